//! Commands of `janus-client`: arguments, output, exit codes. One file per command.

mod adopt;
mod backup;
mod cache;
mod cat;
mod chosen;
mod cp;
mod daemon;
mod dry_run;
mod enroll;
mod failure;
mod inside;
mod list;
mod ls;
mod mount;
mod nbd;
mod notice;
mod opening;
mod recover;
mod restore;
mod seal;
mod service;
mod sources;
mod status;
mod test;
mod to_folder;
mod trust;

use std::{path::PathBuf, process::ExitCode, sync::Arc, time::Duration};

use clap::{Arg, ArgAction, ArgMatches, Command};
use janus_proto::{
    archive::{Place, place::SILENCE},
    bandwidth::{self, Zone},
    channel::Proxied,
    ids::{MachineKey, ServerId},
    settings::Loader,
    tls::{Identity, PKI_KEYS, Role},
    trace,
};
use serde_json::Value;
use tokio_util::sync::CancellationToken;

pub use self::{
    cache::{cache_here, needs_server},
    daemon::daemon,
    dry_run::dry_run,
    enroll::enroll,
    failure::Failure,
    notice::tell,
    recover::{needs_server as recover_needs_server, recover},
    seal::seal,
    service::service,
    sources::sources,
};
use crate::{
    archive, browse::reader, config::Settings, frozen::watchdog, link::Link, revoked, wake,
    ways::Ways,
};

/// Loads settings from file, environment and flags.
pub fn loader() -> Loader<Settings> {
    let loader = Loader::new("JANUS_CLIENT").describe_section("pki", PKI_KEYS);
    loader.describe(&[
        ("urls", "URLs of janus or servers, tried together, earlier ones with a head start"),
        ("cert", "This machine's certificate, PEM"),
        ("key", "Its private key, PEM"),
        ("ca", "The CA's certificate, PEM"),
        ("cache_path", "Folder of the hash cache and of the open run"),
        ("encryption", "Who encrypts backups: none, or client (see `seal init`)"),
        ("seal_key", "File of the key that they are sealed with; empty: seal.key beside key"),
        (
            "for_machine",
            "Whose disks these are, where a group's rights allow it; empty: the certificate's own",
        ),
        ("disks", "Disks to back up: /dev/sdX or NAME=/path/to/image"),
        ("allow_live", "Read disks that are mounted writable"),
        ("make_snapshots", "Read mounted volumes of LVM and ZFS from a snapshot, made for it"),
        ("snapshot_size", "Most that a snapshot of a thick LVM volume takes up: 10%ORIGIN, 5G"),
        ("pre_backup", "Program, with its arguments, that runs before a backup"),
        ("post_backup", "Program, with its arguments, that runs after it, also when it failed"),
        ("hook_seconds", "Longest time that each of both may take"),
        ("hash_threads", "Threads that read and hash; 0: one for each core, and eight where reads wait for the disk"),
        ("skip_free", "Count free space of NTFS, ext4 and XFS as zeros"),
        ("skip_volumes", "Volumes to count as zeros: DISK/NUMBER"),
        ("full_compare_runs", "Everything is compared after so many backups; 0: not for that"),
        ("full_compare_days", "Everything is compared after so many days; 0: not for that"),
        (
            "audit_percent",
            "Share of what a change journal calls unchanged that is read all the same",
        ),
        ("encoding", "Packing of blocks on their way: auto, none, lz4 or zstd"),
        (
            "failover_after_seconds",
            "A lost server is waited for so long, then another takes the backup",
        ),
        (
            "failover_wait_seconds",
            "The longest such wait, by backups that have taken longer already",
        ),
        ("direct", "Data straight to the server where it answers at once: never, or prefer"),
        ("bandwidth", "Limits by local time: 20 Mbit/s, 08:00-18:00 20 Mbit/s"),
        ("wake", "Servers to wake before a backup or restore: MAC[@BROADCAST], or remembered"),
        ("boot_seconds", "How long a server that was woken is waited for"),
        ("proxy", "HTTP proxy: http://HOST:PORT, or none; empty: as the environment says"),
        ("log", "Log filter, such as info or janus_client=debug"),
        ("log_format", "Log lines for people or programs: text, or json"),
        ("otlp_endpoint", "Collector that gets the spans of runs by OTLP over gRPC; empty: none"),
        ("notify.when", "What is told of: failure, recovery, success"),
        ("notify.webhook", "URL that gets JSON about it; empty: none"),
        ("notify.ca", "Authority of the webhook's certificate; empty: the system's"),
        ("notify.command", "Program, with its arguments, that gets the same on stdin"),
        ("notify.seconds", "Longest time that each of both may take"),
        ("schedule.days", "Days of backups: Mon to Sun"),
        ("schedule.times", "Times of day: 22:00"),
        ("schedule.random_delay_minutes", "Backups begin later by up to so much"),
        ("schedule.catch_up", "Make up for backups missed while the machine was off"),
        ("schedule.wake", "Wake the machine from suspend; only with systemd"),
        ("schedule.on_battery", "Back up also on battery"),
        ("schedule.on_metered", "Back up also over a metered link"),
        ("schedule.retry_minutes", "A failed backup is tried again after so much, then twice that"),
    ])
}

