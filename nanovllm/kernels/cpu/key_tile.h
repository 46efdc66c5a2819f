// A tile of keys in the paged cache: what one step of attention's walk over a context reads.
#pragma once

#include "attention.h"
#include "pack.h"

namespace nanovllm {

constexpr int kKeys = kTileVectors * kLanes;  // keys of a tile

// What is asked of a step, the same for all its units.
template <class Kind>
struct Queries {
  using Element = typename Kind::Element;

  Cache cache;
  Batch batch;
  const Element* q;
  long q_row;
  long num_heads;
  float scale;
  long window;  // 0: all of the context
  Element* out;

  long group = num_heads / cache.num_heads;
  long vectors = (cache.dim + kLanes - 1) / kLanes;
  long padded = vectors * kLanes;
  long query_row = panel_row<Kind>(cache.dim);
};

// The keys of one sequence for one KV head.
struct Keys {
  const int32_t* table;
  long head;
  long first, end;  // keys that any row of a unit sees; first at a tile's edge
};

// Where the keys and values of a tile lie: in the cache, and in a buffer what cannot be read there.
template <class Kind>
struct KeyTile {
  using Element = typename Kind::Element;
  // Values of consecutive keys.
  struct Segment {
    const char* base;
    long steps;
  };
  static constexpr int kMostSegments = kKeys / 8 + 1;  // blocks have at least 8 slots

  Scattered keys = {};
  Segment values[kMostSegments];
  int num_segments = 0;

  static long buffer_bytes(const Queries<Kind>& a) {
    return num_steps<Kind>(a.cache.dim) * kTileVectors * Kind::kBytes +
           num_steps<Kind>(kKeys) * a.vectors * Kind::kBytes;
  }

  static bool is_in_cache(const Cache& cache) {
    return cache.block_size % kLanes == 0 && cache.dim % kLanes == 0;
  }

  // Keys [key, key + kKeys) before `limit`.
  void locate(const Queries<Kind>& a, const Keys& of, long key, long limit, char* buffer) {
    const Cache& cache = a.cache;
    const Element* data = static_cast<const Element*>(cache.data);
    int size = static_cast<int>(cache.block_size);
    char* value_buffer = buffer + num_steps<Kind>(cache.dim) * kTileVectors * Kind::kBytes;
    keys.step = (size % kLanes == 0 ? size : kKeys) * Kind::kDepth * sizeof(Element);
    num_segments = 0;
    int end = static_cast<int>(std::min<long>(limit - key, kKeys));
    for (int i = 0; i < end;) {
      int block = of.table[(static_cast<int>(key) + i) / size];
      int offset = (static_cast<int>(key) + i) % size, count = std::min(size - offset, end - i);
      const Element* from = data + cache.keys(block, of.head) + offset * Kind::kDepth;
      if (size % kLanes == 0) {
        for (int j = 0; j < count; j += kLanes) {
          keys.base[(i + j) / kLanes] = reinterpret_cast<const char*>(from + j * Kind::kDepth);
        }
      } else {
        copy_keys(from, cache, count, i, buffer);
      }
      add_values(a, data + cache.values(block, of.head) + offset * cache.dim, count, value_buffer);
      i += count;
    }
    for (int v = 0; v < kTileVectors && size % kLanes != 0; v++) {
      keys.base[v] = buffer + v * Kind::kBytes;
    }
    for (int v = (end + kLanes - 1) / kLanes; v < kTileVectors; v++) keys.base[v] = keys.base[0];
  }

  static void copy_keys(const Element* from, const Cache& cache, int count, int at, char* buffer) {
    Element* to = reinterpret_cast<Element*>(buffer) + at * Kind::kDepth;
    for (long step = 0; step < num_steps<Kind>(cache.dim); step++) {
      std::memcpy(to, from, count * Kind::kDepth * sizeof(Element));
      from += cache.block_size * Kind::kDepth;
      to += kKeys * Kind::kDepth;
    }
  }

  // Values are used as they lie, but the last of an odd number of keys and rows of odd length.
  void add_values(const Queries<Kind>& a, const Element* from, int count, char*& buffer) {
    long dim = a.cache.dim, whole = dim % kLanes == 0 ? count / Kind::kDepth : 0;
    if (whole > 0) values[num_segments++] = {reinterpret_cast<const char*>(from), whole};
    long steps = (count + Kind::kDepth - 1) / Kind::kDepth - whole;
    if (steps == 0) return;
    values[num_segments++] = {buffer, steps};
    for (long step = whole; step < whole + steps; step++, buffer += a.vectors * Kind::kBytes) {
      std::memset(buffer, 0, a.vectors * Kind::kBytes);
      Element* to = reinterpret_cast<Element*>(buffer);
      const Element* row = from + step * dim * Kind::kDepth;
      for (long i = 0; i < dim * Kind::kDepth; i++) {
        if (step * Kind::kDepth + i % Kind::kDepth < count) to[i] = row[i];
      }
    }
  }
};

}  // namespace nanovllm
