//! `janus`: routes backups to the server used longest ago.

use std::process::ExitCode;

use clap::{Arg, ArgAction, ArgMatches, Command};
use janus::{config, maintenance, serve::Janus, status};
use janus_proto::{log, manual, memory, program, settings::SettingsError, show};
use tokio::runtime::Runtime;
use tokio_util::sync::CancellationToken;

/// Exit code of wrong settings or usage, as clap has it.
const USAGE: u8 = 2;

fn main() -> ExitCode {
    program::keep_memory_private();
    program::keep_files_private();
    let check = Arg::new("check")
        .long("check")
        .action(ArgAction::SetTrue)
        .help("Check the settings and end");
    let serve = config::loader()
        .add_flags(Command::new("serve").about("Route backups to the servers"))
        .arg(check);
    let flag = |name: &'static str, help: &'static str| {
        Arg::new(name).long(name).action(ArgAction::SetTrue).help(help)
    };
    let url = Arg::new("url")
        .long("url")
        .value_name("URL")
        .help("The janus to ask; default: the one of the settings, at its listen address");
    let status = config::loader()
        .add_flags(Command::new("status").about("Show how a running janus stands"))
        .arg(url.clone())
        .arg(flag("json", "Print one JSON object on stdout"))
        .arg(flag("check", "Print one line for a monitoring system; exit with 0, 1 or 2"));
    let forget = config::loader()
        .add_flags(
            Command::new("forget").about("Forget a server that is gone for good, at one janus"),
        )
        .arg(Arg::new("server").value_name("SERVER").required(true).help("Its name"))
        .arg(url)
        .arg(flag("json", "Print one JSON object on stdout"));
    let command = Command::new("janus")
        .about("Router of Janus Backup: each backup goes to the server used longest ago")
        .version(env!("CARGO_PKG_VERSION"))
        .subcommand_required(true)
        .arg_required_else_help(true)
        .subcommand(serve)
        .subcommand(status)
        .subcommand(forget);
    let command = manual::with_commands(command);
    let matches = command.clone().get_matches();
    if let Some(written) = manual::answer(&matches, command) {
        return written.map_or_else(|error| fail(error, 1), |()| ExitCode::SUCCESS);
    }
    match matches.subcommand() {
        Some(("serve", matches)) => serve_command(matches),
        Some(("status", matches)) => status_command(matches),
        Some(("forget", matches)) => forget_command(matches),
        _ => ExitCode::from(USAGE),
    }
}

fn fail(error: impl std::fmt::Display, code: u8) -> ExitCode {
    eprintln!("janus: {error}");
    ExitCode::from(code)
}

/// Prints an answer; `code`, unless it can't be printed.
fn print(text: &str, code: ExitCode) -> ExitCode {
    if program::print(&format!("{text}\n")) { code } else { ExitCode::FAILURE }
}

fn serve_command(matches: &ArgMatches) -> ExitCode {
    let settings = match config::loader().load(matches, std::env::vars_os()) {
        Ok(settings) => settings,
        Err(error) => return fail(error, USAGE),
    };
    if let Err(error) = settings.check() {
        return fail(error, USAGE);
    }
    // Dropped last: what is told at the end is told too.
    let _log = match log::start(settings.log_plan()) {
        Ok(log) => log,
        Err(error) => return fail(error, USAGE),
    };
    if matches.get_flag("check") {
        println!("settings are valid");
        return ExitCode::SUCCESS;
    }
    memory::keep_large_blocks();
    program::allow_open_files();
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let mut runtime = tokio::runtime::Builder::new_multi_thread();
    let runtime = match runtime.worker_threads(threads(cores)).enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return fail(error, 1),
    };
    let matches = matches.clone();
    let again = move || config::loader().load(&matches, std::env::vars_os());
    match runtime.block_on(serve(settings, again)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(error, 1),
    }
}

