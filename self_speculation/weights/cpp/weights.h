// x W^T over weights as they lie in memory: the inputs x in the layout that a kernel reads, the kernels, and `Weight`, which
// chooses one. Each output (row of the weight, token) is one sum along the columns, in one order: the bits do not depend on other
// tokens, on other rows, or on the number of threads.
//
//   weight in 16 or 32 bits   multiply_rows, by fused multiply-add or dot products of bfloat16
//   weight in few bits        multiply_panel of few_bits.h, by dot products of eight bits
//   prompts with AMX          multiply_rows_by_tiles and multiply_panels_by_tiles
#pragma once
#include "few_bits.h"
#include "tiles.h"

namespace {
constexpr int64_t ROW_BLOCK = 32;  // rows that are multiplied at a time; PANEL rows of a weight in few bits, without tiles
constexpr int64_t MAX_TOKENS = LANES == 16 ? 8 : 6;  // tokens that are multiplied at a time: with two rows, their sums fit in registers
constexpr int64_t MAX_TOKENS_IN_PAIRS = 6;           // tokens in bfloat16 that are multiplied at a time, with four rows
constexpr int64_t COLUMNS = 2 * LANES;               // columns that are multiplied at a time
constexpr int64_t MAX_TILES = 8;                     // tiles of a weight along the columns: 16 KiB, which the first cache holds

// How inputs lie in memory, with zeros after the columns. Tokens that are multiplied together are a token tile.
enum class Layout {
  floats,      // token tiles of up to MAX_TOKENS, [stride / LANES, tokens of the tile, LANES] in the order of `half_columns`
  pairs,       // token tiles of up to MAX_TOKENS_IN_PAIRS in bfloat16, [stride / COLUMNS, tokens of the tile, COLUMNS]
  eight_bits,  // as `RoundedInputs`
  token_rows,  // AMX tiles in bfloat16 with a token in each row, [stride / 32, token tiles, 16 tokens, 32]
  pair_rows,   // the same transposed, [stride / 32, token tiles, 16 pairs of columns, 16 tokens, 2]
};

// Inputs [T, columns] of a product with weights of one type, in memory of `size` floats.
struct Inputs {
  int64_t tokens;
  int64_t columns;
  int64_t stride;  // columns with padding
  Layout layout;
  bool even_columns_first;  // the order of `half_columns` of a weight in bfloat16
  int64_t token_tiles;
  float* data;
  RoundedInputs rounded;

  Inputs(Floats* memory, int64_t tokens, int64_t columns, ScalarType type, bool in_bfloat16 = false)
      : tokens(tokens), columns(columns), stride(stride_of(columns)), layout(layout_for(type, in_bfloat16)),
        even_columns_first(type == ScalarType::BFloat16), token_tiles((tokens - 1) / max_tokens() + 1),
        data(reinterpret_cast<float*>(memory)), rounded(memory, tokens, stride / BLOCK) {}
  static int64_t stride_of(int64_t columns) { return round_up(columns, BLOCK); }
  static int64_t size(int64_t tokens, int64_t columns) {
    return round_up(tokens, HAS_TILES ? tiles::ROWS : 1) * stride_of(columns);
  }
  static bool uses_tiles(ScalarType type, bool in_bfloat16) { return HAS_TILES && in_bfloat16 && type != ScalarType::Float; }
  static Layout layout_for(ScalarType type, bool in_bfloat16) {
    if (uses_tiles(type, in_bfloat16)) return type == ScalarType::Byte ? Layout::token_rows : Layout::pair_rows;
    if (type == ScalarType::Byte) return Layout::eight_bits;
    return in_bfloat16 && type == ScalarType::BFloat16 ? Layout::pairs : Layout::floats;
  }
  bool is_tiled() const { return layout == Layout::token_rows || layout == Layout::pair_rows; }
  int64_t max_tokens() const {
    if (is_tiled()) return tiles::ROWS;
    return layout == Layout::pairs ? MAX_TOKENS_IN_PAIRS : MAX_TOKENS;
  }
  int64_t first_token(int64_t token_tile) const { return tokens * token_tile / token_tiles; }  // tiles are of nearly equal size

