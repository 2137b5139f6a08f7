// Copies between a block of rows of a strided (n, width) matrix and its local row-major, lane-padded form.
//
// Row-major matrices are copied row by row. Column-major ones (the storage of hash_encode's output) go through
// square transposes in registers, so each column is read and written in whole vectors. Any other strides
// (an expanded cotangent has stride 0) take the element loop. Rows that are a block as they lie are not copied at all:
// the products then wait for memory while they compute.
#pragma once
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "fused_mlp_tile_cpu.h"

namespace pmf {

template <class T>
struct Matrix {
  T* data;
  int64_t row_stride, col_stride;  // in elements
};

template <class T>
inline Vec<T> load_vector(const T* from) {  // from any address
  Vec<T> value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

template <class T>
inline void store_vector(T* to, Vec<T> value) {
  std::memcpy(to, &value, sizeof value);
}

// a0 b0 a1 b1 ... of the first (second) halves of a and b.
template <bool kSecondHalf, class T>
inline Vec<T> interleave(Vec<T> a, Vec<T> b) {
  constexpr int n = Vector<T>::lanes;
  const int first = kSecondHalf ? n / 2 : 0;
#if defined(__clang__)
  Vec<T> out;
  for (int i = 0; i < n; ++i) out[i] = i % 2 ? b[first + i / 2] : a[first + i / 2];
  return out;
#else
  using Index = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  typedef Index IndexVec __attribute__((vector_size(kVectorBytes)));
  IndexVec index = {};
  for (int i = 0; i < n; ++i) index[i] = first + i / 2 + (i % 2) * n;
  return __builtin_shuffle(a, b, index);
#endif
}

// Transposes lanes x lanes elements: log2(lanes) rounds that interleave row i with row i + lanes/2.
template <class T>
inline void transpose(Vec<T>* rows) {
  constexpr int n = Vector<T>::lanes;
#pragma GCC unroll 8
  for (int round = 1; round < n; round *= 2) {
    Vec<T> next[n];
#pragma GCC unroll 16
    for (int i = 0; i < n / 2; ++i) {
      next[2 * i] = interleave<false, T>(rows[i], rows[i + n / 2]);
      next[2 * i + 1] = interleave<true, T>(rows[i], rows[i + n / 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i) rows[i] = next[i];
  }
}

// Whether the rows from `row` on are a block as they lie: row-major, without padding, on a vector boundary.
template <class T>
inline bool is_block(const Matrix<T>& m, int64_t row, int64_t width, int64_t ld) {
  return m.col_stride == 1 && m.row_stride == ld && width == ld &&
         reinterpret_cast<uintptr_t>(m.data + row * ld) % kVectorBytes == 0;
}

template <class T>
inline void copy_elements(const Matrix<const T>& from, const Matrix<T>& to, int64_t first, int64_t count,
                          int64_t width) {
  for (int64_t r = first; r < count; ++r)
    for (int64_t c = 0; c < width; ++c)
      to.data[r * to.row_stride + c * to.col_stride] = from.data[r * from.row_stride + c * from.col_stride];
}

template <class T>
inline void copy_rows(const Matrix<const T>& from, const Matrix<T>& to, int64_t count, int64_t width) {
  constexpr int64_t lanes = Vector<T>::lanes;
  for (int64_t r = 0; r < count; ++r) {
    const T* source = from.data + r * from.row_stride;
    T* target = to.data + r * to.row_stride;
    int64_t c = 0;
    for (; c + lanes <= width; c += lanes) store_vector(target + c, load_vector(source + c));
    for (; c < width; ++c) target[c] = source[c];
  }
}

// Rows [row, row + count) of `global` into `local` (count x ld).
// What lies in its padding columns never reaches a result.
template <class T>
inline void load_block(const Matrix<const T>& global, int64_t row, int64_t count, int64_t width, T* local,
                       int64_t ld) {
  constexpr int64_t lanes = Vector<T>::lanes;
  const Matrix<const T> from{global.data + row * global.row_stride, global.row_stride, global.col_stride};
  const Matrix<T> to{local, ld, 1};
  if (from.col_stride == 1) return copy_rows(from, to, count, width);
  int64_t r = 0;
  if (from.row_stride == 1) {
    for (; r + lanes <= count; r += lanes) {
      for (int64_t c = 0; c < width; c += lanes) {
        Vec<T> tile[lanes] = {};
        for (int64_t i = 0; i < lanes && c + i < width; ++i)
          tile[i] = load_vector(from.data + r + (c + i) * from.col_stride);
        transpose<T>(tile);
        for (int64_t i = 0; i < lanes; ++i) store_vector(local + (r + i) * ld + c, tile[i]);
      }
    }
  }
  copy_elements(from, to, r, count, width);
}

// The same rows, where they lie if they are a block there, else loaded into `local`.
template <class T>
inline const T* block_of(const Matrix<const T>& global, int64_t row, int64_t count, int64_t width, T* local,
                         int64_t ld) {
  if (is_block(global, row, width, ld)) return global.data + row * ld;
  load_block(global, row, count, width, local, ld);
  return local;
}

// The inverse of `load_block`: `local` (count x ld) into rows [row, row + count) of `global`.
template <class T>
inline void store_block(const T* local, int64_t ld, int64_t row, int64_t count, int64_t width,
                        const Matrix<T>& global) {
  constexpr int64_t lanes = Vector<T>::lanes;
  const Matrix<const T> from{local, ld, 1};
  const Matrix<T> to{global.data + row * global.row_stride, global.row_stride, global.col_stride};
  if (to.col_stride == 1) return copy_rows(from, to, count, width);
  int64_t r = 0;
  if (to.row_stride == 1) {
    for (; r + lanes <= count; r += lanes) {
      for (int64_t c = 0; c < width; c += lanes) {
        Vec<T> tile[lanes];
        for (int64_t i = 0; i < lanes; ++i) tile[i] = load_vector(local + (r + i) * ld + c);
        transpose<T>(tile);
        for (int64_t i = 0; i < lanes && c + i < width; ++i)
          store_vector(to.data + r + (c + i) * to.col_stride, tile[i]);
      }
    }
  }
  copy_elements(from, to, r, count, width);
}

}  // namespace pmf
