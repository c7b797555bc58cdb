//! The systemd units of scheduled backups, as text.
//!
//! The timer says when; the service runs `janus-client daemon --once`, which decides by the last success whether a backup is
//! due, waits for mains power and an unmetered link, and repeats what failed. systemd's own conditions would skip such a
//! backup until the next day. The service has no view of the file system of its own (`ProtectSystem=` and the like):
//! snapshots, freezing and hooks need the machine's mounts as they are, and disks are devices.

use std::{fmt::Write, path::Path};

use crate::schedule::{ScheduleError, ScheduleSettings};

/// Name of the service's unit.
pub const SERVICE: &str = "janus-client.service";
/// Name of the timer's unit.
pub const TIMER: &str = "janus-client.timer";

/// A unit: its name and text.
pub type Unit = (&'static str, String);

/// Service and timer for `program` with the settings file `config`, whose relative paths count from `folder`.
///
/// # Errors
/// When the schedule can't be used.
pub fn units(
    program: &Path,
    config: &Path,
    folder: &Path,
    schedule: &ScheduleSettings,
) -> Result<[Unit; 2], ScheduleError> {
    Ok([(SERVICE, service(program, config, folder)), (TIMER, timer(config, schedule)?)])
}

fn service(program: &Path, config: &Path, folder: &Path) -> String {
    let (program, quoted) = (quote(program), quote(config));
    let folder = specifiers(folder);
    let head = head(config);
    format!(
        "{head}[Unit]
Description=Backup of this machine's disks (Janus Backup)
Documentation=man:janus-client(1)
Wants=network-online.target
After=network-online.target

[Service]
Type=exec
# Backs up if a backup is due by the last success; waits for mains power and an unmetered link, and repeats what failed.
WorkingDirectory={folder}
ExecStart={program} daemon --once --config {quoted}
# Ends the backup so that the next one goes on from there.
KillMode=mixed
TimeoutStopSec=90
Nice=5
IOSchedulingPriority=7
UMask=0077
# Keys stay in memory.
LimitCORE=0
KeyringMode=private
# Raw disks, snapshots, freezing and hooks need root and the machine's own mounts: no ProtectSystem, PrivateTmp, PrivateDevices.
CapabilityBoundingSet=~CAP_SYS_BOOT CAP_SYS_TIME CAP_SYS_PACCT CAP_SYSLOG CAP_WAKE_ALARM CAP_MAC_ADMIN CAP_MAC_OVERRIDE
LockPersonality=yes
ProtectHostname=yes
RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6 AF_NETLINK
RestrictRealtime=yes
RestrictSUIDSGID=yes
SystemCallArchitectures=native
SystemCallFilter=~@clock @cpu-emulation @module @obsolete @raw-io @reboot @swap
SystemCallErrorNumber=EPERM
"
    )
}

fn timer(config: &Path, schedule: &ScheduleSettings) -> Result<String, ScheduleError> {
    schedule.check()?;
    let days = schedule.weekdays()?;
    let days = match days.len() {
        7 => String::new(),
        _ => days.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(",") + " ",
    };
    let mut text = head(config);
    text.push_str(
        "[Unit]\nDescription=Schedule of this machine's backups (Janus Backup)\nDocumentation=man:janus-client(1)\n\n[Timer]\n",
    );
    for time in schedule.times_of_day()? {
        let _ = writeln!(text, "OnCalendar={days}*-*-* {}", time.strftime("%H:%M:%S"));
    }
    let _ = writeln!(text, "RandomizedDelaySec={}min", schedule.random_delay_minutes);
    let _ = writeln!(text, "Persistent={}", schedule.catch_up);
    if schedule.catch_up {
        text.push_str("# A backup that was interrupted by a shutdown goes on after the start.\nOnBootSec=3min\n");
    }
    let _ = writeln!(text, "WakeSystem={}", schedule.wake);
    text.push_str("\n[Install]\nWantedBy=timers.target\n");
    Ok(text)
}

fn head(config: &Path) -> String {
    let config = config.display().to_string().replace(char::is_control, "?");
    format!(
        "# Made by `janus-client service install` from {config}: after a change of [schedule], run it again.\n\n"
    )
}

/// A folder as systemd reads it: all of the line, but for specifiers.
fn specifiers(folder: &Path) -> String {
    folder.display().to_string().replace(char::is_control, "?").replace('%', "%%")
}

/// A word of a command line as systemd reads it.
fn quote(path: &Path) -> String {
    let mut quoted = "\"".to_owned();
    for character in path.display().to_string().chars() {
        match character {
            '"' | '\\' => quoted.extend(['\\', character]),
            '%' | '$' => quoted.extend([character, character]),
            c if c.is_control() => {
                let _ = write!(quoted, "\\u{:04x}", u32::from(c));
            }
            c => quoted.push(c),
        }
    }
    quoted + "\""
}

#[cfg(test)]
mod tests {
    use super::*;

    fn timer_of(change: impl FnOnce(&mut ScheduleSettings)) -> String {
        let mut schedule = ScheduleSettings::default();
        change(&mut schedule);
        let [_, (_, timer)] = units(
            "/usr/bin/janus-client".as_ref(),
            "/etc/c.toml".as_ref(),
            "/".as_ref(),
            &schedule,
        )
        .unwrap();
        timer
    }

    #[test]
    fn the_timer_says_what_the_settings_say() {
        let timer = timer_of(|_| {});
        for line in [
            "OnCalendar=*-*-* 22:00:00",
            "RandomizedDelaySec=30min",
            "Persistent=true",
            "OnBootSec=3min",
            "WakeSystem=false",
        ] {
            assert!(timer.lines().any(|one| one == line), "{line}: {timer}");
        }
        let timer = timer_of(|schedule| {
            schedule.days = vec!["sat".into(), "Mon".into()];
            schedule.times = vec!["22:00".into(), "06:30".into()];
            (schedule.catch_up, schedule.wake) = (false, true);
        });
        for line in [
            "OnCalendar=Mon,Sat *-*-* 06:30:00",
            "OnCalendar=Mon,Sat *-*-* 22:00:00",
            "Persistent=false",
            "WakeSystem=true",
        ] {
            assert!(timer.lines().any(|one| one == line), "{line}: {timer}");
        }
        assert!(!timer.contains("OnBootSec"));
    }

    #[test]
    fn no_path_becomes_another_word_or_line() {
        assert_eq!(quote("/a b/50%/$x\"\\\n".as_ref()), "\"/a b/50%%/$$x\\\"\\\\\\u000a\"");
        let (_, text) = &units(
            "/p".as_ref(),
            "/x\nUser=eve".as_ref(),
            "/50%\nUser=eve".as_ref(),
            &Default::default(),
        )
        .unwrap()[0];
        assert!(text.contains("\nWorkingDirectory=/50%%?User=eve\n"), "{text}");
        assert!(!text.lines().any(|line| line.starts_with("User=")), "{text}");
    }
}
