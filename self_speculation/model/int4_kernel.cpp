// Products of drafts on x86 processors, x W^T with W in four bits and x in eight; and the rounding of W.
// kernels.py builds this file, int4_linear.py calls it.
//
// W [N, K] is stored by blocks of 16 rows and groups of 32 columns. Both are padded.
//   weight [N / 16, K / 32, 4, 64] bytes: byte 4 r + j of part i has two steps of row r, from 0 to 15. Column
//     8 i + j is its lower half, column 8 i + 4 + j its upper half.
//   scales [N / 16, K / 32, 2, 16] bfloat16: the size of a step, and the value of step 8.
// Each token's product is the same whichever tokens are beside it, whatever the number of threads.
#include <immintrin.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <memory>
#include <tuple>

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

Tensor int4_mm(const Tensor& x, const Tensor& weight, const Tensor& scales) {
  STD_TORCH_CHECK(x.dim() == 2 && x.scalar_type() == ScalarType::Float && x.is_contiguous(), "x: not a float32 matrix");
  int64_t tokens = x.size(0), columns = x.size(1), groups = (columns + GROUP - 1) / GROUP, num_blocks = weight.size(0);
  STD_TORCH_CHECK(weight.dim() == 4 && weight.size(1) == groups && weight.numel() == num_blocks * groups * BYTES &&
                      scales.numel() == num_blocks * groups * 2 * ROWS && scales.scalar_type() == ScalarType::BFloat16 &&
                      weight.scalar_type() == ScalarType::Byte && weight.is_contiguous() && scales.is_contiguous(),
                  "weight, scales: not those of a matrix with ", columns, " columns");
  Tensor out = empty({tokens, num_blocks * ROWS}, aoti_torch_dtype_float32());
  Inputs inputs(tokens, groups);
  auto* from = static_cast<const float*>(x.const_data_ptr());
  torch::stable::parallel_for(0, tokens, 1 + 16384 / columns, [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; t++) inputs.quantise(from + t * columns, columns, t);
  });
  auto* steps = static_cast<const uint8_t*>(weight.const_data_ptr());
  auto* numbers = static_cast<const uint16_t*>(scales.const_data_ptr());
  auto* to = static_cast<float*>(out.mutable_data_ptr());
  torch::stable::parallel_for(0, num_blocks, 1 + 256 / groups, [&](int64_t first, int64_t last) {
    for (int64_t n = first; n < last; n++) {
      int64_t t = 0;
      auto tile = [&]<int T>() {
        for (; t + T <= tokens; t += T)
          block<T>(steps + n * groups * BYTES, numbers + n * groups * 2 * ROWS, inputs, t,
                   to + t * num_blocks * ROWS + n * ROWS, num_blocks * ROWS);
      };
      if constexpr (MOST_TOKENS == 8) tile.template operator()<8>();
      tile.template operator()<4>(), tile.template operator()<2>(), tile.template operator()<1>();
    }
  });
  return out;
}
// Rounds one group of `LANES` rows as `in_four_bits` of int4_linear.py does: elements [32, LANES], counts [32].
void round_group(const Floats* elements, const float* counts, uint8_t* weight, uint16_t* scales) {
  Floats least = elements[0], largest = elements[0], mean = {};
  for (int j = 0; j < GROUP; j++) {
    least = elements[j] < least ? elements[j] : least, largest = elements[j] > largest ? elements[j] : largest;
    mean += elements[j] * counts[j];
  }
  auto rounded = [](Floats x) {  // to bfloat16
    Ints bits = (Ints)x;
    return (Floats)((bits + 0x7fff + ((bits >> 16) & 1)) & ~0xffff);
  };
  auto step = [](Floats element, Floats per_scale, Floats middle) {
    const Floats lowest = splat(-8.0f), highest = splat(7.0f), nearest = splat(0x1.8p23f);
    Floats steps = (element - middle) * per_scale;
    steps = steps > lowest ? steps : lowest, steps = steps < highest ? steps : highest;
    return steps + nearest - nearest;
  };
  const Floats smallest = splat(1e-12f);
  Floats best_error = splat(INFINITY), best_scale = smallest, best_middle = {};
  for (float share : {1.0f, 0.9f, 0.8f}) {
    Floats scale = (largest - least) * share / 15.0f, middle = (least + largest + scale) / 2.0f;
    for (int fit = 0; fit < 2; fit++) {
      scale = rounded(scale > smallest ? scale : smallest), middle = rounded(middle);
      Floats mean_step = {}, square = {}, product = {}, per_scale = 1.0f / scale;
      for (int j = 0; j < GROUP; j++) {
        Floats steps = step(elements[j], per_scale, middle), weighted = steps * counts[j];
        mean_step += weighted, square += weighted * steps, product += weighted * elements[j];
      }
      Floats error = scale * (scale * square + 2.0f * (middle * mean_step - product)) + middle * (middle - 2.0f * mean);
      Ints better = error < best_error;
      best_error = better ? error : best_error;
      best_scale = better ? scale : best_scale, best_middle = better ? middle : best_middle;
      Floats variance = square - mean_step * mean_step;
      scale = (product - mean_step * mean) / (variance > smallest ? variance : smallest);
      middle = mean - scale * mean_step;
    }
  }
  for (int j = 0; j < GROUP; j++) {
    Ints steps = __builtin_convertvector(step(elements[j], 1.0f / best_scale, best_middle), Ints) + 8;
    for (int64_t row = 0; row < LANES; row++) weight[j / 8 * 64 + row * 4 + j % 4] |= steps[row] << (j & 4);
  }
  for (int64_t row = 0; row < LANES; row++) {
    scales[row] = ((Ints)best_scale)[row] >> 16, scales[ROWS + row] = ((Ints)best_middle)[row] >> 16;
  }
}

