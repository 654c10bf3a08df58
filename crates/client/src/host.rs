//! The host path: the real device file `/dev/nitro_enclaves`, whatever driver stands behind it.
//!
//! Uses mainline's five calls and poll, nothing else. Memory is huge pages of this process, largest first, one
//! NE_SET_USER_MEMORY_REGION per mapping; the driver itself merges what is contiguous within one call. System calls that need `unsafe` are in
//! [`sys`], the choice of pages in [`huge_pages`].

mod huge_pages;
mod sys;

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nitroxide_abi::ioctl::{self, EnclaveStartInfo, ImageLoadInfo, UserMemoryRegion};
use nitroxide_abi::{Cid, Code, CpuId, SlotUid};
use rustix::fs::{FileType, Mode, OFlags};
use rustix::io::Errno;

use crate::error::{Call, Refused};
use crate::image::split;
use crate::{AllocateError, CreateError, OpenError};

/// The device file's usual name.
pub(crate) const DEVICE_FILE: &str = "/dev/nitro_enclaves";

/// An open device file.
#[derive(Debug)]
pub(crate) struct Device {
    file: Arc<OwnedFd>,
    path: PathBuf,
}

impl Device {
    pub(crate) fn open(path: &Path) -> Result<Self, OpenError> {
        let opened = rustix::fs::open(path, OFlags::RDWR | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY, Mode::empty());
        let file = opened.map_err(|errno| match errno {
            // The second: a device node that no driver answers for.
            Errno::NOENT | Errno::NXIO | Errno::NODEV | Errno::NOTDIR => OpenError::NoDeviceFile(path.to_owned()),
            Errno::ACCESS | Errno::PERM => OpenError::NotAllowed(path.to_owned()),
            Errno::ISDIR => OpenError::NotThisDevice(path.to_owned()),
            errno => OpenError::OpenDeviceFile(path.to_owned(), errno.into()),
        })?;
        let stat = rustix::fs::fstat(&file).map_err(|errno| OpenError::OpenDeviceFile(path.to_owned(), errno.into()))?;
        match FileType::from_raw_mode(stat.st_mode) {
            // Under `nitroxide exec` it may be something else than a character device.
            FileType::RegularFile | FileType::Directory | FileType::BlockDevice => Err(OpenError::NotThisDevice(path.to_owned())),
            _ => Ok(Self { file: Arc::new(file), path: path.to_owned() }),
        }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn create_enclave(&self) -> Result<Enclave, CreateError> {
        let mut argument = [0; size_of::<u64>()];
        let file = sys::call_for_descriptor(&self.file, ioctl::CREATE_VM, &mut argument)
            .map_err(|code| CreateError::Refused(Refused::new(Call::CreateVm, code)))?;
        let slot_uid = SlotUid(u64::from_le_bytes(argument));
        if slot_uid == SlotUid(0) {
            return Err(CreateError::NoSlotUid);
        }
        Ok(Enclave { file, slot_uid, memory: Vec::new() })
    }
}

/// Memory for an enclave: huge pages that are still this process's.
#[derive(Debug)]
pub(crate) struct Memory {
    regions: Vec<sys::Mapping>,
    size: u64,
}

impl Memory {
    /// Gets at least `bytes` (a multiple of 2 MiB above zero) of huge pages.
    pub(crate) fn allocate(bytes: u64) -> Result<Self, AllocateError> {
        let sizes = huge_pages::page_sizes().map_err(AllocateError::NoHugePageSizes)?;
        let (pieces, missing) = huge_pages::plan(bytes, &sizes);
        if missing > 0 {
            return Err(too_few(bytes, missing));
        }
        let mut memory = Self { regions: Vec::new(), size: 0 };
        for piece in pieces {
            let length = usize::try_from(piece.bytes).map_err(|_| AllocateError::System(io::ErrorKind::OutOfMemory.into()))?;
            let mapping = sys::Mapping::new(length, piece.page.shift()).map_err(|error| match Errno::from_io_error(&error) {
                // Somebody else was faster, a cgroup has less, or (EFAULT) a page could not be had when it was touched.
                Some(Errno::NOMEM | Errno::FAULT) => too_few(bytes, bytes.saturating_sub(memory.size).max(piece.page.bytes)),
                _ => AllocateError::System(error),
            })?;
            memory.size = memory.size.saturating_add(piece.bytes);
            memory.regions.push(mapping);
        }
        Ok(memory)
    }

