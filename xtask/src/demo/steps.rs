//! Steps of the story: told as they happen, kept for `--json`.

use std::time::Instant;

use anyhow::Result;
use serde::Serialize;

/// A step that has ended.
#[derive(Debug, Serialize)]
pub(super) struct Done {
    step: String,
    ok: bool,
    seconds: f64,
    /// What was seen, or the error.
    said: String,
}

/// The steps so far.
pub(super) struct Steps {
    pub done: Vec<Done>,
    quiet: bool,
}

impl Steps {
    pub fn new(quiet: bool) -> Self {
        Self { done: Vec::new(), quiet }
    }

    /// Runs a step, which returns its result and what it saw.
    pub fn step<T>(&mut self, name: &str, work: impl FnOnce() -> Result<(T, String)>) -> Result<T> {
        let started = Instant::now();
        let result = work();
        let said = match &result {
            Ok((_, said)) => said.clone(),
            Err(error) => format!("{error:#}"),
        };
        let seconds = started.elapsed().as_secs_f64();
        if !self.quiet {
            let mark = if result.is_ok() { "ok  " } else { "FAIL" };
            println!("{mark} {seconds:5.1} s  {name}");
            if !said.is_empty() {
                println!("              {said}");
            }
        }
        self.done.push(Done { step: name.to_owned(), ok: result.is_ok(), seconds, said });
        result.map(|(value, _)| value)
    }
}
