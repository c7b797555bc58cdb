//! `janus-server prove`: reads a backup as a restore would and says whether it could be restored; `prove status` says what was
//! proven when.

use std::{fmt::Write, sync::Arc};

use clap::{Args, Subcommand};
use janus_proto::{
    ids::{DiskId, MachineKey, SnapshotId},
    show::{amount, date},
};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{Admin, AdminError, Answer, Task, table::table};
use crate::{
    prove::{
        ProveError, Prover, Target, boot,
        record::{Boot, DiskProof, Proof, VolumeProof},
    },
    runs::Machine,
    verify::pace::Limit,
};

/// What to prove.
#[derive(Debug, Clone, PartialEq, Eq, Args, Serialize, Deserialize)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub struct Arguments {
    /// Prove a backup now: one by chance of the machine that was proven longest ago
    #[arg(long, required = true)]
    now: bool,
    /// One of this machine, with all its disks or only this one
    #[arg(value_name = "USER/MACHINE[/DISK]", value_parser = parse)]
    what: Option<What>,
    /// The run of this snapshot
    #[arg(long, value_name = "ID")]
    snapshot: Option<SnapshotId>,
    /// Start the machine too, as section [prove] of the settings says, also where that doesn't name it
    #[arg(long)]
    boot: bool,
    /// Read at most so fast; default: as fast as it goes
    #[arg(long, value_name = "MIB", default_value_t = 0)]
    mib_per_second: u64,
    #[command(subcommand)]
    action: Option<Action>,
}

#[derive(Debug, Clone, PartialEq, Eq, Subcommand, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Action {
    /// Show what was proven when, and what failed
    Status {
        /// Only this machine
        #[arg(value_name = "USER/MACHINE")]
        machine: Option<MachineKey>,
    },
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct What {
    machine: MachineKey,
    disk: Option<DiskId>,
}

fn parse(text: &str) -> Result<What, String> {
    let disk_at = text.match_indices('/').nth(1).map(|(at, _)| at);
    let (machine, disk) = match disk_at {
        Some(at) => (&text[..at], Some(text[at + 1..].parse().map_err(|e| format!("{e}"))?)),
        None => (text, None),
    };
    let machine = machine.parse().map_err(|e| format!("{e}: name USER/MACHINE[/DISK]"))?;
    Ok(What { machine, disk })
}

pub(super) fn run(
    admin: &Admin,
    arguments: &Arguments,
    task: &Task<'_>,
) -> Result<Answer, AdminError> {
    match &arguments.action {
        Some(Action::Status { machine }) => status(admin, machine.as_ref()),
        None => now(admin, arguments, task),
    }
}

fn now(admin: &Admin, arguments: &Arguments, task: &Task<'_>) -> Result<Answer, AdminError> {
    let Some(target) = target(admin, arguments)? else {
        let text = match is_incomplete(admin, arguments.what.as_ref())? {
            true => {
                "nothing was proven: what is here isn't complete yet, `janus-server seed status` tells what still comes from other servers\n"
            }
            false => "nothing was proven: there is no backup of these machines here\n",
        };
        return Ok(Answer { is_bad: true, ..Answer::new(text, json!({ "proof": null })) });
    };
    if arguments.boot && boot::qemu().is_none() {
        return Err(ProveError::NoQemu.into());
    }
    let settings = &admin.settings().prove;
    // Checked with the settings.
    let starts = settings.boot().unwrap_or_default();
    let starts = starts.iter().any(|which| which.takes(&target.run.machine));
    let (stop, rate) = (task.token().clone(), arguments.mib_per_second.saturating_mul(1 << 20));
    let prover = Prover {
        runs: admin.runs(),
        files_bytes: settings.files_mib.saturating_mul(1 << 20),
        boot: (arguments.boot || starts && target.is_whole()).then(|| boot::Wish::of(settings)),
        pace: Arc::new(Limit::new(rate, stop.clone(), || false)),
        stop,
        tell: &|line| task.tell(line),
    };
    let proof = prover.prove(&target)?;
    let machine = &target.run.machine;
    admin.runs().note_proof(machine, proof.clone())?;
    let is_bad = proof.failure().is_some();
    Ok(Answer { is_bad, ..Answer::new(shown(machine, &proof), json(machine, &proof)) })
}

