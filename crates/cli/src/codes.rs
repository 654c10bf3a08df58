//! The E-codes: E00 to E60 with the meanings that AWS's nitro-cli documents, so that scripts keep working; from E61 on our own.
//!
//! [`ErrorCode`] is one of them; the exit status of a failed command is its number. The texts are ours; `nitroxide explain` shows them.

use std::{fmt, str::FromStr};

/// One of the codes. Displayed as `E29`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ErrorCode(u8);

/// What is known about a code.
#[derive(Debug, Clone, Copy)]
pub struct Meaning {
    /// A few words.
    pub title: &'static str,
    /// When it comes and what to do about it.
    pub text: &'static str,
}

macro_rules! codes {
    ($( $number:literal $name:ident $title:literal $text:literal; )*) => {
        #[expect(dead_code, reason = "the table is complete, while some codes describe nitro-cli's own innards and are only explained here")]
        impl ErrorCode {
            $( #[doc = $title] pub const $name: Self = Self($number); )*
        }
        const MEANINGS: &[Meaning] = &[ $( Meaning { title: $title, text: $text }, )* ];
    };
}

codes! {
    0 UNSPECIFIED "Unspecified error" "Something failed that has no code of its own. The message says what; please report it if it does not help.";
    1 MISSING_ARGUMENT "Missing argument" "The command needs an argument that was not given. `nitroxide help COMMAND` lists them with examples.";
    2 CONFLICTING_ARGUMENTS "Conflicting arguments" "Two of the arguments exclude each other, e.g. --cpu-count and --cpu-ids. Leave one out.";
    3 INVALID_ARGUMENT "Invalid argument" "An argument's value is not one that the command understands, e.g. an enclave CID below 4, or a memory size that is not a number of MiB. The message names it.";
    4 SOCKET_PAIR "Socket pair failure" "The connection to the background process could not be made; usually the limit of open files is reached (`ulimit -n`).";
    5 SPAWN "Process not started" "A process could not be started: the limit of processes is reached (`ulimit -u`), or the program was removed while it ran.";
    6 DAEMONIZE "Background process failure" "The background process that owns an enclave could not detach from the terminal.";
    7 READ_DISK "Runtime directory not usable" "The directory with the state of running enclaves cannot be used. It must belong to you and have mode 0700; NITROXIDE_RUNTIME_DIR chooses another.";
    8 UNUSABLE_CONNECTION "Unusable connection" "The connection to the process of an enclave broke off. `describe-enclaves` shows whether it still runs.";
    9 SOCKET_CLOSE "Socket not closed" "A socket could not be closed in order.";
    10 CONNECT_TIMEOUT "No answer in time" "The process of an enclave accepted the connection but did not answer in time. The machine may be overloaded; try again.";
    11 SOCKET "Socket failure" "A socket failed in a way that has no code of its own; the message has the system's reason.";
    12 EPOLL "Waiting for events failed" "The system refused to wait for several events at once (epoll).";
    13 INOTIFY "Watching files failed" "The system refused to watch a file (inotify); its limits are in /proc/sys/fs/inotify.";
    14 INVALID_COMMAND "Unknown command" "There is no such command. `nitroxide help` lists all of them.";
    15 LOCK "Lock failure" "A lock inside the program is broken because a thread failed while holding it. That is a bug; please report it.";
    16 THREAD_JOIN "Thread failed" "A thread ended with a failure. That is a bug; please report it.";
    17 SERDE "Malformed data" "JSON or another encoded text is not what it should be, usually in the file given with --config. The message has line and column.";
    18 FILE_PERMISSIONS "File permissions" "The permissions of a file could not be set or are not what they must be.";
    19 FILE_OPERATION "File operation failed" "A file could not be opened, read or written. The message names it. On a real instance without the nitro_enclaves driver it is the driver's CPU pool file.";
    20 CPU_CONFIGURATION "CPU configuration" "The CPUs of this machine, or the pool among them that enclaves may use, could not be understood.";
    21 CPU_NOT_IN_POOL "CPU not in the pool" "A CPU of --cpu-ids is not in the CPU pool or belongs to another enclave. `nitroxide doctor` shows the pool.";
    22 INSUFFICIENT_CPUS "Not enough CPUs" "The pool has fewer free CPUs than --cpu-count asks for. End other enclaves, make the pool larger, or ask for fewer.";
    23 MALFORMED_CPU_ID "Malformed CPU id" "An entry of --cpu-ids is not a CPU number, or stands there twice.";
    24 CPU "CPU failure" "The state of a CPU could not be read or changed.";
    25 NO_SUCH_HUGEPAGE_SIZE "Unknown huge page size" "There is no flag for huge pages of this size.";
    26 INSUFFICIENT_MEMORY_REQUESTED "Too little memory requested" "The enclave's memory cannot hold its image: an enclave has at least 64 MiB, and on a real instance four times the image is the rule. Give more with --memory.";
    27 INSUFFICIENT_MEMORY_AVAILABLE "Not enough memory available" "The machine has not enough memory (on a real instance: huge pages) for the enclave. Ask for less with --memory, or reserve more.";
    28 INVALID_ENCLAVE_FD "Invalid enclave descriptor" "The driver returned something that is no file descriptor.";
    29 IOCTL "The driver refused" "A call to the Nitro Enclaves driver failed. The message has the driver's own code, e.g. NE_ERR_NO_CPUS_AVAIL_IN_POOL, and what it means.";
    30 IOCTL_IMAGE_LOAD_INFO "Image load information refused" "The driver did not say where the image belongs in memory. (Kept for compatibility: E29 is what is raised.)";
    31 IOCTL_MEMORY_REGION "Memory region refused" "The driver did not take a memory region. (Kept for compatibility: E29 is what is raised.)";
    32 IOCTL_VCPU "vCPU refused" "The driver did not add a vCPU. (Kept for compatibility: E29 is what is raised.)";
    33 IOCTL_START "Start refused" "The driver did not start the enclave. (Kept for compatibility: E29 is what is raised.)";
    34 MEMORY_OVERFLOW "Memory overflow" "Sizes or addresses of memory regions are too large to be added up.";
    35 EIF_PARSING "Not an enclave image" "The file is not an enclave image (EIF), or it is damaged. `nitroxide describe-eif` says where.";
    36 BOOT "The enclave did not boot" "The enclave was started, but ended or did not answer before its heartbeat. `nitroxide run` shows its console; more memory often helps.";
    37 EVENT_WAIT "Waiting for the enclave failed" "The end of an enclave could not be waited for.";
    38 NOT_EXECUTED "Command not executed" "The process of the enclave did not carry the command out.";
    39 ENCLAVE_PROCESS_CONNECTION "No connection to the enclave's process" "The process of the enclave cannot be reached, or ended before it had answered. `describe-enclaves` shows what runs.";
    40 SOCKET_PATH "Socket path" "The path of a socket is not usable, e.g. because it is too long.";
    41 SEND_REPLY "Reply not sent" "A reply could not be sent to the command that asked.";
    42 MMAP "Memory not mapped" "The system did not give memory for the enclave or the image.";
    43 MUNMAP "Memory not given back" "The system did not take memory back.";
    44 CONSOLE_CONNECT "No console" "The console can only be attached when the enclave runs in debug mode (--debug-mode). Without it, `nitroxide logs` shows what a local enclave has printed.";
    45 CONSOLE_READ "Console not readable" "The enclave's console broke off while it was read.";
    46 CONSOLE_WRITE "Console not writable" "What the enclave's console printed could not be written to standard output.";
    47 INTEGER_PARSE "Not a number" "A text that must be a number is none.";
    48 EIF_BUILD "Image not built" "The enclave image could not be built.";
    49 DOCKER_BUILD "Container image not built" "The container image that the enclave image is made of could not be built.";
    50 DOCKER_PULL "Container image not found" "The container image that the enclave image is made of could not be fetched.";
    51 ARTIFACTS_PATH "NITRO_CLI_ARTIFACTS" "The directory for intermediate files is not set or cannot be used.";
    52 BLOBS_PATH "NITRO_CLI_BLOBS" "The directory with the kernel and init for enclave images is not set or cannot be used.";
    53 CLOCK_SKEW "Clock" "The machine's clock gives no sensible time.";
    54 SIGNAL_MASK "Signal mask" "Signals could not be blocked.";
    55 SIGNAL_UNMASK "Signal mask" "Signals could not be unblocked.";
    56 LOGGER "Logger" "The log could not be opened or written.";
    57 HASHER "Measurement failed" "The measurements (PCRs) of a file could not be computed.";
    58 NAMING "No such enclave" "No running enclave has this name or id, or the name cannot be used. `nitroxide describe-enclaves` lists them.";
    59 EIF_SIGNATURE "Signature of the image" "The image's signature is not valid for its content or certificate.";
    60 EIF_SIGNING "Image not signed" "The image could not be signed; certificate and private key must belong together (P-256, P-384 or P-521).";
    61 ATTESTATION "Attestation document not verified" "The document is not genuine below a trusted root, has expired, or does not say what was expected. The message names the check and the certificate.";
    62 PKI "Local PKI not usable" "The root and the keys that local attestation documents hang from cannot be read, written or replaced. They are in $XDG_DATA_HOME/nitroxide/pki, else ~/.local/share/nitroxide/pki; the message names the file and what to do.";
}

impl ErrorCode {
    /// The exit status of a command that failed with this code: its number, and 1 for E00, since 0 would be success.
    pub fn exit_status(self) -> u8 {
        self.0.max(1)
    }

    /// Title and text.
    pub fn meaning(self) -> Meaning {
        MEANINGS.get(usize::from(self.0)).copied().unwrap_or(Meaning { title: "Unknown", text: "" })
    }

    /// All codes, ascending.
    #[cfg(test)]
    pub fn all() -> impl Iterator<Item = Self> {
        (0..).zip(MEANINGS).map(|(number, _)| Self(number))
    }
}

impl fmt::Display for ErrorCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "E{:02}", self.0)
    }
}

