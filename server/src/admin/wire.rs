//! Lines on the admin socket: one [`Ask`] in, any number of [`Told`] out, the last of them `Done` or `Failed`.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{Answer, Command};

/// Longest request.
pub(super) const MAX_ASK_BYTES: u64 = 64 << 10;
/// Longest line of an answer: the usage of some hundred thousand snapshots.
pub(super) const MAX_TOLD_BYTES: u64 = 256 << 20;

/// This program's version; both ends must have it.
const VERSION: &str = env!("CARGO_PKG_VERSION");

/// A request.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Ask {
    version: String,
    command: Command,
}

/// What comes back.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Told {
    /// How far it is.
    Progress(String),
    /// The command was done.
    Done(Answer),
    /// It was not; why.
    Failed(String),
}

/// A request as a line.
pub(super) fn ask_line(command: Command) -> serde_json::Result<Vec<u8>> {
    line(&Ask { version: VERSION.into(), command })
}

/// A value as a line.
pub(super) fn line(value: &impl Serialize) -> serde_json::Result<Vec<u8>> {
    let mut bytes = serde_json::to_vec(value)?;
    bytes.push(b'\n');
    Ok(bytes)
}

/// Reads a request. The version comes first: a command of another version may not be one here.
pub(super) fn parse_ask(line: &[u8]) -> Result<Command, String> {
    let value: Value = serde_json::from_slice(line).map_err(|error| error.to_string())?;
    match value.get("version").and_then(Value::as_str) {
        Some(VERSION) => {}
        other => {
            return Err(format!(
                "the server that runs has version {VERSION}, this command {}: restart the server",
                other.unwrap_or("none")
            ));
        }
    }
    let ask: Ask = serde_json::from_value(value).map_err(|error| error.to_string())?;
    Ok(ask.command)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::admin::usage;

    #[test]
    fn commands_survive_the_socket() {
        let command = Command::Usage(usage::Arguments::default());
        assert_eq!(parse_ask(&ask_line(command.clone()).unwrap()), Ok(command));
    }

    #[test]
    fn another_version_is_named_and_nonsense_is_refused() {
        let error = parse_ask(br#"{"version":"9.9","command":{"fly":{}}}"#).unwrap_err();
        assert!(error.contains("9.9") && error.contains(VERSION), "{error}");
        for nonsense in [&b""[..], b"{", b"[]", b"{}", &[0xff; 9]] {
            assert!(parse_ask(nonsense).is_err());
        }
    }
}
