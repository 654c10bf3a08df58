//! From text to [`Faults`]. The grammar, with examples, is in `docs/device.md`, "Faults".
//!
//! ```text
//! faults   = [ rule *( separator rule ) ]          separator: commas, semicolons, blanks, line ends
//! rule     = target [ "@" when ] "=" action
//! when     = N | N "+" | N "-" M                   counted from 1
//! action   = "-" NAME | "-" N | "+" N | "delay:" N unit | "lost" | "hold" | "spurious" | field ":" N
//! unit     = "ms" | "s" | "min"
//! ```

use std::str::FromStr;
use std::time::Duration;

use displaydoc::Display;
use nitroxide_abi::code::{ERRNOS, NE_CODES};
use thiserror::Error;

use super::{Action, COMMAND_NAMES, FIELD_NAMES, Faults, Rule, Target, When};
use crate::DeviceCode;

/// More rules than this are refused: they come from a command line, and each is tried for every command.
const MAX_RULES: usize = 256;

/// The longest delay: an hour is beyond every timeout there is.
const MAX_DELAY: Duration = Duration::from_secs(3600);

/// Why a text is no set of fault rules.
#[derive(Debug, Clone, PartialEq, Eq, Display, Error)]
pub enum ParseFaultsError {
    /// The fault rule `{0}` has no `=`; write it like `start=-EIO` or `add-mem@3=-ENOMEM`.
    NoAction(String),
    /// The fault rule `{rule}` names `{target}`, which is no command; known are start, stop, alloc, free, add-mem, add-vcpu, add-bulk-vcpus, info, count, next, get-slot, any and event.
    UnknownTarget {
        /// The whole rule.
        rule: String,
        /// The part that is not understood.
        target: String,
    },
    /// The fault rule `{rule}` says `@{when}`; write `@3` for the third time, `@3+` for the third and all later ones, `@2-4` for a range, counted from 1.
    BadOccurrence {
        /// The whole rule.
        rule: String,
        /// The part that is not understood.
        when: String,
    },
    /// The fault rule `{rule}` asks for `{action}`; possible are an error such as `-EIO`, `-NE_ERR_MEM_MAX_REGIONS` or `-22`, a positive code such as `+5`, `delay:5s`, `lost`, `hold`, `spurious`, and `uid:`, `cid:`, `state:` or `regions:` with a number.
    UnknownAction {
        /// The whole rule.
        rule: String,
        /// The part that is not understood.
        action: String,
    },
    /// The fault rule `{rule}` names the error `{name}`, which is not known; give its number instead, e.g. `-71`.
    UnknownError {
        /// The whole rule.
        rule: String,
        /// The name that is not known.
        name: String,
    },
    /// The fault rule `{rule}` has the delay `{delay}`; write a whole number with its unit, `250ms`, `5s` or `2min`, up to one hour.
    BadDelay {
        /// The whole rule.
        rule: String,
        /// The part that is not understood.
        delay: String,
    },
    /// The fault rule `{0}` does not fit its target: an event can be `lost`, `spurious` or have a `delay:`, nothing else.
    NotForEvents(String),
    /// There are more than 256 fault rules; leave some out.
    TooMany,
}

impl FromStr for Faults {
    type Err = ParseFaultsError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let mut rules = Vec::new();
        for rule in text.split(|c: char| c == ',' || c == ';' || c.is_whitespace()).filter(|rule| !rule.is_empty()) {
            if rules.len() == MAX_RULES {
                return Err(ParseFaultsError::TooMany);
            }
            rules.push(parse_rule(rule)?);
        }
        Ok(Self { rules })
    }
}

fn parse_rule(rule: &str) -> Result<Rule, ParseFaultsError> {
    let (subject, action) = rule.split_once('=').ok_or_else(|| ParseFaultsError::NoAction(rule.to_owned()))?;
    let (target, when) = match subject.split_once('@') {
        None => (subject, When::ALWAYS),
        Some((target, when)) => {
            let bad = || ParseFaultsError::BadOccurrence { rule: rule.to_owned(), when: when.to_owned() };
            (target, parse_when(when).ok_or_else(bad)?)
        }
    };
    let target =
        parse_target(target).ok_or_else(|| ParseFaultsError::UnknownTarget { rule: rule.to_owned(), target: target.to_owned() })?;
    let action = parse_action(rule, action)?;
    if target == Target::Event && !matches!(action, Action::Lost | Action::Spurious | Action::Delay(_)) {
        return Err(ParseFaultsError::NotForEvents(rule.to_owned()));
    }
    Ok(Rule { target, when, action })
}

fn parse_target(name: &str) -> Option<Target> {
    match name {
        "any" => Some(Target::Any),
        "event" => Some(Target::Event),
        _ => COMMAND_NAMES.iter().find(|(known, _)| *known == name).map(|(_, number)| Target::Command(*number)),
    }
}

