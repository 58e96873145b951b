// bfloat16, the upper half of a float: what the kernels need to know of it. For dtypes.h.

namespace {

struct bf16 {
  uint16_t bits;
};

inline uint32_t nonzero(bf16 w) { return (w.bits & 0x7fff) != 0; }

// Narrowing rounds to nearest, ties to even.
#if defined(SPP_AVX512)

inline V from_words(__m256i x, bf16) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }

// Not VCVTNEPS2BF16, which treats denormals as zeros.
inline void narrow(bf16* out, V v) {
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  const __m512i high = _mm512_mask_mov_epi32(_mm512_srli_epi32(rounded, 16), nan, _mm512_set1_epi32(0x7fc0));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm512_cvtepi32_epi16(high));
}

// The even columns, then the odd ones: a shift and a mask.
constexpr bool even_columns_first(bf16) { return true; }
inline void widen_32(__m512i words, bf16, V& even, V& odd) {
  even = _mm512_castsi512_ps(_mm512_slli_epi32(words, 16));
  odd = _mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
}

#elif defined(SPP_AVX2)

inline __m256 from_words(__m128i x, bf16) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16));
}

inline __m256i bf16_bits(__m256 v) {
  const __m256i bits = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(_mm256_srli_epi32(rounded, 16), _mm256_set1_epi32(0x7fc0), nan);
}
inline void narrow(bf16* out, const V& v) {
  // The instruction packs each 128-bit half by itself, which leaves the four quarters in the order 0, 2, 1, 3.
  const __m256i packed = _mm256_packus_epi32(bf16_bits(v.low), bf16_bits(v.high));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm256_permute4x64_epi64(packed, 0xd8));
}

#else

inline float widen_one(bf16 x) { return from_bits(static_cast<uint32_t>(x.bits) << 16); }
inline void narrow_one(bf16* out, float x) {
  const uint32_t bits = to_bits(x);
  out->bits = static_cast<uint16_t>(x != x ? 0x7fc0u : (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

#endif

}  // namespace
