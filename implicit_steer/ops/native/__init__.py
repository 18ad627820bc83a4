"""Native code: C++ for processors, CUDA for GPUs, behind the same operators."""
