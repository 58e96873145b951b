// What every instruction set implements: one table of functions over rows of a weight.
//
// A weight W (O, I) is dense, or packed: its non-zeros row by row, one bit per entry (bit b of word w of a row is column
// 32 w + b), and for every row the index of its first non-zero. Plain C types only: no library headers, whose inline
// functions the linker might take from a file compiled for a newer CPU.
//
// Shapes: T tokens, O output features, I input features, R row groups, K directions.

#pragma once

#include <stdint.h>

namespace spp {

// A float's bits, and back; static, so that each instruction set's file has its own.
static inline uint32_t to_bits(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  return bits;
}
static inline float from_bits(uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, sizeof x);
  return x;
}

// The number of this interface: the structs, constants and functions that __init__.py repeats. Whoever changes one of
// them raises it, here and there, so that a library built from other sources is refused and not called.
constexpr int32_t kAbi = 2;

enum class Dtype : int32_t { bf16 = 0, fp16 = 1, fp32 = 2 };

struct Weight {
  const void* values;          // dense: (O, I) with row_stride; packed: (nonzeros,)
  const int32_t* bitmask;      // (O, ceil(I / 32)), or null where the weight is dense
  const int64_t* row_offsets;  // (O + 1,), or null where the weight is dense
  int64_t nonzeros;
  int64_t row_stride;  // dense: entries from one row to the next
  int64_t out_features;
  int64_t in_features;
  Dtype dtype;
};

// Survivors of `bits` bits each; spp/ops/few_bits.py has the layout.
struct FewBitWeight {
  const uint8_t* codes;
  const int32_t* bitmask;
  const int64_t* row_offsets;
  const void* scales;      // (O, ceil(I / group)) fp16
  const int8_t* codebook;  // (2^bits,), or unused for 8 bits
  int64_t code_bytes;      // at least 64: the last 64 are padding
  int64_t out_features;
  int64_t in_features;
  int32_t bits;
  int32_t group;
  int32_t per_word;
  int32_t unused;
};

// s * B and A of the operator, both in fp32; `a` is null for no adapter.
struct Factors {
  const float* a;  // (R K, I)
  const float* b;  // (O, K)
  int64_t groups;
  int64_t directions;  // at most kMostDirections
};

// The group of output row i, whose rows of A are K g(i) to K g(i) + K: g(i) = floor(i * R / O).
inline int64_t row_group(int64_t row, int64_t groups, int64_t out_features) { return row * groups / out_features; }

// How entries compare with those they came from; see TensorProof in spp/ops/zero_proof.py, whose fields these are.
struct Comparison {
  int64_t zeros, offenders, negative_zeros, survivors, underflowed, unchanged, sign_flips, non_finite;
  float largest_relative_change;
  int32_t unused;
};

// Rows [first, last) of one call; every function returns false where a packed row is not what its offsets say.
struct Kernels {
  const char* name;

  // out[i, :] = W[i, :] * with_base + W[i, :] * (sum_k A[K g(i) + k, :] * b[i, k]), rounded once; +0.0 where W is zero.
  bool (*effective)(const Weight&, const Factors&, bool with_base, void* out, Dtype out_dtype, int64_t first,
                    int64_t last);

  // For P = G * W over rows of one group: db[i, k] = sum_j P[i, j] A[K g + k, j], da[k, j] = sum_i P[i, j] b[i, k]. G has
  // the rows from `start` on, (..., I); da (K, I) is written, db is indexed by row.
  bool (*reduce)(const Weight&, const Factors&, const void* gradient, Dtype gradient_dtype, int64_t start, float* da,
                 float* db, int64_t first, int64_t last);

  // How many tokens `matvec` and `arrange` take, for x in a dtype.
  int64_t (*most_tokens)(const Weight&, Dtype dtype);

  // y[t, i] = sum_j W[i, j] x[t, j] + bias[i] for t < tokens <= most_tokens(...), with x as `arrange` made it from one of
  // `dtype`, which y has, too.
  bool (*matvec)(const Weight&, const float* x, Dtype dtype, int64_t tokens, const float* bias, void* y, int64_t first,
                 int64_t last);

  // x (tokens, I) as `matvec` wants it, in tokens * padded(I) floats: by default in fp32, every row padded with zeros.
  void (*arrange)(const Weight&, const void* x, Dtype dtype, int64_t tokens, float* out);

  // Bits and count of the non-zeros of dense rows, by value: zeros of either sign are zeros. counts is indexed by row.
  void (*scan)(const Weight&, int32_t* bitmask, int64_t* counts, int64_t first, int64_t last);

  // The non-zeros of dense rows to where row_offsets says.
  void (*gather)(const Weight&, const int32_t* bitmask, const int64_t* row_offsets, void* values, int64_t first,
                 int64_t last);

  // y[t, i] = sum_j W[i, j] x[t, j] + bias[i] for t < tokens <= kMostTokens, with x as `round_x` made it from one of `dtype`,
  // which y has, too: in int8, with a scale per group, in rounded_bytes(...) bytes.
  bool (*matvec_few)(const FewBitWeight&, void* rounded, Dtype dtype, int64_t tokens, const float* bias, void* y,
                     int64_t first, int64_t last);
  int64_t (*rounded_bytes)(const FewBitWeight&, int64_t tokens);
  void (*round_x)(const FewBitWeight&, const void* x, Dtype dtype, int64_t tokens, void* rounded);

  // out[i - start, :] = W[i, :], rounded once.
  bool (*expand_few)(const FewBitWeight&, void* out, Dtype out_dtype, int64_t start, int64_t first, int64_t last);

  // Entries [first, last) of two tensors, at most kMostCompared of them; `found` is written.
  void (*compare)(const void* base, Dtype base_dtype, const void* other, Dtype other_dtype, int64_t first, int64_t last,
                  Comparison* found);
};

constexpr int64_t kMostCompared = 1 << 16;

constexpr int64_t kMostTokens = 4;  // where an instruction set has no kernel for more
constexpr int64_t kMostDirections = 16;
constexpr int64_t kChunk = 32;  // columns at a time, one word of the bitmask
inline int64_t padded(int64_t in_features) { return (in_features + kChunk - 1) / kChunk * kChunk; }

extern const Kernels portable;
#if defined(__x86_64__)
extern const Kernels avx2;
extern const Kernels avx512;
extern const Kernels avx512_bf16;  // the same, with VDPBF16PS
#endif

}  // namespace spp
