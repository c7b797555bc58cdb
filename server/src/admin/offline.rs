//! Commands without a server: those that change what a store is, only while none runs, since a running one would have to forget all it
//! knows; and what needs none.

use std::{
    cell::Cell,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use clap::Subcommand;
use janus_proto::show::amount;

use super::{
    Answer, Person,
    ask::{AskError, check_owner},
    policy, rebuild,
};
use crate::{
    audit::{Action, Audit, Event},
    chain::store::{Store, relocate::relocate},
    config::Settings,
    storage::Disk,
};

/// Between two lines of progress.
const TELL_EVERY: Duration = Duration::from_secs(5);

/// What an administrator asks for without the server.
#[derive(Debug, Clone, PartialEq, Eq, Subcommand)]
pub enum Command {
    /// Make the catalog from the folders alone, also after they were copied here; the server must be stopped
    Rebuild {
        /// Only say what would be done
        #[arg(long)]
        dry_run: bool,
    },
    /// Copy the store to another path, compare the copy, and make it the store; the server must be stopped
    Move {
        /// An empty folder, or one that is not there yet
        #[arg(long, value_name = "PATH")]
        to: PathBuf,
    },
    /// Show who is in which group of a policy, and what that gives
    Policy(policy::Arguments),
    /// Make a copied store one of its own; the server must be stopped
    Adopt {
        /// Give it a new generation, so that it is no longer taken for the store it was copied from
        #[arg(long, required = true)]
        new_id: bool,
    },
}

/// Does a command. Blocks; lines of progress go to `progress`.
///
/// # Errors
/// As [`AskError`] says; a server that runs is one reason.
pub fn run(
    settings: &Settings,
    command: &Command,
    progress: &dyn Fn(String),
) -> Result<Answer, AskError> {
    let root = &settings.image_path;
    let text = match command {
        Command::Rebuild { dry_run: true } | Command::Policy(_) => String::new(),
        Command::Rebuild { .. } => "rebuild".into(),
        Command::Move { to } => format!("move to {}", to.display()),
        Command::Adopt { .. } => "adopt as a store of its own".into(),
    };
    let record = |event: Event| {
        // Files that another user makes there would be in the server's way.
        if !text.is_empty() && check_owner(root, ".store.json").is_ok() {
            // Dropped at once: where it lies may be moved now.
            Audit::new(Disk::default(), &settings.audit_folder()).note(&Person::own().who(), event);
        }
    };
    let event = Event::new(Action::Command).noting(&text);
    record(event.clone().asked());
    let done = carry_out(settings, command, progress);
    // A moved store's log goes on at its new place.
    if !matches!((command, &done), (Command::Move { .. }, Ok(_))) {
        record(event.with_result(&done));
    }
    done
}

fn carry_out(
    settings: &Settings,
    command: &Command,
    progress: &dyn Fn(String),
) -> Result<Answer, AskError> {
    let (root, separate) = (&settings.image_path, settings.separate_folders_by_user);
    match command {
        Command::Rebuild { dry_run } => {
            // A copy may come without the store's own files.
            check_owner(root, ".")?;
            rebuild::run(&Disk::default(), root, separate, *dry_run, progress)
        }
        Command::Policy(arguments) => policy::run(settings, arguments),
        Command::Move { to } => {
            check_owner(root, ".store.json")?;
            relocate_store(root, to, progress)
        }
        Command::Adopt { .. } => {
            check_owner(root, ".store.json")?;
            let generation = Store::renew(&Disk::default(), root)?;
            let text = format!("{} is store {generation} from now on\n", root.display());
            Ok(Answer::new(text, serde_json::json!({ "store_generation": generation })))
        }
    }
}

fn relocate_store(root: &Path, to: &Path, progress: &dyn Fn(String)) -> Result<Answer, AskError> {
    let told = Cell::new(Instant::now());
    let tell = |number: usize, all: usize, path: &Path| {
        if told.get().elapsed() >= TELL_EVERY {
            told.set(Instant::now());
            progress(format!("file {} of {all}: {}", number + 1, path.display()));
        }
    };
    let moved = relocate(&Disk::default(), root, to, &tell)?;
    let to = std::path::absolute(to).unwrap_or_else(|_| to.to_owned());
    let text = format!(
        "{} files: {} copied and compared, {} shared, {} files were there already\n\
         The store is at {new} now: set image_path = {new:?} in the server's settings and start it.\n\
         Nothing uses {} any more: remove it when you like.\n",
        moved.files,
        amount(moved.copied_bytes),
        amount(moved.shared_bytes),
        moved.found_files,
        root.display(),
        new = to.display().to_string(),
    );
    let mut json = serde_json::to_value(moved).unwrap_or_default();
    json["image_path"] = serde_json::json!(to);
    Ok(Answer::new(text, json))
}
