#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| janus_client::fuzz::fuzz_nbd_server(bytes));
