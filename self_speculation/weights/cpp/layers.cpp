// Passes on a CPU: a range of layers, or one product, as one operator, over weights where they lie.
// kernels.py builds this file; in_place_runner.py calls it.
//
// One parallel region serves all layers. If the system suspends a thread, only that thread's piece is late.
#include <sched.h>

#include <atomic>
#include <span>

#include "int4_rounding.h"
#include "tile_attention.h"
#include "weights.h"

namespace {
void pause() {
#ifdef __x86_64__
  _mm_pause();
#else
  __asm__ volatile("yield");
#endif
}

// Work that must end before the next begins. All threads run the same phases, and claim their pieces from a counter:
//
//   thread 0   | piece 0 | piece 2 | piece 3 |.| piece 0 |        a dot: it waits until all pieces are done
//   thread 1   | piece 1           | piece 4 | | piece 1 |
//              phase 0                         phase 1
class Phase {
 public:
  // The pieces are `f(0)` to `f(n - 1)`. A thread that gets one calls `prepare` first. Returns once all are done.
  template <class Prepare, class F>
  void run(int64_t n, const Prepare& prepare, const F& f) {
    int64_t num_done = 0;
    auto claim = [&] { return next_.fetch_add(1, std::memory_order_relaxed); };
    if (next_.load(std::memory_order_relaxed) < n) prepare();
    try {
      for (int64_t i = claim(); i < n; i = claim()) {
        num_done++;
        f(i);
      }
    } catch (...) {  // no memory: torch raises it once all threads are through, so none may wait for this piece
      done_.fetch_add(num_done, std::memory_order_release);
      throw;
    }
    if (num_done) done_.fetch_add(num_done, std::memory_order_release);
    for (int spins = 0; done_.load(std::memory_order_acquire) < n; spins++) {
      if (spins < 20000) pause();
      else sched_yield();
    }
  }

 private:
  alignas(64) std::atomic<int64_t> next_{0};
  alignas(64) std::atomic<int64_t> done_{0};
};

// Rows of several weights as pieces of work, in units of ROWS. Without tiles they are long, since fetching ahead starts anew with
// each.
class Pieces {
 public:
  Pieces(std::span<const Weight* const> weights, int64_t wanted) : weights_(weights) {
    for (const Weight* weight : weights_) units_ += units_of(*weight);
    size_ = std::max<int64_t>(1, (units_ + wanted - 1) / wanted);
  }
  int64_t number() const { return (units_ + size_ - 1) / size_; }

  // Calls f(index of the weight, first row, last row) for each weight with rows in a piece.
  template <class F>
  void for_rows(int64_t piece, const F& f) const {
    int64_t first = piece * size_;
    int64_t last = std::min(first + size_, units_);
    for (size_t i = 0; i < weights_.size(); i++) {
      const int64_t units = units_of(*weights_[i]);
      if (first < units && last > 0) f(i, std::max<int64_t>(0, first) * ROWS, std::min(last * ROWS, weights_[i]->rows));
      first -= units;
      last -= units;
    }
  }

 private:
  static int64_t units_of(const Weight& weight) { return (weight.rows + ROWS - 1) / ROWS; }

  std::span<const Weight* const> weights_;
  int64_t units_ = 0;
  int64_t size_;  // units of a piece
};

// Up to so many tokens, each thread makes all inputs itself, which saves a phase.
constexpr int64_t MADE_BY_THREAD = 8;

// A thread's view of products over the tokens of a pass.
class Products {
 public:
  // `shared`: memory for all inputs, if they are made once. `in_bfloat16`: inputs are rounded to bfloat16 where
  // `Inputs::layout_of` says so.
  Products(int64_t tokens, int64_t columns, int64_t threads, Floats* shared, bool in_bfloat16 = false)
      : tokens_(tokens), threads_(threads), in_bfloat16_(in_bfloat16), shared_(shared), in_order_(aligned(Inputs::piece_size(columns))),
        thread_inputs_(shared ? nullptr : aligned(Inputs::size(tokens, columns))) {}
  static std::unique_ptr<Floats[]> memory(int64_t tokens, int64_t columns) {
    return tokens > MADE_BY_THREAD ? aligned(Inputs::size(tokens, columns)) : nullptr;
  }

