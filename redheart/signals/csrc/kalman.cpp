// The Kalman filter's last posterior, as kalman.py defines it, forward and backward over the steps of a text; and its transition's
// bound. Texts stand side by side in vectors of 64 bytes, one in each lane.
//
// Serial on purpose: a text's result depends on nothing but that text, neither on the number of threads nor on its batch, and
// the time is small beside the network's. Plain C symbols and addresses: nothing of Python or torch is needed to compile it.

#include <cmath>
#include <cstdint>
#include <vector>

#include "lanes.h"

namespace {

// Rows of a measurement with independent noise: H [rows, S] of all texts, values and precisions [texts, …, rows].
template <class T>
struct Rows {
  const T *h, *value, *precision;
  int64_t count;
};

// Gathers element i of row (text, step) of [texts, steps, width] into lane `text`; the lanes behind the last text repeat it.
template <class T>
inline Lanes<T> gather(const T* from, int64_t first, int64_t texts, int64_t steps, int64_t step, int64_t width, int64_t i) {
  Lanes<T> out;
  for (int64_t l = 0; l < kLanes<T>; ++l)
    out.set(l, from[((first + (l < texts ? l : texts - 1)) * steps + step) * width + i]);
  return out;
}

template <class T>
inline void scatter(const Lanes<T>& x, T* to, int64_t first, int64_t texts, int64_t steps, int64_t step, int64_t width, int64_t i) {
  for (int64_t l = 0; l < texts; ++l) to[((first + l) * steps + step) * width + i] = x.get(l);
}

// One group of texts.
template <class T>
struct Filter {
  using V = Lanes<T>;
  const int64_t size, area, first, texts;
  std::vector<V> x, p, u, w, z;      // [S], and [S, S]
  std::vector<V> v, r, a, q, curved;  // [S], and [S, rows]

  Filter(int64_t size, int64_t rows, int64_t first, int64_t texts)
      : size(size), area(size * size), first(first), texts(texts), x(size), p(area), u(area), w(area), z(area), v(size), r(size),
        a(size * (rows > 1 ? rows : 1)), q(a.size()), curved(a.size()) {}

  // x, P -> F x, F P F' + Q
  void predict(const T* f, const T* noise) {
    product<false>(u.data(), Matrix{f, size, 1}, Matrix{p.data(), size, 1}, size, size, size);
    product<true>(p.data(), Matrix{u.data(), size, 1}, Matrix{f, 1, size}, size, size, size);
    for (int64_t i = 0; i < size; ++i)
      for (int64_t j = 0; j < size; ++j) p[i * size + j] += V((noise[i * size + j] + noise[j * size + i]) / 2);
    product<false>(v.data(), Matrix{x.data(), 0, 1}, Matrix{f, 1, size}, 1, size, size);
    x = v;
  }

  // A measurement, row by row: with a = P h and w = precision / (1 + precision h'a): x += a w (z - h'x), P -= w a a'.
  void update(const Rows<T>& rows, int64_t steps, int64_t step) {
    for (int64_t m = 0; m < rows.count; ++m) {
      const T* h = rows.h + m * size;
      const V precision = gather(rows.precision, first, texts, steps, step, rows.count, m);
      V innovation = gather(rows.value, first, texts, steps, step, rows.count, m), spread(0);
      product<false>(a.data(), Matrix{h, 0, 1}, Matrix{p.data(), size, 1}, 1, size, size);
      for (int64_t i = 0; i < size; ++i) {
        spread += a[i] * h[i];
        innovation -= x[i] * h[i];
      }
      const V gain = precision / (V(1) + precision * spread);
      for (int64_t i = 0; i < size; ++i) {
        const V scaled = a[i] * gain;
        x[i] += scaled * innovation;
        for (int64_t j = 0; j <= i; ++j) p[i * size + j] = p[j * size + i] = p[i * size + j] - scaled * a[j];
      }
    }
  }

