// What a test asks of the emulator.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <utility>
#include <vector>

namespace simt {

// What the runtime says of its device from now on; at first the first one of kDevices.
struct Device {
  const char* name;
  int multiprocessors, block_bytes, bytes;  // shared memory, of a block and of a multiprocessor
};
// On one multiprocessor warps go through several tiles of edges, on several there are several blocks.
constexpr Device kDevices[] = {{"1 x 227 KB", 1, 227 << 10, 228 << 10}, {"3 x 99 KB", 3, 99 << 10, 100 << 10}};
void use_device(const Device& device);
// Before a call: forget failures and arrays; seed 0: threads and blocks in order, else in some other one.
void reset(uint64_t seed, bool trace);
// With `trace`: an array that kernels may read, and write if so. All others are out of bounds.
void add_array(const void* begin, size_t bytes, const char* name, bool writable);
// Of the launches of a kernel: with `trace` the memory instructions of all warps, where between two barriers a warp
// takes as many as the lane that has most; threads and dynamic shared memory of a block; the most blocks of a launch.
struct Count {
  uint64_t instructions;
  unsigned threads;
  size_t shared_bytes;
  unsigned blocks;
};
// By kernel, since the last call of this.
std::map<std::string, Count> take_counts();
// Why the call failed; empty if it did not.
std::string failure();

// Barriers that some thread has reached, and one to be left out.
std::vector<std::pair<std::string, int>> barriers();
void skip_barrier(const std::string& file, int line);

}  // namespace simt

// Launches are written down from now on instead of being made, or made again; and the names of the kernels since then,
// each on a line. For bench/dispatch.py.
extern "C" void simt_record(bool on);
extern "C" const char* simt_recorded();
