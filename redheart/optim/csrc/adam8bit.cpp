// One fused AdamW step over a flat fp32 parameter with 8-bit block-wise states, and the states' codes.
//
// A block is 256 elements and has two scales, powers of two. A code is a small float of the value divided by its scale:
//   m        sign, 4 exponent and 3 mantissa bits;     sqrt(v)   4 exponent and 4 mantissa bits
// with gradual underflow (exponent field 0 is linear down to zero), 15 octaves of full precision and 3 or 4 more below.
// Both ways are integer shifts on the float's bits, no table, so that everything vectorises. Because a scale is a power of
// two, a code's value survives another scale: moments -> codes -> moments changes no bit as long as it stays in the range.
// Rounding is stochastic, with noise that is a pure function of (seed, step, element): a decay of 0.1 % a step, far below the
// codes' resolution, is right on average, and a resumed run is bitwise the uninterrupted one. A second moment above zero never
// rounds to zero: its step would explode.
//
// Memory is passed over once, a block in two loops: `update` leaves it as floats in the first cache, with the largest |m| and
// sqrt(v), which give the scales and tell whether its gradient is finite; `write` codes it. Measured on Zen 3 (AVX2): one loop in
// registers, with the scales bounded beforehand, runs out of registers and takes a tenth longer; Newton steps for the square
// root and the quotient, up to a sixth. Vectors are the compiler's own (vector_size), 16, 8 or 4 floats wide; only what it has
// no good code for (square roots, narrowing to bytes, streaming stores) has intrinsics, each beside its portable form.

#include <pybind11/pybind11.h>  // alone: torch's own headers take a minute to compile, and addresses are all that is needed

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "lanes.h"

