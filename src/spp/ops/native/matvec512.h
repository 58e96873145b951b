// y = W x for packed 16-bit weights, at most kMostTokens tokens. For avx512.cpp, after rows.h and table.h.
//
// Weights are expanded to their columns, 32 at a time, and multiplied there. What matters:
//
// - `expand_words` (avx512.cpp) expands in place, which alone doubles the speed.
// - The bits of two words come in one 64-bit load, for the loads are the next limit.
// - Two rows share the loads of x. They are half the thread's rows apart, not neighbours, so that each is one long
//   sequence in memory, which the prefetchers follow.
// - Where arithmetic takes longer than memory, the prefetchers fall behind, and asking for values ahead helps.
//
// Every row is summed in one order, whichever row it is paired with.

namespace {

// How 32 weights are multiplied by 32 entries of x, an X, which is made of Entry. There are two sums, so that additions
// need not wait for each other: one for each half of a chunk, or one for each of two chunks; `odd` is the second.

// bf16 by bf16, in VDPBF16PS: for CPUs with AVX512_BF16, and one token; matmul512.h is for more. It treats denormals as
// zeros, also in the sums. As assembly, so that nothing else in this file is compiled for such a CPU.
struct MultiplyPairs {
  using Weights = bf16;
  using Entry = uint16_t;
  static constexpr bool slow = false;
  struct X {
    __m512i words;
    explicit X(const Entry* x) : words(_mm512_loadu_si512(x)) {}
  };
  __m512i w;

  explicit MultiplyPairs(__m512i words) : w(words) {}
  void add_to(V (&sums)[2], bool odd, X x) const {
    asm("vdpbf16ps %2, %1, %0" : "+v"(sums[odd]) : "v"(w), "v"(x.words));
  }
};

// In fp32, for every dtype of 16 bits. Where widening is easier so, x has the even columns of every 32 before the odd ones.
template <class T>
struct MultiplyFloats {
  using Weights = T;
  using Entry = float;
  static constexpr bool slow = true;
  struct X {
    V low, high;
    explicit X(const Entry* x) : low(load(x)), high(load(x + 16)) {}
  };
  V low, high;

