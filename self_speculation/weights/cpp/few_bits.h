// Weights in few bits: the formats, the way from a row of a `.gguf` file, and the products with inputs in eight bits.
//
// A weight [N, K] is one tensor of bytes: a header with the code of the format, then panels of 16 rows. A panel has the
// quants of 32 columns in one block. Rows are padded to 16 and columns to 32 by zeros.
//
//   a weight   | header | panel: rows 0 to 15 | panel: rows 16 to 31 | ...
//   a panel    | block: columns 0 to 31 | block: columns 32 to 63 | ...
//              with super-blocks, scales of 256 columns (`super_scale_bytes`) precede each 8 blocks
//   a block    | 16 scales | 16 minimums | low: 4 planes of 64 bytes | high: bits - 4 planes of 64 bytes |
//
// An element is (quant - offset) * scale + minimum. Formats without minimums have 0 there; the format of copies has zero points
// there, the value of quant 8. Where 16 columns share a scale, each half of a block has 16 scales and 16 minimums, the first half
// first. In a plane, row r has bytes 4 r to 4 r + 3:
//   low   byte 4 r + j of plane i has the lower 4 bits of two quants: of column 8 i + j in its lower half, of column
//         8 i + 4 + j in its upper half;
//   high  byte 4 r + j of plane i has the upper bits of columns 4 v + j, for the 8 / (bits - 4) values of v that begin at
//         8 / (bits - 4) * i.
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
constexpr int64_t BYTES_AHEAD = 4096;       // that are fetched into the cache before a kernel reads them

// Formats by ggml's numbers. INT4 is the format of copies and of models that are rounded here.
enum FormatCode {
  INT4 = 0, Q4_0 = 2, Q4_1 = 3, Q5_0 = 6, Q5_1 = 7, Q8_0 = 8, Q2_K = 10, Q3_K = 11, Q4_K = 12, Q5_K = 13, Q6_K = 14, IQ4_NL = 20,
  IQ4_XS = 23,
};
struct Format {
  FormatCode code;
  int64_t file_bytes;     // of a block or a super-block in a file
  int bits;               // of a quant
  int scale_columns;      // columns that share a scale
  bool has_minimum;
  bool has_super_blocks;  // scales are bytes, times a scale of 256 columns that precedes the blocks
  float offset;

  int64_t scale_bytes() const {
    return has_super_blocks ? PANEL * (BLOCK / scale_columns) * (1 + has_minimum) : PANEL * 2 * (1 + has_minimum);
  }
  int64_t block_bytes() const { return scale_bytes() + LOW + (bits - 4) * PLANE; }
  int64_t super_scale_bytes() const { return has_super_blocks ? PANEL * 2 * (1 + has_minimum) : 0; }
  // Bytes of a panel before a block, or before the scales of the super-block that begins with it. All bytes of a panel, if `block`
  // is the number of blocks.
  int64_t bytes_before(int64_t block) const {
    return block * block_bytes() + (block + SUPER_BLOCK / BLOCK - 1) / (SUPER_BLOCK / BLOCK) * super_scale_bytes();
  }
  int64_t num_bytes(int64_t rows, int64_t columns) const {
    return HEADER + round_up(rows, PANEL) / PANEL * bytes_before(round_up(columns, BLOCK) / BLOCK);
  }
};
constexpr Format FORMATS[] = {
    {INT4, 0, 4, 32, true, false, 8},  // scales in bfloat16; in all formats below in float16
    {Q4_0, 18, 4, 32, false, false, 8},
    {Q4_1, 20, 4, 32, true, false, 0},
    {Q5_0, 22, 5, 32, false, false, 16},
    {Q5_1, 24, 5, 32, true, false, 0},
    {Q8_0, 34, 8, 32, false, false, 128},
    {Q2_K, 84, 4, 16, true, true, 0},
    {Q3_K, 110, 4, 16, false, true, 4},
    {Q4_K, 144, 4, 32, true, true, 0},
    {Q5_K, 176, 5, 32, true, true, 0},
    {Q6_K, 210, 6, 16, false, true, 32},
    {IQ4_NL, 18, 8, 32, false, false, 128},
    {IQ4_XS, 136, 8, 32, false, true, 128},
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
  // The elements of quant 0.
  Floats zeros(const Format& format) const { return fma(scales, splat(-format.offset), minimums); }
};
// Scales in 16 bits: of a block or, in formats with super-blocks, of a super-block.
template <size_t I>
INLINE Scales load_scales(const uint8_t* at, int64_t row) {
  using Scalar = std::conditional_t<FORMATS[I].code == INT4, BFloat16, Half>;
  auto read = [&](const uint8_t* from) { return widen(reinterpret_cast<const Scalar*>(from) + row); };
  return {read(at), FORMATS[I].has_minimum ? read(at + 2 * PANEL) : Floats{}};
}
// Scales of half a block, in a super-block with `super_scales`.
template <size_t I>
INLINE Scales half_scales(const Scales& super_scales, const uint8_t* block, int64_t half, int64_t row) {
  constexpr const Format& format = FORMATS[I];
  if constexpr (!format.has_super_blocks) return load_scales<I>(block, row);
  const auto* at = reinterpret_cast<const int8_t*>(block) + half * PANEL * (1 + format.has_minimum) + row;
  return {super_scales.scales * widen(at), format.has_minimum ? -super_scales.minimums * widen(at + PANEL) : Floats{}};
}