  // Adjoints of a measurement: (x, P) are the moments after it, (dx, dP) their adjoints, which become those before it.
  // P = (P0^-1 + J)^-1 and x = P (P0^-1 x0 + eta), so that with W = I - P J: dP0 = W' dP W + sym(W'dx (eta - J x)'), dx0 = W' dx;
  // J = sum of precision h h' and eta = sum of precision z h give the rest. All lanes; d_h [rows, S] adds up where active.
  void update_backward(const V* x, const V* p, V* dx, V* dp, const Rows<T>& rows, int64_t steps, int64_t step, const Active<T>& active,
                       T* d_value, T* d_precision, V* d_h) {
    const int64_t count = rows.count;
    if (count == 0) return;
    product<false>(a.data(), Matrix{p, size, 1}, Matrix{rows.h, 1, size}, size, count, size);        // A = P H'
    product<false>(q.data(), Matrix{dp, size, 1}, Matrix{a.data(), count, 1}, size, count, size);    // dP A
    product<false>(curved.data(), Matrix{p, size, 1}, Matrix{q.data(), count, 1}, size, count, size);  // P dP A
    product<false>(v.data(), Matrix{dx, 0, 1}, Matrix{p, size, 1}, 1, size, size);                   // P dx
    for (int64_t i = 0; i < size; ++i) r[i] = V(0);
    for (int64_t m = 0; m < count; ++m) {
      const T* h = rows.h + m * size;
      const V precision = gather(rows.precision, first, texts, steps, step, count, m);
      V rest = gather(rows.value, first, texts, steps, step, count, m), heard(0), bend(0);
      for (int64_t i = 0; i < size; ++i) {
        rest -= x[i] * h[i];
        heard += v[i] * h[i];
        bend += a[i * count + m] * q[i * count + m];
      }
      scatter(active.only(precision * heard), d_value, first, texts, steps, step, count, m);
      scatter(active.only(heard * rest - bend), d_precision, first, texts, steps, step, count, m);
      for (int64_t i = 0; i < size; ++i) {
        r[i] += precision * rest * h[i];
        d_h[m * size + i] += active.only(precision * (v[i] * rest - heard * x[i] - (curved[i * count + m] + curved[i * count + m])));
        a[i * count + m] *= precision;  // A becomes P H' diag(precision)
      }
    }
    product<false>(w.data(), Matrix{a.data(), count, 1}, Matrix{rows.h, size, 1}, size, size, count);  // P J
    for (int64_t i = 0; i < area; ++i) w[i] = V(i % (size + 1) == 0 ? 1 : 0) - w[i];
    product<false>(v.data(), Matrix{dx, 0, 1}, Matrix{w.data(), size, 1}, 1, size, size);
    product<false>(u.data(), Matrix{dp, size, 1}, Matrix{w.data(), size, 1}, size, size, size);
    product<true>(z.data(), Matrix{w.data(), 1, size}, Matrix{u.data(), size, 1}, size, size, size);
    for (int64_t i = 0; i < size; ++i) {
      dx[i] = active.choose(v[i], dx[i]);
      for (int64_t j = 0; j < size; ++j)
        dp[i * size + j] = active.choose(z[i * size + j] + (v[i] * r[j] + v[j] * r[i]) * T(0.5), dp[i * size + j]);
    }
  }

