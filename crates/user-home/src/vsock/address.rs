//! `struct sockaddr_vm` (linux/vm_sockets.h): family at byte 0, port at byte 4, CID at byte 8; 16 bytes. Pure.

use nitroxide_abi::Cid;
use nitroxide_world::VsockAddress;

/// AF_VSOCK.
pub(crate) const FAMILY: u16 = 40;
/// `VMADDR_CID_ANY` and `VMADDR_PORT_ANY`.
pub(crate) const ANY: u32 = u32::MAX;
/// The CID of a parent with enclaves.
pub(crate) const PARENT: u32 = Cid::PARENT.0;
/// `VMADDR_CID_LOCAL`: what the loopback transport gives as its own.
pub(crate) const LOCAL: u32 = 1;
/// `VMADDR_CID_HOST`.
pub(crate) const HOST: u32 = 2;
/// `VMADDR_CID_HYPERVISOR`: where consoles are.
pub(crate) const HYPERVISOR: u32 = 0;

/// What a socket without an address says that it has.
pub(crate) const NONE: VsockAddress = VsockAddress { cid: ANY, port: ANY };

/// Bytes of it.
pub(crate) const BYTES: usize = 16;

/// `VMADDR_FLAG_TO_HOST`, the only flag there is: for guests of a guest, without an effect here.
const TO_HOST: u8 = 1;

/// The address that a program gives; none if its family is another, or a flag unknown.
pub(crate) fn read(bytes: &[u8; BYTES]) -> Option<VsockAddress> {
    let [family_low, family_high, _, _, p0, p1, p2, p3, c0, c1, c2, c3, flags, ..] = *bytes;
    let is_ours = u16::from_le_bytes([family_low, family_high]) == FAMILY && flags & !TO_HOST == 0;
    is_ours.then(|| VsockAddress { cid: u32::from_le_bytes([c0, c1, c2, c3]), port: u32::from_le_bytes([p0, p1, p2, p3]) })
}

/// The address as a program gets it.
pub(crate) fn write(address: VsockAddress) -> [u8; BYTES] {
    let mut bytes = [0; BYTES];
    let family = FAMILY.to_le_bytes().into_iter().chain([0, 0]);
    let whole = family.chain(address.port.to_le_bytes()).chain(address.cid.to_le_bytes());
    for (target, source) in bytes.iter_mut().zip(whole) {
        *target = source;
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_where_the_kernel_has_them() {
        let bytes = write(VsockAddress { cid: 0x0403_0201, port: 0x0807_0605 });
        assert_eq!(bytes, [40, 0, 0, 0, 5, 6, 7, 8, 1, 2, 3, 4, 0, 0, 0, 0]);
        assert_eq!(size_of::<libc::sockaddr_vm>(), BYTES);
        assert_eq!(std::mem::offset_of!(libc::sockaddr_vm, svm_port), 4);
        assert_eq!(std::mem::offset_of!(libc::sockaddr_vm, svm_cid), 8);
        assert_eq!(read(&bytes), Some(VsockAddress { cid: 0x0403_0201, port: 0x0807_0605 }));
    }

    #[test]
    fn other_families_are_no_addresses() {
        assert_eq!(read(&[0; BYTES]), None);
        assert_eq!(read(&[1, 0, 0, 0, 5, 6, 7, 8, 1, 2, 3, 4, 0, 0, 0, 0]), None);
        assert!(read(&[40, 0, 0, 0, 5, 6, 7, 8, 1, 2, 3, 4, 1, 9, 9, 9]).is_some());
        assert_eq!(read(&[40, 0, 0, 0, 5, 6, 7, 8, 1, 2, 3, 4, 2, 0, 0, 0]), None);
        assert_eq!(read(&[40, 1, 0, 0, 5, 6, 7, 8, 1, 2, 3, 4, 0, 0, 0, 0]), None);
    }
}
