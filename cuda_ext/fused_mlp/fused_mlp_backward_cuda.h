// Backward of the fused MLP: a block of row tiles, 16 rows to a warp.
//
// The block recomputes the hidden activations of its rows in half, exactly as the forward does (so the gates are the
// same), and then goes back through the layers with bfloat16 operands and float sums: bfloat16 has the exponents of
// float, so small gradients do not underflow and no loss scaling is needed.
//
// Shared memory holds one tile per activation h_0 .. h_{L-1} and one for the gradient of the output. The gradient z of
// h_l takes the place of h_l, element by element, as soon as the weight gradient of layer l has been taken.
// Weight gradients z^T h are sums over rows, so all warps share the rows and divide the tiles of the matrix. They are
// summed in shared memory over all row tiles of the block, and end in one atomicAdd per weight and block: rows are
// spread over blocks, and a second pass over partial sums would cost more than a few thousand additions. Matrices too
// large for shared memory add each row tile directly. Additions of blocks come in any order: sums differ in the last
// digits from run to run.
// Gradients of `extra` with an index are sums over the rows of a ray. Rows are sorted by ray, so a lane adds up
// neighbouring rows of the same ray first and spends an atomicAdd where the ray changes.
#pragma once
#include "fused_mlp_tile_cuda.h"

namespace pmf {

// Gradients that are wanted, null where not.
struct MlpGradients {
  const float* out;
  int64_t out_row, out_col;
  float* x;
  int64_t x_row, x_col;
  float *extra, *params;
};

struct BackwardLayout {
  int rows;             // of a block: 16 per warp
  bool is_staged;       // weights lie in shared memory
  bool sums_in_shared;  // and so do the weight gradients
  int64_t sums_bytes, stage_bytes, tile_bytes, weight_bytes;

  int64_t bytes() const { return sums_bytes + stage_bytes + tile_bytes + weight_bytes; }
};

// Places in shared memory, in the order sums, stages, tiles, weights.
inline BackwardLayout backward_layout(const MlpPlan& plan, int rows, bool is_staged, bool sums_in_shared,
                                      bool wants_params) {
  BackwardLayout layout{rows, is_staged, sums_in_shared, 0, 0, 0, 0};
  const int64_t packed = plan.weights_at[plan.n_layers];
  if (wants_params && sums_in_shared) layout.sums_bytes = packed * static_cast<int64_t>(sizeof(float));
  layout.stage_bytes = rows / kTile * kStageFloats * static_cast<int64_t>(sizeof(float));
  layout.tile_bytes = int64_t{2} * rows * plan.tile_at[plan.n_layers + 1];
  if (is_staged) layout.weight_bytes = int64_t{2} * 2 * packed;
  return layout;
}

template <bool kStaged>
struct BackwardBlock {
  const MlpPlan& plan;
  const MlpInput& in;
  const MlpGradients& grad;
  const __half* weights;          // for the way forward
  const __nv_bfloat16* weights_b;  // for the way back
  float* sums;                     // weight gradients in shared memory; null: straight to `grad.params`
  float* stage;                    // of the warp
  __half* tiles;                   // of the block: activation l from rows * plan.tile_at[l] on
  int rows, warp, n_warps;

  __device__ __forceinline__ __half* tile(int l) const { return tiles + rows * plan.tile_at[l]; }
  __device__ __forceinline__ __half* own(int l) const { return tile(l) + warp * kTile * plan.stride(l); }
  __device__ __forceinline__ __nv_bfloat16* own_z(int l) const { return reinterpret_cast<__nv_bfloat16*>(own(l)); }

  // Hidden activations and the gradient of the output of the warp's rows.
  __device__ __forceinline__ void recompute(int64_t row) const {
    const int last = plan.n_layers;
    in.template load<kTile>(row, own(0), plan.stride(0));
    __syncwarp();
    for (int l = 0; l + 1 < last; ++l)
      hidden_layer<1, 2>(own(l), plan.stride(l), weights + plan.weights_at[l], plan.stride(l), plan.tiles(l),
                         plan.dims[l + 1], own(l + 1), plan.stride(l + 1), stage);
    load_rows<__nv_bfloat16, kTile>(grad.out, grad.out_row, grad.out_col, row, in.n, plan.dims[last], own_z(last),
                                    plan.stride(last), 0);
    MlpInput::clear_padding<__nv_bfloat16, kTile>(own_z(last), plan.stride(last), plan.dims[last]);
    for (int l = 0; l < last; ++l) to_bfloat16(own(l), plan.stride(l), padded_width(plan.dims[l]));
    __syncwarp();
  }

