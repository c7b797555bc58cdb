//! `janus-client ls`.

use std::{collections::HashSet, fmt::Write};

use clap::{Arg, ArgAction, ArgMatches, Command};
use janus_proto::show::{amount, date};
use serde_json::{Value, json};

use super::{
    Context, Failure, Outcome,
    inside::{self, Chosen},
};
use crate::{
    browse::{Entry, Kind, Volume, entry::check_name, shown},
    volume::{self, Layout},
};

/// Folders in folders.
const MOST_DEPTH: usize = 512;

pub(super) fn command() -> Command {
    let flag = |name: &'static str| Arg::new(name).long(name).action(ArgAction::SetTrue);
    Command::new("ls")
        .about("List the volumes of a snapshot, or the files in one of them")
        .args(inside::arguments())
        .arg(flag("long").short('l').help("With mode or attributes, owner, size, date and streams"))
        .arg(flag("recursive").short('R').help("With all that is in its folders"))
}

pub(super) async fn run(matches: &ArgMatches, context: &Context) -> Result<Outcome, Failure> {
    let chosen = inside::choose(matches, context).await?;
    let (is_long, is_deep) = (matches.get_flag("long"), matches.get_flag("recursive"));
    let list = move |chosen: Chosen| match chosen.inside.volume {
        None => volumes(&chosen),
        Some(_) => files(&chosen, is_long, is_deep),
    };
    chosen.blocking(list).await
}

fn volumes(chosen: &Chosen) -> Result<Outcome, Failure> {
    let layout = chosen.layout()?;
    let of = |one: &volume::Volume| {
        json!({
            "number": one.number,
            "file_system": one.file_system,
            "label": one.fs_label,
            "uuid": one.fs_uuid,
            "partition_label": one.label,
            "type": one.type_name,
            "start_bytes": one.start,
            "size_bytes": one.len,
        })
    };
    let volumes: Vec<_> = layout.volumes.iter().map(of).collect();
    let json = json!({ "ok": true, "snapshot_id": chosen.snapshot.snapshot().snapshot_id, "table": layout.table, "volumes": volumes });
    Ok(Outcome { json, text: volumes_text(&layout) })
}

fn volumes_text(layout: &Layout) -> String {
    let mut text = String::new();
    for one in &layout.volumes {
        let kind = one.file_system.map_or("unknown".to_owned(), |kind| kind.to_string());
        let labels = [&one.fs_label, &one.label, &one.type_name];
        let mut labels: Vec<_> = labels
            .into_iter()
            .filter(|label| !label.is_empty())
            .map(|label| shown(label.as_bytes()))
            .collect();
        labels.dedup();
        let _ = writeln!(
            text,
            "{:>3}  {kind:9}  {:>10}  {}",
            one.number,
            amount(one.len),
            labels.join(", ")
        );
    }
    if layout.volumes.is_empty() {
        text.push_str("no volumes that are known here\n");
    }
    text
}

/// What is listed, and what could not be.
struct Listing {
    is_long: bool,
    text: String,
    entries: Vec<Value>,
    problems: Vec<String>,
}

fn files(chosen: &Chosen, is_long: bool, is_deep: bool) -> Result<Outcome, Failure> {
    let mut volume = chosen.volume()?;
    let path = chosen.inside.path.clone();
    let own = volume.look(&path)?;
    let mut listing = Listing { is_long, text: String::new(), entries: vec![], problems: vec![] };
    if own.kind() == Kind::Folder {
        listing.tree(&mut volume, path, &own, is_deep)?;
    } else {
        listing.add(&path, &own);
    }
    let is_whole = listing.problems.is_empty();
    listing.problems.iter().for_each(|problem| eprintln!("janus-client: {problem}"));
    let json = json!({
        "ok": is_whole,
        "exit_code": u8::from(!is_whole),
        "snapshot_id": chosen.snapshot.snapshot().snapshot_id,
        "fetched_bytes": chosen.snapshot.fetched_bytes(),
        "entries": listing.entries,
        "problems": listing.problems,
    });
    Ok(Outcome { json, text: listing.text })
}

