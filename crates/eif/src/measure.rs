//! Checksum and PCRs of an image.
//!
//! `PCR = SHA-384(48 zero bytes || SHA-384(content))`, content being section payloads without their headers (docs/eif.md, section 5). One pass over the file
//! gives everything: PCR1's content is where PCR0's begins, so its hash state is a copy of PCR0's taken at the second ramdisk; only PCR2 needs hashing of its
//! own, and that happens on a second thread (the module `pipeline`). The checksum comes along with reading and costs next to nothing.

use std::fmt;
use std::io::{self, Read};
use std::ops::ControlFlow;

use sha2::{Digest, Sha384};

use crate::error::ReadError;
use crate::format::{CRC_OFFSET, SECTION_HEADER_SIZE, SectionKind};
use crate::image::{Image, Section};
use crate::pipeline::Pipeline;
use crate::read_at::ReadAt;

/// Size of a PCR in bytes: a SHA-384 digest.
pub const PCR_SIZE: usize = 48;
/// How much is read at once, in bytes: small enough to be hashed out of the cache.
pub(crate) const CHUNK_BYTES: usize = 128 * 1024;

/// The value of a platform configuration register. Displayed as 96 lower-case hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Pcr(pub [u8; PCR_SIZE]);

impl Pcr {
    /// The value of a register that nothing was measured into.
    pub const ZERO: Pcr = Pcr([0; PCR_SIZE]);

    /// The PCR of some content held in memory.
    pub fn of(content: &[u8]) -> Pcr {
        Pcr::from_hash(Sha384::new_with_prefix(content))
    }

    /// The PCR of all a reader gives.
    ///
    /// # Errors
    ///
    /// What the reader said.
    pub fn of_reader(reader: &mut impl Read) -> io::Result<Pcr> {
        let mut hash = Sha384::new();
        let mut buffer = vec![0; CHUNK_BYTES];
        loop {
            match reader.read(&mut buffer) {
                Ok(0) => return Ok(Pcr::from_hash(hash)),
                Ok(count) => hash.update(buffer.get(..count).expect("read() returns at most the buffer's length")),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Extends a zero register by the digest of what `hash` has seen.
    pub(crate) fn from_hash(hash: Sha384) -> Pcr {
        let extended = Sha384::new_with_prefix([0; PCR_SIZE]).chain_update(hash.finalize());
        Pcr(extended.finalize().into())
    }
}

impl fmt::Display for Pcr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Pcr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Pcr({self})")
    }
}

impl From<Pcr> for [u8; PCR_SIZE] {
    fn from(pcr: Pcr) -> [u8; PCR_SIZE] {
        pcr.0
    }
}

/// What an image measures to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Measurements {
    /// Kernel, command line and all ramdisks.
    pub pcr0: Pcr,
    /// Kernel, command line and the first ramdisk.
    pub pcr1: Pcr,
    /// All ramdisks but the first.
    pub pcr2: Pcr,
    /// The signing certificate; `None` if the image is not signed, or if its signature section cannot be read
    /// ([`Image::signature`] says why).
    pub pcr8: Option<Pcr>,
}

/// The checksum in the header and the one of the content.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Checksum {
    /// What the header says.
    pub stored: u32,
    /// What the content has.
    pub computed: u32,
}

impl Checksum {
    /// Are they equal?
    pub fn matches(self) -> bool {
        self.stored == self.computed
    }

    /// Makes an error of a difference.
    ///
    /// # Errors
    ///
    /// `ChecksumMismatch`.
    pub fn verify(self) -> Result<(), ReadError> {
        if self.matches() { Ok(()) } else { Err(ReadError::ChecksumMismatch { stored: self.stored, computed: self.computed }) }
    }
}

/// All that one pass over an image finds out; nothing is judged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pass {
    /// The PCRs.
    pub measurements: Measurements,
    /// The checksum.
    pub checksum: Checksum,
}

/// How many threads measure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Threads {
    /// The calling thread alone: every byte from the second ramdisk on is hashed twice, one after the other.
    One,
    /// The calling thread and a helper that lives as long as the call; where no thread is to be had, as `One`.
    Two,
}

/// Called now and then with the number of bytes done; `Break` ends the work with [`ReadError::Cancelled`].
type Progress<'a> = dyn FnMut(u64) -> ControlFlow<()> + 'a;

