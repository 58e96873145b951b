// The functions of an instruction set's table for weights of few bits. After few_bit_rows.h and the file's
//
// DotRows<tokens>: add(rows, factors, x, group, totals) adds the products of a segment of two rows, groups from `group` on,
// to totals[row][t], moves `at` of the rows behind their last byte, and returns whether the words were as promised by
// per_word.

namespace {

// y[t, i] over rows [first, last), two rows at once: they are far apart, so that each is one long sequence in memory.
template <class Y, int tokens>
bool matvec_few_rows(const FewBitWeight& w, const RoundedX& x, const float* bias, Y* y, int64_t first, int64_t last) {
  FewBitRow rows[2] = {FewBitRow(w), FewBitRow(w)};
  GroupFactors<tokens> factors[2];
  const int64_t half = (last - first + 1) / 2;
  for (int64_t row = first; row < first + half; ++row) {
    // With an odd number of rows, the last one is paired with a row that is computed twice.
    if (!rows[0].start(row) || !rows[1].start(row + half < last ? row + half : last - 1)) return false;
    float totals[2][tokens] = {};
    for (int64_t column = 0; column < w.in_features; column += kDecoded) {
      for (int k = 0; k < 2; ++k) {
        if (!rows[k].segment(column)) return false;
        factors[k].start(w, rows[k].row, x, column / w.group, rows[k].groups);
      }
      if (!DotRows<tokens>::add(rows, factors, x, column / w.group, totals)) return false;
      if (rows[0].at != rows[0].end || rows[1].at != rows[1].end) return false;
    }
    for (const FewBitRow& one : rows) {
      const float start = bias ? bias[one.row] : 0.0f;
      for (int t = 0; t < tokens; ++t) narrow_one(y + t * w.out_features + one.row, totals[&one - rows][t] + start);
    }
  }
  return true;
}

bool matvec_few(const FewBitWeight& w, void* rounded, Dtype dtype, int64_t tokens, const float* bias, void* y,
                int64_t first, int64_t last) {
  const RoundedX x(w, tokens, rounded);
  return with_dtype(dtype, [&](auto* type) {
    auto* to = static_cast<decltype(type)>(y);
    switch (tokens) {
      case 1: return matvec_few_rows<typename Pointee<decltype(type)>::type, 1>(w, x, bias, to, first, last);
      case 2: return matvec_few_rows<typename Pointee<decltype(type)>::type, 2>(w, x, bias, to, first, last);
      case 3: return matvec_few_rows<typename Pointee<decltype(type)>::type, 3>(w, x, bias, to, first, last);
      default: return matvec_few_rows<typename Pointee<decltype(type)>::type, 4>(w, x, bias, to, first, last);
    }
  });
}

// W itself: every product of a value and its scale is exact in fp32, and rounded once.
template <class Out>
bool expand_few_rows(const FewBitWeight& w, Out* out, int64_t start, int64_t first, int64_t last) {
  FewBitRow reader(w);
  float scales[kMostGroups + 16];
  for (int64_t row = first; row < last; ++row) {
    if (!reader.start(row)) return false;
    for (int64_t column = 0; column < w.in_features; column += kDecoded) {
      if (!reader.segment(column)) return false;
      widen_scales(w, row, column / w.group, reader.groups, scales);
      Out* const to = out + (row - start) * w.in_features + column;
      for (int64_t j = 0; j < reader.columns; j += kChunk) {
        const uint32_t mask = *reader.word++;
        const V scale = broadcast(scales[j / w.group]);
        const V low = levels(mask & 0xffff, reader.at);
        reader.at += count(mask & 0xffff);
        const V high = levels(mask >> 16, reader.at);
        reader.at += count(mask >> 16);
        // Not a bare product, which is -0.0 for a zero and a negative scale.
        const V w_low = where_nonzero(low, mul(low, scale)), w_high = where_nonzero(high, mul(high, scale));
        if (reader.columns - j >= kChunk) {
          narrow(to + j, w_low);
          narrow(to + j + 16, w_high);
        } else {
          narrow_part(to + j, reader.columns - j, w_low, w_high);
        }
      }
      if (reader.at != reader.end) return false;
    }
  }
  return true;
}

bool expand_few(const FewBitWeight& w, void* out, Dtype dtype, int64_t start, int64_t first, int64_t last) {
  return with_dtype(dtype, [&](auto* type) {
    return expand_few_rows(w, static_cast<decltype(type)>(out), start, first, last);
  });
}

}  // namespace
