//! What an administrator should look at, from a janus' status: for `janus status --check`, the page and alerts alike.

use std::{fmt, time::Duration};

use janus_proto::{
    pb::{GetRouterStatusResponse, MachineStatus, ServerStatus},
    show::{amount, date, of_named},
};

/// A certificate that expires in less than this is worth a warning, unless it is one of those that are short and renewed when half
/// of that is over: then in less than a sixth of its validity.
const CERTIFICATE: Duration = Duration::from_secs(14 * 86_400);
/// Clocks of servers and janus may differ by so much.
const CLOCK: Duration = Duration::from_secs(3600);
/// A server with less than one part in so many free is nearly full.
const NEARLY_FULL: u64 = 20;
/// Machines that are named in one finding.
const MOST_NAMED: usize = 5;

/// How bad it is, with the exit codes of monitoring plugins.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Verdict {
    /// All is well.
    Ok = 0,
    /// Backups go on, but not as they should.
    Warning = 1,
    /// Backups don't go on, or a machine has none.
    Critical = 2,
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ok => "OK",
            Self::Warning => "WARNING",
            Self::Critical => "CRITICAL",
        })
    }
}

/// What a finding is about.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum About {
    /// No server takes backups.
    NoServer,
    /// This machine has no new backup.
    Overdue(String),
    /// This machine's newest backup is dated in the future.
    Clock(String),
    /// This server takes no backups.
    Server(String),
    /// This server doesn't report.
    Report(String),
    /// Machines without a backup on this server.
    Unseeded(String),
    /// The certificate of this server or janus.
    Certificate(String),
    /// The disk of this server.
    Disk(String),
    /// What of this server's store can't be used.
    Store(String),
    /// Damaged snapshots on this server.
    Damage(String),
    /// A backup of a machine on a server that can't be restored: both names.
    Proof(String, String),
    /// A backup of a machine on a server that looks like an attack: both names.
    Alarm(String, String),
    /// What servers differ in.
    Agreement,
}

/// One thing to look at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// How bad it is.
    pub verdict: Verdict,
    /// What it is about; the same from one look to the next.
    pub about: About,
    /// For people.
    pub text: String,
}

/// All that is wrong. A machine is overdue when its newest backup is older than `overdue`.
pub fn findings(status: &GetRouterStatusResponse, overdue: Duration, now_ms: i64) -> Vec<Finding> {
    let mut found = Vec::new();
    let mut say = |verdict, about, text| found.push(Finding { verdict, about, text });
    if !status.servers.iter().any(|server| server.ready) {
        say(Verdict::Critical, About::NoServer, "no server takes backups".into());
    }
    let oldest = now_ms.saturating_sub(millis(overdue));
    for machine in status.machines.iter().filter(|machine| since_ms(machine) < oldest) {
        let (name, since) = (machine.machine.clone(), date(since_ms(machine)));
        let text = match has_none(machine) {
            true => format!("{name} starts backups since {since} and never got one done"),
            false => format!("{name} has no backup since {since}"),
        };
        say(Verdict::Critical, About::Overdue(name), text);
    }
    let future = now_ms.saturating_add(millis(CLOCK));
    for machine in status.machines.iter().filter(|machine| machine.last_backup_ms > future) {
        let (name, at) = (machine.machine.clone(), date(machine.last_backup_ms));
        let text = format!(
            "{name} has a backup of {at}, in the future: a clock was wrong, and nobody knows how old its newest is"
        );
        say(Verdict::Warning, About::Clock(name), text);
    }
    for server in &status.servers {
        let name = name_of(server);
        if !server.ready {
            let text = format!("{name}: {}", of_named(&name, &server.reason));
            say(Verdict::Warning, About::Server(name.clone()), text);
        } else if server.report_age_ms < 0 {
            let last = match server.last_report_ms {
                0 => String::new(),
                at => format!(" since {}", date(at)),
            };
            let text = format!("{name} does not report to this janus{last}");
            say(Verdict::Warning, About::Report(name.clone()), text);
        } else if let Some(text) = unseeded(server, &status.machines) {
            say(Verdict::Warning, About::Unseeded(name.clone()), text);
        }
        let (free, total) = (server.free_bytes, server.total_bytes);
        if total > 0 && free < total / NEARLY_FULL {
            let text = format!("{name} is nearly full: {} of {} free", amount(free), amount(total));
            say(Verdict::Warning, About::Disk(name.clone()), text);
        }
        if let Some(text) = unusable(server) {
            say(Verdict::Warning, About::Store(name.clone()), text);
        }
        if let Some(text) = damage(server) {
            say(Verdict::Warning, About::Damage(name.clone()), text);
        }
        if let Some((verdict, text)) =
            expiring(&name, (server.certificate_expires_ms, server.certificate_valid_ms), now_ms)
        {
            say(verdict, About::Certificate(name), text);
        }
    }
    for (machine, at) in
        status.machines.iter().flat_map(|one| one.uses.iter().map(move |at| (one, at)))
    {
        if !at.alarm.is_empty() {
            let (name, server) = (machine.machine.clone(), at.server_id.clone());
            let text = format!("{server}: {}", at.alarm);
            say(Verdict::Critical, About::Alarm(name, server), text);
        }
        let failure = at.proof.as_ref().map_or("", |proof| &proof.failure);
        if !failure.is_empty() {
            let (name, server) = (machine.machine.clone(), at.server_id.clone());
            let text = format!(
                "{server}: a proof failed: {failure}; `janus-server prove status` there says more"
            );
            say(Verdict::Warning, About::Proof(name, server), text);
        }
    }
    let own = format!("janus {}", status.janus_id);
    if let Some((verdict, text)) =
        expiring(&own, (status.certificate_expires_ms, status.certificate_valid_ms), now_ms)
    {
        say(verdict, About::Certificate(own), text);
    }
    for warning in &status.warnings {
        say(Verdict::Warning, About::Agreement, warning.clone());
    }
    found
}

