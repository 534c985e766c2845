// Products of few rows of inputs with the rows of a weight as they are stored.
#pragma once
#include "panels.h"

namespace neuron_minimax {

constexpr int ROWS = 4;  // of a weight that are read beside each other,
constexpr int TALL = 6;  // for so many rows of input: sums stay in registers

// sums[n,r] += dot(input n, row r of a weight), while the same rows are fetched, and near their end those
// from `below` on.
template <class Number, int COUNT, int READ>
inline void add_dots(const float* input, int64_t apart, const Number* weight, int64_t features,
                     int64_t length, const Number* below, float* sums) {
  const int64_t ahead = columns_ahead<Number>(READ, length);
  Lanes total[COUNT][READ] = {};
  int64_t i = 0;
  for (; i + WIDTH <= length; i += WIDTH) {
    const Number* next = i + ahead < length ? weight + i + ahead : below + i + ahead - length;
    UNROLLED for (int r = 0; r < READ; ++r) fetch_strip(next + r * features);
    UNROLLED for (int part = 0; part < STRIP; ++part) {
      Lanes numbers[READ];
      UNROLLED for (int r = 0; r < READ; ++r) numbers[r] = kept(read_part(weight + r * features + i, part));
      UNROLLED for (int n = 0; n < COUNT; ++n) {
        const Lanes x = kept(read(input + n * apart + i + part * LANES));
        UNROLLED for (int r = 0; r < READ; ++r) total[n][r] += x * numbers[r];
      }
    }
  }
  UNROLLED for (int n = 0; n < COUNT; ++n) {
    Four four = sums_of(total[n][0], total[n][1 % READ], total[n][2 % READ], total[n][3 % READ]);
    for (int r = 0; r < READ; ++r) sums[n * READ + r] += four[r];
  }
  for (; i < length; ++i)
    for (int n = 0; n < COUNT; ++n)
      for (int r = 0; r < READ; ++r)
        sums[n * READ + r] += input[n * apart + i] * read_one(weight + r * features + i);
}

#if defined(__AVX512BF16__) && defined(__AVX512VBMI__)
// sums[n,r] = dot(input n, row r of a weight) by products of pairs. The scale of each block of features
// multiplies its sum, so that inputs stay as they are.
template <class Number, int COUNT, int READ>
inline void dots_of_pairs(const BFloat16* input, int64_t apart, const Number* weight, int64_t features,
                          const Number* below, const Scales& scales, int64_t row_block, float* sums) {
  const int64_t ahead = columns_ahead<Number>(READ, features), whole = features / WIDTH * WIDTH;
  Lanes total[COUNT][READ] = {};
  for (int64_t i = 0, block = 0; i < whole; ++block) {
    Lanes product[COUNT][READ] = {};
    for (const int64_t end = std::min(i + scales.block_columns, whole); i < end; i += WIDTH) {
      const Number* next = i + ahead < features ? weight + i + ahead : below + i + ahead - features;
      __m512bh numbers[READ][2];
      UNROLLED for (int r = 0; r < READ; ++r) fetch_strip(next + r * features);
      UNROLLED for (int r = 0; r < READ; ++r) read_pairs(weight + r * features + i, numbers[r]);
      UNROLLED for (int half = 0; half < 2; ++half) UNROLLED for (int n = 0; n < COUNT; ++n) {
        const Lanes x = kept(load_as<Lanes>(input + n * apart + i + half * (WIDTH / 2)));
        UNROLLED for (int r = 0; r < READ; ++r) product[n][r] = add_pairs(product[n][r], numbers[r][half], x);
      }
    }
    const Lanes scale = splat(scales.of(row_block, block));
    UNROLLED for (int n = 0; n < COUNT; ++n) UNROLLED for (int r = 0; r < READ; ++r) total[n][r] +=
        scale * product[n][r];
  }
  UNROLLED for (int n = 0; n < COUNT; ++n) {
    const Four four = sums_of(total[n][0], total[n][1 % READ], total[n][2 % READ], total[n][3 % READ]);
    for (int r = 0; r < READ; ++r) {
      sums[n * READ + r] = four[r];
      for (int64_t i = whole; i < features; ++i)
        sums[n * READ + r] += input[n * apart + i] * float(bfloat16_of(weight + r * features + i)) *
                              scales.of(row_block, i / scales.block_columns);
    }
  }
}

#endif

// Strips of a row as registers of float32, for products with an input each.
template <class Stored>
struct Floats {
  using Number = Stored;
  using Input = float;
  static constexpr int ROWS = 1;
  static constexpr float HALF = HALF_REBIAS<Number>;
  Lanes numbers[STRIP];

  void read(const Number* row, const Number*) { read_strip(row, numbers); }
  void add_times(const float* input, Lanes (&total)[STRIP]) const {
    const Lanes x = kept(splat(*input));
    UNROLLED for (int part = 0; part < STRIP; ++part) total[part] += x * numbers[part];
  }
  static void in_order(Lanes (&strip)[STRIP]) { neuron_minimax::in_order<Number>(strip); }
  static float one(const Number* from) { return read_one(from); }
};

// sums[n,c] += input[n,r] * weight[r,c] by products of strips (Floats, or Pairs of bf16.h), while the same
// rows are fetched, and near their end those from `below` on. Strips of sums are in the order in which
// strips of the weight are read.
template <class Product, int COUNT, class Number = typename Product::Number>
inline void add_rows(const typename Product::Input* input, int64_t input_apart, const Number* weight,
                     int64_t apart, int64_t depth, const Number* below, int64_t width, float* sums,
                     int64_t sums_apart) {
  const int64_t ahead = columns_ahead<Number>(depth, width);
  int64_t c = 0;
  for (; c + WIDTH <= width; c += WIDTH) {
    const Number* next = c + ahead < width ? weight + c + ahead : below + c + ahead - width;
    Lanes total[COUNT][STRIP];
    UNROLLED for (int n = 0; n < COUNT; ++n) read_strip(sums + n * sums_apart + c, total[n]);
    for (int64_t r = 0; r < depth; r += Product::ROWS) {
      UNROLLED for (int row = 0; row < Product::ROWS; ++row) fetch_strip(next + (r + row) * apart);
      const Number* from = weight + r * apart + c;
      Product product;
      product.read(from, r + 1 < depth ? from + apart : from);  // behind an odd last row inputs are 0
      UNROLLED for (int n = 0; n < COUNT; ++n) product.add_times(input + n * input_apart + r, total[n]);
    }
    UNROLLED for (int n = 0; n < COUNT; ++n) UNROLLED for (int part = 0; part < STRIP; ++part)
        store(sums + n * sums_apart + c + part * LANES, total[n][part]);
  }
  for (; c < width; ++c)
    for (int n = 0; n < COUNT; ++n)
      for (int64_t r = 0; r < depth; ++r)
        sums[n * sums_apart + c] += input[n * input_apart + r] * Product::one(weight + r * apart + c);
}

}  // namespace neuron_minimax
