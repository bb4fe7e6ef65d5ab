// How the inner loops are compiled: for the vector units of several processors, the best of which is picked when the
// library loads.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define MGD_VECTORISED __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define MGD_VECTORISED
#endif
