//! `describe-enclaves`: the running enclaves of this user, as nitro-cli shows them.

use nitroxide_enclave::control;
use serde_json::Value;

use crate::{Dialect, arguments::DescribeEnclavesArguments, codes::ErrorCode, failure::Failure, output, target, world};

/// What only `--metadata` shows.
const METADATA: [&str; 3] = ["ImageName", "ImageVersion", "Metadata"];
/// What nitro-cli does not have.
const OURS: [&str; 4] = ["Exit", "Engine", "Isolation", "Notes"];

/// Prints an array, `[]` for none.
pub fn run(arguments: &DescribeEnclavesArguments, dialect: Dialect) -> Result<(), Failure> {
    let world = world::open()?;
    let mut enclaves = Vec::new();
    for description in control::list(&world).map_err(target::failure)? {
        let value = serde_json::to_value(description)
            .map_err(|error| Failure::new(ErrorCode::SERDE, "An enclave cannot be described").because(error))?;
        enclaves.push(shown(value, arguments.metadata, dialect));
    }
    output::json(&enclaves)
}

fn shown(mut enclave: Value, with_metadata: bool, dialect: Dialect) -> Value {
    if let Value::Object(fields) = &mut enclave {
        // For benchmarks, through the control socket.
        fields.remove("Stages");
        for name in METADATA.iter().filter(|_| !with_metadata).chain(OURS.iter().filter(|_| dialect == Dialect::NitroCli)) {
            fields.remove(*name);
        }
    }
    enclave
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn metadata_is_shown_on_request_and_our_own_fields_not_to_nitro_clis_users() {
        let enclave = json!({ "EnclaveName": "a", "ImageName": "i", "Engine": "QEMU", "Isolation": "none", "Stages": [] });
        assert_eq!(shown(enclave.clone(), false, Dialect::Nitroxide), json!({ "EnclaveName": "a", "Engine": "QEMU", "Isolation": "none" }));
        assert_eq!(shown(enclave, true, Dialect::NitroCli), json!({ "EnclaveName": "a", "ImageName": "i" }));
    }
}
