//! The real program over a whole life of enclaves, without a virtual machine (`--engine none`): start, look, name, end, and everything going wrong.
//!
//! Each test has a runtime directory of its own, and at its end nothing may be left in it: no socket, no process.

#![expect(clippy::unwrap_used, reason = "the helpers of tests are tests too")]

mod common;

use std::{
    fs,
    process::{Command, Stdio},
};

use common::{run, text, user::User};
use serde_json::Value;

/// Starting fails: the exit status, and what was said.
fn start_fails(user: &User, words: &[&str]) -> (i32, String) {
    let output = run(user.without_machine().args(["run-enclave", "--memory", "64", "--eif-path"]).arg(&user.image).args(words));
    assert_eq!(text(&output.stdout), "");
    (output.status.code().unwrap(), text(&output.stderr))
}

fn is_alive(pid: &Value) -> bool {
    // A process that nobody has reaped yet has ended all the same.
    let status = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    status.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with(['Z', 'X']))
}

#[test]
fn an_enclave_is_started_described_and_ended_in_nitro_clis_shapes() {
    let user = User::new();
    let started = user.start(&["--cpu-count", "2", "--enclave-cid", "16", "--debug-mode"]);
    let keys: Vec<&String> = started.as_object().unwrap().keys().collect();
    assert_eq!(keys, ["EnclaveName", "EnclaveID", "ProcessID", "EnclaveCID", "NumberOfCPUs", "CPUIDs", "MemoryMiB"]);
    assert_eq!(started["EnclaveName"], "small");
    assert_eq!(started["EnclaveCID"], 16);
    assert_eq!(started["NumberOfCPUs"], 2);
    assert_eq!(started["MemoryMiB"], 64);
    let enclaves = user.enclaves();
    assert_eq!(enclaves.len(), 1);
    for key in keys {
        assert_eq!(enclaves[0][key], started[key], "{key}");
    }
    assert_eq!(enclaves[0]["State"], "RUNNING");
    assert_eq!(enclaves[0]["Flags"], "DEBUG_MODE");
    assert!(is_alive(&started["ProcessID"]));

    let output = user.say(&["terminate-enclave", "--enclave-id", started["EnclaveID"].as_str().unwrap()]);
    let terminated: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(terminated["EnclaveID"], started["EnclaveID"]);
    assert_eq!(terminated["EnclaveName"], "small");
    assert_eq!(terminated["Terminated"], true);
    assert!(!is_alive(&started["ProcessID"]));
    user.ends_with_nothing_left();
}

#[test]
fn equal_names_get_numbers_and_enclaves_are_found_by_name() {
    let user = User::new();
    assert_eq!(user.start(&[])["EnclaveName"], "small");
    assert_eq!(user.start(&[])["EnclaveName"], "small_1");
    assert_eq!(user.start(&["--enclave-name", "other"])["EnclaveName"], "other");
    assert!(user.say(&["terminate-enclave", "--enclave-name", "small_1"]).status.success());
    assert!(user.say(&["terminate-enclave", "other"]).status.success());
    assert_eq!(user.enclaves().len(), 1);
    let output = user.say(&["terminate-enclave", "--enclave-name", "nobody"]);
    assert_eq!(output.status.code(), Some(58));
    assert!(text(&output.stderr).contains("[E58]"));
    user.ends_with_nothing_left();
}

#[test]
fn enclaves_share_neither_cpus_nor_cids() {
    let user = User::new();
    let first = user.start(&["--cpu-ids", "2", "3"]);
    assert_eq!(first["CPUIDs"], serde_json::json!([2, 3]));
    let second = user.start(&["--cpu-count", "2"]);
    assert!(second["CPUIDs"].as_array().unwrap().iter().all(|id| id != 2 && id != 3), "{second}");
    assert_ne!(first["EnclaveCID"], second["EnclaveCID"]);

    let (status, complaint) = start_fails(&user, &["--cpu-ids", "3"]);
    assert_eq!(status, 21, "{complaint}");
    let (status, complaint) = start_fails(&user, &["--cpu-count", "63"]);
    assert_eq!(status, 22, "{complaint}");
    let (status, complaint) = start_fails(&user, &["--enclave-cid", &first["EnclaveCID"].to_string()]);
    assert_eq!(status, 29, "{complaint}");
    assert!(complaint.contains("is in use"), "{complaint}");
    assert_eq!(user.enclaves().len(), 2);
    user.ends_with_nothing_left();
}

