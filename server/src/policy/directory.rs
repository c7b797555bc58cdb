//! Who is in the groups of a directory, by LDAP (RFC 4511).
//!
//! Groups name members by `member`, `uniqueMember` (names of entries, of groups too) or `memberUid` (names of users). A user's name is
//! the attribute that the policy says. Active Directory gives long lists in parts (`member;range=0-1499`, [MS-ADTS] 3.1.1.3.1.3.3).
//! Accounts that are disabled have no rights. What a directory says is trusted, but not to be well-formed.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    sync::Arc,
    time::Duration,
};

use futures::{StreamExt, stream};
use janus_proto::{ids::check_name, trust::trusting};
use ldap3::{
    Ldap as Connection, LdapConnAsync, LdapConnSettings, LdapError, Scope, SearchEntry, drive,
};
use tokio::time::timeout;

use super::file::{Ldap, MAX_MEMBERS, PolicyError};

/// For connecting, and for each answer.
const ANSWER: Duration = Duration::from_secs(5);
/// For all of it. Together with the longest `refresh_seconds` it is below a minute.
const ALL: Duration = Duration::from_secs(14);
/// Entries asked for at once.
const AT_ONCE: usize = 16;
/// Parts of one group's list of members.
const MAX_PARTS: usize = 100;
/// `ACCOUNTDISABLE` of Active Directory's `userAccountControl` ([MS-ADTS] 2.2.16).
const DISABLED: u32 = 2;
/// Results that say that there is no such entry for us: `noSuchObject`, `invalidDNSyntax`, `insufficientAccessRights`.
const NOT_THERE: [u32; 3] = [32, 34, 50];

/// Users by group of the directory, in small letters.
pub type Users = BTreeMap<String, BTreeSet<String>>;