  // Threads make inputs in pieces. A piece is a token or, in AMX tiles, a token tile.
  int64_t pieces() const { return is_tiled() ? token_tiles : tokens; }
  static int64_t scratch_size(int64_t columns) { return (HAS_TILES ? tiles::ROWS : 1) * stride_of(columns); }

  // Makes a piece. `fill(token, to)` writes the input of a token, [columns]; `scratch` has room for the tokens of a piece.
  template <class Fill>
  void make(int64_t piece, const Fill& fill, float* scratch) const {
    if (is_tiled()) return make_tiles(piece, fill, scratch);
    fill(piece, scratch);
    std::fill(scratch + columns, scratch + stride, 0.0f);
    if (layout == Layout::eight_bits) return rounded.round(piece, scratch);
    const int64_t token_tile = ((piece + 1) * token_tiles - 1) / tokens;
    const int64_t first = first_token(token_tile);
    const int64_t n = first_token(token_tile + 1) - first;
    if (layout == Layout::pairs) {
      auto* to = reinterpret_cast<BFloat16*>(data) + first * stride + (piece - first) * COLUMNS;
      for (int64_t k = 0; k < stride; k += COLUMNS)
        for (int64_t i = 0; i < COLUMNS; i++) to[k * n + i] = BFloat16(scratch[k + i]);
      return;
    }
    const int64_t column_step = even_columns_first ? 2 : 1;
    const int64_t second = even_columns_first ? 1 : LANES;
    for (int64_t k = 0; k < stride; k += COLUMNS)
      for (int64_t i = 0; i < LANES; i++) {
        float* to = data + first * stride + k * n + (piece - first) * LANES + i;
        to[0] = scratch[k + column_step * i];
        to[n * LANES] = scratch[k + column_step * i + second];
      }
  }

  // The AMX tile of 16 tokens and of columns 32 * step to 32 * step + 31.
  Ints* tile(int64_t step, int64_t token_tile) const {
    return reinterpret_cast<Ints*>(data) + (token_tile * (stride / tiles::COLUMNS) + step) * tiles::ROWS;
  }
  // Writes an AMX tile. `read(t, j)` returns LANES columns of token t of the tile, from column j of the tile on.
  template <class Read>
  INLINE void put_tile(int64_t step, int64_t token_tile, const Read& read) const {
    Ints* tile_rows = tile(step, token_tile);
    for (int64_t t = 0; t < tiles::ROWS; t++) tile_rows[t] = to_bfloat16(read(t, 0), read(t, LANES));
    if (layout == Layout::pair_rows) transpose(tile_rows);
  }

