//! Directed cases about the CPU pool: its text, what is refused, and what enclaves do to it.
//!
//! Rules: docs/driver.md, "The CPU pool".

use super::{On, Op, POOL, Who, close, create, pool, vcpu};

/// Writes and looks.
fn pool_writes(texts: &[&str]) -> Vec<Op> {
    texts.iter().flat_map(|text| [pool(text), Op::ReadPool, Op::Online]).chain([pool(POOL), Op::ReadPool]).collect()
}

pub(super) fn pool_none() -> Vec<Op> {
    [vec![pool("\n"), Op::ReadPool, Op::Online, create(0), Op::Poll { on: On::Device, who: Who::Owner }], pool_writes(&["2-5\n"])].concat()
}

pub(super) fn pool_grammar() -> Vec<Op> {
    pool_writes(&[
        "2-3,4-5\n",
        "2,3\n",
        "2-3,2-3\n",
        " 2-3 \n",
        "2-3",
        "2-5:2/2\n",
        "2-5:2/4",
        "4-N\n",
        "n-N",
        "3,2",
        "2-3\n4-5",
        "2-3 4-5",
        "2-3,,4-5",
        ",2-3",
        "2-3,",
        "2\t3",
        "02-03",
    ])
}

pub(super) fn pool_refused() -> Vec<Op> {
    let mut ops = pool_writes(&[
        "all\n",
        "99\n",
        "2-99",
        "4294967296",
        "18446744073709551616",
        "5-2",
        "2-",
        "-3",
        "a",
        "2-3x",
        "0x2-0x3",
        "0-3",
        "1",
        "0",
        "2",
        "2-4",
        "3-4",
        "1-3",
        "2-5:0/2",
        "2-5:3/2",
        "2-5:1/2",
        "2-5:2/0",
        "2--3",
        "2-3:",
        "\n\n",
        " ",
    ]);
    ops.push(Op::WritePool { text: "2-3".to_owned(), privileged: false });
    ops.push(Op::ReadPool);
    ops
}

pub(super) fn pool_length() -> Vec<Op> {
    let long = |bytes: usize| format!("{:<bytes$}", "2-3");
    pool_writes(&[&long(510), &long(511), &long(512), &long(600)])
}

pub(super) fn pool_and_enclaves() -> Vec<Op> {
    vec![
        create(0),
        pool("2-3"),
        Op::ReadPool,
        pool("\n"),
        pool("x"),
        Op::Online,
        close(0),
        pool("2-3"),
        create(0),
        vcpu(0, 4),
        vcpu(0, 0),
        vcpu(0, 0),
        vcpu(0, 0),
        create(1),
        close(0),
        create(1),
        close(1),
        pool(POOL),
        Op::Online,
    ]
}

pub(super) fn pool_online_by_hand() -> Vec<Op> {
    vec![
        create(0),
        Op::SetOnline { cpu: 2, online: true },
        Op::Online,
        vcpu(0, 0),
        close(0),
        pool("4-5"),
        Op::Online,
        Op::SetOnline { cpu: 2, online: false },
        pool("2-3"),
        Op::ReadPool,
        Op::Online,
        Op::SetOnline { cpu: 2, online: true },
        pool(POOL),
        Op::Online,
    ]
}
