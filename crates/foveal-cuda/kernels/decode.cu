// Few queries over many keys. Each warp is a worker with an equal share of all units of 16 keys (32 of int8) of all heads, laid
// end to end (Sanovar et al. 2024, "Lean Attention", arXiv 2405.10480): it streams its share through shared memory of
// its own by cp.async, so that no worker waits for another, and leaves one partial result for each head it crosses.
// All query heads of a group, and all queries of a head, are rows of one product. `merge` combines the partial results.
//
// D, DV, and optionally INT8 (rows of int8 with one scale a row), SOFTCAP, F16 are compile-time.
#include "common.cuh"

constexpr int ROWS = 16, WARPS = 4;
// Keys of a unit: 4 KB of keys and as much of values, where a row has 128 channels.
#ifdef INT8
constexpr int SIZE = 1, STAGES = 3, KEYS = 32;
#else
constexpr int SIZE = 2, STAGES = 3, KEYS = 16;
#endif
constexpr int KP = D * SIZE / 16, VP = DV * SIZE / 16;  // 16-byte pieces of a row
constexpr int KB = KEYS * D * SIZE, VB = KEYS * DV * SIZE;
#ifdef INT8
constexpr int STAGE = KB + VB + 2 * KEYS * 4;
#else
constexpr int STAGE = KB + VB;
#endif

struct Params {
  const u16* q;
  const u8 *k, *v;               // steps in bytes
  const float *k_scale, *v_scale;
  const i64* units;              // units before each (sequence, key head), and all of them
  const int* lens;               // keys of each sequence
  float *part, *part_lse;
  u16* out;
  float* lse;
  i64 q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, s_b, s_h, o_b, o_h, o_t;
  int segments, kv_heads, group, n, workers, row_tiles;
  float scale, cap;
};

DEV int segment_of(const Params& p, i64 unit) {
  int lo = 0, hi = p.segments;  // units[lo] <= unit < units[hi]
  while (hi - lo > 1) {
    int mid = (lo + hi) / 2;
    if (p.units[mid] <= unit) lo = mid; else hi = mid;
  }
  return lo;
}

#ifdef INT8
// Pieces of a row are placed so that the reads of `int8` fragments below meet different banks.
template <int P> DEV u32 spot(int r, int c) { return (u32)(r * P + (c ^ ((r >> 1) * 2 & (P - 1)))) * 16; }

// Bytes 0 and 2 of a word, as numbers from -128 to 127, to a pair of 16-bit elements; other bytes mean nothing.
DEV u32 from_bytes(u32 x) {
  u32 r;
#ifdef F16
  u32 y = ((x & 0x00ff00ffu) ^ 0x00800080u) | 0x64006400u;  // 1024 + 128 + x
  asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(y), "r"(0x64806480u));
#else
  // 128 + the low seven bits, minus 128 or, if negative, 256.
  u32 y = (x & 0x007f007fu) | 0x43004300u, z = (x & 0x00800080u) | 0x43004300u;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(z), "r"(0xbf80bf80u), "r"(y));
#endif
  return r;
}
DEV u32 lds4(u32 at) {
  u32 r;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(r) : "r"(at) : "memory");
  return r;
}
template <int N> DEV void lds(u32 (&r)[N], u32 at) {
  static_assert(N == 2 || N == 4, "8 or 16 bytes");
  if (N == 4)
    asm volatile("ld.shared.v4.b32 {%0,%1,%2,%3}, [%4];" : "=r"(r[0]), "=r"(r[1]), "=r"(r[N - 2]), "=r"(r[N - 1]) : "r"(at) : "memory");
  else
    asm volatile("ld.shared.v2.b32 {%0,%1}, [%2];" : "=r"(r[0]), "=r"(r[1]) : "r"(at) : "memory");
}
#else
template <int P> DEV u32 spot(int r, int c) { return (u32)(r * P + (c ^ (r & (P < 8 ? P - 1 : 7)))) * 16; }
#endif

