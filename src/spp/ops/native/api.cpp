// The functions that Python calls through ctypes: they choose the instruction set, and divide rows among the threads of
// torch's OpenMP.
//
// The library is not linked against OpenMP: a second runtime in the process would start a second set of threads, which
// would compete for the cores. Python passes the entry points of the runtime that torch has loaded.

#include "kernels.h"

using spp::Comparison;
using spp::Dtype;
using spp::Factors;
using spp::FewBitWeight;
using spp::Kernels;
using spp::Weight;

namespace {

using Region = void (*)(void*);
void (*start_team)(Region, void*, unsigned threads, unsigned flags) = nullptr;  // GOMP_parallel
int (*thread_number)() = nullptr;                                                // omp_get_thread_num
int (*team_size)() = nullptr;                                                    // omp_get_num_threads

template <class Body>
struct Shared {
  const Body& body;
  int64_t items;
  int failed;

  void run(int64_t thread, int64_t threads) {
    const int64_t first = items * thread / threads, last = items * (thread + 1) / threads;
    if (first < last && !body(first, last)) __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
  }
};

// body(first, last) over all items, by up to `threads` threads; whether every part succeeded.
template <class Body>
bool in_parallel(int64_t items, int64_t threads, const Body& body) {
  Shared<Body> shared{body, items, 0};
  if (threads > items) threads = items;
  if (threads > 1 && start_team) {
    const Region region = [](void* data) {
      static_cast<Shared<Body>*>(data)->run(thread_number(), team_size());
    };
    start_team(region, &shared, static_cast<unsigned>(threads), 0);
  } else {
    shared.run(0, 1);
  }
  return !shared.failed;
}

const Kernels* best() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool basic = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                     __builtin_cpu_supports("f16c") && __builtin_cpu_supports("popcnt") &&
                     __builtin_cpu_supports("bmi2");
  if (basic && __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("avx512vpopcntdq") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vnni")) {
    return __builtin_cpu_supports("avx512bf16") ? &spp::avx512_bf16 : &spp::avx512;
  }
  if (basic) return &spp::avx2;
#endif
  return &spp::portable;
}

const Kernels* kernels(int level) {
#if defined(__x86_64__)
  static const Kernels* const all[] = {&spp::portable, &spp::avx2, &spp::avx512, &spp::avx512_bf16};
#else
  static const Kernels* const all[] = {&spp::portable};
#endif
  static const Kernels* const chosen = best();
  if (level < 0) return chosen;
  for (unsigned i = 0; i < sizeof all / sizeof *all; ++i) {
    if (all[i] == chosen && level > static_cast<int>(i)) return nullptr;  // this CPU does not have it
  }
  return level < static_cast<int>(sizeof all / sizeof *all) ? all[level] : nullptr;
}

// Rows of one group, [first, last).
struct Block {
  int64_t first, last, group;
};

}  // namespace

#define SPP_API extern "C" __attribute__((visibility("default")))

// Errors: 0 fine, 1 a packed row whose bits and offsets disagree.

SPP_API int32_t spp_abi() { return spp::kAbi; }

SPP_API void spp_use_threads_of(void* gomp_parallel, void* omp_get_thread_num, void* omp_get_num_threads) {
  start_team = reinterpret_cast<decltype(start_team)>(gomp_parallel);
  thread_number = reinterpret_cast<decltype(thread_number)>(omp_get_thread_num);
  team_size = reinterpret_cast<decltype(team_size)>(omp_get_num_threads);
}

// Name of an instruction set: level 0 is portable, -1 the best that this CPU has; null where it lacks the level.
SPP_API const char* spp_instructions(int level) {
  const Kernels* found = kernels(level);
  return found ? found->name : nullptr;
}

SPP_API int spp_effective(int level, int threads, const Weight* weight, const Factors* factors, int with_base, void* out,
                          Dtype out_dtype) {
  const Kernels* k = kernels(level);
  return !in_parallel(weight->out_features, threads, [=](int64_t first, int64_t last) {
    return k->effective(*weight, *factors, with_base, out, out_dtype, first, last);
  });
}

// Adds to da (R K, I), and writes db, over rows [first, first + rows). `partial` has room for spp_blocks(...) times (K, I).
// Blocks are fixed by the shapes alone and added in order, so that the sums do not depend on the number of threads.
SPP_API int64_t spp_blocks(int64_t first, int64_t rows, int64_t groups, int64_t out_features, int64_t most, Block* blocks) {
  int64_t found = 0;
  for (int64_t row = first; row < first + rows; ++found) {
    const int64_t group = spp::row_group(row, groups, out_features);
    const int64_t group_end = ((group + 1) * out_features + groups - 1) / groups;  // the first i with g(i) > group
    int64_t last = row + most;
    if (last > group_end) last = group_end;
    if (last > first + rows) last = first + rows;
    if (blocks) blocks[found] = {row, last, group};
    row = last;
  }
  return found;
}

