// `attend_to_blocks` of attention.h by tiles, for tokens of a prompt, in bfloat16. Scores are [keys, 16 queries], so a lane is a query
// from the scores to the sums.
#pragma once
#include "attention.h"
#include "tiles.h"

namespace {
constexpr int64_t KEY_TILES = KEY_BLOCK / tiles::ROWS;
constexpr int64_t VALUE_TILES = KEY_BLOCK / tiles::COLUMNS;  // along the keys

// Elements [j, j + LANES) of a vector [d], then zeros.
template <class Scalar>
Floats load_lanes(const Scalar* vector, int64_t j, int64_t d) {
  if (j + LANES <= d) return widen(vector + j);
  return j < d ? widen(vector + j, d - j) : Floats{};
}

// A block of keys and values of a head as tiles in bfloat16. Missing keys and values are zeros.
class KeyTiles {
 public:
  explicit KeyTiles(int64_t d)
      : d_(d), steps_((d + tiles::COLUMNS - 1) / tiles::COLUMNS), keys_(new Ints[2 * KEY_BLOCK * steps_]),
        values_(new Ints[2 * steps_ * VALUE_TILES * tiles::ROWS]) {}

  int64_t steps() const { return steps_; }
  // The tile of 16 keys times 32 columns. The sum of both terms is the keys.
  const Ints* keys(int64_t tile, int64_t step, int64_t term) const {
    return &keys_[((tile * steps_ + step) * 2 + term) * tiles::ROWS];
  }
  const Ints* values(int64_t tile, int64_t key_tile) const { return &values_[(tile * VALUE_TILES + key_tile) * tiles::ROWS]; }
  // Whether a value is infinite or NaN. The tile has 0 for it, since a weight of 0 times infinity would be NaN.
  bool has_nonfinite() const { return has_nonfinite_; }

  // Fills the tiles with keys and values [num_keys, d].
  template <class Scalar>
  void pack(const Scalar* keys, const Scalar* values, int64_t num_keys) {
    for (int64_t key = 0; key < KEY_BLOCK; key++)
      for (int64_t step = 0; step < steps_; step++) {
        auto half = [&](int64_t j) { return key < num_keys ? load_lanes(keys + key * d_, step * tiles::COLUMNS + j, d_) : Floats{}; };
        const Split split(half(0), half(LANES));
        const int64_t tile = key / tiles::ROWS;
        const int64_t row = key % tiles::ROWS;
        keys_[((tile * steps_ + step) * 2) * tiles::ROWS + row] = split.upper;
        keys_[((tile * steps_ + step) * 2 + 1) * tiles::ROWS + row] = split.rest;
      }
    Ints nonfinite = {};
    for (int64_t tile = 0; tile < 2 * steps_; tile++)
      for (int64_t key_tile = 0; key_tile < VALUE_TILES; key_tile++) {
        Ints* rows = &values_[(tile * VALUE_TILES + key_tile) * tiles::ROWS];
        for (int64_t pair = 0; pair < tiles::ROWS; pair++) {
          auto finite = [&](int64_t key) {
            if (key >= num_keys) return Floats{};
            const Floats value = load_lanes(values + key * d_, tile * LANES, d_);
            const Ints is_infinite = ((Ints)value & 0x7f800000) == 0x7f800000;
            nonfinite |= is_infinite;
            return (Floats)((Ints)value & ~is_infinite);
          };
          const int64_t key = key_tile * tiles::COLUMNS + 2 * pair;
          rows[pair] = to_pairs(finite(key), finite(key + 1));
        }
        transpose(rows);
      }
    has_nonfinite_ = any(nonfinite);
  }

 private:
  int64_t d_;
  int64_t steps_;
  std::unique_ptr<Ints[]> keys_;    // [KEY_BLOCK / 16, steps, 2 terms, 16 keys, 32]
  std::unique_ptr<Ints[]> values_;  // [2 * steps, KEY_BLOCK / 32, 16 columns, 32 keys]
  bool has_nonfinite_ = false;
};

// Exponentials of numbers up to 0. The relative error of 3e-6 is enough for weights in bfloat16. NaN stays NaN.
Floats exponential_of_negative(Floats x) {
  const Floats lowest = splat(-87.0f);
  const Floats nearest = splat(0x1.8p23f);
  x = x < lowest ? lowest : x;
  const Floats rounded = fma(x, splat(0x1.715476p0f), nearest);
  const Floats rest = fma(rounded - nearest, splat(-0x1.62e430p-1f), x);
  Floats sum = splat(1.0f / 120.0f);
  for (float factor : {1.0f / 24.0f, 1.0f / 6.0f, 0.5f, 1.0f, 1.0f}) sum = fma(sum, rest, splat(factor));
  return (Floats)((Ints)sum + ((Ints)rounded << 23));
}

// `PartialAttention` of 16 queries, one for each lane.
class QueryTile {
 public:
  // Takes the first 16 of queries [num_queries, d] and their positions.
  QueryTile(const float* queries, int64_t num_queries, int64_t d, const Ints positions, int64_t window)
      : d_(d), steps_((d + tiles::COLUMNS - 1) / tiles::COLUMNS), positions_(positions),
        oldest_(positions - int32_t(window ? window : INT32_MAX / 2)), queries_(new Ints[2 * steps_ * tiles::ROWS]),
        sums_(new Floats[steps_ * tiles::COLUMNS]()) {
    for (int64_t step = 0; step < steps_; step++) {
      Ints* upper = &queries_[2 * step * tiles::ROWS];
      Ints* rest = upper + tiles::ROWS;
      for (int64_t i = 0; i < tiles::ROWS; i++) {
        auto half = [&](int64_t j) { return i < num_queries ? load_lanes(queries + i * d, step * tiles::COLUMNS + j, d) : Floats{}; };
        const Split split(half(0), half(LANES));
        upper[i] = split.upper;
        rest[i] = split.rest;
      }
      transpose(upper);
      transpose(rest);
    }
  }

  // Adds the block of keys from position `block` on. Without IS_MASKED all queries see all keys.
  template <bool IS_MASKED, class Scalar>
  void add(const KeyTiles& keys, const Scalar* values, int64_t block, int64_t num_keys) {
    alignas(64) Floats scores[KEY_BLOCK];
    alignas(64) Ints weights[KEY_BLOCK / 2];
    score(keys, scores);
    const Floats none = splat(-INFINITY);
    Floats new_max = max_scores_;
    for (int64_t key = 0; key < KEY_BLOCK; key++) {
      if (IS_MASKED) scores[key] = sees(block + key) ? scores[key] : none;
      new_max = scores[key] > new_max ? scores[key] : new_max;
    }
    const Floats base = IS_MASKED ? (new_max > none ? new_max : Floats{}) : new_max;  // a query may see no key yet
    Floats sum = {};
    auto weight = [&](int64_t key) __attribute__((always_inline)) {
      const Floats power = exponential_of_negative(scores[key] - base);
      return IS_MASKED ? (scores[key] != none ? power : Floats{}) : power;
    };
#pragma GCC unroll 4
    for (int64_t key = 0; key < KEY_BLOCK; key += 2) {
      const Ints pair = to_pairs(weight(key), weight(key + 1));
      sum += (Floats)(pair << 16) + (Floats)(pair & int32_t(0xffff0000));  // of the rounded weights, which meet the values
      weights[key / 2] = pair;
    }
    if (any(new_max != max_scores_)) {
      const Floats scale = exponential_of_negative(max_scores_ - base);
      sum_ *= scale;
      for (int64_t j = 0; j < steps_ * tiles::COLUMNS; j++) sums_[j] *= scale;
      max_scores_ = new_max;
    }
    sum_ += sum;
    add_values(keys, weights);
    if (keys.has_nonfinite()) spread_nonfinite(values, block, num_keys);
  }

  // Writes the attention of `num_queries` queries.
  void finish(int64_t num_queries, PartialAttention* attended) {
    for (int64_t j = 0; j < d_; j += LANES) {
      Ints rows[tiles::ROWS];
      std::memcpy(rows, &sums_[j], sizeof(rows));
      transpose(rows);
      for (int64_t i = 0; i < num_queries; i++) store((Floats)rows[i], attended[i].values + j, std::min(LANES, d_ - j));
    }
    for (int64_t i = 0; i < num_queries; i++) {
      attended[i].max_score = max_scores_[i];
      attended[i].sum = sum_[i];
    }
  }

 private:
  Ints sees(int64_t position) const {
    const Ints at = int32_t(position) - Ints{};
    return (at <= positions_) & (at > oldest_);
  }

  void score(const KeyTiles& keys, Floats* scores) const {
    tiles::zero<0>();
    tiles::zero<1>();
    tiles::zero<2>();
    tiles::zero<3>();
    static_assert(KEY_TILES == 4);
    for (int64_t step = 0; step < steps_; step++) {
      tiles::load<4>(&queries_[2 * step * tiles::ROWS], 64);
      tiles::load<5>(&queries_[(2 * step + 1) * tiles::ROWS], 64);
      auto add = [&]<int C>() __attribute__((always_inline)) {
        tiles::load<6>(keys.keys(C, step, 0), 64);
        tiles::dot<C, 6, 4>();
        tiles::dot<C, 6, 5>();
        tiles::load<7>(keys.keys(C, step, 1), 64);
        tiles::dot<C, 7, 4>();
      };
      add.template operator()<0>();
      add.template operator()<1>();
      add.template operator()<2>();
      add.template operator()<3>();
    }
    tiles::store<0>(scores, 64);
    tiles::store<1>(scores + tiles::ROWS, 64);
    tiles::store<2>(scores + 2 * tiles::ROWS, 64);
    tiles::store<3>(scores + 3 * tiles::ROWS, 64);
  }

  void add_values(const KeyTiles& keys, const Ints* weights) {
    tiles::load<6>(weights, 64);
    tiles::load<7>(weights + tiles::ROWS, 64);
    static_assert(VALUE_TILES == 2);
    for (int64_t step = 0; step < steps_; step++) {
      Floats* first = &sums_[step * tiles::COLUMNS];
      Floats* second = first + tiles::ROWS;
      tiles::load<0>(first, 64);
      tiles::load<4>(keys.values(2 * step, 0), 64);
      tiles::dot<0, 4, 6>();
      tiles::load<1>(second, 64);
      tiles::load<5>(keys.values(2 * step + 1, 0), 64);
      tiles::dot<1, 5, 6>();
      tiles::load<4>(keys.values(2 * step, 1), 64);
      tiles::dot<0, 4, 7>();
      tiles::load<5>(keys.values(2 * step + 1, 1), 64);
      tiles::dot<1, 5, 7>();
      tiles::store<0>(first, 64);
      tiles::store<1>(second, 64);
    }
  }

  // Makes NaN of each sum of a query that sees an infinite value or NaN.
  template <class Scalar>
  void spread_nonfinite(const Scalar* values, int64_t block, int64_t num_keys) {
    for (int64_t key = 0; key < num_keys; key++)
      for (int64_t j = 0; j < d_; j++)
        if (!std::isfinite(float(values[key * d_ + j]))) sums_[j] = sees(block + key) ? splat(NAN) : sums_[j];
  }

  int64_t d_;
  int64_t steps_;
  Ints positions_;  // a query sees keys up to its position
  Ints oldest_;     // and after this one
  Floats max_scores_ = splat(-INFINITY);
  Floats sum_ = {};
  std::unique_ptr<Ints[]> queries_;  // [steps, 2 terms, 16 pairs of columns, 16 queries, 2]
  std::unique_ptr<Floats[]> sums_;   // [columns, 16 queries]
};

// Attention of queries over the span of keys that begins at `span_begin`, as `attend_to_blocks`.
void attend_to_span_by_tiles(const float* queries, int64_t tokens, int64_t heads, int64_t d, int64_t start, int64_t window,
                             const CachedHead& cached, int64_t span_begin, PartialAttention* attended) {
  const int64_t num_queries = tokens * heads;
  const int64_t span_end = std::min(span_begin + SPAN, start + tokens);
  std::vector<QueryTile> query_tiles;
  for (int64_t query = 0; query < num_queries; query += tiles::ROWS) {
    Ints positions;
    for (int64_t i = 0; i < LANES; i++) positions[i] = int32_t(start + std::min(query + i, num_queries - 1) / heads);
    query_tiles.emplace_back(queries + query * d, num_queries - query, d, positions, window);
  }
  KeyTiles packed(d);
  for (int64_t block = span_begin; block < span_end; block += KEY_BLOCK) {
    if (window && block + KEY_BLOCK <= start + 1 - window) continue;  // no query sees a key
    const int64_t num_keys = std::min(KEY_BLOCK, span_end - block);
    cached.read(block, num_keys, false, [&]<class Scalar>(const Scalar* keys, const Scalar* values) {
      packed.pack(keys, values, num_keys);
      for (int64_t tile = 0; tile < int64_t(query_tiles.size()); tile++) {
        const int64_t first_position = start + tile * tiles::ROWS / heads;
        const int64_t last_position = start + std::min(tile * tiles::ROWS + tiles::ROWS - 1, num_queries - 1) / heads;
        const bool is_seen = block <= last_position && !(window && block + KEY_BLOCK <= first_position - window + 1);
        const bool is_masked = window || block + KEY_BLOCK - 1 > first_position;
        if (!is_seen) continue;
        auto add = is_masked ? &QueryTile::add<true, Scalar> : &QueryTile::add<false, Scalar>;
        (query_tiles[tile].*add)(packed, values, block, num_keys);
      }
    });
  }
  for (int64_t tile = 0; tile < int64_t(query_tiles.size()); tile++)
    query_tiles[tile].finish(std::min(tiles::ROWS, num_queries - tile * tiles::ROWS), attended + tile * tiles::ROWS);
}
}  // namespace
