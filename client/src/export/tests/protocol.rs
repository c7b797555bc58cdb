//! The protocol as strangers may use and misuse it.

use super::{
    Disk, SIZE, Served, limits,
    raw::{DISCONNECT, READ, Raw, WRITE, queries},
};

const ACK: u32 = 1;
const UNSUPPORTED: u32 = (1 << 31) + 1;
const POLICY: u32 = (1 << 31) + 2;
const INVALID: u32 = (1 << 31) + 3;
const UNKNOWN: u32 = (1 << 31) + 6;
const TOO_BIG: u32 = (1 << 31) + 9;

/// What a stranger does.
type Act = Box<dyn Fn(&mut Raw)>;

fn talking(served: &Served) -> Raw {
    let mut raw = Raw::greeted(&served.path);
    raw.send(&3u32.to_be_bytes());
    raw
}

/// The server still serves others.
fn assert_serves(served: &Served) {
    let mut raw = Raw::ready(&served.path, false);
    raw.request(READ, 9, 0, 512);
    assert_eq!(raw.simple(), (0, 9));
    assert_eq!(raw.take(512).unwrap(), Disk::new().content[..512]);
}

#[test]
fn options_are_answered_one_by_one() {
    let served = Served::of(Disk::new());
    let mut raw = talking(&served);
    assert_eq!(raw.ask(5, &[]).kind, POLICY);
    for unknown in [0, 4, 11, 12, u32::MAX] {
        assert_eq!(raw.ask(unknown, b"whatever").kind, UNSUPPORTED, "{unknown}");
    }
    // The one export, its name, its description.
    raw.option(3, &[]);
    let listed = raw.reply().unwrap();
    assert_eq!((listed.kind, listed.data), (2, b"\0\0\0\x04diska test".to_vec()));
    assert_eq!(raw.reply().unwrap().kind, ACK);
    assert_eq!(raw.ask(3, b"x").kind, INVALID);
    // Its facts, also the text.
    raw.option(6, &[&b"\0\0\0\x04disk\0\x02\0\x01\0\x02"[..]].concat());
    let facts: Vec<_> = std::iter::from_fn(|| Some(raw.reply().unwrap()))
        .take_while(|reply| reply.kind == 3)
        .map(|reply| reply.data)
        .collect();
    let size = (SIZE as u64).to_be_bytes();
    assert_eq!(facts[0][..10], [&[0, 0][..], &size].concat());
    assert_eq!(facts[1], [0, 3, 0, 0, 0, 1, 0, 0, 16, 0, 2, 0, 0, 0]);
    assert_eq!(facts[2..], [b"\0\x01disk".to_vec(), b"\0\x02a test".to_vec()]);
    for wrong in [&b""[..], b"\0\0\0\x04", b"\xff\xff\xff\xffdisk\0\0", b"\0\0\0\0\0\x02\0\x01"] {
        assert_eq!(raw.ask(7, wrong).kind, INVALID, "{wrong:?}");
    }
    assert_eq!(raw.ask(7, b"\0\0\0\x05other\0\0").kind, UNKNOWN);
    // Abort is a polite end.
    assert_eq!(raw.ask(2, &[]).kind, ACK);
    assert!(raw.is_ended());
}

#[test]
fn contexts_are_listed_by_namespace_and_chosen_by_name() {
    let served = Served::of(Disk::new());
    let mut raw = talking(&served);
    let contexts = |raw: &mut Raw, option, names: &[&str]| {
        raw.option(option, &queries("", names));
        let mut found = Vec::new();
        loop {
            let reply = raw.reply().unwrap();
            match reply.kind {
                4 => {
                    found.push((reply.data[3], String::from_utf8(reply.data[4..].into()).unwrap()))
                }
                kind => return (kind, found),
            }
        }
    };
    let all = vec![(0, "base:allocation".to_owned())];
    for names in [&[][..], &["base:"], &["base:allocation", "other:x"]] {
        assert_eq!(contexts(&mut raw, 9, names), (ACK, all.clone()), "{names:?}");
    }
    assert_eq!(contexts(&mut raw, 9, &["qemu:"]), (ACK, vec![]));
    assert_eq!(
        contexts(&mut raw, 10, &["base:allocation"]).0,
        INVALID,
        "no structured replies yet"
    );
    assert_eq!(raw.ask(8, &[]).kind, ACK);
    assert_eq!(contexts(&mut raw, 10, &["base:"]), (ACK, vec![]));
    assert_eq!(contexts(&mut raw, 10, &["base:allocation"]), (ACK, vec![(1, all[0].1.clone())]));
    // Chosen for the default export, entered by another name of it: nothing is chosen then.
    raw.option(7, b"\0\0\0\x04disk\0\0");
    while raw.reply().unwrap().kind != ACK {}
    raw.request(7, 1, 0, 4096);
    let (flags, kind, cookie, body) = raw.chunk();
    assert_eq!((flags, kind, cookie, &body[..4]), (1, 0x8001, 1, &22u32.to_be_bytes()[..]));
}

