//! `janus-client restore USER/MACHINE --map DISK=PATH`: the disks of a machine, each to its place, after a look at what is lost.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    io::{self, BufRead, IsTerminal},
    path::{Path, PathBuf},
    sync::Arc,
};

use clap::ArgMatches;
use janus_proto::{
    ids::DiskId,
    show::{amount, date},
};
use serde_json::json;

use super::{super::Context, Failure, Outcome};
use crate::{
    catalog::Found,
    seal::Keys,
    snapshot::Selection,
    source::{mounts, size_of, sysfs},
    volume,
    ways::Ways,
};

pub(super) async fn run(
    matches: &ArgMatches,
    context: &Context,
    wanted: &Selection,
    ways: &Ways,
    keys: &Arc<Keys>,
) -> Result<Outcome, Failure> {
    let texts = matches.get_many::<String>("map").into_iter().flatten();
    let mut places = parse(texts.map(String::as_str))?;
    // Others may stand for a server that is away, unless only one was asked for.
    let found = match wanted.server {
        Some(_) => wanted.find_disks(ways).await?,
        None => wanted.find_all(ways).await?,
    };
    let known: Vec<_> = found.iter().map(|found| found.snapshot.disk_id.clone()).collect();
    let mut moves = Vec::new();
    for found in found {
        if let Some(to) = places.remove(&found.snapshot.disk_id) {
            let force = matches.get_flag("force") || is_device(&to);
            let restore = super::restore_to(matches, context, (ways, keys), wanted, &to, force)?;
            moves.push((found, restore));
        }
    }
    if let Some(disk) = places.keys().next() {
        let known = known.join(", ");
        return Err(Failure::usage(format!(
            "--map {disk}: there is no such disk; there are {known}"
        )));
    }
    // All of them before any is written.
    for (found, restore) in &moves {
        let checked = restore.check(found).await;
        checked.map_err(|error| after(error.into(), &found.snapshot.disk_id, ""))?;
    }
    let plan = tokio::task::spawn_blocking({
        let moves: Vec<_> = moves.iter().map(|(f, r)| (f.clone(), r.to.clone())).collect();
        move || plan(&moves)
    });
    confirm(&plan.await.map_err(Failure::failed)?, matches.get_flag("yes"), context).await?;
    let (mut text, mut disks) = (String::new(), Vec::new());
    for (found, restore) in moves {
        let name = found.snapshot.disk_id.clone();
        let done = super::one(restore, found, context).await;
        let done = done.map_err(|failure| after(failure, &name, &text))?;
        text += &done.text;
        disks.push(done.json);
    }
    Ok(Outcome { json: json!({ "ok": true, "disks": disks }), text })
}

/// A failure names the disk, and what was done before it.
fn after(failure: Failure, disk: &str, done: &str) -> Failure {
    let before = match done.lines().count() {
        0 => String::new(),
        _ => format!("; before it: {}", done.trim_end().replace('\n', "; ")),
    };
    Failure { message: format!("disk {disk}: {}{before}", failure.message), ..failure }
}

fn parse<'a>(texts: impl Iterator<Item = &'a str>) -> Result<BTreeMap<String, PathBuf>, Failure> {
    let mut places: BTreeMap<String, PathBuf> = BTreeMap::new();
    for text in texts {
        let (disk, path) =
            text.split_once('=').filter(|(_, path)| !path.is_empty()).ok_or_else(|| {
                Failure::usage(format!("--map {text}: write DISK=PATH, such as sda=/dev/nvme0n1"))
            })?;
        let disk: DiskId = disk.parse()?;
        if places.values().any(|other| same_place(other, Path::new(path))) {
            return Err(Failure::usage(format!(
                "--map {text}: {path} is the place of another disk"
            )));
        }
        if places.insert(disk.to_string(), path.into()).is_some() {
            return Err(Failure::usage(format!("--map {text}: disk {disk} has a place already")));
        }
    }
    Ok(places)
}