    pub(crate) fn size(&self) -> u64 {
        self.size
    }

    pub(crate) fn write_at(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let sizes: Vec<u64> = self.regions.iter().map(region_bytes).collect();
        split(sizes, offset, bytes, |region, offset, part| {
            let start = usize::try_from(offset).ok();
            let range = start.and_then(|start| Some(start..start.checked_add(part.len())?));
            let target = self.regions.get_mut(region).zip(range).and_then(|(region, range)| region.as_mut_slice().get_mut(range));
            target.ok_or(io::ErrorKind::InvalidInput)?.copy_from_slice(part);
            Ok(())
        })
    }
}

fn region_bytes(region: &sys::Mapping) -> u64 {
    u64::try_from(region.bytes()).unwrap_or(u64::MAX)
}

fn too_few(wanted: u64, missing: u64) -> AllocateError {
    const MIB: u64 = 1 << 20;
    AllocateError::NoHugePages { wanted_mib: wanted / MIB, missing_mib: missing.div_ceil(MIB), suggested_pages: wanted.div_ceil(2 * MIB) }
}

/// An enclave of the driver behind the device file. Dropping it closes its descriptor, upon which the driver stops and frees it, and only
/// then unmaps its memory.
#[derive(Debug)]
pub(crate) struct Enclave {
    // Fields are dropped in this order.
    file: OwnedFd,
    slot_uid: SlotUid,
    memory: Vec<sys::Donated>,
}

impl Enclave {
    pub(crate) fn slot_uid(&self) -> SlotUid {
        self.slot_uid
    }

    pub(crate) fn poll_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    pub(crate) fn add_memory(&mut self, memory: Memory) -> Result<(), Refused> {
        for region in memory.regions {
            let request = UserMemoryRegion { flags: 0, memory_size: region_bytes(&region), userspace_addr: region.address() };
            // From the call on the pages may be the enclave's, even if the call fails: a device can refuse the second of two runs.
            self.memory.push(region.donate());
            self.call(Call::SetUserMemoryRegion, ioctl::SET_USER_MEMORY_REGION, &mut request.to_bytes())?;
        }
        Ok(())
    }

    pub(crate) fn image_load_info(&mut self, flags: u64) -> Result<u64, Refused> {
        let mut argument = ImageLoadInfo { flags, memory_offset: 0 }.to_bytes();
        self.call(Call::GetImageLoadInfo, ioctl::GET_IMAGE_LOAD_INFO, &mut argument)?;
        Ok(ImageLoadInfo::from_bytes(&argument).memory_offset)
    }

    pub(crate) fn add_vcpu(&mut self, wanted: CpuId) -> Result<CpuId, Refused> {
        let mut argument = wanted.0.to_le_bytes();
        self.call(Call::AddVcpu, ioctl::ADD_VCPU, &mut argument)?;
        Ok(CpuId(u32::from_le_bytes(argument)))
    }

    pub(crate) fn start(&mut self, flags: u64, enclave_cid: u64) -> Result<Cid, Refused> {
        let mut argument = EnclaveStartInfo { flags, enclave_cid }.to_bytes();
        self.call(Call::StartEnclave, ioctl::START_ENCLAVE, &mut argument)?;
        let cid = EnclaveStartInfo::from_bytes(&argument).enclave_cid;
        // CIDs have 32 bits; a device that answers more has not given one.
        u32::try_from(cid).map(Cid).map_err(|_| Refused::new(Call::StartEnclave, Code::EIO))
    }

