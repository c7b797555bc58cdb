//! Which person asks for a command, as far as the kernel knows.

use std::{fs, process::Command};

use crate::audit::Who;

/// What the kernel says where nobody has logged in.
const NOBODY: u32 = u32::MAX;

/// Somebody who asks for a command.
///
/// Who has become root by `sudo` or `su` is still known by the account that he logged in with, where the system keeps track of it
/// (`pam_loginuid`). Root can become everybody, and can write that, too.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Person {
    uid: u32,
    login: Option<u32>,
}

impl Person {
    /// The process at the other end of a socket. Reads a file.
    pub fn of_peer(uid: u32, pid: Option<i32>) -> Self {
        let path = pid.map(|pid| format!("/proc/{pid}/loginuid"));
        Self { uid, login: path.and_then(|path| login(&path)) }
    }

    /// This process. Reads a file.
    pub fn own() -> Self {
        Self { uid: rustix::process::geteuid().as_raw(), login: login("/proc/self/loginuid") }
    }

    /// Tells persons apart: the account of the login, else the user.
    pub fn id(&self) -> u32 {
        self.login.unwrap_or(self.uid)
    }

    /// Name of the account that the kernel says, whoever logged in; also one that only a directory knows. Runs a program.
    pub fn account(&self) -> String {
        let asked = Command::new("getent").args(["passwd", &self.uid.to_string()]).output();
        let text = asked.ok().and_then(|output| String::from_utf8(output.stdout).ok());
        let name = text.as_deref().and_then(|text| text.split(':').next());
        name.filter(|name| !name.is_empty()).map_or_else(|| named(self.uid), str::to_owned)
    }

    /// Name of the account, or its number. Reads a file.
    pub fn name(&self) -> String {
        named(self.id())
    }

    /// As it is recorded.
    pub fn who(&self) -> Who {
        let login = self.login.map(|login| format!(", logged in as {login}")).unwrap_or_default();
        Who::named(format!("local {} (uid {}{login})", self.name(), self.uid))
    }
}

fn named(id: u32) -> String {
    let users = fs::read_to_string("/etc/passwd").unwrap_or_default();
    let name = users.lines().find_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        (fields.nth(1)?.parse() == Ok(id)).then(|| name.to_owned())
    });
    name.unwrap_or_else(|| id.to_string())
}

fn login(path: &str) -> Option<u32> {
    let id: u32 = fs::read_to_string(path).ok()?.trim().parse().ok()?;
    (id != NOBODY).then_some(id)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_person_is_who_logged_in() {
        let root = Person { uid: 0, login: None };
        let alice = Person { uid: 0, login: Some(1_234_567) };
        assert_ne!(root.id(), alice.id());
        assert_eq!((root.name().as_str(), alice.name().as_str()), ("root", "1234567"));
        assert_eq!(root.who().name, "local root (uid 0)");
        assert_eq!(alice.who().name, "local 1234567 (uid 0, logged in as 1234567)");
        assert_eq!(
            Person::own(),
            Person::of_peer(Person::own().uid, i32::try_from(std::process::id()).ok())
        );
    }
}
