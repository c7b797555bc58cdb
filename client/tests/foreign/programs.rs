//! Clients in other languages, on gRPC libraries with their default settings. All take the same arguments and print JSON.

use std::{
    fs,
    io::{BufRead, BufReader},
    path::Path,
    process::{Child, Command, Stdio},
    sync::{OnceLock, mpsc},
    time::Duration,
};

use serde_json::Value;
use xtask::{
    packages,
    site::{target, workspace},
};

const PYTHON_PACKAGES: &[&str] = &[
    "blake3==1.0.11",
    "googleapis-common-protos==1.76.0",
    "grpcio==1.85.1",
    "grpcio-health-checking==1.85.1",
    "grpcio-reflection==1.85.1",
    "grpcio-tools==1.85.1",
];

/// A program and the arguments that always come first.
pub struct Foreign {
    pub name: &'static str,
    command: Vec<String>,
}

/// Both, made once: the tests of this file run side by side.
pub fn all() -> &'static [Foreign] {
    static READY: OnceLock<[Foreign; 2]> = OnceLock::new();
    READY.get_or_init(|| [python(), node()])
}

fn text(path: impl AsRef<Path>) -> String {
    path.as_ref().to_string_lossy().into_owned()
}

/// grpcio, with modules made of the schema.
fn python() -> Foreign {
    let interpreter = packages::python("python-client", PYTHON_PACKAGES).unwrap();
    let stubs = target().join("tools/python-client-stubs");
    let schema = workspace().join("proto/schema");
    let _ = fs::remove_dir_all(&stubs);
    fs::create_dir_all(&stubs).unwrap();
    let mut protoc = Command::new(&interpreter);
    protoc.args(["-m", "grpc_tools.protoc"]).arg(format!("-I{}", schema.display()));
    protoc
        .arg(format!("--python_out={}", stubs.display()))
        .arg(format!("--grpc_python_out={}", stubs.display()));
    for name in ["types", "backup", "restore", "catalog"] {
        protoc.arg(schema.join(format!("janus/v1/{name}.proto")));
    }
    packages::output(&mut protoc).unwrap();
    let program = workspace().join("client/tests/python/janus_client.py");
    let command = vec![text(interpreter), text(program), "--stubs".into(), text(stubs)];
    Foreign { name: "python", command }
}

/// @grpc/grpc-js, with stubs made of what reflection says.
fn node() -> Foreign {
    let ours = workspace().join("client/tests/node");
    let folder = packages::node("node-client", &ours).unwrap();
    // Modules are looked for from the program's own folder on.
    let program = folder.join("janus_client.mjs");
    fs::copy(ours.join("janus_client.mjs"), &program).unwrap();
    Foreign { name: "node", command: vec!["node".into(), text(program)] }
}

impl Foreign {
    /// A command of the machine whose keys are in `keys`.
    pub fn command(&self, url: &str, keys: &Path, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.command[0]);
        command.args(&self.command[1..]).args(["--url", url]);
        for name in ["cert", "key", "ca"] {
            command.arg(format!("--{name}")).arg(keys.join(format!("{name}.pem")));
        }
        command.args(arguments);
        command
    }

    /// A command without TLS.
    pub fn plain(&self, address: &str, arguments: &[&str]) -> Value {
        let mut command = Command::new(&self.command[0]);
        command.args(&self.command[1..]).args(["--plain", address]).args(arguments);
        answer(&mut command)
    }

    /// Runs a command; an error is an answer, too.
    pub fn call(&self, url: &str, keys: &Path, arguments: &[&str]) -> Value {
        answer(&mut self.command(url, keys, arguments))
    }
}

fn answer(command: &mut Command) -> Value {
    let output = command.output().unwrap();
    let (said, complained) =
        (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    let answer: Value = serde_json::from_str(&said)
        .unwrap_or_else(|_| panic!("{command:?} printed {said:?} and {complained}"));
    assert_eq!(output.status.success(), answer["ok"] == true, "{answer}");
    answer
}

/// A health watch that runs, line by line.
pub struct Watch {
    child: Child,
    lines: mpsc::Receiver<String>,
}

impl Watch {
    pub fn start(mut command: Command) -> Self {
        let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
        let stdout = child.stdout.take().unwrap();
        let (tell, lines) = mpsc::channel();
        std::thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                let _ = tell.send(line);
            }
        });
        Self { child, lines }
    }

    /// The next status; within 20 s.
    pub fn next(&self) -> String {
        let line = self.lines.recv_timeout(Duration::from_secs(20)).expect("a change");
        let answer: Value = serde_json::from_str(&line).unwrap();
        answer["status"].as_str().unwrap_or_else(|| panic!("{line}")).to_owned()
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
