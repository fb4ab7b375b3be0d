// Products of drafts on x86 processors, x W^T with W in four bits and x in eight, with the norms and activations
// between them; and the rounding of W. kernels.py builds this file, int4_linear.py and int4_layer.py call it.
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
#include <cmath>
#include <cstring>
#include <memory>
#include <optional>
#include <tuple>

namespace {
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
constexpr int64_t ROWS = 16, GROUP = 32, BYTES = ROWS * GROUP / 2;
constexpr int64_t CHUNK = 128;  // keys
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
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1)), two = _mm_add_ps(four, _mm_movehl_ps(four, four));
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

struct RMSNorm {
  int64_t size;
  float epsilon;
  std::unique_ptr<float[]> weight;

  RMSNorm(const Tensor& from, double epsilon) : size(from.numel()), epsilon(epsilon), weight(new float[size]) {
    STD_TORCH_CHECK(from.is_contiguous(), "norm: not in one piece");
    with_numbers(from, [&](auto* numbers) { std::copy(numbers, numbers + size, weight.get()); });
  }
  const float* operator()(const float* x, float* normed) const {
    Floats squares = {};
    int64_t j = 0;
    for (; j + LANES <= size; j += LANES) squares += load<Floats>(x + j) * load<Floats>(x + j);
    float sum = lane_sum(squares);
    for (; j < size; j++) sum += x[j] * x[j];
    float scale = 1.0f / std::sqrt(sum / float(size) + epsilon);
    for (j = 0; j < size; j++) normed[j] = x[j] * scale * weight[j];
    return normed;
  }
};

Floats exponential(Floats x) {  // to 2e-7
  const Floats least = splat(-87.0f), most = splat(88.0f), nearest = splat(0x1.8p23f);
  x = x > least ? x : least, x = x < most ? x : most;
  Floats power = x * 0x1.715476p0f + nearest, rest = fma(power - nearest, splat(-0x1.62e430p-1f), x);
  Floats sum = splat(1.0f / 720.0f);
  for (float factor : {1.0f / 120.0f, 1.0f / 24.0f, 1.0f / 6.0f, 0.5f, 1.0f, 1.0f}) sum = fma(sum, rest, splat(factor));
  return (Floats)((Ints)sum + (((Ints)power - (Ints)nearest) << 23));
}

// silu(gates) * ups
void gate(const float* gates, const float* ups, int64_t size, float* gated) {
  for (int64_t j = 0; j < size; j += LANES) {
    Floats g = {}, up = {};
    int64_t bytes = std::min(LANES, size - j) * sizeof(float);
    std::memcpy(&g, gates + j, bytes), std::memcpy(&up, ups + j, bytes);
    g = g / (1.0f + exponential(-g)) * up;
    std::memcpy(gated + j, &g, bytes);
  }
}

Tensor int4_mm(const Tensor& x, const Tensor& weight, const Tensor& scales, std::optional<Tensor> norm, double epsilon) {
  const float* from = matrix(x);
  int64_t tokens = x.size(0);
  Weight w(weight, scales, x.size(1));
  Tensor out = empty({tokens, w.rows}, aoti_torch_dtype_float32());
  auto* to = static_cast<float*>(out.mutable_data_ptr());
  if (norm) {
    RMSNorm normed(*norm, epsilon);
    STD_TORCH_CHECK(normed.size == w.columns, "norm: not of ", w.columns, " columns");
    w.multiply(tokens, [&](int64_t t, float* computed) { return normed(from + t * w.columns, computed); }, to);
  } else {
    w.multiply(tokens, [&](int64_t t, float*) { return from + t * w.columns; }, to);
  }
  return out;
}

// Attention of one head's queries over a chunk of keys, not divided by `sum`.
struct Attended {
  float largest, sum;  // of scores, and of their exponentials relative to it
  float* values;  // [d]
};

