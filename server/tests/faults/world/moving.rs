//! A store that is moved to a folder beside it.

use std::{
    fs,
    path::{Path, PathBuf},
};

use janus_proto::summed;
use janus_server::chain::store::relocate::relocate;
use serde_json::Value;

use super::World;

/// Where it is moved to.
const NEW: &str = "moved";
/// What says where the other place is, on either side of a move.
const MARKERS: [&str; 2] = [".moved.json", ".moving.json"];

impl World {
    /// Ends the server and moves its store, or goes on with that.
    pub fn relocate(&mut self) -> Result<(), String> {
        self.runs = None;
        let to = self.new_place();
        self.until_done("move", |world| {
            relocate(&world.storage, &world.folder, &to, &|_, _, _| ())
                .map(drop)
                .map_err(|error| error.to_string())
        })?;
        self.folder = to;
        Ok(())
    }

    /// True when a move was begun, and the old place is the store still.
    pub fn is_half_moved(&self) -> bool {
        let to = self.new_place();
        self.folder != to && to.join(MARKERS[1]).exists()
    }

    /// The server is told of the new place; who moves ends the move first.
    pub(super) fn follow(&mut self) -> Result<(), String> {
        let to = self.new_place();
        let ended = relocate(&self.storage, &self.folder, &to, &|_, _, _| ());
        ended.map_err(|error| error.to_string())?;
        self.folder = to;
        Ok(())
    }

    fn new_place(&self) -> PathBuf {
        self.folder.with_file_name(NEW)
    }
}

/// What a crash has left of a store that was elsewhere: its markers name places below `base` from now on.
pub fn bring_home(base: &Path) {
    let places = fs::read_dir(base).unwrap().map(|place| place.unwrap().path());
    for marker in places.flat_map(|place| MARKERS.map(|name| place.join(name))) {
        // One that was torn names no place.
        let Ok(bytes) = fs::read(&marker) else { continue };
        let Ok(mut value) = summed::parse::<Value>(&bytes, 1) else { continue };
        let path = PathBuf::from(value["path"].as_str().unwrap());
        value["path"] = base.join(path.file_name().unwrap()).to_str().unwrap().into();
        let mut text = serde_json::to_vec_pretty(&value).unwrap();
        text.push(b'\n');
        fs::write(&marker, summed::with_sum(text)).unwrap();
    }
}
