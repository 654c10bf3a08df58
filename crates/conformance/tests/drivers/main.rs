//! The C driver and our module in virtual machines: what both say ([`transcripts`], [`shapes`]), what only one of them does ([`weaknesses`], [`module`]),
//! and many calls at once ([`stress`]).
//!
//! One program, so that tests that wait for a device leave the CPUs to others.

#![cfg(feature = "core")]

mod machines;
mod module;
mod shapes;
mod stress;
mod transcripts;
mod vsock;
mod weaknesses;
