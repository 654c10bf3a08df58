//! How a parent VM is set up: the text file [`PLACE`] in its initramfs, one step per line.
//!
//! `module NAME PARAMETERS` loads `/modules/NAME.ko`; `run COMMAND` runs a line with `sh -c`. An unknown line is reported and left out.

/// Where the plan lies in the initramfs.
pub const PLACE: &str = "/etc/nitroxide-parent";

/// One step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// Load the module of this name with these parameters.
    Module {
        /// Its name: the file is `/modules/<name>.ko`.
        name: String,
        /// As insmod(8) takes them, e.g. `ne_cpus=1-2`; often empty.
        parameters: String,
    },
    /// Run this line with `sh -c`.
    Run(String),
}

impl Step {
    /// The step as its line, without line end.
    pub fn to_line(&self) -> String {
        match self {
            Self::Module { name, parameters } => format!("module {name} {parameters}"),
            Self::Run(line) => format!("run {line}"),
        }
    }

    /// Reads a line.
    ///
    /// # Errors
    ///
    /// The line, where it is no step.
    pub fn from_line(line: &str) -> Result<Self, &str> {
        match line.split_once(' ') {
            Some(("module", rest)) => {
                let (name, parameters) = rest.split_once(' ').unwrap_or((rest, ""));
                let is_name = !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_-".contains(&byte));
                if is_name { Ok(Self::Module { name: name.to_owned(), parameters: parameters.trim().to_owned() }) } else { Err(line) }
            }
            Some(("run", rest)) => Ok(Self::Run(rest.to_owned())),
            _ => Err(line),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_are_read_as_they_were_written() {
        let module = |name: &str, parameters: &str| Step::Module { name: name.to_owned(), parameters: parameters.to_owned() };
        for step in [module("vsock", ""), module("nitro_enclaves", "ne_cpus=1-2"), Step::Run("echo a > /b".to_owned())] {
            assert_eq!(Step::from_line(&step.to_line()), Ok(step));
        }
    }

    #[test]
    fn other_lines_are_refused() {
        for line in ["", "module", "module ../x", "reboot now", "module  x"] {
            assert_eq!(Step::from_line(line), Err(line));
        }
    }
}
