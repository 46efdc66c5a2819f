// Matrix products with few rows: a read of the weights, as fast as the memory can.
//
// out [M, N] = x [M, K] @ weight [N, K].T, with the norm before and the bias, residual or SiLU
// after. Each block owns some output features and streams their weight rows through a ring of
// stages in shared memory. The ring is filled before the wait for the kernel before, whose result
// only x depends on: reading weights never stops between two products.
//
// The tensor cores multiply 16 rows of x (rows past M are zero) with 8 weight rows and 16 features
// of K. Which K a lane holds does not matter as long as both operands agree, so a lane reads 16
// bytes in a row of either. The warps of a block share K; their sums meet in shared memory.
//
// RMSNorm (NORM) is applied as (x * norm) @ weight.T, scaled by 1 / rms(x).
//
// Constants: BLOCKS of the grid, N output features (of one of gate and up, if GATED), K, K_STEP of one stage,
// GROUPS of 8 weight rows in a unit of work (gate and up alternate), WARPS, STAGES, ROWS (8 or 16),
// LEAD (the next kernel may start when a block has so many stages left to fetch; -1: as soon as the
// kernel before has ended), and NORM, BIAS, GATED, RESIDUAL, HALF.
#include "common.cuh"

constexpr int FEATURES = 8 * GROUPS / (GATED ? 2 : 1);  // of a unit
constexpr int UNITS = (N + FEATURES - 1) / FEATURES;
constexpr int K_STEPS = K / K_STEP;
constexpr int CHUNKS = K_STEP / (32 * WARPS);  // of 32 features, in each warp
constexpr int ROW_BYTES = K_STEP * 2 + 64;     // two rows then lie in different banks
constexpr int STAGE_BYTES = 8 * ROW_BYTES;
constexpr int HALVES = ROWS / 8;
constexpr int SUMS = GROUPS * HALVES * 64;  // of a warp: [GROUPS][HALVES][8 rows][8 features]
constexpr int CONSUMERS = WARPS * 32;

static_assert(K % K_STEP == 0 && K_STEP % (32 * WARPS) == 0 && N % 8 == 0);

struct Shared {
  alignas(128) unsigned char ring[STAGES][STAGE_BYTES];
  alignas(16) float sums[WARPS][SUMS];
  float squares[WARPS][ROWS];
  alignas(8) u64 full[STAGES], empty[STAGES];
};

