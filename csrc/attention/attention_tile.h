// Attention of a tile of queries to the blocks of keys that it sees; the formulas are in
// triton_kernels/attention/packed_attention.py. The query heads of one key head are rows of one matrix: row i of a tile
// is token i / R, head i % R. Scores have a row per key: softmax statistics are then vectors over queries, and keys and
// values are read without transposing.
//
// Columns number the keys of a path: column c is the buffer's row c from the segment's start on, and row
// c - (start - prompt_end) before it, in the prompt.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <utility>

#include "matrix_product.h"
#include "../policy/token_kl.h"

namespace dsm {

constexpr int64_t kTileRows = 128;
constexpr int64_t kBlockColumns = 64;

template <typename T>
constexpr T kInfinity = std::numeric_limits<T>::infinity();

struct Segment {
  int64_t start, end, prompt_start, prompt_end;

  int64_t prompt() const { return prompt_end - prompt_start; }
  int64_t first_column() const { return start - prompt(); }
  int64_t pairs() const { return (end - start) * (prompt() + (end - start + 1) / 2); }
};

// Consecutive tokens of a segment, from the buffer's row `first` on.
struct Tile {
  const Segment* segment;
  int64_t first, tokens;

  int64_t pairs() const { return tokens * (first + tokens - segment->first_column()); }
};

// Consecutive columns that a tile sees at least in part. key: the buffer's row of the first. offset: its column minus
// the tile's first token.
struct Block {
  int64_t size, key, offset, R, window, rows;

  // Rows of the tile that see any of the n columns from c on.
  Range rows_of(int64_t c, int64_t n) const {
    return Range{(offset + c) * R, (offset + c + n - 1 + window) * R}.within(rows);
  }

  // Columns that any of the n rows from i on sees.
  Range columns_of(int64_t i, int64_t n) const {
    return Range{i / R - offset - window + 1, (i + n - 1) / R - offset + 1}.within(size);
  }
};

// The range, widened to whole registers of fp32.
inline Range widened(Range x) { return {x.begin / 8 * 8, (x.end + 7) / 8 * 8}; }

// exp(x) for x <= 88; a float result that would be subnormal is 0. NaN stays NaN.
inline float exp_or_zero(float x) {
  const float e = bounded_exp(x);
  return x < -87.0f ? 0.0f : e;
}

inline double exp_or_zero(double x) { return std::exp(x); }

// A tensor [tokens, heads, width] whose columns are contiguous within a head.
template <typename T>
struct Heads {
  T* data;
  int64_t token, head, width;

  explicit Heads(const at::Tensor& x)
      : data(const_cast<T*>(x.const_data_ptr<T>())), token(x.stride(0)), head(x.stride(1)), width(x.size(2)) {}

  T* at(int64_t t, int64_t h) const { return data + t * token + h * head; }

  Matrix<T> from(int64_t t, int64_t h) const { return {at(t, h), token}; }

  void copy(int64_t t, int64_t n, int64_t h, std::remove_const_t<T>* to) const {
    for (int64_t i = 0; i < n; ++i) std::copy_n(at(t + i, h), width, to + i * width);
  }
};

// Bump allocator over a thread's memory; arrays begin on a cache line.
template <typename T>
struct Scratch {
  T* next;

  T* take(int64_t n) { return std::exchange(next, next + (n + 15) / 16 * 16); }
};

template <typename T>
struct Attention {
  Heads<const T> q, k, v;
  int64_t num_tokens, J, R, window;
  T scale;

  Attention(const at::Tensor& q_THK, const at::Tensor& k, const at::Tensor& v, double scale,
            std::optional<int64_t> window)
      : q(q_THK), k(k), v(v), num_tokens(q_THK.size(0)), J(k.size(1)), R(q_THK.size(1) / J),
        window(std::min(window.value_or(num_tokens), num_tokens)), scale(T(scale)) {}

  int64_t tile_tokens() const { return std::max<int64_t>(1, kTileRows / std::max<int64_t>(1, R)); }

