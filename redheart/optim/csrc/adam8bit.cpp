// One fused AdamW step over a flat parameter whose moments take a byte each, and the codes of these bytes.
//
// A block is 256 elements. With r = sqrt(v), an element's two codes are
//   r        a small float: 3 to 6 mantissa bits, whatever is left after the exponents that the block's elements span: 32, 16, 8
//            or 4 octaves below its largest. A block of like curvature has steps of 1 %, one that spans 9 decades of 6 to 12 %;
//   q = m/r  evenly spaced, in units of a power of two that lets the block's largest reach 64 to 127. Adam's own step is q but
//            for constants, so q is bounded (|q| < 7.3 for betas of 0.9 and 0.999), and whatever a block's gradients span, the
//            first moment of the least of them is as exact as that of the largest. A block's largest |m| as the unit, which is
//            what is usual, leaves elements four decades below it without a first moment.
// Moments -> codes -> moments changes no bit. Both are rounded stochastically: a decay of 0.1 % a step, far below the codes'
// resolution, is right on average. The noise of an element walks in steps of the golden ratio from step to step (a Weyl
// sequence, van der Corput's uniformity in time) from a start that is a pure function of (seed, parameter, block), so that n steps
// that each round up with probability f round up n f times but for one or two, where independent draws scatter by sqrt(n f);
// and a resumed run is bitwise the uninterrupted one.
//
// The weights are fp32, with a bfloat16 copy written in the same pass if it is asked for, or split: bfloat16 to nearest, which
// is the copy, and in another byte what this rounding took away, in 1/256 of its last place. Such a pair is a float of 16
// significant bits, into which updates are rounded stochastically, by the same noise.
//
// Memory is passed over once, a block in two loops: `update` leaves it as floats in the first cache, with the largest |q| and the
// largest and smallest r, which say how to code it and whether its gradient was finite; `write` codes it.

#include <pybind11/pybind11.h>  // alone: torch's own headers take a minute to compile, and addresses are all that is needed

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "lanes.h"

namespace {

// 64 well-mixed bits of x (the finaliser of splitmix64)
inline uint64_t mix(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  return x ^ (x >> 31);
}

constexpr uint32_t kSpace = 0x85ebca6bu;   // from an element's noise to the next one's
constexpr uint32_t kTime = 0x9e39e379u;    // and from a step's: its upper and its lower 20 bits are both the golden ratio
constexpr float kTiny = 0x1p-120f;         // added to v, so that nothing is divided by zero
constexpr float kSmallest = 0x1p-58f;      // a block whose largest r is below counts as zero
constexpr float kLarge = 0x1p40f;          // gradients beyond count as this, so that what the step multiplies stays finite
constexpr float kSmallestRate = 0x1p-40f;  // a step below moves nothing
constexpr int64_t kFew = 1 << 15;          // elements that one thread does sooner than two agree on
constexpr int kMostBits = 6, kFewestBits = 3;

inline float power_of_two(int32_t exponent) { return bits<float>(exponent << 23); }  // biased by 127
inline int32_t exponent_of(float x) { return bits<int32_t>(x) >> 23; }

// How a block's bytes are to be read.
struct Scales {
  float ratio;     // of q's codes: a power of two, or zero
  float base;      // r of code 0: a power of two, or zero for a block of zeros
  int32_t shift;   // of a float's bits, to the last of r's code: 23 less its mantissa bits
};

inline Scales scales_of(float q_most, float r_most, float r_least) {
  if (!(r_most >= kSmallest)) return {0.0f, 0.0f, 23 - kMostBits};
  const int32_t top = exponent_of(r_most), span = top - exponent_of(r_least) + 1;
  int mantissa = kMostBits;
  while (mantissa > kFewestBits && span > 256 >> mantissa) --mantissa;
  const float ratio = q_most > 0.0f ? std::max(power_of_two(exponent_of(q_most * (1.0f / 127.0f))), 0x1p-100f) : 0.0f;
  return {ratio * 127.0f < q_most ? 2.0f * ratio : ratio, power_of_two(top - (256 >> mantissa) + 1), 23 - mantissa};
}

inline float inverse(float scale) { return scale > 0.0f ? power_of_two(254 - exponent_of(scale)) : 0.0f; }

struct Step {
  float g_to_m, g_to_v, beta1, beta2, shrink;
  float root, eps;  // both over the learning rate
  bool still;       // a rate of nothing: the weights stay
  uint64_t key;     // of the noise
  uint32_t time;
};

// A parameter's arrays, or a padded copy of its last block: weights (fp32 with an optional copy, or bfloat16 with `low`),
// gradients (fp32 or bfloat16, as the template argument says), codes and what they are in units of.
struct Arrays {
  float* p;
  uint16_t* high;  // split: the weights; else their copy, or null
  int8_t* low;     // split only
  const void* g;
  int8_t* q8;
  uint8_t* r8;
  float *ratio, *base;
  uint8_t* mantissa;
};

// What a block's elements become before they are coded, in the order of the bytes (lanes.h), and what tells how.
struct Updated {
  alignas(64) float p[kBlock], q[kBlock], r[kBlock];
  float q_most, r_most, r_least;
  Scales scales;
};

inline float most_of(Ints x) {
  int32_t most = x[0];
  for (int i = 1; i < kLanes; ++i) most = std::max(most, x[i]);
  return bits<float>(most);
}
// Two vectors of consecutive numbers, apart as even and odd ones.
inline void load_pair(const float* at, Floats* even, Floats* odd) {
  part(load<Floats>(at), load<Floats>(at + kLanes), even, odd);
}
inline void load_pair(const uint16_t* at, Floats* even, Floats* odd) {
  const Words w = load<Words>(at);
  *even = bits<Floats>(w << 16);
  *odd = bits<Floats>(w & 0xffff0000u);
}

// bfloat16 to nearest as `high`, and what it lacks in 1/256 of its last place as `low`; 24 bits are left of the sum's 32.
template <int J>
inline Floats joined(Floats high, Words low) {
  return bits<Floats>((bits<Words>(high) | byte_of<J, 1>(low)) - 0x8000u);
}

// A block's update, turn by turn.
template <bool kSplit, typename Gradient>
struct Updating {
  const Arrays& a;
  const Gradient* g;  // of the block
  int64_t start;
  Updated& to;
  const float g_to_m, g_to_v, beta2, shrink, root, eps, m_unit;
  const uint32_t base;
  const int32_t shift;
  Floats q_most = {};
  Ints r_most = {};
  Bytes code_least = Bytes{} + 255;

  inline __attribute__((always_inline)) Updating(const Arrays& a, const Gradient* g, int64_t start, const Scales& old, const Step& s, Updated& to)
      : a(a), g(g), start(start), to(to), g_to_m(s.g_to_m), g_to_v(s.g_to_v), beta2(s.beta2), shrink(s.shrink), root(s.root),
        eps(s.eps), m_unit(old.ratio * s.beta1 * 0x1p-24f), base(bits<uint32_t>(old.base)), shift(old.shift) {}

  inline __attribute__((always_inline)) void turn(int i) {
    const int64_t words = start + i - i % kGroup + (i % kGroup) / 2;
    const Words qb = load<Words>(a.q8 + start + i), rb = load<Words>(a.r8 + start + i);
    code_least = smaller(code_least, bits<Bytes>(rb));
    Floats grad[4], p[4];
    load_pair(g + words - start, grad, grad + 1);
    load_pair(g + words - start + 32, grad + 2, grad + 3);
    if constexpr (kSplit) {
      load_pair(a.high + words, p, p + 1);
      load_pair(a.high + words + 32, p + 2, p + 3);
      const Words low = load<Words>(a.low + start + i) ^ 0x80808080u;
      p[0] = joined<0>(p[0], low), p[1] = joined<1>(p[1], low), p[2] = joined<2>(p[2], low), p[3] = joined<3>(p[3], low);
    } else {
      load_pair(a.p + words, p, p + 1);
      load_pair(a.p + words + 32, p + 2, p + 3);
    }
    const Words qs[4] = {byte_of<0, 3>(qb), byte_of<1, 3>(qb), byte_of<2, 3>(qb), byte_of<3, 3>(qb)};
    const Words rs[4] = {byte_of<0, 3>(rb), byte_of<1, 3>(rb), byte_of<2, 3>(rb), byte_of<3, 3>(rb)};
    const Words down = Words{} + static_cast<uint32_t>(24 - shift);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const Floats old_r = bits<Floats>((rs[j] >> down) + base), old_q = __builtin_convertvector(bits<Ints>(qs[j]), Floats);
      const Floats m = old_q * old_r * m_unit + grad[j] * g_to_m;
      const Floats r = square_root(old_r * old_r * beta2 + (grad[j] * grad[j] * g_to_v + kTiny));
      const Floats divisor = r * root + eps, z = m / (r * divisor), q = z * divisor;
      store(to.p + i + j * kLanes, p[j] * shrink - z * r);
      store(to.q + i + j * kLanes, q);
      store(to.r + i + j * kLanes, r);
      q_most = larger_size(q_most, q);
      r_most = larger(r_most, bits<Ints>(r));
    }
  }

