// UTF-8 that arrives in pieces.
#pragma once

#include <string>
#include <string_view>

namespace megalodon::detail {

// Gives out whole characters only. What is not UTF-8 becomes U+FFFD, one for each maximal part of a character
// (Unicode 15, section 3.9), as Python's incremental decoder does.
class Utf8Decoder {
 public:
    std::string push(std::string_view bytes);
    std::string flush();  // U+FFFD for an unfinished character, or ""

 private:
    bool take(unsigned char byte, std::string& out);
    bool is_surrogate() const;

    std::string held_;                           // an unfinished character
    int needed_ = 0;                             // bytes that it lacks
    unsigned char lower_ = 0x80, upper_ = 0xBF;  // of the next byte
};

}  // namespace megalodon::detail
