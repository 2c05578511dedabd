// The gate in one launch for small batches, in two up to kFlagRows rows, in three beyond. Nothing is read by the host.
//
// One launch: every block judges all rows itself (they are few and come from the L2 cache), so each knows the place of
// every row without waiting for another block, and copies its share. Two: one launch judges, the next one counts the
// flags in front of each row that it copies. Three: one block places the rows in between.
#include "row_stats.cuh"

namespace aep::kernels::cuda {
namespace {

// One row's place in GateParams::scratch; behind these, a byte for each row: whether it leaves.
struct GateRow {
  int64_t answer;  // argmax of running'
  int64_t judged;  // argmax of the judged values; -1: not judged (NaN)
  int64_t place;   // row of the outputs
  float stats[3];
  int32_t leaves;
};

constexpr int kPlaceThreads = 1024;
constexpr int64_t kSmallRows = 32, kSmallLogits = 16384, kFlagRows = 1024;
constexpr int64_t kChunk = 16384;  // bytes of features that a block copies at a time
constexpr int64_t kSmallBlocks = 512;

__device__ inline unsigned char* flags_of(const GateParams& p) {
  return static_cast<unsigned char*>(p.scratch) + static_cast<size_t>(p.n) * sizeof(GateRow);
}

template <class R, class S>
__device__ R updated(const GateParams& p, int64_t n, int64_t k, Acc<S> weight) {
  const R* running = static_cast<const R*>(p.running) + n * p.running_stride_n;
  const S* logits = static_cast<const S*>(p.exit_logits) + n * p.logits_stride_n;
  R result;
  put(&result, add(value_of(running[k]), product(weight, value_of(logits[k]))));
  return result;
}

// The largest value of a team, in every thread; `shared` holds one for each warp of a block.
template <bool kBlock>
__device__ int64_t largest_of_team(int64_t value, int64_t* shared) {
  for (int step = 1; step < static_cast<int>(kWarpSize); step *= 2) value = larger(value, shuffle_index(value, step));
  if constexpr (kBlock) {
    if (threadIdx.x % kWarpSize == 0) shared[threadIdx.x / kWarpSize] = value;
    __syncthreads();
    for (unsigned warp = 0; warp < blockDim.x / kWarpSize; ++warp) value = larger(value, shared[warp]);
    __syncthreads();
  }
  return value;
}

template <class A>
__device__ bool decide(const GateParams& p, int64_t n, const RowResult& result, int64_t most, A threshold) {
  switch (p.criterion) {
    case GateCriterion::confidence:
      return result.confidence >= static_cast<float>(threshold);
    case GateCriterion::entropy:
      return result.entropy <= static_cast<float>(threshold);
    case GateCriterion::margin:
      return result.margin >= static_cast<float>(threshold);
    case GateCriterion::patience: {
      const int64_t* state = p.state + n * 2;
      return static_cast<double>(state[0] == result.argmax ? state[1] + 1 : 1) >= static_cast<double>(threshold);
    }
    case GateCriterion::vote:
      return static_cast<double>(most) >= static_cast<double>(threshold);
  }
  return false;
}

// One row by one team, a warp or a block; the result is the same in all of its threads.
template <bool kBlock, class R, class S>
__device__ GateRow judge_row(const GateParams& p, int64_t n, RowState<Acc<S>>* shared, int64_t* shared_votes) {
  using A = Acc<S>;
  const unsigned size = kBlock ? blockDim.x : kWarpSize, rank = kBlock ? threadIdx.x : threadIdx.x % kWarpSize;
  const A weight = read<A>(p.weight), temperature = read<A>(p.temperature), threshold = read<A>(p.threshold);
  const bool on_exit = p.criterion_on == CriterionOn::exit;
  const A divisor = on_exit ? temperature : product(add(read<A>(p.weight_sum), weight), temperature);
  const S* logits = static_cast<const S*>(p.exit_logits) + n * p.logits_stride_n;
  RowState<A> sums = empty_row<A>(), own = empty_row<A>();
  for (int64_t k = rank; k < p.K; k += size) {
    const A sum[1] = {value_of(updated<R, S>(p, n, k, weight))}, logit[1] = {value_of(logits[k])};
    add_values(sums, sum, k, 1, on_exit ? A(1) : divisor);
    if (on_exit) add_values(own, logit, k, 1, divisor);
  }
  sums = merge_team<kBlock>(sums, shared);
  if (on_exit) own = merge_team<kBlock>(own, shared);
  const RowResult answer = finish_row(sums), result = on_exit ? finish_row(own) : answer;
  const bool judged = result.confidence == result.confidence;
  int64_t most = 0;
  if (p.criterion == GateCriterion::vote) {
    const int64_t* votes = p.state + n * p.S;
    for (int64_t k = rank; k < p.S; k += size) most = larger(most, votes[k] + (k == result.argmax ? 1 : 0));
    most = largest_of_team<kBlock>(most, shared_votes);
  }
  return {answer.argmax,
          judged ? result.argmax : -1,
          0,
          {result.confidence, result.entropy, result.margin},
          p.last || (p.enabled && judged && decide(p, n, result, most, threshold))};
}

// Of a block's flags: how many are set in front of this thread's, and in all. `shared` holds a count for each warp.
struct Counted {
  int64_t before, all;
};
__device__ inline Counted count_flags(bool flag, int* shared) {
  const unsigned lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize, warps = blockDim.x / kWarpSize;
  const unsigned votes = __ballot_sync(kAllLanes, flag);
  if (lane == 0) shared[warp] = __popc(votes);
  __syncthreads();
  Counted result = {__popc(votes & ((1u << lane) - 1u)), 0};
  for (unsigned other = 0; other < warps; ++other) {
    result.all += shared[other];
    if (other < warp) result.before += shared[other];
  }
  __syncthreads();
  return result;
}

// Copies a part of one row of features, or clears it, in units of T.
template <class T>
__device__ void move_bytes(char* __restrict__ out, const char* __restrict__ in, int64_t bytes, bool clear) {
  const int count = static_cast<int>(bytes / static_cast<int64_t>(sizeof(T)));  // of a chunk
  const int step = static_cast<int>(blockDim.x);
  T* __restrict__ to = reinterpret_cast<T*>(out);
  const T* __restrict__ from = reinterpret_cast<const T*>(in);
  if (clear) {
    for (int i = static_cast<int>(threadIdx.x); i < count; i += step) to[i] = T{};
    return;
  }
  for (int i = static_cast<int>(threadIdx.x); i < count; i += kBatch * step) {
    T unit[kBatch];
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      if (i + j * step < count) unit[j] = from[i + j * step];
    }
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      if (i + j * step < count) to[i + j * step] = unit[j];
    }
  }
}

