// Attention of last resort: a warp a query, any widths up to 256, any block sizes and row masks. It serves what the
// tiled kernels cannot, at a speed that nobody should plan with. Parameters as there, but `indptr` and `tiles` are
// the caller's own blocks of block_q queries and block_k keys, and `masks` their optional row masks.
#include "attend.cuh"

struct Source {
  const u16 *q, *k, *v;
  i64 q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t;
  int d, dv;
};
struct Blocks {
  const u64* masks;
  int block_q, block_k, table;
};

extern "C" __global__ void __launch_bounds__(128)
attend(const __grid_constant__ Source in, const __grid_constant__ Params p, const __grid_constant__ Blocks t) {
  __shared__ float query[4][256];
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  i64 id = (i64)blockIdx.x * 4 + warp;
  if (id >= (i64)p.batch * p.heads * p.tq) return;
  int bh = (int)(id / p.tq), i = (int)(id % p.tq), b = bh / p.heads, h = bh % p.heads, kv = h / p.group;
  const u16* q = in.q + b * in.q_b + h * in.q_h + i * in.q_t;
  const u16* k = in.k + b * in.k_b + kv * in.k_h;
  const u16* v = in.v + b * in.v_b + kv * in.v_h;
  for (int c = lane; c < in.d; c += 32) query[warp][c] = widen(q[c]);
  __syncwarp();
  int at = p.tk - p.tq + i;
  int lo = max(0, at - p.left + 1), hi = min(p.tk, at + p.right + 1);
  float m = -INF, l = 0.f, o[8] = {};
  int entry = 0, end = 1;
  if (t.table) {
    int r = bh * p.q_tiles + i / t.block_q;
    entry = p.indptr[r];
    end = p.indptr[r + 1];
  }
  for (; entry < end; entry++) {
    int from = lo, to = hi;
    if (t.table) {
      if (t.masks && !(t.masks[entry] >> (i % t.block_q) & 1)) continue;
      from = max(lo, p.tiles[entry] * t.block_k);
      to = min(hi, p.tiles[entry] * t.block_k + t.block_k);
    }
    for (int j0 = from; j0 < to; j0 += 32) {
      float s = -INF;
      if (j0 + lane < to) {
        const u16* key = k + (j0 + lane) * in.k_t;
        s = 0.f;
        for (int c = 0; c < in.d; c++) s = fmaf(query[warp][c], widen(key[c]), s);
        s *= p.scale;
        if (p.cap > 0.f) s = soft_cap(s, p.cap, 2.f * LOG2E / p.cap);
      }
      float top = fmaxf(m, s);
      for (int x = 16; x; x /= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, x));
      float keep = exp2_fast((m - top) * LOG2E), w = exp2_fast((s - top) * LOG2E), sum = w;
      for (int x = 16; x; x /= 2) sum += __shfl_xor_sync(~0u, sum, x);
      m = top;
      l = fmaf(l, keep, sum);
#pragma unroll
      for (int c = 0; c < 8; c++) o[c] *= keep;
      for (int j = 0; j < min(32, to - j0); j++) {
        float x = __shfl_sync(~0u, w, j);
#pragma unroll
        for (int c = 0; c < 8; c++)
          if (lane + 32 * c < in.dv) o[c] = fmaf(x, widen(v[(j0 + j) * in.v_t + lane + 32 * c]), o[c]);
      }
    }
  }
  auto [by, lse] = close(p, h, m, l, 1.f);
  if (lane == 0 && p.lse) p.lse[(i64)bh * p.tq + i] = lse;
  u16* to = (u16*)p.out + b * p.out_b + h * p.out_h + i * p.out_t;
#pragma unroll
  for (int c = 0; c < 8; c++)
    if (lane + 32 * c < in.dv) to[lane + 32 * c] = narrow(o[c] * by);
}