// Inputs in eight bits, by blocks of 32 columns.
struct RoundedInputs {
  int64_t tokens;
  int64_t blocks;
  int8_t* quants;  // [blocks, T, 32] from -127 to 127
  float* scales;   // [blocks, T]
  float* sums;     // [blocks, T, 3] of the rounded inputs in the first half, in the second half, and in the block

  // `memory` has room for T * blocks * 32 floats.
  RoundedInputs(Floats* memory, int64_t tokens, int64_t blocks)
      : tokens(tokens), blocks(blocks), quants(reinterpret_cast<int8_t*>(memory)),
        scales(reinterpret_cast<float*>(quants + tokens * blocks * BLOCK)), sums(scales + tokens * blocks) {}
  // Rounds the input [blocks * 32] of a token. An infinity makes quants of 0 and a scale of infinity, whose product is NaN.
  // NaN makes a scale of NaN.
  void round(int64_t token, const float* input) const {
    for (int64_t block = 0; block < blocks; block++) {
      const float* values = input + block * BLOCK;
      int32_t largest = 0;  // bits of absolute values have the order of the values, NaN last
      int32_t half_sums[2] = {};
      for (int j = 0; j < BLOCK; j++) largest = std::max(largest, std::bit_cast<int32_t>(values[j]) & 0x7fffffff);
      const float range = std::bit_cast<float>(largest);
      const float inverse_scale = range > 1e-30f ? 127.0f / range : 0.0f;
      const int64_t at = block * tokens + token;
      int8_t* block_quants = &quants[at * BLOCK];
      for (int half = 0; half < 2; half++)
        for (int j = half * 16; j < half * 16 + 16; j++) {
          constexpr float nearest = 0x1.8p23f;  // added to a number it rounds the number
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
void dispatch_format(const Format& format, const F& f) {
  dispatch_count<std::size(FORMATS)>(&format - FORMATS + 1, [&]<int N>() { f.template operator()<N - 1>(); });
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
        for (int i = 0; i < 4; i++) unpack_quants<HIGH_BITS>(low_ + v * LANES * 4, i, &unpacked_[v][2 * i], nullptr);
      }
    }
  }

  // Adds products with N tokens, from input `at` of [blocks * T] on, to `sums`, [N, PANEL].
  template <int N>
  INLINE void add_products(const RoundedInputs& x, int64_t at, float* sums) const {
    // For several tokens it is faster to load inputs once for both vectors.
    constexpr int vectors_at_a_time = N == 1 ? 1 : VECTORS;
#pragma GCC unroll 2
    for (int v = 0; v < VECTORS; v += vectors_at_a_time) add_products<N, vectors_at_a_time>(x, at, v, sums);
  }

  // Writes the elements in bfloat16, [16 pairs of columns, 16 rows, 2]. A vector must have 16 lanes.
  INLINE void unpack(Ints* to) const {
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
      Bytes quants[2];
      Bytes upper[2] = {};
      if constexpr (UNPACKS_ONCE) std::copy_n(&unpacked_[0][2 * i], 2, quants);
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
  static constexpr bool HALVES = FORMAT.scale_columns < BLOCK;            // each half of the block has scales
  static constexpr bool SPLITS = HIGH_BITS == 4 && !TAKES_EIGHT_BITS;     // quants into lower and upper four bits
  static constexpr bool UNPACKS_ONCE = HIGH_BITS == 1 || HIGH_BITS == 2;  // for all tokens, since unpacking takes long
  // Steps of eight columns that `dot` adds before `total`.
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
        if constexpr (UNPACKS_ONCE) std::copy_n(&unpacked_[first + v][2 * i], 2, quants[v]);
        else unpack_quants<HIGH_BITS>(low_ + (first + v) * LANES * 4, i, quants[v], upper[v]);
      }
#pragma GCC unroll 8
      for (int n = 0; n < N; n++) {
#pragma GCC unroll 2
        for (int j = 0; j < 2; j++) {
          const int32_t inputs = load<int32_t>(x.quants + (at + n) * BLOCK + 8 * i + 4 * j);  // four columns
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
        constexpr int steps_per_scale = HALVES ? 2 : 4;  // of eight columns
        const int half = i / steps_per_scale;
        if ((i + 1) % STEPS_PER_TOTAL) continue;
#pragma GCC unroll 2
        for (int v = 0; v < V; v++) {
          totals[n][v] += total(dots[n][v]);
          dots[n][v] = Ints{};
          if ((i + 1) % steps_per_scale) continue;
          static_assert(!(SPLITS && HALVES));  // `upper_dots` cover the block
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
  Bytes unpacked_[UNPACKS_ONCE ? VECTORS : 1][8];
};

// Outputs of a panel for all tokens, [T, PANEL]. For one token the sums stay in registers. `x` is a copy, so the compiler knows
// that a write to `outputs` does not change it.
template <size_t I, bool ONE_TOKEN>
__attribute__((noinline)) void multiply_panel(const uint8_t* panel, const RoundedInputs x, float* outputs) {
  constexpr const Format& format = FORMATS[I];
  const int64_t tokens = ONE_TOKEN ? 1 : x.tokens;
  const uint8_t* at = panel;
  Scales super_scales[PANEL / LANES];
  float sums[ONE_TOKEN ? PANEL : 1] = {};
  if (!ONE_TOKEN) std::fill_n(outputs, tokens * PANEL, 0.0f);
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
      const int64_t first = b * tokens;
      if constexpr (LANES == PANEL)  // registers have room for the sums of eight tokens
        for (; t + 8 <= tokens; t += 8) block.template add_products<8>(x, first + t, outputs + t * PANEL);
      for (; t + 4 <= tokens && t + 5 != tokens; t += 4) block.template add_products<4>(x, first + t, outputs + t * PANEL);
      switch (tokens - t) {
        case 1: block.template add_products<1>(x, first + t, outputs + t * PANEL); break;
        case 2: block.template add_products<2>(x, first + t, outputs + t * PANEL); break;
        case 3: block.template add_products<3>(x, first + t, outputs + t * PANEL); break;
        case 5: block.template add_products<5>(x, first + t, outputs + t * PANEL);  // one token takes as long as two
      }
    }
  }
  if (ONE_TOKEN) std::copy_n(sums, PANEL, outputs);
}

void multiply_panel(const Format& format, const uint8_t* panel, const RoundedInputs& x, float* outputs) {
  dispatch_format(format, [&]<size_t I>() {
    x.tokens == 1 ? multiply_panel<I, true>(panel, x, outputs) : multiply_panel<I, false>(panel, x, outputs);
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

// A block of a row as a file has it, by ggml's layouts.
struct FileBlock {
  uint8_t quants[BLOCK];
  const uint8_t* scale;    // two bytes, of the block or of the super-block
  const uint8_t* minimum;  // likewise
  uint8_t half_scales[2] = {};
  uint8_t half_minimums[2] = {};
};
FileBlock block_in_file(const Format& format, const uint8_t* row, int64_t block) {
  FileBlock to;
  const int64_t b = block % 8;  // in the super-block
  const int64_t n = b / 4;      // half of the super-block, 128 columns
  const int64_t l = b % 4;      // in the half
  const uint8_t* at = row + (format.has_super_blocks ? block / 8 : block) * format.file_bytes;
  auto set_quants = [&](auto f) { for (int j = 0; j < BLOCK; j++) to.quants[j] = uint8_t(f(j)); };
  auto nibble = [](const uint8_t* low, int j) { return low[j % 16] >> j / 16 * 4 & 15; };
  constexpr int8_t iq4_values[] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
  to.scale = at;
  to.minimum = at + 2;
  switch (format.code) {
    case Q4_0: set_quants([&](int j) { return nibble(at + 2, j); }); break;
    case Q4_1: set_quants([&](int j) { return nibble(at + 4, j); }); break;
    case Q5_0: case Q5_1: {
      const uint8_t* low = at + (format.code == Q5_0 ? 6 : 8);
      const uint32_t high = load<uint32_t>(low - 4);
      set_quants([&](int j) { return nibble(low, j) | (high >> j & 1) << 4; });
      break;
    }
    case Q8_0: set_quants([&](int j) { return at[2 + j] ^ 128; }); break;  // plus 128
    case Q2_K:
      to.scale = at + 80;
      to.minimum = at + 82;
      set_quants([&](int j) { return at[16 + 32 * n + j] >> 2 * l & 3; });
      for (int half = 0; half < 2; half++) {
        to.half_scales[half] = at[2 * b + half] & 15;
        to.half_minimums[half] = at[2 * b + half] >> 4;
      }
      break;
    case Q3_K:
      to.scale = at + 108;
      set_quants([&](int j) { return (at[32 + 32 * n + j] >> 2 * l & 3) | (at[j] >> b & 1) << 2; });
      for (int half = 0; half < 2; half++) {
        const int64_t i = 2 * b + half;
        const int low = at[96 + i % 8] >> i / 8 * 4 & 15;
        const int high = at[104 + i % 4] >> i / 4 * 2 & 3;
        to.half_scales[half] = uint8_t((low | high << 4) - 32);
      }
      break;
    case Q4_K: case Q5_K: {
      const uint8_t* scales = at + 4;
      const uint8_t* low = at + (format.code == Q4_K ? 16 : 48);
      set_quants([&](int j) { return (low[b / 2 * 32 + j] >> b % 2 * 4 & 15) | (format.code == Q5_K ? (at[16 + j] >> b & 1) << 4 : 0); });
      to.half_scales[0] = b < 4 ? scales[b] & 63 : (scales[b + 4] & 15) | scales[b - 4] >> 6 << 4;
      to.half_minimums[0] = b < 4 ? scales[b + 4] & 63 : scales[b + 4] >> 4 | scales[b] >> 6 << 4;
      break;
    }
    case Q6_K:
      to.scale = at + 208;
      set_quants([&](int j) { return (at[64 * n + l % 2 * 32 + j] >> l / 2 * 4 & 15) | (at[128 + 32 * n + j] >> 2 * l & 3) << 4; });
      for (int half = 0; half < 2; half++) to.half_scales[half] = at[192 + 2 * b + half];
      break;
    case IQ4_NL: set_quants([&](int j) { return iq4_values[nibble(at + 2, j)] + 128; }); break;
    case IQ4_XS:
      set_quants([&](int j) { return iq4_values[nibble(at + 8 + 16 * b, j)] + 128; });
      to.half_scales[0] = uint8_t(((at[4 + b / 2] >> b % 2 * 4 & 15) | (load<uint16_t>(at + 2) >> 2 * b & 3) << 4) - 32);
      break;
    case INT4: break;  // is in no file
  }
  return to;
}

// Moves the rows [begin, end) of a file into panels of zeros.
void repack_rows(const Format& format, const uint8_t* raw, int64_t row_bytes, int64_t begin, int64_t end, int64_t blocks,
                 uint8_t* panels) {
  for (int64_t row = begin; row < end; row++)
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
  AtenTensorHandle made;  // `torch::stable::empty` takes longer than a small product
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

// A weight in few bits, of rows of a file, [N, bytes]. All elements keep their values.
Tensor repack_weight(const Tensor& file_rows, int64_t code, int64_t columns) {
  const Format& format = format_of(code);
  const int64_t block_columns = format.has_super_blocks ? SUPER_BLOCK : BLOCK;
  const int64_t rows = file_rows.size(0);
  STD_TORCH_CHECK(format.file_bytes && file_rows.dim() == 2 && file_rows.is_contiguous() &&
                      file_rows.scalar_type() == ScalarType::Byte && columns % block_columns == 0 &&
                      file_rows.size(1) == columns / block_columns * format.file_bytes,
                  "weight: not that of a file, in format ", code);
  Tensor weight = new_weight(format, rows, columns);
  const auto* raw = static_cast<const uint8_t*>(file_rows.const_data_ptr());
  auto* panels = static_cast<uint8_t*>(weight.mutable_data_ptr()) + HEADER;
  torch::stable::parallel_for(0, round_up(rows, PANEL) / PANEL, 1, [&](int64_t begin, int64_t end) {
    repack_rows(format, raw, file_rows.size(1), begin * PANEL, std::min(rows, end * PANEL), columns / BLOCK, panels);
  });
  return weight;
}

// The rows `ids` [n] of a weight in few bits, [n, columns] in float32.
Tensor dequantize_rows(const Tensor& weight, const Tensor& ids, int64_t rows, int64_t columns) {
  const auto* bytes = static_cast<const uint8_t*>(weight.const_data_ptr());
  const Format& format = format_of(bytes[0]);
  const auto* row_ids = static_cast<const int64_t*>(ids.const_data_ptr());
  const int64_t n = ids.numel();
  const int64_t blocks = round_up(columns, BLOCK) / BLOCK;
  Tensor elements = empty({n, columns}, aoti_torch_dtype_float32());
  auto* to = static_cast<float*>(elements.mutable_data_ptr());
  STD_TORCH_CHECK(std::all_of(row_ids, row_ids + n, [&](int64_t id) { return id >= 0 && id < rows; }), "ids: not those of rows");
  auto read = [&]<size_t I>() {
    constexpr const Format& format = FORMATS[I];
    torch::stable::parallel_for(0, n, 64, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) {
        const int64_t row = row_ids[i] % PANEL;
        const int64_t lane = row % LANES;
        const uint8_t* block = bytes + HEADER + row_ids[i] / PANEL * format.bytes_before(blocks);
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
  dispatch_format(format, read);
  return elements;
}
}  // namespace
