//! A whole site on loopback: keys, servers, a janus and client machines, each program as a process of its own.
//!
//! Ports are chosen before anything starts, so that a server which was killed comes back under its old address.
//! Dropping a site kills its processes and removes its folder, unless it was made in a named one.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

pub mod answers;
mod browser;
mod client;
mod network;
mod ports;
mod process;
mod programs;
mod sites;

pub use browser::Browser;
pub use client::{Client, Finished, Running, Taken};
pub use network::{Cut, Network};
pub use ports::free_ports;
pub use process::{Process, stop_children_on_interrupt};
pub use programs::{PROGRAMS_VARIABLE, Profile, Programs, cargo, target, workspace};
pub use sites::{MACHINES, Part, SITES, Sites, url};

/// Group of the keys of every site.
pub const GROUP: &str = "demo";
/// User of every client.
pub const USER: &str = "alice";

/// Settings of a program as they go into its TOML file.
#[derive(Debug, Clone, Default)]
pub struct Settings(BTreeMap<String, Value>);

impl Settings {
    /// Sets a key; strings, numbers, booleans and lists of them are written the same in JSON and TOML.
    pub fn set(&mut self, key: &str, value: impl Into<Value>) {
        self.0.insert(key.to_owned(), value.into());
    }

    /// The value of a key that was set.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.0.get(key)
    }

    /// Writes the file.
    ///
    /// # Errors
    /// When it can't be written.
    pub fn write(&self, path: &Path) -> Result<()> {
        let text: String = self.0.iter().map(|(key, value)| format!("{key} = {value}\n")).collect();
        fs::write(path, text).with_context(|| format!("write {}", path.display()))
    }
}

/// How a site is made.
#[derive(Debug, Clone)]
pub struct Plan {
    /// Names of the servers, in the order of janus' `server_urls`.
    pub servers: Vec<String>,
    /// With a janus before them.
    pub janus: bool,
    /// Where everything lies; a temporary folder when absent.
    pub folder: Option<PathBuf>,
}

impl Default for Plan {
    fn default() -> Self {
        Self { servers: vec!["server-a".into(), "server-b".into()], janus: true, folder: None }
    }
}

/// The site.
#[derive(Debug)]
pub struct Site {
    programs: Programs,
    folder: PathBuf,
    temporary: bool,
    servers: Vec<Server>,
    janus: Option<Janus>,
}

/// A server of the site; it may be down.
#[derive(Debug)]
pub struct Server {
    /// Settings of its next start.
    pub settings: Settings,
    name: String,
    port: u16,
    images: PathBuf,
    process: Option<Process>,
}

#[derive(Debug)]
struct Janus {
    settings: Settings,
    port: u16,
    process: Option<Process>,
}

impl Site {
    /// Makes keys and settings and starts everything.
    ///
    /// # Errors
    /// When a program fails.
    pub fn start(programs: Programs, plan: &Plan) -> Result<Self> {
        let mut site = Self::prepare(programs, plan)?;
        site.start_all()?;
        Ok(site)
    }

    /// Makes keys and settings; nothing runs yet.
    ///
    /// # Errors
    /// When a key can't be made.
    pub fn prepare(programs: Programs, plan: &Plan) -> Result<Self> {
        let folder = match &plan.folder {
            Some(folder) => {
                fs::create_dir_all(folder)
                    .with_context(|| format!("make folder {}", folder.display()))?;
                fs::canonicalize(folder)?
            }
            None => tempfile::Builder::new().prefix("janus-site-").tempdir()?.keep(),
        };
        if plan.folder.is_none() {
            process::remove_on_interrupt(&folder);
        }
        let ports = free_ports(plan.servers.len() + 1)?;
        let mut site = Self {
            programs,
            folder,
            temporary: plan.folder.is_none(),
            servers: Vec::new(),
            janus: None,
        };
        for folder in ["pki", "logs", "settings"] {
            fs::create_dir_all(site.folder.join(folder))?;
        }
        let out = site.folder.join("pki").to_string_lossy().into_owned();
        site.pki(&["init", "--out", &out, "--group", GROUP])?;
        for (name, port) in plan.servers.iter().zip(&ports) {
            site.prepare_server(name, *port)?;
        }
        if plan.janus {
            site.prepare_janus(ports[plan.servers.len()])?;
        }
        Ok(site)
    }

    fn prepare_server(&mut self, name: &str, port: u16) -> Result<()> {
        let keys = self.issue("server", name, &["--host", "127.0.0.1", "--host", "localhost"])?;
        let images = self.folder.join(name);
        fs::create_dir_all(&images)?;
        let mut settings = keys;
        settings.set("listen", format!("127.0.0.1:{port}"));
        settings.set("image_path", images.to_string_lossy());
        settings.set("urls", json!([format!("https://127.0.0.1:{port}")]));
        settings.set("refresh_seconds", 1);
        settings.set("log", "info");
        self.servers.push(Server { settings, name: name.to_owned(), port, images, process: None });
        Ok(())
    }

