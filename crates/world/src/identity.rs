//! Who the parent is: the instance id and the IAM role that its enclaves attest.
//!
//! An enclave's names come from both: [`InstanceId::enclave_id`] is what people see, [`InstanceId::module_id`] what its NSM says. A value of these types
//! has the form that AWS gives it; it does not prove that there is such an instance or role. Registers 3 and 4: docs/nsm.md, "Registers".

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// The instance id where nobody has said another one: nitro-cli's, outside of EC2. Always the same, so that PCR4 is too.
pub const DEFAULT_INSTANCE_ID: &str = "i-0000000000000000";

/// The longest ARN of a role in bytes (IAM's own limit of an ARN).
const MAX_ARN_BYTES: usize = 2048;

/// The parent of an enclave, as attestation knows it.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct ParentIdentity {
    /// The instance.
    pub instance_id: InstanceId,
    /// Its IAM role, if it has one.
    pub role: Option<RoleArn>,
}

/// An instance's id: `i-` and 8 or 17 digits of lower-case hex, or [`DEFAULT_INSTANCE_ID`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct InstanceId(String);

impl Default for InstanceId {
    fn default() -> Self {
        Self(DEFAULT_INSTANCE_ID.to_owned())
    }
}

impl InstanceId {
    /// As it is written.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The id of an enclave of this instance: `-enc` and the slot uid in hex without padding, as nitro-cli shows it.
    #[must_use]
    pub fn enclave_id(&self, slot_uid: u64) -> String {
        format!("{self}-enc{slot_uid:x}")
    }

    /// The name of that enclave's NSM: the same with 16 digits, as in the documents of AWS's devices.
    #[must_use]
    pub fn module_id(&self, slot_uid: u64) -> String {
        format!("{self}-enc{slot_uid:016x}")
    }
}

impl TryFrom<String> for InstanceId {
    type Error = InstanceIdError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<InstanceId> for String {
    fn from(checked: InstanceId) -> Self {
        checked.0
    }
}

impl fmt::Display for InstanceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// `{0}` is no instance id; write `i-` and 8 or 17 digits of lower-case hex, e.g. i-0123456789abcdef0
#[derive(Debug, Clone, PartialEq, Eq, displaydoc::Display, thiserror::Error)]
pub struct InstanceIdError(String);

impl FromStr for InstanceId {
    type Err = InstanceIdError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let is_hex = |digit: u8| digit.is_ascii_digit() || (b'a'..=b'f').contains(&digit);
        let is_ours = |digits: &str| matches!(digits.len(), 8 | 17) && digits.bytes().all(is_hex);
        if text == DEFAULT_INSTANCE_ID || text.strip_prefix("i-").is_some_and(is_ours) {
            Ok(Self(text.to_owned()))
        } else {
            Err(InstanceIdError(text.escape_debug().to_string()))
        }
    }
}

/// The ARN of an IAM role: `arn:<partition>:iam::<12 digits>:role/<path and name>`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct RoleArn(String);

impl RoleArn {
    /// As it is written.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for RoleArn {
    type Error = RoleArnError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<RoleArn> for String {
    fn from(checked: RoleArn) -> Self {
        checked.0
    }
}

impl fmt::Display for RoleArn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// `{text}` is no ARN of an IAM role: {why}; write e.g. arn:aws:iam::123456789012:role/Webserver
#[derive(Debug, Clone, PartialEq, Eq, displaydoc::Display, thiserror::Error)]
pub struct RoleArnError {
    text: String,
    why: &'static str,
}

impl FromStr for RoleArn {
    type Err = RoleArnError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match fault_of_arn(text) {
            None => Ok(Self(text.to_owned())),
            Some(why) => Err(RoleArnError { text: text.escape_debug().to_string(), why }),
        }
    }
}

