//! The policy file: groups, who is in them, and what they may do.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write,
    fs,
    io::{self, Read},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    sync::Arc,
};

use janus_proto::{grants::Which, hash::hash_block, settings::toml_problem};
use serde::Deserialize;
use zeroize::Zeroizing;

use super::{Member, Rights};
use crate::config::replicate;

/// Larger files aren't read.
const MAX_BYTES: u64 = 1 << 20;
/// Members by name, of all groups together; also of those that a directory names.
pub(super) const MAX_MEMBERS: usize = 10_000;

/// Machines that one group names for one right; a `*` counts as one.
const MAX_MACHINES: usize = 1000;

/// Why a policy isn't one.
#[derive(Debug, thiserror::Error)]
pub enum PolicyError {
    /// It can't be read.
    #[error("policy {path} can't be read: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// It isn't TOML of the form that docs/identities.md describes.
    #[error("policy {path}: {reason}")]
    Form {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// Everybody could give rights away, or read a password.
    #[error("{path} is open to {whom} (mode {mode:o}): chmod {wanted}")]
    Open {
        /// The file.
        path: PathBuf,
        /// To whom.
        whom: &'static str,
        /// Its permissions.
        mode: u32,
        /// What to do.
        wanted: &'static str,
    },
}

/// A policy as its file says.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct File {
    /// By their names.
    pub groups: BTreeMap<String, Group>,
    /// The directory that knows who is in groups.
    pub ldap: Option<Ldap>,
}

/// A group.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Group {
    /// By name.
    pub members: BTreeSet<Member>,
    /// Groups of the directory whose members are members here.
    pub ldap: BTreeSet<String>,
    /// What they may do.
    pub rights: Arc<Rights>,
}

/// Section `[ldap]`: how the directory is asked. Not part of the digest: it may differ from server to server.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Ldap {
    /// `ldaps://HOST[:PORT]`, or `ldap://HOST[:PORT]` for TLS by StartTLS, in the order in which they are tried.
    pub urls: Vec<String>,
    /// Certificates, PEM, that the directory's own is checked against; empty: those of the system.
    pub ca: PathBuf,
    /// Who asks; empty: nobody (anonymous).
    pub bind_dn: String,
    /// File with that account's password.
    pub password_file: PathBuf,
    /// Attribute with the name that stands in a user's certificate: `uid`, or `sAMAccountName`.
    pub user_attribute: String,
    /// Without TLS; on loopback only.
    pub plain: bool,
    /// The directory is asked again after so long.
    pub refresh_seconds: u64,
    /// What it said last counts for so long while it can't be asked.
    pub keep_seconds: u64,
}

impl Default for Ldap {
    fn default() -> Self {
        Self {
            urls: Vec::new(),
            ca: PathBuf::new(),
            bind_dn: String::new(),
            password_file: PathBuf::new(),
            user_attribute: "uid".into(),
            plain: false,
            refresh_seconds: 30,
            keep_seconds: 900,
        }
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Written {
    #[serde(default)]
    groups: BTreeMap<String, WrittenGroup>,
    ldap: Option<Ldap>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, default)]
#[derive(Default)]
struct WrittenGroup {
    members: Vec<String>,
    ldap: Vec<String>,
    backup: Vec<String>,
    restore: Vec<String>,
    admin: Vec<String>,
}

impl File {
    /// Reads and checks a policy.
    ///
    /// # Errors
    /// Names the file and what is wrong with it.
    pub fn read(path: &Path) -> Result<Self, PolicyError> {
        let text = read_guarded(path, 0o022, "others who may write it", "go-w")?;
        Self::parse(&text).map_err(|reason| PolicyError::Form { path: path.into(), reason })
    }

    fn parse(text: &str) -> Result<Self, String> {
        let written: Written = toml::from_str(text).map_err(|error| {
            let (line, reason) = toml_problem(text, &error);
            let line = line.map(|line| format!("line {line}: ")).unwrap_or_default();
            format!("{line}{reason}")
        })?;
        if let Some(ldap) = &written.ldap {
            ldap.check()?;
        }
        let has_ldap = written.ldap.is_some();
        let mut groups = BTreeMap::new();
        let mut members = 0;
        for (name, written) in written.groups {
            let group = written.checked(has_ldap).map_err(|why| format!("group {name}: {why}"))?;
            members += group.members.len();
            groups.insert(name, group);
        }
        match members > MAX_MEMBERS {
            true => Err(format!("more than {MAX_MEMBERS} members")),
            false => Ok(Self { groups, ldap: written.ldap }),
        }
    }

    /// The directory, and the groups there whose members are to be asked for; `None`: there is nothing to ask.
    pub fn directory(&self) -> Option<(&Ldap, BTreeSet<String>)> {
        let groups = self.groups.values().flat_map(|group| group.ldap.iter().cloned());
        let groups: BTreeSet<_> = groups.collect();
        self.ldap.as_ref().filter(|_| !groups.is_empty()).map(|ldap| (ldap, groups))
    }

