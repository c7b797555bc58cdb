//! `cargo xtask bench --proxies`: janus as a proxy, beside nothing in between, a byte copier that ends TLS on both sides (the
//! floor: it can't route) and nginx and HAProxy, all with the same client, server, keys and machine, in turns.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};

use crate::{
    measure,
    packages::{self, Tool},
    site::{Plan, Process, Programs, Site, cargo, free_ports, target, workspace},
};

const TOOLS: &[Tool] = &[
    Tool { program: "nginx", package: "nginx-light" },
    Tool { program: "haproxy", package: "haproxy" },
];
/// The server's name in its certificate.
const SINK: &str = "sink";
const BULK_MIB: u64 = 2048;
const MANY: u64 = 64;
const CONCURRENCY: [u64; 3] = [1, 16, 64];
const UNARY_SECONDS: f64 = 1.0;
/// Before calls are measured. Listeners of ours read from a caller of more than 20,000 frames a second more slowly, which this time
/// saves for more than the calls of a second: without it their limit was measured, with a p99 of 4 to 14 ms.
const REST: Duration = Duration::from_secs(6);
const START_TIME: Duration = Duration::from_secs(20);

/// What `proxy-load bulk` prints.
#[derive(Debug, Deserialize)]
struct Bulk {
    mib_per_second: f64,
}

/// What `proxy-load unary` prints.
#[derive(Debug, Clone, Copy, Deserialize, Serialize)]
struct Unary {
    p50_us: u64,
    p99_us: u64,
    calls_per_second: f64,
}

/// One way from the client to the server.
struct Way {
    name: &'static str,
    url: String,
    /// None: there is nothing in between.
    process: Option<Process>,
}

/// Figures of one way: the best of all rounds.
#[derive(Debug, Serialize)]
struct Row {
    who: &'static str,
    mib_per_second: f64,
    cpu_seconds_per_gib: f64,
    /// By concurrency.
    unary: Vec<(u64, Unary)>,
    many_streams_mib_per_second: f64,
    many_streams_peak_rss_mib: u64,
}

/// Measures in `rounds` turns, prints and saves. The best of the turns counts, since other work on the machine only makes a
/// figure worse.
///
/// # Errors
/// When a program can't be installed, built or started, or loses a byte.
pub(super) fn run(programs: &Programs, rounds: u32, json: &Path) -> Result<()> {
    packages::require(TOOLS)?;
    let load = build_load()?;
    let bench = Bench::start(programs, load)?;
    let mut rows: Vec<Row> = bench.ways.iter().map(|way| Row::new(way.name)).collect();
    for _ in 0..rounds {
        bench.each(&mut rows, "one stream", Bench::bulk)?;
        bench.each(&mut rows, "calls", Bench::unary)?;
    }
    bench.each(&mut rows, "many streams", Bench::many_streams)?;
    print(&rows, rounds);
    let report = serde_json::json!({"rows": rows, "rounds": rounds, "bulk_mib": BULK_MIB});
    fs::write(json, serde_json::to_vec_pretty(&report)?)
        .with_context(|| format!("write {}", json.display()))?;
    println!("\nfigures: {}", json.display());
    Ok(())
}

fn build_load() -> Result<PathBuf> {
    let mut build = cargo();
    build.args(["build", "--release", "--workspace"]);
    build.args(["--features", "xtask/load", "--bin", "proxy-load"]);
    ensure!(build.status().context("run cargo")?.success(), "the build failed");
    Ok(target().join("release/proxy-load"))
}

struct Bench {
    load: PathBuf,
    ways: Vec<Way>,
    /// Arguments that name the client's keys.
    client_keys: Vec<String>,
    _sink: Process,
    _site: Site,
}

