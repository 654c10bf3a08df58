//! The PCI configuration space: 256 bytes, what of them can be written, and the capability through which tests steer the device.
//!
//! QEMU asks for all of it once, keeps BARs and the MSI-X table itself, and passes the rest on. Layout: PCI Local Bus Specification 3.0, section 6.1,
//! and the kernel's `include/uapi/linux/pci_regs.h`; our choices: docs/device-pci.md, "Configuration space".

use nitroxide_abi::pci::{BAR, DEVICE_ID, MIN_VECTORS, VENDOR_ID};

use crate::addresses;

/// Bytes of conventional configuration space.
pub const CONFIG_BYTES: u64 = 256;
/// The BAR with the MSI-X table and its pending bits.
pub const MSIX_BAR: u8 = 0;
/// Where in [`MSIX_BAR`] the pending bits are.
pub const PENDING_BITS: u64 = 0x800;

const SIZE: usize = 256;
/// Where the MSI-X capability is.
const MSIX: usize = 0x40;
/// Where the test control is, if it is offered.
pub(crate) const CONTROL: usize = 0x60;
/// Bytes of the test control.
pub(crate) const CONTROL_BYTES: usize = 0x20;

/// Status register: there is a list of capabilities (`PCI_STATUS_CAP_LIST`).
const HAS_CAPABILITIES: u8 = 0x10;
/// Base class "system peripheral", subclass "other" (`PCI_CLASS_SYSTEM_OTHER`).
const CLASS: [u8; 2] = [0x80, 0x08];
/// `PCI_CAP_ID_MSIX` and `PCI_CAP_ID_VNDR`.
const CAP_MSIX: u8 = 0x11;
const CAP_VENDOR: u8 = 0x09;
/// What tells our vendor capability from others: `N`.
pub const CONTROL_MARK: u8 = b'N';

/// Configuration space as bytes with a mask of what can be written.
#[derive(Debug, Clone)]
pub struct Config {
    bytes: [u8; SIZE],
    writable: [u8; SIZE],
}

impl Config {
    /// The space after a reset; `control` offers the test control.
    #[must_use]
    pub fn new(control: bool) -> Self {
        let mut config = Self { bytes: [0; SIZE], writable: [0; SIZE] };
        let [vendor, device] = [VENDOR_ID.to_le_bytes(), DEVICE_ID.to_le_bytes()];
        config.put(0x00, &vendor);
        config.put(0x02, &device);
        config.put(0x06, &[HAS_CAPABILITIES]);
        config.put(0x0A, &CLASS);
        config.put(0x2C, &vendor);
        config.put(0x2E, &device);
        config.put(0x34, &[u8_of(MSIX)]);
        // The table's size counts from zero; its lowest three bits of each offset name the BAR.
        let last_vector = MIN_VECTORS.saturating_sub(1).to_le_bytes();
        let [table, pending] = [u32::from(MSIX_BAR), 0x800 | u32::from(MSIX_BAR)].map(u32::to_le_bytes);
        config.put(MSIX, &[CAP_MSIX, if control { u8_of(CONTROL) } else { 0 }]);
        config.put(MSIX + 2, &last_vector);
        config.put(MSIX + 4, &table);
        config.put(MSIX + 8, &pending);
        if control {
            config.put(CONTROL, &[CAP_VENDOR, 0, u8_of(CONTROL_BYTES), CONTROL_MARK]);
        }
        // Command: memory, bus master, no INTx. Cache line size, interrupt line. MSI-X: function mask, enable.
        for (at, mask) in [(0x04, 0x06), (0x05, 0x04), (0x0C, 0xFF), (0x3C, 0xFF), (MSIX + 3, 0xC0)] {
            if let Some(place) = config.writable.get_mut(at) {
                *place = mask;
            }
        }
        // BARs 0 and 3: 32-bit memory of one page each. QEMU keeps their addresses; what it writes at its start is taken and read back.
        for bar in [MSIX_BAR, BAR] {
            let at = 0x10 + usize::from(bar) * 4;
            for (place, mask) in config.writable.iter_mut().skip(at).zip([0x00, 0xF0, 0xFF, 0xFF]) {
                *place = mask;
            }
        }
        config
    }

    fn put(&mut self, at: usize, bytes: &[u8]) {
        for (place, byte) in self.bytes.iter_mut().skip(at).zip(bytes) {
            *place = *byte;
        }
    }

    /// Reads; what lies beyond the space is zero.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        for (byte, at) in data.iter_mut().zip(addresses(offset)) {
            *byte = usize::try_from(at).ok().and_then(|at| self.bytes.get(at).copied()).unwrap_or(0);
        }
    }

    /// Writes the bits that can be written.
    pub fn write(&mut self, offset: u64, data: &[u8]) {
        for (byte, at) in data.iter().zip(addresses(offset)) {
            let Ok(at) = usize::try_from(at) else { return };
            if let (Some(place), Some(mask)) = (self.bytes.get_mut(at), self.writable.get(at)) {
                *place = (*place & !mask) | (byte & mask);
            }
        }
    }
}

/// Offsets in a space of 256 bytes.
const fn u8_of(value: usize) -> u8 {
    assert!(value < SIZE, "an offset in configuration space");
    #[expect(clippy::cast_possible_truncation, reason = "asserted above")]
    let value = value as u8;
    value
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read<const N: usize>(config: &Config, offset: u64) -> [u8; N] {
        let mut data = [0xAA; N];
        config.read(offset, &mut data);
        data
    }

    #[test]
    fn it_is_the_nitro_enclaves_device_with_two_vectors() {
        let config = Config::new(false);
        assert_eq!(read(&config, 0), [0x0F, 0x1D, 0xC1, 0xE4]);
        let capability = read::<12>(&config, u64::from(read::<1>(&config, 0x34)[0]));
        assert_eq!(capability, [0x11, 0, 1, 0, 0, 0, 0, 0, 0, 8, 0, 0]);
    }

    #[test]
    fn the_control_is_the_last_capability_and_only_there_when_asked_for() {
        let config = Config::new(true);
        let next = read::<2>(&config, 0x40)[1];
        assert_eq!(read(&config, next.into()), [0x09, 0, 0x20, b'N']);
    }

    #[test]
    fn only_writable_bits_change() {
        let mut config = Config::new(false);
        config.write(0, &[0xFF; 256]);
        assert_eq!(read(&config, 0), [0x0F, 0x1D, 0xC1, 0xE4, 0x06, 0x04, 0x10, 0x00]);
        assert_eq!(read(&config, 0x10), [0x00, 0xF0, 0xFF, 0xFF, 0, 0, 0, 0]);
        assert_eq!(read(&config, 0x1C), [0x00, 0xF0, 0xFF, 0xFF]);
        assert_eq!(read(&config, 0x42), [1, 0xC0]);
        config.write(0, &[0; 256]);
        assert_eq!(read(&config, 0x10), [0; 4]);
    }

    #[test]
    fn accesses_beyond_the_space_are_zero_and_change_nothing() {
        let mut config = Config::new(true);
        config.write(254, &[1; 8]);
        config.write(u64::MAX - 1, &[1; 8]);
        assert_eq!(read(&config, 254), [0; 8]);
        assert_eq!(read(&config, u64::MAX - 1), [0; 8]);
    }
}
