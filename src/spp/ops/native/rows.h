// The functions of `Kernels`, written once over 16 floats at a time (`V`); each instruction set's file defines V and its
// operations, then includes this. All of it has internal linkage: the same template compiled for two instruction sets
// must stay two functions.
//
// From the including file: V; load, store, zero, broadcast, add, mul, fma, sum, where_nonzero(w, v) = v or +0.0 where w
// is zero; count. From it and dtypes.h, for every dtype: widen(const T*) -> V, narrow(T*, V) and narrow_one(T*, float);
// expand(mask, p, end) -> V, the next count(mask) entries at p in the lanes of the bits of `mask`, none from `end` on;
// expand_bits(out, mask, p, end), the same for 32 columns, as bits.

namespace {

inline uint32_t low_bits(int64_t n) { return n >= 32 ? ~0u : (1u << n) - 1u; }

// Up to 32 entries, padded with zeros: the last columns of a row as a whole chunk.
template <class T>
struct Padded {
  T entries[kChunk];
  Padded(const T* from, int64_t n) {
    for (int64_t i = 0; i < kChunk; ++i) entries[i] = i < n ? from[i] : T{};
  }
};

// Rows of a dense weight, 32 columns at a time.
template <class T>
struct DenseRows {
  const Weight& weight;
  const T* at;

  explicit DenseRows(const Weight& w) : weight(w), at(nullptr) {}
  bool start(int64_t row) {
    at = static_cast<const T*>(weight.values) + row * weight.row_stride;
    return true;
  }
  void next(V& low, V& high) {
    low = widen(at);
    high = widen(at + 16);
    at += kChunk;
  }
  void last(int64_t n, V& low, V& high) {
    Padded<T> rest(at, n);
    low = widen(rest.entries);
    high = widen(rest.entries + 16);
  }
};

// Rows of a packed weight, 32 columns at a time. A row is read only after its bits and its offsets agree, so that no
// bitmask makes it read beyond the values.
template <class T>
struct PackedRows {
  const Weight& weight;
  const int64_t words;
  const T* const end;
  const uint32_t* word;
  const T* at;

  explicit PackedRows(const Weight& w)
      : weight(w),
        words((w.in_features + 31) / 32),
        end(static_cast<const T*>(w.values) + w.nonzeros),
        word(nullptr),
        at(nullptr) {}
  bool start(int64_t row) {
    const int64_t first = weight.row_offsets[row], past = weight.row_offsets[row + 1];
    word = reinterpret_cast<const uint32_t*>(weight.bitmask) + row * words;
    at = static_cast<const T*>(weight.values) + first;
    return 0 <= first && first <= past && past <= weight.nonzeros && count_all(word, words) == past - first;
  }
  void step(uint32_t mask, V& low, V& high) {
    low = expand(mask & 0xffff, at, end);
    at += count(mask & 0xffff);
    high = expand(mask >> 16, at, end);
    at += count(mask >> 16);
  }
  void next(V& low, V& high) { step(*word++, low, high); }
  void last(int64_t n, V& low, V& high) { step(*word & low_bits(n), low, high); }
};

template <class Out>
void narrow_part(Out* out, int64_t n, V low, V high) {
  Out whole[kChunk];
  narrow(whole, low);
  narrow(whole + 16, high);
  for (int64_t i = 0; i < n; ++i) out[i] = whole[i];
}

// sum_k a[k, :] * b[k] over 16 columns; every product and sum is rounded, in this order.
template <class Mixed>
inline V mixed(const Mixed& by, const float* a, int64_t stride) {
  V total = mul(load(a), by.b[0]);
  for (int64_t k = 1; k < by.count(); ++k) total = add(total, mul(load(a + k * stride), by.b[k]));
  return total;
}

// How a row combines its directions: `fixed` of them; if that is 0, the number given at run time.
template <int fixed>
struct Mix {
  const int64_t given;
  V b[fixed ? fixed : kMostDirections];

