//! Rights beyond the own machine: groups of users and machines, from a policy file and from a directory, and what they may do.
//!
//! What a caller may do is looked up once for each call, in memory: [`follow`] reads the file and asks the directory in the background.
//! A right that was taken away ends the calls that build on it.

pub mod directory;
pub mod file;
pub mod follow;

use std::{
    collections::{BTreeSet, HashMap},
    fmt,
    sync::{Arc, PoisonError, RwLock},
};

pub use janus_proto::grants::{Member, Which};
use janus_proto::{ids::MachineKey, pb, tls::Role};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// Members in one message to janus.
const A_MESSAGE: usize = 1000;

/// What a group may do to machines.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Right {
    /// List what they have, read hashes, and make backups in their names.
    Backup,
    /// List and read what they have.
    Restore,
    /// Both, and to administer them on a server's host, by an account of the same name.
    Admin,
}

impl fmt::Display for Right {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Backup => "backup",
            Self::Restore => "restore",
            Self::Admin => "admin",
        })
    }
}

impl Right {
    const ALL: [Self; 3] = [Self::Backup, Self::Restore, Self::Admin];
}

/// What the members of a group may do.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Rights {
    /// Machines to make backups of.
    pub backup: Vec<Which>,
    /// Machines to read.
    pub restore: Vec<Which>,
    /// Machines to administer; these are in the other lists, too.
    pub admin: Vec<Which>,
}

impl Rights {
    /// The machines that a right is for.
    pub fn machines(&self, right: Right) -> &[Which] {
        match right {
            Right::Backup => &self.backup,
            Right::Restore => &self.restore,
            Right::Admin => &self.admin,
        }
    }
}

/// A group with everybody who is in it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Members {
    /// By name in the policy, or by the directory.
    pub members: BTreeSet<Member>,
    /// What they may do.
    pub rights: Arc<Rights>,
}

/// The rights of one caller at one time, of all its groups.
#[derive(Debug, Default)]
pub struct Grants {
    groups: Vec<Arc<Rights>>,
    /// One of them was taken away.
    lessened: CancellationToken,
}

impl Grants {
    fn machines(&self, right: Right) -> impl Iterator<Item = &Which> {
        self.groups.iter().flat_map(move |rights| rights.machines(right))
    }

    /// True when the right is there for this machine.
    pub fn allow(&self, right: Right, machine: &MachineKey) -> bool {
        self.machines(right).any(|which| which.takes(machine))
    }

    /// True when the right is there for some machine.
    pub fn have(&self, right: Right) -> bool {
        self.machines(right).next().is_some()
    }

    /// True when there are none.
    pub fn are_none(&self) -> bool {
        self.groups.is_empty()
    }

    /// Ends when one of the rights is taken away.
    pub fn lessened(&self) -> CancellationToken {
        self.lessened.clone()
    }

    /// True when all of it is in `other`, too.
    fn are_within(&self, other: &Self) -> bool {
        Right::ALL.into_iter().all(|right| {
            self.machines(right).all(|which| other.machines(right).any(|others| others == which))
        })
    }
}

/// The rights of all, as they are now. Cheap to ask.
#[derive(Debug)]
pub struct Policy {
    state: RwLock<State>,
    changes: watch::Sender<u64>,
}

#[derive(Debug, Default)]
struct State {
    groups: Vec<Members>,
    grants: HashMap<Member, Arc<Grants>>,
    digest: String,
    problems: Vec<String>,
}

impl Default for Policy {
    fn default() -> Self {
        Self { state: RwLock::default(), changes: watch::Sender::new(0) }
    }
}

impl Policy {
    /// What a caller may do beyond its own machine.
    pub fn of(&self, role: &Role) -> Arc<Grants> {
        let member = Member::of(role);
        let state = self.state.read().unwrap_or_else(PoisonError::into_inner);
        member.and_then(|member| state.grants.get(&member).cloned()).unwrap_or_default()
    }

    /// Says when rights have changed.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    /// What doesn't work, a line each, for people.
    pub fn problems(&self) -> Vec<String> {
        self.state.read().unwrap_or_else(PoisonError::into_inner).problems.clone()
    }

    /// Replaces what doesn't work.
    fn set_problems(&self, problems: Vec<String>) {
        self.state.write().unwrap_or_else(PoisonError::into_inner).problems = problems;
    }

