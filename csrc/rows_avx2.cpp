#define RGPB_ISA avx2
#define RGPB_BYTES 32
#include "rows.inl"
