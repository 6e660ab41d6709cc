// The loss of one response, its gradient and statistics: triton_kernels/policy/grpo_loss.py has the formulas.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <limits>
#include <optional>
#include <string_view>
#include <tuple>

#include "token_kl.h"

namespace dsm {

// `Op` for the types of the fields of triton_kernels/policy/objective.py, in their order.
template <template <typename...> class Op>
using ForObjective = Op<double, double, double, std::string_view, std::string_view, std::string_view,
                        std::optional<double>, std::optional<double>, std::optional<double>, double>;

struct Objective {
  double clip_low, clip_high, kl_coef;
  KL kl;
  bool sequence, cispo;
  double dual_clip, delta;  // infinity: off

  // All fields, in their order; the last two are for ops that have rollout log-probabilities and the entropy.
  Objective(double clip_low, double clip_high, double kl_coef, std::string_view kl, std::string_view ratio,
            std::string_view surrogate, std::optional<double> dual_clip, std::optional<double> delta,
            std::optional<double> /*tis_clip*/, double /*entropy_coef*/)
      : clip_low(clip_low), clip_high(clip_high), kl_coef(kl_coef), kl(parse_kl(kl)), sequence(ratio == "sequence"),
        cispo(surrogate == "cispo"), dual_clip(dual_clip.value_or(std::numeric_limits<double>::infinity())),
        delta(delta.value_or(std::numeric_limits<double>::infinity())) {}
};

using LossGradientStats = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

// Loss, dloss / dlogprob and packed statistics. `advantage` has one value per row, or one per response.
LossGradientStats policy_loss(const at::Tensor& logprob, const std::optional<at::Tensor>& old,
                              const std::optional<at::Tensor>& ref, const at::Tensor& advantage,
                              const at::Tensor& weight, const at::Tensor& response_cu, const Objective& objective,
                              bool advantage_per_response);

}  // namespace dsm
