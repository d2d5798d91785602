// The row kernels as torch operators: shapes and types are checked here, rows are shared out among torch's threads, and
// the instruction set is chosen from what the processor has. Every result goes into a tensor that the caller gives.
//
// Dimensions: C rows of the buffer, V vocabulary (or a slice of it), T tiles of it.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>
#include <torch/version.h>

#include <cmath>
#include <optional>
#include <string>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "rows.h"

namespace rgpb {
namespace {

using at::Tensor;
using Maybe = std::optional<Tensor>;

struct InstructionSet {
  std::string name;
  const Kernels* table;
};

// What was compiled and this processor runs, best first.
const std::vector<InstructionSet>& instruction_sets() {
  static const std::vector<InstructionSet> found = [] {
    std::vector<InstructionSet> sets;
#ifdef RGPB_X86
    __builtin_cpu_init();
    const bool fma = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (fma && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
      sets.push_back({"avx512", avx512::kernels()});
    if (fma) sets.push_back({"avx2", avx2::kernels()});
#endif
    sets.push_back({"baseline", baseline::kernels()});
    return sets;
  }();
  return found;
}

const InstructionSet*& chosen() {
  static const InstructionSet* set = &instruction_sets().front();
  return set;
}

// The names of the instruction sets that can run here, best first.
std::vector<std::string> available() {
  std::vector<std::string> names;
  for (const auto& set : instruction_sets()) names.push_back(set.name);
  return names;
}

// Take the instruction set of that name; "" changes nothing. Returns the one taken before.
std::string use(std::string name) {
  const std::string before = chosen()->name;
  if (name.empty()) return before;
  for (const auto& set : instruction_sets())
    if (set.name == name) {
      chosen() = &set;
      return before;
    }
  TORCH_CHECK_VALUE(false, "name: expected an instruction set of this processor, got '", name, "'");
}

std::string built_for() { return TORCH_VERSION; }

// Of the sources that this was built from.
std::string tag() { return RGPB_TAG; }

// Ask the system to back a large fresh buffer with huge pages: the first touch of 4 KiB pages costs as much as a fifth
// of a product over the same bytes. Where there are none, nothing happens.
void huge_pages(const Tensor& x) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t PAGE = uintptr_t{1} << 21;
  if (!x.device().is_cpu() || !x.is_contiguous()) return;
  const auto first = reinterpret_cast<uintptr_t>(x.data_ptr()), last = first + x.nbytes();
  const auto start = (first + PAGE - 1) / PAGE * PAGE, stop = last / PAGE * PAGE;
  if (start < stop) madvise(reinterpret_cast<void*>(start), stop - start, MADV_HUGEPAGE);
#else
  (void)x;
#endif
}

// -- checks -----------------------------------------------------------------------------------------------------------

// Both types in one table entry; z alone: out is of the same type.
Types types_of(const Tensor& z, const Tensor& out) {
  const auto from = z.scalar_type(), to = out.scalar_type();
  if (from == at::kDouble && to == at::kDouble) return F64;
  if (from == at::kFloat && to == at::kFloat) return F32;
  if (from == at::kBFloat16 && to == at::kBFloat16) return BF16;
  TORCH_CHECK_VALUE(from == at::kFloat && to == at::kBFloat16,
                    "z: expected float64, float32 or bfloat16, and out of the same type or bfloat16 for float32, got ",
                    from, " and ", to);
  return F32_TO_BF16;
}

at::ScalarType accumulators(const Tensor& z) { return z.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }

void check_rows(const Tensor& x, const char* name, const Tensor& like) {
  TORCH_CHECK_VALUE(x.dim() == 2 && x.sizes() == like.sizes() && x.size(1) >= 1 &&
                        (x.size(1) == 1 || x.stride(1) == 1) && x.device().is_cpu(),
                    name, ": expected a CPU tensor [C, V >= 1] like z, of unit stride along V, got ", x.sizes(), " ",
                    x.strides());
}

// A dense vector of `size` elements of that type; a null pointer for none.
template <class P = void>
P* vector(const Maybe& x, const char* name, int64_t size, at::ScalarType type) {
  if (!x.has_value()) return nullptr;
  TORCH_CHECK_VALUE(x->dim() == 1 && x->size(0) == size && x->scalar_type() == type && x->is_contiguous() &&
                        x->device().is_cpu(),
                    name, ": expected a dense CPU vector of ", size, " ", type, ", got ", x->sizes(), " ",
                    x->scalar_type());
  return static_cast<P*>(x->data_ptr());
}

// The targets, each below V.
const int64_t* targets(const Tensor& target, const Tensor& z) {
  const auto* y = vector<const int64_t>(target, "target", z.size(0), at::kLong);
  for (int64_t row = 0; row < z.size(0); ++row)
    TORCH_CHECK_VALUE(y[row] < z.size(1), "target: expected columns below ", z.size(1), ", got ", y[row], " in row ",
                      row);
  return y;
}

Epilogue epilogue(const Tensor& z, const Maybe& bias, std::optional<double> softcap, double scale) {
  return {vector<const void>(bias, "bias", z.size(1), accumulators(z)), softcap.value_or(0.0), scale};
}

// Reads and writes numbers of a row in the accumulators' type.
struct Column {
  void* data;
  bool wide;
  double operator[](int64_t row) const {
    if (!data) return 0;
    return wide ? static_cast<double*>(data)[row] : static_cast<double>(static_cast<float*>(data)[row]);
  }
  void set(int64_t row, double x) const {
    if (!data) return;
    if (wide)
      static_cast<double*>(data)[row] = x;
    else
      static_cast<float*>(data)[row] = static_cast<float>(x);
  }
};

Column column(const Maybe& x, const char* name, const Tensor& z) {
  return {vector<void>(x, name, z.size(0), accumulators(z)), z.scalar_type() == at::kDouble};
}

char* start_of(const Tensor& x, int64_t row) {
  return static_cast<char*>(x.data_ptr()) + row * x.stride(0) * static_cast<int64_t>(x.element_size());
}

template <class F>
void each_row(const Tensor& z, F f) {
  at::parallel_for(0, z.size(0), 1, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) f(row);
  });
}

