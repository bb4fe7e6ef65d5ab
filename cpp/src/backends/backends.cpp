#include "backends.hpp"

#include <algorithm>
#include <set>

#include "megalodon/state_layout.h"

namespace megalodon::detail {

namespace {

void check_names(const std::set<std::string>& expected, const std::vector<std::string>& names,
                 const std::string& where) {
    const std::set<std::string> found(names.begin(), names.end());
    std::vector<std::string> unlike;
    std::set_symmetric_difference(expected.begin(), expected.end(), found.begin(), found.end(),
                                  std::back_inserter(unlike));
    if (unlike.empty()) return;
    throw Error(ErrorKind::bundle,
                where + ": tensor " + unlike[0] + " is not in both model and manifest; export and build again");
}

}  // namespace

std::unique_ptr<Engine> open_engine(const Bundle& bundle, const SessionOptions& options) {
    if (options.threads < 0) {
        throw Error(ErrorKind::invalid_argument,
                    "threads = " + std::to_string(options.threads) + " is not a positive integer, nor 0 for all");
    }
    if (options.backend == "onnxruntime") return open_onnxruntime(bundle, options);
    if (options.backend == "tensorrt" || options.backend == "tensorrt-rtx") return open_tensorrt(bundle, options);
    throw Error(ErrorKind::invalid_argument,
                "unknown backend '" + options.backend + "'; there are: onnxruntime, tensorrt, tensorrt-rtx");
}

void check_inputs(const Bundle& bundle, const std::vector<std::string>& names, const std::string& where) {
    std::set<std::string> expected = {kTokens, kPosition};
    for (const StateSpec& spec : bundle.manifest().state)
        expected.insert(spec.past);
    check_names(expected, names, where);
}

void check_tensors(const Bundle& bundle, const std::set<std::string>& weights, const std::vector<std::string>& names,
                   const std::string& where) {
    std::set<std::string> expected = weights;
    expected.insert({kTokens, kPosition, kLogits});
    for (const StateSpec& spec : bundle.manifest().state)
        expected.insert({spec.past, spec.present});
    check_names(expected, names, where);
}

}  // namespace megalodon::detail
