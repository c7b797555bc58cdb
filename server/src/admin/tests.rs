//! The socket and its callers, over a real store.

use std::{
    fs,
    io::{BufRead, BufReader, Write},
    os::unix::{
        fs::PermissionsExt,
        net::{UnixListener, UnixStream},
    },
    path::{Path, PathBuf},
    time::Duration,
};

use tokio::task::JoinHandle;

use super::{
    ask::{AskError, ask},
    socket::AdminSocket,
    *,
};
use crate::chain::store::{Counters, Store};

fn settings(image_path: &Path) -> Settings {
    Settings { image_path: image_path.to_owned(), ..Settings::default() }
}

fn usage() -> Command {
    Command::Usage(usage::Arguments::default())
}

/// What serves one store.
struct Holder {
    stop: CancellationToken,
    task: JoinHandle<()>,
}

impl Holder {
    fn start(image_path: &Path) -> Self {
        let (store, machines) = Store::open(image_path, true).unwrap();
        let runs = Arc::new(Runs::new(store, machines, Duration::from_secs(60)));
        let admin = Arc::new(Admin::new(runs, settings(image_path)));
        let socket = AdminSocket::bind(image_path).unwrap();
        let stop = CancellationToken::new();
        Self { task: tokio::spawn(socket.serve(admin, stop.clone())), stop }
    }

    async fn stop(self) {
        self.stop.cancel();
        self.task.await.unwrap();
    }
}

async fn asked(image_path: &Path, command: Command) -> Result<Answer, AskError> {
    let settings = settings(image_path);
    tokio::task::spawn_blocking(move || ask(&settings, command, &|_| {})).await.unwrap()
}

fn folder_for(length: usize) -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let missing = length.saturating_sub(folder.path().as_os_str().len() + 1).max(1);
    let mut path = folder.path().to_owned();
    for part in "x".repeat(missing).as_bytes().chunks(100) {
        path.push(std::str::from_utf8(part).unwrap());
    }
    (folder, path)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_command_reaches_who_holds_the_store_and_is_done_here_when_nobody_does() {
    // The second path is longer than a socket's address can be.
    for length in [0, 300] {
        let (_folder, path) = folder_for(length);
        let holder = Holder::start(&path);
        let socket = path.join(socket::NAME);
        assert_eq!(fs::metadata(&socket).unwrap().permissions().mode() & 0o777, 0o600);
        let by_socket = asked(&path, usage()).await.unwrap();
        assert!(by_socket.text.contains("free"), "{by_socket:?}");
        holder.stop().await;
        assert!(!socket.exists(), "the socket goes with its server");
        let here = asked(&path, usage()).await.unwrap();
        assert_eq!(here.json["machines"], by_socket.json["machines"]);
        let again = Holder::start(&path);
        asked(&path, usage()).await.unwrap();
        again.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_killed_server_left_is_replaced() {
    let (_folder, path) = folder_for(0);
    Holder::start(&path).stop().await;
    drop(UnixListener::bind(path.join(socket::NAME)).unwrap());
    asked(&path, usage()).await.unwrap();
    let holder = Holder::start(&path);
    asked(&path, usage()).await.unwrap();
    holder.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_held_store_without_a_socket_and_no_store_are_told() {
    let (_folder, path) = folder_for(0);
    let error = asked(&path, usage()).await.unwrap_err();
    assert!(matches!(error, AskError::Store(StoreError::NoStore { .. })), "{error}");
    assert!(!path.exists(), "a command makes no store");
    let held = Store::open(&path, true).unwrap();
    let mut waiting = std::pin::pin!(asked(&path, usage()));
    let early = tokio::time::timeout(Duration::from_millis(300), &mut waiting).await;
    assert!(early.is_err(), "it waits for a server that starts");
    drop(held);
    waiting.await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn unknown_machines_and_nonsense_get_an_answer() {
    let (_folder, path) = folder_for(0);
    let holder = Holder::start(&path);
    let command = Command::Usage(usage::Arguments::of("alice/none".parse().unwrap()));
    let error = asked(&path, command).await.unwrap_err().to_string();
    assert!(error.contains("no machine alice/none"), "{error}");
    for nonsense in [&b"{}\n"[..], b"\xff\n", b"{\"version\":\"0\"}\n"] {
        let mut stream = UnixStream::connect(path.join(socket::NAME)).unwrap();
        stream.write_all(nonsense).unwrap();
        let mut answer = String::new();
        BufReader::new(stream).read_line(&mut answer).unwrap();
        assert!(answer.starts_with("{\"failed\":"), "{answer}");
    }
    asked(&path, usage()).await.unwrap();
    holder.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_machines_damaged_pins_stop_no_others_retention() {
    let (_folder, path) = folder_for(0);
    let (store, _) = Store::open(&path, true).unwrap();
    for key in ["alice/bad", "alice/good"] {
        store.save_counters(&key.parse().unwrap(), Counters::default()).unwrap();
    }
    let pins = store.machine_folder(&"alice/bad".parse().unwrap()).join(".pins.json");
    fs::write(&pins, "{}").unwrap();
    drop(store);
    for action in [
        retention::Action::Run(retention::RunArguments::default()),
        retention::Action::Plan { machine: None },
    ] {
        let answer = asked(&path, Command::Retention(action)).await.unwrap();
        assert!(answer.is_bad && answer.text.contains("remove it and pin again"), "{answer:?}");
        let machines = answer.json["machines"].as_array().unwrap();
        assert_eq!(machines.len(), 2);
        assert!(machines[0]["error"].is_string() && machines[1]["error"].is_null(), "{machines:?}");
    }
    assert!(pins.exists());
}
