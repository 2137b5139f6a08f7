// Density and colour of samples in one pass: two networks of fused_mlp, one after the other on the same block.
//
//   geo = density network(x),  sigma = exp(min(geo_0 + bias, max)),  rgb = logistic(colour network([geo, view_ray]))
//
// Between them nothing reaches memory but geo, which the pose branch reads and the backward starts the colour network
// from: its gradient, the activations and the columns of both stay in the block. Rules of fused_mlp_network_cpu.h hold.
#include <omp.h>

#include <algorithm>

#include "../fused_mlp/fused_mlp_network_cpu.h"
#include "abi.h"
#include "vector_exp_cpu.h"

namespace pmf {
namespace {

// One of the two networks as the ABI passes it.
template <class T>
struct Network {
  const T* params;
  const int64_t* dims;
  int64_t n_layers;
};

template <class T>
struct Radiance {
  Network<T> density, colour;
  Input<T> x, view;  // view: geo as x, the rays' features as its second part
  T bias, max_log_density;
  int64_t n;

  int64_t n_geo() const { return density.dims[density.n_layers]; }
  int check(int64_t n_rays, int64_t n_threads) const {
    if (const int status = pmf::check(x, 0, density.dims, density.n_layers, n, n, n_threads)) return status;
    const int64_t view_width = view.rays.width + view.extra_width;
    if (const int status = pmf::check(view, view_width, colour.dims, colour.n_layers, n, n_rays, n_threads))
      return status;
    const bool fits = colour.dims[0] == n_geo() + view_width && colour.dims[colour.n_layers] == 3;
    return fits && (view.has_rays() || n == 0) ? PMF_OK : PMF_BAD_ARGUMENT;  // no samples: an index without address
  }
};

template <class T>
struct Outputs {
  T *sigmas, *rgb, *geo;
};

template <class T>
void activate(const Radiance<T>& in, const T* geo, int64_t geo_ld, int64_t count, T* sigmas) {
  for (int64_t r = 0; r < count; ++r) {
    const T log_density = geo[r * geo_ld] + in.bias;
    sigmas[r] = log_density > in.max_log_density ? in.max_log_density : log_density;
  }
  exp_array(sigmas, count);
}

template <class T>
int forward(const Radiance<T>& in, const Outputs<T>& out, int64_t n_threads) {
  const Layout<T> density(in.density.dims, in.density.n_layers, 0);
  const Layout<T> colour(in.colour.dims, in.colour.n_layers, in.view.rays.width);
  Scratch<T> density_weights(density.forward_at.back()), colour_weights(colour.forward_at.back());
  pack_weights<T>(density, in.density.params, density_weights.get(), nullptr);
  pack_weights<T>(colour, in.colour.params, colour_weights.get(), nullptr);
  const RayTerms<T> no_rays(density, in.x, in.density.params, in.n, n_threads);
  const RayTerms<T> rays(colour, in.view, in.colour.params, in.n, n_threads);
  const Block<T> density_block{density, in.x, no_rays, density_weights.get()};
  const Block<T> colour_block{colour, in.view, rays, colour_weights.get()};
  const int64_t buffer = kBlock * std::max(density.widest, colour.widest);
  Scratch<T> scratch(2 * buffer * n_threads);
  const int64_t n_blocks = (in.n + kBlock - 1) / kBlock, n_geo = in.n_geo();
#pragma omp parallel for schedule(dynamic, 8) num_threads(n_threads) if (in.n > PMF_MIN_PARALLEL)
  for (int64_t block = 0; block < n_blocks; ++block) {
    T *next = scratch.get() + 2 * buffer * omp_get_thread_num(), *other = next + buffer;
    const int64_t row = block * kBlock, count = std::min(kBlock, in.n - row);
    const T* now = density_block.run(row, count, density_block.load(row, count, other), next, other);
    store_block(now, density.width(density.n_layers), row, count, n_geo, Matrix<T>{out.geo, n_geo, 1});
    activate(in, now, density.width(density.n_layers), count, out.sigmas + row);
    now = colour_block.run(row, count, now, next, other);
    store_block(now, colour.width(colour.n_layers), row, count, 3, Matrix<T>{out.rgb, 3, 1});
    logistic_array(out.rgb + 3 * row, 3 * count);
  }
  return PMF_OK;
}

// Gradients of the outputs (that of geo may be null) and where those of the inputs go; null: not wanted.
template <class T>
struct Gradients {
  const T *sigmas, *rgb, *geo;
  Matrix<T> x;
  T *view, *density_params, *colour_params;
};

// z (count, ld): gradient of the colour network's output from that of rgb.
template <class T>
void colour_cotangent(const T* grad, const T* rgb, int64_t count, int64_t ld, T* z) {
  for (int64_t r = 0; r < count; ++r)
    for (int64_t c = 0; c < 3; ++c) {
      const T value = rgb[3 * r + c];
      z[r * ld + c] = grad[3 * r + c] * value * (T(1) - value);
    }
}

// Adds to z (count, ld), the gradient of geo, what comes through the density and from outside.
template <class T>
void add_geo_cotangent(const Radiance<T>& in, const Outputs<const T>& saved, const Gradients<T>& grad, int64_t row,
                       int64_t count, int64_t ld, T* z) {
  const int64_t n_geo = in.n_geo();
  for (int64_t r = row; r < row + count; ++r, z += ld) {
    const bool passes = saved.geo[r * n_geo] + in.bias <= in.max_log_density;  // false for NaN, as torch's clamp
    if (passes) z[0] += grad.sigmas[r] * saved.sigmas[r];
    for (int64_t c = 0; c < n_geo && grad.geo != nullptr; ++c) z[c] += grad.geo[r * n_geo + c];
  }
}

template <class T>
int backward(const Radiance<T>& in, const Outputs<const T>& saved, const Gradients<T>& grad, int64_t n_rays,
             int64_t n_threads) {
  const Layout<T> density(in.density.dims, in.density.n_layers, 0);
  const Layout<T> colour(in.colour.dims, in.colour.n_layers, in.view.rays.width);
  const Chunks chunks(in.n);
  const Backward<T> density_work(density, in.x, in.density.params, in.n, chunks, grad.density_params != nullptr, false,
                                 n_threads);
  const Backward<T> colour_work(colour, in.view, in.colour.params, in.n, chunks, grad.colour_params != nullptr,
                                grad.view != nullptr, n_threads);
  const int64_t density_size = Backward<T>::scratch_size(density), colour_size = Backward<T>::scratch_size(colour);
  Scratch<T> scratch((density_size + colour_size) * n_threads);
#pragma omp parallel for schedule(dynamic, 1) num_threads(n_threads) if (in.n > PMF_MIN_PARALLEL)
  for (int64_t chunk = 0; chunk < chunks.count; ++chunk) {
    T* first = scratch.get() + (density_size + colour_size) * omp_get_thread_num();
    T* second = first + density_size;
    const int64_t begin = chunk * chunks.size, end = std::min(in.n, begin + chunks.size);
    for (int64_t row = begin; row < end; row += kBlock) {
      const int64_t count = std::min(kBlock, end - row);
      T *free_buffer, *geo_gradient = density_work.output_gradient(first);
      const T* rows = colour_work.block().load(row, count, second);
      colour_work.block().hidden(row, count, rows, second);
      T* rgb_gradient = colour_work.output_gradient(second);
      colour_cotangent(grad.rgb + 3 * row, saved.rgb + 3 * row, count, colour.width(colour.n_layers), rgb_gradient);
      const T* z = colour_work.layers(begin, row, count, rows, rgb_gradient, second, &free_buffer);
      colour_work.input_gradient(count, z, colour.dims[0], geo_gradient);
      add_geo_cotangent(in, saved, grad, row, count, colour.width(0), geo_gradient);
      rows = density_work.block().load(row, count, first);
      density_work.block().hidden(row, count, rows, first);
      z = density_work.layers(begin, row, count, rows, geo_gradient, first, &free_buffer);
      if (grad.x.data == nullptr) continue;
      density_work.input_gradient(count, z, density.dims[0], free_buffer);
      store_block(free_buffer, density.width(0), row, count, density.dims[0], grad.x);
    }
  }
  density_work.finish(in.n, grad.density_params, nullptr, n_threads);
  colour_work.finish(in.n, grad.colour_params, grad.view, n_threads);
  if (in.n == 0 && grad.view != nullptr) std::fill_n(grad.view, n_rays * in.view.extra_width, T(0));
  return PMF_OK;
}

}  // namespace
}  // namespace pmf

