//! What passed between core and device: [`Recorder`].

use std::collections::VecDeque;

use nitroxide_abi::pci::{Command, Reply};
use nitroxide_driver::{Device, Mailbox, Notice, SendError};

use crate::support::wire::Registers;

/// One command as the core sent it, and what it was told.
#[derive(Clone, Debug, PartialEq)]
pub struct Exchange {
    pub command: Command,
    pub request: Vec<u8>,
    pub outcome: Result<Reply, SendError>,
}

/// A device over registers that remembers every command.
pub struct Recorder {
    pub mailbox: Mailbox<Registers>,
    pub record: VecDeque<Exchange>,
}

impl Device for Recorder {
    fn send(&mut self, command: Command, request: &[u8]) -> Result<Reply, SendError> {
        let outcome = self.mailbox.send(command, request);
        if let Ok(reply) = outcome {
            // The mailbox may lose a reply, but it never takes one for another.
            assert_eq!(Some(reply), self.mailbox.port_mut().last_made, "a reply that belongs to another command");
        }
        self.record.push_back(Exchange { command, request: request.to_vec(), outcome });
        outcome
    }

    fn events_seen(&mut self) -> u64 {
        self.mailbox.events_seen()
    }

    fn now_ns(&mut self) -> u64 {
        self.mailbox.now_ns()
    }

    fn notice(&mut self, notice: &Notice) {
        self.mailbox.notice(notice);
    }
}
