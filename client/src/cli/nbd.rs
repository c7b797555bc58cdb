//! `janus-client nbd`: serves a snapshot to local programs until it is stopped.

use std::{net::SocketAddr, path::PathBuf, sync::Arc, time::Instant};

use clap::{Arg, ArgMatches, Command, value_parser};
use janus_proto::{
    program,
    show::{amount, date},
};
use serde_json::{Value, json};
use tokio::runtime::Handle;

use super::{
    Context, Failure, Outcome,
    chosen::{self, selection},
};
use crate::{
    export::{At, Door, Export, Folder, Overlay, Server, changed},
    snapshot::{Opened, SnapshotMedium},
    source::medium::Medium,
};

/// Name of the command.
pub(super) const COMMAND: &str = "nbd";

pub(super) fn command() -> Command {
    Command::new(COMMAND)
        .about("Serve a snapshot over NBD to programs on this machine, until stopped")
        .args(chosen::arguments())
        .arg(
            Arg::new("socket")
                .long("socket")
                .value_name("PATH")
                .value_parser(value_parser!(PathBuf))
                .help("Unix socket to make; default: one in a new folder"),
        )
        .arg(
            Arg::new("listen")
                .long("listen")
                .value_name("ADDRESS:PORT")
                .value_parser(value_parser!(SocketAddr))
                .conflicts_with("socket")
                .help("Loopback address instead, for programs without Unix sockets: 127.0.0.1:10809"),
        )
        .arg(
            Arg::new("write")
                .long("write")
                .value_name("SCRATCH")
                .value_parser(value_parser!(PathBuf))
                .help("Let clients write, into this new sparse file; the snapshot stays as it is, the file goes at the end"),
        )
        .arg(
            Arg::new("changed-since")
                .long("changed-since")
                .value_name("ID")
                .help("Also tell what changed since this older snapshot, as block status janus:changed"),
        )
}

pub(super) async fn run(matches: &ArgMatches, context: &Context) -> Result<Outcome, Failure> {
    let what = matches.get_one::<String>("what").map(String::as_str).unwrap_or_default();
    let medium = context.medium(matches, &selection(matches, what, context)?).await?;
    // What can't be read at all is said now, not to the first program that reads.
    medium.opened().place().await?;
    let overlay = match matches.get_one::<PathBuf>("write") {
        Some(path) => {
            let overlay = Overlay::create(Arc::new(medium.clone()), path);
            Some(Arc::new(overlay.map_err(Failure::failed)?))
        }
        None => None,
    };
    let mut export = exported(&medium, overlay.clone());
    if let Some(id) = matches.get_one::<String>("changed-since") {
        add_changes(&mut export, id, matches, context, &medium, overlay).await?;
    }
    let place = Place::of(matches)?;
    let door = Door::open(&place.at).map_err(Failure::failed)?;
    let told = Told { uri: door.uri().to_string(), export: &export, medium: &medium };
    match context.events {
        true => program::print(&format!("{}\n", told.json())),
        false => program::print(&told.text()),
    };
    let began = Instant::now();
    let server = Server { export: Arc::new(export), door };
    server.run(&context.stop).await;
    medium.close().await;
    let (fetched, seconds) = (medium.fetched_bytes(), began.elapsed().as_secs_f64());
    let json = json!({ "ok": true, "fetched_bytes": fetched, "seconds": seconds });
    Ok(Outcome { json, text: format!("stopped; {} were fetched\n", amount(fetched)) })
}

fn exported(medium: &SnapshotMedium, overlay: Option<Arc<Overlay>>) -> Export {
    let snapshot = medium.snapshot();
    let description = format!(
        "{} of {}, {} on {}",
        snapshot.disk_id,
        date(snapshot.committed_ms),
        snapshot.snapshot_id,
        snapshot.server_id
    );
    match overlay {
        Some(overlay) => Export::writable(&snapshot.disk_id, &description, overlay),
        None => Export::read_only(&snapshot.disk_id, &description, Arc::new(medium.clone())),
    }
}

