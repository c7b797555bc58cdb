//! Development commands: `cargo xtask demo|test|bench|bindings`.

mod bindings;

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(name = "cargo xtask", about = "Development commands of Janus Backup")]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Rebuild proto/src/gen from proto/schema
    Bindings(bindings::Args),
}

fn main() -> anyhow::Result<()> {
    match Args::parse().command {
        Command::Bindings(args) => bindings::run(&args),
    }
}
