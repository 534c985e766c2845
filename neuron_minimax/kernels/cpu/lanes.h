// Numbers as they are stored, read as one register of float32 lanes.
#pragma once
#include <c10/core/impl/alloc_cpu.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <new>
#include <utility>
#include <vector>

// Sums of a tile stay in registers only where its loops are gone.
#define UNROLLED _Pragma("GCC unroll 16")

namespace neuron_minimax {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
// The compiler's own vectors: each operator is one instruction on any processor.
typedef float Lanes __attribute__((vector_size(4 * LANES)));
typedef int32_t Words __attribute__((vector_size(4 * LANES)));

struct E4M3 {
  int8_t bits;
};
struct BF16 {
  int16_t bits;
};

// What a number that was read lacks, split in two so that neither an input nor a scale leaves
// float32's range: E4M3 bits as the top bits of a float32 mean the value times 2^(7 - 127).
template <class Number>
constexpr float HALF_REBIAS = 1.f;
template <>
inline constexpr float HALF_REBIAS<E4M3> = 0x1p60f;

template <class Vector, class Number>
inline Vector load_as(const Number* from) {
  Vector vector;
  std::memcpy(&vector, from, sizeof vector);
  return vector;
}
inline void store(float* to, Lanes lanes) { std::memcpy(to, &lanes, sizeof lanes); }
inline Lanes splat(float value) { return value - Lanes{}; }

inline Lanes read(const float* from) { return load_as<Lanes>(from); }

// A strip of numbers is four registers of them. Of stored numbers it is read in an order of its own,
// which needs no instruction that widens: the first register has every fourth code, or the first of
// every two bfloat16 numbers, as words of 32 bits hold them.
constexpr int STRIP = 4;
constexpr int64_t WIDTH = STRIP * LANES;
inline Lanes read_part(const float* from, int part) { return read(from + part * LANES); }
inline Lanes read_part(const BF16* from, int part) {
  const Words pairs = load_as<Words>(from + part / 2 * (2 * LANES));
  return (Lanes)(part % 2 ? pairs & int32_t(0xffff0000) : pairs << 16);
}
inline Lanes read_part(const E4M3* from, int part) {
  return (Lanes)((load_as<Words>(from) << (24 - 8 * part)) >> 4 & int32_t(0x87f00000));
}
template <class Number>
inline void read_strip(const Number* from, Lanes (&to)[STRIP]) {
  UNROLLED for (int part = 0; part < STRIP; ++part) to[part] = read_part(from, part);
}

template <int... J>
inline void interleave(Lanes& first, Lanes& second, std::integer_sequence<int, J...>) {
  const Lanes one = first, other = second;
  first = __builtin_shufflevector(one, other, (J / 2 + J % 2 * LANES)...);
  second = __builtin_shufflevector(one, other, ((J + LANES) / 2 + J % 2 * LANES)...);
}
template <int... J>
inline void separate(Lanes& first, Lanes& second, std::integer_sequence<int, J...>) {
  const Lanes one = first, other = second;
  first = __builtin_shufflevector(one, other, (2 * J)...);
  second = __builtin_shufflevector(one, other, (2 * J + 1)...);
}
// A strip in the order in which it is read of such numbers, to the order in which they lie, and back.
template <class Number>
inline void in_order(Lanes (&strip)[STRIP]) {
  constexpr auto all = std::make_integer_sequence<int, LANES>();
  if constexpr (sizeof(Number) == 1) {
    interleave(strip[0], strip[2], all);
    interleave(strip[1], strip[3], all);
    interleave(strip[0], strip[1], all);
    interleave(strip[2], strip[3], all);
  } else if constexpr (sizeof(Number) == 2) {
    interleave(strip[0], strip[1], all);
    interleave(strip[2], strip[3], all);
  }
}
template <class Number>
inline void as_read(Lanes (&strip)[STRIP]) {
  constexpr auto all = std::make_integer_sequence<int, LANES>();
  if constexpr (sizeof(Number) == 1) {
    separate(strip[0], strip[1], all);
    separate(strip[2], strip[3], all);
    separate(strip[0], strip[2], all);
    separate(strip[1], strip[3], all);
  } else if constexpr (sizeof(Number) == 2) {
    separate(strip[0], strip[1], all);
    separate(strip[2], strip[3], all);
  }
}
// Numbers to the order in which strips of Number are read; what fills no strip stays as it is.
template <class Number>
inline void spread(const float* from, int64_t count, float* to) {
  int64_t i = 0;
  for (; i + WIDTH <= count; i += WIDTH) {
    Lanes strip[STRIP];
    read_strip(from + i, strip);
    as_read<Number>(strip);
    UNROLLED for (int part = 0; part < STRIP; ++part) store(to + i + part * LANES, strip[part]);
  }
  for (; i < count; ++i) to[i] = from[i];
}
// Keep a number in its register: GCC would load it again wherever it is used.
inline Lanes kept(Lanes lanes) {
#if defined(__AVX512F__)
  asm("" : "+v"(lanes));
#elif defined(__AVX2__)
  asm("" : "+x"(lanes));
#endif
  return lanes;
}
constexpr int64_t FETCHED = 12288;  // bytes that are fetched before they are read
// How many numbers of each of some rows that is, a strip at least.
template <class Number>
inline int64_t columns_ahead(int64_t rows, int64_t length) {
  const int64_t strips = FETCHED / (rows * WIDTH * int64_t(sizeof(Number)));
  return std::min(std::max<int64_t>(strips, 1) * WIDTH, length);
}
// Into the second cache: the first has few places for lines that are on their way.
inline void fetch(const void* line) { __builtin_prefetch(line, 0, 2); }
template <class Number>
inline void fetch_strip(const Number* from) {
  for (int64_t i = 0; i < WIDTH; i += 64 / int64_t(sizeof(Number))) fetch(from + i);
}

template <int ROWS, class Number>
inline void fetch_rows(const Number* from, int64_t apart, int64_t count) {
  for (int64_t i = 0; i < count; i += WIDTH)
    for (int row = 0; row < ROWS; ++row) fetch_strip(from + row * apart + i);
}

inline float read_one(const float* from) { return *from; }
template <class Number>
inline float read_one(const Number* from) {
  const bool code = sizeof(Number) == 1;
  const uint32_t bits = uint32_t(int32_t(from->bits)) << (code ? 20 : 16) & (code ? 0x87f00000u : ~0u);
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// Registers' lanes summed: half as many registers, whose lanes are those of both in turns, first within
// blocks of four lanes, then over the blocks.
template <int... J>
inline Lanes fold_lanes(Lanes a, Lanes b, std::integer_sequence<int, J...>) {
  return __builtin_shufflevector(a, b, (J / 4 * 4 + J % 4 / 2 + J % 2 * LANES)...) +
         __builtin_shufflevector(a, b, (J / 4 * 4 + J % 4 / 2 + J % 2 * LANES + 2)...);
}
template <int... J>
inline Lanes fold_blocks(Lanes a, Lanes b, std::integer_sequence<int, J...>) {
  return __builtin_shufflevector(a, b, (J / 4 * 8 + J % 4)...) +
         __builtin_shufflevector(a, b, (J / 4 * 8 + J % 4 + 4)...);
}
inline Lanes fold_four(Lanes a, Lanes b, Lanes c, Lanes d) {
  constexpr auto all = std::make_integer_sequence<int, LANES>();
  return fold_lanes(fold_lanes(a, c, all), fold_lanes(b, d, all), all);
}
// The sums of four registers' lanes.
typedef float Four __attribute__((vector_size(16)));
inline Four sums_of(Lanes a, Lanes b, Lanes c, Lanes d) {
  const Lanes blocks = fold_four(a, b, c, d);
  Four parts[LANES / 4];
  std::memcpy(parts, &blocks, sizeof blocks);
  for (int part = 1; part < LANES / 4; ++part) parts[0] += parts[part];
  return parts[0];
}
// Those of as many registers as a register has lanes.
inline Lanes sums_of(const Lanes (&rows)[LANES]) {
  Lanes blocks[LANES / 4];
  UNROLLED for (int i = 0; i < LANES / 4; ++i) {
    const Lanes* four = rows + 4 * i;
    blocks[i] = fold_four(four[0], four[1], four[2], four[3]);
  }
  UNROLLED for (int count = LANES / 8; count > 0; count /= 2) UNROLLED for (int i = 0; i < count; ++i)
      blocks[i] = fold_blocks(blocks[2 * i], blocks[2 * i + 1], std::make_integer_sequence<int, LANES>());
  return blocks[0];
}
inline float sum(Lanes lanes) { return sums_of(lanes, Lanes{}, Lanes{}, Lanes{})[0]; }

// e^x = 2^n e^r, where n is x / ln 2 rounded and r = x - n ln 2, with ln 2 in two parts (Cody and Waite);
// e^r is the polynomial of degree 7 of expf in Cephes (S. Moshier, netlib.org/cephes). Its relative
// error is below 1e-7 from -87 to 88; below -87 it is 0, above 88 it stays e^88.
inline Lanes exponential(Lanes x) {
  const Lanes low = splat(-87.f), high = splat(88.f);
  const Words vanishes = x < low;
  Lanes bounded = vanishes ? low : x;
  bounded = bounded > high ? high : bounded;
  const Words n =
      __builtin_convertvector(bounded * 1.44269504f + (bounded < 0 ? splat(-.5f) : splat(.5f)), Words);
  const Lanes whole = __builtin_convertvector(n, Lanes);
  const Lanes rest = bounded - whole * 0.693359375f - whole * -2.12194440e-4f;
  Lanes power = splat(1.9875691500e-4f);
  for (float coefficient :
       {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
    power = power * rest + coefficient;
  power = power * rest * rest + rest + 1.f;
  return vanishes ? Lanes{} : power * (Lanes)((n + 127) << 23);
}

// Memory from the beginning of a cache line on, where no register touches two lines. What it holds at first
// is anything: nobody writes zeros that are not asked for.
template <class T>
struct FromLine {
  using value_type = T;
  template <class U>
  void construct(U* number) {
    ::new (static_cast<void*>(number)) U;
  }
  T* allocate(std::size_t count) { return static_cast<T*>(c10::alloc_cpu(count * sizeof(T))); }
  void deallocate(T* data, std::size_t) { c10::free_cpu(data); }
  bool operator==(const FromLine&) const { return true; }
};
template <class T>
using Scratch = std::vector<T, FromLine<T>>;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace neuron_minimax
