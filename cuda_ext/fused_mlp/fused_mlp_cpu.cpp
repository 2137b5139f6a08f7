// Fused MLP on the CPU: forward and backward over blocks of points whose activations never leave L1/L2.
//
// A block of kBlock points runs through all layers in scratch memory. The backward keeps nothing from the forward:
// it recomputes the hidden layers of its block (a third more arithmetic, no activation traffic), then walks the
// layers from last to first. Weights are packed once per call: transposed for the forward product, plain for the
// input gradient, rows padded to whole vectors.
//
// Repeatable: the weight gradient is summed per chunk of points, chunks depend on n alone, and the partial sums are
// added in chunk order, so the result does not depend on the number of threads or on their timing.
// NaN and inf stay in their row of the output and of dx; no sum over padding ever reaches a result.
#include <omp.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>
#include <vector>

#include "abi.h"
#include "fused_mlp_block_cpu.h"
#include "fused_mlp_tile_cpu.h"

namespace pmf {
namespace {

constexpr int kOutOfMemory = 2;     // status
constexpr int64_t kBlock = 48;      // points; a multiple of every row tile and vector width
constexpr int64_t kMinChunk = 480;  // points summed into one partial weight gradient, at least
constexpr int64_t kMaxChunks = 64;  // bound on the memory of the partial gradients

template <class T>
class Scratch {  // zeroed, on a cache line boundary
 public:
  explicit Scratch(int64_t count) {
    const size_t bytes = (std::max<int64_t>(count, 1) * sizeof(T) + 63) / 64 * 64;
    data_ = static_cast<T*>(std::aligned_alloc(64, bytes));
    if (data_ == nullptr) throw std::bad_alloc();
    std::memset(data_, 0, bytes);
  }
  ~Scratch() { std::free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  T* get() { return data_; }

 private:
  T* data_;
};

// Sizes and places that follow from the layer dimensions.
template <class T>
struct Layout {
  const int64_t* dims;
  int64_t n_layers;
  int64_t widest = 0;               // padded width of the widest activation
  std::vector<int64_t> forward_at;  // W^T of layer l: (dims[l], padded(dims[l+1]))
  std::vector<int64_t> plain_at;    // W of layer l: (dims[l+1], padded(dims[l])); also the gradient's layout

  Layout(const int64_t* dims_, int64_t n_layers_) : dims(dims_), n_layers(n_layers_), forward_at{0}, plain_at{0} {
    for (int64_t l = 0; l <= n_layers; ++l) widest = std::max(widest, width(l));
    for (int64_t l = 0; l < n_layers; ++l) {
      forward_at.push_back(forward_at[l] + dims[l] * width(l + 1));
      plain_at.push_back(plain_at[l] + dims[l + 1] * width(l));
    }
  }
  int64_t width(int64_t l) const { return padded<T>(dims[l]); }
};

template <class T>
void pack_weights(const Layout<T>& layout, const T* params, T* forward, T* plain) {
  for (int64_t l = 0; l < layout.n_layers; ++l) {
    const int64_t n_in = layout.dims[l], n_out = layout.dims[l + 1];
    const T* weight = params + layer_offset(layout.dims, l);
    for (int64_t o = 0; o < n_out; ++o)
      for (int64_t i = 0; i < n_in; ++i) {
        forward[layout.forward_at[l] + i * layout.width(l + 1) + o] = weight[o * n_in + i];
        if (plain != nullptr) plain[layout.plain_at[l] + o * layout.width(l) + i] = weight[o * n_in + i];
      }
  }
}

// Layer l on a block: `in` (count, width(l)) -> `out` (count, width(l+1)); ReLU after all but the last layer.
template <class T>
void forward_layer(const Layout<T>& layout, int64_t l, const T* weights, const T* in, T* out, int64_t count) {
  const int64_t in_width = layout.width(l), out_width = layout.width(l + 1);
  const Product<T> product{in,  in_width,  1,       weights + layout.forward_at[l], out_width,     out,
                           out_width, nullptr, count,   out_width,                      layout.dims[l]};
  if (l + 1 < layout.n_layers)
    multiply<true, Store::kRelu>(product);
  else
    multiply<true, Store::kPlain>(product);
}

template <class T>
int forward(Matrix<const T> x, const T* params, const int64_t* dims, int64_t n_layers, int64_t n, T* out,
            int64_t n_threads) {
  const Layout<T> layout(dims, n_layers);
  const int64_t buffer = kBlock * layout.widest;
  Scratch<T> weights(layout.forward_at.back()), scratch(2 * buffer * n_threads);
  pack_weights<T>(layout, params, weights.get(), nullptr);
  const Matrix<T> target{out, dims[n_layers], 1};
  const int64_t n_blocks = (n + kBlock - 1) / kBlock;
#pragma omp parallel for schedule(dynamic, 16) num_threads(n_threads) if (n > PMF_MIN_PARALLEL)
  for (int64_t block = 0; block < n_blocks; ++block) {
    T* in = scratch.get() + 2 * buffer * omp_get_thread_num();
    T* result = in + buffer;
    const int64_t row = block * kBlock, count = std::min(kBlock, n - row);
    load_block(x, row, count, dims[0], in, layout.width(0));
    for (int64_t l = 0; l < n_layers; ++l, std::swap(in, result))
      forward_layer(layout, l, weights.get(), in, result, count);
    store_block(in, layout.width(n_layers), row, count, dims[n_layers], target);
  }
  return PMF_OK;
}

template <class T>
struct Backward {
  const Layout<T>& layout;
  Matrix<const T> x, grad;
  Matrix<T> grad_x;  // data null: not wanted
  const T *forward, *plain;

