// Vectors of numbers, and what the instructions of a processor do with them. Code without intrinsics is plain
// C++, which compiles for any processor.
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

// Tests define WIDE, PAIRS or TILES. They run this code on processors without such instructions.
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
// Memory for so many floats, aligned so that no vector crosses a line of the cache.
std::unique_ptr<Floats[]> aligned(int64_t number) {
  return std::unique_ptr<Floats[]>(new Floats[(number + LANES - 1) / LANES]);
}
int64_t round_up(int64_t number, int64_t unit) { return (number + unit - 1) / unit * unit; }

// LANES numbers in the format of a weight or a norm.
Floats widen(const float* from) { return load<Floats>(from); }
Floats widen(const BFloat16* from) { return (Floats)(__builtin_convertvector(load<Shorts>(from), Ints) << 16); }
// LANES numbers rounded to nearest even; subnormal numbers stay. NaN is quiet.
Shorts to_bfloat16_bits(Floats x) {
  const Ints bits = (Ints)x;
  const Ints rounded = x == x ? bits + 0x7fff + (bits >> 16 & 1) : bits | 0x400000;
  return __builtin_convertvector(rounded >> 16, Shorts);
}
#ifdef __AVX512VNNI__
constexpr bool TAKES_EIGHT_BITS = true;  // `dot` takes quants above 127
Floats widen(const Half* from) { return _mm512_cvtph_ps(load<__m256i>(from)); }
Shorts to_half_bits(Floats x) { return (Shorts)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
Floats widen(const int8_t* from) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load<__m128i>(from))); }
Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
// Adds four quants times four inputs, in each lane. `total` follows up to 8 calls for quants of 4 bits, 4 calls for 5 bits and
// 2 calls for 6 bits.
Ints dot(Ints sums, Bytes quants, int32_t x) {
  return (Ints)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)quants, _mm512_set1_epi32(x));
}
Ints total(Ints sums) { return sums; }
float max_lane(Floats x) { return _mm512_reduce_max_ps((__m512)x); }
__m256 sum_of_halves(Floats x) { return _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1)); }
#elif defined(__AVX2__)
constexpr bool TAKES_EIGHT_BITS = false;
Floats widen(const Half* from) { return _mm256_cvtph_ps(load<__m128i>(from)); }
Shorts to_half_bits(Floats x) { return (Shorts)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT); }
Floats widen(const int8_t* from) { return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)from))); }
Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
// Two sums of 16 bits for each lane, of 16 products of 15 * 127, 8 of 31 * 127, or 4 of 63 * 127.
Ints dot(Ints sums, Bytes quants, int32_t x) {
  return (Ints)_mm256_add_epi16((__m256i)sums, _mm256_maddubs_epi16((__m256i)quants, _mm256_set1_epi32(x)));
}
Ints total(Ints sums) { return (Ints)_mm256_madd_epi16((__m256i)sums, _mm256_set1_epi16(1)); }
__m256 sum_of_halves(Floats x) { return x; }
#else
constexpr bool TAKES_EIGHT_BITS = false;
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
Ints dot(Ints sums, Bytes quants, int32_t x) {
#ifdef __ARM_FEATURE_DOTPROD
  int32x4_t quarters[LANES / 4];
  std::memcpy(quarters, &sums, sizeof(quarters));
  for (int64_t i = 0; i < LANES / 4; i++)
    quarters[i] = vdotq_s32(quarters[i], load<int8x16_t>((char*)&quants + 16 * i), vreinterpretq_s8_s32(vdupq_n_s32(x)));
  return load<Ints>(quarters);
#else
  for (int j = 0; j < 4; j++) sums += ((Ints)quants >> 8 * j & 255) * int32_t(int8_t(x >> 8 * j));
  return sums;
#endif
}
Ints total(Ints sums) { return sums; }
#endif

// Keeps additions to `sum` in program order. GCC would add in trees, which need more registers than there are.
INLINE void keep_order(Ints& sum) {
#ifdef __AVX2__
  asm("" : "+v"(sum));
#endif
}

// As `fma`, of registers: with operands in memory GCC moves sums there, too.
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
// Adds, in each lane, products of two numbers in bfloat16, the upper ones first. Each of the two sums is rounded to nearest even,
// and subnormal numbers are zeros.
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

// Numbers in bfloat16, rounded to nearest even: the lower half has `first`, the upper half has `second`. As pairs, the lower
// half of each lane has a number of `first`, the upper half one of `second`.
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
  uint16_t numbers[2 * LANES];
  for (int64_t i = 0; i < 2 * LANES; i++) numbers[i] = uint16_t(uint32_t(halves[i / LANES][i % LANES]) >> 16);
  return load<Ints>(numbers);
}
#endif

