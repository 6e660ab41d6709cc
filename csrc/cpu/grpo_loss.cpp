#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/scalar_tensor.h>
#include <ATen/ops/tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "policy_loss.h"

namespace dsm {
namespace {

// Order of triton_kernels/_common.py: SUMS, then the maximum and the minimum of the ratio.
enum Stat { kTokens, kWeight, kKL, kLogRatio, kRatio, kClippedLow, kClippedHigh, kEntropy, kNumSums };

// In double, one per response: added in the order of the responses, so that threads do not change the result.
struct Partial {
  double loss = 0;
  std::array<double, kNumSums> sums{};
  double max_ratio = -std::numeric_limits<double>::infinity();
  double min_ratio = std::numeric_limits<double>::infinity();

  void add(const Partial& other) {
    loss += other.loss;
    for (int i = 0; i < kNumSums; ++i) sums[i] += other.sums[i];
    max_ratio = std::max(max_ratio, other.max_ratio);
    min_ratio = std::min(min_ratio, other.min_ratio);
  }
};

// The rows of one response. Absent tensors are null; the advantage of row t is advantage[t * advantage_stride].
template <typename T>
struct Rows {
  const T *logprob, *old, *ref, *advantage, *weight;
  int64_t advantage_stride, size;

  bool present(int64_t t) const { return weight[t] != 0; }
  // On-policy the difference is 0, or NaN, which must stay visible.
  T log_ratio(int64_t t) const { return logprob[t] - (old ? old : logprob)[t]; }
};

template <typename T>
T ratio_of(T log_ratio) {
  return std::exp(clamp(log_ratio, T(-kLogRatioLimit), T(kLogRatioLimit)));
}

// The surrogate of one row and its derivative by the log ratio; for cispo by the log-probability.
template <typename T>
ValueAndSlope<T> surrogate(T log_ratio, T ratio, T advantage, T logprob, const Objective& o) {
  const T clipped = clamp(ratio, T(1 - o.clip_low), T(1 + o.clip_high));
  if (o.cispo) return {clipped * advantage * logprob, clipped * advantage};
  const T unclipped = (ratio > T(o.delta) ? T(o.delta) : ratio) * advantage;
  const bool inside = std::abs(log_ratio) <= T(kLogRatioLimit) && ratio <= T(o.delta);
  ValueAndSlope<T> result{clipped * advantage, T(0)};
  if (unclipped <= result.value) result = {unclipped, inside ? ratio * advantage : T(0)};
  if (advantage < 0 && result.value < T(o.dual_clip) * advantage) result = {T(o.dual_clip) * advantage, T(0)};
  return result;
}

// Writes the gradient of each row.
template <typename T>
Partial response_loss(const Rows<T>& rows, const Objective& o, T* dlogprob) {
  Partial partial;
  double tokens = 0, log_ratio_sum = 0, sequence_slope = 0;
  T sequence_log_ratio = 0, sequence_ratio = 1;
  const bool through_sequence = o.sequence && !o.cispo;
  if (o.sequence) {
    for (int64_t t = 0; t < rows.size; ++t) {
      if (!rows.present(t)) continue;
      tokens += 1;
      log_ratio_sum += rows.log_ratio(t);
    }
    sequence_log_ratio = T(log_ratio_sum / std::max(tokens, 1.0));
    sequence_ratio = ratio_of(sequence_log_ratio);
  }
  for (int64_t t = 0; t < rows.size; ++t) {
    dlogprob[t] = 0;
    if (!rows.present(t)) continue;
    const T advantage = rows.advantage[t * rows.advantage_stride], weight = rows.weight[t];
    const T log_ratio = rows.log_ratio(t);
    const T ratio = o.sequence ? sequence_ratio : ratio_of(log_ratio);
    const auto policy = surrogate(o.sequence ? sequence_log_ratio : log_ratio, ratio, advantage, rows.logprob[t], o);
    ValueAndSlope<T> kl{0, 0};
    if (rows.ref) kl = kl_and_slope(rows.logprob[t] - rows.ref[t], o.kl);
    const T kl_coef = T(o.kl_coef);
    partial.loss -= double(weight) * (policy.value - kl_coef * kl.value);
    dlogprob[t] = weight * (kl_coef * kl.slope - (through_sequence ? T(0) : policy.slope));
    if (through_sequence) sequence_slope += double(weight) * policy.slope;

    partial.sums[kTokens] += 1;
    partial.sums[kWeight] += weight;
    partial.sums[kKL] += kl.value;
    partial.sums[kLogRatio] -= log_ratio;
    partial.sums[kRatio] += ratio;
    partial.sums[kClippedLow] += ratio < T(1 - o.clip_low) && advantage < 0;
    partial.sums[kClippedHigh] += ratio > T(1 + o.clip_high) && advantage > 0;
    partial.max_ratio = std::max(partial.max_ratio, double(ratio));
    partial.min_ratio = std::min(partial.min_ratio, double(ratio));
  }
  if (through_sequence) {
    // Every present row moves the mean log ratio by 1 / tokens.
    const T shared = T(sequence_slope / std::max(tokens, 1.0));
    for (int64_t t = 0; t < rows.size; ++t) {
      if (rows.present(t)) dlogprob[t] -= shared;
    }
  }
  return partial;
}

}  // namespace

LossGradientStats policy_loss(const at::Tensor& logprob_, const std::optional<at::Tensor>& old_,
                              const std::optional<at::Tensor>& ref_, const at::Tensor& advantage_,
                              const at::Tensor& weight_, const at::Tensor& response_cu_, const Objective& objective,
                              bool advantage_per_response) {
  const auto dtype = logprob_.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const auto convert = [&](const std::optional<at::Tensor>& x) {
    return x.has_value() ? x->to(dtype).contiguous() : at::Tensor();
  };
  const at::Tensor logprob = convert(logprob_), old = convert(old_), ref = convert(ref_);
  const at::Tensor advantage = convert(advantage_), weight = convert(weight_), response_cu = response_cu_.contiguous();
  const int32_t* cu = response_cu.const_data_ptr<int32_t>();
  const int64_t num_responses = response_cu.numel() - 1;

  at::Tensor dlogprob = at::empty(logprob.sizes(), logprob.options());
  std::vector<Partial> partials(num_responses);
  AT_DISPATCH_FLOATING_TYPES(dtype, "policy_loss", [&] {
    const auto from = [](const at::Tensor& x, int64_t t) {
      return x.defined() ? x.const_data_ptr<scalar_t>() + t : nullptr;
    };
    scalar_t* gradient = dlogprob.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, num_responses, 16, [&](int64_t begin, int64_t end) {
      for (int64_t s = begin; s < end; ++s) {
        const int64_t t = cu[s];
        const Rows<scalar_t> rows{from(logprob, t), from(old, t), from(ref, t),
                                  from(advantage, advantage_per_response ? s : t), from(weight, t),
                                  advantage_per_response ? 0 : 1, cu[s + 1] - t};
        partials[s] = response_loss(rows, objective, gradient + t);
      }
    });
  });

  Partial total;
  for (const Partial& partial : partials) total.add(partial);
  std::vector<double> stats(total.sums.begin(), total.sums.end());
  stats.push_back(total.max_ratio);
  stats.push_back(total.min_ratio);
  return {at::scalar_tensor(total.loss, logprob.options()), dlogprob, at::tensor(stats, logprob.options())};
}

namespace {

LossGradientStats grpo_loss(const at::Tensor& logprob, const std::optional<at::Tensor>& old,
                            const std::optional<at::Tensor>& ref, const at::Tensor& advantage, const at::Tensor& weight,
                            const at::Tensor& response_cu, double clip_low, double clip_high, double kl_coef,
                            std::string_view kl, std::string_view ratio, std::string_view surrogate,
                            std::optional<double> dual_clip, std::optional<double> delta) {
  const Objective objective(clip_low, clip_high, kl_coef, kl, ratio, surrogate, dual_clip, delta);
  return policy_loss(logprob, old, ref, advantage, weight, response_cu, objective, false);
}

}  // namespace
}  // namespace dsm

TORCH_LIBRARY_IMPL(dsm, CPU, m) { m.impl("grpo_loss", &dsm::grpo_loss); }
