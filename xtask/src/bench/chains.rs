//! A restore through a long chain beside one of a base with the same content, by the real client.

use std::path::Path;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::{
    disk,
    site::{Plan, Programs, Site},
};

const BYTES: u64 = 1 << 30;
/// Deltas above the base; the last link holds the newest snapshot.
const DELTAS: u64 = 100;
const ROUNDS: usize = 5;

/// Rows of `bench --store`: 1 % changes in each backup, most in runs of 64 KiB, a fifth as single blocks.
pub(super) fn measure(programs: &Programs, work: &Path) -> Result<Value> {
    let disk_path = work.join("disk.raw");
    disk::blank(&disk_path, BYTES)?;
    disk::write_noise(&disk_path, 0..BYTES, 1)?;
    let plan =
        Plan { servers: vec!["server-a".into()], janus: false, folder: Some(work.join("site")) };
    let site = Site::start(programs.clone(), &plan)?;
    let source = [format!("disk={}", disk_path.display())];
    let chained = site.client("chained", &source)?;
    chained.backup()?;
    for round in 0..DELTAS {
        disk::change(&disk_path, BYTES / 100, round + 2)?;
        chained.backup()?;
    }
    let base = site.client("base", &source)?;
    base.backup()?;
    let (mut through_chain, mut of_base) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        for (client, seconds) in [(&chained, &mut through_chain), (&base, &mut of_base)] {
            let to = work.join("restored.raw");
            let finished =
                client.run(&["restore", "disk", "--to", &to.to_string_lossy(), "--json"])?;
            finished.answer::<Value>()?;
            disk::compare(&disk_path, &to)?;
            std::fs::remove_file(to)?;
            seconds.push(finished.seconds);
        }
    }
    let best = |seconds: Vec<f64>| seconds.into_iter().min_by(f64::total_cmp).context("no round");
    let (chain, base) = (best(through_chain)?, best(of_base)?);
    println!(
        "restore of {} MiB through {DELTAS} deltas: {chain:.2} s, of a base {base:.2} s: {:.2} of its speed",
        BYTES >> 20,
        base / chain
    );
    Ok(
        json!({ "what": "restore", "mib": BYTES >> 20, "deltas": DELTAS, "seconds": chain, "base_seconds": base }),
    )
}
