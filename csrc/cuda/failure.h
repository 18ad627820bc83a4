// Errors of the CUDA runtime, by what failed.
#pragma once

#include "compat.cuh"
#include "library.h"

namespace implicit_steer {

inline Failure failure(const char* what, cudaError_t error) {
  if (error == cudaSuccess) return {what, nullptr};
  cudaGetLastError();  // or the next launch would report it, too
  return {what, cudaGetErrorString(error)};
}

#define IST_TRY(expression) \
  if (const Failure failed = expression; failed.reason) return failed

}  // namespace implicit_steer
