// AVX-512 with VBMI2 and VNNI (Ice Lake, Zen 4 and later): one instruction puts packed values at their columns.

#define SPP_AVX512
#include "kernels.h"

#if defined(__x86_64__)

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vbmi2,avx512vnni,avx512vpopcntdq,f16c,fma,popcnt,bmi2"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vbmi2,avx512vnni,avx512vpopcntdq,f16c,fma,popcnt,bmi2")
#endif

#include <immintrin.h>

namespace {

using namespace spp;
using V = __m512;

inline V zero() { return _mm512_setzero_ps(); }
inline V broadcast(float x) { return _mm512_set1_ps(x); }
inline V load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, V v) { _mm512_storeu_ps(p, v); }
inline V add(V a, V b) { return _mm512_add_ps(a, b); }
inline V mul(V a, V b) { return _mm512_mul_ps(a, b); }
inline V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
inline float sum(V v) { return _mm512_reduce_add_ps(v); }
inline V where_nonzero(V w, V v) { return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(w, zero(), _CMP_NEQ_UQ), v); }

}  // namespace

#include "dtypes.h"

namespace {

inline __m256i words(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
template <class T>  // of 16 bits
inline V widen(const T* p) {
  return from_words(words(p), T{});
}
template <class Out>
inline void narrow_one(Out* out, float x) {
  Out whole[16];
  narrow(whole, broadcast(x));
  *out = whole[0];
}

inline int count(uint32_t mask) { return _mm_popcnt_u32(mask); }
inline int64_t count_all(const uint32_t* word, int64_t n) {
  __m512i total = _mm512_setzero_si512();
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    total = _mm512_add_epi32(total, _mm512_popcnt_epi32(_mm512_loadu_si512(word + i)));
  }
  if (i < n) {
    const __mmask16 rest = static_cast<__mmask16>((1u << (n - i)) - 1u);
    total = _mm512_add_epi32(total, _mm512_popcnt_epi32(_mm512_maskz_loadu_epi32(rest, word + i)));
  }
  return _mm512_reduce_add_epi32(total);
}

// VPEXPANDW on Zen 4 waits for the old value of its destination even where it zeroes it. A compiler that gives every
// expansion the same destination makes one chain of them, 5 to 6 cycles each; this makes the destination the source,
// which was just loaded. Only assembly can say so.
inline __m512i expand_words(uint32_t mask, __m512i words) {
  asm("vpexpandw %0, %0 %{%1%}%{z%}" : "+v"(words) : "Yk"(static_cast<__mmask32>(mask)));
  return words;
}
inline __m256i expand_words(uint32_t mask, __m256i words) {
  asm("vpexpandw %0, %0 %{%1%}%{z%}" : "+v"(words) : "Yk"(static_cast<__mmask16>(mask)));
  return words;
}

// 16 entries at p, or fewer: none from `end` on.
inline __m256i some_words(const void* p, const void* end) {
  const int64_t there = static_cast<const uint16_t*>(end) - static_cast<const uint16_t*>(p);
  return there >= 16 ? words(p) : _mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << there) - 1u), p);
}
template <class T>  // of 16 bits
inline V expand(uint32_t mask, const T* p, const T* end) {
  return from_words(expand_words(mask, some_words(p, end)), T{});
}
inline V expand(uint32_t mask, const float* p, const float*) {
  return _mm512_maskz_expandloadu_ps(static_cast<__mmask16>(mask), p);
}

template <class T>
inline void expand_bits(T* out, uint32_t mask, const T* p, const T* end) {
  static_assert(sizeof(T) == 2);
  const int64_t there = end - p;
  const __m512i values =
      there >= 32 ? _mm512_loadu_si512(p) : _mm512_maskz_loadu_epi16(static_cast<__mmask32>((1u << there) - 1u), p);
  _mm512_storeu_si512(out, expand_words(mask, values));
}
inline void expand_bits(float* out, uint32_t mask, const float* p, const float* end) {
  store(out, expand(mask & 0xffff, p, end));
  store(out + 16, expand(mask >> 16, p + count(mask & 0xffff), end));
}

// Codes as bytes, 64 at a time: the bytes that have a bit of eight codes go to one lane, from which the bits of every
// code are taken; only the lowest six bits of an index count where it is looked up.
inline void decode(const uint8_t* codes, int64_t first, int64_t n, int bits, const uint8_t (&table)[64], uint8_t* out) {
  const uint8_t* from = codes + first * bits / 8;
  const __m512i lane = _mm512_set_epi64(7, 6, 5, 4, 3, 2, 1, 0), bytes = _mm512_set1_epi64(0x0706050403020100);
  // Lane k begins with byte k * bits, and its code i with bit `phase` + i * bits.
  const __m512i start = _mm512_mullo_epi64(lane, _mm512_set1_epi64(bits * 0x0101010101010101));
  const __m512i spread = _mm512_add_epi8(start, bytes);
  const int64_t phase = first * bits % 8, lowest = phase * 0x0101010101010101;
  const __m512i places = _mm512_set1_epi64(bits * 0x0706050403020100 + lowest);
  const __m512i levels = _mm512_loadu_si512(table);
  for (int64_t i = 0; i < n; i += 64, from += 8 * bits, out += 64) {
    const __m512i lanes = _mm512_permutexvar_epi8(spread, _mm512_loadu_si512(from));
    const __m512i indices = _mm512_multishift_epi64_epi8(places, lanes);
    _mm512_storeu_si512(out, _mm512_permutexvar_epi8(indices, levels));
  }
}

inline V levels(uint32_t mask, const uint8_t* at) {
  const __m128i zeros = _mm_set1_epi8(static_cast<char>(128));
  const __m128i bytes = _mm_mask_expand_epi8(zeros, static_cast<__mmask16>(mask), _mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_xor_si128(bytes, zeros)));
}

}  // namespace

#include "rows.h"
#include "table.h"
#include "matvec512.h"
#include "matmul512.h"
#include "few_bit_rows.h"
#include "few_bits512.h"
#include "few_bit_table.h"

namespace spp {
const Kernels avx512 = {"avx512", effective, reduce, most_tokens, matvec_512, arrange_512, scan, gather,
                        matvec_few, rounded_bytes, round_x, expand_few, compare};
const Kernels avx512_bf16 = {"avx512_bf16", effective, reduce, most_tokens_512_bf16, matvec_512_bf16,
                             arrange_512_bf16, scan, gather, matvec_few, rounded_bytes, round_x, expand_few, compare};
}  // namespace spp

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif
