// The operators of a CPU: `run_layers` runs a range of layers over the new tokens of all sequences, `linear` computes x W^T. Both
// read weights where they lie. kernels.py builds this file; in_place_runner.py calls it.
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

// Work that ends before the next phase begins. All threads run the same phases, and claim pieces from a counter:
//
//   thread 0   | piece 0 | piece 2 | piece 3 |.| piece 0 |        at a dot the thread waits until all pieces are done
//   thread 1   | piece 1           | piece 4 | | piece 1 |
//              phase 0                         phase 1
class Phase {
 public:
  // Runs `f(0)` to `f(n - 1)`, one for each piece. A thread calls `prepare` before the first piece that it claims. Returns once all
  // pieces are done.
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
    } catch (...) {  // no memory: torch raises the error once all threads are through, so none may wait for this piece
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

// Rows of several weights as pieces of work, in blocks of ROW_BLOCK rows. Without tiles pieces are long, since fetching ahead starts
// anew with each.
class Pieces {
 public:
  Pieces(std::span<const Weight* const> weights, int64_t wanted) : weights_(weights) {
    for (const Weight* weight : weights_) blocks_ += num_blocks(*weight);
    size_ = std::max<int64_t>(1, (blocks_ + wanted - 1) / wanted);
  }
  int64_t count() const { return (blocks_ + size_ - 1) / size_; }

  // Calls f(index of the weight, begin, end) for each weight that has rows [begin, end) in a piece.
  template <class F>
  void for_rows(int64_t piece, const F& f) const {
    int64_t begin = piece * size_;
    int64_t end = std::min(begin + size_, blocks_);
    for (size_t i = 0; i < weights_.size(); i++) {
      const int64_t blocks = num_blocks(*weights_[i]);
      if (begin < blocks && end > 0) f(i, std::max<int64_t>(0, begin) * ROW_BLOCK, std::min(end * ROW_BLOCK, weights_[i]->rows));
      begin -= blocks;
      end -= blocks;
    }
  }

 private:
  static int64_t num_blocks(const Weight& weight) { return (weight.rows + ROW_BLOCK - 1) / ROW_BLOCK; }

  std::span<const Weight* const> weights_;
  int64_t blocks_ = 0;
  int64_t size_;  // blocks of a piece
};

// With up to this many tokens each thread makes all inputs for itself, which saves a phase.
constexpr int64_t MAX_TOKENS_PER_THREAD = 8;

// One thread of a pass: the phases in their order, and memory for inputs.
class Worker {
 public:
  // `shared`: memory for inputs that all threads make together; nullptr: each thread makes all inputs for itself.
  // `in_bfloat16`: inputs are rounded to bfloat16 where `Inputs::layout_for` says so.
  Worker(Phase* first_phase, int64_t tokens, int64_t max_columns, int64_t threads, Floats* shared, bool in_bfloat16 = false)
      : phase_(first_phase), tokens_(tokens), threads_(threads), in_bfloat16_(in_bfloat16), shared_(shared),
        scratch_(aligned(Inputs::scratch_size(max_columns))),
        thread_inputs_(shared ? nullptr : aligned(Inputs::size(tokens, max_columns))) {}
  static std::unique_ptr<Floats[]> shared_memory(int64_t tokens, int64_t columns) {
    return tokens > MAX_TOKENS_PER_THREAD ? aligned(Inputs::size(tokens, columns)) : nullptr;
  }

  Phase& next_phase() { return *phase_++; }

  // `fill(token, to)` writes the input of a token. Calls f(inputs, index of the weight, begin, end) for all rows [begin, end) of all
  // weights. Takes two phases, and two more where the next weight has another type, since inputs are made for one type.
  template <class Fill, class F>
  void multiply(std::vector<const Weight*> weights, const Fill& fill, const F& f) {
    for (size_t first = 0, end = 0; first < weights.size(); first = end) {
      const Weight& weight = *weights[first];
      while (end < weights.size() && weights[end]->type == weight.type) end++;
      const Inputs x(shared_ ? shared_ : thread_inputs_.get(), tokens_, weight.columns, weight.type, in_bfloat16_);
      auto make = [&](int64_t piece) { x.make(piece, fill, reinterpret_cast<float*>(scratch_.get())); };
      auto make_all = [&] {
        for (int64_t piece = 0; piece < x.pieces(); piece++) make(piece);
      };
      Phase& inputs_phase = next_phase();
      if (shared_) inputs_phase.run(x.pieces(), [] {}, make);
      auto prepare = [&] { if (!shared_) make_all(); };
      multiply_inputs({&weights[first], end - first}, x, prepare,
                      [&](int64_t i, int64_t row_begin, int64_t row_end) { f(x, first + i, row_begin, row_end); });
    }
  }

  // As `multiply`, in one phase, for weights of one type. `prepare` makes the inputs, unless they are made.
  template <class Prepare, class F>
  void multiply_inputs(std::span<const Weight* const> weights, const Inputs& x, const Prepare& prepare, const F& f) {
    const Pieces pieces(weights, threads_ * (x.is_tiled() ? 8 : 2));
    next_phase().run(pieces.count(), prepare, [&](int64_t piece) { pieces.for_rows(piece, f); });
  }

 private:
  Phase* phase_;
  int64_t tokens_;
  int64_t threads_;
  bool in_bfloat16_;
  Floats* shared_;
  std::unique_ptr<Floats[]> scratch_;        // of a piece of inputs
  std::unique_ptr<Floats[]> thread_inputs_;  // without `shared`
};

template <class F>
void on_all_threads(int64_t threads, bool needs_tiles, const F& f) {
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    const tiles::Configured configured(needs_tiles);
    for (; begin < end; begin++) f();
  });
}