// -- operators --------------------------------------------------------------------------------------------------------

// z_y, lse_other and, where given, h_o, masses [C, T] of `tile` columns each, weights J exp(z - top) with their sum in
// `total`. A negative target lies in another slice of the vocabulary: z_y is 0.
void row_statistics(const Tensor& z, const Tensor& target, const Maybe& bias, std::optional<double> softcap,
                    double scale, const Tensor& z_y, const Tensor& lse_other, const Maybe& h_o, const Maybe& masses,
                    int64_t tile, const Maybe& weights, const Maybe& total) {
  check_rows(z, "z", z);
  if (weights) check_rows(*weights, "weights", z);
  const auto& kernels = chosen()->table[types_of(z, weights ? *weights : z)];
  const auto* y = targets(target, z);
  const auto e = epilogue(z, bias, softcap, scale);
  const auto zy = column(z_y, "z_y", z), lo = column(lse_other, "lse_other", z), ho = column(h_o, "h_o", z);
  const auto sum = column(total, "total", z);
  if (masses)
    TORCH_CHECK_VALUE(tile > 0 && masses->dim() == 2 && masses->size(0) == z.size(0) &&
                          masses->size(1) == (z.size(1) - 1) / tile + 1 &&
                          masses->scalar_type() == accumulators(z) && masses->is_contiguous(),
                      "masses: expected a dense [C, ceil(V / tile)] in the type of z_y, got ", masses->sizes(),
                      " with tile=", tile);
  each_row(z, [&](int64_t row) {
    void* mass = masses ? start_of(*masses, row) : nullptr;
    void* out = weights ? start_of(*weights, row) : nullptr;
    const Found found = kernels.statistics(start_of(z, row), out, z.size(1), y[row], e, h_o.has_value(), tile, mass);
    zy.set(row, found.z_y);
    lo.set(row, found.lse_other);
    ho.set(row, found.h_o);
    sum.set(row, found.total);
  });
}

// One slice of the vocabulary into `running` [C, 4], float64: the largest other logit so far, total = sum exp(z - it),
// sum e (h - log e) over the slices' totals e and entropies h, and the target's logit. A negative target lies elsewhere.
void row_slice(const Tensor& z, const Tensor& target, const Maybe& bias, std::optional<double> softcap, double scale,
               bool entropy, const Tensor& running) {
  check_rows(z, "z", z);
  TORCH_CHECK_VALUE(running.dim() == 2 && running.size(0) == z.size(0) && running.size(1) == 4 &&
                        running.scalar_type() == at::kDouble && running.is_contiguous() && running.device().is_cpu(),
                    "running: expected a dense float64 CPU tensor [C, 4], got ", running.sizes(), " ",
                    running.scalar_type());
  const auto& kernels = chosen()->table[types_of(z, z)];
  const auto* y = targets(target, z);
  const auto e = epilogue(z, bias, softcap, scale);
  auto* state = static_cast<double*>(running.data_ptr());
  each_row(z, [&](int64_t row) {
    const Found found = kernels.statistics(start_of(z, row), nullptr, z.size(1), y[row], e, entropy, 0, nullptr);
    double* const of = state + 4 * row;
    double &top = of[0], &total = of[1], &mixed = of[2];
    of[3] += found.z_y;
    if (found.total == 0) return;  // nothing is possible in this slice; NaN goes on
    const double higher = found.top > top ? found.top : top, rise = higher - top;
    if (total != 0) {
      mixed = std::exp(-rise) * (mixed + rise * total);
      total *= std::exp(-rise);
    }
    const double here = found.total * std::exp(found.top - higher);
    if (entropy && here > 0) mixed += here * (found.h_o - std::log(here));
    total += here;
    top = higher;
  });
}

