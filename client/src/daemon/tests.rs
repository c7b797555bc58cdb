use std::sync::{
    Arc, Mutex,
    atomic::{AtomicI64, Ordering},
};

use jiff::{SignedDuration, tz::TimeZone};
use tokio::time::Instant;

use super::*;

/// A machine whose clocks a test steps: virtual time goes on by itself while all wait.
#[derive(Clone)]
struct Fake(Arc<Inner>);

struct Inner {
    began: Instant,
    wall: Timestamp,
    /// How far the wall clock was set, and the machine slept.
    set_s: AtomicI64,
    slept_s: AtomicI64,
    last: Mutex<Option<Timestamp>>,
    hindrance: Mutex<Option<Hindrance>>,
    /// How the next backups end; afterwards all are made.
    endings: Mutex<Vec<Ended>>,
    runs: Mutex<Vec<Timestamp>>,
    run_s: AtomicI64,
}

impl Host for Fake {
    fn now(&self) -> Moment {
        let slept = SignedDuration::from_secs(self.0.slept_s.load(Ordering::SeqCst));
        let real = SignedDuration::try_from(self.0.began.elapsed()).unwrap() + slept;
        let set = SignedDuration::from_secs(self.0.set_s.load(Ordering::SeqCst));
        let wall = self.0.wall + real + set;
        Moment { wall, zone: TimeZone::UTC, running: real.unsigned_abs() }
    }

    async fn last_success(&self) -> Option<Timestamp> {
        *self.0.last.lock().unwrap()
    }

    async fn hindrance(&self, _settings: &ScheduleSettings) -> Option<Hindrance> {
        *self.0.hindrance.lock().unwrap()
    }

    async fn back_up(&self, stop: &CancellationToken) -> Ended {
        let taken = self.now().wall;
        self.0.runs.lock().unwrap().push(taken);
        let took = self.0.run_s.load(Ordering::SeqCst);
        tokio::select! {
            () = sleep(Duration::from_secs(took as u64)) => {}
            () = stop.cancelled() => return Ended::Stopped,
        }
        let ended = self.0.endings.lock().unwrap().pop().unwrap_or(Ended::Made);
        if ended == Ended::Made {
            *self.0.last.lock().unwrap() = Some(taken);
        }
        ended
    }

    fn adopt(&mut self, _settings: &Settings) {}
}

fn at(text: &str) -> Timestamp {
    format!("2026-{text}:00Z").parse().unwrap()
}

impl Fake {
    fn new(wall: &str, last: Option<&str>) -> Self {
        Self(Arc::new(Inner {
            began: Instant::now(),
            wall: at(wall),
            set_s: 0.into(),
            slept_s: 0.into(),
            last: Mutex::new(last.map(at)),
            hindrance: Mutex::default(),
            endings: Mutex::default(),
            runs: Mutex::default(),
            run_s: 60.into(),
        }))
    }

    fn daemon(&self, until: Until) -> (Daemon<Self>, mpsc::Sender<Box<Settings>>) {
        let (sender, reloads) = mpsc::channel(1);
        let settings = ScheduleSettings { random_delay_minutes: 0, ..Default::default() };
        let (host, seed, stop) = (self.clone(), String::new(), CancellationToken::new());
        (Daemon { host, settings, seed, until, reloads, stop }, sender)
    }

    fn start(&self) -> Started {
        let (daemon, reloads) = self.daemon(Until::Stopped);
        let stop = daemon.stop.clone();
        Started { task: tokio::spawn(daemon.run()), stop, reloads }
    }

    /// Goes on for so long.
    async fn hours(&self, hours: f64) {
        sleep(Duration::from_secs_f64(hours * 3600.0)).await;
    }

    fn set_clock(&self, hours: i64) {
        self.0.set_s.fetch_add(hours * 3600, Ordering::SeqCst);
    }

    /// The wall clock goes on in suspend, our timers don't.
    fn suspend(&self, hours: i64) {
        self.0.slept_s.fetch_add(hours * 3600, Ordering::SeqCst);
    }

    fn fail(&self, times: usize) {
        let failed = Ended::Failed { message: "no".into(), exit_code: 3 };
        *self.0.endings.lock().unwrap() = vec![failed; times];
    }

    /// Backups by the wall clock, to the minute.
    fn runs(&self) -> Vec<String> {
        let runs = self.0.runs.lock().unwrap();
        runs.iter().map(|run| run.strftime("%m-%dT%H:%M").to_string()).collect()
    }
}

struct Started {
    task: tokio::task::JoinHandle<Result<End, ScheduleError>>,
    stop: CancellationToken,
    reloads: mpsc::Sender<Box<Settings>>,
}

