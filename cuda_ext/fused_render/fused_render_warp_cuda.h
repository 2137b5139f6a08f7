// The rounds of a warp of the fused renderer: see fused_render_cuda.cu.
#pragma once
#include "fused_render_ray_cuda.h"

namespace pmf {

// Per-warp shared memory, and the ray of this lane.
template <class Stored, int F>
struct RenderWarp {
  const RenderPlan& plan;
  const __half* weights;
  __half *inputs, *hidden, *views;
  float *stage, *sums, *starts, *ends, *sigmas, *sample_weights;
  int* owners;  // lane whose ray a sample belongs to, -1: none
  int lane;
  RayState ray;
  int first_sample, n_mine;  // samples of this lane's ray in this round

  __device__ __forceinline__ RenderWarp(const RenderPlan& plan_, const __half* weights_, unsigned char* memory)
      : plan(plan_), weights(weights_), inputs(reinterpret_cast<__half*>(memory)),
        hidden(inputs + kRows * plan_.input_stride()), views(hidden + kRows * plan_.hidden_stride()),
        stage(reinterpret_cast<float*>(views + kRows * plan_.view_columns)), sums(stage + kStageFloats),
        starts(sums + kRows * plan_.pose_sums()), ends(starts + kRows), sigmas(ends + kRows),
        sample_weights(sigmas + kRows), owners(reinterpret_cast<int*>(sample_weights + kRows)), lane(lane_of_warp()),
        ray{}, first_sample(0), n_mine(0) {
    for (int i = lane; i < kRows * plan.pose_sums(); i += kWarp) sums[i] = 0.0f;
    __syncwarp();
  }

  __device__ __forceinline__ const __half* matrix(int name) const { return weights + plan.matrices[name].at; }
  __device__ __forceinline__ int stride(int name) const { return plan.matrices[name].stride; }

  // Gives the lanes without a ray the next ones of the warp, until every lane has samples to show or none is left.
  // The warp's rays are 16 in every 16 * n_warps: `next` counts them.
  __device__ __forceinline__ void refill(int64_t warp, int64_t n_warps, int64_t* next) {
    while (true) {
      const unsigned vacant = __ballot_sync(kFullWarp, lane < kRows && !ray.is_active);
      if (vacant == 0 || ray_number(*next, warp, n_warps) >= plan.n_rays) return;
      const int64_t r = ray_number(*next + __popc(vacant & ((1u << lane) - 1)), warp, n_warps);
      const bool begins = ((vacant >> lane) & 1) != 0 && r < plan.n_rays;
      if (begins) {
        ray.begin(plan, r);
        if (ray.is_active) ray.write_view(plan, views + lane * plan.view_columns);
      }
      *next += __popc(vacant);
      retire(begins && !ray.is_active);
    }
  }

  static __device__ __forceinline__ int64_t ray_number(int64_t i, int64_t warp, int64_t n_warps) {
    return (i / kRows * n_warps + warp) * kRows + i % kRows;
  }

  // Places for samples: 1 for each ray, or 2, 4, 8 when few are left. Places of a ray never cross the middle.
  __device__ __forceinline__ void collect(unsigned active) {
    int quota = 1;
    while (quota < kRows / 2 && 2 * quota * __popc(active) <= kRows) quota *= 2;
    if (lane < kRows) owners[lane] = -1;
    __syncwarp();
    n_mine = 0;
    if (ray.is_active) {
      first_sample = quota * __popc(active & ((1u << lane) - 1));
      do {
        const int s = first_sample + n_mine++;
        starts[s] = ray.start;
        ends[s] = ray.end;
        owners[s] = lane;
        ray.is_active = ray.walk.next(plan.grid, &ray.start, &ray.end);
      } while (ray.is_active && n_mine < quota);
    }
    __syncwarp();
  }

