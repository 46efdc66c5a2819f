// Vectors of float32 and the three element types that activations, weights and the KV cache have.
// Knows the instruction set; knows nothing of matrices, threads or models.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace nanovllm {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef int32_t VecInt __attribute__((vector_size(kLanes * 4)));
typedef uint32_t VecBits __attribute__((vector_size(kLanes * 4)));
typedef uint16_t VecHalf __attribute__((vector_size(kLanes * 2)));

struct Bf16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

enum DType { kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2 };

// Calls f with a zero of the element type.
template <class F>
inline void with_element(long dtype, F f) {
  switch (dtype) {
    case kFloat32: return f(float{});
    case kBfloat16: return f(Bf16{});
    case kFloat16: return f(Half{});
  }
}

// Index of the first value outside [0, limit), or -1.
inline long first_outside(const int64_t* values, long count, long limit) {
  for (long i = 0; i < count; i++) {
    if (values[i] < 0 || values[i] >= limit) return i;
  }
  return -1;
}

template <class To, class From>
inline To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast between different sizes");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

inline Vec splat(float x) { return x - Vec{}; }

inline Vec max(Vec a, Vec b) { return a > b ? a : b; }

// a * b + c, rounded once where the processor can. Always called by name: a compiler left to form
// it does so or not by what is around it, and equal sums would differ.
inline Vec fma(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
  return (Vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return (Vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
  return (Vec)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}

// ---- loads: any element type to float32

inline Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline VecHalf load_bits(const void* p) {
  VecHalf v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline Vec load(const Bf16* p) {
  return bit_cast<Vec>(__builtin_convertvector(load_bits(p), VecBits) << 16);
}

inline Vec load(const Half* p) {
#if defined(__AVX512F__)
  return (Vec)_mm512_cvtph_ps(bit_cast<__m256i>(load_bits(p)));
#elif defined(__F16C__)
  return (Vec)_mm256_cvtph_ps(bit_cast<__m128i>(load_bits(p)));
#elif defined(__aarch64__)
  return (Vec)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(&p->bits)));
#else
  // Shift the exponent and mantissa into place and rescale: exact, subnormals included.
  VecBits half = __builtin_convertvector(load_bits(p), VecBits);
  VecBits sign = (half & 0x8000u) << 16;
  Vec magnitude = bit_cast<Vec>((half & 0x7fffu) << 13) * splat(0x1p112f);
  VecInt special = (half & 0x7c00u) == 0x7c00u;
  VecBits bits = bit_cast<VecBits>(magnitude) | ((VecBits)special & 0x7f800000u);
  return bit_cast<Vec>(bits | sign);
#endif
}

// ---- stores: float32 to any element type, rounded to nearest, ties to even

inline void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }

inline void store(Bf16* p, Vec v) {
#if defined(__AVX512BF16__)
  __m256bh half = _mm512_cvtneps_pbh((__m512)v);  // subnormals become 0, as in its products
  std::memcpy(p, &half, sizeof half);
#else
  VecBits bits = bit_cast<VecBits>(v);
  VecBits rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  VecBits is_nan = (VecBits)(v != v);
  VecHalf half = __builtin_convertvector((is_nan & 0x7fc0u) | (~is_nan & rounded), VecHalf);
  std::memcpy(p, &half, sizeof half);
#endif
}

inline uint16_t half_from_float(float x) {
  uint32_t bits = bit_cast<uint32_t>(x);
  uint16_t sign = uint16_t((bits >> 16) & 0x8000u);
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return sign | 0x7e00u;
  if (bits >= 0x477ff000u) return sign | 0x7c00u;  // rounds to 2^16 or is infinite
  if (bits < 0x38800000u) {                        // below 2^-14: the sum rounds at 2^-24
    float aligned = bit_cast<float>(bits) + 0.5f;
    return sign | uint16_t(bit_cast<uint32_t>(aligned) - 0x3f000000u);
  }
  return sign | uint16_t((bits - 0x38000000u + 0xfffu + ((bits >> 13) & 1u)) >> 13);
}

inline void store(Half* p, Vec v) {
#if defined(__AVX512F__)
  __m256i half = _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT);
  std::memcpy(p, &half, sizeof half);
#elif defined(__F16C__)
  __m128i half = _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
  std::memcpy(p, &half, sizeof half);
#else
  for (int i = 0; i < kLanes; i++) p[i].bits = half_from_float(v[i]);
#endif
}

// What v would be after a store and a load.
template <class T>
inline Vec rounded(Vec v) {
  if constexpr (sizeof(T) == sizeof(float)) return v;
  T buffer[kLanes];
  store(buffer, v);
  return load(buffer);
}

// ---- the last, partial vector of a row: `count` elements, the other lanes zero

template <class T>
inline Vec load_part(const T* p, int count) {
  if (count == kLanes) return load(p);
  T buffer[kLanes] = {};
  std::memcpy(buffer, p, count * sizeof(T));
  return load(buffer);
}

template <class T>
inline void store_part(T* p, Vec v, int count) {
  if (count == kLanes) return store(p, v);
  T buffer[kLanes];
  store(buffer, v);
  std::memcpy(p, buffer, count * sizeof(T));
}

// ---- sums, maxima, exponentials

inline float sum(Vec v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)v);
#endif
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; i++) v[i] += v[i + width];
  }
  return v[0];
}

inline float largest(Vec v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)v);
#endif
  float result = v[0];
  for (int i = 1; i < kLanes; i++) result = result > v[i] ? result : v[i];
  return result;
}

// e^x for x <= 88, to about 2 units in the last place; exactly 1 at 0 and exactly 0 below -110.
// 2^n * e^r with r in [-ln 2 / 2, ln 2 / 2] (Cody and Waite's reduction, Taylor coefficients).
inline Vec exp(Vec x) {
  x = max(x, splat(-200.0f));
#if defined(__AVX512F__)
  Vec n = (Vec)_mm512_roundscale_ps((__m512)(x * 1.44269504f), 0);
#else
  const Vec shift = splat(0x1.8p23f);
  Vec n = fma(x, splat(1.44269504f), shift) - shift;
#endif
  Vec r = fma(n, splat(-0x1.62ep-1f), x);
  r = fma(n, splat(-0x1.0bfbe8p-15f), r);
  Vec p = splat(1.0f / 720);
  p = fma(p, r, splat(1.0f / 120));
  p = fma(p, r, splat(1.0f / 24));
  p = fma(p, r, splat(1.0f / 6));
  p = fma(p, r, splat(0.5f));
  p = fma(p, r, splat(1.0f));
  p = fma(p, r, splat(1.0f));
#if defined(__AVX512F__)
  return (Vec)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  VecInt exponent = (__builtin_convertvector(n, VecInt) + 127) << 23;
  return x > splat(-87.0f) ? p * bit_cast<Vec>(exponent) : Vec{};
#endif
}

}  // namespace nanovllm
