// What several threads may do at once; the build with ThreadSanitizer is what makes this a test.
#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <memory>
#include <thread>

#include "fake_engine.hpp"
#include "megalodon/log.hpp"
#include "megalodon/session.hpp"
#include "policy_worker.hpp"
#include "stream_service.hpp"
#include "tiny_bundle.hpp"

namespace megalodon::test {
namespace {

using Tokens = std::vector<std::int64_t>;

Session make_session() {
    return Session(tiny_bundle(), std::make_unique<FakeEngine>());
}

StreamService::Request request(std::uint64_t number) {
    StreamService::Request made{{}, 5 + number % 9, {}};
    made.sampling.seed = number;
    for (std::uint64_t index = 0; index < 1 + 7 * number % 40; ++index) {
        made.prompt.push_back(static_cast<std::int64_t>((number + 3 * index) % 11));
    }
    return made;
}

Tokens alone(const StreamService::Request& asked) {
    Session session = make_session();
    Stream stream = session.stream();
    stream.prefill(asked.prompt);
    Tokens tokens;
    while (tokens.size() < asked.max_new_tokens)
        tokens.push_back(stream.sample(asked.sampling));
    return tokens;
}

TEST(StreamService, ClientsGetWhatTheirStreamsGiveAlone) {
    Session session = make_session();
    StreamService service(session, 3, 8);
    std::vector<std::thread> clients;
    std::atomic<int> num_right{0};
    for (std::uint64_t client = 0; client < 6; ++client) {
        clients.emplace_back([&, client] {
            for (std::uint64_t turn = 0; turn < 10; ++turn) {
                const StreamService::Request asked = request(client * 10 + turn);
                if (service.submit(asked).get() == alone(asked)) ++num_right;
            }
        });
    }
    for (std::thread& client : clients)
        client.join();
    EXPECT_EQ(num_right, 60);
}

TEST(StreamService, FinishesWhatWasSubmittedAndTellsOfMistakes) {
    Session session = make_session();
    std::future<Tokens> result;
    {
        StreamService service(session, 1);
        EXPECT_THROW(service.submit({{}, 1, {}}), Error);
        EXPECT_THROW(service.submit({{99}, 1, {}}), Error);
        service.submit(request(1));
        result = service.submit(request(2));
    }
    EXPECT_EQ(result.get(), alone(request(2)));
}

TEST(StreamService, AnEnginesErrorReachesEveryClient) {
    auto engine = std::make_unique<FakeEngine>();
    engine->before_call = [] { throw Error(ErrorKind::engine, "gone"); };
    Session session(tiny_bundle(), std::move(engine));
    StreamService service(session, 2);
    auto first = service.submit(request(1)), second = service.submit(request(2));
    EXPECT_THROW(first.get(), Error);
    EXPECT_THROW(second.get(), Error);
}

TEST(StreamService, AServiceThatCannotBeIsRefusedWhereItIsMade) {
    Session session = make_session();
    EXPECT_THROW(StreamService(session, 0), Error);
}

TEST(PolicyWorker, AnswersTheNewestObservationAndNeverBlocks) {
    auto engine = std::make_unique<FakeEngine>();
    std::atomic<bool> is_slow{true};
    engine->before_call = [&] {
        while (is_slow)
            std::this_thread::sleep_for(std::chrono::milliseconds(1));
    };
    Session session(tiny_bundle(), std::move(engine));
    PolicyWorker worker(session);
    for (std::uint64_t number = 0; number < 50; ++number) {
        worker.post(static_cast<std::int64_t>(number % 11), number);
        EXPECT_FALSE(worker.poll().has_value()) << "the model is still busy";
    }
    is_slow = false;
    std::optional<PolicyWorker::Action> last;
    while (!last || last->observation != 49) {
        if (const auto action = worker.poll()) last = action;
    }
}

TEST(PolicyWorker, TellsTheLoopWhatEndedIt) {
    auto engine = std::make_unique<FakeEngine>();
    engine->before_call = [] { throw Error(ErrorKind::engine, "gone"); };
    Session session(tiny_bundle(), std::move(engine));
    PolicyWorker worker(session);
    worker.post(1, 0);
    EXPECT_THROW(for (;;) worker.poll(), Error);
}

TEST(Sessions, AreIndependentAndMayMoveBetweenThreads) {
    const Bundle bundle = tiny_bundle();
    std::atomic<int> num_messages{0};
    set_logger([&](LogLevel, std::string_view) { ++num_messages; });
    std::vector<std::vector<float>> logits(4);
    std::vector<std::thread> threads;
    for (std::size_t number = 0; number < logits.size(); ++number) {
        threads.emplace_back([&, number] {
            Session session(bundle, std::make_unique<FakeEngine>());
            Stream stream = session.stream();
            stream.prefill({1, 2, 3});
            std::thread([&] { logits[number] = stream.step(4); }).join();
        });
    }
    for (std::thread& thread : threads)
        thread.join();
    set_logger({});
    for (const auto& found : logits)
        EXPECT_EQ(found, logits[0]);
}

}  // namespace
}  // namespace megalodon::test
