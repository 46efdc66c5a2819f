// The operators as C functions: what Python calls one by one and forward.cpp in a row.
#pragma once

#include <cstdint>
#include <limits>

namespace nanovllm {

struct Cache;
struct Batch;

// What nanovllm_attention returns where memory ran out.
constexpr long kNoMemory = std::numeric_limits<long>::min();

extern "C" {
long nanovllm_embedding(const void* packed, const int64_t* ids, long count, void* out);
int nanovllm_linear(const void* packed, const void* x, long x_row, long m, const void* bias,
                    void* out);
void nanovllm_rms_norm(int dtype, const void* x, long x_row, const void* weight, float eps,
                       long rows, long n, void* out);
void nanovllm_add_rms_norm(int dtype, const void* x, void* residual, const void* weight, float eps,
                           long rows, long n, void* out);
long nanovllm_rope(int dtype, void* q, long q_row, long num_q, const void* q_norm, void* k,
                   long k_row, long num_k, const void* k_norm, float eps, const float* cos_sin,
                   long max_positions, const int64_t* positions, long tokens, long dim);
void nanovllm_silu_mul(int dtype, const void* gate_up, long rows, long n, void* out);
long nanovllm_attention(const Cache* cache, const Batch* batch, const void* q, long q_row,
                        const void* k, long k_row, const void* v, long v_row, long num_heads,
                        float scale, long window, void* out);
}

}  // namespace nanovllm
