//! `janus-server`: serves backups, and makes the certificates of a group.

use std::process::ExitCode;

use clap::{ArgMatches, Command, FromArgMatches, Subcommand};
use janus_proto::program;
use janus_server::{
    config,
    pki::{self, PkiCommand},
    serve::Server,
};
use tokio_util::sync::CancellationToken;

/// Exit code of wrong settings or usage, as clap has it.
const USAGE: u8 = 2;

fn main() -> ExitCode {
    let loader = config::loader();
    let serve = loader.add_flags(Command::new("serve").about("Serve backups and restores"));
    let pki = PkiCommand::augment_subcommands(Command::new("pki").about("Make certificates"))
        .subcommand_required(true);
    let command = Command::new("janus-server")
        .about("Backup server of Janus Backup: keeps chains of virtual disks")
        .version(env!("CARGO_PKG_VERSION"))
        .subcommand_required(true)
        .arg_required_else_help(true)
        .subcommand(serve)
        .subcommand(pki);
    match command.get_matches().subcommand() {
        Some(("serve", matches)) => serve_command(matches),
        Some(("pki", matches)) => pki_command(matches),
        _ => ExitCode::from(USAGE),
    }
}

fn fail(error: impl std::fmt::Display, code: u8) -> ExitCode {
    eprintln!("janus-server: {error}");
    ExitCode::from(code)
}

fn pki_command(matches: &ArgMatches) -> ExitCode {
    match PkiCommand::from_arg_matches(matches) {
        Ok(command) => match pki::run(command) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => fail(error, 1),
        },
        Err(error) => error.exit(),
    }
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
    let server = Server::start(settings).await?;
    let shutdown = CancellationToken::new();
    let signals = program::follow_signals(server.identity().clone(), shutdown.clone())?;
    println!("listening on https://{}", server.address()?);
    let served = server.run(shutdown).await;
    signals.abort();
    Ok(served?)
}
