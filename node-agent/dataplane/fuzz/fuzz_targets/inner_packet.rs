//! See `cvault_dataplane::fuzzing::inner_packet`.

#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| cvault_dataplane::fuzzing::inner_packet(input));
