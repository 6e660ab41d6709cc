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

// The rows of one response. Absent tensors are null; the advantage of row t is advantage[t * advantage_stride].
template <typename T>
struct Rows {
  const T *logprob, *old, *ref, *advantage, *weight;
  int64_t advantage_stride, size;
};

// A block of rows with all that is computed of them. Whatever an absent row holds is replaced by 0 first.
template <typename T>
struct Block {
  T weight[kBlock], advantage[kBlock], logprob[kBlock], log_ratio[kBlock], ratio[kBlock];
  T surrogate[kBlock], slope[kBlock], d[kBlock], kl[kBlock], kl_slope[kBlock];
  int64_t n;

  Block(const Rows<T>& rows, int64_t t) : n(std::min(kBlock, rows.size - t)) {
    const T *x = rows.logprob + t, *w = rows.weight + t, *a = rows.advantage + t * rows.advantage_stride;
    // On-policy the log ratio is 0, or NaN, which must stay visible.
    const T* old = rows.old ? rows.old + t : x;
    const T* ref = rows.ref ? rows.ref + t : x;
    const bool has_ref = rows.ref != nullptr;
    for (int64_t i = 0; i < n; ++i) {
      const T x_i = x[i], old_i = old[i], ref_i = ref[i], a_i = a[i * rows.advantage_stride];
      const bool present = w[i] != 0;
      weight[i] = w[i];
      logprob[i] = present ? x_i : T(0);
      advantage[i] = present ? a_i : T(0);
      log_ratio[i] = present ? x_i - old_i : T(0);
      d[i] = present & has_ref ? x_i - ref_i : T(0);
    }
  }

  // The surrogate and its derivative by the log ratio, which for cispo is that by the log-probability. Comparisons are
  // such that NaN, of which each is false, reaches both.
  void evaluate(const Objective& o, const T* sequence_log_ratio) {
    const T limit = T(kLogRatioLimit), low = T(1 - o.clip_low), high = T(1 + o.clip_high);
    const T delta = T(o.delta), dual_clip = T(o.dual_clip);
    T x[kBlock];
    for (int64_t i = 0; i < n; ++i) {
      x[i] = sequence_log_ratio && weight[i] != 0 ? *sequence_log_ratio : log_ratio[i];  // 0 in an absent row
    }
    for (int64_t i = 0; i < n; ++i) {
      ratio[i] = bounded_exp(clamp(x[i], -limit, limit));
      slope[i] = clamp(ratio[i], low, high) * advantage[i];
      surrogate[i] = slope[i] * logprob[i];
    }
    if (o.cispo) return;
    for (int64_t i = 0; i < n; ++i) {
      const T r = ratio[i], a = advantage[i], clipped = slope[i];
      const T unclipped = (r > delta ? delta : r) * a;
      const T bounded = unclipped > clipped ? clipped : unclipped;
      T moving = unclipped > clipped ? T(0) : r * a;
      moving = r > delta ? T(0) : moving;
      moving = std::abs(x[i]) > limit ? T(0) : moving;
      const T floor = dual_clip * (a < 0 ? a : T(-1));  // not infinity * 0
      const T floored = a < 0 ? floor : bounded;
      surrogate[i] = bounded < floored ? floored : bounded;
      slope[i] = bounded < floored ? T(0) : moving;
    }
  }
};

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

  // NaN, which maxima and minima skip, is in the sum: a ratio is never infinite.
  double largest() const { return std::isnan(sums[kRatio]) ? sums[kRatio] : max_ratio; }
  double smallest() const { return std::isnan(sums[kRatio]) ? sums[kRatio] : min_ratio; }

  template <typename T>
  void add(const Block<T>& block, const Objective& o) {
    const T low = T(1 - o.clip_low), high = T(1 + o.clip_high), kl_coef = T(o.kl_coef);
    Partial p;
    for (int64_t i = 0; i < block.n; ++i) {
      // The other terms of an absent row are 0.
      const bool present = block.weight[i] != 0;
      const T weight = block.weight[i], ratio = block.ratio[i], advantage = block.advantage[i];
      p.loss -= double(weight) * (block.surrogate[i] - kl_coef * block.kl[i]);
      p.sums[kTokens] += present;
      p.sums[kWeight] += weight;
      p.sums[kKL] += block.kl[i];
      p.sums[kLogRatio] -= block.log_ratio[i];
      p.sums[kRatio] += present ? ratio : T(0);
      const T product = ratio * advantage, unknown = product == product ? T(0) : product;
      p.sums[kClippedLow] += T((ratio < low) & (advantage < 0)) + unknown;
      p.sums[kClippedHigh] += T((ratio > high) & (advantage > 0)) + unknown;
      p.max_ratio = std::max<double>(p.max_ratio, present ? ratio : -std::numeric_limits<T>::infinity());
      p.min_ratio = std::min<double>(p.min_ratio, present ? ratio : std::numeric_limits<T>::infinity());
    }
    add(p);
  }
};

// Writes the gradient of each row.
template <typename T>
Partial response_loss(const Rows<T>& rows, const Objective& o, T* dlogprob) {
  Partial partial;
  double tokens = 0, log_ratio_sum = 0, sequence_slope = 0;
  T sequence_log_ratio = 0;
  const bool through_sequence = o.sequence && !o.cispo;
  if (o.sequence) {
    for (int64_t t = 0; t < rows.size; t += kBlock) {
      const Block<T> block(rows, t);
      for (int64_t i = 0; i < block.n; ++i) tokens += block.weight[i] != 0, log_ratio_sum += block.log_ratio[i];
    }
    sequence_log_ratio = T(log_ratio_sum / std::max(tokens, 1.0));
  }
  for (int64_t t = 0; t < rows.size; t += kBlock) {
    Block<T> block(rows, t);
    block.evaluate(o, o.sequence ? &sequence_log_ratio : nullptr);
    // Without a reference d is 0, and so is every estimate and slope but k1's slope, which kl_coef = 0 removes.
    kl_and_slope(block.d, block.n, o.kl, block.kl, block.kl_slope);
    const T kl_coef = T(o.kl_coef), own_slope = through_sequence ? T(0) : T(1);
    for (int64_t i = 0; i < block.n; ++i) {
      dlogprob[t + i] = block.weight[i] * (kl_coef * block.kl_slope[i] - own_slope * block.slope[i]);
    }
    for (int64_t i = 0; i < block.n; ++i) sequence_slope += double(block.weight[i]) * block.slope[i];
    partial.add(block, o);
  }
  if (through_sequence) {
    // Every present row moves the mean log ratio by 1 / tokens.
    const T shared = T(sequence_slope / std::max(tokens, 1.0));
    for (int64_t t = 0; t < rows.size; ++t) dlogprob[t] -= rows.weight[t] != 0 ? shared : T(0);
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
  stats.push_back(total.largest());
  stats.push_back(total.smallest());
  return {at::scalar_tensor(total.loss, logprob.options()), dlogprob, at::tensor(stats, logprob.options())};
}

namespace {

template <typename... Field>
struct GrpoLoss {
  static LossGradientStats run(const at::Tensor& logprob, const std::optional<at::Tensor>& old,
                               const std::optional<at::Tensor>& ref, const at::Tensor& advantage,
                               const at::Tensor& weight, const at::Tensor& response_cu, Field... field) {
    return policy_loss(logprob, old, ref, advantage, weight, response_cu, Objective(field...), false);
  }
};

}  // namespace
}  // namespace dsm

TORCH_LIBRARY_IMPL(dsm, CPU, m) { m.impl("grpo_loss", &dsm::ForObjective<dsm::GrpoLoss>::run); }
