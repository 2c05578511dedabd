// Global average pooling. Every (n, c) is summed in an order that depends on the shape and the layout only.

namespace aep::kernels::cpu::AEP_ISA_NAMESPACE {
namespace {

// Spatial positions contiguous: one horizontal sum per channel.
template <class S>
Acc<S> sum_contiguous(const S* x, int64_t count) {
  using V = Vec<Acc<S>>;
  V s[4] = {V::set(0), V::set(0), V::set(0), V::set(0)};
  int64_t i = 0;
  for (; i + 4 * V::n <= count; i += 4 * V::n) {
    for (int u = 0; u < 4; ++u) s[u] = V::add(s[u], load(x + i + u * V::n, Full{}, Acc<S>(0)));
  }
  for_vectors<V::n>(count - i, [&](int64_t j, auto part) { s[0] = V::add(s[0], load(x + i + j, part, Acc<S>(0))); });
  return V::sum(V::add(V::add(s[0], s[1]), V::add(s[2], s[3])));
}

// Any strides: a sum per image row, then the sum of those.
template <class S>
Acc<S> sum_strided(const S* x, const GlobalAvgPoolParams& p) {
  Acc<S> total = 0;
  for (int64_t h = 0; h < p.H; ++h) {
    Acc<S> line = 0;
    for (int64_t w = 0; w < p.W; ++w) line += value_of(x[h * p.stride_h + w * p.stride_w]);
    total += line;
  }
  return total;
}

// Channels contiguous: kVectors vectors of channels go down the image together. A sum per image row keeps the rounding
// error small.
template <int kVectors, class S, class P>
void pool_channels(const S* x, S* out, const GlobalAvgPoolParams& p, P part) {
  using A = Acc<S>;
  using V = Vec<A>;
  V total[kVectors];
  for (int u = 0; u < kVectors; ++u) total[u] = V::set(0);
  for (int64_t h = 0; h < p.H; ++h) {
    V line[kVectors];
    for (int u = 0; u < kVectors; ++u) line[u] = V::set(0);
    const S* position = x + h * p.stride_h;
    for (int64_t w = 0; w < p.W; ++w, position += p.stride_w) {
      for (int u = 0; u < kVectors; ++u) line[u] = V::add(line[u], load(position + u * V::n, part, A(0)));
    }
    for (int u = 0; u < kVectors; ++u) total[u] = V::add(total[u], line[u]);
  }
  const V count = V::set(static_cast<A>(p.H * p.W));
  for (int u = 0; u < kVectors; ++u) store(out + u * V::n, V::div(total[u], count), part);
}

template <class S>
void global_avg_pool_as(const GlobalAvgPoolParams& p, int64_t begin, int64_t end) {
  using V = Vec<Acc<S>>;
  const S* input = static_cast<const S*>(p.input);
  S* output = static_cast<S*>(p.output);
  const int64_t spatial = p.H * p.W;
  // Positions one element apart; the stride of a dimension of size 1 does not count.
  const bool contiguous = (p.W == 1 || p.stride_w == 1) && (p.H == 1 || p.stride_h == p.W);
  const bool channels = !contiguous && p.stride_c == 1 && p.out_stride_c == 1;
  for (int64_t item = begin; item < end;) {
    const int64_t n = item / p.C, first = item % p.C, last = smaller(p.C, first + (end - item));
    const S* image = input + n * p.stride_n;
    S* row = output + n * p.out_stride_n;
    int64_t c = first;
    if (channels) {
      for (; c + 4 * V::n <= last; c += 4 * V::n) pool_channels<4>(image + c, row + c, p, Full{});
      for (; c + V::n <= last; c += V::n) pool_channels<1>(image + c, row + c, p, Full{});
      if (c < last) pool_channels<1>(image + c, row + c, p, Part{static_cast<int>(last - c)});
    } else {
      for (; c < last; ++c) {
        const S* x = image + c * p.stride_c;
        const Acc<S> sum = contiguous ? sum_contiguous(x, spatial) : sum_strided(x, p);
        put(row + c * p.out_stride_c, sum / static_cast<Acc<S>>(spatial));
      }
    }
    item += last - first;
  }
}

void global_avg_pool(const GlobalAvgPoolParams& p, int64_t begin, int64_t end) {
  AEP_BY_DTYPE(p.dtype, global_avg_pool_as, p, begin, end)
}

}  // namespace
}  // namespace aep::kernels::cpu::AEP_ISA_NAMESPACE
