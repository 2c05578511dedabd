// An exit of the gated graph: one launch that adds, judges, answers and sets the condition of what follows.
#include "gated_exit.h"

#include "row_stats.cuh"

namespace aep::kernels::cuda {
namespace {

template <class A>
__device__ A number(const void* values, DType dtype, int64_t i) {
  switch (dtype) {
    case DType::f64:
      return static_cast<A>(static_cast<const double*>(values)[i]);
    case DType::bf16:
      return static_cast<A>(value_of(static_cast<const BF16*>(values)[i]));
    case DType::f16:
      return static_cast<A>(value_of(static_cast<const F16*>(values)[i]));
    default:
      return static_cast<A>(static_cast<const float*>(values)[i]);
  }
}

// Loads that are under way at once: one after the other, each would wait for memory.
constexpr int kAhead = 8, kTurn = 4;

template <class A, class W>
__device__ A sum_of(const W* weights, int64_t count) {
  A ahead[kAhead], sum = A(0);
  for (int j = 0; j < kAhead; ++j) ahead[j] = j < count ? static_cast<A>(value_of(weights[j])) : A(0);
  for (int j = 0; j < kAhead; ++j) {
    if (j < count) sum = add(sum, ahead[j]);
  }
#pragma unroll 1
  for (int64_t j = kAhead; j < count; ++j) sum = add(sum, static_cast<A>(value_of(weights[j])));
  return sum;
}

template <class A>
__device__ A sum_of(const void* weights, DType dtype, int64_t count) {
  switch (dtype) {
    case DType::f64:
      return sum_of<A>(static_cast<const double*>(weights), count);
    case DType::bf16:
      return sum_of<A>(static_cast<const BF16*>(weights), count);
    case DType::f16:
      return sum_of<A>(static_cast<const F16*>(weights), count);
    default:
      return sum_of<A>(static_cast<const float*>(weights), count);
  }
}

// Whether a judged row leaves where it may. `most`: of a vote, the largest count.
template <class A>
__device__ bool reaches(const GatedExitParams& p, const RowResult& row, const int64_t* patience, int64_t most,
                        A threshold) {
  switch (p.criterion) {
    case GateCriterion::confidence:
      return row.confidence >= static_cast<float>(threshold);
    case GateCriterion::entropy:
      return row.entropy <= static_cast<float>(threshold);
    case GateCriterion::margin:
      return row.margin >= static_cast<float>(threshold);
    case GateCriterion::patience:
      return static_cast<double>(patience[0] == row.argmax ? patience[1] + 1 : 1) >= static_cast<double>(threshold);
    case GateCriterion::vote:
      return static_cast<double>(most) >= static_cast<double>(threshold);
  }
  return false;
}

// Rows are known once every block has counted its own; the last one to come tells the graph.
__device__ void tell(const GatedExitParams& p, uint32_t staying) {
  uint32_t total = staying;
  if (gridDim.x > 1) {
    uint32_t* tally = p.tally + p.e * 2;
    atomicAdd(&tally[0], staying);
    __threadfence();
    if (atomicAdd(&tally[1], 1u) + 1 != gridDim.x) return;
    total = atomicAdd(&tally[0], 0u);
    tally[0] = tally[1] = 0;
  }
  p.remaining[p.e] = total;
  if (p.sets) cudaGraphSetConditional(p.condition, total > 0 ? 1u : 0u);
}

template <class S>
__global__ void gated_exit_of(GatedExitParams p) {
  using A = Acc<S>;
  AEP_SHARED(RowState<A>, shared, kMaxThreads / kWarpSize);
  AEP_SHARED(int64_t, shared_votes, kMaxThreads);
  const bool first = p.e == 0, last = p.e == p.E - 1, live = !last && p.may_leave && p.enabled[p.e];
  const bool vote = p.criterion == GateCriterion::vote, patience = p.criterion == GateCriterion::patience;
  const bool judges = live || last || vote || patience;
  const A weight = number<A>(p.weights, p.weights_dtype, p.e);
  const A weight_sum = add(sum_of<A>(p.weights, p.weights_dtype, p.e), weight);
  const A temperature = static_cast<A>(p.temperatures[p.e]);
  const A threshold = last ? A(0) : static_cast<A>(p.thresholds[p.e]);
  const bool on_exit = p.criterion_on == CriterionOn::exit;
  const A divisor = on_exit ? temperature : product(weight_sum, temperature);
  A* running = static_cast<A*>(p.running);
  uint32_t staying = 0;
  for (int64_t n = blockIdx.x; n < p.N; n += gridDim.x) {
    if (!first && p.exit[n] >= 0) continue;
    const S* logits = static_cast<const S*>(p.exit_logits) + n * p.logits_stride_n;
    A* sums = running + n * p.K;
    RowState<A> row = empty_row<A>();
    for (int64_t begin = threadIdx.x; begin < p.K; begin += kTurn * blockDim.x) {
      A own[kTurn], sum[kTurn];
      for (int i = 0; i < kTurn; ++i) {
        const int64_t k = begin + static_cast<int64_t>(i) * blockDim.x;
        own[i] = k < p.K ? value_of(logits[k]) : A(0);
        sum[i] = k < p.K && !first ? sums[k] : A(0);
      }
      for (int i = 0; i < kTurn; ++i) {
        const int64_t k = begin + static_cast<int64_t>(i) * blockDim.x;
        if (k >= p.K) break;
        sum[i] = add(sum[i], product(weight, own[i]));
        sums[k] = sum[i];
        const A judged[1] = {on_exit ? own[i] : sum[i]};
        if (judges) add_values(row, judged, k, 1, divisor);
      }
    }
    bool leaves = false;
    if (judges) {
      const RowResult result = finish_row(merge_team<true>(row, shared));
      const bool judged = result.confidence == result.confidence;
      int64_t most = 0, seen[2] = {-1, 0};
      if (vote) {
        int64_t* votes = p.state + n * p.S;
        for (int64_t k = threadIdx.x; k < p.S; k += blockDim.x) {
          const int64_t before = first ? 0 : votes[k];
          most = larger(most, before + (k == result.argmax ? 1 : 0));
          votes[k] = before + (judged && k == result.argmax ? 1 : 0);
        }
        most = block_reduce(most, shared_votes, larger<int64_t>);
      } else if (patience) {
        int64_t* state = p.state + n * 2;
        if (!first) seen[0] = state[0], seen[1] = state[1];
        __syncthreads();  // all have read what the first thread replaces
        if (threadIdx.x == 0) {
          state[0] = judged ? result.argmax : -1;
          state[1] = !judged ? 0 : result.argmax == seen[0] ? seen[1] + 1 : 1;
        }
      }
      leaves = last || (live && judged && reaches(p, result, seen, most, threshold));
      if (leaves) {
        S* answer = static_cast<S*>(p.logits) + n * p.K;
        for (int64_t k = threadIdx.x; k < p.K; k += blockDim.x) put(answer + k, quotient(sums[k], weight_sum));
        if (threadIdx.x == 0) p.confidence[n] = result.confidence;
      }
    }
    staying += leaves ? 0 : 1;
    if (threadIdx.x == 0) p.exit[n] = leaves ? p.e : -1;
  }
  if (threadIdx.x == 0) tell(p, staying);
}

auto kernel_for(DType dtype) {
  switch (dtype) {
    case DType::f64:
      return &gated_exit_of<double>;
    case DType::bf16:
      return &gated_exit_of<BF16>;
    case DType::f16:
      return &gated_exit_of<F16>;
    default:
      return &gated_exit_of<float>;
  }
}

}  // namespace

GatedExitKernel gated_exit_kernel(const GatedExitParams& p) {
  return {kernel_for(p.dtype), blocks_for(p.N), threads_for(p.K)};
}

cudaError_t launch_gated_exit(const GatedExitParams& p, cudaStream_t stream) {
  const GatedExitKernel kernel = gated_exit_kernel(p);
  return enqueue(kernel.function, dim3(kernel.blocks), dim3(kernel.threads), 0, stream, p);
}

}  // namespace aep::kernels::cuda