    /// BLAKE3 (hexadecimal) over all that gives rights: equal on all servers if they give the same.
    pub fn digest(&self, write_only: &[Which]) -> String {
        let mut text = String::new();
        for (name, Group { members, ldap, rights }) in &self.groups {
            let members = members.iter().map(ToString::to_string).collect();
            let _ = writeln!(text, "group {name:?}");
            let mut line = |what: &str, mut all: Vec<String>| {
                all.sort();
                all.dedup();
                let _ = writeln!(text, "{what} {all:?}");
            };
            let texts = |which: &[Which]| which.iter().map(ToString::to_string).collect();
            line("members", members);
            line("ldap", ldap.iter().cloned().collect());
            line("backup", texts(&rights.backup));
            line("restore", texts(&rights.restore));
            line("admin", texts(&rights.admin));
        }
        let mut write_only: Vec<_> = write_only.iter().map(ToString::to_string).collect();
        write_only.sort();
        write_only.dedup();
        if text.is_empty() && write_only.is_empty() {
            return String::new();
        }
        let _ = writeln!(text, "write_only {write_only:?}");
        hash_block(text.as_bytes()).to_string()
    }
}

impl WrittenGroup {
    fn checked(self, has_ldap: bool) -> Result<Group, String> {
        let Self { members, ldap, backup, restore, admin } = self;
        if !ldap.is_empty() && !has_ldap {
            return Err("names a group of a directory, and there is no section [ldap]".into());
        }
        let parse = |name: &String| {
            name.parse().map_err(|error| {
                format!("member {name:?} is neither a user nor USER/MACHINE: {error}")
            })
        };
        let members = members.iter().map(parse).collect::<Result<_, String>>()?;
        let machines = |texts: &[String]| {
            let machines = replicate::which(texts)?;
            match machines.iter().find(|which| which.alone().is_some()) {
                Some(disk) => Err(format!("{disk}: rights are for whole machines")),
                None => Ok(machines),
            }
        };
        let (backup, restore, admin) = (machines(&backup)?, machines(&restore)?, machines(&admin)?);
        let with = |mut machines: Vec<Which>| {
            machines.extend(admin.iter().cloned());
            machines
        };
        let rights = Rights { backup: with(backup), restore: with(restore), admin: admin.clone() };
        match rights.backup.len().max(rights.restore.len()) > MAX_MACHINES {
            true => Err(format!("names more than {MAX_MACHINES} machines")),
            false => Ok(Group { members, ldap: ldap.into_iter().collect(), rights: rights.into() }),
        }
    }
}

impl Ldap {
    fn check(&self) -> Result<(), String> {
        let wrong = |key: &str, why: &str| Err(format!("ldap.{key} {why}"));
        if self.urls.is_empty() {
            return wrong("urls", "is empty: ldaps://HOST");
        }
        for text in &self.urls {
            let url: http::Uri = text.parse().unwrap_or_default();
            let host = url.host().unwrap_or_default();
            let is_loopback = matches!(host, "127.0.0.1" | "[::1]" | "localhost");
            match url.scheme_str() {
                _ if host.is_empty() => return wrong("urls", "names no host"),
                Some("ldaps") if !self.plain => {}
                Some("ldap") if !self.plain || is_loopback => {}
                _ => {
                    let why = "takes ldaps://HOST, or ldap://HOST, which begins TLS by StartTLS; `plain = true` is for ldap:// on loopback only";
                    return wrong("urls", why);
                }
            }
        }
        let is_attribute = |c: char| c.is_ascii_alphanumeric() || c == '-';
        if self.user_attribute.is_empty() || !self.user_attribute.chars().all(is_attribute) {
            return wrong("user_attribute", "is no name of an attribute");
        }
        // Who leaves a group has no rights a minute later.
        if !(1..=45).contains(&self.refresh_seconds) {
            return wrong("refresh_seconds", "must be 1 to 45");
        }
        if self.keep_seconds > 86_400 {
            return wrong("keep_seconds", "must be at most 86400, a day");
        }
        if !self.bind_dn.is_empty() && self.password_file.as_os_str().is_empty() {
            return wrong("password_file", "is empty, and bind_dn names an account");
        }
        Ok(())
    }

