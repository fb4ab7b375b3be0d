// Attention of new positions over the keys and values of their row. Keys are taken KEYS at a time, at fixed positions and in
// one order: the bits of a token do not depend on what is beside it.
#pragma once
#include "vectors.h"

namespace {
constexpr int64_t KEYS = 64;  // keys whose scores are computed before their values are added
constexpr int64_t SPAN = 512;   // keys of one piece of work

// Attention of one query over some keys, not divided by `sum`.
struct Attended {
  float largest = -INFINITY, sum = 0.0f;  // of scores, and of their exponentials relative to it
  float* values;                          // [d]

  void clear(int64_t d) { largest = -INFINITY, sum = 0.0f, std::fill_n(values, d, 0.0f); }

  // Makes room for others: of the values, `own` are these and `its` the others.
  void scale(const Attended& other, float& own, float& its) {
    float both = std::max(largest, other.largest);
    own = std::exp(largest - both), its = std::exp(other.largest - both);
    largest = both, sum = own * sum + its * other.sum;
  }
  void add(const Attended& other, int64_t d) {
    if (other.sum == 0.0f) return;  // no keys
    float own, its;
    scale(other, own, its);
    for (int64_t j = 0; j < d; j++) values[j] = own * values[j] + its * other.values[j];
  }
};

// x [d], rotated by the cosines and sines [d] of its position, times a factor.
void rotate(const float* x, const float* cosines, const float* sines, int64_t d, float factor, float* rotated) {
  const int64_t half = d / 2;
  int64_t j = 0;
  for (; j + LANES <= half; j += LANES) {
    const Floats first = load<Floats>(x + j);
    const Floats second = load<Floats>(x + j + half);
    auto turned = [&](int64_t at, Floats straight, Floats across) {
      const Floats number = (straight * load<Floats>(cosines + at) + across * load<Floats>(sines + at)) * factor;
      std::memcpy(rotated + at, &number, sizeof(number));
    };
    turned(j, first, -second);
    turned(j + half, second, first);
  }
  for (; j < half; j++) {
    const float first = x[j];
    const float second = x[j + half];
    rotated[j] = (first * cosines[j] - second * sines[j]) * factor;
    rotated[j + half] = (second * cosines[j + half] + first * sines[j + half]) * factor;
  }
}

// The most queries at a time, whose sums are in registers; queries whose scores are made before values are added, so that
// keys and values stay in the first cache.
constexpr int64_t MOST_QUERIES = LANES == 16 ? 4 : 3, BATCH = 24;
typedef float Scores[KEYS + LANES];

// Q queries [Q, d] times the keys [first, last) of [KEYS, d]. WHOLE: vectors have all d numbers, without a rest.
template <int Q, bool WHOLE>
void score(const float* queries, int64_t d, const float* keys, int64_t first, int64_t last, Scores* scores) {
  for (int64_t key = first; key < last; key += 4) {
    Floats sums[Q * 4] = {};
    const float* of_keys[4];
    for (int i = 0; i < 4; i++) of_keys[i] = keys + std::min(key + i, last - 1) * d;  // a last key stands in
    int64_t j = 0;
    for (; j + LANES <= d; j += LANES) {
      Floats of_queries[Q];
#pragma GCC unroll 4
      for (int q = 0; q < Q; q++) of_queries[q] = load<Floats>(queries + q * d + j);
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) {
        Floats of_key = load<Floats>(of_keys[i] + j);
#pragma GCC unroll 4
        for (int q = 0; q < Q; q++) sums[q * 4 + i] = accumulate(of_queries[q], of_key, sums[q * 4 + i]);
      }
    }
    for (int q = 0; q < Q; q++) {
      float* four = &scores[q][key];  // those after the last key are written over
      lane_sums(sums + q * 4, four);
      for (int64_t rest = j; !WHOLE && rest < d; rest++)
        for (int i = 0; i < 4; i++) four[i] += queries[q * d + rest] * of_keys[i][rest];
    }
  }
}

// Scores become their exponentials relative to the largest one; returns it and their sum.
Attended weigh(float* scores, int64_t first, int64_t last) {
  std::fill_n(scores + last, LANES, -INFINITY);
  Floats most = splat(-INFINITY), sum = {};
  for (int64_t key = first; key < last; key += LANES) {
    Floats some = load<Floats>(scores + key);
    most = some > most ? some : most;
  }
  float largest = -INFINITY;
  for (int64_t i = 0; i < LANES; i++) largest = std::max(largest, most[i]);
  for (int64_t key = first; key < last; key += LANES) {
    Floats powers = exponential(load<Floats>(scores + key) - largest);
    for (int64_t i = last - key; i < LANES; i++) powers[i] = 0.0f;
    std::memcpy(scores + key, &powers, sizeof(Floats));
    sum += powers;
  }
  return {largest, lane_sum(sum), nullptr};
}

