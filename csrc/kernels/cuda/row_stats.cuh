// Softmax statistics of a row in one reading: an online softmax that carries what entropy and margin need.
#pragma once

#include "common.cuh"

namespace aep::kernels::cuda {
namespace {

template <class A>
struct RowState {
  A top, next;      // the largest two judged values z
  A sum, weighted;  // sum of e^(z - top), sum of e^(z - top) (z - top); values of -inf contribute nothing
  A best;           // the largest value before the division
  int64_t best_at;  // its lowest index; -1 if there is none yet
  int64_t nan_at;   // lowest index of a NaN before the division; -1 if there is none
  bool nan_z;       // a judged value is NaN
};

template <class A>
__device__ RowState<A> empty_row() {
  return {-infinity<A>(), -infinity<A>(), A(0), A(0), -infinity<A>(), -1, -1, false};
}

// Moves sums that are relative to `from` to `to` >= from.
template <class A>
__device__ void rebase(A& sum, A& weighted, A from, A to) {
  if (sum == A(0) || from == to) return;
  const A shift = from - to, scale = exponential(shift);
  weighted = scale > A(0) ? scale * (weighted + sum * shift) : A(0);
  sum *= scale;
}

template <class A>
__device__ RowState<A> merge_rows(RowState<A> a, RowState<A> b) {
  const A top = larger(a.top, b.top);
  rebase(a.sum, a.weighted, a.top, top);
  rebase(b.sum, b.weighted, b.top, top);
  a.next = larger(larger(a.next, b.next), smaller(a.top, b.top));
  a.top = top;
  a.sum += b.sum;
  a.weighted += b.weighted;
  if (b.best_at >= 0 && (a.best_at < 0 || b.best > a.best || (b.best == a.best && b.best_at < a.best_at))) {
    a.best = b.best;
    a.best_at = b.best_at;
  }
  if (b.nan_at >= 0 && (a.nan_at < 0 || b.nan_at < a.nan_at)) a.nan_at = b.nan_at;
  a.nan_z |= b.nan_z;
  return a;
}

// Takes in the value v at index k; z = v / divisor is what is judged.
template <class A>
__device__ void add_value(RowState<A>& row, A v, int64_t k, A divisor) {
  if (v != v) {
    if (row.nan_at < 0) row.nan_at = k;
    row.nan_z = true;
    return;
  }
  if (row.best_at < 0 || v > row.best) {  // indices ascend within a thread: the first of equals stays
    row.best = v;
    row.best_at = k;
  }
  const A z = v / divisor;
  if (z != z) {
    row.nan_z = true;
    return;
  }
  row.next = larger(row.next, smaller(row.top, z));
  if (z > row.top) {
    rebase(row.sum, row.weighted, row.top, z);
    row.top = z;
  }
  if (z == -infinity<A>() || !finite(row.top)) return;
  const A d = z - row.top, e = exponential(d);
  row.sum += e;
  row.weighted += e > A(0) ? e * d : A(0);
}

struct RowResult {
  float confidence, entropy, margin;
  int64_t argmax;
};

template <class A>
__device__ RowResult finish_row(const RowState<A>& row) {
  const int64_t argmax = row.nan_at >= 0 ? row.nan_at : row.best_at;
  if (row.nan_z || !finite(row.top)) {
    const float nan = not_a_number<float>();
    return {nan, nan, nan, argmax};
  }
  return {static_cast<float>(A(1) / row.sum), static_cast<float>(logarithm(row.sum) - row.weighted / row.sum),
          static_cast<float>((A(1) - exponential(row.next - row.top)) / row.sum), argmax};
}

}  // namespace
}  // namespace aep::kernels::cuda
