//! The registers of BAR 3 as plain bytes: what a driver reads at any width, and what its writes mean.
//!
//! Pure: [`Registers::write`] says what is to be done as an [`Act`] and does nothing of it. Offsets and meaning: `nitroxide_abi::pci`; the
//! decisions on odd accesses: docs/device-pci.md, "Registers". Source: kernel file `drivers/virt/nitro_enclaves/ne_pci_dev.h`.

use nitroxide_abi::pci::{
    COMMAND, DISABLED, ENABLE, ENABLED, EVENT_COUNTER, EventCounter, REPLY, REQUEST, Reply, VERSION, VERSION_ONE, WINDOW_BYTES,
};

use crate::addresses;

/// Bytes of BAR 3: one page.
pub const BAR_BYTES: u64 = 4096;

/// The command register's last byte: the one whose write starts the command.
const COMMAND_LAST: u64 = COMMAND + 3;

/// What a write asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Act {
    /// The device is to be switched on.
    Enable,
    /// Everything is to be freed; until [`Registers::switched_off`] the enable register reads 1.
    Disable,
    /// A command is to be carried out.
    Command {
        /// What stands in the command register.
        number: u32,
        /// What stands in the request window.
        request: Box<[u8; WINDOW_BYTES]>,
    },
}

/// Whether the device is on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Power {
    /// Off, and nothing is given away.
    #[default]
    Off,
    /// On.
    On,
    /// Being switched off: what was given away is coming back.
    Ending,
}

/// The state behind BAR 3.
#[derive(Debug, Clone)]
pub struct Registers {
    power: Power,
    version: [u8; 2],
    command: [u8; 4],
    request: [u8; WINDOW_BYTES],
    reply: [u8; WINDOW_BYTES],
}

impl Default for Registers {
    fn default() -> Self {
        Self { power: Power::Off, version: [0; 2], command: [0; 4], request: [0; WINDOW_BYTES], reply: [0; WINDOW_BYTES] }
    }
}

impl Registers {
    /// Whether the device is on.
    #[must_use]
    pub fn power(&self) -> Power {
        self.power
    }

    /// Reads any number of bytes from anywhere; what is no register is zero.
    pub fn read(&self, offset: u64, data: &mut [u8], counter: EventCounter) {
        data.fill(0);
        let counter = counter.to_register().to_le_bytes();
        for (byte, at) in data.iter_mut().zip(addresses(offset)) {
            *byte = self.read_byte(at, counter);
        }
    }

    fn read_byte(&self, at: u64, counter: [u8; 4]) -> u8 {
        let within =
            |from: u64, bytes: &[u8]| at.checked_sub(from).and_then(|at| usize::try_from(at).ok()).and_then(|at| bytes.get(at).copied());
        if at == ENABLE {
            return if self.power == Power::Off { DISABLED } else { ENABLED };
        }
        // The command register is for writing only: it reads zero.
        within(VERSION, &self.version)
            .filter(|_| at < COMMAND)
            .or_else(|| within(EVENT_COUNTER, &counter))
            .or_else(|| within(REQUEST, &self.request))
            .or_else(|| within(REPLY, &self.reply))
            .unwrap_or(0)
    }

    /// Writes any number of bytes anywhere; what is no register, or only for reading, ignores them.
    ///
    /// A command starts when the last byte of its register is written, so that a driver may write it in pieces from the lowest byte on. One write
    /// asks for one thing at most, except that a wide one can hold version and command: they take effect in the order of their bytes. A command in
    /// the write that switches the device off is dropped.
    #[must_use]
    pub fn write(&mut self, offset: u64, data: &[u8]) -> Option<Act> {
        let mut act = None;
        let mut version_written = false;
        for (&byte, at) in data.iter().zip(addresses(offset)) {
            match at {
                ENABLE => act = self.switch(byte).or(act),
                VERSION..COMMAND => {
                    put(&mut self.version, at - VERSION, byte);
                    version_written = true;
                }
                COMMAND..=COMMAND_LAST => {
                    put(&mut self.command, at - COMMAND, byte);
                    // Nobody could take the answer of a device that this very write switches off.
                    if at == COMMAND_LAST && act != Some(Act::Disable) {
                        act = Some(Act::Command { number: u32::from_le_bytes(self.command), request: Box::new(self.request) });
                    }
                }
                REQUEST..REPLY => put(&mut self.request, at - REQUEST, byte),
                _ => {}
            }
        }
        // Only version 1 can be selected. A driver sees by reading back that another was not.
        if version_written && u16::from_le_bytes(self.version) != VERSION_ONE {
            self.version = [0; 2];
        }
        act
    }

