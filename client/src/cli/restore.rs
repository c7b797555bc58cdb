//! `janus-client restore`.

use std::{
    ops::Range,
    path::{Path, PathBuf},
    sync::Arc,
};

use clap::{Arg, ArgAction, ArgMatches};
use janus_proto::{
    pb::Consistency,
    show::{amount, date},
};
use serde_json::{Value, json};

use super::{Context, Failure, Outcome, chosen::selection};
use crate::{
    catalog::{Found, consistency_name},
    progress::{self, Doing, Progress},
    restore::{FORMATS, Lost, Restore, RestoreReport, TargetFormat},
    seal::Keys,
    snapshot::Selection,
    ways::Ways,
};

mod map;

/// Arguments about how it is done.
pub(super) fn arguments() -> Vec<Arg> {
    let flag = |name: &'static str| Arg::new(name).long(name).action(ArgAction::SetTrue);
    vec![
        Arg::new("to")
            .long("to")
            .value_name("PATH")
            .required_unless_present("map")
            .help("File to make, or block device"),
        Arg::new("map")
            .long("map")
            .value_name("DISK=PATH")
            .action(ArgAction::Append)
            .conflicts_with_all(["to", "volume", "partial"])
            .help("Where a disk of a machine goes; once for each. What is lost is shown, and must be confirmed"),
        flag("yes").requires("map").help("Don't ask"),
        Arg::new("volume")
            .long("volume")
            .value_name("NUMBER")
            .value_parser(clap::value_parser!(u32))
            .help("Only this volume of the disk, as `ls` and `sources` number them"),
        Arg::new("format")
            .long("format")
            .value_parser(FORMATS)
            .help("As what a file is written; by default as its name ends, else raw"),
        flag("in-place").requires("force").help(
            "Overwrite the file itself instead of a copy: needs no space, but until it is done the file is neither old nor new",
        ),
        flag("full").help("Fetch all of it, without reading what is there"),
        flag("verify").help("Read all of it back in the end and compare it once more"),
    ]
}

pub(super) async fn run(matches: &ArgMatches, context: &Context) -> Result<Outcome, Failure> {
    let text = |name: &str| matches.get_one::<String>(name).cloned().unwrap_or_default();
    let wanted = selection(matches, &text("what"), context)?;
    let keys = context.keys(matches).await?;
    let ways = context.ways_awake().await?;
    if matches.contains_id("map") {
        return map::run(matches, context, &wanted, &ways, &keys).await;
    }
    let to = PathBuf::from(text("to"));
    // Others may stand for a server that is away, unless only one was asked for.
    let found = match wanted.server {
        Some(_) => wanted.find(&ways).await?,
        None => wanted.find_away(&ways).await?,
    };
    let force = matches.get_flag("force");
    let restore = restore_to(matches, context, (&ways, &keys), &wanted, &to, force)?;
    one(restore, found, context).await
}

/// A restore as the arguments want it.
fn restore_to(
    matches: &ArgMatches,
    context: &Context,
    (ways, keys): (&Ways, &Arc<Keys>),
    wanted: &Selection,
    to: &Path,
    force: bool,
) -> Result<Restore, Failure> {
    let settings = &context.settings;
    let format = matches.get_one::<String>("format").and_then(|name| TargetFormat::named(name));
    let restore = Restore {
        reach: context.reach(ways, wanted),
        keys: keys.clone(),
        // Only this one was asked for.
        alone: wanted.server.is_some(),
        volume: matches.get_one("volume").copied(),
        to: to.to_owned(),
        format: format.unwrap_or_else(|| TargetFormat::of_path(to)),
        force,
        in_place: matches.get_flag("in-place"),
        full: matches.get_flag("full"),
        verify: matches.get_flag("verify"),
        partial: matches.get_one::<String>("partial").map(PathBuf::from),
        packing: settings.encoding()?,
        threads: settings.threads(),
        progress: Progress::new(0),
        stop: context.stop.clone(),
    };
    if restore.verify && restore.format != TargetFormat::Raw {
        return Err(Failure::usage("--verify reads raw disks back, not images: leave it out"));
    }
    Ok(restore)
}

/// Restores one disk, or a part of it.
async fn one(restore: Restore, found: Found, context: &Context) -> Result<Outcome, Failure> {
    let display = progress::show(Doing::Restore, &restore.progress, context.events);
    let to = &restore.to;
    let report = restore.run(found).await?;
    drop(display);
    let snapshot = &report.snapshot;
    let json = json!({
        "ok": true,
        "snapshot_id": snapshot.snapshot_id,
        "server": snapshot.server_id,
        "disk_id": snapshot.disk_id,
        "to": to,
        "size_bytes": snapshot.size_bytes,
        "volume": restore.volume,
        "bytes": report.place.bytes(),
        "table_moved": report.place.table.is_some(),
        "consistency": consistency_name(snapshot.consistency()),
        "resumed": report.resumed,
        "read_bytes": report.read_bytes,
        "fetched_bytes": report.fetched_bytes,
        "sources": sources_json(&report),
        "written_bytes": report.written_bytes,
        "verified_bytes": report.verified_bytes,
        "read_back_bytes": report.read_back_bytes,
        "lost": lost_json(&report.lost),
        "seconds": report.seconds,
    });
    let lost = match report.lost.is_empty() {
        true => String::new(),
        false => format!(
            "LOST, zeros now: {} at bytes {}\n",
            amount(report.lost.bytes()),
            report.lost.said()
        ),
    };
    let smeared = match snapshot.consistency() {
        Consistency::Smeared => {
            "SMEARED: its parts are from different times, read while the disk was in use\n"
        }
        _ => "",
    };
    let moved = match report.place.table {
        Some(_) => "its backup GPT was moved to the end of the device\n",
        None => "",
    };
    let volume = restore.volume.map(|number| format!("volume {number} of ")).unwrap_or_default();
    let server = &snapshot.server_id;
    let from = match snapshot.reachable {
        true => server.clone(),
        false => format!("others than {server}, which is away,"),
    };
    let text = format!(
        "{lost}{smeared}restored {volume}{} of {} from {from} to {}: {}, in {:.1} s\n{moved}",
        snapshot.disk_id,
        date(snapshot.committed_ms),
        to.display(),
        figures(&report),
        report.seconds,
    );
    Ok(Outcome { json, text })
}

/// What was read, fetched, written and verified, in one line.
fn figures(report: &RestoreReport) -> String {
    let mut text = format!(
        "{} read there, {} fetched",
        amount(report.read_bytes),
        amount(report.fetched_bytes)
    );
    if report.sources.len() > 1 {
        let from = |(server, bytes): &(String, u64)| format!("{} from {server}", amount(*bytes));
        let from: Vec<_> = report.sources.iter().map(from).collect();
        text += &format!(" ({})", from.join(", "));
    }
    text += &format!(
        ", {} written, {} of {} verified",
        amount(report.written_bytes),
        // Of blocks around a volume, too.
        amount(report.verified_bytes.min(report.place.bytes())),
        amount(report.place.bytes())
    );
    if report.read_back_bytes > 0 {
        text += &format!(", {} read back", amount(report.read_back_bytes));
    }
    text
}

fn sources_json(report: &RestoreReport) -> Value {
    let source = |(server, bytes): &(String, u64)| json!({ "server": server, "bytes": bytes });
    report.sources.iter().map(source).collect()
}

/// Lost parts as `--json` prints them.
pub(super) fn lost_json(lost: &Lost) -> Value {
    let range =
        |range: &Range<u64>| json!({ "offset": range.start, "bytes": range.end - range.start });
    lost.ranges().iter().map(range).collect()
}
