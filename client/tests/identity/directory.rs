//! Groups of a directory: Debian's OpenLDAP on loopback, by LDAPS and by StartTLS.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use xtask::{
    packages::{self, Tool},
    site::{Client, USER, free_ports},
};

use crate::scene::{A, B, Scene, until, write_private};

const LDAP_TOOLS: &[Tool] = &[
    Tool { program: "slapd", package: "slapd" },
    Tool { program: "ldapmodify", package: "ldap-utils" },
];
const BASE: &str = "dc=example,dc=org";
const READER: &str = "cn=janus,dc=example,dc=org";
const PASSWORD: &str = "a password of the directory";
/// What the issue promises.
const MINUTE: Duration = Duration::from_secs(60);

/// People and groups: one by names of entries, with another in it, and one by names of users.
const TREE: &str = "
dn: dc=example,dc=org
objectClass: dcObject
objectClass: organization
dc: example
o: Example

dn: cn=janus,dc=example,dc=org
objectClass: organizationalRole
objectClass: simpleSecurityObject
cn: janus
userPassword: a password of the directory

dn: cn=helpdesk,dc=example,dc=org
objectClass: groupOfNames
cn: helpdesk
member: uid=Carol,dc=example,dc=org
member: cn=night shift,dc=example,dc=org
member: cn=nobody any more,dc=example,dc=org

dn: cn=night shift,dc=example,dc=org
objectClass: groupOfNames
cn: night shift
member: uid=dave,dc=example,dc=org
member: cn=helpdesk,dc=example,dc=org
member: uid=two,dc=example,dc=org

dn: cn=readers,dc=example,dc=org
objectClass: posixGroup
cn: readers
gidNumber: 1000
memberUid: erin
memberUid: no name/of a user
";

fn person(uids: &[&str]) -> String {
    let uid = uids[0];
    let names: String = uids.iter().map(|uid| format!("uid: {uid}\n")).collect();
    format!("\ndn: uid={uid},{BASE}\nobjectClass: inetOrgPerson\ncn: {uid}\nsn: {uid}\n{names}")
}

struct Directory {
    folder: PathBuf,
    /// LDAP and LDAPS.
    ports: [u16; 2],
    process: Child,
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

impl Directory {
    fn start(scene: &Scene) -> Self {
        packages::require(LDAP_TOOLS).unwrap();
        let folder = scene.site.folder().join("directory");
        fs::create_dir_all(folder.join("data")).unwrap();
        // Another authority's certificate would do as well.
        scene.site.issue("server", "directory", &["--host", "127.0.0.1"]).unwrap();
        let keys = scene.keys("directory");
        let path = |name: &str| keys.join(name).display().to_string();
        let config = format!(
            "include /etc/ldap/schema/core.schema\n\
             include /etc/ldap/schema/cosine.schema\n\
             include /etc/ldap/schema/nis.schema\n\
             include /etc/ldap/schema/inetorgperson.schema\n\
             modulepath /usr/lib/ldap\n\
             moduleload back_mdb\n\
             TLSCertificateFile {}\n\
             TLSCertificateKeyFile {}\n\
             TLSVerifyClient never\n\
             security tls=1\n\
             database mdb\n\
             suffix {BASE}\n\
             rootdn cn=admin,{BASE}\n\
             rootpw secret\n\
             directory {}\n\
             access to attrs=userPassword by anonymous auth\n\
             access to * by dn.exact={READER} read by * auth\n",
            path("cert.pem"),
            path("key.pem"),
            folder.join("data").display()
        );
        fs::write(folder.join("slapd.conf"), config).unwrap();
        let people = [&["Carol"][..], &["dave"], &["two", "names"]].map(person).concat();
        fs::write(folder.join("tree.ldif"), format!("{TREE}{people}")).unwrap();
        let ports = free_ports(2).unwrap().try_into().unwrap();
        // Ubuntu keeps the program in its place from reading our folder.
        fs::copy(packages::find("slapd"), folder.join("slapd")).unwrap();
        let mut adding = Command::new(folder.join("slapd"));
        adding.args(["-T", "add", "-f"]).arg(folder.join("slapd.conf"));
        let adding = adding.arg("-l").arg(folder.join("tree.ldif")).output().unwrap();
        assert!(adding.status.success(), "{}", String::from_utf8_lossy(&adding.stderr));
        let process = Self::spawn(&folder, ports);
        Self { folder, ports, process }
    }

    fn spawn(folder: &Path, ports: [u16; 2]) -> Child {
        let [plain, tls] = ports;
        let process = Command::new(folder.join("slapd"))
            // In the foreground.
            .args(["-d", "0", "-h"])
            .arg(format!("ldap://127.0.0.1:{plain}/ ldaps://127.0.0.1:{tls}/"))
            .arg("-f")
            .arg(folder.join("slapd.conf"))
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        for port in ports {
            until("slapd answers", Duration::from_secs(20), || {
                std::net::TcpStream::connect(("127.0.0.1", port)).is_ok()
            });
        }
        process
    }

    fn stop(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }

    /// Changes entries, by another program.
    fn modify(&self, change: &str) {
        let file = self.folder.join("change.ldif");
        fs::write(&file, change).unwrap();
        let output = Command::new("ldapmodify")
            .env("LDAPTLS_REQCERT", "never")
            .args(["-x", "-H", &format!("ldaps://127.0.0.1:{}", self.ports[1])])
            .args(["-D", &format!("cn=admin,{BASE}"), "-w", "secret", "-f"])
            .arg(&file)
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }

    fn policy(&self, scene: &Scene, url: &str, more: &str) -> String {
        let password = self.folder.join("password");
        write_private(&password, PASSWORD);
        format!(
            "[groups.helpdesk]\nldap = [\"cn=helpdesk,{BASE}\", \"cn=readers,{BASE}\"]\n\
             restore = [\"{USER}/*\"]\n\
             [ldap]\nurls = [\"{url}\"]\nca = \"{}\"\nbind_dn = \"{READER}\"\n\
             password_file = \"{}\"\nrefresh_seconds = 2\n{more}",
            scene.keys("directory").join("ca.pem").display(),
            password.display(),
        )
    }
}

fn is_let_in(person: &Client) -> bool {
    let ran = person.run(&["list", "--machine", &format!("{USER}/web1")]).unwrap();
    if ran.code != Some(0) {
        assert!(ran.stderr.contains("may not"), "{}", ran.stderr);
    }
    ran.code == Some(0)
}

#[test]
fn members_of_a_directory_have_their_rights_while_they_are_members() {
    let mut scene = Scene::with_policy(Some(""));
    let mut directory = Directory::start(&scene);
    // One server asks by LDAPS, the other by StartTLS.
    let [plain, tls] = directory.ports;
    let policies = [
        (A, directory.policy(&scene, &format!("ldaps://127.0.0.1:{tls}"), "keep_seconds = 5\n")),
        (B, directory.policy(&scene, &format!("ldap://127.0.0.1:{plain}"), "keep_seconds = 5\n")),
    ];
    for (server, policy) in &policies {
        scene.set_policy(server, policy);
    }
    let machine = scene.enrolled("web1");
    scene.works(&machine, "web1");
    scene.works(&machine, "web1");
    let people = ["carol", "dave", "erin", "frank", "two", "names"].map(|name| scene.person(name));
    let [carol, dave, erin, frank, two, names] = &people;
    until("both servers know the members", MINUTE, || is_let_in(carol));
    assert!(is_let_in(dave), "by a group in the group");
    assert!(is_let_in(erin), "by the name of the user");
    for stranger in [frank, two, names] {
        assert!(!is_let_in(stranger));
    }
    let to = scene.site.folder().join("restored-by-carol");
    carol.restore(&format!("{USER}/web1/disk"), &to).unwrap();
    xtask::disk::compare(&scene.disk("web1"), &to).unwrap();

    let began = Instant::now();
    directory.modify(&format!(
        "dn: cn=helpdesk,{BASE}\nchangetype: modify\ndelete: member\nmember: uid=Carol,{BASE}\n"
    ));
    until("carol is let in no more", MINUTE, || !is_let_in(carol));
    println!("{:?} after carol had left the group she was refused", began.elapsed());
    assert!(is_let_in(dave));
    directory.modify(&format!("dn: uid=dave,{BASE}\nchangetype: delete\n"));
    until("an account that is gone is let in no more", MINUTE, || !is_let_in(dave));

    // While the directory is away, what it has said last counts for a while.
    assert!(is_let_in(erin));
    directory.stop();
    let told = |server: &str, what: &str| scene.site.log(server).contains(what);
    for server in [A, B] {
        until("it is told of", MINUTE, || told(server, "what it said last counts, for now"));
    }
    until("nobody is a member for ever", MINUTE, || !is_let_in(erin));
    directory.process = Directory::spawn(&directory.folder, directory.ports);
    until("it is asked again", MINUTE, || is_let_in(erin));

    // An operator sees who is in which group before a server uses it.
    let shown = scene.admin(A, &["policy"]);
    assert_eq!(shown["groups"][0]["members"], serde_json::json!(["erin"]));
    let nothing = scene.admin(A, &["policy", "carol"]);
    assert_eq!(nothing["groups"], serde_json::json!([]));

    // What can't be asked is named.
    for (change, said) in [
        (("bind_dn = \"cn=janus", "bind_dn = \"cn=other"), "doesn't let cn=other,"),
        (("ldaps://127.0.0.1", "ldaps://localhost"), "ldaps://localhost:"),
        (("cn=readers,", "cn=writers,"), "there is no group cn=writers,"),
    ] {
        let wrong = policies[0].1.replace(change.0, change.1);
        scene.set_policy(A, &wrong);
        until(said, MINUTE, || told(A, said));
        let line = scene.site.log(A);
        let line = line.lines().rev().find(|line| line.contains(said)).unwrap();
        println!("{line}");
        assert!(!line.contains(PASSWORD));
    }
    scene.site.kill_server(B).unwrap();
    assert!(!scene.site.log(A).contains(PASSWORD));
}
