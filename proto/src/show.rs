//! What programs tell people alike: amounts, dates, the status of a janus.

use std::{collections::BTreeMap, fmt::Write};

use serde_json::{Value, json};

use crate::pb::{
    DamagedMachine, Fetching, GetRouterStatusResponse, MachineStatus, MachineUse, Proof,
    ServerStatus,
};

/// Bytes as people read them.
pub fn amount(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let unit = (0..UNITS.len()).rev().find(|unit| bytes >> (10 * unit) > 0).unwrap_or(0);
    match unit {
        0 => format!("{bytes} B"),
        _ => format!("{:.1} {}", bytes as f64 / (1u64 << (10 * unit)) as f64, UNITS[unit]),
    }
}

/// Unix milliseconds as a date in UTC.
pub fn date(ms: i64) -> String {
    let format = time::macros::format_description!("[year]-[month]-[day] [hour]:[minute]:[second]");
    let time = time::OffsetDateTime::from_unix_timestamp(ms / 1000).ok();
    time.and_then(|time| time.format(&format).ok()).unwrap_or_else(|| ms.to_string())
}

/// What is said of a server after its name: where that is its URL, since it was never reached, it isn't said twice.
pub fn of_named<'a>(name: &str, reason: &'a str) -> &'a str {
    reason.strip_prefix(name).and_then(|rest| rest.strip_prefix(": ")).unwrap_or(reason)
}

/// A janus' status as text, a line for each thing it knows.
pub fn router_status(status: &GetRouterStatusResponse) -> String {
    let mut text = String::new();
    if !status.janus_id.is_empty() {
        let certificate = match status.certificate_expires_ms {
            0 => String::new(),
            at => format!("  certificate until {}", date(at)),
        };
        let _ = writeln!(text, "janus {}{certificate}", status.janus_id);
    }
    for server in &status.servers {
        server_line(&mut text, server);
    }
    for machine in &status.machines {
        let name = &machine.machine;
        let _ = match (machine.last_backup_ms, machine.first_use_ms) {
            (0, since @ 1..) => {
                writeln!(text, "{name}  NO backup, though it starts them since {}", date(since))
            }
            (last, _) => {
                writeln!(text, "{name}  last backup {} on {}", date(last), machine.server_id)
            }
        };
        for at in &machine.uses {
            proof_line(&mut text, machine, at);
            if !at.alarm.is_empty() {
                let _ = writeln!(text, "{}  {}", at.server_id, at.alarm);
            }
        }
    }
    for server in &status.servers {
        for warning in &server.warnings {
            let _ = writeln!(text, "warning of {}: {warning}", server.server_id);
        }
    }
    for warning in &status.warnings {
        let _ = writeln!(text, "warning: {warning}");
    }
    text
}

/// What was proven of a machine on one server, if anything was tried.
fn proof_line(text: &mut String, machine: &MachineStatus, at: &MachineUse) {
    let Some(proof) = &at.proof else { return };
    let proven = match proof.proven_ms {
        0 => "never proven".to_owned(),
        at => format!("last proven {}", date(at)),
    };
    let failed = match proof.failure.as_str() {
        "" => String::new(),
        failure => format!("; FAILED on {}: {failure}", date(proof.tried_ms)),
    };
    let warnings = match proof.warnings {
        0 => String::new(),
        count => format!("; {count} warnings"),
    };
    let (machine, server) = (&machine.machine, &at.server_id);
    let _ = writeln!(text, "{machine}  {proven} on {server}{failed}{warnings}");
}

fn server_line(text: &mut String, server: &ServerStatus) {
    let state = match server.ready {
        true => "ready".to_owned(),
        false => format!("not ready: {}", of_named(&server.url, &server.reason)),
    };
    let since = match server.since_ms {
        1.. => format!(" since {}", date(server.since_ms)),
        _ => String::new(),
    };
    let report = match server.report_age_ms {
        -1 if server.last_report_ms > 0 => {
            format!("no report stream, last report {}", date(server.last_report_ms))
        }
        -1 => "no report stream".to_owned(),
        age => format!("last report {:.0} s ago", age as f64 / 1000.0),
    };
    let space = match server.total_bytes {
        0 => String::new(),
        total => format!("; {} of {} free", amount(server.free_bytes), amount(total)),
    };
    let certificate = match server.certificate_expires_ms {
        0 => String::new(),
        at => format!("; certificate until {}", date(at)),
    };
    let damaged: u64 = server.damaged.iter().map(|machine| machine.snapshots).sum();
    let damaged = match damaged {
        0 => String::new(),
        count => format!("; {count} DAMAGED snapshots"),
    };
    let incomplete = match server.incomplete_snapshots {
        0 => String::new(),
        count => format!("; {count} snapshots incomplete"),
    };
    let proven = match server.proven_ms {
        0 => String::new(),
        at => format!("; last proof {}", date(at)),
    };
    let fetched = server.fetching.iter().map(fetched).collect::<String>();
    let _ = writeln!(
        text,
        "{}  {}  {state}{since}; {report}; {} starts, {} to it, {} from it{space}{certificate}{proven}{damaged}{incomplete}{fetched}",
        if server.server_id.is_empty() { "?" } else { &server.server_id },
        server.url,
        server.starts,
        amount(server.bytes_sent),
        amount(server.bytes_received),
    );
}

