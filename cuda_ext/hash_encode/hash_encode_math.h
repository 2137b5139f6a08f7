// Hash grid (Mueller et al. 2022, arXiv:2201.05989) with tiny-cuda-nn's conventions, per point and level.
//
//   pos = x * scale + 0.5,  cell = floor(pos),  frac = pos - cell              x in [0, 1]^3
//   corner c in {0..7} adds bit 0 to x, bit 1 to y, bit 2 to z; its weight is the product of frac or 1 - frac
//   dense level:  index = (x + y res + z res^2) mod entries      (the far corner of the last cell wraps, as there)
//   hashed level: index = (x ^ 2654435761 y ^ 805459861 z) mod entries,  entries a power of two
//
// Functions are templates over a scalar or a vector of lanes: host loops, AVX-512 blocks and CUDA threads share them.
#pragma once
#include <cstdint>

#include "host_device.h"

namespace pmf {

struct HashLevel {
    double scale;                // pos = x * scale + 0.5
    uint32_t stride_y, stride_z; // of the index: row and slice of a dense level, primes of a hashed one
    uint32_t entries;            // rows of the table that belong to this level
    bool hashed;
};

PMF_HD HashLevel make_level(double scale, int64_t resolution, int64_t entries) {
    const bool hashed = static_cast<double>(resolution) * resolution * resolution > static_cast<double>(entries);
    const uint32_t rows = static_cast<uint32_t>(resolution);
    if (hashed) return {scale, 2654435761u, 805459861u, static_cast<uint32_t>(entries), true};
    return {scale, rows, rows * rows, static_cast<uint32_t>(entries), false};
}

// NaN goes to 0: comparisons with NaN are false, so a bad coordinate can never become a bad address.
template <class Real>
PMF_HD Real clamp_unit(Real x) {
    const Real zero{}, one = zero + 1;
    const Real low = x > zero ? x : zero;
    return low < one ? low : one;
}

// The terms of one axis are combined by xor (hashed) or sum (dense).
template <bool HASHED, class Uint>
PMF_HD Uint grid_index(Uint x, Uint y, Uint z, uint32_t entries) {
    if (HASHED) return (x ^ y ^ z) & (entries - 1);
    const Uint index = x + y + z;  // < 2 entries, because a corner coordinate is at most the resolution
    const Uint wrapped = index - entries;
    return wrapped < index ? wrapped : index;  // unsigned: without wrap-around the difference is huge
}

// Cell of a position and everything needed to visit its eight corners.
template <class Real, class Uint>
struct Cell {
    Uint x[2], y[2], z[2];       // index terms of the near and the far side
    Real wx[2], wy[2], wz[2];    // linear weights of the near and the far side
};

// `Convert` has static to_uint(Real) and to_real(Uint); positions are >= 0.5, so truncation is floor.
template <class Convert, class Real, class Uint>
PMF_HD Cell<Real, Uint> locate(Real px, Real py, Real pz, const HashLevel& level) {
    const Uint cx = Convert::to_uint(px), cy = Convert::to_uint(py), cz = Convert::to_uint(pz);
    const Real fx = px - Convert::to_real(cx), fy = py - Convert::to_real(cy), fz = pz - Convert::to_real(cz);
    const Uint ty = cy * level.stride_y, tz = cz * level.stride_z;
    return {{cx, cx + 1}, {ty, ty + level.stride_y}, {tz, tz + level.stride_z},
            {1 - fx, fx}, {1 - fy, fy}, {1 - fz, fz}};
}

template <bool HASHED, class Real, class Uint>
PMF_HD Uint corner_index(const Cell<Real, Uint>& cell, int corner, uint32_t entries) {
    return grid_index<HASHED, Uint>(cell.x[corner & 1], cell.y[(corner >> 1) & 1], cell.z[corner >> 2], entries);
}

template <class Real, class Uint>
PMF_HD Real corner_weight(const Cell<Real, Uint>& cell, int corner) {
    return cell.wx[corner & 1] * (cell.wy[(corner >> 1) & 1] * cell.wz[corner >> 2]);
}

}  // namespace pmf
