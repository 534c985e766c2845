// Fused mixture of experts: sort by expert, grouped GEMM straight from the stored weights, SwiGLU,
// combine.
//
// Each chosen expert is read once for up to GROUP of its tokens. Few tokens are bound by memory: the
// weight is read as it lies. More are bound by arithmetic: a strip of some of its rows is expanded, and
// multiplied with a few tokens after the other; of bfloat16 numbers, for many, a panel by the library.
//
// Shapes: H hidden, I intermediate; P places, one for each of a token's K experts, sorted by expert.
#pragma once
#include "linear.h"

namespace neuron_minimax {

constexpr int64_t GROUP = 128;            // tokens of one expert that are multiplied together
constexpr int64_t FEW_TOKENS[] = {8, 4};  // up to so many a weight is read as it lies: in float32, as pairs
constexpr int64_t MOST_TOKENS = 64;       // up to so many strips are multiplied, of pairs
constexpr int TILE = LANES < 16 ? 2 : 4;  // tokens beside each other: their sums stay in registers
constexpr int64_t PASS = 1024;            // places whose sums are kept between the two products
constexpr int64_t NARROWEST = 512;        // columns that a thread takes at a time
constexpr int64_t WIDEST = 4096;          // whose sums stay in the second cache
constexpr int64_t WIDEST_PANEL = 256;     // columns of a panel: it stays in the second cache

// A weight of every expert, [E, rows, columns], inputs are rows.
template <class Number>
struct Stacked {
  const Number* data;
  int64_t experts, rows, columns;
  Scales scales;

  const Number* at(int64_t expert, int64_t row) const { return data + (expert * rows + row) * columns; }
};

struct Group {
  int64_t expert, first, count;  // of its places
};

// out (+)= one strip of sums * factor, the strip in the order in which it is read.
template <class Product>
inline void add_strip(Lanes (&strip)[STRIP], const float* factor, bool add, float* out) {
  Product::in_order(strip);
  UNROLLED for (int part = 0; part < STRIP; ++part) {
    float* to = out + part * LANES;
    const Lanes product = strip[part] * read(factor + part * LANES);
    store(to, add ? read(to) + product : product);
  }
}

// out (+)= sums * factor, strips of sums in the order in which they are read.
template <class Product>
inline void add_scaled(const float* sums, const float* factor, int64_t width, bool add, float* out) {
  int64_t c = 0;
  for (; c + WIDTH <= width; c += WIDTH) {
    Lanes strip[STRIP];
    read_strip(sums + c, strip);
    add_strip<Product>(strip, factor + c, add, out + c);
  }
  for (; c < width; ++c) out[c] = sums[c] * factor[c] + (add ? out[c] : 0.f);
}

// Inputs [P, rows] of a product, as they are multiplied.
struct Inputs {
  Scratch<float> floats;
  Scratch<BFloat16> rounded;  // with a zero behind an odd row
  int64_t rows, apart;

  template <class Panel>
  const Panel* of(int64_t place) const {
    if constexpr (std::is_same_v<Panel, float>)
      return floats.data() + place * apart;
    else
      return rounded.data() + place * apart;
  }
  // Take `count` rows, which row(p, to) writes; floats are multiplied by `half`.
  template <class Row>
  void take(int64_t count, int64_t width, bool pairs, float half, const Row& row) {
    rows = width;
    apart = apart_of(width);
    floats.resize(count * apart);
    rounded.resize(pairs ? count * apart : 0);
    at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p) {
        float* to = &floats[p * apart];
        row(p, to);
        if (pairs) round(to, rows, &rounded[p * apart]);
        if (pairs) rounded[p * apart + rows] = BFloat16(0.f);
        for (int64_t r = 0; r < rows; ++r) to[r] *= half;
      }
    });
  }
};

// out[p, left:right] = inputs[p] @ columns of an expert's weight, for few tokens; DEEP rows of the weight
// are read beside each other.
template <class Product, int DEEP, class Number = typename Product::Number>
void multiply_few(const Inputs& inputs, const Group& group, const Stacked<Number>& weight, int64_t left,
                  int64_t right, float* out) {
  const int64_t count = group.count, width = right - left;
  const int64_t tiles = ceil_div(count, TALL);
  const Scales scales = weight.scales.of_expert(group.expert);
  thread_local Scratch<float> sums, factor;
  sums.resize(count * width);
  factor.resize(width);
  for (int64_t top = 0, block = 0; top < weight.rows; top += scales.block_rows, ++block) {
    const int64_t bottom = std::min(top + scales.block_rows, weight.rows);
    std::fill_n(sums.begin(), count * width, 0.f);
    for (int64_t row = top; row < bottom; row += DEEP) {
      const int64_t depth = std::min<int64_t>(DEEP, bottom - row);
      const Number* from = weight.at(group.expert, row) + left;
      for (int64_t tile = 0; tile < tiles; ++tile) {
        const int64_t n = count * tile / tiles, height = count * (tile + 1) / tiles - n;
        with_constant<TALL>(height, [&](auto few) {
          add_rows<Product, few>(inputs.of<typename Product::Input>(group.first + n) + row, inputs.apart,
                                 from, weight.columns, depth, from + depth * weight.columns, width,
                                 &sums[n * width], width);
        });
      }
    }
    scales.of_columns(block, left, width, Product::HALF, factor.data());
    for (int64_t n = 0; n < count; ++n)
      add_scaled<Product>(&sums[n * width], factor.data(), width, block, out + n * weight.columns + left);
  }
}

// out[p] (+)= inputs[p] @ one strip of columns of `depth` rows of a weight, times `factor`, for COUNT tokens.
// product(r) is what is read of the rows from r on.
template <class Product, int COUNT, class Read>
inline void multiply_tile(const typename Product::Input* input, int64_t input_apart, int64_t depth,
                          const Read& product, const float* factor, bool add, float* out, int64_t out_apart) {
  Lanes total[COUNT][STRIP] = {};
  for (int64_t r = 0; r < depth; r += Product::ROWS) {
    const Product numbers = product(r);
    UNROLLED for (int n = 0; n < COUNT; ++n) numbers.add_times(input + n * input_apart + r, total[n]);
  }
  UNROLLED for (int n = 0; n < COUNT; ++n) add_strip<Product>(total[n], factor, add, out + n * out_apart);
}

// The same for more: strip by strip of columns. What is read for the first tile of tokens is kept for the
// others, in the first or second cache.
template <class Product, class Number = typename Product::Number>
void multiply_strips(const Inputs& inputs, const Group& group, const Stacked<Number>& weight, int64_t left,
                     int64_t right, float* out) {
  const int64_t count = group.count, columns = weight.columns, width = right - left;
  const int64_t tiles = ceil_div(count, TILE);
  const Scales scales = weight.scales.of_expert(group.expert);
  thread_local Scratch<float> strips, factor;
  strips.resize(DEPTH * WIDTH);
  factor.resize(width);
  float* const kept_strip = strips.data();
  for (int64_t top = 0, block = 0; top < weight.rows; top += scales.block_rows, ++block) {
    const int64_t bottom = std::min(top + scales.block_rows, weight.rows);
    scales.of_columns(block, left, width, Product::HALF, factor.data());
    for (int64_t row = top; row < bottom; row += DEPTH) {
      const int64_t depth = std::min(DEPTH, bottom - row), ahead = columns_ahead<Number>(depth, width);
      const Number* from = weight.at(group.expert, row) + left;
      const Number* below = from + depth * columns - width;
      const auto* input = inputs.of<typename Product::Input>(group.first) + row;
      int64_t c = 0;
      for (; c + WIDTH <= width; c += WIDTH) {
        const Number* next = (c + ahead < width ? from : below) + c + ahead;
        const auto kept_at = [&](int64_t r) { return kept_strip + r / Product::ROWS * WIDTH; };
        const auto read_first = [&](int64_t r) {
          UNROLLED for (int i = 0; i < Product::ROWS; ++i) fetch_strip(next + (r + i) * columns);
          const Number* at = from + r * columns + c;
          Product product;
          product.read(at, r + 1 < depth ? at + columns : at);  // behind an odd last row inputs are 0
          UNROLLED for (int part = 0; part < STRIP; ++part)
              store(kept_at(r) + part * LANES, product.numbers[part]);
          return product;
        };
        const auto read_again = [&](int64_t r) {
          Product product;
          UNROLLED for (int part = 0; part < STRIP; ++part) product.numbers[part] =
              kept(read(kept_at(r) + part * LANES));
          return product;
        };
        for (int64_t tile = 0; tile < tiles; ++tile) {
          const int64_t n = count * tile / tiles, height = count * (tile + 1) / tiles - n;
          with_constant<TILE>(height, [&](auto few) {
            const auto multiply = [&](const auto& product) {
              multiply_tile<Product, decltype(few)::value>(input + n * inputs.apart, inputs.apart, depth,
                                                           product, &factor[c], row > 0,
                                                           out + n * columns + left + c, columns);
            };
            tile ? multiply(read_again) : multiply(read_first);
          });
        }
      }
      for (; c < width; ++c)
        for (int64_t n = 0; n < count; ++n) {
          float sum = 0, *to = out + n * columns + left + c;
          for (int64_t r = 0; r < depth; ++r)
            sum += input[n * inputs.apart + r] * Product::one(from + r * columns + c);
          *to = sum * factor[c] + (row ? *to : 0.f);
        }
    }
  }
}

