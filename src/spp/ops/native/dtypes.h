// The dtypes of weights and activations: one header for each, and the choice among them at run time. For an instruction
// set's file, after its V and the operations on it, before everything that is written once over dtypes.
//
// A dtype's header has its type T, a struct of its bits, and these functions, found by their argument:
//
// - everywhere: nonzero(T) -> 1, or 0 for zeros of either sign;
// - portable.cpp (no SPP_ macro): widen_one(T) -> float and narrow_one(T*, float);
// - avx2.cpp (SPP_AVX2): from_words(__m128i, T) -> __m256, eight entries of 16 bits as floats, and narrow(T*, V);
// - avx512.cpp (SPP_AVX512): from_words(__m256i, T) -> V and narrow(T*, V); widen_32(__m512i, T, V&, V&), 32 entries as
//   matvec512.h multiplies them, and even_columns_first(T): whether those are the even columns and then the odd ones.
//
// That is all for 16 bits. A dtype of another width has its own widen, expand and expand_bits (rows.h says what they
// are) instead of from_words, widen_32 and even_columns_first.
//
// Everything has internal linkage, the types too: each instruction set's file has its own.

#include "bf16.h"
#include "fp16.h"

namespace {

using Scale = fp16;  // of weights of few bits

// float is what the kernels compute in.
inline uint32_t nonzero(float w) { return (to_bits(w) & 0x7fffffff) != 0; }
#if defined(SPP_AVX512) || defined(SPP_AVX2)
inline V widen(const float* p) { return load(p); }
inline void narrow(float* out, const V& v) { store(out, v); }
#else
inline float widen_one(float x) { return x; }
inline void narrow_one(float* out, float x) { *out = x; }
#endif

// Calls f with a null pointer of the C++ type of a dtype.
template <class F>
auto with_dtype(Dtype dtype, F f) {
  switch (dtype) {
    case Dtype::bf16: return f(static_cast<bf16*>(nullptr));
    case Dtype::fp16: return f(static_cast<fp16*>(nullptr));
    default: return f(static_cast<float*>(nullptr));
  }
}

template <class T>
struct Pointee;
template <class T>
struct Pointee<T*> {
  using type = T;
};

}  // namespace