__device__ __forceinline__ void multiply(float (&sum)[HALVES * 2], const u32 (&a)[4], u32 b0,
                                         u32 b1) {
#if ROWS == 8
  float unused0 = 0.f, unused1 = 0.f;
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." TYPE_16 "." TYPE_16 ".f32"
      " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(unused0), "+f"(unused1)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." TYPE_16 "." TYPE_16 ".f32"
      " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

// The weight row that is `row`-th of group `group` of a unit.
__device__ __forceinline__ int weight_row(int unit, int group, int row) {
  int feature = unit * FEATURES + (GATED ? group / 2 : group) * 8 + row;
  feature = feature < N ? feature : N - 1;  // past the end: read, and not used
  return GATED && group % 2 ? N + feature : feature;
}

__device__ __forceinline__ void produce(Shared& s, const u16* weight, int lane) {
  const u64 policy = read_once_policy();
  int stage = 0;
  u32 phase = 0;
  int left = blockIdx.x < UNITS ? (UNITS - 1 - blockIdx.x) / BLOCKS + 1 : 0;  // units, then stages
  left *= K_STEPS * GROUPS;
  if (left <= LEAD) let_next_kernel_start();
  for (int unit = blockIdx.x; unit < UNITS; unit += BLOCKS)
    for (int step = 0; step < K_STEPS; ++step)
      for (int group = 0; group < GROUPS; ++group) {
        const u32 full = shared_address(&s.full[stage]);
        if (lane == 0) {
          barrier_wait(shared_address(&s.empty[stage]), phase ^ 1);
          barrier_expect(full, 8 * K_STEP * 2);
        }
        __syncwarp();
        if (lane < 8) {
          const u16* row = weight + static_cast<u64>(weight_row(unit, group, lane)) * K;
          copy_bytes(shared_address(&s.ring[stage][lane * ROW_BYTES]), row + step * K_STEP,
                     K_STEP * 2, full, policy);
        }
        if (--left == LEAD) let_next_kernel_start();
        if (++stage == STAGES) stage = 0, phase ^= 1;
      }
}

__device__ __forceinline__ void consume(Shared& s, const u16* x, const u16* norm, const u16* bias,
                                        const u16* residual, u16* out, int rows, float eps) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int row = lane / 4, at = warp * CHUNKS * 32 + lane % 4 * 8;
  int stage = 0;
  u32 phase = 0;
#if NORM
  uint4 norms[CHUNKS];
#pragma unroll
  for (int c = 0; c < CHUNKS; ++c)
    norms[c] = __ldg(reinterpret_cast<const uint4*>(norm + at + c * 32));
#endif
  wait_for_earlier_kernels();
  if (LEAD < 0) let_next_kernel_start();
  for (int unit = blockIdx.x; unit < UNITS; unit += BLOCKS) {
    float sum[GROUPS][HALVES * 2] = {};
    float square[HALVES] = {};
    for (int step = 0; step < K_STEPS; ++step) {
      u32 a[CHUNKS][HALVES][4];
#pragma unroll
      for (int c = 0; c < CHUNKS; ++c)
#pragma unroll
        for (int h = 0; h < HALVES; ++h) {
          uint4 v = {0, 0, 0, 0};
          if (row + 8 * h < rows)
            v = *reinterpret_cast<const uint4*>(x + (row + 8 * h) * K + step * K_STEP + at + c * 32);
          a[c][h][0] = v.x, a[c][h][1] = v.y, a[c][h][2] = v.z, a[c][h][3] = v.w;
        }
#if NORM
#pragma unroll
      for (int c = 0; c < CHUNKS; ++c) {
        if (K_STEPS > 1)
          norms[c] = __ldg(reinterpret_cast<const uint4*>(norm + step * K_STEP + at + c * 32));
        const u32 words[4] = {norms[c].x, norms[c].y, norms[c].z, norms[c].w};
#pragma unroll
        for (int h = 0; h < HALVES; ++h)
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const float2 v = unpack(a[c][h][i]), g = unpack(words[i]);
            square[h] += v.x * v.x + v.y * v.y;
            a[c][h][i] = pack(v.x * g.x, v.y * g.y);
          }
      }
#endif
#pragma unroll
      for (int group = 0; group < GROUPS; ++group) {
        barrier_wait(shared_address(&s.full[stage]), phase);
        const unsigned char* weights = &s.ring[stage][row * ROW_BYTES + at * 2];
#pragma unroll
        for (int c = 0; c < CHUNKS; ++c) {
          const uint4 w = *reinterpret_cast<const uint4*>(weights + c * 64);
          const u32 first[4] = {a[c][0][0], HALVES > 1 ? a[c][HALVES - 1][0] : 0, a[c][0][1],
                                HALVES > 1 ? a[c][HALVES - 1][1] : 0};
          const u32 second[4] = {a[c][0][2], HALVES > 1 ? a[c][HALVES - 1][2] : 0, a[c][0][3],
                                 HALVES > 1 ? a[c][HALVES - 1][3] : 0};
          multiply(sum[group], first, w.x, w.y);
          multiply(sum[group], second, w.z, w.w);
        }
        __syncwarp();
        if (lane == 0) barrier_arrive(shared_address(&s.empty[stage]));
        if (++stage == STAGES) stage = 0, phase ^= 1;
      }
    }
    if (unit != blockIdx.x) sync_threads(1, CONSUMERS);  // the last unit's sums have been read
#pragma unroll
    for (int group = 0; group < GROUPS; ++group)
#pragma unroll
      for (int h = 0; h < HALVES; ++h)
        *reinterpret_cast<float2*>(&s.sums[warp][(group * HALVES + h) * 64 + lane * 2]) =
            make_float2(sum[group][2 * h], sum[group][2 * h + 1]);
#if NORM
#pragma unroll
    for (int h = 0; h < HALVES; ++h) {
      square[h] += __shfl_xor_sync(~0u, square[h], 1);
      square[h] += __shfl_xor_sync(~0u, square[h], 2);
      if (lane % 4 == 0) s.squares[warp][row + 8 * h] = square[h];
    }
#endif
    sync_threads(1, CONSUMERS);
    for (int i = threadIdx.x; i < rows * FEATURES; i += CONSUMERS) {
      const int m = i / FEATURES, f = i % FEATURES, n = unit * FEATURES + f;
      if (n >= N) continue;
      float scale = 1.f;
#if NORM
      float total = 0.f;
      for (int w = 0; w < WARPS; ++w) total += s.squares[w][m];
      scale = rsqrtf(total / K + eps);
#endif
      const int group = GATED ? f / 8 * 2 : f / 8;
      const int spot = (group * HALVES + m / 8) * 64 + m % 8 * 8 + f % 8;
      float value = 0.f;
      for (int w = 0; w < WARPS; ++w) value += s.sums[w][spot];
      value *= scale;
#if GATED
      float up = 0.f;
      for (int w = 0; w < WARPS; ++w) up += s.sums[w][spot + HALVES * 64];
      value = rounded(silu(rounded(value))) * rounded(up * scale);
#endif
#if BIAS
      value += from_16(bias[n]);
#endif
#if RESIDUAL
      value = rounded(value) + from_16(residual[m * N + n]);
#endif
      out[m * N + n] = to_16(value);
    }
  }
}

extern "C" __global__ void __launch_bounds__(CONSUMERS + 32)
    few(const u16* x, const u16* weight, const u16* norm, const u16* bias, const u16* residual,
        u16* out, int rows, float eps) {
  extern __shared__ __align__(128) unsigned char memory[];
  Shared& s = *reinterpret_cast<Shared*>(memory);
  if (threadIdx.x < STAGES) {
    barrier_init(shared_address(&s.full[threadIdx.x]), 1);
    barrier_init(shared_address(&s.empty[threadIdx.x]), WARPS);
  }
  barriers_ready();
  __syncthreads();
  if (threadIdx.x >= CONSUMERS) {
    produce(s, weight, threadIdx.x - CONSUMERS);
    return;
  }
  consume(s, x, norm, bias, residual, out, rows, eps);
}