// Queries [n, d] over `keys` and `values`, `number` rows of d numbers each.
void attend_to_chunk(const float* queries, int64_t n, int64_t d, const float* keys, const float* values, int64_t number,
                     Attended* attended) {
  alignas(64) float scores[CHUNK];
  for (int64_t head = 0; head < n; head++, attended++) {
    const float* query = queries + head * d;
    attended->largest = -INFINITY, attended->sum = 0.0f;
    for (int64_t key = 0; key < CHUNK; key += 4) {
      Floats sums[4] = {};
      for (int64_t j = 0; key < number && j < d; j += LANES)
        for (int i = 0; i < 4; i++)  // a last key stands in for those behind it
          sums[i] = fma(load<Floats>(query + j), load<Floats>(keys + std::min(key + i, number - 1) * d + j), sums[i]);
      for (int i = 0; i < 4; i++) {
        scores[key + i] = key + i < number ? lane_sum(sums[i]) : -INFINITY;
        attended->largest = std::max(attended->largest, scores[key + i]);
      }
    }
    for (int64_t key = 0; key < number; key += LANES) {
      Floats powers = exponential(load<Floats>(scores + key) - attended->largest);
      std::memcpy(scores + key, &powers, sizeof(Floats));
    }
    for (int64_t key = 0; key < number; key++) attended->sum += scores[key];
    auto add = [&]<int N>(int64_t j) {
      Floats sums[N] = {};
      for (int64_t key = 0; key < number; key++)
        for (int i = 0; i < N; i++)
          sums[i] = fma(splat(scores[key]), load<Floats>(values + key * d + j + i * LANES), sums[i]);
      std::memcpy(attended->values + j, sums, sizeof(sums));
    };
    int64_t j = 0;
    for (; j + 4 * LANES <= d; j += 4 * LANES) add.template operator()<4>(j);
    for (; j < d; j += LANES) add.template operator()<1>(j);
  }
}

// Attention of one token, [1, heads * d]: joint projection of norm(hidden), rotation by [1, d, d] (of which a diagonal
// and one beside it are read), keys and values into slot 0 of [slots, kv_heads, capacity, d]. `past` [start, 0] has as
// many rows as positions are before the token: TorchScript traces sizes of tensors, and numbers only as constants.
Tensor int4_attend(const Tensor& hidden, const Tensor& norm, double epsilon, const Tensor& weight, const Tensor& scales,
                   std::optional<Tensor> bias, const Tensor& rotation, const Tensor& keys, const Tensor& values,
                   const Tensor& past, double scale, int64_t heads) {
  const float* from = matrix(hidden);
  int64_t start = past.size(0), kv_heads = keys.size(1), capacity = keys.size(2), d = keys.size(3), together = heads / kv_heads;
  Weight w(weight, scales, hidden.size(1));
  RMSNorm normed(norm, epsilon);
  auto is_fit = [&](const Tensor& buffer) {
    return buffer.dim() == 4 && buffer.is_contiguous() && buffer.scalar_type() == ScalarType::Float;
  };
  STD_TORCH_CHECK(hidden.size(0) == 1 && normed.size == w.columns && is_fit(keys) && is_fit(values) &&
                      values.numel() == keys.numel() && start < capacity && d % 16 == 0 &&
                      heads % kv_heads == 0 && w.rows >= (heads + 2 * kv_heads) * d && rotation.numel() == d * d &&
                      rotation.scalar_type() == ScalarType::Float && rotation.is_contiguous(),
                  "hidden, norm, rotation, keys, values: not those of a token");
  std::unique_ptr<float[]> joint(new float[w.rows]), rotated(new float[(heads + kv_heads) * d]);
  w.multiply(1, [&](int64_t, float* computed) { return normed(from, computed); }, joint.get());
  if (bias) with_numbers(*bias, [&](auto* numbers) {
    for (int64_t j = 0; j < bias->numel(); j++) joint[j] += float(numbers[j]);
  });
  auto* turn = static_cast<const float*>(rotation.const_data_ptr());
  for (int64_t j = 0; j < d; j++) {
    int64_t other = (j + d / 2) % d;
    float own = turn[j * d + j], crossed = turn[other * d + j];
    for (int64_t head = 0; head < heads + kv_heads; head++)
      rotated[head * d + j] = joint[head * d + j] * own + joint[head * d + other] * crossed;
  }
  for (int64_t j = 0; j < heads * d; j++) rotated[j] *= float(scale);
  auto *of_keys = static_cast<float*>(keys.mutable_data_ptr()), *of_values = static_cast<float*>(values.mutable_data_ptr());
  for (int64_t head = 0; head < kv_heads; head++) {
    std::copy_n(&rotated[(heads + head) * d], d, of_keys + (head * capacity + start) * d);
    std::copy_n(&joint[(heads + kv_heads + head) * d], d, of_values + (head * capacity + start) * d);
  }
  int64_t chunks = start / CHUNK + 1;
  std::unique_ptr<float[]> sums(new float[chunks * heads * d]);
  std::unique_ptr<Attended[]> parts(new Attended[chunks * heads]);
  torch::stable::parallel_for(0, kv_heads * chunks, 1, [&](int64_t first, int64_t last) {
    for (int64_t part = first; part < last; part++) {
      int64_t head = part / chunks, key = part % chunks * CHUNK, at = (head * capacity + key) * d;
      Attended* attended = &parts[part * together];
      for (int64_t i = 0; i < together; i++) attended[i].values = &sums[(part * together + i) * d];
      attend_to_chunk(&rotated[head * together * d], together, d, of_keys + at, of_values + at,
                      std::min(CHUNK, start + 1 - key), attended);
    }
  });
  Tensor out = empty({1, heads * d}, aoti_torch_dtype_float32());
  auto* to = static_cast<float*>(out.mutable_data_ptr());
  for (int64_t head = 0; head < heads; head++, to += d) {
    const Attended* of_head = &parts[head / together * chunks * together + head % together];
    float largest = -INFINITY, sum = 0.0f;
    for (int64_t i = 0; i < chunks; i++) largest = std::max(largest, of_head[i * together].largest);
    for (int64_t i = 0; i < chunks; i++) sum += of_head[i * together].sum * std::exp(of_head[i * together].largest - largest);
    std::fill_n(to, d, 0.0f);
    for (int64_t i = 0; i < chunks; i++) {
      const Attended& part = of_head[i * together];
      float share = std::exp(part.largest - largest) / sum;
      for (int64_t j = 0; j < d; j++) to[j] += share * part.values[j];
    }
  }
  return out;
}