  // Elements that backward takes; forward takes fewer.
  int64_t scratch_size() const {
    const int64_t rows = tile_tokens() * R + 16;
    return (3 * q.width + 2 * v.width + 2 * kBlockColumns + 2) * rows + (q.width + v.width) * kBlockColumns;
  }

  template <typename F>
  void for_tiles(const Segment& s, const F& f) const {
    for (int64_t t = s.start; t < s.end; t += tile_tokens()) f(Tile{&s, t, std::min(tile_tokens(), s.end - t)});
  }

  // Calls f(i, token, query head) for each row of the tile.
  template <typename F>
  void for_rows(const Tile& tile, int64_t j, const F& f) const {
    for (int64_t t = 0, i = 0; t < tile.tokens; ++t) {
      for (int64_t r = 0; r < R; ++r, ++i) f(i, tile.first + t, j * R + r);
    }
  }

  template <typename F>
  void for_blocks(const Tile& tile, const F& f) const {
    const Segment& s = *tile.segment;
    const int64_t end = tile.first + tile.tokens;
    for (int64_t c = std::max(s.first_column(), tile.first - window + 1), next; c < end; c = next) {
      next = std::min(c + kBlockColumns, c < s.start ? s.start : end);
      f(Block{next - c, c < s.start ? c - (s.start - s.prompt_end) : c, c - tile.first, R, window, tile.tokens * R});
    }
  }

  // Computes out and lse [H, T] of the tile's tokens for the query heads of key head j.
  void forward(const Tile& tile, int64_t j, Scratch<T> scratch, const Heads<T>& out, T* lse) const {
    const int64_t rows = tile.tokens * R, lanes = widened({0, rows}).end, V = v.width;
    T *q_t = scratch.take(lanes * q.width), *o = scratch.take(rows * V), *values = scratch.take(kBlockColumns * V);
    T *p = scratch.take(kBlockColumns * lanes), *factor = scratch.take(lanes);
    T *max = scratch.take(lanes), *sum = scratch.take(lanes);
    load_transposed(q, tile, j, scale, lanes, q_t);
    std::fill_n(max, lanes, -kInfinity<T>);
    std::fill_n(sum, lanes, T(0));
    bool add = false;
    for_blocks(tile, [&](const Block& b) {
      scores(b, k.from(b.key, j), q.width, q_t, lanes, p);
      softmax(b, lanes, p, max, sum, factor);
      if (add) rescale(rows, factor, o);
      v.copy(b.key, b.size, j, values);
      by_row(b, p, lanes, values, V, o, add);
      add = true;
    });
    vectorised([&, this] {
      for_rows(tile, j, [&](int64_t i, int64_t t, int64_t h) {
        const T inverse = 1 / sum[i];
        T* to = out.at(t, h);
        for (int64_t n = 0; n < V; ++n) to[n] = o[i * V + n] * inverse;
        lse[h * num_tokens + t] = max[i] + std::log(sum[i]);
      });
    });
  }

  // Further inputs of the backward pass, and its outputs.
  struct Gradients {
    Heads<const T> grad_out, out;
    const T *lse, *grad_lse;  // [H, T]; grad_lse may be null
    Heads<T> dq, dk, dv;
  };

