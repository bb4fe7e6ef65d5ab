// The file format: what is written comes back, and nothing that is damaged gets in or brings the program down.
#include <gtest/gtest.h>

#include <cstring>
#include <random>

#include "files.hpp"
#include "safetensors.hpp"
#include "tiny_bundle.hpp"

namespace megalodon::test {
namespace {

using detail::read_safetensors;
using detail::SafetensorsFile;
using detail::write_safetensors;

SafetensorsFile some_file() {
    SafetensorsFile file;
    file.metadata = {{"format", "some \"quoted\" text"}};
    file.tensors["wide"] = {DType::int64, {3}, std::vector<std::byte>(24, std::byte{1})};
    file.tensors["half"] = {DType::float16, {1, 5}, std::vector<std::byte>(10, std::byte{2})};
    file.tensors["empty"] = {DType::float32, {1, 0, 4}, {}};
    return file;
}

bool is_refused(const std::filesystem::path& path) {
    try {
        read_safetensors(path);
    } catch (const Error& error) {
        EXPECT_EQ(error.kind(), ErrorKind::state) << error.what();
        return true;
    }
    return false;
}

TEST(Safetensors, WhatIsWrittenComesBack) {
    const TemporaryDirectory directory;
    const auto path = directory.path() / "file";
    write_safetensors(path, some_file());
    const SafetensorsFile found = read_safetensors(path), expected = some_file();
    EXPECT_EQ(found.metadata, expected.metadata);
    ASSERT_EQ(found.tensors.size(), expected.tensors.size());
    for (const auto& [name, tensor] : expected.tensors) {
        EXPECT_EQ(found.tensors.at(name).dtype, tensor.dtype);
        EXPECT_EQ(found.tensors.at(name).shape, tensor.shape);
        EXPECT_EQ(found.tensors.at(name).data, tensor.data);
    }
}

TEST(Safetensors, ATruncatedFileIsRefusedWhereverItEnds) {
    const TemporaryDirectory directory;
    const auto path = directory.path() / "file";
    write_safetensors(path, some_file());
    const std::string text = detail::read_text(path);
    for (std::size_t length = 0; length < text.size(); ++length) {
        write_text(path, text.substr(0, length));
        EXPECT_TRUE(is_refused(path)) << length;
    }
    write_text(path, text + "x");
    EXPECT_TRUE(is_refused(path)) << "longer than its tensors";
}

TEST(Safetensors, DamagedBytesNeverBringTheProgramDown) {
    const TemporaryDirectory directory;
    const auto path = directory.path() / "file";
    write_safetensors(path, some_file());
    const std::string text = detail::read_text(path);
    std::mt19937 random(1);
    int num_refused = 0;
    for (int round = 0; round < 3000; ++round) {
        std::string damaged = text;
        damaged[random() % damaged.size()] = static_cast<char>(random());
        write_text(path, damaged);
        num_refused += is_refused(path);
    }
    EXPECT_GT(num_refused, 1000);
}

TEST(Safetensors, HostileHeadersAreRefused) {
    const TemporaryDirectory directory;
    const auto path = directory.path() / "file";
    for (const char* header : {
             "[]",
             "{\"a\":3}",
             "{\"a\":{\"dtype\":\"F32\",\"shape\":[-1],\"data_offsets\":[0,0]}}",
             "{\"a\":{\"dtype\":\"F32\",\"shape\":[4611686018427387904,4],\"data_offsets\":[0,0]}}",
             "{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[4,0]}}",
             "{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,18446744073709551615]}}",
             "{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0]}}",
             "{\"a\":{\"dtype\":\"X\",\"shape\":[],\"data_offsets\":[0,0]}}",
             "{\"__metadata__\":{\"a\":1}}",
         }) {
        std::string text(8, '\0');
        text[0] = static_cast<char>(std::strlen(header));
        write_text(path, text + header);
        EXPECT_TRUE(is_refused(path)) << header;
    }
    write_text(path, std::string(8, '\xff') + "{}");
    EXPECT_TRUE(is_refused(path)) << "a header longer than any file";
}

}  // namespace
}  // namespace megalodon::test
