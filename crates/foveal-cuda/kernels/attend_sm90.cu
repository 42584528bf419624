// Exact attention on Hopper: one producer warp loads tiles by TMA into rings of shared memory, two warpgroups of 64
// queries each multiply them by wgmma. While one warpgroup takes exponentials the other has the tensor cores
// (named barriers hand them over), and within one the product with the values of the last tile runs beside
// the scores of the next (Shah et al. 2024, "FlashAttention-3", arXiv 2407.08608).
// Blocks stay on their multiprocessor and take tiles of 128 queries from a counter, longest first.
//
// D, DV, BN, and optionally MASK (causality or a band), TABLE (blocks), SOFTCAP, F16 are compile-time.
#include "attend.cuh"

constexpr int BM = 128, STAGES = 2;
constexpr int DC = (D + 63) / 64, VC = (DV + 63) / 64;  // columns of atoms, 64 elements wide
constexpr int QB = DC * BM * 128, KB = DC * BN * 128, VB = VC * BN * 128;
#ifndef PINGPONG
#define PINGPONG (D <= 128)
#endif

struct Rings {
  u64 q_full, q_empty, tile_full, tile_empty;
  u64 k_full[STAGES], k_empty[STAGES], v_full[STAGES], v_empty[STAGES];
  int tile, place[STAGES];
};

DEV void step(int& stage, u32& phase) {
  if (++stage == STAGES) { stage = 0; phase ^= 1; }
}

struct Rows {
  float m[2], l[2];
};

// Scores to weights; returns the factors on what was summed so far.
template <bool FIRST, bool EDGE>
DEV bool soften(float (&s)[BN / 2], Rows& r, float (&keep)[2], const Params& p, float c, int key, int row) {
#ifdef SOFTCAP
  float bend = 2.f * LOG2E * p.scale / p.cap;
#pragma unroll
  for (int i = 0; i < BN / 2; i++) s[i] = soft_cap(s[i], p.cap, bend);
#endif
  if (EDGE) {
#ifdef MASK
    int at = p.tk - p.tq + row, left = p.left, right = p.right;
#pragma unroll
    for (int h = 0; h < 2; h++) {
      int hi = min(p.tk - 1, at + 8 * h + right) - key, lo = at + 8 * h - left + 1 - key;
#pragma unroll
      for (int j = 0; j < BN / 8; j++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
          int col = 8 * j + e;
          if (col > hi || col < lo) s[4 * j + 2 * h + e] = -INF;
        }
    }
#else
    int n = p.tk - key;
#pragma unroll
    for (int j = 0; j < BN / 8; j++)
#pragma unroll
      for (int e = 0; e < 4; e++)
        if (8 * j + (e & 1) >= n) s[4 * j + e] = -INF;
#endif
  }
  float top[2];
#pragma unroll
  for (int h = 0; h < 2; h++) {
    float x[4];
#pragma unroll
    for (int j = 0; j < 4; j++) x[j] = fmaxf(s[4 * j + 2 * h], s[4 * j + 2 * h + 1]);
#pragma unroll
    for (int j = 4; j < BN / 8; j++) x[j % 4] = fmaxf(x[j % 4], fmaxf(s[4 * j + 2 * h], s[4 * j + 2 * h + 1]));
    top[h] = quad_max(fmaxf(fmaxf(x[0], x[1]), fmaxf(x[2], x[3])));
  }
  // Sums and the output are scaled only if the maximum of a row of this warp moves. (To let weights pass 1 would spare
  // more, but then the largest weight of a row is rounded, too.)
  bool moves = FIRST;
  if (!FIRST) moves = __any_sync(~0u, top[0] > r.m[0] || top[1] > r.m[1]);
  if (moves) {
#pragma unroll
    for (int h = 0; h < 2; h++) {
      float high = FIRST ? top[h] : fmaxf(top[h], r.m[h]);
      if (!FIRST) {
        keep[h] = high == -INF ? 1.f : exp2_fast((r.m[h] - high) * c);
        r.l[h] *= keep[h];
      }
      r.m[h] = high;
    }
  }
#pragma unroll
  for (int h = 0; h < 2; h++) {
    float cut = r.m[h] * c;
#ifdef MASK
    if (r.m[h] == -INF) cut = 0.f;
#endif
    float sum[2] = {0.f, 0.f};
#pragma unroll
    for (int j = 0; j < BN / 8; j++)
#pragma unroll
      for (int e = 0; e < 2; e++) {
        float& x = s[4 * j + 2 * h + e];
        x = exp2_fast(fmaf(x, c, -cut));
        sum[e] += x;
      }
    r.l[h] = FIRST ? sum[0] + sum[1] : r.l[h] + (sum[0] + sum[1]);
  }
  return moves;
}