/// How many threads forward. The tasks of a call wake each other: on one thread that costs nothing, on another it is a call of the
/// system and a wait for a core that sender and receiver may need. A core forwards about 1 GiB/s.
fn threads(cores: usize) -> usize {
    (cores / 2).max(1)
}

/// The settings, and the runtime for one call.
/// `monitored`: a monitoring system reads one line of standard output, whatever happens.
fn for_one_call(
    matches: &ArgMatches,
    monitored: bool,
) -> Result<(config::Settings, Runtime), ExitCode> {
    let failed = |error: &dyn std::fmt::Display, code: u8| match monitored {
        true => {
            let code = ExitCode::from(status::Verdict::Critical as u8);
            print(&format!("JANUS CRITICAL - {error}"), code)
        }
        false => fail(error, code),
    };
    // A janus in the process of a server has its settings in that one's file.
    let settings = config::loader().or_section("janus", "pki").load(matches, std::env::vars_os());
    let settings = settings.map_err(|error| failed(&error, USAGE))?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    Ok((settings, runtime.map_err(|error| failed(&error, 1))?))
}

fn failed_call(error: &str, json: bool) -> ExitCode {
    if json {
        let answer = serde_json::json!({ "ok": false, "error": error, "exit_code": 1 });
        print(&answer.to_string(), ExitCode::FAILURE);
    }
    fail(error, 1)
}

fn forget_command(matches: &ArgMatches) -> ExitCode {
    let (settings, runtime) = match for_one_call(matches, false) {
        Ok(ready) => ready,
        Err(code) => return code,
    };
    let url = matches.get_one::<String>("url").map(String::as_str);
    let server = matches.get_one::<String>("server").map(String::as_str).unwrap_or_default();
    let json = matches.get_flag("json");
    match runtime.block_on(maintenance::forget(&settings, url, server)) {
        Ok(forgotten) => {
            let (snapshots, machines) = (forgotten.snapshots, forgotten.machines);
            let text = match json {
                true => serde_json::json!({ "ok": true, "server": server, "snapshots": snapshots, "machines": machines }).to_string(),
                false => format!("forgot {server}: {snapshots} snapshots of {machines} machines are no longer listed by this janus"),
            };
            print(&text, ExitCode::SUCCESS)
        }
        Err(error) => failed_call(&error, json),
    }
}

fn status_command(matches: &ArgMatches) -> ExitCode {
    let (check, json) = (matches.get_flag("check"), matches.get_flag("json"));
    let (settings, runtime) = match for_one_call(matches, check) {
        Ok(ready) => ready,
        Err(code) => return code,
    };
    let url = matches.get_one::<String>("url").map(String::as_str);
    let answer = runtime.block_on(status::ask(&settings, url));
    match answer {
        Ok(status) if check => {
            let (verdict, line) = status::check(&status, settings.overdue());
            print(&line, ExitCode::from(verdict as u8))
        }
        Ok(status) => {
            let text = match json {
                true => show::router_status_json(&status).to_string(),
                false => show::router_status(&status),
            };
            print(text.trim_end(), ExitCode::SUCCESS)
        }
        Err(error) if check => {
            let code = ExitCode::from(status::Verdict::Critical as u8);
            print(&format!("JANUS CRITICAL - {error}"), code)
        }
        Err(error) => failed_call(&error, json),
    }
}

async fn serve(
    settings: config::Settings,
    again: impl Fn() -> Result<config::Settings, SettingsError> + Send + Sync + 'static,
) -> anyhow::Result<()> {
    let janus = Janus::start(settings).await?;
    let shutdown = CancellationToken::new();
    let reload = janus.reload();
    let reload = move || reload.apply(again().map_err(|error| error.to_string()));
    let signals = program::follow_signals(shutdown.clone(), reload)?;
    println!("listening on https://{}", janus.address()?);
    let served = janus.run(shutdown).await;
    signals.abort();
    Ok(served?)
}
