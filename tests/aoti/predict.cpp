// predict PACKAGE OPERATORS < STRUCTURE: energy (eV), energies of atoms, forces (eV/Å) and virial (eV) of a structure
// by a potential that implicit_steer.deploy.package wrote; OPERATORS is _ops.so. A structure is numbers with white
// space between them: atoms, edges; atomic numbers; positions; three lattice vectors; sources; targets; shifts.
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/torch.h>

#include <cstdint>
#include <cstdio>
#include <exception>
#include <iostream>
#include <stdexcept>
#include <vector>

namespace {

torch::Tensor read(std::vector<int64_t> shape, torch::ScalarType type) {
  const auto found = torch::empty(shape, torch::kFloat64);
  for (int64_t n = 0; n < found.numel(); ++n)
    if (!(std::cin >> found.data_ptr<double>()[n])) throw std::runtime_error("the structure ends too early");
  return found.to(type);
}

void predict(const char* package, const char* operators) {
  if (!dlopen(operators, RTLD_NOW | RTLD_GLOBAL)) throw std::runtime_error(dlerror());
  torch::inductor::AOTIModelPackageLoader model(package);
  int64_t atoms = 0, edges = 0;
  std::cin >> atoms >> edges;
  const auto numbers = read({atoms}, torch::kInt64);
  const auto pos = read({atoms, 3}, torch::kFloat64), cell = read({3, 3}, torch::kFloat64);
  const auto edge_index = read({2, edges}, torch::kInt64), shift = read({edges, 3}, torch::kFloat64);
  std::vector<torch::Tensor> inputs{numbers, pos, cell, edge_index, shift};
  for (const auto& found : model.run(inputs)) {
    const auto flat = found.to(torch::kFloat64).contiguous();
    for (int64_t n = 0; n < flat.numel(); ++n) std::printf("%.17g ", flat.data_ptr<double>()[n]);
    std::printf("\n");
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) {
    std::fprintf(stderr, "predict PACKAGE OPERATORS < STRUCTURE\n");
    return 2;
  }
  try {
    predict(argv[1], argv[2]);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
