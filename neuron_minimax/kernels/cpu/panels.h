// Blocks of a weight expanded into scratch that stays in the cache, and multiplied there by oneDNN.
#pragma once
#include <ATen/native/CPUBlas.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/from_blob.h>

#include <algorithm>
#include <vector>

#include "bf16.h"
#include "lanes.h"

namespace neuron_minimax {

// How far rows of so many numbers are apart in scratch: rows that are a power of two apart share few
// places of a cache.
inline int64_t apart_of(int64_t length) { return (length / 32 + 1) * 32 + 32; }

constexpr int64_t DEPTH = 128;  // inputs that are multiplied at a time: KC

// One scale per block of a weight; without data 1 for all. `parts` weights lie side by side in the
// columns, each with blocks of its own.
struct Scales {
  const float* data;
  int64_t block_rows, block_columns;
  int64_t rows, columns;  // of blocks
  int64_t parts, part_width;

  float of(int64_t row, int64_t column) const { return data ? data[row * columns + column] : 1.f; }
  Scales of_expert(int64_t expert) const {
    Scales one = *this;
    if (data) one.data += expert * rows * columns;
    return one;
  }
  // factor[j] = half * the scale of column left + j, in one row of blocks.
  void of_columns(int64_t row, int64_t left, int64_t count, float half, float* factor) const {
    for (int64_t j = 0; j < count;) {
      const int64_t part = (left + j) / part_width, inside = (left + j) % part_width;
      const int64_t end = std::min((inside / block_columns + 1) * block_columns, part_width) - inside;
      const float value = half * of(row, part * (columns / parts) + inside / block_columns);
      const int64_t stop = std::min(j + end, count);
      for (; j < stop; ++j) factor[j] = value;
    }
  }
};

// What is multiplied: float32, or bfloat16, of which B has pairs: rows 2k and 2k + 1 of each column
// beside each other.
struct Shape {
  int64_t m, n, k, lda, ldb, ldc;
};

// Whether oneDNN has its micro-kernels for this processor and numbers, found by multiplying.
template <class Panel>
inline bool has_brgemm() {
  static const bool supported = [] {
    try {
      const Scratch<Panel> ones(16, Panel(1.f));
      float sums[16];
      at::native::cpublas::brgemm(4, 4, 4, 4, 4, 4, false, ones.data(), ones.data(), sums,
                                  sizeof(Panel) == 2);
      return sums[15] == 4.f;
    } catch (const std::exception&) {
      return false;
    }
  }();
  return supported;
}
inline bool has_pairs() { return has_brgemm<BFloat16>(); }

// C [m,n] (+)= A [m,k] @ B [k,n].
inline void multiply(const Shape& s, bool add, const float* a, const float* b, float* c) {
  if (has_brgemm<float>())
    return at::native::cpublas::brgemm(s.m, s.n, s.k, s.lda, s.ldb, s.ldc, add, a, b, c, false);
  const auto matrix = [](const float* data, int64_t rows, int64_t columns, int64_t apart) {
    return at::from_blob(const_cast<float*>(data), {rows, columns}, {apart, 1}, at::kFloat);
  };
  at::Tensor sums = matrix(c, s.m, s.n, s.ldc);
  at::addmm_out(sums, sums, matrix(a, s.m, s.k, s.lda), matrix(b, s.k, s.n, s.ldb), add ? 1.f : 0.f);
}
inline void multiply(const Shape& s, bool add, const BFloat16* a, const BFloat16* b, float* c) {
  at::native::cpublas::brgemm(s.m, s.n, s.k, s.lda, s.ldb, s.ldc, add, a, b, c, true);
}

// Numbers to panels of float32: to[j] = number j times factor j.
template <class Number>
inline void expand(const Number* from, const float* factor, int64_t count, float* to) {
  int64_t j = 0;
  for (; j + WIDTH <= count; j += WIDTH) {
    Lanes strip[STRIP];
    read_strip(from + j, strip);
    in_order<Number>(strip);
    UNROLLED for (int part = 0; part < STRIP; ++part)
        store(to + j + part * LANES, strip[part] * read(factor + j + part * LANES));
  }
  for (; j < count; ++j) to[j] = read_one(from + j) * factor[j];
}

}  // namespace neuron_minimax