  // Adjoints of a prediction from (x, P), the moments before it.
  void predict_backward(const V* x, const V* p, V* dx, V* dp, const T* f, const Active<T>& active, V* d_f, V* d_q) {
    product<false>(u.data(), Matrix{dp, size, 1}, Matrix{f, size, 1}, size, size, size);       // dP F
    product<false>(w.data(), Matrix{u.data(), size, 1}, Matrix{p, size, 1}, size, size, size);  // dP F P
    product<true>(z.data(), Matrix{f, 1, size}, Matrix{u.data(), size, 1}, size, size, size);   // F' dP F
    product<false>(v.data(), Matrix{dx, 0, 1}, Matrix{f, size, 1}, 1, size, size);
    for (int64_t i = 0; i < size; ++i)
      for (int64_t j = 0; j < size; ++j) {
        const int64_t at = i * size + j;
        d_q[at] += active.only(dp[at]);
        d_f[at] += active.only(w[at] + w[at] + dx[i] * x[j]);
      }
    for (int64_t i = 0; i < area; ++i) dp[i] = active.choose(z[i], dp[i]);
    for (int64_t i = 0; i < size; ++i) dx[i] = active.choose(v[i], dx[i]);
  }
};

// moments [groups, steps + 1, S + S S, lanes]: after every step and after the last measurement; none are kept where it is null.
template <class T>
void kalman(const T* mean0, const T* variance0, const T* f, const T* noise, const Rows<T>& each, const Rows<T>& last,
            const bool* mask, int64_t batch, int64_t steps, int64_t size, T* mean, T* covariance, T* moments) {
  using V = Lanes<T>;
  const NoSubnormals now;
  V* keep = reinterpret_cast<V*>(moments);
  for (int64_t first = 0; first < batch; first += kLanes<T>) {
    const int64_t texts = batch - first < kLanes<T> ? batch - first : kLanes<T>;
    Filter<T> s(size, each.count > last.count ? each.count : last.count, first, texts);
    for (int64_t i = 0; i < s.area; ++i) s.p[i] = V(0);
    for (int64_t i = 0; i < size; ++i) {
      s.x[i] = gather(mean0, first, texts, 1, 0, size, i);
      s.p[i * size + i] = gather(variance0, first, texts, 1, 0, size, i);
    }
    std::vector<V> x, p;
    for (int64_t t = 0; t <= steps; ++t) {
      const Active<T> active(mask, first, texts, steps, t);
      if (active.any) {
        if (!active.all) x = s.x, p = s.p;
        if (t < steps) s.predict(f, noise);
        s.update(t < steps ? each : last, t < steps ? steps : 1, t < steps ? t : 0);
        if (!active.all) {
          for (int64_t i = 0; i < size; ++i) s.x[i] = active.choose(s.x[i], x[i]);
          for (int64_t i = 0; i < s.area; ++i) s.p[i] = active.choose(s.p[i], p[i]);
        }
      }
      if (keep != nullptr) {
        for (int64_t i = 0; i < size; ++i) *keep++ = s.x[i];
        for (int64_t i = 0; i < s.area; ++i) *keep++ = s.p[i];
      }
    }
    for (int64_t i = 0; i < size; ++i) scatter(s.x[i], mean, first, texts, 1, 0, size, i);
    for (int64_t i = 0; i < s.area; ++i) scatter(s.p[i], covariance, first, texts, 1, 0, s.area, i);
  }
}

template <class T>
struct Gradients {
  T *mean0, *variance0, *f, *noise, *h, *value, *precision, *last_h, *last_value, *last_precision;
};

// Adds the active texts' parts of a gradient that they share, text by text: the same sum however they stand in groups.
template <class T>
void add_texts(const std::vector<Lanes<T>>& parts, int64_t texts, T* to) {
  for (int64_t l = 0; l < texts; ++l)
    for (size_t i = 0; i < parts.size(); ++i) to[i] += parts[i].get(l);
}

template <class T>
void kalman_backward(const T* grad_mean, const T* grad_covariance, const T* mean0, const T* variance0, const T* f, const Rows<T>& each,
                     const Rows<T>& last, const bool* mask, const T* moments, int64_t batch, int64_t steps, int64_t size,
                     const Gradients<T>& d) {
  using V = Lanes<T>;
  const NoSubnormals now;
  const int64_t area = size * size, stride = size + area;
  for (int64_t i = 0; i < area; ++i) d.f[i] = d.noise[i] = 0;
  for (int64_t i = 0; i < each.count * size; ++i) d.h[i] = 0;
  for (int64_t i = 0; i < last.count * size; ++i) d.last_h[i] = 0;
  const V* kept = reinterpret_cast<const V*>(moments);
  for (int64_t first = 0; first < batch; first += kLanes<T>, kept += (steps + 1) * stride) {
    const int64_t texts = batch - first < kLanes<T> ? batch - first : kLanes<T>;
    Filter<T> s(size, each.count > last.count ? each.count : last.count, first, texts);
    std::vector<V> dx(size), dp(area), start(stride, V(0));
    std::vector<V> d_f(area, V(0)), d_q(area, V(0)), d_h(each.count * size, V(0)), d_last(last.count * size, V(0));
    for (int64_t i = 0; i < size; ++i) {
      dx[i] = gather(grad_mean, first, texts, 1, 0, size, i);
      start[i] = gather(mean0, first, texts, 1, 0, size, i);
      start[size + i * size + i] = gather(variance0, first, texts, 1, 0, size, i);
      for (int64_t j = 0; j < size; ++j)
        dp[i * size + j] = (gather(grad_covariance, first, texts, 1, 0, area, i * size + j) +
                            gather(grad_covariance, first, texts, 1, 0, area, j * size + i)) * T(0.5);
    }
    for (int64_t t = steps; t >= 0; --t) {
      const V *after = kept + t * stride, *before = t > 0 ? after - stride : start.data();
      const Active<T> active(mask, first, texts, steps, t);
      if (t == steps) {
        s.update_backward(after, after + size, dx.data(), dp.data(), last, 1, 0, active, d.last_value, d.last_precision, d_last.data());
        continue;
      }
      // without an active text the rows' gradients are still written: as zeros
      s.update_backward(after, after + size, dx.data(), dp.data(), each, steps, t, active, d.value, d.precision, d_h.data());
      s.predict_backward(before, before + size, dx.data(), dp.data(), f, active, d_f.data(), d_q.data());
    }
    for (int64_t i = 0; i < size; ++i) {
      scatter(dx[i], d.mean0, first, texts, 1, 0, size, i);
      scatter(dp[i * size + i], d.variance0, first, texts, 1, 0, size, i);
    }
    add_texts(d_f, texts, d.f);
    add_texts(d_q, texts, d.noise);
    add_texts(d_h, texts, d.h);
    add_texts(d_last, texts, d.last_h);
  }
}

// ---- The bound of a matrix ----------------------------------------------------------------------------------------------

// w [n, n] -> out = w / max(1, norm), its largest singular value `norm` and that one's derivative by w; kalman.py, `contraction`.
template <class T>
void contraction(const T* w, int64_t n, int64_t squarings, T* out, T* direction, T* norm) {
  std::vector<double> gram(n * n, 0.0), power, square(n * n);
  double trace = 0, sum = 0;
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < n; ++j)
      for (int64_t k = 0; k < n; ++k) gram[i * n + j] += static_cast<double>(w[k * n + i]) * w[k * n + j];
  power = gram;
  for (int64_t step = 0; step <= squarings; ++step) {
    trace = 0;
    for (int64_t i = 0; i < n; ++i) trace += power[i * n + i];
    if (trace == 0) break;  // of a matrix of zeros alone
    for (double& x : power) x /= trace;
    if (step == squarings) break;
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < n; ++j) {
        double entry = 0;
        for (int64_t k = 0; k < n; ++k) entry += power[i * n + k] * power[k * n + j];
        square[i * n + j] = entry;
      }
    power.swap(square);
  }
  for (int64_t i = 0; i < n * n; ++i) sum += power[i] * gram[i];
  const double largest = std::sqrt(sum), scale = largest > 1.0 ? 1.0 / largest : 1.0;
  *norm = static_cast<T>(largest);
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < n; ++j) {
      double entry = 0;
      for (int64_t k = 0; k < n; ++k) entry += w[i * n + k] * power[k * n + j];
      direction[i * n + j] = static_cast<T>(largest > 0.0 ? entry / largest : 0.0);
      out[i * n + j] = static_cast<T>(w[i * n + j] * scale);
    }
}

