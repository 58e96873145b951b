// Plain C++ for every CPU, and the readable reference for the faster files.

#include "kernels.h"

namespace {

using namespace spp;

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

}  // namespace

#include "dtypes.h"

namespace {

template <class T>
inline V widen(const T* p) {
  return each([=](int i) { return widen_one(p[i]); });
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