/// Name of a server, or its URL while the name isn't known.
pub(crate) fn name_of(server: &ServerStatus) -> String {
    if server.server_id.is_empty() { server.url.clone() } else { server.server_id.clone() }
}

/// True when it has started backups and never got one done.
pub(crate) fn has_none(machine: &MachineStatus) -> bool {
    machine.last_backup_ms == 0 && machine.first_use_ms > 0
}

/// Since when it has no new backup.
fn since_ms(machine: &MachineStatus) -> i64 {
    if has_none(machine) { machine.first_use_ms } else { machine.last_backup_ms }
}

fn millis(time: Duration) -> i64 {
    i64::try_from(time.as_millis()).unwrap_or(i64::MAX)
}

fn expiring(
    name: &str,
    (expires_ms, valid_ms): (i64, i64),
    now_ms: i64,
) -> Option<(Verdict, String)> {
    let enough_ms = match valid_ms / 6 {
        0 => millis(CERTIFICATE),
        share => share.min(millis(CERTIFICATE)),
    };
    if expires_ms == 0 || expires_ms > now_ms.saturating_add(enough_ms) {
        return None;
    }
    let at = date(expires_ms);
    Some(match expires_ms > now_ms {
        true => (Verdict::Warning, format!("the certificate of {name} expires on {at}")),
        false => (Verdict::Critical, format!("the certificate of {name} expired on {at}")),
    })
}

/// What of its store a server can't use.
fn unusable(server: &ServerStatus) -> Option<String> {
    let named = server.warnings.iter().take(MOST_NAMED).map(String::as_str).collect::<Vec<_>>();
    let more = match server.warnings.len().saturating_sub(MOST_NAMED) {
        0 => String::new(),
        more => format!("; and {more} more"),
    };
    (!named.is_empty()).then(|| format!("{}: {}{more}", name_of(server), named.join("; ")))
}

/// Snapshots that have lost blocks.
fn damage(server: &ServerStatus) -> Option<String> {
    let snapshots: u64 = server.damaged.iter().map(|machine| machine.snapshots).sum();
    let names = server.damaged.iter().take(MOST_NAMED).map(|machine| machine.machine.as_str());
    let named = names.collect::<Vec<_>>().join(", ");
    let more = match server.damaged.len().saturating_sub(MOST_NAMED) {
        0 => String::new(),
        more => format!(" and {more} more"),
    };
    let heals = match server.damaged.iter().any(|machine| machine.newest) {
        true => "; the next backup there heals the newest",
        false => "",
    };
    (snapshots > 0).then(|| {
        format!("{} has {snapshots} damaged snapshots of {named}{more}{heals}", name_of(server))
    })
}