  // x is what `fill(token, to)` writes. Calls f(x, index of the weight, first row, last row) for all rows: two phases, and two
  // more where the next weight has another type, since inputs are made for one type.
  template <class Fill, class F>
  void run(Phase*& phase, std::vector<const Weight*> weights, const Fill& fill, const F& f) const {
    for (size_t begin = 0, end = 0; begin < weights.size(); begin = end) {
      const Weight& weight = *weights[begin];
      while (end < weights.size() && weights[end]->type == weight.type) end++;
      const Inputs x(shared_ ? shared_ : thread_inputs_.get(), tokens_, weight.columns, weight.type, in_bfloat16_);
      auto make = [&](int64_t piece) { x.make(piece, fill, reinterpret_cast<float*>(in_order_.get())); };
      auto make_all = [&] {
        for (int64_t piece = 0; piece < x.pieces(); piece++) make(piece);
      };
      if (shared_) phase->run(x.pieces(), [] {}, make);
      phase++;
      auto prepare = [&] { if (!shared_) make_all(); };
      run_packed(phase, {&weights[begin], end - begin}, x, prepare,
                 [&](int64_t i, int64_t first, int64_t last) { f(x, begin + i, first, last); });
    }
  }

  // Calls f(index of the weight, first row, last row) for all rows of weights of one type: one phase, over inputs that are
  // there once a thread has called `prepare`.
  template <class Prepare, class F>
  void run_packed(Phase*& phase, std::span<const Weight* const> weights, const Inputs& x, const Prepare& prepare,
                  const F& f) const {
    const Pieces pieces(weights, threads_ * (x.in_tiles() ? 8 : 2));
    phase++->run(pieces.number(), prepare, [&](int64_t piece) { pieces.for_rows(piece, f); });
  }

 private:
  int64_t tokens_;
  int64_t threads_;
  bool in_bfloat16_;
  Floats* shared_;
  std::unique_ptr<Floats[]> in_order_;       // of a piece
  std::unique_ptr<Floats[]> thread_inputs_;  // unless they are shared
};

template <class F>
void on_all_threads(int64_t threads, bool needs_tiles, const F& f) {
  torch::stable::parallel_for(0, threads, 1, [&](int64_t first, int64_t last) {
    const tiles::Shaped shaped(needs_tiles);
    for (; first < last; first++) f();
  });
}

// Copies n numbers; ROWS of them without a call.
INLINE void put_numbers(const float* numbers, int64_t n, float* to) {
  if (n == ROWS) std::memcpy(to, numbers, ROWS * sizeof(float));
  else std::copy_n(numbers, n, to);
}

// GELU by tanh, x (1 + tanh(y)) / 2 = x / (1 + exp(-2 y)), or SiLU.
Floats activate(bool is_gelu, Floats x) {
  const Floats inner = is_gelu ? 1.5957691216f * (x + 0.044715f * x * x * x) : x;
  return x / (1.0f + exponential(-inner));
}

// A layer as `InPlaceLayer.description` has it: so many integers and as many floats.
constexpr int64_t NUMBERS = 7;
// `InPlaceLayer.tensors`: six norms, and seven weights with their biases.
constexpr int64_t TENSORS = 20;

struct Layer {
  int64_t heads;
  int64_t kv_heads;
  int64_t width;  // of the MLP
  int64_t window;
  int64_t rotation;  // index
  bool is_gelu;
  float scaling;
  Norm input_norm, query_norm, key_norm, attended_norm, mlp_norm, output_norm;
  Weight query, key, value, out, gate, up, down;

  Layer(const Tensor* tensors, const int64_t* integers, const double* floats, int64_t hidden, int64_t d)
      : heads(integers[0]), kv_heads(integers[1]), width(integers[2]), window(integers[3]), rotation(integers[4]),
        is_gelu(integers[5]), scaling(float(floats[0])), input_norm(tensors[0], hidden, floats[1], integers[6]),
        query_norm(tensors[1], d, floats[2], integers[6]), key_norm(tensors[2], d, floats[3], integers[6]),
        attended_norm(tensors[3], hidden, floats[4], integers[6]), mlp_norm(tensors[4], hidden, floats[5], integers[6]),
        output_norm(tensors[5], hidden, floats[6], integers[6]), query(tensors + 6, heads * d, hidden),
        key(tensors + 8, kv_heads * d, hidden), value(tensors + 10, kv_heads * d, hidden), out(tensors + 12, hidden, heads * d),
        gate(tensors + 14, width, hidden), up(tensors + 16, width, hidden), down(tensors + 18, hidden, width) {}
};

// Products of queries, keys, values, gates and what they gate may be two phases each, if weights differ in type.
constexpr int64_t MOST_PHASES = 17;

// New tokens of a row of the batch. Arrays by token hold the tokens of row 0, then of row 1, and so on.
struct Row {
  int64_t slot;       // of the cache
  int64_t start;      // positions before the pass
  int64_t tokens;     // at least one
  int64_t beginning;  // the slot that has the first positions,
  int64_t shared;     // so many

