// Fibers, their scheduler, barriers and operations of warps. Compiled without -fsanitize=thread.

#include "engine.h"

#include <dlfcn.h>
#include <link.h>
#include <stdarg.h>
#include <sys/mman.h>

#include <algorithm>
#include <utility>

#include "simt.h"
#include "trace.h"
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define WITH_ASAN(...) __VA_ARGS__
#else
#define WITH_ASAN(...)
#endif
#if !defined(__x86_64__)
#error "The switch between fibers is written for x86-64."
#endif

// Saves the registers that a call must keep, changes stacks, and restores those of the other side.
asm(R"(
.text
.p2align 4
simt_switch:
  push %rbp; push %rbx; push %r12; push %r13; push %r14; push %r15
  mov %rsp, (%rdi); mov %rsi, %rsp
  pop %r15; pop %r14; pop %r13; pop %r12; pop %rbx; pop %rbp
  ret
)");
extern "C" void simt_switch(void** save, void* load);

namespace simt {

namespace {

bool recording = false;
std::string recorded;

constexpr unsigned kMostThreads = 1024;
constexpr size_t kStack = 256 << 10, kPage = 4096;
constexpr size_t kMostShared = 227 << 10;  // of a block, on any device
constexpr int kAlwaysShared = 48 << 10;    // of a block, for kernels that did not ask for more
alignas(1024) thread_local unsigned char dynamic_memory[kMostShared];

// Lanes of a warp that wait at one operation for the others of `mask`.
struct Meeting {
  uint32_t mask, arrived;
  Site site;
  WarpOperation operation;
};
struct Warp {
  uint32_t ready, alive, waiting;
  int priority;
  unsigned epoch;  // of memory: barriers passed since the block's last one
  std::vector<Meeting> meetings;
  Operand operands[32];
};

Thread* threads;
char* stacks;
Warp warps[kMostThreads / 32];
unsigned n_threads, n_warps, n_alive, n_arrived;
unsigned epoch;  // of the block's memory: barriers passed
uint32_t warps_ready;
Site barrier_site;
void* main_stack_pointer;
void (*current_call)(void*);
void* current_context;
const char* kernel_name;
std::map<std::string, Count> counts;
bool counting;
std::map<const void*, unsigned> accesses[kMostThreads];  // by a thread's instruction, since its warp last met
std::map<const void*, size_t> widths;                    // of instructions, in bytes
uint64_t seed, random_state;
enum Policy { kAnyLane, kOneWarpFirst, kLastLane, kInOrder } policy;
bool failed;
std::string message;
Device device = kDevices[0];
std::map<const void*, int> allowed_shared;  // by kernel
std::set<std::pair<const char*, int>> reached;
std::string skipped_file;
int skipped_line = 0;
char* shared_begin;
size_t shared_bytes, dynamic_bytes;
WITH_ASAN(const void* main_bottom; size_t main_size; void* main_fake_stack;)

uint64_t random_number() {
  random_state ^= random_state << 13, random_state ^= random_state >> 7, random_state ^= random_state << 17;
  return random_state;
}

void to_scheduler([[maybe_unused]] bool for_good) {
  Thread* t = self;
  WITH_ASAN(__sanitizer_start_switch_fiber(for_good ? nullptr : &t->fake_stack, main_bottom, main_size);)
  simt_switch(&t->stack_pointer, main_stack_pointer);
  WITH_ASAN(__sanitizer_finish_switch_fiber(t->fake_stack, &main_bottom, &main_size);)
}

void wake(unsigned w, uint32_t lanes) {
  warps[w].ready |= lanes;
  if (warps[w].ready) warps_ready |= 1u << w;
}

const char* name_of(const char* file) {
  const char* name = strrchr(file, '/');
  return name ? name + 1 : file;
}

bool is_skipped(const Site& site) {
  reached.emplace(site.file, site.line);
  return site.line == skipped_line && skipped_file == name_of(site.file);
}

// Where a call that returns to `address` stands in the library, for addr2line.
ptrdiff_t offset_of(const void* address) {
  Dl_info info;
  if (!dladdr(address, &info)) return 0;
  return static_cast<const char*>(address) - static_cast<const char*>(info.dli_fbase) - 1;
}

// What lanes accessed since they last met, as instructions of their warp: each as often as the lane that has most.
void end_stretch(unsigned w, uint32_t lanes) {
  if (!counting) return;
  std::map<const void*, unsigned> most;
  for (uint32_t left = lanes; left; left &= left - 1) {
    auto& own = accesses[w * 32 + __builtin_ctz(left)];
    for (const auto& [instruction, n] : own) most[instruction] = std::max(most[instruction], n);
    own.clear();
  }
  auto& of_kernel = counts[kernel_name].instructions;
  for (const auto& [instruction, n] : most) {
    Executed& executed = of_kernel[offset_of(instruction)];
    executed.n += n, executed.bytes = widths[instruction];
  }
}

void no_operation(Operand*, uint32_t, size_t) {}

void fiber_main() {
  WITH_ASAN(__sanitizer_finish_switch_fiber(nullptr, &main_bottom, &main_size);)
  current_call(current_context);
  warps[self->warp].alive &= ~(1u << self->lane), --n_alive;
  if (n_arrived) fail("a thread exits while others wait at %s:%d", barrier_site.file, barrier_site.line);
  to_scheduler(true);
  __builtin_trap();
}

void prepare_stack(Thread& t) {
  const uintptr_t top = (reinterpret_cast<uintptr_t>(t.stack) + kStack - kPage) & ~uintptr_t{63};
  void** s = reinterpret_cast<void**>(top);
  *--s = nullptr, *--s = reinterpret_cast<void*>(fiber_main);
  for (int i = 0; i < 6; ++i) *--s = nullptr;  // registers; at the entry the stack pointer is 8 past a multiple of 16
  t.stack_pointer = s, t.fake_stack = nullptr;
  WITH_ASAN(ASAN_UNPOISON_MEMORY_REGION(t.stack, kStack - kPage);)
}

// The library's thread-local segment: the static and dynamic shared memory.
int find_segments(dl_phdr_info* info, size_t, void*) {
  bool here = false;
  for (int k = 0; k < info->dlpi_phnum; ++k) {
    const auto& segment = info->dlpi_phdr[k];
    const uintptr_t begin = info->dlpi_addr + segment.p_vaddr;
    here |= segment.p_type == PT_LOAD && reinterpret_cast<uintptr_t>(&find_segments) - begin < segment.p_memsz;
  }
  if (!here) return 0;
  for (int k = 0; k < info->dlpi_phnum; ++k) {
    const auto& segment = info->dlpi_phdr[k];
    const uintptr_t begin = info->dlpi_addr + segment.p_vaddr;
    if (segment.p_type == PT_TLS)
      shared_begin = static_cast<char*>(info->dlpi_tls_data), shared_bytes = segment.p_memsz;
    if (segment.p_type == PT_LOAD) trace_ignore(begin, begin + segment.p_memsz);
  }
  return 1;
}

void set_up() {
  if (stacks) return;
  const auto map = [](size_t bytes) {
    return mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  };
  threads = static_cast<Thread*>(map(sizeof(Thread) * kMostThreads));
  stacks = static_cast<char*>(map(kMostThreads * kStack));
  for (unsigned i = 0; i < kMostThreads; ++i) {
    threads[i].stack = stacks + i * kStack + kPage;
    mprotect(stacks + i * kStack, kPage, PROT_NONE);
  }
  dynamic_memory[0] = 0;  // allocates the segment
  dl_iterate_phdr(find_segments, nullptr);
  const auto address = [](const void* p) { return reinterpret_cast<uintptr_t>(p); };
  trace_ignore(address(stacks), address(stacks) + kMostThreads * kStack);
  trace_ignore(address(threads), address(threads + kMostThreads));
  trace_shared(shared_begin, shared_bytes, dynamic_memory, kMostShared);
}

void prepare_block() {
  n_alive = n_threads, n_arrived = 0, epoch = 1, warps_ready = 0, n_warps = (n_threads + 31) / 32;
  WITH_ASAN(ASAN_UNPOISON_MEMORY_REGION(shared_begin, shared_bytes);)
  memset(shared_begin, 0xff, shared_bytes);  // NaN in every floating type, -1 in every integer
  WITH_ASAN(ASAN_POISON_MEMORY_REGION(dynamic_memory + dynamic_bytes, kMostShared - dynamic_bytes);)
  trace_block(dynamic_bytes);
  for (unsigned i = 0; i < n_threads; ++i) {
    Thread& t = threads[i];
    t.number = i, t.lane = i % 32, t.warp = i / 32;
    t.index = {i % block_size.x, i / block_size.x % block_size.y, i / (block_size.x * block_size.y)};
    prepare_stack(t);
  }
  for (unsigned w = 0; w < n_warps; ++w) {
    const unsigned lanes = std::min(32u, n_threads - 32 * w);
    warps[w].alive = lanes == 32 ? ~0u : (1u << lanes) - 1;
    warps[w].ready = warps[w].waiting = 0, warps[w].epoch = 0, warps[w].meetings.clear();
    warps[w].priority = random_number() & 0xffff;
    wake(w, warps[w].alive);
  }
  policy = seed ? static_cast<Policy>(random_number() % 4) : kInOrder;
}

std::string instruction_text() {
  if (!traced_instruction()) return "";
  char text[32];
  snprintf(text, sizeof text, " (at 0x%tx)", offset_of(traced_instruction()));
  return text;
}

void report_deadlock() {
  std::string where;
  const auto add = [&](const Site& site, unsigned n) {
    where += "; " + std::to_string(n) + " at " + site.what + " " + site.file + ":" + std::to_string(site.line);
  };
  if (n_arrived) add(barrier_site, n_arrived);
  for (unsigned w = 0; w < n_warps; ++w)
    for (const Meeting& m : warps[w].meetings) add(m.site, __builtin_popcount(m.arrived));
  failed = true;
  message = std::string(kernel_name) + ": deadlock, " + std::to_string(n_alive) + " threads left" + where;
}

int bit_from(uint32_t bits, unsigned start) {
  const uint32_t turned = start ? bits >> start | bits << (32 - start) : bits;
  return (__builtin_ctz(turned) + start) % 32;
}

// The thread to go on, of those that are ready.
Thread& choose() {
  unsigned w = __builtin_ctz(warps_ready);
  if (policy == kAnyLane) w = bit_from(warps_ready, random_number() % 32);
  if (policy == kOneWarpFirst || policy == kLastLane) {
    for (uint32_t left = warps_ready; left; left &= left - 1)
      if (warps[__builtin_ctz(left)].priority > warps[w].priority) w = __builtin_ctz(left);
    if ((random_number() & 255) == 0) warps[w].priority = random_number() & 0xffff;
  }
  const uint32_t ready = warps[w].ready;
  unsigned lane = __builtin_ctz(ready);
  if (policy == kLastLane) lane = 31 - __builtin_clz(ready);
  if (policy == kAnyLane || policy == kOneWarpFirst) lane = bit_from(ready, random_number() % 32);
  warps[w].ready &= ~(1u << lane);
  if (!warps[w].ready) warps_ready &= ~(1u << w);
  return threads[w * 32 + lane];
}

void run_block() {
  prepare_block();
  while (n_alive && !failed) {
    if (!warps_ready) return report_deadlock();
    self = &choose();
    WITH_ASAN(__sanitizer_start_switch_fiber(&main_fake_stack, self->stack, kStack - kPage);)
    simt_switch(&main_stack_pointer, self->stack_pointer);
    WITH_ASAN(__sanitizer_finish_switch_fiber(main_fake_stack, nullptr, nullptr);)
    self = nullptr;
  }
  for (unsigned w = 0; w < n_warps; ++w)
    end_stretch(w, std::min(32u, n_threads - 32 * w) == 32 ? ~0u : (1u << n_threads % 32) - 1);
}

}  // namespace

Thread* self;
uint3 block_index;
dim3 block_size, grid_size;

void fail(const char* format, ...) {
  if (!failed) {
    failed = true;
    char text[512];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    message = std::string(kernel_name) + " block " + std::to_string(block_index.x) + " thread " +
              std::to_string(self->number) + ": " + text + instruction_text();
  }
  to_scheduler(true);
  __builtin_trap();
}

void block_barrier(Site site) {
  if (is_skipped(site)) return;
  if (n_arrived && (barrier_site.line != site.line || strcmp(barrier_site.file, site.file)))
    fail("__syncthreads at line %d while others wait at line %d", site.line, barrier_site.line);
  if (n_alive != n_threads) fail("__syncthreads at line %d after a thread of the block has exited", site.line);
  barrier_site = site;
  warps[self->warp].waiting |= 1u << self->lane;
  if (++n_arrived == n_alive) {  // the last one goes back to the queue, too: no thread has a head start
    for (unsigned w = 0; w < n_warps; ++w) {
      wake(w, warps[w].waiting), end_stretch(w, warps[w].waiting);
      warps[w].waiting = 0, warps[w].epoch = 0;
    }
    n_arrived = 0, ++epoch;
  }
  to_scheduler(false);
}

void collective(uint32_t mask, Site site, Operand operand, size_t bytes, WarpOperation operation) {
  Warp& warp = warps[self->warp];
  const uint32_t mine = 1u << self->lane;
  if (!(mask & mine)) fail("%s at line %d: lane %u is not in its mask %08x", site.what, site.line, self->lane, mask);
  if (mask & ~warp.alive) fail("%s at line %d: mask %08x names lanes that are not there", site.what, site.line, mask);
  auto meeting =
      std::find_if(warp.meetings.begin(), warp.meetings.end(), [=](const Meeting& m) { return m.mask == mask; });
  if (meeting == warp.meetings.end())
    meeting = warp.meetings.insert(meeting, {mask, 0, site, operation});
  else if (meeting->site.line != site.line || strcmp(meeting->site.what, site.what))
    fail("%s at line %d while lanes %08x are at %s, line %d", site.what, site.line, meeting->arrived,
         meeting->site.what, meeting->site.line);
  warp.operands[self->lane] = operand;
  if ((meeting->arrived |= mine) != mask) return to_scheduler(false);
  operation(warp.operands, mask, bytes);
  end_stretch(self->warp, mask);
  if (operation == no_operation && mask == warp.alive) ++warp.epoch;  // only barriers order memory
  warp.meetings.erase(meeting);
  wake(self->warp, mask & ~mine);
  if (random_number() & 1) wake(self->warp, mine), to_scheduler(false);
}

void fence(Site site) {
  if (!is_skipped(site)) trace_fence();
}

void warp_barrier(uint32_t mask, Site site) {
  if (!is_skipped(site)) collective(mask, site, {nullptr, nullptr, 0}, 0, no_operation);
}

unsigned char* dynamic_shared() { return dynamic_memory; }

cudaError_t allow_shared(const void* kernel, int bytes) {
  if (bytes > device.block_bytes) return cudaErrorInvalidConfiguration;
  return allowed_shared[kernel] = bytes, cudaSuccess;
}

void run(dim3 grid, dim3 block, size_t bytes, const void* kernel, void (*call)(void*), void* context,
         const char* name) {
  if (failed) return;
  if (recording) {
    recorded.append(name).push_back('\n');
    return;
  }
  set_up();
  kernel_name = name, grid_size = grid, block_size = block, n_threads = block.x * block.y * block.z;
  dynamic_bytes = bytes, current_call = call, current_context = context;
  const auto allowed = allowed_shared.find(kernel);
  const size_t most = allowed == allowed_shared.end() ? kAlwaysShared : allowed->second;
  if (n_threads == 0 || n_threads > kMostThreads || bytes > most || !grid.x || grid.y != 1 || grid.z != 1) {
    failed = true, message = std::string(name) + ": no legal launch";
    return;
  }
  Count& count = counts[kernel_name];
  Dl_info info;
  if (counting && (!dladdr(kernel, &info) || info.dli_saddr != kernel)) {
    failed = true;
    message = std::string(name) + ": has no symbol, as in an anonymous namespace; expected one to count it";
    return;
  }
  if (counting) count.symbol = info.dli_sname;
  count.threads = n_threads, count.shared_bytes = bytes, count.blocks = std::max(count.blocks, grid.x);
  count.warps += uint64_t{grid.x} * ((n_threads + 31) / 32);
  trace_launch(context);
  random_state = 88172645463325252ull ^ (seed * 0x9E3779B97F4A7C15ull);
  random_number(), random_number();
  std::vector<uint32_t> order(grid.x);
  for (uint32_t i = 0; i < grid.x; ++i) order[i] = i;
  for (uint32_t i = grid.x; i > 1 && seed; --i) std::swap(order[i - 1], order[random_number() % i]);
  for (uint32_t i = 0; i < grid.x && !failed; ++i) {
    block_index = {order[i], 0, 0};
    run_block();
  }
  if (counting) count.touched = touched_bytes();
}

Moment now() { return {block_index.x + 1, self->number + 1, self->warp, epoch, warps[self->warp].epoch}; }

void use_device(const Device& described) { device = described, allowed_shared.clear(); }

void reset(uint64_t new_seed, bool trace) {
  failed = false, message.clear(), seed = new_seed;
  trace_reset(trace);
}
void count_accesses(bool on) { counting = on; }
void count_access(const void* instruction, size_t bytes) {
  if (counting) ++accesses[self->number][instruction], widths[instruction] = bytes;
}
std::map<std::string, Count> take_counts() { return std::exchange(counts, {}); }
std::string failure() { return message; }
std::set<std::pair<std::string, int>> take_barriers() {
  std::set<std::pair<std::string, int>> taken;
  for (const auto& [file, line] : std::exchange(reached, {})) taken.emplace(name_of(file), line);
  return taken;
}
void skip_barrier(const std::string& file, int line) { skipped_file = file, skipped_line = line; }

}  // namespace simt

void simt_record(bool on) { simt::recording = on, simt::recorded.clear(); }
const char* simt_recorded() { return simt::recorded.c_str(); }

cudaError_t cudaGetLastError() { return simt::failed ? cudaErrorLaunchFailure : cudaSuccess; }
const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorLaunchFailure ? simt::message.c_str() : "invalid configuration";
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      return *value = simt::device.multiprocessors, cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      return *value = simt::device.block_bytes, cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      return *value = simt::device.bytes, cudaSuccess;
    case cudaDevAttrReservedSharedMemoryPerBlock:
      return *value = simt::device.bytes - simt::device.block_bytes, cudaSuccess;
  }
  return cudaErrorInvalidConfiguration;
}
