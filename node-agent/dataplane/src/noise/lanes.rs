//! X25519 (RFC 7748) four at a time: each 64-bit lane of an AVX2 register works on an agreement of its own.
//!
//! Numbers modulo 2^255 - 19 are ten limbs of 26 and 25 bits in turn, little end first. Nothing branches on a secret or is
//! indexed by one.

use std::arch::x86_64::{
    __m256i, _mm256_add_epi64, _mm256_and_si256, _mm256_blendv_epi8, _mm256_extract_epi64, _mm256_mul_epu32,
    _mm256_set_epi64x, _mm256_set1_epi64x, _mm256_setzero_si256, _mm256_slli_epi64, _mm256_srli_epi64,
    _mm256_sub_epi64, _mm256_xor_si256,
};

use zeroize::Zeroizing;

/// How many are worked on at once.
pub(super) const LANES: usize = 4;
const LIMBS: usize = 10;
/// Twice the prime: added before a subtraction, so that no limb gets below zero.
const TWICE_PRIME: [i64; LIMBS] = [
    0x7ff_ffda, 0x3ff_fffe, 0x7ff_fffe, 0x3ff_fffe, 0x7ff_fffe, 0x3ff_fffe, 0x7ff_fffe, 0x3ff_fffe, 0x7ff_fffe,
    0x3ff_fffe,
];
/// (A - 2) / 4 of the curve.
const A24: i64 = 121_665;

/// A number in each lane. *Tight*: an even limb is below 2^26 + 2^18, an odd one below 2^25 + 2^18. *Loose*: three times that.
/// Loose limbs times 19 fit into 32 bits, and a column of products of loose limbs into 63.
#[derive(Clone, Copy)]
struct Field([__m256i; LIMBS]);

/// The scalar products of `scalars` and the points with these coordinates; all zeroes for a point of small order. `None`:
/// this processor has no AVX2.
#[expect(unsafe_code, reason = "a processor may lack what the function is compiled for")]
pub(super) fn multiply(
    scalars: [&[u8; 32]; LANES],
    points: [&[u8; 32]; LANES],
) -> Option<Zeroizing<[[u8; 32]; LANES]>> {
    if !std::arch::is_x86_feature_detected!("avx2") {
        return None;
    }
    // SAFETY: the processor has AVX2.
    Some(unsafe { multiply_with_avx2(scalars, points) })
}

#[target_feature(enable = "avx2")]
fn multiply_with_avx2(scalars: [&[u8; 32]; LANES], points: [&[u8; 32]; LANES]) -> Zeroizing<[[u8; 32]; LANES]> {
    let scalars = Zeroizing::new(scalars.map(clamp));
    let point = Field::read(points);
    // Two multiples of the point, one point apart; which of them is the lower follows from the bit before.
    let (mut x2, mut z2, mut x3, mut z3) = (Field::small(1), Field::small(0), point, Field::small(1));
    let mut before = _mm256_setzero_si256();
    for bit in (0..255).rev() {
        let now = lanes(scalars.each_ref().map(|scalar| i64::from(scalar[bit / 8] >> (bit % 8) & 1)));
        let other = _mm256_sub_epi64(_mm256_setzero_si256(), _mm256_xor_si256(before, now));
        before = now;
        let (sum2, difference2) = (x2.plus(&z2), x2.minus(&z2));
        let (sum3, difference3) = (x3.plus(&z3), x3.minus(&z3));
        // The sum of both is the same whichever is the lower; one is doubled.
        let (crossed2, crossed3) = (difference3.times(&sum2), sum3.times(&difference2));
        let square_sum = sum2.or(&sum3, other).square();
        let square_difference = difference2.or(&difference3, other).square();
        let square_crossed = crossed2.minus(&crossed3).square();
        x3 = crossed2.plus(&crossed3).square();
        let e = square_sum.minus(&square_difference);
        let f = e.times_a24().plus(&square_sum);
        x2 = square_sum.times(&square_difference);
        z3 = square_crossed.times(&point);
        z2 = e.times(&f);
    }
    let other = _mm256_sub_epi64(_mm256_setzero_si256(), before);
    x2.or(&x3, other).times(&z2.or(&z3, other).inverse()).write()
}

fn clamp(scalar: &[u8; 32]) -> [u8; 32] {
    let mut scalar = *scalar;
    scalar[0] &= 248;
    scalar[31] = scalar[31] & 127 | 64;
    scalar
}

