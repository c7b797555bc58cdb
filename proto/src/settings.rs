//! Settings in layers: defaults, then a TOML file, then environment variables, then flags.
//!
//! The settings struct with its defaults is the only list of keys: file, environment and flags are derived from it
//! (`image_path`, `PREFIX_IMAGE_PATH`, `--image-path`; nested tables as `section.key`, `PREFIX_SECTION_KEY`,
//! `--section-key`). What no key fits is refused with the nearest one. Paths stay as written, relative to the working directory.
//! An `Option` key must serialize as null, not be skipped, or it is unknown here. A key whose default is an empty table takes a
//! table of any names, in the file alone: it has neither variable nor flag.

use std::{
    collections::BTreeMap, ffi::OsString, fmt, fs, marker::PhantomData, net::Ipv6Addr,
    path::PathBuf,
};

use clap::{Arg, ArgAction, ArgMatches, Command};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::Value;

mod keys;

pub use keys::toml_problem;
use keys::{Key, Kind, known_keys, nearest, place};

/// Why settings can't be used. Each text is one line that names the place, the key and the way out.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SettingsError {
    /// The file can't be read.
    #[error("can't read settings file {path}: {reason}; check --config")]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        reason: String,
    },
    /// The file isn't TOML.
    #[error("{place}: not valid TOML: {reason}")]
    Syntax {
        /// File and line.
        place: Place,
        /// What the parser says.
        reason: String,
    },
    /// A key, variable or section that doesn't exist.
    #[error("{place}: unknown key {key:?}; {hint}")]
    UnknownKey {
        /// Where it stands.
        place: Place,
        /// The key.
        key: String,
        /// The nearest known one.
        hint: String,
    },
    /// A value of the wrong type or out of range.
    #[error("{place}: {key} = {value}: {reason}")]
    WrongValue {
        /// Where it stands.
        place: Place,
        /// The key.
        key: String,
        /// The value.
        value: String,
        /// What was expected.
        reason: String,
    },
}

/// Where a setting was made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// In the settings file.
    File {
        /// The file.
        path: PathBuf,
        /// Line, from 1, where known.
        line: Option<usize>,
    },
    /// In an environment variable.
    Variable(String),
    /// On the command line.
    Flag(String),
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File { path, line: Some(line) } => write!(f, "{} line {line}", path.display()),
            Self::File { path, line: None } => write!(f, "{}", path.display()),
            Self::Variable(name) => write!(f, "environment variable {name}"),
            Self::Flag(name) => write!(f, "flag --{name}"),
        }
    }
}

/// Checks what a program is to listen on: `HOST:PORT`, where an IPv6 address stands in brackets.
///
/// # Errors
/// Says what is expected.
pub fn check_listen(address: &str) -> Result<(), String> {
    let is_host = |host: &str| match host.strip_prefix('[') {
        Some(rest) => rest.strip_suffix(']').is_some_and(|ip| ip.parse::<Ipv6Addr>().is_ok()),
        None => !host.is_empty() && !host.contains([':', '/', ' ']),
    };
    match address.rsplit_once(':') {
        Some((host, port)) if is_host(host) && port.parse::<u16>().is_ok() => Ok(()),
        _ => Err(format!("{address:?} is not HOST:PORT, such as 0.0.0.0:7420 or [::]:7420")),
    }
}

/// Makes a `T` of all layers.
pub struct Loader<T> {
    prefix: &'static str,
    texts: BTreeMap<String, &'static str>,
    defaults: Value,
    keys: Vec<Key>,
    /// Section of a larger program's file that may hold all keys instead, and a section of that file that counts there, too.
    section: Option<(&'static str, &'static str)>,
    settings: PhantomData<fn() -> T>,
}

/// One value with where it comes from.
struct Override<'k> {
    key: &'k Key,
    value: Value,
    place: Place,
}

impl<T: Default + Serialize + DeserializeOwned> Loader<T> {
    /// A loader for `T`; environment variables start with `prefix` and an underscore.
    pub fn new(prefix: &'static str) -> Self {
        // A settings struct that can't be shown as JSON has no keys: every test of its program would fail.
        let defaults = serde_json::to_value(T::default()).unwrap_or(Value::Null);
        let keys = known_keys(&defaults);
        Self {
            prefix,
            texts: BTreeMap::new(),
            defaults,
            keys,
            section: None,
            settings: PhantomData,
        }
    }