// Copies n floats, and ROW_BLOCK floats without a call.
INLINE void copy_outputs(const float* outputs, int64_t n, float* to) {
  if (n == ROW_BLOCK) std::memcpy(to, outputs, ROW_BLOCK * sizeof(float));
  else std::copy_n(outputs, n, to);
}

// GELU by tanh, x (1 + tanh(y)) / 2 = x / (1 + exp(-2 y)), or SiLU.
Floats activate(bool is_gelu, Floats x) {
  const Floats inner = is_gelu ? 1.5957691216f * (x + 0.044715f * x * x * x) : x;
  return x / (1.0f + exponential(-inner));
}

// A layer arrives as LAYER_NUMBERS integers and as many floats, see `InPlaceLayer.description`, and as LAYER_TENSORS tensors, see
// `InPlaceLayer.tensors`: six norms, and seven weights with their biases.
constexpr int64_t LAYER_NUMBERS = 7;
constexpr int64_t LAYER_TENSORS = 20;

struct Layer {
  int64_t heads;
  int64_t kv_heads;
  int64_t intermediate_size;
  int64_t window;
  int64_t rotation;  // index of the tables
  bool is_gelu;
  float scaling;
  Norm input_norm;
  Norm query_norm;
  Norm key_norm;
  Norm attended_norm;
  Norm mlp_norm;
  Norm output_norm;
  Weight query;
  Weight key;
  Weight value;
  Weight out;
  Weight gate;
  Weight up;
  Weight down;

  Layer(const Tensor* tensors, const int64_t* integers, const double* floats, int64_t hidden_size, int64_t head_dim)
      : heads(integers[0]), kv_heads(integers[1]), intermediate_size(integers[2]), window(integers[3]), rotation(integers[4]),
        is_gelu(integers[5]), scaling(float(floats[0])), input_norm(tensors[0], hidden_size, floats[1], integers[6]),
        query_norm(tensors[1], head_dim, floats[2], integers[6]), key_norm(tensors[2], head_dim, floats[3], integers[6]),
        attended_norm(tensors[3], hidden_size, floats[4], integers[6]), mlp_norm(tensors[4], hidden_size, floats[5], integers[6]),
        output_norm(tensors[5], hidden_size, floats[6], integers[6]), query(tensors + 6, heads * head_dim, hidden_size),
        key(tensors + 8, kv_heads * head_dim, hidden_size), value(tensors + 10, kv_heads * head_dim, hidden_size),
        out(tensors + 12, hidden_size, heads * head_dim), gate(tensors + 14, intermediate_size, hidden_size),
        up(tensors + 16, intermediate_size, hidden_size), down(tensors + 18, hidden_size, intermediate_size) {}
};