  // Computes dq of the tile's tokens for the query heads of key head j and adds to dk and dv of that key head. The
  // prompt's gradients are the rows of `prompt_dk` and `prompt_dv`.
  void backward(const Tile& tile, int64_t j, Scratch<T> scratch, const Gradients& g, Matrix<T> prompt_dk,
                Matrix<T> prompt_dv) const {
    const int64_t rows = tile.tokens * R, lanes = widened({0, rows}).end, K = q.width, V = v.width;
    T *q_t = scratch.take(lanes * K), *queries = scratch.take(rows * K), *dq = scratch.take(rows * K);
    T *do_t = scratch.take(lanes * V), *grad_out = scratch.take(rows * V), *keys = scratch.take(kBlockColumns * K);
    T *p = scratch.take(kBlockColumns * lanes), *ds = scratch.take(kBlockColumns * lanes);
    T *lse = scratch.take(lanes), *delta = scratch.take(lanes);
    load_transposed(q, tile, j, scale, lanes, q_t);
    load_transposed(g.grad_out, tile, j, T(1), lanes, do_t);
    load_rows(tile, j, g, lanes, queries, grad_out, lse, delta);
    bool add = false;
    for_blocks(tile, [&](const Block& b) {
      const bool own = b.key >= tile.segment->start;
      const int64_t in_prompt = b.key - tile.segment->prompt_start;
      k.copy(b.key, b.size, j, keys);
      scores(b, {keys, K}, K, q_t, lanes, p);
      scores(b, v.from(b.key, j), V, do_t, lanes, ds);
      differentiate(b, lanes, p, ds, lse, delta);
      add_by_column(b, p, lanes, grad_out, V, own ? g.dv.from(b.key, j) : prompt_dv.from(in_prompt));
      add_by_column(b, ds, lanes, queries, K, own ? g.dk.from(b.key, j) : prompt_dk.from(in_prompt));
      by_row(b, ds, lanes, keys, K, dq, add);
      add = true;
    });
    vectorised([&, this] {
      for_rows(tile, j, [&](int64_t i, int64_t t, int64_t h) {
        T* to = g.dq.at(t, h);
        for (int64_t n = 0; n < K; ++n) to[n] = dq[i * K + n] * scale;
      });
    });
  }

  // Writes the tile's rows of x times `factor`, transposed: [width, lanes]. Lanes beyond the rows repeat the last row.
  void load_transposed(const Heads<const T>& x, const Tile& tile, int64_t j, T factor, int64_t lanes, T* to) const {
    vectorised([=, this] {
      for (int64_t i = 0, t = 0, r = 0; i < lanes; i += kLanes<T>) {
        const T* from[kLanes<T>];
        for (int64_t u = 0; u < kLanes<T>; ++u) {
          from[u] = x.at(tile.first + t, j * R + r);
          if (i + u + 1 < tile.tokens * R && ++r == R) r = 0, ++t;
        }
        for (int64_t n = 0; n < x.width; ++n) {
          Lanes<T> column;
          for (int64_t u = 0; u < kLanes<T>; ++u) column[u] = from[u][n];
          column *= factor;
          std::memcpy(to + n * lanes + i, &column, sizeof(column));
        }
      }
    });
  }

  // Loads the tile's rows: queries times the scale, gradients of the output, lse, delta.
  void load_rows(const Tile& tile, int64_t j, const Gradients& g, int64_t lanes, T* queries, T* grad_out, T* lse,
                 T* delta) const {
    std::fill_n(lse, lanes, T(0));
    std::fill_n(delta, lanes, T(0));
    vectorised([=, this, &g] {
      for_rows(tile, j, [=, this, &g](int64_t i, int64_t t, int64_t h) {
        const T *from = q.at(t, h), *grad = g.grad_out.at(t, h), *out = g.out.at(t, h);
        for (int64_t n = 0; n < q.width; ++n) queries[i * q.width + n] = from[n] * scale;
        for (int64_t n = 0; n < v.width; ++n) grad_out[i * v.width + n] = grad[n];
        T dot = 0;
#pragma omp simd reduction(+ : dot)
        for (int64_t n = 0; n < v.width; ++n) dot += grad[n] * out[n];
        lse[i] = g.lse[h * num_tokens + t];
        delta[i] = dot - (g.grad_lse ? g.grad_lse[h * num_tokens + t] : T(0));
      });
    });
  }

  // to [columns, lanes] = x y; x [columns, width] holds keys or values, y [width, lanes] is of the tile.
  void scores(const Block& b, Matrix<const T> x, int64_t width, const T* y, int64_t lanes, T* to) const {
    product<T>(b.size, x, {y, lanes}, {to, lanes}, false,
               [=](int64_t c, int64_t n) { return std::pair(widened(b.rows_of(c, n)), Range{0, width}); });
  }

