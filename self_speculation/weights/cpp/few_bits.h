// Weights in few bits: their formats, how they are made of the rows of a `.gguf` file, and their products.
//
// A weight [N, K] is one tensor of bytes: a header with the code of the format, then panels of 16 rows. A panel has the
// quants of 32 columns in one block. Rows are padded to 16 and columns to 32 by zeros.
//
//   a weight   | header | panel: rows 0 to 15 | panel: rows 16 to 31 | ...
//   a panel    | block: columns 0 to 31 | block: columns 32 to 63 | ...
//              with super-blocks, scales of 256 columns (`super_scale_bytes`) precede each 8 blocks
//   a block    | 16 scales | 16 minimums | low: 4 planes of 64 bytes | high: bits - 4 planes of 64 bytes |
//
// A number is (quant - offset) * scale + minimum. Formats without minimums have 0 there; the format of copies has zero points
// there, the value of quant 8. Where 16 columns share a scale, scales and minimums of the first half of the block precede those
// of the second half. In a plane, row r has bytes 4 r to 4 r + 3:
//   low   byte 4 r + j of plane i has the lower 4 bits of two quants: of column 8 i + j in its lower half, of column
//         8 i + 4 + j in its upper half;
//   high  byte 4 r + j of plane i has the upper bits of columns 4 v + j, for 8 / (bits - 4) numbers v, in their order.
// Quants of 8 bits have 8 planes in the place of low and high: byte 4 r + j of plane v is the quant of column 4 v + j.
#pragma once
#include "vectors.h"

namespace {
constexpr int64_t PANEL = 16;         // rows side by side
constexpr int64_t BLOCK = 32;         // columns of a block
constexpr int64_t SUPER_BLOCK = 256;  // columns of a super-block
constexpr int64_t HEADER = 64;        // bytes
constexpr int64_t PLANE = 64;         // bytes
constexpr int64_t LOW = PANEL * BLOCK / 2;  // bytes of the low planes
constexpr int64_t BYTES_AHEAD = 4096;

struct Format {
  int code;          // ggml's number; 0: the format of copies and of models that are rounded here
  int64_t in_file;   // bytes of a block or a super-block in a file
  int bits;          // of a quant
  int scale_columns; // columns that share a scale
  bool has_minimum;
  bool has_super_blocks;  // scales are bytes, times a number for 256 columns that precedes the blocks
  float offset;

