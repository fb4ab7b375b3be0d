// x W^T of a prompt's tokens by tiles. Rows of a weight become tiles in bfloat16, up to 256 columns at a time, and meet all tokens
// while the first cache has them. Each (row, token) is one sum over tiles of 32 columns, in their order.
#pragma once
#include "inputs.h"

namespace {
constexpr int64_t TILE_ROWS = 2 * tiles::ROWS;  // of a weight that are multiplied at a time
constexpr int64_t MOST_TILES = 8;               // along the columns: 16 KiB

// Tiles of a weight, of TILE_ROWS rows: 16 rows times 32 columns in 16 bits, and few bits as 16 pairs of columns times 16 rows.
struct WeightTiles {
  alignas(64) Ints numbers[MOST_TILES][2][tiles::ROWS];
};

// Rows of a weight in 16 bits where they lie, `row_stride` numbers from each other. A number in float16 is a sum of TERMS numbers
// in bfloat16.
template <class Number>
struct RowsInPlace {
  static constexpr int64_t TERMS = std::is_same_v<Number, Half> ? 2 : 1;
  const Number* first;
  int64_t row_stride;
  int64_t rows;
  int64_t columns;

  // Fills tiles of columns `from`, a multiple of 32, to `to`.
  void pack(int64_t from, int64_t to, WeightTiles& packed) const {
    for (int64_t row = 0; row < TILE_ROWS; row++) {
      const Number* numbers = first + row * row_stride;
      const int64_t last = row < rows ? to : 0;
      int64_t tile = 0;
      int64_t column = from;
      for (; column + tiles::COLUMNS <= last; column += tiles::COLUMNS) {
        put(numbers + column, row, &packed.numbers[tile]);
        tile += TERMS;
      }
      for (; column < to; column += tiles::COLUMNS) {  // memory after the last number may not be mapped
        Number padded[tiles::COLUMNS] = {};
        if (column < last) std::memcpy(padded, numbers + column, (last - column) * sizeof(Number));
        put(padded, row, &packed.numbers[tile]);
        tile += TERMS;
      }
    }
  }
  // Fetches share `share` of `shares` of 32 columns.
  INLINE void fetch(int64_t from, int64_t share, int64_t shares) const {
    for (int64_t row = TILE_ROWS * share / shares; row < TILE_ROWS * (share + 1) / shares; row++)
      __builtin_prefetch(first + row * row_stride + from, 0, 2);
  }
  RowsInPlace next() const { return {first + TILE_ROWS * row_stride, row_stride, rows, columns}; }

