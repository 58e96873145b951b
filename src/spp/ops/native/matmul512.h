// y = W x for packed bf16 weights and 2 to kMostPaired bf16 tokens, in VDPBF16PS. For avx512.cpp, after matvec512.h.
//
// Arithmetic is the limit from some 8 tokens on: 4 rows by 6 tokens are 24 sums in registers, which wait neither for each
// other nor for loads (10 for 24 instructions). A group of 4 rows is expanded once, together with the first tokens, into
// a panel, from which the other tokens take it. Panel and x stay in the L2 cache, and are read in the order in which
// they lie there, which is as fast as from L1.
//
// - Sums are loaded and stored once for each segment of a row, so that segments are as long as the panel allows.
// - Expanding waits for memory, multiplying does not: meanwhile, the values of the next group are fetched bit by bit.
//
// Every row is summed in one order for every token, whatever else is computed with them.

namespace {

constexpr int kRows = 4;
constexpr int kTokens = 6;           // at most, at once
constexpr int64_t kSegment = 128;    // words of a row in the panel: 32 KB
constexpr int64_t kMostPaired = 64;  // tokens; above, x falls out of the L2 cache

// Tokens as `arrange` has them: in blocks of up to kTokens, nearly equal, and in each block 32 columns of one token
// after those of the other.
struct Blocks {
  const int64_t tokens, count;
  explicit Blocks(int64_t t) : tokens(t), count((t + kTokens - 1) / kTokens) {}
  int64_t start(int64_t block) const { return tokens * block / count; }
};

// To the L2 cache: a hint, which may point anywhere.
inline void fetch(uintptr_t at) { _mm_prefetch(reinterpret_cast<const char*>(at), _MM_HINT_T1); }

// Where the rows of a group are read, and where the next group lies.
struct Group {
  const uint32_t* word[kRows];
  const bf16* at[kRows];
  const bf16* end;
  int64_t next;     // bytes from values of this group to those of the next, about
  uintptr_t ahead;  // what is fetched next, where there is a panel ...
  int64_t pace;     // ... and by how many bytes that moves with every word
};

// Adds products of `words` words of the rows with tokens to the sums, or starts them where `fresh`. Weights come from the
// packed rows, and go into the panel unless that is null; or, where not `packed`, from the panel.
template <int tokens, bool packed>
__attribute__((noinline)) void multiply(Group& group, __m512i* panel, const bf16* x, int64_t words, V* sums,
                                        bool fresh) {
  const __mmask16 old = fresh ? 0 : 0xffff;
  V s[tokens][kRows];  // every loop over rows and tokens is unrolled, which keeps this in registers
#pragma GCC unroll 6
  for (int t = 0; t < tokens; ++t) {
#pragma GCC unroll 4
    for (int k = 0; k < kRows; ++k) s[t][k] = _mm512_maskz_loadu_ps(old, sums + t * kRows + k);
  }
  const uint32_t* const word[kRows] = {group.word[0], group.word[1], group.word[2], group.word[3]};
  const bf16* at[kRows] = {group.at[0], group.at[1], group.at[2], group.at[3]};
  const bf16* const end = group.end;
  const int64_t next = group.next, pace = group.pace;
  uintptr_t ahead = group.ahead;
  for (int64_t i = 0; i < words; ++i, x += tokens * kChunk) {
    __m512i w[kRows];
#pragma GCC unroll 4
    for (int k = 0; k < kRows; ++k) {
      if (packed) {
        const uint32_t mask = word[k][i];
        w[k] = expand_words(mask, next_words(at[k], end));
        if (panel) {
          _mm512_store_si512(panel + k, w[k]);
        } else {
          fetch(reinterpret_cast<uintptr_t>(at[k]) + next);
        }
        at[k] += count(mask);
      } else {
        w[k] = _mm512_load_si512(panel + k);
      }
    }
    if (!packed || panel) {
      fetch(ahead);
      ahead += pace;
      panel += kRows;
    }
#pragma GCC unroll 6
    for (int t = 0; t < tokens; ++t) {
      const __m512i there = _mm512_loadu_si512(x + t * kChunk);
#pragma GCC unroll 4
      for (int k = 0; k < kRows; ++k) asm("vdpbf16ps %2, %1, %0" : "+v"(s[t][k]) : "v"(w[k]), "v"(there));
    }
  }
  if (packed) {
    for (int k = 0; k < kRows; ++k) {
      group.word[k] += words;
      group.at[k] = at[k];
    }
  }
  group.ahead = ahead;
#pragma GCC unroll 6
  for (int t = 0; t < tokens; ++t) {
#pragma GCC unroll 4
    for (int k = 0; k < kRows; ++k) sums[t * kRows + k] = s[t][k];
  }
}

template <bool packed>
void multiply_tokens(int64_t tokens, Group& group, __m512i* panel, const bf16* x, int64_t words, V* sums, bool fresh) {
  switch (tokens) {
    case 1: return multiply<1, packed>(group, panel, x, words, sums, fresh);
    case 2: return multiply<2, packed>(group, panel, x, words, sums, fresh);
    case 3: return multiply<3, packed>(group, panel, x, words, sums, fresh);
    case 4: return multiply<4, packed>(group, panel, x, words, sums, fresh);
    case 5: return multiply<5, packed>(group, panel, x, words, sums, fresh);
    default: return multiply<6, packed>(group, panel, x, words, sums, fresh);
  }
}

// Each quarter has the sum of one vector, four times.
inline V sum_four(const V* v) {
  const V ab = add(_mm512_shuffle_f32x4(v[0], v[1], 0x44), _mm512_shuffle_f32x4(v[0], v[1], 0xee));
  const V cd = add(_mm512_shuffle_f32x4(v[2], v[3], 0x44), _mm512_shuffle_f32x4(v[2], v[3], 0xee));
  const V all = add(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xdd));
  const V pairs = add(all, _mm512_permute_ps(all, 0x4e));
  return add(pairs, _mm512_permute_ps(pairs, 0xb1));
}

