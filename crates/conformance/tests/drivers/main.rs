//! The C driver and our module in virtual machines: what both say ([`transcripts`], [`shapes`]), and what only one of them does ([`weaknesses`]).
//!
//! One program, so that tests that wait for a device leave the CPUs to others.

#![cfg(feature = "core")]

mod machines;
mod shapes;
mod transcripts;
mod weaknesses;
