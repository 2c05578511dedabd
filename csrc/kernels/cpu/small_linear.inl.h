// A linear layer of a few rows. Large products are ATen's; here the matrix is read once and the call to a BLAS would
// cost more than the work. A sum's order depends on C only.

namespace aep::kernels::cpu::AEP_ISA_NAMESPACE {
namespace {

// kRows rows of the weight against one input row: kRows * 2 independent chains hide the latency of the addition.
template <int kRows, class S>
inline void dots(const S* x, const S* weight, int64_t stride_k, int64_t C, Acc<S>* out) {
  using A = Acc<S>;
  using V = Vec<A>;
  V sum[kRows][2];
  for (int r = 0; r < kRows; ++r) sum[r][0] = sum[r][1] = V::set(0);
  int64_t c = 0;
  for (; c + 2 * V::n <= C; c += 2 * V::n) {
    const V x0 = load(x + c, Full{}, A(0)), x1 = load(x + c + V::n, Full{}, A(0));
    for (int r = 0; r < kRows; ++r) {
      sum[r][0] = V::fma(x0, load(weight + r * stride_k + c, Full{}, A(0)), sum[r][0]);
      sum[r][1] = V::fma(x1, load(weight + r * stride_k + c + V::n, Full{}, A(0)), sum[r][1]);
    }
  }
  for_vectors<V::n>(C - c, [&](int64_t i, auto part) {
    const V x0 = load(x + c + i, part, A(0));
    for (int r = 0; r < kRows; ++r)
      sum[r][0] = V::fma(x0, load(weight + r * stride_k + c + i, part, A(0)), sum[r][0]);
  });
  for (int r = 0; r < kRows; ++r) out[r] = V::sum(V::add(sum[r][0], sum[r][1]));
}

template <class S>
void small_linear_as(const SmallLinearParams& p, int64_t begin, int64_t end) {
  using A = Acc<S>;
  const S* weight = static_cast<const S*>(p.weight);
  const S* bias = static_cast<const S*>(p.bias);
  const auto finish = [&](A sum, int64_t k, S* out) {
    put(out + k, bias ? sum + value_of(bias[k * p.bias_stride]) : sum);
  };
  for (int64_t n = begin; n < end; ++n) {
    const S* x = static_cast<const S*>(p.input) + n * p.stride_n;
    S* out = static_cast<S*>(p.output) + n * p.out_stride_n;
    A sum[4];
    int64_t k = 0;
    for (; k + 4 <= p.K; k += 4) {
      dots<4>(x, weight + k * p.weight_stride_k, p.weight_stride_k, p.C, sum);
      for (int i = 0; i < 4; ++i) finish(sum[i], k + i, out);
    }
    for (; k < p.K; ++k) {
      dots<1>(x, weight + k * p.weight_stride_k, p.weight_stride_k, p.C, sum);
      finish(sum[0], k, out);
    }
  }
}

void small_linear(const SmallLinearParams& p, int64_t begin, int64_t end) {
  AEP_BY_DTYPE(p.dtype, small_linear_as, p, begin, end)
}

}  // namespace
}  // namespace aep::kernels::cpu::AEP_ISA_NAMESPACE
