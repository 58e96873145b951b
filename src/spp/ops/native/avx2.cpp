// AVX2 with FMA and F16C (Haswell, Zen and later): a table of permutations puts eight packed values at their columns.

#define SPP_AVX2
#include "kernels.h"

#if defined(__x86_64__)

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,f16c,fma,popcnt,bmi2"))), apply_to = function)
#else
#pragma GCC target("avx2,f16c,fma,popcnt,bmi2")
#endif

#include <immintrin.h>

namespace {

using namespace spp;

struct V {
  __m256 low, high;
};

inline V zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline V broadcast(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline V load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void store(float* p, const V& v) {
  _mm256_storeu_ps(p, v.low);
  _mm256_storeu_ps(p + 8, v.high);
}
inline V add(const V& a, const V& b) { return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)}; }
inline V mul(const V& a, const V& b) { return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)}; }
inline V fma(const V& a, const V& b, const V& c) {
  return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
inline float sum(const V& v) {
  const __m256 eight = _mm256_add_ps(v.low, v.high);
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
inline __m256 where_nonzero(__m256 w, __m256 v) {
  return _mm256_and_ps(v, _mm256_cmp_ps(w, _mm256_setzero_ps(), _CMP_NEQ_UQ));
}
inline V where_nonzero(const V& w, const V& v) {
  return {where_nonzero(w.low, v.low), where_nonzero(w.high, v.high)};
}

}  // namespace

#include "dtypes.h"

namespace {

inline __m128i words(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
template <class T>  // of 16 bits
inline V widen(const T* p) {
  return {from_words(words(p), T{}), from_words(words(p + 8), T{})};
}

template <class Out>
inline void narrow_one(Out* out, float x) {
  Out whole[16];
  narrow(whole, broadcast(x));
  *out = whole[0];
}

inline int count(uint32_t mask) { return _mm_popcnt_u32(mask); }
inline int64_t count_all(const uint32_t* word, int64_t n) {
  int64_t total = 0, i = 0;
  for (; i + 2 <= n; i += 2) {
    uint64_t both;
    __builtin_memcpy(&both, word + i, sizeof both);
    total += _mm_popcnt_u64(both);
  }
  return i < n ? total + count(word[i]) : total;
}

// For each eight bits: the rank of every set bit among them, as places of 32-bit lanes and as the bytes of 16-bit ones.
// 0x80 gives a zero in the byte shuffle; a lane's place does not matter where its bit is not set.
struct Places {
  uint8_t lanes[256][8];
  uint8_t bytes[256][16];
  constexpr Places() : lanes(), bytes() {
    for (int mask = 0; mask < 256; ++mask) {
      int rank = 0;
      for (int lane = 0; lane < 8; ++lane) {
        const bool set = mask >> lane & 1;
        lanes[mask][lane] = static_cast<uint8_t>(set ? rank : 0);
        bytes[mask][2 * lane] = static_cast<uint8_t>(set ? 2 * rank : 0x80);
        bytes[mask][2 * lane + 1] = static_cast<uint8_t>(set ? 2 * rank + 1 : 0x80);
        rank += set;
      }
    }
  }
};
constexpr Places places;

// Eight entries at p, none from `end` on.
template <class T>
struct Eight {
  const T* at;
  T rest[8];
  Eight(const T* p, const T* end) : at(p) {
    if (end - p >= 8) return;
    for (int64_t i = 0; i < 8; ++i) rest[i] = i < end - p ? p[i] : T{};
    at = rest;
  }
};

template <class T>
inline __m128i expand_eight(uint32_t mask, const T* p, const T* end) {
  static_assert(sizeof(T) == 2);
  return _mm_shuffle_epi8(words(Eight<T>(p, end).at), words(places.bytes[mask]));
}
inline __m256 expand_eight(uint32_t mask, const float* p, const float* end) {
  const __m256i lanes = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(places.lanes[mask])));
  const __m256 values = _mm256_permutevar8x32_ps(_mm256_loadu_ps(Eight<float>(p, end).at), lanes);
  const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i set = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(static_cast<int>(mask)), bit), bit);
  return _mm256_and_ps(values, _mm256_castsi256_ps(set));
}
template <class T>  // of 16 bits
inline V expand(uint32_t mask, const T* p, const T* end) {
  const T* second = p + count(mask & 0xff);
  return {from_words(expand_eight(mask & 0xff, p, end), T{}),
          from_words(expand_eight(mask >> 8 & 0xff, second, end), T{})};
}
inline V expand(uint32_t mask, const float* p, const float* end) {
  return {expand_eight(mask & 0xff, p, end), expand_eight(mask >> 8 & 0xff, p + count(mask & 0xff), end)};
}

inline void put(void* out, __m128i v) { _mm_storeu_si128(static_cast<__m128i*>(out), v); }
inline void put(float* out, __m256 v) { _mm256_storeu_ps(out, v); }
template <class T>
inline void expand_bits(T* out, uint32_t mask, const T* p, const T* end) {
  for (int i = 0; i < 32; i += 8) {
    const uint32_t byte = mask >> i & 0xff;
    put(out + i, expand_eight(byte, p, end));
    p += count(byte);
  }
}

