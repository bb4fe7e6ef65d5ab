#pragma once

#include <string>

#include "megalodon/log.hpp"

namespace megalodon::detail {

void log(LogLevel level, const std::string& message);

}  // namespace megalodon::detail
