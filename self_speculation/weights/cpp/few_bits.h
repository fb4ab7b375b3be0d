// Weights in few bits: their formats, how they are made of those of a `.gguf` file, and their products.
//
// A weight [N, K] is one tensor of bytes: a header with the code of its format, then blocks of 16 rows. A block has a cell
// for each group of 32 columns. Rows are padded to 16 and columns to 32 by zeros.
//
//   a weight   | header | block: rows 0 to 15 | block: rows 16 to 31 | ...
//   a block    | cell: columns 0 to 31 | cell: columns 32 to 63 | ...
//              with `has_super`, scales of 256 columns (`before` bytes) precede each 8 cells
//   a cell     | 16 sizes | 16 middles | low: 4 parts of 64 bytes | high: bits - 4 parts of 64 bytes |
//
// A size is the distance of two levels, a middle is what level `offset` stands for; some formats have no middles. Where 16
// columns share them, those of the first half of the cell precede those of the second half. A number is
// (level - offset) * size + middle. In a part, bytes 4 r to 4 r + 3 are those of row r:
//   low   byte 4 r + j of part i has the lower 4 bits of two levels: of column 8 i + j in its lower half, of column
//         8 i + 4 + j in its upper half;
//   high  byte 4 r + j of part i has the upper bits of columns 4 v + j, for 8 / (bits - 4) numbers v, in their order.
// Levels of 8 bits have 8 parts of 64 in the place of both: byte 4 r + j of part v is that of column 4 v + j.
#pragma once
#include "vectors.h"

namespace {
constexpr int64_t BLOCK = 16, GROUP = 32, HEADER = 64, LOW = BLOCK * GROUP / 2, SUPER = 256;
constexpr int64_t BYTES_AHEAD = 4096;

struct Format {
  int code;                    // ggml's number; 0: our own, of copies and of models that are rounded here
  int64_t in_file;             // bytes of 32 columns in a file or, with `has_super`, of 256
  int bits, group;             // of a level; columns that share a size
  bool has_middle, has_super;  // super: sizes are bytes, times a number for 256 columns, which is before their cells
  float offset;

