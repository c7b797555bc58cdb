//! TLS towards those who are not of our group: collectors of spans, webhooks, object stores, directories.

use std::path::Path;

use rustls::{
    ClientConfig, RootCertStore,
    pki_types::{CertificateDer, pem::PemObject},
};

use crate::tls::crypto_provider;

/// Believes certificates of the authorities in the file `ca`, or else of those that this system trusts (which `SSL_CERT_FILE` may
/// name). Reads files.
///
/// # Errors
/// When there is nobody to trust.
pub fn trusting(ca: Option<&Path>) -> Result<ClientConfig, String> {
    let roots = match ca {
        Some(ca) => of_file(ca)?,
        None => of_system()?,
    };
    with(roots)
}

/// Believes nobody: for connections without TLS, where a configuration is asked for.
pub(crate) fn nobody() -> Result<ClientConfig, String> {
    with(RootCertStore::empty())
}

fn with(roots: RootCertStore) -> Result<ClientConfig, String> {
    let config = ClientConfig::builder_with_provider(crypto_provider())
        .with_safe_default_protocol_versions()
        .map_err(|error| error.to_string())?;
    Ok(config.with_root_certificates(roots).with_no_client_auth())
}

fn of_file(ca: &Path) -> Result<RootCertStore, String> {
    let failed = |why: String| format!("{}: {why}", ca.display());
    let mut roots = RootCertStore::empty();
    for cert in CertificateDer::pem_file_iter(ca).map_err(|error| failed(error.to_string()))? {
        let cert = cert.map_err(|error| failed(error.to_string()))?;
        roots.add(cert).map_err(|error| failed(error.to_string()))?;
    }
    match roots.is_empty() {
        true => Err(failed("holds no certificate".into())),
        false => Ok(roots),
    }
}

fn of_system() -> Result<RootCertStore, String> {
    let mut roots = RootCertStore::empty();
    let found = rustls_native_certs::load_native_certs();
    roots.add_parsable_certificates(found.certs);
    if roots.is_empty() {
        let why = found.errors.first().map(|error| format!(": {error}")).unwrap_or_default();
        return Err(format!(
            "this system trusts no authority (package ca-certificates), so TLS can't be checked{why}"
        ));
    }
    Ok(roots)
}
