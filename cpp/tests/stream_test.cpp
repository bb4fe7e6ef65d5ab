// One stream: prefill, generate, save, on the fake engine.
#include <gtest/gtest.h>

#include <memory>
#include <string>

#include "fake_engine.hpp"
#include "formats.hpp"
#include "megalodon/session.hpp"
#include "refusal.hpp"
#include "safetensors.hpp"
#include "tiny_bundle.hpp"

namespace megalodon::test {
namespace {

using Tokens = std::vector<std::int64_t>;

Session make_session(const TinyModel& model = {}) {
    return Session(tiny_bundle(model), std::make_unique<FakeEngine>());
}

Tokens some_tokens(int count) {
    Tokens tokens;
    for (int index = 0; index < count; ++index)
        tokens.push_back(index * 5 % 11);
    return tokens;
}

Tokens generated(Stream& stream, const Tokens& prompt, const GenerateOptions& options) {
    Tokens tokens;
    stream.generate(prompt, options, [&](const GeneratedToken& item) {
        tokens.push_back(item.token);
        return true;
    });
    return tokens;
}

GenerateOptions sampled(std::int64_t count) {
    GenerateOptions options;
    options.max_new_tokens = count;
    options.sampling = SamplingParams{};
    options.sampling.seed = 5;
    options.stop_tokens = Tokens{};
    return options;
}

TEST(Stream, AnySplitGivesTheSameLogits) {
    Session session = make_session();
    const Tokens tokens = some_tokens(40);
    Stream whole = session.stream(), steps = session.stream(), pieces = session.stream();
    whole.prefill(tokens);
    for (const std::int64_t token : tokens)
        steps.step(token);
    pieces.prefill({tokens.begin(), tokens.begin() + 17});
    pieces.prefill({tokens.begin() + 17, tokens.end()});
    EXPECT_EQ(whole.logits(), steps.logits());
    EXPECT_EQ(whole.logits(), pieces.logits());
}

TEST(Stream, LogitsOfAllPositionsGiveTheLastOnes) {
    TinyModel model;
    Session last = make_session(model);
    model.returns_all_logits = true;
    Session all = make_session(model);
    Stream first = last.stream(), second = all.stream();
    EXPECT_EQ(first.prefill(some_tokens(7)), second.prefill(some_tokens(7)));
}

TEST(Stream, GoesOnFromAFileAsIfNothingHadHappened) {
    const TemporaryDirectory directory;
    const auto path = directory.path() / "new-directory" / "stream.safetensors";
    Session session = make_session();
    Stream stream = session.stream();
    generated(stream, some_tokens(30), sampled(9));  // leaves a token pending, and a generator
    stream.save(path);
    Stream resumed = session.resume(path), fork = stream.fork();
    const Tokens expected = generated(stream, {}, sampled(40));
    EXPECT_EQ(generated(resumed, {}, sampled(40)), expected);
    EXPECT_EQ(generated(fork, {}, sampled(40)), expected);
    EXPECT_EQ(stream.position(), resumed.position());
}

TEST(Stream, AFreshStreamCanBeSavedAndForked) {
    const TemporaryDirectory directory;
    Session session = make_session();
    const Stream stream = session.stream();
    stream.save(directory.path() / "fresh");
    Stream resumed = session.resume(directory.path() / "fresh"), fork = stream.fork();
    EXPECT_EQ(resumed.step(4), fork.step(4));
}

TEST(Stream, StopsWhereItIsTold) {
    Session session = make_session();
    Stream stream = session.stream();
    const Tokens all = generated(stream, some_tokens(3), sampled(60));
    Stream second = session.stream();
    GenerateOptions options = sampled(60);
    options.stop_tokens = Tokens{all[20]};
    Finish last = Finish::none;
    int count = 0;
    second.generate(some_tokens(3), options, [&](const GeneratedToken& item) {
        last = item.finish;
        ++count;
        return true;
    });
    EXPECT_EQ(last, Finish::stop_token);
    EXPECT_LE(count, 21);
    Stream third = session.stream();
    const Finish finish = third.generate(some_tokens(3), sampled(60), [](const GeneratedToken&) { return false; });
    EXPECT_EQ(finish, Finish::callback);
    Tokens rest = {all[0]};
    for (const std::int64_t token : generated(third, {}, sampled(59)))
        rest.push_back(token);
    EXPECT_EQ(rest, all) << "the token that was cut short is consumed by the next call";
}

TEST(Stream, AThrowingCallbackLeavesItWhereItWas) {
    Session session = make_session();
    Stream stream = session.stream(), other = session.stream();
    const Tokens all = generated(other, some_tokens(3), sampled(10));
    EXPECT_THROW(stream.generate(some_tokens(3), sampled(10), [](const GeneratedToken&) -> bool { throw 1; }), int);
    Tokens rest = {all[0]};
    for (const std::int64_t token : generated(stream, {}, sampled(9)))
        rest.push_back(token);
    EXPECT_EQ(rest, all);
}

TEST(Stream, RefusesWhatMakesNoSense) {
    Session session = make_session();
    Stream stream = session.stream();
    const auto generate = [&](const GenerateOptions& options, const Tokens& prompt = {1}) {
        return message_of([&] { generated(stream, prompt, options); }, ErrorKind::invalid_argument);
    };
    GenerateOptions options;
    EXPECT_NE(generate(options, {}).find("fresh stream"), std::string::npos);
    EXPECT_NE(generate(options, {-1}).find("token -1"), std::string::npos);
    options.max_new_tokens = 0;
    EXPECT_NE(generate(options).find("max_new_tokens = 0"), std::string::npos);
    options.max_new_tokens = 1;
    EXPECT_NE(message_of([&] { stream.generate(Tokens{1}, options, nullptr); }, ErrorKind::invalid_argument)
                  .find("no callback"),
              std::string::npos);
    options.stop_strings = {""};
    EXPECT_NE(generate(options).find("stop_strings"), std::string::npos);
    options.stop_strings.clear();
    options.sampling.top_p = 0;
    EXPECT_NE(generate(options).find("top_p"), std::string::npos);
    session.set_tokenizer(nullptr);
    EXPECT_NE(message_of([&] { stream.generate("text", {}, [](const GeneratedToken&) { return true; }); },
                         ErrorKind::invalid_argument)
                  .find("set_tokenizer"),
              std::string::npos);
    EXPECT_EQ(stream.position(), 0);
}

// Changes one thing of a good file; resuming must fail with a message that has `expected` in it.
void expect_refused(const std::function<void(detail::SafetensorsFile&)>& change, const std::string& expected) {
    const TemporaryDirectory directory;
    const auto path = directory.path() / "stream";
    Session session = make_session();
    Stream stream = session.stream();
    stream.prefill(some_tokens(30));
    stream.save(path);
    detail::SafetensorsFile file = detail::read_safetensors(path);
    change(file);
    detail::write_safetensors(path, file);
    EXPECT_NE(message_of([&] { session.resume(path); }, ErrorKind::state).find(expected), std::string::npos)
        << expected;
}

TEST(SavedStream, AForeignOrDamagedOneIsRefused) {
    using File = detail::SafetensorsFile;
    expect_refused([](File& file) { file.metadata["format"] = "other"; }, "format is 'other'");
    expect_refused([](File& file) { file.metadata.erase("format_version"); }, "format_version is missing");
    expect_refused(
        [](File& file) { file.metadata["bundle_fingerprint"] = file.metadata["model_fingerprint"] = "ffff"; },
        "comes from bundle ffff");
    expect_refused([](File& file) { file.tensors.erase("position"); }, "position is missing");
    expect_refused([](File& file) { file.tensors.erase("past_cema.0"); }, "past_cema.0 is missing");
    expect_refused([](File& file) { file.tensors["past_key.1"] = file.tensors["past_key.0"]; }, "unknown tensor");
    expect_refused([](File& file) { file.tensors["position"].data[0] = std::byte{29}; }, "has shape [1, 2, 6");
    expect_refused([](File& file) { file.tensors["position"].data[7] = std::byte{0x80}; }, "position is -");
    expect_refused([](File& file) { file.tensors["recent_tokens"].data[0] = std::byte{99}; }, "token 99");
    expect_refused(
        [](File& file) {
            file.tensors["past_norm.final"].data[3] = std::byte{0x7f},
            file.tensors["past_norm.final"].data[2] = std::byte{0x80};
        },
        "holds NaN or infinity");
    expect_refused([](File& file) { file.tensors["logits"] = {DType::float32, {0}, {}}; }, "logits is missing");
    expect_refused([](File& file) { file.tensors["generator"] = {DType::uint64, {1}, std::vector<std::byte>(8)}; },
                   "generator has length 1");
    expect_refused([](File& file) { file.tensors["past_cema.0"].dtype = DType::int8; }, "past_cema.0");
}

TEST(SavedStream, ABrokenStreamIsNotSavedAndLeavesNothingBehind) {
    auto engine = std::make_unique<FakeEngine>();
    FakeEngine& fake = *engine;
    Session session(tiny_bundle(), std::move(engine));
    const TemporaryDirectory directory;
    StreamBatch batch = session.batch(2);
    Stream stream = batch.admit(), other = batch.admit();
    other.prefill(some_tokens(6));  // the memory of rows stays as long as it is
    fake.bad_token = 5;
    stream.prefill({1, 2, 3, 4, 5});
    EXPECT_NE(message_of([&] { stream.save(directory.path() / "stream"); }, ErrorKind::state).find("NaN"),
              std::string::npos);
    EXPECT_TRUE(std::filesystem::is_empty(directory.path()));
    batch.retire(stream);
    Stream next = batch.admit(), alone = session.stream();
    EXPECT_EQ(next.prefill({1, 2, 3}), alone.prefill({1, 2, 3}));
    next.save(directory.path() / "stream");
}

}  // namespace
}  // namespace megalodon::test
