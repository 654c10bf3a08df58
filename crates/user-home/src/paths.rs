//! The files by which clients find the driver: which path is one ([`Shown::of`]), and what stat and access say of it. Pure, but for looking up where a
//! relative path begins.

use std::fs;
use std::os::unix::ffi::OsStrExt as _;

use crate::caller::Caller;

/// A file that is there only for clients.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Shown {
    /// The device.
    Device,
    /// The CPU pool, read only.
    Pool,
    /// The device that tells the parent's CID.
    Vsock,
    /// How many huge pages nobody has: clients look before they map.
    FreePages,
    /// How many there are.
    AllPages,
    /// The instance's id, where nitro-cli looks for it.
    AssetTag,
}

/// Where they are.
const FILES: [(&[u8], Shown); 6] = [
    (b"/dev/nitro_enclaves", Shown::Device),
    (b"/dev/vsock", Shown::Vsock),
    (b"/sys/module/nitro_enclaves/parameters/ne_cpus", Shown::Pool),
    (b"/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages", Shown::FreePages),
    (b"/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages", Shown::AllPages),
    (b"/sys/devices/virtual/dmi/id/board_asset_tag", Shown::AssetTag),
];

/// Major and minor number of the device: a miscellaneous device, with the minor that container tools give its node.
const DEVICE_NUMBER: (u32, u32) = (10, 122);
/// Those of `/dev/vsock`: its minor is any that is free.
const VSOCK_NUMBER: (u32, u32) = (10, 121);

/// What a path is relative to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Base {
    /// The working directory.
    WorkingDirectory,
    /// The directory behind a descriptor.
    Descriptor(i32),
}

impl Base {
    /// From the first argument of an `*at` call.
    pub(crate) fn from_argument(argument: u64) -> Self {
        let number = low_signed(argument);
        if number == libc::AT_FDCWD { Self::WorkingDirectory } else { Self::Descriptor(number) }
    }

    fn path(self, thread: i32) -> Option<Vec<u8>> {
        let link = match self {
            Self::WorkingDirectory => format!("/proc/{thread}/cwd"),
            Self::Descriptor(number) => format!("/proc/{thread}/fd/{number}"),
        };
        Some(fs::read_link(link).ok()?.as_os_str().as_bytes().to_vec())
    }
}

/// The low half of an argument, as the kernel takes an `int`.
pub(crate) fn low_signed(argument: u64) -> i32 {
    low(argument).cast_signed()
}

/// The low half of an argument.
pub(crate) fn low(argument: u64) -> u32 {
    u32::try_from(argument & 0xFFFF_FFFF).unwrap_or(0)
}

impl Shown {
    /// Which file a path in a caller's memory names, if it is one of ours.
    ///
    /// Links are not followed, so a link to the device names nothing that is there.
    pub(crate) fn of(caller: &Caller<'_>, base: Base, address: u64) -> Option<Self> {
        let path = caller.path(address).ok()?;
        Self::of_path(&path, || base.path(caller.thread).filter(|_| caller.is_waiting()))
    }

    /// The same for a path that was read; `base` is asked only if its last part fits and it does not begin at the root.
    fn of_path(path: &[u8], base: impl FnOnce() -> Option<Vec<u8>>) -> Option<Self> {
        if !FILES.iter().any(|(ours, _)| last_part(ours) == last_part(path)) {
            return None;
        }
        let whole = if path.starts_with(b"/") { path.to_vec() } else { [base()?.as_slice(), b"/", path].concat() };
        let whole = normal(&whole);
        FILES.iter().find(|(ours, _)| *ours == whole.as_slice()).map(|(_, shown)| *shown)
    }

    /// Whether the caller may open it so: the errno if not. `flags` are open's.
    pub(crate) fn may_open(self, flags: u64) -> Result<(), i32> {
        let flags = low_signed(flags);
        let is_set = |bits: i32| flags & bits == bits;
        if is_set(libc::O_CREAT | libc::O_EXCL) {
            return Err(libc::EEXIST);
        }
        if is_set(libc::O_DIRECTORY) {
            return Err(libc::ENOTDIR);
        }
        // The pool is set by the options of `exec`: a client's write could not be told that it is wrong.
        let writes = flags & libc::O_ACCMODE != libc::O_RDONLY || is_set(libc::O_TRUNC);
        if !self.is_device() && writes && !is_set(libc::O_PATH) { Err(libc::EACCES) } else { Ok(()) }
    }

    /// What access() answers: the errno if not 0.
    pub(crate) fn access(self, mode: u32) -> Result<(), i32> {
        const EXECUTE: u32 = 1;
        const WRITE: u32 = 2;
        match mode {
            8.. => Err(libc::EINVAL),
            mode if mode & EXECUTE != 0 => Err(libc::EACCES),
            mode if mode & WRITE != 0 && !self.is_device() => Err(libc::EACCES),
            _ => Ok(()),
        }
    }