SPP_API int spp_reduce(int level, int threads, const Weight* weight, const Factors* factors, const void* gradient,
                       Dtype gradient_dtype, int64_t first, const Block* blocks, int64_t count, float* partial,
                       float* da, float* db) {
  const Kernels* k = kernels(level);
  const int64_t sums = factors->directions * weight->in_features;
  const bool sound = in_parallel(count, threads, [=](int64_t from, int64_t to) {
    for (int64_t i = from; i < to; ++i) {
      if (!k->reduce(*weight, *factors, gradient, gradient_dtype, first, partial + i * sums, db, blocks[i].first,
                     blocks[i].last)) {
        return false;
      }
    }
    return true;
  });
  if (!sound) return 1;
  in_parallel(sums, threads, [=](int64_t from, int64_t to) {
    for (int64_t i = 0; i < count; ++i) {
      float* to_rows = da + blocks[i].group * sums;
      const float* part = partial + i * sums;
      for (int64_t j = from; j < to; ++j) to_rows[j] += part[j];
    }
    return true;
  });
  return 0;
}

// How many tokens spp_matvec takes at once, for x in a dtype.
SPP_API int64_t spp_most_tokens(int level, const Weight* weight, Dtype dtype) {
  return kernels(level)->most_tokens(*weight, dtype);
}

// arranged: room for tokens * ceil(I / 32) * 32 floats.
SPP_API int spp_matvec(int level, int threads, const Weight* weight, const void* x, Dtype dtype, int64_t tokens,
                       const float* bias, float* arranged, void* y) {
  const Kernels* k = kernels(level);
  k->arrange(*weight, x, dtype, tokens, arranged);
  return !in_parallel(weight->out_features, threads, [=](int64_t first, int64_t last) {
    return k->matvec(*weight, arranged, dtype, tokens, bias, y, first, last);
  });
}

SPP_API void spp_scan(int level, int threads, const Weight* weight, int32_t* bitmask, int64_t* counts) {
  const Kernels* k = kernels(level);
  in_parallel(weight->out_features, threads, [=](int64_t first, int64_t last) {
    k->scan(*weight, bitmask, counts, first, last);
    return true;
  });
}

SPP_API void spp_gather(int level, int threads, const Weight* weight, const int32_t* bitmask, const int64_t* row_offsets,
                        void* values) {
  const Kernels* k = kernels(level);
  in_parallel(weight->out_features, threads, [=](int64_t first, int64_t last) {
    k->gather(*weight, bitmask, row_offsets, values, first, last);
    return true;
  });
}

// What spp_matvec_few needs for its rounded x.
SPP_API int64_t spp_rounded_bytes(int level, const FewBitWeight* weight, int64_t tokens) {
  return kernels(level)->rounded_bytes(*weight, tokens);
}

// `rounded` has room for spp_rounded_bytes(...).
SPP_API int spp_matvec_few(int level, int threads, const FewBitWeight* weight, const void* x, Dtype dtype, int64_t tokens,
                           const float* bias, void* rounded, void* y) {
  const Kernels* k = kernels(level);
  k->round_x(*weight, x, dtype, tokens, rounded);
  return !in_parallel(weight->out_features, threads, [=](int64_t first, int64_t last) {
    return k->matvec_few(*weight, rounded, dtype, tokens, bias, y, first, last);
  });
}

// Rows [start, start + rows).
SPP_API int spp_expand_few(int level, int threads, const FewBitWeight* weight, void* out, Dtype out_dtype, int64_t start,
                           int64_t rows) {
  const Kernels* k = kernels(level);
  return !in_parallel(rows, threads, [=](int64_t first, int64_t last) {
    return k->expand_few(*weight, out, out_dtype, start, start + first, start + last);
  });
}

// Entries [0, count) of two tensors; `parts` has room for ceil(count / spp::kMostCompared), and `found` is their sum.
SPP_API void spp_compare(int level, int threads, const void* base, Dtype base_dtype, const void* other,
                         Dtype other_dtype, int64_t count, Comparison* parts, Comparison* found) {
  const Kernels* k = kernels(level);
  const int64_t most = spp::kMostCompared, blocks = (count + most - 1) / most;
  in_parallel(blocks, threads, [=](int64_t from, int64_t to) {
    for (int64_t i = from; i < to; ++i) {
      const int64_t first = i * most, last = first + most < count ? first + most : count;
      k->compare(base, base_dtype, other, other_dtype, first, last, parts + i);
    }
    return true;
  });
  *found = {};
  for (int64_t i = 0; i < blocks; ++i) {
    const Comparison& part = parts[i];
    found->zeros += part.zeros;
    found->offenders += part.offenders;
    found->negative_zeros += part.negative_zeros;
    found->survivors += part.survivors;
    found->underflowed += part.underflowed;
    found->unchanged += part.unchanged;
    found->sign_flips += part.sign_flips;
    found->non_finite += part.non_finite;
    if (part.largest_relative_change > found->largest_relative_change) {
      found->largest_relative_change = part.largest_relative_change;
    }
  }
}
