// Rounds W to four bits, as `in_four_bits` of int4_linear.py does.
#pragma once
#include "few_bits.h"

namespace {
// Rounds a block of LANES rows, elements [32, LANES], for inputs of importance [32]. Writes the low planes, and scales and zero
// points in bfloat16.
void round_block(const Floats* elements, const float* importance, uint8_t* low, uint16_t* scales) {
  Floats least = elements[0];
  Floats largest = elements[0];
  Floats mean = {};
  for (int j = 0; j < BLOCK; j++) {
    least = elements[j] < least ? elements[j] : least;
    largest = elements[j] > largest ? elements[j] : largest;
    mean += elements[j] * importance[j];
  }
  auto to_bfloat16 = [](Floats x) {
    Ints bits = (Ints)x;
    return (Floats)((bits + 0x7fff + ((bits >> 16) & 1)) & ~0xffff);
  };
  auto quantised = [](Floats element, Floats inverse_scale, Floats zero_point) {
    const Floats lowest = splat(-8.0f);
    const Floats highest = splat(7.0f);
    const Floats nearest = splat(0x1.8p23f);
    Floats quants = (element - zero_point) * inverse_scale;
    quants = quants > lowest ? quants : lowest;
    quants = quants < highest ? quants : highest;
    return quants + nearest - nearest;
  };
  const Floats smallest = splat(1e-12f);
  Floats best_gain = splat(-1.0f);
  Floats scale = smallest;   // NaN elements keep these values
  Floats zero_point = mean;
  for (float share : {1.0f, 0.9f, 0.8f}) {
    Floats trial_scale = (largest - least) * share / 15.0f;
    trial_scale = trial_scale > smallest ? trial_scale : smallest;
    const Floats inverse_scale = 1.0f / trial_scale;
    const Floats trial_zero_point = (least + largest + trial_scale) / 2.0f;
    Floats mean_quant = {};
    Floats mean_square = {};
    Floats mean_product = {};
    for (int j = 0; j < BLOCK; j++) {
      const Floats quants = quantised(elements[j], inverse_scale, trial_zero_point);
      const Floats weighted = quants * importance[j];
      mean_quant += weighted;
      mean_square += weighted * quants;
      mean_product += weighted * elements[j];
    }
    Floats variance = mean_square - mean_quant * mean_quant;
    const Floats covariance = mean_product - mean_quant * mean;
    variance = variance > smallest ? variance : smallest;
    const Floats gain = covariance * covariance / variance;
    const Floats fitted_scale = covariance / variance;
    const Ints better = gain > best_gain;
    best_gain = better ? gain : best_gain;
    scale = better ? fitted_scale : scale;
    zero_point = better ? mean - fitted_scale * mean_quant : zero_point;
  }
  scale = to_bfloat16(scale > smallest ? scale : smallest);
  zero_point = to_bfloat16(zero_point);
  const Floats inverse_scale = 1.0f / scale;
  for (int j = 0; j < BLOCK; j += 8) {  // a lane has the eight quants of a row, as a low plane has them
    Ints words = {};
    for (int i = 0; i < 8; i++) {
      const Ints quants = __builtin_convertvector(quantised(elements[j + i], inverse_scale, zero_point), Ints) + 8;
      words |= quants << (i % 4 * 8 + i / 4 * 4);
    }
    std::memcpy(low + j / 8 * PLANE, &words, sizeof(words));
  }
  auto put = [](Floats parameters, uint16_t* to) {
    const Shorts bits = __builtin_convertvector((Ints)parameters >> 16, Shorts);
    std::memcpy(to, &bits, sizeof(bits));
  };
  put(scale, scales);
  put(zero_point, scales + PANEL);
}

template <class Scalar>
void round_rows(const Scalar* weight, int64_t rows, int64_t columns, const float* importance, uint8_t* panels) {
  const Format& format = FORMATS[0];
  const int64_t blocks = (columns + BLOCK - 1) / BLOCK;
  for (int64_t first = 0; first < (rows + PANEL - 1) / PANEL * PANEL; first += LANES) {
    for (int64_t b = 0; b < blocks; b++) {
      alignas(64) float elements[BLOCK][LANES] = {};
      const int64_t block_columns = std::min(BLOCK, columns - b * BLOCK);
      for (int64_t row = 0; row < std::min(LANES, rows - first); row++) {
        const Scalar* from = weight + (first + row) * columns + b * BLOCK;
        int64_t j = 0;
        for (; j + LANES <= block_columns; j += LANES) {
          const Floats widened = widen(from + j);
          for (int64_t i = 0; i < LANES; i++) elements[j + i][row] = widened[i];
        }
        for (; j < block_columns; j++) elements[j][row] = float(from[j]);
      }
      const int64_t lane = first % PANEL;
      uint8_t* block = panels + first / PANEL * format.bytes_before(blocks) + format.bytes_before(b);
      round_block(reinterpret_cast<Floats*>(elements), importance + b * BLOCK, block + format.scale_bytes() + lane * 4,
                  reinterpret_cast<uint16_t*>(block) + lane);
    }
  }
}

// A weight [rows, columns] in four bits. It uses one thread, since int4_linear.py rounds several weights at a time.
Tensor int4_round(const Tensor& weight, const Tensor& importance) {
  const int64_t rows = weight.size(0);
  const int64_t columns = weight.size(1);
  Tensor rounded = new_weight(FORMATS[0], rows, columns);
  auto* panels = static_cast<uint8_t*>(rounded.mutable_data_ptr()) + HEADER;
  auto* column_importance = static_cast<const float*>(importance.const_data_ptr());
  dispatch(weight.scalar_type(), weight.const_data_ptr(),
           [&](auto* elements) { round_rows(elements, rows, columns, column_importance, panels); });
  return rounded;
}
}  // namespace
