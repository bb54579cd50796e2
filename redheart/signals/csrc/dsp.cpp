// The filter bank of dsp.py, where the formulas stand, forward and backward over the frames of a text.
//
// Serial on purpose: a text's result depends on nothing but that text, neither on the number of threads nor on its batch, and
// the time is small beside the network's. Plain C symbols and addresses: nothing of Python or torch is needed to compile it.
// All of it in double, whatever comes in; a series is one signal of one text.

#include <cmath>
#include <cstdint>
#include <vector>

namespace {

constexpr double kTwoPi = 6.283185307179586476925286766559;

// A control between two bounds, evenly over its logarithm: low (high / low)^sigmoid(raw).
struct Control {
  double value, slope;  // slope: d value / d raw
  Control(double raw, const double* bounds) {
    const double share = 1.0 / (1.0 + std::exp(-raw)), span = std::log(bounds[1] / bounds[0]);
    value = bounds[0] * std::exp(span * share);
    slope = value * span * share * (1.0 - share);
  }
};

// 1 - exp(-1 / (tau rate)) and its derivative by tau.
struct Gain {
  double value, slope;
  Gain(double tau, double rate) {
    value = -std::expm1(-1.0 / (tau * rate));
    slope = (value - 1.0) / (tau * tau * rate);
  }
};

template <class T>
struct Series {  // of controls [6, C], from where the series' own begin
  Control attack_s, release_s, frequency_hz, decay_s;
  double swell, swing;
  Gain attack, release, loss;
  double angle, pole_re, pole_im;
  Series(const T* raw, int64_t stride, const double* bounds, double rate)
      : attack_s(raw[0], bounds),
        release_s(raw[stride], bounds + 2),
        frequency_hz(raw[2 * stride], bounds + 4),
        decay_s(raw[3 * stride], bounds + 6),
        swell(raw[4 * stride]),
        swing(raw[5 * stride]),
        attack(attack_s.value, rate),
        release(release_s.value, rate),
        loss(decay_s.value, rate),
        angle(kTwoPi * frequency_hz.value / rate),
        pole_re((1.0 - loss.value) * std::cos(angle)),
        pole_im((1.0 - loss.value) * std::sin(angle)) {}
};

struct State {  // after a step
  double x, follower, ring_re, ring_im;
};

template <class T>
inline State advance(const Series<T>& s, const State& before, double drive, bool real) {
  State now;
  now.x = real ? std::tanh(drive) : 0.0;
  const double level = std::fabs(now.x);
  const Gain& gain = level > before.follower ? s.attack : s.release;
  now.follower = before.follower + gain.value * (level - before.follower);
  now.ring_re = s.pole_re * before.ring_re - s.pole_im * before.ring_im + now.x;
  now.ring_im = s.pole_im * before.ring_re + s.pole_re * before.ring_im;
  return now;
}

// drive, out [B, L, C]; mask [B, L]; raw [B, 6, C]; bounds [4, 2]
template <class T>
void bank(const T* drive, const bool* mask, const T* raw, const double* bounds, double rate, int64_t rows, int64_t steps,
          int64_t width, T* out) {
  for (int64_t b = 0; b < rows; ++b, mask += steps, drive += steps * width, out += steps * width, raw += 6 * width)
    for (int64_t c = 0; c < width; ++c) {
      const Series<T> s(raw + c, width, bounds, rate);
      State state = {0.0, 0.0, 0.0, 0.0};
      for (int64_t t = 0; t < steps; ++t) {
        state = advance(s, state, drive[t * width + c], mask[t]);
        const double heard = s.swell * state.follower + s.swing * s.loss.value * state.ring_re;
        out[t * width + c] = static_cast<T>(mask[t] ? heard : 0.0);  // filters ring on behind the last token
      }
    }
}

template <class T>
void bank_backward(const T* grad, const T* drive, const bool* mask, const T* raw, const double* bounds, double rate, int64_t rows,
                   int64_t steps, int64_t width, T* grad_drive, T* grad_raw) {
  std::vector<State> states(steps + 1);
  states[0] = {0.0, 0.0, 0.0, 0.0};
  for (int64_t b = 0; b < rows; ++b) {
    for (int64_t c = 0; c < width; ++c) {
      const Series<T> s(raw + c, width, bounds, rate);
      for (int64_t t = 0; t < steps; ++t) states[t + 1] = advance(s, states[t], drive[t * width + c], mask[t]);
      double d_swell = 0, d_swing = 0, d_loss = 0, d_attack = 0, d_release = 0, d_re = 0, d_im = 0;  // by the quantity's name
      double follower = 0, ring_re = 0, ring_im = 0;                                                // adjoints of the state
      for (int64_t t = steps - 1; t >= 0; --t) {
        const State &now = states[t + 1], &before = states[t];
        const double g = mask[t] ? static_cast<double>(grad[t * width + c]) : 0.0;
        d_swell += g * now.follower;
        d_swing += g * s.loss.value * now.ring_re;
        d_loss += g * s.swing * now.ring_re;
        follower += g * s.swell;
        ring_re += g * s.swing * s.loss.value;
        const double level = std::fabs(now.x), climb = level - before.follower;
        const bool rising = climb > 0.0;
        (rising ? d_attack : d_release) += follower * climb;
        const double gain = rising ? s.attack.value : s.release.value;
        double d_x = ring_re + (now.x > 0.0 ? 1.0 : now.x < 0.0 ? -1.0 : 0.0) * follower * gain;
        follower *= 1.0 - gain;
        d_re += ring_re * before.ring_re + ring_im * before.ring_im;
        d_im += ring_im * before.ring_re - ring_re * before.ring_im;
        const double re = ring_re * s.pole_re + ring_im * s.pole_im;
        ring_im = ring_im * s.pole_re - ring_re * s.pole_im;
        ring_re = re;
        d_x *= mask[t] ? 1.0 - now.x * now.x : 0.0;
        grad_drive[t * width + c] = static_cast<T>(d_x);
      }
      const double cosine = std::cos(s.angle), sine = std::sin(s.angle), rho = 1.0 - s.loss.value;
      const double d_angle = rho * (d_im * cosine - d_re * sine);
      d_loss -= d_re * cosine + d_im * sine;
      T* to = grad_raw + c;
      to[0] = static_cast<T>(d_attack * s.attack.slope * s.attack_s.slope);
      to[width] = static_cast<T>(d_release * s.release.slope * s.release_s.slope);
      to[2 * width] = static_cast<T>(d_angle * kTwoPi / rate * s.frequency_hz.slope);
      to[3 * width] = static_cast<T>(d_loss * s.loss.slope * s.decay_s.slope);
      to[4 * width] = static_cast<T>(d_swell);
      to[5 * width] = static_cast<T>(d_swing);
    }
    mask += steps, drive += steps * width, grad += steps * width, grad_drive += steps * width;
    raw += 6 * width, grad_raw += 6 * width;
  }
}

}  // namespace

#define REDHEART_SIGNALS(T, name)                                                                                              \
  extern "C" void bank_##name(const T* drive, const bool* mask, const T* raw, const double* bounds, double rate, int64_t rows, \
                              int64_t steps, int64_t width, T* out) {                                                          \
    bank<T>(drive, mask, raw, bounds, rate, rows, steps, width, out);                                                          \
  }                                                                                                                            \
  extern "C" void bank_backward_##name(const T* grad, const T* drive, const bool* mask, const T* raw, const double* bounds,    \
                                       double rate, int64_t rows, int64_t steps, int64_t width, T* grad_drive, T* grad_raw) {  \
    bank_backward<T>(grad, drive, mask, raw, bounds, rate, rows, steps, width, grad_drive, grad_raw);                          \
  }

REDHEART_SIGNALS(float, float32)
REDHEART_SIGNALS(double, float64)