/// One pass over an image, with its settings; usable from any thread that can reach the image.
pub struct Measurer<'a, S> {
    image: &'a Image<S>,
    threads: Threads,
    progress: Option<Box<Progress<'a>>>,
}

impl<S> fmt::Debug for Measurer<'_, S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Measurer").field("threads", &self.threads).finish_non_exhaustive()
    }
}

impl<'a, S: ReadAt + Sync> Measurer<'a, S> {
    /// A pass over `image`: on two threads, or on one if the machine has no second processor for us.
    pub fn new(image: &'a Image<S>) -> Measurer<'a, S> {
        let alone = std::thread::available_parallelism().is_ok_and(|count| count.get() == 1);
        Measurer { image, threads: if alone { Threads::One } else { Threads::Two }, progress: None }
    }

    /// Sets the number of threads.
    #[must_use]
    pub fn threads(mut self, threads: Threads) -> Measurer<'a, S> {
        self.threads = threads;
        self
    }

    /// Sets what is told about progress, on the calling thread and about every 128 KiB: the number of bytes done so far, of [`Image::end`].
    #[must_use]
    pub fn progress(mut self, progress: impl FnMut(u64) -> ControlFlow<()> + 'a) -> Measurer<'a, S> {
        self.progress = Some(Box::new(progress));
        self
    }

    /// Does the pass.
    ///
    /// # Errors
    ///
    /// `Io`, `Cancelled`.
    pub fn run(mut self) -> Result<Pass, ReadError> {
        let image = self.image;
        let mut application = ApplicationHash::default();
        let mut whole = WholeHash::default();
        let mut done = 0;
        let mut progress = |bytes: usize| {
            done += bytes as u64;
            match self.progress.as_mut().map_or(ControlFlow::Continue(()), |progress| progress(done)) {
                ControlFlow::Continue(()) => Ok(()),
                ControlFlow::Break(()) => Err(ReadError::Cancelled { done }),
            }
        };
        let mut computed = None;
        if self.threads == Threads::Two {
            let pipeline = Pipeline::new(image);
            let helped = std::thread::scope(|scope| {
                let helper = std::thread::Builder::new().name("eif-measure".to_owned()).spawn_scoped(scope, || {
                    pipeline.consume(1, |chunk, bytes| {
                        application.add(chunk, bytes);
                        Ok(())
                    });
                });
                if helper.is_err() {
                    return false; // there is no thread to be had: this one does it all
                }
                pipeline.consume(0, |chunk, bytes| {
                    whole.add(chunk, bytes);
                    progress(bytes.len())
                });
                // A panic of the helper (of the source's reader, that is) becomes ours when the scope ends.
                true
            });
            if helped {
                computed = Some(pipeline.finish()?);
            }
        }
        let computed = match computed {
            Some(computed) => computed,
            None => each_chunk(image, |chunk, bytes| {
                whole.add(chunk, bytes);
                application.add(chunk, bytes);
                progress(bytes.len())
            })?,
        };
        let (pcr0, pcr1) = whole.finish();
        let pcr8 =
            image.signature().ok().flatten().and_then(|signature| signature.certificate().ok()).map(|certificate| certificate.pcr8());
        let measurements = Measurements { pcr0, pcr1, pcr2: application.finish(), pcr8 };
        Ok(Pass { measurements, checksum: Checksum { stored: image.header().crc32, computed } })
    }
}

/// The checksum alone, on the calling thread.
pub(crate) fn checksum<S: ReadAt>(image: &Image<S>) -> Result<Checksum, ReadError> {
    let computed = each_chunk(image, |_, _| Ok(()))?;
    Ok(Checksum { stored: image.header().crc32, computed })
}

/// A piece of an image that is read at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Chunk {
    /// Where it begins, in bytes from the start of the image.
    pub offset: u64,
    /// Its size in bytes, at most [`CHUNK_BYTES`].
    pub size: usize,
    /// What its section holds.
    pub kind: SectionKind,
    /// How many ramdisks came before its section.
    pub ramdisks_before: usize,
    /// How many of its bytes belong to the section's header and are not hashed.
    pub header_size: usize,
}