// Phases of a layer, if all weights differ in type: 6 for queries, keys and values, 1 for attention, 3 for the output projection
// with a norm, 4 for gates and ups, 3 for down with a norm.
constexpr int64_t MAX_PHASES = 17;

// New tokens of a sequence. Arrays by token hold the tokens of sequence 0, then of sequence 1, and so on.
struct Sequence {
  int64_t slot;           // of the cache
  int64_t start;          // positions before the pass
  int64_t tokens;         // at least one
  int64_t prefix_slot;    // slot of the prefix that other sequences share
  int64_t prefix_length;  // 0: no shared prefix

  int64_t num_spans() const { return (start + tokens + SPAN - 1) / SPAN; }
};

// New tokens of all sequences, through a range of layers of one shape: only weights, windows and MLP sizes differ.
class Pass {
 public:
  Pass(std::span<const Layer> layers, float* states, int64_t tokens, int64_t hidden_size, const std::vector<Tensor>& caches,
       const std::vector<Tensor>& rotations, std::span<const Sequence> sequences, bool in_bfloat16)
      : layers_(layers), caches_(caches), rotations_(rotations), states_(states), sequences_(sequences), tokens_(tokens),
        hidden_size_(hidden_size), in_bfloat16_(in_bfloat16), head_dim_(caches[0].size(3)), heads_(layers[0].heads),
        kv_heads_(layers[0].kv_heads), group_size_(heads_ / kv_heads_), qkv_size_((heads_ + 2 * kv_heads_) * head_dim_),
        max_intermediate_size_(std::ranges::max(layers, {}, &Layer::intermediate_size).intermediate_size),
        max_spans_(std::ranges::max(sequences, {}, &Sequence::num_spans).num_spans()),
        max_columns_(std::max({hidden_size, heads_ * head_dim_, max_intermediate_size_})),
        threads_(torch::stable::get_num_threads()), phases_(new Phase[layers.size() * MAX_PHASES]),
        finished_spans_(new std::atomic<int64_t>[layers.size() * sequences.size() * kv_heads_]()),
        qkv_(new float[tokens * qkv_size_]), attended_(new float[tokens * heads_ * head_dim_]),
        gates_(new float[tokens * max_intermediate_size_]), ups_(new float[tokens * max_intermediate_size_]),
        projected_(new float[tokens * hidden_size]), span_values_(new float[tokens * heads_ * max_spans_ * head_dim_]),
        partial_(new PartialAttention[tokens * heads_ * max_spans_]),
        shared_inputs_(Worker::shared_memory(tokens, max_columns_)),
        activated_(in_bfloat16 && HAS_TILES ? aligned(Inputs::size(tokens, max_intermediate_size_)) : nullptr) {
    for (int64_t i = 0; i < tokens * heads_ * max_spans_; i++) partial_[i].values = &span_values_[i * head_dim_];
    for (int64_t first = 0; const Sequence& sequence : sequences) {
      first_tokens_.push_back(first);
      first += sequence.tokens;
    }
  }

  void run() {
    on_all_threads(threads_, in_bfloat16_, [&] {
      Worker worker(phases_.get(), tokens_, max_columns_, threads_, shared_inputs_.get(), in_bfloat16_);
      for (size_t index = 0; index < layers_.size(); index++) {
        const Layer& layer = layers_[index];
        project_qkv(worker, layer);
        worker.next_phase().run(int64_t(sequences_.size()) * kv_heads_ * max_spans_, [] {},
                                [&](int64_t piece) { attend(index, piece); });
        add_projection(worker, layer.out, attended_.get(), heads_ * head_dim_, layer.attended_norm);
        activate_gates(worker, layer);
        if (activates_tiles(layer)) {
          const Inputs activated = activated_tiles(layer);
          add_projection(worker, layer.down, gates_.get(), layer.intermediate_size, layer.output_norm, &activated);
        } else {
          add_projection(worker, layer.down, gates_.get(), layer.intermediate_size, layer.output_norm);
        }
      }
    });
  }

 private:
  auto normed_states(const Norm& norm) const {
    return [&, this](int64_t t, float* to) { norm(states_ + t * hidden_size_, to); };
  }

