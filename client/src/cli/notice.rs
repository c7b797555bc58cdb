//! How a backup ended: into the state, the log, and to those who want to know.

use std::io::IsTerminal;

use janus_proto::{
    clock::unix_ms,
    show::{amount, date},
    tls::Identity,
};
use serde_json::{Value, json};

use super::{Failure, Outcome, failure, opening::lock, whose};
use crate::{
    config::Settings,
    notify::{Event, is_news, one_more},
    state::{Failing, MachineState},
};

/// Notes and tells what came of a backup, which stays what it is. Runs of others and interruptions aren't news.
pub async fn tell(
    settings: &Settings,
    identity: Option<&Identity>,
    outcome: &Result<Outcome, Failure>,
) {
    let asked = identity.map(|identity| whose(settings, &identity.principal().role));
    let machine = match asked {
        Some(Ok(Some(machine))) => machine.to_string(),
        _ => std::fs::read_to_string("/proc/sys/kernel/hostname")
            .unwrap_or_default()
            .trim()
            .to_owned(),
    };
    match outcome {
        Ok(made) => tell_success(settings, &machine, &made.json).await,
        Err(failed) if matches!(failed.exit_code, failure::BUSY | failure::INTERRUPTED) => {}
        Err(failed) => tell_failure(settings, &machine, failed).await,
    }
}

async fn tell_success(settings: &Settings, machine: &str, made: &Value) {
    let sum = |figure: &str| -> u64 {
        let disks = made["disks"].as_array().map(Vec::as_slice).unwrap_or_default();
        disks.iter().filter_map(|disk| disk[figure].as_u64()).sum()
    };
    let [read, changed, sent] = ["read_bytes", "sent_bytes", "wire_bytes"].map(sum);
    let word = |key: &str| made[key].as_str().unwrap_or_default();
    let (server, backup_id) = (word("server"), word("backup_id"));
    let seconds = made["seconds"].as_f64().unwrap_or_default();
    tracing::info!(
        server,
        backup_id,
        seconds,
        read_bytes = read,
        changed_bytes = changed,
        sent_bytes = sent,
        "backup made"
    );
    let recovered = state(settings).await.and_then(|state| state.recovered().cloned());
    let notify = &settings.notify;
    let event = match &recovered {
        Some(_) if notify.wants(Event::Recovery) => Event::Recovery,
        _ if notify.wants(Event::Success) => Event::Success,
        _ => return forget(settings, recovered).await,
    };
    let again = match (&recovered, event) {
        (Some(failed), Event::Recovery) => {
            format!(", after {} failed since {} UTC", failed.count, date(failed.since_ms))
        }
        _ => String::new(),
    };
    let text = format!("{machine}: backup made on {server}, {} sent{again}", amount(sent));
    let message = json!({
        "text": text,
        "event": event.name(),
        "machine": machine,
        "at_ms": unix_ms(),
        "server": server,
        "backup_id": backup_id,
        "last_backup_ms": made["taken_ms"],
        "seconds": seconds,
        "read_bytes": read,
        "changed_bytes": changed,
        "sent_bytes": sent,
        "failures": recovered.as_ref().map_or(0, |failed| failed.count),
    });
    // What nobody has taken is told of after the next backup.
    if notify.tell(&message).await || event != Event::Recovery {
        forget(settings, recovered).await;
    }
}

async fn forget(settings: &Settings, recovered: Option<Failing>) {
    let Some(recovered) = recovered else { return };
    let Some(mut state) = state(settings).await else { return };
    if let Err(error) = state.forget_recovered(&recovered) {
        tracing::warn!(%error, "can't note that it was told that backups work again");
    }
}

async fn tell_failure(settings: &Settings, machine: &str, failed: &Failure) {
    let exit_code = failed.exit_code;
    let reason = failed.json()["reason"].clone();
    // A person at a terminal reads it once: as the program's last word.
    if !std::io::stderr().is_terminal() {
        tracing::error!(exit_code, reason = reason.as_str(), "backup failed: {}", failed.message);
    }
    let mut failing = note(settings, |before| one_more(before, &failed.message, unix_ms())).await;
    let notify = &settings.notify;
    if !notify.wants(Event::Failure) || !is_news(&failing, unix_ms()) {
        return;
    }
    let last = crate::state::look(&settings.cache_path).ok();
    let last = last.and_then(|stored| stored.last_success).map(|last| last.taken_ms);
    let last_text = match last {
        Some(ms) => format!("last one of {} UTC", date(ms)),
        None => "there is none yet".into(),
    };
    let message = json!({
        "text": format!("{machine}: backup failed: {}; {last_text}", failed.message),
        "event": Event::Failure.name(),
        "machine": machine,
        "at_ms": unix_ms(),
        "error": failed.message,
        "reason": reason,
        "exit_code": exit_code,
        "failures": failing.count,
        "since_ms": failing.since_ms,
        "last_backup_ms": last,
    });
    if notify.tell(&message).await {
        failing.told_ms = Some(unix_ms());
        note(settings, |_| failing.clone()).await;
    }
}

/// Stores what failed. The lock is held no longer than that: a receiver that hangs keeps no backup away.
async fn note(settings: &Settings, next: impl FnOnce(Option<&Failing>) -> Failing) -> Failing {
    let Some(mut state) = state(settings).await else { return next(None) };
    let failing = next(state.failing());
    if let Err(error) = state.set_failing(failing.clone()) {
        tracing::warn!(%error, "can't note the failure");
    }
    failing
}

/// None while another backup has it, or where there is no folder for it: then each failure is the first.
async fn state(settings: &Settings) -> Option<MachineState> {
    lock(settings).await.ok()
}
