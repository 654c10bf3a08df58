//! Flags of the mainline structs, and the bounds they are compared with (as numbers, not as masks).

/// `ne_image_load_info.flags`: the image is an EIF. The only valid value; 0 is not.
pub const EIF_IMAGE: u64 = 1;
/// `ne_image_load_info.flags`: the first value that is refused from above.
pub const IMAGE_LOAD_MAX_FLAG_VAL: u64 = 2;
/// `ne_user_memory_region.flags`: memory for the enclave's general use. The only valid value.
pub const DEFAULT_MEMORY_REGION: u64 = 0;
/// `ne_user_memory_region.flags`: the first value that is refused.
pub const MEMORY_REGION_MAX_FLAG_VAL: u64 = 1;
/// `ne_enclave_start_info.flags`: no console, full attestation.
pub const ENCLAVE_PRODUCTION_MODE: u64 = 0;
/// `ne_enclave_start_info.flags`: the console can be read, attestation shows zeroed PCRs.
pub const ENCLAVE_DEBUG_MODE: u64 = 1;
/// `ne_enclave_start_info.flags`: the first value that is refused.
pub const ENCLAVE_START_MAX_FLAG_VAL: u64 = 2;

/// Valid bits of the image-load flags, as NE_QUERY tells them.
pub const IMAGE_LOAD_VALID: u64 = EIF_IMAGE;
/// Valid bits of the memory-region flags, as NE_QUERY tells them.
pub const MEMORY_REGION_VALID: u64 = 0;
/// Valid bits of the start flags, as NE_QUERY tells them.
pub const ENCLAVE_START_VALID: u64 = ENCLAVE_DEBUG_MODE;