extern "C" __global__ void __launch_bounds__(32 * WARPS) decode(const __grid_constant__ Params p) {
  extern __shared__ __align__(128) u8 raw[];
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32, quad = lane % 4, g = lane / 4;
  u32 room = shared_address(raw) + warp * STAGES * STAGE;
  i64 all = p.units[p.segments], w = (i64)blockIdx.x * WARPS + warp;
  if (w >= p.workers) return;
  i64 unit = w * all / p.workers, end = (w + 1) * all / p.workers;
  if (unit >= end) return;
  int tile = blockIdx.y, seg = segment_of(p, unit), rows = p.group * p.n - tile * ROWS;
#ifdef SOFTCAP
  const float c = LOG2E, bend = 2.f * LOG2E * p.scale / p.cap;
#else
  const float c = p.scale * LOG2E;
#endif
  while (unit < end) {
    while (p.units[seg + 1] <= unit) seg++;
    i64 base = p.units[seg], stop = min(end, p.units[seg + 1]);
    int b = seg / p.kv_heads, kv = seg % p.kv_heads, len = p.lens[b];
    int from = (int)(unit - base), count = (int)(stop - unit);
    const u8* k = p.k + b * p.k_b + kv * p.k_h;
    const u8* v = p.v + b * p.v_b + kv * p.v_h;
    // Queries as fragments of 16 rows.
    u32 qf[D / 16][4];
    int limit[2];
#pragma unroll
    for (int x = 0; x < 2; x++) {
      int r = tile * ROWS + g + 8 * x;
      bool ok = g + 8 * x < rows;
      const u16* q = p.q + b * p.q_b + (kv * p.group + (ok ? r / p.n : 0)) * p.q_h + (ok ? r % p.n : 0) * p.q_t;
      limit[x] = ok ? len - p.n + r % p.n : -1;  // the last key that the row sees
#pragma unroll
      for (int s = 0; s < D / 16; s++)
#pragma unroll
        for (int y = 0; y < 2; y++) {
#ifdef INT8
          int at = D / 4 * quad + 4 * s + 2 * y;  // channels are summed in the order in which keys are read
#else
          int at = 16 * s + 8 * y + 2 * quad;
#endif
          qf[s][x + 2 * y] = ok ? (u32)q[at] | (u32)q[at + 1] << 16 : 0;
        }
    }
    auto fetch = [&](int i, int stage) {
      int key = (from + i) * KEYS;
      u32 to = room + stage * STAGE;
#pragma unroll
      for (int j = 0; j < KEYS * KP / 32; j++) {
        int id = j * 32 + lane, r = id / KP, x = id % KP;
        bool ok = key + r < len;
        copy16(to + spot<KP>(r, x), k + (ok ? key + r : 0) * p.k_t + 16 * x, ok);
      }
#pragma unroll
      for (int j = 0; j < KEYS * VP / 32; j++) {
        int id = j * 32 + lane, r = id / VP, x = id % VP;
        bool ok = key + r < len;
        copy16(to + KB + spot<VP>(r, x), v + (ok ? key + r : 0) * p.v_t + 16 * x, ok);
      }
#ifdef INT8
      bool ok = key + lane < len;
      i64 at = b * p.s_b + kv * p.s_h + (ok ? key + lane : 0);
      copy4(to + KB + VB + 4 * lane, p.k_scale + at, ok);
      copy4(to + KB + VB + 4 * KEYS + 4 * lane, p.v_scale + at, ok);
#endif
    };
    __syncwarp();
#pragma unroll
    for (int i = 0; i < STAGES - 1; i++) {
      if (i < count) fetch(i, i);
      copies_commit();
    }
    float o[DV / 8][4] = {}, m[2] = {-INF, -INF}, l[2] = {0.f, 0.f};
    int stage = 0;
    for (int i = 0; i < count; i++) {
      copies_wait<STAGES - 2>();
      __syncwarp();
      int ahead = stage == 0 ? STAGES - 1 : stage - 1;
      if (i + STAGES - 1 < count) fetch(i + STAGES - 1, ahead);
      copies_commit();
      u32 ks = room + stage * STAGE, vs = ks + KB;
#pragma unroll
      for (int sub = 0; sub < KEYS; sub += 16) {
      float s[2][4] = {};
#ifdef INT8
#pragma unroll
      for (int t = 0; t < 2; t++)
#pragma unroll
        for (int x = 0; x < KP / 4; x++) {
          u32 f[4];
          lds(f, ks + spot<KP>(sub + 8 * t + g, quad * (KP / 4) + x));
#pragma unroll
          for (int y = 0; y < 4; y++)
            mma(s[t], qf[4 * x + y], from_bytes(__byte_perm(f[y], 0, 0x4140)), from_bytes(__byte_perm(f[y], 0, 0x4342)));
        }
      u32 ss = ks + KB + VB + 4 * sub;
      float k0 = __uint_as_float(lds4(ss + 8 * quad)), k1 = __uint_as_float(lds4(ss + 8 * quad + 4));
      float k2 = __uint_as_float(lds4(ss + 8 * quad + 32)), k3 = __uint_as_float(lds4(ss + 8 * quad + 36));
#pragma unroll
      for (int x = 0; x < 2; x++) { s[0][2 * x] *= k0; s[0][2 * x + 1] *= k1; s[1][2 * x] *= k2; s[1][2 * x + 1] *= k3; }
#else
#pragma unroll
      for (int d = 0; d < D / 16; d++) {
        u32 f[4];
        ldmatrix4(f, ks + spot<KP>(sub + lane / 16 * 8 + lane % 8, 2 * d + lane / 8 % 2));
        mma(s[0], qf[d], f[0], f[1]);
        mma(s[1], qf[d], f[2], f[3]);
      }
#endif
#ifdef SOFTCAP
#pragma unroll
      for (int j = 0; j < 8; j++) s[j / 4][j % 4] = soft_cap(s[j / 4][j % 4], p.cap, bend);
#endif
      int key = (from + i) * KEYS + sub + 2 * quad;
      if (key - 2 * quad + 16 > len - p.n + 1) {
#pragma unroll
        for (int j = 0; j < 8; j++)
          if (key + 8 * (j / 4) + j % 2 > limit[j / 2 % 2]) s[j / 4][j % 4] = -INF;
      }
#pragma unroll
      for (int x = 0; x < 2; x++) {
        float top = fmaxf(fmaxf(s[0][2 * x], s[0][2 * x + 1]), fmaxf(s[1][2 * x], s[1][2 * x + 1]));
        top = fmaxf(quad_max(top), m[x]);
        float cut = top == -INF ? 0.f : top * c, keep = exp2_fast(m[x] * c - cut);
        if (top != m[x]) {
#pragma unroll
          for (int j = 0; j < DV / 8; j++) { o[j][2 * x] *= keep; o[j][2 * x + 1] *= keep; }
          l[x] *= keep;
        }
        m[x] = top;
#pragma unroll
        for (int j = 0; j < 2; j++)
#pragma unroll
          for (int e = 0; e < 2; e++) {
            float y = exp2_fast(fmaf(s[j][2 * x + e], c, -cut));
            s[j][2 * x + e] = y;
            l[x] += y;
          }
      }
#ifdef INT8
      float v0 = __uint_as_float(lds4(ss + 4 * KEYS + 8 * quad)), v1 = __uint_as_float(lds4(ss + 4 * KEYS + 8 * quad + 4));
      float v2 = __uint_as_float(lds4(ss + 4 * KEYS + 8 * quad + 32)), v3 = __uint_as_float(lds4(ss + 4 * KEYS + 8 * quad + 36));
#pragma unroll
      for (int x = 0; x < 2; x++) { s[0][2 * x] *= v0; s[0][2 * x + 1] *= v1; s[1][2 * x] *= v2; s[1][2 * x + 1] *= v3; }
#endif
      u32 a[4] = {pack2(s[0][0], s[0][1]), pack2(s[0][2], s[0][3]), pack2(s[1][0], s[1][1]), pack2(s[1][2], s[1][3])};
#ifdef INT8
      // Lane group g takes channels DV / 8 g .. of keys 2 quad, + 1, + 8, + 9.
      u32 f[4][DV / 32];
#pragma unroll
      for (int r = 0; r < 4; r++) {
        int row = sub + 2 * quad + r % 2 + r / 2 * 8, at = DV / 8 * g;
        lds(f[r], vs + spot<VP>(row, at / 16) + at % 16);
      }
#pragma unroll
      for (int j = 0; j < DV / 8; j++) {
        constexpr u32 pick[4] = {0x4400, 0x5511, 0x6622, 0x7733};
        mma(o[j], a, from_bytes(__byte_perm(f[0][j / 4], f[1][j / 4], pick[j % 4])),
            from_bytes(__byte_perm(f[2][j / 4], f[3][j / 4], pick[j % 4])));
      }
#else
#pragma unroll
      for (int j = 0; j < DV / 8; j += 2) {
        u32 f[4];
        ldmatrix4t(f, vs + spot<VP>(sub + lane % 16, j + lane / 16));
        mma(o[j], a, f[0], f[1]);
        mma(o[j + 1], a, f[2], f[3]);
      }
#endif
      }
      if (++stage == STAGES) stage = 0;
    }
    copies_wait<0>();
    i64 slot = (w + seg) * p.row_tiles + tile;
#pragma unroll
    for (int x = 0; x < 2; x++) {
      float sum = quad_sum(l[x]), by = sum > 0.f ? 1.f / sum : 0.f;
      int r = g + 8 * x;
      if (r < rows) {
        if (quad == 0) p.part_lse[slot * ROWS + r] = sum > 0.f ? m[x] * c + log2f(sum) : -INF;
        float* to = p.part + (slot * ROWS + r) * DV;
#pragma unroll
        for (int j = 0; j < DV / 8; j++) {
#ifdef INT8
          to[DV / 8 * 2 * quad + j] = o[j][2 * x] * by;
          to[DV / 8 * (2 * quad + 1) + j] = o[j][2 * x + 1] * by;
#else
          *(float2*)(to + 8 * j + 2 * quad) = make_float2(o[j][2 * x] * by, o[j][2 * x + 1] * by);
#endif
        }
      }
    }
    unit = stop;
  }
}

