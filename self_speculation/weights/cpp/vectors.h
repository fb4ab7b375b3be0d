// Vectors of LANES floats, and the operations that the other files compute with. Each operation has intrinsics or, for any
// other processor, plain C++.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <memory>
#include <type_traits>
#include <utility>
#include <vector>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__ARM_FEATURE_DOTPROD)
#include <arm_neon.h>
#endif

namespace {
using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Tests define WIDE, EIGHT_BITS, PAIRS or TILES. They run this code on processors without such instructions.
#ifdef TILES
#define WIDE
#define PAIRS
#endif
#if defined(__AVX512VNNI__) || defined(WIDE)
constexpr int64_t LANES = 16;
#else
constexpr int64_t LANES = 8;
#endif
#define INLINE inline __attribute__((always_inline))  // where vectors would go through memory
#define VECTOR(bytes) __attribute__((vector_size(LANES * (bytes))))
typedef float Floats VECTOR(4);
typedef int32_t Ints VECTOR(4);
typedef uint8_t Bytes VECTOR(4);  // four for each lane
typedef uint16_t Shorts VECTOR(2);

template <class V>
V load(const void* from) {
  V to;
  std::memcpy(&to, from, sizeof(V));
  return to;
}
Floats splat(float x) { return x - Floats{}; }
// Memory for `count` floats, aligned so that no vector crosses a line of the cache.
std::unique_ptr<Floats[]> aligned(int64_t count) {
  return std::unique_ptr<Floats[]>(new Floats[(count + LANES - 1) / LANES]);
}
int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// LANES elements of a weight, a norm or a cache as float32.
Floats widen(const float* from) { return load<Floats>(from); }
Floats widen(const BFloat16* from) { return (Floats)(__builtin_convertvector(load<Shorts>(from), Ints) << 16); }
// Rounds to nearest even. Subnormal numbers stay; NaN becomes quiet.
Shorts to_bfloat16_bits(Floats x) {
  const Ints bits = (Ints)x;
  const Ints rounded = x == x ? bits + 0x7fff + (bits >> 16 & 1) : bits | 0x400000;
  return __builtin_convertvector(rounded >> 16, Shorts);
}
#ifdef __AVX512VNNI__
Floats widen(const Half* from) { return _mm512_cvtph_ps(load<__m256i>(from)); }
Shorts to_half_bits(Floats x) { return (Shorts)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
Floats widen(const int8_t* from) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load<__m128i>(from))); }
Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
float max_lane(Floats x) { return _mm512_reduce_max_ps((__m512)x); }
__m256 sum_of_halves(Floats x) { return _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1)); }
#elif defined(__AVX2__)
Floats widen(const Half* from) { return _mm256_cvtph_ps(load<__m128i>(from)); }
Shorts to_half_bits(Floats x) { return (Shorts)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT); }
Floats widen(const int8_t* from) { return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)from))); }
Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
__m256 sum_of_halves(Floats x) { return x; }
#else
typedef _Float16 Halves VECTOR(2);
Floats widen(const Half* from) { return __builtin_convertvector(load<Halves>(from), Floats); }
Shorts to_half_bits(Floats x) { return (Shorts)__builtin_convertvector(x, Halves); }
Floats widen(const int8_t* from) {
  typedef int8_t Signed VECTOR(1);
  return __builtin_convertvector(load<Signed>(from), Floats);
}
Floats fma(Floats a, Floats b, Floats c) {
  for (int i = 0; i < LANES; i++) a[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return a;
}
#endif

// Adds four quants times four inputs, in each lane. If `dot` takes no quants above 127, `total` follows up to 8 calls for quants of
// 4 bits, 4 calls for 5 bits and 2 calls for 6 bits. All sums are exact, so each processor has the same.
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
constexpr bool TAKES_EIGHT_BITS = true;
Ints dot(Ints sums, Bytes quants, int32_t x) {
#ifdef __AVX512VNNI__
  return (Ints)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)quants, _mm512_set1_epi32(x));
#else
  return (Ints)_mm256_dpbusd_avx_epi32((__m256i)sums, (__m256i)quants, _mm256_set1_epi32(x));
