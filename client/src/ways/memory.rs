//! What this machine remembers of its URLs: which one answered last, who it was, how its host is woken up, and how fast the lines are.
//!
//! A small file in the cache folder, replaced as a whole. It is worth some time, never a backup: one that is damaged, lost or
//! of a newer version is as good as none. What was remembered of a URL that left the settings isn't used, and goes a month
//! later: a single run with other `--urls` must not cost the addresses that wake the servers up.

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
};

use janus_proto::{clock::unix_ms, ids::ServerId, tls::Role};
use serde::{Deserialize, Serialize};

const VERSION: u32 = 1;
const FILE: &str = "ways.json";
/// A file that is larger was not written by us.
const MAX_BYTES: u64 = 1 << 20;
/// How long a URL is remembered that the settings don't name, and how many of them.
const LEFT_KEPT_MS: i64 = 30 * 86_400_000;
const LEFT_KEPT: usize = 64;
/// What a line brings through differs by so much from one time to the next.
const SAME_LINE: f64 = 0.2;

/// What is known of one URL.
#[derive(Debug, Default, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Known {
    /// Who answered last: `server NAME` or `janus NAME`.
    pub peer: String,
    /// Hardware address of its host, where that is on a local link: `00:11:22:33:44:55`.
    pub mac: Option<String>,
    /// Those of the servers behind a janus, by their names.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub behind: BTreeMap<String, String>,
    /// Bytes a second that the line brought through, by the server they went to.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub lines: BTreeMap<String, u64>,
    /// Unix milliseconds since when the settings don't name it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub left_ms: Option<i64>,
}

impl Known {
    /// All hardware addresses, as they are written.
    pub fn macs(&self) -> impl Iterator<Item = &String> {
        self.mac.iter().chain(self.behind.values())
    }
}

#[derive(Debug, Default, PartialEq, Serialize, Deserialize)]
struct Stored {
    version: u32,
    last: Option<String>,
    urls: BTreeMap<String, Known>,
}

/// What is known of all URLs of the settings.
#[derive(Debug, Default)]
pub struct Memory {
    /// URL that answered last.
    pub last: Option<String>,
    /// By URL.
    pub urls: BTreeMap<String, Known>,
    /// Those that the settings don't name now.
    left: BTreeMap<String, Known>,
    file: Option<PathBuf>,
    is_new: bool,
}

impl Memory {
    /// Reads what `folder` remembers of these URLs.
    pub fn read(folder: &Path, urls: &[String]) -> Self {
        let file = folder.join(FILE);
        let stored = match parse(&file) {
            Ok(stored) => stored.unwrap_or_default(),
            Err(error) => {
                tracing::warn!(path = %file.display(), error, "what was remembered of the URLs is lost; going on without it");
                Stored::default()
            }
        };
        let is_ours = |url: &String| urls.contains(url);
        let last = stored.last.filter(is_ours);
        let before = stored.urls.clone();
        let (mut ours, left): (BTreeMap<_, _>, BTreeMap<_, _>) =
            stored.urls.into_iter().partition(|(url, _)| is_ours(url));
        ours.values_mut().for_each(|known| known.left_ms = None);
        let left = left_of(left, unix_ms());
        let is_new = ours.len() + left.len() != before.len()
            || ours.iter().chain(&left).any(|(url, known)| before.get(url) != Some(known));
        Self { last, is_new, urls: ours, left, file: Some(file) }
    }

    /// A URL has answered.
    pub fn note(&mut self, url: &str, peer: &Role) {
        let peer = peer.to_string();
        let is_known = self.urls.get(url).is_some_and(|known| known.peer == peer);
        if is_known && self.last.as_deref() == Some(url) {
            return;
        }
        if !is_known {
            // Another host has the address now.
            self.urls.insert(url.to_owned(), Known { peer, ..Known::default() });
        }
        self.last = Some(url.to_owned());
        self.is_new = true;
    }

    /// The hardware address of the host that answers at a URL.
    pub fn note_mac(&mut self, url: &str, mac: String) {
        let known = self.urls.entry(url.to_owned()).or_default();
        if known.mac.as_ref() != Some(&mac) {
            known.mac = Some(mac);
            self.is_new = true;
        }
    }