// The adjoint of `out` by w.
template <class T>
void contraction_backward(const T* grad, const T* out, const T* direction, const T* norm, int64_t n, T* d_w) {
  const double scale = *norm > T(1) ? 1.0 / *norm : 1.0;
  double along = 0;
  for (int64_t i = 0; i < n * n; ++i) along += static_cast<double>(grad[i]) * out[i];
  if (!(*norm > T(1))) along = 0;
  for (int64_t i = 0; i < n * n; ++i) d_w[i] = static_cast<T>(scale * (grad[i] - along * direction[i]));
}

}  // namespace

#define REDHEART_SIGNALS(T, name)                                                                                                  \
  extern "C" void contraction_##name(const T* w, int64_t n, int64_t squarings, T* out, T* direction, T* norm) {                    \
    contraction<T>(w, n, squarings, out, direction, norm);                                                                         \
  }                                                                                                                                \
  extern "C" void contraction_backward_##name(const T* grad, const T* out, const T* direction, const T* norm, int64_t n, T* d_w) { \
    contraction_backward<T>(grad, out, direction, norm, n, d_w);                                                                   \
  }                                                                                                                                \
  extern "C" void kalman_##name(const T* mean0, const T* variance0, const T* f, const T* noise, const T* h, const T* value,        \
                                const T* precision, const T* last_h, const T* last_value, const T* last_precision,                 \
                                const bool* mask, int64_t batch, int64_t steps, int64_t size, int64_t rows, int64_t last_rows,     \
                                T* mean, T* covariance, T* moments) {                                                              \
    kalman<T>(mean0, variance0, f, noise, {h, value, precision, rows}, {last_h, last_value, last_precision, last_rows}, mask,      \
              batch, steps, size, mean, covariance, moments);                                                                      \
  }                                                                                                                                \
  extern "C" void kalman_backward_##name(                                                                                          \
      const T* grad_mean, const T* grad_covariance, const T* mean0, const T* variance0, const T* f, const T* h, const T* value,    \
      const T* precision, const T* last_h, const T* last_value, const T* last_precision, const bool* mask, const T* moments,       \
      int64_t batch, int64_t steps, int64_t size, int64_t rows, int64_t last_rows, T* d_mean0, T* d_variance0, T* d_f, T* d_noise, \
      T* d_h, T* d_value, T* d_precision, T* d_last_h, T* d_last_value, T* d_last_precision) {                                     \
    kalman_backward<T>(grad_mean, grad_covariance, mean0, variance0, f, {h, value, precision, rows},                               \
                       {last_h, last_value, last_precision, last_rows}, mask, moments, batch, steps, size,                         \
                       {d_mean0, d_variance0, d_f, d_noise, d_h, d_value, d_precision, d_last_h, d_last_value, d_last_precision}); \
  }

REDHEART_SIGNALS(float, float32)
REDHEART_SIGNALS(double, float64)
