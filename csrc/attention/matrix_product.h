// Products of small matrices in the cache.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "../vectorised.h"

namespace dsm {

template <typename T>
struct Register {
  typedef T Lanes __attribute__((vector_size(32)));  // AVX2's; elsewhere the compiler takes two smaller ones
};

template <typename T>
using Lanes = typename Register<T>::Lanes;

template <typename T>
constexpr int64_t kLanes = sizeof(Lanes<T>) / sizeof(T);

struct Range {
  int64_t begin, end;

  Range within(int64_t size) const { return {std::clamp<int64_t>(begin, 0, size), std::clamp<int64_t>(end, 0, size)}; }
};

template <typename T>
struct Matrix {
  T* data;
  int64_t row, column = 1;  // strides

  Matrix from(int64_t first_row) const { return {data + first_row * row, row, column}; }
  Matrix transposed() const { return {data, column, row}; }
};

// Computes kRows rows by kWide vectors V of C, from column n on. 6 rows of two Lanes leave registers for the operands.
template <typename V, int kRows, int kWide, typename T>
void product_block(int64_t n, Range inner, Matrix<const T> a, Matrix<const T> b, Matrix<T> c, bool add) {
  constexpr int64_t size = sizeof(V) / sizeof(T);
  V sum[kRows][kWide] = {};
  for (int64_t l = inner.begin; l < inner.end; ++l) {
    V right[kWide];
    for (int w = 0; w < kWide; ++w) std::memcpy(&right[w], b.data + l * b.row + n + w * size, sizeof(V));
    for (int i = 0; i < kRows; ++i) {
      const T left = a.data[i * a.row + l * a.column];
      for (int w = 0; w < kWide; ++w) sum[i][w] += left * right[w];
    }
  }
  for (int i = 0; i < kRows; ++i) {
    for (int w = 0; w < kWide; ++w) {
      T* at = c.data + i * c.row + n + w * size;
      V old = {};
      if (add) std::memcpy(&old, at, sizeof(V));
      old += sum[i][w];
      std::memcpy(at, &old, sizeof(V));
    }
  }
}

// Computes the first `rows` <= kRows rows of C.
template <int kRows, typename T>
void product_rows(int64_t rows, Range columns, Range inner, Matrix<const T> a, Matrix<const T> b, Matrix<T> c,
                  bool add) {
  if constexpr (kRows > 1) {
    if (rows < kRows) return product_rows<kRows - 1>(rows, columns, inner, a, b, c, add);
  }
  int64_t n = columns.begin;
  for (; n + 2 * kLanes<T> <= columns.end; n += 2 * kLanes<T>) {
    product_block<Lanes<T>, kRows, 2>(n, inner, a, b, c, add);
  }
  for (; n + kLanes<T> <= columns.end; n += kLanes<T>) product_block<Lanes<T>, kRows, 1>(n, inner, a, b, c, add);
  for (; n < columns.end; ++n) product_block<T, kRows, 1>(n, inner, a, b, c, add);
}

// C = A B, or with `add` C += A B; A has M rows, rows of B and C are contiguous. `limits(m, rows)` gives the columns of
// C to compute in rows m .. m + rows - 1, and the columns of A that are not 0 there.
template <typename T, typename F>
void product(int64_t M, Matrix<const T> a, Matrix<const T> b, Matrix<T> c, bool add, const F& limits) {
  vectorised([=, &limits] {
    for (int64_t m = 0, rows; m < M; m += rows) {
      const int64_t blocks = (M - m + 5) / 6;
      rows = (M - m + blocks - 1) / blocks;
      const auto [columns, inner] = limits(m, rows);
      product_rows<6>(rows, columns, inner, a.from(m), b, c.from(m), add);
    }
  });
}

}  // namespace dsm
