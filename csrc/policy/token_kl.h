// The KL estimators: triton_kernels/policy/token_kl.py has the formulas. Loops have neither branches nor calls, so that
// the compiler vectorises them for float.
#pragma once

#include <c10/util/Exception.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <string_view>

namespace dsm {

// triton_kernels/policy/objective.py: log ratios are clamped to +-20 before exp.
constexpr double kLogRatioLimit = 20.0;

// Rows that are taken through one step of a computation together, small enough for the first-level cache.
constexpr int64_t kBlock = 256;

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

// exp(x) for |x| <= 20: 2^n p(x - n ln 2), with the polynomial of Cephes' expf. NaN stays NaN.
inline float bounded_exp(float x) {
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, which is then in the low bits
  const float shifted = x * 1.44269504f + magic;
  const float n = shifted - magic;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  uint32_t bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = (bits + 127) << 23;  // 2^n
  float scale;
  std::memcpy(&scale, &bits, sizeof scale);
  return p * scale;
}

inline double bounded_exp(double x) { return std::exp(x); }

// exp(-c) - 1 + c for |c| <= 20. The sum cancels near 0, so its Taylor series serves there.
inline float k3(float c) {
  float series = 1 / 720.0f - c * (1 / 5040.0f - c * (1 / 40320.0f - c * (1 / 362880.0f)));
  series = c * c * (1 / 2.0f - c * (1 / 6.0f - c * (1 / 24.0f - c * (1 / 120.0f - c * series))));
  const float sum = bounded_exp(-c) - 1 + c;
  return std::abs(c) < 0.5f ? series : sum;
}

inline double k3(double c) { return std::expm1(-c) + c; }

// For n differences d = logprob - ref_logprob: the estimate, and its derivative by d.
template <typename T>
void kl_and_slope(const T* d, int64_t n, KL kl, T* value, T* slope) {
  const T limit = T(kLogRatioLimit);
  if (kl == KL::k3 || kl == KL::k3_plus) {
    for (int64_t i = 0; i < n; ++i) {
      const T c = clamp(d[i], -limit, limit);
      value[i] = k3(c);
      slope[i] = std::abs(d[i]) > limit ? T(0) : c - value[i];
    }
  } else if (kl == KL::k2) {
    for (int64_t i = 0; i < n; ++i) value[i] = d[i] * d[i] / 2;
  } else {
    for (int64_t i = 0; i < n; ++i) value[i] = d[i], slope[i] = d[i] == d[i] ? T(1) : d[i];
  }
  if (kl == KL::k2 || kl == KL::k1_plus || kl == KL::k3_plus) {
    for (int64_t i = 0; i < n; ++i) slope[i] = d[i];
  }
}

}  // namespace dsm