/// The chunks of an image, section by section in the order of the header's table.
#[derive(Debug)]
pub(crate) struct Plan<'a> {
    sections: std::slice::Iter<'a, Section>,
    current: Option<Chunk>,
    left: u64,
    ramdisks: usize,
}

impl<'a> Plan<'a> {
    pub fn new(sections: &'a [Section]) -> Plan<'a> {
        Plan { sections: sections.iter(), current: None, left: 0, ramdisks: 0 }
    }
}

impl Iterator for Plan<'_> {
    type Item = Chunk;

    fn next(&mut self) -> Option<Chunk> {
        let mut chunk = match self.current {
            Some(previous) if self.left > 0 => Chunk { offset: previous.offset + previous.size as u64, header_size: 0, ..previous },
            _ => {
                let section = self.sections.next()?;
                let ramdisks_before = self.ramdisks;
                self.ramdisks += usize::from(section.kind == SectionKind::Ramdisk);
                self.left = section.end() - section.header_offset;
                Chunk { offset: section.header_offset, size: 0, kind: section.kind, ramdisks_before, header_size: SECTION_HEADER_SIZE }
            }
        };
        chunk.size = usize::try_from(self.left).unwrap_or(CHUNK_BYTES).min(CHUNK_BYTES);
        self.left -= chunk.size as u64;
        self.current = Some(chunk);
        Some(chunk)
    }
}

/// The checksum's state before the first section: the header up to the checksum field.
pub(crate) fn checksum_start<S: ReadAt>(image: &Image<S>) -> crc32fast::Hasher {
    let mut crc = crc32fast::Hasher::new();
    crc.update(image.header_bytes().get(..CRC_OFFSET).expect("the checksum field lies inside the header"));
    crc
}

/// Reads an image chunk by chunk on the calling thread and returns the checksum.
fn each_chunk<S: ReadAt>(image: &Image<S>, mut visit: impl FnMut(Chunk, &[u8]) -> Result<(), ReadError>) -> Result<u32, ReadError> {
    let mut crc = checksum_start(image);
    let mut buffer = vec![0; CHUNK_BYTES];
    for chunk in Plan::new(image.sections()) {
        let bytes = buffer.get_mut(..chunk.size).expect("a chunk is not bigger than the buffer");
        image.source().read_exact_at(bytes, chunk.offset).map_err(ReadError::io("a section", chunk.offset))?;
        crc.update(bytes);
        visit(chunk, bytes)?;
    }
    Ok(crc.finalize())
}

/// The bytes of a chunk that are measured: without the section's header.
fn payload(chunk: Chunk, bytes: &[u8]) -> &[u8] {
    bytes.get(chunk.header_size..).unwrap_or_default()
}

/// PCR0 and PCR1.
#[derive(Default)]
struct WholeHash {
    whole: Sha384,
    /// PCR1's own state, from the second ramdisk on; equal to `whole` before.
    bootstrap: Option<Sha384>,
}

impl WholeHash {
    fn add(&mut self, chunk: Chunk, bytes: &[u8]) {
        if !chunk.kind.is_measured() {
            return;
        }
        let application = chunk.kind == SectionKind::Ramdisk && chunk.ramdisks_before > 0;
        if application {
            self.bootstrap.get_or_insert_with(|| self.whole.clone());
        } else if let Some(bootstrap) = &mut self.bootstrap {
            // A command line behind the second ramdisk: no tool writes that, but the format allows it.
            bootstrap.update(payload(chunk, bytes));
        }
        self.whole.update(payload(chunk, bytes));
    }

    fn finish(self) -> (Pcr, Pcr) {
        let bootstrap = self.bootstrap.unwrap_or_else(|| self.whole.clone());
        (Pcr::from_hash(self.whole), Pcr::from_hash(bootstrap))
    }
}

/// PCR2.
#[derive(Default)]
struct ApplicationHash(Sha384);

impl ApplicationHash {
    fn add(&mut self, chunk: Chunk, bytes: &[u8]) {
        if chunk.kind == SectionKind::Ramdisk && chunk.ramdisks_before > 0 {
            self.0.update(payload(chunk, bytes));
        }
    }

    fn finish(self) -> Pcr {
        Pcr::from_hash(self.0)
    }
}