  template <bool HASHED>
  static __device__ __forceinline__ void interpolate(const Cell<float, uint32_t>& cell, uint32_t entries,
                                                     const Stored* rows, float (&sum)[F]) {
#pragma unroll
    for (int c = 0; c < 8; ++c) {
      float feature[F];
      load_row(rows, corner_index<HASHED>(cell, c, entries), feature);
      const float weight = corner_weight(cell, c);
#pragma unroll
      for (int f = 0; f < F; ++f) sum[f] += weight * feature[f];
    }
  }

  // The input rows: encoding of the samples and the view of their rays.
  __device__ __forceinline__ void encode() {
    const int s = lane % kRows, owner = owners[s], from = owner < 0 ? 0 : owner;
    const float middle = 0.5f * (starts[s] + ends[s]);
    float x[3];
#pragma unroll
    for (int a = 0; a < 3; ++a)
      x[a] = __shfl_sync(kFullWarp, ray.walk.ray.o[a], from) + middle * __shfl_sync(kFullWarp, ray.walk.ray.d[a], from);
    __half* row = inputs + s * plan.input_stride();
    for (int l = lane / kRows; l < plan.levels.count && owner >= 0; l += kWarp / kRows) {
      const HashLevel level = plan.levels[l];
      const auto cell = locate_point(Point<float>{x[0], x[1], x[2]}, plan.levels.scale[l], level);
      const Stored* rows = static_cast<const Stored*>(plan.table) + plan.levels.first_row[l] * F;
      float sum[F] = {};
      if (level.hashed) {
        interpolate<true>(cell, level.entries, rows, sum);
      } else {
        interpolate<false>(cell, level.entries, rows, sum);
      }
#pragma unroll
      for (int f = 0; f < F; ++f) put(row + l * F + f, sum[f]);
    }
    for (int c = plan.encoding + lane / kRows; c < plan.encoding_columns; c += kWarp / kRows) put(row + c, 0.0f);
    auto* view = reinterpret_cast<uint4*>(row + plan.encoding_columns + kGeoColumns);
    const auto* of_ray = reinterpret_cast<const uint4*>(views + from * plan.view_columns);
    for (int c = lane / kRows; c < plan.view_columns / 8; c += kWarp / kRows) view[c] = of_ray[c];
    __syncwarp();
  }

  // geo into the input rows, the density of each sample.
  __device__ __forceinline__ void density() {
    const int in_stride = plan.input_stride(), h_stride = plan.hidden_stride(), h_tiles = plan.hidden / kTile;
    hidden_layer<1, 2>(inputs, in_stride, matrix(kDensity0), stride(kDensity0), plan.encoding_columns / kTile,
                       plan.hidden, hidden, h_stride, stage);
    warp_product<__half, 1, 2, true>(hidden, h_stride, matrix(kDensity1), stride(kDensity1), h_tiles, 0, 1, stage,
                                     [&](const float* tile, int, int) {
      if (lane < kRows) {
        const float log_density = tile[lane * kStageStride] + plan.log_init_density;
        sigmas[lane] = expf(log_density > plan.max_log_density ? plan.max_log_density : log_density);
      }
      for_pairs(tile, [&](int r, int c, float a, float b) {
        put_pair(inputs + r * in_stride + plan.encoding_columns + c, c < plan.n_geo ? a : 0.0f,
                 c + 1 < plan.n_geo ? b : 0.0f);
      });
    });
    __syncwarp();
  }

  // Weights of the lane's samples; those in the dark lose their owner, and end the ray.
  __device__ __forceinline__ void absorb() {
    for (int k = 0; k < n_mine; ++k) {
      const int s = first_sample + k;
      if (!ray.absorb(sigmas[s], starts[s], ends[s], plan.early_stop_eps, sample_weights + s)) {
        for (int dark = k; dark < n_mine; ++dark) owners[first_sample + dark] = -1;
        n_mine = k;
      }
    }
    if (ray.transmittance < plan.early_stop_eps) ray.is_active = false;
    __syncwarp();
  }