// Whether a lane is not 0.
bool any(Ints x) {
#ifdef __AVX512F__
  return _mm512_test_epi32_mask((__m512i)x, (__m512i)x);
#else
  bool is = false;
  for (int64_t i = 0; i < LANES; i++) is |= x[i] != 0;
  return is;
#endif
}

// Numbers as the sum of two numbers in bfloat16, in the order of `to_bfloat16`. The sum lacks 2^-17 of a number.
struct Split {
  Ints upper;
  Ints rest;

  Split(Floats first, Floats second) : upper(to_bfloat16(first, second)) {
    BFloat16 numbers[2 * LANES];
    std::memcpy(numbers, &upper, sizeof(upper));
    rest = to_bfloat16(first - widen(numbers), second - widen(numbers + LANES));
  }
};

#ifndef __AVX512VNNI__
float max_lane(Floats x) {  // of numbers, without NaN
  float most = x[0];
  for (int64_t i = 1; i < LANES; i++) most = std::max(most, x[i]);
  return most;
}
#endif

// Transposes [LANES, LANES].
#ifdef __AVX512F__
INLINE void transpose(Ints* rows) {
  __m512i r[16], s[16];
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
      const int32_t kept = rows[i][j];
      rows[i][j] = rows[j][i];
      rows[j][i] = kept;
    }
}
#endif

// The first n numbers, then zeros: memory after the last number may not be mapped.
template <class Number>
Floats widen(const Number* from, int64_t n) {
  if (n == LANES) return widen(from);
  Number padded[LANES] = {};
  std::memcpy(padded, from, n * sizeof(Number));
  return widen(padded);
}
// The first n numbers, rounded.
void narrow(Floats numbers, float* to, int64_t n) { std::memcpy(to, &numbers, n * sizeof(float)); }
void narrow(Floats numbers, BFloat16* to, int64_t n) {
  const Shorts bits = to_bfloat16_bits(numbers);
  std::memcpy(to, &bits, n * sizeof(bits[0]));
}
// Infinities and numbers beyond float16's range become a NaN that arithmetic never gives.
void narrow(Floats numbers, Half* to, int64_t n) {
  Shorts bits = to_half_bits(numbers);
  bits |= (Shorts)((bits & 0x7fff) == 0x7c00) & 0x7fff;
  std::memcpy(to, &bits, n * sizeof(bits[0]));
}
void store(Floats numbers, float* to, int64_t n) {
  if (n == LANES) std::memcpy(to, &numbers, sizeof(numbers));
  else std::memcpy(to, &numbers, n * sizeof(float));
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
float lane_sum(Floats x) {
  Floats alone[4] = {x};
  float sums[4];
  lane_sums(alone, sums);
  return sums[0];
}

Floats exponential(Floats x) {  // to 2e-7; NaN stays NaN
  const Floats least = splat(-87.0f);
  const Floats most = splat(88.0f);
  const Floats nearest = splat(0x1.8p23f);
  Floats within = x > least ? x : least;
  within = within < most ? within : most;
  const Floats power = within * 0x1.715476p0f + nearest;
  const Floats rest = fma(power - nearest, splat(-0x1.62e430p-1f), within);
  Floats sum = splat(1.0f / 720.0f);
  for (float factor : {1.0f / 120.0f, 1.0f / 24.0f, 1.0f / 6.0f, 0.5f, 1.0f, 1.0f}) sum = fma(sum, rest, splat(factor));
  return x == x ? (Floats)((Ints)sum + (((Ints)power - (Ints)nearest) << 23)) : x;
}

// Calls f<n>(), for n from 1 to MOST.
template <int MOST, class F>
INLINE void with_count(int64_t n, const F& f) {
  [&]<int... I>(std::integer_sequence<int, I...>) __attribute__((always_inline)) {
    ((n == I + 1 && (f.template operator()<I + 1>(), true)) || ...);
  }(std::make_integer_sequence<int, MOST>());
}

// Calls f with the numbers of a tensor.
template <class F>
void with_numbers(ScalarType type, const void* numbers, const F& f) {
  if (type == ScalarType::Float) return f(static_cast<const float*>(numbers));
  if (type == ScalarType::Half) return f(static_cast<const Half*>(numbers));
  if (type == ScalarType::BFloat16) return f(static_cast<const BFloat16*>(numbers));
  STD_TORCH_CHECK(false, "weight: neither float32 nor float16 nor bfloat16");
}
}  // namespace
