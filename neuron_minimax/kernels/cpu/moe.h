// Fused mixture of experts: sort by expert, grouped GEMM straight from the stored weights, SwiGLU,
// combine.
//
// Each chosen expert is read once for up to GROUP of its tokens. Few tokens are bound by memory: the
// weight is read as it lies. Many are bound by arithmetic: blocks are expanded and multiplied.
//
// Shapes: H hidden, I intermediate; P places, one for each of a token's K experts, sorted by expert.
#pragma once
#include "linear.h"

namespace neuron_minimax {

constexpr int64_t GROUP = 128;              // tokens of one expert that are multiplied together
constexpr int64_t FEW_TOKENS[] = {48, 40};  // up to so many a weight is read as it lies: in float32, as pairs
constexpr int64_t PASS = 2048;              // places whose sums are kept between the two products
constexpr int64_t NARROWEST = 512;          // columns that a thread takes at a time
constexpr int64_t WIDEST = 4096;            // whose sums stay in the second cache
constexpr int64_t WIDEST_PANEL = 256;       // columns of a panel: it stays in the second cache

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

// out (+)= sums * factor, strips of sums in the order in which they are read.
template <class Product>
inline void add_scaled(const float* sums, const float* factor, int64_t width, bool add, float* out) {
  int64_t c = 0;
  for (; c + WIDTH <= width; c += WIDTH) {
    Lanes strip[STRIP];
    read_strip(sums + c, strip);
    Product::in_order(strip);
    UNROLLED for (int part = 0; part < STRIP; ++part) {
      float* to = out + c + part * LANES;
      const Lanes product = strip[part] * read(factor + c + part * LANES);
      store(to, add ? read(to) + product : product);
    }
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

// The same for many: blocks are expanded to panels of Panel, float or BFloat16.
template <class Panel, class Number>
void multiply_many(const Inputs& inputs, const Group& group, const Stacked<Number>& weight, int64_t left,
                   int64_t right, float* out) {
  constexpr bool pairs = std::is_same_v<Panel, BFloat16>;
  constexpr float half = pairs ? 1.f : HALF_REBIAS<Number>;
  const int64_t count = group.count, columns = weight.columns;
  const Scales scales = weight.scales.of_expert(group.expert);
  thread_local Scratch<Panel> panel;
  thread_local Scratch<float> sums, factor;
  panel.resize(DEPTH * WIDEST_PANEL);
  factor.resize(WIDEST_PANEL);
  sums.resize(count * WIDEST_PANEL);
  for (; left < right; left += WIDEST_PANEL) {
    const int64_t width = std::min(WIDEST_PANEL, right - left);
    for (int64_t top = 0, block = 0; top < weight.rows; top += scales.block_rows, ++block) {
      scales.of_columns(block, left, width, half, factor.data());
      const int64_t bottom = std::min(top + scales.block_rows, weight.rows);
      for (int64_t row = top; row < bottom; row += DEPTH) {
        const int64_t depth = std::min(DEPTH, bottom - row);
        const Number* from = weight.at(group.expert, row) + left;
        const Panel* input = inputs.of<Panel>(group.first) + row;
        float* to = out + left;
        if constexpr (pairs) {
          for (int64_t r = 0; r < depth; r += 2) {
            fetch_rows<2>(from + (r + DEPTH) * columns, columns, width);
            expand_pairs(from + r * columns, r + 1 < depth ? from + (r + 1) * columns : nullptr, width,
                         &panel[r * width]);
          }
          multiply({count, width, ceil_div(depth, 2) * 2, inputs.apart, width, width}, false, input,
                   panel.data(), sums.data());
          for (int64_t n = 0; n < count; ++n)
            for (int64_t c = 0; c < width; ++c) {
              const float product = sums[n * width + c] * factor[c];
              to[n * columns + c] = row ? to[n * columns + c] + product : product;
            }
        } else {
          for (int64_t r = 0; r < depth; ++r) {
            fetch_rows<1>(from + (r + DEPTH) * columns, columns, width);
            expand(from + r * columns, factor.data(), width, &panel[r * width]);
          }
          multiply({count, width, depth, inputs.apart, width, columns}, row > 0, input, panel.data(), to);
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
  auto multiply_one = multiply_few<Floats<Number>, 8>, multiply_more = multiply_few<Floats<Number>, 16>;
#if defined(__AVX512BF16__) && defined(__AVX512VBMI__)
  if constexpr (!std::is_same_v<Number, float>)
    if (pairs && weight.scales.block_rows % 2 == 0) {
      multiply_one = multiply_few<Pairs<Number>, 8>;
      multiply_more = multiply_few<Pairs<Number>, 16>;
    }
#endif
  for_each_item(int64_t(groups.size()) * chunks, [&](int64_t item) {
    const Group& group = groups[item / chunks];
    const int64_t left = item % chunks * chunk, right = std::min(left + chunk, weight.columns);
    const auto multiply_group = group.count <= 2                   ? multiply_one
                                : group.count <= FEW_TOKENS[pairs] ? multiply_more
                                : pairs                            ? multiply_many<BFloat16, Number>
                                                                   : multiply_many<float, Number>;
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
