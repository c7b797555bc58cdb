//! `janus-proof`: what a caller wants, signed with the key of its certificate, so that a janus in between can't want it
//! in the caller's name.
//!
//! A janus forwards certificates, and whoever has seen one can forward it. StartBackup, CommitBackup, OpenSnapshot and ReadTable
//! therefore carry a signature over the server, the method, the principal, a digest of the request, and an end. A proof that
//! is seen on its way is good for the same call once more, which changes nothing: starts and commits are idempotent, and who
//! forwards a restore reads it anyway.
//!
//! The header is `1;<server>;<expiry>;<scheme>;<signature>`: server id or `*`, Unix seconds, TLS `SignatureScheme` in
//! hexadecimal (RFC 8446, section 4.2.3), base64. What is signed is the text of [`signed_text`].
//!
//! A caller whose certificate was replaced while it has connections signs with the new key. It sends `2;…;<certificates>` then: the
//! same, and the new certificate with those between it and its authority, each in base64, with commas between them.

use std::time::Duration;

use base64::{Engine, engine::general_purpose::STANDARD};
use bytes::Bytes;
use rustls::{SignatureScheme, sign::SigningKey};
use x509_parser::prelude::{FromDer, X509Certificate};

use crate::{
    clock::unix_ms,
    hash::hash_block,
    ids::{BlockHash, MachineKey, ServerId},
    metadata, pb,
    tls::{Identity, Principal, TlsError, signature_algorithms},
};

/// How long a new proof is good for: as wrong as clocks may be, and more.
const VALID: Duration = Duration::from_secs(24 * 60 * 60);
/// A proof may end this far ahead: that of a caller whose clock is a day early.
const LONGEST: Duration = Duration::from_secs(48 * 60 * 60);
/// Longest header that is looked at, in bytes; ours have about 160, of RSA keys 700, with certificates some thousand.
const MAX_HEADER: usize = 40 << 10;
const VERSION: &str = "1";
const WITH_CERTIFICATE: &str = "2";
const ANY_SERVER: &str = "*";

/// Why a proof isn't one.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ProofError {
    /// None came.
    #[error(
        "this certificate asks for a janus-proof, and none came: the client is too old, or somebody speaks in its name"
    )]
    Missing,
    /// Not of the form that this module describes.
    #[error("janus-proof isn't of a form this server knows")]
    Form,
    /// It is for another server.
    #[error("janus-proof is for server {0}")]
    OtherServer(String),
    /// Too old, or too far ahead.
    #[error(
        "janus-proof has expired, or ends too far ahead: compare the clocks of client and server"
    )]
    Expired,
    /// The certificate that came with it isn't the caller's.
    #[error("janus-proof comes with a certificate that isn't that of the caller: {0}")]
    Certificate(String),
    /// Somebody else signed, or something else was.
    #[error("janus-proof isn't what the key of this certificate signs for this call")]
    Signature,
}

/// One call, as far as a proof speaks of it: its method and a digest of what it asks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Statement {
    method: &'static str,
    digest: BlockHash,
}

impl Statement {
    /// A digest over one line for each thing that counts.
    fn of(method: &'static str, lines: &[String]) -> Self {
        let text: String = lines.iter().flat_map(|line| [line.as_str(), "\n"]).collect();
        Self { method, digest: hash_block(text.as_bytes()) }
    }

    /// Of StartBackup: the run, its disks, and for whom it is where that isn't the caller.
    pub fn start(request: &pb::StartBackupRequest, other: Option<&MachineKey>) -> Self {
        let mut lines = vec![request.backup_id.clone()];
        lines.extend(of_other(other));
        lines.extend(request.disks.iter().map(|disk| {
            format!("{} {} {}", disk.disk_id, disk.size_bytes, disk.logical_sector_bytes)
        }));
        Self::of("StartBackup", &lines)
    }

    /// Of CommitBackup: the run, and of each disk what it is based on and what it must hold then.
    pub fn commit(request: &pb::CommitBackupRequest, other: Option<&MachineKey>) -> Self {
        let mut lines = vec![request.backup_id.clone(), request.epoch.to_string()];
        lines.extend(of_other(other));
        lines.extend(request.disks.iter().map(|disk| {
            let pb::DiskCommit { disk_id, expected_head_id, consistency, skipped_bytes, .. } = disk;
            let digest = hex::encode(&disk.table_digest);
            format!("{disk_id} {expected_head_id} {digest} {consistency} {skipped_bytes}")
        }));
        lines.push(hex::encode(&request.client_seal));
        Self::of("CommitBackup", &lines)
    }

    /// Of OpenSnapshot.
    pub fn open(request: &pb::OpenSnapshotRequest) -> Self {
        Self::of("OpenSnapshot", &[request.snapshot_id.clone(), request.table.to_string()])
    }

