// x W^T with few tokens x, over weights as they lie in memory. Each (row of a weight, token) is one sum along the columns,
// in one order: its bits do not depend on other tokens, on other rows, or on the number of threads.
#pragma once
#include "few_bits.h"

namespace {
constexpr int64_t ROWS = 4;          // of a weight in floating point that are multiplied at a time
constexpr int64_t MOST_TOKENS = 8;   // at a time
constexpr int64_t AHEAD = 8192;      // bytes; the processor's own prefetching ends with each page of 4 KiB

// Two vectors of columns of a weight, as its products take them; of bfloat16, even columns and odd ones.
struct Columns {
  Floats first, second;
};
template <class Number>
Columns columns_of(const Number* from) {
  return {widen(from), widen(from + LANES)};
}
Columns columns_of(const BFloat16* from) {
  Ints both = load<Ints>(from);
  return {(Floats)(both << 16), (Floats)(both & int32_t(0xffff0000))};
}

// Inputs of products with weights of a type, in memory for T * stride floats: [T, stride] with zeros after the columns, in
// the order of `Columns`; for weights in few bits, rounded.
struct Inputs {
  int64_t tokens, columns, stride;
  ScalarType type;
  float* numbers;
  RoundedInputs rounded;

  Inputs(Floats* memory, int64_t tokens, int64_t columns, ScalarType type)
      : tokens(tokens), columns(columns), stride(stride_of(columns)), type(type), numbers(reinterpret_cast<float*>(memory)),
        rounded(memory, tokens, stride / GROUP) {}
  static int64_t stride_of(int64_t columns) { return round_up(columns, GROUP); }

  // `fill(token, to)` writes the numbers of a token; `in_order` is memory for them.
  template <class Fill>
  void put(int64_t t, const Fill& fill, float* in_order) const {
    float *own = numbers + t * stride, *filled = type == ScalarType::Float || type == ScalarType::Half ? own : in_order;
    fill(t, filled);
    std::fill(filled + columns, filled + stride, 0.0f);
    if (type == ScalarType::Byte) return rounded.round(t, filled);
    if (filled == own) return;
    for (int64_t k = 0; k < stride; k += 2 * LANES)
      for (int64_t i = 0; i < LANES; i++) own[k + i] = filled[k + 2 * i], own[k + LANES + i] = filled[k + 2 * i + 1];
  }
};

// Products of R rows and T tokens, [T, ROWS].
template <class Number, int R, int T, bool FETCH>
void tile(const Number* w, int64_t row, const float* x, int64_t stride, int64_t columns, float* out) {
  constexpr int64_t STEP = 2 * LANES;
  Floats sums[(R * T + 3) / 4 * 4] = {};
  auto add = [&](int64_t k, auto of_row) {
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      Columns both = of_row(r);
#pragma GCC unroll 8
      for (int t = 0; t < T; t++) {
        Floats& sum = sums[t * R + r];
        sum = fma(both.first, load<Floats>(x + t * stride + k), sum);
        sum = fma(both.second, load<Floats>(x + t * stride + k + LANES), sum);
      }
    }
  };
  int64_t k = 0;
  for (; k + STEP <= columns; k += STEP) {
    if (FETCH)  // rows that follow each other are one stretch of memory
#pragma GCC unroll 8
      for (int64_t byte = 0; byte < int64_t(R * STEP * sizeof(Number)); byte += 64)
        __builtin_prefetch(reinterpret_cast<const char*>(w + k * R) + byte + AHEAD, 0, 2);
    add(k, [&](int r) { return columns_of(w + r * row + k); });
  }
  if (k < columns)  // what follows the last column may be no memory of this process
    add(k, [&](int r) {
      Number last[STEP] = {};
      std::memcpy(last, w + r * row + k, (columns - k) * sizeof(Number));
      return columns_of(last);
    });
  float lanes[(R * T + 3) / 4 * 4];
#pragma GCC unroll 8
  for (int i = 0; i < R * T; i += 4) lane_sums(sums + i, lanes + i);
#pragma GCC unroll 8
  for (int t = 0; t < T; t++)
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) out[t * ROWS + r] = lanes[t * R + r];
}

