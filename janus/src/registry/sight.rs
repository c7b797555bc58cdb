//! Which machines a caller may see, of all that this janus knows: its own, and those that groups give, as servers have reported.
//!
//! Servers decide themselves about each call. This is for what janus answers from memory, and so that nobody moves the turn of a
//! machine that isn't his.

use std::collections::HashSet;

use janus_proto::{
    grants::{Member, Which},
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
    groups: Vec<Group>,
    /// `None`: the first list isn't whole yet.
    digest: Option<String>,
    /// The list that is under way.
    staged: Vec<Group>,
}

#[derive(Debug, PartialEq, Eq)]
struct Group {
    members: HashSet<Member>,
    backup: Vec<Which>,
    restore: Vec<Which>,
}

impl Group {
    /// What can't be read stands for nobody, and for no machine.
    fn of(told: &pb::Grant) -> Self {
        let machines = |texts: &[String]| {
            let all = texts.iter().filter_map(|text| text.parse::<Which>().ok());
            all.filter(|which| which.alone().is_none()).collect()
        };
        Self {
            members: told.members.iter().filter_map(|name| name.parse().ok()).collect(),
            backup: machines(&told.backup),
            restore: machines(&told.restore),
        }
    }

    fn names(&self) -> usize {
        1 + self.members.len() + self.backup.len() + self.restore.len()
    }
}

impl Granted {
    /// A new stream begins: what an older one has told of a list that it didn't end is no part of the next.
    pub fn begin(&mut self) {
        self.staged.clear();
    }

    /// Takes a part of the list in.
    pub fn take(&mut self, told: pb::Grants) {
        let mut kept: usize = self.staged.iter().map(Group::names).sum();
        for group in told.grants.iter().map(Group::of) {
            kept += group.names();
            if kept <= MAX_NAMES {
                self.staged.push(group);
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
    backup: Vec<Which>,
    restore: Vec<Which>,
    /// No server reports, so what groups give isn't known.
    is_untold: bool,
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
            || self.backup.iter().chain(&self.restore).any(|which| which.takes(machine))
    }

    /// True when it may see the machine of this name.
    pub fn sees_name(&self, machine: &str) -> bool {
        self.is_all || machine.parse().is_ok_and(|machine| self.sees(&machine))
    }

    /// True when it may name this machine in a call, or might: before any server reports, the one that gets the call decides alone.
    pub fn may_name(&self, machine: &MachineKey) -> bool {
        self.is_untold || self.sees(machine)
    }

    /// True when it may name it in a call that writes, or might.
    pub fn may_write(&self, machine: &MachineKey) -> bool {
        self.is_untold || self.is_all || self.writes(machine)
    }

    /// True when it may make backups of this machine.
    fn writes(&self, machine: &MachineKey) -> bool {
        self.own.as_ref() == Some(machine) || self.backup.iter().any(|which| which.takes(machine))
    }
}

impl Inner {
    fn groups(&self) -> impl Iterator<Item = &Group> {
        self.servers.values().filter_map(|state| state.granted.as_ref()).flat_map(|g| &g.groups)
    }
}

impl Registry {
    /// What a caller may see.
    pub fn sight(&self, caller: &Principal) -> Sight {
        self.sight_of(&caller.role)
    }

    pub(super) fn sight_of(&self, role: &Role) -> Sight {
        if matches!(role, Role::Operator(_) | Role::Server(_) | Role::Janus(_)) {
            return Sight::all();
        }
        let user = match role {
            Role::User(name) => Some(name.clone()),
            _ => None,
        };
        let mut sight = Sight { own: role.machine().cloned(), user, ..Sight::default() };
        let inner = self.lock();
        sight.is_untold = inner.servers.values().all(|state| state.last_message.is_none());
        let Some(member) = Member::of(role) else { return sight };
        for group in inner.groups().filter(|group| group.members.contains(&member)) {
            sight.backup.extend(group.backup.iter().cloned());
            sight.restore.extend(group.restore.iter().cloned());
        }
        sight
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
        let takes = |which: &str| {
            let grant = pb::Grant { restore: vec![which.into()], ..Default::default() };
            Group::of(&grant).restore.iter().any(|which| which.takes(&machine))
        };
        for which in ["*", "alice/*", "alice/web1"] {
            assert!(takes(which), "{which}");
        }
        for which in ["", "alice", "alic*", "alice/we*", "alice/web", "bob/*", "*/web1", "/*"] {
            assert!(!takes(which), "{which}");
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
        assert_eq!(granted.groups, [Group::of(&grant("carol")), Group::of(&grant("dave"))]);
        granted.take(message("frank", true));
        granted.begin();
        assert_eq!(granted.groups.len(), 2, "the last whole list counts");
        granted.take(message("erin", false));
        assert_eq!((granted.groups.len(), granted.digest.as_deref()), (1, Some("digest")));
        let names = (0..MAX_NAMES).map(|number| number.to_string()).collect();
        let many = pb::Grant { members: names, ..Default::default() };
        granted.take(pb::Grants { grants: vec![many], ..Default::default() });
        assert!(granted.groups.is_empty());
    }
}
