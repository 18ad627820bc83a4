"""Native code, C++ and CUDA: `cpu` and `cuda` share the plan's arrays, the packing of parameters and autograd."""
