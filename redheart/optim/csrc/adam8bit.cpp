// One fused AdamW step over a flat fp32 parameter with 8-bit block-wise states, and the states' codes.
//
// A block is 256 elements and has two fp32 scales: the largest |m| and the largest sqrt(v). Codes hold value / scale:
//   m        sign, 4 exponent and 3 mantissa bits;     sqrt(v)   4 exponent and 4 mantissa bits
// as the top bits of a float between 2^-15 and 2, so that shifts of the float's bits code and decode them and every loop
// vectorises. Code 0 is zero. Rounding is stochastic, with noise that is a pure function of (seed, step, element): a decay of
// 0.1 % a step, far below the codes' resolution, is right on average, and a resumed run is bitwise the uninterrupted one.
// A second moment above zero never rounds to zero: its step would explode.

#include <torch/extension.h>

#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

constexpr int64_t kBlock = 256;
constexpr uint32_t kLow = 112u << 23;  // bits of 2^-15
constexpr float kTop = 1.875f;         // what the largest |m| of a block is scaled to: the largest 3-bit mantissa
constexpr float kTopV = 1.9375f;       // the largest 4-bit mantissa

inline uint32_t bits_of(float x) {
  uint32_t b;
  std::memcpy(&b, &x, 4);
  return b;
}

inline float float_of(uint32_t b) {
  float x;
  std::memcpy(&x, &b, 4);
  return x;
}

// 32 well-mixed bits of an element's number (multiply and xor-shift, two rounds)
inline uint32_t noise(uint32_t x) {
  x ^= x >> 16;
  x *= 0x7feb352du;
  x ^= x >> 15;
  x *= 0x846ca68bu;
  return x ^ (x >> 16);
}

inline uint16_t bfloat16_of(float x) {  // to nearest, ties to even
  uint32_t b = bits_of(x);
  return static_cast<uint16_t>((b + 0x7fffu + ((b >> 16) & 1u)) >> 16);
}

template <int kShift>
inline float decode(uint32_t code) {
  return code == 0 ? 0.0f : float_of((code << kShift) + kLow);
}

// |x| in [0, 2) -> code of at most 23 - kShift + 4 bits; `dither` is uniform in [0, 2^kShift)
template <int kShift>
inline uint32_t encode(float x, uint32_t dither) {
  constexpr uint32_t kMost = (1u << (27 - kShift)) - 1u;
  uint32_t b = bits_of(x) + dither;
  uint32_t code = b < kLow + (1u << kShift) ? 0u : (b - kLow) >> kShift;
  return code > kMost ? kMost : code;
}

// below the smallest code a value becomes that code with the probability that keeps its mean, else zero
template <int kShift>
inline uint32_t encode_small(float x, uint32_t dither) {
  const float least = float_of(kLow + (1u << kShift));
  const float chance = static_cast<float>(dither) * (1.0f / static_cast<float>(1u << kShift));
  return x < least ? (x > chance * least ? 1u : 0u) : encode<kShift>(x, dither);
}

struct Step {
  float lr, beta1, beta2, eps, decay, correction1, correction2;
  uint32_t key;
};

void update_block(float* p, const float* g, uint8_t* m8, uint8_t* v8, float* m_scale, float* v_scale, uint16_t* copy,
                  int64_t n, uint32_t first, const Step& s) {
  alignas(64) float m[kBlock], r[kBlock];
  const float m_unit = *m_scale * (1.0f / kTop), v_unit = *v_scale * (1.0f / kTopV);
  const float shrink = 1.0f - s.lr * s.decay, rate = s.lr / s.correction1, root = 1.0f / std::sqrt(s.correction2);
  uint32_t m_most = 0, v_most = 0;
#pragma omp simd reduction(max : m_most, v_most)
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t c = m8[i];
    const float old_m = float_of(bits_of(decode<20>(c & 127u) * m_unit) | ((c & 128u) << 24));
    const float old_r = decode<19>(v8[i]) * v_unit;
    const float new_m = s.beta1 * old_m + (1.0f - s.beta1) * g[i];
    const float new_r = std::sqrt(s.beta2 * old_r * old_r + (1.0f - s.beta2) * g[i] * g[i]);
    const float new_p = p[i] * shrink - rate * new_m / (new_r * root + s.eps);
    p[i] = new_p;
    m[i] = new_m;
    r[i] = new_r;
    const uint32_t a = bits_of(new_m) & 0x7fffffffu, b = bits_of(new_r);
    m_most = a > m_most ? a : m_most;
    v_most = b > v_most ? b : v_most;
  }
  if (copy != nullptr) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) copy[i] = bfloat16_of(p[i]);
  }
  const float new_m_scale = float_of(m_most), new_v_scale = float_of(v_most);
  *m_scale = new_m_scale;
  *v_scale = new_v_scale;
  const float m_up = new_m_scale > 0.0f ? kTop / new_m_scale : 0.0f, v_up = new_v_scale > 0.0f ? kTopV / new_v_scale : 0.0f;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t z = noise((first + static_cast<uint32_t>(i)) * 0x9e3779b9u ^ s.key);
    const float a = std::fabs(m[i]) * m_up;
    m8[i] = static_cast<uint8_t>(encode_small<20>(a, (z >> 16) << 4) | ((bits_of(m[i]) >> 31) << 7));
    const uint32_t v = encode<19>(r[i] * v_up, (z & 0xffffu) << 3);
    v8[i] = static_cast<uint8_t>(v == 0 && r[i] > 0.0f ? 1u : v);
  }
}