  explicit Mix(const Factors& factors) : given(factors.directions) {}
  int64_t count() const { return fixed ? fixed : given; }
  void start(const float* of_row) {
    for (int64_t k = 0; k < count(); ++k) b[k] = broadcast(of_row[k]);
  }
};

// The last columns of the directions of a group, padded with zeros, (K, kChunk).
template <int fixed>
struct LastColumns {
  float entries[(fixed ? fixed : kMostDirections) * kChunk];

  LastColumns(const float* from, int64_t directions, int64_t stride, int64_t n) {
    for (int64_t k = 0; k < directions; ++k) {
      for (int64_t i = 0; i < kChunk; ++i) entries[k * kChunk + i] = i < n ? from[k * stride + i] : 0.0f;
    }
  }
};

template <bool with_base>
inline V updated(V w, V multiplier) {
  const V delta = mul(w, multiplier);
  return where_nonzero(w, with_base ? add(delta, w) : delta);
}

template <class Rows, class Out, bool with_base, int fixed>
bool effective_rows(const Weight& weight, const Factors& factors, Out* out, int64_t first, int64_t last) {
  Rows rows(weight);
  Mix<fixed> mix(factors);
  const int64_t columns = weight.in_features, whole = columns / kChunk * kChunk, rest = columns - whole;
  V low, high;
  for (int64_t row = first; row < last; ++row) {
    if (!rows.start(row)) return false;
    Out* to = out + row * columns;
    const float* a = factors.a + row_group(row, factors.groups, weight.out_features) * mix.count() * columns;
    mix.start(factors.b + row * mix.count());
    for (int64_t j = 0; j < whole; j += kChunk) {
      rows.next(low, high);
      narrow(to + j, updated<with_base>(low, mixed(mix, a + j, columns)));
      narrow(to + j + 16, updated<with_base>(high, mixed(mix, a + j + 16, columns)));
    }
    if (rest) {
      rows.last(rest, low, high);
      const LastColumns<fixed> a_rest(a + whole, mix.count(), columns, rest);
      narrow_part(to + whole, rest, updated<with_base>(low, mixed(mix, a_rest.entries, kChunk)),
                  updated<with_base>(high, mixed(mix, a_rest.entries + 16, kChunk)));
    }
  }
  return true;
}

// W itself in another dtype.
template <class Rows, class Out>
bool convert_rows(const Weight& weight, Out* out, int64_t first, int64_t last) {
  Rows rows(weight);
  const int64_t columns = weight.in_features, whole = columns / kChunk * kChunk, rest = columns - whole;
  V low, high;
  for (int64_t row = first; row < last; ++row) {
    if (!rows.start(row)) return false;
    Out* to = out + row * columns;
    for (int64_t j = 0; j < whole; j += kChunk) {
      rows.next(low, high);
      narrow(to + j, low);
      narrow(to + j + 16, high);
    }
    if (rest) {
      rows.last(rest, low, high);
      narrow_part(to + whole, rest, low, high);
    }
  }
  return true;
}

// W itself, packed, in its own dtype: its bits are copied, whatever they mean.
template <class T>
bool expand_rows(const Weight& weight, T* out, int64_t first, int64_t last) {
  PackedRows<T> rows(weight);
  const int64_t columns = weight.in_features;
  for (int64_t row = first; row < last; ++row) {
    if (!rows.start(row)) return false;
    T* to = out + row * columns;
    for (int64_t j = 0; j < columns; j += kChunk) {
      const int64_t n = columns - j;
      const uint32_t mask = *rows.word++ & low_bits(n);
      if (n >= kChunk) {
        expand_bits(to + j, mask, rows.at, rows.end);
      } else {
        T whole[kChunk];
        expand_bits(whole, mask, rows.at, rows.end);
        for (int64_t i = 0; i < n; ++i) to[j + i] = whole[i];
      }
      rows.at += count(mask);
    }
  }
  return true;
}

template <class Rows, class G, int fixed>
bool reduce_rows(const Weight& weight, const Factors& factors, const G* gradient, float* da, float* db, int64_t first,
                 int64_t last) {
  Rows rows(weight);
  Mix<fixed> mix(factors);
  const int64_t columns = weight.in_features, whole = columns / kChunk * kChunk, rest = columns - whole;
  const int64_t directions = mix.count();
  const float* a = factors.a + row_group(first, factors.groups, weight.out_features) * directions * columns;
  const LastColumns<fixed> a_rest(a + whole, directions, columns, rest);
  for (int64_t j = 0; j < directions * columns; ++j) da[j] = 0.0f;
  V low, high;
  for (int64_t row = first; row < last; ++row) {
    if (!rows.start(row)) return false;
    const G* g = gradient + (row - first) * columns;
    mix.start(factors.b + row * directions);
    V sums[fixed ? fixed : kMostDirections];
    for (int64_t k = 0; k < directions; ++k) sums[k] = zero();
    for (int64_t j = 0; j < whole; j += kChunk) {
      rows.next(low, high);
      // Zeros of W contribute nothing, even where G is not finite.
      const V p_low = where_nonzero(low, mul(low, widen(g + j)));
      const V p_high = where_nonzero(high, mul(high, widen(g + j + 16)));
      for (int64_t k = 0; k < directions; ++k) {
        const float* a_k = a + k * columns + j;
        float* da_k = da + k * columns + j;
        sums[k] = fma(p_high, load(a_k + 16), fma(p_low, load(a_k), sums[k]));
        store(da_k, fma(p_low, mix.b[k], load(da_k)));
        store(da_k + 16, fma(p_high, mix.b[k], load(da_k + 16)));
      }
    }
    if (rest) {
      rows.last(rest, low, high);
      Padded<G> g_rest(g + whole, rest);
      const V p_low = where_nonzero(low, mul(low, widen(g_rest.entries)));
      const V p_high = where_nonzero(high, mul(high, widen(g_rest.entries + 16)));
      for (int64_t k = 0; k < directions; ++k) {
        const float* a_k = a_rest.entries + k * kChunk;
        float* da_k = da + k * columns + whole;
        const Padded<float> before(da_k, rest);
        sums[k] = fma(p_high, load(a_k + 16), fma(p_low, load(a_k), sums[k]));
        narrow_part(da_k, rest, fma(p_low, mix.b[k], load(before.entries)),
                    fma(p_high, mix.b[k], load(before.entries + 16)));
      }
    }
    for (int64_t k = 0; k < directions; ++k) db[row * directions + k] = sum(sums[k]);
  }
  return true;
}

template <class Rows, class Y, int tokens>
bool matvec_rows(const Weight& weight, const float* x, const float* bias, Y* y, int64_t first, int64_t last) {
  Rows rows(weight);
  const int64_t columns = weight.in_features, whole = columns / kChunk * kChunk, rest = columns - whole;
  const int64_t stride = padded(columns);
  V low, high;
  for (int64_t row = first; row < last; ++row) {
    if (!rows.start(row)) return false;
    V sum_low[tokens], sum_high[tokens];
    for (int t = 0; t < tokens; ++t) sum_low[t] = sum_high[t] = zero();
    for (int64_t j = 0; j < whole; j += kChunk) {
      rows.next(low, high);
      for (int t = 0; t < tokens; ++t) {
        sum_low[t] = fma(low, load(x + t * stride + j), sum_low[t]);
        sum_high[t] = fma(high, load(x + t * stride + j + 16), sum_high[t]);
      }
    }
    if (rest) {
      rows.last(rest, low, high);
      for (int t = 0; t < tokens; ++t) {
        sum_low[t] = fma(low, load(x + t * stride + whole), sum_low[t]);
        sum_high[t] = fma(high, load(x + t * stride + whole + 16), sum_high[t]);
      }
    }
    for (int t = 0; t < tokens; ++t) {
      const float total = sum(add(sum_low[t], sum_high[t])) + (bias ? bias[row] : 0.0f);
      narrow_one(y + t * weight.out_features + row, total);
    }
  }
  return true;
}

}  // namespace
