#include "megalodon/log.hpp"

#include <mutex>
#include <utility>

#include "logging.hpp"

namespace megalodon {

namespace {

std::mutex& logger_mutex() {
    static std::mutex mutex;
    return mutex;
}

Logger& logger() {
    static Logger current;
    return current;
}

}  // namespace

void set_logger(Logger replacement) {
    const std::lock_guard<std::mutex> lock(logger_mutex());
    logger() = std::move(replacement);
}

void detail::log(LogLevel level, const std::string& message) {
    const std::lock_guard<std::mutex> lock(logger_mutex());
    if (logger()) logger()(level, message);
}

}  // namespace megalodon
