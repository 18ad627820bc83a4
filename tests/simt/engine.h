// What a test asks of the emulator.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace simt {

// Before a call: forget failures and arrays; seed 0: threads and blocks in order, else in some other one.
void reset(uint64_t seed, bool trace);
// With `trace`: an array that kernels may read, and write if so. All others are out of bounds.
void add_array(const void* begin, size_t bytes, const char* name, bool writable);
// Why the call failed; empty if it did not.
std::string failure();

// Barriers that some thread has reached, and one to be left out.
std::vector<std::pair<std::string, int>> barriers();
void skip_barrier(const std::string& file, int line);

}  // namespace simt
