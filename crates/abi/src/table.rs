//! Named numbers as tables: the macros that define a constant once and also list it, for the C header and for tests.

/// One named number of the interface, as the C header needs it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Constant {
    /// The C name.
    pub name: &'static str,
    /// The value.
    pub value: u64,
    /// What it means, one sentence or more.
    pub text: &'static str,
}

/// One command, as the C header needs it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Command {
    /// The C name.
    pub name: &'static str,
    /// The full 32-bit word.
    pub word: u32,
    /// The C type that the word's size stands for; empty for a word without one.
    pub c_type: &'static str,
    /// What it does, one sentence or more.
    pub text: &'static str,
}

/// Defines constants of one type, each with its C name, and `ALL`, the table of them.
macro_rules! constants {
    ($type:ty: $( $name:ident = $value:expr, $c_name:literal, $text:literal; )*) => {
        $( #[doc = concat!($c_name, ": ", $text)] pub const $name: $type = $value; )*
        /// All constants of this module, for the C header.
        pub const ALL: &[$crate::table::Constant] = &[ $(
            $crate::table::Constant { name: $c_name, value: $name as u64, text: $text },
        )* ];
    };
}
pub(crate) use constants;

/// Defines command words (direction, number, size in bytes, C type), and `COMMANDS`, the table of them.
macro_rules! commands {
    ($( $name:ident = $direction:expr, $number:literal, $size:expr, $c_name:literal, $c_type:literal, $text:literal; )*) => {
        $( #[doc = concat!($c_name, ": ", $text)] pub const $name: u32 = $crate::ioctl::word($direction, $number, $size); )*
        /// All commands of this module, for the C header.
        pub const COMMANDS: &[$crate::table::Command] = &[ $(
            $crate::table::Command { name: $c_name, word: $name, c_type: $c_type, text: $text },
        )* ];
    };
}
pub(crate) use commands;
