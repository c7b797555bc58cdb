//! `janus-server lock`: runs that nobody can drop before a date.

use std::{str::FromStr, sync::Arc};

use clap::Args;
use janus_proto::{
    error::WireError,
    ids::{DiskId, MachineKey},
    show::date,
};
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::{Admin, AdminError, Answer, alarm::failed, moment, table::table};
use crate::{
    audit::{Action, Event, Who},
    chain::Run,
    config::retention::MOST_LOCK_DAYS,
    runs::{Machine, now_ms},
};

const DAY_MS: i64 = 86_400_000;

/// A machine, maybe one of its disks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Target {
    machine: MachineKey,
    disk: Option<DiskId>,
}

impl FromStr for Target {
    type Err = WireError;

    fn from_str(text: &str) -> Result<Self, WireError> {
        let (machine, disk) = match text.splitn(3, '/').collect::<Vec<_>>()[..] {
            [user, machine, disk] => (MachineKey::new(user, machine)?, Some(disk.parse()?)),
            _ => (text.parse()?, None),
        };
        Ok(Self { machine, disk })
    }
}

/// What to lock.
#[derive(Debug, Clone, PartialEq, Eq, Args, Serialize, Deserialize)]
pub struct Arguments {
    /// Whose run; with a disk its newest run that holds that
    #[arg(value_name = "USER/MACHINE[/DISK]", required_unless_present = "list")]
    target: Option<Target>,
    /// The run, by its id or that of one of its snapshots
    #[arg(value_name = "RUN", required_unless_present_any = ["newest", "list"], conflicts_with = "newest")]
    run: Option<String>,
    /// The newest one
    #[arg(long)]
    newest: bool,
    /// Until this day or moment (UTC): nobody can drop it before, and no command takes the lock off again
    #[arg(long, value_name = "DATE", required_unless_present = "list")]
    until: Option<String>,
    /// Show what is locked
    #[arg(long, conflicts_with_all = ["target", "run", "newest", "until"])]
    list: bool,
}

impl Arguments {
    pub(super) fn only_shows(&self) -> bool {
        self.list
    }

    /// Whose run is locked; `None`: locks are shown.
    pub(super) fn machine(&self) -> Option<&MachineKey> {
        self.target.as_ref().map(|target| &target.machine)
    }
}

pub(super) fn run(admin: &Admin, arguments: &Arguments, who: &Who) -> Result<Answer, AdminError> {
    let Arguments { target: Some(target), until: Some(until), .. } = arguments else {
        return list(admin);
    };
    let until_ms = moment::parse(until)?;
    let days = until_ms.saturating_sub(now_ms()) / DAY_MS;
    if until_ms <= now_ms() || days > i64::from(MOST_LOCK_DAYS) {
        return Err(AdminError::LockDate { until: until.clone() });
    }
    let machines = admin.machines(Some(&target.machine))?;
    let machine = machines.first().ok_or_else(|| unknown(target))?;
    let run = chosen(machine, target, arguments.run.as_deref())?;
    let lock = admin.runs().dated_lock(until_ms);
    let lock = admin.runs().lock_run(machine, run.backup, lock).map_err(failed)?;
    let until = date(lock.until_ms);
    let event = Event::new(Action::Lock).of_run(&machine.key, run.backup);
    admin.runs().note(who, event.noting(format!("until {until}")));
    let text = format!(
        "{}: the run of {} is locked until {until} UTC: nobody can drop it before, and no command takes the lock off\n",
        machine.key,
        date(machine.time_of(&run)),
    );
    let json = json!({
        "machine": machine.key,
        "backup_id": run.backup.to_string(),
        "until_ms": lock.until_ms,
    });
    Ok(Answer::new(text, json))
}

fn unknown(target: &Target) -> AdminError {
    AdminError::UnknownMachine { machine: target.machine.clone() }
}

/// The run that was named, or the newest one.
fn chosen(machine: &Machine, target: &Target, named: Option<&str>) -> Result<Arc<Run>, AdminError> {
    let snapshots = machine.snapshots();
    let mut fitting = snapshots.iter().filter(|held| {
        let snapshot = held.snapshot();
        let is_named = named.is_none_or(|named| {
            held.run.backup.to_string() == named || snapshot.id.to_string() == named
        });
        is_named && target.disk.as_ref().is_none_or(|disk| snapshot.disk == *disk)
    });
    let found = fitting.next().map(|held| held.run.clone());
    found.ok_or_else(|| AdminError::UnknownRun {
        machine: machine.key.clone(),
        run: named.unwrap_or("that is newest").to_owned(),
    })
}

fn list(admin: &Admin) -> Result<Answer, AdminError> {
    let mut rows = vec![["MACHINE", "COMMITTED", "RUN", "LOCKED"].map(String::from).to_vec()];
    let mut all = Vec::new();
    let now = admin.runs().now();
    for machine in admin.machines(None)? {
        let guarded = machine.guarded();
        let mut runs: Vec<Arc<Run>> =
            machine.snapshots().into_iter().map(|held| held.run).collect();
        runs.dedup_by_key(|run| run.backup);
        for run in runs {
            let Some(lock) = guarded.lock_of(run.backup, now) else { continue };
            rows.push(vec![
                machine.key.to_string(),
                date(machine.time_of(&run)),
                run.backup.to_string(),
                lock.describe(now),
            ]);
            all.push(json!({
                "machine": machine.key,
                "backup_id": run.backup.to_string(),
                "until_ms": lock.until_ms,
            }));
        }
    }
    let text = match all.is_empty() {
        true => "nothing is locked\n".to_owned(),
        false => table(&rows),
    };
    Ok(Answer::new(text, json!({ "locks": all })))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_target_is_a_machine_or_a_disk() {
        let machine: Target = "alice/web".parse().unwrap();
        assert_eq!(machine, Target { machine: "alice/web".parse().unwrap(), disk: None });
        let disk: Target = "alice/web/sda".parse().unwrap();
        assert_eq!(disk.disk.unwrap().as_str(), "sda");
        for none in ["alice", "", "a/b/c/d", "../x"] {
            assert!(none.parse::<Target>().is_err(), "{none}");
        }
    }
}
