//! `cargo xtask bench --networks`: what URLs cost that lead nowhere, and what packing brings on slow lines. Real lines between
//! network namespaces, so it needs root.

use std::{
    fs,
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use serde::Serialize;
use serde_json::{Value, json};

use crate::site::{Client, Cut, MACHINES, Part, Programs, SITES, Sites, url};

const MIB: u64 = 1 << 20;
/// Of each list the fastest of so many counts: other work on the machine is no property of a URL.
const TRIES: usize = 5;
/// Lines, in Mbit/s. Without a limit it is what two namespaces on one machine can.
const LINES: [Option<u32>; 5] = [Some(10), Some(20), Some(100), Some(500), None];
const ENCODINGS: [&str; 4] = ["auto", "none", "lz4", "zstd"];

#[derive(Debug, Serialize)]
struct Url {
    first_url: &'static str,
    seconds_to_answer: f64,
}

#[derive(Debug, Serialize)]
struct Packing {
    mbit_per_second: Option<u32>,
    encoding: &'static str,
    mostly: String,
    seconds: f64,
    sent_mib: f64,
    wire_mib: f64,
}

/// Measures, prints, and writes the figures.
///
/// # Errors
/// When we aren't root or a program fails.
pub(super) fn run(programs: &Programs, json: &Path) -> Result<()> {
    let mut sites = Sites::start(programs.clone())?;
    let client = sites.client("laptop", &[])?;
    sites.await_equal(&client, Duration::from_secs(30))?;
    let urls = urls(&mut sites, &client)?;
    println!("{:<32} {:>10}", "first URL of two", "s to answer");
    for row in &urls {
        println!("{:<32} {:>10.3}", row.first_url, row.seconds_to_answer);
    }
    println!(
        "\n{:>9} {:<9} {:<7} {:>8} {:>9} {:>9}",
        "Mbit/s", "encoding", "mostly", "s", "MiB", "as MiB"
    );
    let mut packing = Vec::new();
    for (number, line) in LINES.into_iter().enumerate() {
        for encoding in ENCODINGS {
            let row = pack(&sites, programs, number, line, encoding)?;
            let line = line.map_or_else(|| "no limit".into(), |line| line.to_string());
            println!(
                "{line:>9} {:<9} {:<7} {:>8.1} {:>9.1} {:>9.1}",
                row.encoding, row.mostly, row.seconds, row.sent_mib, row.wire_mib
            );
            packing.push(row);
        }
    }
    let report = json!({ "urls": urls, "packing": packing });
    fs::write(json, serde_json::to_vec_pretty(&report)?)
        .with_context(|| format!("write {}", json.display()))?;
    println!("\nfigures: {}", json.display());
    Ok(())
}

/// Time of a list, by the state of the first of two URLs.
fn urls(sites: &mut Sites, client: &Client) -> Result<Vec<Url>> {
    let both = SITES.map(|site| url(site, 7420));
    let mut rows = Vec::new();
    let mut row = |first_url, urls: &[String]| -> Result<()> {
        let mut client = client.clone();
        client.settings.set("urls", json!(urls));
        let mut best = f64::MAX;
        for _ in 0..TRIES {
            let began = Instant::now();
            client.list()?;
            best = best.min(began.elapsed().as_secs_f64());
        }
        rows.push(Url { first_url, seconds_to_answer: best });
        Ok(())
    };
    row("answers", &both)?;
    row("(the second one alone)", &both[1..])?;
    sites.network().cut_between(MACHINES, SITES[0], Cut::Drop)?;
    row("black-holed", &both)?;
    sites.network().heal()?;
    sites.network().cut_between(MACHINES, SITES[0], Cut::Reject)?;
    row("unreachable", &both)?;
    sites.network().heal()?;
    sites.kill(SITES[0], Part::Janus)?;
    row("refused", &both)?;
    sites.start_part(SITES[0], Part::Janus)?;
    Ok(rows)
}

/// A first backup of what programs are made of, over a line.
fn pack(
    sites: &Sites,
    programs: &Programs,
    number: usize,
    line: Option<u32>,
    encoding: &'static str,
) -> Result<Packing> {
    match line {
        Some(mbit) => sites.network().slow(MACHINES, mbit * 1000)?,
        None => sites.network().fast(MACHINES)?,
    }
    // About ten seconds of the line, so that buffers don't count for much.
    let mib = line.map_or(256, |mbit| u64::from(mbit) * 10 / 8).clamp(24, 256);
    let disk = sites.folder().join("programs.raw");
    let mut content = Vec::new();
    while (content.len() as u64) < mib * MIB {
        for name in ["janus-client", "janus-server", "janus"] {
            content.extend(fs::read(programs.folder().join(name))?);
        }
    }
    content.truncate((mib * MIB) as usize);
    fs::write(&disk, content)?;
    let machine = format!("machine-{number}-{encoding}");
    let mut client = sites.client(&machine, &[format!("disk={}", disk.display())])?;
    client.settings.set("encoding", encoding);
    let answer: Value = client.answer(&["backup"])?;
    let bytes = |key: &str| answer["disks"][0][key].as_u64().context("no figure");
    let (sent, wire) = (bytes("sent_bytes")?, bytes("wire_bytes")?);
    ensure!(sent >= wire, "{answer}");
    Ok(Packing {
        mbit_per_second: line,
        encoding,
        mostly: answer["packing"]["mostly"].as_str().context("no packing")?.to_owned(),
        seconds: answer["seconds"].as_f64().context("no time")?,
        sent_mib: sent as f64 / MIB as f64,
        wire_mib: wire as f64 / MIB as f64,
    })
}
