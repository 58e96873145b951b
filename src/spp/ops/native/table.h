// Selects the templates of rows.h by the dtypes given at run time: the functions of an instruction set's table.

namespace {

template <class Rows, class Out, int fixed>
bool effective_mixed(const Weight& w, const Factors& f, bool with_base, Out* out, int64_t first, int64_t last) {
  return with_base ? effective_rows<Rows, Out, true, fixed>(w, f, out, first, last)
                   : effective_rows<Rows, Out, false, fixed>(w, f, out, first, last);
}
template <class Rows, class Out>
bool effective_out(const Weight& w, const Factors& f, bool with_base, Out* out, int64_t first, int64_t last) {
  if (!f.a) return convert_rows<Rows>(w, out, first, last);
  switch (f.directions) {  // as published, our default, and any other number
    case 1: return effective_mixed<Rows, Out, 1>(w, f, with_base, out, first, last);
    case 4: return effective_mixed<Rows, Out, 4>(w, f, with_base, out, first, last);
    default: return effective_mixed<Rows, Out, 0>(w, f, with_base, out, first, last);
  }
}

bool effective(const Weight& w, const Factors& f, bool with_base, void* out, Dtype out_dtype, int64_t first,
               int64_t last) {
  return with_dtype(w.dtype, [&](auto* weight_type) {
    using T = typename Pointee<decltype(weight_type)>::type;
    if (w.bitmask && !f.a && out_dtype == w.dtype) return expand_rows(w, static_cast<T*>(out), first, last);
    return with_dtype(out_dtype, [&](auto* out_type) {
      auto* to = static_cast<decltype(out_type)>(out);
      return w.bitmask ? effective_out<PackedRows<T>>(w, f, with_base, to, first, last)
                       : effective_out<DenseRows<T>>(w, f, with_base, to, first, last);
    });
  });
}

template <class Rows, class G>
bool reduce_mixed(const Weight& w, const Factors& f, const G* g, float* da, float* db, int64_t first, int64_t last) {
  switch (f.directions) {
    case 1: return reduce_rows<Rows, G, 1>(w, f, g, da, db, first, last);
    case 4: return reduce_rows<Rows, G, 4>(w, f, g, da, db, first, last);
    default: return reduce_rows<Rows, G, 0>(w, f, g, da, db, first, last);
  }
}
bool reduce(const Weight& w, const Factors& f, const void* gradient, Dtype gradient_dtype, int64_t start, float* da,
            float* db, int64_t first, int64_t last) {
  return with_dtype(w.dtype, [&](auto* weight_type) {
    using T = typename Pointee<decltype(weight_type)>::type;
    return with_dtype(gradient_dtype, [&](auto* gradient_type) {
      auto* g = static_cast<const typename Pointee<decltype(gradient_type)>::type*>(gradient);
      g += (first - start) * w.in_features;
      return w.bitmask ? reduce_mixed<PackedRows<T>>(w, f, g, da, db, first, last)
                       : reduce_mixed<DenseRows<T>>(w, f, g, da, db, first, last);
    });
  });
}

template <class Rows, class Y>
bool matvec_tokens(const Weight& w, const float* x, int64_t tokens, const float* bias, Y* y, int64_t first,
                   int64_t last) {
  switch (tokens) {
    case 1: return matvec_rows<Rows, Y, 1>(w, x, bias, y, first, last);
    case 2: return matvec_rows<Rows, Y, 2>(w, x, bias, y, first, last);
    case 3: return matvec_rows<Rows, Y, 3>(w, x, bias, y, first, last);
    default: return matvec_rows<Rows, Y, 4>(w, x, bias, y, first, last);
  }
}

int64_t most_tokens(const Weight&, Dtype) { return kMostTokens; }

bool matvec(const Weight& w, const float* x, Dtype dtype, int64_t tokens, const float* bias, void* y, int64_t first,
            int64_t last) {
  return with_dtype(w.dtype, [&](auto* weight_type) {
    using T = typename Pointee<decltype(weight_type)>::type;
    return with_dtype(dtype, [&](auto* y_type) {
      auto* to = static_cast<decltype(y_type)>(y);
      return w.bitmask ? matvec_tokens<PackedRows<T>>(w, x, tokens, bias, to, first, last)
                       : matvec_tokens<DenseRows<T>>(w, x, tokens, bias, to, first, last);
    });
  });
}

void arrange(const Weight& w, const void* x, Dtype dtype, int64_t tokens, float* out) {
  const int64_t in_features = w.in_features;
  with_dtype(dtype, [&](auto* type) {
    auto* from = static_cast<const typename Pointee<decltype(type)>::type*>(x);
    for (int64_t t = 0; t < tokens; ++t, from += in_features) {
      for (int64_t j = 0; j < in_features; j += kChunk, out += kChunk) {
        Padded<typename Pointee<decltype(type)>::type> chunk(from + j, in_features - j);
        store(out, widen(chunk.entries));
        store(out + 16, widen(chunk.entries + 16));
      }
    }
  });
}

void scan(const Weight& w, int32_t* bitmask, int64_t* counts, int64_t first, int64_t last) {
  with_dtype(w.dtype, [&](auto* type) {
    using T = typename Pointee<decltype(type)>::type;
    const int64_t words = (w.in_features + 31) / 32;
    for (int64_t row = first; row < last; ++row) {
      const T* from = static_cast<const T*>(w.values) + row * w.row_stride;
      counts[row] = 0;
      for (int64_t word = 0; word < words; ++word) {
        const int64_t n = w.in_features - word * 32;
        uint32_t mask = 0;
        for (int64_t i = 0; i < (n < 32 ? n : 32); ++i) mask |= nonzero(from[word * 32 + i]) << i;
        bitmask[row * words + word] = static_cast<int32_t>(mask);
        counts[row] += count(mask);
      }
    }
  });
}

void gather(const Weight& w, const int32_t* bitmask, const int64_t* row_offsets, void* values, int64_t first,
            int64_t last) {
  with_dtype(w.dtype, [&](auto* type) {
    using T = typename Pointee<decltype(type)>::type;
    const int64_t words = (w.in_features + 31) / 32;
    for (int64_t row = first; row < last; ++row) {
      const T* from = static_cast<const T*>(w.values) + row * w.row_stride;
      T* to = static_cast<T*>(values) + row_offsets[row];
      for (int64_t word = 0; word < words; ++word) {
        for (uint32_t mask = static_cast<uint32_t>(bitmask[row * words + word]); mask; mask &= mask - 1) {
          *to++ = from[word * 32 + __builtin_ctz(mask)];
        }
      }
    }
  });
}

// Plain loops over 16 lanes, which compilers turn into vector code for the instruction set of the file.
struct Counters {
  uint32_t lanes[8][16];
};

inline void count_lanes(Counters& c, const float* base, const float* other) {
  constexpr uint32_t sign = 0x80000000u, infinity = 0x7f800000u;
  for (int i = 0; i < 16; ++i) {
    const uint32_t b = to_bits(base[i]), o = to_bits(other[i]);
    const uint32_t zero = (b & ~sign) == 0, other_zero = (o & ~sign) == 0;
    const uint32_t finite = (b & infinity) != infinity, other_finite = (o & infinity) != infinity;
    const uint32_t same = base[i] == other[i], flipped = (b ^ o) >> 31;
    const uint32_t comparable = (zero ^ 1u) & finite & other_finite;
    c.lanes[0][i] += zero;
    c.lanes[1][i] += zero & (o != 0);
    c.lanes[2][i] += zero & (o == sign);
    c.lanes[3][i] += (zero ^ 1u) & other_zero;
    c.lanes[4][i] += (zero ^ 1u) & same;
    c.lanes[5][i] += comparable & (other_zero ^ 1u) & flipped;
    c.lanes[6][i] += finite & (other_finite ^ 1u);
    // Absolute values other than NaN are ordered as their bits are.
    const uint32_t change = to_bits((other[i] - base[i]) / base[i]) & ~sign & (0u - comparable);
    c.lanes[7][i] = c.lanes[7][i] > change ? c.lanes[7][i] : change;
  }
}

template <class Base, class Other>
void compare_entries(const Base* base, const Other* other, int64_t n, Comparison* found) {
  Counters c = {};
  float from[16], to[16];
  const int64_t whole = n / 16 * 16;
  for (int64_t j = 0; j < whole; j += 16) {
    store(from, widen(base + j));
    store(to, widen(other + j));
    count_lanes(c, from, to);
  }
  const int64_t rest = n - whole, padding = rest ? 16 - rest : 0;
  if (rest) {
    store(from, widen(Padded<Base>(base + whole, rest).entries));
    store(to, widen(Padded<Other>(other + whole, rest).entries));
    count_lanes(c, from, to);
  }
  int64_t totals[7] = {};
  uint32_t largest = 0;
  for (int i = 0; i < 16; ++i) {
    for (int which = 0; which < 7; ++which) totals[which] += c.lanes[which][i];
    largest = largest > c.lanes[7][i] ? largest : c.lanes[7][i];
  }
  const int64_t zeros = totals[0] - padding;  // the padding is zeros
  *found = {zeros,     totals[1], totals[2], n - zeros,         totals[3],
            totals[4], totals[5], totals[6], from_bits(largest), 0};
}

void compare(const void* base, Dtype base_dtype, const void* other, Dtype other_dtype, int64_t first, int64_t last,
             Comparison* found) {
  with_dtype(base_dtype, [&](auto* type) {
    const auto* from = static_cast<decltype(type)>(const_cast<void*>(base)) + first;
    with_dtype(other_dtype, [&](auto* other_type) {
      const auto* to = static_cast<decltype(other_type)>(const_cast<void*>(other)) + first;
      compare_entries(from, to, last - first, found);
    });
  });
}

}  // namespace