  explicit MultiplyFloats(__m512i words) { widen_32(words, T{}, low, high); }
  void add_to(V (&sums)[2], bool, X x) const {
    sums[0] = fma(low, x.low, sums[0]);
    sums[1] = fma(high, x.high, sums[1]);
  }
};

// The next 32 entries, or fewer: none from `end` on.
template <class T>
inline __m512i next_words(const T* at, const T* end) {
  const int64_t there = end - at;
  if (__builtin_expect(there >= kChunk, 1)) return _mm512_loadu_si512(at);
  return _mm512_maskz_loadu_epi16(low_bits(there), at);
}

template <class Multiply, int tokens>
__attribute__((noinline)) void two_rows(PackedRows<typename Multiply::Weights> (&rows)[2],
                                        const typename Multiply::Entry* x, float (&totals)[2][tokens]) {
  constexpr bool ahead = Multiply::slow || tokens > 1;
  const int64_t words = rows[0].words, stride = words * kChunk;
  const auto* const end = rows[0].end;
  const uint32_t* const word[2] = {rows[0].word, rows[1].word};
  const typename Multiply::Weights* at[2] = {rows[0].at, rows[1].at};
  // Every loop over rows and tokens is unrolled, which keeps the sums in registers.
  V sums[2][tokens][2];
#pragma GCC unroll 2
  for (int row = 0; row < 2; ++row) {
#pragma GCC unroll 4
    for (int t = 0; t < tokens; ++t) sums[row][t][0] = sums[row][t][1] = zero();
  }
  int64_t i = 0;
  for (; i + 2 <= words; i += 2, x += 2 * kChunk) {
    uint64_t bits[2];
#pragma GCC unroll 2
    for (int row = 0; row < 2; ++row) {
      __builtin_memcpy(&bits[row], word[row] + i, sizeof bits[row]);
      if (ahead) _mm_prefetch(reinterpret_cast<const char*>(reinterpret_cast<uintptr_t>(at[row]) + 2048), _MM_HINT_T0);
    }
#pragma GCC unroll 2
    for (int odd = 0; odd < 2; ++odd) {
      const uint32_t mask[2] = {static_cast<uint32_t>(odd ? bits[0] >> 32 : bits[0]),
                                static_cast<uint32_t>(odd ? bits[1] >> 32 : bits[1])};
      const Multiply weights[2] = {Multiply(expand_words(mask[0], next_words(at[0], end))),
                                   Multiply(expand_words(mask[1], next_words(at[1], end)))};
      at[0] += count(mask[0]);
      at[1] += count(mask[1]);
#pragma GCC unroll 4
      for (int t = 0; t < tokens; ++t) {
        const typename Multiply::X there(x + t * stride + odd * kChunk);
        weights[0].add_to(sums[0][t], odd, there);
        weights[1].add_to(sums[1][t], odd, there);
      }
    }
  }
  if (i < words) {
#pragma GCC unroll 2
    for (int row = 0; row < 2; ++row) {
      const Multiply weights(expand_words(word[row][i], next_words(at[row], end)));
#pragma GCC unroll 4
      for (int t = 0; t < tokens; ++t) weights.add_to(sums[row][t], false, typename Multiply::X(x + t * stride));
    }
  }
#pragma GCC unroll 2
  for (int row = 0; row < 2; ++row) {
#pragma GCC unroll 4
    for (int t = 0; t < tokens; ++t) totals[row][t] = sum(add(sums[row][t][0], sums[row][t][1]));
  }
}

template <class Multiply, class Y, int tokens>
bool matvec_packed(const Weight& weight, const float* x, const float* bias, Y* y, int64_t first, int64_t last) {
  using Rows = PackedRows<typename Multiply::Weights>;
  Rows rows[2] = {Rows(weight), Rows(weight)};
  const int64_t half = (last - first + 1) / 2;
  for (int64_t row = first; row < first + half; ++row) {
    // With an odd number of rows, the last one is paired with a row that is computed twice.
    const int64_t both[2] = {row, row + half < last ? row + half : last - 1};
    if (!rows[0].start(both[0]) || !rows[1].start(both[1])) return false;
    float totals[2][tokens];
    two_rows<Multiply, tokens>(rows, reinterpret_cast<const typename Multiply::Entry*>(x), totals);
    for (int k = 0; k < 2; ++k) {
      const float start = bias ? bias[both[k]] : 0.0f;
      for (int t = 0; t < tokens; ++t) narrow_one(y + t * weight.out_features + both[k], totals[k][t] + start);
    }
  }
  return true;
}

template <class Multiply, class Y>
bool matvec_packed_tokens(const Weight& w, const float* x, int64_t tokens, const float* bias, Y* y, int64_t first,
                          int64_t last) {
  switch (tokens) {
    case 1: return matvec_packed<Multiply, Y, 1>(w, x, bias, y, first, last);
    case 2: return matvec_packed<Multiply, Y, 2>(w, x, bias, y, first, last);
    case 3: return matvec_packed<Multiply, Y, 3>(w, x, bias, y, first, last);
    default: return matvec_packed<Multiply, Y, 4>(w, x, bias, y, first, last);
  }
}

// Whether a call can use MultiplyPairs, on a CPU that supports it.
inline bool in_pairs(const Weight& w, Dtype dtype) {
  return w.bitmask && w.dtype == Dtype::bf16 && dtype == Dtype::bf16;
}

bool matvec_512(const Weight& w, const float* x, Dtype dtype, int64_t tokens, const float* bias, void* y, int64_t first,
                int64_t last) {
  return with_dtype(w.dtype, [&](auto* weight_type) {
    using T = typename Pointee<decltype(weight_type)>::type;
    if constexpr (sizeof(T) == 2) {
      if (w.bitmask) {
        return with_dtype(dtype, [&](auto* type) {
          auto* to = static_cast<decltype(type)>(y);
          return matvec_packed_tokens<MultiplyFloats<T>>(w, x, tokens, bias, to, first, last);
        });
      }
    }
    return matvec(w, x, dtype, tokens, bias, y, first, last);
  });
}

void arrange_512(const Weight& w, const void* x, Dtype dtype, int64_t tokens, float* out) {
  arrange(w, x, dtype, tokens, out);
  const bool even_first = with_dtype(w.dtype, [](auto* weight_type) {
    using T = typename Pointee<decltype(weight_type)>::type;
    if constexpr (sizeof(T) == 2) return even_columns_first(T{});
    return false;
  });
  if (!w.bitmask || !even_first) return;
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
  for (float* const past = out + tokens * padded(w.in_features); out < past; out += kChunk) {
    const V low = load(out), high = load(out + 16);
    store(out, _mm512_permutex2var_ps(low, even, high));
    store(out + 16, _mm512_permutex2var_ps(low, odd, high));
  }
}

}  // namespace