#[inline]
#[target_feature(enable = "avx2")]
fn lanes([a, b, c, d]: [i64; LANES]) -> __m256i {
    _mm256_set_epi64x(d, c, b, a)
}

/// How many bits a limb has.
const fn bits(limb: usize) -> i32 {
    if limb.is_multiple_of(2) { 26 } else { 25 }
}

impl Field {
    #[target_feature(enable = "avx2")]
    fn small(number: i64) -> Self {
        let mut limbs = [_mm256_setzero_si256(); LIMBS];
        limbs[0] = _mm256_set1_epi64x(number);
        Self(limbs)
    }

    /// Without the highest bit, as RFC 7748 has it. Tight.
    #[target_feature(enable = "avx2")]
    fn read(numbers: [&[u8; 32]; LANES]) -> Self {
        let limbs = numbers.map(read);
        let mut field = Self::small(0);
        for (index, limb) in field.0.iter_mut().enumerate() {
            *limb = lanes(limbs.each_ref().map(|limbs| limbs[index]));
        }
        field
    }

    /// Of a tight one.
    #[target_feature(enable = "avx2")]
    fn write(&self) -> Zeroizing<[[u8; 32]; LANES]> {
        let mut limbs = Zeroizing::new([[0; LIMBS]; LANES]);
        for (index, limb) in self.0.iter().enumerate() {
            limbs[0][index] = _mm256_extract_epi64::<0>(*limb);
            limbs[1][index] = _mm256_extract_epi64::<1>(*limb);
            limbs[2][index] = _mm256_extract_epi64::<2>(*limb);
            limbs[3][index] = _mm256_extract_epi64::<3>(*limb);
        }
        Zeroizing::new(limbs.each_ref().map(write))
    }

    /// Tight and tight makes loose.
    #[inline]
    #[target_feature(enable = "avx2")]
    fn plus(&self, other: &Self) -> Self {
        let mut sum = *self;
        for (limb, other) in sum.0.iter_mut().zip(&other.0) {
            *limb = _mm256_add_epi64(*limb, *other);
        }
        sum
    }

    /// Tight and tight makes loose.
    #[inline]
    #[target_feature(enable = "avx2")]
    fn minus(&self, other: &Self) -> Self {
        let mut difference = *self;
        for ((limb, other), twice) in difference.0.iter_mut().zip(&other.0).zip(TWICE_PRIME) {
            *limb = _mm256_sub_epi64(_mm256_add_epi64(*limb, _mm256_set1_epi64x(twice)), *other);
        }
        difference
    }

    /// The other in the lanes in which `mask` is all ones.
    #[inline]
    #[target_feature(enable = "avx2")]
    fn or(&self, other: &Self, mask: __m256i) -> Self {
        let mut chosen = *self;
        for (limb, other) in chosen.0.iter_mut().zip(&other.0) {
            *limb = _mm256_blendv_epi8(*limb, *other, mask);
        }
        chosen
    }

    /// Each limb times a number below 2^32, of which nothing may be lost.
    #[inline]
    #[target_feature(enable = "avx2")]
    fn scaled(&self, factor: i64) -> Self {
        let factor = _mm256_set1_epi64x(factor);
        let mut scaled = *self;
        for limb in &mut scaled.0 {
            *limb = _mm256_mul_epu32(*limb, factor);
        }
        scaled
    }

    /// Nineteen times as much. In memory: or the compiler forgets that 32 bits are enough and does not align what it spills,
    /// which together cost a third.
    #[inline]
    #[target_feature(enable = "avx2")]
    fn wrapped(&self) -> Self {
        std::hint::black_box(self.scaled(19))
    }

    /// Loose makes tight.
    #[inline]
    #[target_feature(enable = "avx2")]
    fn times_a24(&self) -> Self {
        self.scaled(A24).carried()
    }

    /// Loose and loose makes tight.
    #[inline(never)]
    #[target_feature(enable = "avx2")]
    fn times(&self, other: &Self) -> Self {
        let wrapped = other.wrapped();
        let mut columns = Self::small(0);
        columns.add_row::<0>(self.0[0], other, &wrapped);
        columns.add_row::<1>(self.0[1], other, &wrapped);
        columns.add_row::<2>(self.0[2], other, &wrapped);
        columns.add_row::<3>(self.0[3], other, &wrapped);
        columns.add_row::<4>(self.0[4], other, &wrapped);
        columns.add_row::<5>(self.0[5], other, &wrapped);
        columns.add_row::<6>(self.0[6], other, &wrapped);
        columns.add_row::<7>(self.0[7], other, &wrapped);
        columns.add_row::<8>(self.0[8], other, &wrapped);
        columns.add_row::<9>(self.0[9], other, &wrapped);
        columns.carried()
    }

