#include "group_advantage.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>

namespace dsm {
namespace {

constexpr double kEps = 1e-6;

struct MeanAndScale {
  double mean, scale;
  bool flat;  // all rewards are equal
};

// Scale: 1 / (sample deviation + eps); 0 where all rewards are equal.
template <typename T>
MeanAndScale mean_and_scale(const T* reward, int64_t n) {
  double sum = 0, squares = 0;
  bool flat = true;
  for (int64_t i = 0; i < n; ++i) {
    sum += reward[i];
    flat = flat && reward[i] == reward[0];
  }
  const double mean = sum / std::max<int64_t>(n, 1);
  for (int64_t i = 0; i < n; ++i) squares += (reward[i] - mean) * (reward[i] - mean);
  return {mean, flat ? 0 : 1 / (std::sqrt(squares / std::max<int64_t>(n - 1, 1)) + kEps), flat};
}

}  // namespace

at::Tensor group_advantage(const at::Tensor& reward_, const at::Tensor& group_cu_, std::string_view scale) {
  const auto dtype = reward_.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const at::Tensor reward = reward_.to(dtype).contiguous(), group_cu = group_cu_.contiguous();
  at::Tensor advantage = at::empty(reward.sizes(), reward.options());
  const int32_t* cu = group_cu.const_data_ptr<int32_t>();
  AT_DISPATCH_FLOATING_TYPES(dtype, "group_advantage", [&] {
    const scalar_t* r = reward.const_data_ptr<scalar_t>();
    scalar_t* out = advantage.mutable_data_ptr<scalar_t>();
    const double batch_scale = scale == "batch" ? mean_and_scale(r, reward.numel()).scale : 0;
    at::parallel_for(0, group_cu.numel() - 1, 64, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p) {
        const int64_t n = cu[p + 1] - cu[p];
        const MeanAndScale group = mean_and_scale(r + cu[p], n);
        double factor = group.scale;
        if (scale == "none") factor = 1;
        if (scale == "loo") factor = double(n) / std::max<int64_t>(n - 1, 1);
        if (scale == "batch") factor = batch_scale;
        for (int64_t i = cu[p]; i < cu[p + 1]; ++i) {
          out[i] = scalar_t((group.flat ? 0 : r[i] - group.mean) * factor);
        }
      }
    });
  });
  return advantage;
}

}  // namespace dsm

TORCH_LIBRARY_IMPL(dsm, CPU, m) { m.impl("group_advantage", &dsm::group_advantage); }
