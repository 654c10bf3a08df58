//! The commands, one file each: a function that takes the command's arguments and returns nothing or a failure.

pub mod attestation;
pub mod console;
pub mod describe_eif;
pub mod describe_enclaves;
pub mod device;
pub mod doctor;
pub mod exec;
pub mod explain;
pub mod generate;
pub mod pcr;
pub mod run;
pub mod run_enclave;
pub mod sign_eif;
pub mod terminate;
pub mod vsock;
pub mod wait;
