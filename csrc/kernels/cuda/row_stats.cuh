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

__device__ inline int64_t shuffle_index(int64_t index, int step) {
  return static_cast<int64_t>(__shfl_xor_sync(kAllLanes, static_cast<long long>(index), step));
}

// Moves sums that are relative to `from` to `to` >= from.
template <class A>
__device__ void rebase(A& sum, A& weighted, A from, A to) {
  if (sum == A(0) || from == to) return;
  const A shift = from - to, scale = exponential(shift);
  weighted = scale > A(0) ? scale * (weighted + sum * shift) : A(0);
  sum *= scale;
}

// The states of a warp's lanes, merged, in every lane. The sums are brought to the common maximum first, so that
// merging them is plain addition; a + b is b + a, so all lanes have the same bits.
template <class A>
__device__ RowState<A> merge_lanes(RowState<A> row) {
  const A own_top = row.top;
  for (int step = 1; step < static_cast<int>(kWarpSize); step *= 2) {
    const A top = __shfl_xor_sync(kAllLanes, row.top, step), next = __shfl_xor_sync(kAllLanes, row.next, step);
    row.next = larger(larger(row.next, next), smaller(row.top, top));
    row.top = larger(row.top, top);
    const A best = __shfl_xor_sync(kAllLanes, row.best, step);
    const int64_t best_at = shuffle_index(row.best_at, step), nan_at = shuffle_index(row.nan_at, step);
    if (best_at >= 0 && (row.best_at < 0 || best > row.best || (best == row.best && best_at < row.best_at))) {
      row.best = best;
      row.best_at = best_at;
    }
    if (nan_at >= 0 && (row.nan_at < 0 || nan_at < row.nan_at)) row.nan_at = nan_at;
  }
  row.nan_z = __any_sync(kAllLanes, row.nan_z);
  rebase(row.sum, row.weighted, own_top, row.top);
  for (int step = 1; step < static_cast<int>(kWarpSize); step *= 2) {
    row.sum += __shfl_xor_sync(kAllLanes, row.sum, step);
    row.weighted += __shfl_xor_sync(kAllLanes, row.weighted, step);
  }
  return row;
}

// The states of all threads of a team (a warp, or a block of several) merged, in every thread. `shared` holds a state
// for each warp of a block and may be used again at once.
template <bool kBlock, class A>
__device__ RowState<A> merge_team(RowState<A> row, RowState<A>* shared) {
  row = merge_lanes(row);
  if constexpr (kBlock) {
    const unsigned lane = threadIdx.x % kWarpSize, warps = blockDim.x / kWarpSize;
    if (lane == 0) shared[threadIdx.x / kWarpSize] = row;
    __syncthreads();
    row = merge_lanes(lane < warps ? shared[lane] : empty_row<A>());
    __syncthreads();
  }
  return row;
}

// Before: an index from 0 on, or -1 for none yet, which stands behind all.
__device__ inline bool before(int64_t index, int64_t other) {
  return static_cast<uint64_t>(index) < static_cast<uint64_t>(other);
}

// Takes in `count` values at k, k + 1, ..; z = value / divisor is what is judged. One rebasing for all of them.
template <int V, class A>
__device__ void add_values(RowState<A>& row, const A (&values)[V], int64_t k, int count, A divisor) {
  A z[V];
  const A from = row.top;
  for (int i = 0; i < V; ++i) {
    const A v = values[i];
    z[i] = -infinity<A>();
    if (i >= count) continue;
    if (v != v) {
      if (before(k + i, row.nan_at)) row.nan_at = k + i;
      row.nan_z = true;
      continue;
    }
    if (v > row.best || (v == row.best && before(k + i, row.best_at))) {
      row.best = v;
      row.best_at = k + i;
    }
    const A judged = v / divisor;
    if (judged != judged) {
      row.nan_z = true;
      continue;
    }
    z[i] = judged;
    row.next = larger(row.next, smaller(row.top, judged));
    row.top = larger(row.top, judged);
  }
  rebase(row.sum, row.weighted, from, row.top);
  if (!finite(row.top)) return;
  for (int i = 0; i < V; ++i) {
    if (z[i] == -infinity<A>()) continue;
    const A d = z[i] - row.top, e = exponential(d);
    row.sum += e;
    row.weighted += e > A(0) ? e * d : A(0);
  }
}

// What values are divided by before they are judged: by multiplication where that is as good.
template <class A>
struct Divisor {
  A value, inverse;
  bool plain;  // positive, with a finite reciprocal: the order of the values is that of the quotients
  __device__ explicit Divisor(A divisor)
      : value(divisor), inverse(A(1) / divisor), plain(divisor > 0 && inverse > 0 && finite(inverse)) {}
};

// The same for V values, most of which change neither the largest nor the first NaN: about a third of the instructions.
template <int V, class A>
__device__ void add_pack(RowState<A>& row, const A (&values)[V], int64_t k, const Divisor<A>& divisor) {
  bool plain = divisor.plain;
  A most = values[0];
#pragma unroll
  for (int i = 0; i < V; ++i) {
    plain = plain && values[i] == values[i];
    most = maximum(most, values[i]);
  }
  if (!plain) {  // rare, so one value after the other: the code of one
    A rest[V];
    for (int i = 0; i < V; ++i) rest[i] = values[i];
#pragma unroll 1
    for (int i = 0; i < V; ++i) {
      const A one[1] = {rest[0]};
      add_values(row, one, k + i, 1, divisor.value);
#pragma unroll
      for (int j = 1; j < V; ++j) rest[j - 1] = rest[j];  // constant indices stay in registers
    }
    return;
  }
  if (most > row.best || (most == row.best && before(k, row.best_at))) {
    int64_t at = k;
#pragma unroll
    for (int i = V - 1; i >= 0; --i) at = values[i] == most ? k + i : at;
    if (most > row.best || before(at, row.best_at)) {
      row.best = most;
      row.best_at = at;
    }
  }
  const A from = row.top;
  A z[V];
#pragma unroll
  for (int i = 0; i < V; ++i) {
    z[i] = values[i] * divisor.inverse;
    row.next = maximum(row.next, minimum(row.top, z[i]));
    row.top = maximum(row.top, z[i]);
  }
  rebase(row.sum, row.weighted, from, row.top);
  if (!finite(row.top)) return;
#pragma unroll
  for (int i = 0; i < V; ++i) {
    const A d = maximum(z[i] - row.top, A(-10000));  // e^-10000 is 0; a product with -inf would be NaN
    const A e = exponential_of_difference(d);
    row.sum += e;
    row.weighted += e * d;
  }
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
