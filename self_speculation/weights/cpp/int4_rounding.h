// Rounds W to four bits, as `in_four_bits` of int4_linear.py does.
#pragma once
#include "weights.h"

namespace {
// One group of LANES rows: elements [32, LANES], counts [32].
void round_group(const Floats* elements, const float* counts, uint8_t* low, uint16_t* scales) {
  Floats least = elements[0], largest = elements[0], mean = {};
  for (int j = 0; j < GROUP; j++) {
    least = elements[j] < least ? elements[j] : least, largest = elements[j] > largest ? elements[j] : largest;
    mean += elements[j] * counts[j];
  }
  auto rounded = [](Floats x) {  // to bfloat16
    Ints bits = (Ints)x;
    return (Floats)((bits + 0x7fff + ((bits >> 16) & 1)) & ~0xffff);
  };
  auto level = [](Floats element, Floats per_scale, Floats middle) {
    const Floats lowest = splat(-8.0f), highest = splat(7.0f), nearest = splat(0x1.8p23f);
    Floats levels = (element - middle) * per_scale;
    levels = levels > lowest ? levels : lowest, levels = levels < highest ? levels : highest;
    return levels + nearest - nearest;
  };
  const Floats smallest = splat(1e-12f);
  Floats best_gain = splat(-1.0f), scale = smallest, middle = mean;  // of a NaN
  for (float share : {1.0f, 0.9f, 0.8f}) {
    Floats tried = (largest - least) * share / 15.0f, mean_level = {}, square = {}, product = {};
    tried = tried > smallest ? tried : smallest;
    Floats per_scale = 1.0f / tried, tried_middle = (least + largest + tried) / 2.0f;
    for (int j = 0; j < GROUP; j++) {
      Floats levels = level(elements[j], per_scale, tried_middle), weighted = levels * counts[j];
      mean_level += weighted, square += weighted * levels, product += weighted * elements[j];
    }
    Floats variance = square - mean_level * mean_level, covariance = product - mean_level * mean;
    variance = variance > smallest ? variance : smallest;
    Floats gain = covariance * covariance / variance, fitted = covariance / variance;
    Ints better = gain > best_gain;
    best_gain = better ? gain : best_gain;
    scale = better ? fitted : scale, middle = better ? mean - fitted * mean_level : middle;
  }
  scale = rounded(scale > smallest ? scale : smallest), middle = rounded(middle);
  Floats per_scale = 1.0f / scale;
  for (int j = 0; j < GROUP; j += 8) {  // eight levels of each row are a word, those of four columns side by side
    Ints words = {};
    for (int i = 0; i < 8; i++) {
      Ints levels = __builtin_convertvector(level(elements[j + i], per_scale, middle), Ints) + 8;
      words |= levels << (i % 4 * 8 + i / 4 * 4);
    }
    std::memcpy(low + j / 8 * 64, &words, sizeof(words));
  }
  int64_t number = 0;
  for (Floats of_group : {scale, middle}) {
    Shorts bits = __builtin_convertvector((Ints)of_group >> 16, Shorts);
    std::memcpy(scales + BLOCK * number++, &bits, sizeof(bits));
  }
}

template <class Number>
void round_rows(const Number* numbers, int64_t rows, int64_t columns, const float* counts, uint8_t* blocks) {
  const Format& format = FORMATS[0];
  int64_t groups = (columns + GROUP - 1) / GROUP;
  for (int64_t first = 0; first < (rows + BLOCK - 1) / BLOCK * BLOCK; first += LANES) {
    for (int64_t g = 0; g < groups; g++) {
      alignas(64) float elements[GROUP][LANES] = {};
      int64_t width = std::min(GROUP, columns - g * GROUP);
      for (int64_t row = 0; row < std::min(LANES, rows - first); row++) {
        const Number* from = numbers + (first + row) * columns + g * GROUP;
        int64_t j = 0;
        for (; j + LANES <= width; j += LANES) {
          Floats part = widen(from + j);
          for (int64_t i = 0; i < LANES; i++) elements[j + i][row] = part[i];
        }
        for (; j < width; j++) elements[j][row] = float(from[j]);
      }
      int64_t lane = first % BLOCK;
      uint8_t* cell = blocks + first / BLOCK * format.to(groups) + format.to(g);
      round_group(reinterpret_cast<Floats*>(elements), counts + g * GROUP, cell + format.scales() + lane * 4,
                  reinterpret_cast<uint16_t*>(cell) + lane);
    }
  }
}

// On the caller's thread: int4_linear.py rounds several weights at a time.
Tensor int4_round(const Tensor& from, const Tensor& counts) {
  int64_t rows = from.size(0), columns = from.size(1);
  Tensor weight = new_weight(FORMATS[0], rows, columns);
  auto* blocks = static_cast<uint8_t*>(weight.mutable_data_ptr()) + HEADER;
  auto* of_columns = static_cast<const float*>(counts.const_data_ptr());
  with_numbers(from.scalar_type(), from.const_data_ptr(), [&](auto* numbers) { round_rows(numbers, rows, columns, of_columns, blocks); });
  return weight;
}
}  // namespace