 private:
  template <class Fill>
  void make_tiles(int64_t token_tile, const Fill& fill, float* scratch) const {
    const int64_t first = token_tile * tiles::ROWS;
    for (int64_t t = 0; t < tiles::ROWS; t++) {
      float* input = scratch + t * stride;
      if (first + t < tokens) fill(first + t, input);
      std::fill(input + (first + t < tokens ? columns : 0), input + stride, 0.0f);
    }
    for (int64_t step = 0; step < stride / tiles::COLUMNS; step++)
      put_tile(step, token_tile, [&](int64_t t, int64_t j) { return load<Floats>(scratch + t * stride + step * tiles::COLUMNS + j); });
  }
};

// The first or the second vector of COLUMNS columns; of bfloat16, even columns and odd ones.
template <bool SECOND, class Scalar>
Floats half_columns(const Scalar* from) {
  return widen(from + SECOND * LANES);
}
template <bool SECOND>
Floats half_columns(const BFloat16* from) {
  const Ints pairs = load<Ints>(from);
  return (Floats)(SECOND ? pairs & int32_t(0xffff0000) : pairs << 16);
}

// Adds dot products of R rows of a weight and T tokens to `sums`, [T, ROW_BLOCK] vectors. The rows are `row_step` rows from each
// other. Fetches as many columns of the rows at `ahead`.
template <int R, int T, class V, class Scalar>
__attribute__((noinline)) void add_dot_products(const Scalar* w, const Scalar* ahead, int64_t row_stride, int64_t row_step,
                                                const float* x, int64_t columns, Floats* sums) {
  constexpr bool AS_PAIRS = std::is_same_v<V, Ints>;
  Floats tile_sums[R * T];
#pragma GCC unroll 24
  for (int i = 0; i < R * T; i++) tile_sums[i] = sums[i / R * ROW_BLOCK + i % R * row_step];
  auto half = [&]<bool SECOND>(const Scalar* w, int64_t row_stride) __attribute__((always_inline)) {
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
  auto add_columns = [&](const Scalar* w, int64_t row_stride) __attribute__((always_inline)) {
    half.template operator()<false>(w, row_stride);
    if constexpr (!AS_PAIRS) half.template operator()<true>(w, row_stride);
  };
  for (int64_t k = 0; k < columns / COLUMNS * COLUMNS; k += COLUMNS) {
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) __builtin_prefetch(ahead + r * row_stride * row_step + k, 0, 2);
    add_columns(w + k, row_stride * row_step);
    x += COLUMNS * T / (1 + AS_PAIRS);
  }
  if (const int64_t rest = columns % COLUMNS) {  // memory after the weight may not be mapped
    Scalar padded[R * COLUMNS] = {};
    for (int r = 0; r < R; r++) std::memcpy(padded + r * COLUMNS, w + r * row_stride * row_step + columns - rest, rest * sizeof(Scalar));
    add_columns(padded, COLUMNS);
  }
#pragma GCC unroll 24
  for (int i = 0; i < R * T; i++) sums[i / R * ROW_BLOCK + i % R * row_step] = tile_sums[i];
}

// Outputs of `n` rows, up to ROW_BLOCK, for all tokens, [T, ROW_BLOCK]. Columns are taken in chunks whose inputs fit into the L1
// cache. Each chunk meets all rows. Rows that are multiplied together are in different pages, which a processor reads faster than
// neighbours.
template <class Scalar>
void multiply_rows(const Scalar* w, int64_t row_stride, int64_t n, const Inputs& x, float* outputs) {
  std::unique_ptr<Floats[]> sums(new Floats[x.tokens * ROW_BLOCK]());
  const int64_t max_columns = std::max<int64_t>(1024, 6144 / x.tokens);
  const int64_t chunks = (x.columns + max_columns - 1) / max_columns;
  const int64_t chunk_columns = round_up((x.columns + chunks - 1) / chunks, COLUMNS);
  for (int64_t begin = 0; begin < x.columns; begin += chunk_columns) {
    const Scalar* chunk = w + begin;
    const Scalar* next = begin + chunk_columns < x.columns ? chunk + chunk_columns : w + ROW_BLOCK * row_stride;
    for (int64_t token_tile = 0; token_tile < x.token_tiles; token_tile++) {
      const int64_t first = x.first_token(token_tile);
      auto multiply_token_tile = [&]<int T, class V>() {
        auto add_rows = [&]<int R>(int64_t r, int64_t row_step) {
          const Scalar* ahead = r % x.token_tiles == token_tile ? next : chunk;  // each token tile fetches a share of the next chunk
          const int64_t at = first * x.stride + begin * T;
          add_dot_products<R, T, V>(chunk + r * row_stride, ahead + r * row_stride, row_stride, row_step,
                                    &x.data[x.layout == Layout::pairs ? at / 2 : at], std::min(chunk_columns, x.columns - begin),
                                    &sums[first * ROW_BLOCK + r]);
        };
        constexpr int R = T <= 2 || std::is_same_v<V, Ints> ? 4 : 2;
        for (int64_t r = 0; r < n / R; r++) add_rows.template operator()<R>(r, n / R);
        for (int64_t r = n / R * R; r < n; r++) add_rows.template operator()<1>(r, 1);
      };
      const int64_t num_tokens = x.first_token(token_tile + 1) - first;
      if constexpr (std::is_same_v<Scalar, BFloat16>)
        if (x.layout == Layout::pairs) {
          dispatch_count<MAX_TOKENS_IN_PAIRS>(num_tokens, [&]<int T>() { multiply_token_tile.template operator()<T, Ints>(); });
          continue;
        }
      dispatch_count<MAX_TOKENS>(num_tokens, [&]<int T>() { multiply_token_tile.template operator()<T, Floats>(); });
    }
  }
  for (int64_t i = 0; i < x.tokens * ROW_BLOCK; i += 4) lane_sums(&sums[i], outputs + i);
}

// The AMX tiles of ROW_BLOCK rows of a weight. In 16 bits a tile is 16 rows times 32 columns; of few bits it is 16 pairs of
// columns times 16 rows. Up to 256 columns meet all tokens while the first cache has them.
struct WeightTiles {
  alignas(64) Ints elements[MAX_TILES][2][tiles::ROWS];
};

// Rows of a weight in 16 bits where they lie, `row_stride` elements from each other. An element in float16 is a sum of TERMS
// elements in bfloat16.
template <class Scalar>
struct WeightRows {
  static constexpr int64_t TERMS = std::is_same_v<Scalar, Half> ? 2 : 1;
  const Scalar* first;
  int64_t row_stride;
  int64_t rows;
  int64_t columns;