/// The older snapshot may be on any server.
async fn add_changes(
    export: &mut Export,
    id: &str,
    matches: &ArgMatches,
    context: &Context,
    medium: &SnapshotMedium,
    overlay: Option<Arc<Overlay>>,
) -> Result<(), Failure> {
    let what = matches.get_one::<String>("what").map(String::as_str).unwrap_or_default();
    let then = selection(matches, what, context)?.other(id)?;
    let ways = context.ways().await?;
    let found = then.find(&ways).await?;
    let (ours, theirs) = (&medium.snapshot().disk_id, &found.snapshot.disk_id);
    if ours != theirs {
        return Err(Failure::usage(format!(
            "snapshot {id} is of disk {theirs}, not of {ours}: changes are told within one disk"
        )));
    }
    let then = Opened::new(context.reach(&ways, &then), found)?;
    let changed = changed::Changed::compare(medium.clone(), then, Handle::current()).await?;
    let tells: Arc<dyn crate::export::Tells> = match overlay {
        Some(overlay) => Arc::new(changed::OrWritten(changed, overlay)),
        None => Arc::new(changed),
    };
    for name in [changed::NAME, changed::BITMAP_NAME] {
        export.contexts.push((name.to_owned(), tells.clone()));
    }
    Ok(())
}

/// Where to listen; a folder that was made for it goes at the end.
struct Place {
    at: At,
    _folder: Option<Folder>,
}

impl Place {
    fn of(matches: &ArgMatches) -> Result<Self, Failure> {
        if let Some(path) = matches.get_one::<PathBuf>("socket") {
            return Ok(Self { at: At::Socket(path.clone()), _folder: None });
        }
        if let Some(address) = matches.get_one::<SocketAddr>("listen") {
            return Ok(Self { at: At::Address(*address), _folder: None });
        }
        let folder = Folder::make().map_err(Failure::failed)?;
        let at = At::Socket(folder.socket());
        Ok(Self { at, _folder: Some(folder) })
    }
}

/// What is said when it begins.
struct Told<'a> {
    uri: String,
    export: &'a Export,
    medium: &'a SnapshotMedium,
}

impl Told<'_> {
    fn json(&self) -> Value {
        let snapshot = self.medium.snapshot();
        let contexts: Vec<_> = self.export.contexts.iter().map(|(name, _)| name).collect();
        json!({
            "event": "serving",
            "uri": self.uri,
            "export": self.export.name,
            "snapshot_id": snapshot.snapshot_id,
            "server": snapshot.server_id,
            "size_bytes": self.medium.size_bytes(),
            "writable": self.export.overlay.is_some(),
            "contexts": contexts,
        })
    }

    fn text(&self) -> String {
        let (uri, export) = (&self.uri, self.export);
        let is_writable = export.overlay.is_some();
        // QEMU's own scratch file takes what a machine writes, where ours doesn't.
        let [how, snapshot] = match is_writable {
            true => ["writes go to the scratch file", ""],
            false => ["read-only", "-snapshot "],
        };
        let size = amount(self.medium.size_bytes());
        let mut text = format!("{} ({size}), {how}: {uri}\n", export.description);
        // In -drive a comma in a value is written twice.
        let driven = uri.replace(',', ",,");
        text += &format!("  look      nbdinfo '{uri}'; nbdinfo --map '{uri}'\n");
        text += &format!("  copy      nbdcopy '{uri}' disk.raw\n");
        text += &format!(
            "  boot      qemu-system-x86_64 {snapshot}-m 2048 -drive 'file={driven},format=raw,if=virtio'\n"
        );
        text += &format!("  mount     {}\n", self.mount(is_writable));
        if export.contexts.iter().any(|(name, _)| name == changed::NAME) {
            text += &format!("  changed   nbdinfo --map={} '{uri}'\n", changed::NAME);
        }
        text + "Ctrl-C ends it.\n"
    }

    /// By the kernel's client.
    fn mount(&self, is_writable: bool) -> String {
        let how = if is_writable { "" } else { " -o ro,noload" };
        let place = match self.uri.strip_prefix("nbd://") {
            Some(address) => address.rsplit_once(':').map_or_else(String::new, |(host, port)| {
                format!("{} {port}", host.trim_start_matches('[').trim_end_matches(']'))
            }),
            None => format!("-unix {}", self.uri.split_once('=').map_or("", |(_, path)| path)),
        };
        format!("modprobe nbd; nbd-client {place} /dev/nbd0; mount{how} /dev/nbd0p1 /mnt")
    }
}
