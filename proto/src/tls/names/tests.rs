use proptest::prelude::*;
use rcgen::{CertificateParams, DnType, DnValue, KeyPair, SanType};

use super::*;

fn pki(rules: &str) -> Pki {
    toml::from_str(&format!("group = \"g\"\nca = \"ca.pem\"\n{rules}")).unwrap()
}

fn names(rules: &str) -> Names {
    Names::of(&pki(rules)).unwrap().unwrap()
}

const CLIENT: &str = r#"
[names.machines]
uri = "spiffe://example.org/backup/client/{user}/{machine}"
role = "client"
[names.hosts]
dns = "{machine}.{user}.backup.example.org"
role = "client"
[names.servers]
dns = "{name}.servers.example.org"
role = "server"
[names.people]
email = "{name}@example.org"
role = "operator"
[names.subject]
cn = "backup of {machine}"
user = "alice"
role = "restore"
"#;

const UNREAD: &str = "has no name that a rule of pki.names takes";

fn decide(shown: &[Shown<'_>]) -> Result<String, String> {
    names(CLIENT).decide(shown).map(|(role, _)| role.to_string())
}

#[test]
fn whole_names_are_taken_and_nothing_that_only_looks_alike() {
    use Kind::{CommonName, Dns, Email, Uri};
    for (name, who) in [
        ((Uri, "spiffe://example.org/backup/client/alice/web1"), "client alice/web1"),
        ((Dns, "web1.alice.backup.example.org"), "client alice/web1"),
        // Hosts have no case, and Active Directory likes capitals.
        ((Dns, "PC-1.Alice.Backup.EXAMPLE.org"), "client alice/pc-1"),
        ((Dns, "north.servers.example.org"), "server north"),
        ((Email, "alice.smith@example.org"), "operator alice.smith"),
        ((CommonName, "backup of web1"), "restore of alice/web1"),
    ] {
        assert_eq!(decide(&[name]).as_deref(), Ok(who), "{name:?}");
    }
    for other in [
        // Another trust domain, or one that looks like ours.
        (Uri, "spiffe://example.org.evil.org/backup/client/alice/web1"),
        (Uri, "spiffe://evil.example.org/backup/client/alice/web1"),
        (Uri, "spiffe://xample.org/backup/client/alice/web1"),
        (Uri, "spiffe://\u{435}xample.org/backup/client/alice/web1"),
        (Uri, "spiffe://xn--xample-2of.org/backup/client/alice/web1"),
        (Uri, "spiffe://example.org@evil.org/backup/client/alice/web1"),
        (Uri, "spiffe://alice@example.org/backup/client/alice/web1"),
        (Uri, "spiffe://example.org:443/backup/client/alice/web1"),
        (Uri, "spiffe://example.org./backup/client/alice/web1"),
        (Uri, "spiffe://EXAMPLE.org/backup/client/alice/web1"),
        (Uri, "SPIFFE://example.org/backup/client/alice/web1"),
        (Uri, "https://example.org/backup/client/alice/web1"),
        (Uri, "spiffe:/example.org/backup/client/alice/web1"),
        // Another path.
        (Uri, "spiffe://example.org/backup/client/alice"),
        (Uri, "spiffe://example.org/backup/client/alice/web1/"),
        (Uri, "spiffe://example.org/backup/client/alice/web1/x"),
        (Uri, "spiffe://example.org/backup/client//web1"),
        (Uri, "spiffe://example.org/backup/client/alice/"),
        (Uri, "spiffe://example.org//backup/client/alice/web1"),
        (Uri, "spiffe://example.org/x/../backup/client/alice/web1"),
        (Uri, "spiffe://example.org/backup/Client/alice/web1"),
        (Uri, " spiffe://example.org/backup/client/alice/web1"),
        // Hosts.
        (Dns, "web1.alice.backup.example.org.evil.org"),
        (Dns, "web1.alice.backup.example.org."),
        (Dns, "x.web1.alice.backup.example.org"),
        (Dns, "alice.backup.example.org"),
        (Dns, ".alice.backup.example.org"),
        (Dns, "web1.alicebackup.example.org"),
        (Dns, "web1.alice.backup.example.or\u{212a}"),
        (Dns, "*.example.org"),
        (Dns, ""),
        // Mail addresses and common names have case.
        (Email, "alice@example.org@evil.org"),
        (Email, "alice@EXAMPLE.org"),
        (Email, "@example.org"),
        (CommonName, "Backup of web1"),
        (CommonName, "backup of "),
        (CommonName, "backup of web1.example.org"),
        // A name of another kind.
        (CommonName, "web1.alice.backup.example.org"),
        (Email, "web1.alice.backup.example.org"),
        (Uri, "web1.alice.backup.example.org"),
        (Dns, "spiffe://example.org/backup/client/alice/web1"),
    ] {
        let refused = decide(&[other]).unwrap_err();
        assert!(refused.starts_with(UNREAD), "{other:?}: {refused}");
        assert!(refused.contains(&show(other)), "{refused}");
    }
    let nothing = decide(&[]).unwrap_err();
    assert!(nothing.starts_with(UNREAD) && nothing.ends_with("it has none"), "{nothing}");
    // Where a name stands that fits, it must be one.
    for bad in [
        (Uri, "spiffe://example.org/backup/client/../web1"),
        (Uri, "spiffe://example.org/backup/client/alice/web1?x"),
        (Uri, "spiffe://example.org/backup/client/alice/web1#x"),
        (Uri, "spiffe://example.org/backup/client/alice/web%31"),
        (Uri, "spiffe://example.org/backup/client/al%2Fice/web1"),
        (Uri, "spiffe://example.org/backup/client/alice/web1\0"),
        (Uri, "spiffe://example.org/backup/client/alice/w\u{435}b1"),
        (Uri, "spiffe://example.org/backup/client/alice/web1 "),
        (Uri, "spiffe://example.org/backup/client/alice/con"),
        (Dns, "*.alice.backup.example.org"),
        (Dns, "web1.*.backup.example.org"),
        (Dns, "w\0b1.alice.backup.example.org"),
        (Dns, "-web1.alice.backup.example.org"),
        (Email, "\"alice\"@example.org"),
        (Email, "alice+x@example.org"),
        (CommonName, "backup of web1\0"),
        (CommonName, "backup of web1, bob"),
    ] {
        let refused = decide(&[bad]).unwrap_err();
        assert!(refused.contains("can't take"), "{bad:?}: {refused}");
        // What is shown has no characters that do something to a terminal or a log.
        assert!(refused.chars().all(|c| !c.is_control()), "{refused}");
    }
}

#[test]
fn all_names_that_fit_agree_or_nobody_is_meant() {
    use Kind::{CommonName, Dns, Uri};
    let spiffe = (Uri, "spiffe://example.org/backup/client/alice/web1");
    let host = (Dns, "web1.alice.backup.example.org");
    let others = [(Dns, "www.example.com"), (CommonName, "web1")];
    assert_eq!(decide(&[others[0], host, spiffe, others[1]]).as_deref(), Ok("client alice/web1"));
    for other in [
        (Dns, "web2.alice.backup.example.org"),
        (Dns, "web1.bob.backup.example.org"),
        (Dns, "web1.servers.example.org"),
        (CommonName, "backup of web1"),
    ] {
        for shown in [[host, other], [other, host], [spiffe, other]] {
            let refused = decide(&shown).unwrap_err();
            assert!(refused.starts_with("is for more than one: "), "{refused}");
            assert!(
                refused.contains("client alice/web1") && refused.contains(other.1),
                "{refused}"
            );
        }
    }
    // One that fits and isn't a name spoils the others.
    decide(&[host, (Dns, "*.alice.backup.example.org")]).unwrap_err();
    decide(&[(Dns, "*.alice.backup.example.org"), host]).unwrap_err();
    // SPIFFE knows one URI for each certificate.
    for second in ["spiffe://example.org/other", "https://example.org", spiffe.1] {
        let refused = decide(&[spiffe, (Uri, second)]).unwrap_err();
        assert!(refused.contains("just one"), "{refused}");
    }
    // Equal roles with unequal limits aren't one principal either.
    let twice = names(
        "[names.a]\ndns = \"{machine}.a\"\nuser = \"u\"\nrole = \"client\"\n\
         [names.b]\ncn = \"{machine}\"\nuser = \"u\"\nrole = \"client\"\nproof = false",
    );
    let refused = twice.decide(&[(Dns, "m.a"), (CommonName, "m")]).unwrap_err();
    assert!(refused.ends_with("with other limits"), "{refused}");
}

#[test]
fn who_signs_by_default_must_and_a_janus_keeps_to_its_users() {
    let limits = |rule: &str| {
        let names = names(&format!("[names.a]\ncn = \"x\"\n{rule}"));
        names.decide(&[(Kind::CommonName, "x")]).unwrap().1
    };
    for role in ["client", "restore"] {
        let rule = format!("role = \"{role}\"\nuser = \"u\"\nmachine = \"m\"\n");
        assert!(limits(&rule).proof, "{role}");
        assert!(!limits(&format!("{rule}proof = false")).proof, "{role}");
    }
    assert!(limits("role = \"operator\"\nname = \"o\"").proof);
    let janus = limits("role = \"janus\"\nname = \"j\"\nusers = [\"bob\", \"alice\"]");
    assert_eq!(janus.users, ["alice", "bob"]);
}

#[test]
fn settings_that_could_be_read_in_two_ways_are_refused() {
    let wrong = |rules: &str, says: &str| {
        let error = pki(rules).check().unwrap_err().to_string();
        assert!(error.starts_with("pki.") && error.contains(says), "{rules}: {error}");
    };
    let rule = |text: &str| format!("[names.a]\n{text}");
    let client = |uri: &str| rule(&format!("role = \"client\"\nuri = \"{uri}\""));
    wrong(&rule("role = \"client\""), "one of uri, dns, email, cn");
    wrong(&rule("role = \"server\"\ncn = \"{name}\"\ndns = \"{name}\""), "one of uri");
    wrong(&rule("cn = \"{name}\""), "needs a role");
    wrong(&client("spiffe://e/{user}-{machine}"), "more than one placeholder");
    wrong(&client("spiffe://e/{user}{machine}"), "more than one placeholder");
    wrong(&client("spiffe://e/{user}"), "needs user and machine");
    wrong(&client("spiffe://e/{user}/{user}/{machine}"), "each once");
    wrong(&client("spiffe://e/{user}/{machine}/{name}"), "each once");
    wrong(&client("spiffe://e/{user}/{host}"), "{host} is none of");
    wrong(&client("spiffe://e/{user/{machine}"), "without }");
    wrong(&client("spiffe://e/{user}/{machine"), "without }");
    wrong(&client("spiffe://e/user}/{machine}"), "without {");
    wrong(&client("spiffe://{user}/{machine}"), "SCHEME://HOST/PATH");
    wrong(&client("{user}://e/{machine}"), "SCHEME://HOST/PATH");
    wrong(&client("spiffe:///{user}/{machine}"), "SCHEME://HOST/PATH");
    wrong(&client("spiffe://e//{user}/{machine}"), "SCHEME://HOST/PATH");
    wrong(&client("spiffe://e/{user}/{machine}/"), "SCHEME://HOST/PATH");
    wrong(&client("{user}/{machine}"), "SCHEME://HOST/PATH");
    wrong(&client("janus://g/client/{user}/{machine}"), "janus://");
    wrong(&client("Janus-limit://g/client/{user}/{machine}"), "janus://");
    for sign in ["*", "?", "#", "%41", "\\\\", " ", "\u{e4}"] {
        wrong(&client(&format!("spiffe://e/{sign}/{{user}}/{{machine}}")), "can't stand in it");
    }
    wrong(&rule("role = \"server\"\ndns = \"*.{name}.e\""), "can't stand in it");
    wrong(&rule("role = \"server\"\ndns = \"{name}..e\""), "empty part");
    wrong(&rule("role = \"server\"\ndns = \"{name}.e.\""), "empty part");
    wrong(&rule("role = \"operator\"\nemail = \"a@{name}\""), "NAME@HOST");
    wrong(&rule("role = \"operator\"\nemail = \"{name}\""), "NAME@HOST");
    wrong(&rule("role = \"server\"\ncn = \"{name}\"\nname = \"x\""), "each once");
    wrong(&rule("role = \"server\"\ncn = \"x\"\nname = \"../x\""), "is not a name");
    wrong(&rule("role = \"server\"\ncn = \"{name}\"\nproof = false"), "always prove");
    wrong(&rule("role = \"janus\"\ncn = \"{name}\"\nusers = [\"a/b\"]"), "is not a name");
    wrong(&rule("role = \"server\"\ncn = \"{name}\"\nusers = [\"a\"]"), "is for a janus");
    wrong("", "names: is empty");
    let good: Pki = pki(CLIENT);
    good.check().unwrap();
    let wrong = |pki: Pki, says: &str| {
        let error = pki.check().unwrap_err().to_string();
        assert!(error.contains(says), "{error}");
    };
    wrong(Pki { group: String::new(), ..good.clone() }, "pki.group");
    wrong(Pki { group: "a/b".into(), ..good.clone() }, "pki.group");
    wrong(Pki { ca: PathBuf::new(), ..good }, "pki.ca: is empty");
    Pki::default().check().unwrap();
}

/// A certificate with these names, made by no matter whom.
fn certificate(cn: &[DnValue], names: Vec<SanType>) -> Bytes {
    let mut params = CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    // One of each type is all that rcgen takes.
    for (value, kind) in cn.iter().zip([DnType::CommonName, DnType::OrganizationName]) {
        params.distinguished_name.push(kind, value.clone());
    }
    params.subject_alt_names = names;
    let key = KeyPair::generate().unwrap();
    params.self_signed(&key).unwrap().der().to_vec().into()
}

#[test]
fn certificates_are_read_whole() {
    let uri = |text: &str| SanType::URI(text.try_into().unwrap());
    let dns = |text: &str| SanType::DnsName(text.try_into().unwrap());
    let who = |cn: &[DnValue], shown: Vec<SanType>| {
        names(CLIENT).principal(certificate(cn, shown)).map_err(|error| error.to_string())
    };
    let spiffe = "spiffe://example.org/backup/client/alice/web1";
    let web1 = who(&[], vec![uri(spiffe), dns("web1.example.org")]).unwrap();
    assert_eq!(web1.uri(), "janus://g/client/alice/web1");
    assert!(web1.limits.proof);
    assert_eq!(web1.issued(), web1.validity().0);
    // Names of our own kind say nothing here, and whoever got one into such a certificate had something in mind.
    for own in ["janus://g/operator/root", "JANUS://g/operator/root", "janus-limit:user=alice"] {
        let refused = who(&[], vec![uri(spiffe), uri(own)]).unwrap_err();
        assert!(refused.contains("certificates of `ca` alone"), "{refused}");
        let refused = who(&[], vec![dns("web1.alice.backup.example.org"), uri(own)]).unwrap_err();
        assert!(refused.contains(own), "{refused}");
    }
    let bmp = DnValue::BmpString("backup of web1".try_into().unwrap());
    let refused = who(std::slice::from_ref(&bmp), vec![uri(spiffe)]).unwrap_err();
    assert!(refused.contains("isn't text"), "{refused}");
    let no_subject = names("[names.a]\nuri = \"spiffe://example.org/{name}\"\nrole = \"server\"");
    let server = certificate(&[bmp], vec![uri("spiffe://example.org/north")]);
    assert_eq!(no_subject.principal(server).unwrap().to_string(), "server north");
    let refused = who(&["web1".into()], vec![dns("web1.example.org")]).unwrap_err();
    assert!(refused.contains("dns \"web1.example.org\", cn \"web1\""), "{refused}");
    for cut in [0, 1, 100] {
        let der = certificate(&[], vec![uri(spiffe)]);
        names(CLIENT).principal(der.slice(..cut)).unwrap_err();
    }
}

/// What a pattern takes, by trying all values that stand in a name.
fn naive(pattern: &str, separator: char, name: &str) -> Option<(String, String)> {
    let values: BTreeSet<&str> = (0..name.len())
        .flat_map(|from| (from + 1..=name.len()).map(move |to| &name[from..to]))
        .filter(|value| !value.contains(separator))
        .collect();
    let mut found =
        values.iter().flat_map(|user| values.iter().map(move |machine| (*user, *machine)));
    let fits = |(user, machine): &(&str, &str)| {
        pattern.replace("{user}", user).replace("{machine}", machine) == name
    };
    found.find(fits).map(|(user, machine)| (user.to_owned(), machine.to_owned()))
}

proptest! {
    #[test]
    fn patterns_take_what_trying_all_values_finds(
        name in "[ab./-]{0,9}",
        parts in prop::collection::vec("[ab-]{0,2}", 4),
        is_dns in any::<bool>(),
    ) {
        let (separator, kind, key) =
            if is_dns { ('.', Kind::Dns, "dns") } else { ('/', Kind::Uri, "uri") };
        let [a, b, c, d] = parts.as_slice() else { unreachable!() };
        let prefix = if is_dns { "" } else { "x://h/" };
        let pattern = format!("{prefix}{a}{{user}}{b}{separator}{c}{{machine}}{d}");
        let rules = names(&format!("[names.a]\n{key} = \"{pattern}\"\nrole = \"client\""));
        let name = format!("{prefix}{name}");
        let expected = naive(&pattern, separator, &name);
        let read = rules.rules[0].read(&name);
        match (expected, read) {
            (None, None) => {}
            (Some((user, machine)), Some(read)) => {
                let valid = MachineKey::new(&user, &machine).ok().map(Role::Client);
                prop_assert_eq!(read.ok(), valid);
            }
            (expected, read) => prop_assert!(false, "{} {}: {:?} {:?}", pattern, name, expected, read),
        }
        let decided = rules.decide(&[(kind, &name)]);
        prop_assert_eq!(decided.is_ok(), rules.rules[0].read(&name).is_some_and(|read| read.is_ok()));
    }

    #[test]
    fn whatever_a_certificate_says_there_is_one_answer_in_any_order(
        mut shown in prop::collection::vec(
            (0..4_usize, "(spiffe://example.org/backup/client/[ab]/[ab]|[ab]\\.[ab]\\.backup\\.example\\.org|[ab]\\.servers\\.example\\.org|[ab*]@example\\.org|backup of [ab]|.{0,12})"),
            0..4,
        ),
        turn in 0..4_usize,
    ) {
        let kinds = [Kind::Uri, Kind::Dns, Kind::Email, Kind::CommonName];
        let decided = |shown: &[(usize, String)]| {
            let shown: Vec<_> =
                shown.iter().map(|(kind, name)| (kinds[*kind], name.as_str())).collect();
            decide(&shown)
        };
        let first = decided(&shown);
        let each: BTreeSet<_> =
            shown.iter().filter_map(|one| decided(std::slice::from_ref(one)).ok()).collect();
        if let Ok(who) = &first {
            // Nothing but what one name alone says, and no other name that says another.
            prop_assert_eq!(each.into_iter().collect::<Vec<_>>(), vec![who.clone()]);
        }
        if !shown.is_empty() {
            let turn = turn % shown.len();
            shown.rotate_left(turn);
        }
        prop_assert_eq!(first.is_ok(), decided(&shown).is_ok());
    }

    #[test]
    fn no_bytes_make_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..400), at in any::<prop::sample::Index>(), change in 1..=255_u8) {
        let names = names(CLIENT);
        let _ = names.principal(bytes.into());
        let uri = SanType::URI("spiffe://example.org/backup/client/alice/web1".try_into().unwrap());
        let mut der = certificate(&["backup of web1".into()], vec![uri]).to_vec();
        let at = at.index(der.len());
        der[at] ^= change;
        let _ = names.principal(der.into());
    }
}