  // Fills tiles with the columns [begin, end). `begin` is a multiple of 32.
  void pack(int64_t begin, int64_t end, WeightTiles& packed) const {
    for (int64_t row = 0; row < ROW_BLOCK; row++) {
      const Scalar* elements = first + row * row_stride;
      const int64_t row_end = row < rows ? end : 0;
      int64_t tile = 0;
      int64_t column = begin;
      for (; column + tiles::COLUMNS <= row_end; column += tiles::COLUMNS) {
        put(elements + column, row, &packed.elements[tile]);
        tile += TERMS;
      }
      for (; column < end; column += tiles::COLUMNS) {  // memory after the weight may not be mapped
        Scalar padded[tiles::COLUMNS] = {};
        if (column < row_end) std::memcpy(padded, elements + column, (row_end - column) * sizeof(Scalar));
        put(padded, row, &packed.elements[tile]);
        tile += TERMS;
      }
    }
  }
  // Fetches 32 columns from `column` on, of share `share` of `shares` of the rows.
  INLINE void fetch(int64_t column, int64_t share, int64_t shares) const {
    for (int64_t row = ROW_BLOCK * share / shares; row < ROW_BLOCK * (share + 1) / shares; row++)
      __builtin_prefetch(first + row * row_stride + column, 0, 2);
  }
  WeightRows next() const { return {first + ROW_BLOCK * row_stride, row_stride, rows, columns}; }

