//! Tokens that were made here, in `.tokens.json` below the image path: of their secrets only digests.

use std::{
    path::PathBuf,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use janus_proto::{enroll::Secret, ids::MachineKey, show::date, tls::Role};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::EnrollError;
use crate::{
    chain::{
        FORMAT,
        store::{Store, StoreError, read_or_put_aside, write},
    },
    pki::PkiError,
    runs::now_ms,
    storage::Disk,
};

const TOKENS: &str = ".tokens.json";
/// Most that are known at once.
const MOST: usize = 1000;
/// Used and expired ones are told about for so long.
const TOLD_MS: i64 = 7 * 24 * 60 * 60 * 1000;

/// Why a token brings no certificate.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TokenRefused {
    /// No such token. Whoever guesses learns no more.
    #[error("this server doesn't know the token; `janus-server enroll token` makes one")]
    Unknown,
    /// Its time is over.
    #[error(
        "the token for {machine} has expired on {when}; `janus-server enroll token` makes another"
    )]
    Expired {
        /// Whose it is.
        machine: MachineKey,
        /// The end.
        when: String,
    },
    /// Somebody else has got the certificate.
    #[error(
        "the token for {machine} was used on {when}: each is good once. If that wasn't you, revoke the machine: janus-server pki revoke --machine {machine}"
    )]
    Used {
        /// Whose it is.
        machine: MachineKey,
        /// When.
        when: String,
    },
    /// Too many wait.
    #[error("{most} tokens are open: cancel some first (janus-server enroll list)")]
    TooMany {
        /// The limit.
        most: usize,
    },
}

/// One token, as it is kept.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Kept {
    /// Names it.
    pub id: Uuid,
    /// BLAKE3 of its secret, in hexadecimal.
    digest: String,
    /// For this machine.
    pub machine: MachineKey,
    /// Unix milliseconds.
    pub made_ms: i64,
    /// Unix milliseconds.
    pub expires_ms: i64,
    /// What it has brought.
    pub used: Option<Used>,
}

/// The certificate that a token has brought.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Used {
    /// Unix milliseconds.
    pub at_ms: i64,
    /// BLAKE3 of the key (SubjectPublicKeyInfo's bits), in hexadecimal.
    key: String,
    certificate: String,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
struct TokensFile {
    format: u32,
    tokens: Vec<Kept>,
}

/// The tokens of a store.
pub struct Tokens {
    storage: Disk,
    path: PathBuf,
    /// As it is on the disk; `None`: not read yet.
    file: Mutex<Option<TokensFile>>,
}

impl Tokens {
    /// Those of a store. Nothing is read yet.
    pub fn new(store: &Store) -> Self {
        let (storage, path) = (store.storage().clone(), store.root().join(TOKENS));
        Self { storage, path, file: Mutex::default() }
    }

    /// All that are known, the newest last.
    ///
    /// # Errors
    /// When they can't be read.
    pub fn list(&self) -> Result<Vec<Kept>, StoreError> {
        Ok(self.read(&mut self.lock())?.tokens.clone())
    }

    /// Makes a token for a machine. Others that are still open for it are of no use any more.
    ///
    /// # Errors
    /// When it can't be kept, or too many are.
    pub fn make(&self, machine: MachineKey, valid: Duration) -> Result<Secret, EnrollError> {
        let (secret, made_ms) = (Secret::random(), now_ms());
        let valid_ms = i64::try_from(valid.as_millis()).unwrap_or(i64::MAX);
        let kept = Kept {
            id: secret.id,
            digest: secret.digest().to_hex().to_string(),
            machine,
            made_ms,
            expires_ms: made_ms.saturating_add(valid_ms),
            used: None,
        };
        let mut file = self.lock();
        let mut tokens = self.read(&mut file)?.tokens.clone();
        tokens.retain(|other| {
            let is_open = other.used.is_none();
            let ended_ms = other.used.as_ref().map_or(other.expires_ms, |used| used.at_ms);
            !(is_open && other.machine == kept.machine)
                && made_ms < ended_ms.saturating_add(TOLD_MS)
        });
        if tokens.len() >= MOST {
            return Err(TokenRefused::TooMany { most: MOST }.into());
        }
        tokens.push(kept);
        self.replace(&mut file, tokens)?;
        Ok(secret)
    }

    /// Takes an open token back; false when there is none.
    ///
    /// # Errors
    /// When that can't be written.
    pub fn cancel(&self, id: Uuid) -> Result<bool, StoreError> {
        let mut file = self.lock();
        let mut tokens = self.read(&mut file)?.tokens.clone();
        let before = tokens.len();
        tokens.retain(|token| token.id != id || token.used.is_some());
        let is_gone = tokens.len() < before;
        self.replace(&mut file, tokens)?;
        Ok(is_gone)
    }