namespace {

// 64 well-mixed bits of x (the finaliser of splitmix64)
inline uint64_t mix(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  return x ^ (x >> 31);
}

constexpr uint32_t kGolden = 0x9e3779b9u;
constexpr float kDelta = 0x1p-14f;                // m: the smallest value of full precision
constexpr int32_t kDeltaBits = (127 - 14) << 23;  // its bits
constexpr int32_t kFloorBits = (127 - 15) << 23;  // of 2^-15, the smallest sqrt(v)
constexpr float kSmallestScale = 0x1p-100f;       // below, a whole block counts as zero
constexpr float kLarge = 0x1p60f;                 // squares stay finite; a gradient beyond counts as this
constexpr int64_t kFew = 1 << 15;                 // elements that one thread does sooner than two agree on
constexpr int kShiftM = 20, kShiftV = 19;         // of a float's bits, to the last of a code

// Codes -> values in units of the scale.
inline float decode_m(int8_t code) {  // A - delta where the exponent field is 0, else A / 2
  const float a = bits<float>((std::abs(code) << kShiftM) + kDeltaBits);
  return std::copysign(std::min(a - kDelta, a * 0.5f), static_cast<float>(code));
}
inline float decode_v(uint8_t code) { return bits<float>((code << kShiftV) + kFloorBits); }

// Values in units of the scale, below 2 -> codes, to nearest.
inline int8_t encode_m(float x) {
  const float a = std::fabs(x);
  const int32_t b = std::max(bits<int32_t>(a * 2.0f), bits<int32_t>(a + kDelta)) - kDeltaBits;
  const int32_t code = std::min((b + (1 << (kShiftM - 1))) >> kShiftM, 127);
  return static_cast<int8_t>(x < 0.0f ? -code : code);
}
inline uint8_t encode_v(float x) {
  return static_cast<uint8_t>(std::clamp((bits<int32_t>(x) + (1 << (kShiftV - 1)) - kFloorBits) >> kShiftV, 0, 255));
}

// The smallest power of two whose largest code (1.875 times it, 1.9375 times it) reaches `most`.
template <int kShift>
inline float scale_of(float most) {
  const float scale = bits<float>((bits<uint32_t>(most) + ((1u << kShift) - 1u)) & 0x7f800000u);
  return scale < kSmallestScale ? 0.0f : scale;
}

inline float inverse(float scale) { return scale > 0.0f ? bits<float>((254u << 23) - bits<uint32_t>(scale)) : 0.0f; }

struct Step {
  float g_to_m, g_to_r, beta1, root_beta2, shrink;
  float root, eps;  // both over the learning rate, 0 and infinity where that is none
  uint64_t key;
};

// What a block's elements become before they are coded: parameters, first moments, square roots of the second.
struct Updated {
  alignas(64) float p[kBlock], m[kBlock], r[kBlock];
  float m_most, r_most;    // largest |m| and r
  float m_scale, v_scale;  // from them
};

inline float largest(Ints x) {
  int32_t most = 0;
  for (int i = 0; i < kLanes; ++i) most = std::max(most, x[i]);
  return bits<float>(most);
}

inline __attribute__((always_inline)) void update(const float* p, const float* g, const int8_t* m8, const uint8_t* v8, float m_scale, float v_scale,
                   const Step& s, Updated& to) {
  const float m_unit = m_scale * s.beta1, v_unit = v_scale * s.root_beta2;  // moments decode decayed
  const float m_delta = kDelta * m_unit, m_half = 0.5f * m_unit;
  const float g_to_m = s.g_to_m, g_to_r = s.g_to_r, shrink = s.shrink, root = s.root, eps = s.eps;
  Ints m_most = {}, r_most = {};
  for (int i = 0; i < kBlock; i += kLanes) {
    const Ints mc = load_codes(m8 + i), vc = load_codes(v8 + i);
    const Floats a = bits<Floats>((absolute(mc) << kShiftM) + kDeltaBits), m1 = a * m_unit - m_delta, m2 = a * m_half;
    const Floats old_m = bits<Floats>(bits<Ints>(m1 < m2 ? m1 : m2) | (mc & INT32_MIN));
    const Floats old_r = bits<Floats>((vc << kShiftV) + kFloorBits) * v_unit;
    const Floats grad = load<Floats>(g + i), h = grad * g_to_r;
    const Floats m = grad * g_to_m + old_m, r = square_root(old_r * old_r + h * h);
    const Floats new_p = load<Floats>(p + i) * shrink - m / (r * root + eps);
    store(to.p + i, new_p);
    store(to.m + i, m);
    store(to.r + i, r);
    m_most = larger(m_most, bits<Ints>(m) & INT32_MAX);
    r_most = larger(r_most, bits<Ints>(r));
  }
  to.m_most = largest(m_most);
  to.r_most = largest(r_most);
}

// Again, for a block whose moments would be too large to square. False when a gradient is not finite.
__attribute__((noinline)) bool update_large(const float* p, const float* g, const int8_t* m8, const uint8_t* v8,
                                            float m_scale, float v_scale, const Step& s, Updated& to) {
  float clamped[kBlock];
  for (int i = 0; i < kBlock; ++i) {
    if (!std::isfinite(g[i])) return false;
    clamped[i] = std::min(std::max(g[i], -kLarge), kLarge);
  }
  update(p, clamped, m8, v8, m_scale, v_scale, s, to);
  return true;
}

// Writes an updated block: parameters, codes, scales and, unless `copy` is null, the 16-bit copy.
inline __attribute__((always_inline)) void write(const Updated& x, float* p, int8_t* m8, uint8_t* v8, float* m_scale,
                                                 float* v_scale, uint16_t* copy, bool stream, uint32_t start) {
  *m_scale = x.m_scale;
  *v_scale = x.v_scale;
  const float m_up = inverse(x.m_scale), v_up = inverse(x.v_scale), m_up2 = 2.0f * m_up;
  Words noise;
  for (int i = 0; i < kLanes; ++i) noise[i] = start + static_cast<uint32_t>(i) * kGolden;
  for (int i = 0; i < kBlock; i += kGroup) {
    Ints m_codes[kParts], v_codes[kParts];
    Floats new_p[kParts];
#pragma GCC unroll 8
    for (int k = 0; k < kParts; ++k) {
      const int j = i + k * kLanes;
      const Floats m = load<Floats>(x.m + j), a = bits<Floats>(bits<Ints>(m) & INT32_MAX), r = load<Floats>(x.r + j);
      const Ints b = larger(bits<Ints>(a * m_up2), bits<Ints>(a * m_up + kDelta));
      m_codes[k] = with_sign((b + (bits<Ints>(noise >> (32 - kShiftM)) - kDeltaBits)) >> kShiftM, m);
      v_codes[k] = (bits<Ints>(r * v_up) + (bits<Ints>(noise) & ((1 << kShiftV) - 1))) >> kShiftV;
      noise += static_cast<uint32_t>(kLanes) * kGolden;
      new_p[k] = load<Floats>(x.p + j);
      store(p + j, new_p[k]);
    }
    store_m_codes(m_codes, m8 + i);
    store_v_codes<(kFloorBits >> kShiftV)>(v_codes, v8 + i);
    if (copy != nullptr) store_copy(new_p, copy + i, stream);
  }
}

// A whole parameter's arrays, or a padded copy of its last block.
struct Arrays {
  float* p;
  const float* g;
  int8_t* m8;
  uint8_t* v8;
  float *m_scale, *v_scale;
  uint16_t* copy;  // may be null
};

// Steps full blocks first .. last - 1, which `number` onwards draw noise; returns how many were left alone. A block is written
// while the next one is updated, so that neither waits for the other's last results.
int64_t step_blocks(const Arrays& a, int64_t first, int64_t last, uint64_t number, const Step& s) {
  Updated x[2];
  bool done[2] = {};
  int64_t left = 0;
  const bool stream = reinterpret_cast<uintptr_t>(a.copy) % 32 == 0;
  for (int64_t b = first; b <= last; ++b) {
    if (b < last) {
      const int64_t i = b * kBlock;
      Updated& to = x[b & 1];
      update(a.p + i, a.g + i, a.m8 + i, a.v8 + i, a.m_scale[b], a.v_scale[b], s, to);
      done[b & 1] = true;
      if (__builtin_expect(!(to.m_most < kLarge && to.r_most < kLarge), 0)) {
        done[b & 1] = update_large(a.p + i, a.g + i, a.m8 + i, a.v8 + i, a.m_scale[b], a.v_scale[b], s, to);
        left += !done[b & 1];
      }
      to.m_scale = scale_of<kShiftM>(to.m_most);
      to.v_scale = scale_of<kShiftV>(to.r_most);
    }
    if (b > first && done[(b - 1) & 1]) {
      const int64_t i = (b - 1) * kBlock;
      const uint32_t start = static_cast<uint32_t>(mix(s.key + number + static_cast<uint64_t>(b - 1 - first)) >> 32);
      write(x[(b - 1) & 1], a.p + i, a.m8 + i, a.v8 + i, a.m_scale + b - 1, a.v_scale + b - 1, a.copy ? a.copy + i : nullptr,
            stream, start);
    }
  }
  return left;
}

template <typename T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// Where one parameter's states are: codes [n], scales [ceil(n / kBlock)].
struct States {
  int8_t* m8;
  uint8_t* v8;
  float *m_scale, *v_scale;
  States(uintptr_t m8, uintptr_t v8, uintptr_t m_scale, uintptr_t v_scale)
      : m8(at<int8_t>(m8)), v8(at<uint8_t>(v8)), m_scale(at<float>(m_scale)), v_scale(at<float>(v_scale)) {}
};

}  // namespace

