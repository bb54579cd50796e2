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
constexpr int kMostBits = 6;

inline float power_of_two(int32_t exponent) { return bits<float>(exponent << 23); }  // biased by 127
inline int32_t exponent_of(float x) { return bits<int32_t>(x) >> 23; }

// How a block's bytes are to be read.
struct Scales {
  float ratio;     // of q's codes: a power of two, or zero
  float base;      // r of code 0: a power of two, or zero for a block of zeros
  int32_t shift;   // of a float's bits, to the last of r's code: 23 less its mantissa bits
};

// `room`: a step rounds at random, the largest r too. Where that may lift it out of its octave the window ends an octave higher: cut
// off there, it would never grow by less than a code, and the steps of its block stay too large.
inline Scales scales_of(float q_most, float r_most, float r_least, bool room) {
  if (!(r_most >= kSmallest)) return {0.0f, 0.0f, 23 - kMostBits};
  const int32_t least = exponent_of(r_least);
  int32_t top = exponent_of(r_most), mantissa;
  for (;;) {
    const int32_t octaves = top - least + 1;
    mantissa = kMostBits - (octaves > 4) - (octaves > 8) - (octaves > 16);  // 256 codes: 4 octaves with 6 bits, 32 with 3
    const int32_t lifted = (bits<int32_t>(r_most) + (room ? (1 << (23 - mantissa)) - 1 : 0)) >> 23;
    if (lifted == top) break;
    top = lifted;
  }
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

// A block's moments before they are coded, in the order of the bytes (lanes.h), and what tells how.
struct Moments {
  alignas(64) float m[kBlock];  // then q
  alignas(64) float r[kBlock];
  float q_most, r_most, r_least;
};

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

// Calls turn(group, within) for every turn of a block: the first byte of its group of 64, and its own within that.
template <typename Turn>
inline __attribute__((always_inline)) void for_turns(const Turn& turn) {
  for (int group = 0; group < kBlock; group += kGroup) {
#pragma GCC unroll 4
    for (int within = 0; within < kGroup; within += kTurn) turn(group, within);
  }
}

// How far apart in the noise a turn's elements are: a table, as gcc makes a hundred instructions of what is computed here.
struct Apart {
  alignas(64) uint32_t of[4][kLanes] = {};
  constexpr Apart() {
    for (int j = 0; j < 4; ++j)
      for (int i = 0; i < kLanes; ++i) of[j][i] = static_cast<uint32_t>(4 * i + j) * kSpace;
  }
};
constexpr Apart kApart;

// The noise of a turn's four vectors; turns have to be asked for in their order.
struct Noise {
  Words of[4];
  explicit Noise(uint32_t start) {
    for (int j = 0; j < 4; ++j) of[j] = load<Words>(kApart.of[j]) + start;
  }
  inline __attribute__((always_inline)) Words next(int j) {
    const Words now = of[j];
    of[j] += static_cast<uint32_t>(kTurn) * kSpace;
    return now;
  }
};

// A step is three short loops over a block: moments (a square root), weights (a quotient), codes. In one loop the chain from an
// element's codes to its new ones is so long that a processor waits for it; between them a block's floats lie in the first cache.

// m and r of a block from its codes and its gradients `g`.
template <typename Gradient>
inline __attribute__((always_inline)) void update_moments(const Arrays& a, const Gradient* g, int64_t start, const Scales& old, const Step& s, Moments& to) {
  const int8_t* const q8 = a.q8 + start;
  const uint8_t* const r8 = a.r8 + start;
  const float g_to_m = s.g_to_m, g_to_v = s.g_to_v, beta2 = s.beta2, m_unit = old.ratio * s.beta1 * 0x1p-24f;
  const uint32_t base = bits<uint32_t>(old.base);
  const Words down = Words{} + static_cast<uint32_t>(24 - old.shift);
  Words r_most = {};
  Bytes code_least = Bytes{} + 255;
  for_turns([&](int group, int within) __attribute__((always_inline)) {
    const int i = group + within;
    const Words qb = load<Words>(q8 + i), rb = load<Words>(r8 + i);
    code_least = smaller(code_least, bits<Bytes>(rb));
    Floats grad[4];
    load_pair(g + group + within / 2, grad, grad + 1);
    load_pair(g + group + within / 2 + 32, grad + 2, grad + 3);
    const Words qs[4] = {byte_of<0, 3>(qb), byte_of<1, 3>(qb), byte_of<2, 3>(qb), byte_of<3, 3>(qb)};
    const Words rs[4] = {byte_of<0, 3>(rb), byte_of<1, 3>(rb), byte_of<2, 3>(rb), byte_of<3, 3>(rb)};
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const Floats old_r = bits<Floats>((rs[j] >> down) + base), old_q = __builtin_convertvector(bits<Ints>(qs[j]), Floats);
      const Floats r = square_root(old_r * old_r * beta2 + (grad[j] * grad[j] * g_to_v + kTiny));
      store(to.m + i + j * kLanes, old_q * old_r * m_unit + grad[j] * g_to_m);
      store(to.r + i + j * kLanes, r);
      r_most = larger(r_most, bits<Words>(r));
    }
  });
  to.r_most = bits<float>(most_of(r_most));  // of all but what is none; else what is none
  to.r_least = bits<float>((least_of(code_least) << old.shift) + base) * std::sqrt(beta2);  // it is this, or above
  if (base == 0 || beta2 < 0.5f) to.r_least = *std::min_element(to.r, to.r + kBlock);  // where this says little
}

