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

inline void decode(const uint8_t* codes, int64_t first, int64_t n, int bits, const uint8_t (&table)[64], uint8_t* out) {
  for (int64_t i = first; i < first + n; ++i) {
    const uint8_t* from = codes + i * bits / 8;
    const int both = from[0] | from[1] << 8;
    *out++ = table[both >> (i * bits % 8) & ((1 << bits) - 1)];
  }
}
inline V levels(uint32_t mask, const uint8_t* at) {
  return each([&](int i) { return mask >> i & 1 ? static_cast<float>(*at++ - 128) : 0.0f; });
}

}  // namespace

#include "rows.h"
#include "table.h"
#include "few_bit_rows.h"

namespace {

template <int tokens>
struct DotRows {
  static bool add(FewBitRow (&rows)[2], const GroupFactors<tokens> (&factors)[2], const RoundedX& x, int64_t group,
                  float (&totals)[2][tokens]) {
    bool as_promised = true;
    for (int k = 0; k < 2; ++k) {
      FewBitRow& row = rows[k];
      const int64_t words = row.weight.group / 32;
      for (int64_t g = 0; g < row.groups; ++g) {
        int32_t dots[tokens] = {};
        int64_t before = 0;
        for (int64_t i = 0; i < words; ++i) {
          const int8_t* entries = x.entries + (group + g) * row.weight.group + i * 32;
          for (uint32_t mask = row.word[g * words + i]; mask; mask &= mask - 1) {
            const int32_t w = *row.at++ - 128;
            for (int t = 0; t < tokens; ++t) dots[t] += w * entries[t * x.columns + count((mask & -mask) - 1)];
          }
          before += count(row.word[g * words + i]);
        }
        as_promised &= row.per_word == 0 || before == row.per_word * (words / 2);
        for (int t = 0; t < tokens; ++t) totals[k][t] += static_cast<float>(dots[t]) * factors[k].of[t][g];
      }
    }
    return as_promised;
  }
};

}  // namespace

#include "few_bit_table.h"

namespace spp {
const Kernels portable = {"portable", effective, reduce, most_tokens, matvec, arrange, scan, gather,
                          matvec_few, rounded_bytes, round_x, expand_few, compare};
}