  inline __attribute__((always_inline)) void end() const {
    to.q_most = most_of(bits<Ints>(q_most));
    to.r_most = most_of(r_most);
    uint32_t least = 255;
    for (size_t i = 0; i < sizeof code_least; ++i) least = std::min<uint32_t>(least, code_least[i]);
    to.r_least = bits<float>((least << shift) + base) * std::sqrt(beta2);  // it is this, or above
    if (base == 0 || beta2 < 0.5f) to.r_least = *std::min_element(to.r, to.r + kBlock);  // where this says little
  }
};

template <bool kSplit, typename Gradient>
inline __attribute__((always_inline)) void update(const Arrays& a, const Gradient* g, int64_t start, const Scales& old, const Step& s, Updated& to) {
  Updating<kSplit, Gradient> updating(a, g, start, old, s, to);
  for (int i = 0; i < kBlock; i += kTurn) updating.turn(i);
  updating.end();
}

// Whether a number is finite, and as a float.
inline float as_float(float x) { return x; }
inline float as_float(uint16_t x) { return bits<float>(static_cast<uint32_t>(x) << 16); }

// Again, for a block whose gradients would be too large to square. False when one is not finite.
template <bool kSplit, typename Gradient>
__attribute__((noinline)) bool update_large(const Arrays& a, const Gradient* g, int64_t start, const Scales& old, const Step& s, Updated& to) {
  float clamped[kBlock];
  for (int i = 0; i < kBlock; ++i) {
    const float x = as_float(g[i]);
    if (!std::isfinite(x)) return false;
    clamped[i] = std::min(std::max(x, -kLarge), kLarge);
  }
  update<kSplit>(a, clamped, start, old, s, to);
  return true;
}

// Puts a block's weights back as they were.
template <bool kSplit>
__attribute__((noinline)) void leave_weights(const Arrays& a, int64_t start, Updated& to) {
  for (int i = 0; i < kBlock; ++i) {
    const int byte = place(i), turn = byte / kTurn * kTurn, at = turn + byte % 4 * kLanes + byte % kTurn / 4;
    to.p[at] = kSplit ? bits<float>((static_cast<uint32_t>(a.high[start + i]) << 16) + (static_cast<int32_t>(a.low[start + byte]) << 8))
                      : a.p[start + i];
  }
}

// An updated block's writing, turn by turn: weights, codes, scales.
template <bool kSplit>
struct Writing {
  const Updated& x;
  const Arrays& a;
  int64_t start;
  const float up;
  const int32_t shift;
  const uint32_t floor;
  Words noise;

  inline __attribute__((always_inline)) Writing(const Updated& x, const Arrays& a, int64_t b, uint32_t noise_start)
      : x(x), a(a), start(b * kBlock), up(inverse(x.scales.ratio)), shift(x.scales.shift),
        floor(x.scales.base > 0.0f ? bits<uint32_t>(x.scales.base) >> x.scales.shift : 0xffffu) {
    a.ratio[b] = x.scales.ratio;
    a.base[b] = x.scales.base;
    a.mantissa[b] = static_cast<uint8_t>(23 - x.scales.shift);
    for (int i = 0; i < kLanes; ++i) noise[i] = noise_start + static_cast<uint32_t>(4 * i) * kSpace;
  }