    fn prepare_janus(&mut self, port: u16) -> Result<()> {
        let mut settings =
            self.issue("janus", "router", &["--host", "127.0.0.1", "--host", "localhost"])?;
        let servers: Vec<_> = self.servers.iter().map(|server| server.url()).collect();
        settings.set("listen", format!("127.0.0.1:{port}"));
        settings.set("server_urls", servers);
        settings.set("log", "info");
        for server in &mut self.servers {
            server.settings.set("janus_urls", json!([format!("https://127.0.0.1:{port}")]));
        }
        self.janus = Some(Janus { settings, port, process: None });
        Ok(())
    }

    /// Issues a certificate into `pki/<name>` and returns the settings `cert`, `key`, `ca` that name it.
    ///
    /// # Errors
    /// When that fails.
    pub fn issue(&self, role: &str, name: &str, more: &[&str]) -> Result<Settings> {
        let ca = self.folder.join("pki");
        let out = ca.join(name);
        let (ca_text, out_text) = (ca.to_string_lossy(), out.to_string_lossy());
        let mut arguments = vec!["issue", role, "--ca", &ca_text, "--out", &out_text];
        if !["client", "restore"].contains(&role) {
            arguments.extend(["--name", name]);
        }
        arguments.extend(more);
        self.pki(&arguments)?;
        Ok(key_settings(&out))
    }

    fn pki(&self, arguments: &[&str]) -> Result<()> {
        crate::packages::output(self.programs.server().arg("pki").args(arguments)).map(drop)
    }

    /// A client machine with its certificate and empty cache, backing up `disks` (`name=/path`) through janus, or
    /// straight to the first server when the site has no janus.
    ///
    /// # Errors
    /// When its certificate can't be made.
    pub fn client(&self, machine: &str, disks: &[String]) -> Result<Client> {
        let mut settings =
            self.issue("client", machine, &["--user", USER, "--machine", machine])?;
        let folder = self.client_folder(machine);
        settings.set("urls", json!([self.url()]));
        settings.set("cache_path", folder.join("cache").to_string_lossy());
        settings.set("disks", disks);
        self.client_with(machine, settings)
    }

    /// The folder of a client machine.
    pub fn client_folder(&self, machine: &str) -> PathBuf {
        self.folder.join("clients").join(machine)
    }

    /// A client machine with these settings.
    ///
    /// # Errors
    /// When its folder can't be made.
    pub fn client_with(&self, machine: &str, settings: Settings) -> Result<Client> {
        Client::new(self.programs.clone(), self.client_folder(machine), settings)
    }

    /// URL that clients use: of janus, or of the first server.
    pub fn url(&self) -> String {
        match &self.janus {
            Some(janus) => format!("https://127.0.0.1:{}", janus.port),
            None => self.servers[0].url(),
        }
    }

    /// Starts whatever doesn't run.
    ///
    /// # Errors
    /// When a program fails at its start.
    pub fn start_all(&mut self) -> Result<()> {
        for name in self.server_names() {
            if self.server(&name)?.process.is_none() {
                self.start_server(&name)?;
            }
        }
        if self.janus.as_ref().is_some_and(|janus| janus.process.is_none()) {
            self.start_janus()?;
        }
        Ok(())
    }

    /// Names of the servers.
    pub fn server_names(&self) -> Vec<String> {
        self.servers.iter().map(|server| server.name.clone()).collect()
    }

    /// A server by name.
    ///
    /// # Errors
    /// When there is none of that name.
    pub fn server(&mut self, name: &str) -> Result<&mut Server> {
        self.servers
            .iter_mut()
            .find(|server| server.name == name)
            .with_context(|| format!("no server {name}"))
    }

    /// Starts a server with its settings.
    ///
    /// # Errors
    /// When it fails at its start.
    pub fn start_server(&mut self, name: &str) -> Result<()> {
        let (config, log) = self.files(name);
        let mut command = self.programs.server();
        command.arg("serve").arg("--config").arg(&config);
        let server = self.server(name)?;
        server.settings.write(&config)?;
        server.process = Some(Process::start(name, command, &log)?);
        Ok(())
    }

    /// Kills a server with SIGKILL.
    ///
    /// # Errors
    /// When it doesn't run.
    pub fn kill_server(&mut self, name: &str) -> Result<()> {
        self.take_server(name).map(Process::kill)
    }

    /// Stops a server with SIGTERM and waits for its end.
    ///
    /// # Errors
    /// When it doesn't run, doesn't end in time, or ends with another code than 0.
    pub fn stop_server(&mut self, name: &str) -> Result<()> {
        let status = self.take_server(name)?.stop()?;
        ensure!(status.success(), "{name} ended with {status} after SIGTERM");
        Ok(())
    }

    /// Runs `janus-server ARGUMENTS` with the settings of a server that was started once, whether it runs now or not.
    ///
    /// # Errors
    /// When it can't be started; a failed command is no error here.
    pub fn admin(&self, name: &str, arguments: &[&str]) -> Result<std::process::Output> {
        self.admin_command(name, arguments).output().context("start janus-server")
    }