    /// The account's password, from its file.
    ///
    /// # Errors
    /// When it can't be read, or everybody can read it.
    pub fn password(&self) -> Result<Zeroizing<String>, PolicyError> {
        let mut password = Zeroizing::new(String::new());
        if !self.bind_dn.is_empty() {
            *password = read_guarded(&self.password_file, 0o027, "others", "0640 or less")?;
            let length = password.trim_end_matches(['\n', '\r']).len();
            password.truncate(length);
        }
        Ok(password)
    }
}

/// Reads a file that must not have these permissions.
fn read_guarded(
    path: &Path,
    forbidden: u32,
    whom: &'static str,
    wanted: &'static str,
) -> Result<String, PolicyError> {
    let failed = |source| PolicyError::Read { path: path.into(), source };
    let file = fs::File::open(path).map_err(failed)?;
    let metadata = file.metadata().map_err(failed)?;
    let mode = metadata.permissions().mode() & 0o777;
    if mode & forbidden != 0 {
        return Err(PolicyError::Open { path: path.into(), whom, mode, wanted });
    }
    let mut text = String::new();
    file.take(MAX_BYTES + 1).read_to_string(&mut text).map_err(failed)?;
    if text.len() as u64 > MAX_BYTES {
        return Err(failed(io::Error::new(io::ErrorKind::FileTooLarge, "more than 1 MiB")));
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::Right;

    const TEXT: &str = r#"
        [groups.helpdesk]
        members = ["Carol", "site/hyper1"]
        ldap = ["cn=helpdesk,ou=groups,dc=example,dc=org"]
        restore = ["alice/*", "bob/laptop7"]
        [groups.ops]
        members = ["erin"]
        admin = ["*"]
        [ldap]
        urls = ["ldaps://dc1.example.org"]
    "#;

    #[test]
    fn a_policy_gives_what_it_says() {
        let file = File::parse(TEXT).unwrap();
        let helpdesk = &file.groups["helpdesk"];
        let members: Vec<_> = helpdesk.members.iter().map(ToString::to_string).collect();
        assert_eq!(members, ["carol", "site/hyper1"]);
        assert_eq!(helpdesk.rights.machines(Right::Restore).len(), 2);
        assert!(helpdesk.rights.machines(Right::Backup).is_empty());
        let ops = &file.groups["ops"].rights;
        assert_eq!([&ops.backup, &ops.restore, &ops.admin], [&vec![Which::All]; 3]);
    }

    #[test]
    fn what_gives_the_same_has_the_same_digest() {
        let digest = |text: &str, only: &[Which]| File::parse(text).unwrap().digest(only);
        let whole = digest(TEXT, &[]);
        let moved = TEXT.replace(r#""alice/*", "bob/laptop7""#, r#""bob/laptop7", "alice/*""#);
        assert_eq!(digest(&moved, &[]), whole);
        assert_eq!(digest(&TEXT.replace("dc1.", "dc2."), &[]), whole);
        for other in [
            TEXT.replace("alice/*", "alice/web1"),
            TEXT.replace("Carol", "dave"),
            TEXT.replace("restore =", "backup ="),
            TEXT.replace("cn=helpdesk", "cn=ops"),
            TEXT.replace("groups.ops", "groups.others"),
        ] {
            assert_ne!(digest(&other, &[]), whole, "{other}");
        }
        assert_ne!(digest(TEXT, &[Which::User("alice".into())]), whole);
        assert_eq!(digest("", &[]), "");
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (text, said) in [
            ("[groups.a]\nmembres = []", "line 2: unknown field `membres`"),
            ("[groups.a]\nmembers = [\"a/b/c\"]", "group a: member \"a/b/c\""),
            ("[groups.a]\nrestore = [\"alice\"]", "group a: \"alice\" is none of *"),
            ("[groups.a]\nrestore = [\"alice/web/disk\"]", "whole machines"),
            ("[groups.a]\nldap = [\"cn=x\"]", "no section [ldap]"),
            ("[ldap]\nurls = []", "ldap.urls is empty"),
            ("[ldap]\nurls = [\"http://x\"]", "takes ldaps://"),
            ("[ldap]\nurls = [\"ldap://far\"]\nplain = true", "loopback only"),
            ("[ldap]\nurls = [\"ldaps://x\"]\nrefresh_seconds = 60", "1 to 45"),
            ("[ldap]\nurls = [\"ldaps://x\"]\nbind_dn = \"cn=x\"", "ldap.password_file"),
            ("[groups", "line 1"),
        ] {
            let error = File::parse(text).unwrap_err();
            assert!(error.contains(said), "{text}: {error}");
        }
    }

    #[test]
    fn a_file_that_everybody_may_write_is_none() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("policy.toml");
        fs::write(&path, TEXT).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
        File::read(&path).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o666)).unwrap();
        let error = File::read(&path).unwrap_err().to_string();
        assert!(error.contains("mode 666") && error.contains("chmod go-w"), "{error}");
        let password =
            Ldap { bind_dn: "cn=x".into(), password_file: path.clone(), ..Ldap::default() };
        assert!(password.password().unwrap_err().to_string().contains("chmod 0640"));
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        fs::write(&path, "secret\n").unwrap();
        assert_eq!(password.password().unwrap().as_str(), "secret");
    }
}
