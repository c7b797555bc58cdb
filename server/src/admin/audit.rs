//! `janus-server audit show|verify|head`: what was done, and whether the log of it is whole.

use std::collections::VecDeque;

use clap::Subcommand;
use janus_proto::{
    ids::{BlockHash, MachineKey},
    show::date,
};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{Admin, AdminError, Answer, moment, table::table};
use crate::audit::{
    Record,
    verify::{Bad, Found, verify},
};

/// What to do with the log.
#[derive(Debug, Clone, PartialEq, Eq, Subcommand, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Action {
    /// Show the newest records
    Show {
        /// From this day or moment on (UTC)
        #[arg(long, value_name = "DATE")]
        since: Option<String>,
        /// Only those of this machine
        #[arg(long, value_name = "USER/MACHINE")]
        machine: Option<MachineKey>,
        /// At most so many
        #[arg(long, value_name = "N", default_value_t = 200)]
        last: usize,
    },
    /// Read all of it: each record must follow from the one before
    Verify {
        /// A hash that `audit head` or the server's log told earlier: the log must have it
        #[arg(long, value_name = "HASH")]
        head: Option<BlockHash>,
    },
    /// Show number and hash of the newest record, to be noted elsewhere
    Head,
}

pub(super) fn run(admin: &Admin, action: &Action) -> Result<Answer, AdminError> {
    match action {
        Action::Show { since, machine, last } => {
            let since = since.as_deref().map(moment::parse).transpose()?;
            show(admin, since, machine.as_ref(), *last)
        }
        Action::Verify { head } => check(admin, *head),
        Action::Head => head(admin),
    }
}

fn head(admin: &Admin) -> Result<Answer, AdminError> {
    let Some(audit) = admin.runs().audit() else { return Ok(none()) };
    audit.flush()?;
    let head = audit.head()?;
    Ok(Answer::new(format!("{} {}\n", head.number, head.hash), head))
}

fn none() -> Answer {
    Answer::new("there is no audit log here\n", json!({}))
}

fn read(
    admin: &Admin,
    noted: Option<BlockHash>,
    seen: &mut dyn FnMut(&Record, &[u8]),
) -> Result<Option<Found>, AdminError> {
    let Some(audit) = admin.runs().audit() else { return Ok(None) };
    // What waits for room isn't there yet; that is told in another place.
    let _ = audit.flush();
    let newest = audit.head()?;
    Ok(Some(verify(admin.runs().store().storage(), audit.folder(), newest, noted, seen)?))
}

fn check(admin: &Admin, noted: Option<BlockHash>) -> Result<Answer, AdminError> {
    let Some(found) = read(admin, noted, &mut |_, _| {})? else { return Ok(none()) };
    let mut text = String::new();
    if found.torn > 0 {
        text.push_str(&format!("{} records were torn by crashes, and closed\n", found.torn));
    }
    for lost in &found.lost {
        text.push_str(&format!("{lost}\n"));
    }
    match &found.bad {
        Some(bad) => text.push_str(&bad_line(bad)),
        None => text.push_str(&format!(
            "{} records in {} files follow each other; the newest has the hash {}\n",
            found.head.number, found.files, found.head.hash
        )),
    }
    let bad = found
        .bad
        .as_ref()
        .map(|bad| json!({ "file": bad.file, "line": bad.line, "what": bad.what }));
    let json = json!({
        "records": found.head.number,
        "files": found.files,
        "head": found.head.hash,
        "torn": found.torn,
        "lost": found.lost,
        "bad": bad,
    });
    Ok(Answer { is_bad: found.bad.is_some(), ..Answer::new(text, json) })
}

fn bad_line(bad: &Bad) -> String {
    format!(
        "{}, line {}: {}; what comes after it is not believed\n",
        bad.file.display(),
        bad.line,
        bad.what
    )
}

fn show(
    admin: &Admin,
    since_ms: Option<i64>,
    machine: Option<&MachineKey>,
    last: usize,
) -> Result<Answer, AdminError> {
    let mut kept: VecDeque<(Record, Value)> = VecDeque::new();
    let mut seen = |record: &Record, line: &[u8]| {
        let fits = since_ms.is_none_or(|since_ms| record.ms >= since_ms)
            && machine.is_none_or(|machine| record.machine.as_ref() == Some(machine));
        if fits && last > 0 {
            if kept.len() == last {
                kept.pop_front();
            }
            kept.push_back((record.clone(), serde_json::from_slice(line).unwrap_or_default()));
        }
    };
    let Some(found) = read(admin, None, &mut seen)? else { return Ok(none()) };
    let head = ["NUMBER", "TIME", "WHO", "WHAT", "OF", "RESULT"];
    let mut rows = vec![head.map(String::from).to_vec()];
    rows.extend(kept.iter().map(|(record, _)| row(record)));
    let mut text = table(&rows);
    if let Some(bad) = &found.bad {
        text.push_str(&bad_line(bad));
    }
    let records: Vec<&Value> = kept.iter().map(|(_, value)| value).collect();
    let answer = Answer::new(text, json!({ "records": records }));
    Ok(Answer { is_bad: found.bad.is_some(), ..answer })
}

fn row(record: &Record) -> Vec<String> {
    let what = serde_json::to_value(record.what).unwrap_or_default();
    let through = match record.who.through.as_str() {
        "" => String::new(),
        through => format!(" through {through}"),
    };
    let of = [
        record.machine.as_ref().map(ToString::to_string),
        record.disk.as_ref().map(ToString::to_string),
        record.run.map(|run| run.to_string()),
        Some(record.note.clone()).filter(|note| !note.is_empty()),
    ];
    vec![
        record.n.to_string(),
        date(record.ms),
        format!("{}{through}", record.who.name),
        what.as_str().unwrap_or_default().to_owned(),
        of.into_iter().flatten().collect::<Vec<_>>().join(" "),
        record.result.clone(),
    ]
}
