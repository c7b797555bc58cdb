//! `janus-server verify [USER/MACHINE[/DISK[/SNAPSHOT]]]`: reads stored images now and compares them with their hashes.

use std::{
    collections::{BTreeMap, HashSet},
    time::{Duration, Instant},
};

use clap::Args;
use janus_proto::{
    ids::{BLOCK_BYTES, DiskId, MachineKey, SnapshotId},
    show::{amount, date},
};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use uuid::Uuid;

use super::{Admin, AdminError, Answer, Task, missing::Missing, table::table};
use crate::{
    chain::{Held, health::Damage},
    verify::{CheckError, Way, check_image, pace::Limit},
};

/// Threads that read and compare; more than that and disks seek.
const MOST_THREADS: usize = 4;
/// How often it is told how far it is.
const TELL_EVERY: Duration = Duration::from_secs(1);
/// How often it is looked whether a check is over.
const LOOK: Duration = Duration::from_millis(10);
/// Ranges of blocks that are listed for one image.
const MOST_RANGES: usize = 1000;

/// What to verify.
#[derive(Debug, Clone, PartialEq, Eq, Args, Serialize, Deserialize)]
pub struct Arguments {
    /// Only this machine, disk or snapshot; images that snapshots share are read once
    #[arg(value_name = "USER/MACHINE[/DISK[/SNAPSHOT]]", value_parser = parse)]
    what: Option<What>,
    /// Read at most so fast; default: as fast as it goes
    #[arg(long, value_name = "MIB", default_value_t = 0)]
    mib_per_second: u64,
}

