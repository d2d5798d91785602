// The row kernels as plain functions of one row: the seam between the torch operators (ops.cpp) and the code that is
// compiled once for each instruction set (rows.inl). No header of torch or of the standard library's templates comes
// in here: an inline function compiled for AVX-512 must never be the copy that the linker keeps for all.
//
// Dimensions: V vocabulary (or a slice of it), T tiles of it.
#pragma once

#include <stdint.h>

namespace rgpb {

// What follows the bare product W x: z <- cap tanh(scale (z + b) / cap).
struct Epilogue {
  const void* bias;  // [V] in the accumulators' type, or null
  double softcap;    // 0: none
  double scale;
};

// What a sweep finds of a row: the target's logit; of the others logsumexp, entropy, the largest one, and
// total = sum exp(z - top).
struct Found {
  double z_y, lse_other, h_o, total, top;
};

// Upstream gradients of (z_y, lse_other, H_o), and what they are taken at.
struct Upstream {
  double g_zy, g_lo, g_ho, lse_other, h_o;
};

enum Loss { NLL, UNLIKELIHOOD, BNF };

// Coefficient and reference of one token's loss.
struct Term {
  Loss loss;
  double weight, ref_logp, ref_lam;
};

// z: the row's raw products. y: its target; negative where it lies in another slice of the vocabulary (z_y is 0 then).
// Types of (z, out): float64, float32, bfloat16 alike, or float32 in and bfloat16 out over the same bytes.
struct Kernels {
  // Statistics; where asked for, the softmax mass of each `tile` columns into mass [T], and J exp(z - top) into out
  // (null: nothing is written), 0 at the target.
  Found (*statistics)(const void* z, void* out, int64_t V, int64_t y, const Epilogue& e, bool entropy, int64_t tile,
                      void* mass);
  // dlogits times J into out.
  void (*gradient)(const void* z, void* out, int64_t V, int64_t y, const Epilogue& e, const Upstream& g, bool entropy);
  // Statistics, the loss of a token into value, and its dlogits times J into out.
  Found (*token_loss)(void* z, void* out, int64_t V, int64_t y, const Epilogue& e, bool entropy, const Term& term,
                      double* value);
};

enum Types { F64, F32, BF16, F32_TO_BF16, TYPES };

// Tables by `Types`, one for each instruction set.
namespace baseline {
const Kernels* kernels();
}
namespace avx2 {
const Kernels* kernels();
}
namespace avx512 {
const Kernels* kernels();
}

}  // namespace rgpb