// The block's share of bringing row n to its place: one chunk of its features, and with the first one all the rest.
template <class R, class S>
__device__ void move_row(const GateParams& p, int64_t n, int64_t chunk, const GateRow& row) {
  const int64_t to = row.place;
  if (chunk == 0) {
    const Acc<S> weight = read<Acc<S>>(p.weight), weight_sum = add(read<Acc<S>>(p.weight_sum), weight);
    R* running = static_cast<R*>(p.running_out) + to * p.K;
    for (int64_t k = threadIdx.x; k < p.K; k += blockDim.x) {
      const R sum = updated<R, S>(p, n, k, weight);
      if (row.leaves) {
        put(running + k, quotient(value_of(sum), weight_sum));
      } else {
        running[k] = sum;
      }
    }
    if (p.criterion == GateCriterion::patience) {
      if (threadIdx.x == 0) {
        const int64_t* old = p.state + n * 2;
        p.state_out[to * 2] = row.judged;
        p.state_out[to * 2 + 1] = row.judged < 0 ? 0 : row.judged == old[0] ? old[1] + 1 : 1;
      }
    } else {
      const bool vote = p.criterion == GateCriterion::vote;
      for (int64_t k = threadIdx.x; k < p.S; k += blockDim.x)
        p.state_out[to * p.S + k] = p.state[n * p.S + k] + (vote && k == row.judged ? 1 : 0);
    }
    if (threadIdx.x == 0) {
      p.indices_out[to] = p.indices[n];
      p.argmax_out[to] = row.answer;
      for (int i = 0; i < 3; ++i) p.stats_out[to * 3 + i] = row.stats[i];
    }
  }
  // Leavers are placed behind the stayers: theirs are the rows that are zero.
  // The widest unit that all rows are aligned to.
  const uint64_t alignment =
      reinterpret_cast<uint64_t>(p.features) | reinterpret_cast<uint64_t>(p.features_out) |
      static_cast<uint64_t>(p.feature_row_bytes | p.feature_stride_bytes | p.feature_out_stride_bytes);
  const int64_t begin = chunk * kChunk, bytes = smaller(kChunk, p.feature_row_bytes - begin);
  char* out = static_cast<char*>(p.features_out) + to * p.feature_out_stride_bytes + begin;
  const char* in = static_cast<const char*>(p.features) + n * p.feature_stride_bytes + begin;
  if (alignment % 16 == 0) {
    move_bytes<uint4>(out, in, bytes, row.leaves);
  } else if (alignment % 4 == 0) {
    move_bytes<uint32_t>(out, in, bytes, row.leaves);
  } else if (alignment % 2 == 0) {
    move_bytes<uint16_t>(out, in, bytes, row.leaves);
  } else {
    move_bytes<unsigned char>(out, in, bytes, row.leaves);
  }
}

