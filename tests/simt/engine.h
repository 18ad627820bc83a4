// What a test asks of the emulator.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <set>
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
// How often warps execute a memory instruction, and its width.
struct Executed {
  uint64_t n;
  size_t bytes;
};
// Of the launches of a kernel: its symbol, their warps, threads and dynamic shared memory of a block, the most blocks
// of a launch. With `trace`, while accesses are counted, also how often warps execute each memory instruction, by its
// place in the library: between two meetings of a warp's lanes as often as the lane that executes it most; and by array
// the bytes that the last launch touches.
struct Count {
  std::string symbol;
  uint64_t warps;
  unsigned threads;
  size_t shared_bytes;
  unsigned blocks;
  std::map<ptrdiff_t, Executed> instructions;
  std::map<std::string, uint64_t> touched;
};
void count_accesses(bool on);
// By kernel, since the last call of this.
std::map<std::string, Count> take_counts();
// Why the call failed; empty if it did not.
std::string failure();

// File and line of the barriers that some thread has reached since the last call of this; and one to be left out.
std::set<std::pair<std::string, int>> take_barriers();
void skip_barrier(const std::string& file, int line);

}  // namespace simt

// Launches are written down from now on instead of being made, or made again; and the names of the kernels since then,
// each on a line. For bench/dispatch.py.
extern "C" void simt_record(bool on);
extern "C" const char* simt_recorded();
