#include <torch/library.h>

#include "group_advantage.h"
#include "policy_loss.h"

namespace {

template <typename... Field>
struct GroupGrpoLoss {
  static dsm::LossGradientStats run(const at::Tensor& logprob, const std::optional<at::Tensor>& old,
                                    const std::optional<at::Tensor>& ref, const at::Tensor& reward,
                                    const at::Tensor& weight, const at::Tensor& response_cu,
                                    const at::Tensor& group_cu, std::string_view scale, Field... field) {
    const at::Tensor advantage = dsm::group_advantage(reward, group_cu, scale);
    return dsm::policy_loss(logprob, old, ref, advantage, weight, response_cu, dsm::Objective(field...), true);
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(dsm, CPU, m) { m.impl("group_grpo_loss", &dsm::ForObjective<GroupGrpoLoss>::run); }
