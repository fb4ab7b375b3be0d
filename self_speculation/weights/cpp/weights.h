// x W^T over weights as they lie in memory. Each (row of a weight, token) is one sum along the columns, in one order: its
// bits do not depend on other tokens, on other rows, or on the number of threads.
#pragma once
#include "few_bits.h"

namespace {
constexpr int64_t ROWS = 32;                          // of a weight in floating point that are multiplied at a time
constexpr int64_t MOST_TOKENS = LANES == 16 ? 8 : 6;  // at a time: twice as many sums are in registers
constexpr int64_t MOST_OF_PAIRS = 6;                  // the same of tokens in bfloat16, with four rows
constexpr int64_t COLUMNS = 2 * LANES;                // at a time

// The first or the second vector of COLUMNS columns; of bfloat16, even columns and odd ones.
template <bool SECOND, class Number>
Floats columns_of(const Number* from) {
  return widen(from + SECOND * LANES);
}
template <bool SECOND>
Floats columns_of(const BFloat16* from) {
  Ints both = load<Ints>(from);
  return (Floats)(SECOND ? both & int32_t(0xffff0000) : both << 16);
}

// Inputs of products with weights of a type, in memory for T * stride floats, with zeros after the columns: by parts of up
// to MOST_TOKENS tokens, [stride / LANES, tokens of the part, LANES] in the order of `columns_of`; for weights in few
// bits, rounded. As pairs, for weights in bfloat16, they are in bfloat16 and in the order of columns: [stride / COLUMNS, tokens
// of the part, COLUMNS].
struct Inputs {
  int64_t tokens, columns, stride;
  ScalarType type;
  bool as_pairs;
  int64_t parts;
  float* numbers;
  RoundedInputs rounded;

  Inputs(Floats* memory, int64_t tokens, int64_t columns, ScalarType type, bool in_bfloat16 = false)
      : tokens(tokens), columns(columns), stride(stride_of(columns)), type(type),
        as_pairs(in_bfloat16 && type == ScalarType::BFloat16),
        parts((tokens - 1) / (as_pairs ? MOST_OF_PAIRS : MOST_TOKENS) + 1), numbers(reinterpret_cast<float*>(memory)),
        rounded(memory, tokens, stride / GROUP) {}
  static int64_t stride_of(int64_t columns) { return round_up(columns, GROUP); }
  int64_t first_of(int64_t part) const { return tokens * part / parts; }  // of nearly equal size

  // `fill(token, to)` writes the numbers of a token; `in_order` is memory for them.
  template <class Fill>
  void put(int64_t t, const Fill& fill, float* in_order) const {
    fill(t, in_order);
    std::fill(in_order + columns, in_order + stride, 0.0f);
    if (type == ScalarType::Byte) return rounded.round(t, in_order);
    int64_t part = ((t + 1) * parts - 1) / tokens, first = first_of(part), n = first_of(part + 1) - first;
    if (as_pairs) {
      auto* to = reinterpret_cast<BFloat16*>(numbers) + first * stride + (t - first) * COLUMNS;
      for (int64_t k = 0; k < stride; k += COLUMNS)
        for (int64_t i = 0; i < COLUMNS; i++) to[k * n + i] = BFloat16(in_order[k + i]);
      return;
    }
    int64_t apart = type == ScalarType::BFloat16 ? 2 : 1, second = apart == 2 ? 1 : LANES;
    for (int64_t k = 0; k < stride; k += COLUMNS)
      for (int64_t i = 0; i < LANES; i++) {
        float* to = numbers + first * stride + k * n + (t - first) * LANES + i;
        to[0] = in_order[k + apart * i], to[n * LANES] = in_order[k + apart * i + second];
      }
  }
};

// Adds products of R rows, `apart` rows from each other, and T tokens to `sums`, [T, ROWS]. Fetches the same of `ahead`.
template <int R, int T, class V, class Number>
__attribute__((noinline)) void tile(const Number* w, const Number* ahead, int64_t row, int64_t apart, const float* x,
                                    int64_t columns, Floats* sums) {
  constexpr bool AS_PAIRS = std::is_same_v<V, Ints>;
  Floats own[R * T];
#pragma GCC unroll 24
  for (int i = 0; i < R * T; i++) own[i] = sums[i / R * ROWS + i % R * apart];
  auto half = [&]<bool SECOND>(const Number* w, int64_t row) __attribute__((always_inline)) {
    V of_rows[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) {
      if constexpr (AS_PAIRS) of_rows[r] = load<V>(w + r * row);
      else of_rows[r] = columns_of<SECOND>(w + r * row);
    }
#pragma GCC unroll 8
    for (int t = 0; t < T; t++) {
      V input = load<V>(x + (SECOND * T + t) * LANES);
#pragma GCC unroll 4
      for (int r = 0; r < R; r++) own[t * R + r] = accumulate(of_rows[r], input, own[t * R + r]);
    }
  };
  auto both = [&](const Number* w, int64_t row) __attribute__((always_inline)) {
    half.template operator()<false>(w, row);
    if constexpr (!AS_PAIRS) half.template operator()<true>(w, row);
  };
  for (int64_t k = 0; k < columns / COLUMNS * COLUMNS; k += COLUMNS, x += COLUMNS * T / (1 + AS_PAIRS)) {
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) __builtin_prefetch(ahead + r * row * apart + k, 0, 2);
    both(w + k, row * apart);
  }
  if (int64_t rest = columns % COLUMNS) {  // what follows the last column may be no memory of this process
    Number last[R * COLUMNS] = {};
    for (int r = 0; r < R; r++) std::memcpy(last + r * COLUMNS, w + r * row * apart + columns - rest, rest * sizeof(Number));
    both(last, COLUMNS);
  }
#pragma GCC unroll 24
  for (int i = 0; i < R * T; i++) sums[i / R * ROWS + i % R * apart] = own[i];
}

