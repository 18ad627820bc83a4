// Between engine.cpp and trace.cpp.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>

namespace simt {

// Who runs, and between which barriers: block and thread count from 1.
struct Moment {
  uint32_t block, thread, warp, block_epoch, warp_epoch;
};
Moment now();

void count_access(const void* instruction, size_t bytes);  // of the thread that runs
std::map<std::string, uint64_t> touched_bytes();           // of the launch, by array

void trace_reset(bool on);
void trace_fence();                      // by the thread that runs
const void* traced_instruction();        // of the last access; null without trace
void trace_launch(const void* context);  // the launch's arguments lie around it
void trace_block(size_t dynamic_bytes);
void trace_ignore(uintptr_t begin, uintptr_t end);
void trace_shared(const void* begin, size_t bytes, const void* dynamic, size_t dynamic_capacity);

}  // namespace simt
