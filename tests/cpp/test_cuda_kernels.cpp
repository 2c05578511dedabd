// What only the CUDA kernels promise: labels out of range are no error there, and they are checked on the device.
#include <memory>

#include "testing.h"

using namespace testing;

namespace {

constexpr int64_t kIgnore = -100;

// Rows 1 and 4 have labels out of range, row 2 is ignored: compared with the CPU's kernels, which get valid labels.
void bad_labels(DType d, int64_t K, bool weighted, double smoothing, bool terms) {
  const int64_t E = 2, N = 6;
  const DType acc = acc_of(d);
  Random random(static_cast<uint64_t>(K));
  Logits x(d, E, N, K, Logits::padded);
  x.values.fill_normal(random, 2);
  Values w(acc, K), a(acc, E), grad(d, E * N * K), again(d, E * N * K), other(d, E * N * K), rows(acc, 3 * E * N),
      expected(acc, 3 * E * N), kept(acc, multi_exit_loss_kept(E, N, terms)), loss(acc, 1), exits(acc, 3 * E),
      divisors(acc, 2);
  for (int64_t k = 0; k < K; ++k) w.set(k, 0.3 + random.uniform());
  a.set(0, 0.4), a.set(1, 1.5);
  Guarded target(static_cast<size_t>(N) * 8);
  const int64_t labels[] = {0, K, kIgnore, K - 1, -1, K / 2};
  for (int64_t n = 0; n < N; ++n) target.as<int64_t>()[n] = labels[n];

  MultiExitLossGradParams q{};
  MultiExitLossParams& p = q.loss;
  p.logits = x.data(), p.target = target.as<int64_t>(), p.class_weight = weighted ? w.data() : nullptr;
  for (int i = 0; i < (terms ? 3 : 1); ++i) p.row_losses[i] = rows.at(i * E * N), q.coefficients[i] = {a.data()};
  for (auto& c : q.coefficients) c.factor = 1;
  p.kept = kept.data(), p.dtype = d, p.E = E, p.N = N, p.K = K, p.temperature = 2;
  p.prefixes = p.distillation = terms;
  p.stride_e = x.stride_e, p.stride_n = x.stride_n, p.stride_k = x.stride_k, p.target_stride = 1;
  p.ignore_index = kIgnore, p.label_smoothing = smoothing;
  q.grad_logits = grad.data(), q.out_stride_e = N * K, q.out_stride_n = K, q.out_stride_k = 1;
  backend::check(cuda::launch_multi_exit_loss_grad(q, nullptr), "multi_exit_loss_grad");

  MultiExitLossGradParams b = q;
  for (void*& losses : b.loss.row_losses) losses = nullptr;
  b.grad_logits = again.data();
  backend::check(cuda::launch_multi_exit_loss_grad(b, nullptr), "multi_exit_loss_grad");

  MultiExitLossReduceParams r{};
  for (int i = 0; i < 3; ++i) r.row_losses[i] = p.row_losses[i], r.weights[i] = a.data(), r.losses[i] = exits.at(i * E);
  r.target = p.target, r.class_weight = p.class_weight;
  r.loss = loss.data(), r.divisors = divisors.data(), r.dtype = d;
  r.reduction = Reduction::mean, r.E = E, r.N = N, r.K = K, r.target_stride = 1, r.ignore_index = kIgnore;
  backend::multi_exit_loss_reduce(r);
  CHECK(isnan(loss.get(0)) && isnan(exits.get(0)));

  target.as<int64_t>()[1] = target.as<int64_t>()[4] = 0;
  for (int i = 0; i < (terms ? 3 : 1); ++i) p.row_losses[i] = expected.at(i * E * N);
  q.grad_logits = other.data();
  cpu::kScalarTable.multi_exit_loss_grad(q, 0, N);
  for (int64_t i = 0; i < (terms ? 3 : 1) * E * N; ++i) {
    const bool bad = i % N == 1 || i % N == 4;
    CHECK(bad ? isnan(rows.get(i)) : near(rows.get(i), expected.get(i), 1e-5), "%s K %ld row %ld: %g, want %g",
          name_of(d), long(K), long(i), rows.get(i), expected.get(i));
  }
  for (int64_t i = 0; i < E * N; ++i) {
    const int64_t n = i % N;
    const bool zero = n == 1 || n == 4 || n == 2;
    for (int64_t k = 0; k < K; ++k) {
      const double want = zero ? 0 : other.get(i * K + k), close = zero ? 0 : 2e-5 + 2 * epsilon(d);
      CHECK(near(grad.get(i * K + k), want, close), "%s K %ld row %ld", name_of(d), long(K), long(i));
      CHECK(near(again.get(i * K + k), want, close), "%s K %ld row %ld", name_of(d), long(K), long(i));
    }
  }
}

void subsets_with_bad_labels() {
  const int64_t E = 3, N = 4, K = 5;
  Logits x(DType::f32, E, N, K, Logits::dense);
  for (int64_t i = 0; i < E * N * K; ++i) x.values.set(i, static_cast<double>(i % K));  // class 4 is the largest
  Values w(DType::f32, E);
  for (int64_t e = 0; e < E; ++e) w.set(e, 1);
  Guarded target(static_cast<size_t>(N) * 8), counts(7 * 16);
  const int64_t labels[] = {4, 5, -1, INT64_MAX};
  for (int64_t n = 0; n < N; ++n) target.as<int64_t>()[n] = labels[n];
  memset(counts.data(), 0, counts.size());
  SubsetCorrectParams p{};
  p.logits = x.data(), p.weights = w.data(), p.target = target.as<int64_t>(), p.counts = counts.as<int64_t>();
  p.dtype = DType::f32, p.E = E, p.N = N, p.K = K, p.stride_e = N * K, p.stride_n = K, p.stride_k = 1;
  p.target_stride = 1;
  backend::check(cuda::launch_subset_correct(p, nullptr), "subset_correct");
  for (int i = 0; i < 14; ++i) CHECK(counts.as<int64_t>()[i] == 1);
  p.E = kMaxSubsetExits + 1;
  CHECK(cuda::launch_subset_correct(p, nullptr) == cudaErrorInvalidValue);
}

// Many maps of all layouts at once, as each alone; where a map begins changes no bit.
void many_pools(DType d) {
  struct Map {
    int64_t N, C, H, W;
    bool channels_last;
  };
  constexpr Map kinds[] = {{2, 8, 4, 4, false}, {2, 8, 4, 4, true},  {3, 5, 7, 7, false}, {1, 64, 1, 1, false},
                           {0, 4, 2, 2, false}, {3, 5, 7, 7, true}, {70, 64, 2, 3, true}};
  Random random(5);
  constexpr int kMaps = 21;
  std::vector<GlobalAvgPoolParams> pools, moved;
  std::vector<std::unique_ptr<Values>> memory;
  std::vector<Values*> results, again;
  const auto fresh = [&](int64_t count) { return memory.emplace_back(new Values(d, count)).get(); };
  for (int i = 0; i < kMaps; ++i) {
    const Map& m = kinds[i % 7];
    const int64_t size = m.N * m.C * m.H * m.W, unit = 16;
    GlobalAvgPoolParams p{};
    p.dtype = d, p.N = m.N, p.C = m.C, p.H = m.H, p.W = m.W, p.stride_n = m.C * m.H * m.W;
    p.stride_c = m.channels_last ? 1 : m.H * m.W, p.stride_w = m.channels_last ? m.C : 1, p.stride_h = m.W * p.stride_w;
    p.out_stride_n = m.C, p.out_stride_c = 1;
    for (int64_t shift : {0, 1}) {  // from the end, which is a multiple of a page
      const int64_t gap = (unit - size % unit) % unit + (shift ? unit - shift : 0);
      Values* x = fresh(size + gap);
      for (int64_t k = 0; k < size; ++k) x->set(k, shift ? memory[memory.size() - 3]->get(k) : random.normal());
      p.input = x->data();
      Values* y = fresh(m.N * m.C);
      p.output = y->data();
      (shift ? moved : pools).push_back(p);
      (shift ? again : results).push_back(y);
    }
  }
  const int64_t launches = emulated::launches();
  backend::check(cuda::launch_global_avg_pools(pools.data(), kMaps, nullptr), "global_avg_pools");
  CHECK(emulated::launches() - launches == 2);  // 18 that are not empty
  for (const GlobalAvgPoolParams& p : moved) backend::check(cuda::launch_global_avg_pool(p, nullptr), "moved pool");
  for (size_t i = 0; i < kMaps; ++i) {
    const GlobalAvgPoolParams& p = pools[i];
    Values want(d, p.N * p.C);
    GlobalAvgPoolParams q = p;
    q.output = want.data();
    cpu::kScalarTable.global_avg_pool(q, 0, p.N * p.C);
    for (int64_t k = 0; k < p.N * p.C; ++k) {
      CHECK(near(results[i]->get(k), want.get(k), 1e-6 + 2 * epsilon(d)), "%s map %zu: %g, want %g", name_of(d), i,
            results[i]->get(k), want.get(k));
      CHECK(same(results[i]->get(k), again[i]->get(k)), "%s map %zu, moved", name_of(d), i);
    }
  }
  CHECK(cuda::launch_global_avg_pools(nullptr, 0, nullptr) == cudaSuccess);
}

// Layers of several exits at once. A row's values are the same bits whatever layers and rows are beside it and wherever
// the matrices begin, though the kernel holds one, four or eight rows.
void many_linears(DType d) {
  struct Shape {
    int64_t C, K, gap;
    bool bias;
  };
  constexpr Shape kShapes[] = {{16, 1001, 0, true}, {67, 3, 0, true}, {1, 1, 0, false}, {24, 1003, 8, false},
                               {7, 2, 1, true},     {320, 5, 0, false}, {32, 4, 1, true}};
  constexpr int64_t kRows = 8;
  Random random(11);
  std::vector<std::unique_ptr<Values>> memory;
  // It ends where a page does, and begins at a multiple of 16 bytes or, `shift`, a value behind one.
  const auto matrix = [&](int64_t count, bool shift) {
    const int64_t unit = 16;
    return memory.emplace_back(new Values(d, count + (unit - count % unit) % unit + (shift ? unit - 1 : 0))).get();
  };
  std::vector<SmallLinearParams> layers, moved;
  for (const Shape& shape : kShapes) {
    const int64_t stride = shape.C + shape.gap;
    Values *bias = matrix(shape.K, false), *x[2], *weight[2];
    bias->fill_normal(random);
    for (int shift : {0, 1}) {
      x[shift] = matrix(kRows * shape.C, shift), weight[shift] = matrix(shape.K * stride, shift);
      for (int64_t i = 0; i < kRows * shape.C; ++i) x[shift]->set(i, shift ? x[0]->get(i) : random.normal());
      for (int64_t i = 0; i < shape.K * stride; ++i) weight[shift]->set(i, shift ? weight[0]->get(i) : random.normal());
      SmallLinearParams p{};
      p.input = x[shift]->data(), p.weight = weight[shift]->data(), p.bias = shape.bias ? bias->data() : nullptr;
      p.dtype = d, p.N = kRows, p.C = shape.C, p.K = shape.K;
      p.stride_n = shape.C, p.weight_stride_k = stride, p.bias_stride = 1, p.out_stride_n = shape.K;
      (shift ? moved : layers).push_back(p);
    }
  }
  const auto run = [&](std::vector<SmallLinearParams> list, int64_t rows, bool together) {
    std::vector<Values*> results;
    for (SmallLinearParams& p : list) {
      results.push_back(memory.emplace_back(new Values(d, rows * p.K)).get());
      p.N = rows, p.output = results.back()->data();
    }
    const int64_t launches = emulated::launches();
    for (size_t i = 0; i < (together ? 1 : list.size()); ++i) {
      backend::check(cuda::launch_small_linears(&list[i], together ? static_cast<int64_t>(list.size()) : 1, nullptr),
                     "small_linears");
    }
    CHECK(!together || emulated::launches() - launches == (rows > 0));
    return results;
  };
  const std::vector<Values*> all = run(layers, kRows, true);
  for (size_t i = 0; i < layers.size(); ++i) {
    const SmallLinearParams& p = layers[i];
    for (int64_t n = 0; n < kRows; ++n) {
      for (int64_t k = 0; k < p.K; ++k) {
        double want = p.bias ? load_value(d, p.bias, k) : 0, size = fabs(want);
        for (int64_t c = 0; c < p.C; ++c) {
          const double term = load_value(d, p.input, n * p.C + c) * load_value(d, p.weight, k * p.weight_stride_k + c);
          want += term, size += fabs(term);
        }
        const double got = all[i]->get(n * p.K + k), tolerance = d == DType::f64 ? 1e-14 : 1e-6;
        CHECK(fabs(got - want) <= epsilon(d) * fabs(want) + tolerance * size, "%s layer %zu (%ld, %ld): %g, want %g",
              name_of(d), i, long(n), long(k), got, want);
      }
    }
  }
  const auto as_all = [&](const std::vector<Values*>& results, const char* what) {
    for (size_t i = 0; i < layers.size(); ++i) {
      for (int64_t k = 0; k < results[i]->size(); ++k)
        CHECK(same(results[i]->get(k), all[i]->get(k)), "%s layer %zu, %s", name_of(d), i, what);
    }
  };
  as_all(run(moved, 5, true), "moved, five rows");
  as_all(run(layers, 3, true), "three rows");
  as_all(run(layers, 1, false), "one row, one by one");
  run(layers, 0, true);
  CHECK(cuda::launch_small_linears(nullptr, 0, nullptr) == cudaSuccess);
}

// More layers than one launch takes; what is empty is left out.
void more_linears_than_a_launch_takes() {
  constexpr int64_t kLayers = 2 * cuda::kSmallLinearsPerLaunch + 1;
  Values x(DType::f32, 2), y(DType::f32, kLayers);
  x.set(0, 3), x.set(1, 5);
  std::vector<SmallLinearParams> layers;
  for (int64_t i = 0; i < kLayers; ++i) {
    SmallLinearParams p{};
    p.input = x.data(), p.weight = static_cast<float*>(x.data()) + 1, p.output = static_cast<float*>(y.data()) + i;
    p.dtype = DType::f32, p.N = i % 4 != 1, p.C = p.K = 1, p.stride_n = p.weight_stride_k = p.out_stride_n = 1;
    layers.push_back(p);
  }
  const int64_t launches = emulated::launches();
  backend::check(cuda::launch_small_linears(layers.data(), kLayers, nullptr), "small_linears");
  CHECK(emulated::launches() - launches == 2);
  for (int64_t i = 0; i < kLayers; ++i) CHECK(i % 4 == 1 ? isnan(y.get(i)) : y.get(i) == 15);
  layers[1].dtype = DType::f64;
  CHECK(cuda::launch_small_linears(layers.data(), kLayers, nullptr) == cudaErrorInvalidValue);
}

// Maps whose images begin anywhere, enough of them that a warp takes several, tiles of few and of many channels, and
// channels whose rows of positions have gaps.
void pools_of_all_shapes(DType d) {
  enum Layout { images, channels, gaps };
  struct Map {
    int64_t N, C, H, W;
    Layout layout;
  };
  constexpr Map kinds[] = {{2, 5, 14, 14, images},   {3, 300, 7, 7, images},  {1, 3, 61, 53, images},
                           {20, 128, 3, 3, images},  {3, 5, 1, 3, images},    {5, 8, 14, 14, channels},
                           {2, 24, 9, 9, channels},  {1, 200, 5, 5, channels}, {90, 16, 2, 2, channels},
                           {1, 512, 13, 1, channels}, {2, 24, 5, 6, gaps},     {1, 3, 7, 5, gaps}};
  for (const Map& m : kinds) {
    GlobalAvgPoolParams p{};
    p.dtype = d, p.N = m.N, p.C = m.C, p.H = m.H, p.W = m.W, p.out_stride_n = m.C + 3, p.out_stride_c = 1;
    const int64_t row = m.W + (m.layout == gaps ? 1 : 0), size = m.N * m.C * m.H * row, unit = 16;
    p.stride_n = m.C * m.H * row, p.stride_c = m.layout == images ? m.H * m.W : 1;
    p.stride_w = m.layout == images ? 1 : m.C, p.stride_h = row * p.stride_w;
    Values values(d, size + 2 * unit), results[] = {{d, m.N * (m.C + 3)}, {d, m.N * (m.C + 3)}};
    Values want(d, m.N * (m.C + 3));
    for (int64_t shift : {0, 1}) {  // from a multiple of 16 bytes, since the memory ends at one
      const int64_t begin = unit - size % unit + shift;
      Random random(3);
      for (int64_t k = 0; k < size; ++k) values.set(begin + k, random.normal());
      p.input = static_cast<char*>(values.data()) + static_cast<size_t>(begin) * size_of(d);
      p.output = results[shift].data();
      backend::check(cuda::launch_global_avg_pool(p, nullptr), "global_avg_pool");
      p.output = want.data();
      cpu::kScalarTable.global_avg_pool(p, 0, p.N * p.C);
      for (int64_t n = 0; n < m.N; ++n) {
        for (int64_t c = 0; c < m.C; ++c) {
          const int64_t at = n * (m.C + 3) + c;
          CHECK(near(results[shift].get(at), want.get(at), 1e-6 + 2 * epsilon(d)),
                "%s (%ld, %ld, %ld, %ld): %g, want %g", name_of(d), long(m.N), long(m.C), long(m.H), long(m.W),
                results[shift].get(at), want.get(at));
          if (shift) CHECK(same(results[0].get(at), results[1].get(at)), "%s, moved", name_of(d));
        }
      }
    }
  }
}

// Rows that begin anywhere between multiples of 16 bytes, ties and NaN at their edges, more exits than are read at
// once; where the tensors begin changes no bit.
void rows_that_begin_anywhere(DType d, int64_t E, int64_t N, int64_t K) {
  const int64_t size = E * N * K, unit = 16;
  Values x(d, size + 2 * unit), w(acc_of(d), E), out(d, N * K + 2 * unit), want(d, N * K);
  for (int64_t e = 0; e < E; ++e) w.set(e, 0.25 * static_cast<double>(e + 1));
  const auto rows = static_cast<size_t>(N);
  Guarded stats(rows * 12), first(rows * 12), expected(rows * 12);
  Guarded argmax(rows * 8), best(rows * 8);
  EnsembleStatsParams q{};
  EnsembleParams& p = q.ensemble;
  p.weights = w.data(), p.dtype = d, p.E = E, p.N = N, p.K = K, p.stride_e = N * K, p.stride_n = K, p.stride_k = 1;
  p.out_stride_n = K, q.normalizer = {nullptr, 1.5}, q.temperature = {nullptr, 0.75};
  for (int64_t shift : {0, 1}) {
    const int64_t begin = unit - size % unit + shift, out_begin = unit - N * K % unit + shift;
    Random random(7);
    for (int64_t k = 0; k < size; ++k) x.set(begin + k, random.normal());
    for (int64_t e = 0; e < E; ++e) {
      const auto set = [&](int64_t n, int64_t k, double v) { x.set(begin + (e * N + n) * K + k, v); };
      for (int64_t n = 1; n < 6; ++n) set(n, K - 1, 9), set(n, K / 2, n < 3 ? 9 : 0), set(n, 0, n == 5 ? 9 : 0);
      set(6, K - 1, NAN), set(6, K / 3, NAN), set(7, 0, -INFINITY);
    }
    p.logits = static_cast<char*>(x.data()) + static_cast<size_t>(begin) * size_of(d);
    p.output = static_cast<char*>(out.data()) + static_cast<size_t>(out_begin) * size_of(d);
    q.stats = stats.as<float>(), q.argmax = argmax.as<int64_t>();
    backend::check(cuda::launch_ensemble_stats(q, nullptr), "ensemble_stats");
    p.output = want.data(), q.stats = expected.as<float>(), q.argmax = best.as<int64_t>();
    cpu::kScalarTable.ensemble_stats(q, 0, N);
    for (int64_t i = 0; i < N * K; ++i) CHECK(same(out.get(out_begin + i), want.get(i)), "%s %ld", name_of(d), long(i));
    for (int64_t i = 0; i < N * 3; ++i) {
      const double got = static_cast<double>(stats.as<float>()[i]);
      CHECK(near(got, static_cast<double>(expected.as<float>()[i]), 3e-6), "%s K %ld: %g", name_of(d), long(K), got);
      CHECK(argmax.as<int64_t>()[i / 3] == best.as<int64_t>()[i / 3], "%s K %ld", name_of(d), long(K));
    }
    if (shift == 0) memcpy(first.data(), stats.data(), stats.size());
    else CHECK(memcmp(first.data(), stats.data(), stats.size()) == 0, "%s K %ld, moved", name_of(d), long(K));
  }
}

}  // namespace

int main() {
  more_linears_than_a_launch_takes();
  for (DType d : kAllTypes) {
    for (int64_t K : {1, 2, 33, 257}) {
      bad_labels(d, K, false, 0, false);
      bad_labels(d, K, true, 0.1, false);
      bad_labels(d, K, true, 0.1, true);
    }
    many_pools(d);
    many_linears(d);
    pools_of_all_shapes(d);
    for (int64_t K : {17, 36, 257}) rows_that_begin_anywhere(d, 3, 16, K);
    rows_that_begin_anywhere(d, 5, 8, 2300);
  }
  subsets_with_bad_labels();
  return finish("test_cuda_kernels");
}
