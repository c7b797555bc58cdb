//! `--seeding`: a new server is seeded from another one, and the backup archived into a folder and into an S3 server (`s3s-fs` over
//! plain HTTP), beside `rsync` of the same files over TLS 1.3.
//!
//! Both go over loopback, and all files are in this machine's memory as far as they fit. Seeding compares each block with its hash on
//! both sides and makes one base of the chain; rsync copies the chain's files, here without any comparison of what is missing.

use std::{
    fs,
    io::{BufRead, BufReader},
    os::unix::fs::PermissionsExt,
    path::Path,
    process::{Child, Command, Output, Stdio},
    time::Instant,
};

use anyhow::{Context, Result, ensure};
use serde::Serialize;
use serde_json::{Value, json};

use crate::{
    disk,
    packages::{self, Tool},
    site::{Plan, Programs, Site, free_ports},
};

const MIB: u64 = 1 << 20;
const SOURCE: &str = "server-a";
const ARCHIVE: &str = "bench";
const OBJECTS: &str = "objects";
/// Each gets the disk in another way.
const TARGETS: [&str; 3] = ["target-a", "target-b", "target-c"];

#[derive(Serialize)]
struct Row {
    what: String,
    seconds: f64,
    /// Of data that was missing.
    missing_mib: u64,
    mib_per_second: f64,
    /// Of rsync's time for the same.
    ratio: Option<f64>,
}

pub(super) fn run(programs: &Programs, folder: &Path, bytes: u64, json: &Path) -> Result<()> {
    packages::require(&[
        Tool { program: "rsync-ssl", package: "rsync" },
        Tool { program: "stunnel4", package: "stunnel4" },
        Tool { program: "openssl", package: "openssl" },
    ])?;
    let (work, image) = super::noise_disk(folder, bytes)?;
    let servers = [SOURCE].iter().chain(&TARGETS).map(|name| (*name).to_owned()).collect();
    let plan = Plan { servers, janus: true, folder: Some(work.path().join("site")) };
    let mut site = Site::prepare(programs.clone(), &plan)?;
    let archive = work.path().join("archive");
    fs::create_dir_all(&archive)?;
    let url = format!("file://{}", archive.display());
    site.server(SOURCE)?.settings.set(&format!("archive.{ARCHIVE}.url"), url);
    let s3 = S3::start()?;
    s3.set_up(&mut site, work.path())?;
    site.start_all()?;
    let client = site.client("bench", &[format!("disk={}", image.display())])?;
    site.await_ready(&client)?;
    let backup = || client.run(&["backup", "--json", "--server", SOURCE]);
    ensure!(backup()?.code == Some(0), "the backup failed");

    let rsync = Rsync::start(&mut site, work.path())?;
    let url = site.server(SOURCE)?.url();
    let copied = rsync.copy()?;
    let through_janus = seed(&site, TARGETS[0], &["--from", SOURCE, "--all"])?;
    let direct = seed(&site, TARGETS[1], &["--from", &url, "--all"])?;
    let hashes = seed(&site, TARGETS[2], &["--from", SOURCE, "--all", "--hashes-only"])?;
    let archived = archive_all(&site, ARCHIVE)?;
    let sent = archive_all(&site, OBJECTS)?;
    ensure!(through_janus.written == bytes && direct.written == bytes, "not all was seeded");
    ensure!(hashes.written == 0, "more than hashes were seeded");
    let full = |what: &str, seconds: f64| row(what, seconds, bytes, Some(copied / seconds));
    let mut rows = vec![
        full("rsync over TLS, whole", copied),
        full("seed through janus, whole", through_janus.seconds),
        full("seed straight, whole", direct.seconds),
        full("seed --hashes-only, until a delta can come", hashes.seconds),
        full("archive into a folder, whole", archived),
        full("archive into an S3 server, whole", sent),
    ];

    let changed = bytes / 100 / MIB * MIB;
    scatter(&image, bytes, changed)?;
    ensure!(backup()?.code == Some(0), "the backup failed");
    let copied = rsync.copy()?;
    let archived = archive_all(&site, ARCHIVE)?;
    let sent = archive_all(&site, OBJECTS)?;
    let caught_up = seed(&site, TARGETS[0], &["--from", SOURCE, "--all"])?;
    ensure!(
        caught_up.written * 10 <= changed * 11,
        "{} bytes travelled for {changed} that were missing",
        caught_up.written
    );
    let catch_up = |what: &str, seconds: f64| row(what, seconds, changed, Some(copied / seconds));
    rows.push(catch_up("rsync over TLS, 1 % changed", copied));
    rows.push(catch_up("seed through janus, 1 % changed", caught_up.seconds));
    rows.push(catch_up("archive into a folder, 1 % changed", archived));
    rows.push(catch_up("archive into an S3 server, 1 % changed", sent));

    println!("\n{} MiB of noise at one server, seeded to others over TLS", bytes / MIB);
    println!("{:<44} {:>8} {:>9} {:>8} {:>6}", "what", "s", "missing", "MiB/s", "ratio");
    for row in &rows {
        println!(
            "{:<44} {:>8.2} {:>9} {:>8.0} {:>6.2}",
            row.what,
            row.seconds,
            row.missing_mib,
            row.mib_per_second,
            row.ratio.unwrap_or_default()
        );
    }
    let report = json!({ "disk_bytes": bytes, "rows": rows });
    fs::write(json, serde_json::to_vec_pretty(&report)?)
        .with_context(|| format!("write {}", json.display()))?;
    println!("\nfigures: {}", json.display());
    Ok(())
}

fn row(what: &str, seconds: f64, missing: u64, ratio: Option<f64>) -> Row {
    let mib_per_second = (missing / MIB) as f64 / seconds;
    Row { what: what.to_owned(), seconds, missing_mib: missing / MIB, mib_per_second, ratio }
}