// x (n, density_dims[0]) with any strides (in elements); view (n_rays, view_width) row-major and ray (n) sorted;
// colour_dims[0] = n_geo + view_width, its last is 3; sigmas (n), rgb (n, 3), geo (n, n_geo) row-major.
// Backward: sigmas, rgb and geo are the forward's; grad_geo may be null, and so may grad_x (strides given), grad_view,
// grad_density and grad_colour: that gradient is then not computed.
#define PMF_RADIANCE_INPUTS(T)                                                                                       \
  const T *x, int64_t x_row, int64_t x_col, const T *view, int64_t view_width, const int64_t *ray, int64_t n_rays,   \
      const T *density_params, const int64_t *density_dims, int64_t n_density, const T *colour_params,               \
      const int64_t *colour_dims, int64_t n_colour, double bias, double max_log_density, int64_t n
#define PMF_RADIANCE(T, GEO)                                                                                         \
  const pmf::Radiance<T> in {                                                                                        \
    {density_params, density_dims, n_density}, {colour_params, colour_dims, n_colour},                               \
        pmf::Input<T>({x, x_row, x_col}, nullptr, 0, nullptr, n),                                                    \
        pmf::Input<T>({GEO, density_dims[n_density], 1}, view, view_width, ray, n_rays), static_cast<T>(bias),       \
        static_cast<T>(max_log_density), n                                                                           \
  }
