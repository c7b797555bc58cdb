//! Revocations: certificates that are no longer believed, by principal and time of issue.
//!
//! A revocation names a principal and a moment: all its certificates issued until then are refused, at new connections and
//! in what a janus forwards, and its open connections and calls end. A certificate made later is believed again, so that a machine
//! whose key was stolen goes on under its name with a new one. Revocations only ever grow: of two for one principal the
//! later counts, in whatever order they come. Each is signed by the server that made it, so that nobody between servers can
//! make one.
//!
//! Our certificates say when they were issued in their serial number, which is a UUIDv7 (RFC 9562, section 5.7); of
//! others, such as those that a rule of `[pki]` is for, the beginning of the validity counts.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, Mutex, PoisonError, RwLock},
};

use base64::{Engine, engine::general_purpose::STANDARD};
use prost::Message;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::{
    clock::unix_ms,
    metadata, pb, proof,
    tls::{Identity, Principal, Role, TlsError, validity},
};

/// A revocation may lie this far ahead: that of a server whose clock is early.
const AHEAD_SECONDS: i64 = 24 * 60 * 60;
/// But it refuses no certificate that was issued so long after it was heard of: whoever holds the key of a server can't lock
/// others out for longer.
const GRACE_SECONDS: i64 = 60 * 60;
/// Most that are known, and most of them that one server has signed: one whose key is stolen leaves places to the others.
const MOST: usize = 100_000;
const MOST_OF_ONE: usize = MOST / 2;
/// In one message: far below the message limit.
const A_MESSAGE: usize = 1000;
const A_MESSAGE_BYTES: usize = 1 << 20;
/// Longest URI and certificate of a signer that are looked at, in bytes.
const MAX_PRINCIPAL: usize = 512;
const MAX_SIGNER: usize = 8192;

/// One revocation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Revocation {
    /// URI of the principal.
    pub principal: String,
    /// Unix seconds: certificates issued until then are refused.
    pub until: i64,
    /// Unix seconds at which it was heard of here; 0: it was made here.
    heard: i64,
    /// Who made it, or has signed it anew. Shared by all that one has signed.
    signer: Arc<Signer>,
    scheme: u16,
    /// Base64.
    signature: String,
}

/// Certificate of a server that has signed revocations.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
struct Signer {
    /// DER, base64.
    certificate: String,
    /// Those between it and its authority, as `metadata` writes them.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    intermediates: String,
}

/// Why a revocation isn't believed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RevocationRefused {
    /// It isn't one.
    #[error("a revocation has an invalid {0}")]
    Form(&'static str),
    /// It lies too far ahead.
    #[error("the revocation of {0} lies more than a day ahead: compare the clocks of the servers")]
    Ahead(String),
    /// Not signed by a server.
    #[error("the revocation of {principal} isn't signed by a server of this group: {reason}")]
    Signer {
        /// Whom it is to revoke.
        principal: String,
        /// What is wrong.
        reason: String,
    },
    /// There is no place for more.
    #[error("{MOST} principals are revoked already, or {MOST_OF_ONE} of them by one server")]
    TooMany,
}

/// Revocations as they are kept: the certificate of each signer once.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Kept {
    signers: Vec<Signer>,
    revocations: Vec<KeptOne>,
}

#[derive(Debug, Serialize, Deserialize)]
struct KeptOne {
    principal: String,
    until: i64,
    heard: i64,
    /// Place among the signers.
    signer: usize,
    scheme: u16,
    signature: String,
}

impl Kept {
    /// These, to be kept.
    pub fn of(revocations: &[Revocation]) -> Self {
        let mut kept = Self::default();
        let mut places: HashMap<&Signer, usize> = HashMap::new();
        for one in revocations {
            let Revocation { principal, until, heard, scheme, signature, .. } = one.clone();
            let signer = *places.entry(&one.signer).or_insert_with(|| {
                kept.signers.push((*one.signer).clone());
                kept.signers.len() - 1
            });
            kept.revocations.push(KeptOne { principal, until, heard, signer, scheme, signature });
        }
        kept
    }

