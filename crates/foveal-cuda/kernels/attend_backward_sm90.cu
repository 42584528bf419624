// Gradients of exact attention on Hopper. A block has 128 keys, 64 for each of two warpgroups, and walks along the
// queries that see them, 64 at a time, of all heads of the group. Everything is transposed (rows are keys), so that
// weights and their gradients go from the accumulators of one product straight into registers of the next:
//   s = k q^T   p = e^(s - lse)   dp = v dout^T   ds = p (dp - delta)   dv += p dout   dk += ds q   dq += ds^T k
// ds goes through shared memory once, for dq, of which each warpgroup makes half of the channels; sums over blocks are
// made by bulk reductions in L2, in the order of registers, which `finish` undoes. The order of these f32 sums varies.
//
// D (of q, k, v: 64 or 128), and optionally MASK (causality or a band), F16 are compile-time.
#include "common.cuh"

constexpr int BN = 128, BM = 64, STAGES = 2, DC = D / 64, HALF = D / 2;
constexpr int KB = DC * BN * 128, QB = DC * BM * 128, SB = BN * 128;  // K or V, Q or dout, ds
constexpr int QS = HALF * BM * 4;                                     // a warpgroup's part of dq

struct Params {
  u16 *dk, *dv, *dq;
  float *lse, *delta, *sums;  // of padded rows: base 2, infinite where nothing is seen; less its gradient; dq
  const u16 *out, *dout;
  const float *lse_in, *dlse;
  i64 k_b, k_h, k_t, v_b, v_h, v_t, q_b, q_h, q_t, o_b, o_h, o_t, g_b, g_h, g_t;
  int batch, heads, kv_heads, tq, tk, q_tiles, left, right;
  float scale;
};

// delta = sum of dout * out, less the gradient of lse; a warp a row, padded rows too.
extern "C" __global__ void __launch_bounds__(256) prepare(const __grid_constant__ Params p) {
  int lane = threadIdx.x % 32, rows = p.q_tiles * BM;
  i64 id = (i64)blockIdx.x * 8 + threadIdx.x / 32;
  if (id >= (i64)p.batch * p.heads * rows) return;
  int i = (int)(id % rows), bh = (int)(id / rows), b = bh / p.heads, h = bh % p.heads;
  float lse = INF, sum = 0.f;
  if (i < p.tq) {
    const u16* x = p.out + b * p.o_b + h * p.o_h + i * p.o_t;
    const u16* y = p.dout + b * p.g_b + h * p.g_h + i * p.g_t;
    for (int c = lane; c < D; c += 32) sum = fmaf(widen(x[c]), widen(y[c]), sum);
    for (int d = 16; d; d /= 2) sum += __shfl_xor_sync(~0u, sum, d);
    float l = p.lse_in[(i64)bh * p.tq + i];
    lse = l == -INF ? INF : l * LOG2E;
    if (p.dlse) sum -= p.dlse[(i64)bh * p.tq + i];
  }
  if (lane == 0) {
    p.lse[id] = lse;
    p.delta[id] = sum;
  }
}

struct Rings {
  u64 kv_full, full[STAGES], empty[STAGES];
  __align__(16) float lse[STAGES][BM], delta[STAGES][BM];
};

DEV void bulk_load(u32 to, const void* from, u32 bytes, u32 bar) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
               ::"r"(to), "l"(from), "r"(bytes), "r"(bar) : "memory");
}
DEV void stmatrix4(u32 at, u32 a, u32 b, u32 c, u32 d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(at), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}

// Tiles of queries that see some of the keys key .. key + BN.
DEV int2 span(const Params& p, int key) {
#ifdef MASK
  int at = p.tk - p.tq, last = min(key + BN, p.tk) - 1;
  i64 from = max((i64)0, (i64)key - p.right - at), to = max((i64)0, min((i64)p.tq, (i64)last + p.left - at));
  return make_int2((int)min(from / BM, (i64)p.q_tiles), (int)((to + BM - 1) / BM));
#else
  return make_int2(0, p.q_tiles);
#endif
}

