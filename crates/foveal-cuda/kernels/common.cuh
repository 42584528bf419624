// What all kernels share: types, conversions, fragments, asynchronous copies. No header of the toolkit is included,
// so that NVRTC needs nothing but this text. Q16 elements are bf16, or f16 where F16 is defined.
#pragma once

typedef unsigned char u8;
typedef signed char i8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

#define DEV static __device__ __forceinline__
#define INF __int_as_float(0x7f800000)
#define LOG2E 1.4426950408889634f
#define LN2 0.6931471805599453f

#ifdef F16
#define TY "f16"
#else
#define TY "bf16"
#endif

// Two floats rounded to a pair of 16-bit elements, `lo` in the low half.
DEV u32 pack2(float lo, float hi) {
  u32 r;
  asm("cvt.rn." TY "x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
  return r;
}

// The halves of a pair as floats.
#ifdef F16
DEV float low(u32 x) {
  float r;
  asm("{.reg .f16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, l;}" : "=f"(r) : "r"(x));
  return r;
}
DEV float high(u32 x) { return low(x >> 16); }
#else
DEV float low(u32 x) { return __uint_as_float(x << 16); }
DEV float high(u32 x) { return __uint_as_float(x & 0xffff0000u); }
#endif

DEV float widen(u16 x) { return low(x); }
DEV u16 narrow(float x) { return (u16)pack2(x, 0.f); }

DEV float exp2_fast(float x) {
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}

// cap * tanh(s / cap) by one exponential and one division: tanh.approx would err by 2^-11 of the cap.
DEV float soft_cap(float s, float cap, float two_log2e_by_cap) {
  float e = exp2_fast(s * two_log2e_by_cap);
  return cap - cap * __fdividef(2.f, 1.f + e);
}

DEV u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// 16 bytes from global to shared memory; zeros where `valid` is false.
DEV void copy16(u32 to, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(valid ? 16 : 0) : "memory");
}
DEV void copy4(u32 to, const void* from, bool valid) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from), "r"(valid ? 4 : 0) : "memory");
}
DEV void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N> DEV void copies_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }

DEV void ldmatrix4(u32 (&r)[4], u32 at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(at) : "memory");
}
DEV void ldmatrix4t(u32 (&r)[4], u32 at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(at) : "memory");
}

// d += a b with a 16 x 16, b 16 x 8.
DEV void mma(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." TY "." TY ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

DEV float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}
DEV float quad_sum(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}

// The four lanes of a quad hold r[j] = columns 8 j + 2 lane, + 1 of one row; afterwards lane q holds columns
// 8 q .. 8 q + 7 in r[0..4]: a transpose of 4 x 4 words in two exchanges.
DEV void quad_transpose(u32 (&r)[4], int quad) {
  bool odd = quad & 1, up = quad & 2;
  u32 a = odd ? r[0] : r[1], b = odd ? r[2] : r[3];
  a = __shfl_xor_sync(~0u, a, 1);
  b = __shfl_xor_sync(~0u, b, 1);
  if (odd) { r[0] = a; r[2] = b; } else { r[1] = a; r[3] = b; }
  a = up ? r[0] : r[2];
  b = up ? r[1] : r[3];
  a = __shfl_xor_sync(~0u, a, 2);
  b = __shfl_xor_sync(~0u, b, 2);
  if (up) { r[0] = a; r[1] = b; } else { r[2] = a; r[3] = b; }
}

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
DEV void barrier_init(u32 b, u32 arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(b), "r"(arrivals) : "memory");
}
DEV void barrier_expect(u32 b, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(b), "r"(bytes) : "memory");
}
DEV void barrier_arrive(u32 b) { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(b) : "memory"); }
DEV void barrier_wait(u32 b, u32 parity) {
  asm volatile("{\n.reg .pred done;\nAGAIN:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
               "@done bra OVER;\nbra AGAIN;\nOVER:\n}" ::"r"(b), "r"(parity) : "memory");
}
DEV void named_sync(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }
DEV void named_arrive(int id, int threads) { asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory"); }

struct __align__(128) TensorMap { u64 opaque[16]; };

// What L2 does with a load: evict it last, first, or as any other.
constexpr u64 KEEP = 0x14F0000000000000ull, PASS = 0x12F0000000000000ull, NORMAL = 0x1000000000000000ull;

// A box of a (d, t, h, b) tensor into shared memory.
DEV void tma_load(u32 to, const TensorMap* map, u32 bar, int d, int t, int h, int b, u64 hint) {
  asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
               "[%0], [%1, {%3, %4, %5, %6}], [%2], %7;"
               ::"r"(to), "l"(map), "r"(bar), "r"(d), "r"(t), "r"(h), "r"(b), "l"(hint) : "memory");
}
DEV void tma_prefetch_map(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// A shared-memory operand of wgmma in the 128-byte swizzle: rows of 64 elements, 8 rows an atom of 1024 bytes.
// `lead` is the distance between columns of atoms where the operand is read transposed.
DEV u64 operand(u32 at, u32 lead) {
  return (u64)((at & 0x3ffff) >> 4) | (u64)(lead >> 4) << 16 | (u64)(1024 >> 4) << 32 | 1ull << 62;
}
DEV void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEV void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N> DEV void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory"); }
// Keep the compiler from moving reads and writes of registers across this point.
template <int N> DEV void pin(float (&x)[N]) {
#pragma unroll
  for (int i = 0; i < N; i++) asm volatile("" : "+f"(x[i])::"memory");
}
template <int N> DEV void pin(u32 (&x)[N]) {
#pragma unroll
  for (int i = 0; i < N; i++) asm volatile("" : "+r"(x[i])::"memory");
}
#include "wgmma.cuh"
#endif