/// The program's arguments.
pub fn command() -> Command {
    let loader = loader();
    let server = || Arg::new("server").long("server").value_name("NAME").help("Only this server");
    let machine = || {
        Arg::new("machine")
            .long("machine")
            .value_name("USER/MACHINE")
            .help("Machine to ask about; users and operators must name one")
    };
    let json = || {
        Arg::new("json")
            .long("json")
            .action(ArgAction::SetTrue)
            .help("Print JSON on stdout: the answer as the last line, events of progress before it")
    };
    let with_flags = |command: Command| loader.add_flags(command.arg(json()));
    Command::new("janus-client")
        .about("Backs disks up through janus, and brings them back")
        .version(env!("CARGO_PKG_VERSION"))
        .subcommand_required(true)
        .arg_required_else_help(true)
        .subcommand(with_flags(
            Command::new("backup").about("Back all disks up in one run").arg(server()).arg(
                Arg::new("dry-run")
                    .long("dry-run")
                    .action(ArgAction::SetTrue)
                    .help("Read as a backup would, send nothing, and say of each volume what and why; needs no certificate"),
            )
            .arg(
                Arg::new("to-folder")
                    .long("to-folder")
                    .value_name("DIR")
                    .conflicts_with_all(["server", "dry-run"])
                    .value_parser(clap::value_parser!(PathBuf))
                    .help("Write all disks to a folder that is carried to a server: janus-server import DIR; asks no server"),
            ),
        ))
        .subcommand(with_flags(
            Command::new("list")
                .about("List the snapshots of this machine, newest first")
                .arg(server())
                .arg(machine())
                .args(chosen::archive_arguments()),
        ))
        .subcommand(with_flags(
            Command::new("restore")
                .about("Bring a disk back as a file or onto a device")
                .args(chosen::arguments())
                .arg(
                    Arg::new("force")
                        .long("force")
                        .action(ArgAction::SetTrue)
                        .help("Replace an existing file, overwrite a device; what it has already is not fetched"),
                )
                .args(restore::arguments())
                .arg(
                    Arg::new("partial")
                        .long("partial")
                        .value_name("MAP")
                        .help("Restore what is left of a damaged snapshot; MAP: file to make that says what is zeros now"),
                ),
        ))
        .subcommand(with_flags(enroll::command()))
        .subcommand(with_flags(nbd::command()))
        .subcommand(with_flags(ls::command()))
        .subcommand(with_flags(cat::command()))
        .subcommand(with_flags(cp::command()))
        .subcommand(with_flags(mount::command()))
        .subcommand(with_flags(
            Command::new("trust-journal")
                .about("Use a disk's change journals again after one of them was wrong")
                .arg(Arg::new("disk").required(true).value_name("DISK").help("Its id")),
        ))
        .subcommand(with_flags(
            Command::new("cache")
                .about("Show, check, make anew or forget what is remembered of disks and servers")
                .arg(
                    Arg::new("action")
                        .required(true)
                        .value_parser(cache::ACTIONS)
                        .help("What to do; only rebuild asks servers"),
                )
                .arg(Arg::new("disk").value_name("DISK").help("Only this disk, by its id"))
                .arg(
                    Arg::new("server")
                        .long("server")
                        .value_name("NAME")
                        .help("For forget: only what this server has"),
                ),
        ))
        .subcommand(with_flags(seal::command()))
        .subcommand(with_flags(recover::command()))
        .subcommand(with_flags(Command::new("adopt").about(
            "Go on with the chains of this machine, after it was restored or set up anew",
        )))
        .subcommand(with_flags(
            Command::new("sources").about("List disks, their volumes, and how each can be backed up"),
        ))
        .subcommand(with_flags(Command::new("test").about(
            "Check each URL: connection, certificate, version, clock, space, throughput; exit with 0, 1 or 2",
        )))
        .subcommand(with_flags(
            Command::new("daemon")
                .about("Back up by the schedule of the settings, without systemd")
                .arg(Arg::new("once").long("once").action(ArgAction::SetTrue).help(
                    "Only what is due now, with its repetitions: what the systemd timer starts",
                )),
        ))
        .subcommand(service::command().arg(json()))
        .subcommand(with_flags(Command::new("status").about("Show the servers as janus sees them")))
        .subcommand(
            Command::new(reader::COMMAND)
                .hide(true)
                .about("Reads a file system for ls, cat and cp; the client itself starts it"),
        )
        .subcommand(
            Command::new(watchdog::COMMAND)
                .hide(true)
                .about("Freezes file systems for a moment; the client itself starts it")
                .arg(
                    Arg::new("limit-ms")
                        .long("limit-ms")
                        .value_parser(clap::value_parser!(u64))
                        .help("Thaws after so long; 10 s"),
                )
                .arg(
                    Arg::new("folders")
                        .num_args(1..)
                        .required(true)
                        .value_parser(clap::value_parser!(PathBuf)),
                ),
        )
}

