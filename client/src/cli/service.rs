//! `janus-client service install|show|remove`.

use std::{
    ffi::OsString,
    fmt::Write,
    fs, io,
    path::{Path, PathBuf},
    process::Command as Process,
};

use clap::{Arg, ArgAction, ArgMatches, Command};
use serde_json::{Value, json};

use super::{Failure, Outcome, loader};
use crate::{
    config::Settings,
    files::replace,
    nbd::uri::{self, Uri},
    service::{SERVICE, TIMER, Unit, units},
    source::qcow2::SCHEME,
};

const FOLDER: &str = "etc/systemd/system";
/// Where packages have theirs, which count where there is none in [`FOLDER`].
const PACKAGES: [&str; 2] = ["usr/lib/systemd/system", "lib/systemd/system"];
/// Where it is once installed from a package.
const PACKAGED: &str = "/usr/bin/janus-client";

pub(super) fn command() -> Command {
    Command::new("service")
        .about("Install, show or remove the systemd service and timer of scheduled backups")
        .arg(Arg::new("action").required(true).value_parser(["install", "show", "remove"]))
        .arg(
            Arg::new("config").long("config").value_name("FILE").help(
                "Settings file (TOML) that the service reads, too [env: JANUS_CLIENT_CONFIG]",
            ),
        )
        .arg(
            Arg::new("print")
                .long("print")
                .action(ArgAction::SetTrue)
                .help("With install: print the units, write nothing"),
        )
        .arg(
            Arg::new("root")
                .long("root")
                .value_name("DIR")
                .help("Write below this folder and tell no systemd: for packages and images"),
        )
}

/// Runs the command that `matches` holds.
///
/// # Errors
/// When the settings can't be used, or files or systemd refuse.
pub fn service(matches: &ArgMatches) -> Result<Outcome, Failure> {
    let place = Place::of(matches);
    match matches.get_one::<String>("action").map(String::as_str) {
        Some("install") => {
            let (_, units) = planned(matches, &place)?;
            if matches.get_flag("print") { Ok(printed(&units)) } else { place.install(&units) }
        }
        Some("remove") => place.remove(),
        _ => {
            let (settings, units) = planned(matches, &place)?;
            place.show(&settings, &units)
        }
    }
}

/// The settings, by the file alone as the service reads them, and the units for them.
fn planned(matches: &ArgMatches, place: &Place) -> Result<(Settings, [Unit; 2]), Failure> {
    let config = matches.get_one::<String>("config").map(OsString::from);
    let config = config.or_else(|| std::env::var_os("JANUS_CLIENT_CONFIG"));
    let config = config.ok_or_else(|| {
        Failure::usage(
            "name the settings file that the service is to read: --config /etc/janus/client.toml",
        )
    })?;
    let given = [(OsString::from("JANUS_CLIENT_CONFIG"), config.clone())];
    let settings = loader().load(matches, given).map_err(Failure::usage)?;
    let config = std::path::absolute(config).map_err(Failure::failed)?;
    // Relative paths in the settings count from where the service was installed; a root's from its own. Without any the service
    // depends on no folder, which might be gone one day.
    let is_shown = matches.get_one::<String>("action").is_some_and(|action| action == "show");
    let folder = match place.root {
        None if has_relative_paths(&settings) => match place.installed_folder() {
            Some(folder) if is_shown => folder,
            _ => std::env::current_dir().map_err(Failure::failed)?,
        },
        _ => PathBuf::from("/"),
    };
    let units = units(&place.program()?, &config, &folder, &settings.schedule);
    let units = units.map_err(Failure::usage)?;
    Ok((settings, units))
}

/// True where something in the settings counts from the folder that a program is started in.
fn has_relative_paths(settings: &Settings) -> bool {
    let Settings { cert, key, ca, cache_path, seal_key, notify, pki, .. } = settings;
    let files = [cert, key, ca, cache_path, seal_key, &notify.ca, &pki.ca];
    let disks = settings.disk_specs().unwrap_or_default();
    let words = settings.pre_backup.iter().chain(&settings.post_backup).chain(&notify.command);
    // Such as ./freeze, but not --socket=/run/x.
    let is_relative = |word: &String| {
        word.find('/').is_some_and(|at| at > 0)
            && !word.starts_with('-')
            && !word.contains([':', '='])
    };
    // One that isn't set counts from nowhere.
    files.iter().any(|path| path.is_relative() && !path.as_os_str().is_empty())
        || disks.iter().any(|disk| is_relative_disk(&disk.path))
        || words.into_iter().any(is_relative)
}

fn is_relative_disk(path: &Path) -> bool {
    let text = path.to_string_lossy();
    if uri::is_uri(&text) {
        let socket = |uri: Uri| matches!(uri.place, uri::Place::Unix(path) if path.is_relative());
        return Uri::parse(&text).is_ok_and(socket);
    }
    Path::new(text.strip_prefix(SCHEME).unwrap_or(&text)).is_relative()
}

fn printed(units: &[Unit]) -> Outcome {
    let mut text = String::new();
    for (name, unit) in units {
        let _ = writeln!(text, "# /{FOLDER}/{name}\n{unit}");
    }
    let units: serde_json::Map<_, _> =
        units.iter().map(|(name, text)| ((*name).to_owned(), Value::from(text.as_str()))).collect();
    Outcome { json: json!({ "ok": true, "units": units }), text }
}

/// The machine, or a folder that will be one's root.
struct Place {
    root: Option<PathBuf>,
}

impl Place {
    fn of(matches: &ArgMatches) -> Self {
        Self { root: matches.get_one::<String>("root").map(PathBuf::from) }
    }