    /// Loose makes tight.
    #[inline(never)]
    #[target_feature(enable = "avx2")]
    fn square(&self) -> Self {
        let wrapped = self.wrapped();
        let mut columns = Self::small(0);
        columns.add_square_row::<0>(self, &wrapped);
        columns.add_square_row::<1>(self, &wrapped);
        columns.add_square_row::<2>(self, &wrapped);
        columns.add_square_row::<3>(self, &wrapped);
        columns.add_square_row::<4>(self, &wrapped);
        columns.add_square_row::<5>(self, &wrapped);
        columns.add_square_row::<6>(self, &wrapped);
        columns.add_square_row::<7>(self, &wrapped);
        columns.add_square_row::<8>(self, &wrapped);
        columns.add_square_row::<9>(self, &wrapped);
        columns.carried()
    }

    /// Adds the products of limb `I` of one number and all limbs of another. Two odd limbs stand half a bit too low each, so
    /// their product counts twice; from column 10 on a product counts 19 times in the column ten below.
    #[inline]
    #[target_feature(enable = "avx2")]
    fn add_row<const I: usize>(&mut self, limb: __m256i, other: &Self, wrapped: &Self) {
        let doubled = _mm256_add_epi64(limb, limb);
        for j in 0..LIMBS {
            let left = if I % 2 == 1 && j % 2 == 1 { doubled } else { limb };
            let right = if I + j >= LIMBS { wrapped.0[j] } else { other.0[j] };
            let sum = &mut self.0[(I + j) % LIMBS];
            *sum = _mm256_add_epi64(*sum, _mm256_mul_epu32(left, right));
        }
    }

    /// As [`Self::add_row`], of a number and itself: two different limbs meet twice.
    #[inline]
    #[target_feature(enable = "avx2")]
    fn add_square_row<const I: usize>(&mut self, one: &Self, wrapped: &Self) {
        let limb = one.0[I];
        let doubled = _mm256_add_epi64(limb, limb);
        let fourfold = _mm256_add_epi64(doubled, doubled);
        for j in I..LIMBS {
            let left = match (I == j, I % 2 == 1 && j % 2 == 1) {
                (true, false) => limb,
                (true, true) | (false, false) => doubled,
                (false, true) => fourfold,
            };
            let right = if I + j >= LIMBS { wrapped.0[j] } else { one.0[j] };
            let sum = &mut self.0[(I + j) % LIMBS];
            *sum = _mm256_add_epi64(*sum, _mm256_mul_epu32(left, right));
        }
    }

    /// From columns below 2^63 makes tight. Two carries run at once, from limb 0 and from limb 4.
    #[inline]
    #[target_feature(enable = "avx2")]
    fn carried(mut self) -> Self {
        self.carry::<0>();
        self.carry::<4>();
        self.carry::<1>();
        self.carry::<5>();
        self.carry::<2>();
        self.carry::<6>();
        self.carry::<3>();
        self.carry::<7>();
        self.carry::<4>();
        self.carry::<8>();
        self.carry::<9>();
        self.carry::<0>();
        self
    }

    /// What is too much for limb `FROM`, into the next: 2^255 is 19.
    #[inline]
    #[target_feature(enable = "avx2")]
    fn carry<const FROM: usize>(&mut self) {
        let limb = self.0[FROM];
        let (over, mask) = if FROM.is_multiple_of(2) {
            (_mm256_srli_epi64::<26>(limb), _mm256_set1_epi64x((1 << 26) - 1))
        } else {
            (_mm256_srli_epi64::<25>(limb), _mm256_set1_epi64x((1 << 25) - 1))
        };
        self.0[FROM] = _mm256_and_si256(limb, mask);
        let next = &mut self.0[(FROM + 1) % LIMBS];
        *next = _mm256_add_epi64(*next, over);
        if FROM == LIMBS - 1 {
            let eighteen = _mm256_add_epi64(_mm256_slli_epi64::<4>(over), _mm256_slli_epi64::<1>(over));
            *next = _mm256_add_epi64(*next, eighteen);
        }
    }

    #[target_feature(enable = "avx2")]
    fn squared(&self, times: u32) -> Self {
        (0..times).fold(*self, |field, _| field.square())
    }

