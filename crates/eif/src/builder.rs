//! [`Builder`]: an image made from a kernel, a command line, metadata and ramdisks, in one stream.
//!
//! Section order is that of AWS's builder: kernel, cmdline, metadata, ramdisks. The same input makes the same bytes: no clock is read, no host is described.
//! Neighbours: [`cpio::Tree`](crate::cpio::Tree) as a ramdisk; [`Image`](crate::Image) measures the result.

use std::fmt;
use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::path::{Path, PathBuf};

use crate::cpio::{CpioError, Tree};
use crate::format::{self, Architecture, Header, MAX_SECTIONS, SectionKind};
use crate::metadata::Metadata;
use crate::writer::{ImageWriter, Sink};

const COPY_BYTES: usize = 128 * 1024;
/// Kernel, command line, metadata.
const FIXED_SECTIONS: usize = 3;
/// How many ramdisks an image has room for: one entry of the table stays free for a signature.
pub const MAX_RAMDISKS: usize = MAX_SECTIONS - FIXED_SECTIONS - 1;

/// Where a section's content comes from.
pub enum Payload {
    /// Bytes in memory.
    Bytes(Vec<u8>),
    /// A file, read when the image is written.
    File(PathBuf),
    /// A stream, read to its end when the image is written.
    Reader(Box<dyn Read + Send>),
    /// A file tree, written as a cpio archive.
    Tree(Tree),
}

impl fmt::Debug for Payload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Payload::Bytes(bytes) => write!(f, "Bytes({} bytes)", bytes.len()),
            Payload::File(path) => f.debug_tuple("File").field(path).finish(),
            Payload::Reader(_) => f.write_str("Reader"),
            Payload::Tree(_) => f.write_str("Tree"),
        }
    }
}

impl From<Vec<u8>> for Payload {
    fn from(bytes: Vec<u8>) -> Payload {
        Payload::Bytes(bytes)
    }
}

impl From<PathBuf> for Payload {
    fn from(path: PathBuf) -> Payload {
        Payload::File(path)
    }
}

impl From<&Path> for Payload {
    fn from(path: &Path) -> Payload {
        Payload::File(path.into())
    }
}

impl From<Tree> for Payload {
    fn from(tree: Tree) -> Payload {
        Payload::Tree(tree)
    }
}