// Products of `n` rows, up to ROWS, and all tokens, [T, ROWS].
template <class Number, bool FETCH = true>
void products_of_rows(const Number* w, int64_t row, int64_t n, const Inputs& x, float* out) {
  auto tiles = [&]<int T>(const auto* w, int64_t row, int64_t columns, int64_t first, auto fetch) {
    const float* from = &x.numbers[first * x.stride];
    float* to = out + first * ROWS;
    constexpr int R = T * 4 <= LANES * 3 / 2 ? 4 : T * 2 <= LANES * 3 / 2 ? 2 : 1;  // R * T sums are in registers
    int64_t r = 0;
    for (; r + R <= n; r += R) tile<std::decay_t<decltype(*w)>, R, T, fetch>(w + r * row, row, from, x.stride, columns, to + r);
    for (; r < n; r++) tile<std::decay_t<decltype(*w)>, 1, T, fetch>(w + r * row, row, from, x.stride, columns, to + r);
  };
  auto some = [&](const auto* w, int64_t row, int64_t columns, int64_t first, int64_t tokens, auto fetch) {
    switch (tokens) {
      case 1: return tiles.template operator()<1>(w, row, columns, first, fetch);
      case 2: return tiles.template operator()<2>(w, row, columns, first, fetch);
      case 3: return tiles.template operator()<3>(w, row, columns, first, fetch);
      case 4: return tiles.template operator()<4>(w, row, columns, first, fetch);
      case 5: return tiles.template operator()<5>(w, row, columns, first, fetch);
      case 6: return tiles.template operator()<6>(w, row, columns, first, fetch);
      case 7: return tiles.template operator()<7>(w, row, columns, first, fetch);
      case 8: return tiles.template operator()<8>(w, row, columns, first, fetch);
    }
  };
  if (x.tokens <= MOST_TOKENS) return some(w, row, x.columns, 0, x.tokens, std::true_type());
  // More tokens: the rows are converted once.
  std::unique_ptr<Floats[]> memory = aligned(ROWS * x.stride);
  auto* rows = reinterpret_cast<float*>(memory.get());
  for (int64_t r = 0; r < n; r++) {
    auto put = [&](int64_t k, Columns both) { std::memcpy(&rows[r * x.stride + k], &both, sizeof(Columns)); };
    int64_t k = 0;
    for (; k + 2 * LANES <= x.columns; k += 2 * LANES) {
      __builtin_prefetch(reinterpret_cast<const char*>(w + r * row + k) + AHEAD, 0, 2);
      put(k, columns_of(w + r * row + k));
    }
    if (k == x.columns) continue;
    Number last[2 * LANES] = {};
    std::memcpy(last, w + r * row + k, (x.columns - k) * sizeof(Number));
    put(k, columns_of(last));
  }
  // Tiles of ROWS rows, since the inputs of so many tokens are not in the first cache.
  constexpr int64_t most = LANES * 3 / 2 / ROWS;
  int64_t parts = (x.tokens + most - 1) / most, filled = round_up(x.columns, 2 * LANES);
  for (int64_t part = 0; part < parts; part++) {  // of nearly equal size
    int64_t first = x.tokens * part / parts;
    some(rows, x.stride, filled, first, x.tokens * (part + 1) / parts - first, std::false_type());
  }
}

// A weight [rows, columns] in one of the formats, with its bias.
struct Weight {
  ScalarType type;  // Byte: few bits
  const void* numbers;
  const Format* format = nullptr;  // of few bits
  int64_t rows, columns, row;  // row: elements from one row to the next
  ScalarType bias_type = ScalarType::Float;
  const void* bias = nullptr;

