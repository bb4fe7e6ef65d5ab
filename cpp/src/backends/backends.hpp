#pragma once

#include <memory>
#include <set>

#include "megalodon/session.hpp"

namespace megalodon::detail {

// Throws Error: invalid_argument for an unknown backend, and what the backends throw.
std::unique_ptr<Engine> open_engine(const Bundle& bundle, const SessionOptions& options);

std::unique_ptr<Engine> open_onnxruntime(const Bundle& bundle, const SessionOptions& options);
std::unique_ptr<Engine> open_tensorrt(const Bundle& bundle, const SessionOptions& options);

// Throw Error (bundle) unless the graph's inputs, or all its tensors but `weights`, are those of the manifest's state
// table.
void check_inputs(const Bundle& bundle, const std::vector<std::string>& names, const std::string& where);
void check_tensors(const Bundle& bundle, const std::set<std::string>& weights, const std::vector<std::string>& names,
                   const std::string& where);

}  // namespace megalodon::detail