/// True when there are backups of what is meant. Those that are whole would have been proven.
fn is_incomplete(admin: &Admin, what: Option<&What>) -> Result<bool, AdminError> {
    let disk = what.and_then(|what| what.disk.as_ref());
    let is_meant =
        |held: &crate::chain::Held| disk.is_none_or(|disk| *disk == held.snapshot().disk);
    let machines = admin.machines(what.map(|what| &what.machine))?;
    Ok(machines.iter().any(|machine| machine.snapshots().iter().any(is_meant)))
}

/// The run that is meant; `None`: there is none at all.
fn target(admin: &Admin, arguments: &Arguments) -> Result<Option<Target>, AdminError> {
    let what = arguments.what.as_ref();
    let disk = what.and_then(|what| what.disk.clone());
    if let Some(snapshot) = arguments.snapshot {
        let held = admin.runs().snapshot(snapshot);
        let is_meant = |held: &crate::chain::Held| {
            what.is_none_or(|what| {
                what.machine == held.run.machine
                    && what.disk.as_ref().is_none_or(|disk| *disk == held.snapshot().disk)
            })
        };
        let held = held.filter(is_meant).ok_or(AdminError::UnknownSnapshot { snapshot })?;
        return Ok(Some(Target { run: held.run, disk }));
    }
    let mut machines = admin.machines(what.map(|what| &what.machine))?;
    if what.is_none() {
        // Checked with the settings.
        let wanted = admin.settings().prove.machines().unwrap_or_default();
        machines.retain(|machine| wanted.iter().any(|which| which.takes(&machine.key)));
    }
    match (Target::choose(&machines, disk.as_ref()), what) {
        (None, Some(What { machine, disk: Some(disk) })) if !is_incomplete(admin, what)? => {
            Err(AdminError::UnknownDisk { machine: machine.clone(), disk: disk.clone() })
        }
        (target, _) => Ok(target),
    }
}

fn json(machine: &MachineKey, proof: &Proof) -> Value {
    json!({ "machine": machine, "failure": proof.failure(), "warnings": proof.warnings(), "proof": proof })
}

/// A proof for people.
fn shown(machine: &MachineKey, proof: &Proof) -> String {
    let mut text = String::new();
    let result = match (proof.failure(), proof.warnings()) {
        (Some(_), _) => "FAILED".to_owned(),
        (None, 0) => "proven".to_owned(),
        (None, count) => format!("proven, with {count} warnings"),
    };
    let seconds = (proof.ended_ms - proof.began_ms) as f64 / 1000.0;
    let of = date(proof.committed_ms);
    let _ = writeln!(text, "{machine}, backup of {of}: {result}, in {seconds:.1} s");
    for disk in &proof.disks {
        let (read, size) = (amount(disk.read_bytes), amount(disk.size_bytes));
        let _ = writeln!(
            text,
            "  {}, snapshot {}: {read} of {size} read and compared, the rest is zeros",
            disk.disk, disk.snapshot
        );
        disk.volumes.iter().for_each(|volume| volume_line(&mut text, volume));
    }
    let _ = match &proof.boot {
        Boot::NotWanted => Ok(()),
        Boot::Booted { milliseconds } => {
            writeln!(text, "  started: it was up after {:.1} s", *milliseconds as f64 / 1000.0)
        }
        Boot::Failed { why } => writeln!(text, "  FAILED to start: {why}"),
        Boot::NotTried { why } => writeln!(text, "  not started: {why}"),
    };
    for disk in &proof.disks {
        for line in disk.failures.all() {
            let _ = writeln!(text, "  FAILED: {line}");
        }
        for line in disk.warnings.all() {
            let _ = writeln!(text, "  warning: {line}");
        }
    }
    if let Some(disk) = proof.disks.iter().find(|disk| !disk.failures.is_empty()) {
        text.push_str(&way_out(machine, disk));
    }
    text
}

fn volume_line(text: &mut String, volume: &VolumeProof) {
    let VolumeProof { folders, files, files_read, .. } = volume;
    let mut line = format!("    {}", volume.name);
    if !volume.file_system.is_empty() {
        line.push_str(&format!(" ({})", volume.file_system));
    }
    if *folders > 0 {
        let (read, all) = (amount(volume.read_bytes), amount(volume.file_bytes));
        line.push_str(&format!(
            ": {files} files in {folders} folders, {files_read} read as a whole; {read} of {all} read"
        ));
    }
    if !volume.not_read.is_empty() {
        line.push_str(&format!(": not read: {}", volume.not_read));
    }
    let _ = writeln!(text, "{line}");
}