  // One block: recompute, then per layer the weight gradient (into `partial`, null: not wanted) and the input gradient.
  void block(int64_t row, int64_t count, T* scratch, T* partial) const {
    const int64_t n_layers = layout.n_layers, buffer = kBlock * layout.widest;
    T* z = scratch + n_layers * buffer;  // gradient of the layer's output; activation l is at scratch + l * buffer
    T* next = z + buffer;
    load_block(x, row, count, layout.dims[0], scratch, layout.width(0));
    for (int64_t l = 0; l + 1 < n_layers; ++l)
      forward_layer(layout, l, forward, scratch + l * buffer, scratch + (l + 1) * buffer, count);
    load_block(grad, row, count, layout.dims[n_layers], z, layout.width(n_layers));
    for (int64_t l = n_layers - 1; l >= 0; --l, std::swap(z, next)) {
      const T* h = scratch + l * buffer;
      const int64_t n_out = layout.dims[l + 1], in_width = layout.width(l), out_width = layout.width(l + 1);
      if (partial != nullptr)
        multiply<false, Store::kAdd>(Product<T>{z, 1, out_width, h, in_width, partial + layout.plain_at[l],
                                                in_width, nullptr, n_out, in_width, count});
      const Product<T> input_grad{z,        out_width, 1,     plain + layout.plain_at[l], in_width, next,
                                  in_width, h,         count, in_width,                   n_out};
      if (l > 0) multiply<true, Store::kGate>(input_grad);
      if (l == 0 && grad_x.data != nullptr) {
        multiply<true, Store::kPlain>(input_grad);
        store_block(next, in_width, row, count, layout.dims[0], grad_x);
      }
    }
  }
};

// Adds the partial gradients in chunk order and drops the padding.
template <class T>
void reduce_partials(const Layout<T>& layout, const T* partials, int64_t n_chunks, T* grad_params) {
  for (int64_t l = 0; l < layout.n_layers; ++l) {
    const int64_t n_in = layout.dims[l], n_out = layout.dims[l + 1], base = layer_offset(layout.dims, l);
    for (int64_t o = 0; o < n_out; ++o) {
      T* row = grad_params + base + o * n_in;
      std::fill(row, row + n_in, T(0));
      for (int64_t chunk = 0; chunk < n_chunks; ++chunk) {
        const T* part = partials + chunk * layout.plain_at.back() + layout.plain_at[l] + o * layout.width(l);
        for (int64_t i = 0; i < n_in; ++i) row[i] += part[i];
      }
    }
  }
}

template <class T>
int backward(Matrix<const T> grad, Matrix<const T> x, const T* params, const int64_t* dims, int64_t n_layers,
             int64_t n, Matrix<T> grad_x, T* grad_params, int64_t n_threads) {
  const Layout<T> layout(dims, n_layers);
  const int64_t per_thread = (n_layers + 2) * kBlock * layout.widest;
  const int64_t wanted = std::max(kMinChunk, (n + kMaxChunks - 1) / kMaxChunks);
  const int64_t chunk_size = (wanted + kBlock - 1) / kBlock * kBlock;
  const int64_t n_chunks = (n + chunk_size - 1) / chunk_size;
  const int64_t partial_size = grad_params == nullptr ? 0 : layout.plain_at.back();
  Scratch<T> forward(layout.forward_at.back()), plain(layout.plain_at.back());
  Scratch<T> scratch(per_thread * n_threads), partials(partial_size * n_chunks);
  pack_weights(layout, params, forward.get(), plain.get());
  const Backward<T> work{layout, x, grad, grad_x, forward.get(), plain.get()};
#pragma omp parallel for schedule(dynamic, 1) num_threads(n_threads) if (n > PMF_MIN_PARALLEL)
  for (int64_t chunk = 0; chunk < n_chunks; ++chunk) {
    T* mine = scratch.get() + per_thread * omp_get_thread_num();
    T* partial = grad_params == nullptr ? nullptr : partials.get() + chunk * partial_size;
    const int64_t end = std::min(n, (chunk + 1) * chunk_size);
    for (int64_t row = chunk * chunk_size; row < end; row += kBlock)
      work.block(row, std::min(kBlock, end - row), mine, partial);
  }
  if (grad_params != nullptr) reduce_partials(layout, partials.get(), n_chunks, grad_params);
  return PMF_OK;
}

bool valid(const int64_t* dims, int64_t n_layers, int64_t n, int64_t n_threads) {
  return n_layers >= 1 && n >= 0 && n_threads >= 1 && std::all_of(dims, dims + n_layers + 1, [](int64_t d) {
           return d >= 1;
         });
}

template <class Function>
int guarded(Function run) {  // no exception crosses the C ABI
  try {
    return run();
  } catch (const std::bad_alloc&) {
    return kOutOfMemory;
  }
}

}  // namespace
}  // namespace pmf

// x (n, dims[0]) and grad_out (n, dims[n_layers]) with any strides (in elements), params packed as in
// fused_mlp_math.h, dims (n_layers + 1), out (n, dims[n_layers]) row-major.
// Backward: grad_x (strides given) and grad_params may each be null: that gradient is then not computed.
#define PMF_DEFINE_FUSED_MLP(T, SUFFIX)                                                                              \
  PMF_EXPORT int pmf_fused_mlp_cpu_##SUFFIX(const T* x, int64_t x_row, int64_t x_col, const T* params,               \
                                            const int64_t* dims, int64_t n_layers, int64_t n, T* out,                \
                                            int64_t n_threads) {                                                     \
    if (!pmf::valid(dims, n_layers, n, n_threads)) return PMF_BAD_ARGUMENT;                                          \
    return pmf::guarded(                                                                                             \
        [&] { return pmf::forward<T>({x, x_row, x_col}, params, dims, n_layers, n, out, n_threads); });              \
  }                                                                                                                  \
  PMF_EXPORT int pmf_fused_mlp_backward_cpu_##SUFFIX(                                                                \
      const T* grad_out, int64_t grad_row, int64_t grad_col, const T* x, int64_t x_row, int64_t x_col,               \
      const T* params, const int64_t* dims, int64_t n_layers, int64_t n, T* grad_x, int64_t grad_x_row,              \
      int64_t grad_x_col, T* grad_params, int64_t n_threads) {                                                       \
    if (!pmf::valid(dims, n_layers, n, n_threads)) return PMF_BAD_ARGUMENT;                                          \
    return pmf::guarded([&] {                                                                                        \
      return pmf::backward<T>({grad_out, grad_row, grad_col}, {x, x_row, x_col}, params, dims, n_layers, n,          \
                              {grad_x, grad_x_row, grad_x_col}, grad_params, n_threads);                             \
    });                                                                                                              \
  }

PMF_DEFINE_FUSED_MLP(float, f32)
PMF_DEFINE_FUSED_MLP(double, f64)
