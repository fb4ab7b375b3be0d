// Prints outputs of the code that needs no torch to run. test_portable.py builds this file for several processors and compares
// their outputs.
#include <cstdio>

#include "attention.h"
#include "weights.h"

namespace {
uint32_t state = 1;
float next() {  // from -1 to 1
  state = state * 1664525u + 1013904223u;
  return float(int32_t(state) >> 8) / 8388608.0f;
}
std::vector<float> random(int64_t count) {
  std::vector<float> made(count);
  for (float& each : made) each = next();
  return made;
}
void print(const char* name, const float* numbers, int64_t count) {
  for (int64_t i = 0; i < count; i++) std::printf("%s %.9g\n", name, numbers[i]);
}

Inputs rounded(Floats* memory, const std::vector<float>& x, int64_t tokens, int64_t columns, ScalarType type,
               bool in_bfloat16 = false) {
  const Inputs inputs(memory, tokens, columns, type, in_bfloat16);
  std::vector<float> scratch(Inputs::scratch_size(columns));
  auto fill = [&](int64_t t, float* to) { std::copy_n(&x[t * columns], columns, to); };
  for (int64_t piece = 0; piece < inputs.pieces(); piece++) inputs.make(piece, fill, scratch.data());
  return inputs;
}

// A panel of 16 rows as a file has them, of arbitrary quants.
void few_bits(const Format& format) {
  constexpr int64_t columns = 512;
  constexpr int64_t blocks = columns / BLOCK;
  const int64_t row_bytes = columns / (format.has_super_blocks ? SUPER_BLOCK : BLOCK) * format.file_bytes;
  std::vector<uint8_t> raw(PANEL * row_bytes);
  std::vector<uint8_t> panel(format.bytes_before(blocks));
  for (uint8_t& each : raw) each = uint8_t(int(next() * 128));
  for (int64_t row = 0; row < PANEL; row++)
    for (int64_t b = 0; b < blocks; b++) {
      const FileBlock block = block_in_file(format, &raw[row * row_bytes], b);
      for (const uint8_t* number : {block.scale, format.has_minimum ? block.minimum : block.scale})
        const_cast<uint8_t*>(number)[1] = 0x24;  // about a hundredth
    }
  repack_rows(format, raw.data(), row_bytes, 0, PANEL, blocks, panel.data());
  for (int64_t tokens : {1, 3, 13}) {
    const std::vector<float> x = random(tokens * columns);
    std::vector<float> outputs(tokens * PANEL);
    auto memory = aligned(tokens * columns);
    multiply_panel(format, panel.data(), rounded(memory.get(), x, tokens, columns, ScalarType::Byte).rounded, outputs.data());
    print("few-bits", outputs.data(), outputs.size());
  }
}

template <class Scalar>
void dense(const char* name, ScalarType type, int64_t columns, bool in_bfloat16 = false) {
  constexpr int64_t rows = 4;
  std::vector<Scalar> w;
  for (float number : random(rows * columns)) w.push_back(Scalar(number));
  std::vector<float> x = random(9 * columns);
  for (int64_t tokens = 1; tokens < 10; tokens++) {
    auto memory = aligned(tokens * Inputs::stride_of(columns));
    const Inputs inputs = rounded(memory.get(), x, tokens, columns, type, in_bfloat16);
    std::vector<float> outputs(tokens * ROW_BLOCK);
    multiply_rows(w.data(), columns, rows, inputs, outputs.data());
    for (int64_t t = 0; t < tokens; t++) print(name, &outputs[t * ROW_BLOCK], rows);
  }
}

// Rounded as torch rounds: to nearest even, and subnormal numbers stay.
template <class Scalar>
void rounding(const char* name) {
  for (float number : {1.0f, 0.1f, -3.14159f, 2049.0f, 2051.0f, 65504.0f, 65519.0f, 3e-8f, 9e-8f, -1e-6f, 1e-40f}) {
    Scalar numbers[LANES];
    narrow(splat(number), numbers, LANES);
    if (float(numbers[LANES - 1]) != float(Scalar(number))) std::printf("%s: %g is rounded wrongly\n", name, number);
  }
}

// Numbers beyond the range of float16 become a NaN that no arithmetic makes.
void beyond_range() {
  Half numbers[LANES];
  for (float number : {65520.0f, -1e9f, INFINITY}) {
    narrow(splat(number), numbers, LANES);
    if ((numbers[0].x & 0x7fff) != 0x7fff) std::printf("half: %g is %x\n", number, numbers[0].x);
  }
}

template <class Scalar>
void attention(ScalarType type, int64_t d) {
  constexpr int64_t tokens = 3;
  constexpr int64_t heads = 3;
  constexpr int64_t start = 300;
  std::vector<float> queries = random(tokens * heads * d);
  std::vector<float> keys = random(SPAN * d);
  std::vector<float> values = random(SPAN * d);
  std::vector<Scalar> cached_keys(SPAN * d);
  std::vector<Scalar> cached_values(SPAN * d);
  const SlotHead slot{cached_keys.data(), cached_values.data()};
  CachedHead cached(slot, slot, 0, type, d);
  for (int64_t position = 0; position < SPAN; position++) cached.write(position, &keys[position * d], &values[position * d]);
  std::vector<float> memory(tokens * heads * d);
  for (int64_t window : {0, 150}) {
    std::vector<PartialAttention> attended(tokens * heads);
    for (int64_t i = 0; i < tokens * heads; i++) {
      attended[i].values = &memory[i * d];
      attended[i].clear(d);
    }
    attend_to_blocks(queries.data(), tokens, heads, d, start, window, cached, 0, start + tokens, attended.data());
    for (const PartialAttention& each : attended) {
      print("sum", &each.sum, 1);
      print("attended", each.values, d);
    }
  }
}
}  // namespace

int main() {
  for (int64_t columns : {33, 64, 150}) {
    dense<float>("float", ScalarType::Float, columns);
    dense<Half>("half", ScalarType::Half, columns);
    dense<BFloat16>("bfloat16", ScalarType::BFloat16, columns);
    dense<BFloat16>("pairs", ScalarType::BFloat16, columns, true);
  }
  for (const Format& format : FORMATS)
    if (format.code) few_bits(format);
  rounding<Half>("half");
  rounding<BFloat16>("bfloat16");
  beyond_range();
  for (int64_t d : {20, 64}) {
    attention<float>(ScalarType::Float, d);
    attention<Half>(ScalarType::Half, d);
    attention<BFloat16>(ScalarType::BFloat16, d);
  }
}
