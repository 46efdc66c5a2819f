// One work unit of attention: some query tokens of one sequence with all query heads of a KV head.
//
// It walks the keys in tiles of kKeys with a running maximum and sum per row (online softmax:
// Milakov and Gimelshein, arXiv:1805.02867), anew in every span of kSpan keys; the spans of a row
// are merged in their order. Tiles and spans lie at fixed positions, and one without a visible key
// changes nothing, so a query's result depends on its context alone.
#pragma once

#include "key_tile.h"
#include "pool.h"

namespace nanovllm {

constexpr long kSpan = 512;                   // keys; a multiple of kKeys

// Row r is token begin + r / group, query head r % group of the group.
template <class Kind>
struct Unit {
  using Element = typename Kind::Element;
  using Act = typename Kind::Act;

  const Queries<Kind>& a;
  int seq, begin;
  Panels panels;
  long first_position;
  Keys keys;
  Act* queries;
  Act* weights;  // of the softmax, one panel
  char* buffers[2];
  float* scores;  // one panel
  float* seen;    // two States

  // Query tokens [begin, end) of a sequence.
  Unit(const Queries<Kind>& a, int seq, int begin, int end, long head)
      : a(a), seq(seq), begin(begin), panels((end - begin) * a.group) {
    int len = a.batch.cu_q_lens[seq + 1] - a.batch.cu_q_lens[seq];
    first_position = a.batch.context_lens[seq] - len + begin;
    keys = {a.batch.block_tables + seq * a.batch.table_row, head, first_key(0) / kKeys * kKeys,
            first_position + end - begin};
  }

  // Before `run` and `see`.
  void prepare() {
    carve();
    load_queries();
  }

  void carve() {
    long bytes[] = {panels.rows * a.query_row * long(sizeof(Act)),
                    kTileRows * kSlab * long(sizeof(Act)),
                    KeyTile<Kind>::buffer_bytes(a),
                    KeyTile<Kind>::buffer_bytes(a),
                    kTileRows * kKeys * 4L,
                    2 * State::size(panels.rows, a.padded) * 4};
    constexpr int kParts = sizeof bytes / sizeof *bytes;
    char* parts[kParts];
    long offset = 0;
    for (long& size : bytes) offset += size = (size + 63) / 64 * 64;
    char* next = static_cast<char*>(scratch(Slot::kTile, offset));
    for (int i = 0; i < kParts; next += bytes[i++]) parts[i] = next;
    queries = reinterpret_cast<Act*>(parts[0]);
    weights = reinterpret_cast<Act*>(parts[1]);
    buffers[0] = parts[2];
    buffers[1] = parts[3];
    scores = reinterpret_cast<float*>(parts[4]);
    seen = reinterpret_cast<float*>(parts[5]);
  }

  long position(long row) const { return first_position + row / a.group; }
  long first_key(long row) const {
    return a.window > 0 ? std::max(0L, position(row) - a.window + 1) : 0;
  }
  // The query (or output) of a row begins at this many elements, tokens `stride` apart.
  long row_offset(long row, long stride) const {
    long token = a.batch.cu_q_lens[seq] + begin + row / a.group;
    return token * stride + (keys.head * a.group + row % a.group) * a.cache.dim;
  }

  void load_queries() {
    for (long p = 0; p < panels.count; p++) {
      long first = panels.first(p);
      for (int r = 0; r < panels.size(p); r++) {
        pack_row<Kind>(a.q + row_offset(first + r, a.q_row), a.cache.dim, r, panels.size(p),
                       queries + first * a.query_row);
      }
    }
  }

  long first_span() const { return first_key(0) / kSpan; }
  long end_span() const { return (keys.end + kSpan - 1) / kSpan; }

  // `later`: keys that this thread will probably need after those of this unit.
  void run(const Keys* later) {
    State state(seen, panels.rows, a.padded);
    State part(seen + State::size(panels.rows, a.padded), panels.rows, a.padded);
    see(first_span(), state, later);
    for (long span = first_span() + 1; span < end_span(); span++) {
      see(span, part, later);
      state.merge(part);
    }
    finish(state);
  }

  // All rows over the keys of one span that any of them sees.
  void see(long span, State state, const Keys* later) {
    long limit = std::min(keys.end, (span + 1) * kSpan);
    KeyTile<Kind> tile, next;
    state.clear();
    for (long key = std::max(keys.first, span * kSpan); key < limit; key += kKeys) {
      tile.locate(a, keys, key, limit, buffers[0]);
      bool is_fetching = locate_next(key, limit, later, next);
      for (long p = 0; p < panels.count; p++) {
        if (position(panels.first(p + 1) - 1) < key) continue;
        attend(p, key, tile, is_fetching ? &next : nullptr, state);
        is_fetching = false;
      }
    }
  }

