// A block's step, and what it makes of its codes; adam8bit.cpp says what they mean. Included once, by adam8bit.cpp.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

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

}  // namespace