/// Why an image cannot be built.
#[derive(Debug, thiserror::Error, displaydoc::Display)]
#[non_exhaustive]
pub enum BuildError {
    /// Could not write the image at byte {offset}; check the space and the permissions of the place it is written to.
    Write {
        /// Where, in bytes.
        offset: u64,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// Could not create `{path}`; check that its directory exists and is writable.
    Create {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// Could not read the {kind} from {origin}; check that it exists and is readable.
    Source {
        /// What was to be read.
        kind: SectionKind,
        /// From where.
        origin: String,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// Could not make a ramdisk of the file tree.
    Ramdisk {
        /// Why.
        #[source]
        source: CpioError,
    },
    /// The kernel is empty; name a bzImage (x86_64) or an Image (aarch64).
    EmptyKernel,
    /// The command line has a NUL at byte {at}; leave it out.
    CmdlineHasNul {
        /// Where.
        at: usize,
    },
    /// The {kind} has {size} bytes, more than the limit of {limit}; make it smaller.
    TooBig {
        /// What.
        kind: SectionKind,
        /// Its size in bytes.
        size: u64,
        /// The limit in bytes.
        limit: u64,
    },
    /// There are {count} ramdisks, but an image has room for 28; put several file trees into one.
    TooManyRamdisks {
        /// How many were given.
        count: usize,
    },
}

/// What [`Builder`] has written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Built {
    /// Size of the image in bytes.
    pub size: u64,
    /// Its checksum.
    pub crc32: u32,
}

/// Makes an image. Unsigned; version 4.
#[derive(Debug)]
pub struct Builder {
    kernel: Payload,
    cmdline: Vec<u8>,
    metadata: Metadata,
    ramdisks: Vec<Payload>,
    flags: u16,
    default_memory_bytes: u64,
    default_cpus: u64,
}

impl Builder {
    /// An image for x86_64 with a kernel and its command line (no NUL), without ramdisks, with metadata that says nothing.
    pub fn new(kernel: impl Into<Payload>, cmdline: impl Into<Vec<u8>>) -> Builder {
        Builder {
            kernel: kernel.into(),
            cmdline: cmdline.into(),
            metadata: Metadata::new("", ""),
            ramdisks: Vec::new(),
            flags: 0,
            default_memory_bytes: format::DEFAULT_MEMORY_BYTES,
            default_cpus: format::DEFAULT_CPUS,
        }
    }

    /// Sets the processor the image is for.
    #[must_use]
    pub fn architecture(mut self, architecture: Architecture) -> Builder {
        self.flags = match architecture {
            Architecture::X86_64 => 0,
            Architecture::Aarch64 => format::FLAG_AARCH64,
        };
        self
    }

    /// Sets the memory the image would like to have, in bytes (1 GiB otherwise).
    #[must_use]
    pub fn default_memory_bytes(mut self, bytes: u64) -> Builder {
        self.default_memory_bytes = bytes;
        self
    }

    /// Sets the number of vCPUs the image would like to have (2 otherwise).
    #[must_use]
    pub fn default_cpus(mut self, cpus: u64) -> Builder {
        self.default_cpus = cpus;
        self
    }

    /// Sets the metadata.
    #[must_use]
    pub fn metadata(mut self, metadata: Metadata) -> Builder {
        self.metadata = metadata;
        self
    }

    /// Adds a ramdisk. The first one counts for PCR0 and PCR1, the others for PCR0 and PCR2.
    #[must_use]
    pub fn ramdisk(mut self, ramdisk: impl Into<Payload>) -> Builder {
        self.ramdisks.push(ramdisk.into());
        self
    }

    /// Writes the image to a new file (an existing one is replaced as a whole, once the new one is complete).
    ///
    /// # Errors
    ///
    /// See [`BuildError`]; the file at `path` is as it was before.
    pub fn write_file(self, path: impl AsRef<Path>) -> Result<Built, BuildError> {
        replace_file(path.as_ref(), |file| self.write_to(file))
    }

    /// Writes the image from the stream's current position on, in one go with constant memory, and leaves the position behind it.
    ///
    /// # Errors
    ///
    /// See [`BuildError`]; what was written until then is of no use.
    pub fn write_to(self, out: &mut (impl Write + Seek)) -> Result<Built, BuildError> {
        if let Some(at) = self.cmdline.iter().position(|&byte| byte == 0) {
            return Err(BuildError::CmdlineHasNul { at });
        }
        if self.ramdisks.len() > MAX_RAMDISKS {
            return Err(BuildError::TooManyRamdisks { count: self.ramdisks.len() });
        }
        let metadata = serde_json::to_vec(&self.metadata).expect("strings and JSON values can always be written as JSON");
        within_limit(SectionKind::Cmdline, self.cmdline.len(), format::MAX_CMDLINE_BYTES)?;
        within_limit(SectionKind::Metadata, metadata.len(), format::MAX_METADATA_BYTES)?;

        let mut image = ImageWriter::begin(out)?;
        let mut section = |kind, payload: Payload| image.section(kind, 0, |sink| copy_payload(kind, payload, sink));
        if section(SectionKind::Kernel, self.kernel)? == 0 {
            return Err(BuildError::EmptyKernel);
        }
        section(SectionKind::Cmdline, self.cmdline.into())?;
        section(SectionKind::Metadata, metadata.into())?;
        for ramdisk in self.ramdisks {
            section(SectionKind::Ramdisk, ramdisk)?;
        }
        image.finish(Header {
            magic: format::MAGIC,
            version: format::CURRENT_VERSION,
            flags: self.flags,
            default_memory_bytes: self.default_memory_bytes,
            default_cpus: self.default_cpus,
            reserved: 0,
            num_sections: 0,
            section_offsets: [0; MAX_SECTIONS],
            section_sizes: [0; MAX_SECTIONS],
            unused: 0,
            crc32: 0,
        })
    }
}

fn within_limit(kind: SectionKind, size: usize, limit: u64) -> Result<(), BuildError> {
    let size = size as u64;
    if size > limit { Err(BuildError::TooBig { kind, size, limit }) } else { Ok(()) }
}

fn copy_payload<W: Write>(kind: SectionKind, payload: Payload, sink: &mut Sink<'_, '_, W>) -> Result<(), BuildError> {
    match payload {
        Payload::Bytes(bytes) => sink.put(&bytes),
        Payload::File(path) => {
            let origin = path.display().to_string();
            match File::open(&path) {
                Ok(mut file) => copy_reader(kind, &mut file, &origin, sink),
                Err(source) => Err(BuildError::Source { kind, origin, source }),
            }
        }
        Payload::Reader(mut reader) => copy_reader(kind, &mut reader, "the given stream", sink),
        Payload::Tree(tree) => {
            // Headers of entries are small writes; they are gathered before they become system calls.
            let buffered = io::BufWriter::with_capacity(COPY_BYTES, &mut *sink);
            let ramdisk = |source| BuildError::Ramdisk { source };
            let (buffered, _) = tree.write_to(buffered).map_err(ramdisk)?;
            let flushed = buffered.into_inner().map(drop).map_err(io::IntoInnerError::into_error);
            flushed.map_err(|source| BuildError::Write { offset: 0, source })
        }
    }
}

/// Copies a stream to its end.
pub(crate) fn copy_reader<W: Write>(
    kind: SectionKind,
    reader: &mut impl Read,
    origin: &str,
    sink: &mut Sink<'_, '_, W>,
) -> Result<(), BuildError> {
    let mut buffer = vec![0; COPY_BYTES];
    loop {
        match reader.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(count) => sink.put(buffer.get(..count).expect("read() returns at most the buffer's length"))?,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(source) => return Err(BuildError::Source { kind, origin: origin.into(), source }),
        }
    }
}

/// Lets `write` fill a new file beside `path` and puts it in its place once it is complete; on an error `path` is as it was.
pub(crate) fn replace_file<T, E: From<BuildError>>(path: &Path, write: impl FnOnce(&mut File) -> Result<T, E>) -> Result<T, E> {
    let create = |source| BuildError::Create { path: path.into(), source };
    let mut name = path.file_name().map(std::ffi::OsStr::to_os_string).unwrap_or_default();
    name.push(format!(".{}.part", std::process::id()));
    let part = path.with_file_name(name);
    let mut file = File::create_new(&part).map_err(create)?;
    let result = write(&mut file).and_then(|value| {
        if let Ok(before) = std::fs::metadata(path) {
            file.set_permissions(before.permissions()).map_err(create)?;
        }
        std::fs::rename(&part, path).map_err(create)?;
        Ok(value)
    });
    if result.is_err() {
        // The first error is the one to report.
        let _ = std::fs::remove_file(&part);
    }
    result
}