  void project_qkv(Worker& worker, const Layer& layer) {
    const Weight* weights[] = {&layer.query, &layer.key, &layer.value};
    const int64_t offsets[] = {0, heads_ * head_dim_, (heads_ + kv_heads_) * head_dim_};
    worker.multiply({weights[0], weights[1], weights[2]}, normed_states(layer.input_norm),
                    [&](const Inputs& x, size_t i, int64_t begin, int64_t end) {
                      float* to = &qkv_[offsets[i]];
                      weights[i]->multiply(begin, end, x, [&](int64_t t, int64_t row, const float* outputs, int64_t n) {
                        copy_outputs(outputs, n, &to[t * qkv_size_ + row]);
                      });
                    });
  }

  // Attention of a sequence over a span of the keys of one head. The span that has the positions of the new tokens also writes their
  // keys and values, and no other span reads them. Sequences with a shared prefix share spans: the first sequence attends for all.
  void attend(size_t index, int64_t piece) {
    const Layer& layer = layers_[index];
    const int64_t span = piece % max_spans_;
    const int64_t head = piece / max_spans_ % kv_heads_;
    const size_t sequence = piece / max_spans_ / kv_heads_;
    if (span >= sequences_[sequence].num_spans()) return;
    std::vector<size_t> sharing{sequence};
    for (size_t other = 0; other < sequences_.size(); other++) {
      if (other == sequence || !share_span(layer, sequences_[sequence], sequences_[other], span)) continue;
      if (other < sequence) return;
      sharing.push_back(other);
    }
    // Longest prefix first: where one prefix ends, the sequences before it still share the next blocks.
    std::ranges::stable_sort(sharing, std::greater{}, [&](size_t i) { return sequences_[i].prefix_length; });
    int64_t num_tokens = 0;
    for (size_t i : sharing) num_tokens += sequences_[i].tokens;
    std::unique_ptr<float[]> queries(new float[num_tokens * group_size_ * head_dim_]);
    std::vector<PartialAttention> attended;
    std::vector<CachedHead> cached;
    for (float* to = queries.get(); size_t i : sharing) {
      cached.push_back(cached_head(index, sequences_[i], head));
      rotate_and_write(layer, i, head, span, to, cached.back());
      const int64_t num_queries = sequences_[i].tokens * group_size_;
      PartialAttention* partial = partial_of(i, head) + span * num_queries;
      attended.insert(attended.end(), partial, partial + num_queries);
      to += num_queries * head_dim_;
    }
    if (HAS_TILES && in_bfloat16_ && layer.query.type != ScalarType::Float)
      attend_to_span_by_tiles(queries.get(), num_tokens, group_size_, head_dim_, sequences_[sequence].start, layer.window, cached[0],
                              span * SPAN, attended.data());
    else
      attend_to_span(layer, span, sharing, cached, queries.get(), num_tokens, attended.data());
    for (const PartialAttention* from = attended.data(); size_t i : sharing) {
      const int64_t num_queries = sequences_[i].tokens * group_size_;
      std::copy_n(from, num_queries, partial_of(i, head) + span * num_queries);
      from += num_queries;
      finish_span(index, i, head);
    }
  }

  // Attention of sequences, those with the longest prefixes first: blocks of the prefix for all that have them, then the rest of the
  // span for each. A sequence sees its blocks in order, as it does alone.
  void attend_to_span(const Layer& layer, int64_t span, std::span<const size_t> sharing, std::span<const CachedHead> cached,
                      const float* queries, int64_t num_tokens, PartialAttention* attended) const {
    for (int64_t i = 0; i < num_tokens * group_size_; i++) attended[i].clear(head_dim_);
    const int64_t span_end = (span + 1) * SPAN;
    auto attend = [&](int64_t first_token, int64_t tokens, size_t i, int64_t begin, int64_t end) {
      const int64_t query = first_token * group_size_;
      attend_to_blocks(queries + query * head_dim_, tokens, group_size_, head_dim_, sequences_[sharing[i]].start, layer.window,
                       cached[i], begin, std::min(end, span_end), attended + query);
    };
    int64_t begin = span * SPAN;
    int64_t tokens = num_tokens;
    for (size_t i = sharing.size(); i-- > 0; tokens -= sequences_[sharing[i]].tokens) {
      const int64_t prefix_length = sequences_[sharing[i]].prefix_length;
      attend(0, tokens, i, begin, prefix_length);
      begin = std::max(begin, prefix_length);
    }
    int64_t first_token = 0;
    for (size_t i = 0; i < sharing.size(); i++) {
      const Sequence& sequence = sequences_[sharing[i]];
      attend(first_token, sequence.tokens, i, std::max(span * SPAN, sequence.prefix_length), sequence.start + sequence.tokens);
      first_token += sequence.tokens;
    }
  }

