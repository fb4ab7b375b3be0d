// Inputs of products, in the layout that the kernel of a weight reads.
#pragma once
#include "few_bits.h"
#include "tiles.h"

namespace {
constexpr int64_t MOST_TOKENS = LANES == 16 ? 8 : 6;  // at a time: twice as many sums are in registers
constexpr int64_t MOST_TOKENS_IN_PAIRS = 6;           // the same of tokens in bfloat16, with four rows
constexpr int64_t COLUMNS = 2 * LANES;                // at a time

// How inputs lie in memory, with zeros after the columns. Tokens that are multiplied together are a token tile.
enum class Layout {
  floats,      // token tiles of up to MOST_TOKENS, [stride / LANES, tokens of the tile, LANES] in the order of `half_columns`
  pairs,       // token tiles of up to MOST_TOKENS_IN_PAIRS in bfloat16, [stride / COLUMNS, tokens of the tile, COLUMNS]
  eight_bits,  // as `RoundedInputs`
  token_rows,  // AMX tiles in bfloat16, [stride / 32, token tiles, 16 tokens, 32]
  pair_rows,   // the same transposed, [stride / 32, token tiles, 16 pairs of columns, 16 tokens, 2]
};

// Inputs of products with weights of a type, in memory of `size` floats.
struct Inputs {
  int64_t tokens;
  int64_t columns;
  int64_t stride;  // columns with padding
  Layout layout;
  bool is_bfloat16;  // weights are: `half_columns` has even columns first
  int64_t token_tiles;
  float* numbers;
  RoundedInputs rounded;

  Inputs(Floats* memory, int64_t tokens, int64_t columns, ScalarType type, bool in_bfloat16 = false)
      : tokens(tokens), columns(columns), stride(stride_of(columns)), layout(layout_of(type, in_bfloat16)),
        is_bfloat16(type == ScalarType::BFloat16), token_tiles((tokens - 1) / most_tokens() + 1),
        numbers(reinterpret_cast<float*>(memory)), rounded(memory, tokens, stride / BLOCK) {}
  static int64_t stride_of(int64_t columns) { return round_up(columns, BLOCK); }
  static int64_t size(int64_t tokens, int64_t columns) {
    return round_up(tokens, HAS_TILES ? tiles::ROWS : 1) * stride_of(columns);
  }
  static bool by_tiles(ScalarType type, bool in_bfloat16) { return HAS_TILES && in_bfloat16 && type != ScalarType::Float; }
  static Layout layout_of(ScalarType type, bool in_bfloat16) {
    if (by_tiles(type, in_bfloat16)) return type == ScalarType::Byte ? Layout::token_rows : Layout::pair_rows;
    if (type == ScalarType::Byte) return Layout::eight_bits;
    return in_bfloat16 && type == ScalarType::BFloat16 ? Layout::pairs : Layout::floats;
  }
  bool in_tiles() const { return layout == Layout::token_rows || layout == Layout::pair_rows; }
  int64_t most_tokens() const {
    if (in_tiles()) return tiles::ROWS;
    return layout == Layout::pairs ? MOST_TOKENS_IN_PAIRS : MOST_TOKENS;
  }
  int64_t first_token(int64_t token_tile) const { return tokens * token_tile / token_tiles; }  // of nearly equal size

  // Inputs are made in pieces. A piece is a token or, in AMX tiles, a token tile.
  static int64_t piece_size(int64_t columns) { return (HAS_TILES ? tiles::ROWS : 1) * stride_of(columns); }
  int64_t pieces() const { return in_tiles() ? token_tiles : tokens; }

  // `fill(token, to)` writes the numbers of a token; `in_order` is memory for the numbers of a piece.
  template <class Fill>
  void make(int64_t piece, const Fill& fill, float* in_order) const {
    if (in_tiles()) return make_tiles(piece, fill, in_order);
    fill(piece, in_order);
    std::fill(in_order + columns, in_order + stride, 0.0f);
    if (layout == Layout::eight_bits) return rounded.round(piece, in_order);
    const int64_t token_tile = ((piece + 1) * token_tiles - 1) / tokens;
    const int64_t first = first_token(token_tile);
    const int64_t n = first_token(token_tile + 1) - first;
    if (layout == Layout::pairs) {
      auto* to = reinterpret_cast<BFloat16*>(numbers) + first * stride + (piece - first) * COLUMNS;
      for (int64_t k = 0; k < stride; k += COLUMNS)
        for (int64_t i = 0; i < COLUMNS; i++) to[k * n + i] = BFloat16(in_order[k + i]);
      return;
    }
    const int64_t column_step = is_bfloat16 ? 2 : 1;
    const int64_t second = column_step == 2 ? 1 : LANES;
    for (int64_t k = 0; k < stride; k += COLUMNS)
      for (int64_t i = 0; i < LANES; i++) {
        float* to = numbers + first * stride + k * n + (piece - first) * LANES + i;
        to[0] = in_order[k + column_step * i];
        to[n * LANES] = in_order[k + column_step * i + second];
      }
  }

  // 32 columns of a token tile of 16.
  Ints* tile(int64_t step, int64_t token_tile) const {
    return reinterpret_cast<Ints*>(numbers) + (token_tile * (stride / tiles::COLUMNS) + step) * tiles::ROWS;
  }
  // `numbers(t, j)` are LANES columns of token t of the tile, from column j of the tile on.
  template <class Numbers>
  INLINE void put_tile(int64_t step, int64_t token_tile, const Numbers& numbers) const {
    Ints* rows = tile(step, token_tile);
    for (int64_t t = 0; t < tiles::ROWS; t++) rows[t] = to_bfloat16(numbers(t, 0), numbers(t, LANES));
    if (layout == Layout::pair_rows) transpose(rows);
  }

 private:
  template <class Fill>
  void make_tiles(int64_t token_tile, const Fill& fill, float* in_order) const {
    const int64_t first = token_tile * tiles::ROWS;
    for (int64_t t = 0; t < tiles::ROWS; t++) {
      float* row = in_order + t * stride;
      if (first + t < tokens) fill(first + t, row);
      std::fill(row + (first + t < tokens ? columns : 0), row + stride, 0.0f);
    }
    for (int64_t step = 0; step < stride / tiles::COLUMNS; step++)
      put_tile(step, token_tile, [&](int64_t t, int64_t j) { return load<Floats>(in_order + t * stride + step * tiles::COLUMNS + j); });
  }
};
}  // namespace
