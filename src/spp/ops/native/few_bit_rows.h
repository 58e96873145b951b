// Weights whose survivors are codes of a few bits; spp/ops/few_bits.py has the layout. For an instruction set's file,
// after rows.h.
//
// A segment of a row is decoded into bytes first, one for each survivor: its int8 value + 128. That needs no look at the
// bitmask, and a step makes 64 of them from a place that is known. Codes of 8 bits are such bytes as they are stored. Then
// the bytes are put at their columns by the bitmask, 64 columns at a time, and multiplied with x, which has been rounded
// to int8 once for the whole product, with a scale for every group of columns. Sums within a group are integers, so that
// they are the same for every instruction set.
//
// From the including file: decode(codes, first, n, bits, table, out), table[code] for the n codes from number `first` on,
// and up to 63 bytes more; levels(mask, at) -> V, the values of 16 columns, zeros where `mask` has no bit.

namespace {

constexpr int64_t kColumns = 64;     // at a time
constexpr int64_t kDecoded = 4096;   // columns of a row that are decoded at once
constexpr int64_t kLoad = 64;        // bytes that may be read from every survivor's on

// Whole groups of columns, without a division, which would take as long as some words of a row.
inline int64_t group_of(const FewBitWeight& w, int64_t column) { return column >> (w.group == 64 ? 6 : 7); }
inline int64_t groups_of(const FewBitWeight& w, int64_t columns) { return group_of(w, columns + w.group - 1); }

// x in int8, and what belongs to it, in the caller's memory.
struct RoundedX {
  int64_t columns, groups;  // of one token: whole groups
  int8_t* entries;          // (T, columns), from -127 to 127
  float* scales;            // (T, groups); NaN where an entry of the group is not finite
  int32_t* starts;          // (T, groups, 16): -128 times the sums of four entries each, where sums begin; see few_bits512.h

  RoundedX(const FewBitWeight& w, int64_t tokens, void* memory) {
    groups = groups_of(w, w.in_features);
    columns = groups * w.group;
    starts = static_cast<int32_t*>(memory);
    scales = reinterpret_cast<float*>(starts + tokens * groups * 16);
    entries = reinterpret_cast<int8_t*>(scales + tokens * groups);
  }
  static int64_t bytes(const FewBitWeight& w, int64_t tokens) {
    const RoundedX x(w, tokens, nullptr);
    return tokens * (x.groups * (16 * 4 + 4) + x.columns);
  }
};

// One group of a token, n <= group entries: x = scale * entry, rounded to nearest, where scale = max |x| / 127.
inline void round_group(const float* x, int64_t group, int8_t* entries, float* scale, int32_t* starts) {
  uint32_t largest = 0;  // absolute values other than NaN are ordered as their bits are, and NaN is above infinity
  for (int64_t j = 0; j < group; ++j) {
    const uint32_t size = to_bits(x[j]) & 0x7fffffffu;
    largest = largest > size ? largest : size;
  }
  const bool finite = largest < 0x7f800000u;
  *scale = finite ? from_bits(largest) / 127.0f : from_bits(0x7fc00000u);
  const bool empty = !finite || *scale == 0.0f;
  const float by = empty ? 1.0f : *scale;
  for (int64_t j = 0; j < group; ++j) {
    // Adding 1.5 * 2^23 leaves the integer, rounded, in the low bits.
    const uint32_t rounded = to_bits((empty ? 0.0f : x[j] / by) + 12582912.0f);
    entries[j] = static_cast<int8_t>(rounded & 0xff);
  }
  for (int i = 0; i < 16; ++i) starts[i] = 0;
  for (int64_t j = 0; j < group; ++j) starts[j % kColumns / 4] -= 128 * entries[j];
}

void round_x(const FewBitWeight& w, const void* x, Dtype dtype, int64_t tokens, void* memory) {
  const RoundedX to(w, tokens, memory);
  with_dtype(dtype, [&](auto* type) {
    using T = typename Pointee<decltype(type)>::type;
    const T* from = static_cast<const T*>(x);
    for (int64_t t = 0; t < tokens; ++t, from += w.in_features) {
      for (int64_t g = 0; g < to.groups; ++g) {
        float wide[128];
        for (int64_t j = 0; j < w.group; j += kChunk) {
          const int64_t column = g * w.group + j;
          const Padded<T> chunk(from + (column < w.in_features ? column : 0), w.in_features - column);
          store(wide + j, widen(chunk.entries));
          store(wide + j + 16, widen(chunk.entries + 16));
        }
        const int64_t at = t * to.groups + g;
        round_group(wide, w.group, to.entries + at * w.group, to.scales + at, to.starts + at * 16);
      }
    }
  });
}

int64_t rounded_bytes(const FewBitWeight& w, int64_t tokens) { return RoundedX::bytes(w, tokens); }

// The values of all codes + 128, repeated up to 64 of them.
struct Levels {
  uint8_t bytes[64];
  explicit Levels(const FewBitWeight& w) {
    for (int i = 0; i < 64 && w.bits < 8; ++i) bytes[i] = static_cast<uint8_t>(w.codebook[i & ((1 << w.bits) - 1)] + 128);
  }
};

// Rows, a segment at a time. Whatever bitmask and offsets say, nothing is read but codes and their padding, and a segment
// whose bits are not as many as its codes is refused: before it is read where that could lead beyond the codes, else when
// it has been.
struct FewBitRow {
  const FewBitWeight& weight;
  const Levels table;
  const int64_t most;       // codes in the whole weight
  const int64_t pace;       // bytes of them per group, about
  int64_t row, next, past;  // the codes that are left
  // Of the segment: the bits of its columns, up to the next whole group; its bytes, and where they end.
  int64_t columns, groups;
  int64_t per_word;  // bits in each of its words of 64 columns, where the weight promises that; else 0
  const uint32_t* word;
  const uint8_t* at;
  const uint8_t* end;
  alignas(64) uint32_t bits[kDecoded / 32];
  alignas(64) uint8_t bytes[kDecoded + kLoad];

