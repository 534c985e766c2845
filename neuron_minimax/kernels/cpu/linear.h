// Linear layers: a skinny GEMM for few rows, bound by memory, and a blocked GEMM for many.
//
// Shapes: N rows of input, O output and I input features.
#pragma once
#include "panels.h"
#include "products.h"
#include "work.h"

namespace neuron_minimax {

constexpr int64_t FEW_ROWS[] = {48, 26};  // up to so many a weight is read as it lies: for float32, for pairs
constexpr int64_t CACHED = 8192;          // numbers of the input that stay in the first cache
constexpr int64_t PANEL_ROWS = 128;       // of a weight that are expanded together,
constexpr int64_t PANEL_INPUTS = 512;     // and rows of input that they are multiplied with

// out [N,O] = hidden @ weight.T for few rows.
template <class Number>
void linear_of_few(const float* hidden, int64_t rows, const Number* weight, int64_t outputs, int64_t features,
                   const Scales& scales, float* out) {
  constexpr float half = HALF_REBIAS<Number>;
  const int64_t apart = apart_of(features);
  const int64_t tiles = ceil_div(rows, TALL);
  const int64_t chunk = CACHED / std::min<int64_t>(rows, TALL) / 64 * 64;
  const int64_t tall = std::min<int64_t>(scales.block_rows, 128);
  const int64_t per_block = ceil_div(scales.block_rows, tall);
  Scratch<float> inputs(rows * features);
  for (int64_t n = 0; n < rows; ++n) spread<Number>(hidden + n * features, features, &inputs[n * features]);
  for_each_item(ceil_div(outputs, scales.block_rows) * per_block, [&](int64_t item) {
    const int64_t block = item / per_block;
    const int64_t first = block * scales.block_rows + item % per_block * tall;
    const int64_t last = std::min({first + tall, (block + 1) * scales.block_rows, outputs});
    if (first >= last) return;
    thread_local Scratch<float> scaled, factor, sums;
    sums.resize(rows * ROWS);
    scaled.resize(rows * apart);
    factor.resize(features);
    scales.of_columns(block, 0, features, half, factor.data());
    spread<Number>(factor.data(), features, factor.data());
    for (int64_t n = 0; n < rows; ++n)
      for (int64_t i = 0; i < features; ++i) scaled[n * apart + i] = inputs[n * features + i] * factor[i];
    for (int64_t row = first; row < last;) {
      const int64_t read = last - row >= ROWS ? ROWS : 1;
      std::fill_n(sums.begin(), rows * ROWS, 0.f);
      for (int64_t left = 0; left < features; left += chunk)
        for (int64_t tile = 0; tile < tiles; ++tile) {
          const int64_t n = rows * tile / tiles, height = rows * (tile + 1) / tiles - n;
          with_constant<TALL>(height, [&](auto count) {
            const auto add = read == ROWS ? add_dots<Number, count, ROWS> : add_dots<Number, count, 1>;
            const Number* from = weight + row * features + left;
            add(&scaled[n * apart + left], apart, from, features, std::min(chunk, features - left),
                from + read * features, &sums[n * read]);
          });
        }
      for (int64_t n = 0; n < rows; ++n)
        for (int64_t r = 0; r < read; ++r) out[n * outputs + row + r] = sums[n * read + r] * half;
      row += read;
    }
  });
}

#if defined(__AVX512BF16__) && defined(__AVX512VBMI__)
// out [N,O] = hidden @ weight.T for few rows of bfloat16 numbers.
template <class Number>
void linear_of_few_by_pairs(const float* hidden, int64_t rows, const Number* weight, int64_t outputs,
                            int64_t features, const Scales& scales, float* out) {
  constexpr int tall = 4;
  const int64_t apart = apart_of(features), tiles = ceil_div(rows, tall);
  Scratch<BFloat16> inputs(rows * apart);
  for (int64_t n = 0; n < rows; ++n) {
    round(hidden + n * features, features, &inputs[n * apart]);
    spread_pairs<Number>(&inputs[n * apart], features);
  }
  constexpr int64_t together = 64;
  for_each_item(ceil_div(outputs, together), [&](int64_t item) {
    const int64_t last = std::min((item + 1) * together, outputs);
    for (int64_t row = item * together; row < last;) {
      const int64_t block = row / scales.block_rows;
      const int64_t read = std::min(last, (block + 1) * scales.block_rows) - row >= ROWS ? ROWS : 1;
      for (int64_t tile = 0; tile < tiles; ++tile) {
        const int64_t n = rows * tile / tiles, height = rows * (tile + 1) / tiles - n;
        with_constant<tall>(height, [&](auto count) {
          float sums[tall * ROWS];
          const auto dots =
              read == ROWS ? dots_of_pairs<Number, count, ROWS> : dots_of_pairs<Number, count, 1>;
          const Number* from = weight + row * features;
          dots(&inputs[n * apart], apart, from, features, from + read * features, scales, block, sums);
          for (int64_t k = 0; k < height; ++k)
            for (int64_t r = 0; r < read; ++r) out[(n + k) * outputs + row + r] = sums[k * read + r];
        });
      }
      row += read;
    }
  });
}
#endif

// The same for many rows: rows of the weight are expanded to panels of Panel, float or BFloat16,
// and multiplied with the transposed input, so that no weight is transposed.
template <class Panel, class Number>
void linear_of_many(const float* hidden, int64_t rows, const Number* weight, int64_t outputs,
                    int64_t features, const Scales& scales, float* out) {
  constexpr bool pairs = std::is_same_v<Panel, BFloat16>;
  constexpr float half = pairs ? 1.f : HALF_REBIAS<Number>;
  const int64_t blocks = scales.columns, apart = apart_of(rows);
  // Of each block of features its depth of rows, padded to whole pairs.
  const int64_t deep = ceil_div(scales.block_columns, 2) * 2;
  Scratch<Panel> turned(blocks * deep * apart);
  at::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * scales.block_columns;
      const int64_t depth = std::min(scales.block_columns, features - first);
      Panel* to = &turned[block * deep * apart];
      for (int64_t n = 0; n < rows; ++n)
        for (int64_t k = 0; k < depth; ++k) {
          const Panel number(hidden[n * features + first + k] * half);
          if constexpr (pairs)
            to[(k / 2 * apart + n) * 2 + k % 2] = number;
          else
            to[k * apart + n] = number;
        }
      if (pairs && depth % 2)
        for (int64_t n = 0; n < rows; ++n) to[(depth / 2 * apart + n) * 2 + 1] = Panel(0.f);
    }
  });
  const int64_t groups = ceil_div(rows, PANEL_INPUTS);
  for_each_item(ceil_div(outputs, PANEL_ROWS) * groups, [&](int64_t item) {
    const int64_t first = item / groups * PANEL_ROWS, tall = std::min(PANEL_ROWS, outputs - first);
    const int64_t left = rows * (item % groups) / groups, wide = rows * (item % groups + 1) / groups - left;
    thread_local Scratch<Panel> panel;
    thread_local Scratch<float> factor, sums, product;
    panel.resize(PANEL_ROWS * DEPTH);
    factor.resize(DEPTH);
    const int64_t sums_apart = apart_of(wide);
    sums.assign(tall * sums_apart, 0.f);
    if (pairs) product.resize(tall * sums_apart);
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t begin = block * scales.block_columns,
                    end = std::min(begin + scales.block_columns, features);
      for (int64_t top = begin; top < end; top += DEPTH) {
        const int64_t depth = std::min(DEPTH, end - top), even = pairs ? ceil_div(depth, 2) * 2 : depth;
        for (int64_t r = 0; r < tall; ++r) {
          const Number* from = weight + (first + r) * features + top;
          Panel* to = &panel[r * DEPTH];
          fetch_rows<1>(from + DEPTH, features, DEPTH);
          if constexpr (pairs) {
            round(from, depth, to);
            if (even > depth) to[depth] = Panel(0.f);
          } else {
            std::fill_n(factor.begin(), depth, half * scales.of((first + r) / scales.block_rows, block));
            expand(from, factor.data(), depth, to);
          }
        }
        const Panel* inputs = &turned[(block * deep + top - begin) * apart + left * (pairs ? 2 : 1)];
        if constexpr (pairs) {
          multiply({tall, wide, even, DEPTH, apart, sums_apart}, false, panel.data(), inputs, product.data());
          for (int64_t r = 0; r < tall; ++r) {
            const float scale = scales.of((first + r) / scales.block_rows, block);
            for (int64_t n = 0; n < wide; ++n)
              sums[r * sums_apart + n] += scale * product[r * sums_apart + n];
          }
        } else {
          multiply({tall, wide, depth, DEPTH, apart, sums_apart}, true, panel.data(), inputs, sums.data());
        }
      }
    }
    for (int64_t n = 0; n < wide; ++n)
      for (int64_t r = 0; r < tall; ++r) out[(left + n) * outputs + first + r] = sums[r * sums_apart + n];
  });
}

}  // namespace neuron_minimax
