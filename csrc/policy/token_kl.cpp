#include "token_kl.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>

namespace {

std::tuple<at::Tensor, at::Tensor> token_kl(const at::Tensor& logprob, const at::Tensor& ref, std::string_view estimator) {
  const dsm::KL kl = dsm::parse_kl(estimator);
  const auto dtype = logprob.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const at::Tensor x = logprob.to(dtype).contiguous(), y = ref.to(dtype).contiguous();
  at::Tensor value = at::empty(x.sizes(), x.options()), slope = at::empty(x.sizes(), x.options());
  AT_DISPATCH_FLOATING_TYPES(dtype, "token_kl", [&] {
    const scalar_t *px = x.const_data_ptr<scalar_t>(), *py = y.const_data_ptr<scalar_t>();
    scalar_t *pv = value.mutable_data_ptr<scalar_t>(), *ps = slope.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, x.numel(), 64 * dsm::kBlock, [&](int64_t begin, int64_t end) {
      scalar_t d[dsm::kBlock];
      for (int64_t t = begin; t < end; t += dsm::kBlock) {
        const int64_t n = std::min(dsm::kBlock, end - t);
        for (int64_t i = 0; i < n; ++i) d[i] = px[t + i] - py[t + i];
        dsm::kl_and_slope(d, n, kl, pv + t, ps + t);
      }
    });
  });
  return {value, slope};
}

}  // namespace

TORCH_LIBRARY_IMPL(dsm, CPU, m) { m.impl("token_kl", &token_kl); }
