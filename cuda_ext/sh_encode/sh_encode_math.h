// Real spherical harmonics of a direction, degree 1 to 4 (bands 0 to 3), in tiny-cuda-nn's order, signs and constants.
//
// Band l holds m = -l .. l; the polynomials are those of the unit sphere, extended to all of R^3 as written, which
// fixes the gradient: d value / d (x, y, z) of the polynomial, not projected onto the sphere.
#pragma once
#include "host_device.h"

namespace pmf {

template <int DEGREE, class Real>
PMF_HD void sh_values(Real x, Real y, Real z, Real* out) {
    out[0] = Real(0.28209479177387814);
    if (DEGREE == 1) return;
    out[1] = Real(-0.48860251190291987) * y;
    out[2] = Real(0.48860251190291987) * z;
    out[3] = Real(-0.48860251190291987) * x;
    if (DEGREE == 2) return;
    const Real xx = x * x, yy = y * y, zz = z * z;
    out[4] = Real(1.0925484305920792) * x * y;
    out[5] = Real(-1.0925484305920792) * y * z;
    out[6] = Real(0.94617469575755997) * zz - Real(0.31539156525251999);
    out[7] = Real(-1.0925484305920792) * x * z;
    out[8] = Real(0.54627421529603959) * (xx - yy);
    if (DEGREE == 3) return;
    out[9] = Real(0.59004358992664352) * y * (yy - 3 * xx);
    out[10] = Real(2.8906114426405538) * x * y * z;
    out[11] = Real(0.45704579946446572) * y * (1 - 5 * zz);
    out[12] = Real(0.3731763325901154) * z * (5 * zz - 3);
    out[13] = Real(0.45704579946446572) * x * (1 - 5 * zz);
    out[14] = Real(1.4453057213202769) * z * (xx - yy);
    out[15] = Real(0.59004358992664352) * x * (3 * yy - xx);
}

// Writes sum_k grad[k] * d value_k / d (x, y, z) to gradient[0..3).
template <int DEGREE, class Real>
PMF_HD void sh_gradient(Real x, Real y, Real z, const Real* grad, Real* gradient) {
    Real gx = 0, gy = 0, gz = 0;
    if (DEGREE > 1) {
        gx += Real(-0.48860251190291987) * grad[3];
        gy += Real(-0.48860251190291987) * grad[1];
        gz += Real(0.48860251190291987) * grad[2];
    }
    if (DEGREE > 2) {
        const Real a = Real(1.0925484305920792), b = Real(2 * 0.94617469575755997);
        gx += a * (y * grad[4] - z * grad[7] + x * grad[8]);
        gy += a * (x * grad[4] - z * grad[5] - y * grad[8]);
        gz += b * z * grad[6] - a * (y * grad[5] + x * grad[7]);
    }
    if (DEGREE > 3) {
        const Real xx = x * x, yy = y * y, zz = z * z, xy = x * y, xz = x * z, yz = y * z;
        const Real a = Real(0.59004358992664352), b = Real(2.8906114426405538), c = Real(0.45704579946446572);
        const Real d = Real(0.3731763325901154), e = Real(1.4453057213202769);
        gx += -6 * a * xy * grad[9] + b * yz * grad[10] + c * (1 - 5 * zz) * grad[13] + 2 * e * xz * grad[14] +
              3 * a * (yy - xx) * grad[15];
        gy += 3 * a * (yy - xx) * grad[9] + b * xz * grad[10] + c * (1 - 5 * zz) * grad[11] - 2 * e * yz * grad[14] +
              6 * a * xy * grad[15];
        gz += b * xy * grad[10] - 10 * c * (yz * grad[11] + xz * grad[13]) + d * (15 * zz - 3) * grad[12] +
              e * (xx - yy) * grad[14];
    }
    gradient[0] = gx;
    gradient[1] = gy;
    gradient[2] = gz;
}

}  // namespace pmf
