//! Every limit of the device in one place; `docs/vsock.md` explains them to users.

use std::time::Duration;

/// Connections of one guest at a time, in either direction, those that still shake hands or drain included.
pub const CONNECTIONS: usize = 4096;

/// Receive buffer of one connection in bytes (data from the guest that the host has not taken yet); Linux's own default is the same.
pub const BUFFER_BYTES: u32 = 256 * 1024;

/// Receive buffer of a connection in bytes once [`BUFFER_BUDGET_BYTES`] is promised away.
pub const BUFFER_BYTES_MIN: u32 = 8 * 1024;

/// How many bytes of receive buffers the connections of one guest are promised together, before new ones get [`BUFFER_BYTES_MIN`] each.
pub const BUFFER_BUDGET_BYTES: u64 = 64 * 1024 * 1024;

/// A new connection gets at most this part of what is left of the budget.
pub const BUFFER_BUDGET_SHARE: u64 = 8;

/// Payload of one packet to the guest in bytes, at most (Linux's `VIRTIO_VSOCK_MAX_PKT_BUF_SIZE`).
pub const PACKET_BYTES: usize = 64 * 1024;

/// Descriptors (or pieces at borders of memory regions) in one chain; no driver comes near it.
pub const SEGMENTS: usize = 1024;

/// Resets that wait for a free buffer of the guest; when so many wait, its packets wait too.
pub const RESETS_QUEUED: usize = 1024;

/// Chains that are finished before the used ring is written and the guest's wish for an interrupt is asked.
pub const BATCH: usize = 16;

/// Rounds of work before other threads and the host's events get a turn.
pub const ROUNDS: usize = 16;

/// Length of the lines `CONNECT <port>\n`, `PREPARE <port>\n` and `OK <number>\n` in bytes, at most: the longest has 19.
pub const HANDSHAKE_BYTES: usize = 32;

/// How long a program of the host may take for its line, and again for the stream that it hands over after `PREPARE`.
pub const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);

/// How long the guest may take to accept or refuse a connection.
pub const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);

/// How long the other end of a connection of the guest may take for its answer line, where the router has asked it.
pub const ASKING_TIMEOUT: Duration = Duration::from_secs(10);

/// How long the guest may take to confirm the end of a connection; afterwards it is forgotten.
pub const CLOSE_TIMEOUT: Duration = Duration::from_secs(10);

/// How long to wait before accepting again when the process has no free descriptor.
pub const ACCEPT_RETRY: Duration = Duration::from_millis(100);