fn fault_of_arn(text: &str) -> Option<&'static str> {
    if text.len() > MAX_ARN_BYTES {
        return Some("it is longer than 2048 bytes");
    }
    let mut parts = text.splitn(6, ':');
    let mut next = || parts.next().unwrap_or_default();
    let is_word = |word: &str| !word.is_empty() && word.bytes().all(|byte| byte.is_ascii_lowercase());
    let is_partition = |name: &str| name == "aws" || name.strip_prefix("aws-").is_some_and(|rest| rest.split('-').all(is_word));
    if next() != "arn" || !is_partition(next()) {
        return Some("it does not begin with arn: and a partition such as aws");
    }
    if next() != "iam" || !next().is_empty() {
        return Some("its service is not iam, without a region");
    }
    let account = next();
    if account.len() != 12 || !account.bytes().all(|byte| byte.is_ascii_digit()) {
        return Some("its account is not 12 digits");
    }
    let is_of_name = |byte: u8| byte.is_ascii_alphanumeric() || b"+=,.@_-/".contains(&byte);
    // A path is `/` or has something between its first and last slash, among it slashes (IAM's CreateRole, Path): so `role//x` is none.
    let is_name = |name: &str| !name.is_empty() && !name.starts_with('/') && !name.ends_with('/') && name.bytes().all(is_of_name);
    if next().strip_prefix("role/").is_some_and(is_name) { None } else { Some("it does not end with role/ and a role's name") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_names_of_an_enclave_hold_the_same_number() {
        let instance: InstanceId = "i-0123456789abcdef0".parse().unwrap();
        assert_eq!(instance.enclave_id(0xab), "i-0123456789abcdef0-encab");
        assert_eq!(instance.module_id(0xab), "i-0123456789abcdef0-enc00000000000000ab");
        assert_eq!(instance.enclave_id(u64::MAX), instance.module_id(u64::MAX));
        assert_eq!(InstanceId::default().enclave_id(0xab), "i-0000000000000000-encab");
        for name in [instance.enclave_id(0xab), instance.module_id(0xab)] {
            assert_eq!(crate::slot_of_enclave_id(&name), Some(0xab));
        }
    }

    #[test]
    fn instance_ids_have_8_or_17_digits() {
        for right in ["i-1234abcd", "i-0123456789abcdef0", DEFAULT_INSTANCE_ID] {
            assert_eq!(right.parse::<InstanceId>().unwrap().as_str(), right);
        }
        for wrong in
            ["", "i-", "1234abcd", "i-1234abc", "i-1234ABCD", "i-0123456789abcdef", "i-0123456789abcdef01", "i-1234abcg", "i-1234abcd\n"]
        {
            assert!(wrong.parse::<InstanceId>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn roles_are_arns_of_iam_roles() {
        for right in [
            "arn:aws:iam::123456789012:role/Webserver",
            "arn:aws-us-gov:iam::123456789012:role/path/to/a+b=c,d.e@f_g-h",
            "arn:aws-cn:iam::000000000000:role/x",
            "arn:aws-iso-b:iam::000000000000:role/x",
        ] {
            assert_eq!(right.parse::<RoleArn>().unwrap().as_str(), right);
        }
        for (wrong, why) in [
            ("", "begin"),
            ("Webserver", "begin"),
            ("arn:azure:iam::123456789012:role/x", "begin"),
            ("arn:aws-:iam::123456789012:role/x", "begin"),
            ("arn:aws-cn-:iam::123456789012:role/x", "begin"),
            ("arn:aws:s3::123456789012:role/x", "iam"),
            ("arn:aws:iam:eu-west-1:123456789012:role/x", "region"),
            ("arn:aws:iam::12345678901:role/x", "12 digits"),
            ("arn:aws:iam::123456789012:user/x", "role/"),
            ("arn:aws:iam::123456789012:role/", "name"),
            ("arn:aws:iam::123456789012:role//x", "name"),
            ("arn:aws:iam::123456789012:role/x/", "name"),
            ("arn:aws:iam::123456789012:role/a b", "name"),
            ("arn:aws:iam::123456789012:role/a:b", "name"),
            ("arn:aws:iam::123456789012:role/x\n", "name"),
        ] {
            let error = wrong.parse::<RoleArn>().unwrap_err().to_string();
            assert!(error.contains(why), "{wrong}: {error}");
        }
        assert!(format!("arn:aws:iam::123456789012:role/{}", "x".repeat(2048)).parse::<RoleArn>().is_err());
    }
}
