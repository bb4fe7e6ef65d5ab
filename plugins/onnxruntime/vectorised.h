// How the inner loops are compiled: for the vector units of several processors, the best of which is picked when the
// library loads. GCC 12 is the first that knows them by these names.
#pragma once

#if defined(__x86_64__) && !defined(__clang__) && __GNUC__ >= 12
#define MGD_VECTORISED __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define MGD_VECTORISED
#endif
