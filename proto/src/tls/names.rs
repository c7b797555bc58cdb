//! Certificates of a PKI that isn't ours: which of their names stand for which principal.
//!
//! Section `[pki]` of every program's settings. The authorities in `pki.ca` are apart from those in `ca`: in certificates of
//! the former only the rules here count, in those of the latter only a `janus://` name. So who can get some certificate of a
//! company's authority is nobody here but by a rule, and a rule says nothing of certificates that `pki issue` made.
//!
//! A rule's pattern takes whole names. Only what is certain is believed: all names of a certificate that fit a rule must
//! stand for one principal, else it is refused. In doubt nobody gets in, rather than somebody as somebody else.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    path::PathBuf,
    sync::Arc,
};

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use x509_parser::prelude::{GeneralName, X509Certificate};

use super::{
    TlsError,
    principal::{Limits, Principal, Role, parse},
};
use crate::{
    error::shorten,
    ids::{MachineKey, check_name},
};

/// Names of a certificate that an error shows.
const MOST_SHOWN: usize = 8;

/// Settings of section `[pki]`. Without rules there is no such PKI.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Pki {
    /// Group that its certificates belong to.
    pub group: String,
    /// Its authorities, PEM.
    pub ca: PathBuf,
    /// A server's or janus' certificate must be for the host that was called.
    pub check_hosts: bool,
    /// Rules, by names of their own.
    pub names: BTreeMap<String, NameRule>,
}

impl Default for Pki {
    fn default() -> Self {
        Self { group: String::new(), ca: PathBuf::new(), check_hosts: true, names: BTreeMap::new() }
    }
}

/// One line of help for each key.
pub const PKI_KEYS: &[(&str, &str)] = &[
    ("group", "Group of certificates of a PKI of your own: see docs/identities.md"),
    ("ca", "Authorities of that PKI, PEM; of their certificates only the rules in pki.names count"),
    ("check_hosts", "Its servers and janus must be called by a host of their certificates"),
];

/// One rule: certificates with such a name are for this principal. What the pattern doesn't hold as `{user}`, `{machine}` or
/// `{name}` is set.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct NameRule {
    /// Pattern of a URI.
    pub uri: String,
    /// Pattern of a DNS name.
    pub dns: String,
    /// Pattern of a mail address.
    pub email: String,
    /// Pattern of the subject's common name.
    pub cn: String,
    /// What such a principal may be.
    pub role: Option<RoleName>,
    /// Of a client or restore.
    pub user: String,
    /// Of a client or restore.
    pub machine: String,
    /// Of a server, janus, user or operator.
    pub name: String,
    /// Calls through a janus need a signature, as by `janus-limit:proof`. They do for clients, restores, users and operators.
    pub proof: Option<bool>,
    /// Users that a janus speaks for, as by `janus-limit:user`; empty: all.
    pub users: Vec<String>,
}

/// A role, by the name it has in certificates and settings.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RoleName {
    /// A machine that backs itself up.
    Client,
    /// Who brings a machine back.
    Restore,
    /// A backup server.
    Server,
    /// A router.
    Janus,
    /// A person who owns machines.
    User,
    /// A person who administers.
    Operator,
}

/// A setting of `[pki]` that can't be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("pki.{key}: {reason}")]
pub struct PkiError {
    key: String,
    reason: String,
}

impl Pki {
    /// Checks what types can't.
    ///
    /// # Errors
    /// Names the key or rule.
    pub fn check(&self) -> Result<(), PkiError> {
        Names::of(self).map(drop)
    }
}

/// The kinds of names that rules read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Uri,
    Dns,
    Email,
    CommonName,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Uri => "uri",
            Self::Dns => "dns",
            Self::Email => "email",
            Self::CommonName => "cn",
        })
    }
}