  int64_t num_spans() const { return (start + tokens + SPAN - 1) / SPAN; }
};

// New tokens of a batch's rows, through a range of layers that differ in nothing but their numbers.
class Pass {
 public:
  Pass(std::span<const Layer> layers, float* states, int64_t tokens, int64_t hidden, const std::vector<Tensor>& caches,
       const std::vector<Tensor>& rotations, std::span<const Row> rows, bool in_bfloat16)
      : layers_(layers), caches_(caches), rotations_(rotations), states_(states), rows_(rows), tokens_(tokens),
        hidden_(hidden), in_bfloat16_(in_bfloat16), d_(caches[0].size(3)),
        heads_(layers[0].heads), kv_heads_(layers[0].kv_heads), group_size_(heads_ / kv_heads_),
        qkv_width_((heads_ + 2 * kv_heads_) * d_), mlp_width_(std::ranges::max(layers, {}, &Layer::width).width),
        spans_(std::ranges::max(rows, {}, &Row::num_spans).num_spans()), threads_(torch::stable::get_num_threads()),
        phases_(new Phase[layers.size() * MOST_PHASES]), finished_(new std::atomic<int64_t>[layers.size() * rows.size() * kv_heads_]()),
        qkv_(new float[tokens * qkv_width_]), attended_(new float[tokens * heads_ * d_]),
        gates_(new float[tokens * mlp_width_]), ups_(new float[tokens * mlp_width_]), added_(new float[tokens * hidden]),
        span_values_(new float[tokens * heads_ * spans_ * d_]),
        partial_(new PartialAttention[tokens * heads_ * spans_]), widest_(std::max({hidden, heads_ * d_, mlp_width_})),
        inputs_(Products::memory(tokens, widest_)),
        activated_(in_bfloat16 && HAS_TILES ? aligned(Inputs::size(tokens, mlp_width_)) : nullptr) {
    for (int64_t i = 0; i < tokens * heads_ * spans_; i++) partial_[i].values = &span_values_[i * d_];
    for (int64_t first = 0; const Row& row : rows) {
      first_tokens_.push_back(first);
      first += row.tokens;
    }
  }

  void run() {
    on_all_threads(threads_, in_bfloat16_, [&] {
      Phase* phase = phases_.get();
      const Products products(tokens_, widest_, threads_, inputs_.get(), in_bfloat16_);
      for (size_t index = 0; index < layers_.size(); index++) {
        const Layer& layer = layers_[index];
        project_qkv(products, phase, layer);
        phase++->run(int64_t(rows_.size()) * kv_heads_ * spans_, [] {}, [&](int64_t piece) { attend(index, piece); });
        add_projection(products, phase, layer.out, attended_.get(), heads_ * d_, layer.attended_norm);
        activate_gates(products, phase, layer);
        if (makes_tiles(layer)) {
          const Inputs activated = activated_tiles(layer);
          add_projection(products, phase, layer.down, gates_.get(), layer.width, layer.output_norm, &activated);
        } else {
          add_projection(products, phase, layer.down, gates_.get(), layer.width, layer.output_norm);
        }
      }
    });
  }

 private:
  auto normed_states(const Norm& norm) const {
    return [&, this](int64_t t, float* to) { norm(states_ + t * hidden_, to); };
  }

  void project_qkv(const Products& products, Phase*& phase, const Layer& layer) {
    const Weight* weights[] = {&layer.query, &layer.key, &layer.value};
    int64_t columns[] = {0, heads_ * d_, (heads_ + kv_heads_) * d_};
    products.run(phase, {weights[0], weights[1], weights[2]}, normed_states(layer.input_norm),
                 [&](const Inputs& x, size_t i, int64_t first, int64_t last) {
                   float* to = &qkv_[columns[i]];
                   weights[i]->multiply(first, last, x, [&](int64_t t, int64_t row, const float* numbers, int64_t n) {
                     put_numbers(numbers, n, &to[t * qkv_width_ + row]);
                   });
                 });
  }