/// Freezes file systems until told, as the hidden command says.
pub fn freeze(matches: &ArgMatches) -> ExitCode {
    let folders: Vec<_> = matches.get_many::<PathBuf>("folders").into_iter().flatten().collect();
    let limit = matches.get_one::<u64>("limit-ms").copied().map(Duration::from_millis);
    watchdog::run(&folders, limit.unwrap_or(watchdog::LIMIT))
}

/// What a command does with its settings.
pub struct Context {
    /// Settings.
    pub settings: Settings,
    /// Who we are; an archive doesn't ask.
    pub identity: Option<Identity>,
    /// The way to the archive that is asked instead of servers.
    pub archive: Option<Ways>,
    /// Tells its progress as events on stdout.
    pub events: bool,
    /// Asks it to stop.
    pub stop: CancellationToken,
}

impl Context {
    async fn connect(&self) -> Result<Link, Failure> {
        Ok(self.ways().await?.connect().await?)
    }

    /// What only servers are asked for.
    fn identity(&self) -> Result<&Identity, Failure> {
        self.identity.as_ref().ok_or_else(|| Failure::usage("an archive can't do that"))
    }

    /// The same after servers that sleep were woken up.
    async fn ways_awake(&self) -> Result<Ways, Failure> {
        if let Some(archive) = &self.archive {
            return Ok(archive.clone());
        }
        let (wishes, boot) = (self.settings.wishes()?, self.settings.boot());
        let ways = self.ways().await?;
        wake::wake_up(&wishes, boot, &ways, &self.stop).await;
        Ok(ways)
    }