    /// Takes also the file of a larger program, which has these settings in a section. One of its other sections, `shared`, is
    /// taken where this one has none of that name.
    #[must_use]
    pub fn or_section(mut self, section: &'static str, shared: &'static str) -> Self {
        self.section = Some((section, shared));
        self
    }

    /// One line of help for keys, by dotted name.
    #[must_use]
    pub fn describe(mut self, texts: &[(&'static str, &'static str)]) -> Self {
        self.texts.extend(texts.iter().map(|(key, text)| ((*key).to_owned(), *text)));
        self
    }

    /// The same for the keys of a section.
    #[must_use]
    pub fn describe_section(
        mut self,
        section: &str,
        texts: &[(&'static str, &'static str)],
    ) -> Self {
        self.texts.extend(texts.iter().map(|(key, text)| (format!("{section}.{key}"), *text)));
        self
    }

    /// Adds `--config FILE` and one flag for each key.
    pub fn add_flags(&self, command: Command) -> Command {
        let config = Arg::new("config")
            .long("config")
            .value_name("FILE")
            .help(format!("Settings file in TOML [env: {}_CONFIG]", self.prefix));
        self.spelled().fold(command.arg(config), |command, key| command.arg(self.flag(key)))
    }

    /// Keys that variables and flags can spell.
    fn spelled(&self) -> impl Iterator<Item = &Key> {
        self.keys.iter().filter(|key| key.kind != Kind::Table)
    }

    fn flag(&self, key: &Key) -> Arg {
        let text = self.texts.get(&key.name).copied().unwrap_or_default();
        let space = if text.is_empty() { "" } else { " " };
        let list = if key.kind == Kind::List { ", comma-separated" } else { "" };
        let help = format!(
            "{text}{space}[{}{list}] [env: {}]",
            key.default_text(),
            key.variable(self.prefix)
        );
        let arg =
            Arg::new(key.flag_id()).long(key.flag()).help(help).value_name(key.kind.value_name());
        // A list may be given in parts; of anything else the last one counts.
        match key.kind {
            Kind::List => arg.action(ArgAction::Append),
            _ => arg.overrides_with(key.flag_id()).allow_hyphen_values(true),
        }
    }

    /// Merges all layers. `env` is `std::env::vars_os()` in programs.
    ///
    /// # Errors
    /// When the file can't be read, or a key or value of any layer doesn't fit.
    pub fn load<E>(&self, matches: &ArgMatches, env: E) -> Result<T, SettingsError>
    where
        E: IntoIterator<Item = (OsString, OsString)>,
    {
        let (variables, config) = self.variables(env)?;
        let config = matches.get_one::<String>("config").map(PathBuf::from).or(config);
        let mut overrides = config.map(|path| self.file(path)).transpose()?.unwrap_or_default();
        overrides.extend(variables);
        overrides.extend(self.flags(matches)?);
        self.merge(overrides)
    }