  // A span of the keys of one head of a row. New keys and values are written by the span that they are in, which is the
  // only one to read them. A span of a beginning that rows share is read once: the first of these rows attends for all.
  void attend(size_t index, int64_t piece) {
    const Layer& layer = layers_[index];
    const int64_t span = piece % spans_;
    const int64_t head = piece / spans_ % kv_heads_;
    const size_t row = piece / spans_ / kv_heads_;
    if (span >= rows_[row].num_spans()) return;
    std::vector<size_t> together{row};
    for (size_t other = 0; other < rows_.size(); other++) {
      if (other == row || !share(layer, rows_[row], rows_[other], span)) continue;
      if (other < row) return;
      together.push_back(other);
    }
    int64_t num_tokens = 0;
    for (size_t each : together) num_tokens += rows_[each].tokens;
    std::unique_ptr<float[]> queries(new float[num_tokens * group_size_ * d_]);
    std::vector<PartialAttention> attended;
    CachedHead cached = cached_head(index, rows_[row], head);
    for (float* to = queries.get(); size_t each : together) {
      rotate_and_write(layer, each, head, span, to, cached);
      const int64_t num_queries = rows_[each].tokens * group_size_;
      PartialAttention* partial = partial_of(each, head) + span * num_queries;
      attended.insert(attended.end(), partial, partial + num_queries);
      to += num_queries * d_;
    }
    const bool by_tiles = HAS_TILES && in_bfloat16_ && layer.query.type != ScalarType::Float;
    auto* attend = by_tiles ? attend_to_span_by_tiles : attend_to_span;
    attend(queries.get(), num_tokens, group_size_, d_, rows_[row].start, layer.window, cached, span * SPAN, attended.data());
    for (const PartialAttention* from = attended.data(); size_t each : together) {
      const int64_t num_queries = rows_[each].tokens * group_size_;
      std::copy_n(from, num_queries, partial_of(each, head) + span * num_queries);
      from += num_queries;
      add_spans(index, each, head);
    }
  }

  // Whether all tokens of two rows see the same keys in a span. Tiles take each row alone: it has many tokens.
  bool share(const Layer& layer, const Row& a, const Row& b, int64_t span) const {
    const int64_t end = (span + 1) * SPAN;
    return !in_bfloat16_ && !layer.window && a.beginning == b.beginning && end <= std::min(a.shared, b.shared);
  }

  PartialAttention* partial_of(size_t row, int64_t head) const {
    return &partial_[(first_tokens_[row] * heads_ + head * rows_[row].tokens * group_size_) * spans_];
  }

  CachedHead cached_head(size_t index, const Row& row, int64_t head) const {
    auto of_slot = [&](int64_t slot) -> SlotHead {
      auto at = [&](const Tensor& cache) {
        const int64_t size = cache.size(2) * d_ * int64_t(cache.element_size());
        return static_cast<char*>(cache.mutable_data_ptr()) + (slot * kv_heads_ + head) * size;
      };
      return {at(caches_[2 * index]), at(caches_[2 * index + 1])};
    };
    return {of_slot(row.slot), of_slot(row.beginning), row.shared, caches_[2 * index].scalar_type(), d_};
  }

  // Rotates the queries of a row that share a head of keys, and writes new keys and values of a span.
  void rotate_and_write(const Layer& layer, size_t index, int64_t head, int64_t span, float* queries, CachedHead& cached) const {
    const Row& row = rows_[index];
    auto* cosines = static_cast<const float*>(rotations_[layer.rotation].const_data_ptr());
    const float* sines = cosines + rotations_[layer.rotation].size(1) * d_;
    std::unique_ptr<float[]> normed_head(new float[d_]);
    std::unique_ptr<float[]> rotated_key(new float[d_]);
    auto norm_and_rotate = [&](const float* x, const Norm& norm, int64_t position, float factor, float* to) {
      if (norm.weight) {
        norm(x, normed_head.get());
        x = normed_head.get();
      }
      rotate(x, cosines + position * d_, sines + position * d_, d_, factor, to);
    };
    for (int64_t t = 0; t < row.tokens; t++) {
      const float* qkv = &qkv_[(first_tokens_[index] + t) * qkv_width_];
      const int64_t position = row.start + t;
      for (int64_t i = 0; i < group_size_; i++)
        norm_and_rotate(qkv + (head * group_size_ + i) * d_, layer.query_norm, position, layer.scaling,
                        &queries[(t * group_size_ + i) * d_]);
      if (position / SPAN != span) continue;
      norm_and_rotate(qkv + (heads_ + head) * d_, layer.key_norm, position, 1.0f, rotated_key.get());
      cached.write(position, rotated_key.get(), qkv + (heads_ + kv_heads_ + head) * d_);
    }
  }

