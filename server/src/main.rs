//! `janus-server`: serves backups, and makes the certificates of a group. With a `[janus]` section in its settings the same
//! process routes backups too; only this file knows of both. By hidden commands it is what proofs
//! start: the reader of file systems, and who starts a machine.

use std::process::ExitCode;

use anyhow::Context;
use clap::{Arg, ArgAction, ArgMatches, Command, FromArgMatches, Subcommand};
use janus::serve::Janus;
use janus_client::browse::reader;
use janus_proto::{
    log::{self, LogPlan},
    manual, memory, program,
    settings::{Loader, SettingsError},
    tls::{PKI_KEYS, Pki},
};
use janus_server::{
    admin::{self, revoke},
    config,
    pki::{self, PkiCommand},
    prove::boot,
    serve::Server,
};
use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;

/// Exit code of wrong settings or usage, as clap has it.
const USAGE: u8 = 2;

fn main() -> ExitCode {
    program::keep_memory_private();
    let mut arguments = std::env::args_os().skip(1);
    match arguments.next() {
        Some(name) if name == reader::COMMAND => return reader::run(),
        Some(name) if name == boot::COMMAND => return boot::run(arguments),
        _ => {}
    }
    let serve = loader().add_flags(Command::new("serve").about("Serve backups and restores"));
    let pki = Command::new("pki").about("Make certificates, and refuse them");
    let pki =
        with_settings(PkiCommand::augment_subcommands(pki), revoke::Action::augment_subcommands)
            .subcommand_required(true);
    let command = Command::new("janus-server")
        .about("Backup server of Janus Backup: keeps chains of virtual disks")
        .version(env!("CARGO_PKG_VERSION"))
        .subcommand_required(true)
        .arg_required_else_help(true)
        .subcommand(serve)
        .subcommand(pki);
    let command = manual::with_commands(with_admin_commands(command));
    let matches = command.clone().get_matches();
    if let Some(written) = manual::answer(&matches, command) {
        return written.map_or_else(|error| fail(error, 1), |()| ExitCode::SUCCESS);
    }
    match matches.subcommand() {
        Some(("pki", of_pki)) => match of_pki.subcommand() {
            Some((name, of_command)) if revoke::Action::has_subcommand(name) => {
                let action = revoke::Action::from_arg_matches(of_pki);
                admin_command(&matches, of_command, action.ok().map(admin::Command::Revoke))
            }
            _ => pki_command(of_pki),
        },
        Some((name, of_command)) => {
            program::keep_files_in_group();
            match name {
                "serve" => serve_command(of_command),
                _ => admin_command(&matches, of_command, None),
            }
        }
        None => ExitCode::from(USAGE),
    }
}

/// Adds what is asked of a store. These commands take the settings of `serve`, but their help only shows `--config`.
fn with_admin_commands(command: Command) -> Command {
    with_settings(command, |admin| {
        admin::offline::Command::augment_subcommands(admin::Command::augment_subcommands(admin))
    })
}

fn with_settings(command: Command, augment: impl FnOnce(Command) -> Command) -> Command {
    let json = Arg::new("json")
        .long("json")
        .action(ArgAction::SetTrue)
        .global(true)
        .help("Print one JSON object on stdout");
    let settings = loader().add_flags(Command::new("settings"));
    augment(Command::new("admin")).get_subcommands().fold(command, |command, one| {
        let hidden = |arg: &Arg| arg.clone().global(true).hide(arg.get_id() != "config");
        command.subcommand(one.clone().arg(&json).args(settings.get_arguments().map(hidden)))
    })
}

/// Has a command done by the server that runs, or does it here.
fn admin_command(
    matches: &ArgMatches,
    of_command: &ArgMatches,
    known: Option<admin::Command>,
) -> ExitCode {
    let is_json = of_command.get_flag("json");
    let failed = |error: String, code: u8| {
        if is_json {
            println!("{}", serde_json::json!({ "ok": false, "error": error }));
        }
        fail(error, code)
    };
    let settings = loader().load(of_command, std::env::vars_os()).map_err(|e| e.to_string());
    let settings = match settings.and_then(|settings| settings.check().map(|()| settings)) {
        Ok(settings) => settings,
        Err(error) => return failed(error, USAGE),
    };
    // The answer is what counts here: of the log only what is wrong, and no spans.
    let plan = LogPlan { filter: "warn", otlp_endpoint: "", ..settings.server.log_plan() };
    let _log = match log::start(plan) {
        Ok(log) => log,
        Err(error) => return failed(error.to_string(), USAGE),
    };
    let progress = |line| eprintln!("{line}");
    let is_offline = matches.subcommand_name().is_some_and(admin::offline::Command::has_subcommand);
    let answer = if let Some(command) = known {
        Ok(admin::ask::ask(&settings.server, command, &progress))
    } else if is_offline {
        let command = admin::offline::Command::from_arg_matches(matches);
        command.map(|command| admin::offline::run(&settings.server, &command, &progress))
    } else {
        let command = admin::Command::from_arg_matches(matches);
        command.map(|command| admin::ask::ask(&settings.server, command, &progress))
    };
    match answer.unwrap_or_else(|error| error.exit()) {
        Ok(answer) => {
            let is_printed = print(&answer, is_json);
            ExitCode::from(u8::from(answer.is_bad || !is_printed))
        }
        Err(error) => failed(error.to_string(), 1),
    }
}

fn print(answer: &admin::Answer, is_json: bool) -> bool {
    match is_json {
        true => {
            let mut json = answer.json.clone();
            if let Some(object) = json.as_object_mut() {
                object.insert("ok".into(), (!answer.is_bad).into());
            }
            program::print(&format!("{json}\n"))
        }
        false => program::print(&answer.text),
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
        .describe_section("retention", config::retention::KEYS)
        .describe_section("fill", config::fill::KEYS)
        .describe_section("prove", config::prove::KEYS)
        .describe_section("enroll", config::enroll::KEYS)
        .describe_section("pki", PKI_KEYS)
        .describe_section("janus", janus::config::KEYS)
        .describe_section("janus.pki", PKI_KEYS)
}

/// Settings of the process, of all layers.
fn load(matches: &ArgMatches) -> Result<Settings, SettingsError> {
    let mut settings = loader().load(matches, std::env::vars_os())?;
    // Who is who is the same for both.
    if settings.router().is_some_and(|router| router.pki == Pki::default()) {
        settings.janus.pki.clone_from(&settings.server.pki);
    }
    Ok(settings)
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
    let settings = match load(matches) {
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
    program::allow_open_files();
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return fail(error, 1),
    };
    let matches = matches.clone();
    let again = move || load(&matches);
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
