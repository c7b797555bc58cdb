//! `janus-client cp`.

use std::{fmt::Write, path::PathBuf, time::Instant};

use clap::{Arg, ArgAction, ArgMatches, Command, value_parser};
use janus_proto::show::amount;
use serde_json::{Value, json};

use super::{Context, Failure, Outcome, inside};
use crate::{
    browse::copy::{Copy, Owner, Report, Wishes},
    progress::{self, Doing, Progress},
};

/// Reasons that are written out for people.
const SHOWN: usize = 20;

pub(super) fn command() -> Command {
    let flag = |name: &'static str| Arg::new(name).long(name).action(ArgAction::SetTrue);
    Command::new("cp")
        .about("Copy files and folders out of a snapshot, with times, modes, holes and hard links")
        .args(inside::arguments())
        .arg(
            Arg::new("to")
                .required(true)
                .value_name("DEST")
                .value_parser(value_parser!(PathBuf))
                .help("Folder to copy into, or a new name"),
        )
        .arg(flag("recursive").short('r').help("Folders too, with all that is in them"))
        .arg(flag("force").help("Replace files that exist"))
        .arg(flag("owner").help("Keep owners, which root does anyway; fails for others"))
        .arg(
            flag("no-owner")
                .conflicts_with("owner")
                .help("Make all files those of the user who runs this"),
        )
}

pub(super) async fn run(matches: &ArgMatches, context: &Context) -> Result<Outcome, Failure> {
    let wishes = Wishes {
        recursive: matches.get_flag("recursive"),
        force: matches.get_flag("force"),
        owner: match (matches.get_flag("owner"), matches.get_flag("no-owner")) {
            (true, _) => Owner::Theirs,
            (_, true) => Owner::Ours,
            _ => Owner::IfPermitted,
        },
    };
    let to = matches.get_one::<PathBuf>("to").cloned().unwrap_or_default();
    let chosen = inside::choose(matches, context).await?;
    let (began, stop) = (Instant::now(), context.stop.clone());
    let progress = Progress::new(0);
    let display = progress::show(Doing::Copy, &progress, context.events);
    let snapshot = chosen.snapshot.clone();
    let copy = move |chosen: inside::Chosen| {
        let mut volume = chosen.volume()?;
        Ok(Copy::run(&mut volume, &chosen.inside.path, &to, wishes, progress, stop)?)
    };
    let report = chosen.blocking(copy).await?;
    drop(display);
    report.skipped.iter().take(SHOWN).for_each(|(path, reason)| {
        eprintln!("janus-client: {path}: not copied: {reason}");
    });
    let skipped = |(path, reason): &(String, String)| json!({ "path": path, "reason": reason });
    let fetched_bytes = snapshot.fetched_bytes();
    let json = json!({
        "ok": report.skipped_count == 0,
        "exit_code": u8::from(report.skipped_count > 0),
        "snapshot_id": snapshot.snapshot().snapshot_id,
        "files": report.files,
        "hard_links": report.hard_links,
        "folders": report.folders,
        "links": report.links,
        "bytes": report.bytes,
        "written_bytes": report.written_bytes,
        "fetched_bytes": fetched_bytes,
        "streams_left_out": report.streams,
        "without_times": report.without_times,
        "skipped_count": report.skipped_count,
        "skipped": report.skipped.iter().map(skipped).collect::<Vec<Value>>(),
        "seconds": began.elapsed().as_secs_f64(),
    });
    let text = text(&report, fetched_bytes, began.elapsed().as_secs_f64());
    Ok(Outcome { json, text })
}

fn text(report: &Report, fetched_bytes: u64, seconds: f64) -> String {
    let mut text = format!(
        "copied {} files and {} links in {} folders: {}, {} of it holes; {} fetched, in {seconds:.1} s\n",
        report.files + report.hard_links,
        report.links,
        report.folders,
        amount(report.bytes),
        amount(report.bytes.saturating_sub(report.written_bytes)),
        amount(fetched_bytes),
    );
    if report.streams > 0 {
        let _ = writeln!(text, "left out: {} alternate streams (cat reads them)", report.streams);
    }
    if report.without_times > 0 {
        let _ = writeln!(text, "{} files without their times", report.without_times);
    }
    if report.skipped_count > 0 {
        let _ = writeln!(text, "NOT COPIED: {}", report.skipped_count);
    }
    text
}