extern "C" __global__ void __launch_bounds__(384, 1)
backward(const __grid_constant__ TensorMap mq, const __grid_constant__ TensorMap mk, const __grid_constant__ TensorMap mv,
         const __grid_constant__ TensorMap mg, const __grid_constant__ Params p) {
  extern __shared__ u8 raw[];
  __shared__ Rings rings;
  u32 room = (shared_address(raw) + 1023) & ~1023u;
  u32 ks = room, vs = ks + KB, qs = vs + KB, gs = qs + STAGES * QB, ss = gs + STAGES * QB, sums = ss + 2 * SB;
  int group = threadIdx.x / 128, warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32, quad = lane % 4, g = lane / 4;
  int key_tiles = (p.tk + BN - 1) / BN, kv_id = blockIdx.x / key_tiles, key = blockIdx.x % key_tiles * BN;
  int b = kv_id / p.kv_heads, kv = kv_id % p.kv_heads, shared_by = p.heads / p.kv_heads;
  int2 todo = span(p, key);
  int each = max(0, todo.y - todo.x), n = each * shared_by;
#define AT(x) shared_address(&rings.x)
  if (threadIdx.x == 0) {
    barrier_init(AT(kv_full), 1);
    for (int i = 0; i < STAGES; i++) {
      barrier_init(AT(full[i]), 1);
      barrier_init(AT(empty[i]), 8);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  }
  __syncthreads();

  if (group == 0) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
    if (threadIdx.x == 0 && n > 0) {
      barrier_expect(AT(kv_full), 2 * KB);
      for (int c = 0; c < DC; c++) {
        tma_load(ks + c * BN * 128, &mk, AT(kv_full), 64 * c, key, kv, b, PASS);
        tma_load(vs + c * BN * 128, &mv, AT(kv_full), 64 * c, key, kv, b, PASS);
      }
      int s = 0;
      u32 phase = 1;
      for (int x = 0; x < shared_by; x++) {
        int h = kv * shared_by + x;
        for (int t = todo.x; t < todo.y; t++) {
          i64 at = ((i64)(b * p.heads + h) * p.q_tiles + t) * BM;
          u32 bar = AT(full[s]);
          barrier_wait(AT(empty[s]), phase);
          barrier_expect(bar, 2 * QB + 8 * BM);
          for (int c = 0; c < DC; c++) {
            tma_load(qs + s * QB + c * BM * 128, &mq, bar, 64 * c, t * BM, h, b, KEEP);
            tma_load(gs + s * QB + c * BM * 128, &mg, bar, 64 * c, t * BM, h, b, KEEP);
          }
          bulk_load(AT(lse[s]), p.lse + at, 4 * BM, bar);
          bulk_load(AT(delta[s]), p.delta + at, 4 * BM, bar);
          if (++s == STAGES) { s = 0; phase ^= 1; }
        }
      }
    }
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
    int me = group - 1, mine = key + 64 * me, row = 16 * warp + g;
    float dk[D / 2], dv[D / 2];
#pragma unroll
    for (int i = 0; i < D / 2; i++) dk[i] = dv[i] = 0.f;
    u32 k = ks + me * 8192, v = vs + me * 8192, parts = sums + me * QS;
    float c = p.scale * LOG2E;
    int s = 0, h = kv * shared_by, t = todo.x;
    u32 phase = 0;
    if (n > 0) barrier_wait(AT(kv_full), 0);
    for (int i = 0; i < n; i++) {
      u32 q = qs + s * QB, dout = gs + s * QB, ds = ss + (i & 1) * SB;
      float st[BM / 2], dp[BM / 2];
      barrier_wait(AT(full[s]), phase);
      wgmma_fence();
#pragma unroll
      for (int x = 0; x < D / 16; x++) {
        u32 in = x % 4 * 32;
        Wgmma<BM>::ss<0, 0>(st, operand(k + x / 4 * BN * 128 + in, 16), operand(q + x / 4 * BM * 128 + in, 16), x > 0);
      }
      wgmma_commit();
#pragma unroll
      for (int x = 0; x < D / 16; x++) {
        u32 in = x % 4 * 32;
        Wgmma<BM>::ss<0, 0>(dp, operand(v + x / 4 * BN * 128 + in, 16), operand(dout + x / 4 * BM * 128 + in, 16), x > 0);
      }
      wgmma_commit();
      wgmma_wait<1>();
      pin(st);
      bool edge = mine + 64 > p.tk;
#ifdef MASK
      int at = p.tk - p.tq + t * BM;
      edge |= mine + 63 > at + p.right || mine < at + BM - 1 - p.left + 1;
#endif
      u32 w[BM / 4];
#pragma unroll
      for (int j = 0; j < BM / 8; j++) {
        float2 l = *(const float2*)&rings.lse[s][8 * j + 2 * quad];
#pragma unroll
        for (int x = 0; x < 2; x++) {
          st[4 * j + 2 * x] = exp2_fast(fmaf(st[4 * j + 2 * x], c, -l.x));
          st[4 * j + 2 * x + 1] = exp2_fast(fmaf(st[4 * j + 2 * x + 1], c, -l.y));
        }
      }
      if (edge) {
#pragma unroll
        for (int j = 0; j < BM / 8; j++)
#pragma unroll
          for (int e = 0; e < 4; e++) {
            int x = mine + row + 8 * (e / 2);
            bool off = x >= p.tk;
#ifdef MASK
            int own = at + 8 * j + 2 * quad + e % 2;
            off |= x > own + p.right || x < own - p.left + 1;
#endif
            if (off) st[4 * j + e] = 0.f;
          }
      }
#pragma unroll
      for (int x = 0; x < BM / 4; x++) w[x] = pack2(st[2 * x], st[2 * x + 1]);
      pin(w);
      pin(dv);
      wgmma_fence();
#pragma unroll
      for (int x = 0; x < BM / 16; x++)
        Wgmma<D>::rs<1>(dv, w[4 * x], w[4 * x + 1], w[4 * x + 2], w[4 * x + 3], operand(dout + x * 2048, BM * 128), 1);
      wgmma_commit();
      wgmma_wait<1>();
      pin(dp);
      u32 z[BM / 4];
#pragma unroll
      for (int j = 0; j < BM / 8; j++) {
        float2 d = *(const float2*)&rings.delta[s][8 * j + 2 * quad];
#pragma unroll
        for (int x = 0; x < 2; x++)
          z[2 * j + x] = pack2(st[4 * j + 2 * x] * (dp[4 * j + 2 * x] - d.x), st[4 * j + 2 * x + 1] * (dp[4 * j + 2 * x + 1] - d.y));
      }
      // Rows of 64 queries; matrices of 8 keys by 8 queries.
      int r = 64 * me + 16 * warp + lane % 16;
#pragma unroll
      for (int x = 0; x < BM / 16; x++)
        stmatrix4(ds + r * 128 + (((2 * x + lane / 16) ^ (r & 7)) << 4), z[4 * x], z[4 * x + 1], z[4 * x + 2], z[4 * x + 3]);
      asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
      pin(z);
      pin(dk);
      wgmma_fence();
#pragma unroll
      for (int x = 0; x < BM / 16; x++)
        Wgmma<D>::rs<1>(dk, z[4 * x], z[4 * x + 1], z[4 * x + 2], z[4 * x + 3], operand(q + x * 2048, BM * 128), 1);
      wgmma_commit();
      named_sync(1, 256);
      float dq[HALF / 2];
      wgmma_fence();
#pragma unroll
      for (int x = 0; x < BN / 16; x++)
#if D == 128
        Wgmma<HALF>::ss<1, 1>(dq, operand(ds + x * 2048, 16), operand(ks + me * BN * 128 + x * 2048, 16), x > 0);
#else
        // Half of an atom: 32 channels, 64 bytes into its rows.
        Wgmma<HALF>::ss<1, 1>(dq, operand(ds + x * 2048, 16), operand(ks + me * 64 + x * 2048, 16), x > 0);
#endif
      wgmma_commit();
      wgmma_wait<1>();
      pin(dv);
      pin(dk);
      if (lane == 0) barrier_arrive(AT(empty[s]));
      // The last reduction has read its source.
      if (threadIdx.x % 128 == 0) asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
      wgmma_wait<0>();
      pin(dq);
      named_sync(2 + me, 128);
#pragma unroll
      for (int x = 0; x < HALF / 8; x++)
        asm volatile("st.shared.v4.f32 [%0], {%1,%2,%3,%4};" ::"r"(parts + (x * 128 + threadIdx.x % 128) * 16),
                     "f"(dq[4 * x]), "f"(dq[4 * x + 1]), "f"(dq[4 * x + 2]), "f"(dq[4 * x + 3]) : "memory");
      asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
      named_sync(2 + me, 128);
      if (threadIdx.x % 128 == 0) {
        float* to = p.sums + ((i64)(b * p.heads + h) * p.q_tiles + t) * BM * D + me * HALF * BM;
        asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;"
                     ::"l"(to), "r"(parts), "r"(QS) : "memory");
        asm volatile("cp.async.bulk.commit_group;" ::: "memory");
      }
      if (++s == STAGES) { s = 0; phase ^= 1; }
      if (++t == todo.y) { t = todo.x; h++; }
    }
    if (threadIdx.x % 128 == 0) asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
#pragma unroll
    for (int x = 0; x < 2; x++) {
      int j = mine + row + 8 * x;
      u16* to_k = p.dk + b * p.k_b + kv * p.k_h + j * p.k_t;
      u16* to_v = p.dv + b * p.v_b + kv * p.v_h + j * p.v_t;
#pragma unroll
      for (int i = 0; i < D / 8; i += 4) {
        u32 y[4], z[4];
#pragma unroll
        for (int e = 0; e < 4; e++) {
          int at = 4 * (i + e) + 2 * x;
          y[e] = pack2(dk[at] * p.scale, dk[at + 1] * p.scale);
          z[e] = pack2(dv[at], dv[at + 1]);
        }
        quad_transpose(y, quad);
        quad_transpose(z, quad);
        if (j < p.tk) {
          *(uint4*)(to_k + 8 * (i + quad)) = make_uint4(y[0], y[1], y[2], y[3]);
          *(uint4*)(to_v + 8 * (i + quad)) = make_uint4(z[0], z[1], z[2], z[3]);
        }
      }
    }
  }
}

// Sums of dq, in the order of registers, to rows; a block a tile of queries.
extern "C" __global__ void __launch_bounds__(256) finish(const __grid_constant__ Params p) {
  int tile = blockIdx.x % p.q_tiles, bh = blockIdx.x / p.q_tiles, b = bh / p.heads, h = bh % p.heads;
  const float* from = p.sums + (i64)blockIdx.x * BM * D;
  for (int id = threadIdx.x; id < BM * D / 2; id += 256) {
    int r = id / (D / 2), col = id % (D / 2) * 2, me = col / HALF, in = col % HALF;
    int lane = r % 8 * 4 + in % 8 / 2, thread = r / 16 * 32 + lane, i = tile * BM + r;
    float2 x = *(const float2*)(from + me * HALF * BM + ((in / 8) * 128 + thread) * 4 + r % 16 / 8 * 2);
    if (i < p.tq) *(u32*)(p.dq + b * p.q_b + h * p.q_h + i * p.q_t + col) = pack2(x.x * p.scale, x.y * p.scale);
  }
}
