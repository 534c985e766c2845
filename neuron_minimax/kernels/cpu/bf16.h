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

// 64 codes to bfloat16, by looking bytes up: what is subnormal as float32 bits would be flushed.
inline void expand_64(__m512i codes, BFloat16* to) {
  const auto look_up = [&](const std::array<uint8_t, 128>& bytes) {
    return _mm512_permutex2var_epi8(_mm512_loadu_si512(bytes.data()), codes,
                                    _mm512_loadu_si512(bytes.data() + 64));
  };
  const __m512i lower = look_up(LOWER_BYTES);
  const __m512i upper =
      _mm512_or_si512(look_up(UPPER_BYTES), _mm512_and_si512(codes, _mm512_set1_epi8(-128)));
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
