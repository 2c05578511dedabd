// What the kernels of one instruction set share. Included after vec_*.h, inside no namespace of its own.

namespace aep::kernels::cpu::AEP_ISA_NAMESPACE {
namespace {

// The accumulation type of a storage type.
template <class S>
struct Accumulate {
  using type = float;
};
template <>
struct Accumulate<double> {
  using type = double;
};
template <class S>
using Acc = typename Accumulate<S>::type;

template <class A>
constexpr A kInfinity = static_cast<A>(__builtin_inf());
template <class A>
constexpr A kNaN = static_cast<A>(__builtin_nan(""));

template <class T>
inline T smaller(T a, T b) {
  return b < a ? b : a;
}
template <class T>
inline T larger(T a, T b) {
  return a < b ? b : a;
}

inline float value_of(float x) { return x; }
inline double value_of(double x) { return x; }
inline float value_of(BF16 x) { return to_float(x); }
inline float value_of(F16 x) { return to_float(x); }
inline void put(float* p, float x) { *p = x; }
inline void put(double* p, double x) { *p = x; }
inline void put(BF16* p, float x) { *p = to_bf16(x); }
inline void put(F16* p, float x) { *p = to_f16(x); }

// log by the C library: one call a row.
inline float log_of(float x) { return ::logf(x); }
inline double log_of(double x) { return ::log(x); }

template <class A>
inline A read(Scalar s) {
  return s.ptr ? *static_cast<const A*>(s.ptr) : static_cast<A>(s.value);
}

// Calls f(k, Full{}) for whole vectors and f(k, Part{rest}) for what is left.
template <int kLanes, class F>
inline void for_vectors(int64_t count, F&& f) {
  int64_t k = 0;
  for (; k + kLanes <= count; k += kLanes) f(k, Full{});
  if (k < count) f(k, Part{static_cast<int>(count - k)});
}

// Scratch memory of one call. Up to kOwn values lie in the object itself: at batch 1 an allocation shows.
template <class T, int kOwn = 1>
class Scratch {
 public:
  explicit Scratch(int64_t count) : data_(count <= kOwn ? own_ : static_cast<T*>(allocate(count))) {}
  ~Scratch() {
    if (data_ != own_) free_scratch(data_);
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  T* get() const { return data_; }
  T& operator[](int64_t i) const { return data_[i]; }

 private:
  static void* allocate(int64_t count) {
    if (static_cast<uint64_t>(count) > SIZE_MAX / 2 / sizeof(T)) throw_bad_alloc();
    return allocate_scratch(static_cast<size_t>(count) * sizeof(T));
  }
  alignas(64) T own_[kOwn];
  T* data_;
};

// A row with class stride 1: the row itself, or a copy in `copy`.
template <class S>
inline const S* dense_row(const S* row, int64_t stride, int64_t count, S* copy) {
  if (stride == 1 || count <= 1) return row;
  for (int64_t k = 0; k < count; ++k) copy[k] = row[k * stride];
  return copy;
}

// e^x. float: Cephes' polynomial, within 2 ulp; double: Taylor's series of degree 13 on [-ln 2 / 2, ln 2 / 2], within 2
// ulp. e^-inf and everything below the smallest subnormal is exactly 0; NaN stays NaN; overflow gives +inf.
inline Vec<float> exponential(Vec<float> x) {
  using V = Vec<float>;
  x = V::min(V::set(89.0f), V::max(V::set(-105.0f), x));  // this order of operands keeps NaN
  const V n = V::round(V::mul(x, V::set(1.44269504088896341f)));
  V r = V::fma(n, V::set(-0.693359375f), x);
  r = V::fma(n, V::set(2.12194440e-4f), r);
  V y = V::set(1.9875691500e-4f);
  y = V::fma(y, r, V::set(1.3981999507e-3f));
  y = V::fma(y, r, V::set(8.3334519073e-3f));
  y = V::fma(y, r, V::set(4.1665795894e-2f));
  y = V::fma(y, r, V::set(1.6666665459e-1f));
  y = V::fma(y, r, V::set(5.0000001201e-1f));
  y = V::add(V::fma(V::mul(r, r), y, r), V::set(1.0f));
  return V::scale2(y, n);
}

inline Vec<double> exponential(Vec<double> x) {
  using V = Vec<double>;
  x = V::min(V::set(710.0), V::max(V::set(-746.0), x));
  const V n = V::round(V::mul(x, V::set(1.44269504088896340736)));
  V r = V::fma(n, V::set(-6.93147180369123816490e-01), x);  // ln 2 in two parts, the first with trailing zeros
  r = V::fma(n, V::set(-1.90821492927058770002e-10), r);
  V y = V::set(1.0 / 6227020800.0);
  y = V::fma(y, r, V::set(1.0 / 479001600.0));
  y = V::fma(y, r, V::set(1.0 / 39916800.0));
  y = V::fma(y, r, V::set(1.0 / 3628800.0));
  y = V::fma(y, r, V::set(1.0 / 362880.0));
  y = V::fma(y, r, V::set(1.0 / 40320.0));
  y = V::fma(y, r, V::set(1.0 / 5040.0));
  y = V::fma(y, r, V::set(1.0 / 720.0));
  y = V::fma(y, r, V::set(1.0 / 120.0));
  y = V::fma(y, r, V::set(1.0 / 24.0));
  y = V::fma(y, r, V::set(1.0 / 6.0));
  y = V::fma(y, r, V::set(0.5));
  y = V::add(V::fma(V::mul(r, r), y, r), V::set(1.0));
  return V::scale2(y, n);
}

template <class A>
inline A exponential_of(A x) {
  return Vec<A>::lane(exponential(Vec<A>::set(x)), 0);
}

// Calls F<S>(...) for the storage type that `dtype` names.
#define AEP_BY_DTYPE(dtype, F, ...)  \
  switch (dtype) {                   \
    case DType::f32:                 \
      return F<float>(__VA_ARGS__);  \
    case DType::f64:                 \
      return F<double>(__VA_ARGS__); \
    case DType::bf16:                \
      return F<BF16>(__VA_ARGS__);   \
    case DType::f16:                 \
      return F<F16>(__VA_ARGS__);    \
  }

}  // namespace
}  // namespace aep::kernels::cpu::AEP_ISA_NAMESPACE