impl Kind {
    /// No placeholder takes it.
    fn separator(self) -> char {
        match self {
            Self::Uri => '/',
            Self::Dns | Self::CommonName => '.',
            Self::Email => '@',
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Field {
    User,
    Machine,
    Name,
}

impl Field {
    const ALL: [Self; 3] = [Self::User, Self::Machine, Self::Name];

    fn as_str(self) -> &'static str {
        match self {
            Self::User => "user",
            Self::Machine => "machine",
            Self::Name => "name",
        }
    }
}

/// What stands between two separators of a pattern: at most one placeholder, so that there is one way to read a name.
#[derive(Debug)]
struct Part {
    before: String,
    field: Option<(Field, String)>,
}

impl Part {
    fn parse(text: &str) -> Result<Self, String> {
        let Some((before, rest)) = text.split_once('{') else {
            return match text.contains('}') {
                true => Err("has a } without {".into()),
                false => Ok(Self { before: text.to_owned(), field: None }),
            };
        };
        let (name, after) = rest.split_once('}').ok_or("has a { without }")?;
        let field = Field::ALL.into_iter().find(|field| field.as_str() == name);
        let field = field
            .ok_or_else(|| format!("{{{name}}} is none of {{user}}, {{machine}}, {{name}}"))?;
        if before.contains('}') || after.contains(['{', '}']) {
            return Err(format!(
                "more than one placeholder in {text:?}, which can be read in several ways: keep them apart by a separator"
            ));
        }
        Ok(Self { before: before.to_owned(), field: Some((field, after.to_owned())) })
    }

    /// What its placeholder stands for, if it has one. `None`: it doesn't fit.
    fn read<'a>(&self, text: &'a str) -> Option<Option<(Field, &'a str)>> {
        let Some((field, after)) = &self.field else {
            return (text == self.before).then_some(None);
        };
        let inner = text.strip_prefix(self.before.as_str())?.strip_suffix(after.as_str())?;
        (!inner.is_empty()).then_some(Some((*field, inner)))
    }
}

/// A rule that can be used.
#[derive(Debug)]
struct Rule {
    label: String,
    kind: Kind,
    parts: Vec<Part>,
    role: RoleName,
    set: BTreeMap<Field, String>,
    limits: Limits,
}

impl Rule {
    fn of(label: &str, rule: &NameRule) -> Result<Self, String> {
        let patterns = [
            (Kind::Uri, &rule.uri),
            (Kind::Dns, &rule.dns),
            (Kind::Email, &rule.email),
            (Kind::CommonName, &rule.cn),
        ];
        let mut given = patterns.into_iter().filter(|(_, pattern)| !pattern.is_empty());
        let (Some((kind, pattern)), None) = (given.next(), given.next()) else {
            return Err("needs one of uri, dns, email, cn".into());
        };
        let role = rule.role.ok_or(
            "needs a role: \"client\", \"restore\", \"server\", \"janus\", \"user\" or \"operator\"",
        )?;
        let parts = parse_pattern(kind, pattern)
            .map_err(|reason| format!("{kind} = {pattern:?}: {reason}"))?;
        let set = rule.set()?;
        let held = parts.iter().filter_map(|part| part.field.as_ref().map(|(field, _)| *field));
        let mut all: Vec<_> = held.chain(set.keys().copied()).collect();
        all.sort();
        let needed = match role {
            RoleName::Client | RoleName::Restore => &[Field::User, Field::Machine][..],
            RoleName::Server | RoleName::Janus | RoleName::User | RoleName::Operator => {
                &[Field::Name]
            }
        };
        if all != needed {
            let names: Vec<_> = needed.iter().map(|field| field.as_str()).collect();
            return Err(format!(
                "this role needs {}, each once: in the pattern, such as {{{}}}, or set",
                names.join(" and "),
                names[0]
            ));
        }
        let limits = rule.limits(role)?;
        Ok(Self { label: label.to_owned(), kind, parts, role, set, limits })
    }

    /// Whom a name stands for; `None`: the rule isn't about it.
    fn read(&self, name: &str) -> Option<Result<Role, String>> {
        // Hosts have no case. Everywhere else another case may be another's.
        let folded = (self.kind == Kind::Dns).then(|| name.to_ascii_lowercase());
        let name = folded.as_deref().unwrap_or(name);
        let mut values = self.set.clone();
        let mut texts = name.split(self.kind.separator());
        for part in &self.parts {
            if let Some((field, value)) = part.read(texts.next()?)? {
                values.insert(field, value.to_owned());
            }
        }
        texts.next().is_none().then(|| self.role(&values))
    }

    fn role(&self, values: &BTreeMap<Field, String>) -> Result<Role, String> {
        // All are there: the rule was made so.
        let value = |field| values.get(&field).map(String::as_str).unwrap_or_default();
        let key = || {
            MachineKey::new(value(Field::User), value(Field::Machine))
                .map_err(|error| error.to_string())
        };
        let name = value(Field::Name);
        let id = || name.parse().map_err(|error: crate::error::WireError| error.to_string());
        Ok(match self.role {
            RoleName::Client => Role::Client(key()?),
            RoleName::Restore => Role::Restore(key()?),
            RoleName::Server => Role::Server(id()?),
            RoleName::Janus => Role::Janus(id()?),
            RoleName::User => {
                check_name("user", name).map_err(|error| error.to_string())?;
                Role::User(name.to_owned())
            }
            RoleName::Operator => {
                check_name("operator", name).map_err(|error| error.to_string())?;
                Role::Operator(name.to_owned())
            }
        })
    }
}

impl NameRule {
    fn set(&self) -> Result<BTreeMap<Field, String>, String> {
        let given =
            [(Field::User, &self.user), (Field::Machine, &self.machine), (Field::Name, &self.name)];
        let mut set = BTreeMap::new();
        for (field, value) in given.into_iter().filter(|(_, value)| !value.is_empty()) {
            check_name(field.as_str(), value).map_err(|error| error.to_string())?;
            set.insert(field, value.clone());
        }
        Ok(set)
    }

