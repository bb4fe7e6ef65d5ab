// A bundle without a model, for engines that need none.
#pragma once

#include <filesystem>
#include <nlohmann/json.hpp>
#include <string>

#include "megalodon/bundle.hpp"

namespace megalodon::test {

// A directory that is removed with the object.
class TemporaryDirectory {
 public:
    TemporaryDirectory();
    ~TemporaryDirectory();
    TemporaryDirectory(const TemporaryDirectory&) = delete;
    TemporaryDirectory& operator=(const TemporaryDirectory&) = delete;
    const std::filesystem::path& path() const { return path_; }

 private:
    std::filesystem::path path_;
};

struct TinyModel {
    std::int64_t vocab_size = 11;
    std::int64_t chunk_size = 12;
    std::string precision = "fp32";
    std::string fingerprint = "0123456789abcdef";
    bool returns_all_logits = false;
};

std::string manifest_text(const TinyModel& model);

// Writes manifest, model.onnx and model.onnx.data.
void write_bundle(const std::filesystem::path& directory, const TinyModel& model);

// What engine.json says of an engine whose file holds "weights".
nlohmann::json engine_json(const std::string& id);

void write_text(const std::filesystem::path& path, const std::string& text);

// Opened; nothing of it is read later.
Bundle tiny_bundle(const TinyModel& model = {});

}  // namespace megalodon::test
