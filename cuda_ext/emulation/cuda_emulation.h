// Host emulation of the CUDA subset that the *_cuda.cu files use. For tests only: it is never part of a release build.
//
// The sources are compiled as they are by g++ (-x c++ -DPMF_EMULATE) and their kernels run on the host: the blocks of a
// grid one after the other, the threads of a block as fibres (ucontext) that run until they reach a barrier, a shuffle
// or the end. Which fibre runs next is a schedule that tests choose (forward, reverse, random), and so is the order of
// the blocks; a kernel whose result depends on it lacks a barrier. Shared memory of a launch is allocated afresh, filled
// with NaN patterns and exactly as long as asked for, so the address sanitizer sees a step beyond it.
//
// Stricter than the hardware: a thread that has ended while others wait for it, a lane named in a mask that is elsewhere
// and a barrier that not all reach are failures of the launch (status kFailed, text in pmf_emulation_failure).
// Not modelled: memory ordering between running threads, time, registers, alignment of vector accesses, fast-math.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __shared__ static
#define __constant__ static
#define __restrict__ __restrict
#define __align__(n) __attribute__((aligned(n)))

struct uint3 { unsigned x, y, z; };
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

#define PMF_VECTOR_TYPES(T, NAME)                                                       \
  struct alignas(2 * sizeof(T)) NAME##2 { T x, y; };                                    \
  struct NAME##3 { T x, y, z; };                                                        \
  struct alignas(sizeof(T) == 8 ? 16 : 4 * sizeof(T)) NAME##4 { T x, y, z, w; };        \
  inline NAME##2 make_##NAME##2(T x, T y) { return {x, y}; }                            \
  inline NAME##3 make_##NAME##3(T x, T y, T z) { return {x, y, z}; }                    \
  inline NAME##4 make_##NAME##4(T x, T y, T z, T w) { return {x, y, z, w}; }
PMF_VECTOR_TYPES(float, float)
PMF_VECTOR_TYPES(double, double)
PMF_VECTOR_TYPES(int, int)
#undef PMF_VECTOR_TYPES
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

// ---- runtime calls ---------------------------------------------------------------------------------------------------
using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16, cudaDevAttrMaxSharedMemoryPerBlockOptin = 97 };
enum cudaMemcpyKind { cudaMemcpyHostToDevice = 1, cudaMemcpyDeviceToHost = 2, cudaMemcpyDeviceToDevice = 3 };
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaMemsetAsync(void* data, int value, size_t bytes, cudaStream_t) {
  std::memset(data, value, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute, int) { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount ? 3 : 99 * 1024;  // few processors: grid-stride loops do wrap
  return cudaSuccess;
}

// ---- fibres ----------------------------------------------------------------------------------------------------------
namespace pmf::emulation {

constexpr int kFailed = 900;  // status of a launch that broke a rule of the execution model

struct Thread {
  uint3 thread_index, block_index;
  dim3 block_dim, grid_dim;
  int linear;          // in the block
  unsigned char* slots;  // of its warp: 32 slots of kSlotBytes
};
constexpr int kSlotBytes = 16;

Thread& current();
void* dynamic_shared();
void block_barrier();
void warp_barrier(unsigned mask);
[[noreturn]] void fail(const char* reason);  // ends the launch
int launch(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& body);

template <class T>
T exchange(unsigned mask, T value, int source) {
  static_assert(sizeof(T) <= kSlotBytes);
  const int lane = current().linear % 32;
  if (((mask >> lane) & 1) == 0) fail("a lane calls a warp function with a mask that does not name it");
  std::memcpy(current().slots + lane * kSlotBytes, &value, sizeof value);
  warp_barrier(mask);
  if (((mask >> source) & 1) == 0) fail("a shuffle reads from a lane that its mask does not name");
  T result;
  std::memcpy(&result, current().slots + source * kSlotBytes, sizeof result);
  warp_barrier(mask);  // nobody overwrites a slot that another lane still reads
  return result;
}

}  // namespace pmf::emulation

#define threadIdx (pmf::emulation::current().thread_index)
#define blockIdx (pmf::emulation::current().block_index)
#define blockDim (pmf::emulation::current().block_dim)
#define gridDim (pmf::emulation::current().grid_dim)
#define warpSize 32

inline void __syncthreads() { pmf::emulation::block_barrier(); }
inline void __syncwarp(unsigned mask = 0xffffffffu) { pmf::emulation::warp_barrier(mask); }
inline void __threadfence() {}
inline void __threadfence_block() {}

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  const int lane = pmf::emulation::current().linear % 32;
  return pmf::emulation::exchange(mask, value, lane / width * width + source % width);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const int lane = pmf::emulation::current().linear % 32, source = lane - static_cast<int>(delta);
  return pmf::emulation::exchange(mask, value, source < lane / width * width ? lane : source);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const int lane = pmf::emulation::current().linear % 32, source = lane + static_cast<int>(delta);
  return pmf::emulation::exchange(mask, value, source >= (lane / width + 1) * width ? lane : source);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32) {
  const int lane = pmf::emulation::current().linear % 32, source = lane ^ bits;
  return pmf::emulation::exchange(mask, value, source >= (lane / width + 1) * width ? lane : source);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  unsigned found = 0;
  const int lane = pmf::emulation::current().linear % 32;
  const int own = predicate != 0;
  std::memcpy(pmf::emulation::current().slots + lane * pmf::emulation::kSlotBytes, &own, sizeof own);
  pmf::emulation::warp_barrier(mask);
  for (int i = 0; i < 32; ++i) {
    int other = 0;
    if ((mask >> i) & 1) std::memcpy(&other, pmf::emulation::current().slots + i * pmf::emulation::kSlotBytes, sizeof other);
    found |= static_cast<unsigned>(other) << i;
  }
  pmf::emulation::warp_barrier(mask);
  return found;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) == mask; }

// ---- arithmetic ------------------------------------------------------------------------------------------------------
inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __popcll(unsigned long long v) { return __builtin_popcountll(v); }
inline int __ffs(int v) { return __builtin_ffs(v); }
inline int __clz(int v) { return v == 0 ? 32 : __builtin_clz(static_cast<unsigned>(v)); }
inline float __expf(float v) { return std::exp(v); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float v) { return 1.0f / v; }
inline float rsqrtf(float v) { return 1.0f / std::sqrt(v); }
inline int __float_as_int(float v) { int i; std::memcpy(&i, &v, 4); return i; }
inline float __int_as_float(int i) { float v; std::memcpy(&v, &i, 4); return v; }
inline unsigned __float_as_uint(float v) { unsigned i; std::memcpy(&i, &v, 4); return i; }
inline float __uint_as_float(unsigned i) { float v; std::memcpy(&v, &i, 4); return v; }
template <class T>
T __ldg(const T* at) { return *at; }
template <class T>
T min(T a, T b) { return b < a ? b : a; }
template <class T>
T max(T a, T b) { return a < b ? b : a; }

template <class T>
T atomicAdd(T* at, T value) { const T old = *at; *at = old + value; return old; }
template <class T>
T atomicMax(T* at, T value) { const T old = *at; *at = old < value ? value : old; return old; }
template <class T>
T atomicMin(T* at, T value) { const T old = *at; *at = value < old ? value : old; return old; }
template <class T>
T atomicOr(T* at, T value) { const T old = *at; *at = old | value; return old; }
template <class T>
T atomicExch(T* at, T value) { const T old = *at; *at = value; return old; }
template <class T>
T atomicCAS(T* at, T compare, T value) { const T old = *at; if (old == compare) *at = value; return old; }

#include "half_emulation.h"
#include "wmma_emulation.h"
