// Weights in few bits: their formats, how they are made of those of a `.gguf` file, and their products.
//
// A weight [N, K] is one tensor of bytes. The first 64 have the code of its format. Then come blocks of 16 rows, each with
// cells of 32 columns in their order. Rows are padded to 16 and columns to 32 by zeros. A cell has
//   scales: the sizes of a step of 16 rows and, if the format has them, their middles,
//   steps of 8 bits [8, 64]: byte 4 r + j of part v is that of column 4 v + j of row r; or, of fewer bits,
//   low [4, 64]: byte 4 r + j of part i has the lower 4 bits of two steps of row r: of column 8 i + j in its lower half,
//     of column 8 i + 4 + j in its upper half,
//   high [bits - 4, 64]: byte 4 r + j of part i has the upper bits of columns 4 v + j of row r, for 8 / (bits - 4)
//     numbers v, in their order.
// A number is (step - offset) * size + middle.
#pragma once
#include "vectors.h"

namespace {
constexpr int64_t BLOCK = 16, GROUP = 32, HEADER = 64, LOW = BLOCK * GROUP / 2, SUPER = 256;
constexpr int64_t BYTES_AHEAD = 4096;

struct Format {
  int code;                    // ggml's number; 0: our own, of copies and of models that are rounded here
  int bits, group;             // of a step; columns that share a size
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
    {0, 4, 32, true, false, 8},    // its scales are in bfloat16, all others in float16
    {2, 4, 32, false, false, 8},   // Q4_0
    {3, 4, 32, true, false, 0},    // Q4_1
    {6, 5, 32, false, false, 16},  // Q5_0
    {7, 5, 32, true, false, 0},    // Q5_1
    {8, 8, 32, false, false, 128}, // Q8_0
    {10, 4, 16, true, true, 0},    // Q2_K
    {11, 4, 16, false, true, 4},   // Q3_K
    {12, 4, 32, true, true, 0},    // Q4_K
    {13, 5, 32, true, true, 0},    // Q5_K
    {14, 6, 16, false, true, 32},   // Q6_K
    {20, 8, 32, false, false, 128}, // IQ4_NL
    {23, 8, 32, false, true, 128},  // IQ4_XS
};
const Format& format_of(int64_t code) {
  for (const Format& format : FORMATS)
    if (format.code == code) return format;
  STD_TORCH_CHECK(false, "weight: there is no format ", code);
}

// Of LANES rows: sizes of a step, and middles.
struct Scales {
  Floats sizes = {}, middles = {};
  Floats zeros(const Format& format) const { return fma(sizes, splat(-format.offset), middles); }  // values of step 0
};
// Those at the beginning of a cell or, if the format has them there, of 256 columns.
INLINE Scales scales_at(const Format& format, const uint8_t* at, int64_t row) {
  auto numbers = [&](const uint8_t* from) {
    return format.code ? widen(reinterpret_cast<const Half*>(from) + row) : widen(reinterpret_cast<const BFloat16*>(from) + row);
  };
  return {numbers(at), format.has_middle ? numbers(at + 2 * BLOCK) : Floats{}};
}
// Those of half a cell, from those of its 256 columns.
INLINE Scales scales_in(const Format& format, const Scales& of_super, const uint8_t* cell, int64_t half, int64_t row) {
  const auto* at = reinterpret_cast<const int8_t*>(cell) + half * BLOCK * (1 + format.has_middle) + row;
  return {of_super.sizes * widen(at), format.has_middle ? -of_super.middles * widen(at + BLOCK) : Floats{}};
}

// Inputs of products in eight bits by groups of 32.
struct RoundedInputs {
  int64_t tokens, groups;
  int8_t* steps;  // [groups, T, 32] from -127 to 127
  float* sizes;   // [groups, T] of a step
  float* sums;    // [groups, T, 3] of the group's halves, and of the group

