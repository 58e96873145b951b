// Codes of few bits in AVX-512 with VBMI, VBMI2 and VNNI. For avx512.cpp, between few_bit_rows.h and few_bit_table.h.
//
// VPDPBUSD multiplies unsigned bytes by signed ones. The unsigned ones are weights + 128, with 128 for a zero, which
// VPEXPANDB leaves where no bit is set; so every sum is too large by 128 times the sum of x, and begins with minus that.

namespace {

inline uint64_t next_64(const uint32_t* word) {
  uint64_t mask;
  __builtin_memcpy(&mask, word, sizeof mask);
  asm("" : "+r"(mask));
  return mask;
}

// Loads of 64 bytes are what there is least of, one in a cycle: keeps what is loaded in a register, and is no instruction.
inline __m512i once(__m512i loaded) {
  asm("" : "+v"(loaded));
  return loaded;
}

// A hint, which may point anywhere.
inline void fetch_soon(uintptr_t at) { _mm_prefetch(reinterpret_cast<const char*>(at), _MM_HINT_T0); }
constexpr uintptr_t kBitsAhead = 1024;  // bytes

template <int tokens>
struct DotRows {
  static bool add(FewBitRow (&rows)[2], const GroupFactors<tokens> (&factors)[2], const RoundedX& x, int64_t group,
                  float (&totals)[2][tokens]) {
    if (rows[0].weight.group == 64) return add_as<1, false>(rows, factors, x, group, totals);
    return rows[0].per_word ? add_as<2, true>(rows, factors, x, group, totals)
                            : add_as<2, false>(rows, factors, x, group, totals);
  }

 private:
  // `per_group` words of 64 columns in every group. With `fixed`, the place of every byte is known; else it follows from
  // the bits before it.
  template <int per_group, bool fixed>
  __attribute__((noinline)) static bool add_as(FewBitRow (&rows)[2], const GroupFactors<tokens> (&factors)[2],
                                               const RoundedX& x, int64_t group, float (&totals)[2][tokens]) {
    const __m512i zeros = _mm512_set1_epi8(static_cast<char>(128));
    const int64_t groups = rows[0].groups, per_word = rows[0].per_word;
    const uint32_t* const word[2] = {rows[0].word, rows[1].word};
    const uint8_t* at[2] = {rows[0].at, rows[1].at};
    const int8_t* entries = x.entries + group * per_group * kColumns;
    const int32_t* starts = x.starts + group * 16;
    // Decoding stops and goes, which no prefetcher follows; meanwhile, codes and bits of the rows to come are fetched.
    const uintptr_t ahead[2] = {rows[0].ahead(), rows[1].ahead()};
    const int64_t pace = rows[0].pace;
    uint64_t wrong = 0;
    V sums[2][tokens];
#pragma GCC unroll 2
    for (int k = 0; k < 2; ++k) {
#pragma GCC unroll 4
      for (int t = 0; t < tokens; ++t) sums[k][t] = zero();
    }
    for (int64_t g = 0; g < groups; ++g, entries += per_group * kColumns, starts += 16) {
      __m512i dots[2][tokens];
#pragma GCC unroll 4
      for (int t = 0; t < tokens; ++t) {
        dots[0][t] = dots[1][t] = once(_mm512_loadu_si512(starts + t * x.groups * 16));
      }
#pragma GCC unroll 2
      for (int h = 0; h < per_group; ++h) {
        __m512i w[2];
#pragma GCC unroll 2
        for (int k = 0; k < 2; ++k) {
          const uint64_t mask = next_64(word[k] + (g * per_group + h) * 2);
          const int64_t bits = _mm_popcnt_u64(mask);
          w[k] = _mm512_mask_expand_epi8(zeros, mask, _mm512_loadu_si512(at[k]));
          at[k] += fixed ? per_word : bits;
          if (fixed) wrong |= bits ^ per_word;
        }
#pragma GCC unroll 4
        for (int t = 0; t < tokens; ++t) {
          const __m512i there = once(_mm512_loadu_si512(entries + t * x.columns + h * kColumns));
          dots[0][t] = _mm512_dpbusd_epi32(dots[0][t], w[0], there);
          dots[1][t] = _mm512_dpbusd_epi32(dots[1][t], w[1], there);
        }
      }
#pragma GCC unroll 2
      for (int k = 0; k < 2; ++k) {
        fetch_soon(ahead[k] + g * pace);
        fetch_soon(reinterpret_cast<uintptr_t>(word[k] + g * per_group * 2) + kBitsAhead);
#pragma GCC unroll 4
        for (int t = 0; t < tokens; ++t) {
          sums[k][t] = fma(_mm512_cvtepi32_ps(dots[k][t]), broadcast(factors[k].of[t][g]), sums[k][t]);
        }
      }
    }
    for (int k = 0; k < 2; ++k) {
      rows[k].at = at[k];
      for (int t = 0; t < tokens; ++t) totals[k][t] += sum(sums[k][t]);
    }
    return !wrong;
  }
};

}  // namespace
