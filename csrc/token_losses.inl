// The token-wise losses in C++: included by rows.inl, once for each instruction set.

// Value and slope in lambda of weight times the loss of one token; a rejected token has a negative weight. The formulas
// are those of `rgpb.objectives`; bnf: f = min(p / p_ref, 1), c = min(1, exp(lambda - lambda_ref)).
struct Sloped {
  double value, slope;
};
INLINE Sloped token_term(double lam, double h_o, const Term& term) {
  const double w = term.weight;
  if (w == 0) return {0, 0};
  const double e = __builtin_exp(-__builtin_fabs(lam)), log_1p = __builtin_log1p(e);
  const double log_p = (lam < 0 ? lam : 0) - log_1p, log_not_p = (lam > 0 ? -lam : 0) - log_1p;
  const double p = (lam >= 0 ? 1 : e) / (1 + e), not_p = (lam >= 0 ? e : 1) / (1 + e);
  if (term.loss == UNLIKELIHOOD && w < 0) return {w * log_not_p, -w * p};
  if (term.loss != BNF) return {-w * log_p, -w * not_p};
  const double c = lam >= term.ref_lam ? 1 : __builtin_exp(lam - term.ref_lam);
  const double x = log_p < term.ref_logp ? log_p - term.ref_logp : 0;
  const double f_others = -__builtin_expm1(x);
  const double others = f_others > 0 ? f_others * (log_not_p - h_o) : 0;
  const double own = f_others < 1 ? (1 - f_others) * log_p : 0;
  return {-w * (own + others), -w * c * not_p};
}
