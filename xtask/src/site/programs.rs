//! The built programs: where they are, and building them first.

use std::{
    path::{Path, PathBuf},
    process::Command,
    sync::OnceLock,
};

use anyhow::{Context, Result, ensure};

use super::network;

/// Folder of programs that are already built; set by `cargo xtask test` for the tests it starts.
pub const PROGRAMS_VARIABLE: &str = "XTASK_PROGRAMS";

/// Which build to use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Profile {
    /// `dev`, which this workspace optimises a little.
    Dev,
    /// `release`, for figures.
    Release,
}

/// The folder with `janus-server`, `janus` and `janus-client`.
#[derive(Debug, Clone)]
pub struct Programs {
    folder: PathBuf,
    /// Network namespace in which they run.
    namespace: Option<String>,
}

impl Programs {
    /// Builds the programs and says where they are.
    ///
    /// # Errors
    /// When the build fails.
    pub fn build(profile: Profile) -> Result<Self> {
        let mut cargo = cargo();
        cargo.args(["build", "-p", "janus-server", "-p", "janus", "-p", "janus-client", "--bins"]);
        if profile == Profile::Release {
            cargo.arg("--release");
        }
        ensure!(cargo.status().context("run cargo")?.success(), "the build failed");
        let name = if profile == Profile::Release { "release" } else { "debug" };
        Ok(Self { folder: target().join(name), namespace: None })
    }

    /// For tests: the programs of `cargo xtask test`, else built once in this process.
    ///
    /// # Errors
    /// When the build fails.
    pub fn for_tests() -> Result<Self> {
        static BUILT: OnceLock<Result<Programs, String>> = OnceLock::new();
        let built = BUILT
            .get_or_init(|| Self::built_or(Profile::Dev).map_err(|error| format!("{error:#}")));
        built.clone().map_err(anyhow::Error::msg)
    }

    /// The programs in the folder that [`PROGRAMS_VARIABLE`] names, else built.
    ///
    /// # Errors
    /// When the build fails.
    pub fn built_or(profile: Profile) -> Result<Self> {
        match std::env::var_os(PROGRAMS_VARIABLE) {
            Some(folder) => Ok(Self { folder: folder.into(), namespace: None }),
            None => Self::build(profile),
        }
    }

    /// The same programs, run in a network namespace.
    pub fn inside(&self, namespace: String) -> Self {
        Self { folder: self.folder.clone(), namespace: Some(namespace) }
    }

    /// Their folder.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// A command that runs `janus-server`, without settings from this process's environment.
    pub fn server(&self) -> Command {
        self.command("janus-server")
    }

    /// A command that runs `janus`.
    pub fn janus(&self) -> Command {
        self.command("janus")
    }

    /// A command that runs `janus-client`.
    pub fn client(&self) -> Command {
        self.command("janus-client")
    }

    fn command(&self, name: &str) -> Command {
        let mut command = Command::new(self.folder.join(name));
        // Every setting is also an environment variable: those of whoever runs this are not for these programs.
        for (key, _) in
            std::env::vars_os().filter(|(key, _)| key.to_string_lossy().starts_with("JANUS_"))
        {
            command.env_remove(key);
        }
        match &self.namespace {
            Some(namespace) => network::inside(namespace, &command),
            None => command,
        }
    }
}

/// A command that runs cargo in the workspace, as a user would. What `cargo run` and `cargo test` tell us about our own package would
/// else look like changed settings to build scripts, and ring would be built anew each time.
pub fn cargo() -> Command {
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    let ours = [
        "CARGO_PKG_",
        "CARGO_MANIFEST_",
        "CARGO_BIN_",
        "CARGO_CRATE_NAME",
        "CARGO_PRIMARY_PACKAGE",
        "CARGO_TARGET_TMPDIR",
    ];
    for (key, _) in std::env::vars_os()
        .filter(|(key, _)| ours.iter().any(|name| key.to_string_lossy().starts_with(name)))
    {
        cargo.env_remove(key);
    }
    cargo.current_dir(workspace());
    cargo
}

/// The workspace's folder.
pub fn workspace() -> &'static Path {
    let ours = Path::new(env!("CARGO_MANIFEST_DIR"));
    ours.parent().unwrap_or(ours)
}

/// Where cargo builds.
pub fn target() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| workspace().join("target"), PathBuf::from)
}
