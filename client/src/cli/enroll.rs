//! `janus-client enroll`: the certificate of this machine, for a token.

use std::{
    fs,
    io::{self, Read},
    path::{Path, PathBuf},
};

use clap::{Arg, ArgAction, ArgMatches, Command, value_parser};
use janus_proto::{enroll::Token, show::date};
use serde_json::json;

use super::{Failure, Outcome};
use crate::{
    config::{Encryption, Settings},
    enroll::{self, Done, Files},
};

/// Longest token that is read.
const MAX_TOKEN_BYTES: u64 = 4096;

pub(super) fn command() -> Command {
    Command::new("enroll")
        .about("Get this machine's certificate for a token of `janus-server enroll token`")
        .arg(Arg::new("url").required(true).value_name("URL").help(
            "Where the server certifies machines: https://HOST:PORT of its setting enroll.listen",
        ))
        .arg(
            Arg::new("token")
                .required(true)
                .value_name("TOKEN")
                .help("The token; -: read it from stdin"),
        )
        .arg(
            Arg::new("out")
                .long("out")
                .value_name("DIR")
                .value_parser(value_parser!(PathBuf))
                .help("Write cert.pem, key.pem and ca.pem there, not where the settings say"),
        )
        .arg(
            Arg::new("write-settings")
                .long("write-settings")
                .value_name("FILE")
                .value_parser(value_parser!(PathBuf))
                .help("Begin a settings file there, if there is none"),
        )
        .arg(
            Arg::new("seal").long("seal").action(ArgAction::SetTrue).help(
                "Make the key that its backups are sealed with, too, and print its recovery key",
            ),
        )
        .arg(
            Arg::new("force")
                .long("force")
                .action(ArgAction::SetTrue)
                .help("Replace a certificate that is there"),
        )
}

/// Enrols this machine.
///
/// # Errors
/// When it gets no certificate.
pub async fn enroll(matches: &ArgMatches, settings: &Settings) -> Result<Outcome, Failure> {
    let given = |name| matches.get_one::<String>(name).map_or("", String::as_str);
    let token: Token = read_token(given("token"))?.parse().map_err(Failure::usage)?;
    let files = match matches.get_one::<PathBuf>("out") {
        Some(folder) => Files::within(folder),
        None => settings.identity_files(),
    };
    let proxies = settings.proxies()?;
    let replace = matches.get_flag("force");
    let done = enroll::enroll(given("url"), &token, &files, proxies, replace).await;
    let Done { machine, urls, expires } = done.map_err(Failure::failed)?;
    let Files { cert, key, ca } = &files;
    let until = date(expires.saturating_mul(1000));
    let mut text = format!(
        "this machine is {machine} until {until}; its backups renew that by themselves\n\
         wrote {}, {} and {}\n",
        cert.display(),
        key.display(),
        ca.display(),
    );
    // What is sealed is sealed by a key beside this one.
    let settings = &Settings { key: key.clone(), ..settings.clone() };
    let wants_seal = matches.get_flag("seal") || settings.encryption == Encryption::Client;
    match matches.get_one::<PathBuf>("write-settings") {
        Some(path) if path.exists() => {
            let path = path.display();
            text.push_str(&format!("{path} is there already and stays as it is: see that its cert, key, ca and urls are these\n"));
        }
        Some(path) => {
            write_settings(path, &urls, &files, settings, wants_seal).map_err(|error| {
                Failure::failed(format!("the machine is enrolled, but {}: {error}", path.display()))
            })?;
            text.push_str(&format!("wrote {}: name the `disks` there\n", path.display()));
        }
        None if settings.urls.is_empty() => {
            text.push_str(&format!("its settings still need\n  urls = {urls:?}\n"));
        }
        None => {}
    }
    let sealed = match wants_seal && !settings.seal_key_path().exists() {
        true => Some(super::seal::make(settings)?),
        false => None,
    };
    if let Some(made) = &sealed {
        text.push_str(&format!("\n{}\n", made.text.trim_end()));
    }
    text.push_str("next: janus-client test, and janus-client service install\n");
    let told = json!({
        "machine": machine.to_string(),
        "expires": expires,
        "urls": urls,
        "cert": cert,
        "key": key,
        "ca": ca,
        "seal": sealed.map(|made| made.json),
    });
    Ok(Outcome { json: told, text })
}

fn read_token(given: &str) -> Result<String, Failure> {
    if given != "-" {
        return Ok(given.to_owned());
    }
    let mut text = String::new();
    let read = io::stdin().take(MAX_TOKEN_BYTES).read_to_string(&mut text);
    read.map_err(|error| Failure::failed(format!("stdin: {error}")))?;
    Ok(text)
}

/// Settings to begin with.
fn write_settings(
    path: &Path,
    urls: &[String],
    files: &Files,
    settings: &Settings,
    seals: bool,
) -> io::Result<()> {
    let absolute = |path: &PathBuf| std::path::absolute(path);
    let seal = match seals {
        true => format!(
            "encryption = \"client\"\nseal_key = {:?}\n",
            absolute(&settings.seal_key_path())?
        ),
        false => String::new(),
    };
    let text = format!(
        "# Settings of janus-client, begun by `janus-client enroll`. All that can be set: client.example.toml.\n\
         urls = {urls:?}\n\
         cert = {:?}\n\
         key = {:?}\n\
         ca = {:?}\n\
         {seal}\n\
         # What is backed up: `janus-client sources` lists what there is.\n\
         disks = []\n",
        absolute(&files.cert)?,
        absolute(&files.key)?,
        absolute(&files.ca)?,
    );
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder)?;
    }
    fs::write(path, text)
}
