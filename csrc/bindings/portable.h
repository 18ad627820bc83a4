// With x86-64 and GNU's C library: the names under which libdl.so.2 has had these functions from the start. Since
// glibc 2.34 the linker would choose libc.so.6's newer names, which older systems lack.
#pragma once

#include <climits>  // defines __GLIBC__

#if defined(__GLIBC__) && defined(__x86_64__)
__asm__(".symver dladdr, dladdr@GLIBC_2.2.5");
__asm__(".symver dlerror, dlerror@GLIBC_2.2.5");
__asm__(".symver dlopen, dlopen@GLIBC_2.2.5");
__asm__(".symver dlsym, dlsym@GLIBC_2.2.5");
#endif
