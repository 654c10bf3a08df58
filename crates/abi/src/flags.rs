//! Flags of the mainline structs, and the bounds they are compared with (as numbers, not as masks).

use crate::table::constants;

constants! { u64:
    EIF_IMAGE = 1, "NE_EIF_IMAGE", "ne_image_load_info.flags: the image is an EIF. The only valid value; 0 is not.";
    IMAGE_LOAD_MAX_FLAG_VAL = 2, "NE_IMAGE_LOAD_MAX_FLAG_VAL", "ne_image_load_info.flags: the first value that is refused from above.";
    DEFAULT_MEMORY_REGION = 0, "NE_DEFAULT_MEMORY_REGION", "ne_user_memory_region.flags: memory for the enclave's general use. The only valid value.";
    MEMORY_REGION_MAX_FLAG_VAL = 1, "NE_MEMORY_REGION_MAX_FLAG_VAL", "ne_user_memory_region.flags: the first value that is refused.";
    ENCLAVE_PRODUCTION_MODE = 0, "NE_ENCLAVE_PRODUCTION_MODE", "ne_enclave_start_info.flags: no console, full attestation.";
    ENCLAVE_DEBUG_MODE = 1, "NE_ENCLAVE_DEBUG_MODE", "ne_enclave_start_info.flags: the console can be read, attestation shows zeroed PCRs.";
    ENCLAVE_START_MAX_FLAG_VAL = 2, "NE_ENCLAVE_START_MAX_FLAG_VAL", "ne_enclave_start_info.flags: the first value that is refused.";
}

/// Valid bits of the image-load flags, as NE_QUERY tells them.
pub const IMAGE_LOAD_VALID: u64 = EIF_IMAGE;
/// Valid bits of the memory-region flags, as NE_QUERY tells them.
pub const MEMORY_REGION_VALID: u64 = DEFAULT_MEMORY_REGION;
/// Valid bits of the start flags, as NE_QUERY tells them.
pub const ENCLAVE_START_VALID: u64 = ENCLAVE_DEBUG_MODE;