// The same for many, by panels of bfloat16 numbers that the library multiplies, which uses AMX where the
// processor has it.
template <class Number>
void multiply_panels(const Inputs& inputs, const Group& group, const Stacked<Number>& weight, int64_t left,
                     int64_t right, float* out) {
  const int64_t count = group.count, columns = weight.columns;
  const Scales scales = weight.scales.of_expert(group.expert);
  thread_local Scratch<BFloat16> panel;
  thread_local Scratch<float> sums, factor;
  panel.resize(DEPTH * WIDEST_PANEL);
  factor.resize(WIDEST_PANEL);
  sums.resize(count * WIDEST_PANEL);
  for (; left < right; left += WIDEST_PANEL) {
    const int64_t width = std::min(WIDEST_PANEL, right - left);
    for (int64_t top = 0, block = 0; top < weight.rows; top += scales.block_rows, ++block) {
      scales.of_columns(block, left, width, 1.f, factor.data());
      const int64_t bottom = std::min(top + scales.block_rows, weight.rows);
      for (int64_t row = top; row < bottom; row += DEPTH) {
        const int64_t depth = std::min(DEPTH, bottom - row);
        const Number* from = weight.at(group.expert, row) + left;
        float* to = out + left;
        for (int64_t r = 0; r < depth; r += 2) {
          fetch_rows<2>(from + (r + DEPTH) * columns, columns, width);
          expand_pairs(from + r * columns, r + 1 < depth ? from + (r + 1) * columns : nullptr, width,
                       &panel[r * width]);
        }
        multiply({count, width, ceil_div(depth, 2) * 2, inputs.apart, width, width}, false,
                 inputs.of<BFloat16>(group.first) + row, panel.data(), sums.data());
        for (int64_t n = 0; n < count; ++n)
          for (int64_t c = 0; c < width; ++c) {
            const float product = sums[n * width + c] * factor[c];
            to[n * columns + c] = row ? to[n * columns + c] + product : product;
          }
      }
    }
  }
}

