//! A new authority for a group, step by step, while nothing stops: first everybody learns to believe both, then the new one
//! signs, at last the old one is forgotten.
//!
//! `ca.pem` holds all that are believed; whichever fits `ca.key` signs. Each step is one rename, so a crash leaves the one before
//! or it.

use std::{
    fs,
    path::{Path, PathBuf},
};

use clap::{Args, Subcommand};
use janus_proto::tls::ca_group;

use super::{
    Authority, KEY_MODE, PUBLIC_MODE, PkiError,
    authority::{certificates, read},
    new_authority, refuse_existing, replace, write_new,
};

const NEXT_KEY: &str = "next.key";
const OLD_KEY: &str = "old.key";

/// `janus-server pki ca …`
#[derive(Debug, Subcommand)]
pub enum CaCommand {
    /// Make a second authority that is believed beside the first and doesn't sign yet
    Rotate(Folder),
    /// Let the second authority sign; both are believed
    Switch(Folder),
    /// Believe only the authority that signs
    Retire(Folder),
}

/// Where the authority is.
#[derive(Debug, Args)]
pub struct Folder {
    /// Folder with ca.pem and ca.key.
    #[arg(long, value_name = "DIR")]
    ca: PathBuf,
}

/// Does a step, and says what is to be done before the next one.
pub(super) fn run(command: &CaCommand) -> Result<String, PkiError> {
    match command {
        CaCommand::Rotate(Folder { ca }) => rotate(ca),
        CaCommand::Switch(Folder { ca }) => switch(ca),
        CaCommand::Retire(Folder { ca }) => retire(ca),
    }
}

fn rotate(folder: &Path) -> Result<String, PkiError> {
    let bundle_path = folder.join("ca.pem");
    let group = ca_group(&bundle_path)?;
    let bundle = read(&bundle_path)?;
    if certificates(&bundle)?.len() > 1 {
        return Err(PkiError::Rotation {
            reason: "two authorities are believed already: `pki ca switch` or `pki ca retire` is next",
        });
    }
    let next_key = folder.join(NEXT_KEY);
    refuse_existing(&[&next_key])?;
    let (certificate, key) = new_authority(&group)?;
    write_new(&next_key, &key, KEY_MODE)?;
    replace(&bundle_path, &format!("{}\n{certificate}", bundle.trim_end()), PUBLIC_MODE)?;
    Ok(format!(
        "{0}/ca.pem has both authorities of group {group} now; the old one signs\n\
         next: copy {0}/ca.pem to every host (server, janus, client; SIGHUP to servers and janus). Enrolled machines get it when they\n\
         \x20     renew: wait until all have, or copy it there, or they reach nobody who has a certificate of the new one. Then:\n\
         \x20     janus-server pki ca switch --ca {0}\n",
        folder.display()
    ))
}

fn switch(folder: &Path) -> Result<String, PkiError> {
    let (key, next, old) = (folder.join("ca.key"), folder.join(NEXT_KEY), folder.join(OLD_KEY));
    if !next.exists() {
        return Err(PkiError::Rotation {
            reason: "there is no second authority: `pki ca rotate` makes one",
        });
    }
    let bundle = read(&folder.join("ca.pem"))?;
    // A crash in `rotate` can leave a key whose certificate nobody has seen.
    Authority::of(&bundle, &read(&next)?)?;
    if !old.exists() {
        write_new(&old, &read(&key)?, KEY_MODE)?;
    }
    fs::rename(&next, &key).map_err(|source| PkiError::Write { path: key, source })?;
    Ok(format!(
        "the new authority signs now; both are believed\n\
         next: issue new certificates for servers, janus and operators (pki issue … into new folders; SIGHUP), wait until enrolled\n\
         \x20     machines have renewed theirs, then: janus-server pki ca retire --ca {}\n",
        folder.display()
    ))
}

fn retire(folder: &Path) -> Result<String, PkiError> {
    if folder.join(NEXT_KEY).exists() {
        return Err(PkiError::Rotation {
            reason: "the second authority doesn't sign yet: `pki ca switch` is next",
        });
    }
    let path = folder.join("ca.pem");
    let authority = Authority::open(folder)?;
    if certificates(authority.bundle())?.len() < 2 {
        return Err(PkiError::Rotation { reason: "only one authority is believed already" });
    }
    replace(&path, &authority.certificate_pem(), PUBLIC_MODE)?;
    let old = folder.join(OLD_KEY);
    if old.exists() {
        fs::remove_file(&old).map_err(|source| PkiError::Write { path: old, source })?;
    }
    Ok(format!(
        "the old authority is believed no more, and its key is gone\n\
         next: copy {}/ca.pem to every host, and SIGHUP to servers and janus. Certificates of the old one are refused then\n",
        folder.display()
    ))
}
