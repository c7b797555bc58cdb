//! Settings that should be equal on all servers: what differs, and which server contradicts this janus.

use std::collections::BTreeMap;

use janus_proto::{ids::ServerId, pb::SharedSettings};

/// What this janus requires of servers (`require_equal_settings`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Required {
    /// Format of new chains.
    pub prefer_vhdx: bool,
    /// Whether machines of different users have separate folders.
    pub separate_folders_by_user: bool,
}

impl Required {
    /// The first setting in which a server differs; `None`: in none.
    pub fn contradicted_by(&self, told: &SharedSettings) -> Option<&'static str> {
        if told.prefer_vhdx != self.prefer_vhdx {
            return Some("prefer_vhdx");
        }
        let separate = told.separate_folders_by_user;
        (separate != self.separate_folders_by_user).then_some("separate_folders_by_user")
    }
}

/// A setting's key, and its value as text.
type Setting = (&'static str, fn(&SharedSettings) -> String);

/// A line for each setting that the servers don't agree on, as in `prefer_vhdx differs: true on north; false on south`.
pub fn differences(told: &[(ServerId, SharedSettings)]) -> Vec<String> {
    let settings: [Setting; 3] = [
        ("image_path", |told| told.image_path.clone()),
        ("prefer_vhdx", |told| told.prefer_vhdx.to_string()),
        ("separate_folders_by_user", |told| told.separate_folders_by_user.to_string()),
    ];
    let line = |(key, value): Setting| {
        difference(key, told.iter().map(|(server, told)| (server, value(told))))
    };
    settings.into_iter().filter_map(line).collect()
}

/// The line for one setting, if the servers don't have the same value.
pub fn difference<'a>(
    key: &str,
    values: impl Iterator<Item = (&'a ServerId, String)>,
) -> Option<String> {
    let mut servers: BTreeMap<String, Vec<&str>> = BTreeMap::new();
    for (server, value) in values {
        servers.entry(value).or_default().push(server.as_str());
    }
    let each = servers.iter().map(|(value, servers)| format!("{value} on {}", servers.join(", ")));
    let each: Vec<String> = each.collect();
    (each.len() > 1).then(|| format!("{key} differs: {}", each.join("; ")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(server: &str, image_path: &str, prefer_vhdx: bool) -> (ServerId, SharedSettings) {
        let settings = SharedSettings {
            image_path: image_path.into(),
            prefer_vhdx,
            separate_folders_by_user: true,
        };
        (server.parse().unwrap(), settings)
    }

    #[test]
    fn each_difference_is_a_line_with_who_has_what() {
        let same = [told("a", "/srv", true), told("b", "/srv", true)];
        assert!(differences(&same).is_empty() && differences(&same[..1]).is_empty());
        let other = [told("a", "/srv", true), told("b", "/data", false), told("c", "/srv", true)];
        assert_eq!(
            differences(&other),
            [
                "image_path differs: /data on b; /srv on a, c",
                "prefer_vhdx differs: false on b; true on a, c"
            ]
        );
    }

    #[test]
    fn a_contradiction_names_the_setting_and_paths_are_none() {
        let required = Required { prefer_vhdx: true, separate_folders_by_user: true };
        assert_eq!(required.contradicted_by(&told("a", "/x", true).1), None);
        assert_eq!(required.contradicted_by(&told("a", "/x", false).1), Some("prefer_vhdx"));
        let required = Required { separate_folders_by_user: false, ..required };
        let contradicted = required.contradicted_by(&told("a", "/x", true).1);
        assert_eq!(contradicted, Some("separate_folders_by_user"));
    }
}