  // Sums of weight * relu(hidden) per ray: a lane takes one column of 8 rows, which are of other rays than the rest.
  __device__ __forceinline__ void pose() {
    if (plan.projection == nullptr) return;
    const int depth = (plan.encoding_columns + kGeoColumns) / kTile;
    warp_product<__half, 1, 2, true>(inputs, plan.input_stride(), matrix(kPose0), stride(kPose0), depth, 0,
                                     plan.pose_hidden / kTile, stage, [&](const float* tile, int, int col) {
      const int c = lane % kTile, first = lane / kTile * (kTile / 2);
      for (int r = first; r < first + kTile / 2; ++r) {
        if (owners[r] < 0) continue;
        sums[owners[r] * plan.pose_hidden + col + c] += sample_weights[r] * relu(tile[r * kStageStride + c]);
      }
    });
    __syncwarp();
  }

  __device__ __forceinline__ void colour() {
    const int in_stride = plan.input_stride(), h_stride = plan.hidden_stride(), h_tiles = plan.hidden / kTile;
    const __half* input = inputs + plan.encoding_columns;
    hidden_layer<1, 2>(input, in_stride, matrix(kColour0), stride(kColour0), (kGeoColumns + plan.view_columns) / kTile,
                       plan.hidden, hidden, h_stride, stage);
    hidden_layer<1, 2>(hidden, h_stride, matrix(kColour1), stride(kColour1), h_tiles, plan.hidden, inputs, in_stride,
                       stage);
    warp_product<__half, 1, 2, true>(inputs, in_stride, matrix(kColour2), stride(kColour2), h_tiles, 0, 1, stage,
                                     [&](const float* tile, int, int) {
      for (int k = 0; k < n_mine; ++k) {
        const int s = first_sample + k;
        for (int c = 0; c < 3; ++c)
          ray.rgb[c] += sample_weights[s] / (1.0f + expf(-tile[s * kStageStride + c]));
      }
    });
    __syncwarp();
  }

  // Writes the rays that have ended, and clears their pose sums for the next.
  __device__ __forceinline__ void retire(bool has_ended) {
    if (has_ended) ray.write(plan);
    unsigned ended = __ballot_sync(kFullWarp, has_ended);
    for (; plan.projection != nullptr && ended != 0; ended &= ended - 1) {
      const int from = __ffs(static_cast<int>(ended)) - 1;
      const int64_t r = __shfl_sync(kFullWarp, ray.number, from);
      for (int c = lane; c < plan.pose_hidden; c += kWarp) {
        float* sum = sums + from * plan.pose_hidden + c;
        plan.pose[r * plan.pose_hidden + c] = *sum;
        *sum = 0.0f;
      }
    }
    __syncwarp();
  }

  // The last layer of the pose network for 16 rays of the warp at a time, in place.
  __device__ __forceinline__ void project(int64_t warp, int64_t n_warps) {
    const int width = plan.pose_hidden, h_stride = plan.hidden_stride();
    for (int64_t i = 0; plan.projection != nullptr; i += kRows) {
      const int64_t first = ray_number(i, warp, n_warps);
      if (first >= plan.n_rays) return;
      load_rows<__half, kRows>(plan.pose, width, 1, first, plan.n_rays, width, hidden, h_stride, 0);
      __syncwarp();
      warp_product<__half, 1, 2, true>(hidden, h_stride, plan.projection, width, width / kTile, 0, width / kTile, stage,
                                       [&](const float* tile, int, int col) {
        for_pairs(tile, [&](int r, int c, float a, float b) {
          if (first + r < plan.n_rays)
            *reinterpret_cast<float2*>(plan.pose + (first + r) * width + col + c) = make_float2(a, b);
        });
      });
      __syncwarp();
    }
  }

  __device__ __forceinline__ void run(int64_t warp, int64_t n_warps) {
    int64_t next = 0;
    while (true) {
      refill(warp, n_warps, &next);
      const unsigned active = __ballot_sync(kFullWarp, ray.is_active);
      if (active == 0) break;
      collect(active);
      encode();
      density();
      absorb();
      pose();
      colour();
      retire(((active >> lane) & 1) != 0 && !ray.is_active);
    }
    project(warp, n_warps);
  }
};

}  // namespace pmf
