// Stop strings in text that arrives in pieces: what may be the start of one is held back.
#pragma once

#include <string>
#include <utility>
#include <vector>

namespace megalodon::detail {

// Works on UTF-8: a string of whole characters is never found inside a character.
class StopStrings {
 public:
    explicit StopStrings(std::vector<std::string> strings);  // throws Error (invalid_argument) for an empty string

    // Take more text; returns the text that is free to go out, and whether a stop string ended it there.
    std::pair<std::string, bool> push(const std::string& text);
    std::string flush();  // the held text, once nothing more can follow

 private:
    std::size_t num_held(const std::string& text) const;

    std::vector<std::string> strings_;
    std::string held_;
};

}  // namespace megalodon::detail