    /// The way to the archive that `matches` name, if they name one.
    ///
    /// # Errors
    /// When it can't be read.
    pub async fn archive(
        matches: &ArgMatches,
        identity: Option<&Identity>,
        stop: &CancellationToken,
    ) -> Result<Option<Ways>, Failure> {
        let Some(url) = from_archive(matches) else { return Ok(None) };
        let silence = matches.get_one::<u64>("archive-timeout").copied().map(Duration::from_secs);
        let place = Place { silence: silence.unwrap_or(SILENCE), ..Place::new(url) };
        let named = named_machine(matches)?;
        let own = identity.and_then(|identity| match identity.principal().role.clone() {
            Role::Client(machine) | Role::Restore(machine) => Some(machine),
            _ => None,
        });
        let opened = archive::open(&place, named.as_ref(), own, stop).await;
        opened.map(Some).map_err(Failure::failed)
    }

    /// The ways to janus and the servers, with what is remembered of them.
    async fn ways(&self) -> Result<Ways, Failure> {
        if let Some(archive) = &self.archive {
            return Ok(archive.clone());
        }
        let urls = self.settings.checked_urls()?.to_vec();
        let (identity, proxies) = (self.identity()?.clone(), self.settings.proxies()?);
        let dialer = Arc::new(Proxied { identity, proxies });
        let ways =
            Ways::new(urls, bandwidth::limited(dialer, &self.settings.limits()?, Zone::Local));
        let folder = self.settings.cache_path.clone();
        let own = self.identity()?.clone();
        let reading = tokio::task::spawn_blocking(move || {
            revoked::recall(&own, &folder);
            ways.remembering(&folder)
        });
        reading.await.map_err(Failure::failed)
    }
}

/// What a command prints when all went well.
#[derive(Debug)]
pub struct Outcome {
    /// For `--json`.
    pub json: Value,
    /// For people.
    pub text: String,
}

/// Runs the command that `matches` holds.
///
/// # Errors
/// A failure with its exit code.
pub async fn run(name: &str, matches: &ArgMatches, context: &Context) -> Result<Outcome, Failure> {
    trace::note("command", name);
    match context.identity.as_ref().map(|identity| &identity.principal().role) {
        Some(Role::Client(machine) | Role::Restore(machine)) => trace::note("machine", machine),
        Some(other) => trace::note("caller", other),
        None => {}
    }
    match name {
        "adopt" => adopt::run(matches, context).await,
        "backup" => backup::run(matches, context).await,
        "cache" => cache::rebuild(matches, context).await,
        "cat" => cat::run(matches, context).await,
        "cp" => cp::run(matches, context).await,
        "list" => list::run(matches, context).await,
        nbd::COMMAND => nbd::run(matches, context).await,
        "ls" => ls::run(matches, context).await,
        "mount" => mount::run(matches, context).await,
        recover::COMMAND => recover::run(matches, context).await,
        "restore" => restore::run(matches, context).await,
        "test" => test::run(context).await,
        "trust-journal" => trust::run(matches, context).await,
        _ => status::run(context).await,
    }
}

/// The archive that is to be read instead of servers.
pub fn from_archive(matches: &ArgMatches) -> Option<&String> {
    matches.try_get_one::<String>("from-archive").ok().flatten()
}

/// Where a call goes, by the flags `--server` and `--machine`.
/// Whose backups are made with a certificate of this role; `None`: nobody's.
fn whose(settings: &Settings, role: &Role) -> Result<Option<MachineKey>, Failure> {
    let own = match role {
        Role::Client(machine) => Some(machine.clone()),
        _ => None,
    };
    Ok(settings.machine()?.or(own))
}

/// The one of flag `--server`.
fn server(matches: &ArgMatches) -> Result<Option<ServerId>, Failure> {
    Ok(matches.get_one::<String>("server").map(|name| name.parse()).transpose()?)
}

/// The one of flag `--machine`.
fn named_machine(matches: &ArgMatches) -> Result<Option<MachineKey>, Failure> {
    let named = matches.try_get_one::<String>("machine").ok().flatten();
    Ok(named.map(|key| key.parse()).transpose()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_are_consistent() {
        command().debug_assert();
    }
}
