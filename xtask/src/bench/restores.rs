//! Rows of restores: the whole disk and a rollback by 1 %, from one server and from two, through one janus or straight, beside copying
//! the flattened image. What is restored or copied comes from the disk: nobody restores what was backed up a minute ago.

use std::path::Path;

use anyhow::{Context, Result, ensure};

use super::{Images, Row, limits};
use crate::{
    disk,
    site::{Client, Plan, Programs, Site, answers},
};

struct Bench<'a> {
    client: Client,
    images: &'a Images,
    /// What is below this is theirs.
    servers: &'a Path,
    rows: Vec<Row>,
    /// Seconds of the copy.
    copy: f64,
}

pub(super) fn measure(
    programs: &Programs,
    images: &Images,
    work: &Path,
    encoding: &str,
) -> Result<Vec<Row>> {
    let plan = Plan { folder: Some(work.join("restores")), ..Plan::default() };
    let site = Site::start(programs.clone(), &plan)?;
    let live = work.join("live.raw");
    let mut client = site.client("bench", &[format!("disk={}", live.display())])?;
    client.settings.set("encoding", encoding);
    site.await_ready(&client)?;
    // Both servers have both, in turn.
    let mut snapshots = Vec::new();
    for image in [&images.base, &images.changed] {
        disk::copy(image, &live)?;
        for _ in 0..2 {
            let taken = client.backup()?;
            let disk = taken.disks.first().context("no disk")?;
            snapshots.push((taken.server, disk.snapshot_id.clone()));
        }
        std::fs::remove_file(&live)?;
    }
    let to = work.join("restored.raw");
    disk::forget(work)?;
    disk::forget(&images.base)?;
    let copy = limits::timed(|| {
        disk::copy(&images.base, &to)?;
        Ok(std::fs::File::open(&to)?.sync_all()?)
    })?;
    std::fs::remove_file(&to)?;
    let rows = vec![images.row("cp", "cp --sparse, synced", copy)];
    let mut bench = Bench { client, images, servers: site.folder(), rows, copy };
    let (server, base) = snapshots.first().context("no snapshot")?;
    let one = ["--server", server.as_str()];
    bench.restore("whole, one server", base, &to, &one)?;
    bench.restore("whole, two servers", base, &to, &[])?;
    for (what, from) in [("1 % back, one server", &one[..]), ("1 % back, two servers", &[])] {
        disk::copy(&images.changed, &to)?;
        let more: Vec<_> = ["--force", "--in-place"].iter().chain(from).copied().collect();
        bench.restore(what, base, &to, &more)?;
    }
    bench.client.settings.set("direct", "prefer");
    bench.restore("whole, one server, straight", base, &to, &one)?;
    bench.restore("whole, two servers, straight", base, &to, &[])?;
    let folder = site.folder().to_owned();
    let rows = bench.rows;
    drop(site);
    std::fs::remove_dir_all(folder)?;
    Ok(rows)
}

impl Bench<'_> {
    fn restore(&mut self, what: &str, snapshot: &str, to: &Path, more: &[&str]) -> Result<()> {
        let text = to.to_string_lossy();
        let mut arguments = vec!["restore", snapshot, "--to", &text, "--json"];
        arguments.extend(more);
        disk::forget(self.servers)?;
        if to.exists() {
            disk::forget(to)?;
        }
        let finished = self.client.run(&arguments)?;
        let answer: answers::Restore = finished.answer()?;
        ensure!(answer.verified_bytes == self.images.bytes, "{answer:?}");
        disk::compare(&self.images.base, to)?;
        std::fs::remove_file(to)?;
        let mut row = self.images.row("janus", what, finished.seconds);
        row.limit = Some(("cp --sparse, synced".to_owned(), self.copy / finished.seconds));
        let gib = self.images.gib();
        row.cpu_seconds_per_gib.push(("client".into(), finished.used.cpu_seconds / gib));
        row.peak_rss_mib.push(("client".into(), finished.used.peak_rss_bytes >> 20));
        let shares: Vec<_> = answer
            .sources
            .iter()
            .map(|s| format!("{} MiB of {}", s.bytes >> 20, s.server))
            .collect();
        println!("{what}: fetched {}, wrote {} MiB", shares.join(", "), answer.written_bytes >> 20);
        self.rows.push(row);
        Ok(())
    }
}