impl Arguments {
    /// The machine that is meant, if it is one.
    pub(super) fn machine(&self) -> Option<&MachineKey> {
        self.what.as_ref().map(|what| &what.machine)
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct What {
    machine: MachineKey,
    disk: Option<DiskId>,
    snapshot: Option<SnapshotId>,
}

fn parse(text: &str) -> Result<What, String> {
    let parts: Vec<&str> = text.split('/').collect();
    let [user, machine, rest @ ..] = &parts[..] else {
        return Err("name USER/MACHINE, USER/MACHINE/DISK or USER/MACHINE/DISK/SNAPSHOT".into());
    };
    if rest.len() > 2 {
        return Err("more than USER/MACHINE/DISK/SNAPSHOT".into());
    }
    let machine = format!("{user}/{machine}").parse().map_err(|error| format!("{error}"))?;
    let disk = rest.first().map(|disk| disk.parse()).transpose();
    let snapshot = rest.get(1).map(|snapshot| snapshot.parse()).transpose();
    let disk = disk.map_err(|error| format!("{error}"))?;
    Ok(What { machine, disk, snapshot: snapshot.map_err(|error| format!("{error}"))? })
}

/// What became of one image.
struct Checked {
    held: Held,
    read_bytes: u64,
    result: Result<Damage, String>,
}

pub(super) fn run(
    admin: &Admin,
    arguments: &Arguments,
    task: &Task<'_>,
) -> Result<Answer, AdminError> {
    let began = Instant::now();
    let snapshots = select(admin, arguments.what.as_ref())?;
    let images = images_of(admin, &snapshots);
    let mut checked = Vec::with_capacity(images.len());
    for (index, held) in images.iter().enumerate() {
        task.check()?;
        let place = format!("image {} of {}", index + 1, images.len());
        checked.push(check(admin, held, arguments.mib_per_second, &place, task)?);
    }
    admin.runs().save_health();
    let gaps = Missing::of(admin, &snapshots, arguments.what.as_ref().map(|what| &what.machine));
    Ok(answer(admin, &snapshots, &checked, &gaps, began.elapsed()))
}

/// The snapshots that were named, oldest first.
fn select(admin: &Admin, what: Option<&What>) -> Result<Vec<Held>, AdminError> {
    let machines = match what {
        // What can't be read is named in the answer.
        Some(what) if admin.runs().check_machine(&what.machine).is_err() => return Ok(Vec::new()),
        what => admin.machines(what.map(|what| &what.machine))?,
    };
    let is_wanted = |held: &Held| {
        let snapshot = held.snapshot();
        what.is_none_or(|what| {
            what.disk.as_ref().is_none_or(|disk| *disk == snapshot.disk)
                && what.snapshot.is_none_or(|id| id == snapshot.id)
        })
    };
    let mut found = Vec::new();
    for machine in machines {
        found.extend(machine.snapshots().into_iter().rev().filter(is_wanted));
    }
    match what.filter(|_| found.is_empty()) {
        Some(What { snapshot: Some(snapshot), .. }) => {
            Err(AdminError::UnknownSnapshot { snapshot: *snapshot })
        }
        Some(What { machine, disk: Some(disk), .. }) => {
            Err(AdminError::UnknownDisk { machine: machine.clone(), disk: disk.clone() })
        }
        _ => Ok(found),
    }
}

/// All images that these snapshots need, each once, parents first.
fn images_of(admin: &Admin, snapshots: &[Held]) -> Vec<Held> {
    let mut seen: HashSet<Uuid> = HashSet::new();
    let mut images = Vec::new();
    for held in snapshots {
        let machine = admin.runs().machine(&held.run.machine);
        let chain = machine.and_then(|machine| machine.chain(held.snapshot().id));
        // A chain without one of its manifests: at least the image itself.
        let chain = chain.unwrap_or_else(|| vec![held.clone()]);
        let fresh = chain.into_iter().rev().filter(|held| seen.insert(held.snapshot().data_write));
        images.extend(fresh);
    }
    images
}

fn check(
    admin: &Admin,
    held: &Held,
    mib_per_second: u64,
    place: &str,
    task: &Task<'_>,
) -> Result<Checked, AdminError> {
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(MOST_THREADS);
    let limit = Limit::new(mib_per_second << 20, task.token().clone(), || false);
    let image = format!("{}/{}", held.run.machine, held.snapshot().image);
    let size = held.snapshot().image_allocated_bytes;
    let result = std::thread::scope(|scope| {
        let work = scope.spawn(|| check_image(admin.runs(), held, Way::Anew(threads), &limit));
        let mut told = Instant::now();
        while !work.is_finished() {
            std::thread::sleep(LOOK);
            if told.elapsed() >= TELL_EVERY {
                told = Instant::now();
                let read = amount(limit.read_bytes());
                task.tell(format!("{place}: {image}: {read} of {}", amount(size)));
            }
        }
        work.join().unwrap_or(Err(CheckError::Stopped))
    });
    let result = match result {
        Ok(damage) => Ok(damage),
        Err(CheckError::Stopped) => return Err(AdminError::Cancelled),
        Err(error @ (CheckError::Io(_) | CheckError::Stub)) => Err(error.to_string()),
    };
    Ok(Checked { held: held.clone(), read_bytes: limit.read_bytes(), result })
}

fn answer(
    admin: &Admin,
    snapshots: &[Held],
    checked: &[Checked],
    gaps: &Missing,
    took: Duration,
) -> Answer {
    let mut rows = vec![["SNAPSHOT", "COMMITTED", "DISK", "RESULT"].map(String::from).to_vec()];
    let (mut damaged, mut listed) = (0, Vec::new());
    let failed: BTreeMap<Uuid, &str> = checked
        .iter()
        .filter_map(|one| {
            Some((one.held.snapshot().data_write, one.result.as_ref().err()?.as_str()))
        })
        .collect();
    for held in snapshots {
        let snapshot = held.snapshot();
        let machine = admin.runs().machine(&held.run.machine);
        let (lost, _) = machine.as_ref().map_or((0, 0), |machine| machine.health_of(snapshot.id));
        let chain = machine.and_then(|machine| machine.chain(snapshot.id)).unwrap_or_default();
        let unread = chain.iter().find_map(|held| failed.get(&held.snapshot().data_write));
        damaged += u64::from(lost > 0);
        let result = match (lost, unread) {
            (0, None) => "whole".to_owned(),
            (0, Some(why)) => format!("not checked: {why}"),
            (lost, _) => {
                let bytes = (lost * BLOCK_BYTES).min(snapshot.size_bytes);
                format!("DAMAGED: {} of {} lost", amount(bytes), amount(snapshot.size_bytes))
            }
        };
        let disk = format!("{}/{}", held.run.machine, snapshot.disk);
        listed.push(json!({
            "snapshot_id": snapshot.id,
            "machine": held.run.machine,
            "disk_id": snapshot.disk,
            "committed_ms": held.run.committed_ms,
            "damaged_blocks": lost,
            "not_checked": unread,
        }));
        rows.push(vec![snapshot.id.to_string(), date(held.run.committed_ms), disk, result]);
    }
    let read_bytes: u64 = checked.iter().map(|one| one.read_bytes).sum();
    let speed = read_bytes as f64 / took.as_secs_f64().max(0.001);
    let mut text = table(&rows);
    checked.iter().for_each(|one| text.push_str(&one.text()));
    text.push_str(&gaps.text());
    text.push_str(&format!(
        "{} snapshots, {} images: {} read in {:.1} s, {}/s; {damaged} snapshots damaged\n",
        snapshots.len(),
        checked.len(),
        amount(read_bytes),
        took.as_secs_f64(),
        amount(speed as u64),
    ));
    let json = json!({
        "snapshots": listed,
        "images": checked.iter().map(Checked::json).collect::<Vec<_>>(),
        "read_bytes": read_bytes,
        "seconds": took.as_secs_f64(),
        "damaged_snapshots": damaged,
        "gaps": gaps.json(),
    });
    let is_bad = damaged > 0 || !failed.is_empty() || !gaps.is_empty();
    Answer { is_bad, ..Answer::new(text, json) }
}

impl Checked {
    /// What is wrong with the image, if anything is.
    fn text(&self) -> String {
        let image = format!("{}/{}", self.held.run.machine, self.held.snapshot().image);
        let damage = match &self.result {
            Ok(damage) if damage.is_none() => return String::new(),
            Ok(damage) => damage,
            Err(why) => return format!("{image}: not checked: {why}\n"),
        };
        let what = damage
            .unusable
            .as_deref()
            .unwrap_or("the next backup of its newest snapshot sends what it needs again");
        let (blocks, ranges) = (damage.blocks.blocks(), damage.blocks.len());
        format!("{image}: {blocks} blocks in {ranges} ranges are lost: {what}\n")
    }

    fn json(&self) -> Value {
        let snapshot = self.held.snapshot();
        let damage = self.result.as_ref().ok();
        let ranges: Vec<Value> = damage
            .iter()
            .flat_map(|damage| damage.blocks.iter())
            .take(MOST_RANGES)
            .map(|range| json!({ "first_block": range.start, "block_count": range.end - range.start }))
            .collect();
        json!({
            "image": format!("{}/{}", self.held.run.machine, snapshot.image),
            "snapshot_id": snapshot.id,
            "read_bytes": self.read_bytes,
            "damaged": ranges,
            "damaged_blocks": damage.map(|damage| damage.blocks.blocks()),
            "unusable": damage.and_then(|damage| damage.unusable.as_deref()),
            "not_checked": self.result.as_ref().err(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_a_disk_or_a_snapshot_is_named() {
        let id = SnapshotId::new();
        let whole = parse(&format!("alice/laptop/root/{id}")).unwrap();
        assert_eq!((whole.disk.unwrap().as_str(), whole.snapshot), ("root", Some(id)));
        assert_eq!(parse("alice/laptop").unwrap().disk, None);
        for wrong in ["alice", "alice/laptop/root/1", "alice/laptop/../x", "a/b/c/d/e", "/"] {
            parse(wrong).unwrap_err();
        }
    }
}