  explicit FewBitRow(const FewBitWeight& w) : weight(w), table(w), most((w.code_bytes - kLoad) * 8 / w.bits), pace(most * w.bits / 8 / (w.out_features * groups_of(w, w.in_features))) {}

  bool start(int64_t which) {
    row = which;
    next = weight.row_offsets[row];
    past = weight.row_offsets[row + 1];
    return 0 <= next && next <= past && past <= most;
  }

  // The next columns of the row, from `first` on.
  bool segment(int64_t first) {
    const int64_t there = weight.in_features - first, words = (weight.in_features + 31) / 32, left = past - next;
    columns = there < kDecoded ? there : kDecoded;
    groups = groups_of(weight, columns);
    word = reinterpret_cast<const uint32_t*>(weight.bitmask) + row * words + first / 32;
    const bool whole = groups * weight.group == columns;
    per_word = whole ? weight.per_word : 0;
    if (!whole) copy_bits();
    int64_t codes = left;
    if (per_word) {
      codes = per_word * (columns / kColumns);
    } else if (columns < weight.in_features || next + columns + kLoad > weight.code_bytes) {
      codes = count_all(word, (columns + 31) / 32);
    }
    if (codes > left || codes > columns || (columns == there && codes != left)) return false;
    if (weight.bits == 8) {
      at = weight.codes + next;
    } else {
      decode(weight.codes, next, codes, weight.bits, table.bytes, bytes);
      at = bytes;
    }
    end = at + codes;
    next += codes;
    return true;
  }

  void copy_bits() {
    const int64_t used = (columns + 31) / 32;
    for (int64_t i = 0; i < groups * weight.group / 32; ++i) bits[i] = i < used ? word[i] : 0;
    bits[used - 1] &= low_bits(columns - (used - 1) * 32);
    word = bits;
  }

  // What to fetch while this segment is multiplied, a hint: codes of 8 bits are read at an even pace, and others all at once
  // when a row is decoded, so that it is the row after the next one.
  uintptr_t ahead() const {
    if (weight.bits == 8) return reinterpret_cast<uintptr_t>(at) + 2048;
    const int64_t later = row + 2 < weight.out_features ? row + 2 : row;
    return reinterpret_cast<uintptr_t>(weight.codes) + static_cast<uintptr_t>(weight.row_offsets[later] * weight.bits / 8);
  }
};

// The scales of groups [first, first + n) of a row, in fp32; `out` has room for up to 15 more.
inline void widen_scales(const FewBitWeight& w, int64_t row, int64_t first, int64_t n, float* out) {
  const Scale* from = static_cast<const Scale*>(w.scales) + row * groups_of(w, w.in_features) + first;
  for (int64_t g = 0; g < n; g += 16) {
    store(out + g, n - g >= 16 ? widen(from + g) : widen(Padded<Scale>(from + g, n - g).entries));
  }
}

constexpr int64_t kMostGroups = kDecoded / 64;

// What the sums of groups are multiplied by: the weight's scales times those of x, for every token.
template <int tokens>
struct GroupFactors {
  float of[tokens][kMostGroups + 16];

  void start(const FewBitWeight& w, int64_t row, const RoundedX& x, int64_t first, int64_t n) {
    float scales[kMostGroups + 16];
    widen_scales(w, row, first, n, scales);
    for (int t = 0; t < tokens; ++t) {
      const float* of_x = x.scales + t * x.groups + first;  // up to 15 more are read, where x.entries are
      for (int64_t g = 0; g < n; g += 16) store(of[t] + g, mul(load(scales + g), load(of_x + g)));
    }
  }
};

}  // namespace
