// x W^T over weights as they lie in memory. Each (row of a weight, token) is one sum along the columns, in one order: the
// bits do not depend on other tokens, on other rows, or on the number of threads.
#pragma once
#include "tile_products.h"

namespace {
constexpr int64_t ROWS = 32;  // rows that are multiplied at a time; of few bits without tiles PANEL are

// The first or the second vector of COLUMNS columns; of bfloat16, even columns and odd ones.
template <bool SECOND, class Number>
Floats half_columns(const Number* from) {
  return widen(from + SECOND * LANES);
}
template <bool SECOND>
Floats half_columns(const BFloat16* from) {
  const Ints pairs = load<Ints>(from);
  return (Floats)(SECOND ? pairs & int32_t(0xffff0000) : pairs << 16);
}

// Adds products of R rows, `row_step` rows from each other, and T tokens to `sums`, [T, ROWS]. Fetches as much of `ahead`.
template <int R, int T, class V, class Number>
__attribute__((noinline)) void multiply_rows(const Number* w, const Number* ahead, int64_t row_stride, int64_t row_step,
                                             const float* x, int64_t columns, Floats* sums) {
  constexpr bool AS_PAIRS = std::is_same_v<V, Ints>;
  Floats tile_sums[R * T];
#pragma GCC unroll 24
  for (int i = 0; i < R * T; i++) tile_sums[i] = sums[i / R * ROWS + i % R * row_step];
  auto half = [&]<bool SECOND>(const Number* w, int64_t row_stride) __attribute__((always_inline)) {
    V weights[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) {
      if constexpr (AS_PAIRS) weights[r] = load<V>(w + r * row_stride);
      else weights[r] = half_columns<SECOND>(w + r * row_stride);
    }
#pragma GCC unroll 8
    for (int t = 0; t < T; t++) {
      V input = load<V>(x + (SECOND * T + t) * LANES);
#pragma GCC unroll 4
      for (int r = 0; r < R; r++) tile_sums[t * R + r] = accumulate(weights[r], input, tile_sums[t * R + r]);
    }
  };
  auto add_columns = [&](const Number* w, int64_t row_stride) __attribute__((always_inline)) {
    half.template operator()<false>(w, row_stride);
    if constexpr (!AS_PAIRS) half.template operator()<true>(w, row_stride);
  };
  for (int64_t k = 0; k < columns / COLUMNS * COLUMNS; k += COLUMNS) {
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) __builtin_prefetch(ahead + r * row_stride * row_step + k, 0, 2);
    add_columns(w + k, row_stride * row_step);
    x += COLUMNS * T / (1 + AS_PAIRS);
  }
  if (const int64_t rest = columns % COLUMNS) {  // memory after the last number may not be mapped
    Number last[R * COLUMNS] = {};
    for (int r = 0; r < R; r++) std::memcpy(last + r * COLUMNS, w + r * row_stride * row_step + columns - rest, rest * sizeof(Number));
    add_columns(last, COLUMNS);
  }
#pragma GCC unroll 24
  for (int i = 0; i < R * T; i++) sums[i / R * ROWS + i % R * row_step] = tile_sums[i];
}

// Products of `n` rows, up to ROWS, and all tokens, [T, ROWS]. Columns are taken in chunks whose inputs fit into the L1 cache. Each
// chunk meets all rows. The rows of a tile are in different pages, which a processor reads faster than one after another.
template <class Number>
void products_of_rows(const Number* w, int64_t row_stride, int64_t n, const Inputs& x, float* out) {
  std::unique_ptr<Floats[]> sums(new Floats[x.tokens * ROWS]());
  const int64_t most_columns = std::max<int64_t>(1024, 6144 / x.tokens);
  const int64_t chunks = (x.columns + most_columns - 1) / most_columns;
  const int64_t width = round_up((x.columns + chunks - 1) / chunks, COLUMNS);
  for (int64_t from = 0; from < x.columns; from += width) {
    const Number* chunk = w + from;
    const Number* next = from + width < x.columns ? chunk + width : w + ROWS * row_stride;
    for (int64_t token_tile = 0; token_tile < x.token_tiles; token_tile++) {
      const int64_t first = x.first_token(token_tile);
      auto multiply_token_tile = [&]<int T, class V>() {
        auto add_rows = [&]<int R>(int64_t r, int64_t row_step) {
          const Number* ahead = r % x.token_tiles == token_tile ? next : chunk;  // each token tile fetches a share of the next chunk
          const int64_t at = first * x.stride + from * T;
          multiply_rows<R, T, V>(chunk + r * row_stride, ahead + r * row_stride, row_stride, row_step,
                                 &x.numbers[x.layout == Layout::pairs ? at / 2 : at], std::min(width, x.columns - from),
                                 &sums[first * ROWS + r]);
        };
        constexpr int R = T <= 2 || std::is_same_v<V, Ints> ? 4 : 2;
        for (int64_t r = 0; r < n / R; r++) add_rows.template operator()<R>(r, n / R);
        for (int64_t r = n / R * R; r < n; r++) add_rows.template operator()<1>(r, 1);
      };
      const int64_t num_tokens = x.first_token(token_tile + 1) - first;
      if constexpr (std::is_same_v<Number, BFloat16>)
        if (x.layout == Layout::pairs) {
          with_count<MOST_TOKENS_IN_PAIRS>(num_tokens, [&]<int T>() { multiply_token_tile.template operator()<T, Ints>(); });
          continue;
        }
      with_count<MOST_TOKENS>(num_tokens, [&]<int T>() { multiply_token_tile.template operator()<T, Floats>(); });
    }
  }
  for (int64_t i = 0; i < x.tokens * ROWS; i += 4) lane_sums(&sums[i], out + i);
}

