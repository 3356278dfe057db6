// Included before every source of a wheel's library: where glibc has a newer version of a function, the version that
// glibc 2.28 has too is linked. exp of glibc 2.29 differs only in what it does not do: call a handler of errors.
#pragma once

#if defined(__x86_64__)
__asm__(".symver exp,exp@GLIBC_2.2.5");
#elif defined(__aarch64__)
__asm__(".symver exp,exp@GLIBC_2.17");
#endif
