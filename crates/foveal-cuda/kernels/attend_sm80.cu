// Exact attention on any GPU from sm_80 on: 4 warps of 16 queries each, mma.sync, tiles of 64 keys double-buffered by
// cp.async. Heads of any width up to D: what is missing is zero. Without ALIGNED rows may start anywhere.
//
// D (a multiple of 32), DV, and optionally MASK, TABLE, SOFTCAP, F16, ALIGNED are compile-time.
#include "attend.cuh"

constexpr int BM = 64, BN = 64;
constexpr int KC = D / 8, VC = DV / 8;  // 16-byte pieces of a row

struct Source {
  const u16 *q, *k, *v;
  i64 q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t;
  int d, dv;
};

// Where piece c of row r lies: xor with the row keeps ldmatrix free of bank conflicts.
template <int C> DEV u32 spot(int r, int c) { return (u32)(r * C + (c ^ (r & (C < 8 ? C - 1 : 7)))) * 16; }

template <int C> DEV void load(u32 to, u8* room, const u16* from, i64 step, int width, int rows, int n) {
  for (int i = threadIdx.x; i < rows * C; i += 128) {
    int r = i / C, c = i % C;
#ifdef ALIGNED
    bool ok = r < n && 8 * c < width;
    copy16(to + spot<C>(r, c), ok ? from + r * step + 8 * c : from, ok);
#else
    u16* at = (u16*)(room + spot<C>(r, c));
    for (int e = 0; e < 8; e++) at[e] = r < n && 8 * c + e < width ? from[r * step + 8 * c + e] : (u16)0;
#endif
  }
}

