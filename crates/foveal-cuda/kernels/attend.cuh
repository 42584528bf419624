// What the attention kernels share: the parameters of a call, and which keys a tile of queries visits.
#pragma once
#include "common.cuh"

struct Params {
  void* out;
  float* lse;          // (B, H, Tq), natural; null if not wanted
  const int* indptr;   // block table: first entry of each tile of queries, batch * heads * tiles + 1; null if dense
  const int* tiles;    // numbers of the tiles of keys, ascending within a tile of queries
  int* counter;        // tiles handed out beyond the first of each block; zero before the launch
  i64 out_b, out_h, out_t;
  int batch, heads, group, tq, tk, q_tiles;
  int left, right;     // keys up to and with the query's own position, and after it
  float scale, cap;
};

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