    /// Those that were kept.
    pub fn into_revocations(self) -> Vec<Revocation> {
        let signers: Vec<Arc<Signer>> = self.signers.into_iter().map(Arc::from).collect();
        let one = |KeptOne { principal, until, heard, signer, scheme, signature }| {
            let signer = signers.get(signer)?.clone();
            Some(Revocation { principal, until, heard, signer, scheme, signature })
        };
        self.revocations.into_iter().filter_map(one).collect()
    }
}

impl Revocation {
    fn text(principal: &str, until: i64) -> String {
        format!("janus-revocation 1\n{principal}\n{until}\n")
    }

    /// Role of the principal, as its URI names it.
    fn role(&self) -> &str {
        self.principal.split('/').nth(3).unwrap_or_default()
    }

    /// True when a server was revoked, so that what it had signed is to be [signed anew](Identity::signed_anew).
    pub fn is_of_server(&self) -> bool {
        self.role() == "server"
    }

    /// Until when certificates are refused.
    fn refuses_until(&self) -> i64 {
        match self.heard {
            0 => self.until,
            heard => self.until.min(heard.saturating_add(GRACE_SECONDS)),
        }
    }

    /// As it travels.
    pub fn to_wire(&self) -> pb::Revocation {
        pb::Revocation {
            principal: self.principal.clone(),
            until_seconds: self.until,
            signer: STANDARD.decode(&self.signer.certificate).unwrap_or_default().into(),
            intermediates: match self.signer.intermediates.as_str() {
                "" => Vec::new(),
                text => metadata::certificates_of_text(text.as_bytes()).unwrap_or_default(),
            },
            scheme: self.scheme.into(),
            signature: STANDARD.decode(&self.signature).unwrap_or_default().into(),
        }
    }
}

impl Identity {
    /// Revokes what was issued for a principal (its URI) until now. The caller keeps and inserts it; `None`: our key can't sign.
    pub fn revoke(&self, principal: String) -> Option<Revocation> {
        self.revocation(principal, unix_ms() / 1000, 0)
    }

    fn revocation(&self, principal: String, until: i64, heard: i64) -> Option<Revocation> {
        let text = Revocation::text(&principal, until);
        let (by, scheme, signature) = self.sign(text.as_bytes())?;
        let certificate = STANDARD.encode(&by.der);
        let intermediates = metadata::certificates_to_text(&by.intermediates);
        let signer = Arc::new(Signer { certificate, intermediates });
        let signature = STANDARD.encode(signature);
        Some(Revocation { principal, until, heard, signer, scheme, signature })
    }

    /// Those that we know and whose signers aren't believed any more, signed by us: they were believed when they came, and others
    /// who hear of them now are to believe them, too. Blocks: certificates are checked.
    pub fn signed_anew(&self) -> Vec<Revocation> {
        let mut signers = HashMap::new();
        let all = self.revocations().all().into_iter();
        let lost = all.filter(|one| !self.believes(one, &mut signers));
        lost.filter_map(|one| self.revocation(one.principal, one.until, one.heard)).collect()
    }

    /// True when its signer is a server that we believe. `signers` remembers.
    fn believes(&self, known: &Revocation, signers: &mut HashMap<Arc<Signer>, bool>) -> bool {
        let check = || {
            let pb::Revocation { signer, intermediates, .. } = known.to_wire();
            let by = self.verify_at(&signer, &intermediates, known.until);
            by.is_ok_and(|by| matches!(by.role, Role::Server(_)))
        };
        *signers.entry(known.signer.clone()).or_insert_with(check)
    }

    /// What is news of what came from elsewhere. One that isn't believed is handed to `refused`, the others count. Blocks: signatures
    /// are checked.
    pub fn news(
        &self,
        told: &[pb::Revocation],
        refused: impl Fn(&RevocationRefused),
    ) -> Vec<Revocation> {
        let mut signers = HashMap::new();
        let is_news = |one: &&pb::Revocation| match self.revocations().known(&one.principal) {
            None => true,
            // The same once more counts where its signer will be believed for longer: after a new authority has come, programs
            // learn of it in any order.
            Some(known) if known.until == one.until_seconds => {
                is_newer(&one.signer, &known.signer.certificate)
                    || !self.believes(&known, &mut signers)
            }
            Some(known) => known.until < one.until_seconds,
        };
        let news = told.iter().filter(is_news);
        news.filter_map(|one| self.believed(one).inspect_err(&refused).ok()).collect()
    }

