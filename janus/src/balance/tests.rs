use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use futures::FutureExt;
use tokio::time::{Instant, sleep};
use tower_test::mock;

use super::*;
use crate::selection::{Candidate, InitialBackups, Policy, order};

#[derive(Debug, Clone)]
enum Gate {
    Open,
    Shut(&'static str),
    Silent,
    /// Open so long, then silent.
    OpenFor(Duration),
    /// Needs so long to answer.
    Slow(Duration),
}

/// Servers a, b, … whose use counters are claims counted so far.
#[derive(Debug, Clone)]
struct Fake {
    gates: Vec<Gate>,
    uses: Arc<Mutex<Vec<u64>>>,
    begun: Instant,
}

impl Fake {
    fn new(gates: &[Gate]) -> Self {
        let uses = Arc::new(Mutex::new(vec![0; gates.len()]));
        Self { gates: gates.to_vec(), uses, begun: Instant::now() }
    }
}

impl Directory for Fake {
    type Call = Policy;
    type Target = usize;
    type Claim = ();

    fn targets(&self, _: &Policy) -> Vec<usize> {
        (0..self.gates.len()).collect()
    }

    fn order(&self, policy: &Policy, targets: &[usize]) -> Vec<Place> {
        let uses = self.uses.lock().unwrap();
        let candidates: Vec<Candidate> = targets
            .iter()
            .map(|&position| Candidate {
                name: self.name(&position),
                position,
                use_counter: uses[position],
                has_chain: uses[position] > 0,
                last_starts: 0,
                initial_runs: 0,
                contradicts: None,
                is_seeded: false,
            })
            .collect();
        order(*policy, &candidates)
    }

    fn wait(&self, _: &Policy) -> Wait {
        Wait::of_start(PROBE, self.begun.elapsed())
    }

    fn gate(
        &self,
        _: &Policy,
        target: &usize,
        wait: Wait,
    ) -> BoxFuture<'static, Result<(), String>> {
        let (gate, age) = (self.gates[*target].clone(), self.begun.elapsed());
        let limit = if let Wait::AtMost(limit) = wait { limit } else { PROBE };
        async move {
            let answers_in = match gate {
                Gate::Open => Duration::ZERO,
                Gate::OpenFor(time) if age < time => Duration::ZERO,
                Gate::Slow(time) => time,
                Gate::Shut(reason) => return Err(reason.to_string()),
                Gate::Silent | Gate::OpenFor(_) => Duration::MAX,
            };
            sleep(answers_in.min(limit)).await;
            if answers_in < limit { Ok(()) } else { Err("no answer".to_string()) }
        }
        .boxed()
    }

    fn name(&self, target: &usize) -> String {
        ["a", "b", "c", "d", "e"][*target].to_string()
    }

    fn claim(&self, _: &Policy, target: &usize) {
        let mut uses = self.uses.lock().unwrap();
        let next = uses.iter().max().unwrap() + 1;
        uses[*target] = next;
    }
}

const PROBE: Duration = Duration::from_secs(1);
const START: Policy =
    Policy::LeastRecent { initial_backups: InitialBackups::Allow, max_initial_runs: 2 };

type Mock = mock::Mock<Attempt<Fake, u32>, Outcome<u32, &'static str>>;
type Handle = mock::Handle<Attempt<Fake, u32>, Outcome<u32, &'static str>>;

fn balanced(gates: &[Gate]) -> (Balance<Fake, Mock>, Handle) {
    let (inner, mut handle) = mock::pair();
    handle.allow(100);
    (BalanceLayer::new(Fake::new(gates)).layer(inner), handle)
}

