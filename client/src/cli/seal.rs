//! `janus-client seal init|show`: the key that this machine's backups are sealed with.

use clap::{Arg, ArgMatches, Command};
use serde_json::json;

use super::{Failure, Outcome};
use crate::{
    config::{Encryption, Settings},
    seal::{self, MasterKey},
};

pub(super) fn command() -> Command {
    Command::new("seal")
        .about("Make the key that this machine's backups are sealed with, or show which it is")
        .arg(
            Arg::new("action")
                .required(true)
                .value_parser(["init", "show"])
                .help("init: make it, and print its recovery key, once"),
        )
}

/// Needs neither a server nor a certificate. Blocks.
///
/// # Errors
/// When there is a key already, or none, or it can't be used.
pub fn seal(settings: &Settings, matches: &ArgMatches) -> Result<Outcome, Failure> {
    let path = settings.seal_key_path();
    let shown = path.display();
    let is_sealing = settings.encryption == Encryption::Client;
    if matches.get_one::<String>("action").is_some_and(|action| action == "show") {
        let id = MasterKey::load(&path)?.id();
        let used = if is_sealing {
            "backups are sealed with it"
        } else {
            "encryption = \"none\": backups are not sealed"
        };
        let text = format!("{shown}: key {id}; {used}\n");
        let json =
            json!({ "ok": true, "key": id.to_string(), "seal_key": path, "sealing": is_sealing });
        return Ok(Outcome { json, text });
    }
    make(settings)
}

/// Makes the key, and shows its recovery key.
pub(super) fn make(settings: &Settings) -> Result<Outcome, Failure> {
    let path = settings.seal_key_path();
    let shown = path.display();
    let is_sealing = settings.encryption == Encryption::Client;
    let key = seal::init(&path)?;
    let (id, recovery) = (key.id(), key.recovery().shown());
    let next = match is_sealing {
        true => "The next backup is sealed with it, and sends all of each disk.",
        false => {
            "Set encryption = \"client\" in the settings: the next backup is then sealed with it, and sends all of each disk."
        }
    };
    let text = format!(
        "key {id} is in {shown}

RECOVERY KEY of {id}, shown only now:

{}

Write it down or print it, and keep it elsewhere: not on this machine, and not only on a server that has its backups.
If this machine is lost, it is the only way to its backups. Who loses both the file and the recovery key loses all sealed
backups: nobody can open them. Who has either can read them.

Test what you wrote down: janus-client recover --test
{next}
",
        indented(&recovery),
    );
    let json =
        json!({ "ok": true, "key": id.to_string(), "seal_key": path, "recovery_key": *recovery });
    Ok(Outcome { json, text })
}

fn indented(text: &str) -> String {
    text.lines().map(|line| format!("    {line}")).collect::<Vec<_>>().join("\n")
}
