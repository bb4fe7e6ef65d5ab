// Files: read without copying, written whole or not at all, and their hashes.
#pragma once

#include <cstddef>
#include <filesystem>
#include <functional>
#include <string>

namespace megalodon::detail {

// A file mapped into memory, read-only. Throws Error (io).
class MappedFile {
 public:
    explicit MappedFile(const std::filesystem::path& path);
    ~MappedFile();
    MappedFile(const MappedFile&) = delete;
    MappedFile& operator=(const MappedFile&) = delete;

    const std::byte* data() const { return data_; }
    std::size_t size() const { return size_; }

 private:
    const std::byte* data_ = nullptr;
    std::size_t size_ = 0;
};

std::string read_text(const std::filesystem::path& path);

std::string sha256_file(const std::filesystem::path& path);  // 64 hexadecimal digits

// Calls `write` with a function that appends bytes to a temporary file beside `target`, which is then synced and
// renamed over it. A crash at any moment leaves the old file or the new one. Throws Error (io).
using Append = std::function<void(const void* data, std::size_t bytes)>;
void write_atomically(const std::filesystem::path& target, const std::function<void(const Append&)>& write);

}  // namespace megalodon::detail
