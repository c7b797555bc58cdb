//! Which server a call goes to: pure, no clock, no I/O. Same input, same order, in every janus.
//!
//! The answer is the order in which servers are to be tried, never one server: whether a server can be reached is
//! found out by whoever walks the order. Nothing here excludes a server. Those that a setting holds back go to the
//! end, so that the last one that can be reached is always used.

use std::{cmp::Ordering, fmt};

use serde::{Deserialize, Serialize};

/// Whether a server gets first full backups of a machine by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum InitialBackups {
    /// A machine's first backup to a server travels in its turn.
    #[default]
    Allow,
    /// Only while no server that holds the machine can be reached.
    Hold,
}

/// What a call asks of recency.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Policy {
    /// Starts of runs: the server that the machine used longest ago.
    LeastRecent {
        /// Whether servers without a chain of the machine take their turn.
        initial_backups: InitialBackups,
        /// First backups that one server takes at once before others are preferred.
        max_initial_runs: u32,
    },
    /// Everything else: the server that the machine used last.
    MostRecent,
}

/// What is known of one server, as seen by one machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Candidate {
    /// Server id, or its URL while the id isn't known.
    pub name: String,
    /// Place in `server_urls`; unique.
    pub position: usize,
    /// Counter of the machine's newest start there; 0: never.
    pub use_counter: u64,
    /// Whether the server holds a chain of the machine. Without one it counts as never used.
    pub has_chain: bool,
    /// Machines whose newest start is there.
    pub last_starts: usize,
    /// First backups that run there now.
    pub initial_runs: u32,
    /// Setting in which it differs though all servers must be equal.
    pub contradicts: Option<&'static str>,
    /// The machine's first backup is to come there from another server.
    pub is_seeded: bool,
}

impl Candidate {
    fn effective_use(&self) -> u64 {
        if self.has_chain { self.use_counter } else { 0 }
    }
}

/// Why a server is tried only after the others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hold {
    /// It holds no chain of the machine, and first backups are held.
    InitialBackupsHeld,
    /// It holds no chain of the machine and takes this many first backups already.
    InitialRunsFull(u32),
    /// It holds no chain of the machine, and gets one from another server.
    BeingSeeded,
    /// This setting isn't as all servers must have it.
    SettingDiffers(&'static str),
}

impl Hold {
    /// Later ones are tried after all others.
    fn rank(self) -> u8 {
        match self {
            Self::InitialBackupsHeld | Self::InitialRunsFull(_) => 1,
            Self::BeingSeeded => 2,
            Self::SettingDiffers(_) => 3,
        }
    }
}

impl fmt::Display for Hold {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::InitialBackupsHeld => {
                f.write_str("has no chain of this machine, and initial_backups is \"hold\"")
            }
            Self::InitialRunsFull(runs) => {
                write!(f, "takes {runs} first backups already (max_initial_runs)")
            }
            Self::BeingSeeded => f.write_str(
                "gets this machine's first backup from another server (`janus-server seed status` there)",
            ),
            Self::SettingDiffers(key) => {
                write!(f, "its {key} differs from this janus' (require_equal_settings)")
            }
        }
    }
}

/// A place in the order to try.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// Index into the candidates.
    pub candidate: usize,
    /// Place that recency alone gives: whoever has a lower one and isn't used was passed over.
    pub turn: usize,
    /// Why it stands at the end in spite of its turn.
    pub hold: Option<Hold>,
}

/// The order in which `candidates` are to be tried; each appears exactly once.
pub fn order(policy: Policy, candidates: &[Candidate]) -> Vec<Place> {
    let mut indices: Vec<usize> = (0..candidates.len()).collect();
    indices.sort_by(|&a, &b| compare(policy, &candidates[a], &candidates[b]));
    let mut places: Vec<Place> = indices
        .into_iter()
        .enumerate()
        .map(|(turn, candidate)| Place {
            candidate,
            turn,
            hold: hold(policy, &candidates[candidate]),
        })
        .collect();
    // Stable: held servers keep their turns among themselves.
    places.sort_by_key(|place| place.hold.map_or(0, Hold::rank));
    places
}

