//! The differences that are meant: [`RULES`]. docs/conformance.md, "Rules".

use std::fmt;

use crate::NO_ENCLAVE;
use crate::present::{Present, enclave_of};
use crate::step::ENCLAVES;
use crate::transcript::Line;

/// What a difference means for the steps behind it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Then {
    /// They can be compared.
    GoOn,
    /// Those of this enclave cannot, until it is closed.
    Enclave,
    /// Those of no enclave can, until all are closed.
    Enclaves,
}

/// A difference that is meant.
pub struct Rule {
    /// Its name; W numbers are those of docs/driver.md, "Weaknesses".
    pub id: &'static str,
    /// Why.
    pub reason: &'static str,
    /// What follows.
    pub then: Then,
    /// Is it this one?
    pub(crate) fits: fn(&Step<'_>) -> bool,
}

impl fmt::Debug for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.id)
    }
}

/// One step of both sides, and what was before it in the case.
pub(crate) struct Step<'a> {
    pub(crate) call: &'a str,
    pub(crate) left: &'a str,
    pub(crate) right: &'a str,
    pub(crate) before: &'a [(Line, Line)],
}

impl Step<'_> {
    fn is(&self, what: &str) -> bool {
        self.call.contains(what)
    }

    /// Steps before it on this enclave since it was made.
    fn since_made(&self) -> impl Iterator<Item = &(Line, Line)> {
        let enclave = enclave_of(self.call).map(|(enclave, _)| enclave);
        let own = move |call: &str| enclave.is_some() && enclave_of(call).map(|(enclave, _)| enclave) == enclave;
        self.before.iter().rev().filter(move |(line, _)| own(&line.call)).take_while(|(line, _)| !line.call.contains("CREATE_VM"))
    }

    /// Was there such a call before in the case?
    fn earlier(&self, call: impl Fn(&str) -> bool) -> bool {
        self.before.iter().any(|(left, _)| call(&left.call))
    }

    /// Does the device refuse this command by a fault that was set before?
    fn refusing(&self, command: &str) -> bool {
        self.earlier(|call| call.starts_with(&format!("faults \"{command}")) && call.contains("=-"))
    }

    /// Did both sides refuse memory of some enclave because a page of it is an enclave's already?
    fn memory_was_refused_for_a_page(&self) -> bool {
        self.before.iter().any(|(left, right)| {
            left.call.contains("SET_MEMORY") && [&left.answer, &right.answer].iter().all(|answer| *answer == ALREADY_USED)
        })
    }

    /// Was this enclave started?
    fn started(&self) -> bool {
        self.since_made().any(|(left, _)| left.call.contains(" START ") && (left.answer.starts_with('0') || left.answer == "EFAULT"))
    }

    /// Did the device or the owner check refuse a vCPU of an enclave that is still there?
    fn vcpu_was_refused(&self) -> bool {
        let mut sides: [Present; 2] = Default::default();
        let mut refused = [false; ENCLAVES];
        for (left, right) in self.before {
            sides.iter_mut().zip([left, right]).for_each(|(side, line)| side.follow(line));
            let Some((enclave, what)) = enclave_of(&left.call) else { continue };
            if let Some(place) = refused.get_mut(enclave) {
                let gone = !sides.iter().any(|side| side.has(enclave));
                *place = !gone && (*place || what.starts_with("ADD_VCPU") && is_device_code(&left.answer));
            }
        }
        refused.contains(&true)
    }

    /// Did the device refuse memory of this enclave that this call's touches?
    fn memory_was_refused(&self) -> bool {
        // Answers that come before the device is asked.
        let checked = |answer: &str| answer.starts_with("NE_ERR") && !matches!(answer, ALREADY_USED | MAX_REGIONS);
        let Some(wanted) = region(self.call) else { return false };
        self.since_made().any(|(left, _)| {
            let refused = left.answer != "0" && left.answer != "EFAULT" && left.answer != NO_ENCLAVE && !checked(&left.answer);
            refused && region(&left.call).is_some_and(|kept| wanted.touches(&kept))
        })
    }
}

pub(crate) const ALREADY_USED: &str = "NE_ERR_MEM_REGION_ALREADY_USED";
pub(crate) const MAX_REGIONS: &str = "NE_ERR_MEM_MAX_REGIONS";
pub(crate) const NOT_INIT: &str = "NE_ERR_NOT_IN_INIT_STATE";

/// Not a success, and none of the driver's own codes: what the owner check and the device say.
fn is_device_code(answer: &str) -> bool {
    !answer.starts_with('0') && !answer.starts_with("NE_ERR") && answer != "EFAULT" && answer != NO_ENCLAVE
}

/// The memory that a call gives away.
struct Given<'a> {
    area: &'a str,
    first: u64,
    end: u64,
}

impl Given<'_> {
    fn touches(&self, other: &Given<'_>) -> bool {
        self.area == other.area && self.first < other.end && other.first < self.end.max(self.first + 1)
    }
}

/// The memory of `e0 SET_MEMORY Pages+8M size 4M flags 0`; `None` of another call, or of one with sizes that are none.
fn region(call: &str) -> Option<Given<'_>> {
    let mut words = call.split_once(" SET_MEMORY ")?.1.split(' ');
    let bytes = |text: &str| match text.strip_suffix('M') {
        Some(number) => number.parse::<u64>().ok()?.checked_mul(1 << 20),
        None if text == "0" => Some(0),
        None => u64::from_str_radix(text.strip_prefix("0x")?, 16).ok(),
    };
    let (area, offset) = words.next()?.split_once('+')?;
    let (first, size) = (bytes(offset)?, bytes(words.nth(1)?)?);
    Some(Given { area, first, end: first.checked_add(size)? })
}

