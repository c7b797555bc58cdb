//! `janus-server rebuild`: what was done, and which snapshots can be read now.

use std::path::Path;

use janus_proto::{ids::MachineKey, show::date};
use serde_json::{Value, json};

use super::{Answer, ask::AskError, table::table};
use crate::{
    chain::{
        Held, History,
        opened::OpenedSnapshot,
        store::rebuild::{self, Plan},
    },
    storage::Disk,
};

pub(super) fn run(
    storage: &Disk,
    root: &Path,
    separate: bool,
    dry_run: bool,
    progress: &dyn Fn(String),
) -> Result<Answer, AskError> {
    if dry_run {
        let plan = rebuild::plan(storage, root, separate)?;
        let nameless = plan.images_of_nobody();
        let steps = plan_text(&plan, root);
        let text = format!(
            "{steps}{}Nothing was changed: this is what a rebuild would do.\n",
            nameless_text(nameless)
        );
        let is_bad = nameless > 0 || !plan.unread.is_empty();
        return Ok(Answer { is_bad, ..Answer::new(text, plan_json(&plan, root, true)) });
    }
    let rebuilt = rebuild::rebuild(storage, root, separate)?;
    let mut keys: Vec<&MachineKey> = rebuilt.machines.keys().collect();
    keys.sort_unstable();
    let mut snapshots = Vec::new();
    for key in keys {
        progress(format!("looking at the snapshots of {key}"));
        let folder = rebuilt.store.machine_folder(key);
        let history = &rebuilt.machines[key].history;
        let all = history.newest_first();
        snapshots.extend(all.map(|held| Looked::at(storage, &folder, history, held)));
    }
    let generation = rebuilt.store.generation;
    let mut json = plan_json(&rebuilt.plan, root, false);
    json["store_generation"] = json!(generation);
    json["snapshots"] = snapshots.iter().map(Looked::json).collect();
    let bad = snapshots.iter().filter(|one| one.wrong.is_some()).count();
    let nameless = rebuilt.plan.images_of_nobody();
    let text = format!(
        "{}{}{}{} snapshots, {bad} of them can't be read as a whole; the store is {generation} from now on.\n\
         `janus-server verify` compares all blocks with their hashes.\n",
        plan_text(&rebuilt.plan, root),
        snapshots_text(&snapshots),
        nameless_text(nameless),
        snapshots.len(),
    );
    let is_bad = bad > 0 || nameless > 0 || !rebuilt.plan.unread.is_empty();
    Ok(Answer { is_bad, ..Answer::new(text, json) })
}

/// What is said of a chain that begins with a stub.
const STUB: &str = "it builds on a stub: `janus-server seed status` tells what that lacks";

/// A snapshot and how it can be read.
struct Looked {
    held: Held,
    /// Why not as a whole.
    wrong: Option<String>,
    is_partly_readable: bool,
}

impl Looked {
    /// Opens all files of its chain, and compares the tables with what was committed; blocks are not read.
    fn at(storage: &Disk, folder: &Path, history: &History, held: Held) -> Self {
        let snapshot = held.snapshot();
        let Some(chain) = history.chain(snapshot.id) else {
            let wrong = Some("a manifest of its chain is missing".to_owned());
            return Self { held, wrong, is_partly_readable: false };
        };
        let (wrong, is_partly_readable) = match OpenedSnapshot::open_rest(storage, folder, &chain) {
            Err(error) => (Some(error.to_string()), false),
            Ok(opened) => match opened.tables.table_digest() {
                Err(error) => (Some(error.to_string()), false),
                Ok(digest) if digest != snapshot.table_digest => {
                    (Some("its tables have another digest than at its commit".to_owned()), false)
                }
                Ok(_) => {
                    let lost = opened.lost.first().map(|(_, error)| error.to_string());
                    let base = chain.len().saturating_sub(1);
                    let stub = || opened.is_stub(base).then(|| STUB.to_owned());
                    (lost.or_else(stub), true)
                }
            },
        };
        Self { held, wrong, is_partly_readable }
    }

    fn word(&self) -> &'static str {
        match (&self.wrong, self.is_partly_readable) {
            (None, _) => "yes",
            (Some(_), true) => "in part",
            (Some(_), false) => "no",
        }
    }

    fn json(&self) -> Value {
        let snapshot = self.held.snapshot();
        json!({
            "snapshot_id": snapshot.id,
            "machine": self.held.run.machine,
            "disk_id": snapshot.disk,
            "committed_ms": self.held.run.committed_ms,
            "readable": self.word(),
            "reason": self.wrong,
        })
    }
}

fn snapshots_text(snapshots: &[Looked]) -> String {
    let mut rows = vec![["SNAPSHOT", "COMMITTED", "DISK", "READABLE"].map(String::from).to_vec()];
    for one in snapshots {
        let snapshot = one.held.snapshot();
        let disk = format!("{}/{}", one.held.run.machine, snapshot.disk);
        let why = one.wrong.as_ref().map(|why| format!(": {why}")).unwrap_or_default();
        let readable = format!("{}{why}", one.word());
        rows.push(vec![snapshot.id.to_string(), date(one.held.run.committed_ms), disk, readable]);
    }
    table(&rows)
}

/// A rebuild that loses snapshots must not look like one that finds all.
fn nameless_text(images: usize) -> String {
    match images {
        0 => String::new(),
        images => format!(
            "{images} images belong to no snapshot, since no manifest (.runs/*.json) names them: bring the manifests back and \
             rebuild again, or open the images with other programs.\n"
        ),
    }
}

fn plan_text(plan: &Plan, root: &Path) -> String {
    let steps = plan.steps.iter().map(|step| format!("{}\n", step.describe(root)));
    let unread = plan.unread.iter().map(|(path, why)| format!("{}: {why}\n", path.display()));
    steps.chain(unread).collect()
}

fn plan_json(plan: &Plan, root: &Path, dry_run: bool) -> Value {
    let unread = plan.unread.iter().map(|(path, why)| json!({ "path": path, "reason": why }));
    json!({
        "dry_run": dry_run,
        "steps": plan.steps.iter().map(|step| step.describe(root)).collect::<Vec<_>>(),
        "left_out": unread.collect::<Vec<_>>(),
    })
}