    fn switch(&mut self, byte: u8) -> Option<Act> {
        match (byte, self.power) {
            (DISABLED, Power::On) => {
                self.power = Power::Ending;
                Some(Act::Disable)
            }
            (ENABLED, Power::Off) => {
                self.power = Power::On;
                Some(Act::Enable)
            }
            // Nothing new, or no value of this register. While it ends, it cannot be switched on.
            _ => None,
        }
    }

    /// What was given away is back: the enable register reads 0 from now on, and both windows are empty.
    pub fn switched_off(&mut self) {
        *self = Self::default();
    }

    /// Begins to switch off without a driver's wish (device reset, connection closed); false if there is nothing to end.
    pub fn force_off(&mut self) -> bool {
        let on = self.power == Power::On;
        if on {
            self.power = Power::Ending;
        }
        on
    }

    /// Reads as a device that is still being switched off although it is off already, until [`Registers::switched_off`]; false if it is not off.
    pub fn linger(&mut self) -> bool {
        let off = self.power == Power::Off;
        if off {
            self.power = Power::Ending;
        }
        off
    }

    /// Puts a reply into its window; what stood there before is gone.
    pub fn put_reply(&mut self, reply: &Reply) {
        let bytes = reply.to_bytes();
        self.reply = [0; WINDOW_BYTES];
        for (target, byte) in self.reply.iter_mut().zip(bytes) {
            *target = byte;
        }
    }
}

