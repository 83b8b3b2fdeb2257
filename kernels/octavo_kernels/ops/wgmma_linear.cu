// y = x W^T + b on Hopper, or silu(gate) * up where y holds both side by side. Macros that wgmma_linear.py puts ahead:
//   BLOCK_N     rows of the weight for a tile, a multiple of 16; gated, half of them gates and half of them up
//   NUM_STAGES  tiles of the pipeline in shared memory
//   CLUSTER_M, CLUSTER_N, CLUSTER_K  1 or 2 each: blocks of a cluster along tokens, rows and columns of the weight.
//               Blocks of other tokens share tiles of the weight, blocks of other rows share tiles of the tokens
//   IS_GATED, HAS_BIAS, IS_HALF  0 or 1; IS_HALF: float16, else bfloat16
//   WGMMA(sums, a, b, adds)      m64 nBLOCK_N k16, to the sums if `adds`, else in their place
//
// A block has three teams of four warps. One thread of the first has the tensor memory accelerator fetch tiles; the
// other two teams multiply, 64 tokens each. A block that shares a tile fetches half of it, for both. A stage is full
// when its bytes are there, and empty when all warps of the blocks that its fetches serve have read it. Blocks stay,
// and the next tile arrives while the one before is being written. With CLUSTER_K a cluster makes one group of tiles:
// each block adds up and writes a part of the columns; the other leaves its sums of them in its shared memory.

typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

struct alignas(64) TensorMap {
  u64 words[16];
};

constexpr int BLOCK_M = 128, BLOCK_K = 64, HALF_N = BLOCK_N / 2;
constexpr int OUTPUT_N = IS_GATED ? HALF_N : BLOCK_N;  // columns of the output for a tile
constexpr int CHUNKS = OUTPUT_N / 8;                   // of eight columns, 16 bytes
constexpr int UP = IS_GATED ? CHUNKS * 4 : 0;          // from a thread's sum of a gate to that of its up
constexpr u32 ROW_BYTES = BLOCK_K * 2, HIDDEN_BYTES = BLOCK_M * ROW_BYTES, WEIGHT_BYTES = BLOCK_N * ROW_BYTES;
constexpr u32 STAGE_BYTES = HIDDEN_BYTES + WEIGHT_BYTES;
constexpr int CLUSTER = CLUSTER_M * CLUSTER_N * CLUSTER_K, CONSUMERS = 256, CONSUMER_WARPS = CONSUMERS / 32;
constexpr int PART = BLOCK_N / 2 / CLUSTER_K;  // of a thread's sums that each block adds up
static_assert(CLUSTER_K == 1 || (!IS_GATED && PART % 4 == 0), "blocks add up whole chunks");
static_assert(CONSUMERS * BLOCK_N / 2 * 4 <= NUM_STAGES * STAGE_BYTES, "sums do not fit");
// L2 policies, as CUTLASS names them: a weight is read once, the hidden states by every cluster.
constexpr u64 EVICT_FIRST = 0x12F0000000000000ull, EVICT_LAST = 0x14F0000000000000ull;

__device__ __forceinline__ void init_barrier(u32 barrier, u32 count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}

__device__ __forceinline__ void arrive_and_expect(u32 barrier, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

__device__ __forceinline__ void wait(u32 barrier, u32 phase) {
  u32 is_done;
  do {
    asm volatile(
        "{\n.reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n}\n"
        : "=r"(is_done)
        : "r"(barrier), "r"(phase)
        : "memory");
  } while (!is_done);
}

// The address in the cluster of what lies at `address` in another of its blocks.
__device__ __forceinline__ u32 in_block(u32 address, u32 block) {
  u32 there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(block));
  return there;
}

__device__ __forceinline__ void arrive(u32 barrier_in_cluster) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(barrier_in_cluster) : "memory");
}

__device__ __forceinline__ void store(u32 address_in_cluster, float value) {
  asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(address_in_cluster), "f"(value) : "memory");
}

__device__ __forceinline__ float load(u32 address) {
  float value;
  asm volatile("ld.shared::cta.f32 %0, [%1];" : "=f"(value) : "r"(address) : "memory");
  return value;
}