    fn program(&self) -> Result<PathBuf, Failure> {
        match self.root {
            Some(_) => Ok(PACKAGED.into()),
            None => std::env::current_exe().map_err(Failure::failed),
        }
    }

    fn folder(&self) -> PathBuf {
        self.root.as_deref().unwrap_or(Path::new("/")).join(FOLDER)
    }

    /// A unit's file: what was installed here goes before what a package has.
    fn unit(&self, name: &str) -> (PathBuf, Option<&'static str>) {
        let root = self.root.as_deref().unwrap_or(Path::new("/"));
        let own = self.folder().join(name);
        if own.exists() {
            return (own, None);
        }
        let packaged = PACKAGES.iter().map(|folder| root.join(folder).join(name));
        match packaged.into_iter().find(|path| path.exists()) {
            Some(path) => (path, Some(" by the package")),
            None => (own, None),
        }
    }

    /// The folder from which relative paths of the settings count for the service that is there.
    fn installed_folder(&self) -> Option<PathBuf> {
        let text = fs::read_to_string(self.unit(SERVICE).0).ok()?;
        let folder = text.lines().find_map(|line| line.strip_prefix("WorkingDirectory="))?;
        Some(folder.replace("%%", "%").into())
    }

    fn is_enabled(&self) -> bool {
        fs::symlink_metadata(self.folder().join("timers.target.wants").join(TIMER)).is_ok()
    }

    fn install(&self, units: &[Unit]) -> Result<Outcome, Failure> {
        if self.root.is_none() && !runs_systemd() {
            return Err(Failure::failed(
                "systemd does not run here; let `janus-client daemon` run instead, or write the units for another root with --root",
            ));
        }
        let folder = self.folder();
        fs::create_dir_all(&folder).map_err(failed(&folder))?;
        for (name, unit) in units {
            let path = folder.join(name);
            replace(&path, unit.as_bytes()).map_err(failed(&path))?;
        }
        match self.root {
            None => {
                systemctl(&["daemon-reload"])?;
                systemctl(&["enable", TIMER])?;
                // Also when it runs already: by other times.
                systemctl(&["restart", TIMER])?;
            }
            Some(_) => self.enable()?,
        }
        let folder = folder.display();
        let text = format!("{SERVICE} and {TIMER} are in {folder}, the timer is enabled\n");
        Ok(Outcome { json: json!({ "ok": true, "folder": folder.to_string() }), text })
    }

    /// As `systemctl enable` does it.
    fn enable(&self) -> Result<(), Failure> {
        let wants = self.folder().join("timers.target.wants");
        fs::create_dir_all(&wants).map_err(failed(&wants))?;
        let link = wants.join(TIMER);
        match std::os::unix::fs::symlink(format!("/{FOLDER}/{TIMER}"), &link) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(failed(&link)(error)),
            _ => Ok(()),
        }
    }

    fn remove(&self) -> Result<Outcome, Failure> {
        let folder = self.folder();
        let is_ours = folder.join(TIMER).exists() || folder.join(SERVICE).exists();
        let tells = self.root.is_none() && runs_systemd();
        if tells && is_ours {
            systemctl(&["disable", "--now", TIMER])?;
        }
        for path in [TIMER, SERVICE, &format!("timers.target.wants/{TIMER}")] {
            let path = folder.join(path);
            match fs::remove_file(&path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(failed(&path)(error));
                }
                _ => {}
            }
        }
        if tells && is_ours {
            systemctl(&["daemon-reload"])?;
        }
        let text = if is_ours {
            "removed; settings, certificate and cache stay\n"
        } else {
            "no service was installed\n"
        };
        Ok(Outcome { json: json!({ "ok": true, "removed": is_ours }), text: text.into() })
    }

    fn show(&self, settings: &Settings, units: &[Unit]) -> Result<Outcome, Failure> {
        let mut states = Vec::new();
        for (name, unit) in units {
            let (path, by) = self.unit(name);
            let by = by.unwrap_or_default();
            let state = match fs::read_to_string(&path) {
                Ok(text) if text == *unit => format!("installed{by}"),
                Ok(_) if by.is_empty() => {
                    "differs from the settings; run `janus-client service install` again".into()
                }
                Ok(_) => format!(
                    "installed{by}, and differs from the settings; run `janus-client service install`"
                ),
                Err(error) if error.kind() == io::ErrorKind::NotFound => "not installed".into(),
                Err(error) => return Err(failed(&path)(error)),
            };
            states.push((path, state));
        }
        let local = super::status::local(settings);
        let mut text = String::new();
        for (path, state) in &states {
            let _ = writeln!(text, "{}: {state}", path.display());
        }
        let enabled = self.is_enabled();
        if !enabled {
            text.push_str("the timer is not enabled: no backup is made by itself; run `janus-client service install`\n");
        }
        text.push_str(&local.text);
        let states = states.iter().map(|(path, state)| json!({ "path": path, "state": state }));
        let units: Vec<_> = states.collect();
        Ok(Outcome {
            json: json!({ "ok": true, "units": units, "enabled": enabled, "local": local.json }),
            text,
        })
    }
}

fn runs_systemd() -> bool {
    Path::new("/run/systemd/system").is_dir()
}

fn systemctl(arguments: &[&str]) -> Result<(), Failure> {
    let said = Process::new("systemctl").args(arguments).output();
    let said = said.map_err(|error| Failure::failed(format!("systemctl: {error}")))?;
    if said.status.success() {
        return Ok(());
    }
    let why = String::from_utf8_lossy(&said.stderr);
    Err(Failure::failed(format!("systemctl {}: {}", arguments.join(" "), why.trim())))
}

fn failed(path: &Path) -> impl Fn(io::Error) -> Failure {
    let path = path.display().to_string();
    move |error| Failure::failed(format!("{path}: {error}"))
}
