// Linear recurrences on Hopper, forward: S_t = e^g_t S_{t-1} + k_t^T v_t, o_t = scale q_t S_t, by chunks of 64 tokens
// (without DECAY, g is 0). A block takes 32 value channels of one head and walks along the sequence once, so that q,
// k and v are read once and the state never leaves the registers of one warpgroup. Two others make the outputs of even
// and odd chunks from copies of the state that it leaves in shared memory, one warp loads by TMA, one sums
// the decays, and two scale values by them.
// Blocks of a cluster have the same head: each loads a part of q and k for all of them.
//
// With DELTA the rule is S_t = e^g_t (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T: what a chunk writes is not v but
// u = T (v - e^G k S), with T from `recur_delta.cu`, which the state's warpgroup works out between two states.
//
// D (64 or 128), CLUSTER (1, 2 or 4 blocks), and optionally DECAY, DELTA, F16 are compile-time.
#include "common.cuh"

#ifdef DELTA
constexpr int STAGES = 4, TB = 64 * 128;
#else
constexpr int STAGES = 4, TB = 0;
#endif
constexpr int C = 64, N = 32, DC = D / 64;
constexpr int QB = DC * C * 128, VB = C * N * 2, SB = D * N * 2, STAGE = 2 * QB + TB + VB;
constexpr int PART = C / CLUSTER;  // tokens that a block loads for its cluster

struct Params {
  u16* out;
  const float *g, *initial;
  float* last;
  i64 g_b, g_h, g_t, o_b, o_h, o_t;
  int heads, q_group, k_group, v_group, g_group, t, dv, chunks;
  float scale;
};

struct Rings {
  u64 full[STAGES], empty[STAGES], g_full[STAGES], scaled[STAGES], s_full[2], s_empty[2];
  float decay[STAGES][C];  // sums of g from the start of the chunk, times log2 e
};

// A transposed operand in the 64-byte swizzle: rows of 32 elements, 8 rows an atom of 512 bytes.
DEV u64 operand64(u32 at) { return (u64)((at & 0x3ffff) >> 4) | 1ull << 16 | (u64)(512 >> 4) << 32 | 2ull << 62; }
// Where 16-byte piece c of row r of such a tile lies.
DEV u32 spot64(int r, int c) { return r * 64 + ((c ^ (r >> 1 & 3)) << 4); }

DEV void tma_load_all(u32 to, const TensorMap* map, u32 bar, int d, int t, int h, int b, u16 mask) {
  asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
               "[%0], [%1, {%3, %4, %5, %6}], [%2], %7;"
               ::"r"(to), "l"(map), "r"(bar), "r"(d), "r"(t), "r"(h), "r"(b), "h"(mask) : "memory");
}
// Tell all blocks of the cluster that a warp is done with a stage.
DEV void release(u32 bar, int lane) {
  if (CLUSTER == 1) {
    if (lane == 0) barrier_arrive(bar);
  } else if (lane < CLUSTER) {
    asm volatile("{.reg .b32 far; mapa.shared::cluster.u32 far, %0, %1;\n"
                 "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [far];}" ::"r"(bar), "r"(lane) : "memory");
  }
}
DEV void cluster_sync() {
  if (CLUSTER > 1)
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
  else
    __syncthreads();
}
DEV void store_shared(u32 at, uint4 x) {
  asm volatile("st.shared.v4.b32 [%0], {%1,%2,%3,%4};" ::"r"(at), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w) : "memory");
}
#if defined DECAY && !defined DELTA
DEV uint4 load_shared(u32 at) {
  uint4 x;
  asm volatile("ld.shared.v4.b32 {%0,%1,%2,%3}, [%4];" : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "r"(at) : "memory");
  return x;
}
DEV u32 times(u32 x, float f) { return pack2(low(x) * f, high(x) * f); }
#endif

