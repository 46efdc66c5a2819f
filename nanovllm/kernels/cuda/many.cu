// Matrix products with some tens to hundreds of rows, on Hopper's asynchronous tensor cores.
//
// out [M, N] = x [M, K] @ weight [N, K].T for M <= BATCH. The weights take the place that has 64
// rows in a wgmma instruction, the rows of x the other, which may have any multiple of 8: few rows
// waste nothing, and a tile holds every row of the batch, so each weight is read once.
//
// One warp keeps a ring of tiles full by the tensor copy engine. It fetches weights before the wait
// for the kernel before: reading them never stops between two products. A cluster of SPLIT blocks
// shares K; its blocks' sums meet over distributed shared memory, in the order of their ranks.
//
// The norm before a product costs no launch and no pass over x: the product that completes a
// residual also writes `scaled` = residual * norm and the sums of squares of its features; the next
// one multiplies `scaled` with its weights and then every row by 1 / rms.
//
// Constants: BATCH, BATCH_GROUPS (warpgroups that share the rows of x), SPLIT, STAGES; SCALE (rows
// are to be multiplied by 1 / rms), BIAS, GATED (rows of gate and up alternate by eights;
// SiLU(gate) * up), RESIDUAL (add it, and prepare the next norm), LEAD (the next kernel may start
// when a block has so many stages left to fetch; -1: as soon as the kernel before has ended).
// WGMMA is the text of `multiply`, made for COLUMNS.
#include "common.cuh"

constexpr int TILE = 64;  // weight rows of a block
constexpr int K_STEP = 64;  // 128 bytes: the widest swizzle
constexpr int CONSUMERS = 128 * BATCH_GROUPS;
constexpr int COLUMNS = BATCH / BATCH_GROUPS;  // rows of x in one instruction
constexpr int WEIGHT_BYTES = TILE * K_STEP * 2, X_BYTES = BATCH * K_STEP * 2;
constexpr int STRIDE = TILE + 4;  // floats of a row of sums: no bank conflicts
constexpr int FEATURES = GATED ? TILE / 2 : TILE;
constexpr int LANES = FEATURES / 4;  // threads of one row of the result, four features each
constexpr int ROWS_AT_ONCE = CONSUMERS / LANES;
constexpr int ROWS_OF_RANK = BATCH / SPLIT;  // of the result, in each block of a cluster
constexpr int PASSES = (ROWS_OF_RANK + ROWS_AT_ONCE - 1) / ROWS_AT_ONCE;
constexpr int TOGETHER = SPLIT * (GATED ? 2 : 1) >= 16 ? 1 : 16 / SPLIT / (GATED ? 2 : 1);

static_assert(BATCH % (8 * BATCH_GROUPS) == 0 && BATCH % SPLIT == 0);
static_assert(!GATED || !RESIDUAL && !BIAS);
static_assert(STAGES <= CONSUMERS);

struct Ring {
  unsigned char weight[STAGES][WEIGHT_BYTES];
  unsigned char x[STAGES][X_BYTES];
};

struct Shared {
  union {  // 1024-byte atoms of the swizzle
    alignas(1024) Ring ring;
    float sums[BATCH * STRIDE];
  };
  float scale[BATCH];
  alignas(8) u64 full[STAGES], empty[STAGES];
};

// A tile of 64 values of K, 128 bytes a row, swizzled: PTX ISA, "matrix descriptor".
__device__ __forceinline__ u64 descriptor(u32 address) {
  return static_cast<u64>(address >> 4 & 0x3fff) | 1ull << 16 | 64ull << 32 | 1ull << 62;
}

WGMMA

