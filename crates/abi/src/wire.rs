//! How structs become bytes and back without `unsafe`: the macro behind every struct of this crate.
//!
//! A struct made by `wire_struct!` is `repr(C)`, has only fields of fixed size in an order that leaves no hidden padding
//! (checked when it is compiled), and knows its own fields ([`Field`]), from which the C header and the layout tests are made.

/// One field of a wire struct, as the C header needs to know it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Field {
    /// The field's name, the same in C.
    pub name: &'static str,
    /// Bytes from the start of the struct.
    pub offset: usize,
    /// Bytes of the whole field.
    pub size: usize,
    /// The C type of one element, e.g. `__u64`.
    pub c_type: &'static str,
    /// Elements of an array; 0 for a plain value.
    pub elements: usize,
    /// The lines of its documentation.
    pub doc: &'static [&'static str],
}

/// A value that can be a field: integers and arrays of them, little endian.
pub trait Value: Sized {
    /// Bytes on the wire.
    const SIZE: usize;
    /// The C type of one element.
    const C_TYPE: &'static str;
    /// Elements of an array; 0 for a plain value.
    const ELEMENTS: usize;
    /// Writes the value to the first `SIZE` bytes of `bytes`, which has at least that many.
    fn store(&self, bytes: &mut [u8]);
    /// Reads the value from the first `SIZE` bytes of `bytes`; bytes that are missing count as zero.
    fn load(bytes: &[u8]) -> Self;
}

macro_rules! integer_value {
    ($($type:ty => $c_type:literal),*) => {$(
        impl Value for $type {
            const SIZE: usize = core::mem::size_of::<$type>();
            const C_TYPE: &'static str = $c_type;
            const ELEMENTS: usize = 0;
            #[inline]
            fn store(&self, bytes: &mut [u8]) {
                if let Some(target) = bytes.first_chunk_mut() {
                    *target = self.to_le_bytes();
                }
            }
            #[inline]
            fn load(bytes: &[u8]) -> Self {
                if let Some(whole) = bytes.first_chunk() {
                    return <$type>::from_le_bytes(*whole);
                }
                let mut value = [0; core::mem::size_of::<$type>()];
                for (target, source) in value.iter_mut().zip(bytes) {
                    *target = *source;
                }
                <$type>::from_le_bytes(value)
            }
        }
    )*};
}
integer_value!(u8 => "__u8", u16 => "__u16", u32 => "__u32", i32 => "__s32", u64 => "__u64");

impl<T: Value + Copy + Default, const N: usize> Value for [T; N] {
    const SIZE: usize = T::SIZE * N;
    const C_TYPE: &'static str = T::C_TYPE;
    const ELEMENTS: usize = N;
    fn store(&self, bytes: &mut [u8]) {
        for (value, target) in self.iter().zip(bytes.chunks_mut(T::SIZE)) {
            value.store(target);
        }
    }
    fn load(bytes: &[u8]) -> Self {
        let mut values = [T::default(); N];
        for (value, source) in values.iter_mut().zip(bytes.chunks(T::SIZE)) {
            *value = T::load(source);
        }
        values
    }
}

/// Defines a wire struct: `name = "c_name", size in bytes`, then its fields.
macro_rules! wire_struct {
    (
        $(#[doc = $doc:literal])*
        pub struct $name:ident = $c_name:literal, $size:literal {
            $( $(#[doc = $field_doc:literal])* pub $field:ident: $type:ty, )*
        }
    ) => {
        $(#[doc = $doc])*
        #[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
        #[repr(C)]
        pub struct $name {
            $( $(#[doc = $field_doc])* pub $field: $type, )*
        }

        impl $name {
            /// Bytes on the wire.
            pub const SIZE: usize = $size;
            /// The struct's name in C.
            pub const C_NAME: &'static str = $c_name;
            /// The lines of its documentation.
            pub const DOC: &'static [&'static str] = &[$($doc),*];
            /// Its fields, in order.
            pub const FIELDS: &'static [$crate::wire::Field] = &[$(
                $crate::wire::Field {
                    name: stringify!($field),
                    offset: core::mem::offset_of!($name, $field),
                    size: <$type as $crate::wire::Value>::SIZE,
                    c_type: <$type as $crate::wire::Value>::C_TYPE,
                    elements: <$type as $crate::wire::Value>::ELEMENTS,
                    doc: &[$($field_doc),*],
                },
            )*];

            /// The struct as it stands on the wire, little endian.
            #[must_use]
            #[inline]
            pub fn to_bytes(&self) -> [u8; $size] {
                let mut bytes = [0; $size];
                $(
                    if let Some(target) = bytes.get_mut(core::mem::offset_of!($name, $field)..) {
                        $crate::wire::Value::store(&self.$field, target);
                    }
                )*
                bytes
            }

            /// The struct that these bytes stand for; every byte pattern is one, nothing is checked.
            #[must_use]
            #[inline]
            pub fn from_bytes(bytes: &[u8; $size]) -> Self {
                Self { $(
                    $field: <$type as $crate::wire::Value>::load(
                        bytes.get(core::mem::offset_of!($name, $field)..).unwrap_or(&[]),
                    ),
                )* }
            }

            /// As [`Self::from_bytes`], from a window of any length: the first bytes are used, and if there are too few, none.
            #[must_use]
            pub fn from_prefix(window: &[u8]) -> Option<Self> {
                window.first_chunk::<$size>().map(Self::from_bytes)
            }
        }

        // No hidden padding: the fields fill the struct, so that bytes and memory are the same thing on a little-endian host.
        const _: () = {
            assert!(core::mem::size_of::<$name>() == $size);
            assert!(0 $( + <$type as $crate::wire::Value>::SIZE )* == $size);
        };
    };
}
pub(crate) use wire_struct;