 private:
  static INLINE void put(const Scalar* from, int64_t row, Ints (*to)[2][tiles::ROWS]) {
    auto at = [&](int64_t term) -> Ints& { return to[term][row / tiles::ROWS][row % tiles::ROWS]; };
    if constexpr (TERMS == 1) {
      at(0) = load<Ints>(from);
    } else {
      const Split split(widen(from), widen(from + LANES));
      at(0) = split.upper;
      at(1) = split.rest;
    }
  }
};

// Adds products of `row_tiles` tiles of rows, over `count` tiles along the columns that begin at `step` of the inputs, to
// `sums`, [T rounded up to 16, ROW_BLOCK]. `fetch(k, share, shares)` is called beside tile k, for each share of tokens.
template <bool ROWS_ARE_FIRST, int64_t TERMS, class Fetch>
void add_tile_products(const WeightTiles& weight, int64_t row_tiles, const Inputs& x, int64_t step, int64_t count,
                       float* sums, const Fetch& fetch) {
  constexpr int64_t stride_bytes = ROW_BLOCK * sizeof(float);
  auto dot = [&]<int C, int R, int T>() __attribute__((always_inline)) {
    if constexpr (ROWS_ARE_FIRST) tiles::dot<C, R, T>();
    else tiles::dot<C, T, R>();
  };
  for (int64_t token_tile = 0; token_tile < x.token_tiles; token_tile += 2) {
    const bool has_second = token_tile + 1 < x.token_tiles;
    const bool has_lower = row_tiles > 1;
    float* first = sums + token_tile * tiles::ROWS * ROW_BLOCK;
    float* second = first + tiles::ROWS * ROW_BLOCK;
    auto move_sums = [&]<bool IS_LOAD>() __attribute__((always_inline)) {
      auto move = [&]<int C>(float* at) __attribute__((always_inline)) {
        if constexpr (IS_LOAD) tiles::load<C>(at, stride_bytes);
        else tiles::store<C>(at, stride_bytes);
      };
      move.template operator()<0>(first);
      if (has_lower) move.template operator()<1>(first + tiles::ROWS);
      if (!has_second) return;
      move.template operator()<2>(second);
      if (has_lower) move.template operator()<3>(second + tiles::ROWS);
    };
    move_sums.template operator()<true>();
    for (int64_t k = 0; k < count; k++) {
      fetch(k, token_tile / 2, (x.token_tiles + 1) / 2);
      tiles::load<4>(x.tile(step + k, token_tile), 64);
      if (has_second) tiles::load<5>(x.tile(step + k, token_tile + 1), 64);
#pragma GCC unroll 2
      for (int64_t i = k * TERMS; i < (k + 1) * TERMS; i++) {
        tiles::load<6>(weight.elements[i][0], 64);
        dot.template operator()<0, 6, 4>();
        if (has_second) dot.template operator()<2, 6, 5>();
        if (!has_lower) continue;
        tiles::load<7>(weight.elements[i][1], 64);
        dot.template operator()<1, 7, 4>();
        if (has_second) dot.template operator()<3, 7, 5>();
      }
    }
    move_sums.template operator()<false>();
  }
}

// Outputs of up to ROW_BLOCK rows of a weight in 16 bits for all tokens, [T rounded up to 16, ROW_BLOCK].
template <class Scalar>
__attribute__((noinline)) void multiply_rows_by_tiles(const WeightRows<Scalar> rows, const Inputs& x, float* outputs) {
  constexpr int64_t terms = WeightRows<Scalar>::TERMS;
  constexpr int64_t chunk_columns = MAX_TILES / terms * tiles::COLUMNS;
  std::fill_n(outputs, x.token_tiles * tiles::ROWS * ROW_BLOCK, 0.0f);
  WeightTiles packed;
  for (int64_t begin = 0; begin < x.columns; begin += chunk_columns) {
    const int64_t end = std::min(begin + chunk_columns, x.columns);
    rows.pack(begin, end, packed);
    const WeightRows ahead = end < x.columns ? rows : rows.next();
    auto fetch = [&](int64_t step, int64_t share, int64_t shares) __attribute__((always_inline)) {
      ahead.fetch(end % x.columns + step * tiles::COLUMNS, share, shares);
    };
    const int64_t count = (end - begin + tiles::COLUMNS - 1) / tiles::COLUMNS;
    add_tile_products<true, terms>(packed, 2, x, begin / tiles::COLUMNS, count, outputs, fetch);
  }
  // [rows, tokens] of each tile to [tokens, rows]
  for (int64_t token_tile = 0; token_tile < x.token_tiles; token_tile++)
    for (int64_t column = 0; column < ROW_BLOCK; column += tiles::ROWS) {
      float* at = outputs + token_tile * tiles::ROWS * ROW_BLOCK + column;
      Ints lines[tiles::ROWS];
      for (int64_t i = 0; i < tiles::ROWS; i++) lines[i] = load<Ints>(at + i * ROW_BLOCK);
      transpose(lines);
      for (int64_t i = 0; i < tiles::ROWS; i++) std::memcpy(at + i * ROW_BLOCK, &lines[i], sizeof(Ints));
    }
}

// Outputs of one or two panels of a weight in few bits, `panel_bytes` from each other, for all tokens, [T rounded up to 16,
// ROW_BLOCK].
template <size_t I>
__attribute__((noinline)) void multiply_panels_by_tiles(const uint8_t* panels, int64_t num_panels, int64_t panel_bytes,
                                                        const Inputs& x, float* outputs) {
  constexpr const Format& format = FORMATS[I];
  std::fill_n(outputs, x.token_tiles * tiles::ROWS * ROW_BLOCK, 0.0f);
  WeightTiles packed;
  const int64_t steps = x.stride / tiles::COLUMNS;
  for (int64_t step = 0; step < steps; step += MAX_TILES) {
    const int64_t count = std::min(MAX_TILES, steps - step);
    for (int64_t panel = 0; panel < num_panels; panel++) {
      const uint8_t* block = panels + panel * panel_bytes + format.bytes_before(step);
      Scales super_scales[PANEL / LANES];
      if (format.has_super_blocks) {
        for (int64_t v = 0; v < PANEL / LANES; v++) super_scales[v] = load_scales<I>(block, v * LANES);
        block += format.super_scale_bytes();
      }
      for (int64_t k = 0; k < count; k++, block += format.block_bytes()) {
        for (int64_t byte = 0; byte < format.block_bytes(); byte += 64) __builtin_prefetch(block + byte + BYTES_AHEAD);
        QuantBlock<I>(block, super_scales).unpack(packed.elements[k][panel]);
      }
    }
    add_tile_products<false, 1>(packed, num_panels, x, step, count, outputs, [](int64_t, int64_t, int64_t) {});
  }
}

// Whether a tensor is in CPU memory, in a format that the operators read.
bool is_readable(const Tensor& tensor) {
  const ScalarType type = tensor.scalar_type();
  return tensor.is_cpu() && (type == ScalarType::Float || type == ScalarType::Half || type == ScalarType::BFloat16);
}

// A weight [rows, columns] in one of the formats, with its bias.
struct Weight {
  ScalarType type;  // Byte: few bits
  const void* data;
  const Format* format = nullptr;  // of few bits
  int64_t rows;
  int64_t columns;
  int64_t row_stride = 0;  // elements from one row to the next
  ScalarType bias_type = ScalarType::Float;
  const void* bias = nullptr;

