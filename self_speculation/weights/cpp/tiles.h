// Tiles: 16 rows of 64 bytes, as a processor with AMX multiplies them, and the same in plain C++, bit for bit.
//
//   dot<C, A, B>   C [16, 16] float32 += A [16, 32] bfloat16 times B [16 pairs, 16, 2] bfloat16
//
// A product adds even columns in one chain and odd columns in another, each from 0, each step one fused multiply-add; then
// C + (even + odd). Subnormal numbers are zeros. An element of C depends on one row of A and one column of B alone. kernels.py asks
// Linux for tiles before it chooses a variant with them.
#pragma once
#include "vectors.h"

namespace tiles {
constexpr int64_t ROWS = 16;     // of a tile
constexpr int64_t COLUMNS = 32;  // of a tile in bfloat16; 16 in float32

struct alignas(64) Configuration {  // 16 rows of 64 bytes for all eight tiles: smaller ones take as long
  uint8_t palette = 1;
  uint8_t reserved[15] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Configures the tiles of a thread while this object lives: other libraries set other shapes.
class Configured {
 public:
  explicit Configured(bool is_needed) : is_needed_(is_needed) {
#ifdef AMX
    const Configuration configuration;
    if (is_needed_) asm volatile("ldtilecfg %0" ::"m"(configuration));
#endif
  }
  ~Configured() {
#ifdef AMX
    if (is_needed_) asm volatile("tilerelease");
#endif
  }
  Configured(const Configured&) = delete;

 private:
  [[maybe_unused]] bool is_needed_;
};

#ifdef AMX
// Assembly, since intrinsics take no template arguments and older compilers have none. `volatile` keeps the order. `stride` is in
// bytes.
template <int C>
INLINE void zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(C));
}
template <int C>
INLINE void load(const void* from, int64_t stride) {
  asm volatile("tileloadd (%1,%2,1), %%tmm%c0" ::"i"(C), "r"(from), "r"(stride) : "memory");
}
template <int C>
INLINE void store(void* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c0, (%1,%2,1)" ::"i"(C), "r"(to), "r"(stride) : "memory");
}
template <int C, int A, int B>
INLINE void dot() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}
#else
inline thread_local uint32_t tile[8][ROWS][16];

template <int C>
void zero() {
  std::memset(tile[C], 0, sizeof(tile[C]));
}
template <int C>
void load(const void* from, int64_t stride) {
  for (int64_t row = 0; row < ROWS; row++) std::memcpy(tile[C][row], static_cast<const char*>(from) + row * stride, 64);
}
template <int C>
void store(void* to, int64_t stride) {
  for (int64_t row = 0; row < ROWS; row++) std::memcpy(static_cast<char*>(to) + row * stride, tile[C][row], 64);
}
inline float flush_subnormals(float x) {
  const auto bits = std::bit_cast<uint32_t>(x);
  return bits & 0x7f800000 ? x : std::bit_cast<float>(bits & 0x80000000);
}
template <int C, int A, int B>
void dot() {
  for (int64_t row = 0; row < ROWS; row++)
    for (int64_t column = 0; column < 16; column++) {
      float even = 0.0f;
      float odd = 0.0f;
      for (int64_t pair = 0; pair < 16; pair++) {
        const uint32_t a = tile[A][row][pair];
        const uint32_t b = tile[B][pair][column];
        auto low = [](uint32_t x) { return flush_subnormals(std::bit_cast<float>(x << 16)); };
        auto high = [](uint32_t x) { return flush_subnormals(std::bit_cast<float>(x & 0xffff0000)); };
        even = flush_subnormals(std::fma(low(a), low(b), even));
        odd = flush_subnormals(std::fma(high(a), high(b), odd));
      }
      const float sum = flush_subnormals(std::bit_cast<float>(tile[C][row][column])) + flush_subnormals(even + odd);
      tile[C][row][column] = std::bit_cast<uint32_t>(flush_subnormals(sum));
    }
}
#endif
}  // namespace tiles