impl Bench {
    fn start(programs: &Programs, load: PathBuf) -> Result<Self> {
        let plan = Plan { servers: vec![SINK.into()], ..Plan::default() };
        let mut site = Site::prepare(programs.clone(), &plan)?;
        site.issue("client", "bench", &["--user", "bench", "--machine", "bench"])?;
        let keys = |name: &str| keys(&site.folder().join("pki").join(name));
        let (sink_keys, router_keys, client_keys) = (keys(SINK), keys("router"), keys("bench"));
        let ports = free_ports(3)?;
        let address = |at: usize| format!("127.0.0.1:{}", ports[at]);
        let url = site.server(SINK)?.url();
        let server = url.trim_start_matches("https://").to_owned();
        let log = |name: &str| site.folder().join(format!("logs/{name}.log"));

        let mut command = Command::new(&load);
        command.args(["sink", "--listen", &server]).args(&sink_keys);
        let sink = Process::start(SINK, command, &log(SINK))?;
        let mut command = Command::new(&load);
        command.args(["copier", "--listen", &address(0), "--to", &url]).args(&router_keys);
        let copier = Process::start("copier", command, &log("copier"))?;
        let others = [
            ("nginx", "nginx.conf", &["-c"][..], address(1)),
            ("haproxy", "haproxy.cfg", &["-db", "-f"], address(2)),
        ];
        let mut ways = vec![
            Way { name: "direct", url, process: None },
            Way { name: "copier", url: copier.url().to_owned(), process: Some(copier) },
        ];
        for (name, file, flags, listen) in others {
            let config = site.folder().join(file);
            let folder = site.folder().join("pki/router");
            write_config(file, &config, &folder, &listen, &server)?;
            let mut command = packages::command(name);
            command.args(flags).arg(&config);
            let url = format!("https://{listen}");
            let process = Process::spawn(name, command, &log(name), &url)?;
            ways.push(Way { name, url, process: Some(process) });
        }
        // All streams of the load are one caller's.
        site.janus_settings()?.set("max_bulk_streams_per_caller", MANY as i64);
        site.start_janus()?;
        let janus = site.take_janus()?;
        ways.push(Way { name: "janus", url: janus.url().to_owned(), process: Some(janus) });
        let bench = Self { load, ways, client_keys, _sink: sink, _site: site };
        bench.await_ready()?;
        Ok(bench)
    }

    fn await_ready(&self) -> Result<()> {
        for way in &self.ways {
            let begun = Instant::now();
            while let Err(error) = self.call::<Unary>(way, &["unary"], &[1], Some(0.01)) {
                if begun.elapsed() > START_TIME {
                    bail!("{} does not forward: {error:#}", way.name);
                }
                thread::sleep(Duration::from_millis(100));
            }
        }
        Ok(())
    }

    /// Measures all ways, one after another.
    fn each(
        &self,
        rows: &mut [Row],
        what: &str,
        measure: fn(&Self, &Way, &mut Row) -> Result<()>,
    ) -> Result<()> {
        for (way, row) in self.ways.iter().zip(rows) {
            eprintln!("{what}: {}", way.name);
            measure(self, way, row).with_context(|| format!("{what} through {}", way.name))?;
        }
        Ok(())
    }

    /// Runs `proxy-load` and reads its answer.
    fn call<T: serde::de::DeserializeOwned>(
        &self,
        way: &Way,
        what: &[&str],
        numbers: &[u64],
        seconds: Option<f64>,
    ) -> Result<T> {
        let mut command = Command::new(&self.load);
        command.args(what).args(["--url", &way.url, "--server", SINK]).args(&self.client_keys);
        let names: &[&str] =
            if seconds.is_some() { &["--concurrency"] } else { &["--mib", "--streams"] };
        for (name, number) in names.iter().zip(numbers) {
            command.arg(name).arg(number.to_string());
        }
        if let Some(seconds) = seconds {
            command.arg("--seconds").arg(seconds.to_string());
        }
        let said = packages::output(&mut command)?;
        serde_json::from_str(&said).with_context(|| format!("not an answer: {said}"))
    }

    fn bulk(&self, way: &Way, row: &mut Row) -> Result<()> {
        let cpu = || way.process.as_ref().map_or(0.0, |process| process.used().cpu_seconds);
        let before = cpu();
        let bulk: Bulk = self.call(way, &["bulk"], &[BULK_MIB, 1], None)?;
        let per_gib = (cpu() - before) / (BULK_MIB as f64 / 1024.0);
        row.mib_per_second = row.mib_per_second.max(bulk.mib_per_second);
        row.cpu_seconds_per_gib = row.cpu_seconds_per_gib.min(per_gib);
        Ok(())
    }

    fn unary(&self, way: &Way, row: &mut Row) -> Result<()> {
        for (place, concurrency) in CONCURRENCY.into_iter().enumerate() {
            thread::sleep(REST);
            let unary: Unary = self.call(way, &["unary"], &[concurrency], Some(UNARY_SECONDS))?;
            match row.unary.get_mut(place) {
                None => row.unary.push((concurrency, unary)),
                Some((_, best)) => best.take_best(unary),
            }
        }
        Ok(())
    }

