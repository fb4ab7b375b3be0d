// Prints a digest of products and attention by tiles, of all exponents, subnormal numbers, infinities and NaN.
// test_portable.py builds this file for tiles of a processor and for tiles in plain C++.
#include <cstdio>
#ifdef AMX
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "tile_attention.h"
#include "weights.h"

namespace {
uint64_t state = 1;
uint32_t next() {
  state = state * 6364136223846793005u + 1442695040888963407u;
  return uint32_t(state >> 33);
}
float number() { return float(int32_t(next() % 65536) - 32768) / 16384.0f; }
std::vector<float> numbers(int64_t n) {
  std::vector<float> made(n);
  for (float& each : made) each = number();
  return made;
}

uint64_t digest = 14695981039346656037u;
void add(const void* from, int64_t n) {  // numbers in float32; NaN is NaN
  for (int64_t i = 0; i < n; i++) {
    uint32_t bits = load<uint32_t>(static_cast<const char*>(from) + 4 * i);
    if ((bits & 0x7fffffff) > 0x7f800000) bits = 0x7fc00000;
    for (int byte = 0; byte < 4; byte++) digest = (digest ^ (bits >> 8 * byte & 255)) * 1099511628211u;
  }
}

// Of trials by their exponents: near 1, small, any, and subnormal.
uint16_t bfloat16(int trial) {
  const uint32_t exponents[] = {120 + next() % 12, 60 + next() % 40, next() % 256, next() % 8 ? 64 + next() % 3 : 0};
  return uint16_t((next() & 0x8000) | exponents[trial % 4] << 7 | (next() & 0x7f));
}

void tile_products() {
  for (int trial = 0; trial < 200; trial++) {
    alignas(64) uint16_t a[16][32];
    alignas(64) uint16_t b[16][32];
    alignas(64) uint32_t c[16][16];
    for (auto* operand : {a, b})
      for (int row = 0; row < 16; row++)
        for (int column = 0; column < 32; column++) operand[row][column] = bfloat16(trial);
    for (auto& row : c)
      for (uint32_t& each : row) each = trial % 3 ? uint32_t(bfloat16(trial)) << 16 | (next() & 0xffff) : 0;
    tiles::load<0>(c, 64);
    tiles::load<1>(a, 64);
    tiles::load<2>(b, 64);
    tiles::dot<0, 1, 2>();
    tiles::store<0>(c, 64);
    add(c, 256);
  }
}

Inputs made(Floats* memory, const std::vector<float>& x, int64_t tokens, int64_t columns, ScalarType type) {
  const Inputs inputs(memory, tokens, columns, type, true);
  std::vector<float> scratch(Inputs::scratch_size(columns));
  auto fill = [&](int64_t t, float* to) { std::copy_n(&x[t * columns], columns, to); };
  for (int64_t piece = 0; piece < inputs.pieces(); piece++) inputs.make(piece, fill, scratch.data());
  return inputs;
}

// Each token alone has the bits that it has beside other tokens.
template <class Compute>
void multiply(const char* name, int64_t columns, ScalarType type, int64_t rows, const Compute& compute) {
  for (int64_t tokens : {1, 16, 17, 50}) {
    const std::vector<float> x = numbers(tokens * columns);
    auto memory = aligned(Inputs::size(tokens, columns));
    auto outputs = Weight::new_outputs(tokens);
    auto alone = Weight::new_outputs(1);
    compute(made(memory.get(), x, tokens, columns, type), outputs.get());
    for (int64_t t = 0; t < tokens; t++) add(&outputs[t * ROW_BLOCK], rows);
    for (int64_t t : {int64_t(0), tokens - 1}) {
      const std::vector<float> row(&x[t * columns], &x[t * columns] + columns);
      compute(made(memory.get(), row, 1, columns, type), alone.get());
      if (std::memcmp(alone.get(), &outputs[t * ROW_BLOCK], rows * 4)) std::printf("%s: token %d depends on others\n", name, int(t));
    }
  }
}

template <class Scalar>
void weight(const char* name, ScalarType type, int64_t columns, int64_t rows) {
  std::vector<Scalar> w;
  for (float each : numbers(rows * columns)) w.push_back(Scalar(each));
  multiply(name, columns, type, rows, [&](const Inputs& x, float* outputs) {
    multiply_rows_by_tiles(WeightRows<Scalar>{w.data(), columns, rows, columns}, x, outputs);
  });
}

template <size_t I>
void few_bits(int64_t columns) {
  constexpr const Format& format = FORMATS[I];
  const int64_t panel_bytes = format.bytes_before(columns / BLOCK);
  std::vector<uint8_t> panels(2 * panel_bytes + BYTES_AHEAD);
  for (uint8_t& each : panels) each = uint8_t(next() % 64);  // scales in 16 bits are small
  multiply("few bits", columns, ScalarType::Byte, 32, [&](const Inputs& x, float* outputs) {
    multiply_panels_by_tiles<I>(panels.data(), 2, panel_bytes, x, outputs);
  });
}

template <class Scalar>
void attention(ScalarType type, int64_t d, int64_t start, int64_t window, bool has_nonfinite) {
  constexpr int64_t tokens = 21;
  constexpr int64_t heads = 3;
  const std::vector<float> queries = numbers(tokens * heads * d);
  std::vector<float> keys = numbers(SPAN * d);
  std::vector<float> values = numbers(SPAN * d);
  if (has_nonfinite) {
    keys[(start + 5) * d] = NAN;
    values[(start + 9) * d + 1] = INFINITY;
  }
  std::vector<Scalar> cached_keys(SPAN * d);
  std::vector<Scalar> cached_values(SPAN * d);
  const SlotHead slot{cached_keys.data(), cached_values.data()};
  CachedHead cached(slot, slot, 0, type, d);
  for (int64_t position = 0; position < SPAN; position++) cached.write(position, &keys[position * d], &values[position * d]);
  auto attend = [&](int64_t first, int64_t n, std::vector<float>& memory) {
    std::vector<PartialAttention> attended(n * heads);
    memory.resize(n * heads * d);
    for (int64_t i = 0; i < n * heads; i++) attended[i].values = &memory[i * d];
    attend_to_span_by_tiles(&queries[first * heads * d], n, heads, d, start + first, window, cached, 0, attended.data());
    std::vector<float> sums;
    for (const PartialAttention& each : attended) sums.push_back(each.sum);
    return sums;
  };
  std::vector<float> together;
  std::vector<float> alone;
  const std::vector<float> sums = attend(0, tokens, together);
  add(together.data(), tokens * heads * d);
  add(sums.data(), tokens * heads);
  for (int64_t t = 0; t < tokens; t++) {
    const std::vector<float> token_sums = attend(t, 1, alone);
    for (int64_t i = 0; i < heads * d; i++) {
      const float found = alone[i];
      const float expected = together[t * heads * d + i];
      if (found != expected && !(std::isnan(found) && std::isnan(expected))) std::printf("attention: token %d depends on others\n", int(t));
      if (has_nonfinite && t < 5 && !std::isfinite(found)) std::printf("attention: token %d sees NaN of a later one\n", int(t));
    }
    for (int64_t i = 0; i < heads; i++)
      if (token_sums[i] != sums[t * heads + i] && !std::isnan(token_sums[i])) std::printf("attention: a sum depends on others\n");
  }
}
}  // namespace

int main() {
#ifdef AMX
  if (syscall(SYS_arch_prctl, 0x1023, 18)) return 1;
#endif
  const tiles::Configured configured(true);
  tile_products();
  for (int64_t columns : {32, 70, 600}) {
    weight<BFloat16>("bfloat16", ScalarType::BFloat16, columns, 32);
    weight<BFloat16>("bfloat16", ScalarType::BFloat16, columns, 7);
    weight<Half>("half", ScalarType::Half, columns, 20);
  }
  [&]<size_t... I>(std::index_sequence<I...>) { (few_bits<I>(256), ...); }(std::make_index_sequence<std::size(FORMATS)>());
  for (int64_t d : {10, 64, 80})
    for (int64_t window : {0, 70})
      for (bool has_nonfinite : {false, true}) {
        attention<float>(ScalarType::Float, d, 300, window, has_nonfinite);
        attention<Half>(ScalarType::Half, d, 300, window, has_nonfinite);
        attention<BFloat16>(ScalarType::BFloat16, d, 300, window, has_nonfinite);
      }
  std::printf("digest %016llx\n", static_cast<unsigned long long>(digest));
}