    fn file(&self, path: PathBuf) -> Result<Vec<Override<'_>>, SettingsError> {
        let text = fs::read_to_string(&path).map_err(|error| SettingsError::Read {
            path: path.clone(),
            reason: error.to_string(),
        })?;
        self.parse(path, &text)
    }

    /// The file's values; `path` only names it in errors.
    fn parse(&self, path: PathBuf, text: &str) -> Result<Vec<Override<'_>>, SettingsError> {
        let is_table =
            |name: &str| self.keys.iter().any(|key| key.kind == Kind::Table && key.name == name);
        let mut found = keys::toml_values(text, &is_table).map_err(|(line, reason)| {
            SettingsError::Syntax { place: Place::File { path: path.clone(), line }, reason }
        })?;
        if let Some((section, shared)) = self.section {
            keys::only_section(&mut found, section, shared);
        }
        let mut overrides = Vec::new();
        for (name, line, value) in found {
            let place = Place::File { path: path.clone(), line: Some(line) };
            let Some(key) = self.keys.iter().find(|key| key.name == name) else {
                let hint = nearest(&name, "", self.keys.iter().map(|key| key.name.clone()));
                return Err(SettingsError::UnknownKey { place, key: name, hint });
            };
            overrides.push(Override { key, value, place });
        }
        Ok(overrides)
    }

    /// Values of our variables, and the settings file named by one.
    fn variables<E>(&self, env: E) -> Result<(Vec<Override<'_>>, Option<PathBuf>), SettingsError>
    where
        E: IntoIterator<Item = (OsString, OsString)>,
    {
        let (mut overrides, mut config) = (Vec::new(), None);
        for (name, value) in env {
            let Some(name) = name.to_str().filter(|name| self.is_ours(name)) else { continue };
            let place = Place::Variable(name.to_string());
            if name == format!("{}_CONFIG", self.prefix) {
                config = Some(PathBuf::from(value));
                continue;
            }
            let Some(key) = self.spelled().find(|key| key.variable(self.prefix) == name) else {
                let known = self.spelled().map(|key| key.variable(self.prefix));
                let hint = nearest(name, self.prefix, known);
                return Err(SettingsError::UnknownKey { place, key: name.to_string(), hint });
            };
            let text = value
                .to_str()
                .ok_or_else(|| wrong(key, &place, "?".into(), "is not UTF-8".into()))?;
            let value =
                key.parse_text(text).map_err(|reason| wrong(key, &place, quoted(text), reason))?;
            overrides.push(Override { key, value, place });
        }
        Ok((overrides, config))
    }

    fn is_ours(&self, variable: &str) -> bool {
        variable.strip_prefix(self.prefix).is_some_and(|rest| rest.starts_with('_'))
    }

    fn flags(&self, matches: &ArgMatches) -> Result<Vec<Override<'_>>, SettingsError> {
        let mut overrides = Vec::new();
        for key in &self.keys {
            let Ok(Some(given)) = matches.try_get_many::<String>(&key.flag_id()) else { continue };
            let text = given.map(String::as_str).collect::<Vec<_>>().join(",");
            let place = Place::Flag(key.flag());
            let value = key
                .parse_text(&text)
                .map_err(|reason| wrong(key, &place, quoted(&text), reason))?;
            overrides.push(Override { key, value, place });
        }
        Ok(overrides)
    }

    fn merge(&self, overrides: Vec<Override<'_>>) -> Result<T, SettingsError> {
        let mut merged = self.defaults.clone();
        for given in overrides {
            self.check(&given)?;
            place(&mut merged, &given.key.name, given.value);
        }
        // Each value fits by itself; this fails only on rules between keys.
        serde_json::from_value(merged).map_err(|error| SettingsError::WrongValue {
            place: Place::File { path: "settings".into(), line: None },
            key: "all layers".into(),
            value: "together".into(),
            reason: error.to_string(),
        })
    }

    /// Tries the value alone, so that the error can name the key and where it stands.
    fn check(&self, given: &Override<'_>) -> Result<(), SettingsError> {
        let shown = given.value.to_string();
        if !given.key.kind.fits(&given.value) {
            let expected = format!("expected {}", given.key.kind);
            return Err(wrong(given.key, &given.place, shown, expected));
        }
        let mut alone = self.defaults.clone();
        place(&mut alone, &given.key.name, given.value.clone());
        match serde_json::from_value::<T>(alone) {
            Ok(_) => Ok(()),
            Err(error) => Err(wrong(given.key, &given.place, shown, error.to_string())),
        }
    }
}

/// Dotted names of the keys whose values differ, but for those in `except`.
pub fn changed_keys<T: Serialize>(old: &T, new: &T, except: &[&str]) -> Vec<String> {
    let shown = |settings: &T| serde_json::to_value(settings).unwrap_or(Value::Null);
    let mut changed = Vec::new();
    keys::differing(&shown(old), &shown(new), "", &mut changed);
    changed.retain(|key| !except.contains(&key.as_str()));
    changed
}

fn wrong(key: &Key, place: &Place, value: String, reason: String) -> SettingsError {
    SettingsError::WrongValue { place: place.clone(), key: key.name.clone(), value, reason }
}

fn quoted(text: &str) -> String {
    Value::from(text).to_string()
}

#[cfg(test)]
mod tests;