#[test]
fn export_name_enters_with_and_without_padding() {
    let served = Served::of(Disk::new());
    for (client_flags, pad) in [(3u32, 0), (1, 124), (0, 124)] {
        let mut raw = Raw::greeted(&served.path);
        raw.send(&client_flags.to_be_bytes());
        raw.option(1, b"disk");
        let about = raw.take(10 + pad).unwrap();
        assert_eq!(about[..8], (SIZE as u64).to_be_bytes());
        raw.request(READ, 1, 512, 512);
        assert_eq!(raw.simple(), (0, 1));
        assert_eq!(raw.take(512).unwrap(), Disk::new().content[512..1024]);
        raw.request(DISCONNECT, 2, 0, 0);
        assert!(raw.is_ended());
    }
    let mut raw = talking(&served);
    raw.option(1, b"other");
    assert!(raw.is_ended());
}

#[test]
fn holes_come_as_holes_and_in_one_piece_where_that_is_asked() {
    let served = Served::of(Disk::new());
    let content = Disk::new().content;
    let mut raw = Raw::ready(&served.path, true);
    raw.request(READ, 5, 4096, 81_920);
    let mut got = vec![9; 81_920];
    let (mut holes, mut pieces) = (0, 0);
    loop {
        let (flags, kind, cookie, body) = raw.chunk();
        assert_eq!(cookie, 5);
        let at = u64::from_be_bytes(body[..8].try_into().unwrap()) as usize - 4096;
        match kind {
            1 => {
                got[at..at + body.len() - 8].copy_from_slice(&body[8..]);
                pieces += 1;
            }
            2 => {
                let len = u32::from_be_bytes(body[8..].try_into().unwrap()) as usize;
                got[at..at + len].fill(0);
                holes += 1;
            }
            kind => panic!("chunk of type {kind}"),
        }
        if flags & 1 == 1 {
            break;
        }
    }
    assert!(got == content[4096..86_016]);
    assert_eq!((holes, pieces), (1, 2));
    raw.request_with(4, READ, 6, 4096, 81_920);
    let (flags, kind, _, body) = raw.chunk();
    assert_eq!((flags, kind), (1, 1));
    assert!(body[8..] == content[4096..86_016]);
}

#[test]
fn wrong_requests_get_the_errors_of_the_protocol_and_the_talk_goes_on() {
    let served = Served::of(Disk::new());
    let mut raw = Raw::ready(&served.path, false);
    let end = SIZE as u64;
    let wrong = [
        (READ, 0, end, 512, 22),
        (READ, 0, end - 511, 512, 22),
        (READ, 0, u64::MAX, 512, 22),
        (READ, 0, 0, 0, 22),
        (READ, 0, 0, u32::MAX, 22),
        (READ, 0, 0, (32 << 20) + 1, 22),
        (READ, 0x8000, 0, 512, 22),
        (3, 0, 0, 0, 22),
        (4, 0, 0, 512, 1),
        (6, 0, 0, 512, 1),
        (7, 0, 0, 512, 22),
        (99, 0, 0, 512, 22),
    ];
    for (cookie, (kind, flags, offset, len, errno)) in wrong.into_iter().enumerate() {
        raw.request_with(flags, kind, cookie as u64, offset, len);
        assert_eq!(raw.simple(), (errno, cookie as u64), "{kind} {flags} {offset} {len}");
    }
    // A write comes with its data, which are passed over.
    raw.request(WRITE, 50, 0, 512);
    raw.send(&[1; 512]);
    assert_eq!(raw.simple(), (1, 50));
    // The same cookie twice is the client's affair.
    raw.request(READ, 51, 0, 1);
    raw.request(READ, 51, 1, 1);
    for _ in 0..2 {
        assert_eq!(raw.simple(), (0, 51));
        raw.take(1).unwrap();
    }
    assert_serves(&served);
}