#[test]
fn bad_requests_are_refused_with_their_codes_and_leave_nothing() {
    let user = User::new();
    let missing = user.directory.path().join("missing.eif");
    let cases: &[(&[&str], i32)] = &[
        (&["--eif-path", missing.to_str().unwrap()], 19),
        (&["--eif-path", "/etc/passwd"], 35),
        (&["--enclave-cid", "3"], 3),
        (&["--enclave-cid", "4294967296"], 3),
        (&["--memory", "63"], 26),
        (&["--cpu-ids", "x"], 23),
        (&["--cpu-ids", "5,5"], 23),
        (&["--cpu-ids", "0"], 21),
        (&["--cpu-ids", "64"], 21),
        (&["--cpu-count", "64"], 22),
        (&["--enclave-name", "a/b"], 58),
        (&["--config", missing.to_str().unwrap()], 19),
    ];
    for (words, code) in cases {
        let mut command = user.without_machine();
        command.arg("run-enclave");
        if !words.contains(&"--eif-path") && !words.contains(&"--config") {
            command.arg("--eif-path").arg(&user.image);
        }
        let output = run(command.args(*words));
        assert_eq!(output.status.code(), Some(*code), "{words:?}: {}", text(&output.stderr));
        assert_eq!(text(&output.stdout), "", "{words:?}");
        assert!(text(&output.stderr).contains(&format!("[E{code:02}]")), "{words:?}: {}", text(&output.stderr));
    }
    user.ends_with_nothing_left();
}

