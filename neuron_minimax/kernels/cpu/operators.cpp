// The operators of graphs, whose schemas and checks are in operators.py: contiguous float32
// activations in and out. `pairs` allows products of bfloat16 numbers, where the processor has them.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "attention.h"
#include "linear.h"
#include "moe.h"

namespace neuron_minimax {
namespace {

template <class Number>
const Number* numbers(const at::Tensor& tensor) {
  return static_cast<const Number*>(tensor.const_data_ptr());
}
const float* floats(const at::Tensor& tensor) { return tensor.const_data_ptr<float>(); }
const int64_t* integers(const at::Tensor& tensor) { return tensor.const_data_ptr<int64_t>(); }

// Call function(Number{}) with the type of a stored number.
template <class Function>
void with_stored(at::ScalarType type, const Function& function) {
  if (type == at::kFloat) return function(float{});
  if (type == at::kBFloat16) return function(BF16{});
  function(E4M3{});
}

Scales scales_of(const std::optional<at::Tensor>& scale, int64_t rows, int64_t columns, int64_t block_rows,
                 int64_t block_columns, int64_t parts) {
  if (!scale) return {nullptr, rows, columns / parts, 1, parts, parts, columns / parts};
  return {floats(*scale),  block_rows, block_columns,  scale->size(-2),
          scale->size(-1), parts,      columns / parts};
}

using OptionalTensor = std::optional<at::Tensor>;

// Up to so many rows a dense weight of the activations' dtype is read as it lies, float32 or bfloat16; more
// are left to the library.
constexpr int64_t FEW_DENSE_ROWS[] = {48, 12};

at::Tensor linear(const at::Tensor& hidden, const at::Tensor& weight, const OptionalTensor& scale,
                  int64_t block_rows, int64_t block_columns, bool pairs) {
  const int64_t rows = hidden.size(0), outputs = weight.size(0), features = weight.size(1);
  if (rows > FEW_DENSE_ROWS[pairs] && !scale && (pairs || weight.scalar_type() == at::kFloat))
    return at::linear(hidden.to(weight.scalar_type()), weight).to(at::kFloat);
  const Scales scales = scales_of(scale, outputs, features, block_rows, block_columns, 1);
  at::Tensor out = at::empty({rows, outputs}, hidden.options());
  const float* from = floats(hidden);
  float* to = out.data_ptr<float>();
  pairs = pairs && has_pairs();
  if (scale && rows > FEW_ROWS[pairs]) {
    const auto many = pairs ? linear_of_many<BFloat16, E4M3> : linear_of_many<float, E4M3>;
    many(from, rows, numbers<E4M3>(weight), outputs, features, scales, to);
    return out;
  }
  with_stored(weight.scalar_type(), [&](auto number) {
    using Number = decltype(number);
#if defined(__AVX512BF16__) && defined(__AVX512VBMI__)
    if constexpr (!std::is_same_v<Number, float>)
      if (pairs && (!scale || block_columns % WIDTH == 0))
        return linear_of_few_by_pairs(from, rows, numbers<Number>(weight), outputs, features, scales, to);
#endif
    for (int64_t n = 0; n < rows; n += FEW_ROWS[0])
      linear_of_few(from + n * features, std::min(FEW_ROWS[0], rows - n), numbers<Number>(weight), outputs,
                    features, scales, to + n * outputs);
  });
  return out;
}

at::Tensor expert_mlp(const at::Tensor& hidden, const at::Tensor& expert_index, const at::Tensor& affinity,
                      const at::Tensor& gate_up, const OptionalTensor& gate_up_scale, const at::Tensor& down,
                      const OptionalTensor& down_scale, int64_t block_rows, int64_t block_columns,
                      bool pairs) {
  const int64_t expert_count = down.size(0), intermediate = down.size(1), width = down.size(2);
  const Choice choice{integers(expert_index), floats(affinity), expert_index.size(0), expert_index.size(1)};
  at::Tensor out = at::zeros({hidden.size(0), width}, hidden.options());
  if (!intermediate) return out;
  with_stored(gate_up.scalar_type(), [&](auto number) {
    using Number = decltype(number);
    const Stacked<Number> first{
        numbers<Number>(gate_up), expert_count, width, 2 * intermediate,
        scales_of(gate_up_scale, width, 2 * intermediate, block_rows, block_columns, 2)};
    const Stacked<Number> second{numbers<Number>(down), expert_count, intermediate, width,
                                 scales_of(down_scale, intermediate, width, block_rows, block_columns, 1)};
    expert_mlp(floats(hidden), choice, first, second, pairs && has_pairs(), out.data_ptr<float>());
  });
  return out;
}

// query [S*T*N,D] to the same shape.
at::Tensor attend(const at::Tensor& query, const at::Tensor& keys, const at::Tensor& values,
                  const at::Tensor& positions, bool pairs) {
  at::Tensor out = at::empty_like(query);
  if (!out.numel()) return out;
  const int64_t slots = positions.size(0), tokens = positions.size(1), heads = keys.size(1);
  const int64_t group = query.size(0) / (slots * tokens * heads);
  const bool rounded = pairs && has_pairs() && keys.scalar_type() != at::kFloat;
  with_stored(keys.scalar_type(), [&](auto number) {
    using Number = decltype(number);
    const Cached<Number> cached{
        numbers<Number>(keys), numbers<Number>(values), slots,          heads,         keys.size(2),
        query.size(1),         keys.stride(0),          keys.stride(1), keys.stride(2)};
    float* to = out.data_ptr<float>();
#if defined(__AVX512BF16__) && defined(__AVX512VBMI__)
    if constexpr (!std::is_same_v<Number, float>)
      if (tokens == 1 && rounded)
        return decode<PairKeys<Number>, Pairs<Number>>(floats(query), cached, integers(positions), group, to);
#endif
    if (tokens == 1)
      return decode<FloatKeys<Number>, Floats<Number>>(floats(query), cached, integers(positions), group, to);
    const auto of_prompt = rounded ? prefill<BFloat16, Number> : prefill<float, Number>;
    of_prompt(floats(query), cached, integers(positions), tokens, group, to);
  });
  return out;
}

TORCH_LIBRARY_FRAGMENT(neuron_minimax, library) {
  library.def("has_pairs() -> bool", [] { return has_pairs(); });
}

TORCH_LIBRARY_IMPL(neuron_minimax, CPU, library) {
  library.impl("linear", linear);
  library.impl("expert_mlp", expert_mlp);
  library.impl("attend", attend);
}

}  // namespace
}  // namespace neuron_minimax