__device__ __forceinline__ void fetch(u32 to, const TensorMap* map, int column, int row, u32 barrier, u64 policy) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
      " [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(to), "l"(map), "r"(barrier), "r"(column), "r"(row), "l"(policy)
      : "memory");
}

// To the same place in several blocks of the cluster, each of which counts the bytes at its own barrier.
__device__ __forceinline__ void fetch_for(u16 blocks, u32 to, const TensorMap* map, int column, int row, u32 barrier,
                                          u64 policy) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster.L2::cache_hint"
      " [%0], [%1, {%3, %4}], [%2], %5, %6;" ::"r"(to), "l"(map), "r"(barrier), "r"(column), "r"(row),
      "h"(blocks), "l"(policy)
      : "memory");
}

// Everything that any thread of the cluster wrote before can be read after.
__device__ __forceinline__ void sync_cluster() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// All threads of the cluster have come here; what they wrote may still be on its way.
__device__ __forceinline__ void meet_cluster() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// What a matrix unit takes for a tile in shared memory: rows of 128 bytes, swizzled, eight of them every 1,024 bytes.
__device__ __forceinline__ u64 describe(u32 address) {
  return (u64)((address & 0x3FFFF) >> 4) | (1ull << 16) | (64ull << 32) | (1ull << 62);
}

// The compiler must neither move the sums of running multiplications nor keep copies of them.
__device__ __forceinline__ void pin(float (&sums)[BLOCK_N / 2]) {
#pragma unroll
  for (int i = 0; i < BLOCK_N / 2; ++i) asm volatile("" : "+f"(sums[i])::"memory");
}

__device__ __forceinline__ float widen(u16 element) {
  if (!IS_HALF) return __uint_as_float((u32)element << 16);
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(element));
  return value;
}

__device__ __forceinline__ u32 round_two(float low, float high) {
  u32 both;
  if (IS_HALF) {
    asm("cvt.rn.f16x2.f32 %0, %2, %1;" : "=r"(both) : "f"(low), "f"(high));
  } else {
    asm("cvt.rn.bf16x2.f32 %0, %2, %1;" : "=r"(both) : "f"(low), "f"(high));
  }
  return both;
}

__device__ __forceinline__ float silu_times(float gate, float up) {
  return __fdividef(gate, 1.0f + __expf(-gate)) * up;
}

// Word i of lane q, of each four lanes, becomes word q of lane i.
__device__ __forceinline__ void transpose_quad(u32 (&words)[4], u32 q) {
  const bool is_odd = q & 1, is_high = q & 2;
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    const u32 other = __shfl_xor_sync(~0u, is_odd ? words[i] : words[i + 1], 1);
    if (is_odd) words[i] = other;
    else words[i + 1] = other;
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const u32 other = __shfl_xor_sync(~0u, is_high ? words[i] : words[i + 2], 2);
    if (is_high) words[i] = other;
    else words[i + 2] = other;
  }
}

