//! The metadata section: name, version and origin of an image, as JSON.
//!
//! Written by builders, shown by describe-eif, measured by nobody: never base a decision on it. Field names are those of AWS's tools (docs/eif.md, section 6).

use serde::{Deserialize, Serialize};

/// What the metadata section says.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Metadata {
    /// Name of the image.
    pub image_name: String,
    /// Version of the image.
    pub image_version: String,
    /// How it was built.
    pub build_metadata: BuildMetadata,
    /// Description of the container image it was built from; null if there was none.
    #[serde(default)]
    pub docker_info: serde_json::Value,
    /// What the user wanted to add; null if nothing.
    #[serde(default)]
    pub custom_metadata: serde_json::Value,
}

/// How an image was built.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct BuildMetadata {
    /// When, as RFC 3339 text. Fixed by default, so that the same input makes the same bytes.
    pub build_time: String,
    /// Name of the program.
    pub build_tool: String,
    /// Version of the program.
    pub build_tool_version: String,
    /// Operating system of the kernel, usually `Linux`.
    pub operating_system: String,
    /// Version of the kernel.
    pub kernel_version: String,
}

/// The build time of an image when nobody says otherwise: the start of time, since the real one would make every build differ.
pub const FIXED_BUILD_TIME: &str = "1970-01-01T00:00:00+00:00";

impl Metadata {
    /// Metadata with the given name and version, the fixed build time and an unknown kernel.
    pub fn new(image_name: impl Into<String>, image_version: impl Into<String>) -> Metadata {
        Metadata {
            image_name: image_name.into(),
            image_version: image_version.into(),
            build_metadata: BuildMetadata {
                build_time: FIXED_BUILD_TIME.into(),
                build_tool: "nitroxide".into(),
                build_tool_version: env!("CARGO_PKG_VERSION").into(),
                operating_system: "Linux".into(),
                kernel_version: "Unknown".into(),
            },
            docker_info: serde_json::Value::Null,
            custom_metadata: serde_json::Value::Null,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn field_names_are_those_of_awss_tools() {
        let text = serde_json::to_string(&Metadata::new("web", "1.2")).unwrap();
        let start =
            r#"{"ImageName":"web","ImageVersion":"1.2","BuildMetadata":{"BuildTime":"1970-01-01T00:00:00+00:00","BuildTool":"nitroxide","#;
        assert!(text.starts_with(start), "{text}");
        assert!(
            text.ends_with(r#""OperatingSystem":"Linux","KernelVersion":"Unknown"},"DockerInfo":null,"CustomMetadata":null}"#),
            "{text}"
        );
    }
}