#define PMF_DEFINE_FUSED_RADIANCE(T, SUFFIX)                                                                         \
  PMF_EXPORT int pmf_fused_radiance_cpu_##SUFFIX(PMF_RADIANCE_INPUTS(T), T* sigmas, T* rgb, T* geo,                  \
                                                 int64_t n_threads) {                                                \
    PMF_RADIANCE(T, geo);                                                                                            \
    return pmf::guarded(in.check(n_rays, n_threads),                                                                 \
                        [&] { return pmf::forward<T>(in, {sigmas, rgb, geo}, n_threads); });                         \
  }                                                                                                                  \
  PMF_EXPORT int pmf_fused_radiance_backward_cpu_##SUFFIX(                                                           \
      const T* grad_sigmas, const T* grad_rgb, const T* grad_geo, PMF_RADIANCE_INPUTS(T), const T* sigmas,           \
      const T* rgb, const T* geo, T* grad_x, int64_t grad_x_row, int64_t grad_x_col, T* grad_view, T* grad_density,  \
      T* grad_colour, int64_t n_threads) {                                                                           \
    PMF_RADIANCE(T, geo);                                                                                            \
    const pmf::Gradients<T> grad{grad_sigmas, grad_rgb,     grad_geo,   {grad_x, grad_x_row, grad_x_col},            \
                                 grad_view,   grad_density, grad_colour};                                            \
    return pmf::guarded(in.check(n_rays, n_threads),                                                                 \
                        [&] { return pmf::backward<T>(in, {sigmas, rgb, geo}, grad, n_rays, n_threads); });                  \
  }

PMF_DEFINE_FUSED_RADIANCE(float, f32)
PMF_DEFINE_FUSED_RADIANCE(double, f64)