  int64_t scales() const { return has_super ? BLOCK * (GROUP / group) * (1 + has_middle) : BLOCK * 2 * (1 + has_middle); }
  int64_t cell() const { return scales() + LOW + (bits - 4) * 64; }
  int64_t before() const { return has_super ? BLOCK * 2 * (1 + has_middle) : 0; }
  // Bytes of a block of rows, up to a cell.
  int64_t to(int64_t group) const { return group * cell() + (group + SUPER / GROUP - 1) / (SUPER / GROUP) * before(); }
  int64_t size(int64_t rows, int64_t columns) const {
    return HEADER + round_up(rows, BLOCK) / BLOCK * to(round_up(columns, GROUP) / GROUP);
  }
};
constexpr Format FORMATS[] = {
    {0, 0, 4, 32, true, false, 8},      // its scales are in bfloat16, all others in float16
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

// Of LANES rows.
struct Scales {
  Floats sizes = {}, middles = {};
  Floats zeros(const Format& format) const { return fma(sizes, splat(-format.offset), middles); }  // values of level 0
};
// Those at the beginning of a cell or, if the format has them there, of 256 columns.
template <size_t I>
INLINE Scales scales_at(const uint8_t* at, int64_t row) {
  using Number = std::conditional_t<FORMATS[I].code == 0, BFloat16, Half>;
  auto numbers = [&](const uint8_t* from) { return widen(reinterpret_cast<const Number*>(from) + row); };
  return {numbers(at), FORMATS[I].has_middle ? numbers(at + 2 * BLOCK) : Floats{}};
}
// Those of half a cell; `of_super` are those of its 256 columns.
template <size_t I>
INLINE Scales scales_of(const Scales& of_super, const uint8_t* cell, int64_t half, int64_t row) {
  constexpr const Format& format = FORMATS[I];
  if constexpr (!format.has_super) return scales_at<I>(cell, row);
  const auto* at = reinterpret_cast<const int8_t*>(cell) + half * BLOCK * (1 + format.has_middle) + row;
  return {of_super.sizes * widen(at), format.has_middle ? -of_super.middles * widen(at + BLOCK) : Floats{}};
}

// Inputs of products in eight bits by groups of 32.
struct RoundedInputs {
  int64_t tokens, groups;
  int8_t* levels;  // [groups, T, 32] from -127 to 127
  float* sizes;    // [groups, T] from one level to the next
  float* sums;     // [groups, T, 3] of the group's halves, and of the group

  // In memory for T * groups * 32 floats.
  RoundedInputs(Floats* memory, int64_t tokens, int64_t groups)
      : tokens(tokens), groups(groups), levels(reinterpret_cast<int8_t*>(memory)),
        sizes(reinterpret_cast<float*>(levels + tokens * groups * GROUP)), sums(sizes + tokens * groups) {}
  // The numbers [groups * 32] of a token. An infinity makes levels of 0 and a size of infinity, whose product is NaN. NaN
  // makes a size of NaN.
  void round(int64_t token, const float* numbers) const {
    for (int64_t g = 0; g < groups; g++) {
      const float* values = numbers + g * GROUP;
      int32_t largest = 0, halves[2] = {};  // absolute values are in the order of their bits, NaN last
      for (int j = 0; j < GROUP; j++) largest = std::max(largest, std::bit_cast<int32_t>(values[j]) & 0x7fffffff);
      float range = std::bit_cast<float>(largest), per_level = range > 1e-30f ? 127.0f / range : 0.0f;
      int64_t at = g * tokens + token;
      int8_t* of_group = &levels[at * GROUP];
      for (int half = 0; half < 2; half++)
        for (int j = half * 16; j < half * 16 + 16; j++) {
          constexpr float nearest = 0x1.8p23f;  // a sum with it has no fraction
          int32_t level = std::bit_cast<int32_t>(values[j] * per_level + nearest) - std::bit_cast<int32_t>(nearest);
          halves[half] += of_group[j] = int8_t(level);
        }
      sizes[at] = range / 127.0f;
      for (int half = 0; half < 2; half++) sums[at * 3 + half] = sizes[at] * float(halves[half]);
      sums[at * 3 + 2] = sizes[at] * float(halves[0] + halves[1]);
    }
  }
};

// The levels of LANES rows of columns 8 i to 8 i + 7, by four columns. `low` is that of the first row. If a product does
// not take eight bits, `upper` gets the upper four.
template <int HIGH>
INLINE void levels_of(const uint8_t* low, int i, Bytes* levels, Bytes* upper) {
  typedef uint16_t Pairs VECTOR(4);  // there are no shifts of bytes
  if constexpr (HIGH == 4) {
#pragma GCC unroll 2
    for (int j = 0; j < 2; j++) {
      levels[j] = load<Bytes>(low + (2 * i + j) * 64);
      if (!TAKES_EIGHT_BITS) upper[j] = (Bytes)((Pairs)levels[j] >> 4) & 15, levels[j] &= 15;
    }
    return;
  }
  Bytes both = load<Bytes>(low + i * 64);
  levels[0] = both & 15, levels[1] = (Bytes)((Pairs)both >> 4) & 15;
  if constexpr (HIGH == 1 || HIGH == 2) {
    constexpr int of_byte = 8 / HIGH;
#pragma GCC unroll 2
    for (int j = 0; j < 2; j++) {
      const int v = 2 * i + j, up = 4 - HIGH * (v % of_byte);
      Pairs bits = (Pairs)load<Bytes>(low + LOW + v / of_byte * 64);
      levels[j] |= (Bytes)(up >= 0 ? bits << up : bits >> -up) & uint8_t(((1 << HIGH) - 1) << 4);
    }
  }
}

// Calls f<index in FORMATS>().
template <class F>
void with_format(const Format& format, const F& f) {
  with_count<std::size(FORMATS)>(&format - FORMATS + 1, [&]<int N>() { f.template operator()<N - 1>(); });
}

// A cell: 32 columns of 16 rows.
template <size_t I>
class Cell {
 public:
  static constexpr const Format& FORMAT = FORMATS[I];

  INLINE Cell(const uint8_t* at, const Scales* of_super) : low_(at + FORMAT.scales()) {
#pragma GCC unroll 2
    for (int part = 0; part < PARTS; part++) {
#pragma GCC unroll 2
      for (int half = 0; half <= HALVES; half++) {
        Scales scales = scales_of<I>(of_super[part], at, half, part * LANES);
        sizes_[half][part] = scales.sizes, zeros_[half][part] = scales.zeros(FORMAT);
      }
      if constexpr (KEEPS) {
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) levels_of<HIGH>(low_ + part * LANES * 4, i, &kept_[part][2 * i], nullptr);
      }
    }
  }

  // Adds products with N tokens, whose inputs begin at `at`, to `sums`, [N, BLOCK].
  template <int N>
  INLINE void add_products(const RoundedInputs& x, int64_t at, float* sums) const {
    constexpr int together = N == 1 ? 1 : PARTS;  // parts that share loads of inputs, which is faster for several tokens only
#pragma GCC unroll 2
    for (int part = 0; part < PARTS; part += together) add_products<N, together>(x, at, part, sums);
  }

  // Its numbers in bfloat16, [16 pairs of columns, 16 rows, 2]: where a vector has the 16 rows.
  INLINE void unpack(Ints* to) const {
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
      Bytes levels[2];
      Bytes upper[2] = {};
      if constexpr (KEEPS) std::copy_n(&kept_[0][2 * i], 2, levels);
      else levels_of<HIGH>(low_, i, levels, upper);
      const int half = HALVES ? i / 2 : 0;
#pragma GCC unroll 2
      for (int j = 0; j < 2; j++) {
        if (SPLITS) levels[j] |= upper[j] << 4;
        auto column = [&](int n) __attribute__((always_inline)) {
          const Ints level = (Ints)levels[j] >> 8 * n & 255;
          return fma(__builtin_convertvector(level, Floats), sizes_[half][0], zeros_[half][0]);
        };
        to[4 * i + 2 * j] = to_pairs(column(0), column(1));
        to[4 * i + 2 * j + 1] = to_pairs(column(2), column(3));
      }
    }
  }

