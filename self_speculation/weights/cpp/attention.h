// Attention of the new tokens of a sequence over the keys and values of one head, d numbers each. A span of SPAN keys is one piece
// of work, whose partial results layers.cpp merges. Blocks of KEY_BLOCK keys begin at fixed positions and are added in one order:
// the bits of a token do not depend on what is beside it.
#pragma once
#include "vectors.h"

namespace {
constexpr int64_t KEY_BLOCK = 64;  // keys whose scores are computed before their values are added
constexpr int64_t SPAN = 512;      // keys of one piece of work

// Attention of one query over a range of keys, as flash attention keeps it: `values` are not divided by `sum`.
struct PartialAttention {
  float max_score = -INFINITY;
  float sum = 0.0f;  // of exp(score - max_score)
  float* values;     // [d]: sums of exp(score - max_score) * value

  void clear(int64_t d) {
    max_score = -INFINITY;
    sum = 0.0f;
    std::fill_n(values, d, 0.0f);
  }

  // Adds the maximum and the sum of new keys. The caller then sets values = scale_old * values + scale_new * new values.
  void extend(const PartialAttention& added, float& scale_old, float& scale_new) {
    const float new_max = std::max(max_score, added.max_score);
    scale_old = max_score == new_max ? 1.0f : std::exp(max_score - new_max);
    scale_new = added.max_score == new_max ? 1.0f : std::exp(added.max_score - new_max);
    max_score = new_max;
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
    auto put = [&](int64_t at, Floats by_cosine, Floats by_sine) {
      const Floats lanes = (by_cosine * load<Floats>(cosines + at) + by_sine * load<Floats>(sines + at)) * factor;
      std::memcpy(rotated + at, &lanes, sizeof(lanes));
    };
    put(j, first, -second);
    put(j + half, second, first);
  }
  for (; j < half; j++) {
    const float first = x[j];
    const float second = x[j + half];
    rotated[j] = (first * cosines[j] - second * sines[j]) * factor;
    rotated[j + half] = (second * cosines[j + half] + first * sines[j + half]) * factor;
  }
}

// Queries that are multiplied at a time: their sums are in registers.
constexpr int64_t MAX_QUERIES = LANES == 16 ? 4 : 3;
// Queries whose scores are computed before values are added: keys and values stay in the first cache.
constexpr int64_t QUERY_BLOCK = 24;
typedef float Scores[KEY_BLOCK + LANES];

// Keys and values of one head of a slot, [positions, d] each, in the format of the cache.
struct SlotHead {
  void* keys;
  void* values;
};

// Keys and values of one head of a sequence. The first `prefix_length` positions, a multiple of KEY_BLOCK, lie in the slot of the
// shared prefix, and all later positions in the slot of the sequence.
class CachedHead {
 public:
  CachedHead(SlotHead slot, SlotHead prefix, int64_t prefix_length, ScalarType type, int64_t d)
      : slot_(slot), prefix_(prefix), prefix_length_(prefix_length), type_(type), d_(d) {}

  void write(int64_t position, const float* key, const float* value) {
    put(slot_.keys, position, key);
    put(slot_.values, position, value);
  }
  // Calls f(keys, values) with keys and values [num_keys, d] from `position` on, a multiple of KEY_BLOCK. `is_widened`: in float32,
  // which pays for many queries; else in the format of the cache.
  template <class F>
  void read(int64_t position, int64_t num_keys, bool is_widened, const F& f) const {
    const SlotHead& from = position < prefix_length_ ? prefix_ : slot_;
    dispatch(type_, from.keys, [&]<class Scalar>(const Scalar* keys) {
      keys += position * d_;
      const Scalar* values = static_cast<const Scalar*>(from.values) + position * d_;
      if constexpr (!std::is_same_v<Scalar, float>)
        if (is_widened) return f(widened(keys, num_keys, 0), widened(values, num_keys, KEY_BLOCK * d_));
      f(keys, values);
    });
  }