    /// The hardware addresses of the servers behind the janus that answers at a URL. Those that it didn't see this time stay: they
    /// may be asleep.
    pub fn note_behind(&mut self, url: &str, macs: &BTreeMap<String, String>) {
        let known = self.urls.entry(url.to_owned()).or_default();
        for (server, mac) in macs {
            self.is_new |= known.behind.insert(server.clone(), mac.clone()).as_ref() != Some(mac);
        }
    }

    /// What the line to a server by way of a URL brought through, in bytes a second.
    pub fn line(&self, url: &str, server: &ServerId) -> Option<f64> {
        self.urls.get(url)?.lines.get(server.as_str()).map(|rate| *rate as f64)
    }

    /// A line brought so many bytes a second through. About as many as before are no news.
    pub fn note_line(&mut self, url: &str, server: &ServerId, rate: f64) {
        let Some(known) = self.urls.get_mut(url) else { return };
        let before = known.lines.get(server.as_str()).map_or(0.0, |rate| *rate as f64);
        if (rate - before).abs() > before * SAME_LINE {
            known.lines.insert(server.to_string(), rate as u64);
            self.is_new = true;
        }
    }

    /// Writes it down if there is anything new. Failing costs a head start next time, so it is only logged.
    pub fn write(&mut self) {
        let Some(file) = self.file.as_ref().filter(|_| self.is_new) else { return };
        let all = self.left.iter().chain(&self.urls);
        let urls = all.map(|(url, known)| (url.clone(), known.clone())).collect();
        let stored = Stored { version: VERSION, last: self.last.clone(), urls };
        match replace(file, &stored) {
            Ok(()) => self.is_new = false,
            Err(error) => {
                tracing::warn!(path = %file.display(), %error, "which URL worked can't be remembered");
            }
        }
    }
}

/// What stays of those that the settings don't name.
fn left_of(left: BTreeMap<String, Known>, now_ms: i64) -> BTreeMap<String, Known> {
    let noted = left.into_iter().map(|(url, known)| {
        let left_ms = known.left_ms.unwrap_or(now_ms);
        (url, Known { left_ms: Some(left_ms), ..known })
    });
    let mut kept: Vec<_> = noted
        .filter(|(_, known)| {
            let since = known.left_ms.map_or(0, |left_ms| now_ms.saturating_sub(left_ms));
            since.saturating_abs() < LEFT_KEPT_MS
        })
        .collect();
    kept.sort_by_key(|(_, known)| std::cmp::Reverse(known.left_ms));
    kept.truncate(LEFT_KEPT);
    kept.into_iter().collect()
}

fn parse(file: &Path) -> Result<Option<Stored>, String> {
    let length = match fs::metadata(file) {
        Ok(about) => about.len(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error.to_string()),
    };
    if length > MAX_BYTES {
        return Err(format!("{length} bytes are too many"));
    }
    let text = fs::read(file).map_err(|error| error.to_string())?;
    let stored: Stored = serde_json::from_slice(&text).map_err(|error| error.to_string())?;
    match stored.version {
        VERSION => Ok(Some(stored)),
        other => Err(format!("version {other}, not {VERSION}")),
    }
}

