// Linear layers over packed weights, and the rows of a packed weight as embeddings.
#include <algorithm>
#include <vector>

#include "memory.h"
#include "pack.h"
#include "pool.h"

namespace nanovllm {
namespace {

constexpr long kRowsPerChunk = 256;       // whose sums stay in a second-level cache
constexpr long kSmallWork = 1 << 18;      // multiply-adds that a second thread would not hasten
constexpr long kGroup = kTileVectors * kLanes;  // columns of a tile

struct Packed {
  char* data;
  Region* region;
  long n, k;
  int dtype;

  long num_vectors() const { return (n + kLanes - 1) / kLanes; }
  long num_groups() const { return (num_vectors() + kTileVectors - 1) / kTileVectors; }
};

// Vectors [first, first + count) of a packed weight.
template <class Kind>
struct Group {
  long first, count;
  Adjacent<Kind> weights;

  Group(const Packed& w, long group)
      : first(group * kTileVectors),
        count(std::min<long>(kTileVectors, w.num_vectors() - first)),
        weights{w.data + first * num_steps<Kind>(w.k) * Kind::kBytes, count * Kind::kBytes} {}
};

template <class Kind>
Packed* pack(const typename Kind::Element* weight, long n, long k, int dtype) {
  Packed shape{nullptr, nullptr, n, k, dtype};
  long bytes = shape.num_vectors() * num_steps<Kind>(k) * Kind::kBytes;
  shape.data = allocate_weight(bytes, &shape.region);
  if (shape.data == nullptr) return nullptr;
  std::vector<typename Kind::Element> zeros(k);
  parallel_for(static_cast<int>(shape.num_groups()), [&](int g) {
    Group<Kind> group(shape, g);
    for (long v = 0; v < group.count; v++) {
      const typename Kind::Element* columns[kLanes];
      for (int j = 0; j < kLanes; j++) {
        long column = (group.first + v) * kLanes + j;
        columns[j] = column < n ? weight + column * k : zeros.data();
      }
      char* out = const_cast<char*>(group.weights.vector(v));
      pack_columns<Kind>(columns, k, out, group.weights.step);
    }
  });
  return new Packed(shape);
}

template <class Kind>
struct Linear {
  using Element = typename Kind::Element;
  using Act = typename Kind::Act;

  const Packed& w;
  const Element* x;
  long x_row;
  const Element* bias;  // may be null
  Element* out;
  Panels panels;
  long steps = num_steps<Kind>(w.k);
  long act_row = panel_row<Kind>(w.k);
  Act* act = nullptr;

  void run() {
    act = static_cast<Act*>(scratch(Slot::kActivations, panels.rows * act_row * sizeof(Act)));
    long work = panels.rows * w.n * w.k;
    pack_activations(work);
    long groups = w.num_groups();
    long row_chunks = (panels.rows + kRowsPerChunk - 1) / kRowsPerChunk;
    long per_chunk = groups_per_chunk(groups, row_chunks, work);
    long column_chunks = (groups + per_chunk - 1) / per_chunk;
    parallel_for(static_cast<int>(row_chunks * column_chunks), [&](int chunk) {
      long rows = chunk % row_chunks, first = chunk / row_chunks * per_chunk;
      long panel = panels.count * rows / row_chunks;
      long panel_end = panels.count * (rows + 1) / row_chunks;
      for (long g = first; g < std::min(first + per_chunk, groups); g++) {
        multiply(g, panel, panel_end);
      }
    });
  }

  static long groups_per_chunk(long groups, long row_chunks, long work) {
    if (work < kSmallWork) return groups;
    return std::max(1L, groups * row_chunks / (16L * num_threads()));
  }

  void pack_activations(long work) {
    auto pack = [&](int p) {
      long first = panels.first(p);
      int rows = panels.size(p);
      for (int r = 0; r < rows; r++) {
        pack_row<Kind>(x + (first + r) * x_row, w.k, r, rows, act + first * act_row);
      }
    };
    if (panels.count >= 8 && work >= kSmallWork) {
      parallel_for(static_cast<int>(panels.count), pack);
    } else {
      for (int p = 0; p < panels.count; p++) pack(p);
    }
  }