extern "C" __global__ void
#if CLUSTER > 1
__cluster_dims__(CLUSTER, 1, 1)
#endif
__launch_bounds__(512, 1) recur(const __grid_constant__ TensorMap mq, const __grid_constant__ TensorMap mk,
                                const __grid_constant__ TensorMap mv,
#ifdef DELTA
                                const __grid_constant__ TensorMap mt,
#endif
                                const __grid_constant__ Params p) {
  extern __shared__ u8 raw[];
  __shared__ Rings rings;
  u32 room = (shared_address(raw) + 1023) & ~1023u;
  u32 states = room + STAGES * STAGE;
  int group = threadIdx.x / 128, warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32, quad = lane % 4, g = lane / 4;
  int parts = p.dv / N, part = blockIdx.x % parts, bh = blockIdx.x / parts, b = bh / p.heads, h = bh % p.heads;
#define AT(x) shared_address(&rings.x)
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; i++) {
      barrier_init(AT(full[i]), 1);
      barrier_init(AT(empty[i]), 8 * CLUSTER);
      barrier_init(AT(g_full[i]), 1);
      barrier_init(AT(scaled[i]), 64);
    }
    for (int i = 0; i < 2; i++) {
      barrier_init(AT(s_full[i]), 128);
      barrier_init(AT(s_empty[i]), 4);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  }
  __syncthreads();
  cluster_sync();
  auto stage_of = [](int c) { return c % STAGES; };
  auto phase_of = [](int c) { return (u32)(c / STAGES) & 1; };

  if (group == 0) {
    if (warp == 0 && lane == 0) {
      int rank = CLUSTER > 1 ? blockIdx.x % CLUSTER : 0;
      for (int c = 0; c < p.chunks; c++) {
        int s = stage_of(c);
        u32 at = room + s * STAGE, bar = AT(full[s]);
        barrier_wait(AT(empty[s]), phase_of(c) ^ 1);
        barrier_expect(bar, STAGE);
        for (int x = 0; x < DC; x++) {
          u32 to = at + x * C * 128 + rank * PART * 128;
          if (CLUSTER > 1) {
            tma_load_all(to, &mq, bar, 64 * x, c * C + rank * PART, h / p.q_group, b, (1 << CLUSTER) - 1);
            tma_load_all(to + QB, &mk, bar, 64 * x, c * C + rank * PART, h / p.k_group, b, (1 << CLUSTER) - 1);
          } else {
            tma_load(to, &mq, bar, 64 * x, c * C, h / p.q_group, b, NORMAL);
            tma_load(to + QB, &mk, bar, 64 * x, c * C, h / p.k_group, b, NORMAL);
          }
        }
        tma_load(at + 2 * QB + TB, &mv, bar, part * N, c * C, h / p.v_group, b, PASS);
#ifdef DELTA
        tma_load(at + 2 * QB, &mt, bar, 0, c * C, h, b, NORMAL);
#endif
      }
    }
#ifdef DECAY
    if (warp == 1) {
      const float* from = p.g + b * p.g_b + h / p.g_group * p.g_h;
      auto get = [&](int t) { return t < p.t ? from[t * p.g_t] * LOG2E : 0.f; };
      float x = get(2 * lane), y = get(2 * lane + 1);
      for (int c = 0; c < p.chunks; c++) {
        int s = stage_of(c), next = (c + 1) * C + 2 * lane;
        float sum = x + y;
#pragma unroll
        for (int d = 1; d < 32; d *= 2) {
          float up = __shfl_up_sync(~0u, sum, d);
          if (lane >= d) sum += up;
        }
        float2 two = make_float2(sum - y, sum);
        x = get(next);
        y = get(next + 1);
        barrier_wait(AT(empty[s]), phase_of(c) ^ 1);
        *(float2*)&rings.decay[s][2 * lane] = two;
        __syncwarp();
        if (lane == 0) barrier_arrive(AT(g_full[s]));
      }
    }
#ifndef DELTA
    // Two warps scale the values by what is left of them at the chunk's end, ahead of the state.
    if (warp >= 2) {
      for (int c = 0; c < p.chunks; c++) {
        int s = stage_of(c);
        u32 v = room + s * STAGE + 2 * QB + TB, to = states + 2 * SB + s * VB;
        barrier_wait(AT(full[s]), phase_of(c));
        barrier_wait(AT(g_full[s]), phase_of(c));
        float all = rings.decay[s][C - 1];
#pragma unroll
        for (int i = 0; i < 4; i++) {
          int id = threadIdx.x - 64 + 64 * i;
          float f = exp2_fast(all - rings.decay[s][id / 4]);
          uint4 x = load_shared(v + id * 16);  // the swizzle leaves a row in its row
          store_shared(to + id * 16, make_uint4(times(x.x, f), times(x.y, f), times(x.z, f), times(x.w, f)));
        }
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
        barrier_arrive(AT(scaled[s]));
      }
    }
#endif
#endif
  } else if (group == 1) {
    // The state: rows are key channels 64 m + 16 warp + g (+ 8), columns this block's value channels.
    float state[DC][16];
    i64 base = (i64)bh * D * p.dv + part * N;
#pragma unroll
    for (int m = 0; m < DC; m++)
#pragma unroll
      for (int i = 0; i < 16; i++) {
        int row = 64 * m + 16 * warp + g + 8 * (i / 2 % 2), col = 8 * (i / 4) + 2 * quad + i % 2;
        state[m][i] = p.initial ? p.initial[base + (i64)row * p.dv + col] : 0.f;
      }
    for (int c = 0; c < p.chunks; c++) {
      int s = stage_of(c), half = c & 1;
      u32 k = room + s * STAGE + QB, v = k + QB + TB, out = states + half * SB;
      barrier_wait(AT(s_empty[half]), (u32)(c / 2 & 1) ^ 1);
#pragma unroll
      for (int m = 0; m < DC; m++)
#pragma unroll
        for (int x = 0; x < 2; x++) {
          u32 z[4];
#pragma unroll
          for (int j = 0; j < 4; j++) z[j] = pack2(state[m][4 * j + 2 * x], state[m][4 * j + 2 * x + 1]);
          quad_transpose(z, quad);
          store_shared(out + spot64(64 * m + 16 * warp + g + 8 * x, quad), make_uint4(z[0], z[1], z[2], z[3]));
        }
      asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#ifndef DELTA
      barrier_arrive(AT(s_full[half]));
#endif
      barrier_wait(AT(full[s]), phase_of(c));
#ifdef DECAY
      barrier_wait(AT(g_full[s]), phase_of(c));
      float all = rings.decay[s][C - 1], by = exp2_fast(all);
#endif
#ifdef DELTA
      // What the state says at each key, what is left to write, and T times that.
      u32 rest = states + 2 * SB, said = rest + VB + half * 2 * VB;
      int row = 16 * warp + g;
      named_sync(1, 128);
      float u[16];
#pragma unroll
      for (int i = 0; i < 16; i++) u[i] = 0.f;
      pin(u);
      wgmma_fence();
#pragma unroll
      for (int i = 0; i < D / 16; i++)
        Wgmma<N>::ss<0, 1>(u, operand(k + i / 4 * C * 128 + i % 4 * 32, 16), operand64(out + i * 1024), i > 0);
      wgmma_commit();
      wgmma_wait<0>();
      pin(u);
#pragma unroll
      for (int x = 0; x < 2; x++) {
        float f = 1.f;
#ifdef DECAY
        f = exp2_fast(rings.decay[s][row + 8 * x]);
#endif
        u32 z[4];
#pragma unroll
        for (int j = 0; j < 4; j++) {
          u32 y;
          asm volatile("ld.shared.b32 %0, [%1];" : "=r"(y) : "r"(v + spot64(row + 8 * x, j) + 4 * quad) : "memory");
          z[j] = pack2(low(y) - f * u[4 * j + 2 * x], high(y) - f * u[4 * j + 2 * x + 1]);
        }
        quad_transpose(z, quad);
        store_shared(rest + spot64(row + 8 * x, quad), make_uint4(z[0], z[1], z[2], z[3]));
      }
      asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
      named_sync(1, 128);
      pin(u);
      wgmma_fence();
#pragma unroll
      for (int i = 0; i < C / 16; i++)
        Wgmma<N>::ss<0, 1>(u, operand(k + QB + i * 32, 16), operand64(rest + i * 1024), i > 0);
      wgmma_commit();
      wgmma_wait<0>();
      pin(u);
      v = said;
#pragma unroll
      for (int x = 0; x < 2; x++) {
        u32 z[4];
#pragma unroll
        for (int j = 0; j < 4; j++) z[j] = pack2(u[4 * j + 2 * x], u[4 * j + 2 * x + 1]);
        quad_transpose(z, quad);
        store_shared(said + spot64(row + 8 * x, quad), make_uint4(z[0], z[1], z[2], z[3]));
#ifdef DECAY
        float f = exp2_fast(all - rings.decay[s][row + 8 * x]);
#pragma unroll
        for (int j = 0; j < 4; j++) z[j] = pack2(f * u[4 * j + 2 * x], f * u[4 * j + 2 * x + 1]);
        quad_transpose(z, quad);
        store_shared(said + VB + spot64(row + 8 * x, quad), make_uint4(z[0], z[1], z[2], z[3]));
        v = said + VB;
#endif
      }
      asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
      named_sync(1, 128);
      barrier_arrive(AT(s_full[half]));
#elif defined DECAY
      barrier_wait(AT(scaled[s]), phase_of(c));
      v = states + 2 * SB + s * VB;
#endif
#ifdef DECAY
#pragma unroll
      for (int m = 0; m < DC; m++)
#pragma unroll
        for (int i = 0; i < 16; i++) state[m][i] *= by;
#endif
#pragma unroll
      for (int m = 0; m < DC; m++) pin(state[m]);
      wgmma_fence();
#pragma unroll
      for (int i = 0; i < C / 16; i++)
#pragma unroll
        for (int m = 0; m < DC; m++)
          Wgmma<N>::ss<1, 1>(state[m], operand(k + m * C * 128 + i * 2048, 16), operand64(v + i * 1024), 1);
      wgmma_commit();
      wgmma_wait<0>();
#pragma unroll
      for (int m = 0; m < DC; m++) pin(state[m]);
      release(AT(empty[s]), lane);
    }
    if (p.last) {
#pragma unroll
      for (int m = 0; m < DC; m++)
#pragma unroll
        for (int i = 0; i < 16; i++) {
          int row = 64 * m + 16 * warp + g + 8 * (i / 2 % 2), col = 8 * (i / 4) + 2 * quad + i % 2;
          p.last[base + (i64)row * p.dv + col] = state[m][i];
        }
    }
  } else {
    for (int c = group - 2; c < p.chunks; c += 2) {
      int s = stage_of(c), half = c & 1, row = 16 * warp + g;
      u32 q = room + s * STAGE, k = q + QB, from = states + half * SB;
#ifdef DELTA
      u32 v = states + 2 * SB + VB + half * 2 * VB;
#else
      u32 v = k + QB;
#endif
      float a[32], o[16];
#pragma unroll
      for (int i = 0; i < 32; i++) a[i] = 0.f;
#pragma unroll
      for (int i = 0; i < 16; i++) o[i] = 0.f;
      barrier_wait(AT(full[s]), phase_of(c));
      pin(a);
      pin(o);
      wgmma_fence();
#pragma unroll
      for (int i = 0; i < D / 16; i++) {
        u32 at = i / 4 * C * 128 + i % 4 * 32;
        Wgmma<C>::ss<0, 0>(a, operand(q + at, 16), operand(k + at, 16), i > 0);
      }
      wgmma_commit();
      barrier_wait(AT(s_full[half]), (u32)(c / 2) & 1);
      wgmma_fence();
#pragma unroll
      for (int i = 0; i < D / 16; i++)
        Wgmma<N>::ss<0, 1>(o, operand(q + i / 4 * C * 128 + i % 4 * 32, 16), operand64(from + i * 1024), i > 0);
      wgmma_commit();
#ifdef DECAY
      barrier_wait(AT(g_full[s]), phase_of(c));
      float at[2] = {rings.decay[s][row], rings.decay[s][row + 8]};
#endif
      wgmma_wait<1>();
      pin(a);
      u32 w[16];
#pragma unroll
      for (int j = 0; j < 8; j++) {
#ifdef DECAY
        float2 then = *(const float2*)&rings.decay[s][8 * j + 2 * quad];
#endif
#pragma unroll
        for (int x = 0; x < 2; x++) {
          float y0 = a[4 * j + 2 * x], y1 = a[4 * j + 2 * x + 1];
          int col = 8 * j + 2 * quad;
#ifdef DECAY
          y0 *= exp2_fast(at[x] - then.x);
          y1 *= exp2_fast(at[x] - then.y);
#endif
          // Later tokens, whose factor may be infinite.
          y0 = col <= row + 8 * x ? y0 : 0.f;
          y1 = col + 1 <= row + 8 * x ? y1 : 0.f;
          w[2 * j + x] = pack2(y0, y1);
        }
      }
      wgmma_wait<0>();
      pin(o);
#ifndef DELTA
      if (lane == 0) barrier_arrive(AT(s_empty[half]));
#endif
#ifdef DECAY
#pragma unroll
      for (int i = 0; i < 16; i++) o[i] *= exp2_fast(at[i / 2 % 2]);
#endif
      pin(o);
      pin(w);
      wgmma_fence();
#pragma unroll
      for (int i = 0; i < C / 16; i++)
        Wgmma<N>::rs<1>(o, w[4 * i], w[4 * i + 1], w[4 * i + 2], w[4 * i + 3], operand64(v + i * 1024), 1);
      wgmma_commit();
      wgmma_wait<0>();
      pin(o);
#ifdef DELTA
      if (lane == 0) barrier_arrive(AT(s_empty[half]));
#endif
      release(AT(empty[s]), lane);
#pragma unroll
      for (int x = 0; x < 2; x++) {
        int t = c * C + row + 8 * x;
        u32 z[4];
#pragma unroll
        for (int j = 0; j < 4; j++) z[j] = pack2(o[4 * j + 2 * x] * p.scale, o[4 * j + 2 * x + 1] * p.scale);
        quad_transpose(z, quad);
        if (t < p.t)
          *(uint4*)(p.out + b * p.o_b + h * p.o_h + t * p.o_t + part * N + 8 * quad) = make_uint4(z[0], z[1], z[2], z[3]);
      }
    }
  }
  __syncwarp();
  cluster_sync();
}