    fn call<const SIZE: usize>(&self, call: Call, word: u32, argument: &mut [u8; SIZE]) -> Result<(), Refused> {
        sys::call(&self.file, word, argument).map(|_| ()).map_err(|code| Refused::new(call, code))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_device_file_says_so_and_what_to_use_instead() {
        let error = Device::open(Path::new("/dev/no_such_device")).unwrap_err();
        assert!(matches!(error, OpenError::NoDeviceFile(_)));
        assert_eq!(
            error.to_string(),
            "There is no /dev/no_such_device: this machine has no Nitro Enclaves device, or its driver is not loaded. \
             Use a local device instead (`--device local`)."
        );
    }

    #[test]
    fn other_files_are_not_this_device() {
        let file = tempfile::NamedTempFile::new().unwrap();
        assert!(matches!(Device::open(file.path()), Err(OpenError::NotThisDevice(_))));
        assert!(matches!(Device::open(Path::new("/")), Err(OpenError::NotThisDevice(_))));
    }

    #[test]
    fn device_file_of_something_else_refuses_with_enotty() {
        let device = Device::open(Path::new("/dev/null")).unwrap();
        let error = device.create_enclave().unwrap_err();
        assert_eq!(error.code(), Some(Code::ENOTTY), "{error}");
    }

    #[test]
    fn memory_without_enough_huge_pages_says_how_many_to_reserve() {
        const BYTES: u64 = 1 << 50; // more than any machine has
        match Memory::allocate(BYTES) {
            Err(AllocateError::NoHugePages { wanted_mib, suggested_pages, .. }) => {
                assert_eq!((wanted_mib, suggested_pages), (1 << 30, 1 << 29));
            }
            Err(AllocateError::NoHugePageSizes(_)) => {} // a kernel without huge pages
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn memory_of_huge_pages_is_zero_and_writable_across_regions() {
        const MIB: u64 = 1 << 20;
        let mut memory = match Memory::allocate(8 * MIB) {
            Ok(memory) => memory,
            Err(error) => {
                eprintln!("SKIPPED: {error}");
                return;
            }
        };
        assert!(memory.size() >= 8 * MIB);
        memory.write_at(4 * MIB - 1, b"ab").unwrap();
        assert!(memory.write_at(memory.size() - 1, b"ab").is_err());
        let content: Vec<u8> = memory.regions.iter_mut().flat_map(|region| region.as_mut_slice().to_vec()).collect();
        let written: Vec<usize> = (0..content.len()).filter(|index| content[*index] != 0).collect();
        assert_eq!(written, [(4 << 20) - 1, 4 << 20, content.len() - 1]);
        assert_eq!(memory.regions[0].address() % (2 * MIB), 0);
    }

    #[test]
    fn refused_memory_is_unmapped_with_its_enclave_only() {
        let Ok(memory) = Memory::allocate(2 << 20) else {
            eprintln!("SKIPPED: there is no free huge page");
            return;
        };
        // Not a Nitro Enclaves descriptor, so every call is refused; but a driver might have kept the pages.
        let file = rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()).unwrap();
        let mut enclave = Enclave { file, slot_uid: SlotUid(1), memory: Vec::new() };
        let refused = enclave.add_memory(memory).unwrap_err();
        assert_eq!((refused.call(), refused.code(), enclave.memory.len()), (Call::SetUserMemoryRegion, Code::ENOTTY, 1));
        assert_eq!(enclave.start(0, 0).map_err(|refused| refused.code()), Err(Code::ENOTTY));
        assert_eq!(enclave.add_vcpu(CpuId::ANY).map_err(|refused| refused.code()), Err(Code::ENOTTY));
        assert_eq!(enclave.image_load_info(1).map_err(|refused| refused.code()), Err(Code::ENOTTY));
    }
}