template <class Number>
void round_rows(const Tensor& from, const float* counts, uint8_t* weight, uint16_t* scales) {
  int64_t rows = from.size(0), columns = from.size(1), groups = (columns + GROUP - 1) / GROUP;
  auto* numbers = static_cast<const Number*>(from.const_data_ptr());
  for (int64_t first = 0; first < (rows + ROWS - 1) / ROWS * ROWS; first += LANES) {
    for (int64_t g = 0; g < groups; g++) {
      alignas(64) float elements[GROUP][LANES] = {};
      int64_t width = std::min(GROUP, columns - g * GROUP);
      for (int64_t row = 0; row < std::min(LANES, rows - first); row++)
        for (int64_t j = 0; j < width; j++)
          elements[j][row] = float(numbers[(first + row) * columns + g * GROUP + j]);
      int64_t at = first / ROWS * groups + g, lane = first % ROWS;
      round_group(reinterpret_cast<Floats*>(elements), counts + g * GROUP, weight + at * BYTES + lane * 4,
                  scales + at * 2 * ROWS + lane);
    }
  }
}

// On the caller's thread: int4_linear.py rounds several weights at a time.
std::tuple<Tensor, Tensor> int4_round(const Tensor& from, const Tensor& counts) {
  STD_TORCH_CHECK(from.dim() == 2 && from.is_contiguous(), "weight: not a matrix in one piece");
  int64_t num_blocks = (from.size(0) + ROWS - 1) / ROWS, groups = (from.size(1) + GROUP - 1) / GROUP;
  STD_TORCH_CHECK(counts.scalar_type() == ScalarType::Float && counts.is_contiguous() && counts.numel() == groups * GROUP,
                  "counts: not one float32 for each column");
  Tensor weight = empty({num_blocks, groups, 4, 64}, aoti_torch_dtype_uint8());
  Tensor scales = empty({num_blocks, groups, 2, ROWS}, aoti_torch_dtype_bfloat16());
  auto* steps = static_cast<uint8_t*>(weight.mutable_data_ptr());
  std::fill_n(steps, weight.numel(), 0);
  auto round = from.scalar_type() == ScalarType::Float      ? round_rows<float>
               : from.scalar_type() == ScalarType::Half     ? round_rows<torch::headeronly::Half>
               : from.scalar_type() == ScalarType::BFloat16 ? round_rows<torch::headeronly::BFloat16>
                                                            : nullptr;
  STD_TORCH_CHECK(round != nullptr, "weight: neither float32 nor float16 nor bfloat16");
  round(from, static_cast<const float*>(counts.const_data_ptr()), steps, static_cast<uint16_t*>(scales.mutable_data_ptr()));
  return {weight, scales};
}
}  // namespace

STABLE_TORCH_LIBRARY(self_speculation, library) {
  library.def("int4_mm(Tensor x, Tensor weight, Tensor scales) -> Tensor");
  library.def("int4_round(Tensor weight, Tensor counts) -> (Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(self_speculation, CPU, library) {
  library.impl("int4_mm", TORCH_BOX(&int4_mm));
  library.impl("int4_round", TORCH_BOX(&int4_round));
}
