//! Who may call what: one rule for each method that a server answers.
//!
//! The gate asks them before a service sees a call. Whose machine it is about is decided by the services, which know:
//! [`Caller`](crate::caller::Caller). A test holds that each method of the schema has a rule, and that `docs/identities.md` shows the
//! same table.

use janus_proto::tls::Role;

use crate::policy::{Grants, Right};

/// What one role may do by a method.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reach {
    /// Nothing.
    Nothing,
    /// What concerns the caller's own machine, or a machine of that user.
    Own,
    /// What concerns any machine.
    Any,
}

use Reach::{Any, Nothing, Own};

/// The rule of one method.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rule {
    /// `Service/Method` of package `janus.v1`.
    pub method: &'static str,
    /// A machine.
    pub client: Reach,
    /// Who brings one back.
    pub restore: Reach,
    /// A person who owns machines.
    pub user: Reach,
    /// Another server.
    pub server: Reach,
    /// A janus that speaks for itself.
    pub janus: Reach,
    /// A person who administers.
    pub operator: Reach,
    /// Rights of groups, one of which a machine or a person needs for machines that aren't its own.
    pub groups: &'static [Right],
}

const fn rule(
    method: &'static str,
    [client, restore, user, server, janus, operator]: [Reach; 6],
    groups: &'static [Right],
) -> Rule {
    Rule { method, client, restore, user, server, janus, operator, groups }
}

/// Only the machine itself adds to its backups, or who has that right.
const WRITE: [Reach; 6] = [Own, Nothing, Nothing, Nothing, Nothing, Nothing];
/// Servers read each other's copies: they have the same data themselves.
const READ: [Reach; 6] = [Own, Own, Own, Any, Nothing, Any];
const EVERYBODY: [Reach; 6] = [Any, Any, Any, Any, Any, Any];
/// Who makes backups of a machine.
const BACKUP: &[Right] = &[Right::Backup];
/// Who makes backups sees which there are, and hashes: what changed is found by them.
const EITHER: &[Right] = &[Right::Backup, Right::Restore];
const RESTORE: &[Right] = &[Right::Restore];

/// In the paths of calls that make backups.
pub const WRITES: &str = "BackupService/";
/// What a caller may not do who may not write.
pub const WRITING: &str = "write backups: use a client certificate";

/// All of them.
pub const RULES: &[Rule] = &[
    rule("BackupService/StartBackup", WRITE, BACKUP),
    rule("BackupService/WriteBlocks", WRITE, BACKUP),
    rule("BackupService/CommitBackup", WRITE, BACKUP),
    rule("BackupService/AbortBackup", WRITE, BACKUP),
    rule("BackupService/GetBackup", [Own, Own, Own, Nothing, Nothing, Any], EITHER),
    rule("RestoreService/OpenSnapshot", READ, EITHER),
    rule("RestoreService/CloseSnapshot", READ, EITHER),
    rule("RestoreService/ReadHashes", READ, EITHER),
    rule("RestoreService/ReadBlocks", READ, RESTORE),
    rule("CatalogService/ListMachines", READ, EITHER),
    rule("CatalogService/ListDisks", READ, EITHER),
    rule("CatalogService/ListSnapshots", READ, EITHER),
    rule("CatalogService/GetSnapshot", READ, EITHER),
    rule("TableService/ReadTable", READ, EITHER),
    rule("TableService/ListTables", READ, EITHER),
    rule("ServerInfoService/GetServerInfo", EVERYBODY, &[]),
    rule("ServerInfoService/GetRouterStatus", EVERYBODY, &[]),
    rule("ServerInfoService/WakeServers", EVERYBODY, &[]),
    rule("ProbeService/Upload", EVERYBODY, &[]),
    rule("ProbeService/Download", EVERYBODY, &[]),
];

/// Services that tell nothing of any machine.
const OPEN: &[&str] = &["grpc.health.v1.", "grpc.reflection.v1.", "grpc.reflection.v1alpha."];

impl Rule {
    /// What it gives to a role.
    pub fn of(&self, role: &Role) -> Reach {
        match role {
            Role::Client(_) => self.client,
            Role::Restore(_) => self.restore,
            Role::User(_) => self.user,
            Role::Server(_) => self.server,
            Role::Janus(_) => self.janus,
            Role::Operator(_) => self.operator,
        }
    }
}

/// Whether a role, or what groups give, has any part in the method of this path (`/package.Service/Method`). A method that this version
/// doesn't have is left to the services, which say so.
pub fn may_call(role: &Role, grants: &Grants, path: &str) -> bool {
    let name = path.trim_start_matches('/');
    if OPEN.iter().any(|open| name.starts_with(open)) {
        return true;
    }
    let method = name.strip_prefix("janus.v1.").unwrap_or(name);
    let rule = RULES.iter().find(|rule| rule.method == method);
    rule.is_none_or(|rule| {
        rule.of(role) != Nothing || rule.groups.iter().any(|right| grants.have(*right))
    })
}

#[cfg(test)]
mod tests {
    use janus_proto::pb;
    use prost::Message;
    use prost_types::FileDescriptorSet;

    use super::*;

    /// Answered by janus, or on a port of its own.
    const ELSEWHERE: &[&str] = &["ReportService", "MaintenanceService", "EnrollmentService"];

    #[test]
    fn every_method_has_one_rule_and_every_rule_a_method() {
        let all = FileDescriptorSet::decode(pb::DESCRIPTORS).unwrap();
        let ours = all.file.iter().filter(|file| file.package() == "janus.v1");
        let services = ours.flat_map(|file| &file.service);
        let services = services.filter(|service| !ELSEWHERE.contains(&service.name()));
        let mut methods: Vec<_> = services
            .flat_map(|service| {
                service.method.iter().map(|method| format!("{}/{}", service.name(), method.name()))
            })
            .collect();
        let mut rules: Vec<_> = RULES.iter().map(|rule| rule.method.to_owned()).collect();
        methods.sort();
        rules.sort();
        assert_eq!(methods, rules);
    }

    #[test]
    fn the_document_shows_these_rules() {
        let document = include_str!("../../docs/identities.md");
        let shown = |reach| match reach {
            Nothing => "-",
            Own => "own",
            Any => "any",
        };
        for rule in RULES {
            let Rule { method, client, restore, user, server, janus, operator, groups } = *rule;
            let cells = [client, restore, user, server, janus, operator].map(shown).join(" | ");
            let groups: Vec<_> = groups.iter().map(Right::to_string).collect();
            let groups = if groups.is_empty() { "-".into() } else { groups.join(", ") };
            let row = format!("| `{method}` | {cells} | {groups} |");
            assert!(document.contains(&row), "docs/identities.md lacks\n{row}");
        }
    }

    #[test]
    fn only_machines_write_and_no_janus_reads() {
        let machine = Role::Client("a/b".parse().unwrap());
        let janus = Role::Janus("j".parse().unwrap());
        let none = Grants::default();
        let start = "/janus.v1.BackupService/StartBackup";
        assert!(may_call(&machine, &none, start));
        let server = Role::Server("s".parse().unwrap());
        for other in [Role::Operator("o".into()), Role::User("u".into()), server, janus.clone()] {
            assert!(!may_call(&other, &none, start), "{other}");
        }
        assert!(!may_call(&janus, &none, "/janus.v1.RestoreService/ReadBlocks"));
        assert!(may_call(&janus, &none, "/grpc.health.v1.Health/Watch"));
        assert!(may_call(&janus, &none, "/janus.v1.Unknown/Method"));
    }
}