/// Why a directory can't be asked.
#[derive(Debug, thiserror::Error)]
pub enum DirectoryError {
    /// Nobody to trust, or no password.
    #[error("{0}")]
    Setup(String),
    /// The password's file.
    #[error(transparent)]
    Password(#[from] PolicyError),
    /// No answer, or one that isn't what was asked for.
    #[error("{0}")]
    Ldap(#[from] LdapError),
    /// The account isn't let in.
    #[error("the directory doesn't let {account} in: {reason}")]
    Account {
        /// Who asks.
        account: String,
        /// What it says.
        reason: String,
    },
    /// A group that the policy names.
    #[error("there is no group {0}, or this account may not read it")]
    NoGroup(String),
    /// It takes too long.
    #[error("no answer in {} s", ALL.as_secs())]
    Slow,
    /// More than a directory may name.
    #[error("more than {MAX_MEMBERS} entries in the groups that the policy names")]
    TooMany,
    /// What it sends can't be read.
    #[error("the directory's answer isn't LDAP")]
    Nonsense,
}

/// Asks for the users in these groups, directly or by other groups: each directory in turn, until one answers.
///
/// # Errors
/// Names each directory and why it didn't.
pub async fn users(ldap: &Ldap, groups: &BTreeSet<String>) -> Result<Users, String> {
    let mut failed = Vec::new();
    for url in &ldap.urls {
        let (ldap, groups, to) = (ldap.clone(), groups.clone(), url.clone());
        // The library panics over answers that aren't of its form: that is this task's end and nobody else's.
        let asking = tokio::spawn(async move {
            timeout(ALL, ask(&ldap, &to, &groups)).await.unwrap_or(Err(DirectoryError::Slow))
        });
        match asking.await.unwrap_or(Err(DirectoryError::Nonsense)) {
            Ok(users) => return Ok(users),
            Err(error) => failed.push(format!("{url}: {error}")),
        }
    }
    Err(failed.join("; "))
}

async fn ask(ldap: &Ldap, url: &str, groups: &BTreeSet<String>) -> Result<Users, DirectoryError> {
    let connection = connect(ldap, url).await?;
    let mut asked = Asked { connection, attribute: ldap.user_attribute.clone(), entries: 0 };
    let mut users = Users::new();
    for group in groups {
        users.insert(group.clone(), asked.users_of(group).await?);
    }
    let _ = asked.connection.unbind().await;
    Ok(users)
}

async fn connect(ldap: &Ldap, url: &str) -> Result<Connection, DirectoryError> {
    let (settings, secret) = (ldap.clone(), ldap.clone());
    let reading = move || {
        let ca = Some(settings.ca.as_path()).filter(|ca| !ca.as_os_str().is_empty());
        let tls = if settings.plain { None } else { Some(trusting(ca)?) };
        Ok::<_, String>((tls, secret.password()))
    };
    let read = tokio::task::spawn_blocking(reading).await;
    let read = read.map_err(|error| DirectoryError::Setup(error.to_string()))?;
    let (tls, password) = read.map_err(DirectoryError::Setup)?;
    let password = password?;
    let mut settings = LdapConnSettings::new().set_conn_timeout(ANSWER);
    if let Some(tls) = tls {
        settings = settings.set_starttls(url.starts_with("ldap://")).set_config(Arc::new(tls));
    }
    let (connection, mut ldap_of) = LdapConnAsync::with_settings(settings, url).await?;
    // Ends with the last handle.
    drive!(connection);
    if !ldap.bind_dn.is_empty() {
        let bound = ldap_of.with_timeout(ANSWER).simple_bind(&ldap.bind_dn, &password).await?;
        bound.success().map_err(|error| DirectoryError::Account {
            account: ldap.bind_dn.clone(),
            reason: error.to_string(),
        })?;
    }
    Ok(ldap_of)
}

struct Asked {
    connection: Connection,
    /// With the user's name.
    attribute: String,
    /// How many were asked for.
    entries: usize,
}

/// What an entry is.
#[derive(Debug, PartialEq, Eq)]
enum Entry {
    /// A group: the names of its members' entries, and of users.
    Group { members: Vec<String>, users: Vec<String>, next: Option<usize> },
    /// A user, unless the account is disabled or has no name that could stand in a certificate.
    User(Option<String>),
}

impl Asked {
    /// Users in a group, and in the groups in it.
    async fn users_of(&mut self, group: &str) -> Result<BTreeSet<String>, DirectoryError> {
        let mut users = BTreeSet::new();
        let mut seen: HashSet<String> = HashSet::from([group.to_lowercase()]);
        let mut wanted = vec![group.to_owned()];
        while !wanted.is_empty() {
            self.entries += wanted.len();
            if self.entries > MAX_MEMBERS {
                return Err(DirectoryError::TooMany);
            }
            let this = &*self;
            let asking = std::mem::take(&mut wanted).into_iter().map(|name| async move {
                let entry = this.entry(&name).await;
                (name, entry)
            });
            let found: Vec<_> = stream::iter(asking).buffer_unordered(AT_ONCE).collect().await;
            for (name, entry) in found {
                match entry? {
                    Some(Entry::Group { members, users: named, .. }) => {
                        users.extend(named.into_iter().filter_map(|name| valid(&name)));
                        let new = |name: &String| seen.insert(name.to_lowercase());
                        wanted.extend(members.into_iter().filter(new));
                    }
                    Some(Entry::User(user)) => users.extend(user),
                    None if name == group => return Err(DirectoryError::NoGroup(name)),
                    // It was removed a moment ago, or lies where we may not look.
                    None => {}
                }
            }
        }
        match users.len() > MAX_MEMBERS {
            true => Err(DirectoryError::TooMany),
            false => Ok(users),
        }
    }

    /// The entry of this name, with all of its members.
    async fn entry(&self, name: &str) -> Result<Option<Entry>, DirectoryError> {
        let Some(mut entry) = self.part(name, "member").await? else { return Ok(None) };
        for _ in 0..MAX_PARTS {
            let Entry::Group { members, next: Some(from), .. } = &mut entry else {
                return Ok(Some(entry));
            };
            let more = self.part(name, &format!("member;range={from}-*")).await?;
            match more {
                Some(Entry::Group { members: more, next, .. }) if !more.is_empty() => {
                    members.extend(more);
                    let Entry::Group { next: of_entry, .. } = &mut entry else { break };
                    *of_entry = next;
                }
                _ => return Err(DirectoryError::Nonsense),
            }
        }
        Err(DirectoryError::TooMany)
    }

    async fn part(&self, name: &str, member: &str) -> Result<Option<Entry>, DirectoryError> {
        let attributes = [
            "objectClass",
            member,
            "uniqueMember",
            "memberUid",
            "userAccountControl",
            "nsAccountLock",
            &self.attribute,
        ];
        let mut connection = self.connection.clone();
        let asked = connection.with_timeout(ANSWER);
        let found = asked.search(name, Scope::Base, "(objectClass=*)", attributes).await?;
        let result = found.1;
        match result.rc {
            0 => {}
            code if NOT_THERE.contains(&code) => return Ok(None),
            _ => return Err(LdapError::LdapResult { result }.into()),
        }
        let entry = found.0.into_iter().next().map(SearchEntry::construct);
        Ok(entry.map(|entry| read(&entry, &self.attribute)))
    }
}

/// What an entry is; `attribute` has the name of a user.
fn read(entry: &SearchEntry, attribute: &str) -> Entry {
    let is_group = values(entry, "objectClass").any(|class| {
        ["group", "groupofnames", "groupofuniquenames", "posixgroup", "groupofmembers"]
            .contains(&class.to_ascii_lowercase().as_str())
    });
    if is_group {
        let (mut members, mut next) = (Vec::new(), None);
        for (name, found) in &entry.attrs {
            let name = name.to_ascii_lowercase();
            if name == "uniquemember" || name == "member" {
                members.extend(found.iter().cloned());
            } else if let Some(range) = name.strip_prefix("member;range=") {
                members.extend(found.iter().cloned());
                let last = range.split_once('-').and_then(|(_, last)| last.parse().ok());
                next = last.map(|last: usize| last.saturating_add(1));
            }
        }
        let users = values(entry, "memberUid").map(str::to_owned).collect();
        return Entry::Group { members, users, next };
    }
    let flags = values(entry, "userAccountControl").next().map(str::parse::<u32>);
    let is_disabled = flags.is_some_and(|flags| flags.is_ok_and(|flags| flags & DISABLED != 0))
        || values(entry, "nsAccountLock").any(|lock| lock.eq_ignore_ascii_case("true"));
    let mut names = values(entry, attribute);
    // Of two names nobody knows which is meant.
    let name = names.next().filter(|_| names.next().is_none() && !is_disabled);
    Entry::User(name.and_then(valid))
}

fn values<'a>(entry: &'a SearchEntry, attribute: &'a str) -> impl Iterator<Item = &'a str> {
    let found = entry.attrs.iter().filter(move |(name, _)| name.eq_ignore_ascii_case(attribute));
    found.flat_map(|(_, values)| values).map(String::as_str)
}

/// The name as policies have it, if a certificate can have it.
fn valid(name: &str) -> Option<String> {
    let is_valid = check_name("user", name);
    if let Err(error) = &is_valid {
        tracing::debug!(%error, "a member of a directory's group whose name no certificate can have");
    }
    is_valid.is_ok().then(|| name.to_ascii_lowercase())
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;

    fn entry(attributes: &[(&str, &[&str])]) -> SearchEntry {
        let texts = |values: &[&str]| values.iter().map(|value| (*value).to_owned()).collect();
        let attrs = attributes.iter().map(|(name, values)| ((*name).to_owned(), texts(values)));
        SearchEntry { dn: "cn=x".into(), attrs: attrs.collect(), bin_attrs: HashMap::new() }
    }

    fn user(attributes: &[(&str, &[&str])]) -> Option<String> {
        match read(&entry(attributes), "sAMAccountName") {
            Entry::User(name) => name,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn groups_of_active_directory_come_in_parts() {
        let class = ("objectClass", &["top", "group"][..]);
        let name = ("sAMAccountName", &["helpdesk"][..]);
        let part = entry(&[class, name, ("member;range=0-1499", &["cn=a", "cn=b"])]);
        let Entry::Group { members, next, .. } = read(&part, "sAMAccountName") else { panic!() };
        assert_eq!((members.len(), next), (2, Some(1500)));
        let last = entry(&[class, ("Member;Range=1500-*", &["cn=c"])]);
        let Entry::Group { members, next, .. } = read(&last, "sAMAccountName") else { panic!() };
        assert_eq!((members, next), (vec!["cn=c".to_owned()], None));
        let endless = format!("member;range=0-{}", usize::MAX);
        let Entry::Group { next, .. } = read(&entry(&[class, (&endless, &[])]), "uid") else {
            panic!()
        };
        assert_eq!(next, Some(usize::MAX));
    }

    #[test]
    fn who_is_disabled_or_has_no_name_of_a_certificate_is_nobody() {
        let name = ("samaccountname", &["Carol"][..]);
        assert_eq!(user(&[name]).as_deref(), Some("carol"));
        assert_eq!(user(&[name, ("userAccountControl", &["512"])]).as_deref(), Some("carol"));
        for nobody in [
            &[name, ("userAccountControl", &["514"][..])][..],
            &[name, ("nsAccountLock", &["TRUE"])],
            &[("sAMAccountName", &["carol", "admin"])],
            &[("sAMAccountName", &["../carol"])],
            &[("sAMAccountName", &[""])],
            &[("uid", &["carol"])],
            &[],
        ] {
            assert_eq!(user(nobody), None, "{nobody:?}");
        }
    }
}
