// A ray under way: where its march stands and what has been composited.
#pragma once
#include "fused_render_plan_cuda.h"

#include "../composite/composite_math.h"
#include "../sh_encode/sh_encode_math.h"

namespace pmf {

// march_ray (march_math.h) as a generator: the same samples, one at a call.
struct RayWalk {
  MarchRay<float> ray;
  LatticePoint<float> point;
  float exit;
  int64_t count;

  __device__ __forceinline__ bool begin(const MarchGrid<float>& grid) {
    float entry;
    if (!clip_ray(grid, ray, &entry, &exit)) return false;
    const float first = entry + ray.jitter * step_at(grid, entry);
    point = {first, first, 0};
    count = 0;
    return true;
  }

  __device__ __forceinline__ bool next(const MarchGrid<float>& grid, float* start, float* end) {
    while (count < grid.max_samples && point.index < kMaxLatticeSteps) {
      const float dt = step_at(grid, point.t);
      if (!(exit - point.t > 1e-3f * dt)) return false;  // a last crumb is dropped
      const float following = point.after(grid, dt);
      const float last = following < exit ? following : exit;
      const float middle = 0.5f * (point.t + last);
      const Voxel<float> v = voxel_at(grid, ray, middle, dt);
      if (v.is_occupied) {
        *start = point.t;
        *end = last;
        ++count;
        point.t = following;
        point.index += 1;
        return true;
      }
      const float clear = voxel_exit(grid, ray, v, middle);
      if (clear >= exit && grid.cone_angle == 0) return false;
      skip(grid, v, middle, clear, dt, &point);
    }
    return false;
  }
};

struct RayState {
  RayWalk walk;
  int64_t number;        // which ray
  float start, end;      // the sample that comes next
  float transmittance, rgb[3], depth, opacity;
  int64_t kept;          // samples with a weight
  bool is_active;        // there is a next sample, and light that reaches it

  // Begins ray `r`, up to its first sample.
  __device__ __forceinline__ void begin(const RenderPlan& plan, int64_t r) {
    const float *o = plan.origins + 3 * r, *d = plan.directions + 3 * r;
    walk.ray = {{o[0], o[1], o[2]},
                {d[0], d[1], d[2]},
                plan.near[r],
                plan.far[r],
                plan.jitter != nullptr ? plan.jitter[r] : 0.0f};
    number = r;
    transmittance = 1.0f;
    rgb[0] = rgb[1] = rgb[2] = depth = opacity = 0.0f;
    kept = 0;
    is_active = walk.begin(plan.grid) && walk.next(plan.grid, &start, &end);
  }

  // The weight of a sample; false if too little light is left for it, and then for all behind it.
  __device__ __forceinline__ bool absorb(float sigma, float from, float to, float early_stop_eps, float* weight) {
    if (transmittance < early_stop_eps) return false;
    const Attenuation<float> medium = attenuation<float>(sigma * (to - from));
    *weight = transmittance * medium.alpha;
    transmittance *= medium.pass;
    depth += *weight * (0.5f * (from + to));
    opacity += *weight;
    ++kept;
    return true;
  }

  __device__ __forceinline__ void write(const RenderPlan& plan) const {
    for (int c = 0; c < 3; ++c) plan.rgb[3 * number + c] = rgb[c];
    plan.depth[number] = depth;
    plan.opacity[number] = opacity;
    if (plan.n_samples != nullptr) plan.n_samples[number] = kept;
  }

  // Spherical harmonics of the direction and the appearance code, as the colour network reads them.
  __device__ __forceinline__ void write_view(const RenderPlan& plan, __half* view) const {
    float values[16];
    const float *d = walk.ray.d;
    switch (plan.sh_degree) {
      case 1: sh_values<1, float>(d[0], d[1], d[2], values); break;
      case 2: sh_values<2, float>(d[0], d[1], d[2], values); break;
      case 3: sh_values<3, float>(d[0], d[1], d[2], values); break;
      default: sh_values<4, float>(d[0], d[1], d[2], values); break;
    }
    const int n_sh = plan.sh_degree * plan.sh_degree;
#pragma unroll
    for (int k = 0; k < 16; ++k) {
      if (k < n_sh) put(view + k, values[k]);
    }
    for (int k = n_sh; k < plan.view_columns; ++k) {
      const int a = k - n_sh;
      const bool is_given = plan.appearance != nullptr && a < plan.appearance_dim;
      put(view + k, is_given ? plan.appearance[number * plan.appearance_dim + a] : 0.0f);
    }
  }
};

}  // namespace pmf
