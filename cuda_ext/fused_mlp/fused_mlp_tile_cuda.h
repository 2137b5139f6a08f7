// Products of a warp's own rows with a weight matrix on tensor cores, and its copies between global and shared memory.
//
// A warp keeps 16 R rows in shared memory and takes them through the layers on its own: nothing in here waits for
// another warp. The place of an element in an accumulator is unspecified, so a finished 16 x 16 tile goes through a
// small float stage in shared memory, where `finish` picks it up.
#pragma once
#include <cstdint>
#include <type_traits>

#include "fused_mlp_plan_cuda.h"
#include "fused_mlp_math.h"

namespace pmf {

constexpr int kStageStride = 20;  // floats; a multiple of 4, and rows in different banks
constexpr int kStageFloats = kTile * kStageStride;

__device__ __forceinline__ int lane_of_warp() { return static_cast<int>(threadIdx.x) % kWarp; }

__device__ __forceinline__ void put(__half* to, float value) { *to = __float2half_rn(value); }
__device__ __forceinline__ void put(__nv_bfloat16* to, float value) { *to = __float2bfloat16_rn(value); }
__device__ __forceinline__ void put_pair(__half* to, float a, float b) {
  *reinterpret_cast<__half2*>(to) = __floats2half2_rn(a, b);
}
__device__ __forceinline__ void put_pair(__nv_bfloat16* to, float a, float b) {
  *reinterpret_cast<__nv_bfloat162*>(to) = __nv_bfloat162{__float2bfloat16_rn(a), __float2bfloat16_rn(b)};
}

// Calls visit(row, col, a, b) for neighbouring columns of the tile in `stage`, shared out by lane.
template <class Visit>
__device__ __forceinline__ void for_pairs(const float* stage, Visit visit) {
#pragma unroll
  for (int step = 0; step < kTile * kTile / (2 * kWarp); ++step) {
    const int e = 2 * (lane_of_warp() + step * kWarp), row = e / kTile, col = e % kTile;
    const float2 pair = *reinterpret_cast<const float2*>(stage + row * kStageStride + col);
    visit(row, col, pair.x, pair.y);
  }
}

// C = A B for column tiles [first, last): A is the warp's (16 R, 16 depth) tile, B the weights W of a layer, stored
// (n_out, n_in): its transpose for the way forward (kForward), itself for the way back.
// finish(stage, row, col) is called by the whole warp for each tile of C, which begins at (row, col). The first call
// comes when A has been read for COLUMNS tiles of C, which share its loads: it may overwrite A if C has no more.
template <class T, int R, int COLUMNS, bool kForward, class Finish>
__device__ __forceinline__ void warp_product(const T* a, int a_stride, const T* weights, int w_stride, int depth,
                                             int first, int last, float* stage, Finish finish) {
  namespace wmma = nvcuda::wmma;
  using Layout = std::conditional_t<kForward, wmma::col_major, wmma::row_major>;
  for (int n = first; n < last; n += COLUMNS) {
    wmma::fragment<wmma::accumulator, kTile, kTile, kTile, float> sum[R][COLUMNS];
#pragma unroll
    for (int r = 0; r < R; ++r) {
#pragma unroll
      for (int j = 0; j < COLUMNS; ++j) wmma::fill_fragment(sum[r][j], 0.0f);
    }
    for (int k = 0; k < depth; ++k) {
      wmma::fragment<wmma::matrix_a, kTile, kTile, kTile, T, wmma::row_major> rows[R];
#pragma unroll
      for (int r = 0; r < R; ++r) wmma::load_matrix_sync(rows[r], a + r * kTile * a_stride + k * kTile, a_stride);
#pragma unroll
      for (int j = 0; j < COLUMNS; ++j) {
        if (n + j >= last) continue;
        const int row = kForward ? n + j : k, col = kForward ? k : n + j;
        wmma::fragment<wmma::matrix_b, kTile, kTile, kTile, T, Layout> b;
        wmma::load_matrix_sync(b, weights + row * kTile * w_stride + col * kTile, w_stride);
#pragma unroll
        for (int r = 0; r < R; ++r) wmma::mma_sync(sum[r][j], rows[r], b, sum[r][j]);
      }
    }
#pragma unroll
    for (int r = 0; r < R; ++r) {
#pragma unroll
      for (int j = 0; j < COLUMNS; ++j) {
        if (n + j >= last) continue;
        wmma::store_matrix_sync(stage, sum[r][j], kStageStride, wmma::mem_row_major);
        __syncwarp();
        finish(stage, r * kTile, (n + j) * kTile);
        __syncwarp();
      }
    }
  }
}

// A hidden layer: out = relu(W in), rounded to half; columns beyond `width` become 0, so that no inf * 0 of a padding
// column spoils the next layer. `out` may be `in` up to a width of 16 COLUMNS.
template <int R, int COLUMNS>
__device__ __forceinline__ void hidden_layer(const __half* in, int in_stride, const __half* weights, int w_stride,
                                             int depth, int width, __half* out, int out_stride, float* stage) {
  const int tiles = padded_width(width) / kTile;
  warp_product<__half, R, COLUMNS, true>(in, in_stride, weights, w_stride, depth, 0, tiles, stage,
                                         [&](const float* tile, int row, int col) {
    for_pairs(tile, [&](int r, int c, float a, float b) {
      a = col + c < width ? relu(a) : 0.0f;
      b = col + c + 1 < width ? relu(b) : 0.0f;
      put_pair(out + (row + r) * out_stride + col + c, a, b);
    });
  });
  __syncwarp();
}

// Rows [row, row + ROWS) of a matrix with any strides into columns [col, col + width) of the warp's tile; rows beyond n
// are 0. Neighbouring lanes take neighbouring rows of a column-major matrix and neighbouring columns of any other.
template <class T, int ROWS>
__device__ __forceinline__ void load_rows(const float* data, int64_t row_stride, int64_t col_stride,
                                          int64_t row, int64_t n, int width, T* tile, int tile_stride, int col) {
  const bool by_column = row_stride == 1 && col_stride != 1;
#pragma unroll 4
  for (int e = lane_of_warp(); e < ROWS * width; e += kWarp) {
    const int r = by_column ? e % ROWS : e / width, c = by_column ? e / ROWS : e % width;
    const float value = row + r < n ? data[(row + r) * row_stride + c * col_stride] : 0.0f;
    put(tile + r * tile_stride + col + c, value);
  }
}

// What the network is given: x, and beside it rows of `extra` (n_extra, extra_width): row i, or row index[i].
struct MlpInput {
  const float* x;
  int64_t x_row, x_col, n;
  const float* extra;
  const int64_t* index;
  int x_width, extra_width;

  // Rows [row, row + ROWS) as half, with their padding columns.
  template <int ROWS>
  __device__ __forceinline__ void load(int64_t row, __half* tile, int tile_stride) const {
    load_rows<__half, ROWS>(x, x_row, x_col, row, n, x_width, tile, tile_stride, 0);
    for (int e = lane_of_warp(); e < ROWS * extra_width; e += kWarp) {
      const int r = e / extra_width, c = e % extra_width;
      float value = 0.0f;
      if (row + r < n) value = extra[(index != nullptr ? index[row + r] : row + r) * extra_width + c];
      put(tile + r * tile_stride + x_width + c, value);
    }
    clear_padding<__half, ROWS>(tile, tile_stride, x_width + extra_width);
  }

  template <class T, int ROWS>
  static __device__ __forceinline__ void clear_padding(T* tile, int tile_stride, int width) {
    const int padding = padded_width(width) - width;
    for (int e = lane_of_warp(); e < ROWS * padding; e += kWarp)
      put(tile + e / padding * tile_stride + width + e % padding, 0.0f);
  }
};

}  // namespace pmf
