//! Keeps the rights up to date: the file is read, and the directory asked, again and again.

use std::{path::PathBuf, sync::Arc, time::Duration};

use janus_proto::grants::Which;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::{
    Member, Members, Policy,
    directory::{self, Users},
    file::{File, Group, PolicyError},
};

/// A policy without a directory is read again after so long.
const AGAIN: Duration = Duration::from_secs(10);

/// Where rights come from, and who is told.
#[derive(Debug)]
pub struct Follow {
    /// The policy file; empty: none.
    pub path: PathBuf,
    /// Part of the digest.
    pub write_only: Vec<Which>,
    /// What is kept up to date.
    pub policy: Arc<Policy>,
    /// The file as it could be read last.
    file: File,
    /// What the directory said last, and when.
    users: Option<(Users, Instant)>,
}

impl Follow {
    /// Reads the file for the first time. Blocks.
    ///
    /// # Errors
    /// When it is none: a server doesn't begin with rights that nobody wrote.
    pub fn new(
        path: PathBuf,
        write_only: Vec<Which>,
        policy: Arc<Policy>,
    ) -> Result<Self, PolicyError> {
        let mut follow = Self { path, write_only, policy, file: File::default(), users: None };
        follow.file = follow.read()?;
        follow.apply();
        Ok(follow)
    }

    fn read(&self) -> Result<File, PolicyError> {
        match self.path.as_os_str().is_empty() {
            true => Ok(File::default()),
            false => File::read(&self.path),
        }
    }

    /// Until `shutdown`.
    pub async fn run(mut self, shutdown: CancellationToken) {
        if self.path.as_os_str().is_empty() {
            return;
        }
        while shutdown.run_until_cancelled(self.round()).await.is_some() {
            let pause = self.file.ldap.as_ref();
            let pause = pause.map_or(AGAIN, |ldap| Duration::from_secs(ldap.refresh_seconds));
            if shutdown.run_until_cancelled(tokio::time::sleep(pause)).await.is_none() {
                break;
            }
        }
    }

    async fn round(&mut self) {
        let mut problems = Vec::new();
        let path = self.path.clone();
        let read = crate::blocking(move || File::read(&path)).await;
        match read {
            Ok(Ok(file)) => self.file = file,
            Ok(Err(error)) => problems.push(format!("{error}; the old rights stay in use")),
            Err(_) => return,
        }
        match self.file.directory() {
            None => self.users = None,
            Some((ldap, groups)) => match directory::users(ldap, &groups).await {
                Ok(users) => self.users = Some((users, Instant::now())),
                Err(error) => {
                    let kept = Duration::from_secs(ldap.keep_seconds);
                    self.users = self.users.take().filter(|(_, asked)| asked.elapsed() < kept);
                    let then = match &self.users {
                        Some(_) => "what it said last counts, for now",
                        None => "its groups have no members",
                    };
                    problems.push(format!("directory: {error}; {then}"));
                }
            },
        }
        self.apply();
        if self.policy.problems() != problems {
            match problems.is_empty() {
                true => tracing::info!("rights are read again"),
                false => problems.iter().for_each(|problem| tracing::error!("{problem}")),
            }
            self.policy.set_problems(problems);
        }
    }

    fn apply(&self) {
        let users = self.users.as_ref().map(|(users, _)| users);
        self.policy.set(self.file.digest(&self.write_only), members(&self.file, users));
    }
}

/// Who is in which group, by the file and by what the directory says.
pub fn members(file: &File, users: Option<&Users>) -> Vec<Members> {
    let of_directory = |group: &Group| {
        let named = group.ldap.iter().filter_map(|name| users?.get(name)).flatten();
        named.map(|user| Member::User(user.clone())).collect::<Vec<_>>()
    };
    let all = file.groups.values().map(|group| {
        let members = group.members.iter().cloned().chain(of_directory(group)).collect();
        Members { members, rights: group.rights.clone() }
    });
    all.collect()
}