/// Other data in so many bytes, in pieces of 64 KiB all over the disk.
fn scatter(image: &Path, bytes: u64, changed: u64) -> Result<()> {
    const PIECE: u64 = 64 << 10;
    let count = changed / PIECE;
    for piece in 0..count {
        let at = (bytes / count * piece) / PIECE * PIECE;
        disk::write_noise(image, at..at + PIECE, piece + 2)?;
    }
    Ok(())
}

struct Seeded {
    seconds: f64,
    written: u64,
}

fn seed(site: &Site, target: &str, more: &[&str]) -> Result<Seeded> {
    let arguments = [&["seed", "--json"][..], more].concat();
    let began = Instant::now();
    let output: Output = site.admin(target, &arguments)?;
    let seconds = began.elapsed().as_secs_f64();
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let answer: Value = serde_json::from_slice(&output.stdout)?;
    let written = answer["written_bytes"].as_u64().context("no written_bytes")?;
    Ok(Seeded { seconds, written })
}

/// Archives the newest backup; the seconds that took.
fn archive_all(site: &Site, archive: &str) -> Result<f64> {
    let began = Instant::now();
    let output = site.admin(SOURCE, &["archive", archive])?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Ok(began.elapsed().as_secs_f64())
}

/// `client/examples/s3.rs`: its objects are in the folder for temporary files.
struct S3 {
    server: Child,
    /// Its URL, the bucket, and what signs.
    said: String,
}

impl S3 {
    fn start() -> Result<Self> {
        let mut command = super::example("s3");
        let mut server = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let mut said = String::new();
        let out = server.stdout.take().context("no output")?;
        BufReader::new(out).read_line(&mut said)?;
        Ok(Self { server, said })
    }

    /// The source archives into it.
    fn set_up(&self, site: &mut Site, work: &Path) -> Result<()> {
        let words: Vec<&str> = self.said.split_whitespace().collect();
        let [endpoint, bucket, id, secret] = words.as_slice() else {
            anyhow::bail!("the S3 server said {:?}", self.said);
        };
        let credentials = work.join("s3.env");
        fs::write(
            &credentials,
            format!("AWS_ACCESS_KEY_ID={id}\nAWS_SECRET_ACCESS_KEY={secret}\n"),
        )?;
        fs::set_permissions(&credentials, fs::Permissions::from_mode(0o600))?;
        let settings = &mut site.server(SOURCE)?.settings;
        let mut set =
            |key: &str, value: &str| settings.set(&format!("archive.{OBJECTS}.{key}"), value);
        set("url", &format!("s3://{bucket}/bench"));
        set("endpoint", endpoint);
        set("region", "us-east-1");
        set("credentials", &credentials.display().to_string());
        Ok(())
    }
}

impl Drop for S3 {
    fn drop(&mut self) {
        // It ends with its input.
        drop(self.server.stdin.take());
        let _ = self.server.wait();
    }
}

/// `rsync` as a daemon behind stunnel, which serves the source's images.
struct Rsync {
    stunnel: Child,
    port: u16,
    to: std::path::PathBuf,
    from: String,
}

impl Rsync {
    fn start(site: &mut Site, work: &Path) -> Result<Self> {
        let settings = &site.server(SOURCE)?.settings;
        let path = |key: &str| {
            let value = settings.get(key).and_then(|value| value.as_str().map(str::to_owned));
            value.with_context(|| format!("the server has no {key}"))
        };
        let (cert, key) = (path("cert")?, path("key")?);
        let images = site.server(SOURCE)?.images().display().to_string();
        let port = free_ports(1)?.first().copied().context("no port")?;
        let daemon = work.join("rsyncd.conf");
        fs::write(
            &daemon,
            format!("use chroot = no\nuid = 0\n[images]\npath = {images}\nread only = yes\n"),
        )?;
        let config = work.join("stunnel.conf");
        fs::write(
            &config,
            format!(
                "foreground = yes\npid =\nsyslog = no\n[rsync]\naccept = 127.0.0.1:{port}\ncert = {cert}\nkey = {key}\nsslVersionMin = TLSv1.3\nexec = /usr/bin/rsync\nexecArgs = rsync --server --daemon --config={} .\n",
                daemon.display()
            ),
        )?;
        let mut stunnel = Command::new("stunnel4");
        stunnel.arg(&config).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let rsync = Self {
            stunnel: stunnel.spawn()?,
            port,
            to: work.join("copied"),
            from: "alice/bench".to_owned(),
        };
        let until = Instant::now() + std::time::Duration::from_secs(10);
        while std::net::TcpStream::connect(("127.0.0.1", port)).is_err() {
            ensure!(Instant::now() < until, "stunnel doesn't listen");
            std::thread::sleep(std::time::Duration::from_millis(50));
        }
        Ok(rsync)
    }

    /// Copies what is missing, synced; the seconds that took.
    fn copy(&self) -> Result<f64> {
        fs::create_dir_all(&self.to)?;
        let began = Instant::now();
        let mut command = Command::new("rsync-ssl");
        command.env("RSYNC_SSL_TYPE", "openssl").env("RSYNC_SSL_CA_CERT", "");
        command.args(["--archive", "--sparse", "--fsync", "--whole-file"]);
        command.arg(format!("rsync://127.0.0.1:{}/images/{}/", self.port, self.from)).arg(&self.to);
        packages::output(&mut command)?;
        Ok(began.elapsed().as_secs_f64())
    }
}

impl Drop for Rsync {
    fn drop(&mut self) {
        let _ = self.stunnel.kill();
        let _ = self.stunnel.wait();
    }
}
