// Vectors of 64 bytes, one text to a lane, and products of small matrices of them. Every lane does the same operations in the
// same order, whatever stands in its neighbours.
#pragma once

#include <cstdint>

#if defined(__SSE__)
#include <xmmintrin.h>
#endif

#if defined(__AVX512F__)
constexpr int kNative = 64;
#elif defined(__AVX__)
constexpr int kNative = 32;
#else
constexpr int kNative = 16;
#endif
constexpr int kParts = 64 / kNative;

template <class T>
constexpr int64_t kLanes = 64 / sizeof(T);

// While it lives, this thread's results too small for a normal number are zero: adjoints die away over the steps of a text, and
// arithmetic on subnormal numbers takes ten times as long on x86.
struct NoSubnormals {
#if defined(__SSE__)
  const unsigned before = _mm_getcsr();
  NoSubnormals() { _mm_setcsr(before | 0x8040u); }
  ~NoSubnormals() { _mm_setcsr(before); }
#endif
};

template <class T>
struct Lanes {
  typedef T Native __attribute__((vector_size(kNative)));
  Native part[kParts];

  Lanes() = default;
  explicit Lanes(T x) {
    for (int k = 0; k < kParts; ++k) part[k] = x - Native{};
  }
  T get(int64_t lane) const { return part[lane * sizeof(T) / kNative][lane % (kNative / sizeof(T))]; }
  void set(int64_t lane, T x) { part[lane * sizeof(T) / kNative][lane % (kNative / sizeof(T))] = x; }
};

#define REDHEART_OPERATOR(op)                                                  \
  template <class T>                                                           \
  inline Lanes<T>& operator op##=(Lanes<T>& a, const Lanes<T>& b) {            \
    for (int k = 0; k < kParts; ++k) a.part[k] op## = b.part[k];               \
    return a;                                                                  \
  }                                                                            \
  template <class T>                                                           \
  inline Lanes<T> operator op(Lanes<T> a, const Lanes<T>& b) {                 \
    return a op## = b;                                                         \
  }                                                                            \
  template <class T>                                                           \
  inline Lanes<T> operator op(Lanes<T> a, T b) {                               \
    for (int k = 0; k < kParts; ++k) a.part[k] op## = b;                       \
    return a;                                                                  \
  }
REDHEART_OPERATOR(+)
REDHEART_OPERATOR(-)
REDHEART_OPERATOR(*)
REDHEART_OPERATOR(/)
#undef REDHEART_OPERATOR

template <class T>
inline Lanes<T> operator*(T a, const Lanes<T>& b) {
  return b * a;
}

// Which texts have a token at a step; all have the step behind the last.
template <class T>
struct Active {
  using Bits = decltype(typename Lanes<T>::Native{} < typename Lanes<T>::Native{});
  Bits part[kParts];  // all bits of a lane, or none
  bool any = false, all = true;

  Active(const bool* mask, int64_t first, int64_t texts, int64_t steps, int64_t step) {
    for (int64_t l = 0; l < kLanes<T>; ++l) {
      const bool on = step == steps || mask[(first + (l < texts ? l : texts - 1)) * steps + step];
      part[l * sizeof(T) / kNative][l % (kNative / sizeof(T))] = on ? -1 : 0;
      any = any || on;
      all = all && on;
    }
  }
  Lanes<T> choose(const Lanes<T>& yes, const Lanes<T>& no) const {
    Lanes<T> out;
    for (int k = 0; k < kParts; ++k) out.part[k] = part[k] ? yes.part[k] : no.part[k];
    return out;
  }
  Lanes<T> only(const Lanes<T>& yes) const { return choose(yes, Lanes<T>(0)); }
};

// A matrix of lanes, or of scalars that all lanes share: element (i, j) stands at i row + j column.
template <class X>
struct Matrix {
  const X* at;
  int64_t row, column;
};
template <class X>
Matrix(const X*, int64_t, int64_t) -> Matrix<X>;

template <int kColumns, class T, class A, class B>
inline void columns(Lanes<T>* out, const A* a, int64_t a_step, const B* b, int64_t b_row, int64_t b_column, int64_t inner) {
  Lanes<T> sum[kColumns];
  for (int c = 0; c < kColumns; ++c) sum[c] = Lanes<T>(0);
  for (int64_t k = 0; k < inner; ++k)
    for (int c = 0; c < kColumns; ++c) sum[c] += a[k * a_step] * b[k * b_row + c * b_column];
  for (int c = 0; c < kColumns; ++c) out[c] = sum[c];
}

// out [n, m] = a [n, inner] b [inner, m]. kSymmetric: the product is known to be; the lower half is computed and mirrored.
template <bool kSymmetric, class T, class A, class B>
inline void product(Lanes<T>* out, Matrix<A> a, Matrix<B> b, int64_t n, int64_t m, int64_t inner) {
  for (int64_t i = 0; i < n; ++i) {
    const int64_t stop = kSymmetric ? i + 1 : m;
    const A* row = a.at + i * a.row;
    int64_t j = 0;
    for (; j + 4 <= stop; j += 4) columns<4>(out + i * m + j, row, a.column, b.at + j * b.column, b.row, b.column, inner);
    for (; j < stop; ++j) columns<1>(out + i * m + j, row, a.column, b.at + j * b.column, b.row, b.column, inner);
  }
  if (kSymmetric)
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = i + 1; j < m; ++j) out[i * m + j] = out[j * m + i];
}