fn replace(file: &Path, stored: &Stored) -> io::Result<()> {
    if let Some(folder) = file.parent() {
        crate::files::private_folder(folder)?;
    }
    crate::files::replace(file, &serde_json::to_vec_pretty(stored)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn server(name: &str) -> Role {
        Role::Server(name.parse().unwrap())
    }

    fn urls(names: &[&str]) -> Vec<String> {
        names.iter().map(|name| format!("https://{name}:1")).collect()
    }

    #[test]
    fn what_is_written_is_read_for_the_urls_of_the_settings() {
        let folder = tempfile::tempdir().unwrap();
        let mut memory = Memory::read(folder.path(), &urls(&["a", "b"]));
        memory.note("https://a:1", &server("x"));
        memory.note_mac("https://a:1", "00:11:22:33:44:55".into());
        memory.note("https://b:1", &server("y"));
        let behind = |mac: &str| BTreeMap::from([("s".to_owned(), mac.to_owned())]);
        memory.note_behind("https://b:1", &behind("00:11:22:33:44:66"));
        memory.write();
        memory.note_behind("https://b:1", &behind("00:11:22:33:44:66"));
        assert!(!memory.is_new, "the same addresses are no news");
        memory.note_behind("https://b:1", &behind("00:11:22:33:44:77"));
        memory.note_behind("https://b:1", &BTreeMap::new());
        memory.write();

        let mut same = Memory::read(folder.path(), &urls(&["a", "b"]));
        assert_eq!((&same.last, &same.urls), (&memory.last, &memory.urls));
        assert!(same.urls["https://b:1"].macs().eq(["00:11:22:33:44:77"]));
        same.note("https://a:1", &server("x"));
        assert!(same.urls["https://a:1"].mac.is_some(), "the same host keeps its address");
        same.note("https://a:1", &server("z"));
        assert_eq!(same.urls["https://a:1"].mac, None, "another host has another address");

        let mut changed = Memory::read(folder.path(), &urls(&["a", "c"]));
        assert_eq!(changed.last, None);
        assert!(changed.urls.contains_key("https://a:1") && changed.urls.len() == 1);
        changed.write();
        let back = Memory::read(folder.path(), &urls(&["a", "b"]));
        assert_eq!(back.urls.len(), 2, "one run with other URLs costs nothing");
        assert!(back.left.is_empty() && back.urls.values().all(|known| known.left_ms.is_none()));
    }

    #[test]
    fn the_rate_of_a_line_is_kept_by_url_and_server_while_the_same_host_answers() {
        let folder = tempfile::tempdir().unwrap();
        let (a, b) = ("a".parse().unwrap(), "b".parse().unwrap());
        let url = "https://x:1";
        let mut memory = Memory::read(folder.path(), &urls(&["x"]));
        memory.note_line(url, &a, 1e6);
        assert_eq!(memory.line(url, &a), None, "nobody answered there");
        memory.note(url, &server("a"));
        memory.note_line(url, &a, 1e6);
        memory.write();
        memory.note_line(url, &a, 1.1e6);
        assert!(!memory.is_new && memory.line(url, &a) == Some(1e6), "about as many");
        memory.note_line(url, &a, 2e6);
        memory.write();
        let mut same = Memory::read(folder.path(), &urls(&["x"]));
        assert_eq!((same.line(url, &a), same.line(url, &b)), (Some(2e6), None));
        same.note(url, &server("z"));
        assert_eq!(same.line(url, &a), None, "another host");
    }

    #[test]
    fn what_left_the_settings_goes_in_the_end() {
        let known = |left_ms| Known { left_ms, ..Known::default() };
        let now = 1_767_225_600_000;
        let left = BTreeMap::from([
            ("new".to_owned(), known(None)),
            ("late".to_owned(), known(Some(now - LEFT_KEPT_MS + 1))),
            ("old".to_owned(), known(Some(now - LEFT_KEPT_MS))),
        ]);
        let kept = left_of(left, now);
        assert_eq!(kept.keys().collect::<Vec<_>>(), ["late", "new"]);
        assert_eq!(kept["new"].left_ms, Some(now));
        let many = (0..LEFT_KEPT as i64 + 9).map(|at| (at.to_string(), known(Some(now - at))));
        let kept = left_of(many.collect(), now);
        assert!(kept.len() == LEFT_KEPT && kept.contains_key("0"));
    }

    #[test]
    fn a_damaged_file_is_as_good_as_none() {
        let folder = tempfile::tempdir().unwrap();
        for text in ["", "{\"version\": 1, \"urls", "{\"version\": 2, \"urls\": {}}", "[]", "\u{0}"]
        {
            fs::write(folder.path().join(FILE), text).unwrap();
            let mut memory = Memory::read(folder.path(), &urls(&["a"]));
            assert!(memory.urls.is_empty() && memory.last.is_none(), "{text:?}");
            memory.note("https://a:1", &server("x"));
            memory.write();
            assert_eq!(Memory::read(folder.path(), &urls(&["a"])).urls.len(), 1);
        }
    }
}