  // Counts a span that is through. After the last one all spans are added up, in their order.
  void add_spans(size_t index, size_t row, int64_t head) {
    const int64_t num_spans = rows_[row].num_spans();
    auto& finished = finished_[(index * rows_.size() + row) * kv_heads_ + head];
    if (finished.fetch_add(1, std::memory_order_acq_rel) + 1 < num_spans) return;
    const int64_t num_queries = rows_[row].tokens * group_size_;
    PartialAttention* partial = partial_of(row, head);
    for (int64_t i = 0; i < num_queries; i++) {
      PartialAttention& total = partial[i];
      for (int64_t added = 1; added < num_spans; added++) total.add(partial[added * num_queries + i], d_);
      const int64_t token = first_tokens_[row] + i / group_size_;
      float* to = &attended_[(token * heads_ + head * group_size_ + i % group_size_) * d_];
      for (int64_t j = 0; j < d_; j++) to[j] = total.values[j] / total.sum;
    }
  }

  // act(x W_gate^T) * x W_up^T, of the normed states
  void activate_gates(const Products& products, Phase*& phase, const Layer& layer) {
    auto multiply = [&](const Weight& weight, std::unique_ptr<float[]>& to, const Inputs& x, int64_t first, int64_t last) {
      weight.multiply(first, last, x, [&](int64_t t, int64_t row, const float* numbers, int64_t n) {
        put_numbers(numbers, n, &to[t * layer.width + row]);
      });
    };
    const bool is_one_type = layer.gate.type == layer.up.type;
    if (makes_tiles(layer))
      return products.run(phase, {&layer.up}, normed_states(layer.mlp_norm), [&](const Inputs& x, size_t, int64_t first, int64_t last) {
        activate_tiles(layer, x, first, last);
      });
    if (!is_one_type)
      products.run(phase, {&layer.gate}, normed_states(layer.mlp_norm), [&](const Inputs& x, size_t, int64_t first, int64_t last) {
        multiply(layer.gate, gates_, x, first, last);
      });
    products.run(phase, {&layer.up}, normed_states(layer.mlp_norm), [&](const Inputs& x, size_t, int64_t first, int64_t last) {
      if (is_one_type) multiply(layer.gate, gates_, x, first, last);
      multiply(layer.up, ups_, x, first, last);
      for (int64_t t = 0; t < tokens_; t++)
        for (int64_t j = first; j < last; j += LANES) {
          float* gates = &gates_[t * layer.width + j];
          const float* ups = &ups_[t * layer.width + j];
          const int64_t n = std::min(LANES, last - j);
          store(activate(layer.is_gelu, widen(gates, n)) * widen(ups, n), gates, n);
        }
    });
  }

  // Whether `activate_tiles` makes the inputs of `down`: gate and up have one type, and inputs of up and down are tiles.
  bool makes_tiles(const Layer& layer) const {
    return layer.gate.type == layer.up.type && Inputs::by_tiles(layer.up.type, in_bfloat16_) &&
           Inputs::by_tiles(layer.down.type, in_bfloat16_);
  }
  Inputs activated_tiles(const Layer& layer) const {
    return {activated_.get(), tokens_, layer.width, layer.down.type, in_bfloat16_};
  }

  // As `activate_gates`, but writes the inputs of `down` as tiles: 32 rows of gate and up become 32 columns.
  void activate_tiles(const Layer& layer, const Inputs& x, int64_t first, int64_t last) {
    const Inputs activated = activated_tiles(layer);
    auto gates = Weight::memory_for(tokens_);
    auto ups = Weight::memory_for(tokens_);
    for (int64_t at = first; at < last; at += ROWS) {
      layer.gate.products(at, std::min(ROWS, last - at), x, gates.get());
      layer.up.products(at, std::min(ROWS, last - at), x, ups.get());
      for (int64_t token_tile = 0; token_tile < activated.token_tiles; token_tile++)
        activated.put_tile(at / tiles::COLUMNS, token_tile, [&](int64_t t, int64_t j) {
          const int64_t from = (token_tile * tiles::ROWS + t) * ROWS + j;
          return activate(layer.is_gelu, load<Floats>(&gates[from])) * load<Floats>(&ups[from]);
        });
    }
  }

