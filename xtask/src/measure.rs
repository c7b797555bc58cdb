//! CPU time and peak memory of processes, from `/proc`.

use std::{
    fs,
    process::{Child, ExitStatus},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use rustix::process::{Pid, WaitId, WaitIdOptions, waitid};

/// Clock ticks of `/proc/<pid>/stat` in a second: 100 on every Linux that Rust supports.
const TICKS_PER_SECOND: f64 = 100.0;

/// What a process has used so far.
#[derive(Debug, Clone, Copy, Default, serde::Serialize)]
pub struct Used {
    /// User and system time of all its threads.
    pub cpu_seconds: f64,
    /// Highest resident memory (`VmHWM`).
    pub peak_rss_bytes: u64,
}

/// What process `pid` has used; zeros when there is no such process.
pub fn used(pid: u32) -> Used {
    Used {
        cpu_seconds: stat(pid).map_or(0.0, |stat| stat.cpu_seconds),
        peak_rss_bytes: peak_rss(pid).unwrap_or(0),
    }
}

/// Forgets the peak of process `pid` so far, so that the next one belongs to what follows. Needs our own process.
pub fn reset_peak(pid: u32) {
    // A kernel without this file leaves the old peak: higher than the truth, never lower.
    let _ = fs::write(format!("/proc/{pid}/clear_refs"), "5");
}

/// Waits for a child and watches it: its status, what it used, and how long that took.
///
/// # Errors
/// When waiting fails, or it goes on for longer than `longest`.
pub fn wait(
    child: &mut Child,
    started: Instant,
    longest: Duration,
) -> Result<(ExitStatus, Used, Duration)> {
    let pid = child.id();
    let mut peak = 0;
    loop {
        ensure!(started.elapsed() < longest, "still running after {longest:?}: {}", threads(pid));
        peak = peak.max(peak_rss(pid).unwrap_or(0));
        // A process that has ended stays readable, with its CPU time, until it is waited for.
        let stat = stat(pid).unwrap_or(Stat { ended: true, cpu_seconds: 0.0, below_seconds: 0.0 });
        if stat.ended {
            let took = started.elapsed();
            let status = child.wait()?;
            return Ok((
                status,
                Used { cpu_seconds: stat.cpu_seconds, peak_rss_bytes: peak },
                took,
            ));
        }
        thread::sleep(Duration::from_millis(5));
    }
}

/// Waits for a child that nobody watches: its status, and the CPU seconds of it and of all processes below it that were waited for.
///
/// # Errors
/// When waiting fails.
pub fn wait_for_all(child: &mut Child) -> Result<(ExitStatus, f64)> {
    let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw).context("no process id")?;
    // It stays readable until it is waited for without this flag.
    waitid(WaitId::Pid(pid), WaitIdOptions::EXITED | WaitIdOptions::NOWAIT)?;
    let cpu_seconds = stat(child.id()).map_or(0.0, |stat| stat.cpu_seconds + stat.below_seconds);
    Ok((child.wait()?, cpu_seconds))
}

/// CPU seconds of this process so far, and of all processes below it that were waited for.
pub fn our_cpu_seconds() -> f64 {
    stat(std::process::id()).map_or(0.0, |stat| stat.cpu_seconds + stat.below_seconds)
}

/// The threads of a process, each with what it waits for in the kernel.
fn threads(pid: u32) -> String {
    let of = |thread: &fs::DirEntry, file| {
        fs::read_to_string(thread.path().join(file)).unwrap_or_default().trim().to_owned()
    };
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let told = tasks.map(|task| format!("{} in {}", of(&task, "comm"), of(&task, "wchan")));
    told.collect::<Vec<_>>().join(", ")
}

struct Stat {
    ended: bool,
    cpu_seconds: f64,
    /// Of processes below it that it has waited for, and those below them.
    below_seconds: f64,
}

fn stat(pid: u32) -> Option<Stat> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The second field is the name in brackets, which may hold anything: fields are counted after it.
    let fields: Vec<_> = text.rsplit_once(')')?.1.split_whitespace().collect();
    let seconds = |at: usize| Some(fields.get(at)?.parse::<f64>().ok()? / TICKS_PER_SECOND);
    Some(Stat {
        ended: *fields.first()? == "Z",
        cpu_seconds: seconds(11)? + seconds(12)?,
        below_seconds: seconds(13)? + seconds(14)?,
    })
}

fn peak_rss(pid: u32) -> Option<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    Some(line.trim().trim_end_matches(" kB").parse::<u64>().ok()? * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    const BUSY: &str = "i=0; while [ $i -lt 200000 ]; do i=$((i+1)); done";

    fn sh(script: &str) -> Child {
        std::process::Command::new("sh").args(["-c", script]).spawn().unwrap()
    }

    #[test]
    fn a_child_is_measured_after_its_end() {
        let started = Instant::now();
        let mut child = sh(BUSY);
        let (status, used, _) = wait(&mut child, started, Duration::MAX).unwrap();
        assert!(status.success());
        assert!(used.cpu_seconds > 0.0 && used.peak_rss_bytes > 100_000, "{used:?}");
    }

    #[test]
    fn what_children_of_a_child_used_counts() {
        let (status, cpu_seconds) = wait_for_all(&mut sh(&format!("({BUSY}); exit 3"))).unwrap();
        assert_eq!(status.code(), Some(3));
        assert!(cpu_seconds > 0.0);
        assert!(our_cpu_seconds() >= cpu_seconds);
    }
}