 private:
  static INLINE void put(const Number* from, int64_t row, Ints (*to)[2][tiles::ROWS]) {
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
// `sums`, [T rounded up to 16, TILE_ROWS]. `fetch(k, share, shares)` is called beside tile k, for each share of tokens.
template <bool ROWS_ARE_FIRST, int64_t TERMS, class Fetch>
void add_tile_products(const WeightTiles& weight, int64_t row_tiles, const Inputs& x, int64_t step, int64_t count,
                       float* sums, const Fetch& fetch) {
  constexpr int64_t stride_bytes = TILE_ROWS * sizeof(float);
  auto dot = [&]<int C, int R, int T>() __attribute__((always_inline)) {
    if constexpr (ROWS_ARE_FIRST) tiles::dot<C, R, T>();
    else tiles::dot<C, T, R>();
  };
  for (int64_t token_tile = 0; token_tile < x.token_tiles; token_tile += 2) {
    const bool has_second = token_tile + 1 < x.token_tiles;
    const bool has_lower = row_tiles > 1;
    float* first = sums + token_tile * tiles::ROWS * TILE_ROWS;
    float* second = first + tiles::ROWS * TILE_ROWS;
    auto with_sums = [&]<bool IS_LOAD>() __attribute__((always_inline)) {
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
    with_sums.template operator()<true>();
    for (int64_t k = 0; k < count; k++) {
      fetch(k, token_tile / 2, (x.token_tiles + 1) / 2);
      tiles::load<4>(x.tile(step + k, token_tile), 64);
      if (has_second) tiles::load<5>(x.tile(step + k, token_tile + 1), 64);
#pragma GCC unroll 2
      for (int64_t i = k * TERMS; i < (k + 1) * TERMS; i++) {
        tiles::load<6>(weight.numbers[i][0], 64);
        dot.template operator()<0, 6, 4>();
        if (has_second) dot.template operator()<2, 6, 5>();
        if (!has_lower) continue;
        tiles::load<7>(weight.numbers[i][1], 64);
        dot.template operator()<1, 7, 4>();
        if (has_second) dot.template operator()<3, 7, 5>();
      }
    }
    with_sums.template operator()<false>();
  }
}

// Products of a weight in 16 bits, up to TILE_ROWS rows of it, and all tokens, [T rounded up to 16, TILE_ROWS].
template <class Number>
__attribute__((noinline)) void products_by_tiles(const RowsInPlace<Number> rows, const Inputs& x, float* out) {
  constexpr int64_t terms = RowsInPlace<Number>::TERMS;
  constexpr int64_t width = MOST_TILES / terms * tiles::COLUMNS;
  std::fill_n(out, x.token_tiles * tiles::ROWS * TILE_ROWS, 0.0f);
  WeightTiles packed;
  for (int64_t from = 0; from < x.columns; from += width) {
    const int64_t to = std::min(from + width, x.columns);
    rows.pack(from, to, packed);
    const RowsInPlace ahead = to < x.columns ? rows : rows.next();
    auto fetch = [&](int64_t step, int64_t share, int64_t shares) __attribute__((always_inline)) {
      ahead.fetch(to % x.columns + step * tiles::COLUMNS, share, shares);
    };
    const int64_t count = (to - from + tiles::COLUMNS - 1) / tiles::COLUMNS;
    add_tile_products<true, terms>(packed, 2, x, from / tiles::COLUMNS, count, out, fetch);
  }
  // [rows, tokens] of each tile to [tokens, rows]
  for (int64_t token_tile = 0; token_tile < x.token_tiles; token_tile++)
    for (int64_t column = 0; column < TILE_ROWS; column += tiles::ROWS) {
      float* at = out + token_tile * tiles::ROWS * TILE_ROWS + column;
      Ints lines[tiles::ROWS];
      for (int64_t i = 0; i < tiles::ROWS; i++) lines[i] = load<Ints>(at + i * TILE_ROWS);
      transpose(lines);
      for (int64_t i = 0; i < tiles::ROWS; i++) std::memcpy(at + i * TILE_ROWS, &lines[i], sizeof(Ints));
    }
}

// Products of one or two panels of a weight in few bits, `panel_bytes` from each other, and all tokens, [T rounded up to 16,
// TILE_ROWS].
template <size_t I>
__attribute__((noinline)) void panel_products_by_tiles(const uint8_t* panels, int64_t num_panels, int64_t panel_bytes,
                                                       const Inputs& x, float* out) {
  constexpr const Format& format = FORMATS[I];
  std::fill_n(out, x.token_tiles * tiles::ROWS * TILE_ROWS, 0.0f);
  WeightTiles packed;
  const int64_t steps = x.stride / tiles::COLUMNS;
  for (int64_t step = 0; step < steps; step += MOST_TILES) {
    const int64_t count = std::min(MOST_TILES, steps - step);
    for (int64_t panel = 0; panel < num_panels; panel++) {
      const uint8_t* block = panels + panel * panel_bytes + format.bytes_before(step);
      Scales super_scales[PANEL / LANES];
      if (format.has_super_blocks) {
        for (int64_t v = 0; v < PANEL / LANES; v++) super_scales[v] = load_scales<I>(block, v * LANES);
        block += format.super_scale_bytes();
      }
      for (int64_t k = 0; k < count; k++, block += format.block_bytes()) {
        for (int64_t byte = 0; byte < format.block_bytes(); byte += 64) __builtin_prefetch(block + byte + BYTES_AHEAD);
        QuantBlock<I>(block, super_scales).unpack(packed.numbers[k][panel]);
      }
    }
    add_tile_products<false, 1>(packed, num_panels, x, step, count, out, [](int64_t, int64_t, int64_t) {});
  }
}
}  // namespace
