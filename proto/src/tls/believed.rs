//! The authorities that an identity believes, and whom their certificates are for.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use bytes::Bytes;
use rustls::{
    CertificateError, DigitallySignedStruct, Error as RustlsError, RootCertStore, SignatureScheme,
    client::{
        WebPkiServerVerifier,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    },
    pki_types::{CertificateDer, ServerName, UnixTime},
    server::{WebPkiClientVerifier, danger::ClientCertVerifier},
};

use super::{
    TlsError, certificates, crypto_provider, describe, format_error,
    names::Names,
    principal::{Principal, no_role, parse},
    roots,
};

/// Certificates between one and its authority that are forwarded with it, and their bytes: they travel in a header.
const MOST_INTERMEDIATES: usize = 4;
const MOST_INTERMEDIATE_BYTES: usize = 16 << 10;

/// A PKI of the site's own.
pub(super) struct Site {
    pub(super) ca: PathBuf,
    pub(super) names: Names,
    pub(super) check_hosts: bool,
}

/// The authorities.
#[derive(Clone)]
pub(super) struct Believed {
    /// Ours, as certificates.
    pub(super) authorities: Vec<CertificateDer<'static>>,
    /// All of them.
    pub(super) roots: Arc<RootCertStore>,
    pub(super) verifier: Arc<dyn ClientCertVerifier>,
    theirs: Option<Theirs>,
}

/// Those of a PKI of the site's own, and ours without them.
#[derive(Clone)]
struct Theirs {
    ours: Option<Arc<dyn ClientCertVerifier>>,
    verifier: Arc<dyn ClientCertVerifier>,
    roots: Arc<RootCertStore>,
    names: Names,
    check_hosts: bool,
}

impl Believed {
    /// Reads the files. `ca` may be empty where there is a PKI of the site's own: only that is believed then.
    pub(super) fn read(ca: &Path, site: Option<&Site>) -> Result<Self, TlsError> {
        let what = "CA certificate";
        let Some(site) = site else {
            let authorities = certificates("ca", what, ca)?;
            let roots = roots(&authorities, ca)?;
            let verifier = verifier(&roots, ca)?;
            return Ok(Self { authorities, roots, verifier, theirs: None });
        };
        let authorities = match ca.as_os_str().is_empty() {
            true => Vec::new(),
            false => certificates("ca", what, ca)?,
        };
        let foreign = certificates("pki.ca", what, &site.ca)?;
        if foreign.iter().any(|one| authorities.contains(one)) {
            let reason = "a certificate of it stands in `ca`, too: is it its janus:// names that count, or the rules of pki.names? Leave it in one of them";
            return Err(format_error(what, &site.ca, reason));
        }
        let ours = match authorities.is_empty() {
            true => None,
            false => Some(verifier(&roots(&authorities, ca)?, ca)?),
        };
        let of_theirs = roots(&foreign, &site.ca)?;
        let mut all = RootCertStore { roots: of_theirs.roots.clone() };
        if !authorities.is_empty() {
            all.extend(roots(&authorities, ca)?.roots.iter().cloned());
        }
        let all = Arc::new(all);
        let theirs = Theirs {
            ours,
            verifier: verifier(&of_theirs, &site.ca)?,
            roots: of_theirs,
            names: site.names.clone(),
            check_hosts: site.check_hosts,
        };
        let verifier = verifier(&all, &site.ca)?;
        Ok(Self { authorities, roots: all, verifier, theirs: Some(theirs) })
    }

