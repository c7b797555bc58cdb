//! What speaks against a backup just now: no mains power, a metered link.
//!
//! Asked before each attempt, not only when a timer elapses: a laptop that is plugged in an hour later is backed up then.
//! What can't be known never keeps a backup from being made.

use std::{fmt, fs, path::Path, time::Duration};

use tokio::{process::Command, time::timeout};

use crate::schedule::ScheduleSettings;

/// How long the bus is waited for.
const BUS_PATIENCE: Duration = Duration::from_secs(5);
/// Where the kernel tells of power supplies.
pub const POWER_SUPPLIES: &str = "/sys/class/power_supply";

/// A reason to wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hindrance {
    /// The machine runs on battery.
    OnBattery,
    /// The link costs by what goes over it.
    Metered,
}

impl fmt::Display for Hindrance {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::OnBattery => "the machine runs on battery (schedule.on_battery)",
            Self::Metered => "the link is metered (schedule.on_metered)",
        })
    }
}

/// Looks at this machine.
pub async fn hindrance(settings: &ScheduleSettings) -> Option<Hindrance> {
    let supplies = || is_on_battery(Path::new(POWER_SUPPLIES));
    if !settings.on_battery && tokio::task::spawn_blocking(supplies).await.unwrap_or(false) {
        return Some(Hindrance::OnBattery);
    }
    if !settings.on_metered && is_metered().await {
        return Some(Hindrance::Metered);
    }
    None
}

/// As systemd's ConditionACPower decides: on mains when a supply is online; else on battery when one discharges.
fn is_on_battery(supplies: &Path) -> bool {
    let Ok(entries) = fs::read_dir(supplies) else { return false };
    let mut discharges = false;
    for supply in entries.flatten().map(|entry| entry.path()) {
        let says = |name: &str| fs::read_to_string(supply.join(name)).unwrap_or_default();
        // That of a mouse says nothing about the machine.
        if says("scope").trim() == "Device" {
            continue;
        }
        match says("type").trim() {
            "Mains" | "USB" if says("online").trim() == "1" => return false,
            "Battery" => discharges |= says("status").trim() == "Discharging",
            _ => {}
        }
    }
    discharges
}

/// What NetworkManager calls metered, or guesses to be. Without it no link is.
async fn is_metered() -> bool {
    const NAME: &str = "org.freedesktop.NetworkManager";
    let mut busctl = Command::new("busctl");
    busctl.args([
        "--system",
        "get-property",
        NAME,
        "/org/freedesktop/NetworkManager",
        NAME,
        "Metered",
    ]);
    let asked = timeout(BUS_PATIENCE, busctl.kill_on_drop(true).output()).await;
    asked.is_ok_and(|output| output.is_ok_and(|output| says_metered(&output.stdout)))
}

/// NMMetered: 1 is yes, 3 a guess of yes; 0 unknown, 2 no, 4 a guess of no.
fn says_metered(answer: &[u8]) -> bool {
    matches!(answer.trim_ascii(), b"u 1" | b"u 3")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn supplies(all: &[&[(&str, &str)]]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        for (number, files) in all.iter().enumerate() {
            let supply = folder.path().join(number.to_string());
            fs::create_dir(&supply).unwrap();
            for (name, text) in *files {
                fs::write(supply.join(name), format!("{text}\n")).unwrap();
            }
        }
        folder
    }

    #[test]
    fn only_a_discharging_battery_without_mains_counts() {
        let battery = [("type", "Battery"), ("status", "Discharging")];
        let mouse = [("type", "Battery"), ("status", "Discharging"), ("scope", "Device")];
        let (plugged, unplugged) =
            ([("type", "Mains"), ("online", "1")], [("type", "Mains"), ("online", "0")]);
        let full = [("type", "Battery"), ("status", "Full")];
        let is = |all: &[&[(&str, &str)]]| is_on_battery(supplies(all).path());
        assert!(is(&[&battery]) && is(&[&unplugged, &battery]));
        assert!(!is(&[]) && !is(&[&plugged, &battery]) && !is(&[&mouse]) && !is(&[&full]));
        assert!(!is_on_battery(Path::new("/nonexistent")));
    }

    #[test]
    fn a_guess_of_metered_counts_and_no_answer_does_not() {
        assert!(says_metered(b"u 1\n") && says_metered(b"u 3\n"));
        assert!(
            ["u 0\n", "u 2\n", "u 4\n", "", "u 13"].iter().all(|no| !says_metered(no.as_bytes()))
        );
    }
}
