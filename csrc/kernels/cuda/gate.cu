// The gate in three launches: judge every row, place the rows (one block), copy them. Nothing is read by the host.
#include "row_stats.cuh"

namespace aep::kernels::cuda {
namespace {

// One row's place in GateParams::scratch.
struct GateRow {
  int64_t answer;  // argmax of running'
  int64_t judged;  // argmax of the judged values; -1: not judged (NaN)
  int64_t place;   // row of the outputs
  float stats[3];
  int32_t leaves;
};

constexpr int kPlaceThreads = 1024;

template <class R, class S>
__device__ void updated(const GateParams& p, int64_t n, int64_t k, Acc<S> weight, R* out) {
  const R* running = static_cast<const R*>(p.running) + n * p.running_stride_n;
  const S* logits = static_cast<const S*>(p.exit_logits) + n * p.logits_stride_n;
  put(out, add(value_of(running[k]), product(weight, value_of(logits[k]))));
}

template <class R, class S>
__global__ void judge_kernel(GateParams p) {
  using A = Acc<S>;
  AEP_SHARED(RowState<A>, shared, kMaxThreads);
  AEP_SHARED(int64_t, shared_votes, kMaxThreads);
  const A weight = read<A>(p.weight), temperature = read<A>(p.temperature), threshold = read<A>(p.threshold);
  const bool on_exit = p.on == GateOn::exit;
  const A divisor = on_exit ? temperature : product(add(read<A>(p.weight_sum), weight), temperature);
  for (int64_t n = blockIdx.x; n < p.n; n += gridDim.x) {
    const S* logits = static_cast<const S*>(p.exit_logits) + n * p.logits_stride_n;
    RowState<A> sums = empty_row<A>(), own = empty_row<A>();
    for (int64_t k = threadIdx.x; k < p.K; k += blockDim.x) {
      R stored;
      updated<R, S>(p, n, k, weight, &stored);
      add_value(sums, value_of(stored), k, on_exit ? A(1) : divisor);
      if (on_exit) add_value(own, value_of(logits[k]), k, divisor);
    }
    sums = block_reduce(sums, shared, merge_rows<A>);
    if (on_exit) own = block_reduce(own, shared, merge_rows<A>);
    const RowResult answer = finish_row(sums), result = on_exit ? finish_row(own) : answer;
    const bool judged = result.confidence == result.confidence;
    int64_t most = 0;
    if (p.policy == GatePolicy::vote) {
      const int64_t* votes = p.state + n * p.S;
      for (int64_t k = threadIdx.x; k < p.S; k += blockDim.x)
        most = larger(most, votes[k] + (k == result.argmax ? 1 : 0));
      most = block_reduce(most, shared_votes, larger<int64_t>);
    }
    if (threadIdx.x == 0) {
      bool leaves = false;
      switch (p.policy) {
        case GatePolicy::confidence:
          leaves = result.confidence >= static_cast<float>(threshold);
          break;
        case GatePolicy::entropy:
          leaves = result.entropy <= static_cast<float>(threshold);
          break;
        case GatePolicy::margin:
          leaves = result.margin >= static_cast<float>(threshold);
          break;
        case GatePolicy::patience: {
          const int64_t* state = p.state + n * 2;
          leaves = static_cast<double>(state[0] == result.argmax ? state[1] + 1 : 1) >= static_cast<double>(threshold);
          break;
        }
        case GatePolicy::vote:
          leaves = static_cast<double>(most) >= static_cast<double>(threshold);
          break;
      }
      GateRow& row = static_cast<GateRow*>(p.scratch)[n];
      row.answer = answer.argmax;
      row.judged = judged ? result.argmax : -1;
      row.stats[0] = result.confidence;
      row.stats[1] = result.entropy;
      row.stats[2] = result.margin;
      row.leaves = p.enabled && judged && leaves;
    }
  }
}

// One block: a running count over the rows gives every row its place, stayers first, both in order.
template <class A>
__global__ void place_kernel(GateParams p) {
  AEP_SHARED(int, shared, kPlaceThreads);
  GateRow* rows = static_cast<GateRow*>(p.scratch);
  int64_t stayed = 0;  // before this stretch of rows
  for (int64_t first = 0; first < p.n; first += kPlaceThreads) {
    const int64_t n = first + threadIdx.x;
    const int stays = n < p.n && !rows[n].leaves;
    shared[threadIdx.x] = stays;
    __syncthreads();
    for (unsigned step = 1; step < kPlaceThreads; step *= 2) {
      const int before = threadIdx.x >= step ? shared[threadIdx.x - step] : 0;
      __syncthreads();
      shared[threadIdx.x] += before;
      __syncthreads();
    }
    const int64_t ahead = stayed + shared[threadIdx.x] - stays;  // stayers before row n
    if (n < p.n) rows[n].place = stays ? ahead : n - ahead;  // a leaver's place still lacks the number of all stayers
    stayed += shared[kPlaceThreads - 1];
    __syncthreads();
  }
  for (int64_t n = threadIdx.x; n < p.n; n += kPlaceThreads) {
    if (rows[n].leaves) rows[n].place += stayed;
  }
  if (threadIdx.x == 0) {
    *p.count_out = stayed;
    *static_cast<A*>(p.weight_sum_out) = add(read<A>(p.weight_sum), read<A>(p.weight));
  }
}

// Copies one row of features, or clears it, in units of T.
template <class T>
__device__ void move_row(char* out, const char* in, int64_t bytes, bool clear) {
  const int64_t count = bytes / static_cast<int64_t>(sizeof(T));
  for (int64_t i = threadIdx.x; i < count; i += blockDim.x) {
    reinterpret_cast<T*>(out)[i] = clear ? T{} : reinterpret_cast<const T*>(in)[i];
  }
}

template <class R, class S>
__global__ void scatter_kernel(GateParams p) {
  using A = Acc<S>;
  const A weight = read<A>(p.weight);
  const GateRow* rows = static_cast<const GateRow*>(p.scratch);
  // The widest unit that all rows are aligned to.
  const uint64_t alignment =
      reinterpret_cast<uint64_t>(p.features) | reinterpret_cast<uint64_t>(p.features_out) |
      static_cast<uint64_t>(p.feature_row_bytes | p.feature_stride_bytes | p.feature_out_stride_bytes);
  for (int64_t n = blockIdx.x; n < p.n; n += gridDim.x) {
    const GateRow row = rows[n];
    const int64_t to = row.place;
    for (int64_t k = threadIdx.x; k < p.K; k += blockDim.x)
      updated<R, S>(p, n, k, weight, static_cast<R*>(p.running_out) + to * p.K + k);
    if (p.policy == GatePolicy::patience) {
      if (threadIdx.x == 0) {
        const int64_t* old = p.state + n * 2;
        p.state_out[to * 2] = row.judged;
        p.state_out[to * 2 + 1] = row.judged < 0 ? 0 : row.judged == old[0] ? old[1] + 1 : 1;
      }
    } else {
      const bool vote = p.policy == GatePolicy::vote;
      for (int64_t k = threadIdx.x; k < p.S; k += blockDim.x)
        p.state_out[to * p.S + k] = p.state[n * p.S + k] + (vote && k == row.judged ? 1 : 0);
    }
    if (threadIdx.x == 0) {
      p.indices_out[to] = p.indices[n];
      p.argmax_out[to] = row.answer;
      for (int i = 0; i < 3; ++i) p.stats_out[to * 3 + i] = row.stats[i];
    }
    // Leavers are placed behind the stayers: theirs are the rows that are zero, or left alone.
    if (row.leaves && !p.clear_behind) continue;
    char* out = static_cast<char*>(p.features_out) + to * p.feature_out_stride_bytes;
    const char* in = static_cast<const char*>(p.features) + n * p.feature_stride_bytes;
    if (alignment % 16 == 0) {
      move_row<uint4>(out, in, p.feature_row_bytes, row.leaves);
    } else if (alignment % 4 == 0) {
      move_row<uint32_t>(out, in, p.feature_row_bytes, row.leaves);
    } else if (alignment % 2 == 0) {
      move_row<uint16_t>(out, in, p.feature_row_bytes, row.leaves);
    } else {
      move_row<unsigned char>(out, in, p.feature_row_bytes, row.leaves);
    }
  }
}

template <class R, class S>
cudaError_t launch(const GateParams& p, cudaStream_t stream) {
  cudaError_t error = cudaSuccess;
  if (p.n > 0) error = enqueue(judge_kernel<R, S>, blocks_for(p.n), threads_for(p.K), 0, stream, p);
  if (error == cudaSuccess) error = enqueue(place_kernel<Acc<S>>, 1, kPlaceThreads, 0, stream, p);
  if (error == cudaSuccess && p.n > 0) error = enqueue(scatter_kernel<R, S>, blocks_for(p.n), kMaxThreads, 0, stream, p);
  return error;
}

}  // namespace

size_t gate_scratch_bytes(int64_t n) { return static_cast<size_t>(n) * sizeof(GateRow); }

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
