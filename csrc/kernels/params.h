// Parameters of the aep kernels: one plain struct per operator, shared by the CPU and the CUDA kernels.
//
// Interface changes after the first version are announced here:
//   SmallLinearParams and GateOneParams: new. GateParams::last: new, set it to false for what was.
//   MultiExitLoss*Params: for JointCrossEntropy*Params, whose loss is the one without prefixes and distillation. The items
//   of its kernels are samples, no longer rows; the backward is the gradient without row losses.
//   EnsembleBackwardParams::partials: ensemble_backward_partials() says how large, for both backends.
//
// Conventions, for every struct:
//   * No torch types. Pointers are raw; on CUDA they are device pointers unless a comment says otherwise.
//   * Sizes and strides are int64_t; strides count ELEMENTS, not bytes, unless the name ends in _bytes.
//   * `dtype` is the storage type. The accumulation type ("acc") follows from it: double for f64, float for all others.
//     An "acc" pointer is `float*` or `double*` accordingly.
//   * E exits, N samples (rows), K classes. K >= 1 and E >= 1 wherever they appear; N may be 0.
//   * Buffers are described as (shape): contiguous, unless strides stand beside them. Inputs and outputs must not
//     overlap, except where a comment allows it.
//   * Weighted sums are rounded products added in ascending exit order in acc (no fused multiply-add), then rounded
//     once to dtype.
#pragma once

#include <stdint.h>