impl Listing {
    fn tree(
        &mut self,
        volume: &mut Volume,
        path: Vec<u8>,
        own: &Entry,
        is_deep: bool,
    ) -> Result<(), Failure> {
        let mut left = vec![(path, 0)];
        let mut seen: HashSet<_> = own.id().into_iter().collect();
        let (mut entered, most) = (0, volume.most_folders());
        while let Some((path, depth)) = left.pop() {
            entered += 1;
            let entries = match volume.list(&path) {
                Ok(entries) => entries,
                Err(error) if depth == 0 => return Err(error.into()),
                Err(error) => {
                    self.problems.push(format!("{}: {error}", shown(&path)));
                    continue;
                }
            };
            if is_deep {
                let _ =
                    writeln!(self.text, "{}{}:", if entered > 1 { "\n" } else { "" }, shown(&path));
            }
            let mut folders = Vec::new();
            for entry in &entries {
                let below = [path.strip_suffix(b"/").unwrap_or(&path), b"/", &entry.name].concat();
                self.add(&below, entry);
                let is_new = is_deep
                    && entry.kind() == Kind::Folder
                    && check_name(&entry.name).is_ok()
                    && depth < MOST_DEPTH
                    && (most == 0 || entered < most);
                if is_new && entry.id().is_none_or(|id| seen.insert(id)) {
                    folders.push((below, depth + 1));
                }
            }
            left.extend(folders.into_iter().rev());
        }
        Ok(())
    }

    fn add(&mut self, path: &[u8], entry: &Entry) {
        let mut problem = entry.problem.clone();
        if let Err(reason) = check_name(&entry.name) {
            problem = format!("the file system is damaged: {reason}");
        }
        if !problem.is_empty() {
            self.problems.push(format!("{}: {problem}", shown(path)));
        }
        self.entries.push(entry_json(path, entry, &problem));
        let name = path.rsplit(|byte| *byte == b'/').next().unwrap_or(path);
        if self.is_long {
            self.text.push_str(&long_line(name, entry));
            return;
        }
        let tail = if entry.kind() == Kind::Folder { "/" } else { "" };
        let _ = writeln!(self.text, "{}{tail}", shown(name));
    }
}

fn entry_json(path: &[u8], entry: &Entry, problem: &str) -> Value {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let streams = entry.streams.iter();
    let streams = streams.map(|one| json!({ "name": one.name, "size_bytes": one.size_bytes }));
    let modified = entry.modified_seconds.map(|seconds| {
        seconds.saturating_mul(1000).saturating_add((entry.modified_nanos / 1_000_000).into())
    });
    json!({
        "path": text(path),
        "kind": entry.kind().name(),
        "size_bytes": entry.size_bytes,
        "allocated_bytes": entry.allocated_bytes,
        "modified_ms": modified,
        "mode": entry.mode.map(|mode| format!("{mode:04o}")),
        "uid": entry.uid,
        "gid": entry.gid,
        "attributes": Some(&entry.attributes).filter(|letters| !letters.is_empty()),
        "target": Some(text(&entry.target)).filter(|target| !target.is_empty()),
        "streams": streams.collect::<Vec<_>>(),
        "problem": Some(problem).filter(|problem| !problem.is_empty()),
    })
}

fn long_line(name: &[u8], entry: &Entry) -> String {
    let kind = match entry.kind() {
        Kind::File => '-',
        Kind::Folder => 'd',
        Kind::Link => 'l',
        Kind::Device => 'b',
        Kind::Pipe => 'p',
        Kind::Socket => 's',
        Kind::Unknown => '?',
    };
    let mode = entry.mode.map_or(format!("{:9}", entry.attributes), permissions);
    let number = |id: Option<u32>| id.map_or("-".to_owned(), |id| id.to_string());
    let modified = entry.modified_seconds.map(|seconds| date(seconds.saturating_mul(1000)));
    let target = match entry.target.is_empty() {
        true => String::new(),
        false => format!(" -> {}", shown(&entry.target)),
    };
    let mut text = format!(
        "{kind}{mode} {:>5} {:>5} {:>14}  {:19}  {}{target}\n",
        number(entry.uid),
        number(entry.gid),
        entry.size_bytes,
        modified.unwrap_or_default(),
        shown(name),
    );
    for stream in &entry.streams {
        let name = format!("{}:{}", shown(name), shown(stream.name.as_bytes()));
        let _ = writeln!(text, "{:37}  {:19}  {name}", format!("{:>37}", stream.size_bytes), "");
    }
    text
}

/// As `ls` writes them.
fn permissions(mode: u32) -> String {
    let mut text: Vec<char> = (0..9)
        .map(|at| if mode >> (8 - at) & 1 == 1 { ['r', 'w', 'x'][at % 3] } else { '-' })
        .collect();
    for (bit, at, letter) in [(0o4000, 2, 's'), (0o2000, 5, 's'), (0o1000, 8, 't')] {
        if mode & bit != 0 {
            text[at] = if text[at] == 'x' { letter } else { letter.to_ascii_uppercase() };
        }
    }
    text.into_iter().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn permissions_read_as_those_of_ls() {
        for (mode, text) in [
            (0o755, "rwxr-xr-x"),
            (0o4711, "rws--x--x"),
            (0o1777, "rwxrwxrwt"),
            (0o2640, "rw-r-S---"),
        ] {
            assert_eq!(permissions(mode), text);
        }
    }
}