  // Whether at least half of a span is a prefix that two sequences share. One thread attends for both, so a smaller part would cost
  // more threads than it saves reading. Tiles take each sequence alone: a prompt has many tokens.
  bool share_span(const Layer& layer, const Sequence& a, const Sequence& b, int64_t span) const {
    const int64_t shared = std::min(a.prefix_length, b.prefix_length) - span * SPAN;
    return !in_bfloat16_ && !layer.window && a.prefix_slot == b.prefix_slot && 2 * shared >= SPAN;
  }

  PartialAttention* partial_of(size_t sequence, int64_t head) const {
    return &partial_[(first_tokens_[sequence] * heads_ + head * sequences_[sequence].tokens * group_size_) * max_spans_];
  }

  CachedHead cached_head(size_t index, const Sequence& sequence, int64_t head) const {
    auto slot_head = [&](int64_t slot) -> SlotHead {
      auto at = [&](const Tensor& cache) {
        const int64_t size = cache.size(2) * head_dim_ * int64_t(cache.element_size());
        return static_cast<char*>(cache.mutable_data_ptr()) + (slot * kv_heads_ + head) * size;
      };
      return {at(caches_[2 * index]), at(caches_[2 * index + 1])};
    };
    return {slot_head(sequence.slot), slot_head(sequence.prefix_slot), sequence.prefix_length, caches_[2 * index].scalar_type(), head_dim_};
  }

  // Rotates the queries of a sequence that share a head of keys, and writes the new keys and values of a span.
  void rotate_and_write(const Layer& layer, size_t index, int64_t head, int64_t span, float* queries, CachedHead& cached) const {
    const Sequence& sequence = sequences_[index];
    const Tensor& tables = rotations_[layer.rotation];
    auto* cosines = static_cast<const float*>(tables.const_data_ptr());
    const float* sines = cosines + tables.size(1) * head_dim_;
    std::unique_ptr<float[]> normed_head(new float[head_dim_]);
    std::unique_ptr<float[]> rotated_key(new float[head_dim_]);
    auto norm_and_rotate = [&](const float* x, const Norm& norm, int64_t position, float factor, float* to) {
      if (norm.weight) {
        norm(x, normed_head.get());
        x = normed_head.get();
      }
      rotate(x, cosines + position * head_dim_, sines + position * head_dim_, head_dim_, factor, to);
    };
    for (int64_t t = 0; t < sequence.tokens; t++) {
      const float* qkv = &qkv_[(first_tokens_[index] + t) * qkv_size_];
      const int64_t position = sequence.start + t;
      for (int64_t i = 0; i < group_size_; i++)
        norm_and_rotate(qkv + (head * group_size_ + i) * head_dim_, layer.query_norm, position, layer.scaling,
                        &queries[(t * group_size_ + i) * head_dim_]);
      if (position / SPAN != span) continue;
      norm_and_rotate(qkv + (heads_ + head) * head_dim_, layer.key_norm, position, 1.0f, rotated_key.get());
      cached.write(position, rotated_key.get(), qkv + (heads_ + kv_heads_ + head) * head_dim_);
    }
  }

