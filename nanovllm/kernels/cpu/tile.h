// The matrix kernel under both the linear layers and attention: a few rows of activations times
// 1 or 4 vectors of columns, float32 accumulators in registers.
//
// An output element is one chain of fused multiply-adds over k in ascending order. A chain may be
// stored and taken up again (exactly, in float32), so its bits depend neither on how many rows
// share a tile nor on where k is cut: that is what makes results independent of the batch.
//
// Operands, for a kind with kDepth values of k to a step:
//   activations  a panel: [slab of kSlab steps][row][step of the slab] of Kind::Act
//   weights      kVectors vectors a step, kLanes columns each, Kind::kBytes long
#pragma once

#include "simd.h"

namespace nanovllm {

constexpr int kTileVectors = 4;
constexpr int kSlab = 64;  // steps; the weights of a tile's slab fill half a first-level cache
#if defined(__AVX512F__) || defined(__aarch64__)
#define NANOVLLM_SIX_ROWS
constexpr int kTileRows = 6;  // 24 accumulators, 4 weights and a broadcast fill 32 registers
#else
constexpr int kTileRows = 3;
#endif

// Activations float32, weights of any type that `load` widens.
template <class Weight>
struct Fma {
  using Element = Weight;
  using Act = float;
  using Operand = Vec;
  static constexpr int kDepth = 1;
  static constexpr int kBytes = kLanes * sizeof(Weight);

  static Operand weight(const char* p) { return load(reinterpret_cast<const Weight*>(p)); }
  static Operand broadcast(const Act* p) { return splat(*p); }
  static void accumulate(Vec& sum, Operand act, Operand weight) {
    sum = fma(act, weight, sum);
  }
};

#if defined(__AVX512BF16__)
// Pairs of bfloat16 along k: one instruction multiplies both and adds them to a float32.
struct DotBf16 {
  using Element = Bf16;
  using Act = uint32_t;
  using Operand = __m512i;
  static constexpr int kDepth = 2;
  static constexpr int kBytes = 64;

  static Operand weight(const char* p) { return _mm512_loadu_si512(p); }
  static Operand broadcast(const Act* p) { return _mm512_set1_epi32(static_cast<int>(*p)); }
  static void accumulate(Vec& sum, Operand act, Operand weight) {
    // Not the intrinsic: GCC 12 copies its accumulator.
    asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(act), "v"(weight));
  }
};
using TileBf16 = DotBf16;
#else
using TileBf16 = Fma<Bf16>;
#endif

// Where a tile's weights lie, and what is fetched into the second-level cache meanwhile: `lines`
// cache lines a step. Both kinds are used up by a product, step by step.

// The vectors of a step side by side.
template <class Kind>
struct Adjacent {
  const char* base;
  long step;
  const char* ahead = nullptr;
  long lines = 0, ahead_step = 0;

  const char* vector(int v) const { return base + v * Kind::kBytes; }
  void next() {
    for (long l = 0; l < lines; l++) __builtin_prefetch(ahead + l * 64, 0, 2);
    ahead += ahead_step;
    base += step;
  }
};

// Each vector from a place of its own, and the lines at the same distances from other places.
struct Scattered {
  const char* base[kTileVectors];
  long step;
  const char* ahead[kTileVectors] = {};
  int lines = 0;
  long at = 0;

  const char* vector(int v) const { return base[v] + at; }
  void next() {
    for (int l = 0; l < lines; l++) __builtin_prefetch(ahead[l] + at, 0, 2);
    at += step;
  }
};

// One product: `act` begins at a slab of a panel, `out` has rows `out_row` floats apart.
template <class Kind, class Weights = Adjacent<Kind>>
struct Product {
  const typename Kind::Act* act;
  Weights weights;
  long steps;
  float* out;
  long out_row;
  bool fresh;  // out is written without being read, else added to
};

template <class Kind, int kRows, int kVectors, class Weights>
inline __attribute__((always_inline)) void tile(Product<Kind, Weights> p) {
  Vec sums[kRows][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; r++) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; v++) {
      sums[r][v] = p.fresh ? Vec{} : load(p.out + r * p.out_row + v * kLanes);
    }
  }
  for (long slab = 0; slab < p.steps; slab += kSlab, p.act += kRows * kSlab) {
    long count = p.steps - slab < kSlab ? p.steps - slab : kSlab;
    for (long s = 0; s < count; s++) {
      typename Kind::Operand w[kVectors];
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; v++) w[v] = Kind::weight(p.weights.vector(v));
      p.weights.next();
#pragma GCC unroll 8
      for (int r = 0; r < kRows; r++) {
        typename Kind::Operand a = Kind::broadcast(p.act + r * kSlab + s);
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; v++) Kind::accumulate(sums[r][v], a, w[v]);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; r++) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; v++) store(p.out + r * p.out_row + v * kLanes, sums[r][v]);
  }
}

template <class Kind, int kVectors, class Weights>
void tile_rows(int rows, const Product<Kind, Weights>& p) {
  switch (rows) {
    case 1: return tile<Kind, 1, kVectors>(p);
    case 2: return tile<Kind, 2, kVectors>(p);
    case 3: return tile<Kind, 3, kVectors>(p);
#if defined(NANOVLLM_SIX_ROWS)
    case 4: return tile<Kind, 4, kVectors>(p);
    case 5: return tile<Kind, 5, kVectors>(p);
    case 6: return tile<Kind, 6, kVectors>(p);
#endif
  }
}

template <class Element>
struct KindFor {
  using Type = Fma<Element>;
};
template <>
struct KindFor<Bf16> {
  using Type = TileBf16;
};

// M rows cut into as few panels as fit, as even as can be: panel p begins at row first(p).
struct Panels {
  long rows;
  long count;

  explicit Panels(long m) : rows(m), count((m + kTileRows - 1) / kTileRows) {}
  long first(long p) const { return p * rows / count; }
  int size(long p) const { return static_cast<int>(first(p + 1) - first(p)); }
};

}  // namespace nanovllm
