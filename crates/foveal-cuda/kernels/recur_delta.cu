// The triangular systems of the delta rule, one for each chunk of 64 tokens: with G the sums of g from the start of the
// chunk and A_ij = beta_i e^(G_i - G_j) k_i k_j below the diagonal, T = (I + A)^-1 diag(beta), so that what a
// chunk writes is T (v - e^G k S) for the state S before it. They do not depend on the state: all chunks at once.
// Systems are solved in f32, a column a thread; T is rounded once.
//
// D (64 or 128), and optionally DECAY, F16 are compile-time.
#include "common.cuh"

constexpr int C = 64, KP = D / 8, PITCH = 68;

struct Params {
  u16* t;  // (B, H, chunks * 64, 64)
  const u16* k;
  const float *g, *beta;
  i64 k_b, k_h, k_t, g_b, g_h, b_b, b_h;
  int heads, k_group, g_group, b_group, tokens, chunks;
};

DEV u32 spot(int r, int c) { return (u32)(r * KP + (c ^ (r & 7))) * 16; }

extern "C" __global__ void __launch_bounds__(128) solve(const __grid_constant__ Params p) {
  __shared__ __align__(128) u8 keys[C * D * 2];
  __shared__ __align__(16) float a[C][PITCH];
  __shared__ float sums[C], beta[C];
  int chunk = blockIdx.x % p.chunks, bh = blockIdx.x / p.chunks, b = bh / p.heads, h = bh % p.heads;
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32, quad = lane % 4, first = chunk * C, n = min(C, p.tokens - first);
  const u16* k = p.k + b * p.k_b + h / p.k_group * p.k_h + first * p.k_t;
  u32 room = shared_address(keys);
  for (int i = threadIdx.x; i < C * KP; i += 128) {
    int r = i / KP, c = i % KP;
    copy16(room + spot(r, c), r < n ? k + r * p.k_t + 8 * c : k, r < n);
  }
  copies_commit();
  if (warp == 0) {
    float x = 0.f, y = 0.f;
#ifdef DECAY
    const float* g = p.g + b * p.g_b + h / p.g_group * p.g_h + first;
    x = 2 * lane < n ? g[2 * lane] * LOG2E : 0.f;
    y = 2 * lane + 1 < n ? g[2 * lane + 1] * LOG2E : 0.f;
#endif
    float sum = x + y;
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
      float up = __shfl_up_sync(~0u, sum, d);
      if (lane >= d) sum += up;
    }
    sums[2 * lane] = sum - y;
    sums[2 * lane + 1] = sum;
  } else if (warp == 1) {
    const float* from = p.beta + b * p.b_b + h / p.b_group * p.b_h + first;
    for (int i = lane; i < C; i += 32) beta[i] = i < n ? from[i] : 0.f;
  }
  copies_wait<0>();
  __syncthreads();

  float s[8][4] = {};
#pragma unroll
  for (int d = 0; d < D / 16; d++) {
    u32 q[4];
    ldmatrix4(q, room + spot(16 * warp + lane % 16, 2 * d + lane / 16));
#pragma unroll
    for (int j = 0; j < 8; j += 2)
      if (j <= 2 * warp + 1) {
        u32 f[4];
        ldmatrix4(f, room + spot(8 * j + lane / 16 * 8 + lane % 8, 2 * d + lane / 8 % 2));
        mma(s[j], q, f[0], f[1]);
        mma(s[j + 1], q, f[2], f[3]);
      }
  }
#pragma unroll
  for (int j = 0; j < 8; j++)
#pragma unroll
    for (int x = 0; x < 2; x++) {
      int row = 16 * warp + lane / 4 + 8 * x, col = 8 * j + 2 * quad;
      float by = beta[row], at = sums[row];
      float2 y;
      y.x = col < row ? s[j][2 * x] * by * exp2_fast(at - sums[col]) : 0.f;
      y.y = col + 1 < row ? s[j][2 * x + 1] * by * exp2_fast(at - sums[col + 1]) : 0.f;
      *(float2*)&a[row][col] = y;
    }
  __syncthreads();
  if (threadIdx.x < C) {
    int c = threadIdx.x;
    float x[C], by = beta[c];
    u16* to = p.t + ((i64)bh * p.chunks * C + first) * C + c;
#pragma unroll
    for (int i = 0; i < C; i++) {
      float sum[4] = {i == c ? 1.f : 0.f, 0.f, 0.f, 0.f};
#pragma unroll
      for (int j = 0; j < i; j += 4) {
        float4 y = *(const float4*)&a[i][j];
        sum[0] = fmaf(-y.x, x[j], sum[0]);
        if (j + 1 < i) sum[1] = fmaf(-y.y, x[j + 1], sum[1]);
        if (j + 2 < i) sum[2] = fmaf(-y.z, x[j + 2], sum[2]);
        if (j + 3 < i) sum[3] = fmaf(-y.w, x[j + 3], sum[3]);
      }
      x[i] = (sum[0] + sum[1]) + (sum[2] + sum[3]);
      to[i * C] = narrow(x[i] * by);
    }
  }
}
