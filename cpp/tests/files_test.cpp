#include "files.hpp"

#include <gtest/gtest.h>
#include <sys/resource.h>
#include <unistd.h>

#include "refusal.hpp"
#include "tiny_bundle.hpp"

namespace megalodon::test {
namespace {

using detail::Append;
using detail::write_atomically;

TEST(Files, TheHashIsTheStandardsOne) {
    const TemporaryDirectory directory;
    write_text(directory.path() / "file", "abc");  // FIPS 180-2, appendix B.1
    EXPECT_EQ(detail::sha256_file(directory.path() / "file"),
              "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
    EXPECT_THROW(detail::sha256_file(directory.path() / "none"), Error);
}

TEST(Files, AFailedWriteLeavesTheOldFileAndNothingElse) {
    const TemporaryDirectory directory;
    const auto path = directory.path() / "file";
    write_text(path, "old");
    const auto failing = [](const Append& append) {
        append("half of the new", 15);
        throw Error(ErrorKind::internal, "stop");
    };
    EXPECT_THROW(write_atomically(path, failing), Error);
    EXPECT_EQ(detail::read_text(path), "old");
    EXPECT_EQ(std::distance(std::filesystem::directory_iterator(directory.path()), {}), 1);
    write_atomically(path, [](const Append& append) { append("new", 3); });
    EXPECT_EQ(detail::read_text(path), "new");
}

TEST(Files, WhatAKilledProcessLeftIsNoObstacle) {
    const TemporaryDirectory directory;
    for (int number = 0; number < 1000; ++number) {
        write_text(directory.path() / (".file." + std::to_string(::getpid()) + "." + std::to_string(number)), "half");
    }
    write_atomically(directory.path() / "file", [](const Append& append) { append("new", 3); });
    EXPECT_EQ(detail::read_text(directory.path() / "file"), "new");
}

TEST(Files, APlaceThatCannotBeWrittenIsNamed) {
    const std::string what =
        message_of([] { write_atomically("/proc/none/file", [](const Append&) {}); }, ErrorKind::io);
    EXPECT_NE(what.find("/proc/none/file"), std::string::npos);
}

TEST(Files, AFileBeyondTheProcesssLimitIsAnErrorAndNoSignal) {
    const TemporaryDirectory directory;
    const auto path = directory.path() / "file";
    write_text(path, "old");
    rlimit before{};
    ASSERT_EQ(::getrlimit(RLIMIT_FSIZE, &before), 0);
    const rlimit four_bytes{4, before.rlim_max};
    ::setrlimit(RLIMIT_FSIZE, &four_bytes);
    const std::string what =
        message_of([&] { write_atomically(path, [](const Append& append) { append("12345678", 8); }); }, ErrorKind::io);
    ::setrlimit(RLIMIT_FSIZE, &before);
    EXPECT_NE(what.find("File too large"), std::string::npos) << what;
    EXPECT_EQ(detail::read_text(path), "old");
    EXPECT_EQ(std::distance(std::filesystem::directory_iterator(directory.path()), {}), 1);
}

}  // namespace
}  // namespace megalodon::test