__device__ __forceinline__ void produce(Shared& s, const TensorMap& weights, const TensorMap& x,
                                        int tile, int begin, int steps) {
  const u64 policy = read_once_policy();
  auto fetch_weights = [&](int step) {
    const int stage = step % STAGES;
    const u32 barrier = shared_address(&s.full[stage]);
    const u32 target = shared_address(s.ring.weight[stage]);
    barrier_expect(barrier, WEIGHT_BYTES + X_BYTES);
#if GATED
    copy_tile_once(target, weights, (begin + step) * K_STEP, 0, 0, tile * (TILE / 16), barrier,
                   policy);
#else
    copy_tile_once(target, weights, (begin + step) * K_STEP, tile * TILE, barrier, policy);
#endif
  };
  auto fetch_x = [&](int step) {
    const int stage = step % STAGES;
    copy_tile(shared_address(s.ring.x[stage]), x, (begin + step) * K_STEP, 0,
              shared_address(&s.full[stage]));
  };
  const int ahead = steps < STAGES ? steps : STAGES;
  for (int step = 0; step < ahead; ++step) fetch_weights(step);
  if (steps - ahead <= LEAD) let_next_kernel_start();
  wait_for_earlier_kernels();
  for (int step = 0; step < ahead; ++step) fetch_x(step);
  for (int step = ahead; step < steps; ++step) {
    barrier_wait(shared_address(&s.empty[step % STAGES]), (step / STAGES - 1) & 1);
    fetch_weights(step);
    fetch_x(step);
    if (steps - 1 - step == LEAD) let_next_kernel_start();
  }
}

// The sums of this block's part of K, into shared memory as [row of x][weight row].
__device__ __forceinline__ void consume(Shared& s, int steps, int rows) {
  const int columns = threadIdx.x / 128, warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  float sum[COLUMNS / 2];
  for (int step = 0; step < steps; ++step) {
    const int stage = step % STAGES;
    barrier_wait(shared_address(&s.full[stage]), step / STAGES & 1);
    const u64 a = descriptor(shared_address(s.ring.weight[stage]));
    const u64 b = descriptor(shared_address(s.ring.x[stage]) + columns * COLUMNS * K_STEP * 2);
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
    for (int k = 0; k < 4; ++k) multiply(sum, a + 2 * k, b + 2 * k, step + k > 0);
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
    if (step > 0 && step - 1 + STAGES < steps) {  // the tiles of the step before are wanted again
      asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
      if (lane == 0) barrier_arrive(shared_address(&s.empty[(step - 1) % STAGES]));
    }
  }
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#pragma unroll
  for (int i = 0; i < COLUMNS / 2; ++i) asm volatile("" : "+f"(sum[i])::"memory");
  sync_threads(1, CONSUMERS);  // all tiles have been used: their memory is free
#pragma unroll
  for (int i = 0; i < COLUMNS / 2; ++i) {
    const int m = columns * COLUMNS + i / 4 * 8 + lane % 4 * 2 + i % 2;
    const int n = warp * 16 + i / 2 % 2 * 8 + lane / 4;
    if (m < rows) s.sums[m * STRIDE + n] = sum[i];
  }
}

// 1 / rms of the rows that this block of the cluster finishes, by one warp.
__device__ __forceinline__ void read_scales(Shared& s, const float* squares, int parts, int rows,
                                            int rank, float inverse_size, float eps) {
  const int begin = rank * ROWS_OF_RANK;
  for (int m = begin + threadIdx.x % 32; m < begin + ROWS_OF_RANK && m < rows; m += 32) {
    float total = 0.f;
#pragma unroll 16
    for (int part = 0; part < parts; ++part) total += squares[part * rows + m];
    s.scale[m] = rsqrtf(total * inverse_size + eps);
  }
}

struct Result {
  u16* out;          // [M, N]; the residual, if RESIDUAL
  const u16* bias;   // [N]
  const u16* norm;   // [N]: RESIDUAL
  u16* scaled;       // [M, N]: RESIDUAL
  float* squares;    // [tiles, M]: RESIDUAL
};

// What a thread does of the result: four features of every ROWS_AT_ONCE-th row of its rank.
struct Place {
  int f, n, first;
  bool inside;

  __device__ __forceinline__ Place(int tile, int rank, int n_total)
      : f(threadIdx.x % LANES * 4),
        n(tile * FEATURES + f),
        first(rank * ROWS_OF_RANK + threadIdx.x / LANES),
        inside(n < n_total) {}

