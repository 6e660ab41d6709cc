#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <tuple>
#include <utility>
#include <vector>

#include "attention_tile.h"

namespace dsm {
namespace {

using at::Tensor;

constexpr int64_t kPartTokens = 512;          // see parts_of
constexpr int64_t kPairsPerThread = 1 << 15;  // fewer do not repay waking a thread

std::vector<Segment> segments_of(const Tensor& segments_N5, int64_t num_tokens) {
  const Tensor table = segments_N5.to(at::kLong).contiguous();
  std::vector<Segment> segments;
  for (int64_t n = 0; n < table.size(0); ++n) {
    const int64_t* x = table.const_data_ptr<int64_t>() + 5 * n;
    const bool fits = 0 <= x[2] && x[2] <= x[3] && x[3] <= x[0] && x[0] < x[1] && x[1] <= num_tokens;
    TORCH_CHECK_VALUE(fits, "segments_N5 must lie in a buffer of ", num_tokens, " tokens; got start ", x[0], ", end ",
                      x[1], " and a prompt from ", x[2], " to ", x[3]);
    segments.push_back({x[0], x[1], x[2], x[3]});
  }
  return segments;
}

// Sorts by pairs of query and key, most first; items within a factor of two stay in the buffer's order.
template <typename X>
void sort_by_work(std::vector<X>& items) {
  std::stable_sort(items.begin(), items.end(),
                   [](const X& a, const X& b) { return std::ilogb(a.pairs()) > std::ilogb(b.pairs()); });
}

// Calls f(item, j, scratch) for all items and key heads j on all threads; a thread takes the next few when it is done.
// Results of f must not depend on the thread.
template <typename T, typename X, typename F>
void for_tasks(const std::vector<X>& items, const Attention<T>& attention, const at::TensorOptions& options,
               const F& f) {
  const int64_t J = attention.J, n = items.size() * J;
  int64_t pairs = 0;
  for (const X& item : items) pairs += item.pairs() * J * attention.R;
  const int64_t threads = std::min<int64_t>(at::get_num_threads(), 1 + pairs / kPairsPerThread);
  const int64_t few = std::max<int64_t>(1, n / (64 * threads));
  std::atomic<int64_t> next{0};
  at::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    const Tensor memory = at::empty({attention.scratch_size()}, options);
    const Scratch<T> scratch{memory.mutable_data_ptr<T>()};
    for (int64_t i = next.fetch_add(few); i < n; i = next.fetch_add(few)) {
      for (int64_t end = std::min(i + few, n); i < end; ++i) f(items[i / J], i % J, scratch);
    }
  });
}

// x in `dtype`, contiguous within a head.
Tensor heads_of(const Tensor& x, at::ScalarType dtype) {
  const Tensor y = x.to(dtype);
  return y.stride(2) == 1 ? y : y.contiguous();
}

template <typename T>
void clear(Matrix<T> x, int64_t rows, int64_t width) {
  for (int64_t i = 0; i < rows; ++i) std::fill_n(x.from(i).data, width, T(0));
}

template <typename T>
std::tuple<Tensor, Tensor> forward(const Tensor& q_THK, const Tensor& k, const Tensor& v, const Tensor& segments_N5,
                                   double scale, std::optional<int64_t> window) {
  constexpr auto dtype = c10::CppTypeToScalarType<T>::value;
  const Tensor q_ = heads_of(q_THK, dtype), k_ = heads_of(k, dtype), v_ = heads_of(v, dtype);
  const int64_t num_tokens = q_.size(0), H = q_.size(1);
  const Tensor out = at::empty({num_tokens, H, v_.size(2)}, q_.options());
  const Tensor lse_HT = at::empty({H, num_tokens}, q_.options());
  const Attention<T> attention(q_, k_, v_, scale, window);
  const std::vector<Segment> segments = segments_of(segments_N5, num_tokens);
  std::vector<Tile> tiles;
  for (const Segment& s : segments) {
    attention.for_tiles(s, [&](const Tile& tile) { tiles.push_back(tile); });
  }
  sort_by_work(tiles);
  const Heads<T> out_rows(out);
  T* lse = lse_HT.mutable_data_ptr<T>();
  for_tasks(tiles, attention, q_.options(), [&](const Tile& tile, int64_t j, const Scratch<T>& scratch) {
    attention.forward(tile, j, scratch, out_rows, lse);
  });
  return {out.to(q_THK.scalar_type()), lse_HT};
}

// Consecutive segments of a group; one thread computes all their gradients of a key head. If the part begins with a
// response, the gradients of the prompt's keys go to a slot. The slots are added in a fixed order.
struct Part {
  const Segment *begin, *end;
  int64_t tokens, slot;  // slot: its first row among all slots, or -1

  int64_t pairs() const {
    int64_t sum = 0;
    for (const Segment* s = begin; s < end; ++s) sum += s->pairs();
    return sum;
  }
};

// Cuts groups into parts of at least kPartTokens tokens, and of at least the prompt's length, so that the slots have no
// more rows than the buffer.
std::pair<std::vector<Part>, int64_t> parts_of(const std::vector<Segment>& segments) {
  std::vector<Part> parts;
  int64_t slots = 0, group = -1;
  for (const Segment& s : segments) {
    const bool has_prompt = s.prompt() > 0;
    if (!has_prompt || s.prompt_start != group || parts.back().tokens >= std::max(kPartTokens, s.prompt())) {
      parts.push_back({&s, &s, 0, has_prompt ? std::exchange(slots, slots + s.prompt()) : -1});
      group = has_prompt ? s.prompt_start : s.start;
    }
    parts.back().end = &s + 1;
    parts.back().tokens += s.end - s.start;
  }
  return {parts, slots};
}

