//! `janus-client daemon`.

use std::ffi::OsString;

use clap::ArgMatches;
use janus_proto::{clock, program};
use serde_json::json;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::{Failure, Outcome, loader};
use crate::{
    config::Settings,
    daemon::{Daemon, End, Until, host::Machine},
};

/// Backs up by the schedule until told to stop, or with `--once` until nothing is due.
///
/// # Errors
/// When the schedule can't be used; with `--once` also as the last failed backup.
pub async fn daemon(
    matches: &ArgMatches,
    settings: &Settings,
    stop: &CancellationToken,
) -> Result<Outcome, Failure> {
    clock::warn_without_zone("times of the schedule");
    let (sender, reloads) = mpsc::channel(1);
    let again = matches.clone();
    let reload = move || match loader().load(&again, std::env::vars_os()) {
        // One that waits for its turn is as good.
        Ok(settings) => drop(sender.try_send(Box::new(settings))),
        Err(error) => tracing::error!(%error, "the old settings stay in use"),
    };
    let is_once = matches.get_flag("once");
    let daemon = Daemon {
        host: Machine::new(forwarded(std::env::args_os()), settings.cache_path.clone()),
        settings: settings.schedule.clone(),
        seed: std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default(),
        until: if is_once { Until::Served } else { Until::Stopped },
        reloads,
        stop: stop.clone(),
    };
    let signals = program::follow_hangups(reload).map_err(Failure::failed)?;
    let end = daemon.run().await;
    signals.abort();
    let text = match end.map_err(Failure::usage)? {
        End::Stopped => "stopped".into(),
        End::NothingDue => "no backup is due".into(),
        End::Made => "the backup was made".into(),
        End::PutOff(hindrance) => format!("there was no backup: {hindrance}"),
        End::Failed { message, exit_code } => {
            return Err(Failure { exit_code, ..Failure::failed(message) });
        }
    };
    Ok(Outcome { json: json!({ "ok": true, "said": text }), text: format!("{text}\n") })
}

/// The arguments that a backup needs, too.
fn forwarded(arguments: impl Iterator<Item = OsString>) -> Vec<OsString> {
    arguments.skip(2).filter(|argument| argument != "--once" && argument != "--json").collect()
}
