// Several threads over one result: the same bits as one thread, however the rows are cut. Meant for the thread
// sanitizer too.
#include <atomic>
#include <functional>
#include <thread>

#include "testing.h"

using namespace testing;

namespace {

void parallel(int64_t count, int64_t grain, const std::function<void(int64_t, int64_t, int)>& f) {
  std::atomic<int64_t> next{0};
  std::vector<std::thread> threads;
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back([&, i] {
      for (int64_t begin; (begin = next.fetch_add(grain)) < count;)
        f(begin, begin + grain < count ? begin + grain : count, i);
    });
  }
  for (std::thread& t : threads) t.join();
}

}  // namespace

int main() {
  const int64_t E = 3, N = 203, K = 37;
  Random random(5);
  Logits x(DType::f32, E, N, K, Logits::dense);
  x.values.fill_normal(random);
  Values w(DType::f32, E);
  w.fill_normal(random);
  std::vector<int64_t> target(N);
  for (int64_t& y : target) y = random.below(K);

  for (int64_t grain : {N, int64_t(13), int64_t(1)}) {
    static std::vector<float> first_out, first_stats, first_loss, first_gw;
    static std::vector<int64_t> first_counts;
    std::vector<float> out(N * K), stats(N * 3), loss(E * N), prefix(E * N), kl(E * N);
    std::vector<float> grad(E * N * K), coefficients(E * N, 1.0f);
    std::vector<int64_t> argmax(N);
    EnsembleStatsParams q{};
    q.ensemble = {x.data(), w.data(), out.data(), DType::f32, E, N, K, x.stride_e, x.stride_n, x.stride_k, K};
    q.normalizer = {nullptr, 1}, q.temperature = {nullptr, 2}, q.stats = stats.data(), q.argmax = argmax.data();
    parallel(N, grain, [&](int64_t b, int64_t e, int) { cpu::ensemble_stats(q, b, e); });

    MultiExitLossParams p{};
    p.logits = x.data(), p.target = target.data(), p.row_losses[0] = loss.data(), p.row_losses[1] = prefix.data();
    p.row_losses[2] = kl.data(), p.dtype = DType::f32, p.temperature = 3, p.prefixes = p.distillation = true;
    p.E = E, p.N = N, p.K = K, p.stride_e = x.stride_e, p.stride_n = x.stride_n, p.stride_k = 1, p.target_stride = 1,
    p.ignore_index = -100;
    parallel(N, grain, [&](int64_t b, int64_t e, int) { cpu::multi_exit_loss(p, b, e); });

    const int64_t chunks = cpu::ensemble_backward_chunks(N);
    std::vector<float> partials(chunks * E), gw(E);
    EnsembleBackwardParams g{};
    g.grad = out.data(), g.logits = x.data(), g.weights = w.data(), g.partials = partials.data(),
    g.grad_weights = gw.data();
    g.dtype = DType::f32, g.E = E, g.N = N, g.K = K, g.grad_stride_n = K, g.grad_stride_k = 1;
    g.stride_e = x.stride_e, g.stride_n = x.stride_n, g.stride_k = 1;
    parallel(chunks, 1, [&](int64_t b, int64_t e, int) { cpu::ensemble_backward_weights(g, b, e); });
    cpu::ensemble_backward_weights_finish(g);

    SubsetCorrectParams s{};
    s.logits = x.data(), s.weights = w.data(), s.target = target.data(), s.dtype = DType::f32, s.E = E, s.N = N,
    s.K = K;
    s.stride_e = x.stride_e, s.stride_n = x.stride_n, s.stride_k = 1, s.target_stride = 1;
    std::vector<std::vector<int64_t>> parts(4, std::vector<int64_t>(14));
    parallel(N, grain,
             [&](int64_t b, int64_t e, int i) { cpu::subset_correct(s, b, e, parts[static_cast<size_t>(i)].data()); });
    std::vector<int64_t> counts(14);
    for (const auto& part : parts) {
      for (size_t i = 0; i < 14; ++i) counts[i] += part[i];
    }
    if (first_out.empty()) {
      first_out = out, first_stats = stats, first_loss = loss, first_gw = gw, first_counts = counts;
    }
    CHECK(out == first_out && stats == first_stats && loss == first_loss && gw == first_gw && counts == first_counts,
          "grain %ld", long(grain));
  }
  return finish("test_threads");
}
