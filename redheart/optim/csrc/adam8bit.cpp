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
// Memory is passed over once, a block in three loops: `update_moments` leaves its moments as floats in the first cache, with the
// largest and smallest r, which say whether its gradient was finite; `update_weights` makes q of m; `write_codes` codes both.

#include <pybind11/pybind11.h>  // alone: torch's own headers take a minute to compile, and addresses are all that is needed

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "blocks.h"

namespace {

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
int64_t step_all(const Arrays& a, int64_t n, int64_t begin, const Step& s) {
  const int64_t full = n / kBlock;
  int64_t left = 0;
#pragma omp parallel reduction(+ : left) if (n > kFew)
  {
    const int64_t threads = omp_get_num_threads(), thread = omp_get_thread_num();
    const int64_t first = full * thread / threads, last = full * (thread + 1) / threads;
    left += step_blocks<kSplit, Gradient>(a, first, last, static_cast<uint64_t>(begin + first), s);
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
  if (step_blocks<kSplit, Gradient>(padded, 0, 1, static_cast<uint64_t>(begin + full), s) > 0) return left + 1;
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
// blocks, so the result does not depend on their number; `begin`: the number of the first block in its parameter. Returns how many
// blocks were left alone: their gradient is not finite.
int64_t step(uintptr_t p, uintptr_t high, uintptr_t low, uintptr_t g, bool is_bf16, const States& to, int64_t n, int64_t begin, double scale,
             double lr, double beta1, double beta2, double eps, double decay, int64_t t, int64_t seed) {
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
  if (low) return is_bf16 ? step_all<true, uint16_t>(a, n, begin, s) : step_all<true, float>(a, n, begin, s);
  return is_bf16 ? step_all<false, uint16_t>(a, n, begin, s) : step_all<false, float>(a, n, begin, s);
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
    Scales scales = scales_of(1.0f, r_most, r_least, false);
    const int32_t shift = scales.shift, base = bits<int32_t>(scales.base);
    for (int64_t i = 0; i < size; ++i) {
      const int32_t code = scales.base > 0.0f ? std::clamp((bits<int32_t>(r[i]) - base + (1 << (shift - 1))) >> shift, 0, 255) : 0;
      to.r8[byte_at(start + i, n)] = static_cast<uint8_t>(code);
      const float coded = bits<float>((code << shift) + base);
      q[i] = coded > 0.0f ? m[start + i] / coded : 0.0f;
      q_most = std::max(q_most, std::fabs(q[i]));
    }
    scales = scales_of(q_most, r_most, r_least, false);
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

// The inverse, of elements `start` to `start` + m - 1 of n, to the nearest of the pair (ties to even); false, with nothing said of
// what was written, where one is not finite.
bool split_weights(uintptr_t high_, uintptr_t low_, uintptr_t p_, int64_t start, int64_t m, int64_t n) {
  uint16_t* high = at<uint16_t>(high_);
  int8_t* low = at<int8_t>(low_);
  const float* p = at<float>(p_);
  bool all = true;
#pragma omp parallel for schedule(static) reduction(&& : all) if (parallel : m > kFew)
  for (int64_t i = 0; i < m; ++i) {
    const uint32_t x = bits<uint32_t>(p[i]), y = x + 0x7fu + ((x >> 8) & 1u), w = (y & 0xffffff00u) + 0x8000u;
    all = all && (x & 0x7f800000u) != 0x7f800000u && (w & 0x7f800000u) != 0x7f800000u;
    high[start + i] = static_cast<uint16_t>(w >> 16);
    low[byte_at(start + i, n)] = static_cast<int8_t>(((w >> 8) & 0xffu) ^ 0x80u);
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
