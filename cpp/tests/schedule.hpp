// Streams in slots, admitted, retired, forked, saved and sampled at random, against each stream run alone.
#pragma once

#include <gtest/gtest.h>

#include <filesystem>
#include <random>
#include <vector>

#include "megalodon/session.hpp"

namespace megalodon::test {

// A stream in a slot, and the same stream alone.
struct Pair {
    Stream shared;
    Stream alone;
};

class Schedule {
 public:
    Schedule(Session& session, Session& other, std::int64_t num_slots, const std::filesystem::path& directory)
        : session_(session), other_(other), batch_(session.batch(num_slots)), file_(directory / "stream.safetensors") {}

    void step() {
        const int action = pick(10);
        if (action == 4 && !pairs_.empty()) {
            sample();
        } else if (action == 0 && batch_.num_free() > 0) {
            pairs_.push_back({batch_.admit(), other_.stream()});
        } else if (action == 1 && !pairs_.empty()) {
            retire(pick_pair());
        } else if (action == 2 && batch_.num_free() > 0 && !pairs_.empty()) {
            const Pair& chosen = pairs_[pick_pair()];
            pairs_.push_back({batch_.admit(chosen.shared.snapshot()), chosen.alone.fork()});
        } else if (action == 3 && !pairs_.empty()) {
            move(pick_pair());
        } else {
            feed();
        }
    }
    int num_compared = 0;

 private:
    int pick(int count) { return std::uniform_int_distribution<int>(0, count - 1)(random_); }
    std::size_t pick_pair() { return static_cast<std::size_t>(pick(static_cast<int>(pairs_.size()))); }

    void retire(std::size_t index) {
        if (pick(2) == 0) batch_.retire(pairs_[index].shared);  // else its destructor does
        pairs_.erase(pairs_.begin() + static_cast<std::ptrdiff_t>(index));
    }

    // Seldom through a file: a disk takes its time to say that it has written.
    void move(std::size_t index) {
        const bool through_file = pick(100) == 0;
        if (through_file) pairs_[index].shared.save(file_);
        const Snapshot snapshot =
            through_file ? Snapshot::load(file_, session_.bundle()) : pairs_[index].shared.snapshot();
        batch_.retire(pairs_[index].shared);
        pairs_[index].shared = batch_.admit(snapshot);
    }

    // Some of the streams at once, each with settings of its own.
    void sample() {
        std::vector<Sample> samples;
        std::vector<std::int64_t> expected;
        for (Pair& pair : pairs_) {
            if (pair.alone.position() == 0 || pick(3) == 0) continue;
            SamplingParams params;
            params.seed = static_cast<std::uint64_t>(pick(5));
            params.temperature = pick(2);
            params.repetition_penalty = 1.0 + 0.2 * pick(2);
            samples.push_back({&pair.shared, params});
            expected.push_back(pair.alone.sample(params));
        }
        const auto found = batch_.sample(samples);
        ASSERT_EQ(found.size(), expected.size());
        for (std::size_t index = 0; index < found.size(); ++index)
            ASSERT_EQ(found[index], expected[index]);
        num_compared += static_cast<int>(found.size());
    }

    void feed() {
        std::vector<Feed> feeds;
        std::vector<Pair*> fed;
        for (Pair& pair : pairs_) {
            if (pick(4) == 0) continue;
            const int length = pick(3) == 0 ? 1 + pick(30) : 1;
            std::vector<std::int64_t> tokens;
            for (int count = 0; count < length; ++count)
                tokens.push_back(pick(11));
            pair.alone.prefill(tokens);
            feeds.push_back({&pair.shared, tokens});
            fed.push_back(&pair);
        }
        batch_.feed(feeds);
        for (Pair* pair : fed) {
            ASSERT_EQ(pair->shared.logits(), pair->alone.logits());
            ASSERT_EQ(pair->shared.position(), pair->alone.position());
            ++num_compared;
        }
    }

    Session& session_;
    Session& other_;
    StreamBatch batch_;
    std::filesystem::path file_;
    std::vector<Pair> pairs_;
    std::mt19937 random_{7};
};

}  // namespace megalodon::test