fn compare(policy: Policy, a: &Candidate, b: &Candidate) -> Ordering {
    match policy {
        // The bare counter comes before the ties: a server whose first backups never get done must not be everyone's
        // first choice for ever.
        Policy::LeastRecent { .. } => (a.effective_use(), a.use_counter, a.last_starts, a.position)
            .cmp(&(b.effective_use(), b.use_counter, b.last_starts, b.position))
            .then_with(|| a.name.cmp(&b.name)),
        Policy::MostRecent => {
            b.effective_use().cmp(&a.effective_use()).then_with(|| a.name.cmp(&b.name))
        }
    }
}

fn hold(policy: Policy, candidate: &Candidate) -> Option<Hold> {
    let Policy::LeastRecent { initial_backups, max_initial_runs } = policy else { return None };
    if let Some(key) = candidate.contradicts {
        return Some(Hold::SettingDiffers(key));
    }
    if candidate.has_chain {
        return None;
    }
    if candidate.is_seeded {
        return Some(Hold::BeingSeeded);
    }
    if initial_backups == InitialBackups::Hold {
        return Some(Hold::InitialBackupsHeld);
    }
    (candidate.initial_runs >= max_initial_runs)
        .then_some(Hold::InitialRunsFull(candidate.initial_runs))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const ALLOW: Policy =
        Policy::LeastRecent { initial_backups: InitialBackups::Allow, max_initial_runs: 2 };
    const HOLD: Policy =
        Policy::LeastRecent { initial_backups: InitialBackups::Hold, max_initial_runs: 2 };

    fn candidate(name: &str, position: usize, use_counter: u64) -> Candidate {
        Candidate {
            name: name.into(),
            position,
            use_counter,
            has_chain: use_counter > 0,
            last_starts: 0,
            initial_runs: 0,
            contradicts: None,
            is_seeded: false,
        }
    }

    fn names(policy: Policy, candidates: &[Candidate]) -> Vec<&str> {
        order(policy, candidates)
            .iter()
            .map(|place| candidates[place.candidate].name.as_str())
            .collect()
    }

    #[test]
    fn starts_go_to_the_server_used_longest_ago_and_the_rest_to_the_newest() {
        let servers = [candidate("a", 0, 7), candidate("b", 1, 5), candidate("c", 2, 6)];
        assert_eq!(names(ALLOW, &servers), ["b", "c", "a"]);
        assert_eq!(names(Policy::MostRecent, &servers), ["a", "c", "b"]);
    }

    #[test]
    fn new_machines_spread_over_the_servers() {
        let mut servers = [candidate("b", 0, 0), candidate("a", 1, 0)];
        assert_eq!(names(ALLOW, &servers), ["b", "a"], "server_urls order");
        servers[0].last_starts = 1;
        assert_eq!(names(ALLOW, &servers), ["a", "b"], "fewest machines first");
    }

    #[test]
    fn a_server_without_a_chain_counts_as_never_used_but_not_twice_in_a_row() {
        let mut servers = [candidate("a", 0, 9), candidate("b", 1, 3)];
        servers[0].has_chain = false;
        assert_eq!(names(ALLOW, &servers), ["a", "b"]);
        servers[1].has_chain = false;
        assert_eq!(names(ALLOW, &servers), ["b", "a"], "both are empty: the one tried longest ago");
    }

    #[test]
    fn held_servers_go_last_and_stay_usable() {
        let servers = [candidate("new", 0, 0), candidate("old", 1, 4)];
        assert_eq!(names(HOLD, &servers), ["old", "new"]);
        assert_eq!(
            order(HOLD, &servers)[1],
            Place { candidate: 0, turn: 0, hold: Some(Hold::InitialBackupsHeld) }
        );
        let mut servers = servers;
        servers[0].initial_runs = 2;
        assert_eq!(names(ALLOW, &servers), ["old", "new"]);
    }

    #[test]
    fn servers_with_other_settings_come_after_all_others() {
        let mut servers =
            [candidate("differs", 0, 1), candidate("used", 1, 2), candidate("new", 2, 0)];
        servers[0].contradicts = Some("prefer_vhdx");
        assert_eq!(names(HOLD, &servers), ["used", "new", "differs"]);
        assert_eq!(names(HOLD, &servers[..1]), ["differs"], "never the last one");
        assert_eq!(names(Policy::MostRecent, &servers), ["used", "differs", "new"]);
    }

    #[test]
    fn a_server_that_is_being_seeded_comes_after_those_that_may_take_a_first_backup() {
        let mut servers =
            [candidate("seeded", 0, 0), candidate("new", 1, 0), candidate("old", 2, 4)];
        servers[0].is_seeded = true;
        assert_eq!(names(ALLOW, &servers), ["new", "old", "seeded"]);
        assert_eq!(names(HOLD, &servers), ["old", "new", "seeded"]);
        assert_eq!(names(ALLOW, &servers[..1]), ["seeded"], "never the last one");
        servers[0].has_chain = true;
        assert_eq!(names(ALLOW, &servers), ["seeded", "new", "old"], "it has it now");
    }

    /// The rules of the design, one question after the other.
    fn model_before(policy: Policy, a: &Candidate, b: &Candidate) -> bool {
        let used = |c: &Candidate| if c.has_chain { c.use_counter } else { 0 };
        let Policy::LeastRecent { initial_backups, max_initial_runs } = policy else {
            return if used(a) != used(b) { used(a) > used(b) } else { a.name < b.name };
        };
        let held = |c: &Candidate| {
            !c.has_chain
                && (initial_backups == InitialBackups::Hold || c.initial_runs >= max_initial_runs)
        };
        let seeded = |c: &Candidate| !c.has_chain && c.is_seeded;
        if a.contradicts.is_some() != b.contradicts.is_some() {
            return b.contradicts.is_some();
        }
        if a.contradicts.is_none() && seeded(a) != seeded(b) {
            return seeded(b);
        }
        if a.contradicts.is_none() && !seeded(a) && held(a) != held(b) {
            return held(b);
        }
        if used(a) != used(b) {
            return used(a) < used(b);
        }
        if a.use_counter != b.use_counter {
            return a.use_counter < b.use_counter;
        }
        if a.last_starts != b.last_starts {
            return a.last_starts < b.last_starts;
        }
        a.position < b.position
    }

    fn model_order(policy: Policy, candidates: &[Candidate]) -> Vec<usize> {
        let mut left: Vec<usize> = (0..candidates.len()).collect();
        let mut order = Vec::new();
        while !left.is_empty() {
            let first = (0..left.len())
                .find(|&i| {
                    (0..left.len()).all(|j| {
                        i == j || model_before(policy, &candidates[left[i]], &candidates[left[j]])
                    })
                })
                .expect("the rules order any two servers");
            order.push(left.remove(first));
        }
        order
    }

    prop_compose! {
        fn servers()(
            facts in prop::collection::vec((0..4u64, any::<bool>(), 0..3usize, 0..4u32, 0..4u8, any::<bool>()), 1..7),
            shift in 0..7usize,
        ) -> Vec<Candidate> {
            let count = facts.len();
            facts.into_iter().enumerate().map(|(i, (use_counter, has_chain, last_starts, initial_runs, differs, is_seeded))| Candidate {
                name: format!("s{i}"), position: (i + shift) % count, use_counter, has_chain, last_starts, initial_runs,
                contradicts: (differs == 0).then_some("prefer_vhdx"), is_seeded,
            }).collect()
        }
    }

    fn policies() -> impl Strategy<Value = Policy> {
        prop_oneof![
            Just(Policy::MostRecent),
            (any::<bool>(), 0..4u32).prop_map(|(hold, max_initial_runs)| Policy::LeastRecent {
                initial_backups: if hold { InitialBackups::Hold } else { InitialBackups::Allow },
                max_initial_runs,
            }),
        ]
    }

    proptest! {
        #[test]
        fn the_order_is_that_of_the_naive_model(policy in policies(), servers in servers()) {
            let places = order(policy, &servers);
            let tried: Vec<usize> = places.iter().map(|place| place.candidate).collect();
            prop_assert_eq!(tried, model_order(policy, &servers));
        }

        #[test]
        fn the_order_of_the_input_does_not_matter(policy in policies(), servers in servers()) {
            let mut turned = servers.clone();
            turned.reverse();
            prop_assert_eq!(names(policy, &servers), names(policy, &turned));
        }

        #[test]
        fn with_all_servers_up_starts_visit_all_in_turn(count in 1..6usize, rounds in 1..5usize) {
            let mut servers: Vec<Candidate> = (0..count).map(|i| candidate(&format!("s{i}"), i, 0)).collect();
            let mut visits = vec![0; count];
            for start in 1..=(count * rounds) {
                let chosen = order(ALLOW, &servers)[0].candidate;
                servers[chosen].use_counter = start as u64;
                servers[chosen].has_chain = true;
                visits[chosen] += 1;
            }
            prop_assert!(visits.iter().all(|&n| n == rounds));
        }
    }
}
