//! The CPU pool as text: the C driver's measured answers (docs/driver.md, "The CPU pool"), and the machines that it gets wrong.

#![allow(clippy::unwrap_used, reason = "tests may unwrap")]

mod support;

use nitroxide_abi::{Code, CpuId};
use nitroxide_driver::{Cpus, Machine, PoolError};
use support::machine::{TestCpus, TestMachine};

/// Writes a text and tells result, what is read back, and which CPUs are online.
fn write(machine: &TestMachine, text: &str) -> (Result<(), Code>, String, Vec<u32>) {
    let result = machine.write_pool(text).map_err(Code::from);
    (result, machine.read_pool(), machine.online())
}

#[test]
fn oracle_runs_of_six_cpus_with_two_threads() {
    let machine = TestMachine::with_threads(6, 2);
    let all = || (0..6).collect::<Vec<u32>>();
    for (text, online) in [
        ("2-5:2/2\n", vec![0, 1]),
        ("4-N\n", vec![0, 1, 2, 3]),
        ("all\n", all()),
        ("2-3,2-3\n", vec![0, 1, 4, 5]),
        ("2,3,4,5\n", vec![0, 1]),
        (" 2-3 \n", vec![0, 1, 4, 5]),
        ("2-3", vec![0, 1, 4, 5]),
        ("99\n", all()),
        ("\n", all()),
    ] {
        let (result, read, now) = write(&machine, text);
        let expected = match text {
            "all\n" | "\n" => Err(Code::EINVAL),
            "99\n" => Err(Code::ERANGE),
            _ => Ok(()),
        };
        assert_eq!(result, expected, "{text:?}");
        assert_eq!(read, if result.is_ok() { format!("{text}\n") } else { "\n".to_owned() });
        assert_eq!(now, online, "{text:?}");
    }
}

#[test]
fn every_refusal_has_its_reason_and_leaves_no_pool() {
    let eight = || TestCpus {
        online: vec![true; 8],
        core_of: vec![0, 0, 2, 2, 4, 4, 6, 6],
        node_of: vec![0, 0, 0, 0, 1, 1, -1, -1],
        ..TestCpus::default()
    };
    for (text, expected) in [
        ("2-3,x", PoolError::Syntax),
        ("4294967296", PoolError::Overflow),
        ("8", PoolError::NoSuchCpu),
        ("", PoolError::Empty),
        ("2-5", PoolError::OtherNode(CpuId(4))),
        ("6-7", PoolError::OtherNode(CpuId(6))),
        ("0-1", PoolError::CpuZero),
        ("1-3", PoolError::SiblingOfCpuZero(CpuId(1))),
        ("2", PoolError::HalfCore(CpuId(3))),
        ("3", PoolError::HalfCore(CpuId(2))),
    ] {
        let machine = TestMachine::with_cpus(eight());
        machine.write_pool("2-3").unwrap();
        assert_eq!(machine.write_pool(text), Err(expected), "{text}");
        assert_eq!(machine.read_pool(), "\n");
        assert_eq!(machine.free(), [] as [u32; 0]);
        assert_eq!(machine.online().len(), 8);
        machine.with_pool(|pool, _| assert_eq!((pool.node(), pool.threads_per_core()), (-1, 0)));
    }
    let machine = TestMachine::with_cpus(eight());
    machine.with_pool(|_, cpus| cpus.online[3] = false);
    assert_eq!(machine.write_pool("2-3"), Err(PoolError::Offline(CpuId(3))));
}

#[test]
fn failed_hotplug_brings_the_others_back() {
    let machine = TestMachine::with_threads(6, 2);
    machine.with_pool(|_, cpus| cpus.stuck.insert(4));
    assert_eq!(machine.write_pool("2-5"), Err(PoolError::Hotplug(CpuId(4), Code::EBUSY)));
    assert_eq!(machine.online(), [0, 1, 2, 3, 4, 5]);
    assert_eq!(machine.read_pool(), "\n");
}

#[test]
fn w20_pool_string_at_511_and_512_bytes() {
    let machine = TestMachine::with_threads(6, 2);
    let text = |length: usize| format!("{}2-3", ",".repeat(length - 3));
    machine.write_pool(&text(511)).unwrap();
    assert_eq!(machine.read_pool().len(), 512);
    assert_eq!(machine.write_pool(&text(512)), Err(PoolError::TextTooLong));
    assert_eq!(machine.read_pool(), "\n");
    assert_eq!(machine.online(), [0, 1, 2, 3, 4, 5]);
}

/// Cores by sibling sets: neighbours, halves apart, cores of one and of two threads, ids that repeat between packages.
#[test]
fn w18_cores_are_told_apart_by_siblings_not_by_core_ids() {
    // Threads of a core are eight apart, and CPUs 6, 7 have one thread each; 15 CPUs is an odd count.
    let mut core_of: Vec<u32> = (0..6).chain([6, 7]).chain(0..6).collect();
    core_of.push(14);
    let machine = TestMachine::with_cpus(TestCpus { online: vec![true; 15], core_of, node_of: vec![0; 15], ..TestCpus::default() });
    assert_eq!(machine.write_pool("1,6-7,14"), Err(PoolError::HalfCore(CpuId(9))));
    machine.write_pool("1,9,6-7,14").unwrap();
    let cores = machine.with_pool(|pool, _| pool.cpus().map(|(cpu, core, _)| (cpu.0, core.0)).collect::<Vec<_>>());
    assert_eq!(cores, [(1, 1), (6, 6), (7, 7), (9, 1), (14, 14)]);
}

#[test]
fn foreign_cores_are_not_free_and_keep_the_pool_as_it_is() {
    let machine = TestMachine::with_threads(6, 2);
    machine.write_pool("2-5").unwrap();
    machine.with_pool(|pool, _| pool.set_foreign(CpuId(3), true));
    assert_eq!(machine.free(), [4, 5]);
    assert_eq!(machine.write_pool("2-3"), Err(PoolError::EnclavesExist));
    machine.with_pool(|pool, _| {
        pool.set_foreign(CpuId(4), true);
        assert!(!pool.has_free_core());
        pool.set_foreign(CpuId(2), false);
        pool.set_foreign(CpuId(4), false);
        pool.set_foreign(CpuId(0), true);
        pool.set_foreign(CpuId(77), true);
    });
    assert_eq!(machine.free(), [2, 3, 4, 5]);
    machine.write_pool("2-3").unwrap();
}

#[test]
fn clearing_brings_all_cpus_online() {
    let machine = TestMachine::with_threads(6, 2);
    machine.write_pool("2-5").unwrap();
    machine.with_pool(|pool, cpus| {
        pool.clear(cpus);
        assert!(cpus.is_online(CpuId(2)));
    });
    assert_eq!(machine.read_pool(), "\n");
}

#[test]
fn bytes_behind_a_nul_do_not_count() {
    let machine = TestMachine::with_threads(6, 2);
    machine.write_pool("2-3\0x").unwrap();
    assert_eq!(machine.read_pool(), "2-3\n");
}
