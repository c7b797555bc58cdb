#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| janus_server::fuzz::fuzz_report(bytes));
