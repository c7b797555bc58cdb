//! Certificates for these tests, with dates and groups that the product refuses to issue.

use std::{fs, path::PathBuf, time::Duration};

use janus_proto::tls::Identity;
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SanType,
};
use time::OffsetDateTime;

pub struct Ca {
    folder: tempfile::TempDir,
    issuer: Issuer<'static, KeyPair>,
}

const DAY: Duration = Duration::from_secs(86400);

impl Ca {
    pub fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, "tests");
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        fs::write(folder.path().join("ca.pem"), params.self_signed(&key).unwrap().pem()).unwrap();
        Self { folder, issuer: Issuer::new(params, key) }
    }

    /// Identity of `janus://<principal>`, called `host`, for a day.
    pub fn identity(&self, principal: &str, host: &str) -> Identity {
        self.identity_for(principal, host, DAY)
    }

    /// The same, valid for a shorter time.
    pub fn identity_for(&self, principal: &str, host: &str, valid: Duration) -> Identity {
        let [cert, key, ca] = self.files(principal, host, valid);
        Identity::load(cert, key, ca).unwrap()
    }

    /// Paths of certificate, key and CA.
    pub fn files(&self, principal: &str, host: &str, valid: Duration) -> [PathBuf; 3] {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.not_before = OffsetDateTime::now_utc() - DAY;
        params.not_after = OffsetDateTime::now_utc() + valid;
        let host = match host.parse() {
            Ok(address) => SanType::IpAddress(address),
            Err(_) => SanType::DnsName(host.try_into().unwrap()),
        };
        let uri = SanType::URI(format!("janus://{principal}").try_into().unwrap());
        params.subject_alt_names = vec![host, uri];
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ClientAuth, ExtendedKeyUsagePurpose::ServerAuth];
        let cert = params.signed_by(&key, &self.issuer).unwrap();
        let path =
            |end: &str| self.folder.path().join(format!("{}.{end}", principal.replace('/', "-")));
        fs::write(path("pem"), cert.pem()).unwrap();
        fs::write(path("key"), key.serialize_pem()).unwrap();
        [path("pem"), path("key"), self.folder.path().join("ca.pem")]
    }
}
