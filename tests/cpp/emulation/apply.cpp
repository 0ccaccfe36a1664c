// The apply kernels of one rule (FUSEDOPT_RULE), compiled for the CPU.
#include "cuda/apply.cu"
