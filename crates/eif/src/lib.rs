//! Enclave images: read, verify, measure, build.
