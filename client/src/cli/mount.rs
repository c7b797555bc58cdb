//! `janus-client mount`.

use std::{
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use clap::{Arg, ArgMatches, Command, value_parser};
use fuser::{Config, MountOption};
use serde_json::json;

use super::{
    Context, Failure, Outcome,
    inside::{self, Chosen},
};
use crate::browse::{BrowseError, mount::Mountable};

/// How often is looked whether it was unmounted, or should be.
const LOOK: Duration = Duration::from_millis(100);
/// How long an unmounted folder may still be used.
const GRACE: Duration = Duration::from_secs(1);

pub(super) fn command() -> Command {
    let [_, others @ ..] = super::chosen::arguments();
    Command::new("mount")
        .about(
            "Show the files of a snapshot in a folder, read-only, until it is unmounted or Ctrl-C",
        )
        .arg(
            Arg::new("place")
                .required(true)
                .value_name("WHAT")
                .value_parser(value_parser!(std::ffi::OsString))
                .help("DISK, USER/MACHINE/DISK or SNAPSHOT; each volume becomes a folder"),
        )
        .args(others)
        .arg(
            Arg::new("folder")
                .required(true)
                .value_name("FOLDER")
                .value_parser(value_parser!(PathBuf))
                .help("An empty folder"),
        )
}

pub(super) async fn run(matches: &ArgMatches, context: &Context) -> Result<Outcome, Failure> {
    let folder = matches.get_one::<PathBuf>("folder").cloned().unwrap_or_default();
    let chosen = inside::choose(matches, context).await?;
    if chosen.inside.volume.is_some() {
        return Err(Failure::usage("mount shows all volumes: name the disk or snapshot only"));
    }
    chosen.blocking(move |chosen| serve(chosen, &folder)).await
}

fn serve(chosen: Chosen, folder: &PathBuf) -> Result<Outcome, Failure> {
    let layout = chosen.layout()?;
    let known = layout.volumes.iter().filter(|volume| volume.file_system.is_some());
    let numbers: Vec<_> = known.map(|volume| volume.number).collect();
    let (stop, snapshot) = (chosen.stop.clone(), chosen.snapshot.clone());
    let opener = move |number| {
        let volume = layout.volumes.iter().find(|volume| volume.number == number);
        let unknown = || BrowseError::Unknown { path: format!("volume {number}") };
        chosen.open(volume.ok_or_else(unknown)?)
    };
    let mut config = Config::default();
    config.mount_options = vec![
        MountOption::RO,
        MountOption::NoSuid,
        MountOption::NoDev,
        MountOption::NoExec,
        MountOption::FSName(format!("janus:{}", snapshot.snapshot().snapshot_id)),
        MountOption::Subtype("janus".into()),
    ];
    let mountable = Mountable::new(numbers, Box::new(opener));
    let session = fuser::spawn_mount(mountable, folder, &config);
    let session = session.map_err(|error| {
        Failure::failed(format!("{}: cannot be mounted by FUSE: {error}", folder.display()))
    })?;
    eprintln!("mounted at {}; Ctrl-C or umount ends it", folder.display());
    while !stop.is_cancelled() && !session.guard.is_finished() {
        std::thread::sleep(LOOK);
    }
    if !session.guard.is_finished() {
        detach(folder);
    }
    // Files that are open there end with this process.
    let until = Instant::now() + GRACE;
    while !session.guard.is_finished() && Instant::now() < until {
        std::thread::sleep(LOOK);
    }
    if session.guard.is_finished() {
        let ended = session.join();
        ended.map_err(|error| Failure::failed(format!("{}: {error}", folder.display())))?;
    }
    let json = json!({ "ok": true, "fetched_bytes": snapshot.fetched_bytes() });
    Ok(Outcome { json, text: format!("{} is unmounted\n", folder.display()) })
}

/// Takes the folder out of the way, also while somebody uses it.
fn detach(folder: &Path) {
    if rustix::mount::unmount(folder, rustix::mount::UnmountFlags::DETACH).is_ok() {
        return;
    }
    // Others than root ask the program that has mounted it.
    let mut program = std::process::Command::new("fusermount3");
    let ended = program.args(["-u", "-z", "--"]).arg(folder).status();
    if !ended.is_ok_and(|status| status.success()) {
        tracing::warn!(folder = %folder.display(), "can't be unmounted: umount -l it");
    }
}
