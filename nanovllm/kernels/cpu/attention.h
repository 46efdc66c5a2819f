// What attention works on and with: the paged cache, a step's batch, and what rows have seen.
#pragma once

#include <algorithm>

#include "simd.h"

namespace nanovllm {

constexpr float kLowest = -1e30f;  // below any score, and finite: its differences are too

// Keys at [block, 0], values at [block, 1], then [head], contiguous in a block. A head's keys lie as
// [dim / depth][slot][depth], its values as [slot / depth][dim][depth], depth that of the tile
// kernel: both are operands of a tile without packing.
// This struct and the next are filled by the Python side, field by field.
struct Cache {
  void* data;
  long dtype;
  long num_blocks;
  long block_row;  // elements between blocks
  long num_heads, block_size, dim;

  long num_slots() const { return num_blocks * block_size; }
  // Where the keys and the values of a head in a block begin, in elements.
  long keys(long block, long head) const { return block * block_row + head * block_size * dim; }
  long values(long block, long head) const { return keys(block, num_heads + head); }
};

struct Batch {
  const int32_t* cu_q_lens;
  const int32_t* context_lens;
  const int32_t* block_tables;
  long table_row;
  long num_seqs;
  const int64_t* slots;  // of the new tokens
  long num_tokens;
};

// What some rows have seen of some keys: values times e^(score - highest), and the sum of those
// weights.
struct State {
  float* sums;  // [rows][row]
  float* highest;
  float* total;
  long rows, row;

  State(float* memory, long rows, long row)
      : sums(memory),
        highest(memory + rows * row),
        total(highest + rows),
        rows(rows),
        row(row) {}

  static long size(long rows, long row) { return rows * (row + 2); }

  void clear() {
    std::fill(sums, highest, 0.0f);
    std::fill(highest, total, kLowest);
    std::fill(total, total + rows, 0.0f);
  }

  void scale(long r, float factor) {
    for (long i = r * row; i < (r + 1) * row; i += kLanes) {
      store(sums + i, load(sums + i) * splat(factor));
    }
    total[r] *= factor;
  }

  // Takes in what the same rows have seen of later keys.
  void merge(const State& later) {
    for (long r = 0; r < rows; r++) {
      float top = std::max(highest[r], later.highest[r]);
      scale(r, exp(splat(highest[r] - top))[0]);
      float factor = exp(splat(later.highest[r] - top))[0];
      for (long i = r * row; i < (r + 1) * row; i += kLanes) {
        store(sums + i, fma(load(later.sums + i), splat(factor), load(sums + i)));
      }
      total[r] += later.total[r] * factor;
      highest[r] = top;
    }
  }
};

}  // namespace nanovllm
