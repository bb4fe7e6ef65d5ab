#include "megalodon/engine.hpp"

#include <cstdlib>
#include <cstring>

#include "choice.hpp"

namespace megalodon {

std::unique_ptr<PreparedStep> Engine::prepare_step(StepPlan) {
    return nullptr;
}

std::vector<std::int64_t> Engine::choose(const void* logits, std::int64_t vocab_size,
                                         const std::vector<TokenChoice>& choices) {
    const auto width = static_cast<std::size_t>(vocab_size);
    std::vector<float> row(width);
    std::vector<std::int64_t> tokens(choices.size(), detail::kNoToken);
    for (std::size_t index = 0; index < choices.size(); ++index) {
        if (!choices[index].is_wanted) continue;
        download(row.data(), static_cast<const float*>(logits) + index * width, width * sizeof(float));
        tokens[index] = detail::choose(row, choices[index]);
    }
    return tokens;
}

void* Engine::allocate(std::size_t bytes) {
    void* memory = std::calloc(bytes + 1, 1);  // pages are handed out when they are first written
    if (memory == nullptr) {
        throw Error(ErrorKind::internal,
                    "no memory for " + std::to_string(bytes) + " bytes of stream state; use fewer slots");
    }
    return memory;
}

void Engine::release(void* memory) noexcept {
    std::free(memory);
}

void Engine::upload(void* to, const void* from_host, std::size_t bytes) {
    std::memcpy(to, from_host, bytes);
}

void Engine::download(void* to_host, const void* from, std::size_t bytes) {
    std::memcpy(to_host, from, bytes);
}

void Engine::fill_zero(void* memory, std::size_t bytes) {
    std::memset(memory, 0, bytes);
}

void Engine::copy(void* to, std::size_t to_pitch, const void* from, std::size_t from_pitch, std::size_t width,
                  std::size_t rows) {
    for (std::size_t row = 0; row < rows; ++row) {
        std::memcpy(static_cast<char*>(to) + row * to_pitch, static_cast<const char*>(from) + row * from_pitch, width);
    }
}

}  // namespace megalodon