  // states += norm(x W^T), of x [T, columns], or of inputs that are packed
  void add_projection(const Products& products, Phase*& phase, const Weight& weight, const float* from, int64_t columns,
                      const Norm& norm, const Inputs* packed = nullptr) {
    float* to = norm.weight ? added_.get() : states_;
    const bool is_sum = !norm.weight;
    auto multiply = [&](const Inputs& x, int64_t first, int64_t last) {
      weight.multiply(first, last, x, [&](int64_t t, int64_t row, const float* numbers, int64_t n) {
        float* sums = &to[t * hidden_ + row];
        if (!is_sum) return put_numbers(numbers, n, sums);
        for (int64_t i = 0; i < n; i++) sums[i] += numbers[i];
      });
    };
    const Weight* weights[] = {&weight};
    if (packed)
      products.run_packed(phase, weights, *packed, [] {},
                          [&](size_t, int64_t first, int64_t last) { multiply(*packed, first, last); });
    else
      products.run(phase, {&weight}, [&](int64_t t, float* row) { std::copy_n(from + t * columns, columns, row); },
                   [&](const Inputs& x, size_t, int64_t first, int64_t last) { multiply(x, first, last); });
    if (is_sum) return;
    phase++->run(tokens_, [] {}, [&](int64_t t) {
      float* row = &added_[t * hidden_];
      float* state = states_ + t * hidden_;
      norm(row, row);
      for (int64_t j = 0; j < hidden_; j++) state[j] += row[j];
    });
  }

  std::span<const Layer> layers_;
  const std::vector<Tensor>& caches_;
  const std::vector<Tensor>& rotations_;
  float* states_;  // [tokens, hidden]
  std::span<const Row> rows_;
  std::vector<int64_t> first_tokens_;  // [rows] of all tokens
  int64_t tokens_;
  int64_t hidden_;
  bool in_bfloat16_;
  int64_t d_;
  int64_t heads_;
  int64_t kv_heads_;
  int64_t group_size_;  // heads that share keys
  int64_t qkv_width_;   // numbers of queries, keys and values
  int64_t mlp_width_;   // the most
  int64_t spans_;       // the most
  int64_t threads_;
  std::unique_ptr<Phase[]> phases_;
  std::unique_ptr<std::atomic<int64_t>[]> finished_;  // spans of a head, by layer, row and head
  std::unique_ptr<float[]> qkv_, attended_, gates_, ups_, added_, span_values_;
  std::unique_ptr<PartialAttention[]> partial_;  // by row: [kv_heads, spans, tokens of the row * group size]
  int64_t widest_;
  std::unique_ptr<Floats[]> inputs_;     // of a product, if there are many tokens
  std::unique_ptr<Floats[]> activated_;  // of the last product, by tiles
};

// A range of layers. Each pass reads anew where the weights are, and their shapes and formats.
struct Layers {
  // [L, NUMBERS] each, of `InPlaceLayer.description`, and [L * TENSORS]. `hidden`: columns of a state; `d`: of a head.
  Tensor integers;
  Tensor floats;
  std::vector<Tensor> weights;
  int64_t hidden;
  int64_t d;