template <class A>
__device__ void write_totals(const GateParams& p, int64_t stayed) {
  *p.count_out = stayed;
  *static_cast<A*>(p.weight_sum_out) = add(read<A>(p.weight_sum), read<A>(p.weight));
}

// At most kSmallRows rows, none included: everything.
template <bool kBlock, class R, class S>
__global__ void __launch_bounds__(kMaxThreads) small_gate_kernel(GateParams p, int64_t chunks) {
  AEP_SHARED(GateRow, rows, kSmallRows);
  AEP_SHARED(RowState<Acc<S>>, shared, kRowsOfBlock);
  AEP_SHARED(int64_t, shared_votes, kRowsOfBlock);
  AEP_SHARED(int, counts, kRowsOfBlock);
  const int64_t team = kBlock ? 0 : threadIdx.x / kWarpSize, teams = kBlock ? 1 : kRowsOfBlock;
  for (int64_t n = team; n < p.n; n += teams) {
    const GateRow row = judge_row<kBlock, R, S>(p, n, shared, shared_votes);
    if (threadIdx.x % (kBlock ? blockDim.x : kWarpSize) == 0) rows[n] = row;
  }
  __syncthreads();
  const int64_t mine = threadIdx.x;
  const bool stays = mine < p.n && !rows[mine].leaves;
  const Counted stayers = count_flags(stays, counts);
  if (mine < p.n) rows[mine].place = stays ? stayers.before : stayers.all + mine - stayers.before;
  __syncthreads();
  for (int64_t task = blockIdx.x; task < p.n * chunks; task += gridDim.x)
    move_row<R, S>(p, task / chunks, task % chunks, rows[task / chunks]);
  if (blockIdx.x == 0 && threadIdx.x == 0) write_totals<Acc<S>>(p, stayers.all);
}

template <bool kBlock, class R, class S>
__global__ void __launch_bounds__(kMaxThreads) judge_kernel(GateParams p) {
  AEP_SHARED(RowState<Acc<S>>, shared, kRowsOfBlock);
  AEP_SHARED(int64_t, shared_votes, kRowsOfBlock);
  const int64_t team = kBlock ? 0 : threadIdx.x / kWarpSize, teams = kBlock ? 1 : kRowsOfBlock;
  for (int64_t n = blockIdx.x * teams + team; n < p.n; n += gridDim.x * teams) {
    const GateRow row = judge_row<kBlock, R, S>(p, n, shared, shared_votes);
    if (threadIdx.x % (kBlock ? blockDim.x : kWarpSize) == 0) {
      static_cast<GateRow*>(p.scratch)[n] = row;
      flags_of(p)[n] = row.leaves ? 1 : 0;
    }
  }
}

// One block: a running count over the rows gives every row its place, stayers first, both in order.
template <class A>
__global__ void __launch_bounds__(kPlaceThreads) place_kernel(GateParams p) {
  AEP_SHARED(int, counts, kPlaceThreads / kWarpSize);
  GateRow* rows = static_cast<GateRow*>(p.scratch);
  const unsigned char* leaves = flags_of(p);
  int64_t stayed = 0;  // before this stretch of rows
  for (int64_t first = 0; first < p.n; first += kPlaceThreads) {
    const int64_t n = first + threadIdx.x;
    const bool stays = n < p.n && !leaves[n];
    const Counted stayers = count_flags(stays, counts);
    const int64_t ahead = stayed + stayers.before;
    if (n < p.n) rows[n].place = stays ? ahead : n - ahead;  // a leaver's place still lacks the number of all stayers
    stayed += stayers.all;
  }
  for (int64_t n = threadIdx.x; n < p.n; n += kPlaceThreads) {
    if (leaves[n]) rows[n].place += stayed;
  }
  if (threadIdx.x == 0) write_totals<A>(p, stayed);
}