    /// Of ReadTable.
    pub fn table(request: &pb::ReadTableRequest) -> Self {
        let pb::ReadTableRequest { snapshot_id, since_snapshot_id, first_segment, .. } = request;
        let first = first_segment.to_string();
        Self::of("ReadTable", &[snapshot_id.clone(), since_snapshot_id.clone(), first])
    }
}

/// The line that names another machine than the caller's own.
fn of_other(other: Option<&MachineKey>) -> Option<String> {
    other.map(|machine| format!("for {machine}"))
}

/// What is signed: lines, each with its end, of ASCII text. Public for clients in other languages; `janus-proof` as the first
/// one keeps it apart from everything else that this key signs.
///
/// ```text
/// janus-proof 1
/// StartBackup | CommitBackup | OpenSnapshot | ReadTable
/// <server id or *>
/// janus://<group>/<role>/…   (the URI of the certificate)
/// <BLAKE3-256 of the request's own lines, in hexadecimal>
/// <expiry, Unix seconds>
/// ```
pub fn signed_text(
    statement: &Statement,
    server: &str,
    principal: &Principal,
    expiry: u64,
) -> String {
    let Statement { method, digest } = statement;
    format!("janus-proof {VERSION}\n{method}\n{server}\n{}\n{digest}\n{expiry}\n", principal.uri())
}

/// The header for one call to `server`; `None` there: to any, as a start is before it is known who takes it. `is_new`: the
/// certificate of this key may not be the one that a janus has seen.
pub(crate) fn make(
    key: &dyn SigningKey,
    principal: &Principal,
    is_new: bool,
    statement: &Statement,
    server: Option<&ServerId>,
) -> Option<String> {
    let server = server.map_or(ANY_SERVER, ServerId::as_str);
    let expiry = now().saturating_add(VALID.as_secs());
    let text = signed_text(statement, server, principal, expiry);
    let (scheme, signature) = sign(key, text.as_bytes())?;
    let proof = format!("{server};{expiry};{scheme:04x};{}", STANDARD.encode(signature));
    if !is_new {
        return Some(format!("{VERSION};{proof}"));
    }
    let chain = std::iter::once(&principal.der).chain(&principal.intermediates);
    Some(format!("{WITH_CERTIFICATE};{proof};{}", metadata::certificates_to_text(chain)))
}

/// Checks the header that came with a call to `here`.
///
/// # Errors
/// When it doesn't prove that the holder of this certificate's key wants just this.
pub fn check(
    header: &[u8],
    statement: &Statement,
    principal: &Principal,
    here: &ServerId,
    identity: &Identity,
) -> Result<(), ProofError> {
    let believed = |der: &[u8], between: &[Bytes]| identity.verify_forwarded(der, between);
    check_at(header, statement, principal, here, (now(), &believed))
}

/// Whose a certificate is.
type Believed<'a> = &'a dyn Fn(&[u8], &[Bytes]) -> Result<Principal, TlsError>;

