//! A new authority for a group, step by step, while nothing stops: first everybody learns to believe both, then the new one
//! signs, at last the old one is forgotten.
//!
//! `ca.pem` holds all that are believed; whichever fits `ca.key` signs. Each step is one rename, so a crash leaves the one before
//! or it, and perhaps a key that counts for nothing: a `next.key` whose certificate isn't in `ca.pem`, an `old.key` of none that
//! is. The step that was stopped is done again, and takes no notice of it.

use std::{
    fs,
    path::{Path, PathBuf},
};

use clap::{Args, Subcommand};
use janus_proto::tls::ca_group;
use zeroize::Zeroizing;

use super::{
    Authority, KEY_MODE, PUBLIC_MODE, PkiError,
    authority::{certificates, read},
    new_authority, replace,
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
    let (certificate, key) = new_authority(&group)?;
    replace(&folder.join(NEXT_KEY), &key, KEY_MODE)?;
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
    let next_text = Zeroizing::new(read(&next)?);
    if certificates(&bundle)?.len() < 2 || Authority::of(&bundle, &next_text).is_err() {
        return Err(PkiError::Rotation {
            reason: "next.key fits no certificate in ca.pem, as a `pki ca rotate` leaves it that was stopped: do that again",
        });
    }
    replace(&old, &Zeroizing::new(read(&key)?), KEY_MODE)?;
    fs::rename(&next, &key).map_err(|source| PkiError::Write { path: key, source })?;
    Ok(format!(
        "the new authority signs now; both are believed\n\
         next: issue new certificates for servers, janus and operators (pki issue … into new folders; SIGHUP), wait until enrolled\n\
         \x20     machines have renewed theirs, then: janus-server pki ca retire --ca {}\n",
        folder.display()
    ))
}

fn retire(folder: &Path) -> Result<String, PkiError> {
    let path = folder.join("ca.pem");
    let authority = Authority::open(folder)?;
    let (next, old) = (folder.join(NEXT_KEY), folder.join(OLD_KEY));
    if certificates(authority.bundle())?.len() > 1 {
        if next.exists() {
            return Err(PkiError::Rotation {
                reason: "the second authority doesn't sign yet: `pki ca switch` is next",
            });
        }
        replace(&path, &authority.certificate_pem(), PUBLIC_MODE)?;
    } else if !old.exists() {
        return Err(PkiError::Rotation { reason: "only one authority is believed already" });
    }
    if old.exists() {
        fs::remove_file(&old).map_err(|source| PkiError::Write { path: old, source })?;
    }
    Ok(format!(
        "the old authority is believed no more, and its key is gone\n\
         next: copy {}/ca.pem to every host, and SIGHUP to servers and janus. Certificates of the old one are refused then\n",
        folder.display()
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pki::init;

    fn ca() -> (tempfile::TempDir, PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let ca = folder.path().join("ca");
        init(&ca, "home").unwrap();
        (folder, ca)
    }

    fn count(ca: &Path) -> usize {
        certificates(&read(&ca.join("ca.pem")).unwrap()).unwrap().len()
    }

    fn refused(step: Result<String, PkiError>) -> String {
        step.unwrap_err().to_string()
    }

    #[test]
    fn a_rotation_that_was_stopped_before_its_certificate_was_there_is_done_again() {
        let (_folder, ca) = ca();
        let before = read(&ca.join("ca.pem")).unwrap();
        rotate(&ca).unwrap();
        // The crash: the key is there, and ca.pem as it was.
        fs::write(ca.join("ca.pem"), before).unwrap();
        assert!(refused(switch(&ca)).contains("do that again"));
        assert!(refused(retire(&ca)).contains("only one authority"));
        rotate(&ca).unwrap();
        switch(&ca).unwrap();
        retire(&ca).unwrap();
        assert_eq!(count(&ca), 1);
    }

    #[test]
    fn a_torn_key_is_no_authority() {
        let (_folder, ca) = ca();
        rotate(&ca).unwrap();
        let key = read(&ca.join(NEXT_KEY)).unwrap();
        fs::write(ca.join(NEXT_KEY), &key[..key.len() / 2]).unwrap();
        assert!(refused(switch(&ca)).contains("do that again"));
        assert!(Authority::open(&ca).is_ok());
    }

    #[test]
    fn a_switch_that_was_stopped_between_its_keys_is_done_again() {
        let (_folder, ca) = ca();
        rotate(&ca).unwrap();
        // Left by a rotation long ago, or torn.
        fs::write(ca.join(OLD_KEY), "torn").unwrap();
        let signed = read(&ca.join("ca.key")).unwrap();
        switch(&ca).unwrap();
        assert_eq!(read(&ca.join(OLD_KEY)).unwrap(), signed);
    }

    #[test]
    fn a_retirement_that_was_stopped_before_the_old_key_was_gone_is_done_again() {
        let (_folder, ca) = ca();
        rotate(&ca).unwrap();
        switch(&ca).unwrap();
        let old = read(&ca.join(OLD_KEY)).unwrap();
        retire(&ca).unwrap();
        fs::write(ca.join(OLD_KEY), old).unwrap();
        retire(&ca).unwrap();
        assert!(!ca.join(OLD_KEY).exists());
        assert!(refused(retire(&ca)).contains("only one authority"));
    }
}