impl Started {
    async fn end(self) -> End {
        self.stop.cancel();
        self.task.await.unwrap().unwrap()
    }
}

#[tokio::test(start_paused = true)]
async fn each_slot_has_one_backup_and_a_missed_one_is_made_up_for_at_the_start() {
    let machine = Fake::new("11-20T09:00", Some("11-18T22:00"));
    let daemon = machine.start();
    machine.hours(48.0).await;
    assert_eq!(machine.runs(), ["11-20T09:00", "11-20T22:00", "11-21T22:00"]);
    assert_eq!(daemon.end().await, End::Stopped);
    let machine = Fake::new("11-20T09:00", Some("11-19T22:00"));
    let _daemon = machine.start();
    machine.hours(10.0).await;
    assert_eq!(machine.runs(), [""; 0], "nothing was missed");
}

#[tokio::test(start_paused = true)]
async fn a_backup_that_somebody_else_made_counts() {
    let machine = Fake::new("11-20T21:00", Some("11-19T22:00"));
    let _daemon = machine.start();
    machine.hours(1.0 - 1.0 / 60.0).await;
    *machine.0.last.lock().unwrap() = Some(at("11-20T22:00"));
    machine.hours(12.0).await;
    assert_eq!(machine.runs(), [""; 0]);
}

#[tokio::test(start_paused = true)]
async fn failures_are_tried_again_with_growing_pauses_until_the_next_slot() {
    let machine = Fake::new("11-20T21:59", Some("11-19T22:00"));
    machine.0.run_s.store(0, Ordering::SeqCst);
    machine.fail(9);
    let _daemon = machine.start();
    machine.hours(36.0).await;
    let expected = [
        "11-20T22:00",
        "11-20T22:10",
        "11-20T22:30",
        "11-20T23:10",
        "11-21T00:30",
        "11-21T03:10",
        "11-21T08:30",
        "11-21T14:30",
        "11-21T20:30",
        "11-21T22:00",
    ];
    assert_eq!(machine.runs(), expected);
}

#[tokio::test(start_paused = true)]
async fn a_machine_that_slept_over_a_slot_makes_up_for_it_within_a_minute() {
    let machine = Fake::new("11-20T20:00", Some("11-19T22:00"));
    let _daemon = machine.start();
    machine.hours(0.5).await;
    machine.suspend(72);
    machine.hours(1.0 / 60.0).await;
    assert_eq!(machine.runs().len(), 1, "{:?}", machine.runs());
    machine.hours(4.0).await;
    assert_eq!(machine.runs()[1..], ["11-23T22:00"], "once for all that were missed");
}