  int64_t scale_bytes() const {
    return has_super_blocks ? PANEL * (BLOCK / scale_columns) * (1 + has_minimum) : PANEL * 2 * (1 + has_minimum);
  }
  int64_t block_bytes() const { return scale_bytes() + LOW + (bits - 4) * PLANE; }
  int64_t super_scale_bytes() const { return has_super_blocks ? PANEL * 2 * (1 + has_minimum) : 0; }
  // Bytes of a panel that precede a block and the scales of a super-block that begins there. For the number of blocks: bytes of a
  // panel.
  int64_t bytes_before(int64_t block) const {
    return block * block_bytes() + (block + SUPER_BLOCK / BLOCK - 1) / (SUPER_BLOCK / BLOCK) * super_scale_bytes();
  }
  int64_t num_bytes(int64_t rows, int64_t columns) const {
    return HEADER + round_up(rows, PANEL) / PANEL * bytes_before(round_up(columns, BLOCK) / BLOCK);
  }
};
constexpr Format FORMATS[] = {
    {0, 0, 4, 32, true, false, 8},      // scales in bfloat16; in all formats below in float16
    {2, 18, 4, 32, false, false, 8},    // Q4_0
    {3, 20, 4, 32, true, false, 0},     // Q4_1
    {6, 22, 5, 32, false, false, 16},   // Q5_0
    {7, 24, 5, 32, true, false, 0},     // Q5_1
    {8, 34, 8, 32, false, false, 128},  // Q8_0
    {10, 84, 4, 16, true, true, 0},     // Q2_K
    {11, 110, 4, 16, false, true, 4},   // Q3_K
    {12, 144, 4, 32, true, true, 0},    // Q4_K
    {13, 176, 5, 32, true, true, 0},    // Q5_K
    {14, 210, 6, 16, false, true, 32},  // Q6_K
    {20, 18, 8, 32, false, false, 128}, // IQ4_NL
    {23, 136, 8, 32, false, true, 128}, // IQ4_XS
};
const Format& format_of(int64_t code) {
  for (const Format& format : FORMATS)
    if (format.code == code) return format;
  STD_TORCH_CHECK(false, "weight: there is no format ", code);
}

// Scales and minimums of LANES rows.
struct Scales {
  Floats scales = {};
  Floats minimums = {};
  // The values of quant 0.
  Floats zeros(const Format& format) const { return fma(scales, splat(-format.offset), minimums); }
};
// Scales in 16 bits: of a block or, in formats with super-blocks, of a super-block.
template <size_t I>
INLINE Scales load_scales(const uint8_t* at, int64_t row) {
  using Number = std::conditional_t<FORMATS[I].code == 0, BFloat16, Half>;
  auto numbers = [&](const uint8_t* from) { return widen(reinterpret_cast<const Number*>(from) + row); };
  return {numbers(at), FORMATS[I].has_minimum ? numbers(at + 2 * PANEL) : Floats{}};
}
// Scales of half a block, in a super-block with these scales.
template <size_t I>
INLINE Scales half_scales(const Scales& super_scales, const uint8_t* block, int64_t half, int64_t row) {
  constexpr const Format& format = FORMATS[I];
  if constexpr (!format.has_super_blocks) return load_scales<I>(block, row);
  const auto* at = reinterpret_cast<const int8_t*>(block) + half * PANEL * (1 + format.has_minimum) + row;
  return {super_scales.scales * widen(at), format.has_minimum ? -super_scales.minimums * widen(at + PANEL) : Floats{}};
}

// Inputs of products in eight bits, by blocks of 32 columns.
struct RoundedInputs {
  int64_t tokens;
  int64_t blocks;
  int8_t* quants;  // [blocks, T, 32] from -127 to 127
  float* scales;   // [blocks, T]
  float* sums;     // [blocks, T, 3] of the first half, of the second half, and of the block

  // In memory for T * blocks * 32 floats.
  RoundedInputs(Floats* memory, int64_t tokens, int64_t blocks)
      : tokens(tokens), blocks(blocks), quants(reinterpret_cast<int8_t*>(memory)),
        scales(reinterpret_cast<float*>(quants + tokens * blocks * BLOCK)), sums(scales + tokens * blocks) {}
  // Rounds the numbers [blocks * 32] of a token. An infinity makes quants of 0 and a scale of infinity, whose product is NaN.
  // NaN makes a scale of NaN.
  void round(int64_t token, const float* numbers) const {
    for (int64_t block = 0; block < blocks; block++) {
      const float* values = numbers + block * BLOCK;
      int32_t largest = 0;  // absolute values are in the order of their bits, NaN last
      int32_t half_sums[2] = {};
      for (int j = 0; j < BLOCK; j++) largest = std::max(largest, std::bit_cast<int32_t>(values[j]) & 0x7fffffff);
      const float range = std::bit_cast<float>(largest);
      const float inverse_scale = range > 1e-30f ? 127.0f / range : 0.0f;
      const int64_t at = block * tokens + token;
      int8_t* block_quants = &quants[at * BLOCK];
      for (int half = 0; half < 2; half++)
        for (int j = half * 16; j < half * 16 + 16; j++) {
          constexpr float nearest = 0x1.8p23f;  // a sum with it has no fraction
          int32_t quant = std::bit_cast<int32_t>(values[j] * inverse_scale + nearest) - std::bit_cast<int32_t>(nearest);
          block_quants[j] = int8_t(quant);
          half_sums[half] += block_quants[j];
        }
      scales[at] = range / 127.0f;
      for (int half = 0; half < 2; half++) sums[at * 3 + half] = scales[at] * float(half_sums[half]);
      sums[at * 3 + 2] = scales[at] * float(half_sums[0] + half_sums[1]);
    }
  }
};

// Unpacks the quants of columns 8 i to 8 i + 7 of LANES rows, four columns a vector. `low`: the low planes, from the first row
// on. If a product does not take eight bits, `upper` gets the upper four.
template <int HIGH_BITS>
INLINE void unpack_quants(const uint8_t* low, int i, Bytes* quants, Bytes* upper) {
  typedef uint16_t Pairs VECTOR(4);  // there are no shifts of bytes
  if constexpr (HIGH_BITS == 4) {
#pragma GCC unroll 2
    for (int j = 0; j < 2; j++) {
      quants[j] = load<Bytes>(low + (2 * i + j) * PLANE);
      if (!TAKES_EIGHT_BITS) {
        upper[j] = (Bytes)((Pairs)quants[j] >> 4) & 15;
        quants[j] &= 15;
      }
    }
    return;
  }
  const Bytes bytes = load<Bytes>(low + i * PLANE);
  quants[0] = bytes & 15;
  quants[1] = (Bytes)((Pairs)bytes >> 4) & 15;
  if constexpr (HIGH_BITS == 1 || HIGH_BITS == 2) {
    constexpr int per_byte = 8 / HIGH_BITS;
#pragma GCC unroll 2
    for (int j = 0; j < 2; j++) {
      const int v = 2 * i + j;
      const int shift = 4 - HIGH_BITS * (v % per_byte);
      Pairs bits = (Pairs)load<Bytes>(low + LOW + v / per_byte * PLANE);
      quants[j] |= (Bytes)(shift >= 0 ? bits << shift : bits >> -shift) & uint8_t(((1 << HIGH_BITS) - 1) << 4);
    }
  }
}

// Calls f<index in FORMATS>().
template <class F>
void with_format(const Format& format, const F& f) {
  with_count<std::size(FORMATS)>(&format - FORMATS + 1, [&]<int N>() { f.template operator()<N - 1>(); });
}

// 32 columns of 16 rows.
template <size_t I>
class QuantBlock {
 public:
  static constexpr const Format& FORMAT = FORMATS[I];