// One row of one (sequence, key head) a block. Weights of up to DV partial results first, all at once, then their sum:
// nothing waits for one load after another.
extern "C" __global__ void __launch_bounds__(DV) merge(const __grid_constant__ Params p) {
  __shared__ float weights[DV], tops[DV / 32], sums[DV / 32];
  int seg = blockIdx.x, row = blockIdx.y, tile = row / ROWS, r = row % ROWS, warp = threadIdx.x / 32;
  i64 all = p.units[p.segments], from = p.units[seg], to = p.units[seg + 1];
  float top = -INF, sum = 0.f, acc = 0.f;
  i64 first = 0, end = 0;
  if (from < to) {
    first = ((from + 1) * p.workers - 1) / all;
    end = (to * p.workers - 1) / all + 1;
  }
  for (i64 w = first; w < end; w += DV) {
    int n = (int)min((i64)DV, end - w);
    i64 slot = ((w + seg) * p.row_tiles + tile) * ROWS + r, step = (i64)p.row_tiles * ROWS;
    float lse = threadIdx.x < n ? p.part_lse[slot + threadIdx.x * step] : -INF, high = lse;
    for (int d = 16; d; d /= 2) high = fmaxf(high, __shfl_xor_sync(~0u, high, d));
    if (threadIdx.x % 32 == 0) tops[warp] = high;
    __syncthreads();
    high = top;
    for (int i = 0; i < DV / 32; i++) high = fmaxf(high, tops[i]);
    float x = high == -INF ? 0.f : exp2f(lse - high), add = x;
    weights[threadIdx.x] = x;
    for (int d = 16; d; d /= 2) add += __shfl_xor_sync(~0u, add, d);
    if (threadIdx.x % 32 == 0) sums[warp] = add;
    __syncthreads();
    float keep = high == -INF ? 1.f : exp2f(top - high);
    sum *= keep;
    for (int i = 0; i < DV / 32; i++) sum += sums[i];
    acc *= keep;
    top = high;
    const float* part = p.part + slot * DV + threadIdx.x;
#pragma unroll 8
    for (int i = 0; i < n; i++) acc = fmaf(weights[i], part[i * step * DV], acc);
    __syncthreads();
  }
  int b = seg / p.kv_heads, h = seg % p.kv_heads * p.group + row / p.n, i = row % p.n;
  float by = sum > 0.f ? 1.f / sum : 0.f;
  p.out[b * p.o_b + h * p.o_h + i * p.o_t + threadIdx.x] = narrow(acc * by);
  if (threadIdx.x == 0 && p.lse)
    p.lse[((i64)b * p.kv_heads * p.group + h) * p.n + i] = sum > 0.f ? (top + log2f(sum)) * LN2 : -INF;
}