// Codes as bytes, eight at a time: PDEP puts each into a byte of its own.
inline __m128i sixteen_codes(const uint8_t* codes, int64_t bit, int bits, uint64_t of_each) {
  uint64_t low, high;
  const int64_t next = bit + 8 * bits;
  __builtin_memcpy(&low, codes + bit / 8, sizeof low);
  __builtin_memcpy(&high, codes + next / 8, sizeof high);
  return _mm_set_epi64x(static_cast<int64_t>(_pdep_u64(high >> (next % 8), of_each)),
                        static_cast<int64_t>(_pdep_u64(low >> (bit % 8), of_each)));
}
inline void decode(const uint8_t* codes, int64_t first, int64_t n, int bits, const uint8_t (&table)[64], uint8_t* out) {
  const uint64_t of_each = 0x0101010101010101u * ((1u << bits) - 1u);
  __m128i parts[4];
  for (int i = 0; i < 4; ++i) parts[i] = words(table + 16 * i);
  int64_t bit = first * bits;
  for (int64_t i = 0; i < n; i += 16, bit += 16 * bits, out += 16) {
    const __m128i index = sixteen_codes(codes, bit, bits, of_each);
    // A quarter of the table by the lowest four bits of the index; which one, by the two above.
    const __m128i bit_4 = _mm_slli_epi16(index, 3), bit_5 = _mm_slli_epi16(index, 2);
    const __m128i low = _mm_blendv_epi8(_mm_shuffle_epi8(parts[0], index), _mm_shuffle_epi8(parts[1], index), bit_4);
    const __m128i high = _mm_blendv_epi8(_mm_shuffle_epi8(parts[2], index), _mm_shuffle_epi8(parts[3], index), bit_4);
    put(out, _mm_blendv_epi8(low, high, bit_5));
  }
}

// For each eight bits: the rank of every set bit among them, as places of bytes; 0x80 gives a zero.
struct BytePlaces {
  uint8_t of[256][8];
  constexpr BytePlaces() : of() {
    for (int mask = 0; mask < 256; ++mask) {
      int rank = 0;
      for (int lane = 0; lane < 8; ++lane) of[mask][lane] = static_cast<uint8_t>(mask >> lane & 1 ? rank++ : 0x80);
    }
  }
};
constexpr BytePlaces byte_places;

// The values of 16 columns, which bytes at `at` are above by 128.
inline __m128i sixteen_levels(uint32_t mask, const uint8_t* at) {
  const __m128i low = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(byte_places.of[mask & 0xff]));
  const __m128i high = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(byte_places.of[mask >> 8 & 0xff]));
  const __m128i later = _mm_add_epi8(high, _mm_set1_epi8(static_cast<char>(count(mask & 0xff))));
  const __m128i values = _mm_xor_si128(words(at), _mm_set1_epi8(static_cast<char>(0x80)));
  return _mm_shuffle_epi8(values, _mm_unpacklo_epi64(low, later));
}
inline V levels(uint32_t mask, const uint8_t* at) {
  const __m128i values = sixteen_levels(mask, at);
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(values)),
          _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(values, 8)))};
}

}  // namespace

#include "rows.h"
#include "table.h"
#include "few_bit_rows.h"

namespace {

// VPMADDUBSW multiplies unsigned bytes by signed ones, and adds in pairs: the unsigned ones are |w| <= 128, the signed
// ones x with the sign of w, at most 127, so that no pair exceeds 16 bits.
template <int tokens>
struct DotRows {
  static bool add(FewBitRow (&rows)[2], const GroupFactors<tokens> (&factors)[2], const RoundedX& x, int64_t group,
                  float (&totals)[2][tokens]) {
    return add_row(rows[0], factors[0], x, group, totals[0]) & add_row(rows[1], factors[1], x, group, totals[1]);
  }

 private:
  static bool add_row(FewBitRow& row, const GroupFactors<tokens>& factors, const RoundedX& x, int64_t group,
                      float (&totals)[tokens]) {
    const int64_t words = row.weight.group / 32, promised = row.per_word * (words / 2);
    const int8_t* entries = x.entries + group * row.weight.group;
    int64_t wrong = 0;
    __m256 sums[tokens];
    for (int t = 0; t < tokens; ++t) sums[t] = _mm256_setzero_ps();
    for (int64_t g = 0; g < row.groups; ++g) {
      const uint8_t* const before = row.at;
      __m256i dots[tokens];
      for (int t = 0; t < tokens; ++t) dots[t] = _mm256_setzero_si256();
      for (int64_t i = 0; i < words; ++i, entries += 32) {
        const uint32_t mask = row.word[g * words + i];
        const uint8_t* const second = row.at + count(mask & 0xffff);
        const __m256i w = _mm256_set_m128i(sixteen_levels(mask >> 16, second), sixteen_levels(mask & 0xffff, row.at));
        row.at += count(mask);
        for (int t = 0; t < tokens; ++t) {
          const __m256i there = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(entries + t * x.columns));
          const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(there, w));
          dots[t] = _mm256_add_epi32(dots[t], _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
        }
      }
      if (promised) wrong |= (row.at - before) ^ promised;
      for (int t = 0; t < tokens; ++t) {
        sums[t] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dots[t]), _mm256_set1_ps(factors.of[t][g]), sums[t]);
      }
    }
    for (int t = 0; t < tokens; ++t) totals[t] += sum(V{sums[t], _mm256_setzero_ps()});
    return !wrong;
  }
};

}  // namespace

#include "few_bit_table.h"

namespace spp {
const Kernels avx2 = {"avx2", effective, reduce, most_tokens, matvec, arrange, scan, gather,
                      matvec_few, rounded_bytes, round_x, expand_few, compare};
}

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif
