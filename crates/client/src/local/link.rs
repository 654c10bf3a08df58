//! The driver core's way to a device in the same process: [`Link`].

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use nitroxide_abi::pci::{Command, Reply};
use nitroxide_driver::{Device, Notice, SendError};
use rustix::time::{ClockId, clock_gettime};

use super::Inner;

/// One user of the device. Any number of them may send at the same time: the device orders what has to be ordered.
pub(crate) struct Link<'a>(pub(crate) &'a Inner);

impl Device for Link<'_> {
    fn send(&mut self, command: Command, request: &[u8]) -> Result<Reply, SendError> {
        if self.0.has_faults.load(Ordering::SeqCst) {
            return self.send_in_time(command, request);
        }
        self.0.device.command(command.number(), request).ok_or(SendError::NoReply)
    }

    fn events_seen(&mut self) -> u64 {
        self.0.bell.rings()
    }

    fn now_ns(&mut self) -> u64 {
        let now = clock_gettime(ClockId::Boottime);
        let seconds = u64::try_from(now.tv_sec).unwrap_or(0);
        seconds.saturating_mul(1_000_000_000).saturating_add(u64::try_from(now.tv_nsec).unwrap_or(0))
    }

    fn notice(&mut self, notice: &Notice) {
        tracing::warn!("{notice}");
    }
}

impl Link<'_> {
    /// Sends a command whose reply may be late or lost, and waits for it as long as a driver of real hardware does.
    fn send_in_time(&self, command: Command, request: &[u8]) -> Result<Reply, SendError> {
        let (sender, receiver) = mpsc::channel();
        let device = Arc::clone(&self.0.device);
        let request = request.to_vec();
        let begin = Instant::now();
        // A thread of its own: after the time limit the command goes on without anybody waiting for it.
        let carry_out = move || {
            // Nobody receives it any more after the time limit.
            let _ = sender.send(device.command(command.number(), &request));
        };
        thread::Builder::new().name("device-command".to_owned()).spawn(carry_out).map_err(|_| SendError::NotSent)?;
        let reply = receiver.recv_timeout(self.0.reply_timeout).ok().flatten();
        reply.ok_or_else(|| {
            thread::sleep(self.0.reply_timeout.checked_sub(begin.elapsed()).unwrap_or(Duration::ZERO));
            self.notice_timeout(command);
            SendError::NoReply
        })
    }

    fn notice_timeout(&self, command: Command) {
        tracing::warn!("{}", Notice::Timeout { command });
    }
}