  static __device__ __forceinline__ void to_bfloat16(__half* tile, int stride, int width) {
    for (int e = 2 * lane_of_warp(); e < kTile * width; e += 2 * kWarp) {
      __half* at = tile + e / width * stride + e % width;
      const __half2 pair = *reinterpret_cast<const __half2*>(at);
      put_pair(reinterpret_cast<__nv_bfloat16*>(at), __low2float(pair), __high2float(pair));
    }
  }

  // Adds z^T h of layer l; z is at the place of activation l + 1.
  __device__ __forceinline__ void weight_gradient(int l) const {
    namespace wmma = nvcuda::wmma;
    const auto* h = reinterpret_cast<const __nv_bfloat16*>(tile(l));
    const auto* z = reinterpret_cast<const __nv_bfloat16*>(tile(l + 1));
    const int h_stride = plan.stride(l), z_stride = plan.stride(l + 1), across = plan.tiles(l);
    for (int t = warp; t < across * plan.tiles(l + 1); t += n_warps) {
      const int out = t / across * kTile, col = t % across * kTile;
      float* sum_at = sums != nullptr ? sums + plan.weights_at[l] + out * h_stride + col : stage;
      wmma::fragment<wmma::accumulator, kTile, kTile, kTile, float> sum;
      if (sums != nullptr) {
        wmma::load_matrix_sync(sum, sum_at, h_stride, wmma::mem_row_major);
      } else {
        wmma::fill_fragment(sum, 0.0f);
      }
      for (int k = 0; k < rows; k += kTile) {
        wmma::fragment<wmma::matrix_a, kTile, kTile, kTile, __nv_bfloat16, wmma::col_major> z_tile;
        wmma::fragment<wmma::matrix_b, kTile, kTile, kTile, __nv_bfloat16, wmma::row_major> h_tile;
        wmma::load_matrix_sync(z_tile, z + k * z_stride + out, z_stride);
        wmma::load_matrix_sync(h_tile, h + k * h_stride + col, h_stride);
        wmma::mma_sync(sum, z_tile, h_tile, sum);
      }
      wmma::store_matrix_sync(sum_at, sum, sums != nullptr ? h_stride : kStageStride, wmma::mem_row_major);
      __syncwarp();
      if (sums == nullptr) {
        for_pairs(stage, [&](int r, int c, float a, float b) {
          add_weight(l, out + r, col + c, a);
          add_weight(l, out + r, col + c + 1, b);
        });
        __syncwarp();
      }
    }
  }

  __device__ __forceinline__ void add_weight(int l, int out, int col, float value) const {
    if (out < plan.dims[l + 1] && col < plan.dims[l])
      atomicAdd(grad.params + plan.params_at[l] + out * plan.dims[l] + col, value);
  }

  // Gradient of activation l from that of activation l + 1, through the gate and onto the place of h_l.
  __device__ __forceinline__ void hidden_gradient(int l) const {
    __nv_bfloat16* to = own_z(l);
    const int stride = plan.stride(l);
    warp_product<__nv_bfloat16, 1, 2, false>(own_z(l + 1), plan.stride(l + 1), weights_b + plan.weights_at[l], stride,
                                             plan.tiles(l + 1), 0, plan.tiles(l), stage,
                                             [&](const float* tile, int row, int col) {
      for_pairs(tile, [&](int r, int c, float a, float b) {
        __nv_bfloat16* at = to + (row + r) * stride + col + c;
        put_pair(at, relu_gate(__bfloat162float(at[0]), a), relu_gate(__bfloat162float(at[1]), b));
      });
    });
    __syncwarp();
  }

  // Gradients of x and `extra` of the warp's rows.
  __device__ __forceinline__ void input_gradient(int64_t row) const {
    const int first = grad.x != nullptr ? 0 : in.x_width / kTile;
    const int last = grad.extra != nullptr ? plan.tiles(0) : (in.x_width + kTile - 1) / kTile;
    if (grad.x == nullptr && grad.extra == nullptr) return;
    warp_product<__nv_bfloat16, 1, 2, false>(own_z(1), plan.stride(1), weights_b, plan.stride(0), plan.tiles(1), first,
                                             last, stage, [&](const float* tile, int, int col) {
      if (grad.x != nullptr && col < in.x_width) store_x(tile, row, col);
      if (grad.extra != nullptr && col + kTile > in.x_width) add_extra(tile, row, col);
    });
  }

