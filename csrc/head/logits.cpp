#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "../policy/token_kl.h"
#include "../vectorised.h"

// triton_kernels/head/logits.py has the formulas. A row is computed in blocks that stay in the first-level cache, so
// that its logits are read from memory once. The simd pragmas allow sums in another order, and in-place loops.
namespace dsm {
namespace {

constexpr int64_t kTokens = 1024;
constexpr int64_t kTokensPerTask = 32768;

// Stands for log 0 where it is multiplied by 0, so that p log p is 0 and not NaN: exp of it is 0.
constexpr double kLogZero = -1e4;

// exp(x) for kLogZero <= x <= 88, in float 0 where its result would be subnormal. NaN stays NaN.
inline float exp_or_zero(float x) {
  const float e = bounded_exp(x);
  return x < -87.0f ? 0.0f : e;
}

inline double exp_or_zero(double x) { return std::exp(x); }

// Within 1e-7 of tanh: a series near 0, where the quotient would cancel. NaN stays NaN.
inline float bounded_tanh(float x) {
  const float size = std::abs(x), square = x * x;
  const float e = bounded_exp(-2 * (size > 20.0f ? 20.0f : size));
  float series = -17 / 315.0f + square * (62 / 2835.0f);
  series = size * (1 + square * (-1 / 3.0f + square * (2 / 15.0f + square * series)));
  return std::copysign(size < 0.25f ? series : (1 - e) / (1 + e), x);
}

inline double bounded_tanh(double x) { return std::tanh(x); }

template <typename T>
T at_least(T x, T low) {
  return x < low ? low : x;
}

// The head: all that the rows share. s = z / temperature with z = logits + bias, capped if kCapped. Neither that nor an
// absent bias is a branch between the loops: gcc would copy them for each case, and not vectorise the copies.
template <typename T, bool kCapped>
struct Head {
  const T* bias;  // null without
  T softcap, inverse_temperature;
  int64_t V;

  // s of n tokens from v on.
  void scaled(const T* row, int64_t v, int64_t n, T* s) const {
    static const T zeros[kTokens] = {};
    const T *logits = row + v, *added = bias ? bias + v : zeros;
    const T inverse = 1 / softcap;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      T z = logits[i] + added[i];
      if constexpr (kCapped) z = softcap * bounded_tanh(z * inverse);
      s[i] = z * inverse_temperature;
    }
  }

  // dz / d(logits + bias), from s; uncap is temperature / softcap.
  T slope(T s, T uncap) const {
    if constexpr (!kCapped) return 1;
    return 1 - (s * uncap) * (s * uncap);
  }
};

// NaN is skipped.
template <typename T>
T maximum(const T* s, int64_t n) {
  T largest = -std::numeric_limits<T>::infinity();
#pragma omp simd reduction(max : largest)
  for (int64_t i = 0; i < n; ++i) largest = s[i] > largest ? s[i] : largest;
  return largest;
}

template <typename T>
struct RowStats {
  T max = -std::numeric_limits<T>::infinity(), target = max;
  double sum = 0, weighted = 0;  // of exp(s - max), and of that times s - max

  template <bool kCapped>
  RowStats(const Head<T, kCapped>& head, const T* row, int64_t target_id) {
    T s[kTokens];
    for (int64_t v = 0; v < head.V; v += kTokens) {
      const int64_t n = std::min(kTokens, head.V - v);
      head.scaled(row, v, n, s);
      raise(maximum(s, n));
      if (target_id >= v && target_id < v + n) target = s[target_id - v];
      // With nothing yet but tokens that a bias removed, -inf - (-inf) would be NaN.
      const T base = max == -std::numeric_limits<T>::infinity() ? T(0) : max, log_zero = T(kLogZero);
      T block_sum = 0, block_weighted = 0;
#pragma omp simd reduction(+ : block_sum, block_weighted)
      for (int64_t i = 0; i < n; ++i) {
        const T log_e = at_least(s[i] - base, log_zero), e = exp_or_zero(log_e);
        block_sum += e;
        block_weighted += e * log_e;
      }
      sum += block_sum;
      weighted += block_weighted;
    }
  }

  // The sums so far, by a maximum that is at least `other`.
  void raise(T other) {
    if (other <= max) return;
    const double shift = at_least(double(max) - double(other), kLogZero), scale = std::exp(shift);
    weighted = scale * (weighted + shift * sum);
    sum *= scale;
    max = other;
  }
};

// The gradient of one row by its logits.
template <typename T>
struct RowSlopes {
  T g, h, entropy, max, log_sum;
  int64_t target_id;

  // `out` may be `row`.
  template <bool kCapped>
  void write(const Head<T, kCapped>& head, const T* row, T* out) const {
    const T scaled_g = g * head.inverse_temperature, scaled_h = h * head.inverse_temperature, log_zero = T(kLogZero);
    const T uncap = 1 / (head.softcap * head.inverse_temperature);
    T s[kTokens];
    for (int64_t v = 0; v < head.V; v += kTokens) {
      const int64_t n = std::min(kTokens, head.V - v);
      T* dz = out + v;
      head.scaled(row, v, n, s);
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) {
        const T log_p = at_least(s[i] - max - log_sum, log_zero);
        dz[i] = -exp_or_zero(log_p) * (scaled_g + scaled_h * (log_p + entropy)) * head.slope(s[i], uncap);
      }
      if (target_id >= v && target_id < v + n) dz[target_id - v] += scaled_g * head.slope(s[target_id - v], uncap);
    }
  }
};

