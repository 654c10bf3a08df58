//! Claims between threads and processes: nobody gets what another has, and the killed hold nothing.
#![expect(clippy::unwrap_used, reason = "a failed expectation of a test is a panic")]

mod common;

use std::collections::HashSet;

use common::{Helper, role, say, wait_for_end, world};
use nitroxide_world::{ClaimError, Kind};

/// Enough to make races likely on two cores.
const CLAIMERS: usize = 8;

#[test]
fn helper_claims_many() {
    let Some(world) = role() else { return };
    let mut claims = Vec::new();
    for _ in 0..20 {
        let cid = world.claim_cid(None).unwrap();
        let name = world.claim_name("app").unwrap();
        let slot = world.claim_slot().unwrap();
        say(&format!("{} {} {:x}", cid.cid, name.name, slot.slot_uid));
        claims.push((cid, name, slot));
    }
    say("done");
    wait_for_end();
}

#[test]
fn processes_that_claim_at_once_get_different_things() {
    let (dir, world) = world();
    let path = dir.path().join("world");
    let mut helpers: Vec<Helper> = (0..CLAIMERS).map(|_| Helper::start("helper_claims_many", &path)).collect();

    let mut seen = HashSet::new();
    for helper in &mut helpers {
        for _ in 0..20 {
            for (column, value) in helper.line().split(' ').enumerate() {
                assert!(seen.insert((column, value.to_owned())), "{value} was given twice");
            }
        }
        assert_eq!(helper.line(), "done");
    }

    assert!(seen.contains(&(0, "16".to_owned())) && seen.contains(&(0, format!("{}", 15 + 20 * CLAIMERS))));
    assert!(seen.contains(&(1, "app".to_owned())) && seen.contains(&(1, format!("app_{}", 20 * CLAIMERS - 1))));
    for helper in helpers {
        helper.finish();
    }
    assert_eq!(world.claim_cid(None).unwrap().cid, 16);
}

#[test]
fn threads_that_claim_at_once_get_different_cids() {
    let (_dir, world) = world();
    let mut cids: Vec<u32> = std::thread::scope(|scope| {
        let claim =
            || (0..25).map(|_| world.claim_cid(None).unwrap()).map(|claim| (claim.cid, std::mem::forget(claim)).0).collect::<Vec<_>>();
        let threads: Vec<_> = (0..CLAIMERS).map(|_| scope.spawn(claim)).collect();
        threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
    });
    cids.sort_unstable();
    let expected: Vec<u32> = (16..).take(25 * CLAIMERS).collect();
    assert_eq!(cids, expected);
}

#[test]
fn sweeping_while_others_claim_never_makes_a_free_cid_look_taken() {
    let (dir, world) = world();
    let end = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while !end.load(std::sync::atomic::Ordering::Relaxed) {
                    world.sweep().unwrap();
                }
            });
        }
        for _ in 0..500 {
            // As a killed holder leaves it, so that the sweepers have something to lock.
            std::fs::write(dir.path().join("world/cids/40"), "").unwrap();
            let claim = world.claim_cid(Some(40));
            end.store(claim.is_err(), std::sync::atomic::Ordering::Relaxed);
            claim.unwrap();
        }
        end.store(true, std::sync::atomic::Ordering::Relaxed);
    });
}

#[test]
fn a_cid_that_is_released_and_claimed_all_the_time_never_has_two_holders() {
    let (_dir, world) = world();
    let holders = std::sync::atomic::AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..3000 {
                    let Ok(claim) = world.claim_cid(Some(40)) else { continue };
                    assert_eq!(holders.fetch_add(1, std::sync::atomic::Ordering::SeqCst), 0);
                    std::thread::yield_now();
                    holders.fetch_sub(1, std::sync::atomic::Ordering::SeqCst);
                    drop(claim);
                }
            });
        }
    });
}

#[test]
fn a_released_claim_is_free_even_if_a_child_still_has_its_descriptor() {
    let (_dir, world) = world();
    let claim = world.claim_cid(Some(30)).unwrap().claim;
    let _of_a_child = claim.as_fd().unwrap().try_clone_to_owned().unwrap();
    std::fs::hard_link(world.path().join("cids/30"), world.path().join("cids/31")).unwrap();
    drop(claim);
    // The same file under another name shows whether its lock is gone.
    world.claim_cid(Some(31)).unwrap();
}

