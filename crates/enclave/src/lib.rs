//! The enclave process: image, engine, NSM, vsock, console, control.