  // What to fetch during the tile at `key`. Many rows work long on a tile: the next one. A few are
  // faster than memory, which needs a longer notice: the same tile of later keys.
  bool locate_next(long key, long limit, const Keys* later, KeyTile<Kind>& next) {
    if (panels.count > 1) later = nullptr;
    const Keys& of = later ? *later : keys;
    key = later ? key - keys.first + later->first : key + kKeys;
    limit = later ? later->end : limit;
    if (key >= limit || !KeyTile<Kind>::is_in_cache(a.cache)) return false;
    next.locate(a, of, key, limit, buffers[1]);
    return true;
  }

  // One panel over one tile, while the next tile is fetched unless that is null.
  void attend(long p, long key, const KeyTile<Kind>& tile, const KeyTile<Kind>* next, State state) {
    int rows = panels.size(p);
    long first = panels.first(p);
    Product<Kind, Scattered> product{queries + first * a.query_row, tile.keys,
                                     num_steps<Kind>(a.cache.dim), scores, kKeys, true};
    if (next) {
      product.weights.lines = kTileVectors;
      std::copy_n(next->keys.base, kTileVectors, product.weights.ahead);
    }
    tile_rows<Kind, kTileVectors>(rows, product);
    for (int r = 0; r < rows; r++) soften(first + r, key, r, state);
    Act* weight = weights;
    for (int i = 0; i < tile.num_segments; i++) {
      const char* ahead = next && i < next->num_segments ? next->values[i].base : nullptr;
      add_values(rows, tile.values[i], weight, ahead, state.sums + first * a.padded);
      weight += tile.values[i].steps;
    }
  }

  void add_values(int rows, const typename KeyTile<Kind>::Segment& segment, const Act* weight,
                  const char* ahead, float* sums) {
    Adjacent<Kind> values{segment.base, a.vectors * Kind::kBytes, ahead, 0, a.vectors * Kind::kBytes};
    Product<Kind> product{weight, values, segment.steps, sums, a.padded, false};
    product.weights.lines = ahead ? kTileVectors : 0;
    long vector = 0;
    for (; vector + kTileVectors <= a.vectors; vector += kTileVectors) {
      tile_rows<Kind, kTileVectors>(rows, product);
      product.weights.base += kTileVectors * Kind::kBytes;
      product.weights.ahead += kTileVectors * Kind::kBytes;
      product.out += kKeys;
    }
    product.weights.lines = 0;
    for (; vector < a.vectors; vector++) {
      tile_rows<Kind, 1>(rows, product);
      product.weights.base += Kind::kBytes;
      product.out += kLanes;
    }
  }

  // Scores of row r of the panel -> e^(score - highest); rescales what the row had summed before.
  void soften(long row, long key, int r, State state) {
    const float* score = scores + r * kKeys;
    Act* weight = weights + r * kSlab;
    long last = position(row) - key, first = first_key(row) - key;
    bool all = first <= 0 && last >= kKeys - 1;
    Vec s[kTileVectors];
    Vec tops = splat(kLowest);
    for (int v = 0; v < kTileVectors; v++) {
      s[v] = load(score + v * kLanes) * splat(a.scale);
      if (!all) s[v] = masked(s[v], first - v * kLanes, last - v * kLanes);
      tops = max(s[v], tops);
    }
    float before = state.highest[row], top = std::max(before, largest(tops));
    if (top > before) {
      state.scale(row, exp(splat(before - top))[0]);
      state.highest[row] = top;
    }
    Vec tile_total{};
    for (int v = 0; v < kTileVectors; v++) {
      Vec e = exp(s[v] - splat(top));
      tile_total += e;
      store_weight(weight, v * kLanes, e);
    }
    state.total[row] += sum(tile_total);
  }

  static void store_weight(float* weight, int i, Vec e) { store(weight + i, e); }
  static void store_weight(uint32_t* weight, int i, Vec e) {
    store(reinterpret_cast<Bf16*>(weight) + i, e);
  }

  // Scores outside [first, last] become -inf.
  static Vec masked(Vec score, long first, long last) {
    VecInt lane;
    for (int i = 0; i < kLanes; i++) lane[i] = i;
    VecInt seen = (lane >= static_cast<int>(std::max(first, 0L))) &
                  (lane <= static_cast<int>(std::clamp(last, -1L, long(kLanes))));
    return seen ? score : splat(-INFINITY);
  }

  void finish(State state) {
    for (long row = 0; row < panels.rows; row++) {
      Element* to = a.out + row_offset(row, a.num_heads * a.cache.dim);
      Vec inverse = splat(1.0f / state.total[row]);
      for (long d = 0; d < a.cache.dim; d += kLanes) {
        int count = static_cast<int>(std::min<long>(kLanes, a.cache.dim - d));
        store_part(to + d, load(state.sums + row * a.padded + d) * inverse, count);
      }
    }
  }
};

}  // namespace nanovllm
