// Parameters of the fused inference kernel, as C and Python see them: plain data, eight bytes to a field.
//
// Field (posemap_fast/fields/hash_field.py), with half weights; every matrix is (n_out, n_in) row-major, matrices of a
// network follow one another:
//   encoding = hash(x)                       (L * F)            L * F <= 32
//   geo      = density MLP(encoding)         1 hidden layer, n_geo <= 16 outputs
//   density  = exp(min(geo[0] + log_init_density, max_log_density))
//   rgb      = sigmoid(colour MLP([geo, SH(d), appearance]))    2 hidden layers, SH and appearance together <= 32
//   h        = pose MLP([encoding, geo])     1 hidden layer of pose_hidden, as many outputs
// `hidden` and `pose_hidden` are 16, 32, 48 or 64. Everything else is PMF_BAD_ARGUMENT.
#pragma once
#include <cstdint>

extern "C" {

struct PmfFusedRender {
  // Rays in the unit cube; device memory.
  const float* origins;     // (n_rays, 3)
  const float* directions;  // (n_rays, 3), unit length
  const float* near;        // (n_rays)
  const float* far;         // (n_rays)
  const float* jitter;      // (n_rays) in [0, 1), or null: zeros
  int64_t n_rays;

  // Occupancy grid and steps, as march takes them.
  const double* aabb;   // host, (2, 3)
  const uint8_t* bits;  // device
  int64_t resolution, n_cascades;
  double step_min, step_max, cone_angle;
  int64_t max_samples;  // per ray, marched

  // Hash grid.
  const void* table;           // device, (entries, n_features) half or float, aligned to 16 bytes
  int64_t is_table_half;       // 1 or 0
  const double* scales;        // host, (n_levels)
  const int64_t* resolutions;  // host, (n_levels)
  const int64_t* offsets;      // host, (n_levels + 1), in entries
  int64_t n_levels, n_features;  // 1, 2 or 4 features; with 8 the float kernel spills on sm_90

  // Networks; device, half, aligned to 32 bytes.
  const void* density_weights;  // (hidden, L F), (n_geo, hidden)
  const void* colour_weights;   // (hidden, n_geo + sh_degree^2 + appearance_dim), (hidden, hidden), (3, hidden)
  const void* pose_weights;     // (pose_hidden, L F + n_geo), (pose_hidden, pose_hidden); null: no PoseMap
  const float* appearance;      // device, (n_rays, appearance_dim), or null: zeros
  int64_t hidden, n_geo, sh_degree, appearance_dim, pose_hidden;
  double log_init_density, max_log_density;
  double early_stop_eps;  // a sample with less light in front of it than this, and all behind it, is left out

  // Outputs; device.
  float* rgb;          // (n_rays, 3), without background
  float* depth;        // (n_rays) sum of weight * mid-distance, field units
  float* opacity;      // (n_rays)
  float* pose;         // (n_rays, pose_hidden) composited h; may be null when pose_weights is
  int64_t* n_samples;  // (n_rays) samples with a weight, or null
};

}  // extern "C"
