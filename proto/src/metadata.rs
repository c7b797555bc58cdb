//! Names of the metadata that routing is decided by, and certificates in them.

use base64::{Engine, engine::general_purpose::STANDARD};
use bytes::Bytes;

/// Certificates that are read of one value.
const MOST_CERTIFICATES: usize = 8;

/// Machine key `<user>/<machine>` whose recency counts; a client's must equal its certificate's.
pub const MACHINE: &str = "janus-machine";
/// Request: only this server. Answer: the server that answered.
pub const SERVER: &str = "janus-server";
/// `backup_id` of the run a call belongs to.
pub const RUN: &str = "janus-run";
/// Use counter: in StartBackup the caller's highest known + 1, in its answer the counter of this start.
pub const USE: &str = "janus-use";
/// A use counter may be this far above the one that a server, or a caller, knows; what is further is no count of starts.
pub const MAX_USE_JUMP: u64 = 1 << 32;
/// The caller's certificate (DER, base64), set by janus and believed only from a peer with the janus role.
pub const PRINCIPAL: &str = "janus-principal";
/// Certificates between the caller's and its authority, as [`certificates_to_text`] writes them; with [`PRINCIPAL`] alone.
pub const INTERMEDIATES: &str = "janus-intermediates";
/// The caller's signature over what it asks, as [`proof`](crate::proof) says.
pub const PROOF: &str = "janus-proof";
/// Answer of StartBackup through janus: `<server>: <reason>`, one value for each server passed over.
pub const SKIPPED: &str = "janus-skipped";
/// Answer of StartBackup through janus: something an administrator should look at, one value for each.
pub const WARNING: &str = "janus-warning";

/// Certificates (DER) as one value: base64, with commas between them.
pub fn certificates_to_text<'a>(certificates: impl IntoIterator<Item = &'a Bytes>) -> String {
    let texts: Vec<_> = certificates.into_iter().map(|der| STANDARD.encode(der)).collect();
    texts.join(",")
}

/// The certificates in such a value, which nothing is known of yet. `None`: it isn't one.
pub fn certificates_of_text(text: &[u8]) -> Option<Vec<Bytes>> {
    let mut found = Vec::new();
    for one in text.split(|byte| *byte == b',') {
        if found.len() == MOST_CERTIFICATES {
            return None;
        }
        found.push(STANDARD.decode(one).ok()?.into());
    }
    Some(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn certificates_come_back_and_anything_else_is_none() {
        let some = [&b"one"[..], b"two", b"\0"].map(Bytes::from_static);
        for count in 1..=some.len() {
            let text = certificates_to_text(&some[..count]);
            assert_eq!(certificates_of_text(text.as_bytes()).unwrap(), some[..count]);
        }
        for bad in ["!", "b25l,!", "b25l;b25l", "b25", " b25l", "\0"] {
            assert!(certificates_of_text(bad.as_bytes()).is_none(), "{bad:?}");
        }
        assert!(certificates_of_text(vec![b','; 1 << 20].as_slice()).is_none());
    }
}