 private:
  static constexpr int HIGH = FORMAT.bits - 4, PARTS = BLOCK / LANES;
  static constexpr bool HALVES = FORMAT.group < GROUP;               // which have scales of their own
  static constexpr bool SPLITS = HIGH == 4 && !TAKES_EIGHT_BITS;     // into lower and upper four bits
  static constexpr bool KEEPS = HIGH == 1 || HIGH == 2;              // levels, since to put them together takes long
  static constexpr int EXACT = HIGH == 2 ? 1 : HIGH == 1 || HALVES ? 2 : 4;  // times eight columns that `dot` adds up

  template <int N, int P>
  INLINE void add_products(const RoundedInputs& x, int64_t at, int first, float* sums) const {
    Ints some[N][P] = {}, uppers[N][P] = {}, whole[N][P] = {};
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
      Bytes levels[P][2], upper[P][2];
#pragma GCC unroll 2
      for (int p = 0; p < P; p++) {
        if constexpr (KEEPS) std::copy_n(&kept_[first + p][2 * i], 2, levels[p]);
        else levels_of<HIGH>(low_ + (first + p) * LANES * 4, i, levels[p], upper[p]);
      }
#pragma GCC unroll 8
      for (int n = 0; n < N; n++) {
#pragma GCC unroll 2
        for (int j = 0; j < 2; j++) {
          const int32_t four = load<int32_t>(x.levels + (at + n) * GROUP + 8 * i + 4 * j);
#pragma GCC unroll 2
          for (int p = 0; p < P; p++) {
            some[n][p] = dot(some[n][p], levels[p][j], four), keep_order(some[n][p]);
            if (SPLITS) uppers[n][p] = dot(uppers[n][p], upper[p][j], four), keep_order(uppers[n][p]);
          }
        }
        constexpr int to_scales = HALVES ? 2 : 4;  // times eight columns
        const int half = i / to_scales;
        if ((i + 1) % EXACT) continue;
#pragma GCC unroll 2
        for (int p = 0; p < P; p++) {
          whole[n][p] += total(some[n][p]), some[n][p] = Ints{};
          if ((i + 1) % to_scales) continue;
          if (SPLITS) whole[n][p] += total(uppers[n][p]) << 4;
          float* to = sums + n * BLOCK + (first + p) * LANES;
          Floats sum = fma(zeros_[half][first + p], splat(x.sums[(at + n) * 3 + (HALVES ? half : 2)]), load<Floats>(to));
          sum = fma(__builtin_convertvector(whole[n][p], Floats) * sizes_[half][first + p], splat(x.sizes[at + n]), sum);
          std::memcpy(to, &sum, sizeof(Floats));
          whole[n][p] = Ints{};
        }
      }
    }
  }

  const uint8_t* low_;
  Floats sizes_[1 + HALVES][PARTS], zeros_[1 + HALVES][PARTS];
  Bytes kept_[KEEPS ? PARTS : 1][8];
};

