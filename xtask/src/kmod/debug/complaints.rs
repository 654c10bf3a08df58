//! What a kernel prints when one of its checks fails: [`find`].

/// Parts of a complaint's first line, as mm/kasan/report.c, kernel/locking/lockdep.c, mm/kmemleak.c, lib/debugobjects.c and their like print them.
const MARKS: [&str; 26] = [
    "BUG:",
    // The slab's: `BUG kmalloc-96 (Tainted: ...): ...`.
    "BUG ",
    "KASAN",
    "WARNING:",
    "Oops",
    "general protection fault",
    "Kernel panic",
    "kernel BUG at",
    "possible recursive locking",
    "possible circular locking",
    "inconsistent lock state",
    "held lock freed",
    "Invalid wait context",
    "bad unlock balance",
    "sleeping function called",
    "scheduling while atomic",
    "suspicious RCU",
    "INFO: task",
    "INFO: rcu",
    "unreferenced object",
    "ODEBUG",
    "refcount_t:",
    "non-static key",
    "nobody cared",
    "page allocation failure",
    "panicked at",
];

/// Lines that are shown of one complaint at most.
const SHOWN: usize = 80;

/// The complaints in a console's text, each with the lines that follow it. A mark within another complaint's lines begins none of its own.
pub fn find(text: &str) -> Vec<String> {
    let lines: Vec<&str> = text.lines().collect();
    let mut found = Vec::new();
    let mut next = 0;
    while let Some(at) = (next..lines.len()).find(|at| lines.get(*at).is_some_and(|line| MARKS.iter().any(|mark| line.contains(mark)))) {
        let end = end_of(&lines, at);
        found.push(lines.get(at..end).unwrap_or_default().join("\n"));
        next = end;
    }
    found
}

/// Reports end with a line of `=` or with `---[ end trace`; others after so many lines.
fn end_of(lines: &[&str], at: usize) -> usize {
    let most = lines.len().min(at + SHOWN);
    let is_end = |line: &&str| line.contains("---[ end trace") || line.trim_end().ends_with("==========");
    // The line after the first may still be the frame's upper edge.
    (at + 2..most).find(|next| lines.get(*next).is_some_and(is_end)).map_or(most, |end| end + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn complaints_are_found_with_their_lines() {
        let text = "[ 1.0] nitro_enclaves: hello\n\
                    [ 2.0] ==================================================================\n\
                    [ 2.0] BUG: KASAN: slab-use-after-free in x+0x1/0x2\n\
                    [ 2.0] Read of size 8\n\
                    [ 2.0]  y+0x1/0x2\n\
                    [ 2.0] ==================================================================\n\
                    [ 3.0] nothing\n\
                    [ 4.0] WARNING: CPU: 0 PID: 1 at mm/x.c:1\n\
                    [ 4.0]  z+0x1/0x2\n\
                    [ 4.0] ---[ end trace 0000000000000000 ]---\n\
                    [ 5.0] nothing\n";
        let found = find(text);
        assert_eq!(found.len(), 2, "{found:#?}");
        assert!(found[0].starts_with("[ 2.0] BUG: KASAN") && found[0].contains("y+0x1") && !found[0].contains("nothing"), "{}", found[0]);
        assert!(found[1].contains("z+0x1") && !found[1].contains("nothing"), "{}", found[1]);
    }

    #[test]
    fn each_kind_of_complaint_is_found() {
        for line in [
            "WARNING: possible recursive locking detected",
            "WARNING: possible circular locking dependency detected",
            "WARNING: suspicious RCU usage",
            "BUG: sleeping function called from invalid context at kernel/locking/mutex.c:1",
            "INFO: task x:1 blocked for more than 120 seconds.",
            "unreferenced object 0xffff888001234567 (size 64):",
            "BUG anon_inode_inode (Tainted: G O): Objects remaining on __kmem_cache_shutdown()",
            "INFO: trying to register non-static key.",
            "ODEBUG: free active (active state 0) object: 1 object type: work_struct hint: x",
            "rust_kernel: panicked at src/main.rs:1:2:",
            "Oops: general protection fault, probably for non-canonical address",
        ] {
            assert_eq!(find(&format!("a\n[ 1.0] {line}\nb\n")).len(), 1, "{line}");
        }
    }

    #[test]
    fn what_a_healthy_kernel_prints_is_no_complaint() {
        let text = "kasan: KernelAddressSanitizer initialized (generic)\n\
                    nitro_enclaves: loading out-of-tree module taints kernel.\n\
                    warning: cannot set up lo: EAFNOSUPPORT\n\
                    nitro_enclaves 0000:00:03.0: a command failed: -22\n";
        assert!(find(text).is_empty());
    }
}