// Calls `rows(begin, end)` for parts of the C rows, on all threads.
template <typename Rows>
void for_rows(int64_t C, int64_t V, const Rows& rows) {
  const int64_t rows_per_task = std::max<int64_t>(1, kTokensPerTask / std::max<int64_t>(1, V));
  at::parallel_for(0, C, rows_per_task, [&](int64_t begin, int64_t end) { vectorised([&] { rows(begin, end); }); });
}

// Contiguous, in `like`'s dtype; undefined where absent.
at::Tensor converted(const std::optional<at::Tensor>& x, const at::Tensor& like) {
  return x.has_value() ? x->to(like.scalar_type()).contiguous() : at::Tensor();
}

// Calls `f(head)`.
template <typename T, typename F>
void with_head(const at::Tensor& bias, double temperature, std::optional<double> softcap, int64_t V, const F& f) {
  const T* added = bias.defined() ? bias.const_data_ptr<T>() : nullptr;
  const T inverse_temperature = T(1 / temperature);
  if (softcap.has_value()) {
    f(Head<T, true>{added, T(*softcap), inverse_temperature, V});
  } else {
    f(Head<T, false>{added, 1, inverse_temperature, V});
  }
}

void check_rows(const at::Tensor& rows_CV, const char* name) {
  TORCH_CHECK_VALUE(rows_CV.dim() == 2 && (rows_CV.size(1) < 2 || rows_CV.stride(1) == 1), name,
                    " must be a matrix whose rows are contiguous; got ", rows_CV.sizes(), " with strides ",
                    rows_CV.strides());
}

at::Tensor logit_stats(const at::Tensor& logits_CV, const at::Tensor& target_C, const std::optional<at::Tensor>& bias_V,
                       double temperature, std::optional<double> softcap) {
  check_rows(logits_CV, "logits_CV");
  const int64_t C = logits_CV.size(0), V = logits_CV.size(1), stride = logits_CV.stride(0);
  const at::Tensor targets = target_C.to(at::kLong).contiguous(), bias = converted(bias_V, logits_CV);
  const at::Tensor stats_4C = at::empty({4, C}, logits_CV.options());
  const int64_t* target = targets.const_data_ptr<int64_t>();
  AT_DISPATCH_FLOATING_TYPES(logits_CV.scalar_type(), "logit_stats", [&] {
    const scalar_t* logits = logits_CV.const_data_ptr<scalar_t>();
    scalar_t* stats = stats_4C.mutable_data_ptr<scalar_t>();
    with_head<scalar_t>(bias, temperature, softcap, V, [&](const auto& head) {
      for_rows(C, V, [=](int64_t begin, int64_t end) {
        for (int64_t c = begin; c < end; ++c) {
          const RowStats<scalar_t> row(head, logits + c * stride, target[c]);
          stats[c] = row.max;
          stats[C + c] = scalar_t(row.sum);
          stats[2 * C + c] = row.target;
          stats[3 * C + c] = scalar_t(row.weighted);
        }
      });
    });
  });
  return stats_4C;
}

void logit_gradient(const at::Tensor& out_CV, const at::Tensor& logits_CV, const at::Tensor& target_C,
                    const std::optional<at::Tensor>& bias_V, const at::Tensor& g_C,
                    const std::optional<at::Tensor>& h_C, const at::Tensor& entropy_C, const at::Tensor& max_C,
                    const at::Tensor& log_sum_C, double temperature, std::optional<double> softcap) {
  check_rows(out_CV, "out_CV");
  check_rows(logits_CV, "logits_CV");
  TORCH_CHECK_VALUE(out_CV.sizes() == logits_CV.sizes() && out_CV.scalar_type() == logits_CV.scalar_type(),
                    "out_CV must have the shape and dtype of the logits on the CPU; got ", out_CV.sizes(), " ",
                    out_CV.scalar_type(), " for ", logits_CV.sizes(), " ", logits_CV.scalar_type());
  const int64_t C = logits_CV.size(0), V = logits_CV.size(1);
  const int64_t stride = logits_CV.stride(0), out_stride = out_CV.stride(0);
  const at::Tensor targets = target_C.to(at::kLong).contiguous(), bias = converted(bias_V, logits_CV);
  const at::Tensor gs = converted(g_C, logits_CV), hs = converted(h_C, logits_CV), maxima = converted(max_C, logits_CV);
  const at::Tensor entropies = converted(entropy_C, logits_CV), log_sums = converted(log_sum_C, logits_CV);
  const int64_t* target = targets.const_data_ptr<int64_t>();
  AT_DISPATCH_FLOATING_TYPES(logits_CV.scalar_type(), "logit_gradient", [&] {
    const auto from = [](const at::Tensor& x) { return x.defined() ? x.const_data_ptr<scalar_t>() : nullptr; };
    const scalar_t *g = from(gs), *h = from(hs), *entropy = from(entropies), *max = from(maxima);
    const scalar_t *log_sum = from(log_sums), *logits = from(logits_CV);
    scalar_t* out = out_CV.mutable_data_ptr<scalar_t>();
    with_head<scalar_t>(bias, temperature, softcap, V, [&](const auto& head) {
      for_rows(C, V, [=](int64_t begin, int64_t end) {
        for (int64_t c = begin; c < end; ++c) {
          // Without h the entropy may be anything.
          const RowSlopes<scalar_t> row{g[c], h ? h[c] : 0, h ? entropy[c] : 0, max[c], log_sum[c], target[c]};
          row.write(head, logits + c * stride, out + c * out_stride);
        }
      });
    });
  });
}

}  // namespace
}  // namespace dsm

TORCH_LIBRARY_IMPL(dsm, CPU, m) {
  m.impl("logit_stats", &dsm::logit_stats);
  m.impl("logit_gradient", &dsm::logit_gradient);
}
