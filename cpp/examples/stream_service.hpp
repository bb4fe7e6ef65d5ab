// Many clients, one model: threads submit prompts, one loop advances all streams together.
#pragma once

#include <algorithm>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <exception>
#include <future>
#include <list>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "megalodon/session.hpp"

// Slots decode in one call of the model per token. A waiting prompt takes a slot as soon as one is free, and is read in
// pieces between those calls, so that a long prompt does not hold up the others.
class StreamService {
 public:
    using Tokens = std::vector<std::int64_t>;

    struct Request {
        Tokens prompt;
        std::size_t max_new_tokens;
        megalodon::SamplingParams sampling;
    };

    // `session` is used by the service's thread alone until the service is gone. Throws what Session::batch throws.
    StreamService(megalodon::Session& session, std::int64_t num_slots, std::size_t piece_tokens = 64)
        : vocab_size_(session.bundle().manifest().vocab_size),
          piece_tokens_(std::max<std::size_t>(piece_tokens, 1)),
          batch_(session.batch(num_slots)),
          thread_([this] { run(); }) {}

    // Finishes what was submitted.
    ~StreamService() {
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            is_stopping_ = true;
        }
        wake_.notify_one();
        thread_.join();
    }
    StreamService(const StreamService&) = delete;
    StreamService& operator=(const StreamService&) = delete;

    // From any thread. Throws Error (invalid_argument) for a request that no stream can take; the future has the new
    // tokens, or what went wrong with the engine.
    std::future<Tokens> submit(Request request) {
        check(request);
        Job job{std::move(request), {}, {}};
        std::future<Tokens> result = job.result.get_future();
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            queue_.push_back(std::move(job));
        }
        wake_.notify_one();
        return result;
    }

 private:
    void check(const Request& request) const {
        megalodon::check(request.sampling);
        bool is_valid = !request.prompt.empty() && request.max_new_tokens > 0;
        for (const std::int64_t token : request.prompt)
            is_valid = is_valid && token >= 0 && token < vocab_size_;
        if (is_valid) return;
        throw megalodon::Error(megalodon::ErrorKind::invalid_argument, "a request needs a prompt of tokens below " +
                                                                           std::to_string(vocab_size_) +
                                                                           ", and at least one token to generate");
    }

    struct Job {
        Request request;
        std::promise<Tokens> result;
        Tokens generated;
    };
    struct Active {
        Job job;
        megalodon::Stream stream;
        std::size_t num_read = 0;  // of the prompt
        bool has_read() const { return num_read == job.request.prompt.size(); }
    };

    void run() {
        std::list<Active> active;  // streams keep their address
        while (admit(active)) {
            try {
                advance(active);
                choose(active);
            } catch (...) {
                for (Active& entry : active)
                    entry.job.result.set_exception(std::current_exception());
                active.clear();  // after an engine's error streams are undefined
            }
        }
    }

    // Fills free slots; waits while there is nothing to do. False: it is time to stop.
    bool admit(std::list<Active>& active) {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return is_stopping_ || !queue_.empty() || !active.empty(); });
        while (!queue_.empty() && batch_.num_free() > 0) {
            active.push_back({std::move(queue_.front()), batch_.admit()});
            queue_.pop_front();
        }
        return !active.empty();
    }

    // One token for every stream that decodes, and a piece of prompt for the others.
    void advance(std::list<Active>& active) {
        std::vector<megalodon::Feed> feeds;
        for (Active& entry : active) {
            const Tokens& prompt = entry.job.request.prompt;
            const std::size_t end = std::min(prompt.size(), entry.num_read + piece_tokens_);
            const auto begin = prompt.begin();
            feeds.push_back({&entry.stream, Tokens(begin + static_cast<std::ptrdiff_t>(entry.num_read),
                                                   begin + static_cast<std::ptrdiff_t>(end))});
            entry.num_read = end;
        }
        batch_.feed(feeds);
    }

    // The next token of every stream whose prompt is read; those that are done leave.
    void choose(std::list<Active>& active) {
        std::vector<megalodon::Sample> samples;
        std::vector<std::list<Active>::iterator> asked;
        for (auto entry = active.begin(); entry != active.end(); ++entry) {
            if (!entry->has_read()) continue;
            samples.push_back({&entry->stream, entry->job.request.sampling});
            asked.push_back(entry);
        }
        const auto tokens = batch_.sample(samples);
        for (std::size_t index = 0; index < asked.size(); ++index) {
            if (take(asked[index]->job, tokens[index])) active.erase(asked[index]);
        }
    }

    // Whether the job is done.
    static bool take(Job& job, const std::optional<std::int64_t>& token) {
        if (!token) {
            const megalodon::Error error(megalodon::ErrorKind::state, "the stream went non-finite; submit it again");
            job.result.set_exception(std::make_exception_ptr(error));
            return true;
        }
        job.generated.push_back(*token);
        if (job.generated.size() < job.request.max_new_tokens) return false;
        job.result.set_value(std::move(job.generated));
        return true;
    }

    std::int64_t vocab_size_;
    std::size_t piece_tokens_;
    megalodon::StreamBatch batch_;  // of the service's thread, once that runs
    std::mutex mutex_;
    std::condition_variable wake_;
    std::deque<Job> queue_;
    bool is_stopping_ = false;
    std::thread thread_;  // last: it uses all of the above
};
