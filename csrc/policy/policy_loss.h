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

struct Objective {
  double clip_low, clip_high, kl_coef;
  KL kl;
  bool sequence, cispo;
  double dual_clip, delta;  // infinity: off

  Objective(double clip_low, double clip_high, double kl_coef, std::string_view kl, std::string_view ratio,
            std::string_view surrogate, std::optional<double> dual_clip, std::optional<double> delta)
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