fn check_at(
    header: &[u8],
    statement: &Statement,
    principal: &Principal,
    here: &ServerId,
    (now, believed): (u64, Believed<'_>),
) -> Result<(), ProofError> {
    let header = Some(header).filter(|header| header.len() <= MAX_HEADER);
    let text =
        header.and_then(|header| std::str::from_utf8(header).ok()).ok_or(ProofError::Form)?;
    let parts: Vec<_> = text.split(';').collect();
    let (server, expiry, scheme, signature, chain) = match parts.as_slice() {
        [VERSION, server, expiry, scheme, signature] => (server, expiry, scheme, signature, None),
        [WITH_CERTIFICATE, server, expiry, scheme, signature, chain] => {
            (server, expiry, scheme, signature, Some(chain))
        }
        _ => return Err(ProofError::Form),
    };
    if *server != ANY_SERVER && *server != here.as_str() {
        return Err(ProofError::OtherServer(crate::error::shorten(server)));
    }
    let expiry: u64 = expiry.parse().map_err(|_| ProofError::Form)?;
    let scheme = u16::from_str_radix(scheme, 16).map_err(|_| ProofError::Form)?;
    let signature = STANDARD.decode(signature).map_err(|_| ProofError::Form)?;
    if expiry <= now || expiry > now.saturating_add(LONGEST.as_secs()) {
        return Err(ProofError::Expired);
    }
    let der = match chain {
        None => principal.der.clone(),
        Some(chain) => newer(chain, principal, believed)?,
    };
    let text = signed_text(statement, server, principal, expiry);
    match verify(&der, text.as_bytes(), scheme, &signature) {
        true => Ok(()),
        false => Err(ProofError::Signature),
    }
}

/// The certificate (DER) that came with a proof, if it is the caller's, too.
fn newer(chain: &str, principal: &Principal, believed: Believed<'_>) -> Result<Bytes, ProofError> {
    let chain = metadata::certificates_of_text(chain.as_bytes()).ok_or(ProofError::Form)?;
    let (own, between) = chain.split_first().ok_or(ProofError::Form)?;
    let other =
        believed(own, between).map_err(|error| ProofError::Certificate(error.to_string()))?;
    match (&other.group, &other.role) == (&principal.group, &principal.role) {
        true => Ok(other.der),
        false => Err(ProofError::Certificate(format!("it is that of {other}"))),
    }
}

/// Signs with the first scheme that the key has: its number, and the signature.
pub(crate) fn sign(key: &dyn SigningKey, message: &[u8]) -> Option<(u16, Vec<u8>)> {
    let offered: Vec<_> =
        signature_algorithms().mapping.iter().map(|(scheme, _)| *scheme).collect();
    let signer = key.choose_scheme(&offered)?;
    Some((signer.scheme().into(), signer.sign(message).ok()?))
}

/// True when the key of this certificate (DER) has signed the message.
pub(crate) fn verify(certificate: &[u8], message: &[u8], scheme: u16, signature: &[u8]) -> bool {
    let Ok((_, certificate)) = X509Certificate::from_der(certificate) else { return false };
    let key = &certificate.public_key().subject_public_key.data;
    let wanted = SignatureScheme::from(scheme);
    let algorithms = signature_algorithms().mapping.iter().filter(|(scheme, _)| *scheme == wanted);
    algorithms
        .flat_map(|(_, algorithms)| *algorithms)
        .any(|algorithm| algorithm.verify_signature(key, message, signature).is_ok())
}

/// Unix seconds.
fn now() -> u64 {
    u64::try_from(unix_ms() / 1000).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tls::Role;

    /// A key of P-256 with a certificate that has it.
    fn owner(name: &str) -> (std::sync::Arc<dyn SigningKey>, Principal) {
        let key = rcgen::KeyPair::generate().unwrap();
        let mut params = rcgen::CertificateParams::default();
        let uri = format!("janus://home/client/alice/{name}");
        params.subject_alt_names = vec![rcgen::SanType::URI(uri.try_into().unwrap())];
        let certificate = params.self_signed(&key).unwrap();
        let private = rustls::pki_types::PrivateKeyDer::try_from(key.serialize_der()).unwrap();
        let signing = crate::tls::crypto_provider().key_provider.load_private_key(private).unwrap();
        (signing, Principal::from_der(certificate.der().to_vec()).unwrap())
    }

    fn nobody(_: &[u8], _: &[Bytes]) -> Result<Principal, TlsError> {
        Err(TlsError::NoRole { reason: "isn't believed".into() })
    }

    fn open(id: &str) -> Statement {
        Statement::open(&pb::OpenSnapshotRequest { snapshot_id: id.into(), ..Default::default() })
    }

    #[test]
    fn a_proof_is_good_for_one_call_of_its_owner_within_its_time() {
        let ((key, web1), (_, web2)) = (owner("web1"), owner("web2"));
        let (a, b): (ServerId, ServerId) = ("a".parse().unwrap(), "b".parse().unwrap());
        let header = make(&*key, &web1, false, &open("1"), Some(&a)).unwrap();
        let now = now();
        let check = |header: &str, statement: &Statement, who: &Principal, here: &ServerId, now| {
            check_at(header.as_bytes(), statement, who, here, (now, &nobody))
        };
        assert_eq!(check(&header, &open("1"), &web1, &a, now), Ok(()));
        assert_eq!(check(&header, &open("2"), &web1, &a, now), Err(ProofError::Signature));
        assert_eq!(check(&header, &open("1"), &web2, &a, now), Err(ProofError::Signature));
        let other = Err(ProofError::OtherServer("a".into()));
        assert_eq!(check(&header, &open("1"), &web1, &b, now), other);
        let later = now + VALID.as_secs();
        assert_eq!(check(&header, &open("1"), &web1, &a, later + 1), Err(ProofError::Expired));
        let earlier = now - VALID.as_secs() - 10;
        assert_eq!(check(&header, &open("1"), &web1, &a, earlier), Err(ProofError::Expired));
        let any = make(&*key, &web1, false, &open("1"), None).unwrap();
        assert!(any.starts_with("1;*;"));
        assert_eq!(check(&any, &open("1"), &web1, &b, now), Ok(()));
        // A proof for any server isn't one for this server.
        let moved = any.replace(";*;", ";a;");
        assert_eq!(check(&moved, &open("1"), &web1, &a, now), Err(ProofError::Signature));
    }

    #[test]
    fn a_proof_with_another_certificate_counts_if_that_is_the_callers_too() {
        let ((_, old), (key, new), (thief, other)) = (owner("web1"), owner("web1"), owner("web2"));
        let a: ServerId = "a".parse().unwrap();
        let parsed = |der: &[u8], _: &[Bytes]| Principal::from_der(der.to_vec());
        let check = |header: String, believed: Believed<'_>| {
            check_at(header.as_bytes(), &open("1"), &old, &a, (now(), believed))
        };
        let make = |key: &dyn SigningKey, who: &Principal, is_new| {
            make(key, who, is_new, &open("1"), Some(&a)).unwrap()
        };
        assert_eq!(check(make(&*key, &new, true), &parsed), Ok(()));
        // Without the certificate, with one that isn't believed, with somebody else's, and with one of another key.
        assert_eq!(check(make(&*key, &new, false), &parsed), Err(ProofError::Signature));
        let refused = check(make(&*key, &new, true), &nobody);
        assert!(matches!(refused, Err(ProofError::Certificate(_))), "{refused:?}");
        let refused = check(make(&*thief, &other, true), &parsed);
        assert_eq!(refused, Err(ProofError::Certificate("it is that of client alice/web2".into())));
        assert_eq!(check(make(&*thief, &new, true), &parsed), Err(ProofError::Signature));
    }

    #[test]
    fn whatever_stands_in_a_header_is_refused_without_a_panic() {
        let (key, web1) = owner("web1");
        let a: ServerId = "a".parse().unwrap();
        let good = make(&*key, &web1, false, &open("1"), Some(&a)).unwrap();
        let now = now();
        let refuses = |header: &[u8]| {
            check_at(header, &open("1"), &web1, &a, (now, &nobody)).expect_err("refused")
        };
        for end in 0..good.len() {
            refuses(&good.as_bytes()[..end]);
        }
        for place in 0..good.len() {
            let mut bytes = good.clone().into_bytes();
            bytes[place] ^= 1;
            // The last character of base64 may have bits that count for nothing.
            if place < good.len() - 4 {
                refuses(&bytes);
            }
        }
        assert_eq!(refuses(&[0xFF; 10]), ProofError::Form);
        assert_eq!(refuses(&[b'1'; 10_000]), ProofError::Form);
        assert_eq!(refuses(b"2;a;1;0403;AAAA"), ProofError::Form);
        assert_eq!(refuses(b"3;a;1;0403;AAAA;AAAA"), ProofError::Form);
        assert_eq!(refuses(format!("2;{};!", &good[2..]).as_bytes()), ProofError::Form);
        assert_eq!(refuses(b"1;a;x;0403;AAAA"), ProofError::Form);
        assert_eq!(refuses(b"1;a;99999999999999999999;0403;AAAA"), ProofError::Form);
    }

    #[test]
    fn the_signed_text_is_what_clients_in_other_languages_build() {
        let (_, web1) = owner("web1");
        let text = signed_text(&open("0190"), "a", &web1, 7);
        let digest = hex::encode(blake3::hash(b"0190\nfalse\n").as_bytes());
        let uri = "janus://home/client/alice/web1";
        assert_eq!(text, format!("janus-proof 1\nOpenSnapshot\na\n{uri}\n{digest}\n7\n"));
        assert_eq!(web1.role, Role::Client("alice/web1".parse().unwrap()));
        let disk =
            pb::DiskStart { disk_id: "disk".into(), size_bytes: 4096, logical_sector_bytes: 512 };
        let start = pb::StartBackupRequest {
            backup_id: "id".into(),
            disks: vec![disk],
            ..Default::default()
        };
        assert_eq!(Statement::start(&start, None).digest, hash_block(b"id\ndisk 4096 512\n"));
        let (other, lines) = ("bob/db".parse().unwrap(), b"id\nfor bob/db\ndisk 4096 512\n");
        assert_eq!(Statement::start(&start, Some(&other)).digest, hash_block(lines));
        let commit = pb::CommitBackupRequest {
            backup_id: "id".into(),
            epoch: 3,
            disks: vec![pb::DiskCommit {
                disk_id: "disk".into(),
                expected_head_id: "head".into(),
                table_digest: vec![0xAB; 32].into(),
                consistency: 2,
                skipped_bytes: 9,
            }],
            client_seal: vec![1, 2].into(),
        };
        let lines = format!("id\n3\ndisk head {} 2 9\n0102\n", "ab".repeat(32));
        assert_eq!(Statement::commit(&commit, None).digest, hash_block(lines.as_bytes()));
    }
}