    fn limits(&self, role: RoleName) -> Result<Limits, String> {
        let signs = !matches!(role, RoleName::Server | RoleName::Janus);
        if self.proof.is_some() && !signs {
            return Err("proof is for clients, restores, users and operators: servers always prove, and a janus has nothing to".into());
        }
        if !self.users.is_empty() && role != RoleName::Janus {
            return Err("users is for a janus: others speak for themselves".into());
        }
        for user in &self.users {
            check_name("users", user).map_err(|error| error.to_string())?;
        }
        let users = self.users.iter().collect::<BTreeSet<_>>().into_iter().cloned().collect();
        Ok(Limits { proof: self.proof.unwrap_or(signs), users, enrolled: None })
    }
}

fn parse_pattern(kind: Kind, pattern: &str) -> Result<Vec<Part>, String> {
    let takes = |c: char| c.is_ascii_graphic() || c == ' ' && kind == Kind::CommonName;
    if let Some(other) = pattern.chars().find(|c| !takes(*c) || "*?#%\\".contains(*c)) {
        return Err(format!(
            "{other:?} can't stand in it: names are taken as a whole and as they are"
        ));
    }
    let pattern = match kind {
        Kind::Dns => pattern.to_ascii_lowercase(),
        _ => pattern.to_owned(),
    };
    let parts: Vec<_> =
        pattern.split(kind.separator()).map(Part::parse).collect::<Result<_, _>>()?;
    let is_fixed = |part: &Part| part.field.is_none();
    let is_empty = |part: &Part| is_fixed(part) && part.before.is_empty();
    let is_good = match (kind, parts.as_slice()) {
        (Kind::Uri, [scheme, none, host, path @ ..]) => {
            if is_own(&scheme.before) {
                return Err("janus:// counts by itself, in certificates of `ca`".into());
            }
            let is_scheme = is_fixed(scheme) && scheme.before.len() > 1;
            let is_host = is_fixed(host) && !is_empty(host);
            is_scheme
                && scheme.before.ends_with(':')
                && is_empty(none)
                && is_host
                && !path.is_empty()
        }
        (Kind::Uri, _) => false,
        (Kind::Email, [_, host]) => is_fixed(host) && !is_empty(host),
        (Kind::Email, _) => false,
        (Kind::Dns | Kind::CommonName, _) => true,
    };
    let path = if kind == Kind::Uri { parts.get(2..).unwrap_or_default() } else { &parts };
    match is_good && !path.iter().any(is_empty) {
        true => Ok(parts),
        false => Err(match kind {
            Kind::Uri => "is not SCHEME://HOST/PATH, with placeholders in the path alone",
            Kind::Email => "is not NAME@HOST, with placeholders in the name alone",
            Kind::Dns | Kind::CommonName => "has an empty part",
        }
        .into()),
    }
}

/// The rules of a PKI, ready for use.
#[derive(Debug, Clone)]
pub(super) struct Names {
    pub(super) group: Arc<str>,
    rules: Arc<[Rule]>,
}

/// A name that a certificate has.
type Shown<'a> = (Kind, &'a str);

impl Names {
    /// `None`: the settings name no PKI.
    pub(super) fn of(pki: &Pki) -> Result<Option<Self>, PkiError> {
        let wrong = |key: &str, reason: String| PkiError { key: key.to_owned(), reason };
        if pki.names.is_empty() {
            return match *pki == Pki::default() {
                true => Ok(None),
                false => {
                    let reason = "is empty: without rules its certificates are nobody's";
                    Err(wrong("names", reason.into()))
                }
            };
        }
        check_name("group", &pki.group).map_err(|error| wrong("group", error.to_string()))?;
        if pki.ca.as_os_str().is_empty() {
            let reason = "is empty: it names the file of the authorities whose certificates pki.names is about";
            return Err(wrong("ca", reason.into()));
        }
        let rule = |(label, rule): (&String, &NameRule)| {
            Rule::of(label, rule).map_err(|reason| wrong(&format!("names.{label}"), reason))
        };
        let rules = pki.names.iter().map(rule).collect::<Result<_, _>>()?;
        Ok(Some(Self { group: pki.group.as_str().into(), rules }))
    }