#endif
}
Ints total(Ints sums) { return sums; }
#elif defined(__AVX2__) && !defined(EIGHT_BITS)
constexpr bool TAKES_EIGHT_BITS = false;
// Two sums of 16 bits for each lane, of 16 products of 15 * 127, 8 of 31 * 127, or 4 of 63 * 127.
Ints dot(Ints sums, Bytes quants, int32_t x) {
  return (Ints)_mm256_add_epi16((__m256i)sums, _mm256_maddubs_epi16((__m256i)quants, _mm256_set1_epi32(x)));
}
Ints total(Ints sums) { return (Ints)_mm256_madd_epi16((__m256i)sums, _mm256_set1_epi16(1)); }
#elif defined(__ARM_FEATURE_DOTPROD)
constexpr bool TAKES_EIGHT_BITS = false;
Ints dot(Ints sums, Bytes quants, int32_t x) {
  int32x4_t quarters[LANES / 4];
  std::memcpy(quarters, &sums, sizeof(quarters));
  for (int64_t i = 0; i < LANES / 4; i++)
    quarters[i] = vdotq_s32(quarters[i], load<int8x16_t>((char*)&quants + 16 * i), vreinterpretq_s8_s32(vdupq_n_s32(x)));
  return load<Ints>(quarters);
}
Ints total(Ints sums) { return sums; }
#else
constexpr bool TAKES_EIGHT_BITS = true;
Ints dot(Ints sums, Bytes quants, int32_t x) {
  for (int j = 0; j < 4; j++) sums += ((Ints)quants >> 8 * j & 255) * int32_t(int8_t(x >> 8 * j));
  return sums;
}
Ints total(Ints sums) { return sums; }
#endif

// Keeps additions to `sum` in program order. GCC would add in trees, which need more registers than there are.
INLINE void keep_order(Ints& sum) {
#ifdef __AVX2__
  asm("" : "+v"(sum));
#endif
}

// As `fma`, with all operands in registers: if one is in memory, GCC moves sums there, too.
Floats accumulate(Floats a, Floats b, Floats sum) {
#ifdef __AVX2__
  asm("vfmadd231ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
  return sum;
#else
  return fma(a, b, sum);
#endif
}

#if defined(__AVX512BF16__) || defined(PAIRS)
constexpr bool HAS_PAIRS = true;
#else
constexpr bool HAS_PAIRS = false;
#endif
#if defined(AMX) || defined(TILES)
constexpr bool HAS_TILES = true;
#else
constexpr bool HAS_TILES = false;
#endif
// Adds, in each lane, the dot product of two pairs in bfloat16, the upper elements first. Each of the two sums is rounded to nearest
// even, and subnormal numbers are zeros.
#ifdef __AVX512BF16__
Floats accumulate(Ints a, Ints b, Floats sum) {
  asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
  return sum;
}
#else
Floats flush_subnormals(Floats x) { return (Floats)((Ints)x & ((((Ints)x & 0x7f800000) != 0) | INT32_MIN)); }
Floats accumulate(Ints a, Ints b, Floats sum) {
  auto upper = [](Ints pairs) { return flush_subnormals((Floats)(pairs & int32_t(0xffff0000))); };
  auto lower = [](Ints pairs) { return flush_subnormals((Floats)(pairs << 16)); };
  sum = flush_subnormals(fma(upper(a), upper(b), flush_subnormals(sum)));
  return flush_subnormals(fma(lower(a), lower(b), sum));
}
#endif

// Two vectors in bfloat16, rounded to nearest even. `to_bfloat16`: the lower half has `first`, the upper half has `second`.
// `to_pairs`: the lower half of each lane has an element of `first`, the upper half has an element of `second`.
#ifdef __AVX512BF16__
Ints to_bfloat16(Floats first, Floats second) { return (Ints)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first); }
Ints to_pairs(Floats first, Floats second) {
  const __m512i upper = _mm512_set_epi32(31, 30, 29, 28, 27, 26, 25, 24, 23, 22, 21, 20, 19, 18, 17, 16);
  const __m512i order = _mm512_or_si512(_mm512_slli_epi32(upper, 16), _mm512_sub_epi32(upper, _mm512_set1_epi32(16)));
  return (Ints)_mm512_permutexvar_epi16(order, (__m512i)to_bfloat16(first, second));
}
#else
Ints upper_half(Floats x) {  // rounded: as __AVX512BF16__ does, NaN is quiet and subnormal numbers are zeros
  const Ints bits = (Ints)flush_subnormals(x);
  return (x == x ? bits + 0x7fff + (bits >> 16 & 1) : bits | 0x400000) & int32_t(0xffff0000);
}
Ints to_pairs(Floats first, Floats second) {
  return (upper_half(first) >> 16 & 0xffff) | upper_half(second);
}
Ints to_bfloat16(Floats first, Floats second) {
  const Ints halves[] = {upper_half(first), upper_half(second)};
  uint16_t shorts[2 * LANES];
  for (int64_t i = 0; i < 2 * LANES; i++) shorts[i] = uint16_t(uint32_t(halves[i / LANES][i % LANES]) >> 16);
  return load<Ints>(shorts);
}
#endif