// kPlaced: the places are known; else they are counted here, at most kFlagRows flags.
template <bool kPlaced, class R, class S>
__global__ void __launch_bounds__(kMaxThreads) scatter_kernel(GateParams p, int64_t chunks) {
  AEP_SHARED(int, shared, kRowsOfBlock * 2);
  for (int64_t task = blockIdx.x; task < p.n * chunks; task += gridDim.x) {
    const int64_t n = task / chunks;
    GateRow row = static_cast<const GateRow*>(p.scratch)[n];
    if constexpr (!kPlaced) {
      const unsigned char* leaves = flags_of(p);
      int before = 0, all = 0;  // stayers
      for (int64_t i = threadIdx.x; i < p.n; i += blockDim.x) {
        const int stays = leaves[i] ? 0 : 1;
        all += stays;
        if (i < n) before += stays;
      }
      for (int step = 1; step < static_cast<int>(kWarpSize); step *= 2) {
        all += __shfl_xor_sync(kAllLanes, all, step);
        before += __shfl_xor_sync(kAllLanes, before, step);
      }
      const unsigned warp = threadIdx.x / kWarpSize;
      if (threadIdx.x % kWarpSize == 0) shared[2 * warp] = all, shared[2 * warp + 1] = before;
      __syncthreads();
      all = before = 0;
      for (unsigned other = 0; other < blockDim.x / kWarpSize; ++other) {
        all += shared[2 * other];
        before += shared[2 * other + 1];
      }
      __syncthreads();
      row.place = row.leaves ? all + n - before : before;
      if (task == 0 && threadIdx.x == 0) write_totals<Acc<S>>(p, all);
    }
    move_row<R, S>(p, n, task % chunks, row);
  }
}

// Whether one launch is the shorter way: there every block judges all rows, its warps (or it as a whole) one after the
// other. A row alone would not be judged faster by a launch of its own.
inline bool in_one_launch(const GateParams& p) {
  if (p.n > kSmallRows || p.n * p.K > kSmallLogits) return false;
  const bool block = p.n < kRowsOfBlock;
  const int64_t each = block ? kMaxThreads : kWarpSize, rows = block ? p.n : (p.n + kRowsOfBlock - 1) / kRowsOfBlock;
  return p.n <= 1 || rows * ((p.K + each - 1) / each) <= 8;
}

template <class R, class S>
cudaError_t launch(const GateParams& p, cudaStream_t stream) {
  const int64_t chunks = p.feature_row_bytes > kChunk ? (p.feature_row_bytes + kChunk - 1) / kChunk : 1;
  const int64_t tasks = p.n * chunks;
  if (in_one_launch(p)) {
    const unsigned blocks = blocks_for(tasks < 1 ? 1 : tasks < kSmallBlocks ? tasks : kSmallBlocks);
    return p.n < kRowsOfBlock ? enqueue(small_gate_kernel<true, R, S>, blocks, kMaxThreads, 0, stream, p, chunks)
                              : enqueue(small_gate_kernel<false, R, S>, blocks, kMaxThreads, 0, stream, p, chunks);
  }
  cudaError_t error =
      row_needs_block(p.n, p.K)
          ? enqueue(judge_kernel<true, R, S>, blocks_for(p.n), threads_for(p.K), 0, stream, p)
          : enqueue(judge_kernel<false, R, S>, blocks_for((p.n + kRowsOfBlock - 1) / kRowsOfBlock), kMaxThreads, 0,
                    stream, p);
  if (error != cudaSuccess) return error;
  if (p.n <= kFlagRows)
    return enqueue(scatter_kernel<false, R, S>, blocks_for(tasks), kMaxThreads, 0, stream, p, chunks);
  error = enqueue(place_kernel<Acc<S>>, 1, kPlaceThreads, 0, stream, p);
  if (error != cudaSuccess) return error;
  return enqueue(scatter_kernel<true, R, S>, blocks_for(tasks), kMaxThreads, 0, stream, p, chunks);
}

}  // namespace

size_t gate_scratch_bytes(int64_t n) {
  return static_cast<size_t>(n) * sizeof(GateRow) + static_cast<size_t>(n + 7) / 8 * 8;
}

cudaError_t launch_gate(const GateParams& p, cudaStream_t stream) {
  const bool wide = p.running_dtype == DType::f32;  // the running sum in float, the logits in two bytes
  switch (p.dtype) {
    case DType::f32:
      return launch<float, float>(p, stream);
    case DType::f64:
      return launch<double, double>(p, stream);
    case DType::bf16:
      return wide ? launch<float, BF16>(p, stream) : launch<BF16, BF16>(p, stream);
    case DType::f16:
      return wide ? launch<float, F16>(p, stream) : launch<F16, F16>(p, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace aep::kernels::cuda
