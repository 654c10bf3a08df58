//! What is told about an enclave: its description while it exists, its report when it has ended.
//!
//! [`Description`] has nitro-cli's field names and values, then ours. All of these travel as JSON through [`control`](crate::control).

use std::fmt;

use nitroxide_eif::Measurements;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::stage::StageTime;

/// What nitro-cli prints as the algorithm behind the measurements.
pub const HASH_ALGORITHM: &str = "Sha384 { ... }";

/// One enclave as `describe-enclaves` shows it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Description {
    /// The name given to it, unique in its world.
    pub enclave_name: String,
    /// `i-0000000000000000-enc<slot uid in hex>`.
    #[serde(rename = "EnclaveID")]
    pub enclave_id: String,
    /// The enclave process.
    #[serde(rename = "ProcessID")]
    pub process_id: u32,
    /// Its CID.
    #[serde(rename = "EnclaveCID")]
    pub enclave_cid: u32,
    /// How many vCPUs it has.
    #[serde(rename = "NumberOfCPUs")]
    pub number_of_cpus: u32,
    /// The parent's CPUs it was given, ascending.
    #[serde(rename = "CPUIDs")]
    pub cpu_ids: Vec<u32>,
    /// Its memory in MiB.
    #[serde(rename = "MemoryMiB")]
    pub memory_mib: u64,
    /// Where it is in its life.
    pub state: State,
    /// Whether it is in debug mode.
    pub flags: Flags,
    /// The image's measurements; none before they are computed and for an engine without a VM.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub measurements: Option<HexMeasurements>,
    /// The image's name, if its metadata says one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image_name: Option<String>,
    /// The image's version, if its metadata says one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image_version: Option<String>,
    /// The rest of the image's metadata, if it has any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub metadata: Option<Value>,
    /// Ours: how it ended; none while it runs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exit: Option<EndReport>,
    /// Ours: what executes it and how that is confined, in words; empty before it runs.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub engine: String,
    /// Ours: what protects it from the parent's owner.
    #[serde(default)]
    pub isolation: Isolation,
    /// Ours: what its owner should know, in whole sentences.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<String>,
    /// Ours: when it reached which stage.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub stages: Vec<StageTime>,
}

/// What protects an enclave from the owner of its parent, as NE_QUERY names it (docs/abi.md).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum Isolation {
    /// Nothing: the user who runs it can read its memory. For development and tests.
    #[default]
    None,
    /// The hypervisor below the parent.
    Hypervisor,
}

/// Where an enclave is in its life, in nitro-cli's words.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
#[non_exhaustive]
pub enum State {
    /// It does not run yet.
    Empty,
    /// It runs.
    Running,
    /// It has ended, and its owner has not let go of it yet.
    Terminating,
}

/// Whether an enclave is in debug mode, in nitro-cli's words.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum Flags {
    /// Its console can be read from CID 0 and its attested measurements are zero.
    DebugMode,
    /// Neither.
    None,
}

/// Measurements as text.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HexMeasurements {
    /// [`HASH_ALGORITHM`].
    #[serde(rename = "HashAlgorithm")]
    pub hash_algorithm: String,
    /// Kernel, command line and all ramdisks: 96 hex digits, as the others.
    #[serde(rename = "PCR0")]
    pub pcr0: String,
    /// Kernel, command line and first ramdisk.
    #[serde(rename = "PCR1")]
    pub pcr1: String,
    /// The other ramdisks.
    #[serde(rename = "PCR2")]
    pub pcr2: String,
    /// The signing certificate, for a signed image.
    #[serde(rename = "PCR8", default, skip_serializing_if = "Option::is_none")]
    pub pcr8: Option<String>,
}

impl From<&Measurements> for HexMeasurements {
    fn from(measurements: &Measurements) -> Self {
        Self {
            hash_algorithm: HASH_ALGORITHM.to_owned(),
            pcr0: measurements.pcr0.to_string(),
            pcr1: measurements.pcr1.to_string(),
            pcr2: measurements.pcr2.to_string(),
            pcr8: measurements.pcr8.map(|pcr| pcr.to_string()),
        }
    }
}

/// How deeply what metadata say may be nested to be shown. JSON parsers have a limit (`serde_json`: 128 levels), and a description, which wraps the
/// metadata in more levels than an image does, must stay below it: nobody could describe or end the enclave otherwise.
const METADATA_LEVELS: usize = 64;

/// The image's metadata as `describe-enclaves --metadata` shows it: the builder's words, Docker's, and the user's own keys beside them.
///
/// What is nested more than 64 levels deep is left out.
#[must_use]
pub fn metadata_value(metadata: &nitroxide_eif::Metadata) -> Value {
    let mut all = match serde_json::to_value(&metadata.build_metadata) {
        Ok(Value::Object(build)) => build,
        _ => Map::new(),
    };
    all.insert("DockerInfo".to_owned(), shallow(&metadata.docker_info, METADATA_LEVELS));
    if let Value::Object(custom) = &metadata.custom_metadata {
        for (key, value) in custom {
            all.entry(key.clone()).or_insert_with(|| shallow(value, METADATA_LEVELS));
        }
    }
    Value::Object(all)
}