  INLINE QuantBlock(const uint8_t* at, const Scales* super_scales) : low_(at + FORMAT.scale_bytes()) {
#pragma GCC unroll 2
    for (int v = 0; v < VECTORS; v++) {
#pragma GCC unroll 2
      for (int half = 0; half <= HALVES; half++) {
        const Scales scales = half_scales<I>(super_scales[v], at, half, v * LANES);
        scales_[half][v] = scales.scales;
        zeros_[half][v] = scales.zeros(FORMAT);
      }
      if constexpr (UNPACKS_ONCE) {
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) unpack_quants<HIGH_BITS>(low_ + v * LANES * 4, i, &kept_[v][2 * i], nullptr);
      }
    }
  }

  // Adds products with N tokens, whose inputs begin at `at`, to `sums`, [N, PANEL].
  template <int N>
  INLINE void add_products(const RoundedInputs& x, int64_t at, float* sums) const {
    // Vectors share loads of inputs, which is faster for several tokens only.
    constexpr int vectors_at_a_time = N == 1 ? 1 : VECTORS;
#pragma GCC unroll 2
    for (int v = 0; v < VECTORS; v += vectors_at_a_time) add_products<N, vectors_at_a_time>(x, at, v, sums);
  }

  // Writes the numbers in bfloat16, [16 pairs of columns, 16 rows, 2]: where a vector has the 16 rows.
  INLINE void unpack(Ints* to) const {
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
      Bytes quants[2];
      Bytes upper[2] = {};
      if constexpr (UNPACKS_ONCE) std::copy_n(&kept_[0][2 * i], 2, quants);
      else unpack_quants<HIGH_BITS>(low_, i, quants, upper);
      const int half = HALVES ? i / 2 : 0;
#pragma GCC unroll 2
      for (int j = 0; j < 2; j++) {
        if (SPLITS) quants[j] |= upper[j] << 4;
        auto column = [&](int n) __attribute__((always_inline)) {
          const Ints quant = (Ints)quants[j] >> 8 * n & 255;
          return fma(__builtin_convertvector(quant, Floats), scales_[half][0], zeros_[half][0]);
        };
        to[4 * i + 2 * j] = to_pairs(column(0), column(1));
        to[4 * i + 2 * j + 1] = to_pairs(column(2), column(3));
      }
    }
  }

 private:
  static constexpr int HIGH_BITS = FORMAT.bits - 4;
  static constexpr int VECTORS = PANEL / LANES;                           // of the 16 rows
  static constexpr bool HALVES = FORMAT.scale_columns < BLOCK;            // each half has scales
  static constexpr bool SPLITS = HIGH_BITS == 4 && !TAKES_EIGHT_BITS;     // into lower and upper four bits
  static constexpr bool UNPACKS_ONCE = HIGH_BITS == 1 || HIGH_BITS == 2;  // quants, since to put them together takes long
  // Times eight columns that `dot` adds up.
  static constexpr int STEPS_PER_TOTAL = HIGH_BITS == 2 ? 1 : HIGH_BITS == 1 || HALVES ? 2 : 4;

  template <int N, int V>
  INLINE void add_products(const RoundedInputs& x, int64_t at, int first, float* sums) const {
    Ints dots[N][V] = {};
    Ints upper_dots[N][V] = {};
    Ints totals[N][V] = {};
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
      Bytes quants[V][2];
      Bytes upper[V][2];
#pragma GCC unroll 2
      for (int v = 0; v < V; v++) {
        if constexpr (UNPACKS_ONCE) std::copy_n(&kept_[first + v][2 * i], 2, quants[v]);
        else unpack_quants<HIGH_BITS>(low_ + (first + v) * LANES * 4, i, quants[v], upper[v]);
      }
#pragma GCC unroll 8
      for (int n = 0; n < N; n++) {
#pragma GCC unroll 2
        for (int j = 0; j < 2; j++) {
          const int32_t inputs = load<int32_t>(x.quants + (at + n) * BLOCK + 8 * i + 4 * j);  // of four columns
#pragma GCC unroll 2
          for (int v = 0; v < V; v++) {
            dots[n][v] = dot(dots[n][v], quants[v][j], inputs);
            keep_order(dots[n][v]);
            if (SPLITS) {
              upper_dots[n][v] = dot(upper_dots[n][v], upper[v][j], inputs);
              keep_order(upper_dots[n][v]);
            }
          }
        }
        constexpr int steps_per_scale = HALVES ? 2 : 4;  // times eight columns
        const int half = i / steps_per_scale;
        if ((i + 1) % STEPS_PER_TOTAL) continue;
#pragma GCC unroll 2
        for (int v = 0; v < V; v++) {
          totals[n][v] += total(dots[n][v]);
          dots[n][v] = Ints{};
          if ((i + 1) % steps_per_scale) continue;
          static_assert(!(SPLITS && HALVES));  // `upper_dots` are of the block
          if (SPLITS) totals[n][v] += total(upper_dots[n][v]) << 4;
          float* to = sums + n * PANEL + (first + v) * LANES;
          Floats sum = fma(zeros_[half][first + v], splat(x.sums[(at + n) * 3 + (HALVES ? half : 2)]), load<Floats>(to));
          sum = fma(__builtin_convertvector(totals[n][v], Floats) * scales_[half][first + v], splat(x.scales[at + n]), sum);
          std::memcpy(to, &sum, sizeof(Floats));
          totals[n][v] = Ints{};
        }
      }
    }
  }

  const uint8_t* low_;
  Floats scales_[1 + HALVES][VECTORS];
  Floats zeros_[1 + HALVES][VECTORS];
  Bytes kept_[UNPACKS_ONCE ? VECTORS : 1][8];
};