// Whether a tensor is in CPU memory, in a format that products read.
bool is_read(const Tensor& numbers) {
  const ScalarType type = numbers.scalar_type();
  return numbers.is_cpu() && (type == ScalarType::Float || type == ScalarType::Half || type == ScalarType::BFloat16);
}

// A weight [rows, columns] in one of the formats, with its bias.
struct Weight {
  ScalarType type;  // Byte: few bits
  const void* numbers;
  const Format* format = nullptr;  // of few bits
  int64_t rows;
  int64_t columns;
  int64_t row_stride = 0;  // elements from one row to the next
  ScalarType bias_type = ScalarType::Float;
  const void* bias = nullptr;

  // Of two tensors: the matrix, and a bias or an empty one.
  Weight(const Tensor* tensors, int64_t rows, int64_t columns) : rows(rows), columns(columns) {
    const Tensor& weight = tensors[0];
    const Tensor& added = tensors[1];
    type = weight.scalar_type();
    numbers = weight.const_data_ptr();
    if (type == ScalarType::Byte) {
      STD_TORCH_CHECK(weight.numel() > HEADER && weight.is_cpu(), "weight: empty, or not in the memory of the CPU");
      format = &format_of(*static_cast<const uint8_t*>(numbers));
      STD_TORCH_CHECK(weight.numel() == format->num_bytes(rows, columns) && weight.is_contiguous(), "weight: no matrix of ", rows,
                      " times ", columns, " in few bits");
    } else {
      STD_TORCH_CHECK(weight.dim() == 2 && weight.size(0) == rows && weight.size(1) == columns && weight.stride(1) == 1 && is_read(weight),
                      "weight: no matrix of ", rows, " times ", columns, " in float32, float16 or bfloat16");
      row_stride = weight.stride(0);
    }
    if (added.numel()) {
      STD_TORCH_CHECK(added.numel() == rows && added.is_contiguous() && is_read(added), "bias: not of ", rows, " rows, or in no format of a bias");
      bias = added.const_data_ptr();
      bias_type = added.scalar_type();
    }
  }

  // Rows from `first` on of x W^T + b: `put(token, row, numbers, n)` of n rows. `first` is a multiple of ROWS;
  // `last` is one, too, or the number of rows.
  template <class Put>
  void multiply(int64_t first, int64_t last, const Inputs& x, const Put& put) const {
    auto memory = memory_for(x.tokens);
    const int64_t unit = unit_of(x);
    last = std::min(last, rows);
    for (int64_t at = first; at < last; at += unit) {
      const int64_t n = std::min(unit, last - at);
      products(at, n, x, memory.get());
      for (int64_t t = 0; t < x.tokens; t++) put(t, at, &memory[t * unit], n);
    }
  }

  // Rows that are multiplied at a time.
  int64_t unit_of(const Inputs& x) const { return format && !x.in_tiles() ? PANEL : ROWS; }
  static std::unique_ptr<float[]> memory_for(int64_t tokens) {
    return std::make_unique_for_overwrite<float[]>(round_up(tokens, tiles::ROWS) * ROWS);
  }

  // n rows of x W^T + b from row `at` on, [T, unit]. By tiles, what is beyond the tokens and rows is zeros.
  void products(int64_t at, int64_t n, const Inputs& x, float* to) const {
    const int64_t unit = unit_of(x);
    products_of(at, n, x, to);
    if (!bias) return;
    with_numbers(bias_type, bias, [&](auto* b) {
      for (int64_t t = 0; t < x.tokens; t++)
        for (int64_t r = 0; r < n; r++) to[t * unit + r] += float(b[at + r]);
    });
  }

 private:
  // Products of n rows, [T, ROWS] or, of few bits without tiles, [T, PANEL].
  void products_of(int64_t at, int64_t n, const Inputs& x, float* products) const {
    if (format) {
      const int64_t panel_bytes = format->bytes_before(x.rounded.blocks);
      const auto* panel = static_cast<const uint8_t*>(numbers) + HEADER + at / PANEL * panel_bytes;
      if constexpr (HAS_TILES)
        if (x.in_tiles())
          return with_format(*format, [&]<size_t I>() {
            panel_products_by_tiles<I>(panel, (n + PANEL - 1) / PANEL, panel_bytes, x, products);
          });
      return panel_products(*format, panel, x.rounded, products);
    }
    with_numbers(type, numbers, [&]<class Number>(const Number* w) {
      if constexpr (HAS_TILES && !std::is_same_v<Number, float>)
        if (x.in_tiles()) return products_by_tiles(RowsInPlace<Number>{w + at * row_stride, row_stride, n, columns}, x, products);
      products_of_rows(w + at * row_stride, row_stride, n, x, products);
    });
  }
};

// A root mean square norm.
struct Norm {
  ScalarType type = ScalarType::Float;
  const void* weight = nullptr;  // none: no norm, of an empty tensor
  int64_t size = 0;
  float epsilon = 0.0f;
  float offset = 0.0f;  // the weight is a factor with the offset added

  Norm(const Tensor& from, int64_t size, double epsilon, bool is_centred)
      : size(size), epsilon(epsilon), offset(is_centred) {
    if (!from.numel()) return;
    type = from.scalar_type();
    weight = from.const_data_ptr();
    STD_TORCH_CHECK(from.numel() == size && from.is_contiguous() && is_read(from), "norm: not of ", size, " columns, or in no format of a norm");
  }
  void operator()(const float* x, float* normed) const {
    Floats squares = {};
    int64_t j = 0;
    for (; j + LANES <= size; j += LANES) squares = fma(load<Floats>(x + j), load<Floats>(x + j), squares);
    float sum = lane_sum(squares);
    for (; j < size; j++) sum += x[j] * x[j];
    const float scale = 1.0f / std::sqrt(sum / float(size) + epsilon);
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