// Whether a number is finite, and as a float.
inline float as_float(float x) { return x; }
inline float as_float(uint16_t x) { return bits<float>(static_cast<uint32_t>(x) << 16); }

// Again, for a block whose gradients would be too large to square. False when one is not finite.
template <typename Gradient>
__attribute__((noinline)) bool update_large(const Arrays& a, const Gradient* g, int64_t start, const Scales& old, const Step& s, Moments& to) {
  float clamped[kBlock];
  for (int i = 0; i < kBlock; ++i) {
    const float x = as_float(g[i]);
    if (!std::isfinite(x)) return false;
    clamped[i] = std::min(std::max(x, -kLarge), kLarge);
  }
  update_moments(a, clamped, start, old, s, to);
  return true;
}

// q in the place of m, and the weights' step.
template <bool kSplit>
inline __attribute__((always_inline)) void update_weights(const Arrays& a, int64_t start, const Step& s, Noise noise, Moments& to) {
  float* const whole = kSplit ? nullptr : a.p + start;
  uint16_t* const high = kSplit || a.high ? a.high + start : nullptr;
  int8_t* const low = kSplit ? a.low + start : nullptr;
  const float root = s.root, eps = s.eps, shrink = s.shrink;
  const bool still = s.still;
  Floats q_most = {};
  for_turns([&](int group, int within) __attribute__((always_inline)) {
    const int i = group + within, words = group + within / 2;
    Floats p[4];
    Words w[4];
    if constexpr (kSplit) {
      load_pair(high + words, p, p + 1);
      load_pair(high + words + 32, p + 2, p + 3);
      const Words bytes = load<Words>(low + i) ^ 0x80808080u;
      p[0] = joined<0>(p[0], bytes), p[1] = joined<1>(p[1], bytes), p[2] = joined<2>(p[2], bytes), p[3] = joined<3>(p[3], bytes);
    } else {
      load_pair(whole + words, p, p + 1);
      load_pair(whole + words + 32, p + 2, p + 3);
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const int at = i + j * kLanes;
      const Floats r = load<Floats>(to.r + at), divisor = r * root + eps, z = load<Floats>(to.m + at) / (r * divisor), q = z * divisor;
      store(to.m + at, q);
      q_most = larger_size(q_most, q);
      p[j] = p[j] * shrink - z * r;
      if constexpr (kSplit) w[j] = bits<Words>(p[j]) + ((noise.next(j) & 0xffu) | 0x8000u);
    }
    if (__builtin_expect(still, 0)) {
      if constexpr (kSplit) {
        return;
      } else {  // their copy is written all the same
        load_pair(whole + words, p, p + 1);
        load_pair(whole + words + 32, p + 2, p + 3);
      }
    }
    if constexpr (kSplit) {
      store(low + i, second_bytes(w) ^ 0x80808080u);
    } else {
      for (int j = 0; j < 4; j += 2) {
        Floats first, second;
        join(p[j], p[j + 1], &first, &second);
        store(whole + words + 16 * j, first);
        store(whole + words + 16 * j + kLanes, second);
      }
      if (high == nullptr) return;
      for (int j = 0; j < 4; ++j) w[j] = bits<Words>(p[j]) + 0x7fffu + ((bits<Words>(p[j]) >> 16) & 1u);  // ties to even
    }
    store(high + words, halves(w[0], w[1]));
    store(high + words + 32, halves(w[2], w[3]));
  });
  to.q_most = bits<float>(most_of(bits<Words>(q_most)));
}

