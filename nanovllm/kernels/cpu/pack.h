// Layouts that the tile kernel reads: weights in blocks of kLanes columns, activations in panels.
//
// A packed weight [N, K] is groups of up to kTileVectors vectors of kLanes columns. A group lies in
// one piece: ceil(K / kDepth) steps, in a step its vectors, in a vector kDepth consecutive values
// of k for each column; zeros where N or K ends. Reading all of it is one pass over memory.
#pragma once

#include "tile.h"

namespace nanovllm {

// 32-bit words: to[i * row + j] = from[j][i] for i, j < kLanes.
inline void transpose(const uint32_t* const* from, uint32_t* to, long row) {
#if defined(__AVX512F__)
  __m512i a[16], b[16];
  for (int i = 0; i < 16; i++) a[i] = _mm512_loadu_si512(from[i]);
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    for (int j = 0; j < 2; j++) {
      a[i + 2 * j] = _mm512_unpacklo_epi64(b[i + j], b[i + j + 2]);
      a[i + 2 * j + 1] = _mm512_unpackhi_epi64(b[i + j], b[i + j + 2]);
    }
  }
  for (int i = 0; i < 4; i++) {  // a[4 q + i] holds words 4 l + i of rows 4 q .. 4 q + 3 in lane l
    __m512i even_low = _mm512_shuffle_i32x4(a[i], a[4 + i], 0x88);
    __m512i even_high = _mm512_shuffle_i32x4(a[8 + i], a[12 + i], 0x88);
    __m512i odd_low = _mm512_shuffle_i32x4(a[i], a[4 + i], 0xdd);
    __m512i odd_high = _mm512_shuffle_i32x4(a[8 + i], a[12 + i], 0xdd);
    _mm512_storeu_si512(to + (0 + i) * row, _mm512_shuffle_i32x4(even_low, even_high, 0x88));
    _mm512_storeu_si512(to + (4 + i) * row, _mm512_shuffle_i32x4(odd_low, odd_high, 0x88));
    _mm512_storeu_si512(to + (8 + i) * row, _mm512_shuffle_i32x4(even_low, even_high, 0xdd));
    _mm512_storeu_si512(to + (12 + i) * row, _mm512_shuffle_i32x4(odd_low, odd_high, 0xdd));
  }
#else
  for (int i = 0; i < kLanes; i++) {
    for (int j = 0; j < kLanes; j++) to[i * row + j] = from[j][i];
  }
#endif
}

template <class Kind>
constexpr long num_steps(long k) {
  return (k + Kind::kDepth - 1) / Kind::kDepth;
}

// The Acts of one row of a panel, whole slabs.
template <class Kind>
constexpr long panel_row(long k) {
  return (num_steps<Kind>(k) + kSlab - 1) / kSlab * kSlab;
}

inline void copy_row(const float* x, long count, float* to) {
  std::memcpy(to, x, count * sizeof(float));
}

inline void copy_row(const Bf16* x, long count, uint32_t* to) {
  if (count % 2) to[count / 2] = 0;
  std::memcpy(to, x, count * sizeof(Bf16));
}

template <class Narrow>
void copy_row(const Narrow* x, long count, float* to) {
  for (long i = 0; i < count; i += kLanes) {
    int part = static_cast<int>(count - i < kLanes ? count - i : kLanes);
    store_part(to + i, load_part(x + i, part), part);
  }
}

// One row of length k -> row r of a panel of `rows` rows.
template <class Kind>
void pack_row(const typename Kind::Element* x, long k, int r, int rows, typename Kind::Act* panel) {
  constexpr long kLength = kSlab * Kind::kDepth;
  for (long i = 0; i < k; i += kLength) {
    copy_row(x + i, k - i < kLength ? k - i : kLength, panel + r * kSlab);
    panel += rows * kSlab;
  }
}

// Columns given as kLanes row pointers of length k -> one vector of each step, the steps `stride`
// bytes apart.
template <class Kind>
void pack_columns(const typename Kind::Element* const* columns, long k, char* out, long stride) {
  long step = 0;
  if constexpr (Kind::kDepth * sizeof(typename Kind::Element) == 4) {
    for (; (step + kLanes) * Kind::kDepth <= k; step += kLanes) {
      const uint32_t* from[kLanes];
      for (int j = 0; j < kLanes; j++) {
        from[j] = reinterpret_cast<const uint32_t*>(columns[j] + step * Kind::kDepth);
      }
      transpose(from, reinterpret_cast<uint32_t*>(out + step * stride), stride / 4);
    }
  }
  for (; step < num_steps<Kind>(k); step++) {
    auto* to = reinterpret_cast<typename Kind::Element*>(out + step * stride);
    for (int j = 0; j < kLanes; j++) {
      for (long i = step * Kind::kDepth; i < (step + 1) * Kind::kDepth; i++) {
        *to++ = i < k ? columns[j][i] : typename Kind::Element{};
      }
    }
  }
}

// kDepth rows of length n -> one step of all vectors of columns, zeros where n ends.
template <class Kind>
void pack_rows(const typename Kind::Element* const* rows, long n, char* step) {
  using Element = typename Kind::Element;
  long i = 0;
#if defined(__AVX512BF16__)
  if constexpr (Kind::kDepth == 2) {
    // Word w of the first vector is element w / 2 of row w % 2; the second goes on from there.
    alignas(64) static constexpr uint16_t order[64] = {
        0,  32, 1,  33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39, 8,  40, 9,  41, 10, 42,
        11, 43, 12, 44, 13, 45, 14, 46, 15, 47, 16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53,
        22, 54, 23, 55, 24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63};
    __m512i low = _mm512_load_si512(order), high = _mm512_load_si512(order + 32);
    for (; i + 32 <= n; i += 32, step += 128) {
      __m512i a = _mm512_loadu_si512(rows[0] + i), b = _mm512_loadu_si512(rows[1] + i);
      _mm512_storeu_si512(step, _mm512_permutex2var_epi16(a, low, b));
      _mm512_storeu_si512(step + 64, _mm512_permutex2var_epi16(a, high, b));
    }
  }
#endif
  for (; i < n; i += kLanes, step += Kind::kBytes) {
    Element* out = reinterpret_cast<Element*>(step);
    for (int j = 0; j < kLanes; j++) {
      for (int d = 0; d < Kind::kDepth; d++) *out++ = i + j < n ? rows[d][i + j] : Element{};
    }
  }
}

}  // namespace nanovllm
