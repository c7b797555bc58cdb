//! `janus-server`: serves backups, and makes the certificates of a group. With a `[janus]` section in its settings the same
//! process routes backups too; only this file knows of both.

use std::process::ExitCode;

use anyhow::Context;
use clap::{ArgMatches, Command, FromArgMatches, Subcommand};
use janus::serve::Janus;
use janus_proto::{
    log, memory, program,
    settings::{Loader, SettingsError},
};
use janus_server::{
    config,
    pki::{self, PkiCommand},
    serve::Server,
};
use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;

/// Exit code of wrong settings or usage, as clap has it.
const USAGE: u8 = 2;

fn main() -> ExitCode {
    let serve = loader().add_flags(Command::new("serve").about("Serve backups and restores"));
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

/// All settings of the process.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
struct Settings {
    #[serde(flatten)]
    server: config::Settings,
    /// The router beside it; without any key there is none.
    janus: janus::config::Settings,
}

fn loader() -> Loader<Settings> {
    Loader::new("JANUS_SERVER")
        .describe(config::KEYS)
        .describe_section("janus", janus::config::KEYS)
}

impl Settings {
    /// Settings of the router, if there is to be one.
    fn router(&self) -> Option<&janus::config::Settings> {
        (self.janus != janus::config::Settings::default()).then_some(&self.janus)
    }

    fn check(&self) -> Result<(), String> {
        self.server.check().map_err(|error| error.to_string())?;
        let Some(router) = self.router() else { return Ok(()) };
        let unset = janus::config::Settings::default();
        for (key, is_set) in [
            ("log", router.log != unset.log),
            ("log_format", router.log_format != unset.log_format),
            ("otlp_endpoint", router.otlp_endpoint != unset.otlp_endpoint),
        ] {
            if is_set {
                return Err(format!("setting janus.{key}: one process has one log: set {key}"));
            }
        }
        router.check().map_err(|error| format!("section [janus]: {error}"))
    }
}

fn serve_command(matches: &ArgMatches) -> ExitCode {
    let settings = match loader().load(matches, std::env::vars_os()) {
        Ok(settings) => settings,
        Err(error) => return fail(error, USAGE),
    };
    if let Err(error) = settings.check() {
        return fail(error, USAGE);
    }
    // Dropped last: what is told at the end is told too.
    let _log = match log::start(settings.server.log_plan()) {
        Ok(log) => log,
        Err(error) => return fail(error, USAGE),
    };
    if settings.router().is_some() {
        memory::keep_large_blocks();
    }
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return fail(error, 1),
    };
    let matches = matches.clone();
    let again = move || loader().load(&matches, std::env::vars_os());
    match runtime.block_on(serve(settings, again)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(format!("{error:#}"), 1),
    }
}

async fn serve(
    settings: Settings,
    again: impl Fn() -> Result<Settings, SettingsError> + Send + Sync + 'static,
) -> anyhow::Result<()> {
    let router = match settings.router() {
        Some(router) => Some(Janus::start(router.clone()).await.context("section [janus]")?),
        None => None,
    };
    let server = Server::start(settings.server).await?;
    let shutdown = CancellationToken::new();
    let (of_server, of_router) = (server.reload(), router.as_ref().map(Janus::reload));
    let reload = move || {
        let settings = again().map_err(|error| error.to_string());
        of_server.apply(settings.clone().map(|settings| settings.server));
        if let Some(of_router) = &of_router {
            of_router.apply(settings.map(|settings| settings.janus));
        }
    };
    let signals = program::follow_signals(shutdown.clone(), reload)?;
    if let Some(router) = &router {
        println!("janus listening on https://{}", router.address()?);
    }
    println!("listening on https://{}", server.address()?);
    // Both end together: a server without its router, or the other way round, would look like one that works.
    let routing = async {
        let routed = match router {
            Some(router) => router.run(shutdown.clone()).await.context("section [janus]"),
            None => {
                shutdown.cancelled().await;
                Ok(())
            }
        };
        shutdown.cancel();
        routed
    };
    let serving = async {
        let served = server.run(shutdown.clone()).await;
        shutdown.cancel();
        served
    };
    let (routed, served) = tokio::join!(routing, serving);
    signals.abort();
    served?;
    routed
}
