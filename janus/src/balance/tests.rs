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
}

/// Servers a, b, … whose use counters are claims counted so far.
#[derive(Debug, Clone)]
struct Fake {
    gates: Vec<Gate>,
    uses: Arc<Mutex<Vec<u64>>>,
}

impl Fake {
    fn new(gates: &[Gate]) -> Self {
        Self { gates: gates.to_vec(), uses: Arc::new(Mutex::new(vec![0; gates.len()])) }
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
            })
            .collect();
        order(*policy, &candidates)
    }

    fn gate(&self, _: &Policy, target: &usize) -> BoxFuture<'static, Result<(), String>> {
        let gate = self.gates[*target].clone();
        async move {
            match gate {
                Gate::Open => Ok(()),
                Gate::Shut(reason) => Err(reason.to_string()),
                Gate::Silent => {
                    sleep(Duration::from_secs(1)).await;
                    Err("no answer".to_string())
                }
            }
        }
        .boxed()
    }

    fn name(&self, target: &usize) -> String {
        ["a", "b", "c", "d"][*target].to_string()
    }

    fn claim(&self, _: &Policy, target: &usize) {
        let mut uses = self.uses.lock().unwrap();
        let next = uses.iter().max().unwrap() + 1;
        uses[*target] = next;
    }
}

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