// hidden += x W_out^T, and then hidden += (silu(g) * u) W_down^T with [g u] = norm(hidden) W_joint^T.
void int4_mlp(const Tensor& hidden, const Tensor& x, const Tensor& out, const Tensor& out_scales, const Tensor& norm,
              double epsilon, const Tensor& joint, const Tensor& joint_scales, const Tensor& down,
              const Tensor& down_scales, int64_t width) {
  auto *from = matrix(x), *sums = matrix(hidden);
  auto* to = static_cast<float*>(hidden.mutable_data_ptr());
  int64_t tokens = hidden.size(0), columns = hidden.size(1);
  RMSNorm normed(norm, epsilon);
  Weight w_out(out, out_scales, x.size(1)), w_joint(joint, joint_scales, columns), w_down(down, down_scales, width);
  STD_TORCH_CHECK(x.size(0) == tokens && normed.size == columns && w_out.rows >= columns && w_down.rows >= columns &&
                      w_joint.rows >= 2 * width,
                  "x, norm, weights: not those of a layer with ", columns, " columns");
  std::unique_ptr<float[]> added(new float[tokens * std::max(w_out.rows, w_down.rows)]);
  std::unique_ptr<float[]> gates(new float[tokens * w_joint.rows]);
  auto add = [&](int64_t t, int64_t stride) {
    for (int64_t j = 0; j < columns; j++) to[t * columns + j] += added[t * stride + j];
  };
  w_out.multiply(tokens, [&](int64_t t, float*) { return from + t * w_out.columns; }, added.get());
  w_joint.multiply(tokens, [&](int64_t t, float* computed) {
    add(t, w_out.rows);
    return normed(sums + t * columns, computed);
  }, gates.get());
  w_down.multiply(tokens, [&](int64_t t, float* computed) {
    const float* of_token = gates.get() + t * w_joint.rows;
    gate(of_token, of_token + width, width, computed);
    return computed;
  }, added.get());
  for (int64_t t = 0; t < tokens; t++) add(t, w_down.rows);
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
void round_rows(const Number* numbers, int64_t rows, int64_t columns, const float* counts, uint8_t* weight, uint16_t* scales) {
  int64_t groups = (columns + GROUP - 1) / GROUP;
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
  auto* sums = static_cast<const float*>(counts.const_data_ptr());
  auto* numbers = static_cast<uint16_t*>(scales.mutable_data_ptr());
  with_numbers(from, [&](auto* rows) { round_rows(rows, from.size(0), from.size(1), sums, steps, numbers); });
  return {weight, scales};
}
}  // namespace

STABLE_TORCH_LIBRARY(self_speculation, library) {
  library.def("int4_mm(Tensor x, Tensor weight, Tensor scales, Tensor? norm=None, float epsilon=0.) -> Tensor");
  library.def(
      "int4_attend(Tensor hidden, Tensor norm, float epsilon, Tensor weight, Tensor scales, Tensor? bias, Tensor rotation,"
      " Tensor(a!) keys, Tensor(b!) values, Tensor past, float scale, int heads) -> Tensor");
  library.def(
      "int4_mlp(Tensor(a!) hidden, Tensor x, Tensor out, Tensor out_scales, Tensor norm, float epsilon, Tensor joint,"
      " Tensor joint_scales, Tensor down, Tensor down_scales, int width) -> ()");
  library.def("int4_round(Tensor weight, Tensor counts) -> (Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(self_speculation, CPU, library) {
  library.impl("int4_mm", TORCH_BOX(&int4_mm));
  library.impl("int4_attend", TORCH_BOX(&int4_attend));
  library.impl("int4_mlp", TORCH_BOX(&int4_mlp));
  library.impl("int4_round", TORCH_BOX(&int4_round));
}
