// Register-tiled small matrix product: C (rows x cols) (+)= A (rows x depth) * B (depth x cols).
//
// Columns lie in vector lanes and rows of A are broadcast, so the three products of an MLP share one tile:
//   forward      C = H W^T    rows = points, depth = inputs of the layer,  A contiguous along depth
//   input grad   C = Z W      rows = points, depth = outputs of the layer, A contiguous along depth
//   weight grad  C += Z^T H   rows = outputs, depth = points,              A contiguous along rows
// B and C have rows padded to whole vectors and start on a vector boundary; A has no such need.
// The tile follows the instruction set: accumulators + one row of B + one broadcast must fit the register file,
// or the compiler spills and the product becomes a hundred times slower.
#pragma once
#include <cstdint>

#include "fused_mlp_math.h"

namespace pmf {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64, kTileVectors = 4;  // 32 registers: 6 x 4 accumulators
#elif defined(__AVX2__) || defined(__AVX__)
constexpr int kVectorBytes = 32, kTileVectors = 2;  // 16 registers: 6 x 2 accumulators
#elif defined(__aarch64__)
constexpr int kVectorBytes = 16, kTileVectors = 4;
#else
constexpr int kVectorBytes = 16, kTileVectors = 2;
#endif

template <class T>
struct Vector {
  typedef T type __attribute__((vector_size(kVectorBytes), may_alias));
  static constexpr int64_t lanes = kVectorBytes / sizeof(T);
};
template <class T>
using Vec = typename Vector<T>::type;

template <class T>
constexpr int64_t padded(int64_t count) {
  return (count + Vector<T>::lanes - 1) / Vector<T>::lanes * Vector<T>::lanes;
}

enum class Store { kPlain, kRelu, kGate, kAdd };  // what happens to a finished sum on its way to C

template <class T>
struct Product {
  const T* a;
  int64_t a_row, a_depth;  // strides of A; one of them is 1
  const T* b;
  int64_t b_depth;  // row stride of B
  T* c;
  int64_t c_row;  // row stride of C and of `gate`
  const T* gate;  // Store::kGate: activations h at the place of C
  int64_t rows, cols, depth;
  const T* add = nullptr;              // kPlain, kRelu: row r adds row add_index[r] of this matrix, stride c_row
  const int64_t* add_index = nullptr;
};

// Not inlined: within a large function its six row strides are spilled.
template <class T, int R, int N, bool kDepthContiguous, Store kStore>
__attribute__((noinline)) void run_tile(const Product<T>& p, int64_t row, int64_t col) {
  const T* a = p.a + row * (kDepthContiguous ? p.a_row : 1);
  const T* b = p.b + col;
  const int64_t row_step = kDepthContiguous ? p.a_row : 1;
  const int64_t depth_step = kDepthContiguous ? 1 : p.a_depth;
  Vec<T> sum[R][N] = {};
  for (int64_t k = 0; k < p.depth; ++k, a += depth_step, b += p.b_depth) {
    Vec<T> b_k[N];
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) b_k[j] = reinterpret_cast<const Vec<T>*>(b)[j];
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
      const T a_ik = a[i * row_step];
#pragma GCC unroll 8
      for (int j = 0; j < N; ++j) sum[i][j] += a_ik * b_k[j];
    }
  }
  T* c = p.c + row * p.c_row + col;
  const T* gate = kStore == Store::kGate ? p.gate + row * p.c_row + col : nullptr;
  if ((kStore == Store::kPlain || kStore == Store::kRelu) && p.add != nullptr) {
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
      const T* term = p.add + p.add_index[row + i] * p.c_row + col;
#pragma GCC unroll 8
      for (int j = 0; j < N; ++j) sum[i][j] += reinterpret_cast<const Vec<T>*>(term)[j];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) {
      Vec<T>* out = reinterpret_cast<Vec<T>*>(c + i * p.c_row) + j;
      const Vec<T> zero = {};
      if constexpr (kStore == Store::kPlain) *out = sum[i][j];
      if constexpr (kStore == Store::kRelu) *out = sum[i][j] < zero ? zero : sum[i][j];
      if constexpr (kStore == Store::kGate) {
        const Vec<T> h = reinterpret_cast<const Vec<T>*>(gate + i * p.c_row)[j];
        *out = h <= zero ? zero : sum[i][j];
      }
      if constexpr (kStore == Store::kAdd) *out += sum[i][j];
    }
  }
}

// Rows [row, p.rows) in tiles of R, the rest in tiles of 4, 2, 1: nothing outside A and C is touched.
template <class T, int R, int N, bool kDepthContiguous, Store kStore>
inline void run_rows(const Product<T>& p, int64_t row, int64_t col) {
  for (; row + R <= p.rows; row += R) run_tile<T, R, N, kDepthContiguous, kStore>(p, row, col);
  if constexpr (R > 1) {
    if (row < p.rows) run_rows<T, (R > 4 ? 4 : R / 2), N, kDepthContiguous, kStore>(p, row, col);
  }
}

template <bool kDepthContiguous, Store kStore, class T>
inline void multiply(const Product<T>& p) {
  constexpr int64_t lanes = Vector<T>::lanes;
  int64_t col = 0;
  for (; col + kTileVectors * lanes <= p.cols; col += kTileVectors * lanes)
    run_rows<T, 6, kTileVectors, kDepthContiguous, kStore>(p, 0, col);
  switch ((p.cols - col + lanes - 1) / lanes) {
    case 1: return run_rows<T, 8, 1, kDepthContiguous, kStore>(p, 0, col);
    case 2: if constexpr (kTileVectors > 2) return run_rows<T, 8, 2, kDepthContiguous, kStore>(p, 0, col);
      break;
    case 3: if constexpr (kTileVectors > 2) return run_rows<T, 8, 3, kDepthContiguous, kStore>(p, 0, col);
      break;
    default: break;
  }
}

}  // namespace pmf
