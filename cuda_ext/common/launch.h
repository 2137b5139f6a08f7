// One way to launch a kernel, and the few CUDA names whose spelling differs under the host emulation (tests only).
//
//   PMF_LAUNCH((kernel<float, 2>), grid, block, shared_bytes, stream, args...)   -> PmfStatus, 0 or the CUDA error
//   PMF_DYNAMIC_SHARED(float, name);                                             the launch's shared_bytes, 32-aligned as wmma wants
//
// Every launch checks its error; nothing is swallowed. A launch with an empty grid does nothing and succeeds.
#pragma once
#include <cstdint>

#include "abi.h"
#include "host_device.h"

#if defined(PMF_EMULATE)
#include "../emulation/cuda_emulation.h"
#define PMF_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  ((void)(stream), pmf::emulation::launch((grid), (block), (shared_bytes), [=] { PMF_UNPACK kernel(__VA_ARGS__); }))
#define PMF_DYNAMIC_SHARED(T, name) T* name = reinterpret_cast<T*>(pmf::emulation::dynamic_shared())
#else
#include <cuda_fp16.h>
#include <cuda_bf16.h>
#include <mma.h>
#define PMF_LAUNCH(kernel, grid, block, shared_bytes, stream, ...)                                        \
  ([&]() -> int {                                                                                         \
    const dim3 pmf_grid = (grid);                                                                         \
    if (pmf_grid.x == 0 || pmf_grid.y == 0 || pmf_grid.z == 0) return PMF_OK;                             \
    PMF_UNPACK kernel<<<pmf_grid, (block), (shared_bytes), static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__); \
    return pmf::cuda_status(cudaGetLastError());                                                          \
  }())
#define PMF_DYNAMIC_SHARED(T, name)                              \
  extern __shared__ __align__(32) unsigned char pmf_shared_bytes[]; \
  T* name = reinterpret_cast<T*>(pmf_shared_bytes)
#endif
#define PMF_UNPACK(...) __VA_ARGS__

// Return from an exported function at the first failing step.
#define PMF_TRY(step)                       \
  do {                                      \
    const int pmf_status = (step);          \
    if (pmf_status != PMF_OK) return pmf_status; \
  } while (0)

namespace pmf {

inline int cuda_status(cudaError_t error) {
  return error == cudaSuccess ? PMF_OK : PMF_CUDA_ERROR_BASE + static_cast<int>(error);
}

// Blocks of `per_block` that cover `count`.
inline unsigned blocks_for(int64_t count, int64_t per_block) {
  return static_cast<unsigned>((count + per_block - 1) / per_block);
}

inline int zero_async(void* data, int64_t bytes, void* stream) {
  if (bytes == 0) return PMF_OK;
  return cuda_status(cudaMemsetAsync(data, 0, static_cast<size_t>(bytes), static_cast<cudaStream_t>(stream)));
}

constexpr unsigned kFullWarp = 0xffffffffu;
constexpr int kWarp = 32;

}  // namespace pmf
