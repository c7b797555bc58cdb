//! `janus-server enroll`: tokens for new machines.

use std::time::Duration;

use clap::Subcommand;
use janus_proto::{
    enroll::{Fingerprint, Token},
    ids::MachineKey,
    show::date,
};
use serde::{Deserialize, Serialize};
use serde_json::json;
use uuid::Uuid;

use super::{Admin, AdminError, Answer, table::table};
use crate::{enroll::tokens::Kept, pki::Authority, runs::now_ms};

/// What to do.
#[derive(Debug, Clone, PartialEq, Eq, Subcommand, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Action {
    /// Make a token: good once, for one machine; it replaces an open one of this machine
    Token {
        /// The machine's name
        #[arg(long)]
        machine: String,
        /// The user it belongs to
        #[arg(long)]
        user: String,
        /// It is good for so long
        #[arg(long, default_value_t = 24, value_parser = clap::value_parser!(u32).range(1..=8760))]
        hours: u32,
    },
    /// Show tokens: open, used and expired ones of the last seven days
    List,
    /// Take an open token back
    Cancel {
        /// As `enroll list` shows it
        id: Uuid,
    },
}

pub(super) fn run(admin: &Admin, action: &Action) -> Result<Answer, AdminError> {
    match action {
        Action::Token { machine, user, hours } => {
            make(admin, MachineKey::new(user, machine)?, *hours)
        }
        Action::List => list(&admin.tokens().list()?),
        Action::Cancel { id } => match admin.tokens().cancel(*id)? {
            true => Ok(Answer::new(format!("{id} is of no use any more\n"), json!({ "id": id }))),
            false => Err(AdminError::UnknownToken { id: *id }),
        },
    }
}

fn make(admin: &Admin, machine: MachineKey, hours: u32) -> Result<Answer, AdminError> {
    let settings = &admin.settings().enroll;
    if settings.listen.is_empty() {
        return Err(AdminError::NoEnrollment);
    }
    // Machines could do nothing with a token whose authority can't sign.
    Authority::open(&settings.ca)?;
    // While there are two, the one that this server can show itself to be of.
    let authority = admin.identity()?.authority().ok_or(AdminError::NoAuthority)?;
    let fingerprint = Fingerprint::of(&authority);
    let valid = Duration::from_secs(u64::from(hours) * 60 * 60);
    let secret = admin.tokens().make(machine.clone(), valid)?;
    let id = secret.id;
    let token = Token { secret, authority: fingerprint }.to_string();
    let port = settings.listen.rsplit_once(':').map_or("", |(_, port)| port);
    let text = format!(
        "{token}\n\nfor machine {machine}, good once, for {hours} h. On that machine, as root, with a name of this server:\n\
         \x20 janus-client enroll https://HOST:{port} TOKEN --out /etc/janus/client --write-settings /etc/janus/client.toml\n"
    );
    let told = json!({
        "id": id,
        "token": token,
        "machine": machine.to_string(),
        "hours": hours,
        "authority_sha256": fingerprint.to_string(),
        "port": port,
    });
    Ok(Answer::new(text, told))
}

fn list(tokens: &[Kept]) -> Result<Answer, AdminError> {
    let now = now_ms();
    let state = |token: &Kept| match &token.used {
        Some(used) => format!("used {}", date(used.at_ms)),
        None if now >= token.expires_ms => "expired".to_owned(),
        None => "open".to_owned(),
    };
    let mut rows = vec![["TOKEN", "MACHINE", "MADE", "UNTIL", "STATE"].map(str::to_owned).to_vec()];
    rows.extend(tokens.iter().map(|token| {
        let id = token.id.to_string();
        let (made, until) = (date(token.made_ms), date(token.expires_ms));
        vec![id, token.machine.to_string(), made, until, state(token)]
    }));
    let text = match tokens {
        [] => "no tokens\n".to_owned(),
        _ => table(&rows),
    };
    let all: Vec<_> = tokens
        .iter()
        .map(|token| {
            json!({
                "id": token.id,
                "machine": token.machine.to_string(),
                "made_ms": token.made_ms,
                "expires_ms": token.expires_ms,
                "used_ms": token.used.as_ref().map(|used| used.at_ms),
                "state": state(token),
            })
        })
        .collect();
    Ok(Answer::new(text, json!({ "tokens": all })))
}