// Whether a lane is not 0.
bool any(Ints x) {
#ifdef __AVX512F__
  return _mm512_test_epi32_mask((__m512i)x, (__m512i)x);
#else
  bool found = false;
  for (int64_t i = 0; i < LANES; i++) found |= x[i] != 0;
  return found;
#endif
}

// float32 as the sum of two terms in bfloat16, in the order of `to_bfloat16`. The sum is exact to 2^-17.
struct Split {
  Ints upper;
  Ints rest;

  Split(Floats first, Floats second) : upper(to_bfloat16(first, second)) {
    BFloat16 terms[2 * LANES];
    std::memcpy(terms, &upper, sizeof(upper));
    rest = to_bfloat16(first - widen(terms), second - widen(terms + LANES));
  }
};

#ifndef __AVX512VNNI__
float max_lane(Floats x) {  // without NaN
  float largest = x[0];
  for (int64_t i = 1; i < LANES; i++) largest = std::max(largest, x[i]);
  return largest;
}
#endif

// Transposes [LANES, LANES].
#ifdef __AVX512F__
INLINE void transpose(Ints* rows) {
  __m512i r[16];
  __m512i s[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i++) r[i] = (__m512i)rows[i];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    s[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    s[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4)
#pragma GCC unroll 2
    for (int j = 0; j < 2; j++) {
      r[i + 2 * j] = _mm512_unpacklo_epi64(s[i + j], s[i + j + 2]);
      r[i + 2 * j + 1] = _mm512_unpackhi_epi64(s[i + j], s[i + j + 2]);
    }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++)
#pragma GCC unroll 2
    for (int j = 0; j < 16; j += 8) {
      s[i + j] = _mm512_shuffle_i32x4(r[i + j], r[i + j + 4], 0x88);
      s[i + j + 4] = _mm512_shuffle_i32x4(r[i + j], r[i + j + 4], 0xdd);
    }
#pragma GCC unroll 8
  for (int i = 0; i < 8; i++) {
    rows[i] = (Ints)_mm512_shuffle_i32x4(s[i], s[i + 8], 0x88);
    rows[i + 8] = (Ints)_mm512_shuffle_i32x4(s[i], s[i + 8], 0xdd);
  }
}
#else
void transpose(Ints* rows) {
  for (int64_t i = 0; i < LANES; i++)
    for (int64_t j = 0; j < i; j++) {
      const int32_t upper = rows[i][j];
      rows[i][j] = rows[j][i];
      rows[j][i] = upper;
    }
}
#endif

// The first n elements, then zeros: memory after the last element may not be mapped.
template <class Scalar>
Floats widen(const Scalar* from, int64_t n) {
  if (n == LANES) return widen(from);
  Scalar padded[LANES] = {};
  std::memcpy(padded, from, n * sizeof(Scalar));
  return widen(padded);
}
// Writes the first n lanes, rounded.
void narrow(Floats x, float* to, int64_t n) { std::memcpy(to, &x, n * sizeof(float)); }
void narrow(Floats x, BFloat16* to, int64_t n) {
  const Shorts bits = to_bfloat16_bits(x);
  std::memcpy(to, &bits, n * sizeof(bits[0]));
}
// Infinities and numbers beyond float16's range become a NaN that arithmetic never gives.
void narrow(Floats x, Half* to, int64_t n) {
  Shorts bits = to_half_bits(x);
  bits |= (Shorts)((bits & 0x7fff) == 0x7c00) & 0x7fff;
  std::memcpy(to, &bits, n * sizeof(bits[0]));
}
void store(Floats x, float* to, int64_t n) {
  if (n == LANES) std::memcpy(to, &x, sizeof(x));
  else std::memcpy(to, &x, n * sizeof(float));
}