namespace aep::kernels {

enum class DType : int32_t { f32 = 0, f64 = 1, bf16 = 2, f16 = 3 };

// A scalar operand: the acc-typed value at `ptr` (device memory on CUDA, so that no synchronisation is needed), or
// `value` if ptr is null.
struct Scalar {
  const void* ptr;
  double value;
};

// output[n, c] = mean over h, w of input[n, c, h, w], summed in acc. H * W >= 1.
struct GlobalAvgPoolParams {
  const void* input;  // dtype (N, C, H, W), any strides; channels_last and contiguous have fast paths
  void* output;       // dtype (N, C)
  DType dtype;
  int64_t N, C, H, W;
  int64_t stride_n, stride_c, stride_h, stride_w;
  int64_t out_stride_n, out_stride_c;
};

// output[n, k] = sum_c input[n, c] * weight[k, c] + bias[k], summed in acc, rounded once. For few rows.
struct SmallLinearParams {
  const void* input;   // dtype (N, C), channel stride 1
  const void* weight;  // dtype (K, C), channel stride 1
  const void* bias;    // dtype (K), any stride; or null
  void* output;        // dtype (N, K), class stride 1
  DType dtype;
  int64_t N, C, K;
  int64_t stride_n, weight_stride_k, bias_stride, out_stride_n;
};

// output[n, k] = sum_e weights[e] * logits[e, n, k]
struct EnsembleParams {
  const void* logits;   // dtype (E, N, K), any strides
  const void* weights;  // acc (E)
  void* output;         // dtype (N, K), class stride 1
  DType dtype;
  int64_t E, N, K;
  int64_t stride_e, stride_n, stride_k;
  int64_t out_stride_n;
};

// Gradients of `ensemble`. Either output may be null if it is not wanted.
struct EnsembleBackwardParams {
  const void* grad;     // dtype (N, K), any strides (0 included)
  const void* logits;   // dtype (E, N, K), any strides; read only for grad_weights
  const void* weights;  // acc (E)
  void* grad_logits;    // dtype (E, N, K): weights[e] * grad[n, k]; class stride 1
  void* partials;       // acc: scratch of ensemble_backward_partials(E, N, K) values
  void* grad_weights;   // acc (E): sum_nk grad[n, k] * logits[e, n, k]; the order depends on the shape only
  DType dtype;
  int64_t E, N, K;
  int64_t grad_stride_n, grad_stride_k;
  int64_t stride_e, stride_n, stride_k;
  int64_t out_stride_e, out_stride_n;
};
// The sum for grad_weights is formed of parts: on the CPU of kEnsembleChunkRows rows each, on CUDA of at least
// kEnsemblePartSize of the N * K products, as many as fill a device.
constexpr int64_t kEnsembleChunkRows = 64, kEnsemblePartSize = 4096, kEnsembleMostParts = 1024;
constexpr int64_t ensemble_backward_parts(int64_t N, int64_t K) {
  const int64_t parts = N * K / kEnsemblePartSize + (N * K % kEnsemblePartSize != 0 ? 1 : 0);
  return parts < kEnsembleMostParts ? parts : kEnsembleMostParts;
}
constexpr int64_t ensemble_backward_partials(int64_t E, int64_t N, int64_t K) {
  const int64_t chunks = (N + kEnsembleChunkRows - 1) / kEnsembleChunkRows, parts = ensemble_backward_parts(N, K);
  return (chunks > parts ? chunks : parts) * E;
}

// `ensemble` plus statistics of the RETURNED (rounded) logits z = output / (normalizer * temperature).
//   confidence = max softmax(z); entropy in nats; margin = largest minus second largest probability; K = 1: 1, 0, 1.
//   A row with NaN or +inf, or only -inf: statistics NaN. argmax: lowest index on ties; the first NaN if there is one.
struct EnsembleStatsParams {
  EnsembleParams ensemble;
  Scalar normalizer, temperature;  // acc
  float* stats;                    // (N, 3)
  int64_t* argmax;                 // (N)
};

// The losses of every sample, with lse(x) = log(sum_k exp(x[k])) and t[k] = w[k] * ((1 - s) * q[k] + s / K), where q is the
// one-hot form of target[n], or probabilities[n]:
//   row_losses[0][e, n] = sum_k t[k] * (lse(O_e) - O_e[k]), the cross entropy of the exit's logits O_e;
//   row_losses[1][e, n] = the same of R_e = sum_{j <= e} b_j O_j / sum_{j <= e} b_j; with `prefixes`;
//   row_losses[2][e, n] = KL(softmax(R_{E-1} / T) || softmax(O_e / T)); with `distillation`;
// all 0 where target == ignore_index. On CUDA a label out of range (and not ignored) gives NaN; on the CPU check with
// find_bad_label() first.
struct MultiExitLossParams {
  const void* logits;          // dtype (E, N, K), any strides
  const int64_t* target;       // (N), any stride; or null
  const void* probabilities;   // acc (N, K), class stride 1; read where target is null
  const void* class_weight;    // acc (K): w; or null for ones
  const void* output_weights;  // acc (E): b; or null for ones
  void* row_losses[3];         // acc (E, N) each; null where not asked for
  void* kept;  // acc, multi_exit_loss_kept() values, for the backward; or null. Nothing of use for rows without a gradient
  DType dtype;
  int64_t E, N, K;
  int64_t stride_e, stride_n, stride_k;
  int64_t target_stride;  // of the samples' targets or probabilities
  int64_t ignore_index;
  double label_smoothing, temperature;
  bool prefixes, distillation, detach_prefix;
};
// (E, N) each: what is subtracted from the exits' logits and the sums of the exponentials then (apart, since their sum
// shift + log(sum) would round the logarithm away where logits are large); with prefixes or distillation also both for
// the prefixes, and the sums for O_e / T; and (N), that for R_{E-1} / T.
constexpr int64_t multi_exit_loss_kept(int64_t E, int64_t N, bool terms) { return terms ? (5 * E + 1) * N : 2 * E * N; }

enum class Reduction : int32_t { none = 0, mean = 1, sum = 2 };

// From row losses to the returned losses, in a fixed order of additions. Terms i without losses[i] (none: row_losses[i]) are
// left out.
//   none: loss (N) = sum over terms and exits of weight * row loss; losses are not written (they ARE the row losses).
//   sum:  losses[i][e] = sum_n row_losses[i][e, n]; loss = sum of weight * losses[i][e]
//   mean: the same, with terms 0 and 1 divided by divisors[0] = sum of w[y_n] over the rows that are not ignored (NaN
//   where that sum is 0), or N for probabilities, and term 2 by divisors[1] = the number of rows that are not ignored.
struct MultiExitLossReduceParams {
  const void* row_losses[3];  // acc (E, N) each
  const void* weights[3];     // acc (E) each; null: `weight` for every exit
  double weight;
  const int64_t* target;      // (N), any stride; null: probabilities
  const void* class_weight;   // acc (K), or null
  void* loss;                 // acc: (N) for none, else one value
  void* losses[3];            // acc (E) each; not looked at for none
  void* divisors;             // acc, two values (1 for none and sum); or null
  DType dtype;
  Reduction reduction;
  int64_t E, N, K;
  int64_t target_stride;
  int64_t ignore_index;
};

// What one unit of each row's loss adds to the final scalar:
//   c[e, n] = (weights[e] * grad_loss[n] + grad_losses[e, n]) / denominator * factor
struct LossCoefficients {
  const void* weights;      // acc (E); null: `weight` for every exit
  double weight;
  const void* grad_loss;    // acc, stride loss_stride_n (0: one value for all rows); null: 1
  const void* grad_losses;  // acc, strides stride_e and stride_n (0: one value an exit); null: 0
  const void* denominator;  // acc, one value; null: 1
  int64_t loss_stride_n;
  int64_t stride_e, stride_n;
  double factor;
};

// The gradient of the row losses times their coefficients:
//   grad_logits[e, n, :] = c0[e, n] * (W softmax(O_e) - t)
//                          + b_e * sum_{j >= e} c1[j, n] / B_j * (W softmax(R_j) - t), j = e alone with detach_prefix
//                          + c2[e, n] / T * (softmax(O_e / T) - softmax(R_{E-1} / T)),
// W = sum_k t[k], B_j = sum_{i <= j} b_i; exactly 0 in ignored rows, whatever the coefficients; on CUDA also 0 in rows whose
// label is out of range. With loss.row_losses: these too, in the same pass; without: from loss.kept.
struct MultiExitLossGradParams {
  MultiExitLossParams loss;
  LossCoefficients coefficients[3];
  void* grad_logits;  // dtype (E, N, K), any strides; may be `logits` itself with the same strides (in place)
  int64_t out_stride_e, out_stride_n, out_stride_k;
};

// grad[e, n, k] *= scale / divisor, in acc and rounded once; nothing is touched where that factor is 1.
struct LossGradScaleParams {
  void* grad;         // dtype (E, N, K), any strides
  const void* scale;  // acc, one value
  double divisor;
  DType dtype;
  int64_t E, N, K;
  int64_t stride_e, stride_n, stride_k;
};

// counts[m - 1] = {top-1, top-5} hits of the ensemble over the exits whose bit 1 << e is set in m, m = 1 .. 2^E - 1;
// 1 <= E <= 16. rank = #(score > target's score) + #(equal score and lower class index); a hit when rank < 1 (< 5).
// A NaN score: wrong at every k.
// On CUDA a label out of range is wrong at every k; on the CPU check with find_bad_label() first.
struct SubsetCorrectParams {
  const void* logits;     // dtype (E, N, K), any strides
  const void* weights;    // acc (E)
  const int64_t* target;  // (N), any stride
  int64_t* counts;        // (2^E - 1, 2): the kernels ADD to it; the caller zeroes it
  DType dtype;
  int64_t E, N, K;
  int64_t stride_e, stride_n, stride_k;
  int64_t target_stride;
};
constexpr int64_t kMaxSubsetExits = 16;

enum class GateCriterion : int32_t { confidence = 0, entropy = 1, margin = 2, patience = 3, vote = 4 };
enum class CriterionOn : int32_t { ensemble = 0, exit = 1 };

// One exit's gate over n rows.
//   running' = running + weight * exit_logits (the product rounded, then added; rounded once to running_dtype);
//   ws' = weight_sum + weight (acc).
//   Judged values: running' / (ws' * temperature), or exit_logits / temperature for CriterionOn::exit; statistics as in
//   EnsembleStatsParams. The judged class is the argmax of running' (or of exit_logits) before the division; `argmax`,
//   the answer, is always that of running'.
//   A row leaves when, for confidence and margin, the (float32) statistic >= the (float32) threshold; for entropy, <=;
//   for patience and vote, the count >= the threshold (as double).
//   patience: state = {last judged class or -1, run length}; the same class: run + 1, another: run = 1.
//   vote: state[judged class] += 1; the largest count is compared.
//   A row whose judged values hold a NaN (or whose statistics are NaN) never leaves: no vote, patience {-1, 0}.
//   enabled == false: the state advances, nobody leaves. last: every row leaves, a NaN row too, whatever enabled says.
//   A row that leaves carries R = running' / ws' in `running_out` (of the stored running'; one division in acc, rounded
//   once to running_dtype); a row that stays carries running'.
// Outputs are a stable partition: the rows that stay in order, then those that leave, in order. `features_out` holds
// the rows that stay in front, and zeros behind. Outputs never overlap inputs.
struct GateParams {
  const void* features;     // n dense rows of feature_row_bytes, feature_stride_bytes apart; no dtype needed
  const void* running;      // running_dtype (n, K), class stride 1
  const void* exit_logits;  // dtype (n, K), class stride 1
  const int64_t* indices;   // (n)
  const int64_t* state;     // (n, S); may be null when S == 0
  void* features_out;       // n rows, feature_out_stride_bytes apart
  void* running_out;        // running_dtype (n, K)
  int64_t* indices_out;     // (n)
  int64_t* state_out;       // (n, S)
  float* stats_out;         // (n, 3)
  int64_t* argmax_out;      // (n)
  void* weight_sum_out;     // acc, one value
  int64_t* count_out;       // one value: the number of rows that STAY
  void* scratch;            // gate_scratch_bytes(n) bytes, aligned to 8 (cpu/api.h, cuda/api.h)
  DType dtype;              // of exit_logits; decides acc
  DType running_dtype;      // dtype, or the acc type of dtype
  int64_t n, K, S;          // S: 2 for patience, K for vote, else 0
  int64_t running_stride_n, logits_stride_n;
  int64_t feature_row_bytes, feature_stride_bytes, feature_out_stride_bytes;
  Scalar weight_sum, weight, threshold, temperature;  // acc
  GateCriterion criterion;
  CriterionOn criterion_on;
  bool enabled, last;
};

// The gate for one row, in place, for criteria without a state (confidence, entropy, margin): the same sums, statistics
// decision and R, to the bit. No partition, so nothing else is left of it. CPU only.
struct GateOneParams {
  void* running;            // running_dtype (K), read and written
  const void* exit_logits;  // dtype (K)
  float* stats_out;         // (3)
  bool* leaves_out;         // one value
  DType dtype;              // of exit_logits; decides acc
  DType running_dtype;      // dtype, or the acc type of dtype
  int64_t K;
  double weight_sum, weight, threshold, temperature;  // converted to acc
  GateCriterion criterion;
  CriterionOn criterion_on;
  bool enabled, last;
};

}  // namespace aep::kernels