// Whether all n floats are finite, by their exponent bits.
bool all_finite(uintptr_t x, int64_t n) {
  const float* g = at<float>(x);
  uint32_t worst = 0;
#pragma omp parallel for simd reduction(max : worst) schedule(static) if (parallel : n > kFew)
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t e = bits<uint32_t>(g[i]) & 0x7f800000u;
    worst = e > worst ? e : worst;
  }
  return worst < 0x7f800000u;
}

// Updates `p` [n] and its states in place, from the gradient `g` [n]; writes `copy` [n] bfloat16 unless it is 0. Threads share
// blocks, so the result does not depend on their number. Returns how many blocks were left alone: their gradient is not finite.
int64_t step(uintptr_t p_, uintptr_t g_, const States& to, uintptr_t copy_, int64_t n, double lr, double beta1, double beta2,
             double eps, double decay, int64_t t, int64_t seed) {
  float* p = at<float>(p_);
  const float* g = at<float>(g_);
  uint16_t* copy = at<uint16_t>(copy_);
  const int64_t full = n / kBlock;
  const double correction1 = 1.0 - std::pow(beta1, static_cast<double>(t));
  const double rate = lr / correction1, correction2 = 1.0 - std::pow(beta2, static_cast<double>(t));
  const Step s{static_cast<float>(1.0 - beta1),
               static_cast<float>(std::sqrt(1.0 - beta2)),
               static_cast<float>(beta1),
               static_cast<float>(std::sqrt(beta2)),
               static_cast<float>(1.0 - lr * decay),
               rate > 1e-30 ? static_cast<float>(1.0 / (rate * std::sqrt(correction2))) : 0.0f,
               rate > 1e-30 ? static_cast<float>(eps / rate) : std::numeric_limits<float>::infinity(),
               mix(static_cast<uint64_t>(seed) + mix(static_cast<uint64_t>(t)))};
  const Arrays a{p, g, to.m8, to.v8, to.m_scale, to.v_scale, copy};
  int64_t left = 0;
#pragma omp parallel reduction(+ : left) if (n > kFew)
  {
    const int64_t threads = omp_get_num_threads(), thread = omp_get_thread_num();
    const int64_t first = full * thread / threads, last = full * (thread + 1) / threads;
    left += step_blocks(a, first, last, static_cast<uint64_t>(first), s);
  }
  if (const int64_t i = full * kBlock, rest = n - i; rest > 0) {  // the last, partial block: on a padded copy
    float last_p[kBlock] = {}, last_g[kBlock] = {};
    int8_t last_m[kBlock] = {};
    uint8_t last_v[kBlock] = {};
    uint16_t last_copy[kBlock];
    std::memcpy(last_p, p + i, rest * sizeof(float));
    std::memcpy(last_g, g + i, rest * sizeof(float));
    std::memcpy(last_m, to.m8 + i, rest);
    std::memcpy(last_v, to.v8 + i, rest);
    const Arrays padded{last_p, last_g, last_m, last_v, to.m_scale + full, to.v_scale + full, copy ? last_copy : nullptr};
    const int64_t left_last = step_blocks(padded, 0, 1, static_cast<uint64_t>(full), s);
    left += left_last;
    if (left_last == 0) {
      std::memcpy(p + i, last_p, rest * sizeof(float));
      std::memcpy(to.m8 + i, last_m, rest);
      std::memcpy(to.v8 + i, last_v, rest);
      if (copy) std::memcpy(copy + i, last_copy, rest * sizeof(uint16_t));
    }
  }
  return left;
}