    /// Checks what came from elsewhere.
    ///
    /// # Errors
    /// When no server of our group made it.
    pub fn believed(&self, wire: &pb::Revocation) -> Result<Revocation, RevocationRefused> {
        let pb::Revocation { principal, until_seconds: until, signer, scheme, signature, .. } =
            wire;
        let between = &wire.intermediates;
        if principal.len() > MAX_PRINCIPAL || !principal.starts_with("janus://") {
            return Err(RevocationRefused::Form("principal"));
        }
        let bytes = between.iter().map(bytes::Bytes::len).sum::<usize>();
        if signer.len().max(signature.len()) > MAX_SIGNER || bytes > 2 * MAX_SIGNER {
            return Err(RevocationRefused::Form("signer"));
        }
        let scheme = u16::try_from(*scheme).map_err(|_| RevocationRefused::Form("scheme"))?;
        if *until > (unix_ms() / 1000).saturating_add(AHEAD_SECONDS) {
            return Err(RevocationRefused::Ahead(principal.clone()));
        }
        let not_signed =
            |reason: String| RevocationRefused::Signer { principal: principal.clone(), reason };
        // When it was made the certificate was good; since then it may have expired.
        let by = self
            .verify_at(signer, between, *until)
            .map_err(|error: TlsError| not_signed(error.to_string()))?;
        if !matches!(by.role, Role::Server(_)) {
            return Err(not_signed(format!("it is signed by {by}")));
        }
        let text = Revocation::text(principal, *until);
        if !proof::verify(signer, text.as_bytes(), scheme, signature) {
            return Err(not_signed("the signature is wrong".into()));
        }
        Ok(Revocation {
            principal: principal.clone(),
            until: *until,
            heard: unix_ms() / 1000,
            signer: Arc::new(Signer {
                certificate: STANDARD.encode(signer),
                intermediates: metadata::certificates_to_text(between),
            }),
            scheme,
            signature: STANDARD.encode(signature),
        })
    }
}

/// True when a signer's certificate (DER) begins later than a known one (base64).
fn is_newer(signer: &[u8], known: &str) -> bool {
    let known = STANDARD.decode(known).unwrap_or_default();
    if known == signer || signer.len() > MAX_SIGNER {
        return false;
    }
    validity(signer).0 > validity(&known).0
}

/// All that are known. Cheap to clone; clones share them.
#[derive(Debug, Clone)]
pub struct Revocations(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    known: RwLock<BTreeMap<String, Revocation>>,
    /// Ends what a principal has open.
    open: Mutex<HashMap<String, CancellationToken>>,
    changes: watch::Sender<u64>,
}

impl Default for Revocations {
    fn default() -> Self {
        let changes = watch::Sender::new(0);
        Self(Arc::new(Inner { known: RwLock::default(), open: Mutex::default(), changes }))
    }
}

impl Revocations {
    /// Those known, by principal.
    pub fn all(&self) -> Vec<Revocation> {
        let known = self.0.known.read().unwrap_or_else(PoisonError::into_inner);
        known.values().cloned().collect()
    }

    /// Those of servers and janus, whom clients connect to, as they travel; the latest, if there are too many for a message.
    pub fn of_peers(&self) -> Vec<pb::Revocation> {
        let mut peers = self.all();
        peers.retain(|one| matches!(one.role(), "server" | "janus"));
        peers.sort_by_key(|one| std::cmp::Reverse(one.until));
        peers.iter().take(A_MESSAGE).map(Revocation::to_wire).collect()
    }

    /// The same as they travel, in messages.
    pub fn messages(&self) -> Vec<Vec<pb::Revocation>> {
        let mut messages: Vec<Vec<pb::Revocation>> = Vec::new();
        let mut bytes = 0;
        for one in self.all().iter().map(Revocation::to_wire) {
            let more = one.encoded_len();
            match messages.last_mut() {
                Some(last) if last.len() < A_MESSAGE && bytes + more <= A_MESSAGE_BYTES => {
                    last.push(one);
                    bytes += more;
                }
                _ => {
                    messages.push(vec![one]);
                    bytes = more;
                }
            }
        }
        messages
    }