/// Machines whose backups are on other servers only.
fn unseeded(server: &ServerStatus, machines: &[MachineStatus]) -> Option<String> {
    let is_unseeded = |machine: &&MachineStatus| {
        let mut uses = machine.uses.iter();
        // An older janus doesn't say where the backups are.
        !machine.uses.is_empty()
            && !has_none(machine)
            && !uses.any(|at| at.server_id == server.server_id && at.last_backup_ms > 0)
    };
    let without: Vec<&str> =
        machines.iter().filter(is_unseeded).map(|machine| machine.machine.as_str()).collect();
    let named = without.iter().take(MOST_NAMED).copied().collect::<Vec<_>>().join(", ");
    let more = match without.len() {
        0 => return None,
        1..=MOST_NAMED => String::new(),
        count => format!(" and {} more", count - MOST_NAMED),
    };
    let name = name_of(server);
    Some(format!(
        "{name} has no backup of {named}{more} yet (`janus-server seed` there fetches them)"
    ))
}

#[cfg(test)]
mod tests {
    use janus_proto::pb::{DamagedMachine, MachineUse};

    use super::*;

    const DAY_MS: i64 = 86_400_000;
    const NOW_MS: i64 = 1000 * DAY_MS;

    fn server(name: &str) -> ServerStatus {
        ServerStatus { server_id: name.into(), ready: true, ..Default::default() }
    }

    fn found(servers: Vec<ServerStatus>, machines: Vec<MachineStatus>) -> Vec<Finding> {
        let status = GetRouterStatusResponse { servers, machines, ..Default::default() };
        findings(&status, Duration::from_secs(26 * 3600), NOW_MS)
    }

    /// What is found of a machine with one backup, on server `a`, of which this is told.
    fn found_at(told: MachineUse) -> Vec<Finding> {
        let at = MachineUse { server_id: "a".into(), last_backup_ms: NOW_MS, ..told };
        let machine = MachineStatus {
            machine: "u/m".into(),
            last_backup_ms: NOW_MS,
            uses: vec![at],
            ..Default::default()
        };
        found(vec![server("a")], vec![machine])
    }

    #[test]
    fn a_machine_that_has_backups_on_one_server_only_is_unseeded_on_the_other() {
        let machine = |name: &str, servers: &[(&str, i64)]| MachineStatus {
            machine: name.into(),
            last_backup_ms: NOW_MS,
            uses: servers
                .iter()
                .map(|&(server, last_backup_ms)| MachineUse {
                    server_id: server.into(),
                    use_counter: 1,
                    last_backup_ms,
                    ..Default::default()
                })
                .collect(),
            ..Default::default()
        };
        let both = machine("u/both", &[("a", NOW_MS), ("b", 1)]);
        // A run that was started there and never committed is no backup.
        let one = machine("u/one", &[("a", NOW_MS), ("b", 0)]);
        let seen = found(vec![server("a"), server("b")], vec![both.clone(), one.clone()]);
        assert_eq!(seen.len(), 1);
        assert_eq!(seen[0].about, About::Unseeded("b".into()));
        assert_eq!(
            seen[0].text,
            "b has no backup of u/one yet (`janus-server seed` there fetches them)"
        );
        // Of a server that can't be reached it isn't known, and it is named for that already.
        let down = ServerStatus { ready: false, reason: "down".into(), ..server("b") };
        let seen = found(vec![server("a"), down], vec![both, one]);
        assert_eq!(seen.len(), 1);
        assert_eq!(seen[0].about, About::Server("b".into()));
    }

    #[test]
    fn a_backup_of_the_future_hides_nothing() {
        let machine = |last_backup_ms| MachineStatus {
            machine: "u/m".into(),
            last_backup_ms,
            ..Default::default()
        };
        let seen = found(vec![server("a")], vec![machine(NOW_MS + 2 * 3_600_000)]);
        assert_eq!(seen.len(), 1, "{seen:?}");
        assert_eq!(
            (seen[0].verdict, &seen[0].about),
            (Verdict::Warning, &About::Clock("u/m".into()))
        );
        assert!(found(vec![server("a")], vec![machine(NOW_MS + 60_000)]).is_empty());
    }

    #[test]
    fn a_machine_without_any_backup_is_overdue_from_its_first_start() {
        let machine = |hours: i64| MachineStatus {
            machine: "u/m".into(),
            first_use_ms: NOW_MS - hours * 3_600_000,
            uses: vec![MachineUse { server_id: "a".into(), use_counter: 1, ..Default::default() }],
            ..Default::default()
        };
        assert_eq!(found(vec![server("a"), server("b")], vec![machine(25)]), []);
        let seen = found(vec![server("a")], vec![machine(27)]);
        assert_eq!(
            (seen[0].verdict, &seen[0].about),
            (Verdict::Critical, &About::Overdue("u/m".into()))
        );
        assert!(seen[0].text.contains("never got one done"), "{}", seen[0].text);
    }

