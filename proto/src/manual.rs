//! What shells and `man` know of a program: made of the same description that reads its arguments.

use std::{
    fs,
    io::{self, Write},
    path::{Path, PathBuf},
};

use clap::{Arg, ArgMatches, Command, value_parser};
use clap_complete::{Shell, generate};

const COMPLETIONS: &str = "completions";
const MANUAL: &str = "manual";

/// Adds `completions SHELL`, and for packages the hidden `manual FOLDER`.
pub fn with_commands(command: Command) -> Command {
    let shells = [Shell::Bash, Shell::Zsh, Shell::Fish];
    let shell =
        Arg::new("shell").required(true).value_parser(shells.map(|shell| shell.to_string()));
    let folder = Arg::new("folder").required(true).value_parser(value_parser!(PathBuf));
    command
        .subcommand(Command::new(COMPLETIONS).about("Print completions for a shell").arg(shell))
        .subcommand(Command::new(MANUAL).about("Write man pages").hide(true).arg(folder))
}

/// Does what these commands ask for; `None` when it is another one.
pub fn answer(matches: &ArgMatches, command: Command) -> Option<io::Result<()>> {
    match matches.subcommand()? {
        (COMPLETIONS, matches) => {
            let shell: Shell = matches.get_one::<String>("shell")?.parse().ok()?;
            let mut out = io::stdout().lock();
            let written = out.write_all(&completions(command, shell)).and_then(|()| out.flush());
            // A reader that has gone is no failure.
            let is_gone = |error: &io::Error| error.kind() == io::ErrorKind::BrokenPipe;
            Some(written.or_else(|error| if is_gone(&error) { Ok(()) } else { Err(error) }))
        }
        (MANUAL, matches) => Some(write_pages(command, matches.get_one::<PathBuf>("folder")?)),
        _ => None,
    }
}

fn completions(mut command: Command, shell: Shell) -> Vec<u8> {
    let name = command.get_name().to_owned();
    let mut text = Vec::new();
    generate(shell, &mut command, name, &mut text);
    text
}

/// A page for the program, and one for each command that isn't hidden.
fn write_pages(command: Command, folder: &Path) -> io::Result<()> {
    fs::create_dir_all(folder)?;
    clap_mangen::generate_to(command, folder)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn program() -> Command {
        with_commands(
            Command::new("prog").about("Does it").subcommand(Command::new("run").about("Runs")),
        )
    }

    #[test]
    fn every_shell_completes_every_command() {
        for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
            let text = String::from_utf8(completions(program(), shell)).unwrap();
            assert!(text.contains("prog") && text.contains("run"), "{shell}: {text}");
        }
    }

    #[test]
    fn every_command_has_a_page_and_hidden_ones_have_none() {
        let folder = tempfile::tempdir().unwrap();
        write_pages(program(), folder.path()).unwrap();
        let mut names: Vec<_> = fs::read_dir(folder.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.retain(|name| !name.contains("help"));
        names.sort();
        assert_eq!(names, ["prog-completions.1", "prog-run.1", "prog.1"]);
    }
}
