//! Development commands: `cargo xtask demo|test|bench|dist|bindings`.

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use xtask::{bench, bindings, demo, dist, site};

// Not in the library: test programs are not built anew when it changes.
mod test;

#[derive(Parser)]
#[command(name = "cargo xtask", about = "Development commands of Janus Backup")]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Back up a disk to two servers in turn, lose one, restore: real processes on this machine
    Demo(demo::Args),
    /// Everything that CI runs
    Test(test::Args),
    /// Measure speed, CPU time and memory, as a table and as JSON
    Bench(bench::Args),
    /// Make Debian packages of client, server and janus in target/dist
    Dist(dist::Args),
    /// Rebuild proto/src/gen from proto/schema
    Bindings(bindings::Args),
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        // Without a backtrace, which would stand where what failed is read.
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> anyhow::Result<()> {
    let args = Args::parse();
    site::stop_children_on_interrupt()?;
    match args.command {
        Command::Demo(args) => demo::run(&args),
        Command::Test(args) => test::run(&args),
        Command::Bench(args) => bench::run(&args),
        Command::Dist(args) => dist::run(&args),
        Command::Bindings(args) => bindings::run(&args),
    }
}