// Products of a panel and all tokens, [T, PANEL]. The sums of a token alone stay in registers. `x` is a copy: what is written
// to `out` does not change it.
template <size_t I, bool ONE_TOKEN>
__attribute__((noinline)) void panel_products(const uint8_t* panel, const RoundedInputs x, float* out) {
  constexpr const Format& format = FORMATS[I];
  const int64_t tokens = ONE_TOKEN ? 1 : x.tokens;
  const uint8_t* at = panel;
  Scales super_scales[PANEL / LANES];
  float sums[ONE_TOKEN ? PANEL : 1] = {};
  if (!ONE_TOKEN) std::fill_n(out, tokens * PANEL, 0.0f);
  for (int64_t b = 0; b < x.blocks; b++) {
    if (format.has_super_blocks && b % (SUPER_BLOCK / BLOCK) == 0) {
      for (int v = 0; v < PANEL / LANES; v++) super_scales[v] = load_scales<I>(at, v * LANES);
      at += format.super_scale_bytes();
    }
    for (int64_t byte = 0; byte < format.block_bytes(); byte += 64) __builtin_prefetch(at + byte + BYTES_AHEAD);
    const QuantBlock<I> block(at, super_scales);
    at += format.block_bytes();
    if constexpr (ONE_TOKEN) {
      block.template add_products<1>(x, b, sums);
    } else {
      int64_t t = 0;
      const int64_t inputs = b * tokens;
      if constexpr (LANES == PANEL)  // there are registers for the sums of eight
        for (; t + 8 <= tokens; t += 8) block.template add_products<8>(x, inputs + t, out + t * PANEL);
      for (; t + 4 <= tokens && t + 5 != tokens; t += 4) block.template add_products<4>(x, inputs + t, out + t * PANEL);
      switch (tokens - t) {
        case 1: block.template add_products<1>(x, inputs + t, out + t * PANEL); break;
        case 2: block.template add_products<2>(x, inputs + t, out + t * PANEL); break;
        case 3: block.template add_products<3>(x, inputs + t, out + t * PANEL); break;
        case 5: block.template add_products<5>(x, inputs + t, out + t * PANEL);  // a token alone takes as long as two
      }
    }
  }
  if (ONE_TOKEN) std::copy_n(sums, PANEL, out);
}

