//! Users of the image: `user[:group]` by name or number, resolved with the image's own passwd and group files (passwd(5), group(5)).

use std::{fmt, fs, path::Path};

/// What the application runs as.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// The user's number.
    pub uid: u32,
    /// The primary group's number.
    pub gid: u32,
    /// Further groups; empty when the group was given explicitly.
    pub groups: Vec<u32>,
    /// The home directory of the passwd entry, `/` without one.
    pub home: String,
}

/// Why a user cannot be resolved.
#[derive(Debug, PartialEq, Eq)]
pub enum ResolveError {
    /// No such name in the image's passwd file.
    NoSuchUser(String),
    /// No such name in the image's group file.
    NoSuchGroup(String),
}

impl fmt::Display for ResolveError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoSuchUser(name) => {
                write!(f, "The image's USER `{name}` is not in its /etc/passwd; use a number or add the user to the image")
            }
            Self::NoSuchGroup(name) => {
                write!(f, "The image's group `{name}` is not in its /etc/group; use a number or add the group to the image")
            }
        }
    }
}

/// Resolves `wanted` with the passwd and group files in the directory `etc`; missing files are empty ones.
///
/// # Errors
///
/// A name that is not in the file. A number always resolves; without a passwd entry its group is 0, as in container engines.
pub fn resolve(wanted: &str, etc: &Path) -> Result<Identity, ResolveError> {
    let passwd = fs::read_to_string(etc.join("passwd")).unwrap_or_default();
    let groups = fs::read_to_string(etc.join("group")).unwrap_or_default();
    resolve_in(wanted, &passwd, &groups)
}

fn resolve_in(wanted: &str, passwd: &str, group_file: &str) -> Result<Identity, ResolveError> {
    let (user, group) = wanted.split_once(':').map_or((wanted, None), |(user, group)| (user, Some(group)));
    let number = user.parse::<u32>().ok();
    let entry =
        passwd.lines().map(fields).find(|entry| entry.first() == Some(&user) || (number.is_some() && field_number(entry, 2) == number));
    let uid = match (&entry, number) {
        (Some(entry), _) => field_number(entry, 2).ok_or_else(|| ResolveError::NoSuchUser(user.to_owned()))?,
        (None, Some(number)) => number,
        (None, None) => return Err(ResolveError::NoSuchUser(user.to_owned())),
    };
    let home = entry.as_ref().and_then(|entry| entry.get(5)).filter(|home| !home.is_empty()).map_or("/", |home| *home).to_owned();
    if let Some(group) = group.filter(|group| !group.is_empty()) {
        let gid = match group.parse() {
            Ok(gid) => gid,
            Err(_) => group_file
                .lines()
                .map(fields)
                .find(|entry| entry.first() == Some(&group))
                .and_then(|entry| field_number(&entry, 2))
                .ok_or_else(|| ResolveError::NoSuchGroup(group.to_owned()))?,
        };
        return Ok(Identity { uid, gid, groups: Vec::new(), home });
    }
    let name = entry.as_ref().and_then(|entry| entry.first().copied()).unwrap_or_default();
    let gid = entry.as_ref().and_then(|entry| field_number(entry, 3)).unwrap_or(0);
    let is_member =
        |entry: &Vec<&str>| !name.is_empty() && entry.get(3).is_some_and(|members| members.split(',').any(|member| member == name));
    let groups = group_file.lines().map(fields).filter(is_member).filter_map(|entry| field_number(&entry, 2)).collect();
    Ok(Identity { uid, gid, groups, home })
}

fn fields(line: &str) -> Vec<&str> {
    line.split(':').collect()
}

fn field_number(entry: &[&str], index: usize) -> Option<u32> {
    entry.get(index)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\napp:x:1000:1001:App:/home/app:/bin/sh\nbroken:x:\n";
    const GROUP: &str = "root:x:0:\napp:x:1001:\naudio:x:29:other,app\ndisk:x:6:other\n";

    #[test]
    fn name_resolves_with_primary_and_further_groups() {
        let identity = resolve_in("app", PASSWD, GROUP).unwrap();
        assert_eq!(identity, Identity { uid: 1000, gid: 1001, groups: vec![29], home: "/home/app".into() });
    }

    #[test]
    fn number_with_entry_gets_the_entrys_group() {
        assert_eq!(resolve_in("1000", PASSWD, GROUP).unwrap().gid, 1001);
    }

    #[test]
    fn number_without_entry_gets_group_zero() {
        assert_eq!(resolve_in("4242", PASSWD, GROUP).unwrap(), Identity { uid: 4242, gid: 0, groups: vec![], home: "/".into() });
    }

    #[test]
    fn explicit_group_wins_and_clears_further_groups() {
        assert_eq!(
            resolve_in("app:disk", PASSWD, GROUP).unwrap(),
            Identity { uid: 1000, gid: 6, groups: vec![], home: "/home/app".into() }
        );
        assert_eq!(resolve_in("5:7", "", "").unwrap(), Identity { uid: 5, gid: 7, groups: vec![], home: "/".into() });
    }

    #[test]
    fn unknown_names_and_broken_entries_are_errors() {
        assert_eq!(resolve_in("nobody", PASSWD, GROUP), Err(ResolveError::NoSuchUser("nobody".into())));
        assert_eq!(resolve_in("app:none", PASSWD, GROUP), Err(ResolveError::NoSuchGroup("none".into())));
        assert_eq!(resolve_in("broken", PASSWD, GROUP), Err(ResolveError::NoSuchUser("broken".into())));
    }
}