template <typename T>
std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_out, const std::optional<Tensor>& grad_lse_HT,
                                            const Tensor& q_THK, const Tensor& k, const Tensor& v, const Tensor& out,
                                            const Tensor& lse_HT, const Tensor& segments_N5, double scale,
                                            std::optional<int64_t> window) {
  constexpr auto dtype = c10::CppTypeToScalarType<T>::value;
  const Tensor q_ = heads_of(q_THK, dtype), k_ = heads_of(k, dtype), v_ = heads_of(v, dtype);
  const Tensor grad_out_ = heads_of(grad_out, dtype), out_ = heads_of(out, dtype), lse = lse_HT.contiguous();
  const Tensor grad_lse = grad_lse_HT.has_value() ? grad_lse_HT->to(dtype).contiguous() : Tensor();
  const auto options = q_.options();
  const Tensor dq = at::empty(q_.sizes(), options), dk = at::empty(k_.sizes(), options);
  const Tensor dv = at::empty(v_.sizes(), options);
  const std::vector<Segment> segments = segments_of(segments_N5, q_.size(0));
  auto [parts, slots] = parts_of(segments);
  const Tensor dk_slots = at::empty({slots, k_.size(1), k_.size(2)}, options);
  const Tensor dv_slots = at::empty({slots, v_.size(1), v_.size(2)}, options);
  const Heads<T> slot_dk(dk_slots), slot_dv(dv_slots);
  const Attention<T> attention(q_, k_, v_, scale, window);
  const typename Attention<T>::Gradients g{
      Heads<const T>(grad_out_), Heads<const T>(out_), lse.const_data_ptr<T>(),
      grad_lse.defined() ? grad_lse.const_data_ptr<T>() : nullptr, Heads<T>(dq), Heads<T>(dk), Heads<T>(dv)};
  sort_by_work(parts);
  for_tasks(parts, attention, options, [&](const Part& part, int64_t j, const Scratch<T>& scratch) {
    const bool has_slot = part.slot >= 0;
    const int64_t prompt = part.end[-1].prompt(), prompt_start = part.end[-1].prompt_start;
    const Matrix<T> prompt_dk = has_slot ? slot_dk.from(part.slot, j) : g.dk.from(prompt_start, j);
    const Matrix<T> prompt_dv = has_slot ? slot_dv.from(part.slot, j) : g.dv.from(prompt_start, j);
    if (has_slot) {
      clear(prompt_dk, prompt, k.size(2));
      clear(prompt_dv, prompt, v.size(2));
    }
    for (const Segment* s = part.begin; s < part.end; ++s) {
      clear(g.dk.from(s->start, j), s->end - s->start, k.size(2));
      clear(g.dv.from(s->start, j), s->end - s->start, v.size(2));
      attention.for_tiles(*s, [&](const Tile& tile) { attention.backward(tile, j, scratch, g, prompt_dk, prompt_dv); });
    }
  });
  for (const Part& part : parts) {
    if (part.slot < 0) continue;
    const int64_t n = part.begin->prompt();
    dk.narrow(0, part.begin->prompt_start, n).add_(dk_slots.narrow(0, part.slot, n));
    dv.narrow(0, part.begin->prompt_start, n).add_(dv_slots.narrow(0, part.slot, n));
  }
  return {dq.to(q_THK.scalar_type()), dk.to(k.scalar_type()), dv.to(v.scalar_type())};
}

// `positions_T` follow from the segments, and the `tables` are those of the Triton kernels: neither is read.
std::tuple<Tensor, Tensor> packed_attention_fwd(const Tensor& q_THK, const Tensor& k, const Tensor& v,
                                                const Tensor& positions_T, const Tensor& segments_N5,
                                                at::TensorList tables, double scale, std::optional<int64_t> window) {
  const auto run = q_THK.scalar_type() == at::kDouble ? &forward<double> : &forward<float>;
  return run(q_THK, k, v, segments_N5, scale, window);
}

std::tuple<Tensor, Tensor, Tensor> packed_attention_bwd(const Tensor& grad_out,
                                                        const std::optional<Tensor>& grad_lse_HT, const Tensor& q_THK,
                                                        const Tensor& k, const Tensor& v, const Tensor& out,
                                                        const Tensor& lse_HT, const Tensor& positions_T,
                                                        const Tensor& segments_N5, at::TensorList tables, double scale,
                                                        std::optional<int64_t> window) {
  const auto run = q_THK.scalar_type() == at::kDouble ? &backward<double> : &backward<float>;
  return run(grad_out, grad_lse_HT, q_THK, k, v, out, lse_HT, segments_N5, scale, window);
}

}  // namespace
}  // namespace dsm

TORCH_LIBRARY_IMPL(dsm, CPU, m) {
  m.impl("packed_attention_fwd", &dsm::packed_attention_fwd);
  m.impl("packed_attention_bwd", &dsm::packed_attention_bwd);
}
