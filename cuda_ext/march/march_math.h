// Marching of one ray through a cascaded occupancy bitfield, shared by host and device.
//
// Grid: cascade k of K covers the cube centred at 0.5 with side 2^(k-(K-1)) by resolution^3 cells; K-1 is the unit cube.
// Lattice: t_0 = entry + jitter dt(entry), t_{i+1} = t_i + dt(t_i), dt(t) = clamp(cone_angle t, step_min, step_max).
// A ray's samples are the intervals of its lattice whose midpoint lies in an occupied cell. Empty cells are left in
// whole steps of the lattice: a step is skipped only when its midpoint is in the same empty cell by more than rounding
// error, so every sample is decided by its own look-up and skipping never changes the result. Where it is known that a
// whole block of kBlock^3 cells is empty, it is left as one.
// Constant steps (cone_angle = 0) are computed as t_0 + i dt: no rounding error builds up, and a skip is one division.
#pragma once
#include <cmath>
#include <cstdint>

#include "host_device.h"

namespace pmf {

// A ray is given up after this many steps, so that no input can make it endless; a legitimate ray of the unit cube
// (length <= sqrt 3) stays below it for steps down to 1.7e-6.
constexpr int64_t kMaxLatticeSteps = int64_t{1} << 20;

constexpr int64_t kBlock = 4;  // cells along the side of a block

template <typename S>
struct MarchGrid {
  const uint8_t* bits;  // bit ((k * resolution + z) * resolution + y) * resolution + x, little-endian in each byte
  int64_t resolution, n_cascades;
  S box_min[3], box_max[3];  // inside the unit cube
  S step_min, step_max, cone_angle;
  int64_t max_samples;
  const uint8_t* blocks = nullptr;  // may be null: 1 where a block, in the order of the cells, has an occupied cell

  // Blocks of a cascade end where the finer cascade ends, so that no block has cells which that one decides.
  PMF_HD bool can_have_blocks() const { return resolution % (n_cascades > 1 ? 4 * kBlock : kBlock) == 0; }
};

template <typename S>
struct MarchRay {
  S o[3], d[3], near, far, jitter;
};

// Where a midpoint falls: its cell in the finest cascade that contains it and whose cells are not smaller than dt.
template <typename S>
struct Voxel {
  S position[3];
  int64_t cell[3];
  int64_t level;
  S cells_per_unit;
  bool is_outermost, is_occupied;
};

template <typename S>
PMF_HD S step_at(const MarchGrid<S>& grid, S t) {
  const S dt = t * grid.cone_angle;
  const S below = dt < grid.step_max ? dt : grid.step_max;
  return below > grid.step_min ? below : grid.step_min;
}

// The part of [near, far] inside the box; false if there is none or if the ray is not made of finite numbers.
template <typename S>
PMF_HD bool clip_ray(const MarchGrid<S>& grid, const MarchRay<S>& ray, S* entry, S* exit) {
  S t0 = ray.near, t1 = ray.far;
  if (t0 != t0 || t1 != t1 || !std::isfinite(ray.jitter)) return false;
  for (int a = 0; a < 3; ++a) {
    const S o = ray.o[a], d = ray.d[a];
    if (!std::isfinite(o) || !std::isfinite(d)) return false;
    if (d == 0) {
      if (!(o >= grid.box_min[a] && o <= grid.box_max[a])) return false;
      continue;
    }
    const S to_min = (grid.box_min[a] - o) / d, to_max = (grid.box_max[a] - o) / d;
    const S first = d > 0 ? to_min : to_max, last = d > 0 ? to_max : to_min;
    if (first > t0) t0 = first;
    if (last < t1) t1 = last;
  }
  *entry = t0;
  *exit = t1;
  return std::isfinite(t0) && t0 < t1;
}

template <typename S>
PMF_HD Voxel<S> voxel_at(const MarchGrid<S>& grid, const MarchRay<S>& ray, S t, S dt) {
  Voxel<S> v;
  S reach = 0;
  for (int a = 0; a < 3; ++a) {
    v.position[a] = ray.o[a] + t * ray.d[a];
    const S away = std::fabs(v.position[a] - S(0.5));
    if (away > reach) reach = away;
  }
  const S resolution = S(grid.resolution);
  S scale = S(int64_t{1} << (grid.n_cascades - 1));
  int64_t level = 0;
  while (level < grid.n_cascades - 1 && (reach * scale > S(0.5) || dt * scale * resolution > 1)) {
    scale *= S(0.5);
    ++level;
  }
  int64_t index = level;
  for (int a = 2; a >= 0; --a) {
    const S q = ((v.position[a] - S(0.5)) * scale + S(0.5)) * resolution;
    const S inside = q > 0 ? (q < resolution - 1 ? q : resolution - 1) : S(0);  // NaN becomes 0
    v.cell[a] = static_cast<int64_t>(inside);
    index = index * grid.resolution + v.cell[a];
  }
  v.level = level;
  v.cells_per_unit = scale * resolution;
  v.is_outermost = level == grid.n_cascades - 1;
  v.is_occupied = (grid.bits[index >> 3] >> (index & 7)) & 1;
  return v;
}

// Cells along the side of the largest known empty cube around an empty voxel: of its block, or its own.
template <typename S>
PMF_HD int64_t empty_side(const MarchGrid<S>& grid, const Voxel<S>& v) {
  if (grid.blocks == nullptr) return 1;
  const int64_t n = grid.resolution / kBlock;
  const int64_t row = (v.level * n + v.cell[2] / kBlock) * n + v.cell[1] / kBlock;
  return grid.blocks[row * n + v.cell[0] / kBlock] ? 1 : kBlock;
}

// The ray is inside the voxel, or the cube of `side`^3 cells around it, at least until this t; rounding errors of
// positions are taken off.
template <typename S>
PMF_HD S voxel_exit(const MarchGrid<S>& grid, const MarchRay<S>& ray, const Voxel<S>& v, S t, int64_t side = 1) {
  const S epsilon = sizeof(S) == 4 ? S(1.1920929e-7) : S(2.220446049250313e-16);
  S length = INFINITY;
  for (int a = 0; a < 3; ++a) {
    const S d = ray.d[a];
    if (d == 0) continue;
    const S half = S(0.5) * S(grid.resolution);
    const int64_t first = v.cell[a] & ~(side - 1);  // a power of two
    const S face = S(0.5) + (S(first + (d > 0 ? side : 0)) - half) / v.cells_per_unit;
    const S margin = 8 * epsilon * (1 + std::fabs(ray.o[a]) + std::fabs(t * d));
    const S gap = (d > 0 ? face - v.position[a] : v.position[a] - face) - margin;
    const S along = gap / std::fabs(d);
    if (along < length) length = along;
  }
  return length > 0 ? t + length : t;
}

// Position on the lattice. `index` counts steps from `first`.
template <typename S>
struct LatticePoint {
  S first, t;
  int64_t index;

