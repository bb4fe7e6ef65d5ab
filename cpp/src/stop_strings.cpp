#include "stop_strings.hpp"

#include <algorithm>

#include "megalodon/error.hpp"

namespace megalodon::detail {

StopStrings::StopStrings(std::vector<std::string> strings) : strings_(std::move(strings)) {
    for (const std::string& string : strings_) {
        if (string.empty()) throw Error(ErrorKind::invalid_argument, "stop_strings: one is empty; leave it out");
    }
}

std::pair<std::string, bool> StopStrings::push(const std::string& text) {
    held_ += text;
    std::size_t found = std::string::npos;
    for (const std::string& string : strings_)
        found = std::min(found, held_.find(string));
    if (found != std::string::npos) {
        std::string free = held_.substr(0, found);
        held_.clear();
        return {free, true};
    }
    const std::size_t num_free = held_.size() - num_held(held_);
    std::string free = held_.substr(0, num_free);
    held_.erase(0, num_free);
    return {free, false};
}

std::string StopStrings::flush() {
    return std::exchange(held_, {});
}

// Length of the longest end of `text` that begins a stop string.
std::size_t StopStrings::num_held(const std::string& text) const {
    std::size_t longest = 0;
    for (const std::string& string : strings_) {
        for (std::size_t length = std::min(text.size(), string.size() - 1); length > longest; --length) {
            if (text.compare(text.size() - length, length, string, 0, length) == 0) longest = length;
        }
    }
    return longest;
}

}  // namespace megalodon::detail
