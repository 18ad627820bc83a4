// What GNU's compilers and C library of the last years would ask of the systems that _ops.so runs on, defined in it
// instead: with portable.h it needs no newer glibc and libstdc++ than torch, whose wheels are manylinux_2_28.
#include <new>
#include <sstream>

#if defined(__GLIBCXX__)
// Whether reference counts may do without atomic operations (glibc 2.32): never, torch has threads.
extern "C" __attribute__((visibility("hidden"))) char __libc_single_threaded;
char __libc_single_threaded = 0;

void std::__throw_bad_array_new_length() { throw std::bad_array_new_length(); }  // libstdc++ of GCC 11

// libstdc++ of GCC 9.
template std::ostringstream::basic_ostringstream();
template std::stringstream::basic_stringstream();
#endif
