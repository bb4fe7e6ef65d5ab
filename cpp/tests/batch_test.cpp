// Streams in slots, admitted, retired, forked and saved at random, against each stream run alone.
#include <gtest/gtest.h>

#include <memory>
#include <optional>
#include <random>
#include <string>

#include "fake_engine.hpp"
#include "megalodon/session.hpp"
#include "tiny_bundle.hpp"

namespace megalodon::test {
namespace {

using Tokens = std::vector<std::int64_t>;

struct Case {
    const char* name;
    FakeOptions options;
    std::int64_t num_slots;
};

class Batches : public testing::TestWithParam<Case> {
 protected:
    Session session(const Case& given) const {
        TinyModel model;
        model.chunk_size = given.options.chunk_size;
        return Session(tiny_bundle(model), std::make_unique<FakeEngine>(given.options));
    }
};

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
        if (action == 0 && batch_.num_free() > 0) {
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

    void feed() {
        std::vector<Feed> feeds;
        std::vector<Pair*> fed;
        for (Pair& pair : pairs_) {
            if (pick(4) == 0) continue;
            const int length = pick(3) == 0 ? 1 + pick(30) : 1;
            Tokens tokens;
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

TEST_P(Batches, RandomSchedulesEqualEachStreamAlone) {
    const TemporaryDirectory directory;
    Session shared = session(GetParam());
    Case alone_case = GetParam();
    alone_case.options.is_device = false;
    alone_case.options.has_fixed_capacity = false;
    Session alone = session(alone_case);
    Schedule schedule(shared, alone, GetParam().num_slots, directory.path());
    for (int step = 0; step < 10'000 && !HasFatalFailure(); ++step)
        schedule.step();
    EXPECT_GT(schedule.num_compared, 10'000);
}

INSTANTIATE_TEST_SUITE_P(Engines, Batches,
                         testing::Values(Case{"Host", {12, 64, false, false}, 4},
                                         Case{"LongChunks", {150, 64, false, false}, 3},  // several buckets of rows
                                         Case{"Device", {12, 64, true, true}, 4},
                                         Case{"SmallBatches", {12, 2, true, true}, 5}),
                         [](const auto& tested) { return std::string(tested.param.name); });

Session make_session(std::unique_ptr<FakeEngine> engine = std::make_unique<FakeEngine>()) {
    return Session(tiny_bundle(), std::move(engine));
}

std::string message_of(const std::function<void()>& body, ErrorKind kind) {
    try {
        body();
    } catch (const Error& error) {
        EXPECT_EQ(error.kind(), kind) << error.what();
        return error.what();
    }
    ADD_FAILURE() << "nothing was thrown";
    return "";
}

TEST(Batch, StreamsAdvanceInOneCall) {
    auto engine = std::make_unique<FakeEngine>();
    FakeEngine& fake = *engine;
    Session session = make_session(std::move(engine));
    StreamBatch batch = session.batch(3);
    Stream first = batch.admit(), second = batch.admit(), third = batch.admit();
    batch.feed({{&first, {1}}, {&second, {2}}, {&third, {3}}});
    EXPECT_EQ(fake.num_calls, 1);
    batch.feed({{&first, {1}}, {&third, {3}}});  // the second one waits, so there are two ranges
    EXPECT_EQ(fake.num_calls, 3);
    batch.retire(second);
    batch.feed({{&first, {1}}, {&third, {3}}});  // a free slot runs along
    EXPECT_EQ(fake.num_calls, 4);
}

TEST(Batch, MistakesAreFoundBeforeAnythingIsComputed) {
    auto engine = std::make_unique<FakeEngine>();
    FakeEngine& fake = *engine;
    Session session = make_session(std::move(engine));
    StreamBatch batch = session.batch(2), other = session.batch(1);
    Stream first = batch.admit(), second = batch.admit(), stranger = other.admit();
    const auto invalid = ErrorKind::invalid_argument;
    EXPECT_NE(message_of([&] { batch.feed({{&first, {1}}, {&second, {11}}}); }, invalid).find("token 11"),
              std::string::npos);
    EXPECT_NE(message_of([&] { batch.feed({{&first, {}}}); }, invalid).find("no tokens"), std::string::npos);
    EXPECT_NE(message_of([&] { batch.feed({{&first, {1}}, {&first, {1}}}); }, invalid).find("twice"),
              std::string::npos);
    EXPECT_NE(message_of([&] { batch.feed({{&stranger, {1}}}); }, ErrorKind::state).find("another batch"),
              std::string::npos);
    EXPECT_NE(message_of([&] { batch.retire(stranger); }, ErrorKind::state).find("another batch"), std::string::npos);
    EXPECT_NE(message_of([&] { batch.admit(); }, invalid).find("slots"), std::string::npos);
    EXPECT_NE(message_of([&] { session.batch(0); }, invalid).find("num_slots = 0"), std::string::npos);
    EXPECT_EQ(fake.num_calls, 0);
    EXPECT_EQ(first.position(), 0);
}

TEST(Batch, AStreamGivesItsSlotBackWhenItGoes) {
    Session session = make_session();
    StreamBatch batch = session.batch(1);
    {
        const Stream stream = batch.admit();
        EXPECT_EQ(batch.num_free(), 0);
    }
    EXPECT_EQ(batch.num_free(), 1);
    Stream stream = batch.admit();
    batch.retire(stream);
    EXPECT_NE(message_of([&] { stream.step(1); }, ErrorKind::state).find("retired"), std::string::npos);
    EXPECT_NE(message_of([&] { stream.sample({}); }, ErrorKind::state).find("retired"), std::string::npos);
    Stream moved = std::move(stream);
    EXPECT_NE(message_of([&] { stream.step(1); }, ErrorKind::state).find("moved"), std::string::npos);
}

TEST(Batch, HandlesKeepAliveWhatTheyNeed) {
    std::optional<Stream> stream;
    {
        Session session = make_session();
        StreamBatch batch = session.batch(2);
        stream.emplace(batch.admit());
    }
    EXPECT_EQ(stream->step(3).size(), 11u);
    Stream fork = stream->fork();
    stream.reset();
    EXPECT_EQ(fork.position(), 1);
}

TEST(Batch, AnEnginesErrorReachesTheCaller) {
    auto engine = std::make_unique<FakeEngine>();
    FakeEngine& fake = *engine;
    Session session = make_session(std::move(engine));
    Stream stream = session.stream();
    stream.step(1);
    fake.before_call = [] { throw Error(ErrorKind::engine, "the device is gone"); };
    EXPECT_EQ(message_of([&] { stream.step(1); }, ErrorKind::engine), "the device is gone");
    fake.before_call = nullptr;
    Stream other = session.stream();
    EXPECT_EQ(other.step(1).size(), 11u);
}

}  // namespace
}  // namespace megalodon::test
