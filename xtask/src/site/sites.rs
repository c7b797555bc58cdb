//! Two sites with a server and a janus each, and machines at a third place, joined by lines that can be cut.
//!
//! Each place is a network namespace and each program a process of its own in it. Both janus know both servers, the
//! near one first, and machines know both janus. Dropping it kills the processes and removes namespaces and folder.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use super::{Client, Network, Plan, Process, Programs, Settings, Site, USER, answers, network};
use crate::{disk, packages};

/// The two sites.
pub const SITES: [&str; 2] = ["north", "south"];
/// Where the machines are.
pub const MACHINES: &str = "office";

/// A program of a site.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Part {
    /// `janus-server`, port 7421.
    Server,
    /// `janus`, port 7420.
    Janus,
}

/// Both sites.
#[derive(Debug)]
pub struct Sites {
    // In the order in which they must go: the processes, then their namespaces, then keys and files.
    running: BTreeMap<(&'static str, Part), Process>,
    network: Network,
    /// Settings of the next start of each program.
    pub settings: BTreeMap<(&'static str, Part), Settings>,
    /// Image paths that are not in the sites' folder.
    images: BTreeMap<String, PathBuf>,
    keys: Site,
    programs: Programs,
}

impl Sites {
    /// Makes the network, keys and settings, and starts everything.
    ///
    /// # Errors
    /// When we aren't root or a program fails.
    pub fn start(programs: Programs) -> Result<Self> {
        let mut sites = Self::prepare(programs)?;
        for site in SITES {
            sites.start_part(site, Part::Server)?;
            sites.start_part(site, Part::Janus)?;
        }
        Ok(sites)
    }

    /// Makes the network, keys and settings; nothing runs yet.
    ///
    /// # Errors
    /// When we aren't root or a key can't be made.
    pub fn prepare(programs: Programs) -> Result<Self> {
        let network = Network::make(&[SITES[0], SITES[1], MACHINES])?;
        let plan = Plan { servers: Vec::new(), janus: false, folder: None };
        let keys = Site::prepare(programs.clone(), &plan)?;
        let settings = BTreeMap::new();
        let (running, images) = (BTreeMap::new(), BTreeMap::new());
        let mut sites = Self { running, network, settings, images, keys, programs };
        for (site, other) in [(SITES[0], SITES[1]), (SITES[1], SITES[0])] {
            sites.prepare_server(site)?;
            sites.prepare_janus(site, other)?;
        }
        Ok(sites)
    }

    fn prepare_server(&mut self, site: &'static str) -> Result<()> {
        let mut settings = self.issue("server", site, site)?;
        fs::create_dir_all(self.images(site))?;
        settings.set("listen", "0.0.0.0:7421");
        settings.set("image_path", self.images(site).to_string_lossy());
        settings.set("urls", json!([url(site, 7421)]));
        settings.set("janus_urls", json!(SITES.map(|site| url(site, 7420))));
        self.settings.insert((site, Part::Server), settings);
        Ok(())
    }

    fn prepare_janus(&mut self, site: &'static str, other: &str) -> Result<()> {
        let mut settings = self.issue("janus", &format!("janus-{site}"), site)?;
        settings.set("listen", "0.0.0.0:7420");
        settings.set("server_urls", json!([url(site, 7421), url(other, 7421)]));
        self.settings.insert((site, Part::Janus), settings);
        Ok(())
    }

    fn issue(&self, role: &str, name: &str, site: &str) -> Result<Settings> {
        let hosts = [
            format!("{site}.example.org"),
            format!("{site}6.example.org"),
            self.network.address(site),
            self.network.address6(site),
            "::1".to_owned(),
        ];
        let hosts: Vec<_> = hosts.iter().flat_map(|host| ["--host", host]).collect();
        self.keys.issue(role, name, &hosts)
    }

    /// Starts a program with its settings.
    ///
    /// # Errors
    /// When it fails at its start.
    pub fn start_part(&mut self, site: &'static str, part: Part) -> Result<()> {
        let name = part_name(site, part);
        let (config, log) = self.keys.files(&name);
        self.settings.get(&(site, part)).context("no settings")?.write(&config)?;
        let programs = self.programs_at(site);
        let mut command = match part {
            Part::Server => programs.server(),
            Part::Janus => programs.janus(),
        };
        command.arg("serve").arg("--config").arg(&config);
        let process = Process::start(&name, command, &log)?;
        self.running.insert((site, part), process);
        Ok(())
    }

    /// The programs, as they run at a place.
    pub fn programs_at(&self, place: &str) -> Programs {
        self.programs.inside(self.network.namespace(place))
    }

    /// Kills a program with SIGKILL.
    ///
    /// # Errors
    /// When it doesn't run.
    pub fn kill(&mut self, site: &'static str, part: Part) -> Result<()> {
        self.running.remove(&(site, part)).map(Process::kill).context("does not run")
    }

    /// A running program.
    ///
    /// # Errors
    /// When it doesn't run.
    pub fn process(&self, site: &'static str, part: Part) -> Result<&Process> {
        self.running.get(&(site, part)).context("does not run")
    }

    /// Makes everything whole: lines up, frozen programs awake, killed ones started.
    ///
    /// # Errors
    /// When a program fails at its start.
    pub fn heal(&mut self) -> Result<()> {
        self.network.heal()?;
        for site in SITES {
            for part in [Part::Server, Part::Janus] {
                match self.running.get(&(site, part)) {
                    Some(process) => process.thaw(),
                    None => self.start_part(site, part)?,
                }
            }
        }
        Ok(())
    }

    /// A machine at the third place that backs up `disks` (`name=/path`), with urls of both janus.
    ///
    /// # Errors
    /// When its certificate can't be made.
    pub fn client(&self, machine: &str, disks: &[String]) -> Result<Client> {
        let more = ["--user", USER, "--machine", machine];
        let mut settings = self.keys.issue("client", machine, &more)?;
        let folder = self.folder().join("clients").join(machine);
        settings.set("urls", json!(SITES.map(|site| url(site, 7420))));
        settings.set("cache_path", folder.join("cache").to_string_lossy());
        settings.set("disks", disks);
        Client::new(self.programs_at(MACHINES), folder, settings)
    }

    /// Gives a server another image path at its next start.
    ///
    /// # Errors
    /// When the site has no server.
    pub fn move_images(&mut self, site: &str, to: &Path) -> Result<()> {
        let part =
            self.settings.iter_mut().find(|((at, part), _)| *at == site && *part == Part::Server);
        let (_, settings) = part.context("no such site")?;
        settings.set("image_path", to.to_string_lossy());
        self.images.insert(site.to_owned(), to.to_owned());
        Ok(())
    }

    /// The network.
    pub fn network(&self) -> &Network {
        &self.network
    }

    /// Everything's folder.
    pub fn folder(&self) -> &Path {
        self.keys.folder()
    }

    /// A server's image path.
    pub fn images(&self, site: &str) -> PathBuf {
        let moved = self.images.get(site).cloned();
        moved.unwrap_or_else(|| self.folder().join(site).join("images"))
    }

    /// Bytes that a server's images occupy.
    pub fn stored_bytes(&self, site: &str) -> u64 {
        folder_bytes(&self.images(site))
    }

    /// What a program has logged.
    pub fn log(&self, site: &str, part: Part) -> String {
        self.keys.log(&part_name(site, part))
    }

    /// `janus status --json` of a site's janus, asked there.
    ///
    /// # Errors
    /// When it doesn't answer.
    pub fn status(&self, site: &'static str) -> Result<Value> {
        let config = self.keys.files(&part_name(site, Part::Janus)).0;
        let mut command = self.programs_at(site).janus();
        command.args(["status", "--json", "--url", &url(site, 7420), "--config"]).arg(config);
        Ok(serde_json::from_str(&packages::output(&mut command)?)?)
    }

    /// Waits until both janus see both servers as ready and reporting, and say the same of every machine: use counters,
    /// newest backups, and the snapshots of `client`. Returns the machines.
    ///
    /// # Errors
    /// When that isn't so within `limit`.
    pub fn await_equal(&self, client: &Client, limit: Duration) -> Result<Value> {
        let until = Instant::now() + limit;
        loop {
            let views = SITES.map(|site| self.view(site, client));
            if let [Ok(north), Ok(south)] = &views
                && north == south
            {
                return Ok(north.0.clone());
            }
            if Instant::now() > until {
                bail!("after {limit:?} the two janus are not equal: {views:?}");
            }
            thread::sleep(Duration::from_millis(200));
        }
    }

    /// What a site's janus says of all machines, and its list for `client`.
    fn view(&self, site: &'static str, client: &Client) -> Result<(Value, Vec<String>)> {
        let status = self.status(site)?;
        let servers = status["servers"].as_array().context("no servers")?;
        for server in servers {
            let is_well = server["ready"] == true && server["report_age_ms"].as_i64() >= Some(0);
            ensure!(is_well, "janus {site} says: {server}");
        }
        let here = url(site, 7420);
        let list: answers::List = client.answer(&["list", "--urls", &here])?;
        ensure!(list.unreachable.is_empty(), "janus {site} lists: {:?}", list.unreachable);
        let snapshot =
            |s: &answers::Snapshot| format!("{} {} {}", s.snapshot_id, s.server, s.reachable);
        let mut snapshots: Vec<_> = list.snapshots.iter().map(snapshot).collect();
        snapshots.sort();
        Ok((status["machines"].clone(), snapshots))
    }

    /// Moves the calling thread into a place: sockets that it makes from now on are there.
    ///
    /// # Errors
    /// When we aren't root.
    pub fn enter(&self, place: &str) -> Result<()> {
        network::enter(&self.network.namespace(place))
    }

    /// Keeps the folder when the sites are dropped.
    pub fn keep(&mut self) {
        self.keys.keep();
    }
}

fn part_name(site: &str, part: Part) -> String {
    match part {
        Part::Server => format!("server-{site}"),
        Part::Janus => format!("janus-{site}"),
    }
}

/// URL of a program of a site, by name.
pub fn url(site: &str, port: u16) -> String {
    format!("https://{site}.example.org:{port}")
}

fn folder_bytes(folder: &Path) -> u64 {
    let Ok(entries) = fs::read_dir(folder) else { return 0 };
    let size = |entry: fs::DirEntry| match entry.file_type() {
        Ok(kind) if kind.is_dir() => folder_bytes(&entry.path()),
        _ => disk::allocated_bytes(&entry.path()).unwrap_or(0),
    };
    entries.flatten().map(size).sum()
}
