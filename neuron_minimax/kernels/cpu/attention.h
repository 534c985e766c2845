// Attention over a cache: of one token in every slot (decode), and of a prompt's tokens (prefill).
//
// Both are flash attention with online softmax (Dao et al. 2022, arXiv 2205.14135), BLOCK positions
// at a time. Decode reads each key and value once for all query heads that share it.
//
// Of FP8 a position of a head is D codes and their scale (as_cached of reference.py): codes are
// multiplied as they are, a key's scale is then its scores', and a value's its weights'. With the scales
// goes half of what codes lack, or products of weights and small values would be subnormal.
//
// Shapes: S slots, T tokens, K key heads, G query heads of each, D head_dim; C positions.
#pragma once
#include <limits>

#include "linear.h"

namespace neuron_minimax {

constexpr int64_t AHEAD = 8192;  // bytes that are fetched before they are read
constexpr int64_t BLOCK = 128;   // positions
constexpr int64_t QUERIES = 96;  // rows of queries that are multiplied together
constexpr int HEADS = 6;         // query heads in a tile: sums stay in registers
constexpr float NOTHING = -std::numeric_limits<float>::infinity();

// Keys and values [S,K,C,D]: positions, heads and slots lie as far apart as the cache has them.
template <class Number>
struct Cached {
  static constexpr bool SCALED = sizeof(Number) == 1;
  const Number *keys, *values;
  int64_t slots, heads, positions, size;
  int64_t slots_apart, heads_apart, apart;

  int64_t start(int64_t slot, int64_t head) const { return slot * slots_apart + head * heads_apart; }
  int64_t visible(int64_t position) const {
    return 0 <= position && position < positions ? position + 1 : 0;
  }
  // rows[n,c] *= half * the scale of position c, where there is one: `first` is the first of `count`.
  void scale(const Number* first, int64_t count, float half, float* rows, int64_t height) const {
    if constexpr (SCALED) {
      alignas(64) float scales[BLOCK] = {};
      for (int64_t c = 0; c < count; ++c) {
        std::memcpy(scales + c, first + c * apart + size, sizeof(float));
        scales[c] *= half;
      }
      for (int64_t n = 0; n < height; ++n)
        for (int64_t c = 0; c < BLOCK; ++c) rows[n * BLOCK + c] *= scales[c];
    }
  }
};

// Running softmax of some rows: the largest score, the sum of weights, the weighted sum of values.
struct Softmax {
  Scratch<float> largest, total, sums;

