// What the fused renderer's kernel is given, and where its shared memory lies.
#pragma once
#include <cstdint>

#include "launch.h"

#include "../fused_mlp/fused_mlp_tile_cuda.h"
#include "../hash_encode/hash_encode_cuda.h"
#include "../march/march_math.h"
#include "fused_render.h"

namespace pmf {

constexpr int kRows = kTile;  // samples of a warp at a time, and rays under way in it
constexpr int kMaxEncoding = 32, kMaxView = 32, kMaxHidden = 64, kGeoColumns = kTile;
constexpr int kMaxWarps = 16;  // of a block

// A matrix in shared memory, (padded rows, stride). Columns of the source from `split` on go to `split_to` on.
struct StagedMatrix {
  const __half* source;
  int rows, cols, split, split_to;
  int at, stride, padded_rows;

  PMF_HD int size() const { return padded_rows * stride; }
};

enum MatrixName { kDensity0, kDensity1, kColour0, kColour1, kColour2, kPose0, kMatrices };

struct RenderPlan {
  const float *origins, *directions, *near, *far, *jitter, *appearance;
  int64_t n_rays;
  MarchGrid<float> grid;
  Levels<float> levels;
  const void* table;
  StagedMatrix matrices[kMatrices];
  const __half* projection;  // (pose_hidden, pose_hidden), null: no PoseMap
  int encoding, encoding_columns;  // values of a sample, and with padding
  int n_geo, sh_degree, appearance_dim, view_columns, hidden, pose_hidden;
  float log_init_density, max_log_density, early_stop_eps;
  float *rgb, *depth, *opacity, *pose;
  int64_t* n_samples;
  int n_matrices, weight_halves, warps;

  // The input row of a sample: [encoding | geo | view], so that each network reads neighbouring columns.
  PMF_HD int input_stride() const {
    const int columns = encoding_columns + kGeoColumns + view_columns;
    return (columns > hidden ? columns : hidden) + kRowPad;
  }
  PMF_HD int hidden_stride() const { return (hidden > pose_hidden ? hidden : pose_hidden) + kRowPad; }
  PMF_HD int pose_sums() const { return projection != nullptr ? pose_hidden : 0; }
  // Of a warp: inputs, hidden, view of each ray (half); stage, pose sums, five numbers for each sample (32 bits).
  // A multiple of 32 bytes, as tensor cores ask.
  PMF_HD int64_t warp_bytes() const {
    return int64_t{2} * kRows * (input_stride() + hidden_stride() + view_columns) +
           int64_t{4} * (kStageFloats + kRows * pose_sums() + kRows * 5);
  }
  PMF_HD int64_t shared_bytes() const { return int64_t{2} * weight_halves + warps * warp_bytes(); }
};

inline void add_matrix(RenderPlan* plan, int name, const __half* source, int rows, int cols, int split, int split_to,
                       int columns) {
  plan->matrices[name] = {source, rows, cols, split, split_to, plan->weight_halves, columns + kRowPad,
                          padded_width(rows)};
  plan->weight_halves += plan->matrices[name].size();
}

inline bool is_layer_width(int64_t width) { return width > 0 && width <= kMaxHidden && width % kTile == 0; }

// False if the kernel does not support these sizes.
inline bool make_render_plan(const PmfFusedRender& p, RenderPlan* plan) {
  const Grid levels{p.scales, p.resolutions, p.offsets, p.n_levels};
  if (p.n_levels < 1 || p.n_features < 1 || p.n_levels > kMaxEncoding || p.n_levels * p.n_features > kMaxEncoding)
    return false;
  if (p.n_geo < 1 || p.n_geo > kGeoColumns || p.sh_degree < 1 || p.sh_degree > 4 || p.appearance_dim < 0) return false;
  const int64_t view = p.sh_degree * p.sh_degree + p.appearance_dim;
  const bool has_pose = p.pose_weights != nullptr;
  if (view > kMaxView || !is_layer_width(p.hidden) || (has_pose && !is_layer_width(p.pose_hidden))) return false;
  if (p.n_rays < 0 || (p.n_rays > 0 && has_pose && p.pose == nullptr)) return false;
  *plan = {};
  plan->origins = p.origins, plan->directions = p.directions, plan->near = p.near, plan->far = p.far;
  plan->jitter = p.jitter, plan->appearance = p.appearance, plan->n_rays = p.n_rays, plan->table = p.table;
  plan->levels = select_levels<float>(levels, [](int64_t) { return true; });
  plan->grid = {p.bits, p.resolution, p.n_cascades, {}, {}, static_cast<float>(p.step_min),
                static_cast<float>(p.step_max), static_cast<float>(p.cone_angle), p.max_samples};
  for (int a = 0; a < 3; ++a) {
    const float low = static_cast<float>(p.aabb[a]), high = static_cast<float>(p.aabb[3 + a]);
    plan->grid.box_min[a] = low > 0 ? low : 0.0f;
    plan->grid.box_max[a] = high < 1 ? high : 1.0f;
  }
  plan->encoding = static_cast<int>(p.n_levels * p.n_features), plan->n_geo = static_cast<int>(p.n_geo);
  plan->encoding_columns = padded_width(plan->encoding), plan->view_columns = padded_width(static_cast<int>(view));
  plan->sh_degree = static_cast<int>(p.sh_degree), plan->appearance_dim = static_cast<int>(p.appearance_dim);
  plan->hidden = static_cast<int>(p.hidden), plan->pose_hidden = has_pose ? static_cast<int>(p.pose_hidden) : 0;
  plan->log_init_density = static_cast<float>(p.log_init_density);
  plan->max_log_density = static_cast<float>(p.max_log_density);
  plan->early_stop_eps = static_cast<float>(p.early_stop_eps);
  plan->rgb = p.rgb, plan->depth = p.depth, plan->opacity = p.opacity, plan->pose = p.pose;
  plan->n_samples = p.n_samples;

  const int in = plan->encoding, in_columns = plan->encoding_columns, geo = plan->n_geo, h = plan->hidden;
  const int colour_in = geo + static_cast<int>(view);
  const auto* density = static_cast<const __half*>(p.density_weights);
  add_matrix(plan, kDensity0, density, h, in, in, in, in_columns);
  add_matrix(plan, kDensity1, density + h * in, geo, h, h, h, h);
  const auto* colour = static_cast<const __half*>(p.colour_weights);
  add_matrix(plan, kColour0, colour, h, colour_in, geo, kGeoColumns, kGeoColumns + plan->view_columns);
  add_matrix(plan, kColour1, colour + h * colour_in, h, h, h, h, h);
  add_matrix(plan, kColour2, colour + h * colour_in + h * h, 3, h, h, h, h);
  plan->n_matrices = kPose0;
  if (!has_pose) return true;
  const auto* pose = static_cast<const __half*>(p.pose_weights);
  add_matrix(plan, kPose0, pose, plan->pose_hidden, in + geo, in, in_columns, in_columns + kGeoColumns);
  plan->projection = pose + plan->pose_hidden * (in + geo);
  plan->n_matrices = kMatrices;
  return true;
}

}  // namespace pmf
