//! Commands that change what a store is: only while no server runs, since a running one would have to forget all it knows.

use clap::Subcommand;

use super::{
    Answer,
    ask::{AskError, check_owner},
    rebuild,
};
use crate::{chain::store::Store, config::Settings, storage::Disk};

/// What an administrator asks for while the server is stopped.
#[derive(Debug, Clone, PartialEq, Eq, Subcommand)]
pub enum Command {
    /// Make the catalog from the folders alone, also after they were copied here; the server must be stopped
    Rebuild {
        /// Only say what would be done
        #[arg(long)]
        dry_run: bool,
    },
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
    let (root, separate) = (&settings.image_path, settings.separate_folders_by_user);
    match command {
        Command::Rebuild { dry_run } => {
            // A copy may come without the store's own files.
            check_owner(root, ".")?;
            rebuild::run(&Disk::default(), root, separate, *dry_run, progress)
        }
        Command::Adopt { .. } => {
            check_owner(root, ".store.json")?;
            let generation = Store::renew(&Disk::default(), root)?;
            let text = format!("{} is store {generation} from now on\n", root.display());
            Ok(Answer::new(text, serde_json::json!({ "store_generation": generation })))
        }
    }
}
