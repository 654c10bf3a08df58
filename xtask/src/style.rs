//! Style checks that neither rustfmt nor clippy makes, over every file git tracks.
//!
//! A finding is `file:line: what is wrong`; all of them are printed before the step fails.

use std::path::Path;
use std::process::Command;

use miette::{IntoDiagnostic, Result, WrapErr, bail, ensure};

use crate::context::Context;

/// A file longer than this has more than one purpose (CONTRIBUTING.md, `one-purpose-file`); generated files and tests are exempt.
const LONGEST_FILE_LINES: usize = 700;

/// Runs every check.
pub fn run(context: &Context) -> Result<()> {
    let mut findings = Vec::new();
    for file in tracked_files(&context.root)? {
        let Ok(text) = std::fs::read_to_string(context.root.join(&file)) else {
            continue; // not text, or deleted in the working tree
        };
        findings.extend(check_file(&context.root, &file, &text));
    }
    for finding in &findings {
        eprintln!("{finding}");
    }
    ensure!(findings.is_empty(), "{} style findings", findings.len());
    Ok(())
}

fn tracked_files(root: &Path) -> Result<Vec<String>> {
    let output = Command::new("git")
        .args(["ls-files", "-z", "--cached", "--others", "--exclude-standard"])
        .current_dir(root)
        .output()
        .into_diagnostic()
        .wrap_err("Starting git (the style checks look at the files it tracks)")?;
    if !output.status.success() {
        bail!("git ls-files failed: {}", String::from_utf8_lossy(&output.stderr));
    }
    Ok(String::from_utf8_lossy(&output.stdout).split('\0').filter(|name| !name.is_empty()).map(str::to_owned).collect())
}

fn check_file(root: &Path, file: &str, text: &str) -> Vec<String> {
    let mut findings = Vec::new();
    let mut find = |line: usize, what: String| findings.push(format!("{file}:{line}: {what}"));
    if !file.ends_with(".lock") {
        for (number, line) in text.lines().enumerate() {
            for host in registry_hosts() {
                if line.contains(&host) {
                    find(number + 1, format!("names the package registry host {host}; use the machine's own client configuration"));
                }
            }
            for path in machine_paths() {
                if line.contains(&path) {
                    find(number + 1, format!("names {path}, a path of one machine"));
                }
            }
        }
    }
    if file.ends_with(".rs") {
        if !text.lines().take(3).any(|line| line.starts_with("//!") || line.starts_with("#!")) {
            find(1, "does not begin with `//!` lines that say its purpose".into());
        }
        let lines = text.lines().count();
        if lines > LONGEST_FILE_LINES && !file.contains("/tests/") {
            find(lines, format!("has {lines} lines; past {LONGEST_FILE_LINES} a file has more than one purpose"));
        }
    }
    if file.ends_with(".md") {
        for (number, target) in local_links(text) {
            let folder = Path::new(file).parent().unwrap_or_else(|| Path::new(""));
            if !root.join(folder).join(&target).exists() {
                find(number, format!("links to {target}, which is not there"));
            }
        }
    }
    findings
}

/// Written in pieces, so that this file passes its own check.
fn registry_hosts() -> [String; 5] {
    [["deb.", "debian.org"], ["static.", "crates.io"], ["index.", "crates.io"], ["pypi", ".org"], ["registry.", "npmjs"]]
        .map(|parts| parts.concat())
}

fn machine_paths() -> [String; 3] {
    [["/work", "/main"], ["/tmp/", "poc"], ["../", "shared"]].map(|parts| parts.concat())
}

/// The targets of Markdown links that point into the repository, with their line numbers.
fn local_links(text: &str) -> Vec<(usize, String)> {
    let mut links = Vec::new();
    for (number, line) in text.lines().enumerate() {
        for piece in line.split("](").skip(1) {
            let target = piece.split([')', '#']).next().unwrap_or_default();
            if !target.is_empty() && !target.contains("://") && !target.starts_with("mailto:") && !target.contains(' ') {
                links.push((number + 1, target.to_owned()));
            }
        }
    }
    links
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_broken_link_a_missing_head_and_a_registry_host_are_found() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        assert_eq!(check_file(root, "x.md", "see [this](nowhere.md) and [that](Cargo.toml)").len(), 1);
        assert_eq!(check_file(root, "x.rs", "fn main() {}\n").len(), 1);
        assert_eq!(check_file(root, "x.sh", &format!("fetch {}", registry_hosts()[0])).len(), 1);
        assert!(check_file(root, "y.rs", "//! Purpose.\n").is_empty());
    }
}