DEV void round_weights(u32 (&w)[BN / 4], const float (&s)[BN / 2]) {
#pragma unroll
  for (int i = 0; i < BN / 4; i++) w[i] = pack2(s[2 * i], s[2 * i + 1]);
}

DEV void scores(float (&s)[BN / 2], u32 q, u32 k) {
#pragma unroll
  for (int i = 0; i < D / 16; i++) {
    u32 c = i / 4, in = (i % 4) * 32;
    Wgmma<BN>::ss<0, 0>(s, operand(q + c * BM * 128 + in, 16), operand(k + c * BN * 128 + in, 16), i > 0);
  }
  wgmma_commit();
}

DEV void values(float (&o)[DV / 2], u32 (&w)[BN / 4], u32 v) {
#pragma unroll
  for (int i = 0; i < BN / 16; i++)
    Wgmma<DV>::rs<1>(o, w[4 * i], w[4 * i + 1], w[4 * i + 2], w[4 * i + 3], operand(v + i * 2048, BN * 128), 1);
  wgmma_commit();
}

template <int N> DEV void scale_rows(float (&o)[N], const float (&f)[2]) {
#pragma unroll
  for (int i = 0; i < N; i++) o[i] *= f[(i >> 1) & 1];
}

extern "C" __global__ void __launch_bounds__(384, 1)
attend(const __grid_constant__ TensorMap mq, const __grid_constant__ TensorMap mk, const __grid_constant__ TensorMap mv,
       const __grid_constant__ Params p) {
  extern __shared__ u8 raw[];
  __shared__ Rings rings;
  u32 room = (shared_address(raw) + 1023) & ~1023u;
  u32 qs = room, ks = room + QB, vs = ks + STAGES * KB;
  int group = threadIdx.x / 128, warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
#define AT(x) shared_address(&rings.x)
  if (threadIdx.x == 0) {
    barrier_init(AT(q_full), 1);
    barrier_init(AT(q_empty), 8);
    barrier_init(AT(tile_full), 1);
    barrier_init(AT(tile_empty), 8);
    for (int i = 0; i < STAGES; i++) {
      barrier_init(AT(k_full[i]), 1);
      barrier_init(AT(k_empty[i]), 8);
      barrier_init(AT(v_full[i]), 1);
      barrier_init(AT(v_empty[i]), 8);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  }
  __syncthreads();
  int total = p.q_tiles * p.heads * p.batch;

  if (group == 0) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    if (threadIdx.x == 0) {
      tma_prefetch_map(&mq);
      tma_prefetch_map(&mk);
      tma_prefetch_map(&mv);
      int stage = 0, tile = blockIdx.x;
      u32 phase = 1, turn = 1, q_turn = 1;  // waiting for the phase before the first passes at once
      while (true) {
        barrier_wait(AT(tile_empty), turn);
        rings.tile = tile;
        barrier_arrive(AT(tile_full));
        turn ^= 1;
        if (tile >= total) break;
        int bh = tile / p.q_tiles, qt = p.q_tiles - 1 - tile % p.q_tiles;
        int b = bh / p.heads, h = bh % p.heads, kv = h / p.group;
        int first = qt * BM, last = min(p.tq, first + BM) - 1;
        Visit todo = visit<BN>(p, bh, qt, first, last);
        for (int i = todo.to - 1; i >= todo.from; i--) {
#ifdef TABLE
          int key = p.tiles[i] * BN;
#else
          int key = i * BN;
#endif
          barrier_wait(AT(k_empty[stage]), phase);
          rings.place[stage] = key;
          barrier_expect(AT(k_full[stage]), KB);
          for (int c = 0; c < DC; c++)
            tma_load(ks + stage * KB + c * BN * 128, &mk, AT(k_full[stage]), 64 * c, key, kv, b, KEEP);
          if (i == todo.to - 1) {
            barrier_wait(AT(q_empty), q_turn);
            q_turn ^= 1;
            barrier_expect(AT(q_full), QB);
            for (int c = 0; c < DC; c++) tma_load(qs + c * BM * 128, &mq, AT(q_full), 64 * c, first, h, b, PASS);
          }
          barrier_wait(AT(v_empty[stage]), phase);
          barrier_expect(AT(v_full[stage]), VB);
          for (int c = 0; c < VC; c++)
            tma_load(vs + stage * VB + c * BN * 128, &mv, AT(v_full[stage]), 64 * c, key, kv, b, KEEP);
          step(stage, phase);
        }
        tile = gridDim.x + atomicAdd(p.counter, 1);
      }
    }
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    int me = group - 1, quad = lane % 4;
    u32 q = qs + me * 64 * 128;
#if PINGPONG
    if (me == 0) named_arrive(1, 256);
#endif
#ifdef SOFTCAP
    const float c = LOG2E, unit = 1.f;
#else
    const float c = p.scale * LOG2E, unit = p.scale;
#endif
    int k_stage = 0, v_stage = 0;
    u32 k_phase = 0, v_phase = 0, turn = 0, q_turn = 0;
    while (true) {
      barrier_wait(AT(tile_full), turn);
      turn ^= 1;
      int tile = rings.tile;
      __syncwarp();
      if (lane == 0) barrier_arrive(AT(tile_empty));
      if (tile >= total) break;
      int bh = tile / p.q_tiles, qt = p.q_tiles - 1 - tile % p.q_tiles;
      int b = bh / p.heads, h = bh % p.heads;
      int first = qt * BM, last = min(p.tq, first + BM) - 1;
      Visit todo = visit<BN>(p, bh, qt, first, last);
      int mine = first + 64 * me, row = mine + 16 * warp + lane / 4;

      float o[DV / 2];
#pragma unroll
      for (int i = 0; i < DV / 2; i++) o[i] = 0.f;
      Rows r = {{-INF, -INF}, {0.f, 0.f}};
      int n = todo.to - todo.from;
      if (n > 0) {
        float s[BN / 2], keep[2];
        u32 w[BN / 4];
        int key = 0;
#ifndef TABLE
        int next = todo.to - 1;
#endif
#ifdef TABLE
#define PLACE key = rings.place[k_stage]
#else
#define PLACE key = next-- * BN
#endif
        barrier_wait(AT(q_full), q_turn);
        q_turn ^= 1;
        barrier_wait(AT(k_full[k_stage]), k_phase);
        PLACE;
        wgmma_fence();
        scores(s, q, ks + k_stage * KB);
        wgmma_wait<0>();
        pin(s);
        if (lane == 0) barrier_arrive(AT(k_empty[k_stage]));
        step(k_stage, k_phase);
        if (needs_mask(p, key, BN, mine, mine + 63))
          soften<true, true>(s, r, keep, p, c, key + 2 * quad, row);
        else
          soften<true, false>(s, r, keep, p, c, key + 2 * quad, row);
        round_weights(w, s);

        for (int i = 1; i < n; i++) {
          barrier_wait(AT(k_full[k_stage]), k_phase);
          PLACE;
#if PINGPONG
          named_sync(1 + me, 256);
#endif
          pin(o);
          pin(w);
          wgmma_fence();
          scores(s, q, ks + k_stage * KB);
          barrier_wait(AT(v_full[v_stage]), v_phase);
          wgmma_fence();
          values(o, w, vs + v_stage * VB);
#if PINGPONG
          named_arrive(2 - me, 256);
#endif
          wgmma_wait<1>();
          pin(s);
          if (lane == 0) barrier_arrive(AT(k_empty[k_stage]));
          step(k_stage, k_phase);
          bool moves = needs_mask(p, key, BN, mine, mine + 63)
              ? soften<false, true>(s, r, keep, p, c, key + 2 * quad, row)
              : soften<false, false>(s, r, keep, p, c, key + 2 * quad, row);
          wgmma_wait<0>();
          pin(o);
          if (lane == 0) barrier_arrive(AT(v_empty[v_stage]));
          step(v_stage, v_phase);
          round_weights(w, s);
          if (moves) scale_rows(o, keep);
        }
        if (lane == 0) barrier_arrive(AT(q_empty));
        barrier_wait(AT(v_full[v_stage]), v_phase);
        pin(o);
        pin(w);
        wgmma_fence();
        values(o, w, vs + v_stage * VB);
        r.l[0] = quad_sum(r.l[0]);
        r.l[1] = quad_sum(r.l[1]);
        wgmma_wait<0>();
        pin(o);
        if (lane == 0) barrier_arrive(AT(v_empty[v_stage]));
        step(v_stage, v_phase);
      }
#pragma unroll
      for (int x = 0; x < 2; x++) {
        int i = row + 8 * x;
        auto [by, lse] = close(p, h, r.m[x], r.l[x], unit);
        if (quad == 0 && p.lse && i < p.tq) p.lse[(i64)bh * p.tq + i] = lse;
        u16* to = (u16*)p.out + b * p.out_b + h * p.out_h + i * p.out_t;
#pragma unroll
        for (int j = 0; j < DV / 8; j += 4) {
          u32 z[4];
#pragma unroll
          for (int e = 0; e < 4; e++) {
            int at = 4 * (j + e) + 2 * x;
            z[e] = j + e < DV / 8 ? pack2(o[at] * by, o[at + 1] * by) : 0;
          }
          quad_transpose(z, quad);
          if (i < p.tq && 8 * (j + quad) < DV) *(uint4*)(to + 8 * (j + quad)) = make_uint4(z[0], z[1], z[2], z[3]);
        }
      }
    }
  }
}