// Products of a block of rows and all tokens, [T, BLOCK]. The sums of a token alone stay in registers. `x` is a copy: what is
// written to `out` does not change it.
template <size_t I, bool ALONE>
__attribute__((noinline)) void products_of_cells(const uint8_t* block, const RoundedInputs x, float* out) {
  constexpr const Format& format = FORMATS[I];
  const int64_t tokens = ALONE ? 1 : x.tokens;
  Scales of_super[BLOCK / LANES];
  float own[ALONE ? BLOCK : 1] = {};
  if (!ALONE) std::fill_n(out, tokens * BLOCK, 0.0f);
  for (int64_t g = 0; g < x.groups; g++) {
    if (format.has_super && g % (SUPER / GROUP) == 0) {
      for (int part = 0; part < BLOCK / LANES; part++) of_super[part] = scales_at<I>(block, part * LANES);
      block += format.before();
    }
    for (int64_t byte = 0; byte < format.cell(); byte += 64) __builtin_prefetch(block + byte + BYTES_AHEAD);
    const Cell<I> cell(block, of_super);
    block += format.cell();
    if constexpr (ALONE) {
      cell.template add_products<1>(x, g, own);
    } else {
      int64_t t = 0, at = g * tokens;
      if constexpr (LANES == BLOCK)  // there are registers for the sums of eight
        for (; t + 8 <= tokens; t += 8) cell.template add_products<8>(x, at + t, out + t * BLOCK);
      for (; t + 4 <= tokens && t + 5 != tokens; t += 4) cell.template add_products<4>(x, at + t, out + t * BLOCK);
      switch (tokens - t) {
        case 1: cell.template add_products<1>(x, at + t, out + t * BLOCK); break;
        case 2: cell.template add_products<2>(x, at + t, out + t * BLOCK); break;
        case 3: cell.template add_products<3>(x, at + t, out + t * BLOCK); break;
        case 5: cell.template add_products<5>(x, at + t, out + t * BLOCK);  // a token alone takes as long as two
      }
    }
  }
  if (ALONE) std::copy_n(own, BLOCK, out);
}

void products_of_block(const Format& format, const uint8_t* block, const RoundedInputs& x, float* out) {
  with_format(format, [&]<size_t I>() {
    x.tokens == 1 ? products_of_cells<I, true>(block, x, out) : products_of_cells<I, false>(block, x, out);
  });
}

// Writes the levels [32] of a row into its cell.
void put_levels(const uint8_t* levels, int64_t row, int high_bits, uint8_t* low) {
  auto word = [&](int v) { return load<uint32_t>(levels + 4 * v); };
  auto add = [&](uint8_t* to, uint32_t bits) {
    bits |= load<uint32_t>(to + row * 4);
    std::memcpy(to + row * 4, &bits, 4);
  };
  for (int v = 0; v < 8; v++) {
    if (high_bits == 4) {
      add(low + v * 64, word(v));
      continue;
    }
    add(low + v / 2 * 64, (word(v) & 0x0f0f0f0f) << v % 2 * 4);
    if (!high_bits) continue;
    int of_byte = 8 / high_bits;
    add(low + LOW + v / of_byte * 64, (word(v) >> 4 & 0x01010101u * ((1 << high_bits) - 1)) << v % of_byte * high_bits);
  }
}