template <typename T>
T* data(const torch::Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}

}  // namespace

// Whether every element of an fp32 tensor is finite, by its exponent bits.
bool all_finite(const torch::Tensor& x) {
  const float* g = data<float>(x);
  const int64_t n = x.numel();
  uint32_t worst = 0;
#pragma omp parallel for simd reduction(max : worst) schedule(static)
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t e = bits_of(g[i]) & 0x7f800000u;
    worst = e > worst ? e : worst;
  }
  return worst < 0x7f800000u;
}

// Updates `p` [n] and the states in place; `copy` [n] bfloat16 or empty. Threads share blocks, so the result does not depend
// on their number.
void step(torch::Tensor p, torch::Tensor g, torch::Tensor m8, torch::Tensor v8, torch::Tensor m_scale, torch::Tensor v_scale,
          torch::Tensor copy, double lr, double beta1, double beta2, double eps, double decay, int64_t t, int64_t seed) {
  const int64_t n = p.numel(), blocks = (n + kBlock - 1) / kBlock;
  Step s{static_cast<float>(lr),
         static_cast<float>(beta1),
         static_cast<float>(beta2),
         static_cast<float>(eps),
         static_cast<float>(decay),
         static_cast<float>(1.0 - std::pow(beta1, static_cast<double>(t))),
         static_cast<float>(1.0 - std::pow(beta2, static_cast<double>(t))),
         noise(static_cast<uint32_t>(seed) * 0x85ebca6bu ^ noise(static_cast<uint32_t>(t)))};
  float *pp = data<float>(p), *gg = data<float>(g), *ms = data<float>(m_scale), *vs = data<float>(v_scale);
  uint8_t *mm = data<uint8_t>(m8), *vv = data<uint8_t>(v8);
  uint16_t* cc = copy.numel() ? data<uint16_t>(copy) : nullptr;
#pragma omp parallel for schedule(static)
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t i = b * kBlock;
    update_block(pp + i, gg + i, mm + i, vv + i, ms + b, vs + b, cc ? cc + i : nullptr, std::min(kBlock, n - i),
                 static_cast<uint32_t>(i) ^ static_cast<uint32_t>(i >> 32) * 0x27d4eb2fu, s);
  }
}

// The states as plain fp32 tensors: first moments, and second moments (squared).
void expand(torch::Tensor m8, torch::Tensor v8, torch::Tensor m_scale, torch::Tensor v_scale, torch::Tensor m, torch::Tensor v) {
  const int64_t n = m8.numel();
  const uint8_t *mm = data<uint8_t>(m8), *vv = data<uint8_t>(v8);
  const float *ms = data<float>(m_scale), *vs = data<float>(v_scale);
  float *mo = data<float>(m), *vo = data<float>(v);
#pragma omp parallel for schedule(static)
  for (int64_t i = 0; i < n; ++i) {
    const float a = decode<20>(mm[i] & 127u) * (ms[i / kBlock] * (1.0f / kTop));
    const float r = decode<19>(vv[i]) * (vs[i / kBlock] * (1.0f / kTopV));
    mo[i] = mm[i] & 128u ? -a : a;
    vo[i] = r * r;
  }
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  module.def("all_finite", &all_finite);
  module.def("step", &step, py::call_guard<py::gil_scoped_release>());
  module.def("expand", &expand);
}