void panel_products(const Format& format, const uint8_t* panel, const RoundedInputs& x, float* out) {
  with_format(format, [&]<size_t I>() {
    x.tokens == 1 ? panel_products<I, true>(panel, x, out) : panel_products<I, false>(panel, x, out);
  });
}

// Writes the quants [32] of a row into the planes of a block.
void pack_quants(const uint8_t* quants, int64_t row, int high_bits, uint8_t* low) {
  auto word = [&](int v) { return load<uint32_t>(quants + 4 * v); };
  auto add = [&](uint8_t* to, uint32_t bits) {
    bits |= load<uint32_t>(to + row * 4);
    std::memcpy(to + row * 4, &bits, 4);
  };
  for (int v = 0; v < 8; v++) {
    if (high_bits == 4) {
      add(low + v * PLANE, word(v));
      continue;
    }
    add(low + v / 2 * PLANE, (word(v) & 0x0f0f0f0f) << v % 2 * 4);
    if (!high_bits) continue;
    const int per_byte = 8 / high_bits;
    add(low + LOW + v / per_byte * PLANE, (word(v) >> 4 & 0x01010101u * ((1 << high_bits) - 1)) << v % per_byte * high_bits);
  }
}

// A block of a row, as a file has it. ggml's layouts are described in its quants.
struct FileBlock {
  uint8_t quants[BLOCK];
  const uint8_t* scale;    // two bytes, of the block or of the super-block
  const uint8_t* minimum;  // the same
  uint8_t half_scales[2] = {};
  uint8_t half_minimums[2] = {};
};
FileBlock block_in_file(const Format& format, const uint8_t* row, int64_t block) {
  FileBlock to;
  const int64_t b = block % 8;
  const int64_t n = b / 4;
  const int64_t l = b % 4;
  const uint8_t* at = row + (format.has_super_blocks ? block / 8 : block) * format.in_file;
  auto all = [&](auto f) { for (int j = 0; j < BLOCK; j++) to.quants[j] = uint8_t(f(j)); };
  auto nibble = [](const uint8_t* low, int j) { return low[j % 16] >> j / 16 * 4 & 15; };
  constexpr int8_t iq4_values[] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
  to.scale = at;
  to.minimum = at + 2;
  switch (format.code) {
    case 2: all([&](int j) { return nibble(at + 2, j); }); break;
    case 3: all([&](int j) { return nibble(at + 4, j); }); break;
    case 6: case 7: {
      const uint8_t* low = at + (format.code == 6 ? 6 : 8);
      const uint32_t high = load<uint32_t>(low - 4);
      all([&](int j) { return nibble(low, j) | (high >> j & 1) << 4; });
      break;
    }
    case 8: all([&](int j) { return at[2 + j] ^ 128; }); break;  // plus 128
    case 10:
      to.scale = at + 80;
      to.minimum = at + 82;
      all([&](int j) { return at[16 + 32 * n + j] >> 2 * l & 3; });
      for (int half = 0; half < 2; half++) {
        to.half_scales[half] = at[2 * b + half] & 15;
        to.half_minimums[half] = at[2 * b + half] >> 4;
      }
      break;
    case 11:
      to.scale = at + 108;
      all([&](int j) { return (at[32 + 32 * n + j] >> 2 * l & 3) | (at[j] >> b & 1) << 2; });
      for (int half = 0; half < 2; half++) {
        const int64_t i = 2 * b + half;
        const int low = at[96 + i % 8] >> i / 8 * 4 & 15;
        const int high = at[104 + i % 4] >> i / 4 * 2 & 3;
        to.half_scales[half] = uint8_t((low | high << 4) - 32);
      }
      break;
    case 12: case 13: {
      const uint8_t* scales = at + 4;
      const uint8_t* low = at + (format.code == 12 ? 16 : 48);
      all([&](int j) { return (low[b / 2 * 32 + j] >> b % 2 * 4 & 15) | (format.code == 13 ? (at[16 + j] >> b & 1) << 4 : 0); });
      to.half_scales[0] = b < 4 ? scales[b] & 63 : (scales[b + 4] & 15) | scales[b - 4] >> 6 << 4;
      to.half_minimums[0] = b < 4 ? scales[b + 4] & 63 : scales[b + 4] >> 4 | scales[b] >> 6 << 4;
      break;
    }
    case 14:
      to.scale = at + 208;
      all([&](int j) { return (at[64 * n + l % 2 * 32 + j] >> l / 2 * 4 & 15) | (at[128 + 32 * n + j] >> 2 * l & 3) << 4; });
      for (int half = 0; half < 2; half++) to.half_scales[half] = at[192 + 2 * b + half];
      break;
    case 20: all([&](int j) { return iq4_values[nibble(at + 2, j)] + 128; }); break;
    case 23:
      all([&](int j) { return iq4_values[nibble(at + 8 + 16 * b, j)] + 128; });
      to.half_scales[0] = uint8_t(((at[4 + b / 2] >> b % 2 * 4 & 15) | (load<uint16_t>(at + 2) >> 2 * b & 3) << 4) - 32);
  }
  return to;
}

