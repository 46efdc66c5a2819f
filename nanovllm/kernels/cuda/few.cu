// Matrix products with up to 8 rows: a read of the weights, as fast as the memory can.
//
// out [M, N] = x [M, K] @ weight [N, K].T, with the norm before and the residual or SiLU after.
// Each block owns some output features and streams their weight rows through a ring of stages in
// shared memory. The ring is filled before the wait for the kernel before, whose result only x
// depends on: reading weights never stops between two products.
//
// The tensor cores multiply 16 rows (8 of x, 8 of zeros) with 8 weight rows and 16 features of K.
// Which features a lane holds does not matter as long as both operands agree, so a lane reads 16
// bytes in a row of either. The warps of a block share K; their sums meet in shared memory.
//
// RMSNorm (NORM) is applied as (x * norm) @ weight.T, scaled by 1 / rms(x).
//
// Constants: BLOCKS of the grid, N output features (of one of gate and up, if GATED), K, K_STEP of
// one stage, GROUPS of 8 weight rows in a unit of work (gate and up alternate), WARPS, STAGES, LEAD
// (the next kernel may start when a block has so many stages left to fetch), and NORM, BIAS, GATED,
// RESIDUAL.
#include "common.cuh"

constexpr int FEATURES = 8 * GROUPS / (GATED ? 2 : 1);  // of a unit
constexpr int UNITS = (N + FEATURES - 1) / FEATURES;
constexpr int K_STEPS = K / K_STEP;
constexpr int CHUNKS = K_STEP / (32 * WARPS);  // of 32 features, in each warp
constexpr int ROW_BYTES = K_STEP * 2 + 64;     // two rows then lie in different banks
constexpr int STAGE_BYTES = 8 * ROW_BYTES;
constexpr int CONSUMERS = WARPS * 32;

static_assert(K % K_STEP == 0 && K_STEP % (32 * WARPS) == 0 && N % 8 == 0);
static_assert(!GATED || GROUPS % 2 == 0 && !BIAS && !RESIDUAL);

struct Shared {
  alignas(128) unsigned char ring[STAGES][STAGE_BYTES];
  alignas(16) float sums[WARPS][GROUPS][8][8];  // row of x, weight row
  float squares[WARPS][8];
  alignas(8) u64 full[STAGES], empty[STAGES];
};

__device__ __forceinline__ void multiply(float2& sum, u32 a0, u32 a2, u32 b0, u32 b1) {
  float rest0 = 0.f, rest1 = 0.f;  // of the rows of zeros
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"
      " {%0, %1, %2, %3}, {%4, %5, %6, %5}, {%7, %8}, {%0, %1, %2, %3};"
      : "+f"(sum.x), "+f"(sum.y), "+f"(rest0), "+f"(rest1)
      : "r"(a0), "r"(0), "r"(a2), "r"(b0), "r"(b1));
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

// x times the norm's weight; the squares of x before that are added to `square`.
__device__ __forceinline__ u32 scaled(u32 x, u32 norm, float& square) {
  const float2 v = unpack(x), g = unpack(norm);
  square += v.x * v.x + v.y * v.y;
  return pack(v.x * g.x, v.y * g.y);
}

__device__ __forceinline__ uint4 scaled(uint4 x, uint4 norm, float& square) {
  return {scaled(x.x, norm.x, square), scaled(x.y, norm.y, square), scaled(x.z, norm.z, square),
          scaled(x.w, norm.w, square)};
}

// The warps' sums of a unit meet; every thread finishes some results.
__device__ __forceinline__ void finish(Shared& s, const float2 (&sums)[GROUPS], float square,
                                       int unit, const u16* bias, const u16* residual, u16* out,
                                       int rows, float eps) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = lane / 4;
  if (unit != blockIdx.x) sync_threads(1, CONSUMERS);  // the last unit's sums have been read
#pragma unroll
  for (int group = 0; group < GROUPS; ++group)
    *reinterpret_cast<float2*>(&s.sums[warp][group][row][lane % 4 * 2]) = sums[group];
  if (NORM) {
    square += __shfl_xor_sync(~0u, square, 1);
    square += __shfl_xor_sync(~0u, square, 2);
    if (lane % 4 == 0) s.squares[warp][row] = square;
  }
  sync_threads(1, CONSUMERS);
  for (int i = threadIdx.x; i < rows * FEATURES; i += CONSUMERS) {
    const int m = i / FEATURES, f = i % FEATURES, n = unit * FEATURES + f;
    if (n >= N) continue;
    const int group = GATED ? f / 8 * 2 : f / 8;
    float value = 0.f, up = 0.f, total = 0.f;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) {
      value += s.sums[w][group][m][f % 8];
      if (GATED) up += s.sums[w][group + 1][m][f % 8];
      if (NORM) total += s.squares[w][m];
    }
    const float scale = NORM ? rsqrtf(total / K + eps) : 1.f;
    value *= scale;
    if (GATED) value = rounded(silu(rounded(value))) * rounded(up * scale);
    if (BIAS) value += from_16(bias[n]);
    if (RESIDUAL) value = rounded(value) + from_16(residual[m * N + n]);
    out[m * N + n] = to_16(value);
  }
}

__device__ __forceinline__ void consume(Shared& s, const u16* x, const u16* norm, const u16* bias,
                                        const u16* residual, u16* out, int rows, float eps) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int row = lane / 4, at = warp * CHUNKS * 32 + lane % 4 * 8;
  int stage = 0;
  u32 phase = 0;
  auto part = [&](const u16* vector, int step, int chunk) {
    return reinterpret_cast<const uint4*>(vector + step * K_STEP + at + chunk * 32);
  };
  uint4 norms[CHUNKS];
#pragma unroll
  for (int c = 0; c < CHUNKS; ++c)
    if (NORM) norms[c] = __ldg(part(norm, 0, c));
  wait_for_earlier_kernels();
  for (int unit = blockIdx.x; unit < UNITS; unit += BLOCKS) {
    float2 sums[GROUPS] = {};
    float square = 0.f;
    for (int step = 0; step < K_STEPS; ++step) {
      uint4 a[CHUNKS];
#pragma unroll
      for (int c = 0; c < CHUNKS; ++c)
        a[c] = row < rows ? *part(x + row * K, step, c) : uint4{0, 0, 0, 0};
#pragma unroll
      for (int c = 0; c < CHUNKS; ++c) {
        if (NORM && K_STEPS > 1) norms[c] = __ldg(part(norm, step, c));
        if (NORM) a[c] = scaled(a[c], norms[c], square);
      }
#pragma unroll
      for (int group = 0; group < GROUPS; ++group) {
        barrier_wait(shared_address(&s.full[stage]), phase);
        const unsigned char* weights = &s.ring[stage][row * ROW_BYTES + at * 2];
#pragma unroll
        for (int c = 0; c < CHUNKS; ++c) {
          const uint4 w = *reinterpret_cast<const uint4*>(weights + c * 64);
          multiply(sums[group], a[c].x, a[c].y, w.x, w.y);
          multiply(sums[group], a[c].z, a[c].w, w.z, w.w);
        }
        __syncwarp();
        if (lane == 0) barrier_arrive(shared_address(&s.empty[stage]));
        if (++stage == STAGES) stage = 0, phase ^= 1;
      }
    }
    finish(s, sums, square, unit, bias, residual, out, rows, eps);
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
  } else {
    consume(s, x, norm, bias, residual, out, rows, eps);
  }
}
