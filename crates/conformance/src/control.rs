//! The test's hand on the device: through the PCI function's test control (docs/device-pci.md, "Test control"), a socket, or none.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead as _, BufReader, Write as _};
use std::os::unix::fs::FileExt as _;
use std::os::unix::net::UnixStream;
use std::str::FromStr;
use std::time::{Duration, Instant};

/// How long a line may take. It only ends hangs.
const PATIENCE: Duration = Duration::from_secs(30);

/// A way to tell the device what to do.
pub trait Control {
    /// Its name in the head of a transcript.
    fn name(&self) -> &'static str;
    /// Sends a line; `false` if it was refused, `None` if there is no control.
    fn line(&mut self, text: &str) -> Option<bool>;
    /// Replies that the device has given, wrapping at 16 bits.
    fn replies(&mut self) -> Option<u16>;
    /// Bytes of memory that slots have.
    fn memory_bytes(&mut self) -> Option<u64>;
}

/// No control: cases that need one are left out.
#[derive(Debug)]
pub struct NoControl;

impl Control for NoControl {
    fn name(&self) -> &'static str {
        "none"
    }
    fn line(&mut self, _text: &str) -> Option<bool> {
        None
    }
    fn replies(&mut self) -> Option<u16> {
        None
    }
    fn memory_bytes(&mut self) -> Option<u64> {
        None
    }
}

/// A socket of whoever has the device in its process: a line is asked, a line answers.
#[derive(Debug)]
pub struct Socket {
    stream: BufReader<UnixStream>,
}

impl Socket {
    /// Connects.
    ///
    /// # Errors
    ///
    /// If nobody listens there.
    pub fn connect(path: &str) -> io::Result<Self> {
        let stream = UnixStream::connect(path)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        Ok(Self { stream: BufReader::new(stream) })
    }

    fn ask<T: FromStr>(&mut self, question: &str) -> Option<T> {
        self.stream.get_mut().write_all(format!("{question}\n").as_bytes()).ok()?;
        let mut answer = String::new();
        self.stream.read_line(&mut answer).ok()?;
        answer.trim_end().parse().ok()
    }
}

impl Control for Socket {
    fn name(&self) -> &'static str {
        "socket"
    }
    fn line(&mut self, text: &str) -> Option<bool> {
        self.ask(text)
    }
    fn replies(&mut self) -> Option<u16> {
        self.ask("replies")
    }
    fn memory_bytes(&mut self) -> Option<u64> {
        self.ask("memory")
    }
}

/// The vendor-specific capability in configuration space.
#[derive(Debug)]
pub struct Pci {
    config: File,
    at: u64,
}

impl Pci {
    /// Finds the Nitro Enclaves device with a test control.
    #[must_use]
    pub fn find() -> Option<Self> {
        fs::read_dir("/sys/bus/pci/devices").ok()?.flatten().find_map(|entry| {
            let is = |name: &str, value: &str| fs::read_to_string(entry.path().join(name)).is_ok_and(|text| text.trim() == value);
            if !is("vendor", "0x1d0f") || !is("device", "0xe4c1") {
                return None;
            }
            let config = OpenOptions::new().read(true).write(true).open(entry.path().join("config")).ok()?;
            let mut at = [0];
            config.read_exact_at(&mut at, 0x34).ok()?;
            // A list of capabilities has at most 48 of them.
            for _ in 0..48 {
                let mut head = [0; 4];
                config.read_exact_at(&mut head, at[0].into()).ok()?;
                if head[0] == 9 && head[3] == b'N' {
                    return Some(Self { config, at: at[0].into() });
                }
                at = [head[1]];
                if at[0] == 0 {
                    break;
                }
            }
            None
        })
    }

    fn read<const N: usize>(&self, offset: u64) -> Option<[u8; N]> {
        let mut bytes = [0; N];
        self.config.read_exact_at(&mut bytes, self.at + offset).ok()?;
        Some(bytes)
    }
}

impl Control for Pci {
    fn name(&self) -> &'static str {
        "pci"
    }

    fn line(&mut self, text: &str) -> Option<bool> {
        for piece in text.as_bytes().chunks(4) {
            let mut word = [0; 4];
            word.iter_mut().zip(piece).for_each(|(to, from)| *to = *from);
            self.config.write_all_at(&word, self.at + 4).ok()?;
        }
        self.config.write_all_at(&1_u32.to_le_bytes(), self.at + 8).ok()?;
        let started = Instant::now();
        loop {
            match i32::from_le_bytes(self.read(12)?) {
                1 if started.elapsed() < PATIENCE => {}
                status => return Some(status == 0),
            }
        }
    }

    fn replies(&mut self) -> Option<u16> {
        let [low, high, ..] = self.read::<4>(20)?;
        Some(u16::from_le_bytes([low, high]))
    }

    fn memory_bytes(&mut self) -> Option<u64> {
        self.read(24).map(u64::from_le_bytes)
    }
}