    /// Whom a certificate of this PKI is for. Checks neither its chain nor its dates.
    pub(super) fn principal(&self, der: Bytes) -> Result<Principal, TlsError> {
        let certificate = parse(&der)?;
        let is_subject_read = self.rules.iter().any(|rule| rule.kind == Kind::CommonName);
        let (role, limits) = shown(&certificate, is_subject_read)
            .and_then(|shown| self.decide(&shown))
            .map_err(|reason| TlsError::NotMapped { reason })?;
        Ok(Principal::mapped(self.group.clone(), role, limits, der))
    }

    fn decide(&self, shown: &[Shown<'_>]) -> Result<(Role, Limits), String> {
        let uris = shown.iter().filter(|(kind, _)| *kind == Kind::Uri);
        let mut found: Option<(Role, &Rule, &str)> = None;
        for (kind, name) in shown {
            for rule in self.rules.iter().filter(|rule| rule.kind == *kind) {
                let Some(read) = rule.read(name) else { continue };
                let label = &rule.label;
                let role = read.map_err(|reason| {
                    format!(
                        "has the {}, which rule {label} can't take: {reason}",
                        show((*kind, name))
                    )
                })?;
                // X509-SVID, section 2: such a certificate has exactly one.
                if name.starts_with("spiffe://") && uris.clone().count() > 1 {
                    return Err(format!(
                        "has several URIs, and one of SPIFFE has just one: {}",
                        list(shown)
                    ));
                }
                match &found {
                    Some((before, by, name_before))
                        if (before, &by.limits) != (&role, &rule.limits) =>
                    {
                        return Err(format!(
                            "is for more than one: {before} by its {} (rule {}), {role} by its {} (rule {label}){}",
                            show((by.kind, name_before)),
                            by.label,
                            show((*kind, name)),
                            if *before == role { ", with other limits" } else { "" }
                        ));
                    }
                    Some(_) => {}
                    None => found = Some((role, rule, name)),
                }
            }
        }
        let (role, rule, _) = found.ok_or_else(|| {
            format!("has no name that a rule of pki.names takes: {}", list(shown))
        })?;
        Ok((role, rule.limits.clone()))
    }
}

/// True of URIs that say by themselves who somebody is, and what limits hold for him.
fn is_own(uri: &str) -> bool {
    let scheme = uri.split(':').next().unwrap_or(uri).to_ascii_lowercase();
    scheme == "janus" || scheme.starts_with("janus-")
}

/// The names of a certificate, all of them: one that can't be read is one too many.
fn shown<'a>(
    certificate: &'a X509Certificate<'_>,
    is_subject_read: bool,
) -> Result<Vec<Shown<'a>>, String> {
    let names = certificate.subject_alternative_name();
    let names = names.map_err(|_| "has an invalid list of names".to_owned())?;
    let names = names.map(|names| names.value.general_names.as_slice()).unwrap_or_default();
    let mut shown = Vec::new();
    for name in names {
        match name {
            GeneralName::URI(uri) => {
                if is_own(uri) {
                    let uri = shorten(uri);
                    return Err(format!(
                        "has the name {uri:?}, which may stand in certificates of `ca` alone, not in those of pki.ca"
                    ));
                }
                shown.push((Kind::Uri, *uri));
            }
            GeneralName::DNSName(name) => shown.push((Kind::Dns, *name)),
            GeneralName::RFC822Name(name) => shown.push((Kind::Email, *name)),
            GeneralName::Invalid(..) => return Err("has a name that isn't one".into()),
            _ => {}
        }
    }
    for name in certificate.subject().iter_common_name() {
        match name.as_str() {
            Ok(name) => shown.push((Kind::CommonName, name)),
            Err(_) if is_subject_read => return Err("has a common name that isn't text".into()),
            Err(_) => {}
        }
    }
    Ok(shown)
}

fn show((kind, name): Shown<'_>) -> String {
    format!("{kind} {:?}", shorten(name))
}

fn list(shown: &[Shown<'_>]) -> String {
    let mut listed: Vec<_> = shown.iter().take(MOST_SHOWN).map(|one| show(*one)).collect();
    match shown.len().saturating_sub(MOST_SHOWN) {
        0 if shown.is_empty() => return "it has none".into(),
        0 => {}
        more => listed.push(format!("and {more} more")),
    }
    listed.join(", ")
}

#[cfg(test)]
mod tests;