/// A copy in which a list or object more than `levels` deep is a word about it.
fn shallow(value: &Value, levels: usize) -> Value {
    match (value, levels.checked_sub(1)) {
        (Value::Array(_) | Value::Object(_), None) => Value::String("(nested too deeply to be shown)".to_owned()),
        (Value::Array(items), Some(left)) => items.iter().map(|item| shallow(item, left)).collect(),
        (Value::Object(fields), Some(left)) => fields.iter().map(|(key, field)| (key.clone(), shallow(field, left))).collect(),
        (plain, _) => plain.clone(),
    }
}

/// How an enclave ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct EndReport {
    /// Why.
    pub reason: EndReason,
    /// More about it, for people; often empty.
    pub detail: String,
    /// What the guest's init said about its application, if it did.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub application: Option<ApplicationExit>,
    /// The last of the console, at most 8 KiB.
    pub console_tail: String,
}

/// Why an enclave ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum EndReason {
    /// The guest powered itself off.
    PoweredOff,
    /// The guest rebooted, which is how AWS's init ends.
    Rebooted,
    /// The guest's kernel panicked.
    Panicked,
    /// It was stopped from outside.
    Stopped,
    /// The engine failed; the detail says how.
    EngineFailed,
    /// The enclave process itself vanished.
    ProcessLost,
}

impl fmt::Display for EndReason {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::PoweredOff => "powered off",
            Self::Rebooted => "rebooted",
            Self::Panicked => "its kernel panicked",
            Self::Stopped => "stopped",
            Self::EngineFailed => "the engine failed",
            Self::ProcessLost => "the enclave process was lost",
        })
    }
}

/// How the application inside an enclave ended, as the guest's init tells it on port 9001 of the parent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum ApplicationExit {
    /// It exited with this code.
    Exited(u8),
    /// It was killed by this signal.
    Signalled(u8),
}

impl ApplicationExit {
    /// Reads the two bytes that init sends: kind (1 exited, 2 signalled) and code. `None` for another kind.
    #[must_use]
    pub fn from_bytes(bytes: [u8; 2]) -> Option<Self> {
        match bytes {
            [1, code] => Some(Self::Exited(code)),
            [2, signal] => Some(Self::Signalled(signal)),
            _ => None,
        }
    }

    /// The status a shell would show: the code, or 128 and the signal.
    #[must_use]
    pub fn shell_status(self) -> u8 {
        match self {
            Self::Exited(code) => code,
            Self::Signalled(signal) => signal.saturating_add(128),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn init_s_two_bytes_are_kind_and_code() {
        assert_eq!(ApplicationExit::from_bytes([1, 42]), Some(ApplicationExit::Exited(42)));
        assert_eq!(ApplicationExit::from_bytes([2, 9]).map(ApplicationExit::shell_status), Some(137));
        assert_eq!(ApplicationExit::from_bytes([0, 0]), None);
        assert_eq!(ApplicationExit::from_bytes([3, 0]), None);
    }

    #[test]
    fn words_are_nitro_cli_s() {
        assert_eq!(serde_json::to_string(&Flags::DebugMode).unwrap(), "\"DEBUG_MODE\"");
        assert_eq!(serde_json::to_string(&Flags::None).unwrap(), "\"NONE\"");
        assert_eq!(serde_json::to_string(&State::Terminating).unwrap(), "\"TERMINATING\"");
    }

    /// Metadata whose own text is as deeply nested as the parser of images takes.
    fn deepest_metadata() -> nitroxide_eif::Metadata {
        let parse = |depth: usize| {
            let mut metadata = serde_json::to_string(&nitroxide_eif::Metadata::new("n", "v")).unwrap();
            metadata = metadata.replace("\"DockerInfo\":null", &format!("\"DockerInfo\":{}{}", "[".repeat(depth), "]".repeat(depth)));
            serde_json::from_str(&metadata)
        };
        (1..1000).map_while(|depth| parse(depth).ok()).last().unwrap()
    }

    #[test]
    fn a_description_can_be_read_however_deeply_the_metadata_is_nested() {
        let shown = metadata_value(&deepest_metadata());
        let answer = serde_json::json!({ "protocol": 1, "answer": { "description": { "Metadata": shown } } });
        let read: Value = serde_json::from_slice(&serde_json::to_vec(&answer).unwrap()).unwrap();
        assert_eq!(read, answer);
    }

    #[test]
    fn metadata_of_ordinary_depth_are_shown_whole() {
        let info = serde_json::json!({ "Config": { "Env": ["A=1"], "Labels": { "a": [[[{ "b": null }]]] } } });
        let metadata = nitroxide_eif::Metadata { docker_info: info.clone(), ..nitroxide_eif::Metadata::new("n", "v") };
        assert_eq!(metadata_value(&metadata).get("DockerInfo"), Some(&info));
    }
}
