// Help for the CPU kernels: loops that the compiler turns into vectors for the machine they run on.
//
// DCGAN_CLONES before a function compiles it for AVX-512, AVX2 + FMA and plain x86-64; the loader picks one.
// That needs x86-64, GCC 12 and glibc: elsewhere, or with -DDCGAN_NO_CLONES, one plain loop is compiled.
// So no loop here names an instruction set, and a library built on one machine runs on another.
//
// Half types are widened to float piece by piece (a piece fits the L1 cache), computed on, and rounded once.
#pragma once
#include <cstdint>
#include <cstring>  // and __GLIBC__
#include <type_traits>

#include "checks.h"

#if defined(__x86_64__) && defined(__GLIBC__) && !defined(__clang__) && !defined(DCGAN_NO_CLONES)
#if __GNUC__ >= 12
#include <immintrin.h>
#define DCGAN_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#define DCGAN_AVX2 __attribute__((target("arch=x86-64-v3")))
#endif
#endif
#ifndef DCGAN_CLONES
#define DCGAN_CLONES
#endif

namespace dcgan {
struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};
template <typename T>  // what a kernel computes in
using wide_t = std::conditional_t<std::is_same_v<T, double>, double, float>;
// f(T{}) for the storage type T of `dtype`
template <typename F>
void dispatch(ScalarType dtype, const F& f) {
  switch (dtype) {
    case ScalarType::Double: return f(double{});
    case ScalarType::BFloat16: return f(bf16{});
    case ScalarType::Half: return f(fp16{});
    default: return f(float{});
  }
}
template <typename T>
const T* read_only(const OptionalTensor& t) {
  return t ? t->const_data_ptr<T>() : nullptr;
}
template <typename T>
T* writable(const OptionalTensor& t) {
  return t ? t->mutable_data_ptr<T>() : nullptr;
}

inline uint32_t bits_of(float f) {
  uint32_t u;
  std::memcpy(&u, &f, sizeof u);
  return u;
}
inline float float_of(uint32_t u) {
  float f;
  std::memcpy(&f, &u, sizeof f);
  return f;
}

inline float widen(float x) { return x; }
inline double widen(double x) { return x; }
inline float widen(bf16 x) { return float_of(uint32_t(x.bits) << 16); }
inline void round_to(bf16& y, float x) {  // to nearest even
  uint32_t u = bits_of(x), rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  y.bits = (u & 0x7fffffff) > 0x7f800000 ? uint16_t(0x7fc0) : uint16_t(rounded);
}
inline float widen(fp16 x) {  // without branches, so that a loop of it becomes vectors
  uint32_t sign = uint32_t(x.bits & 0x8000) << 16, u = uint32_t(x.bits & 0x7fff) << 13;
  uint32_t exponent = u & 0x0f800000, normal = u + 0x38000000;
  uint32_t special = normal + 0x38000000;                                               // inf and nan
  uint32_t small = bits_of(float_of(normal + 0x00800000) - float_of(0x38800000));       // 0 and subnormal
  return float_of(sign | (exponent == 0x0f800000 ? special : exponent == 0 ? small : normal));
}
inline void round_to(fp16& y, float x) {  // to nearest even
  uint32_t u = bits_of(x), sign = (u >> 16) & 0x8000, a = u & 0x7fffffff;
  uint32_t normal = (a - 0x38000000 + 0xfff + ((a >> 13) & 1)) >> 13;
  uint32_t small = bits_of(float_of(a) + 0.5f) - 0x3f000000;                            // below 2^-14
  uint32_t huge = a > 0x7f800000 ? 0x7e00 : 0x7c00;                                     // nan, or inf
  y.bits = uint16_t(sign | (a >= 0x47800000 ? huge : a < 0x38800000 ? small : normal));
}