bool matmul_packed(const Weight& weight, const bf16* x, int64_t tokens, const float* bias, bf16* y, int64_t first,
                   int64_t last) {
  __m512i panel[kRows * kSegment];
  V sums[kRows * kMostPaired];
  const Blocks blocks(tokens);
  PackedRows<bf16> rows(weight);
  const int64_t words = rows.words;
  // One block of tokens needs no panel, and so no segments.
  const int64_t segments = blocks.count == 1 || !words ? 1 : (words + kSegment - 1) / kSegment;
  Group group;
  group.end = rows.end;
  for (int64_t row = first; row < last; row += kRows) {
    float start[4 * kRows];
    const bf16* past = nullptr;
    for (int k = 0; k < kRows; ++k) {
      const int64_t this_row = row + k < last ? row + k : last - 1;  // at the end, the last row fills the group
      if (!rows.start(this_row)) return false;
      group.word[k] = rows.word;
      group.at[k] = rows.at;
      past = static_cast<const bf16*>(weight.values) + weight.row_offsets[this_row + 1];
      for (int i = 0; i < 4; ++i) start[4 * k + i] = bias ? bias[this_row] : 0.0f;
    }
    group.next = (past - group.at[0]) * 2;
    group.ahead = reinterpret_cast<uintptr_t>(past);
    group.pace = group.next / (words * blocks.count + 1) + 1;
    for (int64_t i = kRows * words; i < 2 * kRows * words; i += 16) fetch(reinterpret_cast<uintptr_t>(group.word[0]) + i * 4);
    for (int64_t segment = 0; segment < segments; ++segment) {
      const int64_t from = words * segment / segments, n = words * (segment + 1) / segments - from;
      for (int64_t block = 0; block < blocks.count; ++block) {
        const int64_t t = blocks.start(block), many = blocks.start(block + 1) - t;
        const bf16* there = x + (t * words + from * many) * kChunk;
        if (block) {
          multiply_tokens<false>(many, group, panel, there, n, sums + t * kRows, from == 0);
        } else {
          multiply_tokens<true>(many, group, blocks.count == 1 ? nullptr : panel, there, n, sums, from == 0);
        }
      }
    }
    for (int64_t t = 0; t < tokens; ++t) {
      bf16 four_times[4 * kRows], once[kRows], *const to = y + t * weight.out_features + row;
      narrow(four_times, add(sum_four(sums + t * kRows), load(start)));
      _mm_storel_epi64(reinterpret_cast<__m128i*>(once), _mm256_cvtepi64_epi16(::words(four_times)));
      if (row + kRows <= last) {
        __builtin_memcpy(to, once, sizeof once);
      } else {
        for (int k = 0; row + k < last; ++k) to[k] = once[k];
      }
    }
  }
  return true;
}

bool matvec_512_bf16(const Weight& w, const float* x, Dtype dtype, int64_t tokens, const float* bias, void* y,
                     int64_t first, int64_t last) {
  if (!in_pairs(w, dtype)) return matvec_512(w, x, dtype, tokens, bias, y, first, last);
  auto* to = static_cast<bf16*>(y);
  if (tokens == 1) return matvec_packed<MultiplyPairs, bf16, 1>(w, x, bias, to, first, last);
  return matmul_packed(w, reinterpret_cast<const bf16*>(x), tokens, bias, to, first, last);
}

void arrange_512_bf16(const Weight& w, const void* x, Dtype dtype, int64_t tokens, float* out) {
  if (!in_pairs(w, dtype)) return arrange_512(w, x, dtype, tokens, out);
  const auto* from = static_cast<const bf16*>(x);
  auto* to = reinterpret_cast<bf16*>(out);
  const Blocks blocks(tokens);
  for (int64_t block = 0; block < blocks.count; ++block) {
    for (int64_t j = 0; j < w.in_features; j += kChunk) {
      const uint32_t there = low_bits(w.in_features - j);
      for (int64_t t = blocks.start(block); t < blocks.start(block + 1); ++t, to += kChunk) {
        _mm512_storeu_si512(to, _mm512_maskz_loadu_epi16(there, from + t * w.in_features + j));
      }
    }
  }
}

int64_t most_tokens_512_bf16(const Weight& w, Dtype dtype) { return in_pairs(w, dtype) ? kMostPaired : kMostTokens; }

}  // namespace
