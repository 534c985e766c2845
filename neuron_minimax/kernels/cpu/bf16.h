// Numbers to bfloat16. Here alone are instructions of one kind of processor: the products of pairs of
// bfloat16 numbers that it has are worth twice the speed of float32's.
#pragma once
#include <c10/util/BFloat16.h>

#include <array>
#include <type_traits>

#include "lanes.h"
#if defined(__AVX512BF16__) || defined(__AVX512VBMI__)
#include <immintrin.h>
#endif

namespace neuron_minimax {

using c10::BFloat16;

inline BFloat16 bfloat16_of(const E4M3* from) { return BFloat16(read_one(from) * 0x1p120f); }
inline BFloat16 bfloat16_of(const BF16* from) {
  return BFloat16(uint16_t(from->bits), BFloat16::from_bits());
}
inline BFloat16 bfloat16_of(const float* from) { return BFloat16(*from); }

#if defined(__AVX512VBMI__)
// The lower or upper bytes of the bfloat16 numbers of the codes 0 to 127.
inline std::array<uint8_t, 128> bytes_of_codes(int shift) {
  std::array<uint8_t, 128> bytes;
  for (int code = 0; code < 128; ++code) {
    const E4M3 number{int8_t(code)};
    bytes[code] = uint8_t(bfloat16_of(&number).x >> shift);
  }
  return bytes;
}
// Bytes from `first` on of two registers, in turns.
inline std::array<uint8_t, 64> in_turns(int first) {
  std::array<uint8_t, 64> order;
  for (int n = 0; n < 64; ++n) order[n] = uint8_t(first + n / 2 + n % 2 * 64);
  return order;
}
inline __m512i turns(__m512i one, __m512i other, const std::array<uint8_t, 64>& order) {
  return _mm512_permutex2var_epi8(one, _mm512_loadu_si512(order.data()), other);
}
const auto LOWER_HALF = in_turns(0), UPPER_HALF = in_turns(32);
const auto LOWER_BYTES = bytes_of_codes(0), UPPER_BYTES = bytes_of_codes(8);

// The bytes of 64 codes as bfloat16 numbers, looked up: what is subnormal as float32 bits would be flushed.
inline __m512i look_up(const std::array<uint8_t, 128>& bytes, __m512i codes) {
  return _mm512_permutex2var_epi8(_mm512_loadu_si512(bytes.data()), codes,
                                  _mm512_loadu_si512(bytes.data() + 64));
}
inline __m512i lower_bytes(__m512i codes) { return look_up(LOWER_BYTES, codes); }
inline __m512i upper_bytes(__m512i codes) {
  return _mm512_or_si512(look_up(UPPER_BYTES, codes), _mm512_and_si512(codes, _mm512_set1_epi8(-128)));
}

// 64 codes to bfloat16.
inline void expand_64(__m512i codes, BFloat16* to) {
  const __m512i lower = lower_bytes(codes), upper = upper_bytes(codes);
  _mm512_storeu_si512(to, turns(lower, upper, LOWER_HALF));
  _mm512_storeu_si512(to + 32, turns(lower, upper, UPPER_HALF));
}
#endif

// Numbers to bfloat16.
template <class Number>
inline void round(const Number* from, int64_t count, BFloat16* to) {
  int64_t j = 0;
#if defined(__AVX512VBMI__)
  if constexpr (std::is_same_v<Number, E4M3>)
    for (; j + 64 <= count; j += 64) expand_64(_mm512_loadu_si512(from + j), to + j);
#endif
#if defined(__AVX512BF16__)
  if constexpr (std::is_same_v<Number, float>)
    for (; j + LANES <= count; j += LANES) {
      const __m256bh rounded = _mm512_cvtneps_pbh((__m512)read(from + j));
      std::memcpy(to + j, &rounded, sizeof rounded);
    }
#endif
  for (; j < count; ++j) to[j] = bfloat16_of(from + j);
}

#if defined(__AVX512BF16__) && defined(__AVX512VBMI__)
inline Lanes add_pairs(Lanes sums, __m512bh numbers, Lanes pairs) {
  return (Lanes)_mm512_dpbf16_ps((__m512)sums, numbers, (__m512bh)pairs);
}

// A strip of a row as pairs of bfloat16 numbers that are beside each other. Of codes the first register
// has the first eight of every sixteen.
inline void read_pairs(const E4M3* from, __m512bh (&to)[2]) {
  const __m512i codes = _mm512_loadu_si512(from);
  const __m512i lower = lower_bytes(codes), upper = upper_bytes(codes);
  to[0] = (__m512bh)_mm512_unpacklo_epi8(lower, upper);
  to[1] = (__m512bh)_mm512_unpackhi_epi8(lower, upper);
}
inline void read_pairs(const BF16* from, __m512bh (&to)[2]) {
  to[0] = (__m512bh)_mm512_loadu_si512(from);
  to[1] = (__m512bh)_mm512_loadu_si512(from + WIDTH / 2);
}
// Whole strips of numbers to the order in which strips of Number are read as pairs.
template <class Number>
inline void spread_pairs(BFloat16* numbers, int64_t count) {
  if constexpr (sizeof(Number) == 1)
    for (int64_t i = 0; i + WIDTH <= count; i += WIDTH) {
      BFloat16 strip[WIDTH];
      std::copy_n(numbers + i, WIDTH, strip);
      for (int64_t j = 0; j < WIDTH; j += 16) {
        std::copy_n(strip + j, 8, numbers + i + j / 2);
        std::copy_n(strip + j + 8, 8, numbers + i + WIDTH / 2 + j / 2);
      }
    }
}

// Strips of two rows as pairs of bfloat16 numbers, for products with a pair of inputs each.
template <class Stored>
struct Pairs {
  using Number = Stored;
  using Input = BFloat16;
  static constexpr int ROWS = 2;
  static constexpr float HALF = 1.f;
  Lanes numbers[STRIP];

