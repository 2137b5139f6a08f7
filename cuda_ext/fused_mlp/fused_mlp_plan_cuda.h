// Sizes and places that follow from the widths of the network, as the GPU kernels need them.
//
// Tensor cores take tiles of 16 x 16, so every width is padded to a multiple of 16 with zeros. Rows of weights and of
// activations are 8 values longer than that: the 8 rows that a warp reads at once then lie in different banks.
#pragma once
#include <cstdint>

#include "launch.h"

namespace pmf {

constexpr int kTile = 16, kRowPad = 8;
constexpr int kMaxWidth = 256, kMaxLayers = 8;

PMF_HD int padded_width(int width) { return (width + kTile - 1) / kTile * kTile; }
PMF_HD int padded_stride(int width) { return padded_width(width) + kRowPad; }

// Weights of layer l: (padded_width(dims[l + 1]), padded_stride(dims[l])), 16-bit, from weights_at[l] on.
struct MlpPlan {
  int n_layers;
  int dims[kMaxLayers + 1];
  int params_at[kMaxLayers + 1];   // in the float parameters; the last is their number
  int weights_at[kMaxLayers + 1];  // in the packed weights; the last is their number
  int tile_at[kMaxLayers + 2];     // activation l of a row tile, in values per row; the last is the width of all

  PMF_HD int tiles(int l) const { return padded_width(dims[l]) / kTile; }
  PMF_HD int stride(int l) const { return padded_stride(dims[l]); }
};

// False if the kernels do not support these widths.
inline bool make_plan(const int64_t* dims, int64_t n_layers, MlpPlan* plan) {
  if (n_layers < 1 || n_layers > kMaxLayers) return false;
  *plan = {};
  plan->n_layers = static_cast<int>(n_layers);
  for (int64_t l = 0; l <= n_layers; ++l) {
    if (dims[l] < 1 || dims[l] > kMaxWidth) return false;
    plan->dims[l] = static_cast<int>(dims[l]);
    plan->tile_at[l + 1] = plan->tile_at[l] + padded_stride(plan->dims[l]);
  }
  for (int l = 0; l < plan->n_layers; ++l) {
    plan->params_at[l + 1] = plan->params_at[l] + plan->dims[l] * plan->dims[l + 1];
    plan->weights_at[l + 1] = plan->weights_at[l] + padded_width(plan->dims[l + 1]) * plan->stride(l);
  }
  return true;
}

// Width of the widest activation with its padding, in values.
inline int widest_stride(const MlpPlan& plan, int n_activations) {
  int widest = 0;
  for (int l = 0; l < n_activations; ++l) widest = widest > plan.stride(l) ? widest : plan.stride(l);
  return widest;
}

// Shared memory that a block may have, and the number of processors.
inline int device_limits(int* shared_bytes, int* processors) {
  int device = 0;
  PMF_TRY(cuda_status(cudaGetDevice(&device)));
  PMF_TRY(cuda_status(cudaDeviceGetAttribute(shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device)));
  return cuda_status(cudaDeviceGetAttribute(processors, cudaDevAttrMultiProcessorCount, device));
}

template <class Kernel>
int allow_shared(Kernel kernel, int64_t bytes) {
  if (bytes <= 48 * 1024) return PMF_OK;
  return cuda_status(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)));
}

}  // namespace pmf
