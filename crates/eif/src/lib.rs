//! Enclave images (EIF): read, verify, measure, build.
//!
//! An image is a header, then sections: a kernel, its command line, metadata, ramdisks and sometimes a signature. Whoever boots one wants three answers:
//! is it whole (checksum), what is it (PCR0, 1, 2 and 8), and who signed it. [`Image`] gives them from any [`ReadAt`] source with memory that does not grow
//! with the image; nothing in the image is trusted. [`Builder`] makes images, the same bytes for the same input; [`cpio`] makes and reads their ramdisks.
//!
//! The format, our rules where the format is silent, and the limits: `docs/eif.md`.
//!
//! ```
//! # use nitroxide_eif::{Builder, Image, Metadata, cpio::Tree};
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let mut ramdisk = Tree::new();
//! ramdisk.file("init", 0o755, "#!/bin/sh\n")?;
//! let mut file = std::io::Cursor::new(Vec::new()); // or a File
//! Builder::new(b"a bzImage".to_vec(), "console=ttyS0").metadata(Metadata::new("web", "1.0")).ramdisk(ramdisk).write_to(&mut file)?;
//!
//! let image = Image::open(file.into_inner())?;
//! println!("PCR0 {}", image.check_and_measure()?.pcr0);
//! # Ok(())
//! # }
//! ```
#![forbid(unsafe_code)]

pub mod builder;
pub mod certificate;
pub mod cpio;
mod error;
pub mod format;
mod image;
pub mod measure;
pub mod metadata;
mod pipeline;
mod read_at;
mod sign;
pub mod signature;
mod writer;

pub use builder::{BuildError, Builder, Built, Payload};
pub use certificate::{Certificate, CertificateError};
pub use error::{ReadError, ReadErrorKind};
pub use format::{Architecture, Header, SectionHeader, SectionKind};
pub use image::{Image, Section, SectionReader, Warning, measure_file};
pub use measure::{Checksum, Measurements, Measurer, Pass, Pcr};
pub use metadata::{BuildMetadata, Metadata};
pub use read_at::{ReadAt, Window};
pub use sign::{SignError, Signer, sign_file, sign_image};
pub use signature::{Signature, SignatureError};
