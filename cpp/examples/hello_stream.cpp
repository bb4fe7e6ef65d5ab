// hello_stream BUNDLE [PROMPT]: a completion, printed as it comes.
#include <cstdio>
#include <megalodon/runtime.hpp>

int main(int argc, char** argv) {
    if (argc < 2) {
        std::fprintf(stderr, "usage: hello_stream BUNDLE [PROMPT]\n");
        return 2;
    }
    try {
        megalodon::Session session(megalodon::Bundle::open(argv[1]));
        megalodon::Stream stream = session.stream();
        megalodon::GenerateOptions options;
        options.max_new_tokens = 200;
        stream.generate(argc > 2 ? argv[2] : "def main(", options, [](const megalodon::GeneratedToken& item) {
            std::fwrite(item.text.data(), 1, item.text.size(), stdout);
            std::fflush(stdout);
            return true;
        });
        std::printf("\n");
        stream.save("conversation.safetensors");  // Session::resume goes on from here, in Python too
    } catch (const megalodon::Error& error) {
        std::fprintf(stderr, "error: %s\n", error.what());
        return 2;
    }
    return 0;
}
