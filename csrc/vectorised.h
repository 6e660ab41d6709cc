// Loops compiled for AVX2, though the build's flags are portable.
#pragma once

#include <ATen/Version.h>

namespace dsm {

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define DSM_AVX2 1
template <typename F>
__attribute__((target("avx2,fma"), flatten, noinline)) void with_avx2(const F& f) {
  f();
}
#endif

// Calls `f()`, which with all that it calls is compiled once more for processors with AVX2.
template <typename F>
void vectorised(const F& f) {
#ifdef DSM_AVX2
  static const bool avx2 = at::get_cpu_capability() != "DEFAULT";  // and with AVX2 comes FMA
  if (avx2) return with_avx2(f);
#endif
  f();
}

}  // namespace dsm