 private:
  void put(void* slot_data, int64_t position, const float* from) {
    dispatch(type_, slot_data, [&]<class Scalar>(const Scalar* first) {
      auto* to = const_cast<Scalar*>(first) + position * d_;
      for (int64_t j = 0; j < d_; j += LANES) {
        const int64_t n = std::min(LANES, d_ - j);
        narrow(widen(from + j, n), to + j, n);
      }
    });
  }
  template <class Scalar>
  const float* widened(const Scalar* from, int64_t num_keys, int64_t offset) const {
    if (!widened_) widened_ = aligned(2 * KEY_BLOCK * d_);
    float* to = reinterpret_cast<float*>(widened_.get()) + offset;
    const int64_t size = num_keys * d_;
    int64_t j = 0;
    for (; j + LANES <= size; j += LANES) store(widen(from + j), to + j, LANES);
    if (j < size) store(widen(from + j, size - j), to + j, size - j);
    return to;
  }

  SlotHead slot_;
  SlotHead prefix_;
  int64_t prefix_length_;
  ScalarType type_;
  int64_t d_;
  mutable std::unique_ptr<Floats[]> widened_;  // KEY_BLOCK keys, then as many values
};

// Prefetches what lies 4 KiB after `from`: the processor alone fetches too little.
template <class Scalar>
void fetch_ahead(const Scalar* from, int64_t count) {
  constexpr int64_t BYTES = 4096;
  auto* ahead = reinterpret_cast<const char*>(from) + BYTES;
  for (int64_t byte = 0; byte < count * int64_t(sizeof(Scalar)); byte += 64) __builtin_prefetch(ahead + byte, 0, 2);
}

// Scores of Q queries [Q, d] and the keys [begin, end) of [KEY_BLOCK, d]. IS_MULTIPLE: d is a multiple of LANES.
template <int Q, bool IS_MULTIPLE, class Scalar>
void score(const float* queries, int64_t d, const Scalar* keys, int64_t begin, int64_t end, bool fetches, Scores* scores) {
  for (int64_t key = begin; key < end; key += 4) {
    Floats sums[Q * 4] = {};
    const Scalar* four_keys[4];
    for (int i = 0; i < 4; i++) four_keys[i] = keys + std::min(key + i, end - 1) * d;  // the last key stands in for missing ones
    if (fetches) fetch_ahead(four_keys[0], 4 * d);
    int64_t j = 0;
    for (; j + LANES <= d; j += LANES) {
      Floats query[Q];
#pragma GCC unroll 4
      for (int q = 0; q < Q; q++) query[q] = load<Floats>(queries + q * d + j);
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) {
        const Floats key_lanes = widen(four_keys[i] + j);
#pragma GCC unroll 4
        for (int q = 0; q < Q; q++) sums[q * 4 + i] = accumulate(query[q], key_lanes, sums[q * 4 + i]);
      }
    }
    // `weigh` overwrites scores of missing keys.
#pragma GCC unroll 4
    for (int q = 0; q + 1 < Q; q += 2) lane_sums(sums + q * 4, sums + (q + 1) * 4, &scores[q][key], &scores[q + 1][key]);
    if (Q % 2) lane_sums(sums + (Q - 1) * 4, &scores[Q - 1][key]);
    for (int64_t rest = j; !IS_MULTIPLE && rest < d; rest++)
      for (int q = 0; q < Q; q++)
        for (int i = 0; i < 4; i++) scores[q][key + i] += queries[q * d + rest] * float(four_keys[i][rest]);
  }
}

// Replaces the scores of the keys [begin, end) by exp(score - max_score). Returns the maximum and the sum.
PartialAttention weigh(float* scores, int64_t begin, int64_t end) {
  std::fill_n(scores + end, LANES, -INFINITY);
  Floats max_lanes = splat(-INFINITY);
  Floats sum = {};
  for (int64_t key = begin; key < end; key += LANES) {
    const Floats lanes = load<Floats>(scores + key);
    max_lanes = lanes > max_lanes ? lanes : max_lanes;
  }
  const float max_score = max_lane(max_lanes);
  for (int64_t key = begin; key < end; key += LANES) {
    Floats weights = exponential(load<Floats>(scores + key) - max_score);
    for (int64_t i = end - key; i < LANES; i++) weights[i] = 0.0f;
    std::memcpy(scores + key, &weights, sizeof(Floats));
    sum += weights;
  }
  return {max_score, lane_sum(sum), nullptr};
}