// Codes and scales.
inline __attribute__((always_inline)) void write_codes(const Arrays& a, int64_t b, Noise noise, const Moments& from) {
  const Scales scales = scales_of(from.q_most, from.r_most, from.r_least, true);
  a.ratio[b] = scales.ratio;
  a.base[b] = scales.base;
  a.mantissa[b] = static_cast<uint8_t>(23 - scales.shift);
  int8_t* const q8 = a.q8 + b * kBlock;
  uint8_t* const r8 = a.r8 + b * kBlock;
  const float up = inverse(scales.ratio);
  const uint32_t floor = scales.base > 0.0f ? bits<uint32_t>(scales.base) >> scales.shift : 0xffffu;
  const Words mask = Words{} + ((1u << scales.shift) - 1u), down = Words{} + static_cast<uint32_t>(scales.shift);
  for_turns([&](int group, int within) __attribute__((always_inline)) {
    const int i = group + within;
    Ints q[4], r[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const Words n = noise.next(j);
      q[j] = __builtin_convertvector(load<Floats>(from.m + i + j * kLanes) * up + bits<Floats>((n >> 16) | 0x43000000u), Ints);  // 128 + [0, 1)
      r[j] = bits<Ints>((load<Words>(from.r + i + j * kLanes) + (n & mask)) >> down);
    }
    store(q8 + i, to_bytes(q, 0) ^ 0x80808080u);
    store(r8 + i, to_bytes(r, floor));
  });
}

// Steps full blocks first .. last - 1, `number` on in the noise; returns how many were left alone. A block's codes wait for the next
// one's moments, which need not wait for how they are to be written.
template <bool kSplit, typename Gradient>
int64_t step_blocks(const Arrays& a, int64_t first, int64_t last, uint64_t number, const Step& s) {
  Moments both[2];
  int64_t before = -1, left = 0;
  const auto noise_of = [&](int64_t b) {
    return Noise(s.time + static_cast<uint32_t>(mix(s.key + number + static_cast<uint64_t>(b - first)) >> 32));
  };
  for (int64_t b = first; b < last; ++b) {
    const int64_t start = b * kBlock;
    const Gradient* g = static_cast<const Gradient*>(a.g) + start;
    const Scales old{a.ratio[b], a.base[b], 23 - a.mantissa[b]};
    Moments& x = both[b & 1];
    update_moments(a, g, start, old, s, x);
    if (before >= 0) write_codes(a, before, noise_of(before), both[before & 1]);
    before = -1;
    if (__builtin_expect(!(x.r_most < kLarge), 0) && !update_large(a, g, start, old, s, x)) {
      ++left;
      continue;
    }
    update_weights<kSplit>(a, start, s, noise_of(b), x);
    before = b;
  }
  if (before >= 0) write_codes(a, before, noise_of(before), both[before & 1]);
  return left;
}

}  // namespace
