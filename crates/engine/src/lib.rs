//! Runs one enclave VM: from memory, vCPUs and a loaded image to an exit reason.
