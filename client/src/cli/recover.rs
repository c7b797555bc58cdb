//! `janus-client recover`: writes the key file from the recovery key, or (`--test`) says which key that is.
//!
//! It is read from standard input, never from arguments, which everybody on the machine can see.

use std::io::{self, BufRead, IsTerminal};

use clap::{Arg, ArgAction, ArgMatches, Command};
use janus_proto::show::date;
use serde_json::json;
use zeroize::Zeroizing;

use super::{Context, Failure, Outcome, chosen, server};
use crate::{
    config::Settings,
    seal::{KeyId, Keys, MasterKey, RecoveryKey, RunSeal, SealError, Wishes},
    snapshot::Selection,
};

pub(super) const COMMAND: &str = "recover";
/// A longer input is no recovery key.
const MOST: usize = 4096;

pub(super) fn command() -> Command {
    Command::new(COMMAND)
        .about("Write this machine's key file from its recovery key, which is read from standard input")
        .arg(
            Arg::new("test")
                .long("test")
                .action(ArgAction::SetTrue)
                .help("Write nothing: say whether it is the recovery key of the key file here"),
        )
        .arg(
            Arg::new("snapshot")
                .long("snapshot")
                .value_name("DISK|USER/MACHINE[/DISK]|SNAPSHOT")
                .requires("test")
                .help("Say also whether it opens this snapshot; asks the servers"),
        )
        .arg(
            Arg::new("server")
                .long("server")
                .value_name("NAME")
                .requires("snapshot")
                .help("The snapshot on this server"),
        )
        .args(chosen::archive_arguments())
}

/// Whether servers have to be asked.
pub fn needs_server(matches: &ArgMatches) -> bool {
    matches.contains_id("snapshot")
}

/// What needs neither a server nor a certificate. Blocks until the recovery key is typed.
///
/// # Errors
/// When it is none, or the file can't be written, or is another key's.
pub fn recover(settings: &Settings, matches: &ArgMatches) -> Result<Outcome, Failure> {
    let path = settings.seal_key_path();
    let key = ask()?.master();
    if matches.get_flag("test") {
        return Ok(compared(settings, key.id())?.outcome(key.id()));
    }
    let is_here = match MasterKey::load(&path) {
        Ok(here) if here.id() == key.id() => true,
        Ok(_) => return Err(SealError::Exists(path).into()),
        Err(_) => false,
    };
    if !is_here {
        key.store_new(&path)?;
    }
    let (id, shown) = (key.id(), path.display());
    let what = if is_here { "was there already" } else { "is written" };
    let text = format!("{shown}: key {id} {what}\n");
    let json = json!({ "ok": true, "key": id.to_string(), "seal_key": path, "written": !is_here });
    Ok(Outcome { json, text })
}

/// `recover --test --snapshot`.
pub(super) async fn run(matches: &ArgMatches, context: &Context) -> Result<Outcome, Failure> {
    let what = matches.get_one::<String>("snapshot").map(String::as_str).unwrap_or_default();
    let selection = Selection::parse(what, None, None, server(matches)?)?;
    let asking = tokio::task::spawn_blocking(ask);
    let key = context.stop.run_until_cancelled(asking).await.ok_or_else(Failure::interrupted)?;
    let key = key.map_err(Failure::failed)??.master();
    let ways = context.ways_awake().await?;
    let snapshot = selection.find(&ways).await?.snapshot;
    let id = key.id();
    let settings = context.settings.clone();
    let comparing = tokio::task::spawn_blocking(move || compared(&settings, id));
    let mut compared = comparing.await.map_err(Failure::failed)??;
    let seal = RunSeal::look(&snapshot.client_seal);
    let sealed_as = seal.as_ref().map(|seal| seal.machine.clone());
    let keys = Keys::of(key, Wishes { sealed_as, ..Wishes::default() });
    let name = &snapshot.snapshot_id;
    let (opens, said) = match (keys.open(&snapshot), seal) {
        (Ok(Some(_)), Some(seal)) => {
            (true, format!("snapshot {name}: sealed with this key on {}", date(seal.taken_ms)))
        }
        (Ok(_), _) => (false, format!("snapshot {name}: is not sealed")),
        (Err(SealError::OtherKey { wanted, .. }), _) => {
            (false, format!("snapshot {name}: sealed with another key, {wanted}"))
        }
        (Err(error), _) => (false, error.to_string()),
    };
    compared.add(opens, said);
    let mut outcome = compared.outcome(id);
    outcome.json["snapshot_id"] = json!(name);
    outcome.json["opens_snapshot"] = json!(opens);
    Ok(outcome)
}

/// What a recovery key was compared with.
struct Compared {
    /// None: there is no key file.
    is_file: Option<bool>,
    is_right: bool,
    lines: Vec<String>,
}

impl Compared {
    fn add(&mut self, is_right: bool, line: String) {
        // Where there is no key file it is the snapshot that counts.
        self.is_right = is_right && self.is_file != Some(false);
        self.lines.push(line);
    }

    fn outcome(self, key: KeyId) -> Outcome {
        let text = format!("recovery key of key {key}\n{}\n", self.lines.join("\n"));
        let json = json!({
            "ok": self.is_right,
            "exit_code": u8::from(!self.is_right),
            "key": key.to_string(),
            "is_key_file": self.is_file,
        });
        Outcome { json, text }
    }
}

/// Compares with the key file.
fn compared(settings: &Settings, key: KeyId) -> Result<Compared, SealError> {
    let path = settings.seal_key_path();
    let shown = path.display();
    let (is_file, line) = match MasterKey::find(&path)? {
        Some(here) if here.id() == key => (Some(true), format!("{shown}: is this key")),
        Some(here) => (Some(false), format!("{shown}: is ANOTHER key, {}", here.id())),
        None => (None, format!("{shown}: there is no key file to compare with")),
    };
    Ok(Compared { is_file, is_right: is_file == Some(true), lines: vec![line] })
}

/// Reads the recovery key. On a terminal it is shown as it is typed: 72 letters that nobody sees are mistyped.
fn ask() -> Result<RecoveryKey, Failure> {
    let stdin = io::stdin();
    if stdin.is_terminal() {
        eprintln!("Recovery key, 9 groups of 8; lines, spaces and dashes don't matter:");
    }
    let mut text = Zeroizing::new(String::with_capacity(2 * MOST));
    let mut lines = stdin.lock();
    while !RecoveryKey::is_complete(&text) && text.len() < MOST {
        // Room for the line, so that what was read doesn't move in memory.
        let read = io::Read::take(&mut lines, MOST as u64).read_line(&mut text);
        match read {
            Ok(0) => break,
            Ok(_) => {}
            Err(error) => {
                return Err(Failure::failed(format!("the recovery key can't be read: {error}")));
            }
        }
    }
    RecoveryKey::parse(&text).map_err(|error| SealError::from(error).into())
}
