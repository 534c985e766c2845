// Threads that take items of work one after the other, so that none waits long for the others.
#pragma once
#include <ATen/Parallel.h>
#include <ATen/native/CPUBlas.h>

#include <atomic>

namespace neuron_minimax {

template <class Function>
void for_each_item(int64_t items, const Function& function) {
  std::atomic<int64_t> taken{0};
  at::parallel_for(0, std::min<int64_t>(items, at::get_num_threads()), 1, [&](int64_t, int64_t) {
    for (int64_t item = taken++; item < items; item = taken++) function(item);
    at::native::cpublas::brgemm_release();  // a processor's tiles, where it has any
  });
}

// Call function(std::integral_constant<int, count>) for a count from 1 to MOST.
template <int MOST, class Function>
inline void with_constant(int count, const Function& function) {
  if constexpr (MOST > 0) {
    if (count == MOST) return function(std::integral_constant<int, MOST>{});
    with_constant<MOST - 1>(count, function);
  }
}

}  // namespace neuron_minimax