  std::vector<Layer> now() const {
    std::vector<Layer> layers;
    layers.reserve(integers.size(0));
    auto* all_integers = static_cast<const int64_t*>(integers.const_data_ptr());
    auto* all_floats = static_cast<const double*>(floats.const_data_ptr());
    for (int64_t i = 0; i < integers.size(0); i++)
      layers.emplace_back(&weights[TENSORS * i], all_integers + NUMBERS * i, all_floats + NUMBERS * i, hidden, d);
    return layers;
  }
};

// Makes a tensor that owns the description of a range of layers.
Tensor make_layers(const Tensor& integers, const Tensor& floats, std::vector<Tensor> weights, int64_t hidden, int64_t d) {
  auto layers = std::make_unique<Layers>(Layers{integers, floats, std::move(weights), hidden, d});
  const int64_t size = sizeof(Layers);
  const int64_t stride = 1;
  Tensor handle = torch::stable::from_blob(layers.get(), {&size, 1}, {&stride, 1}, integers.device(), ScalarType::Byte,
                                           [](void* owned) { delete static_cast<Layers*>(owned); });
  layers.release();
  return handle;
}

// Runs layers over T new tokens of rows, [B, 5] as `Row` has them. Where the processor multiplies in bfloat16, inputs of prompt
// tokens are rounded to it: by tiles for all weights but float32 and in attention, else for weights in bfloat16. The kind of
// token decides, so no way to read a prompt changes a bit.
void run_layers(const Tensor& hidden, const Tensor& rows, bool is_prompt, const Tensor& handle, std::vector<Tensor> caches,
                std::vector<Tensor> rotations) {
  const std::vector<Layer> layers = static_cast<const Layers*>(handle.const_data_ptr())->now();
  Pass(layers, static_cast<float*>(hidden.mutable_data_ptr()), hidden.size(0), hidden.size(1), caches, rotations,
       {static_cast<const Row*>(rows.const_data_ptr()), size_t(rows.size(0))}, is_prompt && HAS_PAIRS)
      .run();
}

// Tokens of a product at a time: a core's cache has the inputs of so many.
constexpr int64_t MOST_AT_A_TIME = 64;

// x W^T + b, or norm(x) W^T + b: [T, in] -> [T, rows]. Without a norm or a bias these tensors are empty.
Tensor linear(const Tensor& x, const Tensor& norm, double epsilon, bool is_centred, const Tensor& weight, const Tensor& bias,
              int64_t rows) {
  const auto* from = static_cast<const float*>(x.const_data_ptr());
  const int64_t tokens = x.size(0);
  const int64_t columns = x.size(1);
  const int64_t threads = torch::stable::get_num_threads();
  const Tensor tensors[] = {weight, bias};
  const Weight w(tensors, rows, columns);
  const Norm rms_norm(norm, columns, epsilon, is_centred);
  Tensor out = empty({tokens, rows}, aoti_torch_dtype_float32());
  auto* to = static_cast<float*>(out.mutable_data_ptr());
  std::unique_ptr<Phase[]> phases(new Phase[2 * (tokens / MOST_AT_A_TIME + 1)]);
  std::unique_ptr<Floats[]> shared = Products::memory(std::min(MOST_AT_A_TIME, tokens), columns);
  on_all_threads(threads, false, [&] {
    Phase* phase = phases.get();
    for (int64_t start = 0; start < tokens; start += MOST_AT_A_TIME) {
      auto fill = [&](int64_t t, float* computed) {
        const float* row = from + (start + t) * columns;
        if (rms_norm.weight) rms_norm(row, computed);
        else std::copy_n(row, columns, computed);
      };
      Products(std::min(MOST_AT_A_TIME, tokens - start), columns, threads, shared.get())
          .run(phase, {&w}, fill, [&](const Inputs& x, size_t, int64_t first, int64_t last) {
            w.multiply(first, last, x, [&](int64_t t, int64_t row, const float* numbers, int64_t n) {
              put_numbers(numbers, n, &to[(start + t) * rows + row]);
            });
          });
    }
  });
  return out;
}
}  // namespace

STABLE_TORCH_LIBRARY(self_speculation, library) {
  library.def("make_layers(Tensor integers, Tensor floats, Tensor[] weights, int hidden, int d) -> Tensor");
  library.def(
      "run_layers(Tensor(a!) hidden, Tensor rows, bool is_prompt, Tensor handle, Tensor[] caches, Tensor[] rotations) -> ()");
  library.def(
      "linear(Tensor x, Tensor norm, float epsilon, bool is_centred, Tensor weight, Tensor bias, int rows) -> Tensor");
  library.def("int4_round(Tensor weight, Tensor importance) -> Tensor");
  library.def("repack_weight(Tensor rows, int code, int columns) -> Tensor");
  library.def("rows_of_weight(Tensor weight, Tensor ids, int rows, int columns) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(self_speculation, CPU, library) {
  library.impl("make_layers", TORCH_BOX(&make_layers));
  library.impl("run_layers", TORCH_BOX(&run_layers));
  library.impl("linear", TORCH_BOX(&linear));
  library.impl("int4_round", TORCH_BOX(&int4_round));
  library.impl("repack_weight", TORCH_BOX(&repack_weight));
  library.impl("rows_of_weight", TORCH_BOX(&rows_of_weight));
}