#[test]
fn a_config_file_stands_for_the_arguments() {
    let user = User::new();
    let config = user.directory.path().join("enclave.json");
    let write = |text: &str| fs::write(&config, text).unwrap();
    write(&serde_json::json!({ "eif_path": user.image, "cpu_count": 1, "memory_mib": 64, "enclave_cid": 20, "enclave_name": "configured", "debug_mode": true }).to_string());
    let output = user.say(&["run-enclave", "--config", config.to_str().unwrap()]);
    let started: Value = serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{}", text(&output.stderr)));
    assert_eq!(
        (started["EnclaveName"].as_str(), started["EnclaveCID"].as_u64(), started["NumberOfCPUs"].as_u64()),
        (Some("configured"), Some(20), Some(1))
    );

    for (content, code) in [
        (r#"{"eif_path": "x", "memroy_mib": 1}"#, 17),
        ("{", 17),
        (r#"{"eif_path": "x", "cpu_count": 1, "cpu_ids": [2]}"#, 2),
        (r#"{"eif_path": "x", "enclave_cid": 4294967296}"#, 3),
    ] {
        write(content);
        let output = user.say(&["run-enclave", "--config", config.to_str().unwrap()]);
        assert_eq!(output.status.code(), Some(code), "{content}: {}", text(&output.stderr));
    }
    user.ends_with_nothing_left();
}

#[test]
fn called_as_nitro_cli_it_demands_what_nitro_cli_demands() {
    use std::os::unix::process::CommandExt;
    let user = User::new();
    let nitro_cli =
        |words: &[&str]| run(user.without_machine().arg0("nitro-cli").args(["run-enclave", "--eif-path"]).arg(&user.image).args(words));
    assert_eq!(nitro_cli(&["--cpu-count", "2"]).status.code(), Some(1));
    assert_eq!(nitro_cli(&["--memory", "64"]).status.code(), Some(1));
    let started = nitro_cli(&["--cpu-count", "2", "--memory", "64"]);
    assert!(started.status.success(), "{}", text(&started.stderr));
    let output = run(user.without_machine().arg0("nitro-cli").arg("describe-enclaves"));
    let enclaves: Vec<Value> = serde_json::from_slice(&output.stdout).unwrap();
    assert!(enclaves[0].get("Engine").is_none(), "{}", enclaves[0]);
    user.ends_with_nothing_left();
}

#[test]
fn wait_tells_how_an_enclave_ended() {
    use std::io::{BufRead, BufReader};
    let user = User::new();
    // `wait` says when it waits, just before it does: an end in between would be told as "no such enclave", so there are several tries.
    let output = (0..10)
        .find_map(|_| {
            user.start(&["--enclave-name", "waited"]);
            let mut waiting =
                user.without_machine().args(["wait", "waited"]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
            BufReader::new(waiting.stderr.take().unwrap()).read_line(&mut String::new()).unwrap();
            assert!(user.say(&["terminate-enclave", "waited"]).status.success());
            Some(waiting.wait_with_output().unwrap()).filter(|output| output.status.success())
        })
        .unwrap();
    let ending: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(ending["EnclaveName"], "waited");
    assert_eq!(ending["Reason"], "stopped");
    assert_eq!(ending["ExitCode"], Value::Null);
    user.ends_with_nothing_left();
}

#[test]
fn the_console_needs_debug_mode_while_logs_do_not() {
    let user = User::new();
    user.start(&["--enclave-name", "plain"]);
    let output = user.say(&["console", "--enclave-name", "plain"]);
    assert_eq!(output.status.code(), Some(44), "{}", text(&output.stderr));
    assert!(text(&output.stderr).contains("--debug-mode"));
    assert!(user.say(&["logs", "plain"]).status.success());
    user.start(&["--enclave-name", "debug", "--debug-mode"]);
    assert!(user.say(&["console", "--enclave-name", "debug", "--disconnect-timeout", "0"]).status.success());
    user.ends_with_nothing_left();
}

#[test]
fn the_enclave_ends_with_its_owner_and_leaves_nothing() {
    let user = User::new();
    let started = user.start(&[]);
    let owner = owner_of(&started["ProcessID"]);
    kill(owner);
    // The enclave's process sees its owner's end at once; a generous limit ends a hang.
    let begin = std::time::Instant::now();
    while is_alive(&started["ProcessID"]) {
        assert!(begin.elapsed().as_secs() < 30, "the enclave's process outlives its owner");
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    assert_eq!(user.enclaves(), Vec::<Value>::new());
    // Another start finds CPUs, name and CID free again, whatever files the killed ones left.
    let again = user.start(&["--enclave-cid", &started["EnclaveCID"].to_string()]);
    assert_eq!(again["EnclaveName"], started["EnclaveName"]);
    user.ends_with_nothing_left();
}

#[test]
fn the_owner_keeps_nothing_of_the_shell_that_started_it() {
    let user = User::new();
    // A pipe that stays open as descriptor 7 and as standard output: were the owner to keep either, reading to the end would never end.
    let script = format!("{} run-enclave --memory 64 --eif-path {} 7>&1", env!("CARGO_BIN_EXE_nitroxide"), user.image.display());
    let mut command = Command::new("sh");
    command
        .args(["-c", &script])
        .env("NITROXIDE_RUNTIME_DIR", user.directory.path().join("runtime"))
        .env("NITROXIDE_ENGINE", "none")
        .env("NITROXIDE_DEVICE", "local");
    let output = run(&mut command);
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert_eq!(user.enclaves().len(), 1);
    user.ends_with_nothing_left();
}

#[test]
fn many_starts_at_once_do_not_collide() {
    let user = User::new();
    let children: Vec<_> = (0..8)
        .map(|_| {
            user.without_machine()
                .args(["run-enclave", "--memory", "64", "--eif-path"])
                .arg(&user.image)
                .stdout(Stdio::piped())
                .spawn()
                .unwrap()
        })
        .collect();
    let started: Vec<Value> =
        children.into_iter().map(|child| serde_json::from_slice(&child.wait_with_output().unwrap().stdout).unwrap()).collect();
    for key in ["EnclaveName", "EnclaveID", "EnclaveCID", "CPUIDs"] {
        let mut values: Vec<String> = started.iter().map(|enclave| enclave[key].to_string()).collect();
        values.sort();
        values.dedup();
        assert_eq!(values.len(), 8, "{key}: {values:?}");
    }
    assert_eq!(user.enclaves().len(), 8);
    user.ends_with_nothing_left();
}

#[test]
fn vsock_connects_to_a_listener_of_the_parent() {
    use std::io::{Read, Write};
    let user = User::new();
    let mut listener = user
        .without_machine()
        .args(["vsock", "listen", "7000"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // It says when it listens.
    let mut line = [0; 9];
    listener.stderr.as_mut().unwrap().read_exact(&mut line).unwrap();
    listener.stdin.take().unwrap().write_all(b"answer").unwrap();
    let mut client =
        user.without_machine().args(["vsock", "connect", "3", "7000"]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    client.stdin.take().unwrap().write_all(b"question").unwrap();
    assert_eq!(text(&client.wait_with_output().unwrap().stdout), "answer");
    let mut question = String::new();
    listener.stdout.take().unwrap().read_to_string(&mut question).unwrap();
    assert_eq!(question, "question");
    assert!(listener.wait().unwrap().success());

    let output = user.say(&["vsock", "connect", "3", "7001"]);
    assert_eq!(output.status.code(), Some(11));
    let output = user.say(&["vsock", "connect", "4000", "1"]);
    assert_eq!(output.status.code(), Some(58), "{}", text(&output.stderr));
    user.ends_with_nothing_left();
}

/// The parent of a process.
fn owner_of(pid: &Value) -> i32 {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    stat.rsplit_once(") ").unwrap().1.split(' ').nth(1).unwrap().parse().unwrap()
}

fn kill(pid: i32) {
    rustix::process::kill_process(rustix::process::Pid::from_raw(pid).unwrap(), rustix::process::Signal::KILL).unwrap();
}

#[test]
fn an_enclave_whose_description_cannot_be_printed_does_not_stay() {
    let user = User::new();
    let full = fs::File::options().write(true).open("/dev/full").unwrap();
    let mut command = user.without_machine();
    command.args(["run-enclave", "--memory", "64", "--eif-path"]).arg(&user.image).stdout(full);
    let output = common::finish(&mut command);
    assert_eq!(output.status.code(), Some(19), "{}", text(&output.stderr));
    assert!(text(&output.stderr).contains("The enclave was ended again"), "{}", text(&output.stderr));
    assert_eq!(user.processes(), std::collections::BTreeSet::new());
    user.ends_with_nothing_left();
}

#[test]
fn a_made_up_parent_has_the_cpus_that_were_asked_for() {
    let user = User::new();
    let parent = ["--topology", "cpus=6,threads=2", "--pool", "2-5"];
    let started = user.start(&[parent.as_slice(), &["--cpu-count", "4"]].concat());
    let mut cpus: Vec<u64> = started["CPUIDs"].as_array().unwrap().iter().filter_map(Value::as_u64).collect();
    cpus.sort_unstable();
    assert_eq!(cpus, [2, 3, 4, 5]);
    assert_eq!(start_fails(&user, &[parent.as_slice(), &["--cpu-count", "1"]].concat()).0, 22);
    for (words, code) in [
        (["--topology", "cpus=7,threads=2"], 3),
        (["--topology", "threads=2"], 3),
        (["--topology", "cpus=6,cores=3"], 3),
        (["--pool", "0-3"], 3),
        (["--pool", "2-"], 3),
    ] {
        assert_eq!(start_fails(&user, &words).0, code, "{words:?}");
    }
    // Without a pool all but the first core are in it.
    assert!(user.say(&["terminate-enclave", "--all"]).status.success());
    assert_eq!(start_fails(&user, &["--topology", "cpus=4,threads=2", "--cpu-count", "3"]).0, 22);
    user.start(&["--topology", "cpus=4,threads=2", "--cpu-ids", "2,3"]);
    user.ends_with_nothing_left();
}
