// The KL estimators of one row: triton_kernels/token_kl.py has the formulas.
#pragma once

#include <c10/util/Exception.h>

#include <cmath>
#include <string_view>

namespace dsm {

// triton_kernels/objective.py: log ratios are clamped to +-20 before exp.
constexpr double kLogRatioLimit = 20.0;

enum class KL { k1, k2, k3, k1_plus, k3_plus };

inline KL parse_kl(std::string_view name) {
  if (name == "k1") return KL::k1;
  if (name == "k2") return KL::k2;
  if (name == "k3") return KL::k3;
  if (name == "k1+") return KL::k1_plus;
  TORCH_CHECK_VALUE(name == "k3+", "kl must be one of k1, k2, k3, k1+, k3+; got ", name);
  return KL::k3_plus;
}

// NaN stays NaN.
template <typename T>
T clamp(T x, T low, T high) {
  return x < low ? low : (x > high ? high : x);
}

template <typename T>
struct ValueAndSlope {
  T value, slope;
};

// The estimate from d = logprob - ref_logprob, and its derivative by d.
template <typename T>
ValueAndSlope<T> kl_and_slope(T d, KL kl) {
  if (kl == KL::k1) return {d, T(1)};
  if (kl == KL::k1_plus) return {d, d};
  if (kl == KL::k2) return {d * d / 2, d};
  const T limit = T(kLogRatioLimit);
  const T c = clamp(d, -limit, limit);
  // In double, so that the sum does not cancel near 0.
  const T value = T(std::expm1(-double(c)) + double(c));
  if (kl == KL::k3_plus) return {value, d};
  return {value, std::abs(d) <= limit ? c - value : T(0)};
}

}  // namespace dsm
