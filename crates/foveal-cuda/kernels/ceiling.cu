// Ceilings that the other kernels are held against: a plain copy, and bf16 products.
#include "common.cuh"

// Copy `n` pieces of 16 bytes, four of a thread in flight.
extern "C" __global__ void __launch_bounds__(512) copy(uint4* to, const uint4* from, u64 n) {
  u64 step = (u64)gridDim.x * blockDim.x * 4;
  for (u64 i = (u64)blockIdx.x * blockDim.x * 4 + threadIdx.x; i < n; i += step) {
    uint4 x[4];
#pragma unroll
    for (int j = 0; j < 4; j++)
      if (i + j * blockDim.x < n) x[j] = __ldcs(&from[i + j * blockDim.x]);
#pragma unroll
    for (int j = 0; j < 4; j++)
      if (i + j * blockDim.x < n) __stcs(&to[i + j * blockDim.x], x[j]);
  }
}

// Read `n` pieces of 16 bytes: what a kernel that writes next to nothing can reach.
extern "C" __global__ void __launch_bounds__(512) read(u32* to, const uint4* from, u64 n) {
  u64 step = (u64)gridDim.x * blockDim.x * 8;
  u32 acc = 0;
  for (u64 i = (u64)blockIdx.x * blockDim.x * 8 + threadIdx.x; i < n; i += step) {
    uint4 x[8];
#pragma unroll
    for (int j = 0; j < 8; j++) x[j] = i + j * blockDim.x < n ? __ldcs(&from[i + j * blockDim.x]) : make_uint4(0, 0, 0, 0);
#pragma unroll
    for (int j = 0; j < 8; j++) acc ^= x[j].x ^ x[j].y ^ x[j].z ^ x[j].w;
  }
  if (acc == 0x12345678u) *to = acc;
}

// `rounds` products of 64 x 64 (a warpgroup) by 64 x 256 from shared memory and nothing else: the most that the
// tensor cores give on this data at this clock. FLOP of a launch: blocks * 2 * rounds * 2 * 64 * 64 * 256.
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
extern "C" __global__ void __launch_bounds__(256, 1) products(float* out, const uint4* data, int rounds) {
  extern __shared__ u8 raw[];
  u8* room = raw + (1024 - (shared_address(raw) & 1023));
  for (int i = threadIdx.x; i < (16384 + 32768) / 16; i += 256) ((uint4*)room)[i] = data[i];
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  __syncthreads();
  u32 a = shared_address(room) + (threadIdx.x / 128) * 8192, b = shared_address(room) + 16384;
  float d[128];
#pragma unroll
  for (int i = 0; i < 128; i++) d[i] = 0.f;
  for (int r = 0; r < rounds; r++) {
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < 4; k++) Wgmma<256>::ss<0, 0>(d, operand(a + 32 * k, 16), operand(b + 32 * k, 16), 1);
    wgmma_commit();
    wgmma_wait<0>();
  }
  pin(d);
  float sum = 0.f;
#pragma unroll
  for (int i = 0; i < 128; i++) sum += d[i];
  out[blockIdx.x * 256 + threadIdx.x] = sum;
}
#else
// The same by warps: 16 x 128 by 128 x 128 a round, 8 warps a block, operands in registers.
// FLOP of a launch: blocks * 8 * rounds * 16 * 2 * 16 * 8 * 16.
extern "C" __global__ void __launch_bounds__(256, 1) products(float* out, const uint4* data, int rounds) {
  uint4 x = data[threadIdx.x], y = data[256 + threadIdx.x];
  u32 a[4] = {x.x, x.y, x.z, x.w};
  float d[16][4] = {};
  for (int r = 0; r < rounds; r++)
#pragma unroll
    for (int j = 0; j < 16; j++) mma(d[j], a, y.x + j, y.y);
  float sum = 0.f;
#pragma unroll
  for (int j = 0; j < 16; j++) sum += d[j][0] + d[j][1] + d[j][2] + d[j][3];
  out[blockIdx.x * 256 + threadIdx.x] = sum;
}
#endif