#[test]
fn who_breaks_the_frame_is_left_and_others_are_served() {
    let served = Served::of(Disk::new());
    let greeted = || Raw::greeted(&served.path);
    let strangers: Vec<(&str, Act)> = vec![
        ("flags that were not offered", Box::new(|raw| raw.send(&[0xff; 4]))),
        ("a browser", Box::new(|raw| raw.send(b"GET / HTTP/1.1\r\n\r\n"))),
        ("no option", Box::new(|raw| raw.send(&[&3u32.to_be_bytes()[..], &[7; 16]].concat()))),
        ("an option of 4 GiB", {
            Box::new(|raw| {
                raw.send(&3u32.to_be_bytes());
                raw.option_of(7, u32::MAX, b"x");
            })
        }),
        ("a name of 4 GiB", {
            Box::new(|raw| {
                raw.send(&3u32.to_be_bytes());
                raw.option_of(1, u32::MAX, b"x");
            })
        }),
    ];
    for (what, act) in strangers {
        let mut raw = greeted();
        act(&mut raw);
        assert!(raw.is_ended(), "{what}");
        assert_serves(&served);
    }
    let mut raw = talking(&served);
    raw.option(9, &vec![0; 70_000]);
    assert_eq!(raw.reply().unwrap().kind, TOO_BIG);
    assert_eq!(raw.ask(2, &[]).kind, ACK);

    for structured in [true, false] {
        let mut raw = Raw::ready(&served.path, structured);
        raw.send(&[0x55; 28]);
        assert!(raw.is_ended());
        let mut raw = Raw::ready(&served.path, structured);
        raw.request(WRITE, 1, 0, u32::MAX);
        assert!(raw.is_ended());
    }
    assert_serves(&served);
}

#[test]
fn a_write_that_ends_in_its_middle_is_none() {
    let served = Served::writable(Disk::new());
    let before = Disk::new().content[..4096].to_vec();
    for sent in [0, 1, 4095] {
        let mut raw = Raw::ready(&served.path, false);
        raw.request(WRITE, 1, 0, 4096);
        raw.send(&vec![0xaa; sent]);
        drop(raw);
        let mut raw = Raw::ready(&served.path, false);
        raw.request(READ, 2, 0, 4096);
        assert_eq!(raw.simple(), (0, 2));
        assert!(raw.take(4096).unwrap() == before);
    }
    let mut raw = Raw::ready(&served.path, false);
    raw.request_with(1, WRITE, 3, 1, 4096);
    raw.send(&[0xaa; 4096]);
    assert_eq!(raw.simple(), (0, 3));
    raw.request(READ, 4, 0, 4098);
    assert_eq!(raw.simple(), (0, 4));
    let got = raw.take(4098).unwrap();
    assert!(got[0] == before[0] && got[1..4097] == [0xaa; 4096]);
    // Past the end there is no room.
    raw.request(WRITE, 5, SIZE as u64, 512);
    raw.send(&[1; 512]);
    assert_eq!(raw.simple(), (28, 5));
    raw.request(3, 6, 0, 0);
    assert_eq!(raw.simple(), (0, 6));
}

#[test]
fn half_handshakes_keep_nobody_out() {
    let served = Served::of(Disk::new());
    let mut half: Vec<Raw> =
        (0..limits::HANDSHAKES + 20).map(|_| Raw::greeted(&served.path)).collect();
    let began = std::time::Instant::now();
    assert_serves(&served);
    assert!(began.elapsed() < limits::HANDSHAKE / 2, "{:?}", began.elapsed());
    // The oldest had to go.
    assert!(half[0].is_ended());
}

#[test]
fn more_clients_than_places_are_told_so() {
    let served = Served::of(Disk::new());
    let clients: Vec<Raw> =
        (0..limits::CONNECTIONS).map(|_| Raw::ready(&served.path, true)).collect();
    let mut late = talking(&served);
    assert_eq!(late.ask(7, &[0; 6]).kind, POLICY);
    drop(clients);
    let until = std::time::Instant::now() + std::time::Duration::from_secs(10);
    while late.ask(7, &[0; 6]).kind == POLICY {
        assert!(std::time::Instant::now() < until);
    }
}

#[test]
fn many_requests_that_nobody_takes_the_answers_of_hold_up_only_their_client() {
    let served = Served::of(Disk::new());
    let mut greedy = Raw::ready(&served.path, false);
    (0..200).for_each(|cookie| greedy.request(READ, cookie, 0, 5 << 20));
    for _ in 0..20 {
        assert_serves(&served);
    }
}
