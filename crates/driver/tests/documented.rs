//! docs/driver.md names every test of a weakness and every line that differs from the C driver, and no others.

use std::collections::BTreeSet;
use std::path::Path;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn document() -> String {
    std::fs::read_to_string(root().join("../../docs/driver.md")).expect("docs/driver.md is there")
}

/// Names like `w11_foreign_add_vcpu_keeps_core_in_pool` that stand between `before` and `after`.
fn names(text: &str, before: &str, after: char) -> BTreeSet<String> {
    let is_name = |name: &str| name.starts_with('w') && name[1..].starts_with(|c: char| c.is_ascii_digit()) && name.contains('_');
    text.split(before).skip(1).filter_map(|rest| rest.split(after).next()).filter(|name| is_name(name)).map(str::to_owned).collect()
}

#[test]
fn every_test_of_a_weakness_is_in_the_table_and_the_other_way_round() {
    let sources = ["tests", "src"].map(|directory| root().join(directory)).into_iter().flat_map(|directory| {
        std::fs::read_dir(directory).expect("the crate's own directory").map(|entry| entry.expect("an entry").path())
    });
    let tests: BTreeSet<String> = sources
        .filter(|path| path.extension().is_some_and(|extension| extension == "rs"))
        .flat_map(|path| names(&std::fs::read_to_string(path).expect("a source file"), "fn ", '('))
        .collect();
    assert_eq!(names(&document(), "`", '`'), tests);
    assert!(tests.len() > 30);
}

#[test]
fn every_difference_from_the_c_driver_is_in_the_table() {
    let oracle = std::fs::read_to_string(root().join("tests/oracle.rs")).expect("the oracle's tests");
    let table = oracle.split("const DIFFERENCES").nth(1).and_then(|rest| rest.split("];").next()).expect("the table of differences");
    let lines: Vec<&str> = table.split("(\"").skip(1).filter_map(|rest| rest.split('"').next()).collect();
    let text = document();
    for line in &lines {
        assert!(text.contains(&format!("| {line} | ")), "docs/driver.md lacks the difference: {line}");
    }
    assert!(lines.len() > 10);
}
