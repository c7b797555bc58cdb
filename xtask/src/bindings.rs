//! Rebuilds the committed bindings in `proto/src/gen` from `proto/schema`, without protoc.

use std::{fs, path::Path};

use anyhow::{Context, Result, ensure};
use prost::Message;

const SCHEMA: &str = "proto/schema";
const GENERATED: &str = "proto/src/gen";
const FILES: [&str; 10] = [
    "types",
    "backup",
    "restore",
    "catalog",
    "report",
    "info",
    "maintenance",
    "probe",
    "table",
    "enrollment",
];

/// Arguments of `cargo xtask bindings`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Fail when the committed bindings differ instead of writing them
    #[arg(long)]
    check: bool,
}

/// Rebuilds or checks the bindings.
///
/// # Errors
/// When the schema is wrong, or with `--check` when the committed bindings differ.
pub fn run(args: &Args) -> Result<()> {
    run_in(args.check)
}

/// Checks the committed bindings.
///
/// # Errors
/// When they aren't what the schema makes.
pub fn check() -> Result<()> {
    run_in(true)
}

fn run_in(check: bool) -> Result<()> {
    let fresh = tempfile::tempdir()?;
    generate(fresh.path())?;
    for entry in fs::read_dir(fresh.path())? {
        let path = entry?.path();
        let name = path.file_name().context("generated file without a name")?;
        let committed = Path::new(GENERATED).join(name);
        if check {
            ensure!(
                fs::read(&committed).ok() == Some(fs::read(&path)?),
                "{} is not what proto/schema makes: run `cargo xtask bindings`",
                committed.display()
            );
        } else {
            fs::create_dir_all(GENERATED)?;
            fs::copy(&path, &committed)?;
        }
    }
    Ok(())
}

fn generate(out: &Path) -> Result<()> {
    let files = FILES.map(|name| format!("janus/v1/{name}.proto"));
    let mut compiler = protox::Compiler::new([SCHEMA])?;
    compiler.include_source_info(true).include_imports(true).open_files(files)?;
    let descriptors = compiler.file_descriptor_set();
    fs::write(out.join("descriptors.bin"), descriptors.encode_to_vec())?;
    tonic_prost_build::configure()
        .out_dir(out)
        .bytes(".")
        .build_transport(false)
        .compile_fds(descriptors)
        .context("generate bindings")
}