  // In memory for T * groups * 32 floats.
  RoundedInputs(Floats* memory, int64_t tokens, int64_t groups)
      : tokens(tokens), groups(groups), steps(reinterpret_cast<int8_t*>(memory)),
        sizes(reinterpret_cast<float*>(steps + tokens * groups * GROUP)), sums(sizes + tokens * groups) {}
  // The numbers [groups * 32] of a token. An infinity makes steps of 0 and a size of infinity, whose product is NaN. NaN
  // makes a size of NaN.
  void round(int64_t token, const float* numbers) const {
    for (int64_t g = 0; g < groups; g++) {
      const float* values = numbers + g * GROUP;
      int32_t largest = 0, halves[2] = {};  // absolute values are in the order of their bits, NaN last
      for (int j = 0; j < GROUP; j++) largest = std::max(largest, std::bit_cast<int32_t>(values[j]) & 0x7fffffff);
      float range = std::bit_cast<float>(largest), per_step = range > 1e-30f ? 127.0f / range : 0.0f;
      int64_t at = g * tokens + token;
      int8_t* of_group = &steps[at * GROUP];
      for (int half = 0; half < 2; half++)
        for (int j = half * 16; j < half * 16 + 16; j++) {
          constexpr float nearest = 0x1.8p23f;  // a sum with it has no fraction
          int32_t step = std::bit_cast<int32_t>(values[j] * per_step + nearest) - std::bit_cast<int32_t>(nearest);
          halves[half] += of_group[j] = int8_t(step);
        }
      sizes[at] = range / 127.0f;
      for (int half = 0; half < 2; half++) sums[at * 3 + half] = sizes[at] * float(halves[half]);
      sums[at * 3 + 2] = sizes[at] * float(halves[0] + halves[1]);
    }
  }
};

// The steps of LANES rows of a cell, by four columns. If a product does not take eight bits, `upper` gets the upper four.
template <int HIGH>
INLINE void steps_of(const uint8_t* cell, int64_t row, Bytes* steps, Bytes* upper) {
  typedef uint16_t Pairs VECTOR(4);  // there are no shifts of bytes
  const uint8_t *low = cell + row * 4, *high = low + LOW;
  if constexpr (HIGH == 4) {
#pragma GCC unroll 8
    for (int v = 0; v < 8; v++) {
      steps[v] = load<Bytes>(low + v * 64);
      if (!TAKES_EIGHT_BITS) upper[v] = (Bytes)((Pairs)steps[v] >> 4) & 15, steps[v] &= 15;
    }
    return;
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    Bytes both = load<Bytes>(low + i * 64);
    steps[2 * i] = both & 15, steps[2 * i + 1] = (Bytes)((Pairs)both >> 4) & 15;
  }
  if constexpr (HIGH > 0) {
    constexpr int of_byte = 8 / HIGH;
#pragma GCC unroll 8
    for (int v = 0; v < 8; v++) {
      Pairs bits = (Pairs)load<Bytes>(high + v / of_byte * 64);
      int up = 4 - HIGH * (v % of_byte);
      steps[v] |= (Bytes)(up >= 0 ? bits << up : bits >> -up) & uint8_t(((1 << HIGH) - 1) << 4);
    }
  }
}

// Calls f<upper bits, whether halves of a group have scales, whether 256 columns have scales>().
template <class F>
void with_kind(const Format& format, const F& f) {
  if (format.group < GROUP) return format.bits == 6 ? f.template operator()<2, true, true>() : f.template operator()<0, true, true>();
  auto with_super = [&]<int HIGH>() {
    format.has_super ? f.template operator()<HIGH, false, true>() : f.template operator()<HIGH, false, false>();
  };
  if (format.bits == 4) return with_super.template operator()<0>();
  format.bits == 5 ? with_super.template operator()<1>() : with_super.template operator()<4>();
}

// Products of a block of rows and all tokens, [T, BLOCK]. T: 1 for one token, whose sums stay in registers; 0: all of `x`.
template <int HIGH, bool HALVES, bool HAS_SUPER, int T>
void products_of_cells(const Format& format, const uint8_t* block, const RoundedInputs& x, float* out) {
  constexpr bool splits = HIGH == 4 && !TAKES_EIGHT_BITS;
  constexpr int together = splits ? 2 : 1;  // tokens that share the loads of steps, where registers hold too few of them
  constexpr int parts = BLOCK / LANES, exact = HIGH == 1 || HALVES ? 4 : 8;  // vectors that are added up in `dot`
  const int64_t tokens = T ? T : x.tokens;
  const int8_t* columns = x.steps;
  const float *of_sizes = x.sizes, *sums = x.sums;
  Floats few[T ? T * parts : 1] = {};
  if (!T) std::fill_n(out, tokens * BLOCK, 0.0f);
  Scales of_super[parts];
  for (int64_t g = 0; g < x.groups; g++) {
    if (HAS_SUPER && g % (SUPER / GROUP) == 0) {
      for (int part = 0; part < parts; part++) of_super[part] = scales_at(format, block, part * LANES);
      block += format.before();
    }
    for (int64_t byte = 0; byte < format.cell(); byte += 64) __builtin_prefetch(block + byte + BYTES_AHEAD);
    const uint8_t* low = block + format.scales();
#pragma GCC unroll 2
    for (int part = 0; part < parts; part++) {
      Bytes steps[8], upper[8];
      steps_of<HIGH>(low, part * LANES, steps, upper);
      Floats sizes[1 + HALVES], zeros[1 + HALVES];
      for (int half = 0; half <= HALVES; half++) {
        Scales own = HAS_SUPER ? scales_in(format, of_super[part], block, half, part * LANES) : scales_at(format, block, part * LANES);
        sizes[half] = own.sizes, zeros[half] = own.zeros(format);
      }
      auto add = [&]<int N>(int64_t t) __attribute__((always_inline)) {  // products of N tokens
        Ints whole[N] = {}, some[N] = {}, uppers[N] = {};
        Floats sum[N];
#pragma GCC unroll 8
        for (int v = 0; v < 8; v++) {
          const int half = v / 4;
#pragma GCC unroll 2
          for (int n = 0; n < N; n++) {
            const int64_t at = g * tokens + t + n;
            int32_t four = load<int32_t>(columns + at * GROUP + 4 * v);
            some[n] = dot(some[n], steps[v], four);
            if (splits) uppers[n] = dot(uppers[n], upper[v], four), keep_order(some[n], uppers[n]);
            if ((v + 1) % (HIGH == 2 ? 2 : exact) == 0) whole[n] += total(some[n]), some[n] = Ints{};
            if (HALVES ? v % 4 < 3 : v < 7) continue;
            if (splits) whole[n] += total(uppers[n]) << 4;
            float* to = T ? reinterpret_cast<float*>(few + part) : out + (t + n) * BLOCK + part * LANES;
            if (!HALVES || half == 0) sum[n] = load<Floats>(to);
            sum[n] = fma(zeros[HALVES * half], splat(sums[at * 3 + (HALVES ? half : 2)]), sum[n]);
            sum[n] = fma(__builtin_convertvector(whole[n], Floats) * sizes[HALVES * half], splat(of_sizes[at]), sum[n]);
            if (v == 7) std::memcpy(to, &sum[n], sizeof(Floats));
            whole[n] = Ints{};
          }
        }
      };
      int64_t t = 0;
      for (; t + together <= tokens; t += together) add.template operator()<together>(t);
      for (; t < tokens; t++) add.template operator()<1>(t);
    }
    block += format.cell();
  }
  if (T) std::memcpy(out, few, sizeof(few));
}

void products_of_block(const Format& format, const uint8_t* block, const RoundedInputs& x, float* out) {
  with_kind(format, [&]<int HIGH, bool HALVES, bool HAS_SUPER>() {
    if (x.tokens == 1) products_of_cells<HIGH, HALVES, HAS_SUPER, 1>(format, block, x, out);
    else products_of_cells<HIGH, HALVES, HAS_SUPER, 0>(format, block, x, out);
  });
}

// Writes the steps [32] of a row into its cell.
void put_steps(const uint8_t* steps, int64_t row, int high_bits, uint8_t* low) {
  auto word = [&](int v) { return load<uint32_t>(steps + 4 * v); };
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
  uint8_t steps[GROUP];
  const uint8_t *size, *middle;      // two bytes each, of the group, or of 256 columns
  uint8_t sizes[2] = {}, middles[2] = {};  // of halves
};
constexpr int64_t bytes_in_file(int code) {
  switch (code) {
    case 2: return 18; case 3: return 20; case 6: return 22; case 7: return 24; case 8: return 34; case 10: return 84;
    case 11: return 110; case 12: return 144; case 13: return 176; case 14: return 210; case 20: return 18;
    case 23: return 136; default: return 0;
  }
}
FileGroup group_in_file(int code, const uint8_t* row, int64_t group) {
  FileGroup to;
  const int64_t g = group % 8, n = g / 4, l = g % 4;
  const bool is_super = format_of(code).has_super;
  const uint8_t* at = row + (is_super ? group / 8 : group) * bytes_in_file(code);
  auto all = [&](auto f) { for (int j = 0; j < GROUP; j++) to.steps[j] = uint8_t(f(j)); };
  auto nibble = [](const uint8_t* low, int j) { return low[j % 16] >> j / 16 * 4 & 15; };
  constexpr int8_t steps_of_iq4[] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
  to.size = at, to.middle = at + 2;
  switch (code) {
    case 2: all([&](int j) { return nibble(at + 2, j); }); break;
    case 3: all([&](int j) { return nibble(at + 4, j); }); break;
    case 6: case 7: {
      const uint8_t* low = at + (code == 6 ? 6 : 8);
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
      const uint8_t *scales = at + 4, *low = at + (code == 12 ? 16 : 48);
      all([&](int j) { return (low[g / 2 * 32 + j] >> g % 2 * 4 & 15) | (code == 13 ? (at[16 + j] >> g & 1) << 4 : 0); });
      to.sizes[0] = g < 4 ? scales[g] & 63 : (scales[g + 4] & 15) | scales[g - 4] >> 6 << 4;
      to.middles[0] = g < 4 ? scales[g + 4] & 63 : scales[g + 4] >> 4 | scales[g] >> 6 << 4;
      break;
    }
    case 14:
      to.size = at + 208;
      all([&](int j) { return (at[64 * n + l % 2 * 32 + j] >> l / 2 * 4 & 15) | (at[128 + 32 * n + j] >> 2 * l & 3) << 4; });
      for (int half = 0; half < 2; half++) to.sizes[half] = at[192 + 2 * g + half];
      break;
    case 20: all([&](int j) { return steps_of_iq4[nibble(at + 2, j)] + 128; }); break;
    case 23:
      all([&](int j) { return steps_of_iq4[nibble(at + 8 + 16 * g, j)] + 128; });
      to.sizes[0] = uint8_t(((at[4 + g / 2] >> g % 2 * 4 & 15) | (load<uint16_t>(at + 2) >> 2 * g & 3) << 4) - 32);
  }
  return to;
}

// Moves rows [.., groups of columns] of a file into blocks, which are zeros.
void rearrange(const Format& format, int code, const uint8_t* raw, int64_t row_bytes, int64_t first, int64_t last,
               int64_t groups, uint8_t* blocks) {
  for (int64_t row = first; row < last; row++)
    for (int64_t g = 0; g < groups; g++) {
      const int64_t r = row % BLOCK;
      uint8_t *numbers = blocks + row / BLOCK * format.to(groups) + format.to(g), *cell = numbers;
      const FileGroup group = group_in_file(code, raw + row * row_bytes, g);
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
      put_steps(group.steps, r, format.bits - 4, cell + format.scales());
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
  const int64_t of_block = bytes_in_file(int(code)), wide = format.has_super ? SUPER : GROUP, rows = from.size(0);
  STD_TORCH_CHECK(of_block && from.dim() == 2 && from.is_contiguous() && from.scalar_type() == ScalarType::Byte &&
                      columns % wide == 0 && from.size(1) == columns / wide * of_block,
                  "weight: not that of a file, in format ", code);
  Tensor weight = new_weight(format, rows, columns);
  const auto* raw = static_cast<const uint8_t*>(from.const_data_ptr());
  auto* blocks = static_cast<uint8_t*>(weight.mutable_data_ptr()) + HEADER;
  torch::stable::parallel_for(0, round_up(rows, BLOCK) / BLOCK, 1, [&](int64_t first, int64_t last) {
    rearrange(format, int(code), raw, from.size(1), first * BLOCK, std::min(rows, last * BLOCK), columns / GROUP, blocks);
  });
  return weight;
}

// Some rows [n] of a weight in few bits, [n, columns] in float32.
Tensor rows_of_weight(const Tensor& weight, const Tensor& ids, int64_t rows, int64_t columns) {
  const auto* bytes = static_cast<const uint8_t*>(weight.const_data_ptr());
  const Format& format = format_of(bytes[0]);
  STD_TORCH_CHECK(weight.numel() == format.size(rows, columns) && weight.is_contiguous() &&
                      ids.scalar_type() == ScalarType::Long && ids.is_contiguous(), "weight, ids: not those of a weight in few bits");
  const auto* wanted = static_cast<const int64_t*>(ids.const_data_ptr());
  const int64_t n = ids.numel(), groups = round_up(columns, GROUP) / GROUP;
  Tensor numbers = empty({n, columns}, aoti_torch_dtype_float32());
  auto* to = static_cast<float*>(numbers.mutable_data_ptr());
  STD_TORCH_CHECK(std::all_of(wanted, wanted + n, [&](int64_t id) { return id >= 0 && id < rows; }), "ids: not those of rows");
  torch::stable::parallel_for(0, n, 64, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; i++) {
      const int64_t r = wanted[i] % BLOCK, lane = r % LANES;
      const uint8_t* block = bytes + HEADER + wanted[i] / BLOCK * format.to(groups);
      Scales of_super;
      for (int64_t g = 0; g < groups; g++) {
        if (format.has_super && g % (SUPER / GROUP) == 0)
          of_super = scales_at(format, block, r - lane), block += format.before();
        Scales halves[2];
        for (int half = 0; half < 2; half++)
          halves[half] = format.has_super ? scales_in(format, of_super, block, format.group == GROUP ? 0 : half, r - lane)
                                          : scales_at(format, block, r - lane);
        Bytes steps[8], upper[8] = {};
        with_kind(format, [&]<int HIGH, bool, bool>() { steps_of<HIGH>(block + format.scales(), r - lane, steps, upper); });
        for (int64_t j = 0; j < std::min(GROUP, columns - g * GROUP); j++) {
          const Scales& scales = halves[j / 16];
          float step = float(steps[j / 4][lane * 4 + j % 4] + upper[j / 4][lane * 4 + j % 4] * 16);
          to[i * columns + g * GROUP + j] = (step - format.offset) * scales.sizes[lane] + scales.middles[lane];
        }
        block += format.cell();
      }
    }
  });
  return numbers;
}
}  // namespace