    /// Uses a token for a key: `certify` makes the certificate, unless this key has got it already.
    ///
    /// # Errors
    /// When the token is none, or the certificate can't be made or kept.
    pub(super) fn take(
        &self,
        secret: &Secret,
        key: blake3::Hash,
        certify: impl FnOnce(Role) -> Result<String, PkiError>,
    ) -> Result<String, EnrollError> {
        let mut file = self.lock();
        let mut tokens = self.read(&mut file)?.tokens.clone();
        let digest = secret.digest();
        // Hashes compare in constant time.
        let is_it = |kept: &&mut Kept| {
            kept.id == secret.id && blake3::Hash::from_hex(&kept.digest).is_ok_and(|h| h == digest)
        };
        let kept = tokens.iter_mut().find(is_it).ok_or(TokenRefused::Unknown)?;
        let (machine, now) = (kept.machine.clone(), now_ms());
        if let Some(used) = &kept.used {
            return match used.key == key.to_hex().as_str() {
                true => Ok(used.certificate.clone()),
                false => Err(TokenRefused::Used { machine, when: date(used.at_ms) }.into()),
            };
        }
        if now >= kept.expires_ms {
            return Err(TokenRefused::Expired { machine, when: date(kept.expires_ms) }.into());
        }
        let certificate = certify(Role::Client(machine.clone()))?;
        let key = key.to_hex().to_string();
        kept.used = Some(Used { at_ms: now, key, certificate: certificate.clone() });
        self.replace(&mut file, tokens)?;
        tracing::info!(%machine, "machine enrolled");
        Ok(certificate)
    }

    fn lock(&self) -> MutexGuard<'_, Option<TokensFile>> {
        self.file.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn read<'f>(&self, file: &'f mut Option<TokensFile>) -> Result<&'f TokensFile, StoreError> {
        match file {
            Some(file) => Ok(file),
            unread => {
                let known = read_or_put_aside(&self.storage, &self.path)?;
                Ok(unread
                    .insert(known.unwrap_or(TokensFile { format: FORMAT, tokens: Vec::new() })))
            }
        }
    }

    /// What stood there stays when the new list can't be written.
    fn replace(&self, file: &mut Option<TokensFile>, tokens: Vec<Kept>) -> Result<(), StoreError> {
        let new = TokensFile { format: FORMAT, tokens };
        write(&self.storage, &self.path, &new)?;
        *file = Some(new);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tokens(folder: &tempfile::TempDir) -> Tokens {
        let (storage, path) = (Disk::default(), folder.path().join(TOKENS));
        Tokens { storage, path, file: Mutex::default() }
    }

    fn machine() -> MachineKey {
        "alice/web1".parse().unwrap()
    }

    const HOUR: Duration = Duration::from_secs(3600);

    #[test]
    fn one_key_gets_one_certificate_also_after_a_restart() {
        let folder = tempfile::tempdir().unwrap();
        let secret = tokens(&folder).make(machine(), HOUR).unwrap();
        let (one, other) = (blake3::hash(b"one"), blake3::hash(b"other"));
        let take = |key, text: &str| {
            let made = text.to_owned();
            tokens(&folder).take(&secret, key, |role| {
                assert_eq!(role, Role::Client(machine()));
                Ok(made)
            })
        };
        assert_eq!(take(one, "first").unwrap(), "first");
        assert_eq!(take(one, "second").unwrap(), "first");
        let used = take(other, "third").unwrap_err();
        assert!(matches!(used, EnrollError::Token(TokenRefused::Used { .. })), "{used}");
        let stored = std::fs::read_to_string(folder.path().join(TOKENS)).unwrap();
        let key = secret.to_wire();
        assert!(!stored.contains(&key[key.len() - 16..]));
    }

    #[test]
    fn expired_cancelled_replaced_and_unknown_ones_bring_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let tokens = tokens(&folder);
        let none = |secret: &Secret| {
            tokens.take(secret, blake3::hash(b"key"), |_| panic!("certified")).unwrap_err()
        };
        let expired = tokens.make(machine(), Duration::ZERO).unwrap();
        let why = none(&expired);
        assert!(matches!(why, EnrollError::Token(TokenRefused::Expired { .. })), "{why}");
        let replaced = tokens.make("alice/web2".parse().unwrap(), HOUR).unwrap();
        let cancelled = tokens.make("alice/web2".parse().unwrap(), HOUR).unwrap();
        assert!(tokens.cancel(cancelled.id).unwrap());
        assert!(!tokens.cancel(cancelled.id).unwrap());
        for secret in [&replaced, &cancelled, &Secret::random()] {
            let why = none(secret);
            assert!(matches!(why, EnrollError::Token(TokenRefused::Unknown)), "{why}");
        }
        // A certificate that can't be made uses nothing up.
        let open = tokens.make(machine(), HOUR).unwrap();
        let broken = || PkiError::Bundle { reason: "test".into() };
        tokens.take(&open, blake3::hash(b"a"), |_| Err(broken())).unwrap_err();
        tokens.take(&open, blake3::hash(b"b"), |_| Ok("made".into())).unwrap();
    }
}