// Products of `n` rows, up to ROWS, and all tokens, [T, ROWS]. Inputs of as many columns as the first cache holds are
// multiplied by all rows. The rows of a tile are in different pages, which a processor reads faster than one after another.
template <class Number>
void products_of_rows(const Number* w, int64_t row, int64_t n, const Inputs& x, float* out) {
  std::unique_ptr<Floats[]> sums(new Floats[x.tokens * ROWS]());
  int64_t most = std::max<int64_t>(1024, 6144 / x.tokens), blocks = (x.columns + most - 1) / most;
  int64_t width = round_up((x.columns + blocks - 1) / blocks, COLUMNS);
  for (int64_t from = 0; from < x.columns; from += width) {
    const Number *own = w + from, *next = from + width < x.columns ? own + width : w + ROWS * row;
    for (int64_t part = 0; part < x.parts; part++) {
      int64_t first = x.first_of(part);
      auto tiles = [&]<int T, class V>() {
        auto some = [&]<int R>(int64_t r, int64_t apart) {
          const Number* ahead = r % x.parts == part ? next : own;  // each part fetches some of the next
          const int64_t at = first * x.stride + from * T;
          tile<R, T, V>(own + r * row, ahead + r * row, row, apart, &x.numbers[x.as_pairs ? at / 2 : at],
                        std::min(width, x.columns - from), &sums[first * ROWS + r]);
        };
        constexpr int R = T <= 2 || std::is_same_v<V, Ints> ? 4 : 2;
        for (int64_t r = 0; r < n / R; r++) some.template operator()<R>(r, n / R);
        for (int64_t r = n / R * R; r < n; r++) some.template operator()<1>(r, 1);
      };
      const int64_t number = x.first_of(part + 1) - first;
      if constexpr (std::is_same_v<Number, BFloat16>)
        if (x.as_pairs) {
          with_count<MOST_OF_PAIRS>(number, [&]<int T>() { tiles.template operator()<T, Ints>(); });
          continue;
        }
      with_count<MOST_TOKENS>(number, [&]<int T>() { tiles.template operator()<T, Floats>(); });
    }
  }
  for (int64_t i = 0; i < x.tokens * ROWS; i += 4) lane_sums(&sums[i], out + i);
}

bool is_read(const Tensor& numbers) {
  ScalarType type = numbers.scalar_type();
  return numbers.is_cpu() && (type == ScalarType::Float || type == ScalarType::Half || type == ScalarType::BFloat16);
}

// A weight [rows, columns] in one of the formats, with its bias.
struct Weight {
  ScalarType type;  // Byte: few bits
  const void* numbers;
  const Format* format = nullptr;  // of few bits
  int64_t rows, columns, row;  // row: elements from one row to the next
  ScalarType bias_type = ScalarType::Float;
  const void* bias = nullptr;

  // Of two tensors: its numbers, and a bias or an empty one.
  Weight(const Tensor* of, int64_t rows, int64_t columns) : rows(rows), columns(columns) {
    const Tensor &weight = of[0], &added = of[1];
    type = weight.scalar_type(), numbers = weight.const_data_ptr();
    if (type == ScalarType::Byte) {
      STD_TORCH_CHECK(weight.numel() > HEADER && weight.is_cpu(), "weight: empty, or not in the memory of the CPU");
      format = &format_of(*static_cast<const uint8_t*>(numbers));
      STD_TORCH_CHECK(weight.numel() == format->size(rows, columns) && weight.is_contiguous(), "weight: no matrix of ", rows,
                      " times ", columns, " in few bits");
    } else {
      STD_TORCH_CHECK(weight.dim() == 2 && weight.size(0) == rows && weight.size(1) == columns && weight.stride(1) == 1 && is_read(weight),
                      "weight: no matrix of ", rows, " times ", columns, " in float32, float16 or bfloat16");
      row = weight.stride(0);
    }
    if (added.numel()) {
      STD_TORCH_CHECK(added.numel() == rows && added.is_contiguous() && is_read(added), "bias: not of ", rows, " rows, or in no format of a bias");
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
  const void* weight = nullptr;  // none: no norm, of an empty tensor
  int64_t size = 0;
  float epsilon = 0.0f, offset = 0.0f;  // the weight is a factor with the offset added

  Norm(const Tensor& from, int64_t size, double epsilon, bool is_centred)
      : size(size), epsilon(epsilon), offset(is_centred) {
    if (!from.numel()) return;
    type = from.scalar_type(), weight = from.const_data_ptr();
    STD_TORCH_CHECK(from.numel() == size && from.is_contiguous() && is_read(from), "norm: not of ", size, " columns, or in no format of a norm");
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
