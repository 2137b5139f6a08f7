// Fused MLP on the CPU: forward and backward over blocks of points whose activations never leave L1/L2.
#include <omp.h>

#include <algorithm>

#include "abi.h"
#include "fused_mlp_network_cpu.h"

namespace pmf {
namespace {

template <class T>
int forward(const Input<T>& input, const T* params, const int64_t* dims, int64_t n_layers, int64_t n, T* out,
            int64_t n_threads) {
  const Layout<T> layout(dims, n_layers, input.rays.width);
  const int64_t buffer = kBlock * layout.widest;
  Scratch<T> weights(layout.forward_at.back()), scratch(2 * buffer * n_threads);
  pack_weights<T>(layout, params, weights.get(), nullptr);
  const RayTerms<T> rays(layout, input, params, n, n_threads);
  const Block<T> work{layout, input, rays, weights.get()};
  const Matrix<T> target{out, dims[n_layers], 1};
  const int64_t n_blocks = (n + kBlock - 1) / kBlock;
#pragma omp parallel for schedule(dynamic, 8) num_threads(n_threads) if (n > PMF_MIN_PARALLEL)
  for (int64_t block = 0; block < n_blocks; ++block) {
    T *next = scratch.get() + 2 * buffer * omp_get_thread_num(), *other = next + buffer;
    const int64_t row = block * kBlock, count = std::min(kBlock, n - row), last = layout.width(n_layers);
    T* in_place = is_block(target, row, dims[n_layers], last) ? out + row * last : nullptr;
    const T* result = work.run(row, count, work.load(row, count, other), next, other, in_place);
    if (in_place == nullptr) store_block(result, last, row, count, dims[n_layers], target);
  }
  return PMF_OK;
}

// Which gradients are wanted, and where they go; null: not wanted.
template <class T>
struct Gradients {
  Matrix<T> x;
  T *extra, *params;
};

// From the gradient z of the first layer's output to those of x and of a second part that rows have of their own.
template <class T>
void store_input_gradient(const Backward<T>& work, const Gradients<T>& to, int64_t row, int64_t count, const T* z,
                          T* local) {
  const Input<T>& input = work.block().input;
  const Layout<T>& layout = work.block().layout;
  const bool wants_extra = to.extra != nullptr && input.extra != nullptr;
  const int64_t ld = layout.width(0), width = input.extra_width, x_width = layout.dims[0] - width;
  if (to.x.data == nullptr && !wants_extra) return;
  if (!wants_extra && is_block(to.x, row, x_width, ld))
    return work.input_gradient(count, z, x_width, to.x.data + row * ld);
  work.input_gradient(count, z, wants_extra ? layout.dims[0] : x_width, local);
  if (to.x.data != nullptr) store_block(local, ld, row, count, x_width, to.x);
  for (int64_t r = 0; r < count && wants_extra; ++r)
    std::copy_n(local + r * ld + x_width, width, to.extra + (row + r) * width);
}

template <class T>
int backward(Matrix<const T> grad, const Input<T>& input, const T* params, const int64_t* dims, int64_t n_layers,
             int64_t n, const Gradients<T>& to, int64_t n_threads) {
  const Layout<T> layout(dims, n_layers, input.rays.width);
  const Chunks chunks(n);
  const Backward<T> work(layout, input, params, n, chunks, to.params != nullptr, to.extra != nullptr, n_threads);
  const int64_t per_thread = Backward<T>::scratch_size(layout);
  Scratch<T> scratch(per_thread * n_threads);
#pragma omp parallel for schedule(dynamic, 1) num_threads(n_threads) if (n > PMF_MIN_PARALLEL)
  for (int64_t chunk = 0; chunk < chunks.count; ++chunk) {
    T* mine = scratch.get() + per_thread * omp_get_thread_num();
    const int64_t begin = chunk * chunks.size, end = std::min(n, begin + chunks.size);
    for (int64_t row = begin; row < end; row += kBlock) {
      const int64_t count = std::min(kBlock, end - row);
      const T* in = work.block().load(row, count, mine);
      work.block().hidden(row, count, in, mine);
      const T* z = block_of(grad, row, count, dims[n_layers], work.output_gradient(mine), layout.width(n_layers));
      T* other;
      z = work.layers(begin, row, count, in, z, mine, &other);
      store_input_gradient(work, to, row, count, z, other);
    }
  }
  work.finish(n, to.params, input.has_rays() ? to.extra : nullptr, n_threads);
  return PMF_OK;
}

}  // namespace
}  // namespace pmf

// x (n, dims[0] - extra_width) and grad_out (n, dims[n_layers]) with any strides (in elements); extra
// (n_extra, extra_width) row-major, extra_index (n) sorted, or null for n_extra == n; params packed as in
// fused_mlp_math.h, dims (n_layers + 1), out (n, dims[n_layers]) row-major.
// Backward: grad_x (strides given), grad_extra and grad_params may each be null: that gradient is then not computed.
#define PMF_DEFINE_FUSED_MLP(T, SUFFIX)                                                                              \
  PMF_EXPORT int pmf_fused_mlp_cpu_##SUFFIX(                                                                         \
      const T* x, int64_t x_row, int64_t x_col, const T* extra, int64_t extra_width, const int64_t* extra_index,     \
      int64_t n_extra, const T* params, const int64_t* dims, int64_t n_layers, int64_t n, T* out,                    \
      int64_t n_threads) {                                                                                           \
    const pmf::Input<T> input({x, x_row, x_col}, extra, extra_width, extra_index, n_extra);                          \
    return pmf::guarded(pmf::check(input, extra_width, dims, n_layers, n, n_extra, n_threads), [&] {                 \
      return pmf::forward<T>(input, params, dims, n_layers, n, out, n_threads);                                      \
    });                                                                                                              \
  }                                                                                                                  \
  PMF_EXPORT int pmf_fused_mlp_backward_cpu_##SUFFIX(                                                                \
      const T* grad_out, int64_t grad_row, int64_t grad_col, const T* x, int64_t x_row, int64_t x_col,               \
      const T* extra, int64_t extra_width, const int64_t* extra_index, int64_t n_extra, const T* params,             \
      const int64_t* dims, int64_t n_layers, int64_t n, T* grad_x, int64_t grad_x_row, int64_t grad_x_col,           \
      T* grad_extra, T* grad_params, int64_t n_threads) {                                                            \
    const pmf::Input<T> input({x, x_row, x_col}, extra, extra_width, extra_index, n_extra);                          \
    return pmf::guarded(pmf::check(input, extra_width, dims, n_layers, n, n_extra, n_threads), [&] {                 \
      return pmf::backward<T>({grad_out, grad_row, grad_col}, input, params, dims, n_layers, n,                      \
                              {{grad_x, grad_x_row, grad_x_col}, grad_extra, grad_params}, n_threads);               \
    });                                                                                                              \
  }

PMF_DEFINE_FUSED_MLP(float, f32)
PMF_DEFINE_FUSED_MLP(double, f64)
