// Paged causal attention and the writes into its cache.
//
// A work unit is some query tokens of one sequence with all query heads of one KV head. It walks
// the keys in tiles of kKeys with a running maximum and sum per row (online softmax: Milakov and
// Gimelshein, arXiv:1805.02867), anew in every span of kSpan keys; the spans of a row are merged in
// their order. Where there are too few units for the threads, spans are work units of their own.
// Tiles and spans lie at fixed positions, and one without a visible key changes nothing, so a
// query's result depends on its context alone.
#include <algorithm>
#include <vector>

#include "attention.h"
#include "pack.h"
#include "pool.h"

namespace nanovllm {
namespace {

constexpr int kKeys = kTileVectors * kLanes;  // keys of a tile
constexpr long kSpan = 512;                   // keys; a multiple of kKeys
constexpr int kUnitRows = 192;                // rows (token, query head) that share packed keys
constexpr long kSmallWork = 1 << 16;          // multiply-adds not worth a second thread

template <class Kind>
struct Attention {
  using Element = typename Kind::Element;
  using Act = typename Kind::Act;

  Cache cache;
  Batch batch;
  const Element* q;
  long q_row;
  long num_heads;
  float scale;
  long window;  // 0: all of the context
  Element* out;

  struct Tile;
  struct Unit {
    int seq, begin, end;  // query tokens [begin, end) of the sequence
  };

  long group = num_heads / cache.num_heads;
  long vectors = (cache.dim + kLanes - 1) / kLanes;
  long padded = vectors * kLanes;
  long query_row = panel_row<Kind>(cache.dim);
  std::vector<Unit> units = {};
  long most_spans = 1;

  void run() {
    long work = make_units();
    int count = static_cast<int>(units.size() * cache.num_heads);
    auto attend = [&](int i) { tile(i).run(); };
    if (work < kSmallWork) {
      for (int i = 0; i < count; i++) attend(i);
    } else if (count < 2 * num_threads() && most_spans > 1) {
      run_spans(count);
    } else {
      parallel_for(count, attend);
    }
  }

  Tile tile(int i) const { return Tile(*this, units[i / cache.num_heads], i % cache.num_heads); }

  // Returns the number of multiply-adds, roughly.
  long make_units() {
    long work = 0, tokens = std::max(1L, kUnitRows / group);
    for (int seq = 0; seq < batch.num_seqs; seq++) {
      int len = batch.cu_q_lens[seq + 1] - batch.cu_q_lens[seq];
      for (long end = len; end > 0; end -= tokens) {
        units.push_back({seq, static_cast<int>(std::max(0L, end - tokens)), static_cast<int>(end)});
      }
      most_spans = std::max(most_spans, (batch.context_lens[seq] + kSpan - 1) / kSpan);
      work += static_cast<long>(len) * batch.context_lens[seq] * num_heads * cache.dim;
    }
    return work;
  }

  // Every span of every unit by itself, then the merging.
  void run_spans(int count) {
    long rows = 0;
    for (const Unit& unit : units) rows = std::max(rows, (unit.end - unit.begin) * group);
    long size = State::size(rows, padded);
    long bytes = count * most_spans * size * sizeof(float);
    float* memory = static_cast<float*>(scratch(Slot::kActivations, bytes));
    parallel_for(static_cast<int>(count * most_spans), [&](int i) {
      Tile t = tile(i / most_spans);
      t.see(i % most_spans, State(memory + i * size, t.panels.rows, padded));
    });
    for (int i = 0; i < count; i++) {
      Tile t = tile(i);
      auto part = [&](long span) {
        return State(memory + (i * most_spans + span) * size, t.panels.rows, padded);
      };
      State state = part(t.first_span());
      for (long span = t.first_span() + 1; span < t.end_span(); span++) state.merge(part(span));
      t.finish(state);
    }
  }

  alignas(64) static constexpr Element zeros[256] = {};

  // One unit for one KV head. Row r is token begin + r / group, query head r % group of the group.
  struct Tile {
    const Attention& a;
    Unit unit;
    long head;
    long first_position;
    Panels panels;
    Act* queries;
    Act* weights;  // of the softmax, one panel
    char* keys;
    char* values;
    float* scores;  // one panel
    float* seen;    // two States
    long end;       // of the keys that its last row sees