// For Q queries: attended values = scale_old * attended values + scale_new * weights times the values of the keys [begin, end) of
// [KEY_BLOCK, d].
template <int Q, bool IS_MULTIPLE, class Scalar>
void add_values(const Scores* weights, int64_t d, const Scalar* values, int64_t begin, int64_t end, bool fetches,
                const float* scale_old, const float* scale_new, PartialAttention* attended) {
  auto add = [&]<int N>(int64_t j) {
    Floats sums[Q * N] = {};
    for (int64_t key = begin; key < end; key++) {
      if (fetches) fetch_ahead(values + key * d + j, N * LANES);
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
      for (int64_t key = begin; key < end; key++) sum += weights[q][key] * float(values[key * d + j]);
      attended[q].values[j] = scale_old[q] * attended[q].values[j] + scale_new[q] * sum;
    }
}

// Adds the keys [begin, end) of [KEY_BLOCK, d] to the attention of queries [n, d].
template <bool IS_MULTIPLE, class Scalar>
void attend_to_keys(const float* queries, int64_t n, int64_t d, const Scalar* keys, const Scalar* values, int64_t begin,
                    int64_t end, PartialAttention* attended) {
  alignas(64) Scores scores[QUERY_BLOCK];
  float scale_old[QUERY_BLOCK];
  float scale_new[QUERY_BLOCK];
  bool fetches = true;  // once for all queries
  for (; n > 0; queries += QUERY_BLOCK * d, attended += QUERY_BLOCK, n -= QUERY_BLOCK, fetches = false) {
    const int64_t num_queries = std::min(n, QUERY_BLOCK);
    auto for_queries = [&](const auto& f) {
      int64_t i = 0;
      for (; i + MAX_QUERIES <= num_queries; i += MAX_QUERIES) f.template operator()<MAX_QUERIES>(i);
      dispatch_count<MAX_QUERIES - 1>(num_queries - i, [&]<int Q>() { f.template operator()<Q>(i); });
    };
    for_queries([&]<int Q>(int64_t i) {
      score<Q, IS_MULTIPLE>(queries + i * d, d, keys, begin, end, fetches && i == 0, scores + i);
    });
    for (int64_t i = 0; i < num_queries; i++) {
      const PartialAttention added = weigh(scores[i], begin, end);
      attended[i].extend(added, scale_old[i], scale_new[i]);
    }
    for_queries([&]<int Q>(int64_t i) {
      add_values<Q, IS_MULTIPLE>(scores + i, d, values, begin, end, fetches && i == 0, scale_old + i, scale_new + i,
                                 attended + i);
    });
  }
}

// Adds the keys [begin, end), of whole blocks but for the last one, to the attention of queries [T, heads, d] from position `start`
// on. A token sees the keys up to and including its position; with a `window` other than 0, only the last `window` of them.
void attend_to_blocks(const float* queries, int64_t tokens, int64_t heads, int64_t d, int64_t start, int64_t window,
                      const CachedHead& cached, int64_t begin, int64_t end, PartialAttention* attended) {
  const bool is_widened = tokens * heads > 2 * MAX_QUERIES;
  for (int64_t block = begin; block < end; block += KEY_BLOCK) {
    const bool all_are_seen = !window && block + KEY_BLOCK <= start + 1;  // by all tokens
    if (window && block + KEY_BLOCK <= start + 1 - window) continue;      // no token sees a key
    cached.read(block, std::min(KEY_BLOCK, end - block), is_widened, [&]<class Scalar>(const Scalar* keys, const Scalar* values) {
      for (int64_t t = 0; t < tokens; t += all_are_seen ? tokens : 1) {
        const int64_t seen_end = std::min(KEY_BLOCK, start + t + 1 - block);
        const int64_t seen_begin = window ? std::max<int64_t>(0, start + t + 1 - window - block) : 0;
        if (seen_begin >= seen_end) continue;
        auto* attend = d % LANES == 0 ? attend_to_keys<true, Scalar> : attend_to_keys<false, Scalar>;
        attend(queries + t * heads * d, (all_are_seen ? tokens : 1) * heads, d, keys, values, seen_begin, seen_end,
               attended + t * heads);
      }
    });
  }
}
}  // namespace