// The sums of four vectors, each in the same order.
void lane_sums(const Floats* vectors, float* sums) {
#ifdef __AVX2__
  const __m256 first = _mm256_hadd_ps(sum_of_halves(vectors[0]), sum_of_halves(vectors[1]));
  const __m256 second = _mm256_hadd_ps(sum_of_halves(vectors[2]), sum_of_halves(vectors[3]));
  const __m256 halves = _mm256_hadd_ps(first, second);
  _mm_storeu_ps(sums, _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1)));
#else
  for (int i = 0; i < 4; i++) {
    float half[8];
    for (int j = 0; j < 8; j++) half[j] = LANES == 16 ? vectors[i][j] + vectors[i][(j + 8) % LANES] : vectors[i][j];
    sums[i] = (half[0] + half[1]) + (half[2] + half[3]) + ((half[4] + half[5]) + (half[6] + half[7]));
  }
#endif
}
// The sums of four vectors twice, each in the same order.
void lane_sums(const Floats* first, const Floats* second, float* first_sums, float* second_sums) {
#ifdef __AVX512F__
  auto pair = [&](int i) {
    const __m512 lower = _mm512_shuffle_f32x4((__m512)first[i], (__m512)second[i], 0x44);
    return _mm512_add_ps(lower, _mm512_shuffle_f32x4((__m512)first[i], (__m512)second[i], 0xee));
  };
  auto add_neighbours = [](__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x88), _mm512_shuffle_ps(a, b, 0xdd));
  };
  const __m512 quarters = add_neighbours(add_neighbours(pair(0), pair(1)), add_neighbours(pair(2), pair(3)));
  const __m512 even = _mm512_shuffle_f32x4(quarters, quarters, 0x88);
  const __m512 sums = _mm512_add_ps(even, _mm512_shuffle_f32x4(quarters, quarters, 0xdd));
  _mm_storeu_ps(first_sums, _mm512_castps512_ps128(sums));
  _mm_storeu_ps(second_sums, _mm512_extractf32x4_ps(sums, 1));
#else
  lane_sums(first, first_sums);
  lane_sums(second, second_sums);
#endif
}
float lane_sum(Floats x) {
  Floats alone[4] = {x};
  float sums[4];
  lane_sums(alone, sums);
  return sums[0];
}

Floats exponential(Floats x) {  // relative error 2e-7; NaN stays NaN
  const Floats lowest = splat(-87.0f);
  const Floats highest = splat(88.0f);
  const Floats nearest = splat(0x1.8p23f);
  Floats clamped = x > lowest ? x : lowest;
  clamped = clamped < highest ? clamped : highest;
  const Floats power = clamped * 0x1.715476p0f + nearest;
  const Floats rest = fma(power - nearest, splat(-0x1.62e430p-1f), clamped);
  Floats sum = splat(1.0f / 720.0f);
  for (float factor : {1.0f / 120.0f, 1.0f / 24.0f, 1.0f / 6.0f, 0.5f, 1.0f, 1.0f}) sum = fma(sum, rest, splat(factor));
  return x == x ? (Floats)((Ints)sum + (((Ints)power - (Ints)nearest) << 23)) : x;
}

// Calls f<n>(), for n from 1 to MAX.
template <int MAX, class F>
INLINE void dispatch_count(int64_t n, const F& f) {
  [&]<int... I>(std::integer_sequence<int, I...>) __attribute__((always_inline)) {
    ((n == I + 1 && (f.template operator()<I + 1>(), true)) || ...);
  }(std::make_integer_sequence<int, MAX>());
}

// Calls f(data) with a pointer of the type.
template <class F>
void dispatch(ScalarType type, const void* data, const F& f) {
  if (type == ScalarType::Float) return f(static_cast<const float*>(data));
  if (type == ScalarType::Half) return f(static_cast<const Half*>(data));
  if (type == ScalarType::BFloat16) return f(static_cast<const BFloat16*>(data));
  STD_TORCH_CHECK(false, "weight: neither float32 nor float16 nor bfloat16");
}
}  // namespace