  inline __attribute__((always_inline)) void turn(int i) {
    const int64_t words = start + i - i % kGroup + (i % kGroup) / 2;
    const Words mask = Words{} + ((1u << shift) - 1u), down = Words{} + static_cast<uint32_t>(shift);
    Ints q[4], r[4];
    Floats p[4];
    Words w[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const Words n = noise + static_cast<uint32_t>(j) * kSpace;
      const int at = i + j * kLanes;
      q[j] = __builtin_convertvector(load<Floats>(x.q + at) * up + bits<Floats>((n >> 16) | 0x43000000u), Ints);  // 128 + [0, 1)
      r[j] = bits<Ints>((load<Words>(x.r + at) + (n & mask)) >> down);
      p[j] = load<Floats>(x.p + at);
      if constexpr (kSplit) w[j] = bits<Words>(p[j]) + ((n & 0xffu) | 0x8000u);
    }
    noise += static_cast<uint32_t>(kTurn) * kSpace;
    store(a.q8 + start + i, to_bytes(q, 0) ^ 0x80808080u);
    store(a.r8 + start + i, to_bytes(r, floor));
    if constexpr (kSplit) {
      store(a.low + start + i, (((w[0] >> 8) & 0xffu) | (w[1] & 0xff00u) | ((w[2] << 8) & 0xff0000u) | ((w[3] << 16) & 0xff000000u)) ^ 0x80808080u);
    } else {
      for (int j = 0; j < 4; j += 2) {
        Floats first, second;
        join(p[j], p[j + 1], &first, &second);
        store(a.p + words + 16 * j, first);
        store(a.p + words + 16 * j + kLanes, second);
      }
      if (a.high == nullptr) return;
      for (int j = 0; j < 4; ++j) w[j] = bits<Words>(p[j]) + 0x7fffu + ((bits<Words>(p[j]) >> 16) & 1u);  // ties to even
    }
    store(a.high + words, halves(w[0], w[1]));
    store(a.high + words + 32, halves(w[2], w[3]));
  }
};

// Steps full blocks first .. last - 1, `number` on in the noise; returns how many were left alone. Turn by turn a block is updated
// and the one before it written: the one's square roots and quotients take the time of the other's shifts and masks.
template <bool kSplit, typename Gradient>
int64_t step_blocks(const Arrays& a, int64_t first, int64_t last, uint64_t number, const Step& s) {
  Updated x[2];
  bool done = false;  // the block before
  int64_t left = 0;
  const Gradient* g = static_cast<const Gradient*>(a.g);
  const auto writing_of = [&](int64_t b) {
    const uint32_t start = static_cast<uint32_t>(mix(s.key + number + static_cast<uint64_t>(b - first)) >> 32);
    return Writing<kSplit>(x[b & 1], a, b, start + s.time);
  };
  for (int64_t b = first; b < last; ++b) {
    const int64_t start = b * kBlock;
    const Scales old{a.ratio[b], a.base[b], 23 - a.mantissa[b]};
    Updated& to = x[b & 1];
    if (__builtin_expect(done, 1)) {
      Updating<kSplit, Gradient> updating(a, g + start, start, old, s, to);
      Writing<kSplit> writing = writing_of(b - 1);
      for (int i = 0; i < kBlock; i += kTurn) {
        updating.turn(i);
        writing.turn(i);
      }
      updating.end();
    } else {
      update<kSplit>(a, g + start, start, old, s, to);
    }
    done = true;
    if (__builtin_expect(!(to.r_most < kLarge && to.q_most < kLarge), 0)) {
      done = update_large<kSplit>(a, g + start, start, old, s, to);
      left += !done;
    }
    if (__builtin_expect(s.still, 0)) leave_weights<kSplit>(a, start, to);
    to.scales = scales_of(to.q_most, to.r_most, to.r_least);
  }
  if (done) {
    Writing<kSplit> writing = writing_of(last - 1);
    for (int i = 0; i < kBlock; i += kTurn) writing.turn(i);
  }
  return left;
}