#[test]
fn helper_holds_one_of_each() {
    let Some(world) = role() else { return };
    let _claims = (
        world.claim_cid(Some(20)).unwrap(),
        world.claim_cpu(3).unwrap(),
        world.claim_name("app").unwrap(),
        world.claim_slot().unwrap(),
        world.claim_memory(1 << 20, 1 << 20).unwrap(),
    );
    say("held");
    wait_for_end();
}

#[test]
fn a_killed_holder_holds_nothing_and_its_files_are_swept() {
    let (dir, world) = world();
    let path = dir.path().join("world");
    let mut holder = Helper::start("helper_holds_one_of_each", &path);
    assert_eq!(holder.line(), "held");

    assert!(matches!(world.claim_cid(Some(20)), Err(ClaimError::Taken(_))));
    assert!(matches!(world.claim_cpu(3), Err(ClaimError::Taken(_))));
    assert!(matches!(world.claim_memory(1, 1 << 20), Err(ClaimError::Exhausted(_))));
    assert_eq!(world.claim_name("app").unwrap().name, "app_1");
    assert_eq!(world.claimed_cpus().unwrap(), [3]);
    assert!(world.is_cid_claimed(20).unwrap());

    holder.kill();

    assert_eq!(world.claimed_cpus().unwrap(), [] as [u32; 0]);
    assert!(!world.is_cid_claimed(20).unwrap()); // Which also removes the file it looked at.
    assert_eq!(world.claim_name("app").unwrap().name, "app");
    drop(world.claim_memory(1 << 20, 1 << 20).unwrap());
    let swept = world.sweep().unwrap();
    assert_eq!((swept.claims, swept.sockets), (2, 0), "{swept:?}"); // CPU and slot: the rest was taken over above.
    assert_eq!(world.sweep().unwrap().claims, 0);
    drop(world.claim_cpu(3).unwrap());
}

#[test]
fn a_claim_outlives_its_first_holder_when_it_was_handed_over() {
    let (_dir, world) = world();
    let claim = world.claim_cid(Some(30)).unwrap().claim;
    let name = claim.file_name().to_owned();
    let descriptor = claim.hand_over().unwrap();
    assert!(matches!(world.claim_cid(Some(30)), Err(ClaimError::Taken(_))));

    let adopted = world.adopt(Kind::Cid, &name, descriptor).unwrap();
    assert!(matches!(world.claim_cid(Some(30)), Err(ClaimError::Taken(_))));

    drop(adopted);
    world.claim_cid(Some(30)).unwrap();
}

#[test]
fn adopting_what_is_no_claim_is_refused() {
    let (dir, world) = world();
    let _held = world.claim_cid(Some(30)).unwrap();
    let stranger = std::fs::File::create(dir.path().join("stranger")).unwrap();
    let second = std::fs::File::open(dir.path().join("world/cids/30")).unwrap();
    assert!(matches!(world.adopt(Kind::Cid, "30", stranger.into()), Err(ClaimError::Foreign(_))));
    assert!(matches!(world.adopt(Kind::Cid, "30", second.into()), Err(ClaimError::Taken(_))));
}

#[test]
fn cids_keep_their_rules() {
    let (_dir, world) = world();
    for cid in [0, 1, 2, 3, u32::MAX] {
        assert_eq!(world.claim_cid(Some(cid)).unwrap_err().errno(), 22, "{cid}");
    }
    let low = world.claim_cid(Some(4)).unwrap();
    assert_eq!(world.claim_cid(Some(4)).unwrap_err().errno(), 98); // EADDRINUSE.
    assert_eq!(low.cid, 4);
    assert_eq!(world.claim_cid(Some(u32::MAX - 1)).unwrap().cid, u32::MAX - 1);
}

#[test]
fn names_are_bounded_and_never_leave_their_directory() {
    let (dir, world) = world();
    let odd = world.claim_name("../../etc/x\n").unwrap();
    assert_eq!(odd.name, "../../etc/x\n");
    assert_eq!(std::fs::read_dir(dir.path().join("world/names")).unwrap().count(), 1);
    assert!(matches!(world.claim_name(""), Err(ClaimError::Invalid(..))));
    assert!(matches!(world.claim_name(&"x".repeat(241)), Err(ClaimError::Invalid(..))));
    world.claim_name(&"x".repeat(240)).unwrap();
}