    /// Of a device, its numbers.
    fn number(self) -> Option<(u32, u32)> {
        match self {
            Self::Device => Some(DEVICE_NUMBER),
            Self::Vsock => Some(VSOCK_NUMBER),
            _ => None,
        }
    }

    fn is_device(self) -> bool {
        self.number().is_some()
    }

    fn mode(self) -> u32 {
        match self {
            Self::Device | Self::Vsock => libc::S_IFCHR | 0o666,
            Self::Pool | Self::AllPages => libc::S_IFREG | 0o644,
            Self::FreePages | Self::AssetTag => libc::S_IFREG | 0o444,
        }
    }

    /// sysfs says a page, whatever is in the file.
    fn size(self) -> u64 {
        if self.is_device() { 0 } else { 4096 }
    }

    /// A number of the file in its file system: one that no other file there is likely to have.
    fn inode(self) -> u64 {
        match self {
            Self::Device => 0x6E65_0001,
            Self::Pool => 0x6E65_0002,
            Self::FreePages => 0x6E65_0003,
            Self::AllPages => 0x6E65_0004,
            Self::Vsock => 0x6E65_0005,
            Self::AssetTag => 0x6E65_0006,
        }
    }

    /// The directory whose file system it seems to be on.
    pub(crate) fn directory(self) -> &'static str {
        match self {
            Self::Device | Self::Vsock => "/dev",
            _ => "/sys",
        }
    }

    /// `struct stat` of x86-64 (asm/stat.h). `around` is what stat says of [`Self::directory`].
    pub(crate) fn stat(self, around: &Around) -> [u8; 144] {
        let mut bytes = [0; 144];
        put(&mut bytes, 0, &around.device.to_le_bytes());
        put(&mut bytes, 8, &self.inode().to_le_bytes());
        put(&mut bytes, 16, &1_u64.to_le_bytes());
        put(&mut bytes, 24, &self.mode().to_le_bytes());
        if let Some((major, minor)) = self.number() {
            put(&mut bytes, 40, &libc::makedev(major, minor).to_le_bytes());
        }
        put(&mut bytes, 48, &self.size().to_le_bytes());
        put(&mut bytes, 56, &4096_u64.to_le_bytes());
        for time in [72, 88, 104] {
            put(&mut bytes, time, &around.seconds.to_le_bytes());
        }
        bytes
    }

    /// `struct statx` (linux/stat.h).
    pub(crate) fn statx(self, around: &Around) -> [u8; 256] {
        let mut bytes = [0; 256];
        put(&mut bytes, 0, &libc::STATX_BASIC_STATS.to_le_bytes());
        put(&mut bytes, 4, &4096_u32.to_le_bytes());
        put(&mut bytes, 16, &1_u32.to_le_bytes());
        put(&mut bytes, 28, &u16::try_from(self.mode()).unwrap_or(0).to_le_bytes());
        put(&mut bytes, 32, &self.inode().to_le_bytes());
        put(&mut bytes, 40, &self.size().to_le_bytes());
        for time in [64, 96, 112] {
            put(&mut bytes, time, &around.seconds.to_le_bytes());
        }
        if let Some((major, minor)) = self.number() {
            put(&mut bytes, 128, &major.to_le_bytes());
            put(&mut bytes, 132, &minor.to_le_bytes());
        }
        put(&mut bytes, 136, &libc::major(around.device).to_le_bytes());
        put(&mut bytes, 140, &libc::minor(around.device).to_le_bytes());
        bytes
    }
}

/// What the answers have from the directory that the file seems to be in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Around {
    /// `st_dev`.
    pub(crate) device: u64,
    /// Seconds of all three times.
    pub(crate) seconds: i64,
}

fn put(bytes: &mut [u8], offset: usize, value: &[u8]) {
    for (target, source) in bytes.iter_mut().skip(offset).zip(value) {
        *target = *source;
    }
}

fn last_part(path: &[u8]) -> &[u8] {
    path.rsplit(|byte| *byte == b'/').next().unwrap_or_default()
}

