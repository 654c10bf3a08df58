//! `nitroxide exec` as a whole: options and failures of the command. What clients see is tested in crates/user-home.

mod common;

use common::{run, text, user::User};

#[test]
fn client_sees_the_pool_of_the_options_and_its_status_is_the_commands() {
    let user = User::new();
    let pool = "cat /sys/module/nitro_enclaves/parameters/ne_cpus; test -c /dev/nitro_enclaves; exit 3";
    let output = run(user.without_machine().args(["exec", "--topology", "cpus=6,threads=2", "--pool", "2-5", "--", "sh", "-c", pool]));
    assert_eq!((output.status.code(), text(&output.stdout).as_str()), (Some(3), "2-5\n"), "{}", text(&output.stderr));
}

#[test]
fn client_finds_the_instance_id_of_the_options_where_nitro_cli_looks_for_it() {
    let user = User::new();
    let words = ["--", "cat", "/sys/devices/virtual/dmi/id/board_asset_tag"];
    for (options, id) in [(["--instance-id", "i-1234abcd"].as_slice(), "i-1234abcd\n"), (&[], "i-0000000000000000\n")] {
        let output = run(user.without_machine().arg("exec").args(options).args(words));
        assert_eq!(text(&output.stdout), id, "{}", text(&output.stderr));
    }
}

#[test]
fn inner_exec_has_no_options_of_its_own() {
    let user = User::new();
    let inner = |options: &str| format!("exec {} exec {options} -- true", env!("CARGO_BIN_EXE_nitroxide"));
    let output = run(user.without_machine().args(["exec", "--", "sh", "-c", &inner("")]));
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    // What comes from the environment is no option of the inner one's.
    let output = run(user.without_machine().env("NITROXIDE_INSTANCE_ID", "i-1234abcd").args(["exec", "--", "sh", "-c", &inner("")]));
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    let output = run(user.without_machine().args(["exec", "--", "sh", "-c", &inner("--instance-id i-1234abcd")]));
    assert_eq!(output.status.code(), Some(2), "{}", text(&output.stderr));
    let output = run(user.without_machine().args(["exec", "--", "sh", "-c", &inner("--max-regions 8")]));
    assert_eq!(output.status.code(), Some(2), "{}", text(&output.stderr));
    assert!(text(&output.stderr).contains("Give the options to the outer exec"), "{}", text(&output.stderr));
}

#[test]
fn our_own_run_enclave_works_below_it_and_its_enclave_outlives_the_command() {
    let user = User::new();
    let program = env!("CARGO_BIN_EXE_nitroxide");
    let exec = |words: &[&str]| run(user.without_machine().env_remove("NITROXIDE_DEVICE").args(["exec", "--", program]).args(words));
    let image = user.image.to_str().expect("a path of ours");
    let words = ["run-enclave", "--no-wait", "--cpu-count", "2", "--memory", "128", "--eif-path", image];
    let output = exec(&words);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    let described = run(user.without_machine().arg("describe-enclaves"));
    assert!(text(&described.stdout).contains("\"RUNNING\""), "{}", text(&described.stdout));
    let refused = exec(&[&["--device", "host"], &words[..]].concat());
    assert_eq!(refused.status.code(), Some(3), "{}", text(&refused.stderr));
    assert!(text(&refused.stderr).contains("Leave out --device host"), "{}", text(&refused.stderr));
    assert_eq!(exec(&["terminate-enclave", "--all"]).status.code(), Some(0));
}

#[test]
fn failures_have_a_shells_numbers() {
    let user = User::new();
    for (words, status, says) in [
        (["exec", "--", "no-such-program"].as_slice(), 127, "is not found"),
        (&["exec", "--", "/etc/passwd"], 126, "cannot be executed"),
        (&["exec", "--pool", "0-3", "--", "true"], 125, "There is no device for the client"),
    ] {
        let output = run(user.without_machine().args(words));
        assert_eq!(output.status.code(), Some(status), "{words:?}: {}", text(&output.stderr));
        assert!(text(&output.stderr).contains(says), "{words:?}: {}", text(&output.stderr));
    }
}