  __device__ __forceinline__ bool has(int pass, int rank, int rows) const {
    const int m = first + pass * ROWS_AT_ONCE;
    return m < rows && m < (rank + 1) * ROWS_OF_RANK;
  }
};

// What a thread's results need beside the sums: read before the product, for it takes long to come.
struct Known {
  uint2 bias = {0, 0}, norm = {0, 0}, old[PASSES] = {};

  __device__ __forceinline__ void read_weights(const Result& r, const Place& place) {
    if (BIAS && place.inside) bias = __ldg(reinterpret_cast<const uint2*>(r.bias + place.n));
    if (RESIDUAL && place.inside) norm = __ldg(reinterpret_cast<const uint2*>(r.norm + place.n));
  }

  __device__ __forceinline__ void read_residual(const Result& r, const Place& place, int rank,
                                                int rows, int n_total) {
#pragma unroll
    for (int pass = 0; pass < PASSES; ++pass)
      if (RESIDUAL && place.inside && place.has(pass, rank, rows)) {
        const int m = place.first + pass * ROWS_AT_ONCE;
        old[pass] =
            *reinterpret_cast<const uint2*>(r.out + static_cast<u64>(m) * n_total + place.n);
      }
  }
};

__device__ __forceinline__ float4 add(float4 a, float4 b) {
  return {a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w};
}

__device__ __forceinline__ float4 times(float4 a, float scale) {
  return {a.x * scale, a.y * scale, a.z * scale, a.w * scale};
}

__device__ __forceinline__ float gated(float gate, float up) {
  return rounded(silu(rounded(gate))) * rounded(up);
}

// Adds up the cluster's parts of this rank's rows, and writes the result.
__device__ __forceinline__ void finish(Shared& s, const Result& r, const Place& place,
                                       const Known& known, int tile, int rank, int rows,
                                       int n_total) {
  u32 sums[SPLIT];
#pragma unroll
  for (int other = 0; other < SPLIT; ++other) {
    const u32 here = shared_address(s.sums);
    sums[other] = SPLIT > 1 ? address_of_rank(here, other) : here;
  }
  const int column = GATED ? place.f / 8 * 16 + place.f % 8 : place.f;
  const float2 b0 = unpack(known.bias.x), b1 = unpack(known.bias.y);
  const float2 g0 = unpack(known.norm.x), g1 = unpack(known.norm.y);
#pragma unroll
  for (int begin = 0; begin < PASSES; begin += TOGETHER) {
    float4 parts[TOGETHER][SPLIT][GATED ? 2 : 1];  // all on their way before the first is used
#pragma unroll
    for (int i = 0; i < TOGETHER; ++i)
#pragma unroll
      for (int other = 0; other < SPLIT; ++other)
#pragma unroll
        for (int half = 0; half < (GATED ? 2 : 1); ++half) {
          const int m = place.first + (begin + i) * ROWS_AT_ONCE;
          const int spot = m * STRIDE + column + half * 8;
          if (begin + i >= PASSES || !place.has(begin + i, rank, rows)) continue;
          if (SPLIT == 1)
            parts[i][other][half] = *reinterpret_cast<const float4*>(&s.sums[spot]);
          else
            parts[i][other][half] = load_of_cluster(sums[other] + spot * 4);
        }
#pragma unroll
    for (int i = 0; i < TOGETHER; ++i) {
      const int pass = begin + i, m = place.first + pass * ROWS_AT_ONCE;
      if (pass >= PASSES || !place.has(pass, rank, rows)) continue;
      const u64 spot = static_cast<u64>(m) * n_total + place.n;
      const float scale = SCALE ? s.scale[m] : 1.f;
      float4 v = parts[i][0][0];
#pragma unroll
      for (int other = 1; other < SPLIT; ++other) v = add(v, parts[i][other][0]);
      v = times(v, scale);
#if GATED
      float4 up = parts[i][0][1];
#pragma unroll
      for (int other = 1; other < SPLIT; ++other) up = add(up, parts[i][other][1]);
      up = times(up, scale);
      v = {gated(v.x, up.x), gated(v.y, up.y), gated(v.z, up.z), gated(v.w, up.w)};
#endif
#if BIAS
      v.x += b0.x, v.y += b0.y, v.z += b1.x, v.w += b1.y;
#endif
      uint2 packed = {pack(v.x, v.y), pack(v.z, v.w)};
#if RESIDUAL
      const float2 o0 = unpack(known.old[pass].x), o1 = unpack(known.old[pass].y);
      const float2 v0 = unpack(packed.x), v1 = unpack(packed.y);
      packed = {pack(o0.x + v0.x, o0.y + v0.y), pack(o1.x + v1.x, o1.y + v1.y)};
      const float2 r0 = unpack(packed.x), r1 = unpack(packed.y);
      float square = r0.x * r0.x + r0.y * r0.y + r1.x * r1.x + r1.y * r1.y;
      if (!place.inside) square = 0.f;
      const u32 mask = 0xffffu << (threadIdx.x % 32 / 16 * 16);  // the sixteen of a row
#pragma unroll
      for (int step = LANES / 2; step > 0; step /= 2) square += __shfl_xor_sync(mask, square, step);
      if (threadIdx.x % LANES == 0) r.squares[tile * rows + m] = square;
      if (place.inside)
        *reinterpret_cast<uint2*>(r.scaled + spot) =
            uint2{pack(r0.x * g0.x, r0.y * g0.y), pack(r1.x * g1.x, r1.y * g1.y)};
#endif
      if (place.inside) *reinterpret_cast<uint2*>(r.out + spot) = packed;
    }
  }
}