  // `tensors`: the matrix, and a bias or an empty tensor.
  Weight(const Tensor* tensors, int64_t rows, int64_t columns) : rows(rows), columns(columns) {
    const Tensor& weight = tensors[0];
    const Tensor& added = tensors[1];
    type = weight.scalar_type();
    data = weight.const_data_ptr();
    if (type == ScalarType::Byte) {
      STD_TORCH_CHECK(weight.numel() > HEADER && weight.is_cpu(), "weight: empty, or not in the memory of the CPU");
      format = &format_of(*static_cast<const uint8_t*>(data));
      STD_TORCH_CHECK(weight.numel() == format->num_bytes(rows, columns) && weight.is_contiguous(), "weight: no matrix of ", rows,
                      " times ", columns, " in few bits");
    } else {
      STD_TORCH_CHECK(weight.dim() == 2 && weight.size(0) == rows && weight.size(1) == columns && weight.stride(1) == 1 && is_readable(weight),
                      "weight: no matrix of ", rows, " times ", columns, " in float32, float16 or bfloat16");
      row_stride = weight.stride(0);
    }
    if (added.numel()) {
      STD_TORCH_CHECK(added.numel() == rows && added.is_contiguous() && is_readable(added), "bias: not of ", rows, " rows, or in no format of a bias");
      bias = added.const_data_ptr();
      bias_type = added.scalar_type();
    }
  }

  // The rows [begin, end) of x W^T + b. Calls `put(token, row, outputs, n)` for n rows from `row` on. `begin` is a multiple of
  // ROW_BLOCK; `end` is one, too, or the number of rows.
  template <class Put>
  void multiply(int64_t begin, int64_t end, const Inputs& x, const Put& put) const {
    auto outputs = new_outputs(x.tokens);
    const int64_t at_a_time = rows_at_a_time(x);
    end = std::min(end, rows);
    for (int64_t row = begin; row < end; row += at_a_time) {
      const int64_t n = std::min(at_a_time, end - row);
      multiply_block(row, n, x, outputs.get());
      for (int64_t t = 0; t < x.tokens; t++) put(t, row, &outputs[t * at_a_time], n);
    }
  }

