// Global average pooling. Every (n, c) is summed in an order that depends on the shape and the layout only.

namespace aep::kernels::cpu::AEP_ISA_NAMESPACE {
namespace {

// Spatial positions contiguous: the image's sum, still spread over the lanes.
template <class S>
inline Vec<Acc<S>> lanes_of_sum(const S* x, int64_t count) {
  using V = Vec<Acc<S>>;
  V s[4] = {V::set(0), V::set(0), V::set(0), V::set(0)};
  int64_t i = 0;
  for (; i + 4 * V::n <= count; i += 4 * V::n) {
    for (int u = 0; u < 4; ++u) s[u] = V::add(s[u], load(x + i + u * V::n, Full{}, Acc<S>(0)));
  }
  for_vectors<V::n>(count - i, [&](int64_t j, auto part) { s[0] = V::add(s[0], load(x + i + j, part, Acc<S>(0))); });
  return V::add(V::add(s[0], s[1]), V::add(s[2], s[3]));
}

// The same for the first `here` channels, the rest zero; maps of at most one vector without the loop.
template <class S>
inline void lanes_of_sums(const S* x, int64_t stride_c, int64_t count, int here, Vec<Acc<S>> (&lanes)[Vec<Acc<S>>::n]) {
  using V = Vec<Acc<S>>;
  const auto fill = [&](auto sum_at) {
    if (here == V::n) {
      for (int i = 0; i < V::n; ++i) lanes[i] = sum_at(x + i * stride_c);
    } else {
      for (int i = 0; i < V::n; ++i) lanes[i] = i < here ? sum_at(x + i * stride_c) : V::set(0);
    }
  };
  if (count == V::n) {
    fill([](const S* map) { return load(map, Full{}, Acc<S>(0)); });
  } else if (count < V::n) {
    const Part part{static_cast<int>(count)};
    fill([part](const S* map) { return load(map, part, Acc<S>(0)); });
  } else {
    fill([count](const S* map) { return lanes_of_sum(map, count); });
  }
}

// As many channels at a time as a vector has lanes: small images are bound by the sums across lanes, which channels
// then share.
template <class S>
void pool_images(const S* image, S* out, const GlobalAvgPoolParams& p, int64_t first, int64_t last) {
  using A = Acc<S>;
  using V = Vec<A>;
  const int64_t spatial = p.H * p.W;
  const V count = V::set(static_cast<A>(spatial));
  for (int64_t c = first; c < last; c += V::n) {
    const int here = static_cast<int>(smaller<int64_t>(V::n, last - c));
    V lanes[V::n];
    lanes_of_sums(image + c * p.stride_c, p.stride_c, spatial, here, lanes);
    const V mean = V::div(V::sums(lanes), count);
    if (p.out_stride_c != 1) {
      for (int i = 0; i < here; ++i) put(out + (c + i) * p.out_stride_c, V::lane(mean, i));
    } else if (here == V::n) {
      store(out + c, mean, Full{});
    } else {
      store(out + c, mean, Part{here});
    }
  }
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

// Channels contiguous: the image is read in the order of its memory, kTogether positions at a time, into sums that stay
// in the first-level cache. Groups of positions also keep the rounding error small.
constexpr int64_t kTogether = 8, kChannelBlock = 2048;

template <class S>
void add_positions(const S* x, int64_t stride, int64_t positions, int64_t channels, Acc<S>* sums) {
  using A = Acc<S>;
  using V = Vec<A>;
  int64_t i = 0;
  for (; i + kTogether <= positions; i += kTogether, x += kTogether * stride) {
    for_vectors<V::n>(channels, [&](int64_t c, auto part) {
      V v[kTogether];
      for (int u = 0; u < kTogether; ++u) v[u] = load(x + u * stride + c, part, A(0));
      const V low = V::add(V::add(v[0], v[1]), V::add(v[2], v[3]));
      const V high = V::add(V::add(v[4], v[5]), V::add(v[6], v[7]));
      store(sums + c, V::add(load(sums + c, part, A(0)), V::add(low, high)), part);
    });
  }
  for (; i < positions; ++i, x += stride) {
    for_vectors<V::n>(channels, [&](int64_t c, auto part) {
      store(sums + c, V::add(load(sums + c, part, A(0)), load(x + c, part, A(0))), part);
    });
  }
}

template <class S>
void pool_channels(const S* image, S* out, const GlobalAvgPoolParams& p, int64_t first, int64_t last) {
  using A = Acc<S>;
  using V = Vec<A>;
  alignas(64) A sums[kChannelBlock];
  const V count = V::set(static_cast<A>(p.H * p.W));
  const bool rows_follow = p.H == 1 || p.stride_h == p.W * p.stride_w;
  for (int64_t c = first; c < last; c += kChannelBlock) {
    const int64_t here = smaller(kChannelBlock, last - c);
    for (int64_t i = 0; i < here; ++i) sums[i] = 0;
    if (rows_follow) {
      add_positions(image + c, p.stride_w, p.H * p.W, here, sums);
    } else {
      for (int64_t h = 0; h < p.H; ++h) add_positions(image + c + h * p.stride_h, p.stride_w, p.W, here, sums);
    }
    for_vectors<V::n>(
        here, [&](int64_t i, auto part) { store(out + c + i, V::div(load(sums + i, part, A(0)), count), part); });
  }
}

template <class S>
void global_avg_pool_as(const GlobalAvgPoolParams& p, int64_t begin, int64_t end) {
  // Positions one element apart; the stride of a dimension of size 1 does not count.
  const bool contiguous = (p.W == 1 || p.stride_w == 1) && (p.H == 1 || p.stride_h == p.W);
  const bool channels = p.stride_c == 1 && p.out_stride_c == 1 && (!contiguous || p.H * p.W == 1);
  for (int64_t item = begin; item < end;) {
    const int64_t n = item / p.C, first = item % p.C, last = smaller(p.C, first + (end - item));
    const S* image = static_cast<const S*>(p.input) + n * p.stride_n;
    S* row = static_cast<S*>(p.output) + n * p.out_stride_n;
    if (channels) {
      pool_channels(image, row, p, first, last);
    } else if (contiguous) {
      pool_images(image, row, p, first, last);
    } else {
      for (int64_t c = first; c < last; ++c) {
        put(row + c * p.out_stride_c, sum_strided(image + c * p.stride_c, p) / static_cast<Acc<S>>(p.H * p.W));
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
