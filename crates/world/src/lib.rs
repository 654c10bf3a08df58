//! A world: one parent's shared state on disk.
//!
//! A [`World`] is a directory that only its owner can enter. In it lie claims (slots, CIDs, CPUs, memory, names), the control
//! sockets of running enclaves and the meeting points of AF_VSOCK. There is no daemon: a [`Claim`] is a file lock and ends with the
//! process that holds it; whatever a killed process leaves behind changes no answer and is removed by [`World::sweep`].
//!
//! Modules: [`dir`] finds and checks the directory, [`lock`] serialises changes, [`claim`] and [`kinds`] hold what is claimed,
//! [`rendezvous`] the sockets, [`peer`] who is at the other end, [`id`] the enclave's name, [`identity`] the
//! parent's, [`sweep`] the broom.
//! Description with a picture: docs/world.md.
#![forbid(unsafe_code)]

pub mod claim;
pub mod dir;
pub mod id;
pub mod identity;
pub mod kinds;
pub mod lock;
pub mod peer;
pub mod rendezvous;
pub mod sweep;

pub use claim::{Claim, ClaimError, Kind};
pub use dir::{OpenError, World};
pub use id::{enclave_id, slot_of_enclave_id};
pub use identity::{InstanceId, ParentIdentity, RoleArn};
pub use kinds::{CidClaim, NameClaim, SlotClaim};
pub use peer::{VsockAddress, bind_source, peer_address};
pub use rendezvous::{BindError, Endpoint, Listener, Prepared, SocketFile};
pub use sweep::Swept;
