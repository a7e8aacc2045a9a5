//! See `cvault_dataplane::fuzzing::uapi`.

#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| cvault_dataplane::fuzzing::uapi(input));
