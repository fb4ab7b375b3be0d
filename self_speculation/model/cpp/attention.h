// Attention of new positions over the keys and values of their row. Keys are taken by chunks at fixed positions, and
// chunks in one order: the bits of a token do not depend on what is beside it.
#pragma once
#include "vectors.h"

namespace {
constexpr int64_t CHUNK = 128;  // keys whose scores are computed before their values are added
constexpr int64_t SPAN = 512;   // keys of one piece of work

// Attention of one query over some keys, not divided by `sum`.
struct Attended {
  float largest = -INFINITY, sum = 0.0f;  // of scores, and of their exponentials relative to it
  float* values;                          // [d]

  void clear(int64_t d) { largest = -INFINITY, sum = 0.0f, std::fill_n(values, d, 0.0f); }

  void add(const Attended& other, int64_t d) {
    if (other.sum == 0.0f) return;  // no keys
    float both = std::max(largest, other.largest);
    float own = std::exp(largest - both), its = std::exp(other.largest - both);
    largest = both, sum = own * sum + its * other.sum;
    for (int64_t j = 0; j < d; j++) values[j] = own * values[j] + its * other.values[j];
  }
};

// x [d], rotated by the cosines and sines [d] of its position, times a factor.
void rotate(const float* x, const float* cosines, const float* sines, int64_t d, float factor, float* rotated) {
  for (int64_t j = 0, half = d / 2; j < half; j++) {
    rotated[j] = (x[j] * cosines[j] - x[j + half] * sines[j]) * factor;
    rotated[j + half] = (x[j + half] * cosines[j + half] + x[j] * sines[j + half]) * factor;
  }
}

// One query over the keys [first, last) of a chunk [CHUNK, d].
void attend_to_chunk(const float* query, int64_t d, const float* keys, const float* values, int64_t first, int64_t last,
                     Attended& attended) {
  alignas(64) float scores[CHUNK + 4];
  float largest = -INFINITY;
  for (int64_t key = first; key < last; key += 4) {
    Floats sums[4] = {};
    const float* of_keys[4];
    for (int i = 0; i < 4; i++) of_keys[i] = keys + std::min(key + i, last - 1) * d;  // a last key stands in
    int64_t j = 0;
    for (; j + LANES <= d; j += LANES)
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) sums[i] = fma(load<Floats>(query + j), load<Floats>(of_keys[i] + j), sums[i]);
    float four[4];
    lane_sums(sums, four);
    for (; j < d; j++)
      for (int i = 0; i < 4; i++) four[i] += query[j] * of_keys[i][j];
    for (int i = 0; i < 4 && key + i < last; i++) largest = std::max(largest, scores[key + i] = four[i]);
  }
  float sum = 0.0f;
  for (int64_t key = first; key < last; key += LANES) {
    int64_t n = std::min(LANES, last - key);
    Floats powers = exponential(widen(scores + key, n) - largest);
    std::memcpy(scores + key, &powers, n * sizeof(float));
    for (int64_t i = 0; i < n; i++) sum += powers[i];
  }
  attended.largest = largest, attended.sum = sum;
  auto add = [&]<int N>(int64_t j) {
    Floats sums[N] = {};
    for (int64_t key = first; key < last; key++)
#pragma GCC unroll 4
      for (int i = 0; i < N; i++) sums[i] = fma(splat(scores[key]), load<Floats>(values + key * d + j + i * LANES), sums[i]);
    std::memcpy(attended.values + j, sums, sizeof(sums));
  };
  int64_t j = 0;
  for (; j + 4 * LANES <= d; j += 4 * LANES) add.template operator()<4>(j);
  for (; j + LANES <= d; j += LANES) add.template operator()<1>(j);
  for (; j < d; j++) {
    float sum = 0.0f;
    for (int64_t key = first; key < last; key++) sum += scores[key] * values[key * d + j];
    attended.values[j] = sum;
  }
}

// Queries [T, heads, d] at positions `start` and on over the keys and values [.., d] of a span that begins at `key`. A
// token sees the keys up to its own, and only `window` of them if that is not 0.
void attend_to_span(const float* queries, int64_t tokens, int64_t heads, int64_t d, int64_t start, int64_t window,
                    const float* keys, const float* values, int64_t key, Attended* attended) {
  std::unique_ptr<float[]> memory(new float[d]);
  for (int64_t i = 0; i < tokens * heads; i++) attended[i].clear(d);
  for (int64_t chunk = key; chunk < key + SPAN && chunk < start + tokens; chunk += CHUNK)
    for (int64_t t = 0; t < tokens; t++) {
      int64_t last = std::min(CHUNK, start + t + 1 - chunk);
      int64_t first = window ? std::max<int64_t>(0, start + t + 1 - window - chunk) : 0;
      if (first >= last) continue;
      for (int64_t head = 0; head < heads; head++) {
        Attended of_chunk{.values = memory.get()};
        attend_to_chunk(queries + (t * heads + head) * d, d, keys + chunk * d, values + chunk * d, first, last, of_chunk);
        attended[t * heads + head].add(of_chunk, d);
      }
    }
}
}  // namespace
