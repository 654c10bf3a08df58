//! Misfortune on order: which commands fail, answer late, or lose their reply. The text form is described in `docs/device.md`, "Faults".
//!
//! [`Faults`] are the rules as written; `FaultState` counts commands and says what strikes the present one. Parsing is in
//! `parse`.

use std::fmt;
use std::time::Duration;

use crate::DeviceCode;

mod parse;

pub use parse::ParseFaultsError;

/// Rules that say which commands go wrong, and how. The default is none.
///
/// Made from text such as `start=-EIO, add-mem@3=-ENOMEM, start=delay:5s, stop=lost, event=spurious`; [`Display`](fmt::Display) gives text
/// that parses to the same rules.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Faults {
    pub(crate) rules: Vec<Rule>,
}

impl Faults {
    /// No faults.
    #[must_use]
    pub const fn none() -> Self {
        Self { rules: Vec::new() }
    }

    /// Whether there is no rule.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.rules.is_empty()
    }
}

impl fmt::Display for Faults {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, rule) in self.rules.iter().enumerate() {
            let separator = if index == 0 { "" } else { "," };
            write!(f, "{separator}{rule}")?;
        }
        Ok(())
    }
}

/// One rule: what it strikes, when, and what happens then.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Rule {
    pub(crate) target: Target,
    pub(crate) when: When,
    pub(crate) action: Action,
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}={}", self.target, self.when, self.action)
    }
}

/// What a rule strikes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Target {
    /// The command with this number, 1 to 11.
    Command(u32),
    /// Every command, unknown ones included.
    Any,
    /// Events.
    Event,
}

/// The names of commands in rules, by number.
pub(crate) const COMMAND_NAMES: [(&str, u32); 11] = [
    ("start", 1),
    ("get-slot", 2),
    ("stop", 3),
    ("alloc", 4),
    ("free", 5),
    ("add-mem", 6),
    ("add-vcpu", 7),
    ("count", 8),
    ("next", 9),
    ("info", 10),
    ("add-bulk-vcpus", 11),
];

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Command(number) => {
                let name = COMMAND_NAMES.iter().find(|(_, n)| n == number).map_or("any", |(name, _)| name);
                f.write_str(name)
            }
            Self::Any => f.write_str("any"),
            Self::Event => f.write_str("event"),
        }
    }
}

/// Which of the target's occurrences a rule strikes, counted from 1 since the rules were set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct When {
    /// The first occurrence, 1 and up.
    pub(crate) first: u64,
    /// The last occurrence, not below `first`; `u64::MAX` for no end.
    pub(crate) last: u64,
}

impl When {
    pub(crate) const ALWAYS: Self = Self { first: 1, last: u64::MAX };

    fn includes(self, occurrence: u64) -> bool {
        (self.first..=self.last).contains(&occurrence)
    }
}

impl fmt::Display for When {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.first, self.last) {
            (1, u64::MAX) => Ok(()),
            (first, u64::MAX) => write!(f, "@{first}+"),
            (first, last) if first == last => write!(f, "@{first}"),
            (first, last) => write!(f, "@{first}-{last}"),
        }
    }
}

/// What happens when a rule strikes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Action {
    /// The command is not carried out; the reply carries this code.
    Refuse(DeviceCode),
    /// The command is carried out; the reply carries this positive number instead of 0.
    PositiveCode(i32),
    /// The command is carried out; the reply (or the event) comes this much later.
    Delay(Duration),
    /// The command is carried out, but its reply (or the event) never comes.
    Lost,
    /// The command is not carried out before the device is reset, and refused then.
    Hold,
    /// An event is raised although nothing has happened.
    Spurious,
    /// The command is carried out, but a field of its reply is wrong.
    Field(Field, u64),
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Refuse(code) => write!(f, "{}", code.raw()),
            Self::PositiveCode(rc) => write!(f, "+{rc}"),
            Self::Delay(time) => write!(f, "delay:{}ms", time.as_millis()),
            Self::Lost => f.write_str("lost"),
            Self::Hold => f.write_str("hold"),
            Self::Spurious => f.write_str("spurious"),
            Self::Field(field, value) => write!(f, "{field}:{value}"),
        }
    }
}

/// A field of a reply that a rule can set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Field {
    Uid,
    Cid,
    Regions,
    State,
}

/// The names of fields in rules.
pub(crate) const FIELD_NAMES: [(&str, Field); 4] =
    [("uid", Field::Uid), ("cid", Field::Cid), ("regions", Field::Regions), ("state", Field::State)];

impl fmt::Display for Field {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = FIELD_NAMES.iter().find(|(_, field)| field == self).map_or("uid", |(name, _)| name);
        f.write_str(name)
    }
}

