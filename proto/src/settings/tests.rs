use serde::Deserialize;

use super::*;

#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct Settings {
    listen: String,
    image_path: PathBuf,
    lease_seconds: u32,
    prefer_vhdx: bool,
    server_urls: Vec<String>,
    note: Option<String>,
    mode: Mode,
    limits: Limits,
    users: BTreeMap<String, Limits>,
}

#[derive(Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Limits {
    probe_ms: u64,
}

#[derive(Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Mode {
    Allow,
    Hold,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            listen: "127.0.0.1:0".into(),
            image_path: PathBuf::new(),
            lease_seconds: 60,
            prefer_vhdx: true,
            server_urls: Vec::new(),
            note: None,
            mode: Mode::Allow,
            limits: Limits { probe_ms: 1000 },
            users: BTreeMap::new(),
        }
    }
}

fn load(file: Option<&str>, env: &[(&str, &str)], flags: &[&str]) -> Result<Settings, String> {
    let loader = Loader::<Settings>::new("JANUS_ROUTER");
    let folder = tempfile::tempdir().unwrap();
    let mut arguments = vec!["janus".to_string()];
    if let Some(text) = file {
        let path = folder.path().join("janus.toml");
        fs::write(&path, text).unwrap();
        arguments.extend(["--config".into(), path.display().to_string()]);
    }
    arguments.extend(flags.iter().map(ToString::to_string));
    let matches = loader.add_flags(Command::new("janus")).try_get_matches_from(arguments).unwrap();
    let env = env.iter().map(|(name, value)| (name.into(), value.into()));
    let strip = format!("{}/", folder.path().display());
    loader.load(&matches, env).map_err(|error| error.to_string().replace(&strip, ""))
}

#[test]
fn flags_win_over_environment_over_file_over_defaults() {
    let file = "listen = \"file\"\nlease_seconds = 1\nnote = \"n\"\n[limits]\nprobe_ms = 5\n";
    let env = [
        ("JANUS_ROUTER_LISTEN", "env"),
        ("JANUS_ROUTER_LEASE_SECONDS", "2"),
        ("JANUS_ROUTER_LIMITS_PROBE_MS", "7"),
        ("HOME", "x"),
    ];
    let loaded = load(
        Some(file),
        &env,
        &["--listen", "flag", "--server-urls", "a, b", "--server-urls", "c"],
    )
    .unwrap();
    let expected = Settings {
        listen: "flag".into(),
        lease_seconds: 2,
        note: Some("n".into()),
        limits: Limits { probe_ms: 7 },
        server_urls: vec!["a".into(), "b".into(), "c".into()],
        ..Settings::default()
    };
    assert_eq!(loaded, expected);
}

#[test]
fn nothing_given_means_defaults() {
    assert_eq!(load(None, &[], &[]).unwrap(), Settings::default());
}

#[test]
fn the_command_is_consistent() {
    Loader::<Settings>::new("JANUS_ROUTER").add_flags(Command::new("janus")).debug_assert();
}

#[test]
fn unknown_keys_are_refused_with_the_nearest_one() {
    let error = |file: &str| load(Some(file), &[], &[]).unwrap_err();
    assert_eq!(
        error("# x\nimagepath = \"/x\""),
        "janus.toml line 2: unknown key \"imagepath\"; did you mean \"image_path\"?"
    );
    assert_eq!(
        error("[limits]\nprobe = 1"),
        "janus.toml line 2: unknown key \"limits.probe\"; did you mean \"limits.probe_ms\"?"
    );
    assert!(error("zzz = 1").ends_with("--help lists all keys"));
    let variable = load(None, &[("JANUS_ROUTER_LISTN", "x")], &[]).unwrap_err();
    assert!(variable.contains("did you mean \"JANUS_ROUTER_LISTEN\"?"), "{variable}");
    load(None, &[("JANUS_CLIENT_URLS", "x"), ("JANUSX", "y")], &[]).unwrap();
    let variable = load(None, &[("JANUS_ROUTER_BOGUS", "x")], &[]).unwrap_err();
    assert!(variable.contains("--help lists all keys"), "{variable}");
    let negative = load(Some("lease_seconds = -2"), &[], &[]).unwrap_err();
    assert!(negative.contains("expected a whole number, 0 or more"), "{negative}");
}

