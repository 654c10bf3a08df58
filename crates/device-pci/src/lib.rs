//! The Nitro Enclaves device as a PCI device for virtual machines, served over vfio-user.
#![forbid(unsafe_code)]