fn same_place(one: &Path, other: &Path) -> bool {
    use std::os::unix::fs::{FileTypeExt, MetadataExt};
    let number = |path: &Path| {
        let meta = std::fs::metadata(path).ok()?;
        let is_device = meta.file_type().is_block_device();
        Some(if is_device { (0, meta.rdev()) } else { (meta.dev(), meta.ino()) })
    };
    let real = |path: &Path| {
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
        let folder = folder.unwrap_or(Path::new(".")).canonicalize().ok()?;
        Some(folder.join(path.file_name()?))
    };
    let is_same = |one: Option<_>, other: Option<_>| one.is_some() && one == other;
    one == other
        || is_same(number(one), number(other))
        || real(one).is_some() && real(one) == real(other)
}

fn is_device(path: &Path) -> bool {
    use std::os::unix::fs::FileTypeExt;
    std::fs::metadata(path).is_ok_and(|meta| meta.file_type().is_block_device())
}

/// Which snapshot goes where, and what is there now. Blocks.
fn plan(moves: &[(Found, PathBuf)]) -> String {
    let mut text = String::new();
    let runs: std::collections::BTreeSet<_> =
        moves.iter().map(|(found, _)| &found.snapshot.backup_id).collect();
    for (Found { snapshot, .. }, to) in moves {
        let _ = writeln!(
            text,
            "{} of {} ({}, on {})\n    -> {}: {}",
            snapshot.disk_id,
            date(snapshot.committed_ms),
            amount(snapshot.size_bytes),
            snapshot.server_id,
            to.display(),
            now(to),
        );
    }
    if runs.len() > 1 {
        text += "NOT OF ONE BACKUP: these disks are of different moments\n";
    }
    text
}

/// What is lost at a place.
fn now(path: &Path) -> String {
    use std::os::unix::fs::MetadataExt;
    let Ok(meta) = std::fs::metadata(path) else { return "a new file".into() };
    let opened = std::fs::File::open(path);
    let Ok(file) = opened else { return "can't be read".into() };
    let size = size_of(&file, is_device(path)).map(amount).unwrap_or_default();
    let holds = match volume::layout(&file, 512) {
        Ok(layout) => {
            let systems: Vec<_> = layout
                .volumes
                .iter()
                .filter_map(|volume| Some(format!("{} {}", volume.file_system?, volume.fs_label)))
                .collect();
            match systems.is_empty() {
                true => layout.table.to_string(),
                false => format!("{} with {}", layout.table, systems.join(", ")),
            }
        }
        Err(error) => error.to_string(),
    };
    let mounted = match is_device(path) {
        true => mounts::any_mount(&sysfs::Device::of(meta.rdev()).family()),
        false => None,
    };
    let mounted = mounted.map(|mount| format!(", MOUNTED at {mount}")).unwrap_or_default();
    let kind = if is_device(path) { "device" } else { "file" };
    format!("{kind} of {size}, {holds}{mounted}: all of it is overwritten")
}

/// Shows what is going to be done, and asks.
async fn confirm(plan: &str, is_sure: bool, context: &Context) -> Result<(), Failure> {
    eprint!("{plan}");
    if is_sure {
        return Ok(());
    }
    if !io::stdin().is_terminal() {
        return Err(Failure::usage("nobody is there to confirm this: --yes if it is right"));
    }
    eprint!("Write? Type yes: ");
    let asking = tokio::task::spawn_blocking(|| {
        let mut line = String::new();
        io::stdin().lock().read_line(&mut line).map(|_| line)
    });
    let answer = context.stop.run_until_cancelled(asking).await;
    let answer = answer.and_then(Result::ok).and_then(Result::ok).unwrap_or_default();
    match answer.trim() {
        "yes" => Ok(()),
        _ => Err(Failure::interrupted()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_named_once() {
        let parse = |texts: &[&str]| parse(texts.iter().copied());
        let places = parse(&["sda=/dev/x", "sdb=/tmp/b=c"]).unwrap();
        assert_eq!(places["sdb"], Path::new("/tmp/b=c"));
        for wrong in [&["sda"][..], &["sda="], &["sda=/x", "sda=/y"], &["sda=/x", "sdb=/x"]] {
            assert!(parse(wrong).is_err(), "{wrong:?}");
        }
    }
}