  // to [rows, width] = x' y, or with `add` to += x' y; x [columns, lanes], y [columns, width].
  void by_row(const Block& b, const T* x, int64_t lanes, const T* y, int64_t width, T* to, bool add) const {
    product<T>(b.rows, Matrix<const T>{x, lanes}.transposed(), {y, width}, {to, width}, add,
               [=](int64_t i, int64_t n) { return std::pair(Range{0, width}, b.columns_of(i, n)); });
  }

  // to [columns, width] += x y, x [columns, lanes], y [rows, width].
  void add_by_column(const Block& b, const T* x, int64_t lanes, const T* y, int64_t width, Matrix<T> to) const {
    product<T>(b.size, {x, lanes}, {y, width}, to, true,
               [=](int64_t c, int64_t n) { return std::pair(Range{0, width}, b.rows_of(c, n)); });
  }

  // Replaces scores by exp(score - new maximum); sums and outputs over earlier blocks are to be multiplied by `factor`.
  void softmax(const Block& b, int64_t lanes, T* p, T* max, T* sum, T* factor) const {
    vectorised([=] {
      std::copy_n(max, lanes, factor);
      for (int64_t c = 0; c < b.size; ++c) {
        T* row = p + c * lanes;
        const Range wide = hide(b, c, lanes, row, -kInfinity<T>);
#pragma omp simd
        for (int64_t i = wide.begin; i < wide.end; ++i) max[i] = row[i] > max[i] ? row[i] : max[i];
      }
#pragma omp simd
      for (int64_t i = 0; i < lanes; ++i) {
        factor[i] = exp_or_zero(factor[i] - finite(max[i]));
        sum[i] *= factor[i];
      }
      for (int64_t c = 0; c < b.size; ++c) {
        T* row = p + c * lanes;
        const Range wide = widened(b.rows_of(c, 1));
#pragma omp simd
        for (int64_t i = wide.begin; i < wide.end; ++i) {
          row[i] = exp_or_zero(row[i] - finite(max[i]));
          sum[i] += row[i];
        }
      }
    });
  }

  void rescale(int64_t rows, const T* factor, T* o) const {
    vectorised([=, this] {
      for (int64_t i = 0; i < rows; ++i) {
        for (int64_t n = 0; n < v.width; ++n) o[i * v.width + n] *= factor[i];
      }
    });
  }

  // Replaces scores by p and dp by ds.
  void differentiate(const Block& b, int64_t lanes, T* p, T* ds, const T* lse, const T* delta) const {
    vectorised([=] {
      for (int64_t c = 0; c < b.size; ++c) {
        T *p_row = p + c * lanes, *ds_row = ds + c * lanes;
        const Range wide = widened(b.rows_of(c, 1));
#pragma omp simd
        for (int64_t i = wide.begin; i < wide.end; ++i) {
          p_row[i] = exp_or_zero(p_row[i] - lse[i]);
          ds_row[i] = p_row[i] * (ds_row[i] - delta[i]);
        }
        hide(b, c, lanes, p_row, T(0));
        hide(b, c, lanes, ds_row, T(0));
      }
    });
  }

  // Masks column c for the queries that do not see it: `value` in the registers that hold any that do, 0 in the others.
  // Returns the range of the former.
  static Range hide(const Block& b, int64_t c, int64_t lanes, T* row, T value) {
    const Range seen = b.rows_of(c, 1), wide = widened(seen);
    std::fill(row, row + wide.begin, T(0));
    std::fill(row + wide.begin, row + seen.begin, value);
    std::fill(row + seen.end, row + wide.end, value);
    std::fill(row + wide.end, row + lanes, T(0));
    return wide;
  }

  // The maximum of a query that has seen nothing yet is -inf, and -inf - (-inf) would be NaN.
  static T finite(T max) { return max == -kInfinity<T> ? T(0) : max; }
};

}  // namespace dsm
