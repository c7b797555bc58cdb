//! Enrolment tokens: what an administrator gives to a new machine, once.
//!
//! `janus1.<id and secret>.<fingerprint>`, the last two in base64url: the first part goes to the server that has made it,
//! the fingerprint says which authority that server must come from, before anything is sent.

use std::{fmt, str::FromStr};

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use rustls::pki_types::CertificateDer;
use sha2::{Digest, Sha256};
use uuid::Uuid;

const PREFIX: &str = "janus1";
const PART_BYTES: usize = 32;

/// SHA-256 of a certificate (DER), as `openssl x509 -fingerprint -sha256` prints it.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Fingerprint([u8; 32]);

impl Fingerprint {
    /// That of a certificate.
    pub fn of(certificate: &CertificateDer<'_>) -> Self {
        Self(Sha256::digest(certificate).into())
    }
}

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (place, byte) in self.0.iter().enumerate() {
            let colon = if place == 0 { "" } else { ":" };
            write!(f, "{colon}{byte:02X}")?;
        }
        Ok(())
    }
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Why a token isn't one. The text doesn't repeat it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "this is no enrolment token: it begins with {PREFIX}. and is what `janus-server enroll token` prints, without spaces"
)]
pub struct NoToken;

/// What the server keeps a digest of. `Debug` doesn't show it.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret {
    /// Which token it is of; no secret.
    pub id: Uuid,
    key: Uuid,
}

impl Secret {
    /// A new one: 122 bits that nobody can guess.
    pub fn random() -> Self {
        Self { id: Uuid::new_v4(), key: Uuid::new_v4() }
    }

    /// What is kept of it.
    pub fn digest(&self) -> blake3::Hash {
        blake3::hash(self.key.as_bytes())
    }

    /// As it travels.
    pub fn to_wire(&self) -> String {
        let bytes = [*self.id.as_bytes(), *self.key.as_bytes()].concat();
        format!("{PREFIX}.{}", URL_SAFE_NO_PAD.encode(bytes))
    }

    /// Reads it.
    ///
    /// # Errors
    /// When it is something else.
    pub fn from_wire(text: &str) -> Result<Self, NoToken> {
        let bytes = part(text.strip_prefix(PREFIX).and_then(|rest| rest.strip_prefix('.')))?;
        let half = |from: usize| Uuid::from_slice(&bytes[from..from + 16]).map_err(|_| NoToken);
        Ok(Self { id: half(0)?, key: half(16)? })
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Secret({})", self.id)
    }
}

/// A whole token.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Token {
    /// For the server.
    pub secret: Secret,
    /// Of the authority.
    pub authority: Fingerprint,
}

impl fmt::Display for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.secret.to_wire(), URL_SAFE_NO_PAD.encode(self.authority.0))
    }
}

impl FromStr for Token {
    type Err = NoToken;

    fn from_str(text: &str) -> Result<Self, NoToken> {
        let (secret, authority) = text.trim().rsplit_once('.').ok_or(NoToken)?;
        let authority = Fingerprint(part(Some(authority))?);
        Ok(Self { secret: Secret::from_wire(secret)?, authority })
    }
}

fn part(text: Option<&str>) -> Result<[u8; PART_BYTES], NoToken> {
    let text = text.filter(|text| text.len() < 2 * PART_BYTES).ok_or(NoToken)?;
    URL_SAFE_NO_PAD.decode(text).ok().and_then(|bytes| bytes.try_into().ok()).ok_or(NoToken)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_read_as_it_is_written_and_nothing_else_is_one() {
        let authority = Fingerprint::of(&CertificateDer::from(b"certificate".to_vec()));
        let token = Token { secret: Secret::random(), authority };
        let text = token.to_string();
        assert_eq!(format!(" {text}\n").parse(), Ok(token.clone()));
        assert_eq!(Secret::from_wire(&token.secret.to_wire()), Ok(token.secret.clone()));
        let key = text.split('.').nth(1).unwrap();
        assert!(!format!("{token:?}").contains(&key[22..]), "shown: {token:?}");
        for end in 0..text.len() {
            assert_eq!(text[..end].parse::<Token>(), Err(NoToken), "{end}");
        }
        for other in ["janus2.a.b", "janus1..", "janus1.a.b", &format!("{text}A"), &text.repeat(99)]
        {
            assert_eq!(other.parse::<Token>(), Err(NoToken), "{other}");
        }
    }
}
