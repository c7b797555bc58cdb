//! A small certificate authority for one group of servers, routers, clients and operators.
//!
//! `init` makes the CA, `issue` one certificate with its key. Nothing is ever overwritten: a lost race or a
//! repeated command leaves what stood there. Private keys are readable by their owner only. The CA's key stays on one
//! host; who has it can make a certificate for every role.

mod authority;
mod rotation;

use std::{
    fs,
    io::{self, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
    time::Duration,
};

use clap::{Args, Subcommand, ValueEnum};
use janus_proto::{
    error::WireError,
    ids::{MachineKey, ServerId, check_name},
    tls::{Role, TlsError},
};
use rcgen::{BasicConstraints, IsCa, KeyPair, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256};
use zeroize::Zeroizing;

pub use self::authority::{Authority, Wanted};
use self::{authority::params, rotation::CaCommand};

const DAY: Duration = Duration::from_secs(24 * 60 * 60);
/// Validity of a CA: ten years.
const CA_VALID: Duration = Duration::from_secs(3650 * 24 * 60 * 60);
const KEY_MODE: u32 = 0o600;
const PUBLIC_MODE: u32 = 0o644;

/// Why no certificate was made.
#[derive(Debug, thiserror::Error)]
pub enum PkiError {
    /// A file that would be overwritten.
    #[error("{path} exists and is not overwritten; choose another --out or move it away")]
    Exists {
        /// The file.
        path: PathBuf,
    },
    /// A file or folder can't be written.
    #[error("can't write {path}: {source}")]
    Write {
        /// File or folder.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// A file of the CA can't be read.
    #[error("can't read {path}: {source}; --ca is the folder that `janus-server pki init` wrote")]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// The CA's certificate is unusable.
    #[error(transparent)]
    Ca(#[from] TlsError),
    /// A name that can't stand in a certificate.
    #[error("{0}")]
    Name(#[from] WireError),
    /// A flag that this role needs, or that makes no sense for it.
    #[error("pki issue {role}: {reason}")]
    Flags {
        /// Role asked for.
        role: &'static str,
        /// What is missing or too much.
        reason: &'static str,
    },
    /// A host that is neither a DNS name nor an address.
    #[error("--host {host:?} is neither a DNS name nor an IP address")]
    Host {
        /// As given.
        host: String,
    },
    /// The validity asked for is longer than calendars go.
    #[error("--days or --hours is too large")]
    Validity,
    /// The step isn't due.
    #[error("{reason}")]
    Rotation {
        /// Why not.
        reason: &'static str,
    },
    /// No certificate where one must be.
    #[error("ca.pem can't be used: {reason}")]
    Bundle {
        /// What is wrong.
        reason: String,
    },
    /// The cryptography failed, or the CA's key is not one.
    #[error("can't make the certificate: {0}")]
    Crypto(#[from] rcgen::Error),
}

/// `janus-server pki …`
#[derive(Debug, Subcommand)]
pub enum PkiCommand {
    /// Make the certificate authority of a group: ca.pem and ca.key.
    Init {
        /// Folder to write to; it is made if needed.
        #[arg(long, value_name = "DIR")]
        out: PathBuf,
        /// Name of the group; certificates of different groups don't work together.
        #[arg(long)]
        group: String,
    },
    /// Give the group a new authority, step by step
    #[command(subcommand)]
    Ca(CaCommand),
    /// Issue one certificate: cert.pem, key.pem and a copy of ca.pem.
    Issue(IssueArgs),
}

/// Flags of `pki issue`.
#[derive(Debug, Args)]
pub struct IssueArgs {
    /// Role of the certificate.
    pub role: IssueRole,
    /// Folder with ca.pem and ca.key.
    #[arg(long, value_name = "DIR")]
    pub ca: PathBuf,
    /// Name of the server, janus or operator.
    #[arg(long)]
    pub name: Option<String>,
    /// DNS name or address under which a server or janus is called; once for each.
    #[arg(long)]
    pub host: Vec<String>,
    /// User that a client, or a machine to restore, belongs to.
    #[arg(long)]
    pub user: Option<String>,
    /// Machine name of a client, or of a machine to restore.
    #[arg(long)]
    pub machine: Option<String>,
    /// Validity in days; 825, but 1 for the role restore.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    pub days: Option<u32>,
    /// Validity in hours, instead of days.
    #[arg(long, conflicts_with = "days", value_parser = clap::value_parser!(u32).range(1..))]
    pub hours: Option<u32>,
    /// Calls that act for it through a janus must be signed with its key; certificates of operators and of
    /// restores ask for that by themselves.
    #[arg(long, conflicts_with = "no_proof")]
    pub proof: bool,
    /// They needn't: for programs of others, which don't sign.
    #[arg(long)]
    pub no_proof: bool,
    /// A janus speaks for machines of this user only; once for each.
    #[arg(long, value_name = "USER")]
    pub only_user: Vec<String>,
    /// Folder to write to; it is made if needed.
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
}

/// Roles a certificate can be issued for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum IssueRole {
    /// A backup server.
    Server,
    /// A router.
    Janus,
    /// A machine that backs itself up.
    Client,
    /// Who brings a machine back: lists and restores what it has, and nothing else.
    Restore,
    /// A person who owns machines, and may do more where a policy says so.
    User,
    /// A person who administers.
    Operator,
}

impl IssueRole {
    fn as_str(self) -> &'static str {
        match self {
            Self::Server => "server",
            Self::Janus => "janus",
            Self::Client => "client",
            Self::Restore => "restore",
            Self::User => "user",
            Self::Operator => "operator",
        }
    }
}

impl IssueArgs {
    fn valid(&self) -> Duration {
        let days = self.days.unwrap_or(if self.role == IssueRole::Restore { 1 } else { 825 });
        self.hours.map_or(DAY * days, |hours| DAY / 24 * hours)
    }

    fn wanted(&self) -> Result<Wanted, PkiError> {
        let mut wanted = Wanted::new(self.principal()?, self.host.clone(), self.valid());
        wanted.limits.proof = (wanted.limits.proof || self.proof) && !self.no_proof;
        let is_limited = !self.only_user.is_empty();
        if is_limited && self.role != IssueRole::Janus {
            let reason = "takes no --only-user: it speaks for itself";
            return Err(PkiError::Flags { role: self.role.as_str(), reason });
        }
        for user in &self.only_user {
            check_name("user", user)?;
        }
        wanted.limits.users.clone_from(&self.only_user);
        Ok(wanted)
    }

    fn principal(&self) -> Result<Role, PkiError> {
        let flags = |reason| PkiError::Flags { role: self.role.as_str(), reason };
        if matches!(self.role, IssueRole::Client | IssueRole::Restore) {
            let (Some(user), Some(machine), None) = (&self.user, &self.machine, &self.name) else {
                return Err(flags("needs --user and --machine, not --name"));
            };
            let key = MachineKey::new(user, machine)?;
            return Ok(match self.role {
                IssueRole::Restore => Role::Restore(key),
                _ => Role::Client(key),
            });
        }
        let (Some(name), None, None) = (&self.name, &self.user, &self.machine) else {
            return Err(flags("needs --name, not --user and --machine"));
        };
        Ok(match self.role {
            IssueRole::Server => Role::Server(name.parse::<ServerId>()?),
            IssueRole::Janus => Role::Janus(name.parse::<ServerId>()?),
            IssueRole::User => {
                check_name("user", name)?;
                Role::User(name.clone())
            }
            IssueRole::Operator | IssueRole::Client | IssueRole::Restore => {
                check_name("operator", name)?;
                Role::Operator(name.clone())
            }
        })
    }
}

/// Runs the command and prints what it wrote and the next step.
///
/// # Errors
/// When nothing or not all was written.
pub fn run(command: PkiCommand) -> Result<(), PkiError> {
    let text = match command {
        PkiCommand::Init { out, group } => {
            init(&out, &group)?;
            after_init(&out, &group)
        }
        PkiCommand::Ca(command) => rotation::run(&command)?,
        PkiCommand::Issue(args) => {
            let wanted = args.wanted()?;
            issue(&args.ca, &wanted, &args.out)?;
            after_issue(&wanted.role, &args.out)
        }
    };
    // A closed pipe is no reason to fail: the files are written.
    let _ = io::stdout().write_all(text.as_bytes());
    Ok(())
}

/// Makes the CA of `group` in `out`: `ca.pem` and `ca.key`.
///
/// # Errors
/// When one of them exists or can't be written.
pub fn init(out: &Path, group: &str) -> Result<(), PkiError> {
    check_name("group", group)?;
    let (cert, key) = new_authority(group)?;
    make_folder(out)?;
    let (key_path, cert_path) = (out.join("ca.key"), out.join("ca.pem"));
    refuse_existing(&[&key_path, &cert_path])?;
    write_new(&key_path, &key, KEY_MODE)?;
    write_new(&cert_path, &cert, PUBLIC_MODE)
}

/// A certificate that signs others, and its key, both PEM.
fn new_authority(group: &str) -> Result<(String, String), PkiError> {
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
    let mut params = params(group, CA_VALID)?;
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    Ok((params.self_signed(&key)?.pem(), key.serialize_pem()))
}

/// Issues a certificate by the CA in folder `ca`: `cert.pem`, `key.pem` and `ca.pem` in `out`.
///
/// # Errors
/// When the CA can't be read, a host is not a name, a server or janus has no host, or a file exists.
pub fn issue(ca: &Path, wanted: &Wanted, out: &Path) -> Result<(), PkiError> {
    let authority = Authority::open(ca)?;
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
    let cert = authority.certify(wanted, &key)?;
    make_folder(out)?;
    let (key_path, cert_path) = (out.join("key.pem"), out.join("cert.pem"));
    refuse_existing(&[&key_path, &cert_path])?;
    copy_ca(authority.bundle(), &out.join("ca.pem"))?;
    write_new(&key_path, &Zeroizing::new(key.serialize_pem()), KEY_MODE)?;
    write_new(&cert_path, &cert, PUBLIC_MODE)
}

fn make_folder(path: &Path) -> Result<(), PkiError> {
    let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(path);
    made.map_err(|source| PkiError::Write { path: path.into(), source })
}

fn refuse_existing(paths: &[&Path]) -> Result<(), PkiError> {
    match paths.iter().find(|path| path.symlink_metadata().is_ok()) {
        Some(path) => Err(PkiError::Exists { path: path.to_path_buf() }),
        None => Ok(()),
    }
}

/// The same CA may stand there already, as when several certificates go to one folder in turn.
fn copy_ca(pem: &str, path: &Path) -> Result<(), PkiError> {
    match fs::read_to_string(path) {
        Ok(there) if there == pem => Ok(()),
        _ => write_new(path, pem, PUBLIC_MODE),
    }
}

/// Replaces a file by one that is whole.
fn replace(path: &Path, text: &str, mode: u32) -> Result<(), PkiError> {
    let new = path.with_extension("new");
    let _ = fs::remove_file(&new);
    write_new(&new, text, mode)?;
    fs::rename(&new, path).map_err(|source| PkiError::Write { path: path.into(), source })
}

fn write_new(path: &Path, text: &str, mode: u32) -> Result<(), PkiError> {
    let mut file = match fs::OpenOptions::new().write(true).create_new(true).mode(mode).open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            return Err(PkiError::Exists { path: path.into() });
        }
        Err(source) => return Err(PkiError::Write { path: path.into(), source }),
    };
    let written = file.write_all(text.as_bytes()).and_then(|()| file.sync_all());
    written.map_err(|source| PkiError::Write { path: path.into(), source })
}

fn after_init(out: &Path, group: &str) -> String {
    let dir = out.display();
    format!(
        "wrote {dir}/ca.pem (certificate of group {group}; every host gets a copy)\n\
         wrote {dir}/ca.key (private key of the CA: keep it on this host only, and keep a copy offline)\n\
         next: janus-server pki issue server --ca {dir} --name NAME --host HOST --out DIR\n"
    )
}

fn after_issue(role: &Role, out: &Path) -> String {
    let dir = out.display();
    let file = match role {
        Role::Server(_) => "server.toml",
        Role::Janus(_) => "janus.toml",
        Role::Client(_) | Role::Restore(_) | Role::User(_) | Role::Operator(_) => "client.toml",
    };
    format!(
        "wrote {dir}/cert.pem, {dir}/key.pem and {dir}/ca.pem for {role}\n\
         next: copy these three files to the host of {role} and name them in its {file} as cert, key and ca;\n\
         \x20     key.pem is private: keep it readable by its program only. ca.key stays on this host\n"
    )
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use janus_proto::tls::Identity;

    use super::*;

    fn group(name: &str) -> (tempfile::TempDir, PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let ca = folder.path().join("ca");
        init(&ca, name).unwrap();
        (folder, ca)
    }

    fn load(dir: &Path) -> Result<Identity, TlsError> {
        Identity::load(dir.join("cert.pem"), dir.join("key.pem"), dir.join("ca.pem"))
    }

    #[test]
    fn each_role_becomes_the_principal_it_was_issued_for() {
        let (folder, ca) = group("home");
        let roles = [
            Role::Server("a".parse().unwrap()),
            Role::Janus("j".parse().unwrap()),
            Role::Client("alice/web1".parse().unwrap()),
            Role::Restore("alice/web1".parse().unwrap()),
            Role::Operator("root".into()),
        ];
        for role in roles {
            let out = folder.path().join(role.to_string().replace(['/', ' '], "-"));
            let serves = matches!(role, Role::Server(_) | Role::Janus(_));
            let hosts = if serves {
                vec!["localhost".into(), "127.0.0.1".into(), "::1".into()]
            } else {
                vec![]
            };
            issue(&ca, &Wanted::new(role.clone(), hosts, DAY), &out).unwrap();
            let identity = load(&out).unwrap();
            assert_eq!(identity.principal().role, role);
            assert_eq!(&*identity.principal().group, "home");
        }
    }

    #[test]
    fn keys_are_private_and_nothing_is_overwritten() {
        let (folder, ca) = group("home");
        let out = folder.path().join("a");
        let wanted = Wanted::new(Role::Server("a".parse().unwrap()), vec!["a".into()], DAY);
        issue(&ca, &wanted, &out).unwrap();
        for key in [ca.join("ca.key"), out.join("key.pem")] {
            assert_eq!(key.metadata().unwrap().permissions().mode() & 0o777, 0o600, "{key:?}");
        }
        let before = fs::read(out.join("key.pem")).unwrap();
        assert!(matches!(issue(&ca, &wanted, &out), Err(PkiError::Exists { .. })));
        assert!(matches!(init(&ca, "home"), Err(PkiError::Exists { .. })));
        assert_eq!(fs::read(out.join("key.pem")).unwrap(), before);
        load(&out).unwrap();
    }

    #[test]
    fn an_expired_certificate_a_foreign_key_and_a_foreign_ca_are_each_named() {
        let (folder, ca) = group("home");
        let (_other_folder, other_ca) = group("home");
        let operator = |valid| Wanted::new(Role::Operator("o".into()), Vec::new(), valid);
        let dir = |name: &str| folder.path().join(name);
        issue(&ca, &operator(Duration::ZERO), &dir("old")).unwrap();
        issue(&ca, &operator(DAY), &dir("a")).unwrap();
        issue(&ca, &operator(DAY), &dir("b")).unwrap();
        std::thread::sleep(Duration::from_millis(1100));
        assert!(matches!(load(&dir("old")), Err(TlsError::Expired { .. })));
        let (cert, key, root) =
            (dir("a").join("cert.pem"), dir("b").join("key.pem"), dir("a").join("ca.pem"));
        assert!(matches!(Identity::load(&cert, &key, &root), Err(TlsError::KeyMismatch { .. })));
        let foreign = Identity::load(&cert, dir("a").join("key.pem"), other_ca.join("ca.pem"));
        assert!(matches!(foreign, Err(TlsError::OtherCa { .. })), "{foreign:?}");
        let missing = Identity::load("", &key, &root).unwrap_err().to_string();
        assert!(missing.contains("`cert` is empty"), "{missing}");
    }

    #[test]
    fn the_commands_are_consistent() {
        let command = PkiCommand::augment_subcommands(clap::Command::new("pki"));
        command.clone().debug_assert();
        let line = "pki issue client --ca c --user u --machine m --hours 5 --out o";
        let matches = command.try_get_matches_from(line.split(' ')).unwrap();
        let Ok(PkiCommand::Issue(args)) = clap::FromArgMatches::from_arg_matches(&matches) else {
            panic!()
        };
        assert_eq!(args.valid(), Duration::from_secs(5 * 3600));
        assert_eq!(args.principal().unwrap(), Role::Client("u/m".parse().unwrap()));
        let rescue = IssueArgs { role: IssueRole::Restore, hours: None, ..args };
        assert_eq!(rescue.valid(), DAY);
        assert_eq!(rescue.principal().unwrap(), Role::Restore("u/m".parse().unwrap()));
    }

    #[test]
    fn a_role_asks_for_its_own_flags() {
        let (folder, ca) = group("home");
        let issue = |role: Role, hosts: &[String]| {
            issue(&ca, &Wanted::new(role, hosts.to_vec(), DAY), &folder.path().join("x"))
        };
        let server = Role::Server("a".parse().unwrap());
        assert!(matches!(issue(server.clone(), &[]), Err(PkiError::Flags { .. })));
        assert!(matches!(
            issue(Role::Operator("o".into()), &["h".into()]),
            Err(PkiError::Flags { .. })
        ));
        assert!(matches!(issue(server, &["a b".into()]), Err(PkiError::Host { .. })));
        assert!(!folder.path().join("x").exists());
    }
}