// out [P, columns] = inputs[p] @ the weight of p's expert, on all threads.
template <class Number>
void multiply_groups(const std::vector<Group>& groups, const Inputs& inputs, const Stacked<Number>& weight,
                     bool pairs, float* out) {
  const int64_t wanted = ceil_div(weight.columns * int64_t(groups.size()), 4 * at::get_num_threads());
  const int64_t most = ceil_div(std::clamp(wanted, NARROWEST, WIDEST), WIDEST_PANEL) * WIDEST_PANEL;
  const int64_t chunk = std::min(most, weight.columns);
  const int64_t chunks = ceil_div(weight.columns, chunk);
  int64_t few = FEW_TOKENS[0];
  auto multiply_one = multiply_few<Floats<Number>, 8>, multiply_some = multiply_few<Floats<Number>, 16>;
  auto multiply_more = multiply_strips<Floats<Number>>, multiply_most = multiply_more;
  if constexpr (!std::is_same_v<Number, float>) {
    if (pairs) multiply_most = multiply_panels<Number>;
#if defined(__AVX512BF16__) && defined(__AVX512VBMI__)
    if (pairs && weight.scales.block_rows % 2 == 0) {
      few = FEW_TOKENS[1];
      multiply_one = multiply_few<Pairs<Number>, 8>;
      multiply_some = multiply_few<Pairs<Number>, 16>;
      multiply_more = multiply_strips<Pairs<Number>>;
    }
#endif
  }
  for_each_item(int64_t(groups.size()) * chunks, [&](int64_t item) {
    const Group& group = groups[item / chunks];
    const int64_t left = item % chunks * chunk, right = std::min(left + chunk, weight.columns);
    const auto multiply_group = group.count <= 2             ? multiply_one
                                : group.count <= few         ? multiply_some
                                : group.count <= MOST_TOKENS ? multiply_more
                                                             : multiply_most;
    multiply_group(inputs, group, weight, left, right, out + group.first * weight.columns);
  });
}

// to = silu(gate) * up.
inline void activate(const float* gate, const float* up, int64_t count, float* to) {
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES)
    store(to + i, read(gate + i) / (1.f + exponential(-read(gate + i))) * read(up + i));
  for (; i < count; ++i) to[i] = gate[i] / (1.f + std::exp(-gate[i])) * up[i];
}

// The experts [T,K] of each token, and their weights.
struct Choice {
  const int64_t* expert_index;
  const float* affinity;
  int64_t tokens, chosen;
};

// out [T,H] += sum over k of affinity[t,k] * MLP of expert_index[t,k] (hidden[t]).
template <class Number>
void expert_mlp(const float* hidden, const Choice& choice, const Stacked<Number>& gate_up,
                const Stacked<Number>& down, bool pairs, float* out) {
  const int64_t expert_count = down.experts, chosen = choice.chosen;
  std::vector<std::vector<int64_t>> places_of(expert_count);
  for (int64_t place = 0; place < choice.tokens * chosen; ++place)
    if (const int64_t expert = choice.expert_index[place]; 0 <= expert && expert < expert_count)
      places_of[expert].push_back(place);
  const int64_t width = down.columns, intermediate = down.rows;
  Scratch<float> gate_up_PI, product_PH;
  Inputs inputs, activated;
  std::vector<Group> groups;
  std::vector<int64_t> sorted;
  constexpr float half = HALF_REBIAS<Number>;
  const auto run = [&] {
    const int64_t count = int64_t(sorted.size());
    gate_up_PI.resize(count * 2 * intermediate);
    product_PH.resize(count * width);
    inputs.take(count, width, pairs, half,
                [&](int64_t p, float* to) { std::copy_n(hidden + sorted[p] / chosen * width, width, to); });
    multiply_groups(groups, inputs, gate_up, pairs, gate_up_PI.data());
    activated.take(count, intermediate, pairs, half, [&](int64_t p, float* to) {
      const float* gate = &gate_up_PI[p * 2 * intermediate];
      activate(gate, gate + intermediate, intermediate, to);
    });
    multiply_groups(groups, activated, down, pairs, product_PH.data());
    at::parallel_for(0, width, 64, [&](int64_t begin, int64_t end) {
      for (int64_t p = 0; p < count; ++p) {
        const float share = choice.affinity[sorted[p]];
        float* to = out + sorted[p] / chosen * width;
        for (int64_t h = begin; h < end; ++h) to[h] += share * product_PH[p * width + h];
      }
    });
    groups.clear();
    sorted.clear();
  };
  for (int64_t expert = 0; expert < expert_count; ++expert) {
    const auto& places = places_of[expert];
    const int64_t count = int64_t(places.size()), parts = ceil_div(count, GROUP);
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t begin = count * part / parts, end = count * (part + 1) / parts;
      if (int64_t(sorted.size()) + end - begin > PASS) run();
      groups.push_back({expert, int64_t(sorted.size()), end - begin});
      sorted.insert(sorted.end(), places.begin() + begin, places.begin() + end);
    }
  }
  if (!groups.empty()) run();
}

}  // namespace neuron_minimax
