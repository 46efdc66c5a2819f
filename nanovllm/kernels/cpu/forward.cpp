// A decoder's forward pass in one call: the operators in the order of models/decoder.py, which is
// its specification. One call a step leaves Python's lock to others, and the threads of the pool
// no time to fall asleep between two operators.
#include "attention.h"
#include "operators.h"
#include "pool.h"

namespace nanovllm {
namespace {

// These structs are filled by the Python side, field by field.
struct Linear {
  const void* weight;  // packed
  const void* bias;    // may be null

  void operator()(const void* x, long rows, long k, void* out) const {
    if (nanovllm_linear(weight, x, k, rows, bias, out) != 0) throw std::bad_alloc();
  }
};

struct Layer {
  const void* input_norm;
  Linear qkv;
  const void* q_norm;  // null with k_norm: heads are not normed
  const void* k_norm;
  Linear o;
  const void* post_norm;
  Linear gate_up, down;
  Cache cache;
  long window;  // 0: all of the context
};

struct Model {
  const void* embed;  // packed
  const Layer* layers;
  const void* final_norm;
  const float* cos_sin;
  long num_layers, dtype, hidden, num_heads, num_kv_heads, head_dim, intermediate, max_positions;
  float eps, scale;

  long element() const { return dtype == kFloat32 ? 4 : 2; }
  long heads() const { return num_heads + 2 * num_kv_heads; }
};

// What of a step is outside its range; memory is what it found too little of.
enum Wrong { kNothing, kTokenId, kPosition, kSlot, kBlock, kMemory };

// The activations of a step of `rows` tokens.
struct Step {
  const Model& m;
  const Batch& batch;
  const int64_t* positions;
  long rows;
  char *residual, *hidden, *qkv, *attended, *gate_up, *gated;

  Step(const Model& m, const Batch& batch, const int64_t* positions)
      : m(m), batch(batch), positions(positions), rows(batch.num_tokens) {
    long widths[] = {m.hidden,           m.hidden,         m.heads() * m.head_dim,
                     m.num_heads * m.head_dim, 2 * m.intermediate, m.intermediate};
    char** parts[] = {&residual, &hidden, &qkv, &attended, &gate_up, &gated};
    long offset = 0;
    for (long& width : widths) offset += width = (width * rows * m.element() + 63) / 64 * 64;
    char* next = static_cast<char*>(scratch(Slot::kForward, offset));
    for (int i = 0; i < 6; next += widths[i++]) *parts[i] = next;
  }

  void add_norm(const void* weight, void* out) {
    nanovllm_add_rms_norm(m.dtype, hidden, residual, weight, m.eps, rows, m.hidden, out);
  }

  // The normed `hidden` -> what the block adds to the residual.
  Wrong layer(const Layer& layer) {
    layer.qkv(hidden, rows, m.hidden, qkv);
    long row = m.heads() * m.head_dim;
    char* k = qkv + m.num_heads * m.head_dim * m.element();
    char* v = k + m.num_kv_heads * m.head_dim * m.element();
    nanovllm_rope(m.dtype, qkv, row, m.num_heads, layer.q_norm, k, row, m.num_kv_heads,
                  layer.k_norm, m.eps, m.cos_sin, m.max_positions, positions, rows, m.head_dim);
    long bad = nanovllm_attention(&layer.cache, &batch, qkv, row, k, row, v, row, m.num_heads,
                                  m.scale, layer.window, attended);
    if (bad == kNoMemory) return kMemory;
    if (bad != -1) return bad >= 0 ? kBlock : kSlot;
    layer.o(attended, rows, m.num_heads * m.head_dim, hidden);
    add_norm(layer.post_norm, hidden);
    layer.gate_up(hidden, rows, m.hidden, gate_up);
    nanovllm_silu_mul(m.dtype, gate_up, rows, m.intermediate, gated);
    layer.down(gated, rows, m.intermediate, hidden);
    return kNothing;
  }
};

Wrong forward(const Model& m, const Batch& batch, const int64_t* ids, const int64_t* positions,
              void* out) {
  const Layer* layers = m.layers;
  Step step(m, batch, positions);
  if (nanovllm_embedding(m.embed, ids, step.rows, step.residual) >= 0) return kTokenId;
  if (first_outside(positions, step.rows, m.max_positions) >= 0) return kPosition;
  nanovllm_rms_norm(m.dtype, step.residual, m.hidden, layers->input_norm, m.eps, step.rows,
                    m.hidden, step.hidden);
  for (long i = 0; i < m.num_layers; i++) {
    if (i > 0) step.add_norm(layers[i].input_norm, step.hidden);
    Wrong wrong = step.layer(layers[i]);
    if (wrong != kNothing) return wrong;
  }
  step.add_norm(m.final_norm, out);
  return kNothing;
}

}  // namespace

extern "C" int nanovllm_forward(const Model* model, const Batch* batch, const int64_t* ids,
                                const int64_t* positions, void* out) {
  return unless_out_of_memory(
      kMemory, [&] { return forward(*model, *batch, ids, positions, out); });
}

}  // namespace nanovllm
