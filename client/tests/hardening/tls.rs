//! What `openssl s_client`, another implementation, is told by a real server and a real janus.

use std::{
    path::Path,
    process::{Command, Stdio},
};

use xtask::{
    packages::{self, Tool},
    site::{Plan, Programs, Site, USER},
};

const OPENSSL: &[Tool] = &[Tool { program: "openssl", package: "openssl" }];

/// What it says of a connection with these arguments, with our certificate.
fn s_client(address: &str, keys: &Path, arguments: &[&str]) -> String {
    let mut command = Command::new("openssl");
    command.args(["s_client", "-connect", address, "-alpn", "h2", "-verify_return_error"]);
    for (flag, name) in [("-cert", "cert"), ("-key", "key"), ("-CAfile", "ca")] {
        command.arg(flag).arg(keys.join(format!("{name}.pem")));
    }
    let output = command.args(arguments).stdin(Stdio::null()).output().unwrap();
    let [out, error] = [&output.stdout, &output.stderr].map(|bytes| String::from_utf8_lossy(bytes));
    format!("{out}\n{error}")
}

fn is_connected(said: &str) -> bool {
    said.lines().any(|line| line.starts_with("New, TLSv1.3, Cipher is TLS_"))
}

#[test]
fn only_tls_1_3_and_only_authenticated_ciphers() {
    packages::require(OPENSSL).unwrap();
    let plan = Plan { servers: vec!["server-a".into()], ..Plan::default() };
    let mut site = Site::start(Programs::for_tests().unwrap(), &plan).unwrap();
    site.issue("client", "machine", &["--user", USER, "--machine", "machine"]).unwrap();
    let keys = site.folder().join("pki/machine");
    let urls = [site.server("server-a").unwrap().url(), site.url()];
    for url in urls {
        let address = url.strip_prefix("https://").unwrap();
        let said = s_client(address, &keys, &["-tls1_3"]);
        assert!(is_connected(&said) && said.contains("ALPN protocol: h2"), "{said}");
        assert!(said.contains("Verify return code: 0 (ok)"), "{said}");

        // Lowered security levels, or this openssl itself would refuse to offer the old ones.
        for version in ["-tls1_2", "-tls1_1", "-tls1"] {
            let said = s_client(address, &keys, &[version, "-cipher", "ALL:@SECLEVEL=0"]);
            assert!(said.contains("Cipher is (NONE)"), "{version}: {said}");
            // A hello of TLS 1.1 lacks even what a refusal of its version is told by.
            let alert = ["alert protocol version", "alert handshake failure"];
            assert!(alert.iter().any(|alert| said.contains(alert)), "{version}: {said}");
        }

        let mut spoken = Vec::new();
        for suite in [
            "TLS_AES_256_GCM_SHA384",
            "TLS_AES_128_GCM_SHA256",
            "TLS_CHACHA20_POLY1305_SHA256",
            "TLS_AES_128_CCM_SHA256",
            "TLS_AES_128_CCM_8_SHA256",
        ] {
            let said = s_client(address, &keys, &["-tls1_3", "-ciphersuites", suite]);
            if is_connected(&said) {
                assert!(said.contains(suite), "{said}");
                spoken.push(suite);
            }
        }
        // All that TLS 1.3 has are authenticated ciphers; of these the short tag of CCM_8 isn't taken.
        assert_eq!(spoken.len(), 3, "{spoken:?}");

        // Without a certificate: refused, which TLS 1.3 tells after the handshake.
        let output = Command::new("openssl")
            .args(["s_client", "-connect", address, "-alpn", "h2", "-tls1_3", "-ign_eof"])
            .stdin(Stdio::null())
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(said.contains("certificate required"), "{said}");
    }
}
