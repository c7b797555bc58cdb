//! Rights of groups, as policies write them and servers report them: who is a member, and which machines are meant.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

use crate::{
    error::WireError,
    ids::{DiskId, MachineKey, check_name},
    tls::Role,
};

/// A member of groups.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Member {
    /// A user by name, in small letters: directories don't tell them apart.
    User(String),
    /// A machine that also acts for others.
    Machine(MachineKey),
}

impl Member {
    /// Whom the rights of groups may be given to.
    pub fn of(role: &Role) -> Option<Self> {
        match role {
            Role::User(name) => Some(Self::User(name.to_ascii_lowercase())),
            Role::Client(machine) => Some(Self::Machine(machine.clone())),
            Role::Restore(_) | Role::Server(_) | Role::Janus(_) | Role::Operator(_) => None,
        }
    }
}

impl fmt::Display for Member {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::User(name) => f.write_str(name),
            Self::Machine(machine) => machine.fmt(f),
        }
    }
}

impl FromStr for Member {
    type Err = WireError;

    /// `USER`, or `USER/MACHINE`.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text.contains('/') {
            return Ok(Self::Machine(text.parse()?));
        }
        check_name("user", text)?;
        Ok(Self::User(text.to_ascii_lowercase()))
    }
}

/// Which machines.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Which {
    /// One, with all its disks or one of them.
    Machine(MachineKey, Option<DiskId>),
    /// Those of a user.
    User(String),
    /// All.
    All,
}

impl Which {
    /// True for a machine that is meant, with all its disks or some.
    pub fn takes(&self, machine: &MachineKey) -> bool {
        match self {
            Self::Machine(wanted, _) => wanted == machine,
            Self::User(user) => machine.user() == user,
            Self::All => true,
        }
    }

    /// True for a disk that is meant, of a machine that is.
    pub fn takes_disk(&self, disk: &DiskId) -> bool {
        self.alone().is_none_or(|wanted| wanted == disk)
    }

    /// The one disk that is meant, where it is one.
    pub fn alone(&self) -> Option<&DiskId> {
        match self {
            Self::Machine(_, disk) => disk.as_ref(),
            _ => None,
        }
    }
}

impl fmt::Display for Which {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Machine(machine, None) => write!(f, "{machine}"),
            Self::Machine(machine, Some(disk)) => write!(f, "{machine}/{disk}"),
            Self::User(user) => write!(f, "{user}/*"),
            Self::All => f.write_str("*"),
        }
    }
}

impl FromStr for Which {
    type Err = WireError;

    /// `*`, `USER/*`, `USER/MACHINE` or `USER/MACHINE/DISK`.
    fn from_str(text: &str) -> Result<Self, WireError> {
        if text == "*" {
            return Ok(Self::All);
        }
        if let Some(user) = text.strip_suffix("/*") {
            return check_name("user", user).map(|()| Self::User(user.to_owned()));
        }
        let (machine, disk) = match text.match_indices('/').nth(1) {
            Some((at, _)) => (&text[..at], Some(text[at + 1..].parse()?)),
            None => (text, None),
        };
        Ok(Self::Machine(machine.parse()?, disk))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn machines_are_named_one_by_one_by_user_or_all() {
        let which = |text: &str| text.parse::<Which>();
        assert_eq!(which("*").unwrap(), Which::All);
        assert_eq!(which("alice/*").unwrap(), Which::User("alice".into()));
        let web1 = || "alice/web1".parse().unwrap();
        assert_eq!(which("alice/web1").unwrap(), Which::Machine(web1(), None));
        let sda = Some("sda".parse().unwrap());
        assert_eq!(which("alice/web1/sda").unwrap(), Which::Machine(web1(), sda));
        for wrong in ["", "alice", "alice/", "alice/web1/", "a/b/../c", "/*", "*/web1"] {
            assert!(which(wrong).is_err(), "{wrong}");
        }
    }
}