fn parse_when(text: &str) -> Option<When> {
    let (first, last) = if let Some(first) = text.strip_suffix('+') {
        (parse_number(first)?, u64::MAX)
    } else if let Some((first, last)) = text.split_once('-') {
        (parse_number(first)?, parse_number(last)?)
    } else {
        let only = parse_number(text)?;
        (only, only)
    };
    (first >= 1 && first <= last).then_some(When { first, last })
}

fn parse_action(rule: &str, action: &str) -> Result<Action, ParseFaultsError> {
    let unknown = || ParseFaultsError::UnknownAction { rule: rule.to_owned(), action: action.to_owned() };
    match action {
        "lost" => return Ok(Action::Lost),
        "hold" => return Ok(Action::Hold),
        "spurious" => return Ok(Action::Spurious),
        _ => {}
    }
    if let Some(error) = action.strip_prefix('-') {
        return parse_error(rule, error).map(Action::Refuse);
    }
    if let Some(code) = action.strip_prefix('+') {
        let code = parse_number(code).and_then(|code| i32::try_from(code).ok()).filter(|code| *code > 0);
        return code.map(Action::PositiveCode).ok_or_else(unknown);
    }
    let (name, value) = action.split_once(':').ok_or_else(unknown)?;
    if name == "delay" {
        let bad = || ParseFaultsError::BadDelay { rule: rule.to_owned(), delay: value.to_owned() };
        return parse_delay(value).map(Action::Delay).ok_or_else(bad);
    }
    let field = FIELD_NAMES.iter().find(|(known, _)| *known == name).ok_or_else(unknown)?.1;
    parse_number(value).map(|value| Action::Field(field, value)).ok_or_else(unknown)
}

/// An error by its number or by its name, without the sign.
fn parse_error(rule: &str, text: &str) -> Result<DeviceCode, ParseFaultsError> {
    let unknown = || ParseFaultsError::UnknownError { rule: rule.to_owned(), name: text.to_owned() };
    if text.starts_with(|c: char| c.is_ascii_digit()) {
        let number = parse_number(text).and_then(|number| i32::try_from(number).ok()).ok_or_else(unknown)?;
        return DeviceCode::from_raw(-number).ok_or_else(unknown);
    }
    let mut known = NE_CODES.iter().chain(ERRNOS);
    let found = known.find(|entry| entry.name == text || entry.name.strip_prefix("NE_ERR_") == Some(text));
    found.map(|entry| DeviceCode::from(entry.code)).ok_or_else(unknown)
}

fn parse_delay(text: &str) -> Option<Duration> {
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at_checked(digits)?;
    let number = parse_number(number)?;
    let milliseconds = match unit {
        "ms" => Some(number),
        "s" => number.checked_mul(1000),
        "min" => number.checked_mul(60_000),
        _ => None,
    }?;
    Some(Duration::from_millis(milliseconds)).filter(|delay| *delay <= MAX_DELAY)
}

/// A number in decimal, or in hexadecimal after `0x`; without a sign, unlike `parse`.
fn parse_number(text: &str) -> Option<u64> {
    let (digits, radix) = text.strip_prefix("0x").map_or((text, 10), |digits| (digits, 16));
    if digits.starts_with('+') {
        return None;
    }
    u64::from_str_radix(digits, radix).ok()
}

#[cfg(test)]
mod tests {
    use nitroxide_abi::Code;
    use proptest::prelude::*;

    use super::super::Field;
    use super::*;

    fn parse(text: &str) -> Result<Faults, ParseFaultsError> {
        text.parse()
    }

    fn only_rule(text: &str) -> Rule {
        let faults = parse(text).unwrap();
        assert_eq!(faults.rules.len(), 1, "{text}");
        faults.rules[0]
    }

    #[test]
    fn each_form_of_action_is_understood() {
        let forms = [
            ("start=-EIO", Action::Refuse(DeviceCode::EIO)),
            ("start=-5", Action::Refuse(DeviceCode::EIO)),
            ("start=-5000", Action::Refuse(DeviceCode::from_raw(-5000).unwrap())),
            ("start=-NE_ERR_MEM_MAX_REGIONS", Action::Refuse(DeviceCode::from(Code::MEM_MAX_REGIONS))),
            ("start=-MEM_MAX_REGIONS", Action::Refuse(DeviceCode::from(Code::MEM_MAX_REGIONS))),
            ("start=+5", Action::PositiveCode(5)),
            ("start=delay:5s", Action::Delay(Duration::from_secs(5))),
            ("start=delay:250ms", Action::Delay(Duration::from_millis(250))),
            ("start=delay:2min", Action::Delay(Duration::from_secs(120))),
            ("start=lost", Action::Lost),
            ("start=spurious", Action::Spurious),
            ("start=uid:0", Action::Field(Field::Uid, 0)),
            ("start=cid:77", Action::Field(Field::Cid, 77)),
            ("start=state:0xffff", Action::Field(Field::State, 0xffff)),
            ("start=regions:4", Action::Field(Field::Regions, 4)),
        ];
        for (text, action) in forms {
            assert_eq!(only_rule(text), Rule { target: Target::Command(1), when: When::ALWAYS, action }, "{text}");
        }
    }

