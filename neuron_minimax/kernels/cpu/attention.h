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

constexpr int64_t AHEAD = 16384;       // bytes of keys that are fetched before they are read,
constexpr int64_t VALUES_AHEAD = 64;   // and positions of values
constexpr int64_t BLOCK = 128;         // positions
constexpr int64_t QUERIES = 96;        // rows of queries that are multiplied together
constexpr int64_t BESIDE = LANES / 2;  // keys that are multiplied with two queries at a time
constexpr int HEADS = 6;               // query heads whose values are summed together, in registers,
constexpr int64_t DEEP = 32;           // over so many positions
constexpr float NOTHING = -std::numeric_limits<float>::infinity();

// Keys and values [S,K,C,D]: positions, heads and slots lie as far apart as the cache has them.
template <class Number>
struct Cached {
  static constexpr bool SCALED = sizeof(Number) == 1;
  const Number *keys, *values;
  int64_t slots, heads, positions, size;
  int64_t slots_apart, heads_apart, apart;

  int64_t start(int64_t slot, int64_t head) const { return slot * slots_apart + head * heads_apart; }
  int64_t visible(int64_t position) const { return 0 <= position && position < positions ? position + 1 : 0; }
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
  // The average of a row's values, whose sums lack `factor` and are in the order of Rows.
  template <class Rows>
  void finish(int64_t row, int64_t visible, int64_t size, float factor, float* to) const {
    const float share = visible ? factor / total[row] : 0.f;
    int64_t d = 0;
    for (; d + WIDTH <= size; d += WIDTH) {
      Lanes strip[STRIP];
      read_strip(&sums[row * size + d], strip);
      Rows::in_order(strip);
      UNROLLED for (int part = 0; part < STRIP; ++part) store(to + d + part * LANES, strip[part] * share);
    }
    for (; d < size; ++d) to[d] = sums[row * size + d] * share;
  }
};

// Keys and queries as they are multiplied: numbers in the order in which strips of Number are read, behind
// the last of them zeros.
template <class Number>
struct FloatKeys {
  using Input = float;
  static constexpr int64_t AT_ONCE = LANES;

  static bool as_stored(int64_t size) { return std::is_same_v<Number, float> && size % LANES == 0; }
  static void take(const float* from, int64_t size, float* to) {
    spread<Number>(from, size, to);
    for (int64_t d = 0; d < size; ++d) to[d] *= HALF_REBIAS<Number>;
  }
  static void expand(const Number* from, int64_t size, float* to) {
    int64_t d = 0;
    for (; d + WIDTH <= size; d += WIDTH) {
      Lanes strip[STRIP];
      read_strip(from + d, strip);
      UNROLLED for (int part = 0; part < STRIP; ++part) store(to + d + part * LANES, strip[part]);
    }
    for (; d < size; ++d) to[d] = read_one(from + d);
  }
  static Lanes add(Lanes sums, Lanes key, Lanes query) { return sums + key * query; }
};
#if defined(__AVX512BF16__) && defined(__AVX512VBMI__)
template <class Number>
struct PairKeys {
  using Input = BFloat16;
  static constexpr int64_t AT_ONCE = 2 * LANES;

  static bool as_stored(int64_t size) { return sizeof(Number) == 2 && size % AT_ONCE == 0; }
  static void take(const float* from, int64_t size, BFloat16* to) {
    round(from, size, to);
    spread_pairs<Number>(to, size);
  }
  static void expand(const Number* from, int64_t size, BFloat16* to) {
    int64_t d = 0;
    for (; d + WIDTH <= size; d += WIDTH) {
      __m512bh pairs[2];
      read_pairs(from + d, pairs);
      std::memcpy(to + d, pairs, sizeof pairs);
    }
    for (; d < size; ++d) to[d] = bfloat16_of(from + d);
  }
  static Lanes add(Lanes sums, Lanes key, Lanes query) { return add_pairs(sums, (__m512bh)key, query); }
};
#endif

