#pragma once

#include <cstddef>

namespace megalodon::detail {

// A sum in the order of numpy's, so that both runtimes compare the same numbers.
double pairwise_sum(const double* values, std::size_t count);

}  // namespace megalodon::detail
