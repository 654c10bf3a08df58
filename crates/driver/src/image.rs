//! Where an image goes in the enclave's memory.
//!
//! Order of checks: docs/driver.md, "GET_IMAGE_LOAD_INFO".

use nitroxide_abi::{flags, limits};

use crate::error::ImageLoadInfoError;
use crate::{Enclave, State};

/// NE_GET_IMAGE_LOAD_INFO, as it can be answered without the enclave at hand.
#[inline]
pub(crate) fn image_load_info(state: State, image_flags: u64) -> Result<u64, ImageLoadInfoError> {
    state.must_be_init(ImageLoadInfoError::NotInit)?;
    if image_flags == 0 || image_flags >= flags::IMAGE_LOAD_MAX_FLAG_VAL {
        return Err(ImageLoadInfoError::BadFlags);
    }
    Ok(limits::EIF_OFFSET)
}

impl<P, R> Enclave<P, R> {
    /// Bytes from the start of the enclave's memory to the image, for an image of the kind that `image_flags` names.
    ///
    /// Any holder of the descriptor may ask, as often as it likes; neither the device is asked, nor is a call waited for that is under way.
    ///
    /// # Errors
    ///
    /// 270 past `Init` (this comes before the flags, other than for memory and start); 274 for anything but an EIF.
    pub fn image_load_info(&self, image_flags: u64) -> Result<u64, ImageLoadInfoError> {
        image_load_info(self.summary.state, image_flags)
    }
}