// Values [KEYS, d] of the keys [first, last) by their weights, added to what Q queries have: `own` of it, `its` of these.
template <int Q, bool WHOLE>
void add_values(const Scores* weights, int64_t d, const float* values, int64_t first, int64_t last, const float* own,
                const float* its, Attended* attended) {
  auto add = [&]<int N>(int64_t j) {
    Floats sums[Q * N] = {};
    for (int64_t key = first; key < last; key++) {
      Floats of_key[Q];
#pragma GCC unroll 4
      for (int q = 0; q < Q; q++) of_key[q] = splat(weights[q][key]);
#pragma GCC unroll 4
      for (int i = 0; i < N; i++) {
        Floats value = load<Floats>(values + key * d + j + i * LANES);
#pragma GCC unroll 4
        for (int q = 0; q < Q; q++) sums[q * N + i] = accumulate(of_key[q], value, sums[q * N + i]);
      }
    }
    for (int q = 0; q < Q; q++)
      for (int i = 0; i < N; i++) {
        float* to = attended[q].values + j + i * LANES;
        store(own[q] * load<Floats>(to) + its[q] * sums[q * N + i], to, LANES);
      }
  };
  int64_t j = 0;
  for (; j + 4 * LANES <= d; j += 4 * LANES) add.template operator()<4>(j);
  for (; j + LANES <= d; j += LANES) add.template operator()<1>(j);
  for (; !WHOLE && j < d; j++)
    for (int q = 0; q < Q; q++) {
      float sum = 0.0f;
      for (int64_t key = first; key < last; key++) sum += weights[q][key] * values[key * d + j];
      attended[q].values[j] = own[q] * attended[q].values[j] + its[q] * sum;
    }
}

// Queries [n, d] over the keys [first, last) of [KEYS, d].
template <bool WHOLE>
void attend_to_keys(const float* queries, int64_t n, int64_t d, const float* keys, const float* values, int64_t first,
                     int64_t last, Attended* attended) {
  alignas(64) Scores scores[BATCH];
  float own[BATCH], its[BATCH];
  for (; n > 0; queries += BATCH * d, attended += BATCH, n -= BATCH) {
    const int64_t some = std::min(n, BATCH);
    auto all = [&](const auto& f) {
      int64_t i = 0;
      for (; i + MOST_QUERIES <= some; i += MOST_QUERIES) f.template operator()<MOST_QUERIES>(i);
      with_count<MOST_QUERIES - 1>(some - i, [&]<int Q>() { f.template operator()<Q>(i); });
    };
    all([&]<int Q>(int64_t i) { score<Q, WHOLE>(queries + i * d, d, keys, first, last, scores + i); });
    for (int64_t i = 0; i < some; i++) {
      const Attended these = weigh(scores[i], first, last);
      attended[i].scale(these, own[i], its[i]);
    }
    all([&]<int Q>(int64_t i) { add_values<Q, WHOLE>(scores + i, d, values, first, last, own + i, its + i, attended + i); });
  }
}

// Queries [T, heads, d] at positions `start` and on over the keys and values [.., d] of a span that begins at `key`. A
// token sees the keys up to its own, and only `window` of them if that is not 0.
void attend_to_span(const float* queries, int64_t tokens, int64_t heads, int64_t d, int64_t start, int64_t window,
                    const float* keys, const float* values, int64_t key, Attended* attended) {
  for (int64_t i = 0; i < tokens * heads; i++) attended[i].clear(d);
  for (int64_t from = key; from < key + SPAN && from < start + tokens; from += KEYS) {
    const bool is_past = !window && from + KEYS <= start + 1;  // all tokens see all of these
    for (int64_t t = 0; t < tokens; t += is_past ? tokens : 1) {
      int64_t last = std::min(KEYS, start + t + 1 - from);
      int64_t first = window ? std::max<int64_t>(0, start + t + 1 - window - from) : 0;
      if (first >= last) continue;
      auto* attend = d % LANES == 0 ? attend_to_keys<true> : attend_to_keys<false>;
      attend(queries + t * heads * d, (is_past ? tokens : 1) * heads, d, keys + from * d, values + from * d, first, last,
             attended + t * heads);
    }
  }
}
}  // namespace
