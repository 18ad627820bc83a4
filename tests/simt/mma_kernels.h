// Products of one warp, for mma_test.
#pragma once

namespace simt_test {

enum class Rounding { kTf32, k3xTf32 };
// d [16, 8] += a [16, 8] b [8, 8], by rows; lane `missing` takes no part.
void multiply(Rounding rounding, const float* a, const float* b, float* d, int missing);

}  // namespace simt_test
