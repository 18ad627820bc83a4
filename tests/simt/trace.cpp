// Every access of a kernel compiled with -fsanitize=thread: its bounds, its alignment, and whether it races.
//
// Two accesses to one word, one of them a write, race when nothing orders them: two blocks in one launch; two threads
// of a block without a block barrier between, nor, in one warp, a barrier of the whole warp. That does not depend on
// the order in which the emulator happens to run them. Atomic accesses are taken as ordered. What a warp wrote before
// one of its threads went on to a fence and an atomic access of a word is ordered before what another warp reads behind
// an atomic access of that word and a fence.

#include "trace.h"

#include <algorithm>
#include <map>
#include <string>
#include <vector>

#include "engine.h"
#include "simt.h"

namespace simt {

namespace {

// One 4-byte word: the last write, and the readers since the last barrier.
struct Word {
  uint32_t block;                                                // that touched it in this launch, from 1; 0: none
  uint32_t writer, write_epoch, write_warp_epoch, write_fences;  // fences: of all threads, before the write
  uint32_t reader, read_epoch, read_warp_epoch;  // a thread from 1; or kLanes of warp `reader_warp`; or kWarps
  uint32_t reader_warp;
  bool foreign_reader;  // another block read it
};
constexpr uint32_t kLanes = ~0u - 1, kWarps = ~0u;

struct Array {
  uintptr_t begin, end;
  std::string name;
  bool writable;
  std::vector<Word> words;
};

struct Range {
  uintptr_t begin, end;
  bool contains(uintptr_t a) const { return begin <= a && a < end; }
};

// A thread that passed a fence, the `number`-th of the launch, at some moment.
struct Fence {
  Moment at;
  uint32_t number;
};
// Fences before atomic accesses of a word, as a thread found them there: they count from its own next fence on.
struct Arrival {
  std::vector<Fence> before;
  Fence own;  // number 0: not yet
};

bool on;
uint32_t n_fences;                                                      // of the launch, as are these
std::map<std::pair<uint32_t, uint32_t>, Fence> last_fence;              // by block and thread
std::map<uintptr_t, std::vector<Fence>> fenced;                         // by the word whose atomic access they precede
std::map<std::pair<uint32_t, uint32_t>, std::vector<Arrival>> arrived;  // by block and warp
std::vector<Array> arrays;
Array shared{0, 0, "shared memory", true, {}};
Range dynamic;
size_t dynamic_now;
std::vector<Range> ignored;
Range arguments;
const void* instruction;  // of the last access

uintptr_t number(const void* p) { return reinterpret_cast<uintptr_t>(p); }

Array& array_of(uintptr_t a, size_t bytes, Access access) {
  if (shared.begin <= a && a < shared.end) {
    if (dynamic.contains(a) && a + bytes > dynamic.begin + dynamic_now)
      fail("shared memory out of bounds: byte %zu of %zu", static_cast<size_t>(a - dynamic.begin), dynamic_now);
    return shared;
  }
  for (Array& array : arrays) {
    if (a < array.begin || a + bytes > array.end) continue;
    if (access != kRead && !array.writable) fail("writes to %s", array.name.c_str());
    return array;
  }
  for (const Array& array : arrays)
    if (a + 65536 >= array.begin && a < array.end + 65536)
      fail("out of bounds: %s of %zu bytes at byte %td of %s, which has %zu", access == kRead ? "read" : "write", bytes,
           static_cast<ptrdiff_t>(a - array.begin), array.name.c_str(), static_cast<size_t>(array.end - array.begin));
  fail("out of bounds: %s of %zu bytes far from all arrays", access == kRead ? "read" : "write", bytes);
}

[[noreturn]] void race(const char* what, const Array& array, const Word& word, const char* with) {
  fail("race: %s word %td of %s, %s", what, &word - array.words.data(), array.name.c_str(), with);
}

// Whether an access at `then` comes before a barrier that orders it before `now`, or is of the same thread.
bool before(const Moment& then, const Moment& now) {
  return then.thread == now.thread || then.block_epoch < now.block_epoch ||
         (then.warp == now.warp && then.block_epoch == now.block_epoch && then.warp_epoch < now.warp_epoch);
}

// Whether fences and an atomic access order the word's last write before a read at `m`.
bool handed_over(const Word& word, const Moment& m) {
  const Moment write{word.block, word.writer, (word.writer - 1) / 32, word.write_epoch, word.write_warp_epoch};
  const auto covers = [&](const Fence& fence) {
    return fence.at.block == write.block && word.write_fences < fence.number && before(write, fence.at);
  };
  const auto found = arrived.find({m.block, m.warp});
  if (found == arrived.end()) return false;
  return std::any_of(found->second.begin(), found->second.end(), [&](const Arrival& a) {
    return a.own.number && before(a.own.at, m) && std::any_of(a.before.begin(), a.before.end(), covers);
  });
}

void count_arrival(uintptr_t address, const Moment& m) {
  auto& there = fenced[address];
  if (!there.empty()) arrived[{m.block, m.warp}].push_back({there, {m, 0}});
  if (const auto own = last_fence.find({m.block, m.thread}); own != last_fence.end()) there.push_back(own->second);
}

void check_blocks(const Array& array, Word& word, Access access, const Moment& m) {
  if (word.block == 0 || word.block == m.block) return;
  if (word.writer && !(access == kRead && handed_over(word, m)))
    race(access == kRead ? "read of" : "write to", array, word, "written by another block");
  if (access == kWrite) race("write to", array, word, "read by another block");
  word = Word{};
  word.foreign_reader = true;
}

// Whether an access of warp `warp` at these epochs comes before a barrier that orders it before `m`.
bool ordered(uint32_t warp, uint32_t block_epoch, uint32_t warp_epoch, const Moment& m) {
  return block_epoch != m.block_epoch || (warp == m.warp && warp_epoch < m.warp_epoch);
}

void check_word(const Array& array, Word& word, Access access, const Moment& m) {
  check_blocks(array, word, access, m);
  word.block = m.block;
  const bool other_writer = word.writer && word.writer != m.thread;
  if (other_writer && !ordered((word.writer - 1) / 32, word.write_epoch, word.write_warp_epoch, m) &&
      !(access == kRead && handed_over(word, m)))
    race(access == kRead ? "read of" : "write to", array, word, "written by another thread without a barrier between");
  const bool readers = word.reader && word.read_epoch == m.block_epoch;
  if (access == kWrite) {
    if (word.foreign_reader) race("write to", array, word, "read by another block");
    const bool only_self = word.reader == m.thread;
    const bool behind = word.reader != kWarps && word.reader_warp == m.warp && word.read_warp_epoch < m.warp_epoch;
    if (readers && !only_self && !behind) race("write to", array, word, "read by others without a barrier between");
    word.writer = m.thread, word.write_epoch = m.block_epoch, word.write_warp_epoch = m.warp_epoch;
    word.write_fences = n_fences;
    return;
  }
  if (!readers) {
    word.reader = m.thread;
  } else if (word.reader == kWarps || word.reader_warp != m.warp) {
    word.reader = kWarps;
  } else if (word.reader != m.thread) {
    word.reader = word.read_warp_epoch == m.warp_epoch ? kLanes : m.thread;
  }
  word.reader_warp = m.warp, word.read_epoch = m.block_epoch, word.read_warp_epoch = m.warp_epoch;
}

}  // namespace

void trace(const void* address, size_t bytes, Access access, const void* new_instruction) {
  if (!on || !self) return;
  instruction = new_instruction;
  const uintptr_t a = number(address);
  if (arguments.contains(a)) return;
  for (const Range& range : ignored)
    if (range.contains(a)) return;
  count_access(instruction, bytes);
  Array& array = array_of(a, bytes, access);
  if (bytes <= 16 && (bytes & (bytes - 1)) == 0 && a % bytes)
    fail("misaligned access of %zu bytes to %s", bytes, array.name.c_str());
  const Moment m = now();
  if (access == kAtomic) return count_arrival(a, m);
  for (size_t k = (a - array.begin) / 4; k <= (a + bytes - 1 - array.begin) / 4; ++k)
    check_word(array, array.words[k], access, m);
}

void trace_fence() {
  if (!on) return;
  const Fence fence{now(), ++n_fences};
  last_fence[{fence.at.block, fence.at.thread}] = fence;
  for (Arrival& a : arrived[{fence.at.block, fence.at.warp}])
    if (!a.own.number && a.own.at.thread == fence.at.thread) a.own = fence;
}

void trace_reset(bool new_on) { on = new_on, arrays.clear(), instruction = nullptr; }
const void* traced_instruction() { return instruction; }
void add_array(const void* begin, size_t bytes, const char* name, bool writable) {
  if (on) arrays.push_back({number(begin), number(begin) + bytes, name, writable, {}});
}
void trace_launch(const void* context) {
  arguments = {number(context) - 65536, number(context) + 65536};
  for (Array& array : arrays) array.words.assign(on ? (array.end - array.begin) / 4 + 1 : 0, Word{});
  n_fences = 0, last_fence.clear(), fenced.clear(), arrived.clear();
}
std::map<std::string, uint64_t> touched_bytes() {
  std::map<std::string, uint64_t> bytes;
  for (const Array& array : arrays)
    bytes[array.name] +=
        4 * std::count_if(array.words.begin(), array.words.end(), [](const Word& word) { return word.block != 0; });
  return bytes;
}
void trace_block(size_t dynamic_bytes) {
  dynamic_now = dynamic_bytes;
  if (on) shared.words.assign((shared.end - shared.begin) / 4 + 1, Word{});
}
void trace_ignore(uintptr_t begin, uintptr_t end) { ignored.push_back({begin, end}); }
void trace_shared(const void* begin, size_t bytes, const void* dynamic_begin, size_t dynamic_capacity) {
  shared.begin = number(begin), shared.end = number(begin) + bytes;
  dynamic = {number(dynamic_begin), number(dynamic_begin) + dynamic_capacity};
}

}  // namespace simt

// The hooks that -fsanitize=thread calls.
#define SIMT_HOOK(name, bytes, access) \
  extern "C" void __tsan_##name(void* p) { simt::trace(p, bytes, simt::access, __builtin_return_address(0)); }
#define SIMT_HOOKS(n)                    \
  SIMT_HOOK(read##n, n, kRead)           \
  SIMT_HOOK(write##n, n, kWrite)         \
  SIMT_HOOK(unaligned_read##n, n, kRead) \
  SIMT_HOOK(unaligned_write##n, n, kWrite)
SIMT_HOOKS(1)
SIMT_HOOKS(2)
SIMT_HOOKS(4)
SIMT_HOOKS(8)
SIMT_HOOKS(16)
extern "C" void __tsan_read_range(void* p, size_t n) { simt::trace(p, n, simt::kRead, __builtin_return_address(0)); }
extern "C" void __tsan_write_range(void* p, size_t n) { simt::trace(p, n, simt::kWrite, __builtin_return_address(0)); }
extern "C" void __tsan_func_entry(void*) {}
extern "C" void __tsan_func_exit() {}
extern "C" void __tsan_init() {}
extern "C" void __tsan_vptr_update(void**, void*) {}
