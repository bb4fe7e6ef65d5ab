// Feeds the engine's side of a recording: what ONNX Runtime was given and gave back, call by call, when a Python loop
// drove a real bundle. The runtime must give the same inputs. $MEGALODON_RECORDING names its directory.
#include <gtest/gtest.h>

#include <cstdlib>
#include <cstring>

#include "megalodon/session.hpp"
#include "safetensors.hpp"

namespace megalodon::test {
namespace {

using detail::read_safetensors;
using Tokens = std::vector<std::int64_t>;

class ReplayEngine : public Engine {
 public:
    ReplayEngine(std::filesystem::path directory, std::int64_t chunk_size)
        : directory_(std::move(directory)), chunk_size_(chunk_size) {}

    const char* backend() const override { return "replay"; }

    void run(const std::vector<TensorRef>& inputs, const std::vector<TensorRef>& outputs) override {
        const auto file = read_safetensors(directory_ / ("call-" + std::to_string(num_calls_++) + ".safetensors"));
        const std::int64_t position = *static_cast<const std::int64_t*>(inputs.at(1).data);
        for (const TensorRef& input : inputs)
            compare(input, file.tensors.at(input.name), position);
        for (const TensorRef& output : outputs) {
            const HostTensor& recorded = file.tensors.at(output.name);
            ASSERT_EQ(output.shape, recorded.shape) << output.name;
            ASSERT_EQ(output.dtype, recorded.dtype) << output.name;
            std::memcpy(output.data, recorded.data.data(), recorded.data.size());
        }
    }

 private:
    // Of key/value memory the rows of the open chunk count; in a fresh stream no state does.
    void compare(const TensorRef& given, const HostTensor& recorded, std::int64_t position) const {
        ASSERT_EQ(given.dtype, recorded.dtype) << given.name;
        const bool is_rows = given.shape.size() == 4 && given.shape[3] > 2 && given.shape[2] != recorded.shape[2];
        if (!is_rows && given.name.rfind("past_", 0) == 0 && position == 0) return;
        if (!is_rows) {
            ASSERT_EQ(given.shape, recorded.shape) << given.name;
            if (recorded.data.empty()) return;
            EXPECT_EQ(std::memcmp(given.data, recorded.data.data(), recorded.data.size()), 0) << given.name;
            return;
        }
        const std::int64_t num_rows = position % chunk_size_;
        ASSERT_EQ(recorded.shape[2], num_rows) << given.name;
        ASSERT_GE(given.shape[2], num_rows) << given.name;
        const auto row_bytes = static_cast<std::size_t>(given.shape[3]) * byte_size(given.dtype);
        const std::size_t piece = static_cast<std::size_t>(num_rows) * row_bytes;
        for (std::int64_t head = 0; head < given.shape[1] && piece > 0; ++head) {
            const char* found =
                static_cast<const char*>(given.data) + static_cast<std::size_t>(head * given.shape[2]) * row_bytes;
            EXPECT_EQ(std::memcmp(found, &recorded.data[static_cast<std::size_t>(head) * piece], piece), 0)
                << given.name;
        }
    }

    std::filesystem::path directory_;
    std::int64_t chunk_size_;
    int num_calls_ = 0;
};

TEST(Recording, TheRuntimeFeedsWhatPythonFed) {
    const char* directory = std::getenv("MEGALODON_RECORDING");
    if (directory == nullptr) GTEST_SKIP() << "MEGALODON_RECORDING names no recording; tests/cpp makes one";
    const Bundle bundle = Bundle::open(std::filesystem::path(directory) / "bundle");
    const auto script = read_safetensors(std::filesystem::path(directory) / "script.safetensors");
    const auto tokens_of = [&](const char* name) {
        const HostTensor& tensor = script.tensors.at(name);
        Tokens tokens(static_cast<std::size_t>(tensor.shape.at(0)));
        std::memcpy(tokens.data(), tensor.data.data(), tensor.data.size());
        return tokens;
    };
    Session session(bundle, std::make_unique<ReplayEngine>(directory, bundle.manifest().chunk_size));
    Stream stream = session.stream();
    GenerateOptions options;
    const Tokens expected = tokens_of("generated");
    options.max_new_tokens = static_cast<std::int64_t>(expected.size());
    options.stop_tokens = Tokens{};
    Tokens found;
    stream.generate(tokens_of("prompt"), options, [&](const GeneratedToken& item) {
        found.push_back(item.token);
        return true;
    });
    EXPECT_EQ(found, expected);
}

}  // namespace
}  // namespace megalodon::test
