//! `janus`: routes backups to the server used longest ago.

use std::process::ExitCode;

use clap::{Arg, ArgAction, ArgMatches, Command};
use janus::{config, serve::Janus};
use janus_proto::program;
use tokio_util::sync::CancellationToken;

/// Exit code of wrong settings or usage, as clap has it.
const USAGE: u8 = 2;

fn main() -> ExitCode {
    let check = Arg::new("check")
        .long("check")
        .action(ArgAction::SetTrue)
        .help("Check the settings and end");
    let serve = config::loader()
        .add_flags(Command::new("serve").about("Route backups to the servers"))
        .arg(check);
    let command = Command::new("janus")
        .about("Router of Janus Backup: each backup goes to the server used longest ago")
        .version(env!("CARGO_PKG_VERSION"))
        .subcommand_required(true)
        .arg_required_else_help(true)
        .subcommand(serve);
    match command.get_matches().subcommand() {
        Some(("serve", matches)) => serve_command(matches),
        _ => ExitCode::from(USAGE),
    }
}

fn fail(error: impl std::fmt::Display, code: u8) -> ExitCode {
    eprintln!("janus: {error}");
    ExitCode::from(code)
}

fn serve_command(matches: &ArgMatches) -> ExitCode {
    let settings = match config::loader().load(matches, std::env::vars_os()) {
        Ok(settings) => settings,
        Err(error) => return fail(error, USAGE),
    };
    if let Err(error) = settings.check() {
        return fail(error, USAGE);
    }
    if let Err(error) = program::start_log(&settings.log) {
        return fail(format!("setting log: {error}"), USAGE);
    }
    if matches.get_flag("check") {
        println!("settings are valid");
        return ExitCode::SUCCESS;
    }
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return fail(error, 1),
    };
    match runtime.block_on(serve(settings)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(error, 1),
    }
}

async fn serve(settings: config::Settings) -> anyhow::Result<()> {
    let janus = Janus::start(settings).await?;
    let shutdown = CancellationToken::new();
    let stop = program::stop_signal()?;
    let signalled = shutdown.clone();
    let signals = tokio::spawn(async move {
        stop.await;
        tracing::info!("stopping: calls in progress may end");
        signalled.cancel();
    });
    println!("listening on https://{}", janus.address()?);
    let served = janus.run(shutdown).await;
    signals.abort();
    Ok(served?)
}