extern "C" __global__ void __launch_bounds__(128)
attend(const __grid_constant__ Source in, const __grid_constant__ Params p) {
  extern __shared__ __align__(128) u8 raw[];
  u32 room = shared_address(raw);
  constexpr u32 KB = BN * D * 2, VB = BN * DV * 2;
  u32 ks = 0, vs = 2 * KB, qs = 2 * KB + 2 * VB;
  int bh = blockIdx.x / p.q_tiles, qt = p.q_tiles - 1 - blockIdx.x % p.q_tiles;
  int b = bh / p.heads, h = bh % p.heads, kv = h / p.group;
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32, quad = lane % 4;
  int first = qt * BM, last = min(p.tq, first + BM) - 1;
  Visit todo = visit<BN>(p, bh, qt, first, last);
  const u16* k = in.k + b * in.k_b + kv * in.k_h;
  const u16* v = in.v + b * in.v_b + kv * in.v_h;
#ifdef TABLE
#define KEY(i) (p.tiles[i] * BN)
#else
#define KEY(i) ((i) * BN)
#endif
  auto fetch = [&](int i, int stage) {
    int key = KEY(i), n = min(BN, p.tk - key);
    load<KC>(room + ks + stage * KB, raw + ks + stage * KB, k + key * in.k_t, in.k_t, in.d, BN, n);
    load<VC>(room + vs + stage * VB, raw + vs + stage * VB, v + key * in.v_t, in.v_t, in.dv, BN, n);
  };
  load<KC>(room + qs, raw + qs, in.q + b * in.q_b + h * in.q_h + first * in.q_t, in.q_t, in.d, BM, p.tq - first);
  int n = todo.to - todo.from;
  if (n > 0) fetch(todo.to - 1, 0);
  copies_commit();
  copies_wait<0>();
  __syncthreads();

  u32 qf[D / 16][4];
#pragma unroll
  for (int i = 0; i < D / 16; i++) ldmatrix4(qf[i], room + qs + spot<KC>(16 * warp + lane % 16, 2 * i + lane / 16));
  float o[DV / 8][4] = {}, m[2] = {-INF, -INF}, l[2] = {0.f, 0.f};
#ifdef SOFTCAP
  const float c = LOG2E, unit = 1.f, bend = 2.f * LOG2E * p.scale / p.cap;
#else
  const float c = p.scale * LOG2E, unit = p.scale;
#endif
  int row = first + 16 * warp + lane / 4;
  for (int i = 0; i < n; i++) {
    int stage = i & 1, key = KEY(todo.to - 1 - i);
    if (i + 1 < n) fetch(todo.to - 2 - i, stage ^ 1);
    copies_commit();
    float s[8][4] = {};
#pragma unroll
    for (int d = 0; d < D / 16; d++)
#pragma unroll
      for (int j = 0; j < 8; j += 2) {
        u32 f[4];
        ldmatrix4(f, room + ks + stage * KB + spot<KC>(8 * j + (lane / 16) * 8 + lane % 8, 2 * d + lane / 8 % 2));
        mma(s[j], qf[d], f[0], f[1]);
        mma(s[j + 1], qf[d], f[2], f[3]);
      }
#ifdef SOFTCAP
#pragma unroll
    for (int j = 0; j < 32; j++) s[j / 4][j % 4] = soft_cap(s[j / 4][j % 4], p.cap, bend);
#endif
    if (needs_mask(p, key, BN, first + 16 * warp, first + 16 * warp + 15)) {
#pragma unroll
      for (int j = 0; j < 32; j++) {
        int col = key + 8 * (j / 4) + 2 * quad + j % 2;
        bool off = col >= p.tk;
#ifdef MASK
        int at = p.tk - p.tq + row + 8 * (j / 2 % 2);
        off |= col > at + p.right || col < at - p.left + 1;
#endif
        if (off) s[j / 4][j % 4] = -INF;
      }
    }
    u32 w[4][4];
#pragma unroll
    for (int x = 0; x < 2; x++) {
      float top = m[x];
#pragma unroll
      for (int j = 0; j < 8; j++) top = fmaxf(top, fmaxf(s[j][2 * x], s[j][2 * x + 1]));
      top = quad_max(top);
      float cut = top == -INF ? 0.f : top * c, keep = exp2_fast(m[x] * c - cut), sum = 0.f;
      m[x] = top;
#pragma unroll
      for (int j = 0; j < 8; j++) {
        float y0 = exp2_fast(fmaf(s[j][2 * x], c, -cut)), y1 = exp2_fast(fmaf(s[j][2 * x + 1], c, -cut));
        sum += y0 + y1;
        w[j / 2][x + 2 * (j & 1)] = pack2(y0, y1);
      }
      l[x] = fmaf(l[x], keep, sum);
#pragma unroll
      for (int j = 0; j < DV / 8; j++) { o[j][2 * x] *= keep; o[j][2 * x + 1] *= keep; }
    }
#pragma unroll
    for (int t = 0; t < 4; t++)
#pragma unroll
      for (int j = 0; j < DV / 8; j += 2) {
        u32 f[4];
        ldmatrix4t(f, room + vs + stage * VB + spot<VC>(16 * t + lane % 16, j + lane / 16));
        mma(o[j], w[t], f[0], f[1]);
        mma(o[j + 1], w[t], f[2], f[3]);
      }
    copies_wait<0>();
    __syncthreads();
  }
#pragma unroll
  for (int x = 0; x < 2; x++) {
    int i = row + 8 * x;
    auto [by, lse] = close(p, h, m[x], quad_sum(l[x]), unit);
    if (i >= p.tq) continue;
    if (quad == 0 && p.lse) p.lse[(i64)bh * p.tq + i] = lse;
    u16* to = (u16*)p.out + b * p.out_b + h * p.out_h + i * p.out_t;
#pragma unroll
    for (int j = 0; j < DV / 8; j++) {
      int at = 8 * j + 2 * quad;
      if (at < in.dv) to[at] = narrow(o[j][2 * x] * by);
      if (at + 1 < in.dv) to[at + 1] = narrow(o[j][2 * x + 1] * by);
    }
  }
}
