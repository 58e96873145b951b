// Plain C++ for every CPU, and the readable reference for the faster files.

#include "kernels.h"

namespace {

using spp::bf16;
using spp::fp16;
using spp::from_bits;
using spp::to_bits;

struct V {
  float lanes[16];
};

template <class F>
inline V each(F f) {
  V v;
  for (int i = 0; i < 16; ++i) v.lanes[i] = f(i);
  return v;
}

inline V zero() { return each([](int) { return 0.0f; }); }
inline V broadcast(float x) { return each([=](int) { return x; }); }
inline V load(const float* p) { return each([=](int i) { return p[i]; }); }
inline void store(float* p, const V& v) {
  for (int i = 0; i < 16; ++i) p[i] = v.lanes[i];
}
inline V add(const V& a, const V& b) { return each([&](int i) { return a.lanes[i] + b.lanes[i]; }); }
inline V mul(const V& a, const V& b) { return each([&](int i) { return a.lanes[i] * b.lanes[i]; }); }
inline V fma(const V& a, const V& b, const V& c) {
  return each([&](int i) { return a.lanes[i] * b.lanes[i] + c.lanes[i]; });
}
inline V where_nonzero(const V& w, const V& v) {
  return each([&](int i) { return w.lanes[i] == 0.0f ? 0.0f : v.lanes[i]; });
}
inline float sum(const V& v) {
  float total = 0.0f;
  for (int i = 0; i < 16; ++i) total += v.lanes[i];
  return total;
}

inline float widen_one(float x) { return x; }
inline float widen_one(bf16 x) { return from_bits(static_cast<uint32_t>(x.bits) << 16); }
inline float widen_one(fp16 x) {
  const uint32_t sign = (x.bits & 0x8000u) << 16, rest = x.bits & 0x7fffu;
  if (rest >= 0x7c00u) return from_bits(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
  // 2^112 moves the exponent from fp16's bias to fp32's, for denormals too; the product is exact.
  return from_bits(sign | to_bits(from_bits(rest << 13) * from_bits(0x77800000u)));
}
template <class T>
inline V widen(const T* p) {
  return each([=](int i) { return widen_one(p[i]); });
}

inline void narrow_one(float* out, float x) { *out = x; }
inline void narrow_one(bf16* out, float x) {
  const uint32_t bits = to_bits(x);
  out->bits = static_cast<uint16_t>(x != x ? 0x7fc0u : (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
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
template <class Out>
inline void narrow(Out* out, const V& v) {
  for (int i = 0; i < 16; ++i) narrow_one(out + i, v.lanes[i]);
}

inline int count(uint32_t mask) {
  mask -= mask >> 1 & 0x55555555u;
  mask = (mask & 0x33333333u) + (mask >> 2 & 0x33333333u);
  return static_cast<int>((((mask + (mask >> 4)) & 0x0f0f0f0fu) * 0x01010101u) >> 24);
}
inline int64_t count_all(const uint32_t* words, int64_t n) {
  int64_t total = 0;
  for (int64_t i = 0; i < n; ++i) total += count(words[i]);
  return total;
}

template <class T>
inline V expand(uint32_t mask, const T* p, const T*) {
  return each([&](int i) { return mask >> i & 1 ? widen_one(*p++) : 0.0f; });
}
template <class T>
inline void expand_bits(T* out, uint32_t mask, const T* p, const T*) {
  for (int i = 0; i < 32; ++i) out[i] = mask >> i & 1 ? *p++ : T{};
}

}  // namespace

#include "rows.h"
#include "table.h"

namespace spp {
const Kernels portable = {"portable", effective, reduce, most_tokens, matvec, arrange, scan, gather, compare};
}
