#include "utf8.hpp"

namespace megalodon::detail {

namespace {

constexpr char kReplacement[] = "\xEF\xBF\xBD";

}  // namespace

std::string Utf8Decoder::push(std::string_view bytes) {
    std::string out;
    for (const char byte : bytes) {
        const auto value = static_cast<unsigned char>(byte);
        if (!take(value, out)) take(value, out);  // it ended a broken character, and begins another
    }
    return out;
}

std::string Utf8Decoder::flush() {
    std::string out;
    if (needed_ > 0) out = kReplacement;
    if (is_surrogate()) out += kReplacement;
    held_.clear();
    needed_ = 0;
    lower_ = 0x80, upper_ = 0xBF;
    return out;
}

// Half of a UTF-16 pair, which no UTF-8 has. Python's decoder finds out at the byte after it.
bool Utf8Decoder::is_surrogate() const {
    return held_.size() == 2 && held_[0] == '\xED' && static_cast<unsigned char>(held_[1]) >= 0xA0;
}

// False: the byte was not taken, because it cannot follow what is held.
bool Utf8Decoder::take(unsigned char byte, std::string& out) {
    if (needed_ > 0) {
        if (byte < lower_ || byte > upper_ || is_surrogate()) {
            out += flush();
            return false;
        }
        lower_ = 0x80, upper_ = 0xBF;
        held_ += static_cast<char>(byte);
        if (--needed_ == 0) {
            out += held_;
            held_.clear();
        }
        return true;
    }
    if (byte < 0x80) {
        out += static_cast<char>(byte);
    } else if (byte < 0xC2 || byte > 0xF4) {
        out += kReplacement;
    } else {
        needed_ = byte < 0xE0 ? 1 : byte < 0xF0 ? 2 : 3;
        if (byte == 0xE0) lower_ = 0xA0;  // shorter forms exist
        if (byte == 0xF0) lower_ = 0x90;
        if (byte == 0xF4) upper_ = 0x8F;  // beyond U+10FFFF
        held_ = static_cast<char>(byte);
    }
    return true;
}

}  // namespace megalodon::detail