impl FromStr for ErrorCode {
    type Err = String;

    /// Reads `E29`, `e29` or `29`.
    fn from_str(text: &str) -> Result<Self, String> {
        let digits = text.strip_prefix(['E', 'e']).unwrap_or(text);
        let number = if digits.len() <= 2 { digits.parse::<u8>().ok() } else { None };
        number
            .map(Self)
            .filter(|code| usize::from(code.0) < MEANINGS.len())
            .ok_or_else(|| format!("`{text}` is not a code; they are E00 to E{:02}", MEANINGS.len() - 1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_are_61_codes_of_nitro_cli_and_two_of_ours_and_each_has_a_text() {
        assert_eq!(ErrorCode::all().count(), 61 + 2);
        assert!(ErrorCode::all().all(|code| !code.meaning().title.is_empty() && code.meaning().text.ends_with(['.', ')'])));
    }

    #[test]
    fn constants_have_the_documented_numbers() {
        let expected = [
            (ErrorCode::IOCTL, "E29"),
            (ErrorCode::BOOT, "E36"),
            (ErrorCode::CONSOLE_CONNECT, "E44"),
            (ErrorCode::EIF_SIGNING, "E60"),
            (ErrorCode::ATTESTATION, "E61"),
            (ErrorCode::PKI, "E62"),
            (ErrorCode::INVALID_ARGUMENT, "E03"),
        ];
        for (code, text) in expected {
            assert_eq!(code.to_string(), text);
            assert_eq!(text.parse(), Ok(code));
        }
    }

    #[test]
    fn codes_are_read_with_and_without_letter_and_others_are_refused() {
        assert_eq!("e7".parse(), Ok(ErrorCode::READ_DISK));
        assert_eq!("07".parse(), Ok(ErrorCode::READ_DISK));
        for wrong in ["E63", "", "E", "E-1", "E029", "EE1", "+1x"] {
            assert!(wrong.parse::<ErrorCode>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn exit_status_is_the_number_but_never_success() {
        assert_eq!(ErrorCode::IOCTL.exit_status(), 29);
        assert_eq!(ErrorCode::UNSPECIFIED.exit_status(), 1);
    }
}