template <typename T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// Where one parameter's states are: codes [n], and of every block what they are in units of [ceil(n / kBlock)].
struct States {
  int8_t* q8;
  uint8_t* r8;
  float *ratio, *base;
  uint8_t* mantissa;
  States(uintptr_t q8, uintptr_t r8, uintptr_t ratio, uintptr_t base, uintptr_t mantissa)
      : q8(at<int8_t>(q8)), r8(at<uint8_t>(r8)), ratio(at<float>(ratio)), base(at<float>(base)), mantissa(at<uint8_t>(mantissa)) {}
};

// The byte of element i of n: the last, partial block keeps the elements' order.
inline int64_t byte_at(int64_t i, int64_t n) {
  const int64_t start = i - i % kBlock;
  return start + kBlock <= n ? start + place(static_cast<int>(i - start)) : i;
}

template <bool kSplit, typename Gradient>
int64_t step_all(const Arrays& a, int64_t n, const Step& s) {
  const int64_t full = n / kBlock;
  int64_t left = 0;
#pragma omp parallel reduction(+ : left) if (n > kFew)
  {
    const int64_t threads = omp_get_num_threads(), thread = omp_get_thread_num();
    const int64_t first = full * thread / threads, last = full * (thread + 1) / threads;
    left += step_blocks<kSplit, Gradient>(a, first, last, static_cast<uint64_t>(first), s);
  }
  const int64_t i = full * kBlock, rest = n - i;
  if (rest == 0) return left;
  // the last, partial block: on a padded copy
  float p[kBlock] = {};
  uint16_t high[kBlock] = {};
  Gradient g[kBlock] = {};
  int8_t low[kBlock] = {}, q8[kBlock] = {};
  uint8_t r8[kBlock] = {};
  for (int e = 0; e < rest; ++e) {
    if constexpr (kSplit) {
      high[e] = a.high[i + e];
      low[place(e)] = a.low[i + e];
    } else {
      p[e] = a.p[i + e];
    }
    g[e] = static_cast<const Gradient*>(a.g)[i + e];
    q8[place(e)] = a.q8[i + e];
    r8[place(e)] = a.r8[i + e];
  }
  for (int e = static_cast<int>(rest); e < kBlock; ++e) {  // as the first element, so that they do not tell how to code
    g[e] = g[0];
    q8[place(e)] = q8[0];
    r8[place(e)] = r8[0];
  }
  const Arrays padded{p, kSplit || a.high ? high : nullptr, low, g, q8, r8, a.ratio + full, a.base + full, a.mantissa + full};
  if (step_blocks<kSplit, Gradient>(padded, 0, 1, static_cast<uint64_t>(full), s) > 0) return left + 1;
  for (int e = 0; e < rest; ++e) {
    if constexpr (kSplit) {
      a.low[i + e] = low[place(e)];
    } else {
      a.p[i + e] = p[e];
    }
    if (a.high) a.high[i + e] = high[e];
    a.q8[i + e] = q8[place(e)];
    a.r8[i + e] = r8[place(e)];
  }
  return left;
}

template <typename Number>
bool finite(const Number* g, int64_t n) {
  constexpr Number kExponent = static_cast<Number>(sizeof(Number) == 4 ? 0x7f800000u : 0x7f80u);
  Number worst = 0;
#pragma omp parallel for simd reduction(max : worst) schedule(static) if (parallel : n > kFew)
  for (int64_t i = 0; i < n; ++i) {
    const Number e = g[i] & kExponent;
    worst = e > worst ? e : worst;
  }
  return worst < kExponent;
}

}  // namespace

// Whether all n numbers (bfloat16, else fp32) are finite, by their exponent bits.
bool all_finite(uintptr_t x, int64_t n, bool is_bf16) {
  return is_bf16 ? finite(at<uint16_t>(x), n) : finite(at<uint32_t>(x), n);
}

