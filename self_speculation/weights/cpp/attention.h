// Attention of new positions over the keys and values of their row. Keys are taken by chunks at fixed positions, and
// chunks in one order: the bits of a token do not depend on what is beside it.
#pragma once
#include "vectors.h"

namespace {
constexpr int64_t CHUNK = 64;  // keys whose scores are computed before their values are added
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

// Q queries [Q, d] over the keys [first, last) of a chunk [CHUNK, d]. WHOLE: vectors have all d numbers, without a rest.
template <int Q, bool WHOLE>
void attend_to_chunk(const float* queries, int64_t d, const float* keys, const float* values, int64_t first, int64_t last,
                     Attended* attended) {
  alignas(64) float scores[Q][CHUNK + LANES];
  for (int64_t key = first; key < last; key += 4) {
    Floats sums[Q * 4] = {};
    const float* of_keys[4];
    for (int i = 0; i < 4; i++) of_keys[i] = keys + std::min(key + i, last - 1) * d;  // a last key stands in
    int64_t j = 0;
    for (; j + LANES <= d; j += LANES)
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) {
        Floats of_key = load<Floats>(of_keys[i] + j);
#pragma GCC unroll 4
        for (int q = 0; q < Q; q++) sums[q * 4 + i] = accumulate(load<Floats>(queries + q * d + j), of_key, sums[q * 4 + i]);
      }
    for (int q = 0; q < Q; q++) {
      float* four = &scores[q][key];  // those after the last key are written over
      lane_sums(sums + q * 4, four);
      for (int64_t rest = j; !WHOLE && rest < d; rest++)
        for (int i = 0; i < 4; i++) four[i] += queries[q * d + rest] * of_keys[i][rest];
    }
  }
  for (int q = 0; q < Q; q++) {
    std::fill_n(&scores[q][last], LANES, -INFINITY);
    Floats most = splat(-INFINITY), sum = {};
    for (int64_t key = first; key < last; key += LANES) {
      Floats some = load<Floats>(&scores[q][key]);
      most = some > most ? some : most;
    }
    float largest = -INFINITY;
    for (int64_t i = 0; i < LANES; i++) largest = std::max(largest, most[i]);
    for (int64_t key = first; key < last; key += LANES) {
      Floats powers = exponential(load<Floats>(&scores[q][key]) - largest);
      for (int64_t i = last - key; i < LANES; i++) powers[i] = 0.0f;
      std::memcpy(&scores[q][key], &powers, sizeof(Floats));
      sum += powers;
    }
    attended[q].largest = largest, attended[q].sum = lane_sum(sum);
  }
  auto add = [&]<int N>(int64_t j) {
    Floats sums[Q * N] = {};
    for (int64_t key = first; key < last; key++) {
      Floats weights[Q];
#pragma GCC unroll 4
      for (int q = 0; q < Q; q++) weights[q] = splat(scores[q][key]);
#pragma GCC unroll 8
      for (int i = 0; i < N; i++) {
        Floats value = load<Floats>(values + key * d + j + i * LANES);
#pragma GCC unroll 4
        for (int q = 0; q < Q; q++) sums[q * N + i] = accumulate(weights[q], value, sums[q * N + i]);
      }
    }
    for (int q = 0; q < Q; q++) std::memcpy(attended[q].values + j, sums + q * N, N * sizeof(Floats));
  };
  int64_t j = 0;
  for (; j + 4 * LANES <= d; j += 4 * LANES) add.template operator()<4>(j);
  for (; j + LANES <= d; j += LANES) add.template operator()<1>(j);
  for (; !WHOLE && j < d; j++)
    for (int q = 0; q < Q; q++) {
      float sum = 0.0f;
      for (int64_t key = first; key < last; key++) sum += scores[q][key] * values[key * d + j];
      attended[q].values[j] = sum;
    }
}

// Queries [T, heads, d] at positions `start` and on over the keys and values [.., d] of a span that begins at `key`. A
// token sees the keys up to its own, and only `window` of them if that is not 0.
void attend_to_span(const float* queries, int64_t tokens, int64_t heads, int64_t d, int64_t start, int64_t window,
                    const float* keys, const float* values, int64_t key, Attended* attended) {
  constexpr int most = LANES == 16 ? 4 : 2;  // queries at a time: their sums are in registers
  std::unique_ptr<float[]> memory(new float[most * d]);
  for (int64_t i = 0; i < tokens * heads; i++) attended[i].clear(d);
  auto some = [&]<int Q, bool WHOLE>(int64_t i, int64_t chunk, int64_t first, int64_t last) {
    Attended of_chunk[Q];
    for (int q = 0; q < Q; q++) of_chunk[q].values = &memory[q * d];
    attend_to_chunk<Q, WHOLE>(queries + i * d, d, keys + chunk * d, values + chunk * d, first, last, of_chunk);
    for (int q = 0; q < Q; q++) attended[i + q].add(of_chunk[q], d);
  };
  auto all = [&]<bool WHOLE>() {
    for (int64_t chunk = key; chunk < key + SPAN && chunk < start + tokens; chunk += CHUNK) {
      const bool is_past = !window && chunk + CHUNK <= start + 1;  // all tokens see all of it
      for (int64_t t = 0; t < tokens; t += is_past ? tokens : 1) {
        int64_t last = std::min(CHUNK, start + t + 1 - chunk);
        int64_t first = window ? std::max<int64_t>(0, start + t + 1 - window - chunk) : 0;
        if (first >= last) continue;
        int64_t i = t * heads, end = is_past ? tokens * heads : i + heads;
        for (; i + most <= end; i += most) some.template operator()<most, WHOLE>(i, chunk, first, last);
        for (; i < end; i++) some.template operator()<1, WHOLE>(i, chunk, first, last);
      }
    }
  };
  d % LANES == 0 ? all.template operator()<true>() : all.template operator()<false>();
}
}  // namespace