  void clear(int64_t rows, int64_t size) {
    largest.assign(rows, NOTHING);
    total.assign(rows, 0.f);
    sums.assign(rows * size, 0.f);
  }
  // scores [rows, BLOCK] to weights of the first `seen` of a row; the others weigh nothing.
  void weigh(int64_t row, float* scores, int64_t seen, float scaling, int64_t size) {
    if (seen <= 0) {
      std::fill_n(scores, BLOCK, 0.f);
      return;
    }
    std::fill(scores + seen, scores + BLOCK, NOTHING);
    Lanes most = splat(largest[row]);
    for (int64_t c = 0; c < BLOCK; c += LANES) {
      const Lanes score = read(scores + c) * scaling;
      most = most > score ? most : score;
      store(scores + c, score);
    }
    float high = most[0];
    for (int lane = 1; lane < LANES; ++lane) high = std::max(high, most[lane]);
    Lanes weights = {};
    for (int64_t c = 0; c < BLOCK; c += LANES) {
      const Lanes weight = exponential(read(scores + c) - high);
      weights += weight;
      store(scores + c, weight);
    }
    const float shrink = exponential(splat(largest[row] - high))[0];
    largest[row] = high;
    total[row] = total[row] * shrink + sum(weights);
    for (int64_t d = 0; d < size; ++d) sums[row * size + d] *= shrink;
  }
  // The average of a row's values, whose sums lack `factor` and are in the order in which strips of
  // Number are read.
  template <class Number>
  void finish(int64_t row, int64_t visible, int64_t size, float factor, float* to) const {
    const float share = visible ? factor / total[row] : 0.f;
    int64_t d = 0;
    for (; d + WIDTH <= size; d += WIDTH) {
      Lanes strip[STRIP];
      read_strip(&sums[row * size + d], strip);
      in_order<Number>(strip);
      UNROLLED for (int part = 0; part < STRIP; ++part) store(to + d + part * LANES, strip[part] * share);
    }
    for (; d < size; ++d) to[d] = sums[row * size + d] * share;
  }
};

// scores[g,r] = dot(query g, key r), rows BLOCK apart, while the next keys are fetched. Queries are in the
// order in which strips of Number are read.
template <class Number, int COUNT, int READ>
inline void dots(const float* queries, const Number* keys, int64_t apart, int64_t size, const Number* ahead,
                 float* scores) {
  Lanes total[COUNT][READ] = {};
  int64_t d = 0;
  for (; d + WIDTH <= size; d += WIDTH) {
    UNROLLED for (int r = 0; r < READ; ++r) fetch_strip(ahead + r * apart + d);
    UNROLLED for (int part = 0; part < STRIP; ++part) {
      Lanes numbers[READ];
      UNROLLED for (int r = 0; r < READ; ++r) numbers[r] = kept(read_part(keys + r * apart + d, part));
      UNROLLED for (int g = 0; g < COUNT; ++g) {
        const Lanes x = kept(read(queries + g * size + d + part * LANES));
        UNROLLED for (int r = 0; r < READ; ++r) total[g][r] += x * numbers[r];
      }
    }
  }
  UNROLLED for (int g = 0; g < COUNT; ++g) {
    Four four = sums_of(total[g][0], total[g][1 % READ], total[g][2 % READ], total[g][3 % READ]);
    for (int64_t rest = d; rest < size; ++rest)
      for (int r = 0; r < READ; ++r) four[r] += queries[g * size + rest] * read_one(keys + r * apart + rest);
    std::memcpy(scores + g * BLOCK, &four, READ * sizeof(float));
  }
}

// sums[g,d] += weights[g,c] * values[c,d], strips of sums in the order in which they are read.
template <class Number, int COUNT>
inline void add_values(const float* weights, const Number* values, int64_t apart, int64_t count, int64_t size,
                       float* sums) {
  const int64_t ahead = AHEAD / (apart * int64_t(sizeof(Number)));
  int64_t d = 0;
  for (; d + WIDTH <= size; d += WIDTH) {
    Lanes total[COUNT][STRIP];
    UNROLLED for (int g = 0; g < COUNT; ++g) read_strip(sums + g * size + d, total[g]);
    for (int64_t c = 0; c < count; ++c) {
      Lanes numbers[STRIP];
      fetch_strip(values + (c + ahead) * apart + d);
      read_strip(values + c * apart + d, numbers);
      UNROLLED for (int g = 0; g < COUNT; ++g) {
        const Lanes weight = kept(splat(weights[g * BLOCK + c]));
        UNROLLED for (int part = 0; part < STRIP; ++part) total[g][part] += weight * numbers[part];
      }
    }
    UNROLLED for (int g = 0; g < COUNT; ++g) UNROLLED for (int part = 0; part < STRIP; ++part)
        store(sums + g * size + d + part * LANES, total[g][part]);
  }
  for (; d < size; ++d)
    for (int g = 0; g < COUNT; ++g)
      for (int64_t c = 0; c < count; ++c)
        sums[g * size + d] += weights[g * BLOCK + c] * read_one(values + c * apart + d);
}

// out [S,K*G,D] of one token per slot.
template <class Number>
void decode(const float* query, const Cached<Number>& cached, const int64_t* positions, int64_t group,
            float* out) {
  constexpr float half = HALF_REBIAS<Number>;
  const int64_t size = cached.size, apart = cached.apart;
  const int64_t ahead = AHEAD / (apart * int64_t(sizeof(Number)));
  const float scaling = 1.f / std::sqrt(float(size));
  for_each_item(cached.slots * cached.heads, [&](int64_t item) {
    const int64_t slot = item / cached.heads;
    const int64_t start = cached.start(slot, item % cached.heads), visible = cached.visible(positions[slot]);
    thread_local Softmax softmax;
    thread_local Scratch<float> scores, queries;
    softmax.clear(group, size);
    scores.resize(group * BLOCK);
    queries.resize(group * size);
    for (int64_t g = 0; g < group; ++g)
      spread<Number>(query + (item * group + g) * size, size, &queries[g * size]);
    for (float& number : queries) number *= half;
    for (int64_t first = 0; first < visible; first += BLOCK) {
      const int64_t count = std::min(BLOCK, visible - first);
      const Number* keys = cached.keys + start + first * apart;
      const Number* values = cached.values + start + first * apart;
      for (int64_t c = 0; c < count;) {
        const int64_t read_keys = count - c >= ROWS ? ROWS : 1;
        for (int64_t g = 0; g < group; g += HEADS)
          with_constant<HEADS>(std::min<int64_t>(HEADS, group - g), [&](auto tile) {
            const auto multiply = read_keys == ROWS ? dots<Number, tile, ROWS> : dots<Number, tile, 1>;
            multiply(&queries[g * size], keys + c * apart, apart, size, keys + (c + ahead) * apart,
                     &scores[g * BLOCK + c]);
          });
        c += read_keys;
      }
      cached.scale(keys, count, half, scores.data(), group);
      for (int64_t g = 0; g < group; ++g) softmax.weigh(g, &scores[g * BLOCK], count, scaling, size);
      cached.scale(values, count, half, scores.data(), group);
      for (int64_t g = 0; g < group; g += HEADS)
        with_constant<HEADS>(std::min<int64_t>(HEADS, group - g), [&](auto tile) {
          add_values<Number, tile>(&scores[g * BLOCK], values, apart, count, size, &softmax.sums[g * size]);
        });
    }
    for (int64_t g = 0; g < group; ++g)
      softmax.finish<Number>(g, visible, size, half, out + (item * group + g) * size);
  });
}

// out [S,T,K*G,D], each query over the positions up to its own.
template <class Panel, class Number>
void prefill(const float* query, const Cached<Number>& cached, const int64_t* positions, int64_t tokens,
             int64_t group, float* out) {
  constexpr bool pairs = std::is_same_v<Panel, BFloat16>;
  constexpr float half = pairs ? 1.f : HALF_REBIAS<Number>;  // which float32 panels have, and half is wanting
  const int64_t size = cached.size, apart = cached.apart, even = pairs ? ceil_div(size, 2) * 2 : size;
  const int64_t blocks = ceil_div(cached.positions, BLOCK);
  const float scaling = 1.f / std::sqrt(float(size));
  const Scratch<float> halves(size, half);
  // Per block of positions: keys as columns [D, BLOCK], values as rows [BLOCK, D]; zeros behind the last.
  Scratch<Panel> key_panels(blocks * BLOCK * even), value_panels(blocks * BLOCK * size);
  for (int64_t slot = 0; slot < cached.slots; ++slot) {
    int64_t filled = 0;
    for (int64_t t = 0; t < tokens; ++t)
      filled = std::max(filled, cached.visible(positions[slot * tokens + t]));
    for (int64_t head = 0; head < cached.heads; ++head) {
      const int64_t start = cached.start(slot, head);
      for_each_item(ceil_div(filled, BLOCK), [&](int64_t block) {
        const int64_t count = std::min(BLOCK, filled - block * BLOCK);
        const Number* keys = cached.keys + start + block * BLOCK * apart;
        const Number* values = cached.values + start + block * BLOCK * apart;
        Panel* key_panel = &key_panels[block * BLOCK * even];
        Panel* value_panel = &value_panels[block * BLOCK * size];
        std::fill_n(key_panel, BLOCK * even, Panel(0.f));
        std::fill_n(value_panel, BLOCK * size, Panel(0.f));
        for (int64_t c = 0; c < count; ++c) {
          for (int64_t d = 0; d < size; ++d)
            if constexpr (pairs)
              key_panel[(d / 2 * BLOCK + c) * 2 + d % 2] = bfloat16_of(keys + c * apart + d);
            else
              key_panel[d * BLOCK + c] = read_one(keys + c * apart + d) * half;
          if constexpr (!pairs)
            expand(values + c * apart, halves.data(), size, value_panel + c * size);
          else if (c % 2 == 0)
            expand_pairs(values + c * apart, c + 1 < count ? values + (c + 1) * apart : nullptr, size,
                         value_panel + c * size);
        }
      });
      const int64_t step =
          std::max<int64_t>(1, std::min(QUERIES / group, ceil_div(tokens, at::get_num_threads())));
      for_each_item(ceil_div(tokens, step), [&](int64_t item) {
        const int64_t first = item * step, rows = std::min(step, tokens - first) * group;
        thread_local Softmax softmax;
        thread_local Scratch<float> scores;
        thread_local Scratch<Panel> queries, weights;
        thread_local std::vector<int64_t> visible, place;
        softmax.clear(rows, size);
        scores.resize(rows * BLOCK);
        queries.assign(rows * even, Panel(0.f));
        weights.resize(pairs ? rows * BLOCK : 0);
        visible.resize(rows);
        place.resize(rows);
        int64_t most = 0;
        for (int64_t n = 0; n < rows; ++n) {
          const int64_t token = slot * tokens + first + n / group;
          visible[n] = cached.visible(positions[token]);
          place[n] = ((token * cached.heads + head) * group + n % group) * size;
          most = std::max(most, visible[n]);
          for (int64_t d = 0; d < size; ++d) queries[n * even + d] = Panel(query[place[n] + d]);
        }
        for (int64_t block = 0; block < ceil_div(most, BLOCK); ++block) {
          multiply({rows, BLOCK, even, even, BLOCK, BLOCK}, false, queries.data(),
                   &key_panels[block * BLOCK * even], scores.data());
          const int64_t at = start + block * BLOCK * apart, count = std::min(BLOCK, filled - block * BLOCK);
          cached.scale(cached.keys + at, count, half, scores.data(), rows);
          for (int64_t n = 0; n < rows; ++n)
            softmax.weigh(n, &scores[n * BLOCK], std::min(BLOCK, visible[n] - block * BLOCK), scaling, size);
          cached.scale(cached.values + at, count, half, scores.data(), rows);
          const Panel* values = &value_panels[block * BLOCK * size];
          const Shape shape{rows, size, BLOCK, BLOCK, size, size};
          if constexpr (pairs) {
            round(scores.data(), rows * BLOCK, weights.data());
            multiply(shape, true, weights.data(), values, softmax.sums.data());
          } else {
            multiply(shape, true, scores.data(), values, softmax.sums.data());
          }
        }
        for (int64_t n = 0; n < rows; ++n) softmax.finish<float>(n, visible[n], size, 1.f, out + place[n]);
      });
    }
  }
}

}  // namespace neuron_minimax