// Updates weights and states in place from the gradient `g` [n] (bfloat16, else fp32), which counts times `scale`. The weights:
// fp32 `p` [n] with `high` [n] bfloat16 written unless it is 0; or, `low` not 0, split into `high` and `low` [n]. Threads share
// blocks, so the result does not depend on their number. Returns how many blocks were left alone: their gradient is not finite.
int64_t step(uintptr_t p, uintptr_t high, uintptr_t low, uintptr_t g, bool is_bf16, const States& to, int64_t n, double scale, double lr,
             double beta1, double beta2, double eps, double decay, int64_t t, int64_t seed) {
  const double rate = lr / (1.0 - std::pow(beta1, static_cast<double>(t)));
  const double correction = std::sqrt(1.0 - std::pow(beta2, static_cast<double>(t)));
  const bool still = rate < kSmallestRate;
  const double moved = still ? 1.0 : rate;
  const Step s{static_cast<float>((1.0 - beta1) * scale),
               static_cast<float>((1.0 - beta2) * scale * scale),
               static_cast<float>(beta1),
               static_cast<float>(beta2),
               static_cast<float>(1.0 - lr * decay),
               static_cast<float>(1.0 / (moved * correction)),
               static_cast<float>(eps / moved),
               still,
               mix(static_cast<uint64_t>(seed)),
               static_cast<uint32_t>(t) * kTime};
  const Arrays a{at<float>(p), at<uint16_t>(high), at<int8_t>(low), at<void>(g), to.q8, to.r8, to.ratio, to.base, to.mantissa};
  if (low) return is_bf16 ? step_all<true, uint16_t>(a, n, s) : step_all<true, float>(a, n, s);
  return is_bf16 ? step_all<false, uint16_t>(a, n, s) : step_all<false, float>(a, n, s);
}

// The states as fp32: first moments `m` [n], second moments `v` [n] (squared).
void expand(const States& from, uintptr_t m_, uintptr_t v_, int64_t n) {
  float *m = at<float>(m_), *v = at<float>(v_);
#pragma omp parallel for schedule(static) if (parallel : n > kFew)
  for (int64_t i = 0; i < n; ++i) {
    const int64_t b = i / kBlock, byte = byte_at(i, n);
    const float r = bits<float>((static_cast<uint32_t>(from.r8[byte]) << (23 - from.mantissa[b])) + bits<uint32_t>(from.base[b]));
    m[i] = from.q8[byte] * from.ratio[b] * r;
    v[i] = std::max(r * r, r > 0.0f ? 0x1p-149f : 0.0f);
  }
}

// The inverse: the codes nearest to fp32 moments `m` [n] and `v` [n] >= 0, all finite.
void compress(const States& to, uintptr_t m_, uintptr_t v_, int64_t n) {
  const float *m = at<float>(m_), *v = at<float>(v_);
  const int64_t blocks = (n + kBlock - 1) / kBlock;
#pragma omp parallel for schedule(static) if (parallel : n > kFew)
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t start = b * kBlock, size = std::min(n - start, kBlock);
    float q[kBlock], r[kBlock], r_most = 0.0f, r_least = kLarge, q_most = 0.0f;
    for (int64_t i = 0; i < size; ++i) {
      r[i] = std::sqrt(v[start + i] + kTiny);
      r_most = std::max(r_most, r[i]);
      r_least = std::min(r_least, r[i]);
    }
    Scales scales = scales_of(1.0f, r_most, r_least);
    const int32_t shift = scales.shift, base = bits<int32_t>(scales.base);
    for (int64_t i = 0; i < size; ++i) {
      const int32_t code = scales.base > 0.0f ? std::clamp((bits<int32_t>(r[i]) - base + (1 << (shift - 1))) >> shift, 0, 255) : 0;
      to.r8[byte_at(start + i, n)] = static_cast<uint8_t>(code);
      const float coded = bits<float>((code << shift) + base);
      q[i] = coded > 0.0f ? m[start + i] / coded : 0.0f;
      q_most = std::max(q_most, std::fabs(q[i]));
    }
    scales = scales_of(q_most, r_most, r_least);
    const float up = inverse(scales.ratio);
    for (int64_t i = 0; i < size; ++i) to.q8[byte_at(start + i, n)] = static_cast<int8_t>(std::clamp(std::nearbyint(q[i] * up), -127.0f, 127.0f));
    to.ratio[b] = scales.ratio;
    to.base[b] = scales.base;
    to.mantissa[b] = static_cast<uint8_t>(23 - shift);
  }
}

