// The parts of the operators that need no torch to run: test_portable.py builds this file for several processors, and
// compares what it prints.
#include <cstdio>

#include "attention.h"
#include "weights.h"

namespace {
uint32_t state = 1;
float next() {  // from -1 to 1
  state = state * 1664525u + 1013904223u;
  return float(int32_t(state) >> 8) / 8388608.0f;
}
std::vector<float> random(int64_t number) {
  std::vector<float> made(number);
  for (float& each : made) each = next();
  return made;
}
void print(const char* name, const float* numbers, int64_t number) {
  for (int64_t i = 0; i < number; i++) std::printf("%s %.9g\n", name, numbers[i]);
}

template <class Number>
void products(const char* name, ScalarType type, int64_t columns) {
  constexpr int64_t rows = 4;
  std::vector<Number> w;
  for (float number : random(rows * columns)) w.push_back(Number(number));
  std::vector<float> x = random(9 * columns);
  for (int64_t tokens = 1; tokens < 10; tokens++) {
    Inputs inputs(tokens, columns, type, [&](int64_t t, float* to) { std::copy_n(&x[t * columns], columns, to); });
    std::vector<float> out(tokens * ROWS);
    products_of_rows(w.data(), columns, rows, inputs, out.data());
    print(name, out.data(), out.size());
  }
}
}  // namespace

int main() {
  for (int64_t columns : {33, 64, 150}) {
    products<float>("float", ScalarType::Float, columns);
    products<Half>("half", ScalarType::Half, columns);
    products<BFloat16>("bfloat16", ScalarType::BFloat16, columns);
    int64_t groups = round_up(columns, GROUP) / GROUP;
    std::vector<uint8_t> steps(groups * BYTES);
    for (uint8_t& each : steps) each = uint8_t(int(next() * 128));
    std::vector<BFloat16> scales;
    for (float number : random(groups * 2 * BLOCK)) scales.push_back(BFloat16(number));
    std::vector<float> x = random(3 * columns), out(3 * BLOCK);
    Inputs inputs(3, columns, ScalarType::Byte, [&](int64_t t, float* to) { std::copy_n(&x[t * columns], columns, to); });
    products_of_block(steps.data(), scales.data(), inputs, out.data());
    print("int4", out.data(), out.size());
  }
  constexpr int64_t d = 20, tokens = 2, start = 300;
  std::vector<float> queries = random(tokens * 3 * d), keys = random(SPAN * d), values = random(SPAN * d), memory(6 * d);
  for (int64_t window : {0, 150}) {
    std::vector<Attended> attended(6);
    for (int i = 0; i < 6; i++) attended[i].values = &memory[i * d];
    attend_to_span(queries.data(), tokens, 3, d, start, window, keys.data(), values.data(), 0, attended.data());
    for (const Attended& each : attended) print("sum", &each.sum, 1), print("attended", each.values, d);
  }
}