/// Without empty parts, `.` and `..`.
fn normal(path: &[u8]) -> Vec<u8> {
    let mut parts: Vec<&[u8]> = Vec::new();
    for part in path.split(|byte| *byte == b'/') {
        match part {
            b"" | b"." => {}
            b".." => {
                parts.pop();
            }
            part => parts.push(part),
        }
    }
    parts.iter().flat_map(|part| [b"/", *part]).flatten().copied().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(path: &str, base: &str) -> Option<Shown> {
        Shown::of_path(path.as_bytes(), || Some(base.as_bytes().to_vec()))
    }

    #[test]
    fn paths_are_found_whichever_way_they_are_written() {
        for path in ["/dev/nitro_enclaves", "//dev//./nitro_enclaves", "/dev/pts/../nitro_enclaves", "/../dev/nitro_enclaves"] {
            assert_eq!(shown(path, "/nowhere"), Some(Shown::Device), "{path}");
        }
        assert_eq!(shown("nitro_enclaves", "/dev"), Some(Shown::Device));
        assert_eq!(shown("../dev/nitro_enclaves", "/tmp"), Some(Shown::Device));
        assert_eq!(shown("parameters/ne_cpus", "/sys/module/nitro_enclaves"), Some(Shown::Pool));
    }

    #[test]
    fn other_paths_are_nobodys() {
        for path in [
            "",
            "/",
            "/dev/null",
            "/dev/nitro_enclaves/",
            "/dev/nitro_enclaves/x",
            "/tmp/nitro_enclaves",
            "/dev/nitro_enclavesx",
            "dev/nitro_enclaves",
        ] {
            assert_eq!(shown(path, "/tmp"), None, "{path}");
        }
        assert_eq!(Shown::of_path(b"nitro_enclaves", || None), None);
    }

    #[test]
    fn the_base_is_not_looked_up_for_paths_of_others() {
        assert_eq!(Shown::of_path(b"some/file", || panic!("looked up")), None);
        assert_eq!(Shown::of_path(b"/dev/nitro_enclaves", || panic!("looked up")), Some(Shown::Device));
    }

    #[test]
    fn opening_and_access_are_refused_as_the_kernel_does() {
        let open = |shown: Shown, flags: i32| shown.may_open(u64::from(flags.cast_unsigned()));
        for flags in [libc::O_RDONLY, libc::O_RDWR | libc::O_CLOEXEC, libc::O_WRONLY | libc::O_TRUNC, libc::O_RDWR | libc::O_CREAT] {
            assert_eq!(open(Shown::Device, flags), Ok(()), "{flags:#o}");
        }
        assert_eq!(open(Shown::Device, libc::O_CREAT | libc::O_EXCL), Err(libc::EEXIST));
        assert_eq!(open(Shown::Device, libc::O_DIRECTORY), Err(libc::ENOTDIR));
        assert_eq!(open(Shown::Pool, libc::O_RDONLY), Ok(()));
        assert_eq!(open(Shown::Pool, libc::O_WRONLY), Err(libc::EACCES));
        assert_eq!(open(Shown::Pool, libc::O_RDWR), Err(libc::EACCES));
        for (mode, device, pool) in [
            (0, Ok(()), Ok(())),
            (4, Ok(()), Ok(())),
            (2, Ok(()), Err(libc::EACCES)),
            (6, Ok(()), Err(libc::EACCES)),
            (1, Err(libc::EACCES), Err(libc::EACCES)),
            (8, Err(libc::EINVAL), Err(libc::EINVAL)),
        ] {
            assert_eq!((Shown::Device.access(mode), Shown::Pool.access(mode)), (device, pool), "{mode}");
        }
    }

    #[test]
    fn stat_has_its_fields_where_the_kernel_has_them() {
        let around = Around { device: libc::makedev(0, 6), seconds: 1_700_000_000 };
        let stat = Shown::Device.stat(&around);
        let word = |offset: usize| u64::from_le_bytes(stat[offset..offset + 8].try_into().unwrap());
        assert_eq!(std::mem::offset_of!(libc::stat, st_rdev), 40);
        assert_eq!(std::mem::offset_of!(libc::stat, st_mode), 24);
        assert_eq!(std::mem::offset_of!(libc::stat, st_mtime), 88);
        assert_eq!(size_of::<libc::stat>(), 144);
        assert_eq!((word(0), word(40), word(88)), (around.device, libc::makedev(10, 122), 1_700_000_000));
        assert_eq!(u32::from_le_bytes(stat[24..28].try_into().unwrap()), libc::S_IFCHR | 0o666);
        let statx = Shown::Pool.statx(&around);
        assert_eq!(std::mem::offset_of!(libc::statx, stx_size), 40);
        assert_eq!(std::mem::offset_of!(libc::statx, stx_mode), 28);
        assert_eq!(std::mem::offset_of!(libc::statx, stx_dev_major), 136);
        assert_eq!(size_of::<libc::statx>(), 256);
        assert_eq!(u64::from_le_bytes(statx[40..48].try_into().unwrap()), 4096);
        assert_eq!(u32::from_le_bytes(statx[140..144].try_into().unwrap()), 6);
    }
}
