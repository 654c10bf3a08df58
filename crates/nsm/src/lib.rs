//! The Nitro Secure Module: PCRs, CBOR messages, and the virtio-nsm device as a vhost-user backend.
