// Matrix products of bfloat16 operands with float32 results, for processors with bfloat16 instructions: torch's own
// `mm` rounds its result to bfloat16, which log-probabilities don't survive, and copies operands whose rows have room
// behind them. The tiles are oneDNN's, by way of torch's `brgemm`; here is what stands around them: blocks, packing,
// threads. Each tile of the result is one task's, summed in
// a fixed order, so that results don't depend on the number of threads.
//
// Dimensions: A [M, K], B [K, N], result [M, N].
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/native/CPUBlas.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <vector>

#if defined(RGPB_X86) && defined(CPUBLAS_BRGEMM_BF16BF16F32)
#define RGPB_BRGEMM
#endif

namespace rgpb {
namespace {

using at::BFloat16;
using at::Tensor;

// Whether the processor multiplies bfloat16 itself, and this torch has the tiles for it.
bool has_bf16_products() {
#ifdef RGPB_BRGEMM
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

#ifdef RGPB_BRGEMM

constexpr int64_t MB = 128, NB = 64, KB = 512;

int64_t blocks(int64_t size, int64_t block) { return (size + block - 1) / block; }

// A matrix of which one of the two directions is dense.
struct Operand {
  const BFloat16* data;
  int64_t rows, columns, stride;
  bool by_rows;

  Operand(const Tensor& x, const char* name)
      : data(static_cast<const BFloat16*>(x.data_ptr())),
        rows(x.size(0)),
        columns(x.size(1)),
        by_rows(x.stride(1) == 1 || x.size(1) == 1) {
    stride = by_rows ? x.stride(0) : x.stride(1);
    TORCH_CHECK_VALUE(by_rows || x.stride(0) == 1 || x.size(0) == 1, name,
                      ": expected rows or columns of unit stride, got strides ", x.strides());
  }
  const BFloat16* at(int64_t row, int64_t column) const {
    return data + (by_rows ? row * stride + column : column * stride + row);
  }
};

// Rows k0 ... k0 + kk, columns n0 ... n0 + nn of B as pairs of rows, [ceil(kk / 2), NB, 2]; an odd last row gets zeros.
void pack_b(const Operand& b, int64_t k0, int64_t kk, int64_t n0, int64_t nn, BFloat16* packed) {
  const int64_t pairs = kk / 2;
  if (b.by_rows) {
    for (int64_t k = 0; k < pairs; ++k) {
      const BFloat16 *first = b.at(k0 + 2 * k, n0), *second = b.at(k0 + 2 * k + 1, n0);
      BFloat16* row = packed + k * NB * 2;
      for (int64_t n = 0; n < nn; ++n) {
        row[2 * n] = first[n];
        row[2 * n + 1] = second[n];
      }
    }
  } else {
    constexpr int64_t STEP = 16;  // so many pairs of a column are one line of the cache
    for (int64_t from = 0; from < pairs; from += STEP)
      for (int64_t n = 0; n < nn; ++n) {
        const BFloat16* column = b.at(k0, n0 + n);
        for (int64_t k = from; k < std::min(from + STEP, pairs); ++k)
          std::memcpy(packed + (k * NB + n) * 2, column + 2 * k, 2 * sizeof(BFloat16));
      }
  }
  if (kk % 2)
    for (int64_t n = 0; n < nn; ++n) {
      packed[(pairs * NB + n) * 2] = *b.at(k0 + kk - 1, n0 + n);
      packed[(pairs * NB + n) * 2 + 1] = BFloat16(0);
    }
}

// Rows m0 ... m0 + mm, columns k0 ... k0 + kk of A, which lies in columns, as dense rows of `width` (kk made even): two
// columns at a time, a zero behind an odd last one.
void pack_a(const Operand& a, int64_t m0, int64_t mm, int64_t k0, int64_t kk, int64_t width, BFloat16* packed) {
  constexpr int64_t STEP = 32;
  BFloat16 pairs[2 * STEP] = {};
  for (int64_t from = 0; from < mm; from += STEP) {
    const int64_t count = std::min(STEP, mm - from);
    for (int64_t k = 0; k < kk; k += 2) {
      const BFloat16* first = a.at(m0 + from, k0 + k);
      const BFloat16* second = k + 1 < kk ? a.at(m0 + from, k0 + k + 1) : nullptr;
      for (int64_t m = 0; m < count; ++m) {
        pairs[2 * m] = first[m];
        pairs[2 * m + 1] = second ? second[m] : BFloat16(0);
      }
      for (int64_t m = 0; m < count; ++m)
        std::memcpy(packed + (from + m) * width + k, pairs + 2 * m, 2 * sizeof(BFloat16));
    }
  }
}

// Tiles take pairs: an odd last column of A, times its row of B (the first of each pair in `row`), by itself.
void add_column(const Operand& a, int64_t m0, int64_t mm, int64_t k, const BFloat16* row, int64_t nn, float* c,
                int64_t ld, bool add) {
  for (int64_t m = 0; m < mm; ++m) {
    const float x = *a.at(m0 + m, k);
    for (int64_t n = 0; n < nn; ++n)
      c[m * ld + n] = (add ? c[m * ld + n] : 0.0f) + x * static_cast<float>(row[2 * n]);
  }
}

// The result: float32 in place, or bfloat16 rounded once from sums that a task keeps for itself.
struct Result {
  float* wide;
  BFloat16* narrow;
  int64_t stride;

  // Where the sums of a block of rows and columns go, and the stride there.
  float* sums(int64_t row, int64_t column, std::vector<float>& own) const {
    return narrow ? own.data() : wide + row * stride + column;
  }
  void finish(int64_t row, int64_t rows, int64_t column, int64_t columns, int64_t from, const float* sums) const {
    if (!narrow) return;
    for (int64_t m = 0; m < rows; ++m)
      for (int64_t n = 0; n < columns; ++n)
        narrow[(row + m) * stride + column + n] = static_cast<BFloat16>(sums[m * from + n]);
  }
};

// A lies in rows: a task packs a few blocks of B, side by side, and takes rows of A through them.
void by_columns(const Operand& a, const Operand& b, const Result& out, bool accumulate) {
  const int64_t M = a.rows, N = b.columns, K = a.columns;
  constexpr int64_t SPAN = 4 * NB, MOST = 4 * MB;  // sums of a task's own stay in the cache
  const int64_t wide = blocks(N, SPAN);
  const int64_t groups = std::max(std::min(blocks(M, MB), blocks(at::get_num_threads(), wide)),
                                  out.narrow ? blocks(M, MOST) : int64_t{1});
  const int64_t height = blocks(blocks(M, MB), groups) * MB;
  const int64_t ld = out.narrow ? SPAN : out.stride;
  at::parallel_for(0, wide * groups, 1, [&](int64_t first, int64_t last) {
    std::vector<BFloat16> packed(KB * SPAN);
    std::vector<float> own(out.narrow ? height * SPAN : 0);
    for (int64_t task = first; task < last; ++task) {
      const int64_t left = task / groups * SPAN, right = std::min(left + SPAN, N);
      const int64_t top = task % groups * height, bottom = std::min(top + height, M);
      if (top >= bottom) continue;
      float* sums = out.sums(top, left, own);
      for (int64_t k0 = 0; k0 < K; k0 += KB) {
        const int64_t kk = std::min(KB, K - k0), even = kk / 2 * 2;
        const bool add = accumulate || k0 > 0;
        for (int64_t n0 = left; n0 < right; n0 += NB)
          pack_b(b, k0, kk, n0, std::min(NB, right - n0), packed.data() + (n0 - left) * KB);
        for (int64_t m0 = top; m0 < bottom; m0 += MB)
          for (int64_t n0 = left; n0 < right; n0 += NB) {
            const int64_t mm = std::min(MB, bottom - m0), nn = std::min(NB, right - n0);
            const BFloat16* block = packed.data() + (n0 - left) * KB;
            float* c = sums + (m0 - top) * ld + n0 - left;
            if (even) at::native::cpublas::brgemm(mm, nn, even, a.stride, NB, ld, add, a.at(m0, k0), block, c, true);
            if (kk > even) add_column(a, m0, mm, k0 + even, block + even * NB, nn, c, ld, even || add);
          }
      }
      out.finish(top, bottom - top, left, right - left, ld, sums);
    }
    at::native::cpublas::brgemm_release(true);
  });
}

// A lies in columns: B is packed once, a task packs a block of A's rows and takes it through all of B.
void by_rows(const Operand& a, const Operand& b, const Result& out, bool accumulate) {
  const int64_t M = a.rows, N = b.columns, K = a.columns, wide = blocks(N, NB), deep = blocks(K, KB);
  constexpr int64_t HEIGHT = MB / 2;
  const int64_t ld = out.narrow ? N : out.stride;
  std::vector<BFloat16> all_of_b(deep * wide * KB * NB);
  at::parallel_for(0, deep * wide, 1, [&](int64_t first, int64_t last) {
    for (int64_t part = first; part < last; ++part) {
      const int64_t k0 = part / wide * KB, n0 = part % wide * NB;
      pack_b(b, k0, std::min(KB, K - k0), n0, std::min(NB, N - n0), all_of_b.data() + part * KB * NB);
    }
  });
  at::parallel_for(0, blocks(M, HEIGHT), 1, [&](int64_t first, int64_t last) {
    std::vector<BFloat16> packed(HEIGHT * KB);
    std::vector<float> own(out.narrow ? HEIGHT * N : 0);
    for (int64_t task = first; task < last; ++task) {
      const int64_t m0 = task * HEIGHT, mm = std::min(HEIGHT, M - m0);
      float* sums = out.sums(m0, 0, own);
      for (int64_t k = 0; k < deep; ++k) {
        const int64_t kk = std::min(KB, K - k * KB), even = blocks(kk, 2) * 2;
        pack_a(a, m0, mm, k * KB, kk, even, packed.data());
        for (int64_t n = 0; n < wide; ++n)
          at::native::cpublas::brgemm(mm, std::min(NB, N - n * NB), even, even, NB, ld, accumulate || k > 0,
                                      packed.data(), all_of_b.data() + (k * wide + n) * KB * NB, sums + n * NB, true);
      }
      out.finish(m0, mm, 0, N, ld, sums);
    }
    at::native::cpublas::brgemm_release(true);
  });
}

#endif

// out = A B or, accumulating, out += A B.
void mm_bf16(const Tensor& a, const Tensor& b, const Tensor& out, bool accumulate) {
  TORCH_CHECK_VALUE(has_bf16_products(), "mm_bf16: expected a processor with bfloat16 instructions");
  TORCH_CHECK_VALUE(a.dim() == 2 && b.dim() == 2 && out.dim() == 2 && a.size(1) == b.size(0) &&
                        out.size(0) == a.size(0) && out.size(1) == b.size(1),
                    "mm_bf16: expected [M, K], [K, N] and [M, N], got ", a.sizes(), ", ", b.sizes(), " and ",
                    out.sizes());
  const bool narrow = out.scalar_type() == at::kBFloat16 && !accumulate;  // or it would be rounded more than once
  TORCH_CHECK_VALUE(a.scalar_type() == at::kBFloat16 && b.scalar_type() == at::kBFloat16 &&
                        (narrow || out.scalar_type() == at::kFloat),
                    "mm_bf16: expected bfloat16 operands and a float32 result (or bfloat16, not accumulated), got ",
                    a.scalar_type(), ", ", b.scalar_type(), " and ", out.scalar_type());
  TORCH_CHECK_VALUE((out.stride(1) == 1 || out.size(1) == 1) && (out.stride(0) >= out.size(1) || out.size(0) == 1),
                    "mm_bf16: expected a result of unit stride along N and rows that don't overlap, got strides ",
                    out.strides());
  if (out.numel() == 0) return;
  if (a.size(1) == 0) {
    if (!accumulate) out.zero_();
    return;
  }
#ifdef RGPB_BRGEMM
  const Operand left(a, "a"), right(b, "b");
  const Result result{narrow ? nullptr : static_cast<float*>(out.data_ptr()),
                      narrow ? static_cast<BFloat16*>(out.data_ptr()) : nullptr, out.stride(0)};
  (left.by_rows ? by_columns : by_rows)(left, right, result, accumulate);
#endif
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(rgpb, m) {
  m.def("has_bf16_products() -> bool", has_bf16_products);
  m.def("mm_bf16(Tensor a, Tensor b, Tensor(a!) out, bool accumulate) -> ()");
}

TORCH_LIBRARY_IMPL(rgpb, CPU, m) { m.impl("mm_bf16", mm_bf16); }

}  // namespace rgpb