// 32 columns of a row, as a file has them. ggml's layouts are described in its quants.
struct FileGroup {
  uint8_t levels[GROUP];
  const uint8_t *size, *middle;      // two bytes each, of the group, or of 256 columns
  uint8_t sizes[2] = {}, middles[2] = {};  // of halves
};
FileGroup group_in_file(const Format& format, const uint8_t* row, int64_t group) {
  FileGroup to;
  const int64_t g = group % 8, n = g / 4, l = g % 4;
  const uint8_t* at = row + (format.has_super ? group / 8 : group) * format.in_file;
  auto all = [&](auto f) { for (int j = 0; j < GROUP; j++) to.levels[j] = uint8_t(f(j)); };
  auto nibble = [](const uint8_t* low, int j) { return low[j % 16] >> j / 16 * 4 & 15; };
  constexpr int8_t levels_of_iq4[] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
  to.size = at, to.middle = at + 2;
  switch (format.code) {
    case 2: all([&](int j) { return nibble(at + 2, j); }); break;
    case 3: all([&](int j) { return nibble(at + 4, j); }); break;
    case 6: case 7: {
      const uint8_t* low = at + (format.code == 6 ? 6 : 8);
      uint32_t high = load<uint32_t>(low - 4);
      all([&](int j) { return nibble(low, j) | (high >> j & 1) << 4; });
      break;
    }
    case 8: all([&](int j) { return at[2 + j] ^ 128; }); break;  // plus 128
    case 10:
      to.size = at + 80, to.middle = at + 82;
      all([&](int j) { return at[16 + 32 * n + j] >> 2 * l & 3; });
      for (int half = 0; half < 2; half++) to.sizes[half] = at[2 * g + half] & 15, to.middles[half] = at[2 * g + half] >> 4;
      break;
    case 11:
      to.size = at + 108;
      all([&](int j) { return (at[32 + 32 * n + j] >> 2 * l & 3) | (at[j] >> g & 1) << 2; });
      for (int half = 0; half < 2; half++) {
        int64_t i = 2 * g + half;
        int low = at[96 + i % 8] >> i / 8 * 4 & 15, high = at[104 + i % 4] >> i / 4 * 2 & 3;
        to.sizes[half] = uint8_t((low | high << 4) - 32);
      }
      break;
    case 12: case 13: {
      const uint8_t *scales = at + 4, *low = at + (format.code == 12 ? 16 : 48);
      all([&](int j) { return (low[g / 2 * 32 + j] >> g % 2 * 4 & 15) | (format.code == 13 ? (at[16 + j] >> g & 1) << 4 : 0); });
      to.sizes[0] = g < 4 ? scales[g] & 63 : (scales[g + 4] & 15) | scales[g - 4] >> 6 << 4;
      to.middles[0] = g < 4 ? scales[g + 4] & 63 : scales[g + 4] >> 4 | scales[g] >> 6 << 4;
      break;
    }
    case 14:
      to.size = at + 208;
      all([&](int j) { return (at[64 * n + l % 2 * 32 + j] >> l / 2 * 4 & 15) | (at[128 + 32 * n + j] >> 2 * l & 3) << 4; });
      for (int half = 0; half < 2; half++) to.sizes[half] = at[192 + 2 * g + half];
      break;
    case 20: all([&](int j) { return levels_of_iq4[nibble(at + 2, j)] + 128; }); break;
    case 23:
      all([&](int j) { return levels_of_iq4[nibble(at + 8 + 16 * g, j)] + 128; });
      to.sizes[0] = uint8_t(((at[4 + g / 2] >> g % 2 * 4 & 15) | (load<uint16_t>(at + 2) >> 2 * g & 3) << 4) - 32);
  }
  return to;
}