    fn known(&self, principal: &str) -> Option<Revocation> {
        let known = self.0.known.read().unwrap_or_else(PoisonError::into_inner);
        known.get(principal).cloned()
    }

    /// Unix seconds until which certificates of this principal are refused, if this one is.
    pub fn refuses(&self, principal: &Principal) -> Option<i64> {
        let known = self.0.known.read().unwrap_or_else(PoisonError::into_inner);
        let until = known.get(&principal.uri())?.refuses_until();
        (principal.issued() <= until).then_some(until)
    }

    /// Cancelled when the principal is revoked: at once when it is.
    pub fn end_of(&self, principal: &Principal) -> CancellationToken {
        let mut open = self.0.open.lock().unwrap_or_else(PoisonError::into_inner);
        let token = open.entry(principal.uri()).or_default().clone();
        drop(open);
        // Looked at after the token is there: a revocation in between has cancelled it.
        if self.refuses(principal).is_some() {
            let ended = CancellationToken::new();
            ended.cancel();
            return ended;
        }
        token
    }

    /// Counts up when there are more.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.0.changes.subscribe()
    }

    /// Names all that is known: equal where the same is.
    pub fn digest(&self) -> String {
        let known = self.0.known.read().unwrap_or_else(PoisonError::into_inner);
        let mut hasher = blake3::Hasher::new();
        for Revocation { principal, until, .. } in known.values() {
            hasher.update(Revocation::text(principal, *until).as_bytes());
        }
        hasher.finalize().to_hex().to_string()
    }

    /// Takes these in, and ends what their principals have open. They were made here, or [`believed`](Identity::believed).
    ///
    /// # Errors
    /// When there is no place for them all; some may be in then.
    pub fn insert(
        &self,
        more: impl IntoIterator<Item = Revocation>,
    ) -> Result<(), RevocationRefused> {
        let mut ended = Vec::new();
        let mut is_signed_anew = false;
        let mut known = self.0.known.write().unwrap_or_else(PoisonError::into_inner);
        // Those of one signer share it: few of them, with how many each has signed.
        let mut signers: HashMap<*const Signer, (Arc<Signer>, usize)> = HashMap::new();
        for Revocation { signer, .. } in known.values() {
            signers.entry(Arc::as_ptr(signer)).or_insert_with(|| (signer.clone(), 0)).1 += 1;
        }
        let mut signers: Vec<_> = signers.into_values().collect();
        let mut is_full = false;
        for mut one in more {
            let before = known.get(&one.principal);
            // The same once more comes from a signer who is believed still.
            let is_same = before.is_some_and(|before| before.until == one.until);
            if before.is_some_and(|before| before.until > one.until || *before == one) {
                continue;
            }
            let place = signers.iter().position(|(signer, _)| *signer == one.signer);
            let place = place.unwrap_or_else(|| {
                signers.push((one.signer.clone(), 0));
                signers.len() - 1
            });
            let (signer, count) = &mut signers[place];
            if before.is_none() && (known.len() >= MOST || *count >= MOST_OF_ONE) {
                is_full = true;
                continue;
            }
            *count += 1;
            one.signer = signer.clone();
            match is_same {
                true => {
                    one.heard = known.get(&one.principal).map_or(one.heard, |before| before.heard);
                    is_signed_anew = true;
                }
                false => ended.push(one.principal.clone()),
            }
            known.insert(one.principal.clone(), one);
        }
        drop(known);
        let mut open = self.0.open.lock().unwrap_or_else(PoisonError::into_inner);
        for principal in &ended {
            // Who comes back with a newer certificate gets a token of its own.
            if let Some(token) = open.remove(principal) {
                token.cancel();
            }
            tracing::info!(principal, "revoked");
        }
        drop(open);
        if !ended.is_empty() || is_signed_anew {
            self.0.changes.send_modify(|count| *count = count.wrapping_add(1));
        }
        if is_full { Err(RevocationRefused::TooMany) } else { Ok(()) }
    }
}
