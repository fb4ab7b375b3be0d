// Attention of new positions over the keys and values of their row. Keys are taken KEYS at a time, at fixed positions and in
// one order: the bits of a token do not depend on what is beside it.
#pragma once
#include "vectors.h"

namespace {
constexpr int64_t KEYS = 64;   // keys whose scores are computed before their values are added
constexpr int64_t SPAN = 512;   // keys of one piece of work

// Attention of one query over a range of keys, not divided by `sum`.
struct PartialAttention {
  float largest = -INFINITY;  // score
  float sum = 0.0f;           // of exponentials of scores relative to the largest one
  float* values;              // [d]

  void clear(int64_t d) {
    largest = -INFINITY;
    sum = 0.0f;
    std::fill_n(values, d, 0.0f);
  }

  // Makes `largest` and `sum` cover the new keys, too. The caller multiplies `values` by `scale_old` and the new values by
  // `scale_new`, and adds them.
  void extend(const PartialAttention& added, float& scale_old, float& scale_new) {
    const float new_largest = std::max(largest, added.largest);
    scale_old = largest == new_largest ? 1.0f : std::exp(largest - new_largest);
    scale_new = added.largest == new_largest ? 1.0f : std::exp(added.largest - new_largest);
    largest = new_largest;
    sum = scale_old * sum + scale_new * added.sum;
  }
  void add(const PartialAttention& added, int64_t d) {
    if (added.sum == 0.0f) return;  // no keys
    float scale_old;
    float scale_new;
    extend(added, scale_old, scale_new);
    for (int64_t j = 0; j < d; j++) values[j] = scale_old * values[j] + scale_new * added.values[j];
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

// The most queries at a time: their sums are in registers.
constexpr int64_t MOST_QUERIES = LANES == 16 ? 4 : 3;
// Queries whose scores are computed before values are added: keys and values stay in the first cache.
constexpr int64_t QUERIES_AT_A_TIME = 24;
typedef float Scores[KEYS + LANES];

// Keys and values of one head of a slot, [positions, d] each, in the format of the cache.
struct SlotHead {
  void* keys;
  void* values;
};

// Those of a row. Its first `shared` positions, a multiple of KEYS, are in another slot, `beginning`.
class CachedHead {
 public:
  CachedHead(SlotHead slot, SlotHead beginning, int64_t shared, ScalarType type, int64_t d)
      : slot_(slot), beginning_(beginning), shared_(shared), type_(type), d_(d),
        widened_(type == ScalarType::Float ? nullptr : aligned(2 * KEYS * d)) {}

  void write(int64_t position, const float* key, const float* value) {
    put(slot_.keys, position, key);
    put(slot_.values, position, value);
  }
  // Calls f(keys, values), [num_keys, d] from a multiple of KEYS on: as they are, or in float32, widened once for many queries.
  template <class F>
  void read(int64_t position, int64_t num_keys, bool is_widened, const F& f) const {
    const SlotHead& from = position < shared_ ? beginning_ : slot_;
    with_numbers(type_, from.keys, [&]<class Number>(const Number* keys) {
      keys += position * d_;
      const Number* values = static_cast<const Number*>(from.values) + position * d_;
      if constexpr (!std::is_same_v<Number, float>)
        if (is_widened) return f(widened(keys, num_keys, 0), widened(values, num_keys, KEYS * d_));
      f(keys, values);
    });
  }

 private:
  void put(void* to, int64_t position, const float* numbers) {
    with_numbers(type_, to, [&]<class Number>(const Number* first) {
      auto* rounded = const_cast<Number*>(first) + position * d_;
      for (int64_t j = 0; j < d_; j += LANES) {
        const int64_t n = std::min(LANES, d_ - j);
        narrow(widen(numbers + j, n), rounded + j, n);
      }
    });
  }
  template <class Number>
  const float* widened(const Number* numbers, int64_t num_keys, int64_t place) const {
    float* to = reinterpret_cast<float*>(widened_.get()) + place;
    const int64_t size = num_keys * d_;
    int64_t j = 0;
    for (; j + LANES <= size; j += LANES) store(widen(numbers + j), to + j, LANES);
    if (j < size) store(widen(numbers + j, size - j), to + j, size - j);
    return to;
  }

  SlotHead slot_;
  SlotHead beginning_;
  int64_t shared_;
  ScalarType type_;
  int64_t d_;
  std::unique_ptr<Floats[]> widened_;  // KEYS keys, then as many values
};

// Scores of Q queries [Q, d] and the keys [first, last) of [KEYS, d]. IS_MULTIPLE: d is a multiple of LANES.
template <int Q, bool IS_MULTIPLE, class Number>
void score(const float* queries, int64_t d, const Number* keys, int64_t first, int64_t last, Scores* scores) {
  for (int64_t key = first; key < last; key += 4) {
    Floats sums[Q * 4] = {};
    const Number* key_rows[4];
    for (int i = 0; i < 4; i++) key_rows[i] = keys + std::min(key + i, last - 1) * d;  // a last key stands in
    int64_t j = 0;
    for (; j + LANES <= d; j += LANES) {
      Floats query[Q];
#pragma GCC unroll 4
      for (int q = 0; q < Q; q++) query[q] = load<Floats>(queries + q * d + j);
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) {
        const Floats key_numbers = widen(key_rows[i] + j);
#pragma GCC unroll 4
        for (int q = 0; q < Q; q++) sums[q * 4 + i] = accumulate(query[q], key_numbers, sums[q * 4 + i]);
      }
    }
    for (int q = 0; q < Q; q++) {
      float* four = &scores[q][key];  // scores after the last key are written over
      lane_sums(sums + q * 4, four);
      for (int64_t rest = j; !IS_MULTIPLE && rest < d; rest++)
        for (int i = 0; i < 4; i++) four[i] += queries[q * d + rest] * float(key_rows[i][rest]);
    }
  }
}

// Scores become exponentials relative to the largest score. Returns the largest score and the sum of the exponentials.
PartialAttention weigh(float* scores, int64_t first, int64_t last) {
  std::fill_n(scores + last, LANES, -INFINITY);
  Floats most = splat(-INFINITY);
  Floats sum = {};
  for (int64_t key = first; key < last; key += LANES) {
    const Floats lanes = load<Floats>(scores + key);
    most = lanes > most ? lanes : most;
  }
  const float largest = max_lane(most);
  for (int64_t key = first; key < last; key += LANES) {
    Floats powers = exponential(load<Floats>(scores + key) - largest);
    for (int64_t i = last - key; i < LANES; i++) powers[i] = 0.0f;
    std::memcpy(scores + key, &powers, sizeof(Floats));
    sum += powers;
  }
  return {largest, lane_sum(sum), nullptr};
}

// Adds the values [KEYS, d] of the keys [first, last), times their weights, to the values of Q queries. The sum of a query has
// `scale_old` [Q] of the old values and `scale_new` [Q] of the new ones.
template <int Q, bool IS_MULTIPLE, class Number>
void add_values(const Scores* weights, int64_t d, const Number* values, int64_t first, int64_t last, const float* scale_old,
                const float* scale_new, PartialAttention* attended) {
  auto add = [&]<int N>(int64_t j) {
    Floats sums[Q * N] = {};
    for (int64_t key = first; key < last; key++) {
      Floats weight[Q];
#pragma GCC unroll 4
      for (int q = 0; q < Q; q++) weight[q] = splat(weights[q][key]);
#pragma GCC unroll 4
      for (int i = 0; i < N; i++) {
        Floats value = widen(values + key * d + j + i * LANES);
#pragma GCC unroll 4
        for (int q = 0; q < Q; q++) sums[q * N + i] = accumulate(weight[q], value, sums[q * N + i]);
      }
    }
    for (int q = 0; q < Q; q++)
      for (int i = 0; i < N; i++) {
        float* to = attended[q].values + j + i * LANES;
        store(scale_old[q] * load<Floats>(to) + scale_new[q] * sums[q * N + i], to, LANES);
      }
  };
  int64_t j = 0;
  for (; j + 4 * LANES <= d; j += 4 * LANES) add.template operator()<4>(j);
  for (; j + LANES <= d; j += LANES) add.template operator()<1>(j);
  for (; !IS_MULTIPLE && j < d; j++)
    for (int q = 0; q < Q; q++) {
      float sum = 0.0f;
      for (int64_t key = first; key < last; key++) sum += weights[q][key] * float(values[key * d + j]);
      attended[q].values[j] = scale_old[q] * attended[q].values[j] + scale_new[q] * sum;
    }
}

// Queries [n, d] over the keys [first, last) of [KEYS, d].
template <bool IS_MULTIPLE, class Number>
void attend_to_keys(const float* queries, int64_t n, int64_t d, const Number* keys, const Number* values, int64_t first,
                    int64_t last, PartialAttention* attended) {
  alignas(64) Scores scores[QUERIES_AT_A_TIME];
  float scale_old[QUERIES_AT_A_TIME];
  float scale_new[QUERIES_AT_A_TIME];
  for (; n > 0; queries += QUERIES_AT_A_TIME * d, attended += QUERIES_AT_A_TIME, n -= QUERIES_AT_A_TIME) {
    const int64_t num_queries = std::min(n, QUERIES_AT_A_TIME);
    auto all = [&](const auto& f) {
      int64_t i = 0;
      for (; i + MOST_QUERIES <= num_queries; i += MOST_QUERIES) f.template operator()<MOST_QUERIES>(i);
      with_count<MOST_QUERIES - 1>(num_queries - i, [&]<int Q>() { f.template operator()<Q>(i); });
    };
    all([&]<int Q>(int64_t i) { score<Q, IS_MULTIPLE>(queries + i * d, d, keys, first, last, scores + i); });
    for (int64_t i = 0; i < num_queries; i++) {
      const PartialAttention added = weigh(scores[i], first, last);
      attended[i].extend(added, scale_old[i], scale_new[i]);
    }
    all([&]<int Q>(int64_t i) {
      add_values<Q, IS_MULTIPLE>(scores + i, d, values, first, last, scale_old + i, scale_new + i, attended + i);
    });
  }
}

// Queries [T, heads, d] at positions `start` and on over the keys and values of a span from `begin` on. A token sees the
// keys up to its position; if `window` is not 0, only the last `window` keys.
void attend_to_span(const float* queries, int64_t tokens, int64_t heads, int64_t d, int64_t start, int64_t window,
                    const CachedHead& cached, int64_t begin, PartialAttention* attended) {
  for (int64_t i = 0; i < tokens * heads; i++) attended[i].clear(d);
  const int64_t end = std::min(begin + SPAN, start + tokens);
  for (int64_t from = begin; from < end; from += KEYS) {
    const bool all_are_seen = !window && from + KEYS <= start + 1;  // all tokens see all keys of the chunk
    if (window && from + KEYS <= start + 1 - window) continue;  // no token sees one
    cached.read(from, std::min(KEYS, end - from), tokens * heads > 2 * MOST_QUERIES, [&]<class Number>(const Number* keys, const Number* values) {
      for (int64_t t = 0; t < tokens; t += all_are_seen ? tokens : 1) {
        int64_t last = std::min(KEYS, start + t + 1 - from);
        int64_t first = window ? std::max<int64_t>(0, start + t + 1 - window - from) : 0;
        if (first >= last) continue;
        auto* attend = d % LANES == 0 ? attend_to_keys<true, Number> : attend_to_keys<false, Number>;
        attend(queries + t * heads * d, (all_are_seen ? tokens : 1) * heads, d, keys, values, first, last, attended + t * heads);
      }
    });
  }
}
}  // namespace