/// What strikes one command.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Strike {
    /// Do not carry it out, answer this.
    pub(crate) refuse: Option<DeviceCode>,
    /// Answer this instead of 0.
    pub(crate) positive_code: Option<i32>,
    /// Answer later by this much, all rules added up.
    pub(crate) delay: Duration,
    /// Do not answer.
    pub(crate) lost: bool,
    /// Hold it until a reset.
    pub(crate) hold: bool,
    /// Raise an event.
    pub(crate) spurious: bool,
    /// Answer with these fields.
    pub(crate) fields: Vec<(Field, u64)>,
}

/// What strikes one event.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct EventStrike {
    /// Raise it later by this much.
    pub(crate) delay: Duration,
    /// Do not raise it.
    pub(crate) lost: bool,
}

/// The rules in force and how often each target has occurred since they were set.
#[derive(Debug, Default)]
pub(crate) struct FaultState {
    faults: Faults,
    /// Occurrences by command number; 0 for unknown commands.
    commands: [u64; 12],
    any: u64,
    events: u64,
}

impl FaultState {
    pub(crate) fn new(faults: Faults) -> Self {
        Self { faults, ..Self::default() }
    }

    /// Counts a command and says what strikes it. The first rule that refuses wins; delays add up.
    pub(crate) fn next_command(&mut self, number: u32) -> Strike {
        let index = usize::try_from(number).ok().filter(|index| *index < self.commands.len()).unwrap_or(0);
        let of_its_kind = self.commands.get_mut(index).map_or(0, |count| {
            *count = count.saturating_add(1);
            *count
        });
        self.any = self.any.saturating_add(1);
        let mut strike = Strike::default();
        for rule in &self.faults.rules {
            let struck = match rule.target {
                Target::Command(n) => n == number && rule.when.includes(of_its_kind),
                Target::Any => rule.when.includes(self.any),
                // A spurious event belongs to no real one, so these rules count commands.
                Target::Event => rule.action == Action::Spurious && rule.when.includes(self.any),
            };
            if struck {
                strike.add(rule.action);
            }
        }
        strike
    }

    /// Counts an event and says what strikes it.
    pub(crate) fn next_event(&mut self) -> EventStrike {
        self.events = self.events.saturating_add(1);
        let mut strike = EventStrike::default();
        for rule in self.faults.rules.iter().filter(|rule| rule.target == Target::Event && rule.when.includes(self.events)) {
            match rule.action {
                Action::Delay(time) => strike.delay = strike.delay.saturating_add(time),
                Action::Lost => strike.lost = true,
                _ => {}
            }
        }
        strike
    }
}

impl Strike {
    fn add(&mut self, action: Action) {
        match action {
            Action::Refuse(code) => {
                self.refuse.get_or_insert(code);
            }
            Action::PositiveCode(rc) => {
                self.positive_code.get_or_insert(rc);
            }
            Action::Delay(time) => self.delay = self.delay.saturating_add(time),
            Action::Lost => self.lost = true,
            Action::Hold => self.hold = true,
            Action::Spurious => self.spurious = true,
            Action::Field(field, value) => self.fields.push((field, value)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const START: u32 = 1;
    const ADD_MEM: u32 = 6;
    const INFO: u32 = 10;

    fn state(text: &str) -> FaultState {
        FaultState::new(text.parse().unwrap())
    }

    #[test]
    fn third_add_mem_alone_is_refused() {
        let mut state = state("add-mem@3=-ENOMEM");
        let struck: Vec<bool> = (0..5).map(|_| state.next_command(ADD_MEM).refuse == Some(DeviceCode::ENOMEM)).collect();
        assert_eq!(struck, [false, false, true, false, false]);
    }

    #[test]
    fn ranges_and_open_ends_are_counted_per_command() {
        let mut state = state("start@2+=-5, info@1-2=-22");
        assert_eq!(state.next_command(START).refuse, None);
        assert_eq!(state.next_command(INFO).refuse, Some(DeviceCode::EINVAL));
        assert_eq!(state.next_command(START).refuse, Some(DeviceCode::EIO));
        assert_eq!(state.next_command(INFO).refuse, Some(DeviceCode::EINVAL));
        assert_eq!(state.next_command(INFO).refuse, None);
        assert_eq!(state.next_command(START).refuse, Some(DeviceCode::EIO));
    }

    #[test]
    fn first_refusal_wins_and_delays_add_up() {
        let mut state = state("start=-EIO,start=-EINVAL,start=delay:1s,any=delay:500ms");
        let strike = state.next_command(START);
        assert_eq!(strike.refuse, Some(DeviceCode::EIO));
        assert_eq!(strike.delay, Duration::from_millis(1500));
    }

    #[test]
    fn spurious_event_rules_count_commands_and_lost_ones_count_events() {
        let mut state = state("event@2=spurious,event@1=lost");
        assert!(!state.next_command(START).spurious);
        assert!(state.next_command(INFO).spurious);
        assert!(state.next_event().lost);
        assert!(!state.next_event().lost);
    }

    #[test]
    fn any_counts_unknown_commands_too() {
        let mut state = state("any@2=lost");
        assert!(!state.next_command(4711).lost);
        assert!(state.next_command(START).lost);
        assert!(!state.next_command(START).lost);
    }
}