// Moves rows [.., groups of columns] of a file into blocks, which are zeros.
void rearrange(const Format& format, const uint8_t* raw, int64_t row_bytes, int64_t first, int64_t last, int64_t groups,
               uint8_t* blocks) {
  for (int64_t row = first; row < last; row++)
    for (int64_t g = 0; g < groups; g++) {
      const int64_t r = row % BLOCK;
      uint8_t *numbers = blocks + row / BLOCK * format.to(groups) + format.to(g), *cell = numbers;
      const FileGroup group = group_in_file(format, raw + row * row_bytes, g);
      const bool begins = !format.has_super || g % (SUPER / GROUP) == 0;
      if (format.has_super) {
        cell += begins ? format.before() : 0;
        for (int half = 0; half < GROUP / format.group; half++) {
          uint8_t* at = cell + half * BLOCK * (1 + format.has_middle) + r;
          *at = group.sizes[half];
          if (format.has_middle) at[BLOCK] = group.middles[half];
        }
      }
      if (begins) std::memcpy(numbers + 2 * r, group.size, 2);
      if (begins && format.has_middle) std::memcpy(numbers + 2 * BLOCK + 2 * r, group.middle, 2);
      put_levels(group.levels, r, format.bits - 4, cell + format.scales());
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

// A weight [rows, columns] of zeros in few bits.
Tensor new_weight(const Format& format, int64_t rows, int64_t columns) {
  Tensor weight = empty({format.size(rows, columns)}, aoti_torch_dtype_uint8());
  auto* bytes = static_cast<uint8_t*>(weight.mutable_data_ptr());
  std::fill_n(bytes, weight.numel(), 0), bytes[0] = uint8_t(format.code);
  return weight;
}

// A weight of a file, its rows [N, bytes] as the file has them. Only moves numbers.
Tensor weight_of_file(const Tensor& from, int64_t code, int64_t columns) {
  const Format& format = format_of(code);
  const int64_t wide = format.has_super ? SUPER : GROUP, rows = from.size(0);
  STD_TORCH_CHECK(format.in_file && from.dim() == 2 && from.is_contiguous() && from.scalar_type() == ScalarType::Byte &&
                      columns % wide == 0 && from.size(1) == columns / wide * format.in_file,
                  "weight: not that of a file, in format ", code);
  Tensor weight = new_weight(format, rows, columns);
  const auto* raw = static_cast<const uint8_t*>(from.const_data_ptr());
  auto* blocks = static_cast<uint8_t*>(weight.mutable_data_ptr()) + HEADER;
  torch::stable::parallel_for(0, round_up(rows, BLOCK) / BLOCK, 1, [&](int64_t first, int64_t last) {
    rearrange(format, raw, from.size(1), first * BLOCK, std::min(rows, last * BLOCK), columns / GROUP, blocks);
  });
  return weight;
}

// Some rows [n] of a weight in few bits, [n, columns] in float32.
Tensor rows_of_weight(const Tensor& weight, const Tensor& ids, int64_t rows, int64_t columns) {
  const auto* bytes = static_cast<const uint8_t*>(weight.const_data_ptr());
  const Format& format = format_of(bytes[0]);
  const auto* wanted = static_cast<const int64_t*>(ids.const_data_ptr());
  const int64_t n = ids.numel(), groups = round_up(columns, GROUP) / GROUP;
  Tensor numbers = empty({n, columns}, aoti_torch_dtype_float32());
  auto* to = static_cast<float*>(numbers.mutable_data_ptr());
  STD_TORCH_CHECK(std::all_of(wanted, wanted + n, [&](int64_t id) { return id >= 0 && id < rows; }), "ids: not those of rows");
  auto read = [&]<size_t I>() {
    constexpr const Format& format = FORMATS[I];
    torch::stable::parallel_for(0, n, 64, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; i++) {
        const int64_t r = wanted[i] % BLOCK, lane = r % LANES;
        const uint8_t* block = bytes + HEADER + wanted[i] / BLOCK * format.to(groups);
        Scales of_super;
        for (int64_t g = 0; g < groups; g++) {
          if (format.has_super && g % (SUPER / GROUP) == 0)
            of_super = scales_at<I>(block, r - lane), block += format.before();
          Scales halves[2];
          for (int half = 0; half < 2; half++)
            halves[half] = scales_of<I>(of_super, block, format.group == GROUP ? 0 : half, r - lane);
          Bytes levels[8], upper[8] = {};
          const uint8_t* low = block + format.scales() + (r - lane) * 4;
          for (int i = 0; i < 4; i++) levels_of<format.bits - 4>(low, i, &levels[2 * i], &upper[2 * i]);
          for (int64_t j = 0; j < std::min(GROUP, columns - g * GROUP); j++) {
            const Scales& scales = halves[j / 16];
            float level = float(levels[j / 4][lane * 4 + j % 4] + upper[j / 4][lane * 4 + j % 4] * 16);
            to[i * columns + g * GROUP + j] = (level - format.offset) * scales.sizes[lane] + scales.middles[lane];
          }
          block += format.cell();
        }
      }
    });
  };
  with_format(format, read);
  return numbers;
}
}  // namespace
