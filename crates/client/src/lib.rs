//! A safe client of any `/dev/nitro_enclaves`: the real device file, or driver and device in process.
//!
//! [`Device::open`] gives one of two things with the same interface: a *host* device is the machine's own device file, reached by mainline's five
//! ioctls, with huge pages for memory; a *local* device is the driver core and the device model in this process, which needs nothing from
//! the machine and no privilege. `docs/client.md` shows both, and what each error means.
//!
//! ```
//! use nitroxide_client::{Device, LocalOptions};
//! use nitroxide_device::testing::NullLauncher;
//! # use nitroxide_world::World;
//!
//! # let directory = tempfile::tempdir()?;
//! # let world = World::open(&directory.path().join("world"))?;
//! // A device that starts nothing; `Device::open(DeviceChoice::Auto(options))` takes the machine's own, or a local one that does.
//! let options = LocalOptions { pool: "1-4".to_owned(), world: Some(world), ..LocalOptions::default() };
//! let device = Device::local_with(&options, |_memory| std::sync::Arc::new(NullLauncher::default()))?;
//!
//! let image = b"an enclave image";
//! let mut memory = device.allocate_memory(64 << 20)?;
//! memory.write_image(&mut &image[..], 16)?;
//!
//! let mut enclave = device.create_enclave()?;
//! enclave.add_memory(memory)?; // the content is taken now
//! let cpu = enclave.add_vcpu(None)?;
//! let cid = enclave.start(None, false)?;
//! println!("enclave {} runs on CPU {cpu} with CID {cid}", enclave.slot_uid());
//! assert!(!enclave.has_ended()?);
//! drop(enclave); // ends it, and everything goes back
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod device;
mod error;
mod host;
mod image;
mod local;
mod options;
mod served;

pub use device::{Device, DeviceKind, Enclave, Memory};
pub use error::{
    AddMemoryError, AddVcpuError, AllocateError, Call, CreateError, ImageLoadInfoError, OpenError, Refused, StartError, WriteImageError,
};
pub use local::memory::{DonatedPages, LocalMemory};
pub use options::{DeviceChoice, LocalOptions, Topology};
pub use served::{ServedDevice, ServedEnclave, ServedMemory};

/// The examples of `docs/client.md`, so that they are compiled.
#[cfg(doctest)]
#[doc = include_str!("../../../docs/client.md")]
struct DocumentationExamples;