    #[test]
    fn what_a_server_cannot_use_is_one_warning() {
        let with = |warnings: &[&str]| {
            let warnings = warnings.iter().map(ToString::to_string).collect();
            found(vec![ServerStatus { warnings, ..server("a") }], Vec::new())
        };
        assert!(with(&[]).is_empty());
        let seen = with(&["u/m: gone", "u/n: too", "3", "4", "5", "6", "7"]);
        assert_eq!(
            (seen[0].verdict, &seen[0].about),
            (Verdict::Warning, &About::Store("a".into()))
        );
        assert_eq!(seen[0].text, "a: u/m: gone; u/n: too; 3; 4; 5; and 2 more");
    }

    #[test]
    fn damaged_snapshots_are_a_warning() {
        let machine = |machine: &str, snapshots, newest| DamagedMachine {
            machine: machine.into(),
            snapshots,
            blocks: 9,
            newest,
        };
        let damaged = vec![machine("u/m", 2, false), machine("u/n", 1, true)];
        let seen = found(vec![ServerStatus { damaged, ..server("a") }], Vec::new());
        assert_eq!(
            (seen[0].verdict, &seen[0].about),
            (Verdict::Warning, &About::Damage("a".into()))
        );
        let text = "a has 3 damaged snapshots of u/m, u/n; the next backup there heals the newest";
        assert_eq!(seen[0].text, text);
    }

    #[test]
    fn a_failed_proof_is_a_warning_until_another_one_is_good() {
        let with = |failure: &str| {
            let proof = janus_proto::pb::Proof {
                proven_ms: 5,
                tried_ms: 9,
                failure: failure.into(),
                warnings: 1,
            };
            found_at(MachineUse { proof: Some(proof), ..Default::default() })
        };
        assert!(with("").is_empty());
        let seen = with("u/m/sda: block 7 is lost");
        let about = About::Proof("u/m".into(), "a".into());
        assert_eq!((seen[0].verdict, &seen[0].about), (Verdict::Warning, &about));
        assert!(seen[0].text.contains("block 7") && seen[0].text.starts_with("a: "), "{seen:?}");
    }

    #[test]
    fn an_alarm_is_critical_until_it_is_ended() {
        let with = |alarm: &str| found_at(MachineUse { alarm: alarm.into(), ..Default::default() });
        assert!(with("").is_empty());
        let seen = with("alarm: backup 7 of u/m");
        let about = About::Alarm("u/m".into(), "a".into());
        assert_eq!((seen[0].verdict, &seen[0].about), (Verdict::Critical, &about));
        assert_eq!(seen[0].text, "a: alarm: backup 7 of u/m");
    }

    #[test]
    fn certificates_warn_two_weeks_before_they_expire() {
        let expiring = |days: i64| {
            let certificate_expires_ms = NOW_MS + days * DAY_MS;
            let seen =
                found(vec![ServerStatus { certificate_expires_ms, ..server("a") }], Vec::new());
            seen.first().map(|finding| (finding.verdict, finding.about.clone()))
        };
        let about = About::Certificate("a".into());
        assert_eq!(expiring(15), None);
        assert_eq!(expiring(13), Some((Verdict::Warning, about.clone())));
        assert_eq!(expiring(-1), Some((Verdict::Critical, about)));
        // One of an hour has always less than two weeks left.
        let short = |left_ms: i64| super::expiring("a", (NOW_MS + left_ms, 3_600_000), NOW_MS);
        assert_eq!(short(1_200_000), None);
        assert_eq!(short(300_000).unwrap().0, Verdict::Warning);
    }

    #[test]
    fn a_server_with_less_than_a_twentieth_free_is_nearly_full() {
        let with = |free_bytes, total_bytes| {
            found(vec![ServerStatus { free_bytes, total_bytes, ..server("a") }], Vec::new())
        };
        assert_eq!((with(0, 0).len(), with(5 << 30, 100 << 30).len()), (0, 0));
        let full = with(4 << 30, 100 << 30);
        assert_eq!(full[0].about, About::Disk("a".into()));
        assert_eq!(full[0].text, "a is nearly full: 4.0 GiB of 100.0 GiB free");
    }
}
