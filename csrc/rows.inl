// The row kernels, for vectors of RGPB_BYTES bytes in the namespace RGPB_ISA: included once for each instruction set.
//
// Forward, per row with target y:
//   z <- cap tanh(scale (z + b) / cap)        lse_other = log sum_{k != y} exp(z_k)
//   H_o = lse_other - sum_{k != y} q_k z_k,   q_k = exp(z_k - lse_other)
// Vector-Jacobian product, for upstream gradients g_zy, g_lo, g_ho of (z_y, lse_other, H_o):
//   dL/dz_y = g_zy        dL/dz_k = q_k (g_lo - g_ho (H_o + log q_k)), k != y;        times J_k = dz_k / d(W x)_k
//
// A row is swept for its maximum and again for its sums; between the two it stays in the core's own cache (128k float32
// logits are half a megabyte). The target is left out by sweeping what lies left and right of it. Sums run in lanes
// over BLOCK columns at most and in double over blocks, so that their rounding doesn't grow with V.
// Narrow results go over the bytes of logits that are read by then: column k of 2 bytes ends before column k of 4.
//
// Dimensions: V vocabulary (or a slice of it), L lanes of a vector.

#include <stddef.h>
#include <stdint.h>

#include "rows.h"

namespace rgpb {
namespace RGPB_ISA {
namespace {

#define INLINE static inline __attribute__((always_inline))
#define INLINED __attribute__((always_inline))
#define ONCE static __attribute__((noinline))  // for what is rare: it would multiply the code

constexpr int64_t BLOCK = 1024;

// A product that is rounded before it goes on: what it is compared with was rounded, too. Fused into a difference, a
// largest logit of 1e9 would lie dozens above or below itself.
#if defined(__AVX512F__)
#define ROUNDED(v) asm("" : "+v"(v))
#elif defined(__SSE2__)
#define ROUNDED(v) asm("" : "+x"(v))
#elif defined(__aarch64__)
#define ROUNDED(v) asm("" : "+w"(v))
#else
#define ROUNDED(v) asm("" : "+m"(v))
#endif

// -- vectors ----------------------------------------------------------------------------------------------------------

struct bf16 {
  uint16_t bits;
};

template <class T>
struct Lanes;
template <>
struct Lanes<float> {
  typedef float V __attribute__((vector_size(RGPB_BYTES)));
  typedef int32_t I __attribute__((vector_size(RGPB_BYTES)));
  typedef uint16_t H __attribute__((vector_size(RGPB_BYTES / 2)));
};
template <>
struct Lanes<double> {
  typedef double V __attribute__((vector_size(RGPB_BYTES)));
  typedef int64_t I __attribute__((vector_size(RGPB_BYTES)));
};

template <class T>
using Vec = typename Lanes<T>::V;
template <class T>
constexpr int64_t L = RGPB_BYTES / static_cast<int64_t>(sizeof(T));

// The accumulators' type of a stored one.
template <class S>
struct Acc {
  typedef S T;
};
template <>
struct Acc<bf16> {
  typedef float T;
};

template <class T>
INLINE Vec<T> all(T x) {
  return Vec<T>{} + x;
}

INLINE Vec<float> load(const float* p) {
  Vec<float> v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
INLINE Vec<double> load(const double* p) {
  Vec<double> v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
INLINE Vec<float> load(const bf16* p) {
  Lanes<float>::H half;
  __builtin_memcpy(&half, p, sizeof half);
  auto wide = __builtin_convertvector(half, Lanes<float>::I) << 16;
  Vec<float> v;
  __builtin_memcpy(&v, &wide, sizeof v);
  return v;
}

INLINE void store(float* p, Vec<float> v) { __builtin_memcpy(p, &v, sizeof v); }
INLINE void store(double* p, Vec<double> v) { __builtin_memcpy(p, &v, sizeof v); }
INLINE void store(bf16* p, Vec<float> v) {
  Lanes<float>::I bits;
  __builtin_memcpy(&bits, &v, sizeof bits);
  auto rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest even
  rounded = v == v ? rounded : 0x7fc0 + Lanes<float>::I{};
  auto half = __builtin_convertvector(rounded, Lanes<float>::H);
  __builtin_memcpy(p, &half, sizeof half);
}

// The first n columns of a vector, the rest 0.
template <class S, class T = typename Acc<S>::T>
ONCE Vec<T> load_some(const S* p, int64_t n) {
  S lanes[L<T>] = {};
  __builtin_memcpy(lanes, p, sizeof(S) * static_cast<size_t>(n));
  return load(lanes);
}
template <class O, class T>
ONCE void store_some(O* p, T v, int64_t n) {
  O lanes[sizeof(T) / sizeof(typename Acc<O>::T)];
  store(lanes, v);
  __builtin_memcpy(p, lanes, sizeof(O) * static_cast<size_t>(n));
}

// The first n lanes, the others -inf.
template <class T>
ONCE Vec<T> first(Vec<T> v, int64_t n) {
  for (int64_t i = n; i < L<T>; ++i) v[i] = -__builtin_inf();
  return v;
}

template <class T>
INLINE T sum(Vec<T> v) {
  T s = 0;
  for (int64_t i = 0; i < L<T>; ++i) s += v[i];
  return s;
}

// -- functions --------------------------------------------------------------------------------------------------------

// exp to about one unit in the last place, for x < 88; 0 below -88, NaN for NaN.
INLINE Vec<float> exp_of(Vec<float> x) {
  typedef Lanes<float>::I I;
  x = -88.0f > x ? all(-88.0f) : x;
  const Vec<float> magic = all(12582912.0f);  // 1.5 2^23: adding it rounds to a whole number in the low bits
  const Vec<float> shifted = x * 1.44269504088896341f + magic;
  const Vec<float> n = shifted - magic;
  const Vec<float> r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  Vec<float> p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  I bits;
  __builtin_memcpy(&bits, &shifted, sizeof bits);
  bits = (bits << 23) + (127 << 23);  // the whole number in the exponent; what lay above it is shifted out
  Vec<float> power;
  __builtin_memcpy(&power, &bits, sizeof power);
  return p * power;
}
INLINE Vec<double> exp_of(Vec<double> x) {
  for (int64_t i = 0; i < L<double>; ++i) x[i] = __builtin_exp(x[i]);
  return x;
}

// tanh(x), and 1 - tanh(x)^2 from the same exponential, right to rounding where tanh saturates.
template <class T>
struct Tanh {
  Vec<T> t, slope;
};
INLINE Tanh<float> tanh_of(Vec<float> x) {
  const Vec<float> size = x < 0.0f ? -x : x;
  const Vec<float> e = exp_of(size * -2.0f);
  const Vec<float> inverse = 1.0f / (1.0f + e);
  const Vec<float> large = (1.0f - e) * inverse;
  const Vec<float> s = x * x;
  Vec<float> p = s * -5.70498872745e-3f + 2.06390887954e-2f;
  p = p * s - 5.37397155531e-2f;
  p = p * s + 1.33314422036e-1f;
  p = p * s - 3.33332819422e-1f;
  const Vec<float> small = p * s * x + x;  // below 0.625, where 1 - e would cancel
  return {size < 0.625f ? small : (x < 0.0f ? -large : large), 4.0f * e * inverse * inverse};
}
INLINE Tanh<double> tanh_of(Vec<double> x) {
  Tanh<double> made;
  for (int64_t i = 0; i < L<double>; ++i) {
    const double e = __builtin_exp(-2 * __builtin_fabs(x[i]));
    made.t[i] = __builtin_tanh(x[i]);
    made.slope[i] = 4 * e / ((1 + e) * (1 + e));
  }
  return made;
}

// Raw products -> logits and J, with bias and soft-cap compiled in only where there are any.
template <class S, bool BIAS, bool CAP>
struct Finish {
  typedef typename Acc<S>::T T;
  const S* z;
  const T* bias;
  T cap, inverse_cap, scale;

  INLINE Finish make(const void* z, const Epilogue& e) {
    return {static_cast<const S*>(z), static_cast<const T*>(e.bias), static_cast<T>(e.softcap),
            static_cast<T>(1 / e.softcap), static_cast<T>(e.scale)};
  }
  // scale (z + b) at k ... k + n, -inf beyond. n == L: a whole vector.
  INLINED Vec<T> uncapped(int64_t k, int64_t n) const {
    const bool whole = n == L<T>;
    Vec<T> v = whole ? load(z + k) : load_some(z + k, n);
    if (BIAS) v += whole ? load(bias + k) : load_some(bias + k, n);
    v *= scale;
    ROUNDED(v);
    return whole ? v : first<T>(v, n);
  }
  INLINED Vec<T> capped(Vec<T> v, Vec<T>* j) const {
    const Tanh<T> made = tanh_of(v * inverse_cap);
    *j = scale * made.slope;
    Vec<T> z = cap * made.t;
    ROUNDED(z);
    return z;
  }
  // The logits at k ... k + n and, with a soft-cap, J there; beyond them -inf.
  INLINED Vec<T> at(int64_t k, int64_t n, Vec<T>* j) const {
    Vec<T> v = uncapped(k, n);
    if (CAP) v = capped(v, j);
    return CAP && n != L<T> ? first<T>(v, n) : v;
  }
  INLINED T one(int64_t k, T* j) const {
    Vec<T> slope = all(scale);
    const Vec<T> v = at(k, 1, &slope);
    *j = slope[0];
    return v[0];
  }
};

// f(k, n, lane) for each vector of start ... stop, n columns from k on; only the last is less than whole, and it stands
// outside the loop, which so keeps its constants in registers. `lane` alternates between 0 and 1.
template <class T, class F>
INLINE void vectors(int64_t start, int64_t stop, F f) {
  int64_t k = start;
  for (; k + 2 * L<T> <= stop; k += 2 * L<T>) {
    f(k, L<T>, 0);
    f(k + L<T>, L<T>, 1);
  }
  for (; k < stop; k += L<T>) f(k, stop - k < L<T> ? stop - k : L<T>, 0);
}

// f(left, right) for what lies left and right of y in start ... stop, `target` between the two.
template <class F, class Y>
INLINE void around(int64_t y, int64_t start, int64_t stop, F f, Y target) {
  const bool inside = start <= y && y < stop;
  int64_t left = start, right = inside ? y : stop;
  while (true) {
    f(left, right);
    if (right == stop) return;
    target();
    left = y + 1;
    right = stop;
  }
}

// -- sweeps -----------------------------------------------------------------------------------------------------------

template <bool CAP, class F, class T = typename F::T>
INLINE T maximum(const F& finish, int64_t V, int64_t y) {
  Vec<T> top[2] = {all<T>(-__builtin_inf()), all<T>(-__builtin_inf())};
  around(
      y, 0, V,
      [&](int64_t start, int64_t stop) INLINED {
        vectors<T>(start, stop, [&](int64_t k, int64_t n, int lane) INLINED {
          const Vec<T> v = finish.uncapped(k, n);
          top[lane] = v > top[lane] ? v : top[lane];
        });
      },
      []() INLINED {});
  T most = -__builtin_inf();
  for (const auto& lanes : top)
    for (int64_t i = 0; i < L<T>; ++i) most = lanes[i] > most ? lanes[i] : most;
  Vec<T> j;
  return CAP ? finish.capped(all(most), &j)[0] : most;  // a soft-cap keeps the order
}

template <class S, class O, bool BIAS, bool CAP, bool ENTROPY>
INLINE Found sweep(const void* z, O* out, int64_t V, int64_t y, const Epilogue& e, int64_t tile,
                   typename Acc<S>::T* mass) {
  typedef typename Acc<S>::T T;
  const auto finish = Finish<S, BIAS, CAP>::make(z, e);
  T j_y;
  const T z_y = y < 0 ? T(0) : finish.one(y, &j_y);
  T top = maximum<CAP>(finish, V, y);
  if (top == -__builtin_inf()) top = 0;  // no other token, or none that is possible
  double total = 0, mean = 0;            // sum e, sum e (z - top)
  const int64_t step = !mass ? BLOCK : tile < V ? tile : V;
  for (int64_t start = 0; start < V; start += step) {
    const int64_t stop = start + step < V ? start + step : V;
    double of_step = 0;
    // a tile may be longer than what lanes may sum
    for (int64_t first = start; first < stop; first += BLOCK) {
      const int64_t last = first + BLOCK < stop ? first + BLOCK : stop;
      Vec<T> sums[2] = {all<T>(0), all<T>(0)}, means[2] = {all<T>(0), all<T>(0)};
      around(
          y, first, last,
          [&](int64_t left, int64_t right) INLINED {
            vectors<T>(left, right, [&](int64_t k, int64_t n, int lane) INLINED {
              Vec<T> j;
              Vec<T> shifted = finish.at(k, n, &j) - top;
              if (CAP) shifted = shifted > T(0) ? all(T(0)) : shifted;  // tanh keeps the order but for its rounding
              const Vec<T> weight = exp_of(shifted);
              sums[lane] += weight;
              if (ENTROPY) means[lane] += weight > T(0) ? weight * shifted : all<T>(0);  // not 0 inf
              if (out) {
                const Vec<T> made = CAP ? weight * j : weight * finish.scale;
                n == L<T> ? store(out + k, made) : store_some(out + k, made, n);
              }
            });
          },
          [&]() INLINED {
            if (out) store_some(out + y, all<T>(0), 1);
          });
      of_step += static_cast<double>(sum<T>(sums[0] + sums[1]));
      if (ENTROPY) mean += static_cast<double>(sum<T>(means[0] + means[1]));
    }
    total += of_step;
    if (mass) mass[start / step] = static_cast<T>(of_step);
  }
  if (mass)
    for (int64_t t = 0; t * step < V; ++t) mass[t] = static_cast<T>(total > 0 ? mass[t] / total : mass[t]);
  const double log_total = __builtin_log(total);
  return {static_cast<double>(z_y), static_cast<double>(top) + log_total,
          ENTROPY && total > 0 ? log_total - mean / total : 0.0, total, static_cast<double>(top)};
}

template <class S, class O, bool BIAS, bool CAP, bool ENTROPY>
INLINE void pull_back(const void* z, O* out, int64_t V, int64_t y, const Epilogue& e, const Upstream& g) {
  typedef typename Acc<S>::T T;
  const auto finish = Finish<S, BIAS, CAP>::make(z, e);
  T j_y = 0, d_y = 0;
  if (y >= 0) {
    finish.one(y, &j_y);
    d_y = static_cast<T>(g.g_zy) * j_y;
  }
  const T lse = g.lse_other == -__builtin_inf() ? T(0) : static_cast<T>(g.lse_other);  // no other token: every q is 0
  const T g_lo = static_cast<T>(g.g_lo), g_ho = static_cast<T>(g.g_ho), h_o = static_cast<T>(g.h_o);
  around(
      y, 0, V,
      [&](int64_t left, int64_t right) INLINED {
        vectors<T>(left, right, [&](int64_t k, int64_t n, int) INLINED {
          Vec<T> j;
          const Vec<T> log_q = finish.at(k, n, &j) - lse;
          const Vec<T> q = exp_of(log_q > T(80) ? all(T(80)) : log_q);  // statistics of another row: large, not random
          Vec<T> d = q * (ENTROPY ? g_lo - g_ho * (h_o + log_q) : all(g_lo));
          d = q == T(0) ? all<T>(0) : d;  // not 0 inf; NaN stays
          d *= CAP ? j : all(finish.scale);
          n == L<T> ? store(out + k, d) : store_some(out + k, d, n);
        });
      },
      [&]() INLINED { store_some(out + y, all(d_y), 1); });
}

#include "token_losses.inl"

// -- entries ----------------------------------------------------------------------------------------------------------

// f(bias?, cap?, entropy?) with the answers as types.
template <bool X>
struct Is {
  static constexpr bool value = X;
};
template <class F>
INLINE auto choose(const Epilogue& e, bool entropy, F f) {
  if (e.bias) {
    if (e.softcap != 0) return entropy ? f(Is<true>{}, Is<true>{}, Is<true>{}) : f(Is<true>{}, Is<true>{}, Is<false>{});
    return entropy ? f(Is<true>{}, Is<false>{}, Is<true>{}) : f(Is<true>{}, Is<false>{}, Is<false>{});
  }
  if (e.softcap != 0) return entropy ? f(Is<false>{}, Is<true>{}, Is<true>{}) : f(Is<false>{}, Is<true>{}, Is<false>{});
  return entropy ? f(Is<false>{}, Is<false>{}, Is<true>{}) : f(Is<false>{}, Is<false>{}, Is<false>{});
}

template <class S, class O>
ONCE Found statistics(const void* z, void* out, int64_t V, int64_t y, const Epilogue& e, bool entropy, int64_t tile,
                 void* mass) {
  return choose(e, entropy, [&](auto bias, auto cap, auto ent) INLINED {
    return sweep<S, O, bias.value, cap.value, ent.value>(z, static_cast<O*>(out), V, y, e, tile,
                                                         static_cast<typename Acc<S>::T*>(mass));
  });
}

template <class S, class O>
ONCE void gradient(const void* z, void* out, int64_t V, int64_t y, const Epilogue& e, const Upstream& g, bool entropy) {
  choose(e, entropy, [&](auto bias, auto cap, auto ent) INLINED {
    pull_back<S, O, bias.value, cap.value, ent.value>(z, static_cast<O*>(out), V, y, e, g);
  });
}

// Weights over the row's own logits, then, once the loss has given its coefficient, dlogits from them.
template <class S, class O>
Found token_loss(void* z, void* out, int64_t V, int64_t y, const Epilogue& e, bool entropy, const Term& term,
                 double* value) {
  typedef typename Acc<S>::T T;
  S* weights = static_cast<S*>(z);
  O* d = static_cast<O*>(out);
  T j_y = static_cast<T>(e.scale);
  choose(e, false, [&](auto bias, auto cap, auto) INLINED { Finish<S, bias.value, cap.value>::make(z, e).one(y, &j_y); });
  const Found found = statistics<S, S>(z, weights, V, y, e, entropy, 0, nullptr);
  const bool certain = found.lse_other == -__builtin_inf();
  const Sloped made = token_term(certain ? __builtin_inf() : found.z_y - found.lse_other, found.h_o, term);
  *value = made.value;
  const double slope = certain ? 0 : made.slope;  // no logit moves a certain token
  const T r = static_cast<T>(found.total > 0 ? -slope / found.total : 0);
  const T d_y = static_cast<T>(slope) * j_y;
  around(
      y, 0, V,
      [&](int64_t left, int64_t right) INLINED {
        vectors<T>(left, right, [&](int64_t k, int64_t n, int) INLINED {
          if (n == L<T>)
            store(d + k, load(weights + k) * r);
          else
            store_some(d + k, load_some(weights + k, n) * r, n);
        });
      },
      [&]() INLINED { store_some(d + y, all(d_y), 1); });
  return found;
}

constexpr Kernels TABLE[TYPES] = {
    {statistics<double, double>, gradient<double, double>, token_loss<double, double>},
    {statistics<float, float>, gradient<float, float>, token_loss<float, float>},
    {statistics<bf16, bf16>, gradient<bf16, bf16>, nullptr},  // weights of bfloat16 would be rounded twice
    {statistics<float, bf16>, gradient<float, bf16>, token_loss<float, bf16>},
};

}  // namespace

const Kernels* kernels() { return TABLE; }

}  // namespace RGPB_ISA

}  // namespace rgpb
