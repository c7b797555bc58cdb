//! `janus-client`: backs disks up and brings them back.

use std::{path::PathBuf, process::ExitCode, time::Duration};

use clap::ArgMatches;
use janus_client::cli::{self, Context, Failure, Outcome};
use janus_client::{browse::reader, config::Settings, frozen::watchdog, link};
use janus_proto::{
    log, manual, memory, program,
    tls::{Identity, TlsError},
};
use tokio_util::sync::CancellationToken;
use tracing::Instrument;

fn main() -> ExitCode {
    program::forbid_core_dumps();
    let command = manual::with_commands(cli::command());
    let matches = match command.clone().try_get_matches() {
        Ok(matches) => matches,
        Err(error) => return refuse_usage(&error),
    };
    if let Some(written) = manual::answer(&matches, command) {
        let failed = |error| eprintln!("janus-client: {error}");
        return written.map_err(failed).map_or(ExitCode::FAILURE, |()| ExitCode::SUCCESS);
    }
    let Some((name, matches)) = matches.subcommand() else { return ExitCode::from(2) };
    if name == watchdog::COMMAND {
        return cli::freeze(matches);
    }
    if name == reader::COMMAND {
        return reader::run();
    }
    let outcome = match name {
        "service" => cli::service(matches),
        _ => run(name, matches),
    };
    match outcome {
        Ok(outcome) => {
            let is_printed = print(matches, &outcome.json, &outcome.text);
            // Where a command checks something, what it found; else there is none.
            let code = outcome.json["exit_code"].as_u64().unwrap_or(0);
            let code = u8::try_from(code).unwrap_or(1);
            ExitCode::from(if is_printed { code } else { code.max(1) })
        }
        Err(failure) => {
            let known = failure.known.as_ref().map_or("", |known| known.text.as_str());
            print(matches, &failure.json(), known);
            eprintln!("janus-client: {}", failure.message);
            ExitCode::from(failure.exit_code)
        }
    }
}

/// Wrong arguments, or a question for help or version. Without arguments that were understood, `--json` is looked for.
fn refuse_usage(error: &clap::Error) -> ExitCode {
    if error.use_stderr() && std::env::args_os().any(|argument| argument == "--json") {
        let text = error.to_string();
        let said = text.lines().next().unwrap_or_default().trim_start_matches("error: ");
        println!("{}", Failure::usage(said).json());
    }
    let _ = error.print();
    ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2))
}

fn print(matches: &ArgMatches, json: &serde_json::Value, text: &str) -> bool {
    if matches.get_flag("json") {
        program::print(&format!("{json}\n"))
    } else {
        program::print(text)
    }
}

fn run(name: &str, matches: &ArgMatches) -> Result<Outcome, Failure> {
    memory::one_heap();
    let settings = cli::loader().load(matches, std::env::vars_os()).map_err(Failure::usage)?;
    let _log = log::start(settings.log_plan()).map_err(Failure::usage)?;
    if name == "sources" {
        return cli::sources(&settings);
    }
    if name == "cache" && !cli::needs_server(matches) {
        return cli::cache_here(&settings, matches);
    }
    if name == "enroll" {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        return runtime.map_err(Failure::failed)?.block_on(cli::enroll(matches, &settings));
    }
    if name == "seal" {
        return cli::seal(&settings, matches);
    }
    if name == "recover" && !cli::recover_needs_server(matches) {
        return cli::recover(&settings, matches);
    }
    let is_daemon = name == "daemon";
    // A folder that is carried elsewhere is read there by another user.
    let is_carried = name == "backup" && matches.get_one::<PathBuf>("to-folder").is_some();
    if is_daemon || name == "backup" && !is_carried {
        program::keep_files_private();
    }
    let is_dry = name == "backup" && matches.get_flag("dry-run");
    let load = || Identity::load_with(&settings.cert, &settings.key, &settings.ca, &settings.pki);
    let identity = if is_dry || is_daemon { None } else { Some(load()) };
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(Failure::failed)?;
    let outcome = runtime.block_on(async {
        let stop = CancellationToken::new();
        let signals = tokio::spawn(stop_on_signals(stop.clone()));
        // Certificates that end after an hour are replaced while a backup runs.
        let renewals = identity.as_ref().and_then(|identity| identity.as_ref().ok());
        let renewals = renewals
            .map(|identity| tokio::spawn(program::follow_files(identity.clone(), stop.clone())));
        let span = tracing::info_span!("run", trace_id = link::trace().trace_id());
        let _ = link::trace().begin(&span);
        let outcome = match identity {
            // Each backup has a span of its own.
            None if is_daemon => cli::daemon(matches, &settings, &stop).await,
            None => cli::dry_run(&settings, &stop).instrument(span).await,
            Some(identity) => {
                let work = with_identity(name, matches, settings, identity, stop);
                work.instrument(span).await
            }
        };
        signals.abort();
        if let Some(renewals) = renewals {
            renewals.abort();
        }
        outcome
    });
    // A thread in a read that hangs must not keep the program.
    runtime.shutdown_timeout(Duration::from_secs(5));
    outcome
}

async fn with_identity(
    name: &str,
    matches: &ArgMatches,
    settings: Settings,
    identity: Result<Identity, TlsError>,
    stop: CancellationToken,
) -> Result<Outcome, Failure> {
    // A folder is no backup yet that anybody waits for.
    let is_news = name == "backup" && matches.get_one::<PathBuf>("to-folder").is_none();
    let told = is_news.then(|| (settings.clone(), identity.as_ref().ok().cloned()));
    let (events, stopped) = (matches.get_flag("json"), stop.clone());
    let outcome = match identity {
        Err(error) if cli::from_archive(matches).is_none() => Err(error.into()),
        // An archive doesn't ask who we are.
        identity => {
            let identity = identity.ok();
            let archive = Context::archive(matches, identity.as_ref(), &stop).await;
            match archive {
                Ok(archive) => {
                    let context = Context { settings, identity, archive, events, stop };
                    cli::run(name, matches, &context).await
                }
                Err(failure) => Err(failure),
            }
        }
    };
    if let Some((settings, identity)) = told {
        let telling = cli::tell(&settings, identity.as_ref(), &outcome);
        stopped.run_until_cancelled(telling).await;
    }
    outcome
}

async fn stop_on_signals(stop: CancellationToken) {
    let Ok(signal) = program::stop_signal() else { return };
    signal.await;
    stop.cancel();
}
