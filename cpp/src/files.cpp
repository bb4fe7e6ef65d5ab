#include "files.hpp"

#include <fcntl.h>
#include <openssl/evp.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstring>
#include <memory>

#include "megalodon/error.hpp"

namespace megalodon::detail {

namespace {

namespace fs = std::filesystem;

[[noreturn]] void fail(const std::string& what, const fs::path& path, int code) {
    throw Error(ErrorKind::io, path.string() + ": " + what + " (" + std::strerror(code) + ")");
}

// A file descriptor that closes itself.
class Descriptor {
 public:
    Descriptor(const fs::path& path, int flags, int mode = 0) : value_(::open(path.c_str(), flags | O_CLOEXEC, mode)) {}
    ~Descriptor() {
        if (value_ >= 0) ::close(value_);
    }
    Descriptor(const Descriptor&) = delete;
    Descriptor& operator=(const Descriptor&) = delete;
    int get() const { return value_; }
    bool is_open() const { return value_ >= 0; }

 private:
    int value_;
};

void append(int descriptor, const fs::path& path, const void* data, std::size_t bytes) {
    const char* next = static_cast<const char*>(data);
    while (bytes > 0) {
        const ssize_t written = ::write(descriptor, next, bytes);
        if (written < 0) {
            if (errno == EINTR) continue;
            fail("cannot be written; make room, or choose another place", path, errno);
        }
        next += written;
        bytes -= static_cast<std::size_t>(written);
    }
}

// While it lives, a file that grows beyond the process's limit (ulimit -f) is an error of `write`, as a full disk is,
// and no signal that ends the process.
class NoSizeSignal {
 public:
    NoSizeSignal() {
        ::sigemptyset(&signal_);
        ::sigaddset(&signal_, SIGXFSZ);
        sigset_t pending;
        ::sigpending(&pending);
        was_pending_ = ::sigismember(&pending, SIGXFSZ) == 1;
        ::pthread_sigmask(SIG_BLOCK, &signal_, &before_);
    }
    ~NoSizeSignal() {
        const timespec now{};
        if (!was_pending_) ::sigtimedwait(&signal_, nullptr, &now);  // takes the one that came meanwhile
        ::pthread_sigmask(SIG_SETMASK, &before_, nullptr);
    }
    NoSizeSignal(const NoSizeSignal&) = delete;
    NoSizeSignal& operator=(const NoSizeSignal&) = delete;

 private:
    sigset_t signal_, before_;
    bool was_pending_;
};

// A name that is free. A process that was killed may have left one behind, and in a container the next has its number.
fs::path temporary_beside(const fs::path& target) {
    static std::atomic<unsigned> counter{0};
    for (;;) {
        const std::string suffix = "." + std::to_string(::getpid()) + "." + std::to_string(counter++);
        fs::path path = target.parent_path() / ("." + target.filename().string() + suffix);
        struct stat status{};
        if (::lstat(path.c_str(), &status) != 0) return path;
    }
}

// Removes the temporary file unless it was renamed.
class TemporaryFile {
 public:
    explicit TemporaryFile(fs::path path) : path_(std::move(path)) {}
    ~TemporaryFile() {
        if (!path_.empty()) ::unlink(path_.c_str());
    }
    TemporaryFile(const TemporaryFile&) = delete;
    TemporaryFile& operator=(const TemporaryFile&) = delete;
    const fs::path& path() const { return path_; }
    void keep() { path_.clear(); }

 private:
    fs::path path_;
};

}  // namespace

MappedFile::MappedFile(const fs::path& path) {
    const Descriptor file(path, O_RDONLY);
    struct stat status{};
    if (!file.is_open() || ::fstat(file.get(), &status) != 0) fail("cannot be read", path, errno);
    if (!S_ISREG(status.st_mode)) fail("cannot be read", path, EISDIR);
    size_ = static_cast<std::size_t>(status.st_size);
    if (size_ == 0) return;
    void* memory = ::mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, file.get(), 0);
    if (memory == MAP_FAILED) fail("cannot be mapped", path, errno);
    data_ = static_cast<const std::byte*>(memory);
}

MappedFile::~MappedFile() {
    if (data_ != nullptr) ::munmap(const_cast<std::byte*>(data_), size_);
}

std::string read_text(const fs::path& path) {
    const MappedFile file(path);
    return {reinterpret_cast<const char*>(file.data()), file.size()};
}

std::string sha256_file(const fs::path& path) {
    constexpr std::size_t kBlock = 1 << 20;
    const Descriptor file(path, O_RDONLY);
    if (!file.is_open()) fail("cannot be read", path, errno);
    const std::unique_ptr<EVP_MD_CTX, decltype(&EVP_MD_CTX_free)> digest(EVP_MD_CTX_new(), EVP_MD_CTX_free);
    if (!digest || EVP_DigestInit_ex(digest.get(), EVP_sha256(), nullptr) != 1) {
        throw Error(ErrorKind::internal, "OpenSSL has no SHA-256");
    }
    const std::unique_ptr<char[]> block(new char[kBlock]);
    for (;;) {
        const ssize_t size = ::read(file.get(), block.get(), kBlock);
        if (size < 0 && errno == EINTR) continue;
        if (size < 0) fail("cannot be read", path, errno);
        if (size == 0) break;
        EVP_DigestUpdate(digest.get(), block.get(), static_cast<std::size_t>(size));
    }
    unsigned char hash[EVP_MAX_MD_SIZE];
    unsigned length = 0;
    EVP_DigestFinal_ex(digest.get(), hash, &length);
    std::string text;
    for (unsigned index = 0; index < length; ++index) {
        constexpr char kDigits[] = "0123456789abcdef";
        text += kDigits[hash[index] >> 4];
        text += kDigits[hash[index] & 15];
    }
    return text;
}

void write_atomically(const fs::path& target, const std::function<void(const Append&)>& write) {
    const fs::path folder = target.has_parent_path() ? target.parent_path() : fs::path(".");
    std::error_code error;
    fs::create_directories(folder, error);  // when it fails, opening the file says why
    const NoSizeSignal no_signal;
    TemporaryFile temporary(temporary_beside(folder / target.filename()));
    {
        const Descriptor file(temporary.path(), O_WRONLY | O_CREAT | O_EXCL, 0666);
        if (!file.is_open()) fail("cannot be written; choose another place", target, errno);
        write([&](const void* data, std::size_t bytes) { append(file.get(), target, data, bytes); });
        if (::fsync(file.get()) != 0) fail("cannot be written; make room, or choose another place", target, errno);
    }
    if (::rename(temporary.path().c_str(), target.c_str()) != 0) fail("cannot be replaced", target, errno);
    temporary.keep();
    const Descriptor directory(folder, O_RDONLY | O_DIRECTORY);
    if (directory.is_open()) ::fsync(directory.get());
}

}  // namespace megalodon::detail