  // The next tensors are the weight's: its numbers, and a bias if there is one.
  Weight(const Tensor*& next, int64_t rows, int64_t columns, bool has_bias) : rows(rows), columns(columns) {
    const Tensor& weight = *next++;
    type = weight.scalar_type(), numbers = weight.const_data_ptr();
    if (type == ScalarType::Byte) {
      format = &format_of(*static_cast<const uint8_t*>(numbers));
      STD_TORCH_CHECK(weight.numel() == format->size(rows, columns) && weight.is_contiguous(), "weight: no matrix of ", rows,
                      " times ", columns, " in few bits");
    } else {
      STD_TORCH_CHECK(weight.dim() == 2 && weight.size(0) == rows && weight.size(1) == columns && weight.stride(1) == 1 &&
                          (type == ScalarType::Float || type == ScalarType::Half || type == ScalarType::BFloat16),
                      "weight: no matrix of ", rows, " times ", columns, " in float32, float16 or bfloat16");
      row = weight.stride(0);
    }
    if (has_bias) {
      const Tensor& added = *next++;
      STD_TORCH_CHECK(added.numel() == rows && added.is_contiguous(), "bias: not of ", rows, " rows");
      bias = added.const_data_ptr(), bias_type = added.scalar_type();
    }
  }

  // Rows from `first` on of x W^T + b: `put(token, row, number)`. Both ends are multiples of BLOCK, or all rows.
  template <class Put>
  void multiply(int64_t first, int64_t last, const Inputs& x, const Put& put) const {
    int64_t unit = format ? BLOCK : ROWS;
    std::unique_ptr<float[]> products(new float[x.tokens * unit]);
    last = std::min(last, rows);
    for (int64_t at = first; at < last; at += unit) {
      int64_t n = std::min(unit, last - at);
      if (format) {
        const int64_t of_block = format->to(x.rounded.groups);
        products_of_block(*format, static_cast<const uint8_t*>(numbers) + HEADER + at / BLOCK * of_block, x.rounded, products.get());
      } else {
        with_numbers(type, numbers, [&](auto* w) { products_of_rows(w + at * row, row, n, x, products.get()); });
      }
      if (bias)
        with_numbers(bias_type, bias, [&](auto* b) {
          for (int64_t t = 0; t < x.tokens; t++)
            for (int64_t r = 0; r < n; r++) products[t * unit + r] += float(b[at + r]);
        });
      for (int64_t t = 0; t < x.tokens; t++)
        for (int64_t r = 0; r < n; r++) put(t, at + r, products[t * unit + r]);
    }
  }
};

// A root mean square norm.
struct Norm {
  ScalarType type = ScalarType::Float;
  const void* weight = nullptr;  // none: no norm
  int64_t size = 0;
  float epsilon = 0.0f, offset = 0.0f;  // the weight is a factor with the offset added

  Norm() = default;
  Norm(const Tensor& from, int64_t size, double epsilon, bool is_centred)
      : type(from.scalar_type()), weight(from.const_data_ptr()), size(size), epsilon(epsilon), offset(is_centred) {
    STD_TORCH_CHECK(from.numel() == size && from.is_contiguous(), "norm: not of ", size, " columns");
  }
  void operator()(const float* x, float* normed) const {
    Floats squares = {};
    int64_t j = 0;
    for (; j + LANES <= size; j += LANES) squares = fma(load<Floats>(x + j), load<Floats>(x + j), squares);
    float sum = lane_sum(squares);
    for (; j < size; j++) sum += x[j] * x[j];
    float scale = 1.0f / std::sqrt(sum / float(size) + epsilon);
    with_numbers(type, weight, [&](auto* factors) {
      for (j = 0; j + LANES <= size; j += LANES) {
        Floats numbers = load<Floats>(x + j) * scale * (widen(factors + j) + offset);
        std::memcpy(normed + j, &numbers, sizeof(Floats));
      }
      for (; j < size; j++) normed[j] = x[j] * scale * (float(factors[j]) + offset);
    });
  }
};
}  // namespace
