//! The Nitro Enclaves driver core: every check, the accounting and the states; no_std, no allocation, no I/O.