// Moves rows [.., blocks] of a file into panels, which are zeros.
void repack_rows(const Format& format, const uint8_t* raw, int64_t row_bytes, int64_t first, int64_t last, int64_t blocks,
                 uint8_t* panels) {
  for (int64_t row = first; row < last; row++)
    for (int64_t b = 0; b < blocks; b++) {
      const int64_t r = row % PANEL;
      uint8_t* scales = panels + row / PANEL * format.bytes_before(blocks) + format.bytes_before(b);  // in 16 bits
      uint8_t* block = scales;
      const FileBlock from = block_in_file(format, raw + row * row_bytes, b);
      const bool has_scales = !format.has_super_blocks || b % (SUPER_BLOCK / BLOCK) == 0;
      if (format.has_super_blocks) {
        block += has_scales ? format.super_scale_bytes() : 0;
        for (int half = 0; half < BLOCK / format.scale_columns; half++) {
          uint8_t* at = block + half * PANEL * (1 + format.has_minimum) + r;
          *at = from.half_scales[half];
          if (format.has_minimum) at[PANEL] = from.half_minimums[half];
        }
      }
      if (has_scales) std::memcpy(scales + 2 * r, from.scale, 2);
      if (has_scales && format.has_minimum) std::memcpy(scales + 2 * PANEL + 2 * r, from.minimum, 2);
      pack_quants(from.quants, r, format.bits - 4, block + format.scale_bytes());
    }
}

Tensor empty(std::initializer_list<int64_t> shape, int32_t dtype) {
  int64_t strides[4] = {1, 1, 1, 1};
  const int64_t n = shape.size();
  for (int64_t i = n - 1; i > 0; i--) strides[i - 1] = strides[i] * shape.begin()[i];
  AtenTensorHandle made;  // not by `torch::stable::empty`, which takes longer than a small product
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(n, shape.begin(), strides, dtype, aoti_torch_device_type_cpu(), 0, &made));
  return Tensor(made);
}

