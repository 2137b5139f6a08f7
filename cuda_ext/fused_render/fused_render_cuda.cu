// Rays to colour, depth, opacity and composited pose features in one launch, for inference.
//
// A warp has up to 16 rays under way, one to each of its first 16 lanes, and works on 16 samples at a time: one of each
// ray. A ray that ends hands its lane to the next of the warp's rays, so tiles stay full; only when rays run out does
// each of the last ones get 2, 4 or 8 of the 16 places. A round:
//   march      each ray's lane walks to its next samples in occupied cells
//   encode     two lanes per sample, each every second level of the hash grid
//   density    -> weights, by each ray's lane in order: the ray stops where too little light is left
//   pose       weight * relu(hidden) is summed per ray in shared memory, not projected: the network's last layer is
//              linear, so it is applied once per ray at the end and not once per sample
//   colour     -> sigmoid, summed by each ray's lane
// Warps never wait for each other after the block has staged the weights. Networks run on tensor cores with half
// operands and float sums, as in fused_mlp_cuda.cu. Nothing of a sample ever reaches global memory.
//
// Compared with the renderer (march, compact, composite): there is no compaction, because the early stop does its work,
// and samples between transmittance_eps and early_stop_eps, which compaction drops, are rendered. The two agree up to
// transmittance_eps, and up to the rounding to half. A ray's result does not depend on the other rays or on timing.
#include "fused_render_warp_cuda.h"

namespace pmf {
namespace {

__device__ __forceinline__ void stage_weights(const RenderPlan& plan, __half* weights) {
  for (int m = 0; m < plan.n_matrices; ++m) {
    const StagedMatrix& matrix = plan.matrices[m];
    for (int i = static_cast<int>(threadIdx.x); i < matrix.size(); i += static_cast<int>(blockDim.x)) {
      const int row = i / matrix.stride, to = i % matrix.stride;
      const bool is_tail = to >= matrix.split_to;
      const int col = is_tail ? to - matrix.split_to + matrix.split : to;
      const bool is_inside = row < matrix.rows && col < matrix.cols && (is_tail || col < matrix.split);
      weights[matrix.at + i] = is_inside ? matrix.source[row * matrix.cols + col] : __float2half_rn(0.0f);
    }
  }
}

template <class Stored, int F>
__global__ void __launch_bounds__(kMaxWarps* kWarp) fused_render_kernel(const RenderPlan plan) {
  PMF_DYNAMIC_SHARED(unsigned char, shared);
  __half* weights = reinterpret_cast<__half*>(shared);
  stage_weights(plan, weights);
  __syncthreads();
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  RenderWarp<Stored, F> work(plan, weights, shared + 2 * plan.weight_halves + warp * plan.warp_bytes());
  work.run(static_cast<int64_t>(blockIdx.x) * plan.warps + warp, static_cast<int64_t>(gridDim.x) * plan.warps);
}

// One block on each processor, with as many warps as its shared memory holds.
template <class Stored, int F>
int launch_render(RenderPlan plan, void* stream) {
  int shared_limit = 0, processors = 0;
  PMF_TRY(device_limits(&shared_limit, &processors));
  const int64_t room = (shared_limit - int64_t{2} * plan.weight_halves) / plan.warp_bytes();
  if (room < 1) return PMF_BAD_ARGUMENT;
  plan.warps = static_cast<int>(room < kMaxWarps ? room : kMaxWarps);
  const int64_t blocks = blocks_for(plan.n_rays, int64_t{kRows} * plan.warps);
  const unsigned grid = static_cast<unsigned>(blocks < processors ? blocks : processors);
  PMF_TRY(allow_shared(fused_render_kernel<Stored, F>, plan.shared_bytes()));
  return PMF_LAUNCH((fused_render_kernel<Stored, F>), grid, static_cast<unsigned>(plan.warps * kWarp),
                    static_cast<size_t>(plan.shared_bytes()), stream, plan);
}

template <class Stored>
int render(const RenderPlan& plan, int64_t n_features, void* stream) {
  switch (n_features) {
    case 1: return launch_render<Stored, 1>(plan, stream);
    case 2: return launch_render<Stored, 2>(plan, stream);
    case 4: return launch_render<Stored, 4>(plan, stream);
    default: return PMF_BAD_ARGUMENT;
  }
}

}  // namespace
}  // namespace pmf

// See fused_render.h; `params` itself and the arrays of the grid are host memory.
PMF_EXPORT int pmf_fused_render_cuda_f32(const PmfFusedRender* params, void* stream) {
  pmf::RenderPlan plan;
  if (!pmf::make_render_plan(*params, &plan)) return PMF_BAD_ARGUMENT;
  if (plan.n_rays == 0) return PMF_OK;
  return params->is_table_half ? pmf::render<__half>(plan, params->n_features, stream)
                               : pmf::render<float>(plan, params->n_features, stream);
}
