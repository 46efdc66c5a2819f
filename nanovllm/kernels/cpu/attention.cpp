// Paged causal attention and the writes into its cache: how the work is cut and shared out.
#include <algorithm>
#include <vector>

#include "attention_unit.h"
#include "operators.h"

namespace nanovllm {
namespace {

constexpr int kUnitRows = 192;            // rows (token, query head) that share a tile of keys
constexpr long kSmallWork = 1 << 16;      // multiply-adds not worth a second thread
constexpr long kTokensPerChunk = 8;       // of writes into the cache

// Keys and values of new tokens, rows of [head][dim]; k is null if they are in the cache already.
template <class Element>
struct NewTokens {
  const Element* k;
  long k_row;
  const Element* v;
  long v_row;
};

template <class Kind>
void store_head(const Cache& cache, long slot, long head, const typename Kind::Element* k,
                const typename Kind::Element* v) {
  using Element = typename Kind::Element;
  constexpr int kDepth = Kind::kDepth;
  Element* data = static_cast<Element*>(cache.data);
  long block = slot / cache.block_size, offset = slot % cache.block_size;
  Element* keys = data + cache.keys(block, head) + offset * kDepth;
  for (long d = 0; d < cache.dim; d += kDepth, keys += cache.block_size * kDepth) {
    std::memcpy(keys, k + d, kDepth * sizeof(Element));
  }
  Element* values = data + cache.values(block, head) + offset / kDepth * kDepth * cache.dim;
  for (long d = 0; d < cache.dim; d++) values[d * kDepth + offset % kDepth] = v[d];
}

// Tokens [begin, end) of the batch.
template <class Kind>
void store_tokens(const Cache& cache, const Batch& batch,
                  const NewTokens<typename Kind::Element>& from, long head, long begin, long end) {
  for (long t = begin; t < end; t++) {
    store_head<Kind>(cache, batch.slots[t], head, from.k + t * from.k_row + head * cache.dim,
                     from.v + t * from.v_row + head * cache.dim);
  }
}

template <class Kind>
void store_all(const Cache& cache, const Batch& batch,
               const NewTokens<typename Kind::Element>& from) {
  long chunks = (batch.num_tokens + kTokensPerChunk - 1) / kTokensPerChunk;
  parallel_for(static_cast<int>(chunks), [&](int chunk) {
    long begin = chunk * kTokensPerChunk, end = std::min(batch.num_tokens, begin + kTokensPerChunk);
    for (long head = 0; head < cache.num_heads; head++) {
      store_tokens<Kind>(cache, batch, from, head, begin, end);
    }
  });
}

// Where there are too few units for the threads, spans are work units of their own.
template <class Kind>
struct Attention {
  struct Part {
    int seq, begin, end;  // query tokens [begin, end) of the sequence
  };

  Queries<Kind> a;
  NewTokens<typename Kind::Element> fresh;
  std::vector<Part> parts = {};
  long most_spans = 1;

  void run() {
    long work = cut();
    int count = static_cast<int>(parts.size() * a.cache.num_heads);
    bool by_spans = work >= kSmallWork && count < 2 * num_threads() && most_spans > 1;
    // The unit of a single token stores it itself, into lines that it has had fetched: no other
    // sequence of the step reads them (engine/plan.py). Longer ones may be read by another.
    bool stores = fresh.k && !by_spans && a.batch.num_tokens == a.batch.num_seqs;
    if (fresh.k && !stores) store_all<Kind>(a.cache, a.batch, fresh);
    if (by_spans) return run_spans(count);
    auto attend = [&](int i) {
      Unit<Kind> now = unit(i);
      if (stores) {
        const int32_t* tokens = a.batch.cu_q_lens + now.seq;
        store_tokens<Kind>(a.cache, a.batch, fresh, now.keys.head, tokens[0], tokens[1]);
      }
      now.prepare();
      int next = i + num_threads();
      if (next >= count) return now.run(nullptr);
      Unit<Kind> later = unit(next);
      now.run(&later.keys);
    };
    if (work < kSmallWork) {
      for (int i = 0; i < count; i++) attend(i);
    } else {
      parallel_for(count, attend);
    }
  }

  Unit<Kind> unit(long i) const {
    const Part& part = parts[i / a.cache.num_heads];
    return {a, part.seq, part.begin, part.end, i % a.cache.num_heads};
  }

  // Returns the number of multiply-adds, roughly.
  long cut() {
    long work = 0, tokens = std::max(1L, kUnitRows / a.group);
    for (int seq = 0; seq < a.batch.num_seqs; seq++) {
      int len = a.batch.cu_q_lens[seq + 1] - a.batch.cu_q_lens[seq];
      for (long end = len; end > 0; end -= tokens) {
        parts.push_back({seq, static_cast<int>(std::max(0L, end - tokens)), static_cast<int>(end)});
      }
      most_spans = std::max(most_spans, (a.batch.context_lens[seq] + kSpan - 1) / kSpan);
      work += static_cast<long>(len) * a.batch.context_lens[seq] * a.num_heads * a.cache.dim;
    }
    return work;
  }

  // Every span of every unit by itself, then the merging.
  void run_spans(int count) {
    long rows = 0;
    for (const Part& part : parts) rows = std::max(rows, (part.end - part.begin) * a.group);
    long size = State::size(rows, a.padded);
    long bytes = count * most_spans * size * sizeof(float);
    float* memory = static_cast<float*>(scratch(Slot::kActivations, bytes));
    parallel_for(static_cast<int>(count * most_spans), [&](int i) {
      Unit<Kind> u = unit(i / most_spans);
      u.prepare();
      u.see(i % most_spans, State(memory + i * size, u.panels.rows, a.padded), nullptr);
    });
    for (int i = 0; i < count; i++) {
      Unit<Kind> u = unit(i);
      auto part = [&](long span) {
        return State(memory + (i * most_spans + span) * size, u.panels.rows, a.padded);
      };
      State state = part(u.first_span());
      for (long span = u.first_span() + 1; span < u.end_span(); span++) state.merge(part(span));
      u.finish(state);
    }
  }
};

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
  long bad = first_outside(batch->slots, batch->num_tokens, cache->num_slots());
  if (bad >= 0) return bad;
  with_element(cache->dtype, [&](auto zero) {
    using Element = decltype(zero);
    store_all<typename KindFor<Element>::Type>(
        *cache, *batch, {static_cast<const Element*>(k), k_row, static_cast<const Element*>(v),
                         v_row});
  });
  return -1;
}

// Stores k and v unless k is null, then attends. Returns -1 when all went well, the first sequence
// with a block outside the cache, -2 - t for a token t whose slot is, or kNoMemory.
long nanovllm_attention(const Cache* cache, const Batch* batch, const void* q, long q_row,
                        const void* k, long k_row, const void* v, long v_row, long num_heads,
                        float scale, long window, void* out) {
  long bad = first_bad_sequence(*cache, *batch);
  if (bad >= 0) return bad;
  bad = k ? first_outside(batch->slots, batch->num_tokens, cache->num_slots()) : -1;
  if (bad >= 0) return -2 - bad;
  return unless_out_of_memory(kNoMemory, [&] {
    with_element(cache->dtype, [&](auto zero) {
      using Element = decltype(zero);
      using Kind = typename KindFor<Element>::Type;
      Attention<Kind>{
          {*cache, *batch, static_cast<const Element*>(q), q_row, num_heads, scale, window,
           static_cast<Element*>(out)},
          {static_cast<const Element*>(k), k_row, static_cast<const Element*>(v), v_row}}
          .run();
    });
    return -1L;
  });
}
}

}  // namespace nanovllm