#[test]
fn wrong_values_name_place_key_and_expected_type() {
    let error = |file: &str| load(Some(file), &[], &[]).unwrap_err();
    assert_eq!(
        error("lease_seconds = \"x\""),
        "janus.toml line 1: lease_seconds = \"x\": expected a whole number, 0 or more"
    );
    assert!(error("lease_seconds = -1").starts_with("janus.toml line 1: lease_seconds = -1: "));
    assert!(error("server_urls = \"a\"").contains("expected a list"));
    assert!(error("mode = \"x\"").contains("expected `allow` or `hold`"));
    assert!(error("limits = 3").contains("limits"));
    assert!(error("listen = ").starts_with("janus.toml line 1: not valid TOML"));
    let variable = load(None, &[("JANUS_ROUTER_PREFER_VHDX", "yes")], &[]).unwrap_err();
    assert_eq!(
        variable,
        "environment variable JANUS_ROUTER_PREFER_VHDX: prefer_vhdx = \"yes\": expected true or false"
    );
    let flag = load(None, &[], &["--lease-seconds", "many"]).unwrap_err();
    assert_eq!(
        flag,
        "flag --lease-seconds: lease_seconds = \"many\": expected a whole number, 0 or more"
    );
}

#[test]
fn a_missing_file_is_named() {
    let error = load(None, &[("JANUS_ROUTER_CONFIG", "/nowhere/janus.toml")], &[]).unwrap_err();
    assert!(error.starts_with("can't read settings file /nowhere/janus.toml"), "{error}");
}

#[test]
fn a_table_of_names_stands_in_the_file_alone() {
    let file = "[users.\"alice/web.1\"]\nprobe_ms = 7\n[users]\nbob = { probe_ms = 8 }\n";
    let loaded = load(Some(file), &[], &[]).unwrap();
    let probes: Vec<_> = loaded.users.iter().map(|(name, of)| (&**name, of.probe_ms)).collect();
    assert_eq!(probes, [("alice/web.1", 7), ("bob", 8)]);
    let error = load(Some("[users.alice]\nprobe = 7\n"), &[], &[]).unwrap_err();
    assert!(
        error.starts_with("janus.toml line 1: users = ") && error.contains("`probe`"),
        "{error}"
    );
    assert!(load(Some("users = 1"), &[], &[]).unwrap_err().contains("expected a table"));
    let variable = load(None, &[("JANUS_ROUTER_USERS", "x")], &[]).unwrap_err();
    assert!(variable.contains("unknown key"), "{variable}");
}

#[test]
fn changes_are_named_also_in_tables() {
    let (old, mut new) = (Settings::default(), Settings::default());
    assert_eq!(changed_keys(&old, &new, &[]), [""; 0]);
    new.limits.probe_ms = 1;
    new.listen = "x".into();
    new.users.insert("alice/web".into(), Limits { probe_ms: 1 });
    assert_eq!(changed_keys(&old, &new, &["listen"]), ["limits.probe_ms", "users.alice/web"]);
}

#[test]
fn a_file_of_a_larger_program_has_them_in_a_section() {
    let loader = Loader::<Settings>::new("JANUS_ROUTER").or_section("janus", "limits");
    let listen = |text: &str| {
        let overrides = loader.parse("all.toml".into(), text)?;
        loader.merge(overrides).map(|settings| settings.listen)
    };
    let probe_ms = |text: &str| {
        loader.merge(loader.parse("all.toml".into(), text).unwrap()).unwrap().limits.probe_ms
    };
    assert_eq!(probe_ms("[limits]\nprobe_ms = 7\n[janus]\nlisten = \"in\""), 7);
    assert_eq!(probe_ms("[limits]\nprobe_ms = 7\n[janus.limits]\nprobe_ms = 8"), 8);
    assert_eq!(
        listen("other = 1\n[janus]\nlisten = \"in\"\n[janus.limits]\nprobe_ms = 1").unwrap(),
        "in"
    );
    assert_eq!(listen("listen = \"own\"").unwrap(), "own");
    let error = listen("[janus]\nlistn = 1").unwrap_err().to_string();
    assert!(error.starts_with("all.toml line 2: unknown key \"listn\""), "{error}");
}

#[test]
fn addresses_to_listen_on_have_a_port() {
    for right in ["0.0.0.0:7420", "[::]:7420", "[::1]:0", "localhost:1"] {
        check_listen(right).unwrap();
    }
    for wrong in ["", "7420", ":7420", "::1:7420", "[x]:1", "0.0.0.0:99999", "https://a:1", "a b:1"]
    {
        check_listen(wrong).unwrap_err();
    }
}
