//! The Nitro Enclaves interface: ioctl words, structs, codes, the extension, and the PCI device's wire structs.
