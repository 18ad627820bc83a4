// OpenMP's entry points on std::thread, in place of libgomp, for ThreadSanitizer. libgomp is not instrumented: the
// sanitizer does not see that its barriers order what threads write before and read after them, and reports races that
// are none. Threads that start and end with each region give exactly the order that OpenMP promises there, no more.

#include <thread>
#include <vector>

namespace {

thread_local int number = 0;
thread_local int count = 1;

}  // namespace

// What GCC makes of `#pragma omp parallel num_threads(threads)`.
extern "C" void GOMP_parallel(void (*body)(void*), void* data, unsigned threads, unsigned) {
  const auto run = [=](unsigned n) {
    number = static_cast<int>(n), count = static_cast<int>(threads);
    body(data);
    number = 0, count = 1;
  };
  std::vector<std::thread> others;
  for (unsigned n = 1; n < threads; ++n) others.emplace_back(run, n);
  run(0);
  for (std::thread& other : others) other.join();
}

extern "C" int omp_get_thread_num() { return number; }
extern "C" int omp_get_num_threads() { return count; }