fn fetched(one: &Fetching) -> String {
    let what = if one.rule.is_empty() { "stubs" } else { &one.rule };
    let done = match one.succeeded_ms {
        0 => "not done yet".to_owned(),
        at => format!("done {}", date(at)),
    };
    let failed = match one.failure.as_str() {
        "" => String::new(),
        failure => format!(", FAILED: {failure}"),
    };
    format!("; fetching {what}: {}, {done}{failed}", amount(one.bytes))
}

/// A janus' status as `--json` prints it.
pub fn router_status_json(status: &GetRouterStatusResponse) -> Value {
    json!({
        "ok": true,
        "janus": status.janus_id,
        "servers": status.servers.iter().map(server_json).collect::<Vec<_>>(),
        "machines": status.machines.iter().map(machine_json).collect::<Vec<_>>(),
        "warnings": status.warnings,
        "certificate_expires_ms": known(status.certificate_expires_ms),
    })
}

fn known(ms: i64) -> Option<i64> {
    Some(ms).filter(|ms| *ms > 0)
}

fn server_json(server: &ServerStatus) -> Value {
    json!({
        "server": server.server_id,
        "url": server.url,
        "ready": server.ready,
        "reason": Some(&server.reason).filter(|reason| !reason.is_empty()),
        "since_ms": server.since_ms,
        "report_age_ms": server.report_age_ms,
        "last_report_ms": known(server.last_report_ms),
        "starts": server.starts,
        "bytes_sent": server.bytes_sent,
        "bytes_received": server.bytes_received,
        "free_bytes": Some(server.free_bytes).filter(|_| server.total_bytes > 0),
        "total_bytes": Some(server.total_bytes).filter(|total| *total > 0),
        "certificate_expires_ms": known(server.certificate_expires_ms),
        "incomplete_snapshots": server.incomplete_snapshots,
        "proven_ms": known(server.proven_ms),
        "damaged": server.damaged.iter().map(damaged_json).collect::<Vec<_>>(),
        "fetching": server.fetching.iter().map(|one| json!({
            "rule": Some(&one.rule).filter(|rule| !rule.is_empty()),
            "succeeded_ms": known(one.succeeded_ms),
            "bytes": one.bytes,
            "errors": one.errors.iter().map(|of| (of.reason.clone(), of.count)).collect::<BTreeMap<_, _>>(),
            "failure": Some(&one.failure).filter(|failure| !failure.is_empty()),
        })).collect::<Vec<_>>(),
        "warnings": server.warnings,
        "settings": server.settings.as_ref().map(|told| json!({
            "image_path": told.image_path,
            "prefer_vhdx": told.prefer_vhdx,
            "separate_folders_by_user": told.separate_folders_by_user,
        })),
    })
}

fn damaged_json(machine: &DamagedMachine) -> Value {
    json!({
        "machine": machine.machine,
        "snapshots": machine.snapshots,
        "blocks": machine.blocks,
        "newest": machine.newest,
    })
}

fn machine_json(machine: &MachineStatus) -> Value {
    json!({
        "machine": machine.machine,
        "last_backup_ms": machine.last_backup_ms,
        "server": machine.server_id,
        "first_use_ms": known(machine.first_use_ms),
        "uses": machine.uses.iter().map(|at| json!({
            "server": at.server_id,
            "use_counter": at.use_counter,
            "last_backup_ms": Some(at.last_backup_ms).filter(|ms| *ms > 0),
            "proof": at.proof.as_ref().map(proof_json),
            "alarm": Some(&at.alarm).filter(|alarm| !alarm.is_empty()),
        })).collect::<Vec<_>>(),
    })
}

fn proof_json(proof: &Proof) -> Value {
    json!({
        "proven_ms": known(proof.proven_ms),
        "tried_ms": proof.tried_ms,
        "failure": proof.failure,
        "warnings": proof.warnings,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn amounts_and_dates_are_for_people() {
        assert_eq!(amount(0), "0 B");
        assert_eq!(amount(1536), "1.5 KiB");
        assert_eq!(amount(64 << 40), "64.0 TiB");
        assert_eq!(date(1_767_225_600_000), "2026-01-01 00:00:00");
    }
}
