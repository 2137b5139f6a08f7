// Per-element maths and parameter layout of the bias-free ReLU MLP, shared by host and device.
//
//   h_0 = x,   h_{l+1} = relu(W_l h_l)  for l < L-1,   y = W_{L-1} h_{L-1}
//
// W_l is (dims[l+1], dims[l]) row-major; `params` is W_0, W_1, ... one after the other.
// relu(NaN) = NaN and the gate passes a gradient only where h > 0 (or h is NaN), as torch does.
#pragma once
#include <cstdint>

#include "host_device.h"

namespace pmf {

template <class T>
PMF_HD T relu(T value) {
  return value < T(0) ? T(0) : value;
}

// Gradient of relu from its *output* h: zero at h == 0.
template <class T>
PMF_HD T relu_gate(T h, T grad) {
  return h <= T(0) ? T(0) : grad;
}

// First parameter of layer `layer`; with layer == n_layers, the number of parameters.
PMF_HD int64_t layer_offset(const int64_t* dims, int64_t layer) {
  int64_t offset = 0;
  for (int64_t l = 0; l < layer; ++l) offset += dims[l] * dims[l + 1];
  return offset;
}

}  // namespace pmf
