// What the Python tests compare with Python:
//
// utf8 FILE               pieces of text that the bytes of FILE complete one by one, a line of hexadecimal digits each
// cast FILE DTYPE         the tensor "x" of FILE in another type, written to FILE
// sample FILE SEED TEMPERATURE TOP_K TOP_P MIN_P PENALTY WINDOW
//                         a token for every row of the tensor "logits" [n, V] of FILE, a line each
// engine FLAVOUR VERSION CAPABILITY BUNDLE...
//                         the engine of each bundle that is loaded there, and name, offset and size of each weight that
//                         it lacks; "none"
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

#include "backends/engine_info.hpp"
#include "convert.hpp"
#include "files.hpp"
#include "megalodon/sampling.hpp"
#include "safetensors.hpp"
#include "utf8.hpp"

namespace {

using namespace megalodon;

void print_hex(const std::string& text) {
    for (const char byte : text)
        std::printf("%02x", static_cast<unsigned>(static_cast<unsigned char>(byte)));
    std::printf("\n");
}

void decode(const char* path) {
    detail::Utf8Decoder decoder;
    for (const char byte : detail::read_text(path))
        print_hex(decoder.push({&byte, 1}));
    print_hex(decoder.flush());
}

void cast(const char* path, const std::string& dtype) {
    detail::SafetensorsFile file = detail::read_safetensors(path);
    for (const DType wanted : {DType::float32, DType::float16, DType::bfloat16}) {
        if (dtype == name_of(wanted)) file.tensors["x"] = detail::cast(file.tensors.at("x"), wanted, "x");
    }
    detail::write_safetensors(path, file);
}

void sample(char** arguments) {
    const HostTensor tensor = detail::read_safetensors(arguments[0]).tensors.at("logits");
    SamplingParams params;
    Generator generator{std::strtoull(arguments[1], nullptr, 10), 0};
    params.temperature = std::atof(arguments[2]);
    if (std::atol(arguments[3]) > 0) params.top_k = std::strtoull(arguments[3], nullptr, 10);
    params.top_p = std::atof(arguments[4]);
    params.min_p = std::atof(arguments[5]);
    params.repetition_penalty = std::atof(arguments[6]);
    params.repetition_window = std::atoi(arguments[7]);
    const auto width = static_cast<std::size_t>(tensor.shape.at(1));
    std::vector<float> logits(width);
    std::vector<std::int64_t> recent;
    for (std::size_t row = 0; row < static_cast<std::size_t>(tensor.shape.at(0)); ++row) {
        std::memcpy(logits.data(), &tensor.data[row * width * sizeof(float)], width * sizeof(float));
        recent.push_back(choose_token(logits, params, recent, generator));
        std::printf("%lld\n", static_cast<long long>(recent.back()));
    }
}

void choose(const detail::Place& place, const char* path) {
    try {
        const detail::EngineInfo info = detail::choose_engine(Bundle::open(path), place);
        std::printf("%s", info.id.c_str());
        for (const auto& [name, at] : info.bundle_weights) {
            std::printf(" %s %llu %llu", name.c_str(), static_cast<unsigned long long>(at.offset),
                        static_cast<unsigned long long>(at.size_bytes));
        }
        std::printf("\n");
    } catch (const Error& error) {
        if (error.kind() != ErrorKind::engine) throw;
        std::printf("none\n");
    }
}

}  // namespace

int main(int argc, char** argv) {
    try {
        const std::string verb = argc > 1 ? argv[1] : "";
        if (verb == "utf8" && argc == 3) {
            decode(argv[2]);
        } else if (verb == "cast" && argc == 4) {
            cast(argv[2], argv[3]);
        } else if (verb == "sample" && argc == 10) {
            sample(argv + 2);
        } else if (verb == "engine" && argc > 5) {
            for (char** bundle = argv + 5; bundle < argv + argc; ++bundle)
                choose({argv[2], argv[3], std::atoi(argv[4])}, *bundle);
        } else {
            std::fprintf(stderr, "see the head of parity_tool.cpp\n");
            return 2;
        }
    } catch (const Error& error) {
        std::fprintf(stderr, "error: %s\n", error.what());
        return 2;
    }
    return 0;
}