fn way_out(machine: &MachineKey, disk: &DiskProof) -> String {
    format!(
        "What to do: `janus-server verify {machine}/{}` finds all that is damaged; the machine's next backup here sends what \
         its newest snapshot has lost again; `janus-client list` shows what other servers have.\n",
        disk.disk
    )
}

fn status(admin: &Admin, only: Option<&MachineKey>) -> Result<Answer, AdminError> {
    let head = ["MACHINE", "LAST PROVEN", "ITS BACKUP OF", "LAST TRIED", "RESULT"];
    let mut rows = vec![head.map(String::from).to_vec()];
    let (mut lines, mut machines, mut failed) = (String::new(), Vec::new(), 0);
    for machine in admin.machines(only)? {
        if !machine.has_chain() {
            continue;
        }
        let (proofs, stands) = (machine.proofs(), machine.proofs().standing());
        let at = |ms: i64| if ms > 0 { date(ms) } else { "never".to_owned() };
        let result = match (stands.tried_ms, stands.failure.is_empty(), stands.warnings) {
            (0, ..) => String::new(),
            (_, false, _) => "FAILED".into(),
            (_, true, 0) => "good".into(),
            (_, true, count) => format!("good, with {count} warnings"),
        };
        failed += u64::from(!stands.failure.is_empty());
        let of = if stands.proven_ms > 0 { date(stands.proven_backup_ms) } else { String::new() };
        let name = machine.key.to_string();
        rows.push(vec![name.clone(), at(stands.proven_ms), of, at(stands.tried_ms), result]);
        if !stands.failure.is_empty() {
            let _ = writeln!(lines, "FAILED: {}", stands.failure);
        }
        let newest = proofs.newest_first().next();
        for line in
            newest.iter().flat_map(|proof| &proof.disks).flat_map(|disk| disk.warnings.all())
        {
            let _ = writeln!(lines, "warning: {line}");
        }
        machines.push(standing_json(&machine));
    }
    let every = admin.settings().prove.every_seconds;
    let schedule = match every {
        0 => {
            "no backup is proven by itself: see every_seconds in section [prove] of the settings\n"
                .to_owned()
        }
        _ => format!("a backup is proven every {} s\n", every),
    };
    let text = format!("{}{lines}{schedule}", table(&rows));
    let json = json!({ "machines": machines, "failed": failed, "every_seconds": every });
    Ok(Answer { is_bad: failed > 0, ..Answer::new(text, json) })
}

fn standing_json(machine: &Machine) -> Value {
    let (proofs, stands) = (machine.proofs(), machine.proofs().standing());
    let known = |ms: i64| Some(ms).filter(|ms| *ms > 0);
    json!({
        "machine": machine.key,
        "proven_ms": known(stands.proven_ms),
        "proven_backup_ms": known(stands.proven_backup_ms),
        "tried_ms": known(stands.tried_ms),
        "failure": Some(&stands.failure).filter(|text| !text.is_empty()),
        "warnings": stands.warnings,
        "proofs": proofs.newest_first().map(|proof| json(&machine.key, proof)).collect::<Vec<_>>(),
    })
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        arguments: Arguments,
    }

    #[test]
    fn what_is_to_be_proven_is_named_and_nothing_is_by_mistake() {
        let parse = |words: &[&str]| {
            let line = Line::try_parse_from([&["prove"], words].concat());
            line.map(|line| line.arguments)
        };
        let disk = parse(&["--now", "alice/laptop/root"]).unwrap().what.unwrap();
        assert_eq!((disk.machine.as_str(), disk.disk.unwrap().as_str()), ("alice/laptop", "root"));
        assert_eq!(parse(&["--now", "alice/laptop"]).unwrap().what.unwrap().disk, None);
        assert_eq!(parse(&["--now"]).unwrap().what, None);
        assert_eq!(parse(&["status"]).unwrap().action, Some(Action::Status { machine: None }));
        for wrong in [
            &[][..],
            &["alice/laptop"],
            &["--now", "alice"],
            &["--now", "a/b/c/d"],
            &["--now", "status"],
        ] {
            assert!(parse(wrong).is_err(), "{wrong:?}");
        }
    }
}
