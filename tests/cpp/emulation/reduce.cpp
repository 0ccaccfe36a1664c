// The reduce kernel, compiled for the CPU.
#include "cuda/reduce.cu"