    fn many_streams(&self, way: &Way, row: &mut Row) -> Result<()> {
        if let Some(process) = &way.process {
            measure::reset_peak(process.pid());
        }
        let bulk: Bulk = self.call(way, &["bulk"], &[BULK_MIB, MANY], None)?;
        row.many_streams_mib_per_second = bulk.mib_per_second;
        let peak = way.process.as_ref().map_or(0, |process| process.used().peak_rss_bytes);
        row.many_streams_peak_rss_mib = peak >> 20;
        Ok(())
    }
}

impl Unary {
    fn take_best(&mut self, other: Self) {
        self.p50_us = self.p50_us.min(other.p50_us);
        self.p99_us = self.p99_us.min(other.p99_us);
        self.calls_per_second = self.calls_per_second.max(other.calls_per_second);
    }
}

impl Row {
    fn new(who: &'static str) -> Self {
        Self {
            who,
            mib_per_second: 0.0,
            cpu_seconds_per_gib: f64::INFINITY,
            unary: Vec::new(),
            many_streams_mib_per_second: 0.0,
            many_streams_peak_rss_mib: 0,
        }
    }
}

fn keys(folder: &Path) -> Vec<String> {
    ["cert", "key", "ca"]
        .into_iter()
        .flat_map(|name| {
            [format!("--{name}"), folder.join(format!("{name}.pem")).to_string_lossy().into()]
        })
        .collect()
}

/// Fills a proxy's settings in: from `xtask/assets`, with the addresses and keys of this run.
fn write_config(name: &str, to: &Path, keys: &Path, listen: &str, server: &str) -> Result<()> {
    let read = |path: PathBuf| {
        fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))
    };
    let pem = keys.join("both.pem");
    fs::write(&pem, read(keys.join("cert.pem"))? + &read(keys.join("key.pem"))?)?;
    let text = |path: PathBuf| path.to_string_lossy().into_owned();
    let folder = to.parent().context("a file has a folder")?.to_owned();
    let values = [
        ("@LISTEN@", listen.to_owned()),
        ("@SERVER@", server.to_owned()),
        ("@CERT@", text(keys.join("cert.pem"))),
        ("@KEY@", text(keys.join("key.pem"))),
        ("@CA@", text(keys.join("ca.pem"))),
        ("@PEM@", text(pem)),
        ("@FOLDER@", text(folder)),
    ];
    let template = read(workspace().join("xtask/assets").join(name))?;
    let filled = values.iter().fold(template, |text, (key, value)| text.replace(key, value));
    Ok(fs::write(to, filled)?)
}

fn print(rows: &[Row], rounds: u32) {
    let floor =
        rows.iter().find(|row| row.who == "copier").map_or(f64::NAN, |r| r.cpu_seconds_per_gib);
    let direct: Vec<Unary> = rows
        .iter()
        .find(|row| row.who == "direct")
        .map_or(vec![], |row| row.unary.iter().map(|(_, unary)| *unary).collect());
    println!(
        "\nTLS on both sides; the best of {rounds} turns; CPU of the proxy alone; p50 and p99 added, in µs"
    );
    println!(
        "{:<8} {:>7} {:>10} {:>8} {:>15} {:>15} {:>15}  {MANY} streams",
        "way", "MiB/s", "CPU s/GiB", "x floor", "1 call", "16 calls", "64 calls"
    );
    for row in rows {
        let added: Vec<String> = row
            .unary
            .iter()
            .zip(&direct)
            .map(|((_, unary), direct)| {
                let over = |a: u64, b: u64| a as i64 - b as i64;
                let (p50, p99) =
                    (over(unary.p50_us, direct.p50_us), over(unary.p99_us, direct.p99_us));
                format!("{p50:+} {p99:+}")
            })
            .collect();
        println!(
            "{:<8} {:>7.0} {:>10.2} {:>8.2} {:>15} {:>15} {:>15}  {:.0} MiB/s, {} MiB",
            row.who,
            row.mib_per_second,
            row.cpu_seconds_per_gib,
            row.cpu_seconds_per_gib / floor,
            added.first().map_or("", String::as_str),
            added.get(1).map_or("", String::as_str),
            added.get(2).map_or("", String::as_str),
            row.many_streams_mib_per_second,
            row.many_streams_peak_rss_mib,
        );
    }
}
