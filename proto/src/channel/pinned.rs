//! Connections of who has no certificate yet: the other end proves that its certificate comes from an authority of which only the
//! fingerprint is known.

use std::sync::Arc;

use super::{ConnectOptions, Dial, Dialing, Stream, Target, connect::secure, proxy::Proxies};
use crate::{
    enroll::Fingerprint,
    ids::ServerId,
    proof::Statement,
    tls::{Principal, crypto_provider, signature_algorithms},
};
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme,
    client::{
        WebPkiServerVerifier,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    },
    crypto::verify_tls13_signature,
    pki_types::{CertificateDer, ServerName, UnixTime},
    version::TLS13,
};

/// Connects without a certificate of its own, to servers of one authority.
#[derive(Debug, Clone)]
pub struct Pinned {
    verifier: Arc<Verifier>,
    proxies: Proxies,
}

impl Pinned {
    /// To servers whose authority has this fingerprint.
    pub fn new(authority: Fingerprint, proxies: Proxies) -> Self {
        Self { verifier: Arc::new(Verifier(authority)), proxies }
    }

    fn config(&self) -> Result<ClientConfig, rustls::Error> {
        let mut config = ClientConfig::builder_with_provider(crypto_provider())
            .with_protocol_versions(&[&TLS13])?
            .dangerous()
            .with_custom_certificate_verifier(self.verifier.clone())
            .with_no_client_auth();
        config.alpn_protocols = vec![b"h2".to_vec()];
        Ok(config)
    }
}

impl Dial for Pinned {
    fn dial<'a>(&'a self, target: &'a Target, options: &'a ConnectOptions) -> Dialing<'a> {
        Box::pin(async move {
            let config = self.config().map_err(|error| target.closed(error.to_string()))?;
            let tcp = self.proxies.connect(target, options.connect_timeout).await?;
            let named = |shown: Option<&[CertificateDer<'_>]>| {
                let own = shown.and_then(<[_]>::first).map(|own| own.to_vec());
                Principal::from_der(own.unwrap_or_default())
            };
            let (stream, peer) = secure(target, Arc::new(config), named, options, tcp).await?;
            Ok((Box::new(stream) as Stream, peer))
        })
    }

    fn prove(&self, _: &Statement, _: Option<&ServerId>) -> Option<String> {
        None
    }
}

/// Finds the authority among the certificates that the other end shows, then checks as usual.
#[derive(Debug)]
struct Verifier(Fingerprint);

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let unknown = || rustls::Error::InvalidCertificate(CertificateError::UnknownIssuer);
        let is_ours = |other: &&CertificateDer<'_>| Fingerprint::of(other) == self.0;
        let authority = intermediates.iter().find(is_ours).ok_or_else(unknown)?;
        let mut roots = RootCertStore::empty();
        roots.add(authority.clone().into_owned())?;
        let usual = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), crypto_provider());
        let usual = usual.build().map_err(|_| unknown())?;
        usual.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now)
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::Error::General("TLS 1.2 is not offered".into()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, dss, &signature_algorithms())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        signature_algorithms().supported_schemes()
    }
}
