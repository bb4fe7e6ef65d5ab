// Streams in slots, admitted, retired, forked and saved at random, against each stream run alone.
#include <gtest/gtest.h>

#include <memory>
#include <optional>
#include <random>
#include <string>

#include "fake_engine.hpp"
#include "megalodon/session.hpp"
#include "refusal.hpp"
#include "schedule.hpp"
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

TEST_P(Batches, RandomSchedulesEqualEachStreamAlone) {
    const TemporaryDirectory directory;
    Session shared = session(GetParam());
    Case alone_case = GetParam();
    alone_case.options.is_device = false;
    alone_case.options.has_fixed_shapes = false;
    Session alone = session(alone_case);
    Schedule schedule(shared, alone, GetParam().num_slots, directory.path());
    for (int step = 0; step < 10'000 && !HasFatalFailure(); ++step)
        schedule.step();
    EXPECT_GT(schedule.num_compared, 10'000);
}

INSTANTIATE_TEST_SUITE_P(Engines, Batches,
                         testing::Values(Case{"Host", {12, 64, false, false}, 4},
                                         Case{"LongChunks", {150, 64, false, false}, 3},  // several buckets of rows
                                         Case{"FixedShapes", {12, 64, true, false}, 4},
                                         Case{"Device", {12, 64, true, true}, 4}),
                         [](const auto& tested) { return std::string(tested.param.name); });

class Batch : public testing::Test {
 protected:
    Session make_session(FakeOptions options = {}) {
        auto engine = std::make_unique<FakeEngine>(options);
        fake = engine.get();
        return Session(tiny_bundle(), std::move(engine));
    }
    FakeEngine* fake = nullptr;  // of the session that was made last
};

constexpr FakeOptions kDevice{12, 3, true, true};

TEST_F(Batch, StreamsAdvanceInOneCall) {
    Session session = make_session();
    StreamBatch batch = session.batch(3);
    Stream first = batch.admit(), second = batch.admit(), third = batch.admit();
    batch.feed({{&first, {1}}, {&second, {2}}, {&third, {3}}});
    EXPECT_EQ(fake->num_calls, 1);
    batch.feed({{&first, {1}}, {&third, {3}}});  // the second one waits, so there are two ranges
    EXPECT_EQ(fake->num_calls, 3);
    batch.retire(second);
    batch.feed({{&first, {1}}, {&third, {3}}});  // a free slot runs along
    EXPECT_EQ(fake->num_calls, 4);
    batch.feed({{&first, {1, 2}}, {&third, {3, 4}}});  // but not for several tokens
    EXPECT_EQ(fake->num_calls, 6);
}

TEST_F(Batch, ADeviceStepsAllSlotsAtOnceByTwoPreparedSteps) {
    Session session = make_session(kDevice);
    StreamBatch batch = session.batch(3);
    Stream first = batch.admit(), second = batch.admit();
    for (int step = 0; step < 20; ++step)
        batch.feed({{&first, {1}}, {&second, {2}}});
    EXPECT_EQ(fake->num_calls, 20);
    EXPECT_EQ(fake->num_prepared, 2);  // one for each half of the pair
    batch.feed({{&first, {1}}});       // the second waits: it runs along, and is taken back
    EXPECT_EQ(fake->num_calls, 21);
    EXPECT_EQ(fake->num_prepared, 2);
    EXPECT_NE(message_of([&] { session.batch(4); }, ErrorKind::invalid_argument).find("--max-batch 4"),
              std::string::npos);
}

TEST_F(Batch, ABrokenStreamIsLeftOutOfAChoice) {
    Session session = make_session(kDevice);
    StreamBatch batch = session.batch(2);
    Stream good = batch.admit(), bad = batch.admit();
    fake->bad_token = 7;
    bad.step(1);
    bad.step(7);
    good.step(1);
    const auto chosen = batch.sample({{&good, SamplingParams::greedy()}, {&bad, SamplingParams::greedy()}});
    EXPECT_TRUE(chosen.at(0).has_value());
    EXPECT_FALSE(chosen.at(1).has_value());
    EXPECT_NE(message_of([&] { bad.sample({}); }, ErrorKind::state).find("not finite"), std::string::npos);
    Stream fresh = session.batch(1).admit();
    EXPECT_NE(message_of([&] { fresh.sample({}); }, ErrorKind::invalid_argument).find("fresh stream"),
              std::string::npos);
}

TEST_F(Batch, ABrokenStreamLeavesNothingWherePiecesAreRead) {
    Session session = make_session(kDevice);
    StreamBatch batch = session.batch(2);
    Stream bad = batch.admit(), good = batch.admit(), alone = session.stream();
    fake->bad_token = 9;
    bad.prefill({1, 2, 3, 4, 5, 6, 7, 8, 9});
    EXPECT_EQ(good.prefill({1, 2}), alone.prefill({1, 2}));
    EXPECT_EQ(good.step(3), alone.step(3));
}

TEST_F(Batch, MistakesAreFoundBeforeAnythingIsComputed) {
    Session session = make_session();
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
    EXPECT_EQ(fake->num_calls, 0);
    EXPECT_EQ(first.position(), 0);
}

TEST_F(Batch, SizesThatNoMachineHasAreRefused) {
    const std::int64_t many = std::int64_t{1} << 40;
    Session session = make_session();
    EXPECT_NE(message_of([&] { session.batch(many); }, ErrorKind::invalid_argument).find("slots"), std::string::npos);
    TinyModel wide;
    wide.vocab_size = many << 20;
    Session other(tiny_bundle(wide), std::make_unique<FakeEngine>());
    EXPECT_NE(message_of([&] { other.batch(2); }, ErrorKind::invalid_argument).find("2^60"), std::string::npos);
}

TEST_F(Batch, AStreamGivesItsSlotBackWhenItGoes) {
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

TEST_F(Batch, HandlesKeepAliveWhatTheyNeed) {
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

TEST_F(Batch, WhatWasMovedFromIsNotEmpty) {
    Session session = make_session(), moved_session = std::move(session);
    StreamBatch batch = moved_session.batch(2), moved_batch = std::move(batch);
    Stream stream = moved_batch.admit();
    stream.prefill({1, 2, 3});
    const Snapshot snapshot = stream.snapshot();
    Snapshot copy = snapshot, moved = std::move(copy);
    EXPECT_EQ(batch.admit(copy).position(), 3);  // NOLINT: that is the question
    EXPECT_EQ(session.resume(moved).position(), 3);
}

TEST_F(Batch, AnEnginesErrorReachesTheCaller) {
    Session session = make_session();
    Stream stream = session.stream();
    stream.step(1);
    fake->before_call = [] { throw Error(ErrorKind::engine, "the device is gone"); };
    EXPECT_EQ(message_of([&] { stream.step(1); }, ErrorKind::engine), "the device is gone");
    fake->before_call = nullptr;
    Stream other = session.stream();
    EXPECT_EQ(other.step(1).size(), 11u);
}

}  // namespace
}  // namespace megalodon::test