// The states as fp32: first moments `m` [n], second moments `v` [n] (squared).
void expand(const States& from, uintptr_t m_, uintptr_t v_, int64_t n) {
  float *m = at<float>(m_), *v = at<float>(v_);
#pragma omp parallel for schedule(static) if (parallel : n > kFew)
  for (int64_t i = 0; i < n; ++i) {
    const float r = decode_v(from.v8[i]) * from.v_scale[i / kBlock];
    m[i] = decode_m(from.m8[i]) * from.m_scale[i / kBlock];
    v[i] = std::max(r * r, r > 0.0f ? 0x1p-149f : 0.0f);
  }
}

// The inverse: the codes nearest to fp32 moments `m` [n] and `v` [n] >= 0, all finite.
void compress(const States& to, uintptr_t m_, uintptr_t v_, int64_t n) {
  const float *m = at<float>(m_), *v = at<float>(v_);
  const int64_t blocks = (n + kBlock - 1) / kBlock;
#pragma omp parallel for schedule(static) if (parallel : n > kFew)
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t end = std::min(n, (b + 1) * kBlock);
    float m_most = 0.0f, r_most = 0.0f;
    for (int64_t i = b * kBlock; i < end; ++i) {
      m_most = std::max(m_most, std::fabs(m[i]));
      r_most = std::max(r_most, std::sqrt(v[i]));
    }
    to.m_scale[b] = scale_of<kShiftM>(m_most);
    to.v_scale[b] = scale_of<kShiftV>(r_most);
    const float m_up = inverse(to.m_scale[b]), v_up = inverse(to.v_scale[b]);
    for (int64_t i = b * kBlock; i < end; ++i) {
      to.m8[i] = encode_m(m[i] * m_up);
      to.v8[i] = encode_v(std::sqrt(v[i]) * v_up);
    }
  }
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  namespace py = pybind11;
  using released = py::call_guard<py::gil_scoped_release>;
  py::class_<States>(module, "States").def(py::init<uintptr_t, uintptr_t, uintptr_t, uintptr_t>());
  module.def("all_finite", &all_finite, released());
  module.def("step", &step, released());
  module.def("expand", &expand, released());
  module.def("compress", &compress, released());
  module.attr("lanes") = kLanes;
}