// n halfs to floats and back; DCGAN_AVX2 marks the second form, for an instruction that no loop becomes
#ifdef DCGAN_AVX2
#define DCGAN_ELSEWHERE __attribute__((target("default")))
DCGAN_AVX2 inline void convert(const fp16* x, float* y, int64_t n) {
  int64_t i = 0;
#pragma GCC unroll 4  // a loop of five instructions runs at half the speed where it straddles a cache line of code
  for (; i + 8 <= n; i += 8)
    _mm256_storeu_ps(y + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x + i))));
  for (; i < n; ++i) y[i] = widen(x[i]);
}
DCGAN_AVX2 inline void convert(const float* x, fp16* y, int64_t n) {
  int64_t i = 0;
#pragma GCC unroll 4
  for (; i + 8 <= n; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(y + i), _mm256_cvtps_ph(_mm256_loadu_ps(x + i), 0));
  for (; i < n; ++i) round_to(y[i], x[i]);
}
#else
#define DCGAN_ELSEWHERE
#endif
DCGAN_ELSEWHERE inline void convert(const fp16* x, float* y, int64_t n) {
  for (int64_t i = 0; i < n; ++i) y[i] = widen(x[i]);
}
DCGAN_ELSEWHERE inline void convert(const float* x, fp16* y, int64_t n) {
  for (int64_t i = 0; i < n; ++i) round_to(y[i], x[i]);
}
DCGAN_CLONES inline void convert(const bf16* x, float* y, int64_t n) {
  for (int64_t i = 0; i < n; ++i) y[i] = widen(x[i]);
}
DCGAN_CLONES inline void convert(const float* x, bf16* y, int64_t n) {
  for (int64_t i = 0; i < n; ++i) round_to(y[i], x[i]);
}

// Memory keeps up with a loop that asks for what it will touch, in good time and a little at a time: the
// processor's own prefetching begins anew in each page, and a burst waits for itself. Always inlined: GCC
// takes a function that only prefetches for one without effect, and drops the call.
#ifdef __GNUC__
#define DCGAN_FETCH inline __attribute__((always_inline))
#else
#define DCGAN_FETCH inline
#endif
template <int Write, typename T>
DCGAN_FETCH void prefetch(const T* x, int64_t n) {
#ifdef __GNUC__
  for (int64_t j = 0; j < n; j += 64 / sizeof(T)) __builtin_prefetch(x + j, Write);
#endif
}
constexpr int64_t Stretch = 32;  // values between two such requests of a loop
template <int Write, int R, typename T>  // a stretch of R lines; nothing where they are a buffer
DCGAN_FETCH void prefetch_lines(const T* x, int64_t step, int64_t ahead) {
  if (ahead == 0) return;
  for (int r = 0; r < R; ++r) prefetch<Write>(x + r * step + ahead, Stretch);
}

// Up to four lines of adjacent values, `step` apart, in the type that is computed in: memory itself, or a
// buffer that holds them widened (read) or that round_lines() rounds into memory (write). The lines that are
// next in memory lie `ahead`; a buffer has 0 there, and asks for them itself.
template <typename A>
struct Lines {
  A* at;
  int64_t step, ahead;
};
template <typename T, typename A = wide_t<T>>
Lines<const A> read_lines(const T* x, int64_t step, int64_t count, int64_t n, A* buffer, int64_t ahead = 0) {
  if constexpr (std::is_same_v<T, A>) return {x, step, ahead};
  else {
    for (int64_t r = 0; r < count; ++r) {
      prefetch<0>(x + r * step + ahead, n);
      convert(x + r * step, buffer + r * n, n);
    }
    return {buffer, n, 0};
  }
}
template <typename T, typename A = wide_t<T>>
Lines<A> write_lines(T* y, int64_t step, int64_t count, int64_t n, A* buffer, int64_t ahead = 0) {
  if constexpr (std::is_same_v<T, A>) return {y, step, ahead};
  else {
    for (int64_t r = 0; r < count; ++r) prefetch<1>(y + r * step, n);
    return {buffer, n, 0};
  }
}
template <typename T, typename A = wide_t<T>>
void round_lines(T* y, int64_t step, int64_t count, int64_t n, const A* buffer) {
  if constexpr (!std::is_same_v<T, A>)
    for (int64_t r = 0; r < count; ++r) convert(buffer + r * n, y + r * step, n);
}
}  // namespace dcgan
