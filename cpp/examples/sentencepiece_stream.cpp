// sentencepiece_stream BUNDLE PROMPT: hello_stream for a bundle whose tokenizer is a SentencePiece model.
#include <cstdio>
#include <megalodon/runtime.hpp>

#include "sentencepiece_tokenizer.hpp"

int main(int argc, char** argv) {
    if (argc != 3) {
        std::fprintf(stderr, "usage: sentencepiece_stream BUNDLE PROMPT\n");
        return 2;
    }
    try {
        const auto bundle = megalodon::Bundle::open(argv[1]);
        megalodon::Session session(bundle);
        session.set_tokenizer(
            std::make_shared<SentencePieceTokenizer>(bundle.path() / bundle.manifest().tokenizer_file));
        megalodon::Stream stream = session.stream();
        stream.generate(argv[2], {}, [](const megalodon::GeneratedToken& item) {
            std::fwrite(item.text.data(), 1, item.text.size(), stdout);
            std::fflush(stdout);
            return true;
        });
        std::printf("\n");
    } catch (const megalodon::Error& error) {
        std::fprintf(stderr, "error: %s\n", error.what());
        return 2;
    }
    return 0;
}
