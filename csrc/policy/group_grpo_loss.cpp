#include <torch/library.h>

#include "group_advantage.h"
#include "policy_loss.h"

namespace {

dsm::LossGradientStats group_grpo_loss(const at::Tensor& logprob, const std::optional<at::Tensor>& old,
                                       const std::optional<at::Tensor>& ref, const at::Tensor& reward,
                                       const at::Tensor& weight, const at::Tensor& response_cu,
                                       const at::Tensor& group_cu, double clip_low, double clip_high, double kl_coef,
                                       std::string_view kl, std::string_view ratio, std::string_view surrogate,
                                       std::optional<double> dual_clip, std::optional<double> delta,
                                       std::string_view scale) {
  const dsm::Objective objective(clip_low, clip_high, kl_coef, kl, ratio, surrogate, dual_clip, delta);
  const at::Tensor advantage = dsm::group_advantage(reward, group_cu, scale);
  return dsm::policy_loss(logprob, old, ref, advantage, weight, response_cu, objective, true);
}

}  // namespace

TORCH_LIBRARY_IMPL(dsm, CPU, m) { m.impl("group_grpo_loss", &group_grpo_loss); }