// Grid (SPLIT, tiles of N), clusters of SPLIT blocks. squares [parts, M] are those of x.
extern "C" __global__ void __launch_bounds__(CONSUMERS + 64)
    many(const __grid_constant__ TensorMap weights, const __grid_constant__ TensorMap x, int rows,
         int n_total, int k_steps, const float* squares, int parts, float inverse_size, float eps,
         u16* out, const u16* bias, const u16* norm, u16* scaled, float* new_squares) {
  extern __shared__ __align__(1024) unsigned char memory[];
  Shared& s = *reinterpret_cast<Shared*>(memory);
  const int warp = threadIdx.x / 32, rank = blockIdx.x, tile = blockIdx.y;
  const int begin = k_steps * rank / SPLIT, steps = k_steps * (rank + 1) / SPLIT - begin;
  if (threadIdx.x < STAGES) {
    barrier_init(shared_address(&s.full[threadIdx.x]), 1);
    barrier_init(shared_address(&s.empty[threadIdx.x]), CONSUMERS / 32);
  }
  barriers_ready();
  __syncthreads();
  const Result result = {out, bias, norm, scaled, new_squares};
  const Place place(tile, rank, n_total);
  Known known;
  if (warp == CONSUMERS / 32) {
    if (threadIdx.x % 32 == 0) {
      prefetch_map(weights), prefetch_map(x);
      produce(s, weights, x, tile, begin, steps);
    }
    __syncwarp();
  } else {
    if (warp < CONSUMERS / 32) known.read_weights(result, place);
    wait_for_earlier_kernels();
    if (LEAD < 0) let_next_kernel_start();
    if (warp < CONSUMERS / 32) {
      known.read_residual(result, place, rank, rows, n_total);
      consume(s, steps, rows);
    } else if (SCALE) {
      read_scales(s, squares, parts, rows, rank, inverse_size, eps);
    }
  }
  __syncthreads();
#if SPLIT > 1
  cluster_sync();  // every block's sums are there
#endif
  if (warp < CONSUMERS / 32) finish(s, result, place, known, tile, rank, rows, n_total);
#if SPLIT > 1
  __syncthreads();
  cluster_sync();  // nobody reads them any more
#endif
}
