//! The user's world of local enclaves, for commands.

use nitroxide_world::{OpenError, World};

use crate::{codes::ErrorCode, failure::Failure};

/// Opens the world; the directory is made when it is missing.
pub fn open() -> Result<World, Failure> {
    World::open_default().map_err(unusable)
}

/// Why not.
pub fn unusable(error: OpenError) -> Failure {
    Failure::new(ErrorCode::READ_DISK, "The runtime directory cannot be used").because(error)
}