    /// To the power of the prime less two: the inverse, and zero of zero. `to_n` is `self` to the power of 2^n - 1.
    #[target_feature(enable = "avx2")]
    fn inverse(&self) -> Self {
        let to_2 = self.squared(1).times(self);
        let to_3 = to_2.squared(1).times(self);
        let to_5 = to_3.squared(2).times(&to_2);
        let to_10 = to_5.squared(5).times(&to_5);
        let to_20 = to_10.squared(10).times(&to_10);
        let to_40 = to_20.squared(20).times(&to_20);
        let to_50 = to_40.squared(10).times(&to_10);
        let to_100 = to_50.squared(50).times(&to_50);
        let to_200 = to_100.squared(100).times(&to_100);
        let to_250 = to_200.squared(50).times(&to_50);
        // 2^255 - 21 is 2^5 times 2^250 - 1, and 11.
        let eleven = self.squared(3).times(&to_2);
        to_250.squared(5).times(&eleven)
    }
}

/// In limbs.
fn read(number: &[u8; 32]) -> [i64; LIMBS] {
    let word = |at: usize| i64::from(u32::from_le_bytes(number[at..at + 4].try_into().expect("four bytes")));
    let mut start = 0;
    std::array::from_fn(|limb| {
        let at = (start / 8).min(28);
        let shifted = word(at) >> (start - at * 8);
        start += usize::try_from(bits(limb)).expect("25 or 26");
        shifted & ((1 << bits(limb)) - 1)
    })
}

/// The one number below the prime that tight limbs stand for.
fn write(limbs: &[i64; LIMBS]) -> [u8; 32] {
    // They stand for less than twice the prime, which fits if nineteen more carry beyond bit 255.
    let excess = (0..LIMBS).fold(19, |carry, limb| (limbs[limb] + carry) >> bits(limb));
    let mut carry = 19 * excess;
    let mut words = Zeroizing::new([0_u64; 5]);
    let mut start = 0;
    for (limb, value) in limbs.iter().enumerate() {
        let value = value + carry;
        carry = value >> bits(limb);
        let value = (value & ((1 << bits(limb)) - 1)).cast_unsigned();
        words[start / 64] |= value << (start % 64);
        words[start / 64 + 1] |= value >> 1 >> (63 - start % 64);
        start += usize::try_from(bits(limb)).expect("25 or 26");
    }
    let mut bytes = [0; 32];
    for (bytes, word) in bytes.chunks_exact_mut(8).zip(&words[..4]) {
        bytes.copy_from_slice(&word.to_le_bytes());
    }
    bytes
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The greatest loose limb.
    fn at_most(limb: usize) -> i64 {
        3 * ((1 << bits(limb)) + (1 << 18)) - 1
    }

    #[target_feature(enable = "avx2")]
    fn field(limbs: [i64; LIMBS]) -> Field {
        let mut field = Field::small(0);
        for (to, limb) in field.0.iter_mut().zip(limbs) {
            *to = lanes([limb, 0, limb, 1]);
        }
        field
    }

    /// Tight limbs are multiplied right, or the thousand iterations of the RFC would not end where they do.
    #[target_feature(enable = "avx2")]
    fn loose_is_as_tight(one: [i64; LIMBS], other: [i64; LIMBS]) {
        let (one, other) = (field(one), field(other));
        let (tight, tight_other) = (one.carried(), other.carried());
        assert_eq!(*one.times(&other).write(), *tight.times(&tight_other).write());
        assert_eq!(*one.square().write(), *tight.times(&tight).write());
        assert_eq!(*one.times_a24().write(), *tight.times(&Field::small(A24)).write());
        assert_eq!(*tight.minus(&tight_other).plus(&tight_other).carried().write(), *tight.write());
        assert_eq!(*tight.inverse().times(&tight).times(&tight).write(), *tight.write(), "of zero, too");
    }

    proptest! {
        #[test]
        #[expect(unsafe_code, reason = "as in `multiply`")]
        fn no_limb_is_too_large(one: [i64; LIMBS], other: [i64; LIMBS], full: [bool; LIMBS]) {
            let loose = |limbs: [i64; LIMBS]| {
                std::array::from_fn(|limb| if full[limb] { at_most(limb) } else { limbs[limb].rem_euclid(at_most(limb) + 1) })
            };
            if std::arch::is_x86_feature_detected!("avx2") {
                // SAFETY: the processor has AVX2.
                unsafe {
                    loose_is_as_tight(loose(one), loose(other));
                    loose_is_as_tight(std::array::from_fn(at_most), loose(other));
                    loose_is_as_tight(std::array::from_fn(at_most), std::array::from_fn(at_most));
                }
            }
        }
    }
}
