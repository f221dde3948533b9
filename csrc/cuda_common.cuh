// What the two CUDA ops share: the shape of a block, 16-byte accesses, sums over a block, stream and device.
// A block has kThreads threads in kWarps warps. Every reduction combines its values in an order that depends
// on shapes, layout, alignment and the device only, never on which block ran first: results are bitwise reproducible.
#pragma once
#ifndef USE_CUDA  // then torch's headers declare the current stream and the error checks
#define USE_CUDA
#endif
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/headeronly/core/Dispatch_v2.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "checks.h"

namespace dcgan {

// Kernels are __launch_bounds__(kThreads, 1): the compiler may use 128 registers a thread (65,536 of a
// multiprocessor / 512), which keeps the values of several rows in flight.
constexpr int kThreads = 512, kLanes = 32, kWarps = kThreads / kLanes;

// The type that sums and parameters are computed in: float, double for double.
template <typename T>
using wide_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

// V neighbours in memory, read or written by one instruction: 16 bytes where V = kVector<T>.
template <typename T>
constexpr int kVector = 16 / sizeof(T);

template <typename T, int V>
struct alignas(sizeof(T) * V) Vector {
  T at[V];
};
// The built-in type of so many bytes: a load or store of one is one instruction. memcpy into a Vector costs
// none, and unlike a cast it is defined C++.
template <int bytes>
using word_t = std::conditional_t<bytes == 16, uint4, std::conditional_t<bytes == 8, uint2,
               std::conditional_t<bytes == 4, unsigned, unsigned short>>>;
template <int V, typename T>
__device__ Vector<T, V> load(const T* from) {
  const auto word = *reinterpret_cast<const word_t<V * sizeof(T)>*>(from);
  Vector<T, V> values;
  memcpy(&values, &word, sizeof word);
  return values;
}
template <typename T, int V>
__device__ void store(T* to, const Vector<T, V>& values) {
  word_t<V * sizeof(T)> word;
  memcpy(&word, &values, sizeof word);
  __stwb(reinterpret_cast<word_t<V * sizeof(T)>*>(to), word);  // `*to = word` is compiled to 4-byte stores
}
template <int V, typename T>
bool is_aligned(const T* data) {
  return reinterpret_cast<uintptr_t>(data) % (sizeof(T) * V) == 0;
}

template <typename A>
__device__ A warp_sum(A x) {
  for (int step = kLanes / 2; step > 0; step /= 2) x += __shfl_xor_sync(~0u, x, step);
  return x;
}
// The sum over all threads of the block, in every one of them. All must call it.
template <typename A>
__device__ A block_sum(A x) {
  __shared__ A slots[kWarps];
  x = warp_sum(x);
  __syncthreads();  // the slots may still be read for the sum before this one
  if (threadIdx.x % kLanes == 0) slots[threadIdx.x / kLanes] = x;
  __syncthreads();
  x = 0;
  for (int warp = 0; warp < kWarps; ++warp) x += slots[warp];
  return x;
}

// What is reduced: moments in the forward pass, sums in the backward pass.
template <typename A>
struct alignas(4 * sizeof(A)) Moments {
  A count, mean, m2;  // m2: sum of squared distances from the mean
};
template <typename A>
__device__ void merge(Moments<A>& a, const Moments<A>& b) {
  if (b.count == 0) return;
  A count = a.count + b.count, weight = b.count / count, distance = b.mean - a.mean;
  a.m2 += b.m2 + distance * (distance * (a.count * weight));
  a.mean += distance * weight;
  a.count = count;
}
template <typename A>
__device__ Moments<A> shuffle(const Moments<A>& a, int mask) {
  return {__shfl_xor_sync(~0u, a.count, mask), __shfl_xor_sync(~0u, a.mean, mask),
          __shfl_xor_sync(~0u, a.m2, mask)};
}
template <typename A>
struct alignas(2 * sizeof(A)) Sums {
  A dz, dz_x;  // of dz and of dz * (x - mean)
};
template <typename A>
__device__ void merge(Sums<A>& a, const Sums<A>& b) {
  a.dz += b.dz;
  a.dz_x += b.dz_x;
}
template <typename A>
__device__ Sums<A> shuffle(const Sums<A>& a, int mask) {
  return {__shfl_xor_sync(~0u, a.dz, mask), __shfl_xor_sync(~0u, a.dz_x, mask)};
}

// Merges over the warps: lane l of warp 0 gets the result for channel l of the tile. All threads must call.
template <typename P, int kChannels>
__device__ P merge_warps(P mine, P (&slots)[kWarps][kChannels]) {
  const int warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  for (int half = kWarps / 2; half > 0; half /= 2) {
    if (lane < kChannels && warp >= half && warp < 2 * half) slots[warp][lane] = mine;
    __syncthreads();
    if (lane < kChannels && warp < half) merge(mine, slots[warp + half][lane]);
  }
  return mine;
}
// A vector of C values that may be absent, in x's own dtype or in the wide one.
template <typename T>
struct Param {
  void* data;
  bool is_wide;
  __device__ wide_t<T> get(int64_t c, wide_t<T> otherwise) const {
    if (!data) return otherwise;
    return is_wide ? static_cast<wide_t<T>*>(data)[c] : wide_t<T>(static_cast<T*>(data)[c]);
  }
  __device__ void set(int64_t c, wide_t<T> value) const {
    if (is_wide)
      static_cast<wide_t<T>*>(data)[c] = value;
    else
      static_cast<T*>(data)[c] = T(value);
  }
};
template <typename T>
Param<T> param(const OptionalTensor& t, ScalarType x) {
  return {t ? t->data_ptr() : nullptr, t && t->scalar_type() != x};
}
inline Tensor in_row_order(const Tensor& t) { return as(t, t.scalar_type()); }
inline OptionalTensor in_row_order(const OptionalTensor& t) { return t ? in_row_order(*t) : t; }

// Calls f with a zero of the C++ type that `type` names: kernels are launched from templates, not from the
// body of a macro, which the commas of <<<blocks, threads>>> would take apart.
template <typename F>
void dispatch(ScalarType type, const F& f) {
  THO_DISPATCH_V2(type, "dcgan", AT_WRAP([&] { f(scalar_t{}); }), AT_FLOATING_TYPES, ScalarType::Half,
                  ScalarType::BFloat16);
}
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline cudaStream_t current_stream(const Tensor& t) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}
inline int multiprocessors(const Tensor& t) {
  int count = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, t.get_device_index()));
  return count;
}
}  // namespace dcgan