// scores[g,c] of at most BESIDE keys, in rows BLOCK apart; of `group` queries, and one behind an odd last.
template <class Keys, class Number, class Input = typename Keys::Input>
inline void score(const Input* queries, int64_t group, int64_t width, const Number* keys, int64_t count,
                  int64_t apart, int64_t size, Input* panel, float* scores) {
  // What is fetched meanwhile, some lines at each of the steps.
  const int64_t steps = ceil_div(group, 2) * (width / Keys::AT_ONCE);
  const int64_t lines = ceil_div(BESIDE * apart * int64_t(sizeof(Number)), 64 * steps);
  const char* next = reinterpret_cast<const char*>(keys) + AHEAD;
  const Input* from = reinterpret_cast<const Input*>(keys);
  if (count < BESIDE || !Keys::as_stored(size)) {
    for (int64_t c = 0; c < count; ++c) Keys::expand(keys + c * apart, size, panel + c * width);
    from = panel;
    apart = width;
  }
  for (int64_t g = 0; g < group; g += 2) {
    Lanes sums[LANES] = {};
    for (int64_t d = 0; d < width; d += Keys::AT_ONCE) {
      for (int64_t line = 0; line < lines; ++line, next += 64) fetch(next);
      const Lanes one = load_as<Lanes>(queries + g * width + d);
      const Lanes other = load_as<Lanes>(queries + (g + 1) * width + d);
      UNROLLED for (int c = 0; c < BESIDE; ++c) {
        const Lanes key = kept(load_as<Lanes>(from + c * apart + d));
        sums[c] = Keys::add(sums[c], key, one);
        sums[BESIDE + c] = Keys::add(sums[BESIDE + c], key, other);
      }
    }
    const Lanes both = sums_of(sums);
    std::memcpy(scores + g * BLOCK, &both, sizeof both / 2);
    std::memcpy(scores + (g + 1) * BLOCK, (const float*)&both + BESIDE, sizeof both / 2);
  }
}

// out [S,K*G,D] of one token per slot, by products with Keys and with Rows of values (Floats or Pairs).
template <class Keys, class Rows, class Number = typename Rows::Number>
void decode(const float* query, const Cached<Number>& cached, const int64_t* positions, int64_t group,
            float* out) {
  using Input = typename Rows::Input;
  constexpr float half = Rows::HALF;
  const int64_t size = cached.size, apart = cached.apart,
                width = ceil_div(size, Keys::AT_ONCE) * Keys::AT_ONCE;
  const float scaling = 1.f / std::sqrt(float(size));
  for_each_item(cached.slots * cached.heads, [&](int64_t item) {
    const int64_t slot = item / cached.heads;
    const int64_t start = cached.start(slot, item % cached.heads), visible = cached.visible(positions[slot]);
    thread_local Softmax softmax;
    thread_local Scratch<float> scores;
    thread_local Scratch<Input> queries, panel, weights;
    softmax.clear(group, size);
    const int64_t even = ceil_div(group, 2) * 2;
    scores.resize(even * BLOCK);
    queries.assign(even * width, Input(0.f));
    panel.assign(BESIDE * width, Input(0.f));
    for (int64_t g = 0; g < group; ++g)
      Keys::take(query + (item * group + g) * size, size, &queries[g * width]);
    for (int64_t first = 0; first < visible; first += BLOCK) {
      const int64_t count = std::min(BLOCK, visible - first);
      const Number* keys = cached.keys + start + first * apart;
      const Number* values = cached.values + start + first * apart;
      for (int64_t c = 0; c < count; c += BESIDE) {
        const Number* from = keys + c * apart;
        score<Keys>(queries.data(), group, width, from, std::min(BESIDE, count - c), apart, size,
                    panel.data(), &scores[c]);
      }
      cached.scale(keys, count, half, scores.data(), group);
      for (int64_t g = 0; g < group; ++g) softmax.weigh(g, &scores[g * BLOCK], count, scaling, size);
      cached.scale(values, count, half, scores.data(), group);
      const Input* shares;
      if constexpr (std::is_same_v<Input, float>) {
        shares = scores.data();
      } else {
        weights.resize(group * BLOCK);
        round(scores.data(), group * BLOCK, weights.data());
        shares = weights.data();
      }
      for (int64_t c = 0; c < count; c += DEEP) {
        const int64_t depth = std::min(DEEP, count - c);
        const Number* from = values + c * apart;
        for (int64_t g = 0; g < group; g += HEADS)
          with_constant<HEADS>(std::min<int64_t>(HEADS, group - g), [&](auto tile) {
            add_rows<Rows, tile>(shares + g * BLOCK + c, BLOCK, from, apart, depth,
                                 from + VALUES_AHEAD * apart, size, &softmax.sums[g * size], size);
          });
      }
    }
    for (int64_t g = 0; g < group; ++g)
      softmax.finish<Rows>(g, visible, size, half, out + (item * group + g) * size);
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
        for (int64_t n = 0; n < rows; ++n)
          softmax.finish<Floats<float>>(n, visible[n], size, 1.f, out + place[n]);
      });
    }
  }
}

}  // namespace neuron_minimax
