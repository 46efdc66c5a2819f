// Linear layers over packed weights, and the rows of a packed weight as embeddings.
#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <vector>

#include "pack.h"
#include "pool.h"

namespace nanovllm {
namespace {

constexpr long kHugePage = 2 << 20;
constexpr long kRowsPerChunk = 256;       // whose sums stay in a second-level cache
constexpr long kSmallWork = 1 << 18;      // multiply-adds that a second thread would not hasten
constexpr long kGroup = kTileVectors * kLanes;  // columns of a tile

struct Packed {
  char* data;
  long n, k;
  int dtype;

  long num_blocks() const { return (n + kLanes - 1) / kLanes; }
};

template <class Kind>
long block_bytes(const Packed& w) {
  return num_steps<Kind>(w.k) * Kind::kBytes;
}

char* allocate(long bytes) {
  bool huge = bytes >= 2 * kHugePage;
  long unit = huge ? kHugePage : 64;
  bytes = (bytes + unit - 1) / unit * unit;
  void* memory = nullptr;
  if (posix_memalign(&memory, unit, bytes) != 0) return nullptr;
#if defined(MADV_HUGEPAGE)
  if (huge) madvise(memory, bytes, MADV_HUGEPAGE);
#endif
  return static_cast<char*>(memory);
}

template <class Kind>
Packed* pack(const typename Kind::Element* weight, long n, long k, int dtype) {
  Packed shape{nullptr, n, k, dtype};
  shape.data = allocate(shape.num_blocks() * block_bytes<Kind>(shape));
  if (shape.data == nullptr) return nullptr;
  std::vector<typename Kind::Element> zeros(k);
  parallel_for(static_cast<int>(shape.num_blocks()), [&](int block) {
    const typename Kind::Element* columns[kLanes];
    for (int j = 0; j < kLanes; j++) {
      long column = block * kLanes + j;
      columns[j] = column < n ? weight + column * k : zeros.data();
    }
    pack_block<Kind>(columns, k, shape.data + block * block_bytes<Kind>(shape));
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
    long groups = (w.num_blocks() + kTileVectors - 1) / kTileVectors;
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
  void multiply(long group, long begin, long end) {
    long first_row = panels.first(begin);
    float* sums = static_cast<float*>(
        scratch(Slot::kTile, (panels.first(end) - first_row) * kGroup * sizeof(float)));
    long slab = end - begin > 1 ? kSlab : steps;
    for (long step = 0; step < steps; step += slab) {
      long count = std::min(slab, steps - step);
      for (long p = begin; p < end; p++) {
        float* out_rows = sums + (panels.first(p) - first_row) * kGroup;
        multiply_panel(group, p, step, count, out_rows);
      }
    }
    for (long row = first_row; row < panels.first(end); row++) {
      finish(group, sums + (row - first_row) * kGroup, out + row * w.n);
    }
  }

  void multiply_panel(long group, long p, long step, long count, float* sums) {
    int rows = panels.size(p);
    long block = group * kTileVectors, bytes = block_bytes<Kind>(w);
    const char* weights = w.data + block * bytes + step * Kind::kBytes;
    Product<Kind> product{act + panels.first(p) * act_row + step * rows,
                          {weights, Kind::kBytes, bytes},
                          count,
                          sums,
                          kGroup,
                          step == 0};
    if (block + kTileVectors <= w.num_blocks()) return tile_rows<Kind, kTileVectors>(rows, product);
    for (; block < w.num_blocks(); block++) {
      tile_rows<Kind, 1>(rows, product);
      product.weights.base += bytes;
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
  for (long i = 0; i < count; i++, out += w.k) {
    long block = ids[i] / kLanes, lane = ids[i] % kLanes;
    const char* data = w.data + block * block_bytes<Kind>(w);
    auto* column = reinterpret_cast<const typename Kind::Element*>(data) + lane * Kind::kDepth;
    for (long k = 0; k < w.k; k++) {
      out[k] = column[k / Kind::kDepth * kLanes * Kind::kDepth + k % Kind::kDepth];
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
  std::free(w->data);
  delete w;
}

void nanovllm_linear(const void* packed, const void* x, long x_row, long m, const void* bias,
                     void* out) {
  const Packed& w = *static_cast<const Packed*>(packed);
  with_element(w.dtype, [&](auto zero) {
    using Element = decltype(zero);
    using Kind = typename KindFor<Element>::Type;
    Linear<Kind>{w, static_cast<const Element*>(x), x_row, static_cast<const Element*>(bias),
                 static_cast<Element*>(out), Panels(m)}
        .run();
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
