// x W^T on x86 processors with W in four bits and x in eight.
//
// W [N, K] is stored by blocks of 16 rows and groups of 32 columns. Both are padded.
//   weight [N / 16, K / 32, 4, 64] bytes: byte 4 r + j of part i has two steps of row r, from 0 to 15. Column
//     8 i + j is its lower half, column 8 i + 4 + j its upper half.
//   scales [N / 16, K / 32, 2, 16] bfloat16: the size of a step, and the value of step 8.
// Each token's product is the same whichever tokens are beside it, whatever the number of threads.
#pragma once
#include <immintrin.h>
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

namespace {
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
constexpr int64_t ROWS = 16, GROUP = 32, BYTES = ROWS * GROUP / 2;
constexpr int64_t AHEAD = 16;  // groups; the processor's own prefetching ends with each page of 4 KiB

#ifdef __AVX512VNNI__
#define VECTOR __attribute__((vector_size(64)))
constexpr int MOST_TOKENS = 8;
#else
#define VECTOR __attribute__((vector_size(32)))
constexpr int MOST_TOKENS = 4;
#endif
// Each lane is a row: four steps of it, or a number.
typedef uint8_t Steps VECTOR;
typedef int32_t Ints VECTOR;
typedef float Floats VECTOR;
constexpr int64_t LANES = sizeof(Floats) / 4;

template <class V>
V load(const void* from) {
  V to;
  std::memcpy(&to, from, sizeof(V));
  return to;
}
Floats splat(float x) { return x - Floats{}; }

#ifdef __AVX512VNNI__
Ints dot(Ints sums, Steps steps, int32_t x) {
  return (Ints)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)steps, _mm512_set1_epi32(x));
}
Ints total(Ints sums) { return sums; }
Floats widen(const uint16_t* bfloat16s) {
  return (Floats)((Ints)_mm512_cvtepu16_epi32(load<__m256i>(bfloat16s)) << 16);
}
Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
float lane_sum(Floats x) { return _mm512_reduce_add_ps(x); }
#else
// Two sums of 16 bits for each row: those of a group are at most 16 * 15 * 127.
Ints dot(Ints sums, Steps steps, int32_t x) {
  return (Ints)_mm256_add_epi16((__m256i)sums, _mm256_maddubs_epi16((__m256i)steps, _mm256_set1_epi32(x)));
}
Floats widen(const uint16_t* bfloat16s) {
  return (Floats)((Ints)_mm256_cvtepu16_epi32(load<__m128i>(bfloat16s)) << 16);
}
Ints total(Ints sums) { return (Ints)_mm256_madd_epi16((__m256i)sums, _mm256_set1_epi16(1)); }
Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
float lane_sum(Floats x) {
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
#endif

// Tokens in eight bits, by groups of 32 columns.
struct Inputs {
  int64_t groups;
  std::unique_ptr<int8_t[]> steps;  // [T, groups, 32] from -127 to 127
  std::unique_ptr<float[]> sizes, sums;  // [T, groups] the size of a step, and the sum of the group

  Inputs(int64_t tokens, int64_t groups)
      : groups(groups), steps(new int8_t[tokens * groups * GROUP]), sizes(new float[tokens * groups]),
        sums(new float[tokens * groups]) {}

  // An infinity makes steps of 0 and a size of infinity, whose product is NaN. NaN makes a size of NaN.
  void quantise(const float* x, int64_t columns, int64_t token) {
    float last[GROUP] = {};
    std::copy(x + columns / GROUP * GROUP, x + columns, last);
    for (int64_t g = 0, at = token * groups; g < groups; g++, at++) {
      const float* values = (g + 1) * GROUP <= columns ? x + g * GROUP : last;
      int32_t largest = 0, sum = 0;  // absolute values are in the order of their bits, NaN last
      for (int j = 0; j < GROUP; j++) largest = std::max(largest, std::bit_cast<int32_t>(values[j]) & 0x7fffffff);
      float range = std::bit_cast<float>(largest), per_step = range > 1e-30f ? 127.0f / range : 0.0f;
      int8_t* of_group = steps.get() + at * GROUP;
      for (int j = 0; j < GROUP; j++) {
        constexpr float nearest = 0x1.8p23f;  // a sum with it has no fraction
        int32_t step = std::bit_cast<int32_t>(values[j] * per_step + nearest) - std::bit_cast<int32_t>(nearest);
        sum += of_group[j] = int8_t(step);
      }
      sizes[at] = range / 127.0f, sums[at] = sizes[at] * float(sum);
    }
  }
};

// 16 outputs of T tokens.
template <int T>
void block(const uint8_t* weight, const uint16_t* scales, const Inputs& x, int64_t token, float* out, int64_t stride) {
  for (int64_t row = 0; row < ROWS; row += LANES) {
    Floats outputs[T] = {};
    for (int64_t g = 0; g < x.groups; g++) {
      Ints sums[T] = {};
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) {
        __builtin_prefetch(weight + (g + AHEAD) * BYTES + i * 64);
        Steps steps = load<Steps>(weight + g * BYTES + i * 64 + row * 4), lower = steps & 15, upper = steps >> 4;
#pragma GCC unroll 8
        for (int t = 0; t < T; t++) {
          const int8_t* columns = x.steps.get() + ((token + t) * x.groups + g) * GROUP + i * 8;
          sums[t] = dot(dot(sums[t], lower, load<int32_t>(columns)), upper, load<int32_t>(columns + 4));
        }
      }
      __builtin_prefetch(scales + (g + AHEAD) * 2 * ROWS);
      const uint16_t* of_group = scales + g * 2 * ROWS + row;
      Floats size = widen(of_group), zero = fma(size, splat(-8.0f), widen(of_group + ROWS));
#pragma GCC unroll 8
      for (int t = 0; t < T; t++) {
        int64_t at = (token + t) * x.groups + g;
        outputs[t] = fma(zero, splat(x.sums[at]), outputs[t]);
        outputs[t] = fma(__builtin_convertvector(total(sums[t]), Floats) * size, splat(x.sizes[at]), outputs[t]);
      }
    }
    for (int t = 0; t < T; t++) std::memcpy(out + t * stride + row, &outputs[t], sizeof(Floats));
  }
}

