// Operations on one row or head at a time: norms, rotary positions, the gated activation.
// Everything is computed in float32 and rounded when it is stored; a norm also rounds before it
// multiplies by its weight, as the models' reference implementations do.
#include <algorithm>

#include "pool.h"
#include "simd.h"

namespace nanovllm {
namespace {

constexpr long kChunkElements = 1 << 12;  // below this a second thread costs more than it saves

// Calls body(row) for all rows, in chunks of at least kChunkElements.
template <class Body>
void for_rows(long rows, long elements_per_row, const Body& body) {
  long per_chunk = std::max(1L, kChunkElements / std::max(1L, elements_per_row));
  int chunks = static_cast<int>((rows + per_chunk - 1) / per_chunk);
  parallel_for(chunks, [&](int chunk) {
    long end = std::min(rows, (chunk + 1) * per_chunk);
    for (long row = chunk * per_chunk; row < end; row++) body(row);
  });
}

// Calls body(i, count) for the vectors of a row of n elements; count < kLanes at its end.
template <class Body>
inline void for_vectors(long n, const Body& body) {
  long i = 0;
  for (; i + kLanes <= n; i += kLanes) body(i, kLanes);
  if (i < n) body(i, static_cast<int>(n - i));
}

template <class T>
Vec inverse_rms(const T* x, long n, float eps) {
  Vec squares{};
  for_vectors(n, [&](long i, int count) {
    Vec v = load_part(x + i, count);
    squares = fma(v, v, squares);
  });
  return splat(1.0f / std::sqrt(sum(squares) / n + eps));
}

template <class T>
void norm_row(const T* x, const T* weight, long n, float eps, T* out) {
  Vec inverse = inverse_rms(x, n, eps);
  for_vectors(n, [&](long i, int count) {
    Vec y = rounded<T>(load_part(x + i, count) * inverse);
    store_part(out + i, y * load_part(weight + i, count), count);
  });
}

template <class T>
void add_row(const T* x, long n, T* residual) {
  for_vectors(n, [&](long i, int count) {
    store_part(residual + i, load_part(residual + i, count) + load_part(x + i, count), count);
  });
}

// Rotates the pairs (i, i + dim / 2) of one head by the angles of its position.
template <class T>
void rope_head(T* head, long dim, const float* cos_sin) {
  long half = dim / 2;
  for_vectors(half, [&](long i, int count) {
    Vec a = load_part(head + i, count), b = load_part(head + half + i, count);
    Vec c = load_part(cos_sin + i, count), s = load_part(cos_sin + half + i, count);
    store_part(head + i, fma(a, c, Vec{} - b * s), count);
    store_part(head + half + i, fma(b, c, a * s), count);
  });
}

// The same after an RMS norm of the head.
template <class T>
void norm_rope_head(T* head, const T* weight, long dim, float eps, const float* cos_sin) {
  Vec inverse = inverse_rms(head, dim, eps);
  long half = dim / 2;
  for_vectors(half, [&](long i, int count) {
    Vec a = rounded<T>(load_part(head + i, count) * inverse);
    Vec b = rounded<T>(load_part(head + half + i, count) * inverse);
    a = rounded<T>(a * load_part(weight + i, count));
    b = rounded<T>(b * load_part(weight + half + i, count));
    Vec c = load_part(cos_sin + i, count), s = load_part(cos_sin + half + i, count);
    store_part(head + i, fma(a, c, Vec{} - b * s), count);
    store_part(head + half + i, fma(b, c, a * s), count);
  });
}

template <class T>
void silu_mul_row(const T* gate_up, long n, T* out) {
  for_vectors(n, [&](long i, int count) {
    Vec gate = load_part(gate_up + i, count);
    Vec bounded = max(gate, splat(-80.0f));  // e^80 is finite
    Vec sigmoid = 1.0f / (1.0f + exp(Vec{} - bounded));
    store_part(out + i, gate * sigmoid * load_part(gate_up + n + i, count), count);
  });
}

// Heads [tokens][heads][dim], tokens `row` elements apart.
struct Heads {
  void* data;
  long row;
  long num_heads;
  const void* norm;  // weight of an RMS norm over dim, or null
};

template <class T>
void rope_tokens(const Heads& heads, long token, long dim, float eps, const float* cos_sin) {
  T* head = static_cast<T*>(heads.data) + token * heads.row;
  for (long h = 0; h < heads.num_heads; h++, head += dim) {
    if (heads.norm == nullptr) {
      rope_head(head, dim, cos_sin);
    } else {
      norm_rope_head(head, static_cast<const T*>(heads.norm), dim, eps, cos_sin);
    }
  }
}

}  // namespace

extern "C" {

void nanovllm_rms_norm(int dtype, const void* x, long x_row, const void* weight, float eps,
                       long rows, long n, void* out) {
  with_element(dtype, [&](auto zero) {
    using T = decltype(zero);
    for_rows(rows, n, [&](long row) {
      norm_row(static_cast<const T*>(x) + row * x_row, static_cast<const T*>(weight), n, eps,
               static_cast<T*>(out) + row * n);
    });
  });
}

void nanovllm_add_rms_norm(int dtype, const void* x, void* residual, const void* weight, float eps,
                           long rows, long n, void* out) {
  with_element(dtype, [&](auto zero) {
    using T = decltype(zero);
    for_rows(rows, n, [&](long row) {
      T* sum = static_cast<T*>(residual) + row * n;
      add_row(static_cast<const T*>(x) + row * n, n, sum);
      norm_row(sum, static_cast<const T*>(weight), n, eps, static_cast<T*>(out) + row * n);
    });
  });
}

// Returns the index of the first position outside [0, max_positions), or -1 when all went well.
long nanovllm_rope(int dtype, void* q, long q_row, long num_q, const void* q_norm, void* k,
                   long k_row, long num_k, const void* k_norm, float eps, const float* cos_sin,
                   long max_positions, const int64_t* positions, long tokens, long dim) {
  long bad = first_outside(positions, tokens, max_positions);
  if (bad >= 0) return bad;
  Heads queries{q, q_row, num_q, q_norm}, keys{k, k_row, num_k, k_norm};
  with_element(dtype, [&](auto zero) {
    using T = decltype(zero);
    for_rows(tokens, (num_q + num_k) * dim, [&](long token) {
      const float* angles = cos_sin + positions[token] * dim;
      rope_tokens<T>(queries, token, dim, eps, angles);
      rope_tokens<T>(keys, token, dim, eps, angles);
    });
  });
  return -1;
}

void nanovllm_silu_mul(int dtype, const void* gate_up, long rows, long n, void* out) {
  with_element(dtype, [&](auto zero) {
    using T = decltype(zero);
    for_rows(rows, 2 * n, [&](long row) {
      silu_mul_row(static_cast<const T*>(gate_up) + row * 2 * n, n, static_cast<T*>(out) + row * n);
    });
  });
}
}

}  // namespace nanovllm