fn next(reason: &str, refusal: Option<&'static str>) -> Outcome<u32, &'static str> {
    Outcome::Next { reason: reason.into(), request: 7, refusal }
}

fn texts(skipped: &[Skipped]) -> Vec<String> {
    skipped.iter().map(ToString::to_string).collect()
}

#[tokio::test(start_paused = true)]
async fn servers_that_cannot_be_used_are_passed_over_with_the_reason() {
    let (service, mut handle) =
        balanced(&[Gate::Shut("refused"), Gate::Open, Gate::Shut("behind the taken one")]);
    let call = tokio::spawn(service.oneshot((START, 7)));
    let (attempt, respond) = handle.next_request().await.unwrap();
    assert_eq!((attempt.target, attempt.request), (1, 7));
    respond.send_response(Outcome::Done("taken"));
    let balanced = call.await.unwrap().unwrap();
    assert_eq!(balanced.response, Some("taken"));
    assert_eq!(texts(&balanced.skipped), ["a: refused"]);
}

#[tokio::test(start_paused = true)]
async fn silent_servers_cost_one_probe_together() {
    let (service, mut handle) = balanced(&[Gate::Silent, Gate::Silent, Gate::Silent, Gate::Open]);
    let (call, begun) = (tokio::spawn(service.oneshot((START, 7))), Instant::now());
    let (attempt, respond) = handle.next_request().await.unwrap();
    assert_eq!((attempt.target, begun.elapsed()), (3, Duration::from_secs(1)));
    respond.send_response(Outcome::Done("taken"));
    assert_eq!(call.await.unwrap().unwrap().skipped.len(), 3);
}

#[tokio::test(start_paused = true)]
async fn a_silent_server_behind_the_first_costs_nothing() {
    let (service, mut handle) = balanced(&[Gate::Open, Gate::Silent]);
    let (call, begun) = (tokio::spawn(service.oneshot((START, 7))), Instant::now());
    let (_, respond) = handle.next_request().await.unwrap();
    assert_eq!(begun.elapsed(), Duration::ZERO);
    respond.send_response(Outcome::Done("taken"));
    assert_eq!(call.await.unwrap().unwrap().skipped, []);
}

#[tokio::test(start_paused = true)]
async fn the_request_moves_on_and_the_first_refusal_is_kept() {
    let (service, mut handle) = balanced(&[Gate::Open, Gate::Open, Gate::Shut("refused")]);
    let call = tokio::spawn(service.oneshot((START, 7)));
    let (attempt, respond) = handle.next_request().await.unwrap();
    assert_eq!(attempt.target, 0);
    respond.send_response(next("is full", Some("a says full")));
    let (attempt, respond) = handle.next_request().await.unwrap();
    assert_eq!((attempt.target, attempt.request), (1, 7));
    assert_eq!(
        texts(&attempt.skipped),
        Vec::<String>::new(),
        "a was claimed, so its turn is later now"
    );
    respond.send_response(next("is draining", Some("b says no")));
    let balanced = call.await.unwrap().unwrap();
    assert_eq!(balanced.response, Some("a says full"));
    assert_eq!(balanced.skipped.len(), 3);
}

#[tokio::test(start_paused = true)]
async fn calls_at_the_same_time_take_different_servers() {
    let (service, mut handle) = balanced(&[Gate::Open, Gate::Open]);
    let calls = [
        tokio::spawn(service.clone().oneshot((START, 1))),
        tokio::spawn(service.oneshot((START, 2))),
    ];
    let (first, respond_first) = handle.next_request().await.unwrap();
    let (second, respond_second) = handle.next_request().await.unwrap();
    assert_eq!((first.target, second.target), (0, 1));
    respond_first.send_response(Outcome::Done("one"));
    respond_second.send_response(Outcome::Done("two"));
    for call in calls {
        assert!(call.await.unwrap().unwrap().response.is_some());
    }
}

#[tokio::test(start_paused = true)]
async fn without_any_server_each_is_named() {
    let (service, _handle) = balanced(&[Gate::Shut("refused"), Gate::Silent]);
    let balanced = service.oneshot((START, 7)).await.unwrap();
    assert_eq!(balanced.response, None);
    assert_eq!(texts(&balanced.skipped), ["a: refused", "b: no answer"]);
}

#[tokio::test(start_paused = true)]
async fn the_order_is_asked_for_when_the_attempt_can_be_made() {
    let (inner, mut handle) = mock::pair();
    handle.allow(0);
    let directory = Fake::new(&[Gate::Open, Gate::Open]);
    let uses = directory.uses.clone();
    let service: Balance<Fake, Mock> = BalanceLayer::new(directory).layer(inner);
    let call = tokio::spawn(service.oneshot((START, 7)));
    sleep(Duration::from_millis(1)).await;
    // While it waits for the inner service, another start takes the first server.
    uses.lock().unwrap()[0] = 1;
    handle.allow(1);
    let (attempt, respond) = handle.next_request().await.unwrap();
    assert_eq!(attempt.target, 1);
    respond.send_response(Outcome::Done("taken"));
    assert_eq!(call.await.unwrap().unwrap().response, Some("taken"));
}

#[tokio::test(start_paused = true)]
async fn an_error_of_the_inner_service_ends_the_call() {
    let (service, mut handle) = balanced(&[Gate::Open, Gate::Open]);
    let call = tokio::spawn(service.oneshot((START, 7)));
    let (_, respond) = handle.next_request().await.unwrap();
    respond.send_error("broken");
    assert_eq!(call.await.unwrap().unwrap_err().to_string(), "broken");
}

/// Answers attempts as servers do that fall silent once they have a request; the server that answers, and when.
async fn answer_of_the_first_live(handle: &mut Handle, live: usize) -> (Vec<usize>, Duration) {
    let (begun, mut tried) = (Instant::now(), Vec::new());
    loop {
        let (attempt, respond) = handle.next_request().await.unwrap();
        tried.push(attempt.target);
        if attempt.target == live {
            respond.send_response(Outcome::Done("taken"));
            return (tried, begun.elapsed());
        }
        let limit = if let Wait::AtMost(limit) = attempt.wait { limit } else { PROBE };
        sleep(limit + attempt.wait.pause()).await;
        respond.send_response(next("no answer", None));
    }
}

#[tokio::test(start_paused = true)]
async fn a_gate_that_was_open_before_a_failure_is_asked_again() {
    let soon = Gate::OpenFor(Duration::from_millis(500));
    let (service, mut handle) =
        balanced(&[Gate::Open, soon.clone(), soon.clone(), soon, Gate::Open]);
    let call = tokio::spawn(service.oneshot((START, 7)));
    let (tried, took) = answer_of_the_first_live(&mut handle, 4).await;
    assert_eq!(tried, [0, 4], "b, c and d were silent when their turn came");
    assert!(took < Duration::from_millis(1600), "{took:?}: they were asked at once");
    assert_eq!(call.await.unwrap().unwrap().response, Some("taken"));
}

#[tokio::test(start_paused = true)]
async fn servers_that_die_one_after_the_other_cost_less_than_two_seconds() {
    for bad in 1..=4 {
        let (service, mut handle) = balanced(&vec![Gate::Open; bad + 1]);
        let call = tokio::spawn(service.oneshot((START, 7)));
        let (tried, took) = answer_of_the_first_live(&mut handle, bad).await;
        assert_eq!(tried, (0..=bad).collect::<Vec<_>>());
        assert!(took < Duration::from_millis(1950), "{bad} bad servers: {took:?}");
        assert_eq!(call.await.unwrap().unwrap().response, Some("taken"));
    }
}

#[tokio::test(start_paused = true)]
async fn who_was_passed_over_in_haste_is_asked_again_before_the_call_is_given_up() {
    let slow = Gate::Slow(Duration::from_millis(700));
    let (service, mut handle) = balanced(&[Gate::Open, slow]);
    let call = tokio::spawn(service.oneshot((START, 7)));
    let (tried, took) = answer_of_the_first_live(&mut handle, 1).await;
    assert_eq!(tried, [0, 1]);
    assert!(took > Duration::from_secs(2), "{took:?}: it had its full time in the end");
    assert_eq!(call.await.unwrap().unwrap().response, Some("taken"));
}
