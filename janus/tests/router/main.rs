//! A janus over real loopback sockets with TLS, before small servers that misbehave on demand.
//!
//! What proxies of gRPC get wrong, and the test that would notice:
//!
//! | pitfall | test |
//! | --- | --- |
//! | `te: trailers`, `grpc-timeout` and the caller's certificate reach the server | `forwarding::the_server_gets_the_callers_certificate_and_deadline_and_nobody_elses` |
//! | authority and scheme are those of the new leg | `forwarding::the_server_sees_its_own_authority` |
//! | headers of the connection stay behind | unit test in `src/router/headers.rs` |
//! | answers that consist of trailers | `forwarding::statuses_pass_with_their_details` |
//! | trailers after messages | `forwarding::a_status_after_messages_passes` |
//! | no deadline of janus' own on streams | `forwarding::a_quiet_stream_is_left_alone` |
//! | who cancels, cancels at the server | `forwarding::a_given_up_download_ends_at_the_server`, `…::a_broken_upload_is_broken_at_the_server_too` |
//! | a lost server is UNAVAILABLE, no clean end | `forwarding::a_server_lost_in_the_middle_is_unavailable_not_a_clean_end` |
//! | an attempt that failed takes no bytes of the next | `forwarding::an_upload_is_whole_at_one_server_or_fails` |
//! | a handshake proves no live peer | `unusable::one_that_says_nothing_after_the_tls_handshake` |
//! | vectored writes go through | unit test in `src/upstream/wire.rs` |
//! | a port that is taken is told | `life::a_taken_port_is_told_with_its_setting` |
//! | an answer before the end of the upload | `forwarding::an_answer_before_the_end_of_the_upload_ends_it` |
//! | frozen server | `starts::a_frozen_server_is_skipped_and_used_again_when_it_answers`, `forwarding::an_upload_on_a_frozen_server_ends_after_a_while`; SIGSTOP: `client/tests/janus_limits.rs` |
//! | black hole | `starts::a_server_that_accepts_and_never_answers_costs_at_most_two_seconds` |
//! | refused port | `starts::without_servers_each_is_listed_with_its_reason` |
//! | slow reader | `limits::slow_readers_hold_up_nobody_else` |
//! | GOAWAY under load | `forwarding::a_server_that_stops_under_load_costs_no_start_and_no_upload` |
//! | more than 300 streams | `forwarding::many_streams_flow_at_once` |
//! | drain with a connection that never speaks | `life::a_drain_ends_in_time_whatever_hangs_on`, `proto/tests/edge.rs` |

// Helpers of tests are tests.
#![allow(clippy::unwrap_used)]

mod agreement;
mod alerts;
mod backend;
mod catalog;
mod forwarding;
mod life;
mod limits;
mod site;
mod starts;
mod unusable;
