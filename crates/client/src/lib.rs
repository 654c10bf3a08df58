//! A safe client of any /dev/nitro_enclaves: the real device file, or driver and device in process.
