// Case files: named arrays; write_cases.py describes the format.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <fstream>
#include <map>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace native_test {

struct Array {
  std::string dtype;
  std::vector<int64_t> shape;
  std::vector<char> bytes;

  int64_t size() const {
    int64_t n = 1;
    for (int64_t axis : shape) n *= axis;
    return n;
  }
  int64_t item_bytes() const { return dtype == "int32" ? 4 : 8; }
};

template <typename T, typename Stored>
std::vector<T> converted(const Array& array) {
  std::vector<T> result(array.size());
  for (int64_t k = 0; k < array.size(); ++k) {
    Stored value;
    std::memcpy(&value, array.bytes.data() + k * sizeof value, sizeof value);
    result[k] = static_cast<T>(value);
  }
  return result;
}

// The numbers as T, in a vector of exactly their size: reading past its end is seen by AddressSanitizer.
template <typename T>
std::vector<T> numbers(const Array& array) {
  if (array.dtype == "int32") return converted<T, int32_t>(array);
  if (array.dtype == "int64") return converted<T, int64_t>(array);
  if (array.dtype == "float64") return converted<T, double>(array);
  throw std::runtime_error("unknown dtype " + array.dtype);
}

class Case {
 public:
  explicit Case(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    for (std::string line; std::getline(file, line);) {
      std::istringstream words(line);
      std::string name;
      Array array;
      words >> name >> array.dtype;
      for (int64_t axis; words >> axis;) array.shape.push_back(axis);
      array.bytes.resize(array.size() * array.item_bytes());
      if (!file.read(array.bytes.data(), array.bytes.size())) throw std::runtime_error(path + ": too short");
      arrays_[name] = array;
    }
    if (arrays_.empty()) throw std::runtime_error(path + ": no arrays");
  }

  bool has(const std::string& name) const { return arrays_.count(name); }
  const Array& operator[](const std::string& name) const { return arrays_.at(name); }

 private:
  std::map<std::string, Array> arrays_;
};

}  // namespace native_test