// dlogits into `out`, which may lie over z's own bytes; a negative target lies in another slice of the vocabulary.
void row_gradients(const Tensor& z, const Tensor& target, const Maybe& bias, std::optional<double> softcap,
                   double scale, const Tensor& lse_other, const Maybe& h_o, const Tensor& g_zy, const Tensor& g_lo,
                   const Maybe& g_ho, const Tensor& out) {
  check_rows(z, "z", z);
  check_rows(out, "out", z);
  TORCH_CHECK_VALUE(!g_ho || h_o, "h_o: expected the entropies where g_ho is given, got None");
  const auto& kernels = chosen()->table[types_of(z, out)];
  const auto* y = targets(target, z);
  const auto e = epilogue(z, bias, softcap, scale);
  const auto lo = column(lse_other, "lse_other", z), ho = column(h_o, "h_o", z), zy = column(g_zy, "g_zy", z);
  const auto glo = column(g_lo, "g_lo", z), gho = column(g_ho, "g_ho", z);
  each_row(z, [&](int64_t row) {
    const Upstream g{zy[row], glo[row], gho[row], lo[row], ho[row]};
    kernels.gradient(start_of(z, row), start_of(out, row), z.size(1), y[row], e, g, g_ho.has_value());
  });
}

Loss loss_of(const std::string& name) {
  if (name == "nll") return NLL;
  if (name == "unlikelihood") return UNLIKELIHOOD;
  TORCH_CHECK_VALUE(name == "bnf", "loss: expected nll, unlikelihood or bnf, got '", name, "'");
  return BNF;
}

// Statistics, loss and dlogits of a token-wise loss; z is written over. Rows with a negative target are ignored: zeros.
void row_token_loss(const Tensor& z, const Tensor& target, const Maybe& bias, std::optional<double> softcap,
                    double scale, const std::string& loss, const Tensor& weight, const Maybe& ref_logp,
                    const Maybe& ref_lam, const Tensor& z_y, const Tensor& lse_other, const Maybe& h_o,
                    const Tensor& value, const Tensor& out) {
  check_rows(z, "z", z);
  check_rows(out, "out", z);
  const auto& kernels = chosen()->table[types_of(z, out)];
  TORCH_CHECK_VALUE(kernels.token_loss, "z: expected float64 or float32, got ", z.scalar_type());
  const auto name = loss_of(loss);
  TORCH_CHECK_VALUE(name != BNF || (ref_logp && ref_lam && h_o), "loss: bnf needs ref_logp, ref_lam and h_o");
  const auto* y = targets(target, z);
  const auto e = epilogue(z, bias, softcap, scale);
  const auto w = column(weight, "weight", z), rp = column(ref_logp, "ref_logp", z), rl = column(ref_lam, "ref_lam", z);
  const auto zy = column(z_y, "z_y", z), lo = column(lse_other, "lse_other", z), ho = column(h_o, "h_o", z);
  const auto of = column(value, "value", z);
  each_row(z, [&](int64_t row) {
    Found found{0, 0, 0, 0, 0};
    double made = 0;
    char* d = start_of(out, row);
    if (y[row] >= 0) {
      const Term term{name, w[row], rp[row], rl[row]};
      found = kernels.token_loss(start_of(z, row), d, z.size(1), y[row], e, h_o.has_value(), term, &made);
    } else {
      __builtin_memset(d, 0, static_cast<size_t>(out.size(1)) * out.element_size());
    }
    zy.set(row, found.z_y);
    lo.set(row, found.lse_other);
    ho.set(row, found.h_o);
    of.set(row, made);
  });
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(rgpb, m) {
  m.def("cpp_built_for() -> str", built_for);
  m.def("cpp_tag() -> str", tag);
  m.def("cpp_available() -> str[]", available);
  m.def("cpp_use(str name) -> str", use);
  m.def("huge_pages(Tensor x) -> ()", huge_pages);
  m.def(
      "row_statistics(Tensor z, Tensor target, Tensor? bias, float? softcap, float scale, Tensor(a!) z_y, "
      "Tensor(b!) lse_other, Tensor(c!)? h_o, Tensor(d!)? masses, int tile, Tensor(e!)? weights, Tensor(f!)? total) "
      "-> ()");
  m.def(
      "row_slice(Tensor z, Tensor target, Tensor? bias, float? softcap, float scale, bool entropy, "
      "Tensor(a!) running) -> ()");
  m.def(
      "row_gradients(Tensor z, Tensor target, Tensor? bias, float? softcap, float scale, Tensor lse_other, "
      "Tensor? h_o, Tensor g_zy, Tensor g_lo, Tensor? g_ho, Tensor(a!) out) -> ()");
  m.def(
      "row_token_loss(Tensor(a!) z, Tensor target, Tensor? bias, float? softcap, float scale, str loss, "
      "Tensor weight, Tensor? ref_logp, Tensor? ref_lam, Tensor(b!) z_y, Tensor(c!) lse_other, Tensor(d!)? h_o, "
      "Tensor(e!) value, Tensor(f!) out) -> ()");
}

TORCH_LIBRARY_IMPL(rgpb, CPU, m) {
  m.impl("row_statistics", row_statistics);
  m.impl("row_slice", row_slice);
  m.impl("row_gradients", row_gradients);
  m.impl("row_token_loss", row_token_loss);
}

}  // namespace rgpb
