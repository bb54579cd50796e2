// Vectors of floats and what has no good portable code: square roots, codes from and to bytes, streaming stores. Each intrinsic
// stands beside its portable form. Included once, by adam8bit.cpp.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

constexpr int64_t kBlock = 256;

#if defined(REDHEART_LANES)  // for tests: any width gives the same bits
constexpr int kLanes = REDHEART_LANES;
#elif defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
constexpr int kGroup = 32;  // elements of one turn of the coding loop: codes are narrowed together
constexpr int kParts = kGroup / kLanes;

typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));

template <typename To, typename From>
inline To bits(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  std::memcpy(&y, &x, sizeof y);
  return y;
}

template <typename T>
inline T load(const void* at) {
  T x;
  std::memcpy(&x, at, sizeof x);
  return x;
}

template <typename T>
inline void store(void* at, T x) {
  std::memcpy(at, &x, sizeof x);
}

inline Floats square_root(Floats x) {
#if defined(__AVX512F__)
  if constexpr (kLanes == 16) return bits<Floats>(_mm512_sqrt_ps(bits<__m512>(x)));
#endif
#if defined(__AVX2__)
  if constexpr (kLanes == 8) return bits<Floats>(_mm256_sqrt_ps(bits<__m256>(x)));
#endif
  for (int i = 0; i < kLanes; ++i) x[i] = std::sqrt(x[i]);
  return x;
}

// kLanes bytes as integers, signed or not as the bytes are.
template <typename Byte>
inline Ints load_codes(const Byte* at) {
  [[maybe_unused]] constexpr bool kSigned = std::is_signed_v<Byte>;
#if defined(__AVX512F__)
  if constexpr (kLanes == 16) {
    const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(at));
    return bits<Ints>(kSigned ? _mm512_cvtepi8_epi32(x) : _mm512_cvtepu8_epi32(x));
  }
#endif
#if defined(__AVX2__)
  if constexpr (kLanes == 8) {
    const __m128i x = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(at));
    return bits<Ints>(kSigned ? _mm256_cvtepi8_epi32(x) : _mm256_cvtepu8_epi32(x));
  }
#endif
  Ints x;
  for (int i = 0; i < kLanes; ++i) x[i] = at[i];
  return x;
}

inline void store_bytes(Ints x, void* to) {  // the low byte of each
#if defined(__AVX512F__)
  if constexpr (kLanes == 16) return store(to, _mm512_cvtepi32_epi8(bits<__m512i>(x)));
#endif
  for (int i = 0; i < kLanes; ++i) static_cast<uint8_t*>(to)[i] = static_cast<uint8_t>(x[i]);
}

#if defined(__AVX2__)
inline __m256i in_order(__m256i packed) {  // undoes the 128-bit lanes of two levels of packing
  return _mm256_permutevar8x32_epi32(packed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}
#endif

// kGroup first moments' codes, in [-127, 127], to bytes.
inline void store_m_codes(const Ints* c, int8_t* to) {
#if defined(__AVX2__)
  if constexpr (kLanes == 8) {
    const __m256i a = _mm256_packs_epi32(bits<__m256i>(c[0]), bits<__m256i>(c[1]));
    const __m256i b = _mm256_packs_epi32(bits<__m256i>(c[2]), bits<__m256i>(c[3]));
    store(to, in_order(_mm256_packs_epi16(a, b)));
    return;
  }
#endif
  for (int k = 0; k < kParts; ++k) store_bytes(c[k], to + k * kLanes);
}

// kGroup second moments' codes, plus kFloor, to bytes; what is below kFloor becomes 0.
template <int kFloor>
inline void store_v_codes(const Ints* c, uint8_t* to) {
#if defined(__AVX2__)
  if constexpr (kLanes == 8) {
    const __m256i floor = _mm256_set1_epi16(kFloor);
    const __m256i a = _mm256_subs_epu16(_mm256_packus_epi32(bits<__m256i>(c[0]), bits<__m256i>(c[1])), floor);
    const __m256i b = _mm256_subs_epu16(_mm256_packus_epi32(bits<__m256i>(c[2]), bits<__m256i>(c[3])), floor);
    store(to, in_order(_mm256_packus_epi16(a, b)));
    return;
  }
#endif
  for (int k = 0; k < kParts; ++k) {
    const Ints above = c[k] - kFloor;
    store_bytes(above > 0 ? above : Ints{}, to + k * kLanes);
  }
}

// kGroup parameters as bfloat16, to nearest, ties to even; `stream` (32-byte aligned) leaves the caches alone.
inline void store_copy(const Floats* p, uint16_t* to, bool stream) {
  Words w[kParts];
  for (int k = 0; k < kParts; ++k) {
    const Words b = bits<Words>(p[k]);
    w[k] = (b + 0x7fffu + ((b >> 16) & 1u)) >> 16;
  }
#if defined(__AVX2__)
  if constexpr (kLanes == 8) {
    for (int k = 0; k < kParts; k += 2) {
      const __m256i packed = _mm256_packus_epi32(bits<__m256i>(w[k]), bits<__m256i>(w[k + 1]));
      const __m256i halves = _mm256_permute4x64_epi64(packed, 0xd8);
      __m256i* at = reinterpret_cast<__m256i*>(to + k * kLanes);
      stream ? _mm256_stream_si256(at, halves) : _mm256_storeu_si256(at, halves);
    }
    return;
  }
#endif
  for (int k = 0; k < kParts; ++k) {
#if defined(__AVX512F__)
    if constexpr (kLanes == 16) {
      const __m256i halves = _mm512_cvtepi32_epi16(bits<__m512i>(w[k]));
      __m256i* at = reinterpret_cast<__m256i*>(to + k * kLanes);
      stream ? _mm256_stream_si256(at, halves) : _mm256_storeu_si256(at, halves);
      continue;
    }
#endif
    for (int i = 0; i < kLanes; ++i) to[k * kLanes + i] = static_cast<uint16_t>(w[k][i]);
  }
}

inline Ints larger(Ints a, Ints b) { return a > b ? a : b; }

inline Ints absolute(Ints x) {
#if defined(__AVX2__)
  if constexpr (kLanes == 8) return bits<Ints>(_mm256_abs_epi32(bits<__m256i>(x)));
#endif
  return x < 0 ? -x : x;
}

// c with the sign of x; 0 where x is +0
inline Ints with_sign(Ints c, Floats x) {
#if defined(__AVX2__)
  if constexpr (kLanes == 8) return bits<Ints>(_mm256_sign_epi32(bits<__m256i>(c), bits<__m256i>(x)));
#endif
  return bits<Ints>(x) < 0 ? -c : c;
}

}  // namespace