  PMF_HD S after(const MarchGrid<S>& grid, S dt) const {
    return grid.cone_angle == 0 ? first + S(index + 1) * dt : t + dt;
  }
};

// Moves past the steps whose midpoints are before `clear`, an empty voxel's exit; always at least one step.
template <typename S>
PMF_HD void skip(const MarchGrid<S>& grid, const Voxel<S>& v, S middle, S clear, S dt, LatticePoint<S>* p) {
  if (grid.cone_angle == 0) {
    S n = (clear - middle) / dt;
    n = n < S(kMaxLatticeSteps) ? n : S(kMaxLatticeSteps);
    p->index += 1 + static_cast<int64_t>(n);
    p->t = p->first + S(p->index) * dt;
    return;
  }
  do {
    p->t += dt;
    p->index += 1;
    dt = step_at(grid, p->t);
    // Longer steps may belong to a coarser cascade, whose cell is not known to be empty.
  } while (p->t + S(0.5) * dt < clear && (v.is_outermost || dt * v.cells_per_unit <= 1) &&
           p->index < kMaxLatticeSteps);
}

// Number of samples of the ray; they are written if `starts` is not null. Only with kBlocks are `grid.blocks` looked at:
// on a GPU they would cost registers that the kernel in double precision does not have.
template <bool kBlocks = false, typename S>
PMF_HD int64_t march_ray(const MarchGrid<S>& grid, const MarchRay<S>& ray, S* starts, S* ends) {
  S entry, exit;
  if (!clip_ray(grid, ray, &entry, &exit)) return 0;
  const S first = entry + ray.jitter * step_at(grid, entry);
  LatticePoint<S> p{first, first, 0};
  int64_t count = 0;
  while (count < grid.max_samples && p.index < kMaxLatticeSteps) {
    const S dt = step_at(grid, p.t);
    if (!(exit - p.t > S(1e-3) * dt)) break;  // a last crumb is dropped
    const S next = p.after(grid, dt);
    const S end = next < exit ? next : exit;
    const S middle = S(0.5) * (p.t + end);
    const Voxel<S> v = voxel_at(grid, ray, middle, dt);
    if (v.is_occupied) {
      if (starts != nullptr) {
        starts[count] = p.t;
        ends[count] = end;
      }
      ++count;
      p.t = next;
      p.index += 1;
      continue;
    }
    int64_t side = 1;
    if constexpr (kBlocks) side = empty_side(grid, v);
    const S clear = voxel_exit(grid, ray, v, middle, side);
    if (clear >= exit && grid.cone_angle == 0) break;
    skip(grid, v, middle, clear, dt, &p);
  }
  return count;
}

}  // namespace pmf