    Tile(const Attention& a, Unit unit, long head)
        : a(a), unit(unit), head(head), panels((unit.end - unit.begin) * a.group) {
      int len = a.batch.cu_q_lens[unit.seq + 1] - a.batch.cu_q_lens[unit.seq];
      first_position = a.batch.context_lens[unit.seq] - len + unit.begin;
      end = position(panels.rows - 1) + 1;
      carve();
      load_queries();
    }

    void carve() {
      long bytes[] = {panels.rows * a.query_row * long(sizeof(Act)),
                      kTileRows * kSlab * long(sizeof(Act)),
                      num_steps<Kind>(a.cache.dim) * kTileVectors * Kind::kBytes,
                      num_steps<Kind>(kKeys) * a.vectors * Kind::kBytes,
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
      keys = parts[2];
      values = parts[3];
      scores = reinterpret_cast<float*>(parts[4]);
      seen = reinterpret_cast<float*>(parts[5]);
    }

    long position(long row) const { return first_position + row / a.group; }
    long first_key(long row) const {
      return a.window > 0 ? std::max(0L, position(row) - a.window + 1) : 0;
    }
    // The query (or output) of a row begins at this many elements, tokens `stride` apart.
    long row_offset(long row, long stride) const {
      long token = a.batch.cu_q_lens[unit.seq] + unit.begin + row / a.group;
      return token * stride + (head * a.group + row % a.group) * a.cache.dim;
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
    long end_span() const { return (end + kSpan - 1) / kSpan; }

    void run() {
      State state(seen, panels.rows, a.padded);
      State part(seen + State::size(panels.rows, a.padded), panels.rows, a.padded);
      see(first_span(), state);
      for (long span = first_span() + 1; span < end_span(); span++) {
        see(span, part);
        state.merge(part);
      }
      finish(state);
    }

    // All rows over the keys of one span that any of them sees.
    void see(long span, State state) {
      const Element* rows[2][kKeys];
      long key = std::max(first_key(0) / kKeys * kKeys, span * kSpan);
      long span_end = std::min(end, (span + 1) * kSpan);
      state.clear();
      locate(key, span_end, rows[0]);
      for (int now = 0; key < span_end; key += kKeys, now = 1 - now) {
        locate(key + kKeys, span_end, rows[1 - now]);
        pack_tile(rows[now], rows[1 - now]);
        for (long p = 0; p < panels.count; p++) {
          if (position(panels.first(p + 1) - 1) >= key) attend(p, key, state);
        }
      }
    }

    // Where the keys [key, key + kKeys) lie; `zeros` from `limit` on: slots there may hold anything.
    void locate(long key, long limit, const Element** rows) const {
      const Element* base = static_cast<const Element*>(a.cache.data);
      const int32_t* block = a.batch.block_tables + unit.seq * a.batch.table_row;
      block += key / a.cache.block_size;
      long offset = key % a.cache.block_size;
      for (int i = 0; i < kKeys; i++) {
        rows[i] = key + i < limit ? base + a.cache.slot(*block, head, offset) : zeros;
        if (++offset == a.cache.block_size) {
          offset = 0;
          block++;
        }
      }
    }

    const Element* value_of(const Element* key_row) const {
      return key_row == zeros ? zeros : key_row + a.cache.value_offset();
    }

    void fetch(const Element* row) const {
      const char* p = reinterpret_cast<const char*>(row);
      long bytes = a.cache.dim * sizeof(Element);
      for (long i = 0; i < bytes; i += 64) __builtin_prefetch(p + i, 0, 2);
    }

    // Packs the keys and values of one tile, and has those of the next one fetched meanwhile.
    void pack_tile(const Element* const* rows, const Element* const* next_rows) {
      for (int i = 0; i < kTileVectors; i++) {
        for (int j = 0; j < kLanes; j++) fetch(next_rows[i * kLanes + j]);
        pack_columns<Kind>(rows + i * kLanes, a.cache.dim, keys + i * Kind::kBytes,
                           kTileVectors * Kind::kBytes);
      }
      for (long i = 0; i < kKeys; i += Kind::kDepth) {
        const Element* v[Kind::kDepth];
        for (int d = 0; d < Kind::kDepth; d++) {
          fetch(value_of(next_rows[i + d]));
          v[d] = value_of(rows[i + d]);
        }
        pack_rows<Kind>(v, a.cache.dim, values + i / Kind::kDepth * a.vectors * Kind::kBytes);
      }
    }

    void attend(long p, long key, State state) {
      int rows = panels.size(p);
      long first = panels.first(p);
      tile_rows<Kind, kTileVectors>(rows, {queries + first * a.query_row,
                                           {keys, kTileVectors * Kind::kBytes, Kind::kBytes},
                                           num_steps<Kind>(a.cache.dim), scores, kKeys, true});
      for (int r = 0; r < rows; r++) soften(first + r, key, r, state);
      long step = a.vectors * Kind::kBytes;
      Product<Kind> product{weights, {values, step, Kind::kBytes}, num_steps<Kind>(kKeys),
                            state.sums + first * a.padded, a.padded, false};
      long vector = 0;
      for (; vector + kTileVectors <= a.vectors; vector += kTileVectors) {
        tile_rows<Kind, kTileVectors>(rows, product);
        product.weights.base += kTileVectors * Kind::kBytes;
        product.out += kKeys;
      }
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
      Vec s[kTileVectors];
      Vec tops = splat(kLowest);
      for (int v = 0; v < kTileVectors; v++) {
        s[v] = masked(row, key + v * kLanes, load(score + v * kLanes) * splat(a.scale));
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

    Vec masked(long row, long key, Vec score) const {
      long last = position(row), first = first_key(row);
      if (key >= first && key + kLanes - 1 <= last) return score;
      VecInt lane;
      for (int i = 0; i < kLanes; i++) lane[i] = i;
      VecInt seen = (lane >= static_cast<int>(std::max(first - key, 0L))) &
                    (lane <= static_cast<int>(std::clamp(last - key, -1L, long(kLanes))));
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
};

template <class Element>
void store_kv(const Cache& cache, const Batch& batch, const Element* k, long k_row,
              const Element* v, long v_row) {
  Element* base = static_cast<Element*>(cache.data);
  for (long t = 0; t < batch.num_tokens; t++) {
    long block = batch.slots[t] / cache.block_size, offset = batch.slots[t] % cache.block_size;
    for (long head = 0; head < cache.num_heads; head++) {
      Element* to = base + cache.slot(block, head, offset);
      std::memcpy(to, k + t * k_row + head * cache.dim, cache.dim * sizeof(Element));
      std::memcpy(to + cache.value_offset(), v + t * v_row + head * cache.dim,
                  cache.dim * sizeof(Element));
    }
  }
}

// The first sequence whose context names a block outside the cache, or -1.
long first_bad_sequence(const Cache& cache, const Batch& batch) {
  for (long seq = 0; seq < batch.num_seqs; seq++) {
    const int32_t* table = batch.block_tables + seq * batch.table_row;
    long count = (batch.context_lens[seq] + cache.block_size - 1) / cache.block_size;
    for (long i = 0; i < count; i++) {
      if (table[i] < 0 || table[i] >= cache.num_blocks) return seq;
    }
  }
  return -1;
}

}  // namespace

extern "C" {

// Returns the index of the first slot outside the cache, or -1 when all went well.
long nanovllm_store_kv(const Cache* cache, const Batch* batch, const void* k, long k_row,
                       const void* v, long v_row) {
  long num_slots = cache->num_blocks * cache->block_size;
  long bad = first_outside(batch->slots, batch->num_tokens, num_slots);
  if (bad >= 0) return bad;
  with_element(cache->dtype, [&](auto zero) {
    using Element = decltype(zero);
    store_kv(*cache, *batch, static_cast<const Element*>(k), k_row,
             static_cast<const Element*>(v), v_row);
  });
  return -1;
}

// Returns the first sequence with a block outside the cache, or -1 when all went well.
long nanovllm_attention(const Cache* cache, const Batch* batch, const void* q, long q_row,
                        long num_heads, float scale, long window, void* out) {
  long bad = first_bad_sequence(*cache, *batch);
  if (bad >= 0) return bad;
  with_element(cache->dtype, [&](auto zero) {
    using Element = decltype(zero);
    using Kind = typename KindFor<Element>::Type;
    Attention<Kind>{*cache, *batch, static_cast<const Element*>(q), q_row, num_heads, scale,
                    window, static_cast<Element*>(out)}
        .run();
  });
  return -1;
}
}

}  // namespace nanovllm
