// csrc/cuda/mma.cuh in the emulator: where the elements of a product are, how it is rounded, and that a lane which does
// not take part is noticed.

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>
#include <string>
#include <vector>

#include "engine.h"
#include "mma_kernels.h"

namespace {

using simt_test::Rounding;
constexpr int kM = 16, kN = 8, kK = 8, kNobody = 32;

struct Product {
  std::vector<float> a = std::vector<float>(kM * kK), b = std::vector<float>(kK * kN), d = std::vector<float>(kM * kN);

  // d + a b in double
  std::vector<double> expected() const {
    std::vector<double> sums(d.begin(), d.end());
    for (int m = 0; m < kM; ++m)
      for (int n = 0; n < kN; ++n)
        for (int k = 0; k < kK; ++k) sums[m * kN + n] += static_cast<double>(a[m * kK + k]) * b[k * kN + n];
    return sums;
  }
  // As the kernel leaves d; `failure`: why it failed.
  std::vector<float> run(Rounding rounding, int missing, std::string& failure) const {
    std::vector<float> result(d);
    simt::reset(1, true);
    simt::add_array(a.data(), a.size() * 4, "a", false);
    simt::add_array(b.data(), b.size() * 4, "b", false);
    simt::add_array(result.data(), result.size() * 4, "d", true);
    simt_test::multiply(rounding, a.data(), b.data(), result.data(), missing);
    failure = simt::failure();
    return result;
  }
};

// ‖actual − expected‖ / ‖expected‖
double deviation(const Product& product, Rounding rounding) {
  std::string failure;
  const std::vector<float> actual = product.run(rounding, kNobody, failure);
  if (!failure.empty()) return std::printf("%s\n", failure.c_str()), std::numeric_limits<double>::infinity();
  double error = 0, size = 0;
  const std::vector<double> expected = product.expected();
  for (int k = 0; k < kM * kN; ++k) error += std::pow(actual[k] - expected[k], 2), size += std::pow(expected[k], 2);
  return std::sqrt(error / size);
}

int check(bool holds, const char* what) {
  if (!holds) std::printf("FAILED %s\n", what);
  return !holds;
}

// TF32 holds these integers, no two products of rows and columns are equal, and every sum is exact.
int check_layout() {
  Product product;
  for (int k = 0; k < kM * kK; ++k) product.a[k] = static_cast<float>(k * k % 251 - 125);
  for (int k = 0; k < kK * kN; ++k) product.b[k] = static_cast<float>(k * 37 % 127 - 63);
  for (int k = 0; k < kM * kN; ++k) product.d[k] = static_cast<float>(k);
  return check(deviation(product, Rounding::kTf32) == 0, "layout of TF32") +
         check(deviation(product, Rounding::k3xTf32) == 0, "layout of 3xTF32");
}

int check_accuracy() {
  Product product;
  uint64_t state = 1;
  const auto random = [&] {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return static_cast<float>(static_cast<double>(state >> 11) / (uint64_t{1} << 52) - 1);
  };
  for (auto* matrix : {&product.a, &product.b, &product.d}) std::generate(matrix->begin(), matrix->end(), random);
  const double one = deviation(product, Rounding::kTf32), three = deviation(product, Rounding::k3xTf32);
  std::printf("relative error of TF32 %.2g, of 3xTF32 %.2g\n", one, three);
  return check(one >= 1e-4 && one <= 1e-3, "rounding of TF32: expected 1e-4 to 1e-3") +
         check(three <= 2e-6, "rounding of 3xTF32: expected at most 2e-6");
}

int check_missing_lane() {
  int failures = 0;
  for (const Rounding rounding : {Rounding::kTf32, Rounding::k3xTf32}) {
    std::string failure;
    Product().run(rounding, 5, failure);
    std::printf("without lane 5: %s\n", failure.c_str());
    failures += check(!failure.empty(), "a lane that takes no part: nothing noticed");
  }
  return failures;
}

}  // namespace

int main() {
  const int failures = check_layout() + check_accuracy() + check_missing_lane();
  std::printf("mma: %d failures\n", failures);
  return failures > 0;
}