// Split weights as fp32 `p` [n].
void join_weights(uintptr_t high_, uintptr_t low_, uintptr_t p_, int64_t n) {
  const uint16_t* high = at<uint16_t>(high_);
  const int8_t* low = at<int8_t>(low_);
  float* p = at<float>(p_);
#pragma omp parallel for schedule(static) if (parallel : n > kFew)
  for (int64_t i = 0; i < n; ++i)
    p[i] = bits<float>((static_cast<uint32_t>(high[i]) << 16) + (static_cast<uint32_t>(static_cast<int32_t>(low[byte_at(i, n)])) << 8));
}

// The inverse, to the nearest of the pair (ties to even); false, with nothing said of what was written, where one is not finite.
bool split_weights(uintptr_t high_, uintptr_t low_, uintptr_t p_, int64_t n) {
  uint16_t* high = at<uint16_t>(high_);
  int8_t* low = at<int8_t>(low_);
  const float* p = at<float>(p_);
  bool all = true;
#pragma omp parallel for schedule(static) reduction(&& : all) if (parallel : n > kFew)
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t x = bits<uint32_t>(p[i]), y = x + 0x7fu + ((x >> 8) & 1u), w = (y & 0xffffff00u) + 0x8000u;
    all = all && (x & 0x7f800000u) != 0x7f800000u && (w & 0x7f800000u) != 0x7f800000u;
    high[i] = static_cast<uint16_t>(w >> 16);
    low[byte_at(i, n)] = static_cast<int8_t>(((w >> 8) & 0xffu) ^ 0x80u);
  }
  return all;
}

// Reads and writes all that a step of n elements reads and writes, in its order and by as many threads, but for the last partial
// block, and changes no more than a bit of each: what memory alone takes. Done twice it changes nothing.
void pass_over(uintptr_t p, uintptr_t high, uintptr_t low, uintptr_t g, bool is_bf16, const States& to, int64_t n) {
  const int64_t full = n / kBlock;
#pragma omp parallel if (n > kFew)
  {
    const int64_t threads = omp_get_num_threads(), thread = omp_get_thread_num();
    const auto flip = [](void* at, int64_t bytes, Words with) {
      for (int64_t i = 0; i < bytes; i += static_cast<int64_t>(sizeof(Words))) {
        char* x = static_cast<char*>(at) + i;
        store(x, load<Words>(x) ^ with);
      }
    };
    for (int64_t b = full * thread / threads; b < full * (thread + 1) / threads; ++b) {
      const int64_t i = b * kBlock, gradient_size = is_bf16 ? 2 : 4;
      Words read = {};
      for (int64_t j = 0; j < kBlock * gradient_size; j += static_cast<int64_t>(sizeof(Words)))
        read |= load<Words>(at<char>(g) + i * gradient_size + j);
      const Words one = (read & 0u) + 1u;
      if (p) flip(at<float>(p) + i, 4 * kBlock, one);
      if (high) flip(at<uint16_t>(high) + i, 2 * kBlock, one);
      if (low) flip(at<int8_t>(low) + i, kBlock, one);
      flip(to.q8 + i, kBlock, one);
      flip(to.r8 + i, kBlock, one);
    }
  }
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  namespace py = pybind11;
  using released = py::call_guard<py::gil_scoped_release>;
  py::class_<States>(module, "States").def(py::init<uintptr_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t>());
  module.def("all_finite", &all_finite, released());
  module.def("step", &step, released());
  module.def("expand", &expand, released());
  module.def("compress", &compress, released());
  module.def("join_weights", &join_weights, released());
  module.def("split_weights", &split_weights, released());
  module.def("pass_over", &pass_over, released());
  module.attr("lanes") = kLanes;
}