    #[test]
    fn every_command_has_a_name() {
        for (name, number) in COMMAND_NAMES {
            assert_eq!(only_rule(&format!("{name}=lost")).target, Target::Command(number));
        }
        assert_eq!(only_rule("any=lost").target, Target::Any);
        assert_eq!(only_rule("event=lost").target, Target::Event);
    }

    #[test]
    fn occurrences_are_one_number_an_open_end_or_a_range() {
        assert_eq!(only_rule("info@3=lost").when, When { first: 3, last: 3 });
        assert_eq!(only_rule("info@3+=lost").when, When { first: 3, last: u64::MAX });
        assert_eq!(only_rule("info@2-4=lost").when, When { first: 2, last: 4 });
    }

    #[test]
    fn rules_may_be_separated_by_commas_semicolons_and_blanks() {
        let faults = parse(" start=-EIO, stop=lost;\n\tevent=spurious ,").unwrap();
        assert_eq!(faults.to_string(), "start=-5,stop=lost,event=spurious");
        assert!(parse(" ,; ").unwrap().is_empty());
    }

    #[test]
    fn each_mistake_has_its_own_message() {
        let mistakes = [
            ("start", "has no `=`"),
            ("begin=-EIO", "names `begin`"),
            ("start@0=-EIO", "`@0`"),
            ("start@4-2=-EIO", "`@4-2`"),
            ("start@=-EIO", "`@`"),
            ("start=sometimes", "asks for `sometimes`"),
            ("start=+0", "asks for `+0`"),
            ("start=-0", "names the error `0`"),
            ("start=-EWHATEVER", "names the error `EWHATEVER`"),
            ("start=-", "names the error ``"),
            ("start=delay:5", "the delay `5`"),
            ("start=delay:2h", "the delay `2h`"),
            ("start=delay:3601s", "the delay `3601s`"),
            ("start=uid:many", "asks for `uid:many`"),
            ("start=size:4", "asks for `size:4`"),
            ("event=-EIO", "does not fit its target"),
        ];
        for (text, part) in mistakes {
            let message = parse(text).unwrap_err().to_string();
            assert!(message.contains(part), "{text}: {message}");
        }
    }

    #[test]
    fn examples_of_the_documentation_are_understood() {
        let faults_chapter = include_str!("../../../../docs/device.md").split("## Faults").nth(1).unwrap();
        let examples = faults_chapter.split("```text\n").nth(1).unwrap().split("```").next().unwrap();
        assert!(examples.lines().count() >= 5);
        for example in examples.lines() {
            let rules = example.split("   ").next().unwrap();
            let rules = rules.split("  ").next().unwrap();
            assert!(parse(rules).is_ok_and(|faults| !faults.is_empty()), "{example}");
        }
    }

    #[test]
    fn more_than_256_rules_are_refused() {
        assert!(parse(&"start=lost ".repeat(256)).is_ok());
        assert_eq!(parse(&"start=lost ".repeat(257)), Err(ParseFaultsError::TooMany));
    }

    fn any_rule() -> impl Strategy<Value = Rule> {
        let target = prop_oneof![(1_u32..=11).prop_map(Target::Command), Just(Target::Any)];
        let when = prop_oneof![Just(When::ALWAYS), (1_u64..1000, 0_u64..1000).prop_map(|(first, more)| When { first, last: first + more })];
        let action = prop_oneof![
            (i32::MIN + 1..0).prop_map(|rc| Action::Refuse(DeviceCode::from_raw(rc).unwrap())),
            (1..i32::MAX).prop_map(Action::PositiveCode),
            (0_u64..3_600_000).prop_map(|ms| Action::Delay(Duration::from_millis(ms))),
            Just(Action::Lost),
            Just(Action::Spurious),
            any::<u64>().prop_map(|value| Action::Field(Field::State, value)),
        ];
        (target, when, action).prop_map(|(target, when, action)| Rule { target, when, action })
    }

    proptest! {
        #[test]
        fn display_gives_text_that_parses_to_the_same_rules(rules in proptest::collection::vec(any_rule(), 0..8)) {
            let faults = Faults { rules };
            prop_assert_eq!(parse(&faults.to_string()), Ok(faults));
        }

        #[test]
        fn no_text_makes_the_parser_panic(text in "[a-z0-9@=:+,; -]{0,40}|\\PC{0,40}") {
            let _ = parse(&text);
        }
    }
}
