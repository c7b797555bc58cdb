//! The snapshot that a command is about: its arguments, and the snapshot as a disk.

use std::sync::Arc;

use clap::{Arg, ArgAction, ArgMatches};
use tokio::runtime::Handle;

use super::{Context, Failure, server};
use crate::{
    seal::{Keys, Wishes},
    snapshot::{Opened, Selection, SnapshotMedium, opened::Reach},
    ways::Ways,
};

/// Memory for what was read of a snapshot.
const MEMORY_BYTES: u64 = 128 << 20;

/// The arguments.
pub(super) fn arguments() -> [Arg; 8] {
    let [archive, timeout] = archive_arguments();
    [
        Arg::new("what")
            .required(true)
            .value_name("DISK|USER/MACHINE[/DISK]|SNAPSHOT")
            .help("The newest snapshot of a disk, or one by its id"),
        Arg::new("at").long("at").value_name("TIME").help(
            "The newest until then, in UTC as list prints it: 2026-11-20, or \"2026-11-20 22:00\"",
        ),
        Arg::new("snapshot")
            .long("snapshot")
            .value_name("ID")
            .conflicts_with("at")
            .help("This snapshot of the disk"),
        Arg::new("server").long("server").value_name("NAME").help("Only from this server"),
        archive,
        timeout,
        Arg::new("allow-unsealed")
            .long("allow-unsealed")
            .action(ArgAction::SetTrue)
            .help("Also a snapshot that isn't sealed, though this machine seals its backups"),
        Arg::new("sealed-as").long("sealed-as").value_name("USER/MACHINE").help(
            "A sealed snapshot that is kept under another name now was sealed as this machine",
        ),
    ]
}

/// Those about an archive.
pub(super) fn archive_arguments() -> [Arg; 2] {
    [
        Arg::new("from-archive").long("from-archive").value_name("URL").help(
            "Read an archive instead of servers: s3://BUCKET/PREFIX, gs://…, az://… or file:///FOLDER; credentials come from the environment, and no certificate is needed",
        ),
        Arg::new("archive-timeout")
            .long("archive-timeout")
            .value_name("SECONDS")
            .requires("from-archive")
            .value_parser(clap::value_parser!(u64).range(1..=3600))
            .help("A request to the archive is made again after so long a silence; 30"),
    ]
}

/// What they mean; `what` stands for the argument of that name.
pub(super) fn selection(
    matches: &ArgMatches,
    what: &str,
    context: &Context,
) -> Result<Selection, Failure> {
    let text = |name: &str| matches.get_one::<String>(name).map(String::as_str);
    let mut selection = Selection::parse(what, text("at"), text("snapshot"), server(matches)?)?;
    selection.machine = selection.machine.or(context.settings.machine()?);
    Ok(selection)
}

impl Context {
    /// How the snapshots of a selection are reached.
    pub(super) fn reach(&self, ways: &Ways, selection: &Selection) -> Reach {
        Reach {
            ways: ways.clone(),
            direct: self.settings.direct,
            failover_after: self.settings.failover_after(),
            machine: selection.machine.clone(),
        }
    }

    /// What opens sealed snapshots, and what is allowed.
    pub(super) async fn keys(&self, matches: &ArgMatches) -> Result<Arc<Keys>, Failure> {
        let sealed_as = matches.get_one::<String>("sealed-as").map(|name| name.parse());
        let wishes = Wishes {
            allow_unsealed: matches.get_flag("allow-unsealed"),
            sealed_as: sealed_as.transpose()?,
        };
        let settings = self.settings.clone();
        let loading = tokio::task::spawn_blocking(move || Keys::load(&settings, wishes));
        Ok(Arc::new(loading.await.map_err(Failure::failed)?))
    }

    /// The one snapshot that is meant, as a disk.
    pub(super) async fn medium(
        &self,
        matches: &ArgMatches,
        selection: &Selection,
    ) -> Result<SnapshotMedium, Failure> {
        let keys = self.keys(matches).await?;
        let ways = self.ways_awake().await?;
        let found = selection.find(&ways).await?;
        let seal = keys.open(&found.snapshot)?;
        let opened = Opened::new(self.reach(&ways, selection), found)?;
        let packing = self.settings.encoding()?;
        Ok(SnapshotMedium::new(opened, seal, packing, MEMORY_BYTES, Handle::current()))
    }
}
