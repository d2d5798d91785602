#define RGPB_ISA avx512
#define RGPB_BYTES 64
#include "rows.inl"
