// The text of bundles with a SentencePiece model, over Debian's libsentencepiece-dev. A file to copy.
#pragma once

#include <sentencepiece_processor.h>

#include <filesystem>
#include <string>
#include <string_view>
#include <vector>

#include "megalodon/tokenizer.hpp"

class SentencePieceTokenizer : public megalodon::Tokenizer {
 public:
    // Throws Error (bundle) for a file that is no SentencePiece model.
    explicit SentencePieceTokenizer(const std::filesystem::path& model) {
        if (const auto status = processor_.Load(model.string()); !status.ok()) {
            throw megalodon::Error(megalodon::ErrorKind::bundle,
                                   model.string() + ": not a readable SentencePiece model; export again");
        }
    }

    std::vector<std::int64_t> encode(std::string_view utf8, bool start) const override {
        std::vector<int> pieces;
        processor_.Encode(utf8, &pieces);
        std::vector<std::int64_t> tokens(pieces.begin(), pieces.end());
        if (start && processor_.bos_id() >= 0) tokens.insert(tokens.begin(), processor_.bos_id());
        return tokens;
    }

    std::string bytes_of(std::int64_t token) const override {
        const auto piece = static_cast<int>(token);
        if (token < 0 || token >= processor_.GetPieceSize()) return "";
        if (processor_.IsControl(piece) || processor_.IsUnused(piece)) return "";
        if (processor_.IsUnknown(piece)) return processor_.DecodeIds({piece});
        std::string text = processor_.IdToPiece(piece);
        if (processor_.IsByte(piece)) return {static_cast<char>(std::stoi(text.substr(3, 2), nullptr, 16))};  // <0xE2>
        for (std::size_t at; (at = text.find(kSpace)) != std::string::npos;)
            text.replace(at, sizeof kSpace - 1, " ");
        return text;
    }

 private:
    static constexpr char kSpace[] = "\xE2\x96\x81";  // U+2581, what SentencePiece writes for a space

    sentencepiece::SentencePieceProcessor processor_;
};
