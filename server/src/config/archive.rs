//! Section `[archive.NAME]`: an object store or folder that gets copies of chosen runs.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    time::Duration,
};

use janus_proto::{
    archive::{Place, manifest::MAX_LINKS},
    grants::Which,
};
use serde::{Deserialize, Serialize};

use super::ConfigError;

/// Longest file with credentials.
const MAX_CREDENTIALS_BYTES: u64 = 64 << 10;

/// An archive.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Archive {
    /// `s3://BUCKET/PREFIX`, `gs://BUCKET/PREFIX`, `az://CONTAINER/PREFIX` or `file:///FOLDER`.
    pub url: String,
    /// URL of a store that is not its maker's own; empty: that one.
    pub endpoint: String,
    /// Region; empty: as the environment says.
    pub region: String,
    /// File of mode 0600 with lines `NAME=VALUE`; empty: all comes from the environment.
    pub credentials: PathBuf,
    /// `*`, `USER/*`, `USER/MACHINE` or `USER/MACHINE/DISK`.
    pub machines: Vec<String>,
    /// A chain of deltas gets no longer than this, then a new base is sent.
    pub full_every: u32,
    /// So many of the newest runs of each disk are kept; 0: all.
    pub keep: u32,
    /// A request ends after so long a silence, and is made again.
    pub silence_seconds: u64,
}

impl Default for Archive {
    fn default() -> Self {
        Self {
            url: String::new(),
            endpoint: String::new(),
            region: String::new(),
            credentials: PathBuf::new(),
            machines: vec!["*".into()],
            full_every: 100,
            keep: 0,
            silence_seconds: 30,
        }
    }
}

impl Archive {
    /// Which machines.
    ///
    /// # Errors
    /// Says what isn't one.
    pub fn which(&self) -> Result<Vec<Which>, String> {
        super::replicate::which(&self.machines)
    }

    /// Where it is, with the credentials of its file. Reads that file.
    ///
    /// # Errors
    /// When others may read the file too, or it can't be read. What is in it is never told.
    pub fn place(&self) -> Result<Place, String> {
        let options = match self.credentials.as_os_str().is_empty() {
            true => Vec::new(),
            false => read_credentials(&self.credentials)?,
        };
        Ok(Place { options, ..self.bare_place() })
    }

    fn bare_place(&self) -> Place {
        Place {
            endpoint: self.endpoint.clone(),
            region: self.region.clone(),
            silence: Duration::from_secs(self.silence_seconds),
            ..Place::new(self.url.clone())
        }
    }

    pub(super) fn check(&self, name: &str, image_path: &Path) -> Result<(), ConfigError> {
        let invalid = |reason: String| ConfigError::Invalid {
            key: "archive",
            reason: format!("{name}: {reason}"),
        };
        self.which().map_err(invalid)?;
        self.bare_place().check().map_err(|error| invalid(error.to_string()))?;
        // Whatever takes the store's disk would take its copy, too.
        if self
            .url
            .strip_prefix("file://")
            .is_some_and(|path| Path::new(path).starts_with(image_path))
        {
            return Err(invalid(
                "url is a folder below image_path: name one on another disk".into(),
            ));
        }
        if self.full_every == 0 || self.full_every as usize > MAX_LINKS {
            return Err(invalid(format!("full_every must be 1 to {MAX_LINKS}")));
        }
        match self.silence_seconds {
            1..=3600 => Ok(()),
            _ => Err(invalid("silence_seconds must be 1 to 3600".into())),
        }
    }
}

/// Lines `NAME=VALUE` as systemd reads them, of a file that only its owner may read.
fn read_credentials(path: &Path) -> Result<Vec<(String, String)>, String> {
    let failed = |error: std::io::Error| format!("credentials {}: {error}", path.display());
    let metadata = fs::metadata(path).map_err(failed)?;
    let mode = metadata.permissions().mode() & 0o7777;
    if mode & 0o077 != 0 {
        return Err(format!(
            "credentials {}: others may read it (mode {mode:04o}): chmod 600 {}",
            path.display(),
            path.display()
        ));
    }
    if metadata.len() > MAX_CREDENTIALS_BYTES {
        return Err(format!("credentials {}: too long", path.display()));
    }
    let text = fs::read_to_string(path).map_err(failed)?;
    let lines = text.lines().map(str::trim).enumerate();
    let lines = lines.filter(|(_, line)| !line.is_empty() && !line.starts_with('#'));
    let pair = |(number, line): (usize, &str)| {
        // The line itself may be a secret.
        let wrong =
            || format!("credentials {}: line {} is not NAME=VALUE", path.display(), number + 1);
        let (key, value) = line.split_once('=').ok_or_else(wrong)?;
        let quoted = |quote| value.strip_prefix(quote).and_then(|value| value.strip_suffix(quote));
        let value = quoted('"').or_else(|| quoted('\'')).unwrap_or(value);
        Ok((key.trim().to_owned(), value.to_owned()))
    };
    lines.map(pair).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wrong_archives_are_named() {
        let good = Archive { url: "s3://bucket/prefix".into(), ..Archive::default() };
        let images = Path::new("/var/lib/janus/images");
        good.check("offsite", images).unwrap();
        let beside = "file:///var/lib/janus/images-archive".to_owned();
        Archive { url: beside, ..good.clone() }.check("offsite", images).unwrap();
        for wrong in [
            Archive { url: String::new(), ..good.clone() },
            Archive { url: "ftp://x/".into(), ..good.clone() },
            Archive { url: "s3://".into(), ..good.clone() },
            Archive { url: "s3://user:secret@bucket/".into(), ..good.clone() },
            Archive { endpoint: "minio:9000".into(), ..good.clone() },
            Archive { machines: vec!["alice".into()], ..good.clone() },
            Archive { full_every: 0, ..good.clone() },
            Archive { silence_seconds: 0, ..good.clone() },
            Archive { url: "file:///var/lib/janus/images/archive".into(), ..good.clone() },
        ] {
            let said = wrong.check("offsite", images).unwrap_err().to_string();
            assert!(said.contains("offsite"), "{said}");
        }
    }

    #[test]
    fn credentials_are_read_only_where_nobody_else_reads_them_and_never_told() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("key");
        fs::write(&path, "# mine\nAWS_ACCESS_KEY_ID=id\nAWS_SECRET_ACCESS_KEY=\"se=cret\"\n\n")
            .unwrap();
        let archive =
            Archive { url: "s3://b".into(), credentials: path.clone(), ..Archive::default() };
        fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
        let said = archive.place().unwrap_err();
        assert!(said.contains("chmod 600") && !said.contains("cret"), "{said}");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        let place = archive.place().unwrap();
        assert_eq!(place.options[1], ("AWS_SECRET_ACCESS_KEY".into(), "se=cret".into()));
        assert!(!format!("{place:?}").contains("cret"), "{place:?}");
        fs::write(&path, "secret\n").unwrap();
        let said = archive.place().unwrap_err();
        assert!(said.contains("line 1") && !said.contains("secret\n"), "{said}");
    }
}
