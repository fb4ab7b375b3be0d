// Operators of drafts on x86 processors: products by weights in four bits, with the norms, rotations, attention and
// activations of a layer around them. kernels.py builds this file; int4_linear.py and int4_layer.py call it.
#include <optional>

#include "int4_products.h"
#include "int4_rounding.h"

namespace {
constexpr int64_t CHUNK = 128;  // keys that one thread attends to at a time

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

// Attention of one token, [1, heads * d]: joint projection of norm(hidden), rotation by [1, d, d] (of which the diagonal
// and those of rotated halves are read), keys and values into slot 0 of [slots, kv_heads, capacity, d]. `past` [start, 0]
// has as many rows as positions are before the token: TorchScript traces sizes of tensors, and numbers as constants.
Tensor int4_attend(const Tensor& hidden, const Tensor& norm, double epsilon, const Tensor& weight, const Tensor& scales,
                   std::optional<Tensor> bias, std::optional<Tensor> query_norm, std::optional<Tensor> key_norm,
                   const Tensor& rotation, const Tensor& keys, const Tensor& values, const Tensor& past, double scale,
                   int64_t heads) {
  const float* from = matrix(hidden);
  int64_t start = past.size(0), kv_heads = keys.size(1), capacity = keys.size(2), d = keys.size(3);
  int64_t together = heads / kv_heads, outputs = (heads + 2 * kv_heads) * d;
  Weight w(weight, scales, hidden.size(1));
  RMSNorm normed(norm, epsilon);
  auto is_fit = [&](const Tensor& buffer) {
    return buffer.dim() == 4 && buffer.is_contiguous() && buffer.scalar_type() == ScalarType::Float;
  };
  STD_TORCH_CHECK(hidden.size(0) == 1 && normed.size == w.columns && is_fit(keys) && is_fit(values) &&
                      values.numel() == keys.numel() && start < capacity && d % 16 == 0 &&
                      heads % kv_heads == 0 && w.rows >= outputs && rotation.numel() == d * d &&
                      rotation.scalar_type() == ScalarType::Float && rotation.is_contiguous() &&
                      (!bias || (bias->numel() == outputs && bias->is_contiguous())),
                  "hidden, norm, bias, rotation, keys, values: not those of a token");
  std::unique_ptr<float[]> joint(new float[w.rows]), rotated(new float[(heads + kv_heads) * d]);
  w.multiply(1, [&](int64_t, float* computed) { return normed(from, computed); }, joint.get());
  if (bias) with_numbers(*bias, [&](auto* numbers) {
    for (int64_t j = 0; j < outputs; j++) joint[j] += float(numbers[j]);
  });
  auto norm_heads = [&](const std::optional<Tensor>& norm, int64_t first, int64_t number) {
    if (!norm) return;
    RMSNorm of_head(*norm, epsilon);
    STD_TORCH_CHECK(of_head.size == d, "norm: not of ", d, " columns");
    for (float* head = &joint[first * d]; number--; head += d) of_head(head, head);
  };
  norm_heads(query_norm, 0, heads), norm_heads(key_norm, heads, kv_heads);
  auto* turn = static_cast<const float*>(rotation.const_data_ptr());
  for (int64_t j = 0; j < d; j++) {
    int64_t other = (j + d / 2) % d;
    float own = turn[j * d + j], crossed = turn[other * d + j];
    for (int64_t head = 0; head < heads + kv_heads; head++)
      rotated[head * d + j] = joint[head * d + j] * own + joint[head * d + other] * crossed;
  }
  for (int64_t j = 0; j < heads * d; j++) rotated[j] *= float(scale);
  auto* of_keys = static_cast<float*>(keys.mutable_data_ptr());
  auto* of_values = static_cast<float*>(values.mutable_data_ptr());
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
    std::fill_n(to, d, 0.0f);
    for (int64_t i = 0; i < chunks; i++) {
      const Attended& part = of_head[i * together];
      float share = std::exp(part.largest - largest);
      sum += share * part.sum;
      for (int64_t j = 0; j < d; j++) to[j] += share * part.values[j];
    }
    for (int64_t j = 0; j < d; j++) to[j] /= sum;
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
}  // namespace

STABLE_TORCH_LIBRARY(self_speculation, library) {
  library.def("int4_mm(Tensor x, Tensor weight, Tensor scales, Tensor? norm=None, float epsilon=0.) -> Tensor");
  library.def(
      "int4_attend(Tensor hidden, Tensor norm, float epsilon, Tensor weight, Tensor scales, Tensor? bias,"
      " Tensor? query_norm, Tensor? key_norm, Tensor rotation, Tensor(a!) keys, Tensor(b!) values, Tensor past,"
      " float scale, int heads) -> Tensor");
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