// Each cluster makes every num_clusters-th of the groups of CLUSTER_M by CLUSTER_N tiles; those of the same rows of the
// weight follow one another. num_columns: of the output
extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(384, 1)
    wgmma_linear(const __grid_constant__ TensorMap hidden_map, const __grid_constant__ TensorMap weight_map,
                 u16* output, const u16* bias, int num_tokens, int num_columns, int in_features) {
  extern __shared__ __align__(1024) unsigned char shared[];
  const u32 stages = (u32)__cvta_generic_to_shared(shared);
  const u32 full = stages + NUM_STAGES * STAGE_BYTES, empty = full + 8 * NUM_STAGES;
  const int team = threadIdx.x / 128, warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  const int cluster = blockIdx.x / CLUSTER, num_clusters = gridDim.x / CLUSTER;
  const int block_m = blockIdx.x % CLUSTER_M, block_n = blockIdx.x / CLUSTER_M % CLUSTER_N;  // in the cluster
  const int block_k = blockIdx.x % CLUSTER / (CLUSTER_M * CLUSTER_N);
  const auto number_of = [&](int m, int n, int k) { return (k * CLUSTER_N + n) * CLUSTER_M + m; };
  const int groups_m = (num_tokens + BLOCK_M * CLUSTER_M - 1) / (BLOCK_M * CLUSTER_M);
  const int num_groups = groups_m * ((num_columns + OUTPUT_N * CLUSTER_N - 1) / (OUTPUT_N * CLUSTER_N));
  const int all_k = (in_features + BLOCK_K - 1) / BLOCK_K, per_block = (all_k + CLUSTER_K - 1) / CLUSTER_K;
  const int first_k = block_k * per_block, num_k = min(per_block, all_k - first_k);  // perhaps none for the second
  const auto first_token = [&](int group) { return (group % groups_m * CLUSTER_M + block_m) * BLOCK_M; };
  const auto first_column_of = [&](int group) { return (group / groups_m * CLUSTER_N + block_n) * OUTPUT_N; };

  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < NUM_STAGES; ++stage) {
      init_barrier(full + 8 * stage, 1);
      init_barrier(empty + 8 * stage, CONSUMER_WARPS * (CLUSTER_M + CLUSTER_N - 1));
    }
    asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async;" ::: "memory");
  }
  meet_cluster();

  if (team == 0) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    if (threadIdx.x == 0) {
      int token, column;  // the tile's first
      const auto fetch_hidden = [&](int stage, int k) {
        const u32 to = stages + stage * STAGE_BYTES, barrier = full + 8 * stage;
        const int from = (first_k + k) * BLOCK_K;
        if (CLUSTER_N == 1) {
          fetch(to, &hidden_map, from, token, barrier, EVICT_LAST);
        } else {
          const u16 blocks = 1 << number_of(block_m, 0, block_k) | 1 << number_of(block_m, 1, block_k);
          const int half = block_n * (BLOCK_M / 2);
          fetch_for(blocks, to + half * ROW_BYTES, &hidden_map, from, token + half, barrier, EVICT_LAST);
        }
      };
      const auto fetch_weight = [&](int stage, int k) {
        const u32 barrier = full + 8 * stage;
        const int from = (first_k + k) * BLOCK_K;
        arrive_and_expect(barrier, STAGE_BYTES);
        for (int half = 0; half < 2; ++half) {
          const int row = column + half * (IS_GATED ? num_columns : HALF_N);
          const u32 to = stages + stage * STAGE_BYTES + HIDDEN_BYTES + half * (WEIGHT_BYTES / 2);
          if (CLUSTER_M == 1) {
            fetch(to, &weight_map, from, row, barrier, EVICT_FIRST);
          } else if (half == block_m) {
            fetch_for(3 << number_of(0, block_n, block_k), to, &weight_map, from, row, barrier, EVICT_FIRST);
          }
        }
      };
      // The weight's first tiles are on their way before what the kernel ahead writes can be read.
      int num_ahead = cluster < num_groups ? min(NUM_STAGES, num_k) : 0;
      column = first_column_of(cluster);
      for (int stage = 0; stage < num_ahead; ++stage) fetch_weight(stage, stage);
      asm volatile("griddepcontrol.wait;" ::: "memory");
      int stage = 0;
      u32 phase = 0;
      for (int group = cluster; group < num_groups; group += num_clusters) {
        token = first_token(group);
        column = first_column_of(group);
        for (int k = 0; k < num_k; ++k) {
          if (num_ahead > 0) {
            --num_ahead;
          } else {
            wait(empty + 8 * stage, phase ^ 1);
            fetch_weight(stage, k);
          }
          fetch_hidden(stage, k);
          if (++stage == NUM_STAGES) {
            stage = 0;
            phase ^= 1;
          }
        }
      }
    }
    __syncwarp();
    if (CLUSTER_K > 1) {
      meet_cluster();
      sync_cluster();
    }
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    // Lane by lane the blocks that fetch for this one: those of its rows of the weight, then those of its tokens.
    const int fetcher = lane < CLUSTER_M ? number_of(lane, block_n, block_k) : number_of(block_m, 1 - block_n, block_k);
    const auto release = [&](int stage) {
      if (lane < CLUSTER_M + CLUSTER_N - 1) arrive(in_block(empty + 8 * stage, fetcher));
    };
    const u32 tokens = (team - 1) * (HIDDEN_BYTES / 2);
    const u32 q = lane % 4;
    int stage = 0;
    u32 phase = 0;
    for (int group = cluster; group < num_groups; group += num_clusters) {
      const int token = first_token(group), first_column = first_column_of(group);
      // Of a warp's 16 tokens by BLOCK_N: tokens lane / 4 and 8 more, columns 2 * (lane % 4) and 1 more of each eight.
      float sums[BLOCK_N / 2];
      if (HAS_BIAS || CLUSTER_K > 1) {
#pragma unroll
        for (int i = 0; i < BLOCK_N / 2; ++i) {
          sums[i] = 0.0f;
          if (!HAS_BIAS || block_k > 0) continue;
          const int at = i / 4 * 8 + q * 2 + i % 2;  // row of the weight's tile
          const bool is_up = IS_GATED && at >= HALF_N;
          const int column = first_column + at - (is_up ? HALF_N : 0);
          if (column < num_columns) sums[i] = widen(bias[column + (is_up ? num_columns : 0)]);
        }
      }
      int running = -1;
      for (int k = 0; k < num_k; ++k) {
        wait(full + 8 * stage, phase);
        const u64 a = describe(stages + stage * STAGE_BYTES + tokens);
        const u64 b = describe(stages + stage * STAGE_BYTES + HIDDEN_BYTES);
        pin(sums);
        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
        for (int step = 0; step < BLOCK_K / 16; ++step) {
          WGMMA(sums, a + 2 * step, b + 2 * step, HAS_BIAS || CLUSTER_K > 1 || (k | step) != 0);
        }
        asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
        pin(sums);
        if (running >= 0) {
          asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
          release(running);
        }
        running = stage;
        if (++stage == NUM_STAGES) {
          stage = 0;
          phase ^= 1;
        }
      }
      asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
      pin(sums);
      // The chunks [first_chunk, last_chunk) of eight columns: a lane has two columns of each, and writes a whole one.
      const auto write = [&](int first_chunk, int last_chunk) {
#pragma unroll
        for (int lower = 0; lower < 2; ++lower) {
          const int its_token = token + (team - 1) * 64 + warp * 16 + lower * 8 + lane / 4;
          u16* row = output + (long long)its_token * num_columns;
#pragma unroll
          for (int first = first_chunk; first < last_chunk; first += 4) {
            u32 words[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              if (first + i >= last_chunk) {
                words[i] = 0;
              } else {
                const int at = (first + i) * 4 + lower * 2;
                const float low = IS_GATED ? silu_times(sums[at], sums[at + UP]) : sums[at];
                const float high = IS_GATED ? silu_times(sums[at + 1], sums[at + 1 + UP]) : sums[at + 1];
                words[i] = round_two(low, high);
              }
            }
            transpose_quad(words, q);
            const int chunk = first + q, column = first_column + chunk * 8;
            if (its_token < num_tokens && chunk < last_chunk && column < num_columns) {
              *reinterpret_cast<uint4*>(row + column) = make_uint4(words[0], words[1], words[2], words[3]);
            }
          }
        }
      };
      if (CLUSTER_K == 1) {
        release(running);
        write(0, CHUNKS);
        continue;
      }
      // In each block, over tiles that nobody reads any more: sums [CLUSTER_K, PART, CONSUMERS] of its part
      const u32 sums_of_thread = stages + (threadIdx.x - 128) * 4;
      const auto offset = [](int from, int i) { return (from * PART + i) * CONSUMERS * 4; };
      meet_cluster();
#pragma unroll
      for (int to = 0; to < CLUSTER_K; ++to) {
        const u32 there = in_block(sums_of_thread + offset(block_k, 0), number_of(block_m, block_n, to));
#pragma unroll
        for (int i = 0; i < PART; ++i) store(there + offset(0, i), sums[to * PART + i]);
      }
      sync_cluster();
#pragma unroll
      for (int mine = 0; mine < CLUSTER_K; ++mine) {
        if (mine != block_k) continue;
#pragma unroll
        for (int i = 0; i < PART; ++i) {
          sums[mine * PART + i] = 0.0f;
#pragma unroll
          for (int from = 0; from < CLUSTER_K; ++from) sums[mine * PART + i] += load(sums_of_thread + offset(from, i));
        }
        write(mine * PART / 4, (mine + 1) * PART / 4);
      }
    }
  }
  // Nobody leaves while another block may still write into its memory or arrive at its barriers.
  if (CLUSTER_K == 1) sync_cluster();
}