/// The differences that are meant; the first that fits is taken.
pub const RULES: &[Rule] = &[
    Rule {
        id: "W5",
        reason: "a device code that is no errno reaches the caller as EIO, not as it is",
        then: Then::GoOn,
        fits: |step| (step.left.starts_with("returns -") || odd_errno(step.left)) && step.right == "EIO",
    },
    Rule {
        id: "W19",
        reason: "the C driver has none of the extension's commands",
        then: Then::GoOn,
        fits: |step| (step.is("ioctl 0x0000ae3") || step.is("ioctl 0x0000ae20")) && step.left == "ENOTTY",
    },
    Rule {
        id: "W2",
        reason: "a failed SLOT_INFO changes nothing; the C driver takes it for the state INIT and hangs up",
        then: Then::Enclaves,
        fits: |step| {
            let hung_up = step.is(" poll") && step.left == "0x10" && step.right == "0x0";
            let is_call = ["ADD_VCPU", "LOAD_INFO", "SET_MEMORY", " START "].into_iter().any(|call| step.is(call));
            let init_again = is_call && step.right == NOT_INIT && step.left != NOT_INIT;
            (hung_up || init_again)
                && step.started()
                && step.refusing("info")
                && step.earlier(|call| call == "event" || call.ends_with(" ends"))
        },
    },
    Rule {
        id: "W13-write",
        reason: "pages are pinned for writing; the C driver takes pages that are mapped read only",
        then: Then::Enclave,
        fits: |step| step.is("SET_MEMORY ReadOnly") && step.left == "0" && step.right == "EFAULT",
    },
    Rule {
        id: "W14",
        reason: "a part of a page of 1 GiB is refused; the C driver gives all of the page away",
        then: Then::Enclave,
        fits: |step| step.is("SET_MEMORY Gigantic+0 size 2M") && step.left == "0" && step.right == "NE_ERR_INVALID_PAGE_SIZE",
    },
    Rule {
        id: "W18",
        reason: "a CPU that was brought online by hand is not given away",
        then: Then::Enclaves,
        fits: |step| {
            step.is("ADD_VCPU")
                && step.left.starts_with("0 cpu")
                && step.earlier(|call| call.starts_with("cpu") && call.ends_with("online"))
        },
    },
    Rule {
        id: "W11",
        reason: "a core stays in the pool if its vCPU was refused; in the C driver it moves to the enclave before the owner and the device are asked",
        then: Then::Enclaves,
        fits: |step| {
            let missing = matches!(step.left, "NE_ERR_NO_CPUS_AVAIL_IN_POOL" | "NE_ERR_VCPU_NOT_IN_CPU_POOL");
            // Right is what the driver says where the core is in the pool: success, EFAULT, the owner check, or the device.
            let there = !step.right.starts_with("NE_ERR");
            let expected = if step.is("ADD_VCPU") {
                // Another core is the first one, or the last one is gone.
                (step.left.starts_with("0 cpu") && step.right.starts_with("0 cpu")) || (missing && there)
            } else if step.is("CREATE_VM") {
                step.left == "NE_ERR_NO_CPUS_AVAIL_IN_POOL" && there
            } else {
                step.is(" START ") && step.left == "NE_ERR_FULL_CORES_NOT_USED" && there
            };
            expected && step.vcpu_was_refused()
        },
    },
    Rule {
        id: "W12",
        reason: "a region of which the device took nothing is not kept; in the C driver its range stays used",
        then: Then::Enclave,
        // Refused by a fault, for too many pieces, or because an enclave has the page (W13).
        fits: |step| step.is("SET_MEMORY") && step.left == ALREADY_USED && step.memory_was_refused(),
    },
    Rule {
        id: "W12-pages",
        reason: "pages of a region of which the device took nothing go back at once, in the C driver at the last close",
        then: Then::GoOn,
        fits: |step| {
            let numbers = step.left.parse::<u64>().ok().zip(step.right.parse::<u64>().ok());
            step.is("huge pages in use") && numbers.is_some_and(|(left, right)| left > right) && step.refusing("add-mem")
        },
    },
    Rule {
        id: "W13",
        reason: "a page that another enclave has is refused before the device is asked, whose answer was made to be another one here",
        then: Then::Enclave,
        // By a fault, or because the device was told to take fewer pieces than it had promised the driver.
        fits: |step| {
            let limited = step.left == MAX_REGIONS && step.earlier(|call| call.starts_with("max regions"));
            step.is("SET_MEMORY") && step.right == ALREADY_USED && (limited || is_device_code(step.left) && step.refusing("add-mem"))
        },
    },
    Rule {
        id: "W13-runs",
        reason: "memory with a page of another enclave is refused as a whole; the C driver has given the device the runs before that page, and they stay",
        then: Then::Enclaves,
        fits: |step| {
            let shows = ["SET_MEMORY", " START ", "memory of slots", "huge pages in use"].into_iter().any(|call| step.is(call));
            shows && step.memory_was_refused_for_a_page()
        },
    },
];

/// Errnos that no user space knows, or that it would repeat calls for.
fn odd_errno(answer: &str) -> bool {
    let number = answer.strip_prefix("errno ").and_then(|number| number.parse::<u32>().ok());
    answer == "EINTR" || answer == "ERESTART" || answer == "NE_ERR_NOT_IN_RUNNING_STATE" || number.is_some_and(|number| number > 133)
}
