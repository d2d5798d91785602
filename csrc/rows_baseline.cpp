#define RGPB_ISA baseline
#define RGPB_BYTES 16
#include "rows.inl"