    /// Who showed this chain, which is checked with its dates.
    pub(super) fn who(
        &self,
        chain: &[CertificateDer<'_>],
        time: UnixTime,
    ) -> Result<Principal, TlsError> {
        let (own, rest) = chain.split_first().ok_or_else(|| no_role("is missing"))?;
        let principal = match &self.theirs {
            Some(theirs) => theirs.who(own, rest, time)?,
            None => {
                let principal = Principal::from_der(own.to_vec())?;
                let checked = self.verifier.verify_client_cert(own, rest, time);
                checked.map_err(|error| refused(principal.to_string(), &error))?;
                principal
            }
        };
        Ok(principal.through(to_forward(rest)?))
    }

    /// Who showed this chain in a handshake, which has checked it.
    pub(super) fn peer(&self, chain: &[CertificateDer<'_>]) -> Result<Principal, TlsError> {
        match (&self.theirs, chain.split_first()) {
            // The handshake doesn't tell which of the authorities it was.
            (Some(_), _) | (None, None) => self.who(chain, UnixTime::now()),
            (None, Some((own, rest))) => {
                let principal = Principal::from_der(own.to_vec())?;
                Ok(principal.through(to_forward(rest)?))
            }
        }
    }

    /// What checks servers, where it isn't what TLS does by itself.
    pub(super) fn server_verifier(&self) -> Option<Arc<dyn ServerCertVerifier>> {
        let theirs = self.theirs.as_ref().filter(|theirs| !theirs.check_hosts)?;
        let of = |roots: &Arc<RootCertStore>| {
            WebPkiServerVerifier::builder_with_provider(roots.clone(), crypto_provider()).build()
        };
        // The same stores have made verifiers before.
        Some(Arc::new(AnyHost { usual: of(&self.roots).ok()?, theirs: of(&theirs.roots).ok()? }))
    }
}

impl Theirs {
    fn who(
        &self,
        own: &CertificateDer<'_>,
        rest: &[CertificateDer<'_>],
        time: UnixTime,
    ) -> Result<Principal, TlsError> {
        let by = |verifier: &dyn ClientCertVerifier| {
            verifier.verify_client_cert(own, rest, time).map(drop)
        };
        let by_ours = self.ours.as_deref().map(by);
        if let Some(Ok(())) = by_ours {
            return Principal::from_der(own.to_vec());
        }
        let by_theirs = by(&*self.verifier);
        let named = || self.names.principal(own.to_vec().into());
        let error = match (by_theirs, by_ours) {
            (Ok(()), _) => return named(),
            // One of ours that has expired isn't one of theirs that is unknown.
            (Err(_), Some(Err(error))) if !is_of_another(&error) => error,
            (Err(error), _) => error,
        };
        let subject = Principal::from_der(own.to_vec()).or_else(|_| named());
        Err(refused(subject.map_or_else(|_| "a stranger".into(), |who| who.to_string()), &error))
    }
}

fn is_of_another(error: &RustlsError) -> bool {
    use CertificateError::{BadSignature, UnknownIssuer};
    matches!(error, RustlsError::InvalidCertificate(UnknownIssuer | BadSignature))
}

fn refused(subject: String, error: &RustlsError) -> TlsError {
    TlsError::Refused { subject, reason: describe(error) }
}

/// A verifier of those who connect.
pub(super) fn verifier(
    roots: &Arc<RootCertStore>,
    ca: &Path,
) -> Result<Arc<dyn ClientCertVerifier>, TlsError> {
    WebPkiClientVerifier::builder_with_provider(roots.clone(), crypto_provider())
        .build()
        .map_err(|error| format_error("CA certificate", ca, error))
}

/// What others need to check a certificate as we do. Authorities they have themselves.
fn to_forward(rest: &[CertificateDer<'_>]) -> Result<Vec<Bytes>, TlsError> {
    let is_authority = |der: &&CertificateDer<'_>| {
        parse(der).is_ok_and(|certificate| certificate.subject() == certificate.issuer())
    };
    let between: Vec<_> = rest.iter().filter(|der| !is_authority(der)).collect();
    let bytes: usize = between.iter().map(|der| der.len()).sum();
    if between.len() > MOST_INTERMEDIATES || bytes > MOST_INTERMEDIATE_BYTES {
        return Err(no_role(format!(
            "comes with {} others of {bytes} bytes, more than {MOST_INTERMEDIATES} and {MOST_INTERMEDIATE_BYTES} bytes between it and its authority",
            between.len()
        )));
    }
    Ok(between.into_iter().map(|der| Bytes::copy_from_slice(der)).collect())
}

/// Checks servers as usual, but takes those of the site's PKI for what they are at whatever host they are called: their
/// certificates, as those of SPIFFE, needn't name one. Which role they have is looked at next, as always.
#[derive(Debug)]
struct AnyHost {
    usual: Arc<WebPkiServerVerifier>,
    theirs: Arc<WebPkiServerVerifier>,
}

impl ServerCertVerifier for AnyHost {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, RustlsError> {
        let check = |verifier: &WebPkiServerVerifier| {
            verifier.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now)
        };
        match check(&self.usual) {
            // The host is looked at last, when all else is well.
            Err(error) if is_other_host(&error) => match check(&self.theirs) {
                Err(of_theirs) if is_other_host(&of_theirs) => Ok(ServerCertVerified::assertion()),
                _ => Err(error),
            },
            other => other,
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, RustlsError> {
        self.usual.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, RustlsError> {
        self.usual.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.usual.supported_verify_schemes()
    }
}

fn is_other_host(error: &RustlsError) -> bool {
    use CertificateError::{NotValidForName, NotValidForNameContext};
    matches!(
        error,
        RustlsError::InvalidCertificate(NotValidForName | NotValidForNameContext { .. })
    )
}