Tensor empty(std::initializer_list<int64_t> shape, int32_t dtype) {
  int64_t strides[4] = {1, 1, 1, 1}, n = shape.size();
  for (int64_t i = n - 1; i > 0; i--) strides[i - 1] = strides[i] * shape.begin()[i];
  AtenTensorHandle made;  // not by `torch::stable::empty`, which takes longer than a small product
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(n, shape.begin(), strides, dtype, aoti_torch_device_type_cpu(), 0, &made));
  return Tensor(made);
}

struct Weight {
  const uint8_t* steps;
  const uint16_t* scales;
  int64_t columns, groups, blocks, rows;  // rows with padding

  Weight(const Tensor& weight, const Tensor& numbers, int64_t columns)
      : columns(columns), groups((columns + GROUP - 1) / GROUP), blocks(weight.size(0)), rows(blocks * ROWS) {
    STD_TORCH_CHECK(weight.dim() == 4 && weight.size(1) == groups && weight.numel() == blocks * groups * BYTES &&
                        numbers.numel() == blocks * groups * 2 * ROWS && numbers.scalar_type() == ScalarType::BFloat16 &&
                        weight.scalar_type() == ScalarType::Byte && weight.is_contiguous() && numbers.is_contiguous(),
                    "weight, scales: not those of a matrix with ", columns, " columns");
    steps = static_cast<const uint8_t*>(weight.const_data_ptr());
    scales = static_cast<const uint16_t*>(numbers.const_data_ptr());
  }

  // out [T, rows]; `row` gives the inputs of a token, computed in the memory that it gets, or where they are.
  template <class Row>
  void multiply(int64_t tokens, const Row& row, float* out) const {
    Inputs inputs(tokens, groups);
    torch::stable::parallel_for(0, tokens, 1 + 16384 / columns, [&](int64_t first, int64_t last) {
      std::unique_ptr<float[]> computed(new float[columns]);
      for (int64_t t = first; t < last; t++) inputs.quantise(row(t, computed.get()), columns, t);
    });
    torch::stable::parallel_for(0, blocks, 1 + 256 / groups, [&](int64_t first, int64_t last) {
      for (int64_t n = first; n < last; n++) {
        int64_t t = 0;
        auto tile = [&]<int T>() {
          for (; t + T <= tokens; t += T)
            block<T>(steps + n * groups * BYTES, scales + n * groups * 2 * ROWS, inputs, t, out + t * rows + n * ROWS, rows);
        };
        if constexpr (MOST_TOKENS == 8) tile.template operator()<8>();
        tile.template operator()<4>(), tile.template operator()<2>(), tile.template operator()<1>();
      }
    });
  }
};

// Calls f with the numbers of a tensor.
template <class F>
void with_numbers(const Tensor& from, const F& f) {
  const void* numbers = from.const_data_ptr();
  if (from.scalar_type() == ScalarType::Float) return f(static_cast<const float*>(numbers));
  if (from.scalar_type() == ScalarType::Half) return f(static_cast<const torch::headeronly::Half*>(numbers));
  if (from.scalar_type() == ScalarType::BFloat16) return f(static_cast<const torch::headeronly::BFloat16*>(numbers));
  STD_TORCH_CHECK(false, "weight: neither float32 nor float16 nor bfloat16");
}

const float* matrix(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 2 && x.scalar_type() == ScalarType::Float && x.is_contiguous(), "x: not a float32 matrix");
  return static_cast<const float*>(x.const_data_ptr());
}
}  // namespace