  // Counts a finished span. The thread that finishes the last span adds up all spans, in order, and divides by the sum.
  void finish_span(size_t index, size_t sequence, int64_t head) {
    const int64_t num_spans = sequences_[sequence].num_spans();
    auto& finished = finished_spans_[(index * sequences_.size() + sequence) * kv_heads_ + head];
    if (finished.fetch_add(1, std::memory_order_acq_rel) + 1 < num_spans) return;
    const int64_t num_queries = sequences_[sequence].tokens * group_size_;
    PartialAttention* partial = partial_of(sequence, head);
    for (int64_t i = 0; i < num_queries; i++) {
      PartialAttention& total = partial[i];
      for (int64_t span = 1; span < num_spans; span++) total.add(partial[span * num_queries + i], head_dim_);
      const int64_t token = first_tokens_[sequence] + i / group_size_;
      float* to = &attended_[(token * heads_ + head * group_size_ + i % group_size_) * head_dim_];
      for (int64_t j = 0; j < head_dim_; j++) to[j] = total.values[j] / total.sum;
    }
  }

  // act(x W_gate^T) * x W_up^T, of the normed states
  void activate_gates(Worker& worker, const Layer& layer) {
    auto multiply = [&](const Weight& weight, std::unique_ptr<float[]>& to, const Inputs& x, int64_t begin, int64_t end) {
      weight.multiply(begin, end, x, [&](int64_t t, int64_t row, const float* outputs, int64_t n) {
        copy_outputs(outputs, n, &to[t * layer.intermediate_size + row]);
      });
    };
    const bool is_one_type = layer.gate.type == layer.up.type;
    if (activates_tiles(layer))
      return worker.multiply({&layer.up}, normed_states(layer.mlp_norm), [&](const Inputs& x, size_t, int64_t begin, int64_t end) {
        activate_tiles(layer, x, begin, end);
      });
    if (!is_one_type)
      worker.multiply({&layer.gate}, normed_states(layer.mlp_norm), [&](const Inputs& x, size_t, int64_t begin, int64_t end) {
        multiply(layer.gate, gates_, x, begin, end);
      });
    worker.multiply({&layer.up}, normed_states(layer.mlp_norm), [&](const Inputs& x, size_t, int64_t begin, int64_t end) {
      if (is_one_type) multiply(layer.gate, gates_, x, begin, end);
      multiply(layer.up, ups_, x, begin, end);
      for (int64_t t = 0; t < tokens_; t++)
        for (int64_t j = begin; j < end; j += LANES) {
          float* gates = &gates_[t * layer.intermediate_size + j];
          const float* ups = &ups_[t * layer.intermediate_size + j];
          const int64_t n = std::min(LANES, end - j);
          store(activate(layer.is_gelu, widen(gates, n)) * widen(ups, n), gates, n);
        }
    });
  }

  // Whether `activate_tiles` makes the inputs of `down`: gate and up have one type, and inputs of up and down are tiles.
  bool activates_tiles(const Layer& layer) const {
    return layer.gate.type == layer.up.type && Inputs::uses_tiles(layer.up.type, in_bfloat16_) &&
           Inputs::uses_tiles(layer.down.type, in_bfloat16_);
  }
  Inputs activated_tiles(const Layer& layer) const {
    return {activated_.get(), tokens_, layer.intermediate_size, layer.down.type, in_bfloat16_};
  }

  // As `activate_gates`, but writes the inputs of `down` as tiles: 32 rows of gate and up become 32 columns.
  void activate_tiles(const Layer& layer, const Inputs& x, int64_t begin, int64_t end) {
    const Inputs activated = activated_tiles(layer);
    auto gates = Weight::new_outputs(tokens_);
    auto ups = Weight::new_outputs(tokens_);
    for (int64_t row = begin; row < end; row += ROW_BLOCK) {
      layer.gate.multiply_block(row, std::min(ROW_BLOCK, end - row), x, gates.get());
      layer.up.multiply_block(row, std::min(ROW_BLOCK, end - row), x, ups.get());
      for (int64_t token_tile = 0; token_tile < activated.token_tiles; token_tile++)
        activated.put_tile(row / tiles::COLUMNS, token_tile, [&](int64_t t, int64_t j) {
          const int64_t from = (token_tile * tiles::ROWS + t) * ROW_BLOCK + j;
          return activate(layer.is_gelu, load<Floats>(&gates[from])) * load<Floats>(&ups[from]);
        });
    }
  }

