// Which packed samples are worth a second look, shared by host and device.
#pragma once
#include "../composite/composite_math.h"

namespace pmf {

// Walks a ray from the camera; keep(tau) says whether the next sample is lit and opaque enough.
// Written as "not below", so that a NaN density is kept and stays visible.
template <typename S>
struct Sieve {
  S transmittance_eps;
  S alpha_eps;
  S transmittance = 1;

  PMF_HD bool keep(Attenuation<S> sample) {
    const bool is_kept = !(transmittance < transmittance_eps) && !(sample.alpha < alpha_eps);
    transmittance *= sample.pass;
    return is_kept;
  }
};

}  // namespace pmf
