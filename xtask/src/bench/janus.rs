//! Our rows: first backup, unchanged, 1 % changed, restore; through janus and straight to the server.

use std::{path::Path, time::Instant};

use anyhow::{Result, ensure};

use super::{Images, Row, assert_equal, limits::Limits};
use crate::{
    disk,
    measure::{self, Used},
    packages,
    site::{Client, Finished, Plan, Programs, Site, answers},
};

const SERVER: &str = "server-a";

/// A site with one server, so that every backup is of the same chain.
struct Bench<'a> {
    site: Site,
    client: Client,
    images: &'a Images,
    who: &'static str,
}

pub(super) fn measure(
    programs: &Programs,
    images: &Images,
    work: &Path,
    through_janus: bool,
    encoding: &str,
    limits: &Limits,
) -> Result<Vec<Row>> {
    let who = if through_janus { "janus" } else { "direct" };
    let plan =
        Plan { servers: vec![SERVER.into()], janus: through_janus, folder: Some(work.join(who)) };
    let site = Site::start(programs.clone(), &plan)?;
    let live = work.join(format!("{who}.raw"));
    let mut client = site.client("bench", &[format!("disk={}", live.display())])?;
    client.settings.set("encoding", encoding);
    if through_janus {
        site.await_ready(&client)?;
    }
    let mut bench = Bench { site, client, images, who };
    disk::copy(&images.base, &live)?;
    let mut rows = vec![bench.backup("first backup", ("copy and sync", limits.copy))?];
    rows.push(bench.backup("unchanged", ("read and hash", limits.read_and_hash))?);
    std::fs::remove_file(&live)?;
    disk::copy(&images.changed, &live)?;
    rows.push(bench.backup("1 % changed", ("read and hash", limits.read_and_hash))?);
    let to = work.join("restored.raw");
    rows.push(bench.restore(&to, ("copy and sync", limits.copy))?);
    assert_equal(images, &to, true)?;
    std::fs::remove_file(to)?;
    if !through_janus {
        rows.push(bench.verify()?);
    }
    std::fs::remove_file(live)?;
    let folder = bench.site.folder().to_owned();
    drop(bench);
    std::fs::remove_dir_all(folder)?;
    Ok(rows)
}

impl Bench<'_> {
    fn backup(&mut self, what: &str, limit: (&str, f64)) -> Result<Row> {
        let (finished, mut row) = self.run(what, &["backup", "--json"], limit)?;
        let answer: answers::Backup = finished.answer()?;
        row.stored_bytes = Some(answer.disks.iter().map(|disk| disk.image_allocated_bytes).sum());
        if let Some(forwarded) = row.through_janus_bytes {
            let sent: u64 = answer.disks.iter().map(|disk| disk.wire_bytes).sum();
            ensure!(forwarded >= sent, "janus forwarded {forwarded} bytes, the client sent {sent}");
        }
        Ok(row)
    }

    fn restore(&mut self, to: &Path, limit: (&str, f64)) -> Result<Row> {
        let (finished, row) = self.run(
            "restore",
            &["restore", "disk", "--to", &to.to_string_lossy(), "--json"],
            limit,
        )?;
        let answer: answers::Restore = finished.answer()?;
        if let Some(forwarded) = row.through_janus_bytes {
            let most = answer.fetched_bytes;
            ensure!(
                forwarded >= most / 2,
                "janus forwarded {forwarded} bytes, the client fetched {most}"
            );
        }
        Ok(row)
    }

    /// All stored images, as the server reads and compares them, and as b3sum reads the same files. Neither finds them in
    /// the page cache, which backups and checks go past.
    fn verify(&mut self) -> Result<Row> {
        let before = self.processes()?;
        let began = Instant::now();
        let output = self.site.admin(SERVER, &["verify", "--json"])?;
        let seconds = began.elapsed().as_secs_f64();
        ensure!(output.status.success(), "verify failed: {output:?}");
        let answer: serde_json::Value = serde_json::from_slice(&output.stdout)?;
        let read_mib = answer["read_bytes"].as_f64().unwrap_or(0.0) / f64::from(1 << 20);
        let mut row = self.images.row(self.who, "verify", seconds);
        row.disk_mib_per_second = read_mib / seconds;
        let gib = self.images.gib();
        for ((name, _, before), (_, _, after)) in before.iter().zip(self.processes()?) {
            row.cpu_seconds_per_gib
                .push((name.clone(), (after.cpu_seconds - before.cpu_seconds) / gib));
        }
        row.limit = self.b3sum()?.map(|limit| ("b3sum".to_owned(), limit / seconds));
        Ok(row)
    }

    /// Seconds that b3sum takes for all images; `None` where it isn't installed.
    fn b3sum(&mut self) -> Result<Option<f64>> {
        if !packages::is_here("b3sum") {
            return Ok(None);
        }
        let folder = self.site.server(SERVER)?.images().join("alice/bench/disk");
        let images: Vec<_> = std::fs::read_dir(folder)?
            .filter_map(|entry| Some(entry.ok()?.path()))
            .filter(|path| path.extension().is_some_and(|kind| kind == "vhdx"))
            .collect();
        let began = Instant::now();
        packages::output(packages::command("b3sum").args(images))?;
        Ok(Some(began.elapsed().as_secs_f64()))
    }

    fn run(
        &mut self,
        what: &str,
        arguments: &[&str],
        limit: (&str, f64),
    ) -> Result<(Finished, Row)> {
        let forwarded = self.forwarded()?;
        let before = self.processes()?;
        for (_, pid, _) in &before {
            measure::reset_peak(*pid);
        }
        let finished = self.client.run(arguments)?;
        let mut row = self.images.row(self.who, what, finished.seconds);
        row.limit = Some((limit.0.to_owned(), limit.1 / finished.seconds));
        let gib = self.images.gib();
        row.cpu_seconds_per_gib.push(("client".into(), finished.used.cpu_seconds / gib));
        row.peak_rss_mib.push(("client".into(), finished.used.peak_rss_bytes >> 20));
        for ((name, _, before), (_, _, after)) in before.iter().zip(self.processes()?) {
            row.cpu_seconds_per_gib
                .push((name.clone(), (after.cpu_seconds - before.cpu_seconds) / gib));
            row.peak_rss_mib.push((name.clone(), after.peak_rss_bytes >> 20));
        }
        row.through_janus_bytes = match (forwarded, self.forwarded()?) {
            (Some(before), Some(after)) => Some(after - before),
            _ => None,
        };
        Ok((finished, row))
    }

    /// Janus, where there is one, and the server.
    fn processes(&mut self) -> Result<Vec<(String, u32, Used)>> {
        let mut found = Vec::new();
        if let Some(janus) = self.site.janus() {
            found.push(("janus".to_owned(), janus.pid(), janus.used()));
        }
        if let Some(server) = self.site.server(SERVER)?.process() {
            found.push(("server".to_owned(), server.pid(), server.used()));
        }
        Ok(found)
    }

    /// Body bytes that janus says it has forwarded.
    fn forwarded(&self) -> Result<Option<u64>> {
        if self.site.janus().is_none() {
            return Ok(None);
        }
        let status = self.client.status()?;
        Ok(Some(
            status.servers.iter().map(|server| server.bytes_sent + server.bytes_received).sum(),
        ))
    }
}
