// Vectors of floats and what has no good portable code: bytes to and from lanes, square roots. Each intrinsic stands beside its
// portable form, and both give the same bits. Included once, by adam8bit.cpp.
//
// States of one byte lie in groups of 64 so that nothing has to cross a register: byte 4 l + j of a group belongs to element
// 2 l + (j & 1) + 32 (j >> 1). A vector of 4 kLanes bytes then holds, in its dwords, the elements whose 16-bit numbers are the
// lower (j = 0) and upper (j = 1) halves of one vector of dwords, and of another 32 elements on (j = 2, 3): widening is a shift
// or a mask, and narrowing packs within 128 bits. A turn of every loop is four such vectors, whatever their width.

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
constexpr int kGroup = 64;

#if defined(REDHEART_LANES)  // for tests: any width gives the same bits
constexpr int kLanes = REDHEART_LANES;
#elif defined(__AVX512BW__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
constexpr int kTurn = 4 * kLanes;  // elements, and bytes, of a turn

typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
typedef uint8_t Bytes __attribute__((vector_size(4 * kLanes)));

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

// The byte of a block's element.
inline constexpr int place(int element) {
  const int in_group = element % kGroup, in_half = in_group % 32;
  return element - in_group + 4 * (in_half / 2) + (in_half & 1) + 2 * (in_group / 32);
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

// What a shuffle of bytes makes of dwords: byte kFrom as byte kTo, the other three zero.
template <int kFrom, int kTo>
struct Pick {
  alignas(64) uint32_t of[kLanes] = {};
  constexpr Pick() {
    constexpr uint32_t kMask = 0xffu << (8 * kTo), kFirst = (0x80808080u & ~kMask) | (static_cast<uint32_t>(kFrom) << (8 * kTo));
    for (uint32_t i = 0; i < kLanes; ++i) of[i] = kFirst + (i % 4 * 0x04040404u & kMask);
  }
};
template <int kFrom, int kTo>
constexpr Pick<kFrom, kTo> kPick{};

// Byte kFrom of every dword as its byte kTo, the other three zero.
template <int kFrom, int kTo>
inline Words byte_of(Words x) {
  if constexpr (kFrom != kTo) {
#if defined(__AVX512BW__)
    if constexpr (kLanes == 16) return bits<Words>(_mm512_shuffle_epi8(bits<__m512i>(x), load<__m512i>(kPick<kFrom, kTo>.of)));
#endif
#if defined(__AVX2__)
    if constexpr (kLanes == 8) return bits<Words>(_mm256_shuffle_epi8(bits<__m256i>(x), load<__m256i>(kPick<kFrom, kTo>.of)));
#endif
  }
  constexpr uint32_t kMask = 0xffu << (8 * kTo);
  constexpr int kUp = 8 * (kTo - kFrom);
  if constexpr (kUp >= 0) return (x << kUp) & kMask;
  return (x >> -kUp) & kMask;
}

// Numbers below 2^15, less `floor`, saturated to bytes: x[j] becomes byte j of the dwords.
inline Words to_bytes(const Ints* x, uint32_t floor) {
#if defined(__AVX512BW__)
  if constexpr (kLanes == 16) {
    const __m512i less = _mm512_set1_epi16(static_cast<int16_t>(floor));
    const __m512i a = _mm512_subs_epu16(_mm512_packus_epi32(bits<__m512i>(x[0]), bits<__m512i>(x[1])), less);
    const __m512i b = _mm512_subs_epu16(_mm512_packus_epi32(bits<__m512i>(x[2]), bits<__m512i>(x[3])), less);
    const __m128i turned = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    return bits<Words>(_mm512_shuffle_epi8(_mm512_packus_epi16(a, b), _mm512_broadcast_i32x4(turned)));
  }
#endif
#if defined(__AVX2__)
  if constexpr (kLanes == 8) {
    const __m256i less = _mm256_set1_epi16(static_cast<int16_t>(floor));
    const __m256i a = _mm256_subs_epu16(_mm256_packus_epi32(bits<__m256i>(x[0]), bits<__m256i>(x[1])), less);
    const __m256i b = _mm256_subs_epu16(_mm256_packus_epi32(bits<__m256i>(x[2]), bits<__m256i>(x[3])), less);
    const __m128i turned = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    return bits<Words>(_mm256_shuffle_epi8(_mm256_packus_epi16(a, b), _mm256_broadcastsi128_si256(turned)));
  }
#endif
  Words packed = {};
  for (int j = 0; j < 4; ++j)
    for (int i = 0; i < kLanes; ++i)
      packed[i] |= static_cast<uint32_t>(std::clamp(x[j][i] - static_cast<int32_t>(floor), 0, 255)) << (8 * j);
  return packed;
}

// 16-bit numbers in the upper halves of even and odd elements, side by side in memory order.
inline Words halves(Words even, Words odd) {
#if defined(__AVX512BW__)
  if constexpr (kLanes == 16) return bits<Words>(_mm512_mask_blend_epi16(0xaaaaaaaau, bits<__m512i>(even >> 16), bits<__m512i>(odd)));
#endif
#if defined(__AVX2__)
  if constexpr (kLanes == 8) return bits<Words>(_mm256_blend_epi16(bits<__m256i>(even >> 16), bits<__m256i>(odd), 0xaa));
#endif
  return (even >> 16) | (odd & 0xffff0000u);
}

// The second bytes of four vectors' dwords as bytes 0 to 3 of dwords.
inline Words second_bytes(const Words* w) { return byte_of<1, 0>(w[0]) | byte_of<1, 1>(w[1]) | byte_of<1, 2>(w[2]) | byte_of<1, 3>(w[3]); }

// Floats in memory order (two vectors) as their even and odd elements, and back.
inline void part(Floats a, Floats b, Floats* even, Floats* odd) {
  Ints evens, odds;
  for (int i = 0; i < kLanes; ++i) evens[i] = 2 * i, odds[i] = 2 * i + 1;
  *even = __builtin_shuffle(a, b, evens);
  *odd = __builtin_shuffle(a, b, odds);
}
inline void join(Floats even, Floats odd, Floats* a, Floats* b) {
  Ints first, second;
  for (int i = 0; i < kLanes; ++i) first[i] = i / 2 + (i & 1) * kLanes, second[i] = first[i] + kLanes / 2;
  *a = __builtin_shuffle(even, odd, first);
  *b = __builtin_shuffle(even, odd, second);
}

inline Words larger(Words a, Words b) { return a > b ? a : b; }

// The larger of |b| and a, which is not negative.
inline Floats larger_size(Floats a, Floats b) {
#if defined(__AVX512DQ__)
  if constexpr (kLanes == 16) return bits<Floats>(_mm512_range_ps(bits<__m512>(a), bits<__m512>(b), 0b1011));
#endif
  return bits<Floats>(larger(bits<Words>(a), bits<Words>(b) & static_cast<uint32_t>(INT32_MAX)));
}

inline Bytes smaller(Bytes a, Bytes b) { return a < b ? a : b; }

inline uint32_t most_of(Words x) {
  uint32_t most = x[0];
  for (int i = 1; i < kLanes; ++i) most = std::max(most, x[i]);
  return most;
}
inline uint32_t least_of(Bytes x) {
#if defined(__AVX2__)
  if constexpr (kLanes >= 8) {
    __m128i least = load<__m128i>(&x);
    for (int i = 16; i < 4 * kLanes; i += 16) least = _mm_min_epu8(least, load<__m128i>(reinterpret_cast<const char*>(&x) + i));
    least = _mm_min_epu8(least, _mm_srli_epi16(least, 8));
    return static_cast<uint32_t>(_mm_cvtsi128_si32(_mm_minpos_epu16(_mm_and_si128(least, _mm_set1_epi16(255))))) & 0xffffu;
  }
#endif
  uint32_t least = 255;
  for (int i = 0; i < 4 * kLanes; ++i) least = std::min<uint32_t>(least, x[i]);
  return least;
}

}  // namespace