  __device__ __forceinline__ void store_x(const float* tile, int64_t row, int col) const {
    const bool by_column = grad.x_row == 1;
    for (int e = lane_of_warp(); e < kTile * kTile; e += kWarp) {
      const int r = by_column ? e % kTile : e / kTile, c = by_column ? e / kTile : e % kTile;
      if (row + r < in.n && col + c < in.x_width)
        grad.x[(row + r) * grad.x_row + (col + c) * grad.x_col] = tile[r * kStageStride + c];
    }
  }

  // A lane takes 8 rows of one column. A lone atomicAdd to a cleared place is a store, so both kinds share the loop.
  __device__ __forceinline__ void add_extra(const float* tile, int64_t row, int col) const {
    const int c = lane_of_warp() % kTile, half = lane_of_warp() / kTile * (kTile / 2), at = col + c - in.x_width;
    if (at < 0 || at >= in.extra_width) return;
    float sum = 0.0f;
    for (int r = half; r < half + kTile / 2 && row + r < in.n; ++r) {
      sum += tile[r * kStageStride + c];
      const int64_t to = in.index != nullptr ? in.index[row + r] : row + r;
      const bool goes_on = in.index != nullptr && r + 1 < half + kTile / 2 && row + r + 1 < in.n &&
                           in.index[row + r + 1] == to;
      if (goes_on) continue;
      if (in.index != nullptr) {
        atomicAdd(grad.extra + to * in.extra_width + at, sum);
      } else {
        grad.extra[to * in.extra_width + at] = sum;
      }
      sum = 0.0f;
    }
  }

  __device__ __forceinline__ void run(int64_t row) const {
    recompute(row);
    for (int l = plan.n_layers - 1; l >= 0; --l) {
      if (grad.params != nullptr) {
        __syncthreads();  // every warp's z and h are there
        weight_gradient(l);
        __syncthreads();  // and may be overwritten
      }
      if (l > 0) hidden_gradient(l);
    }
    input_gradient(row);
  }
};

template <bool kStaged>
__global__ void __launch_bounds__(256)
    fused_mlp_backward_kernel(MlpPlan plan, MlpInput in, MlpGradients grad, BackwardLayout layout,
                              const __half* __restrict__ packed) {
  PMF_DYNAMIC_SHARED(unsigned char, shared);
  const int n_threads = static_cast<int>(blockDim.x), warp = static_cast<int>(threadIdx.x) / kWarp;
  const int n_packed = plan.weights_at[plan.n_layers];
  float* sums = reinterpret_cast<float*>(shared);
  float* stages = reinterpret_cast<float*>(shared + layout.sums_bytes);
  __half* tiles = reinterpret_cast<__half*>(shared + layout.sums_bytes + layout.stage_bytes);
  __half* staged = reinterpret_cast<__half*>(shared + layout.sums_bytes + layout.stage_bytes + layout.tile_bytes);
  if (kStaged) {
    for (int i = static_cast<int>(threadIdx.x); i < 2 * n_packed / 8; i += n_threads)
      reinterpret_cast<uint4*>(staged)[i] = reinterpret_cast<const uint4*>(packed)[i];
  }
  const bool has_sums = layout.sums_bytes > 0;
  for (int i = static_cast<int>(threadIdx.x); has_sums && i < n_packed; i += n_threads) sums[i] = 0.0f;
  __syncthreads();
  const __half* weights = kStaged ? staged : packed;
  const auto* weights_b = reinterpret_cast<const __nv_bfloat16*>(weights + n_packed);
  float* stage = stages + warp * kStageFloats;
  const BackwardBlock<kStaged> block{plan,  in,    grad,        weights, weights_b,        has_sums ? sums : nullptr,
                                     stage, tiles, layout.rows, warp,    n_threads / kWarp};
  const int64_t step = static_cast<int64_t>(gridDim.x) * layout.rows;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * layout.rows; row < in.n; row += step)
    block.run(row + warp * kTile);
  if (!has_sums) return;
  __syncthreads();
  for (int l = 0; l < plan.n_layers; ++l) {
    const int width = plan.dims[l], count = width * plan.dims[l + 1];
    for (int i = static_cast<int>(threadIdx.x); i < count; i += n_threads)
      atomicAdd(grad.params + plan.params_at[l] + i,
                sums[plan.weights_at[l] + i / width * plan.stride(l) + i % width]);
  }
}

}  // namespace pmf
