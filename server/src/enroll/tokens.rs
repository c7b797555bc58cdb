//! Tokens that were made here, in `.tokens.json` below the image path: of their secrets only digests.

use std::time::Duration;

use janus_proto::{enroll::Secret, ids::MachineKey, show::date, tls::Role};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::EnrollError;
use crate::{
    chain::store::{SmallFile, Store, StoreError},
    pki::PkiError,
    runs::now_ms,
};

const TOKENS: &str = ".tokens.json";
/// Most that are open at once.
const MOST: usize = 1000;
/// Most that are known, used ones included.
const MOST_SHOWN: usize = 5000;
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

#[derive(Debug, Clone, Default, Serialize, Deserialize)]
struct Known {
    tokens: Vec<Kept>,
}

/// The tokens of a store.
pub struct Tokens(SmallFile<Known>);

impl Tokens {
    /// Those of a store. Nothing is read yet.
    pub fn new(store: &Store) -> Self {
        Self(SmallFile::new(store, TOKENS))
    }

    /// All that are known, the newest last.
    ///
    /// # Errors
    /// When they can't be read.
    pub fn list(&self) -> Result<Vec<Kept>, StoreError> {
        Ok(self.0.lock().value()?.tokens.clone())
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
        let mut file = self.0.lock();
        let mut tokens = file.value()?.tokens.clone();
        tokens.retain(|other| {
            let is_open = other.used.is_none();
            let ended_ms = other.used.as_ref().map_or(other.expires_ms, |used| used.at_ms);
            !(is_open && other.machine == kept.machine)
                && made_ms < ended_ms.saturating_add(TOLD_MS)
        });
        // Used ones are only shown: the oldest make room.
        let excess = tokens.len().saturating_sub(MOST_SHOWN);
        tokens.drain(..excess);
        if tokens.iter().filter(|token| token.used.is_none()).count() >= MOST {
            return Err(TokenRefused::TooMany { most: MOST }.into());
        }
        tokens.push(kept);
        file.replace(Known { tokens })?;
        Ok(secret)
    }

    /// Takes an open token back; false when there is none.
    ///
    /// # Errors
    /// When that can't be written.
    pub fn cancel(&self, id: Uuid) -> Result<bool, StoreError> {
        let mut file = self.0.lock();
        let mut tokens = file.value()?.tokens.clone();
        let before = tokens.len();
        tokens.retain(|token| token.id != id || token.used.is_some());
        let is_gone = tokens.len() < before;
        file.replace(Known { tokens })?;
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
        let mut file = self.0.lock();
        let mut tokens = file.value()?.tokens.clone();
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
        file.replace(Known { tokens })?;
        tracing::info!(%machine, "machine enrolled");
        Ok(certificate)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::Disk;

    fn tokens(folder: &tempfile::TempDir) -> Tokens {
        Tokens(SmallFile::at(Disk::default(), folder.path().join(TOKENS)))
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