#[tokio::test(start_paused = true)]
async fn a_pause_after_a_failure_goes_on_in_suspend() {
    let machine = Fake::new("11-20T21:59", Some("11-19T22:00"));
    machine.fail(1);
    let _daemon = machine.start();
    machine.hours(0.1).await;
    machine.suspend(1);
    machine.hours(1.0 / 60.0).await;
    assert_eq!(machine.runs().len(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_clock_set_back_repeats_no_slot_and_loses_none() {
    for back in [1, 3, 13] {
        let machine = Fake::new("11-20T21:00", Some("11-19T22:00"));
        let _daemon = machine.start();
        machine.hours(1.5).await;
        machine.set_clock(-back);
        machine.hours(back as f64 + 1.0).await;
        assert_eq!(machine.runs(), ["11-20T22:00"], "{back} h");
        machine.hours(24.0).await;
        assert_eq!(machine.runs()[1..], ["11-21T22:00"], "{back} h");
    }
    // A clock that was days or years ahead: its success must not keep backups away.
    for back in [25, 24 * 400] {
        let machine = Fake::new("11-20T21:00", Some("11-19T22:00"));
        let _daemon = machine.start();
        machine.hours(1.5).await;
        machine.set_clock(-back);
        machine.hours(0.2).await;
        assert_eq!(machine.runs().len(), 1, "{back} h: not at once");
        machine.hours(48.0).await;
        assert_eq!(machine.runs().len(), 3, "{back} h: {:?}", machine.runs());
    }
}

#[tokio::test(start_paused = true)]
async fn a_clock_set_forward_over_slots_has_one_backup() {
    let machine = Fake::new("11-20T21:00", Some("11-19T22:00"));
    let _daemon = machine.start();
    machine.hours(0.1).await;
    machine.set_clock(5 * 24);
    machine.hours(0.5).await;
    assert_eq!(machine.runs().len(), 1);
    // The mistake is mended.
    machine.set_clock(-5 * 24);
    machine.hours(24.0).await;
    assert_eq!(machine.runs().len(), 2, "{:?}", machine.runs());
}

#[tokio::test(start_paused = true)]
async fn a_clock_that_was_set_while_a_backup_ran_does_not_repeat_it() {
    for hours in [48, -2, -13] {
        let machine = Fake::new("11-20T21:59", Some("11-19T22:00"));
        machine.0.run_s.store(3600, Ordering::SeqCst);
        let _daemon = machine.start();
        machine.hours(0.5).await;
        machine.set_clock(hours);
        machine.hours(8.0).await;
        assert_eq!(machine.runs(), ["11-20T22:00"], "{hours} h");
    }
}

#[tokio::test(start_paused = true)]
async fn without_catching_up_only_slots_of_its_own_time_count_even_by_a_clock_that_was_wrong() {
    let machine = Fake::new("11-20T09:00", Some("11-10T22:00"));
    machine.set_clock(24 * 365 * 5);
    let (mut daemon, _reloads) = machine.daemon(Until::Stopped);
    daemon.settings.catch_up = false;
    let _task = tokio::spawn(daemon.run());
    machine.hours(0.5).await;
    machine.set_clock(-24 * 365 * 5);
    machine.hours(5.0).await;
    assert_eq!(machine.runs(), [""; 0]);
    machine.hours(24.0).await;
    assert_eq!(machine.runs(), ["11-20T22:00"]);
}

#[tokio::test(start_paused = true)]
async fn on_battery_a_backup_waits_for_mains() {
    let machine = Fake::new("11-20T21:59", Some("11-19T22:00"));
    *machine.0.hindrance.lock().unwrap() = Some(Hindrance::OnBattery);
    let _daemon = machine.start();
    machine.hours(5.0).await;
    assert_eq!(machine.runs(), [""; 0]);
    *machine.0.hindrance.lock().unwrap() = None;
    machine.hours(1.0 / 60.0).await;
    assert_eq!(machine.runs().len(), 1);
}

#[tokio::test(start_paused = true)]
async fn settings_that_are_read_again_count_at_once_and_wrong_ones_do_not() {
    let machine = Fake::new("11-20T09:00", Some("11-19T22:00"));
    let daemon = machine.start();
    let mut settings = Settings::default();
    settings.schedule.random_delay_minutes = 0;
    settings.schedule.times = vec!["10:00".into()];
    daemon.reloads.send(Box::new(settings.clone())).await.unwrap();
    machine.hours(2.0).await;
    assert_eq!(machine.runs(), ["11-20T10:00"]);
    settings.schedule.times = vec!["noon".into()];
    daemon.reloads.send(Box::new(settings)).await.unwrap();
    machine.hours(24.0).await;
    assert_eq!(machine.runs()[1..], ["11-21T10:00"]);
    assert_eq!(daemon.end().await, End::Stopped);
}

#[tokio::test(start_paused = true)]
async fn asked_to_stop_it_stops_the_backup_and_ends() {
    let machine = Fake::new("11-20T21:59", Some("11-19T22:00"));
    machine.0.run_s.store(7200, Ordering::SeqCst);
    let daemon = machine.start();
    machine.hours(0.5).await;
    let asked = Instant::now();
    assert_eq!(daemon.end().await, End::Stopped);
    assert!(asked.elapsed() < Duration::from_secs(1));
    assert_eq!(machine.runs().len(), 1);
}

#[tokio::test(start_paused = true)]
async fn once_ends_when_nothing_is_due_and_leaves_the_next_slot_to_the_timer() {
    let once = async |machine: &Fake| machine.daemon(Until::Served).0.run().await.unwrap();
    let served = Fake::new("11-20T09:00", Some("11-19T22:00"));
    assert_eq!((once(&served).await, served.runs().len()), (End::NothingDue, 0));
    let due = Fake::new("11-20T22:00", Some("11-19T22:00"));
    due.fail(2);
    assert_eq!((once(&due).await, due.runs().len()), (End::Made, 3));
    let failing = Fake::new("11-20T22:00", Some("11-19T22:00"));
    failing.fail(99);
    let failed = End::Failed { message: "no".into(), exit_code: 3 };
    assert_eq!(once(&failing).await, failed);
    assert!(failing.now().wall < at("11-21T22:00"));
    let unplugged = Fake::new("11-20T22:00", Some("11-19T22:00"));
    *unplugged.0.hindrance.lock().unwrap() = Some(Hindrance::OnBattery);
    assert_eq!(once(&unplugged).await, End::PutOff(Hindrance::OnBattery));
    assert!(unplugged.now().wall < at("11-21T22:00"));
}
