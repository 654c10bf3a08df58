//! What tests share: the unpacked kernel and QEMU, static guest programs, initramfs images.
