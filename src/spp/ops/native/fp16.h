// IEEE half precision: what the kernels need to know of it. For dtypes.h.

namespace {

struct fp16 {
  uint16_t bits;
};

inline uint32_t nonzero(fp16 w) { return (w.bits & 0x7fff) != 0; }

// Narrowing rounds to nearest, ties to even.
#if defined(SPP_AVX512)

inline V from_words(__m256i x, fp16) { return _mm512_cvtph_ps(x); }
inline void narrow(fp16* out, V v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}

constexpr bool even_columns_first(fp16) { return false; }
inline void widen_32(__m512i words, fp16, V& low, V& high) {
  low = _mm512_cvtph_ps(_mm512_castsi512_si256(words));
  high = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(words, 1));
}

#elif defined(SPP_AVX2)

inline __m256 from_words(__m128i x, fp16) { return _mm256_cvtph_ps(x); }
inline void narrow(fp16* out, const V& v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm256_cvtps_ph(v.low, _MM_FROUND_TO_NEAREST_INT));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 8), _mm256_cvtps_ph(v.high, _MM_FROUND_TO_NEAREST_INT));
}

#else

inline float widen_one(fp16 x) {
  const uint32_t sign = (x.bits & 0x8000u) << 16, rest = x.bits & 0x7fffu;
  if (rest >= 0x7c00u) return from_bits(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
  // 2^112 moves the exponent from fp16's bias to fp32's, for denormals too; the product is exact.
  return from_bits(sign | to_bits(from_bits(rest << 13) * from_bits(0x77800000u)));
}
inline void narrow_one(fp16* out, float x) {
  const uint32_t bits = to_bits(x), sign = bits >> 16 & 0x8000u, size = bits & 0x7fffffffu;
  uint32_t half;
  if (size > 0x7f800000u) {
    half = 0x7e00u;
  } else if (size >= 0x477ff000u) {  // 65520 and more round to infinity
    half = 0x7c00u;
  } else if (size < 0x38800000u) {  // below 2^-14: adding 1/2 leaves the denormal's bits, rounded, at the low end
    half = to_bits(from_bits(size) + 0.5f) - 0x3f000000u;
  } else {
    half = (size - 0x38000000u + 0xfffu + (size >> 13 & 1u)) >> 13;
  }
  out->bits = static_cast<uint16_t>(sign | half);
}

#endif

}  // namespace
