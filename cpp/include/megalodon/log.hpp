// Where the library's messages go. It never writes to a terminal by itself.
#pragma once

#include <functional>
#include <string_view>

#include "megalodon/error.hpp"

namespace megalodon {

enum class LogLevel : int { error = 0, warning = 1, info = 2, debug = 3 };

// Called from any thread that uses the library, one message at a time; must neither throw nor use the
// library.
using Logger = std::function<void(LogLevel, std::string_view)>;

// For the whole process; an empty function drops messages, as is done until this is called. Thread-safe.
MEGALODON_API void set_logger(Logger logger);

}  // namespace megalodon
