//! NTFS images that change as Windows would change them: libntfs in a process of its own, which also writes the change
//! journal and the log that libntfs knows nothing of.

use std::{
    fs::File,
    io::{BufRead, BufReader, Write},
    path::Path,
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
};

use anyhow::{Context, Result, ensure};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::{packages, site::workspace};

/// `ntfs_volume.py`, which ends with this.
pub struct Library {
    child: Child,
    requests: ChildStdin,
    answers: BufReader<ChildStdout>,
}

/// What it says after changes.
#[derive(Debug, Deserialize)]
pub struct Changed {
    /// One for each operation.
    pub answers: Vec<Value>,
    /// `$Bitmap`, in hex: a bit for each cluster.
    pub bitmap: String,
}

/// Formats an image of `bytes` bytes.
///
/// # Errors
/// When mkntfs fails.
pub fn format(image: &Path, bytes: u64, cluster_bytes: u64) -> Result<()> {
    File::create(image)?.set_len(bytes)?;
    let mut mkntfs = packages::command("mkntfs");
    mkntfs.args(["-Q", "-F", "-q", "-c", &cluster_bytes.to_string()]).arg(image);
    packages::output(&mut mkntfs).map(drop)
}

impl Library {
    /// # Errors
    /// When Python is missing.
    pub fn start() -> Result<Self> {
        let mut python = Command::new("python3");
        python.arg(workspace().join("xtask/assets/ntfs_volume.py"));
        let mut child = python.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let requests = child.stdin.take().context("no pipe to Python")?;
        let answers = BufReader::new(child.stdout.take().context("no pipe from Python")?);
        Ok(Self { child, requests, answers })
    }

    /// Mounts, changes and unmounts a volume of `clusters` clusters. `clean`: the log, then at `lsn`, is left closed.
    ///
    /// # Errors
    /// When an operation fails.
    pub fn change(
        &mut self,
        image: &Path,
        clusters: u64,
        operations: &[Value],
        (lsn, clean): (u64, bool),
    ) -> Result<Changed> {
        let request = json!({
            "image": image, "operations": operations, "lsn": lsn, "clean": clean,
            "bitmap_bytes": clusters.div_ceil(64) * 8,
        });
        writeln!(self.requests, "{request}")?;
        let mut line = String::new();
        self.answers.read_line(&mut line)?;
        let answer: Value = serde_json::from_str(&line)?;
        ensure!(answer["error"].is_null(), "{answer}: {request}");
        Ok(serde_json::from_value(answer)?)
    }
}

impl Drop for Library {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