  // states += norm(x W^T + b), of x [T, columns] at `from`, or of inputs that are made already.
  void add_projection(Worker& worker, const Weight& weight, const float* from, int64_t columns, const Norm& norm,
                      const Inputs* made = nullptr) {
    const bool has_norm = norm.weight;
    float* to = has_norm ? projected_.get() : states_;
    auto multiply = [&](const Inputs& x, int64_t begin, int64_t end) {
      weight.multiply(begin, end, x, [&](int64_t t, int64_t row, const float* outputs, int64_t n) {
        float* sums = &to[t * hidden_size_ + row];
        if (has_norm) return copy_outputs(outputs, n, sums);
        for (int64_t i = 0; i < n; i++) sums[i] += outputs[i];
      });
    };
    const Weight* weights[] = {&weight};
    if (made)
      worker.multiply_inputs(weights, *made, [] {}, [&](size_t, int64_t begin, int64_t end) { multiply(*made, begin, end); });
    else
      worker.multiply({&weight}, [&](int64_t t, float* input) { std::copy_n(from + t * columns, columns, input); },
                      [&](const Inputs& x, size_t, int64_t begin, int64_t end) { multiply(x, begin, end); });
    if (!has_norm) return;
    worker.next_phase().run(tokens_, [] {}, [&](int64_t t) {
      float* projected = &projected_[t * hidden_size_];
      float* state = states_ + t * hidden_size_;
      norm(projected, projected);
      for (int64_t j = 0; j < hidden_size_; j++) state[j] += projected[j];
    });
  }

  std::span<const Layer> layers_;
  const std::vector<Tensor>& caches_;     // keys, then values, of each layer: [slots, kv_heads, positions, head_dim]
  const std::vector<Tensor>& rotations_;  // [2, positions, head_dim]: cosines and sines
  float* states_;                         // [tokens, hidden_size]
  std::span<const Sequence> sequences_;
  std::vector<int64_t> first_tokens_;  // of each sequence, among all tokens
  int64_t tokens_;
  int64_t hidden_size_;
  bool in_bfloat16_;
  int64_t head_dim_;
  int64_t heads_;
  int64_t kv_heads_;
  int64_t group_size_;  // heads of queries that share a head of keys
  int64_t qkv_size_;
  int64_t max_intermediate_size_;
  int64_t max_spans_;
  int64_t max_columns_;
  int64_t threads_;
  std::unique_ptr<Phase[]> phases_;
  std::unique_ptr<std::atomic<int64_t>[]> finished_spans_;  // [layers, sequences, kv_heads]
  std::unique_ptr<float[]> qkv_;                            // [tokens, qkv_size]
  std::unique_ptr<float[]> attended_;                       // [tokens, heads, head_dim]
  std::unique_ptr<float[]> gates_;                          // [tokens, intermediate_size]
  std::unique_ptr<float[]> ups_;                            // [tokens, intermediate_size]
  std::unique_ptr<float[]> projected_;                      // [tokens, hidden_size]
  std::unique_ptr<float[]> span_values_;                    // [of each `partial_`, head_dim]
  std::unique_ptr<PartialAttention[]> partial_;             // of each sequence [kv_heads, spans, tokens * group_size]
  std::unique_ptr<Floats[]> shared_inputs_;                 // of many tokens
  std::unique_ptr<Floats[]> activated_;                     // inputs of `down`, by tiles
};

// A range of layers, as Python describes it.
struct Layers {
  Tensor integers;              // [L, LAYER_NUMBERS]
  Tensor floats;                // [L, LAYER_NUMBERS]
  std::vector<Tensor> tensors;  // [L * LAYER_TENSORS]
  int64_t hidden_size;
  int64_t head_dim;

  // Looks up where the weights are now, and their shapes and formats. Each pass does.
  std::vector<Layer> resolve() const {
    std::vector<Layer> layers;
    layers.reserve(integers.size(0));
    auto* all_integers = static_cast<const int64_t*>(integers.const_data_ptr());
    auto* all_floats = static_cast<const double*>(floats.const_data_ptr());
    for (int64_t i = 0; i < integers.size(0); i++)
      layers.emplace_back(&tensors[LAYER_TENSORS * i], all_integers + LAYER_NUMBERS * i, all_floats + LAYER_NUMBERS * i, hidden_size,
                          head_dim);
    return layers;
  }
};

