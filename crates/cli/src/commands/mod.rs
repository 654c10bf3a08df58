//! The commands, one file each: a function that takes the command's arguments and returns nothing or a failure.

pub mod describe_eif;
pub mod doctor;
pub mod explain;
pub mod generate;
pub mod pcr;
