//! Which machines a caller may see, of all that this janus knows: its own, and those that groups give, as servers have reported.
//!
//! Servers decide themselves about each call. This is for what janus answers from memory, and so that nobody moves the turn of a
//! machine that isn't his.

use janus_proto::{
    ids::{MachineKey, ServerId},
    pb,
    tls::{Principal, Role},
};

use super::{Inner, Registry};

/// Members and machines that are kept of one server's groups, all together; more of them aren't known here.
const MAX_NAMES: usize = 100_000;

/// What groups may do on one server, as it has reported.
#[derive(Debug, Default)]
pub(super) struct Granted {
    groups: Vec<pb::Grant>,
    /// `None`: the first list isn't whole yet.
    digest: Option<String>,
    /// The list that is under way.
    staged: Vec<pb::Grant>,
}

impl Granted {
    /// Takes a part of the list in.
    pub fn take(&mut self, told: pb::Grants) {
        let names =
            |grant: &pb::Grant| 1 + grant.members.len() + grant.backup.len() + grant.restore.len();
        let mut kept: usize = self.staged.iter().map(names).sum();
        for grant in told.grants {
            kept += names(&grant);
            if kept <= MAX_NAMES {
                self.staged.push(grant);
            }
        }
        if !told.more {
            self.groups = std::mem::take(&mut self.staged);
            self.digest = Some(told.policy_digest);
        }
    }
}

/// Which machines somebody may see.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Sight {
    is_all: bool,
    own: Option<MachineKey>,
    user: Option<String>,
    backup: Vec<String>,
    restore: Vec<String>,
}

impl Sight {
    /// Of who administers, of servers, and of this janus itself.
    pub fn all() -> Self {
        Self { is_all: true, ..Self::default() }
    }

    /// True when nothing is hidden.
    pub fn is_all(&self) -> bool {
        self.is_all
    }

    /// True when it may see this machine.
    pub fn sees(&self, machine: &MachineKey) -> bool {
        self.is_all
            || self.own.as_ref() == Some(machine)
            || self.user.as_deref() == Some(machine.user())
            || self.backup.iter().chain(&self.restore).any(|which| takes(which, machine))
    }

    /// True when it may see the machine of this name.
    pub fn sees_name(&self, machine: &str) -> bool {
        self.is_all || machine.parse().is_ok_and(|machine| self.sees(&machine))
    }

    /// True when it may make backups of this machine.
    pub fn writes(&self, machine: &MachineKey) -> bool {
        self.own.as_ref() == Some(machine) || self.backup.iter().any(|which| takes(which, machine))
    }
}

/// `*`, `<user>/*` or `<user>/<machine>`.
fn takes(which: &str, machine: &MachineKey) -> bool {
    match which.strip_suffix('*') {
        Some("") => true,
        Some(user) => user.strip_suffix('/') == Some(machine.user()),
        None => which == machine.as_str(),
    }
}

impl Inner {
    fn groups(&self) -> impl Iterator<Item = &pb::Grant> {
        self.servers.values().filter_map(|state| state.granted.as_ref()).flat_map(|g| &g.groups)
    }
}

impl Registry {
    /// What a caller may see.
    pub fn sight(&self, caller: &Principal) -> Sight {
        let (own, user, member) = match &caller.role {
            Role::Operator(_) | Role::Server(_) | Role::Janus(_) => return Sight::all(),
            Role::Restore(machine) => {
                return Sight { own: Some(machine.clone()), ..Sight::default() };
            }
            Role::Client(machine) => (Some(machine.clone()), None, machine.to_string()),
            Role::User(name) => (None, Some(name.clone()), name.to_ascii_lowercase()),
        };
        let mut sight = Sight { own, user, ..Sight::default() };
        let inner = self.lock();
        for group in inner.groups().filter(|group| group.members.contains(&member)) {
            sight.backup.extend(group.backup.iter().cloned());
            sight.restore.extend(group.restore.iter().cloned());
        }
        sight
    }

    /// True when some server reports: what none of them gives isn't given.
    pub fn is_told_of_grants(&self) -> bool {
        self.lock().servers.values().any(|state| state.last_message.is_some())
    }

    /// Digest of each server's policy, of those that have told; empty: it has none.
    pub fn policies(&self) -> Vec<(ServerId, String)> {
        let inner = self.lock();
        let told = inner
            .servers
            .iter()
            .filter_map(|(id, state)| Some((id.clone(), state.granted.as_ref()?.digest.clone()?)));
        told.collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_machines_are_whole() {
        let machine: MachineKey = "alice/web1".parse().unwrap();
        for which in ["*", "alice/*", "alice/web1"] {
            assert!(takes(which, &machine), "{which}");
        }
        for which in ["", "alice", "alic*", "alice/we*", "alice/web", "bob/*", "*/web1", "/*"] {
            assert!(!takes(which, &machine), "{which}");
        }
    }

    #[test]
    fn a_list_counts_when_it_is_whole() {
        let grant = |member: &str| pb::Grant {
            members: vec![member.into()],
            restore: vec!["alice/*".into()],
            ..Default::default()
        };
        let message = |member: &str, more: bool| pb::Grants {
            grants: vec![grant(member)],
            policy_digest: if more { String::new() } else { "digest".into() },
            more,
        };
        let mut granted = Granted::default();
        granted.take(message("carol", true));
        assert!(granted.groups.is_empty() && granted.digest.is_none());
        granted.take(message("dave", false));
        assert_eq!(granted.groups, [grant("carol"), grant("dave")]);
        granted.take(message("erin", false));
        assert_eq!((granted.groups.len(), granted.digest.as_deref()), (1, Some("digest")));
        let names = (0..MAX_NAMES).map(|number| number.to_string()).collect();
        let many = pb::Grant { members: names, ..Default::default() };
        granted.take(pb::Grants { grants: vec![many], ..Default::default() });
        assert!(granted.groups.is_empty());
    }
}