  // Of codes a register has the same four of every sixteen, of others the same four of every eight.
  void read(const Number* first, const Number* second) {
    if constexpr (sizeof(Number) == 1) {
      const __m512i one = _mm512_loadu_si512(first), other = _mm512_loadu_si512(second);
      UNROLLED for (int half = 0; half < 2; ++half) {
        const __m512i codes = half ? _mm512_unpackhi_epi8(one, other) : _mm512_unpacklo_epi8(one, other);
        const __m512i lower = lower_bytes(codes), upper = upper_bytes(codes);
        numbers[2 * half] = (Lanes)_mm512_unpacklo_epi8(lower, upper);
        numbers[2 * half + 1] = (Lanes)_mm512_unpackhi_epi8(lower, upper);
      }
    } else {
      UNROLLED for (int half = 0; half < 2; ++half) {
        const __m512i one = _mm512_loadu_si512(first + half * (WIDTH / 2));
        const __m512i other = _mm512_loadu_si512(second + half * (WIDTH / 2));
        numbers[2 * half] = (Lanes)_mm512_unpacklo_epi16(one, other);
        numbers[2 * half + 1] = (Lanes)_mm512_unpackhi_epi16(one, other);
      }
    }
  }
  void add_times(const BFloat16* input, Lanes (&total)[STRIP]) const {
    const Lanes pair = kept((Lanes)_mm512_set1_epi32(load_as<int32_t>(input)));
    UNROLLED for (int part = 0; part < STRIP; ++part) total[part] =
        add_pairs(total[part], (__m512bh)numbers[part], pair);
  }
  static void in_order(Lanes (&strip)[STRIP]) {
    const auto blocks = [](Lanes a, Lanes b, auto select) {
      return (Lanes)_mm512_shuffle_f32x4((__m512)a, (__m512)b, select);
    };
    const std::integral_constant<int, 0x44> front;
    const std::integral_constant<int, 0xee> back;
    const std::integral_constant<int, 0x88> even;
    const std::integral_constant<int, 0xdd> odd;
    if constexpr (sizeof(Number) == 1) {
      const Lanes a = blocks(strip[0], strip[1], front), b = blocks(strip[2], strip[3], front);
      const Lanes c = blocks(strip[0], strip[1], back), d = blocks(strip[2], strip[3], back);
      strip[0] = blocks(a, b, even);
      strip[1] = blocks(a, b, odd);
      strip[2] = blocks(c, d, even);
      strip[3] = blocks(c, d, odd);
    } else {
      const std::integral_constant<int, 0xd8> between;
      for (int half = 0; half < STRIP; half += 2) {
        const Lanes a = blocks(strip[half], strip[half + 1], front);
        const Lanes b = blocks(strip[half], strip[half + 1], back);
        strip[half] = blocks(a, a, between);
        strip[half + 1] = blocks(b, b, between);
      }
    }
  }
  static float one(const Number* from) { return float(bfloat16_of(from)); }
};
#endif

// Numbers of two rows to pairs of bfloat16, exactly; behind an odd last row zeros.
template <class Number>
inline void expand_pairs(const Number* first, const Number* second, int64_t count, BFloat16* to) {
  int64_t j = 0;
#if defined(__AVX512VBMI__)
  if constexpr (std::is_same_v<Number, E4M3>)
    for (; second && j + 32 <= count; j += 32) {
      const auto codes = [&](const E4M3* row) {
        return _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i*)(row + j)));
      };
      expand_64(turns(codes(first), codes(second), LOWER_HALF), to + 2 * j);
    }
#endif
  for (; j < count; ++j) {
    to[2 * j] = bfloat16_of(first + j);
    to[2 * j + 1] = second ? bfloat16_of(second + j) : BFloat16(0.f);
  }
}

}  // namespace neuron_minimax