// A weight [rows, columns] of zeros in few bits.
Tensor new_weight(const Format& format, int64_t rows, int64_t columns) {
  Tensor weight = empty({format.num_bytes(rows, columns)}, aoti_torch_dtype_uint8());
  auto* bytes = static_cast<uint8_t*>(weight.mutable_data_ptr());
  std::fill_n(bytes, weight.numel(), 0);
  bytes[0] = uint8_t(format.code);
  return weight;
}

// A weight of a file, whose rows are [N, bytes]. Only moves numbers.
Tensor repack_weight(const Tensor& from, int64_t code, int64_t columns) {
  const Format& format = format_of(code);
  const int64_t block_columns = format.has_super_blocks ? SUPER_BLOCK : BLOCK;
  const int64_t rows = from.size(0);
  STD_TORCH_CHECK(format.in_file && from.dim() == 2 && from.is_contiguous() && from.scalar_type() == ScalarType::Byte &&
                      columns % block_columns == 0 && from.size(1) == columns / block_columns * format.in_file,
                  "weight: not that of a file, in format ", code);
  Tensor weight = new_weight(format, rows, columns);
  const auto* raw = static_cast<const uint8_t*>(from.const_data_ptr());
  auto* panels = static_cast<uint8_t*>(weight.mutable_data_ptr()) + HEADER;
  torch::stable::parallel_for(0, round_up(rows, PANEL) / PANEL, 1, [&](int64_t first, int64_t last) {
    repack_rows(format, raw, from.size(1), first * PANEL, std::min(rows, last * PANEL), columns / BLOCK, panels);
  });
  return weight;
}

// Rows [n] of a weight in few bits, [n, columns] in float32.
Tensor rows_of_weight(const Tensor& weight, const Tensor& ids, int64_t rows, int64_t columns) {
  const auto* bytes = static_cast<const uint8_t*>(weight.const_data_ptr());
  const Format& format = format_of(bytes[0]);
  const auto* wanted = static_cast<const int64_t*>(ids.const_data_ptr());
  const int64_t n = ids.numel();
  const int64_t blocks = round_up(columns, BLOCK) / BLOCK;
  Tensor numbers = empty({n, columns}, aoti_torch_dtype_float32());
  auto* to = static_cast<float*>(numbers.mutable_data_ptr());
  STD_TORCH_CHECK(std::all_of(wanted, wanted + n, [&](int64_t id) { return id >= 0 && id < rows; }), "ids: not those of rows");
  auto read = [&]<size_t I>() {
    constexpr const Format& format = FORMATS[I];
    torch::stable::parallel_for(0, n, 64, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; i++) {
        const int64_t row = wanted[i] % PANEL;
        const int64_t lane = row % LANES;
        const uint8_t* block = bytes + HEADER + wanted[i] / PANEL * format.bytes_before(blocks);
        Scales super_scales;
        for (int64_t b = 0; b < blocks; b++) {
          if (format.has_super_blocks && b % (SUPER_BLOCK / BLOCK) == 0) {
            super_scales = load_scales<I>(block, row - lane);
            block += format.super_scale_bytes();
          }
          Scales halves[2];
          for (int half = 0; half < 2; half++)
            halves[half] = half_scales<I>(super_scales, block, format.scale_columns == BLOCK ? 0 : half, row - lane);
          Bytes quants[8];
          Bytes upper[8] = {};
          const uint8_t* low = block + format.scale_bytes() + (row - lane) * 4;
          for (int i = 0; i < 4; i++) unpack_quants<format.bits - 4>(low, i, &quants[2 * i], &upper[2 * i]);
          for (int64_t j = 0; j < std::min(BLOCK, columns - b * BLOCK); j++) {
            const Scales& scales = halves[j / 16];
            float quant = float(quants[j / 4][lane * 4 + j % 4] + upper[j / 4][lane * 4 + j % 4] * 16);
            to[i * columns + b * BLOCK + j] = (quant - format.offset) * scales.scales[lane] + scales.minimums[lane];
          }
          block += format.block_bytes();
        }
      }
    });
  };
  with_format(format, read);
  return numbers;
}
}  // namespace