  // The columns of one group for panels [begin, end): slab after slab of weights, so that every
  // panel meets a slab while it is in the first-level cache.
  void multiply(long g, long begin, long end) {
    Group<Kind> group(w, g);
    long first_row = panels.first(begin);
    float* sums = static_cast<float*>(
        scratch(Slot::kTile, (panels.first(end) - first_row) * kGroup * sizeof(float)));
    long slab = end - begin > 1 ? kSlab : steps;
    for (long step = 0; step < steps; step += slab) {
      for (long p = begin; p < end; p++) {
        int rows = panels.size(p);
        fetch_ahead(group.weights, rows, p - begin, end - begin);
        multiply_panel(group, rows,
                       {act + panels.first(p) * act_row + step * rows, group.weights,
                        std::min(slab, steps - step), sums + (panels.first(p) - first_row) * kGroup,
                        kGroup, step == 0});
      }
      group.weights.base += slab * group.weights.step;
    }
    for (long row = first_row; row < panels.first(end); row++) {
      finish(g, sums + (row - first_row) * kGroup, out + row * w.n);
    }
  }

  // While a slab is used, its panels share the fetching of the next one into the second-level
  // cache; a single panel never stops and fetches what it needs a little later (the more rows,
  // the fewer steps does the processor look ahead by itself). Distances by measurement.
  static void fetch_ahead(Adjacent<Kind>& weights, int rows, long panel, long num_panels) {
    weights.lines = num_panels == 1 ? 4 : num_panels < 4 ? 2 : 1;
    weights.ahead_step = weights.lines * 64;
    if (num_panels == 1) {
      weights.ahead = weights.base + (rows <= 3 ? 4096 : 8192);
    } else if (panel * weights.lines < 4) {
      weights.ahead = weights.base + kSlab * (weights.step + panel * weights.ahead_step);
    } else {
      weights.lines = 0;
    }
  }

  static void multiply_panel(const Group<Kind>& group, int rows, Product<Kind> product) {
    if (group.count == kTileVectors) return tile_rows<Kind, kTileVectors>(rows, product);
    for (long v = 0; v < group.count; v++) {
      tile_rows<Kind, 1>(rows, product);
      product.weights.base += Kind::kBytes;
      product.out += kLanes;
    }
  }

  void finish(long group, const float* sums, Element* out_row) {
    for (int v = 0; v < kTileVectors; v++) {
      long column = group * kGroup + v * kLanes;
      int count = static_cast<int>(std::min<long>(kLanes, w.n - column));
      if (count <= 0) return;
      Vec y = load(sums + v * kLanes);
      if (count == kLanes) {
        store(out_row + column, bias ? y + load(bias + column) : y);
      } else {
        store_part(out_row + column, bias ? y + load_part(bias + column, count) : y, count);
      }
    }
  }
};

template <class Kind>
void embedding(const Packed& w, const int64_t* ids, long count, typename Kind::Element* out) {
  using Element = typename Kind::Element;
  for (long i = 0; i < count; i++, out += w.k) {
    Group<Kind> group(w, ids[i] / kGroup);
    const char* row = group.weights.base + ids[i] % kGroup * Kind::kDepth * sizeof(Element);
    for (long k = 0; k < w.k; k += Kind::kDepth, row += group.weights.step) {
      std::memcpy(out + k, row, std::min<long>(Kind::kDepth, w.k - k) * sizeof(Element));
    }
  }
}

}  // namespace

extern "C" {

void* nanovllm_pack(const void* weight, long n, long k, int dtype) {
  Packed* packed = nullptr;
  with_element(dtype, [&](auto zero) {
    using Element = decltype(zero);
    using Kind = typename KindFor<Element>::Type;
    packed = pack<Kind>(static_cast<const Element*>(weight), n, k, dtype);
  });
  return packed;
}

void nanovllm_free(void* packed) {
  Packed* w = static_cast<Packed*>(packed);
  free_weight(w->region);
  delete w;
}

// Returns 0, or 1 where memory ran out.
int nanovllm_linear(const void* packed, const void* x, long x_row, long m, const void* bias,
                    void* out) {
  const Packed& w = *static_cast<const Packed*>(packed);
  return unless_out_of_memory(1, [&] {
    with_element(w.dtype, [&](auto zero) {
      using Element = decltype(zero);
      using Kind = typename KindFor<Element>::Type;
      Linear<Kind>{w, static_cast<const Element*>(x), x_row, static_cast<const Element*>(bias),
                   static_cast<Element*>(out), Panels(m)}
          .run();
    });
    return 0;
  });
}

// Returns the index of the first id that is no row of the weight, or -1 when all went well.
long nanovllm_embedding(const void* packed, const int64_t* ids, long count, void* out) {
  const Packed& w = *static_cast<const Packed*>(packed);
  long bad = first_outside(ids, count, w.n);
  if (bad >= 0) return bad;
  with_element(w.dtype, [&](auto zero) {
    using Element = decltype(zero);
    using Kind = typename KindFor<Element>::Type;
    embedding<Kind>(w, ids, count, static_cast<Element*>(out));
  });
  return -1;
}
}

}  // namespace nanovllm