// Makes a tensor that owns the description of a range of layers.
Tensor make_layers(const Tensor& integers, const Tensor& floats, std::vector<Tensor> tensors, int64_t hidden_size, int64_t head_dim) {
  auto layers = std::make_unique<Layers>(Layers{integers, floats, std::move(tensors), hidden_size, head_dim});
  const int64_t size = sizeof(Layers);
  const int64_t stride = 1;
  Tensor handle = torch::stable::from_blob(layers.get(), {&size, 1}, {&stride, 1}, integers.device(), ScalarType::Byte,
                                           [](void* owned) { delete static_cast<Layers*>(owned); });
  layers.release();
  return handle;
}

// Runs layers over the new tokens [T, hidden_size] of sequences, [B, 5] as `Sequence` has them, in place. Where the processor
// multiplies in bfloat16, inputs of prompt tokens are rounded to it: by tiles for all weights but float32 and in attention, else for
// weights in bfloat16. The kind of token decides, so no way to read a prompt changes a bit.
void run_layers(const Tensor& hidden, const Tensor& sequences, bool is_prompt, const Tensor& handle, std::vector<Tensor> caches,
                std::vector<Tensor> rotations) {
  const std::vector<Layer> layers = static_cast<const Layers*>(handle.const_data_ptr())->resolve();
  Pass(layers, static_cast<float*>(hidden.mutable_data_ptr()), hidden.size(0), hidden.size(1), caches, rotations,
       {static_cast<const Sequence*>(sequences.const_data_ptr()), size_t(sequences.size(0))}, is_prompt && HAS_PAIRS)
      .run();
}

// Tokens that `linear` multiplies at a time: a core's cache has room for their inputs.
constexpr int64_t LINEAR_TOKENS = 64;

// x W^T + b, or norm(x) W^T + b: [T, in] -> [T, rows]. Empty tensors: no norm, no bias.
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
  std::unique_ptr<Phase[]> phases(new Phase[2 * (tokens / LINEAR_TOKENS + 1)]);
  std::unique_ptr<Floats[]> shared = Worker::shared_memory(std::min(LINEAR_TOKENS, tokens), columns);
  on_all_threads(threads, false, [&] {
    for (int64_t start = 0; start < tokens; start += LINEAR_TOKENS) {
      auto fill = [&](int64_t t, float* input) {
        const float* token = from + (start + t) * columns;
        if (rms_norm.weight) rms_norm(token, input);
        else std::copy_n(token, columns, input);
      };
      Worker(&phases[2 * (start / LINEAR_TOKENS)], std::min(LINEAR_TOKENS, tokens - start), columns, threads, shared.get())
          .multiply({&w}, fill, [&](const Inputs& x, size_t, int64_t begin, int64_t end) {
            w.multiply(begin, end, x, [&](int64_t t, int64_t row, const float* outputs, int64_t n) {
              copy_outputs(outputs, n, &to[(start + t) * rows + row]);
            });
          });
    }
  });
  return out;
}
}  // namespace

STABLE_TORCH_LIBRARY(self_speculation, library) {
  library.def("make_layers(Tensor integers, Tensor floats, Tensor[] tensors, int hidden_size, int head_dim) -> Tensor");
  library.def(
      "run_layers(Tensor(a!) hidden, Tensor sequences, bool is_prompt, Tensor handle, Tensor[] caches, Tensor[] rotations) -> ()");
  library.def(
      "linear(Tensor x, Tensor norm, float epsilon, bool is_centred, Tensor weight, Tensor bias, int rows) -> Tensor");
  library.def("int4_round(Tensor weight, Tensor importance) -> Tensor");
  library.def("repack_weight(Tensor file_rows, int code, int columns) -> Tensor");
  library.def("dequantize_rows(Tensor weight, Tensor ids, int rows, int columns) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(self_speculation, CPU, library) {
  library.impl("make_layers", TORCH_BOX(&make_layers));
  library.impl("run_layers", TORCH_BOX(&run_layers));
  library.impl("linear", TORCH_BOX(&linear));
  library.impl("int4_round", TORCH_BOX(&int4_round));
  library.impl("repack_weight", TORCH_BOX(&repack_weight));
  library.impl("dequantize_rows", TORCH_BOX(&dequantize_rows));
}