    /// Replaces all rights. Who has less than before loses the calls that build on them.
    fn set(&self, digest: String, groups: Vec<Members>) {
        let mut state = self.state.write().unwrap_or_else(PoisonError::into_inner);
        if state.digest == digest && state.groups == groups {
            return;
        }
        let mut now: HashMap<Member, Vec<Arc<Rights>>> = HashMap::new();
        for Members { members, rights } in &groups {
            for member in members {
                now.entry(member.clone()).or_default().push(rights.clone());
            }
        }
        let mut known = std::mem::take(&mut state.grants);
        for (member, groups) in now {
            let mut grants = Grants { groups, lessened: CancellationToken::new() };
            if let Some(before) = known.remove(&member) {
                match before.are_within(&grants) {
                    true => grants.lessened = before.lessened(),
                    false => before.lessened.cancel(),
                }
            }
            state.grants.insert(member, Arc::new(grants));
        }
        known.values().for_each(|gone| gone.lessened.cancel());
        (state.digest, state.groups) = (digest, groups);
        drop(state);
        self.changes.send_modify(|number| *number += 1);
    }

    /// As janus is told, who shows lists of servers that are away: at least one message.
    pub fn messages(&self) -> Vec<pb::Grants> {
        let state = self.state.read().unwrap_or_else(PoisonError::into_inner);
        let texts = |machines: &[Which]| machines.iter().map(ToString::to_string).collect();
        let mut messages = Vec::new();
        for Members { members, rights } in &state.groups {
            let members: Vec<_> = members.iter().map(ToString::to_string).collect();
            messages.extend(members.chunks(A_MESSAGE).map(|members| pb::Grants {
                grants: vec![pb::Grant {
                    members: members.to_vec(),
                    backup: texts(&rights.backup),
                    restore: texts(&rights.restore),
                }],
                more: true,
                ..Default::default()
            }));
        }
        messages.push(pb::Grants { policy_digest: state.digest.clone(), ..Default::default() });
        messages
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn group(members: &[&str], restore: &[&str]) -> Members {
        let members = members.iter().map(|name| name.parse().unwrap()).collect();
        let restore = restore.iter().map(|which| which.parse().unwrap()).collect();
        Members { members, rights: Arc::new(Rights { restore, ..Rights::default() }) }
    }

    #[test]
    fn a_right_that_is_taken_away_ends_what_builds_on_it_and_nothing_else() {
        let policy = Policy::default();
        let (carol, dave) = (Role::User("Carol".into()), Role::User("dave".into()));
        let machine: MachineKey = "alice/web1".parse().unwrap();
        let may = |role: &Role| policy.of(role).allow(Right::Restore, &machine);
        policy.set("1".into(), vec![group(&["carol", "dave"], &["alice/*"])]);
        assert!(may(&carol) && may(&dave) && !policy.of(&carol).have(Right::Backup));
        assert!(!may(&Role::Operator("carol".into())) && !may(&Role::User("caro".into())));
        let (of_carol, of_dave) = (policy.of(&carol).lessened(), policy.of(&dave).lessened());

        let more = group(&["carol"], &["bob/*"]);
        policy.set("2".into(), vec![group(&["carol", "dave"], &["alice/*"]), more.clone()]);
        assert!(!of_carol.is_cancelled() && !of_dave.is_cancelled());
        policy.set("3".into(), vec![group(&["carol"], &["alice/*"]), more.clone()]);
        assert!(!of_carol.is_cancelled() && of_dave.is_cancelled());
        assert!(may(&carol) && !may(&dave));
        policy.set("4".into(), vec![group(&["carol"], &["alice/web2"]), more]);
        assert!(of_carol.is_cancelled() && !may(&carol));
        assert!(!policy.of(&carol).lessened().is_cancelled());
    }

    #[test]
    fn janus_is_told_of_all_in_messages_of_bounded_size() {
        let policy = Policy::default();
        assert_eq!(policy.messages(), [pb::Grants::default()]);
        let names: Vec<_> = (0..2500).map(|number| format!("user{number}")).collect();
        let names: Vec<_> = names.iter().map(String::as_str).collect();
        let mut changes = policy.changes();
        policy.set("digest".into(), vec![group(&names, &["*"])]);
        assert!(changes.has_changed().unwrap());
        changes.mark_unchanged();
        let told = policy.messages();
        assert_eq!(told.len(), 4);
        let members = told.iter().flat_map(|message| &message.grants).map(|g| g.members.len());
        assert_eq!(members.collect::<Vec<_>>(), [1000, 1000, 500]);
        assert!(told[..3].iter().all(|message| message.more) && !told[3].more);
        assert_eq!(told[3].policy_digest, "digest");
        policy.set("digest".into(), vec![group(&names, &["*"])]);
        assert!(!changes.has_changed().unwrap());
    }
}
