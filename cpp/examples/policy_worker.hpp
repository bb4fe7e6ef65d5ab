// A stream that thinks in a thread of its own, for a control loop that must never wait for it.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <functional>
#include <mutex>
#include <optional>
#include <thread>
#include <utility>

#include "megalodon/session.hpp"

// The control loop posts its newest observation and looks whether an action has come. Both hold a lock for a few
// instructions only; the model runs outside of it. An observation that comes while the model is busy replaces one that
// has not been taken: the model always sees the newest.
class PolicyWorker {
 public:
    struct Action {
        std::int64_t token;
        std::uint64_t observation;  // number of the observation that it answers
    };

    // `session` is used by the worker's thread alone until the worker is gone.
    explicit PolicyWorker(megalodon::Session& session) : thread_([this, &session] { run(session); }) {}

    ~PolicyWorker() {
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            is_stopping_ = true;
        }
        wake_.notify_one();
        thread_.join();
    }
    PolicyWorker(const PolicyWorker&) = delete;
    PolicyWorker& operator=(const PolicyWorker&) = delete;

    void post(std::int64_t observation_token, std::uint64_t number) {
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            inbox_ = Observation{observation_token, number};
        }
        wake_.notify_one();
    }

    // The newest action, once. Rethrows what ended the worker.
    std::optional<Action> poll() {
        const std::lock_guard<std::mutex> lock(mutex_);
        if (failure_) std::rethrow_exception(failure_);
        return std::exchange(outbox_, std::nullopt);
    }

 private:
    struct Observation {
        std::int64_t token;
        std::uint64_t number;
    };

    void run(megalodon::Session& session) {
        try {
            megalodon::Stream stream = session.stream();
            while (const std::optional<Observation> seen = next()) {
                stream.step(seen->token);  // the whole past is in the stream's constant memory
                const Action action{stream.sample(megalodon::SamplingParams::greedy()), seen->number};
                const std::lock_guard<std::mutex> lock(mutex_);
                outbox_ = action;
            }
        } catch (...) {
            const std::lock_guard<std::mutex> lock(mutex_);
            failure_ = std::current_exception();
        }
    }

    // Waits for an observation; none: it is time to stop.
    std::optional<Observation> next() {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [this] { return is_stopping_ || inbox_.has_value(); });
        if (is_stopping_) return std::nullopt;
        return std::exchange(inbox_, std::nullopt);
    }

    std::mutex mutex_;
    std::condition_variable wake_;
    std::optional<Observation> inbox_;
    std::optional<Action> outbox_;
    std::exception_ptr failure_;
    bool is_stopping_ = false;
    std::thread thread_;  // last: it uses all of the above
};