    /// What [`Site::admin`] runs.
    pub fn admin_command(&self, name: &str, arguments: &[&str]) -> Command {
        let (config, _) = self.files(name);
        let mut command = self.programs.server();
        command.args(arguments).arg("--config").arg(config).stdin(std::process::Stdio::null());
        command
    }

    fn take_server(&mut self, name: &str) -> Result<Process> {
        self.server(name)?.process.take().with_context(|| format!("{name} does not run"))
    }

    /// Starts janus with its settings.
    ///
    /// # Errors
    /// When it fails at its start or the site has none.
    pub fn start_janus(&mut self) -> Result<()> {
        let (config, log) = self.files("janus");
        let mut command = self.programs.janus();
        command.arg("serve").arg("--config").arg(&config);
        let janus = self.janus.as_mut().context("this site has no janus")?;
        janus.settings.write(&config)?;
        janus.process = Some(Process::start("janus", command, &log)?);
        Ok(())
    }

    /// Kills janus with SIGKILL.
    ///
    /// # Errors
    /// When it doesn't run.
    pub fn kill_janus(&mut self) -> Result<()> {
        self.take_janus().map(Process::kill)
    }

    /// Stops janus with SIGTERM and waits for its end.
    ///
    /// # Errors
    /// When it doesn't run, doesn't end in time, or ends with another code than 0.
    pub fn stop_janus(&mut self) -> Result<()> {
        let status = self.take_janus()?.stop()?;
        ensure!(status.success(), "janus ended with {status} after SIGTERM");
        Ok(())
    }

    /// The running janus, to be kept by the caller.
    ///
    /// # Errors
    /// When it doesn't run.
    pub fn take_janus(&mut self) -> Result<Process> {
        self.janus.as_mut().and_then(|janus| janus.process.take()).context("janus does not run")
    }

    /// The running janus.
    pub fn janus(&self) -> Option<&Process> {
        self.janus.as_ref()?.process.as_ref()
    }

    /// Settings of janus' next start.
    ///
    /// # Errors
    /// When the site has no janus.
    pub fn janus_settings(&mut self) -> Result<&mut Settings> {
        self.janus.as_mut().map(|janus| &mut janus.settings).context("this site has no janus")
    }

    /// Waits until janus says that exactly the running servers are ready and report.
    ///
    /// # Errors
    /// When that isn't so within 20 s.
    pub fn await_ready(&self, client: &Client) -> Result<()> {
        let running: Vec<_> =
            self.servers.iter().filter(|s| s.process.is_some()).map(|s| s.name.clone()).collect();
        let until = Instant::now() + Duration::from_secs(20);
        loop {
            let status = client.status();
            if let Ok(status) = &status {
                let mut ready: Vec<_> = status
                    .servers
                    .iter()
                    .filter(|s| s.ready && s.report_age_ms >= 0)
                    .map(|s| s.server.clone())
                    .collect();
                ready.sort();
                let ready_at_all = status.servers.iter().filter(|s| s.ready).count();
                if ready == running && ready_at_all == running.len() {
                    return Ok(());
                }
            }
            if Instant::now() > until {
                bail!("janus does not see exactly {running:?} as ready: {status:?}");
            }
            thread::sleep(Duration::from_millis(50));
        }
    }

    /// The site's folder.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The programs it runs.
    pub fn programs(&self) -> &Programs {
        &self.programs
    }

    /// What a program has logged.
    pub fn log(&self, name: &str) -> String {
        fs::read_to_string(self.files(name).1).unwrap_or_default()
    }

    fn files(&self, name: &str) -> (PathBuf, PathBuf) {
        (
            self.folder.join(format!("settings/{name}.toml")),
            self.folder.join(format!("logs/{name}.log")),
        )
    }

    /// Keeps the folder when the site is dropped.
    pub fn keep(&mut self) {
        self.temporary = false;
        process::keep_on_interrupt(&self.folder);
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        self.janus = None;
        self.servers.clear();
        if self.temporary && !thread::panicking() {
            let _ = fs::remove_dir_all(&self.folder);
        } else if self.temporary {
            // What a failed test leaves is the only witness of what happened.
            eprintln!("logs and images are kept in {}", self.folder.display());
        }
        process::keep_on_interrupt(&self.folder);
    }
}

impl Server {
    /// Its URL.
    pub fn url(&self) -> String {
        format!("https://127.0.0.1:{}", self.port)
    }

    /// Folder of its images.
    pub fn images(&self) -> &Path {
        &self.images
    }

    /// Its process, while it runs.
    pub fn process(&self) -> Option<&Process> {
        self.process.as_ref()
    }
}

/// The settings `cert`, `key` and `ca` for a folder of `pki issue`.
pub fn key_settings(folder: &Path) -> Settings {
    let mut settings = Settings::default();
    for name in ["cert", "key", "ca"] {
        settings.set(name, folder.join(format!("{name}.pem")).to_string_lossy());
    }
    settings
}