  int64_t rows_at_a_time(const Inputs& x) const { return format && !x.is_tiled() ? PANEL : ROW_BLOCK; }
  static std::unique_ptr<float[]> new_outputs(int64_t tokens) {
    return std::make_unique_for_overwrite<float[]>(round_up(tokens, tiles::ROWS) * ROW_BLOCK);
  }

  // n rows of x W^T + b from `row` on, [T, rows_at_a_time]. By tiles, outputs beyond the tokens and rows are zeros.
  void multiply_block(int64_t row, int64_t n, const Inputs& x, float* outputs) const {
    multiply_without_bias(row, n, x, outputs);
    if (!bias) return;
    const int64_t at_a_time = rows_at_a_time(x);
    dispatch(bias_type, bias, [&](auto* b) {
      for (int64_t t = 0; t < x.tokens; t++)
        for (int64_t r = 0; r < n; r++) outputs[t * at_a_time + r] += float(b[row + r]);
    });
  }

 private:
  void multiply_without_bias(int64_t row, int64_t n, const Inputs& x, float* outputs) const {
    if (format) {
      const int64_t panel_bytes = format->bytes_before(x.rounded.blocks);
      const auto* panel = static_cast<const uint8_t*>(data) + HEADER + row / PANEL * panel_bytes;
      if constexpr (HAS_TILES)
        if (x.is_tiled())
          return dispatch_format(*format, [&]<size_t I>() {
            multiply_panels_by_tiles<I>(panel, (n + PANEL - 1) / PANEL, panel_bytes, x, outputs);
          });
      return multiply_panel(*format, panel, x.rounded, outputs);
    }
    dispatch(type, data, [&]<class Scalar>(const Scalar* w) {
      if constexpr (HAS_TILES && !std::is_same_v<Scalar, float>)
        if (x.is_tiled()) return multiply_rows_by_tiles(WeightRows<Scalar>{w + row * row_stride, row_stride, n, columns}, x, outputs);
      multiply_rows(w + row * row_stride, row_stride, n, x, outputs);
    });
  }
};

// A root mean square norm.
struct Norm {
  ScalarType type = ScalarType::Float;
  const void* weight = nullptr;  // nullptr: no norm, of an empty tensor
  int64_t size = 0;
  float epsilon = 0.0f;
  float offset = 0.0f;  // the weight is a factor with the offset added

  Norm(const Tensor& tensor, int64_t size, double epsilon, bool is_centred)
      : size(size), epsilon(epsilon), offset(is_centred) {
    if (!tensor.numel()) return;
    type = tensor.scalar_type();
    weight = tensor.const_data_ptr();
    STD_TORCH_CHECK(tensor.numel() == size && tensor.is_contiguous() && is_readable(tensor), "norm: not of ", size, " columns, or in no format of a norm");
  }
  void operator()(const float* x, float* normed) const {
    Floats squares = {};
    int64_t j = 0;
    for (; j + LANES <= size; j += LANES) squares = fma(load<Floats>(x + j), load<Floats>(x + j), squares);
    float sum = lane_sum(squares);
    for (; j < size; j++) sum += x[j] * x[j];
    const float scale = 1.0f / std::sqrt(sum / float(size) + epsilon);
    dispatch(type, weight, [&](auto* factors) {
      for (j = 0; j + LANES <= size; j += LANES) {
        const Floats lanes = load<Floats>(x + j) * scale * (widen(factors + j) + offset);
        std::memcpy(normed + j, &lanes, sizeof(Floats));
      }
      for (; j < size; j++) normed[j] = x[j] * scale * (float(factors[j]) + offset);
    });
  }
};
}  // namespace
