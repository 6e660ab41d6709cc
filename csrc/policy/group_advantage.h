#pragma once

#include <ATen/core/Tensor.h>

#include <string_view>

namespace dsm {

// triton_kernels/policy/group_advantage.py has the formulas. fp32, or fp64 from fp64.
at::Tensor group_advantage(const at::Tensor& reward, const at::Tensor& group_cu, std::string_view scale);

}  // namespace dsm
