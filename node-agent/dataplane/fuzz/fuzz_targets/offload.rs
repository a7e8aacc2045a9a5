//! See `cvault_dataplane::fuzzing::offload`.

#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| cvault_dataplane::fuzzing::offload(input));
