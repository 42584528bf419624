// What the attention kernels share: the parameters of a call, and which keys a tile of queries visits.
#pragma once
#include "common.cuh"

struct Params {
  void* out;
  float* lse;          // (B, H, Tq), natural; null if not wanted
  const float* sinks;  // (H): a logit in the denominator only; null without
  const int* indptr;   // block table: first entry of each tile of queries, batch * heads * tiles + 1; null if dense
  const int* tiles;    // numbers of the tiles of keys, ascending within a tile of queries
  int* counter;        // tiles handed out beyond the first of each block; zero before the launch
  i64 out_b, out_h, out_t;
  int batch, heads, group, tq, tk, q_tiles;
  int left, right;     // keys up to and with the query's own position, and after it
  float scale, cap;
};

// Factor on the output of a row of maximum m (times `unit` a natural logit) and sum l, and its log-sum-exp.
struct Close {
  float by, lse;
};

DEV Close close(const Params& p, int h, float m, float l, float unit) {
  if (p.sinks) {
    float own = l > 0.f ? m * unit : -INF, sink = p.sinks[h], top = fmaxf(own, sink);
    if (top == -INF) return {0.f, -INF};
    float seen = exp2_fast((own - top) * LOG2E), sum = l * seen + exp2_fast((sink - top) * LOG2E);
    return {seen / sum, top + __logf(sum)};
  }
  return {l > 0.f ? 1.f / l : 0.f, l > 0.f ? m * unit + __logf(l) : -INF};
}

// The tiles of keys that rows first .. last visit: numbers from..to of all, or of the table's entries.
struct Visit {
  int from, to;
};

template <int KEYS> DEV Visit visit(const Params& p, int bh, int tile, int first, int last) {
#ifdef TABLE
  int row = bh * p.q_tiles + tile;
  return {p.indptr[row], p.indptr[row + 1]};
#else
  int lo = 0, hi = p.tk;
#ifdef MASK
  int at = p.tk - p.tq;
  hi = min(hi, at + last + 1 + p.right);
  lo = max(lo, at + first - p.left + 1);
#endif
  int from = lo / KEYS, to = (max(hi, 0) + KEYS - 1) / KEYS;
  return {min(from, to), to};
#endif
}

// Which of the keys from..from + n a run of rows first..last must mask: none if false.
DEV bool needs_mask(const Params& p, int from, int n, int first, int last) {
  bool edge = from + n > p.tk;
#ifdef MASK
  int at = p.tk - p.tq;
  edge |= from + n - 1 > at + first + p.right || from < at + last - p.left + 1;
#endif
  return edge;
}