fn put(bytes: &mut [u8], at: u64, byte: u8) {
    if let Some(place) = usize::try_from(at).ok().and_then(|at| bytes.get_mut(at)) {
        *place = byte;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const NO_EVENTS: EventCounter = EventCounter { replies: 0, events: 0 };

    fn read<const N: usize>(registers: &Registers, offset: u64) -> [u8; N] {
        let mut data = [0xAA; N];
        registers.read(offset, &mut data, NO_EVENTS);
        data
    }

    fn command(number: u32, request: [u8; WINDOW_BYTES]) -> Option<Act> {
        Some(Act::Command { number, request: Box::new(request) })
    }

    #[test]
    fn the_drivers_handshake_is_answered_at_once() {
        let mut registers = Registers::default();
        assert_eq!(registers.write(ENABLE, &[0]), None);
        assert_eq!(read(&registers, ENABLE), [0]);
        assert_eq!(registers.write(VERSION, &[1, 0]), None);
        assert_eq!(read(&registers, VERSION), [1, 0]);
        assert_eq!(registers.write(ENABLE, &[1]), Some(Act::Enable));
        assert_eq!(read(&registers, ENABLE), [1]);
    }

    #[test]
    fn enable_reads_one_until_everything_is_back() {
        let mut registers = Registers::default();
        let _ = registers.write(ENABLE, &[1]);
        assert_eq!(registers.write(ENABLE, &[0]), Some(Act::Disable));
        assert_eq!(registers.write(ENABLE, &[0]), None);
        assert_eq!(registers.write(ENABLE, &[1]), None);
        assert_eq!(read(&registers, ENABLE), [1]);
        registers.switched_off();
        assert_eq!(read(&registers, ENABLE), [0]);
    }

    #[test]
    fn other_versions_read_back_as_zero() {
        let mut registers = Registers::default();
        let _ = registers.write(VERSION, &[2, 0]);
        assert_eq!(read(&registers, VERSION), [0, 0]);
        let _ = registers.write(VERSION, &[1]);
        let _ = registers.write(VERSION + 1, &[0]);
        assert_eq!(read(&registers, VERSION), [1, 0]);
    }

    #[test]
    fn a_command_starts_with_the_last_byte_of_its_register() {
        let mut request = [0; WINDOW_BYTES];
        request[0] = 7;
        for width in [4, 2, 1] {
            let mut registers = Registers::default();
            assert_eq!(registers.write(REQUEST, &[7]), None);
            let number = 10_u32.to_le_bytes();
            let pieces = number.chunks(width).zip((COMMAND..).step_by(width));
            let acts: Vec<_> = pieces.filter_map(|(piece, at)| registers.write(at, piece)).collect();
            assert_eq!(acts, [command(10, request).unwrap()]);
        }
    }

    #[test]
    fn an_eight_byte_write_holds_version_and_command() {
        let mut registers = Registers::default();
        let act = registers.write(0, &[1, 0, 1, 0, 4, 0, 0, 0]);
        assert_eq!(act, command(4, [0; WINDOW_BYTES]));
        assert_eq!(registers.power(), Power::On);
        assert_eq!(read(&registers, VERSION), [1, 0]);
    }

    #[test]
    fn a_command_in_the_write_that_switches_off_does_not_keep_the_device_on() {
        let mut registers = Registers::default();
        let _ = registers.write(ENABLE, &[1]);
        assert_eq!(registers.write(0, &[0, 0, 1, 0, 4, 0, 0, 0]), Some(Act::Disable));
        assert_eq!(registers.power(), Power::Ending);
    }

    #[test]
    fn stale_bytes_of_the_request_stay() {
        let mut registers = Registers::default();
        let _ = registers.write(REQUEST, &[1; 24]);
        let Some(Act::Command { request, .. }) = registers.write(COMMAND, &[4, 0, 0, 0]) else { panic!("no command") };
        assert_eq!(request[..25], [[1; 24].as_slice(), &[0]].concat());
        let _ = registers.write(REQUEST, &[0]);
        let Some(Act::Command { request, .. }) = registers.write(COMMAND, &[4, 0, 0, 0]) else { panic!("no command") };
        assert_eq!(request[..2], [0, 1]);
    }

    #[test]
    fn reply_counter_and_unknown_registers_are_not_written() {
        let mut registers = Registers::default();
        for offset in [REPLY, EVENT_COUNTER, COMMAND + 4, 0x1F0, 0x1FF, BAR_BYTES - 4, u64::MAX - 3] {
            assert_eq!(registers.write(offset, &[0xFF; 4]), None, "{offset:#x}");
        }
        assert_eq!(read::<0x200>(&registers, 0), [0; 0x200]);
        let mut data = [0; 4];
        registers.read(EVENT_COUNTER, &mut data, EventCounter { replies: 0x0102, events: 0x0304 });
        assert_eq!(data, [0x02, 0x01, 0x04, 0x03]);
    }

    #[test]
    fn a_reply_replaces_the_one_before() {
        let mut registers = Registers::default();
        registers.put_reply(&Reply { slot_uid: u64::MAX, ..Reply::default() });
        registers.put_reply(&Reply { rc: -5, ..Reply::default() });
        assert_eq!(read::<16>(&registers, REPLY), [0xFB, 0xFF, 0xFF, 0xFF, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    }

    proptest! {
        /// Any access of any width: reads agree with a plain array of bytes that knows only what is writable.
        #[test]
        fn accesses_of_every_width_agree_with_bytes(accesses in proptest::collection::vec((0_u64..0x220, proptest::collection::vec(any::<u8>(), 0..17)), 0..60)) {
            let mut registers = Registers::default();
            let mut bytes = [0_u8; 0x240];
            for (offset, data) in accesses {
                let _ = registers.write(offset, &data);
                for (byte, at) in data.iter().zip(addresses(offset)) {
                    if (REQUEST..REPLY).contains(&at) {
                        bytes[usize::try_from(at).unwrap()] = *byte;
                    }
                }
                let mut window = [0; WINDOW_BYTES];
                registers.read(REQUEST, &mut window, NO_EVENTS);
                prop_assert_eq!(&window[..], &bytes[0x10..0x100]);
                let mut one = vec![0; data.len()];
                registers.read(offset, &mut one, NO_EVENTS);
                for (byte, at) in one.iter().zip(addresses(offset)) {
                    let mut single = [0];
                    registers.read(at, &mut single, NO_EVENTS);
                    prop_assert_eq!(*byte, single[0]);
                }
            }
        }
    }
}
