#include <algorithm>
#include <exception>
#include <new>
#include <string>

#include "megalodon/log.hpp"
#include "megalodon/session.hpp"
#include "megalodon_runtime.h"

struct mgr_session {
    megalodon::Session session;
};

struct mgr_batch {
    megalodon::StreamBatch batch;
};

struct mgr_stream {
    megalodon::Stream stream;
};

namespace {

using megalodon::Error;
using megalodon::ErrorKind;
using megalodon::Finish;
using megalodon::GenerateOptions;
using megalodon::SamplingParams;

static_assert(MGR_INTERNAL == static_cast<int>(ErrorKind::internal), "the kinds of errors are the status codes");
static_assert(MGR_CALLBACK == static_cast<int>(Finish::callback), "the reasons to finish are the same");

std::string& last_error() {
    thread_local std::string text;
    return text;
}

int fail(ErrorKind kind, const char* what) {
    try {
        last_error() = what;
    } catch (...) {
        last_error().clear();  // no memory for the message
    }
    return static_cast<int>(kind);
}

// Runs `body`; every exception becomes a status.
template <typename Body>
int guarded(Body body) {
    try {
        body();
        return MGR_OK;
    } catch (const Error& error) {
        return fail(error.kind(), error.what());
    } catch (const std::bad_alloc&) {
        return fail(ErrorKind::internal, "no memory left; use fewer streams");
    } catch (const std::exception& error) {
        return fail(ErrorKind::internal, error.what());
    } catch (...) {
        return fail(ErrorKind::internal, "an exception that is none of ours, from a callback perhaps");
    }
}

void require(const void* pointer, const char* name) {
    if (pointer == nullptr) throw Error(ErrorKind::invalid_argument, std::string(name) + " is NULL");
}

std::string text_or_empty(const char* text) {
    return text == nullptr ? "" : text;
}

std::vector<std::int64_t> token_vector(const std::int64_t* tokens, std::size_t count) {
    if (count > 0) require(tokens, "tokens");
    return {tokens, tokens + count};
}

SamplingParams params_of(const mgr_sampling* given) {
    if (given == nullptr) return SamplingParams::greedy();
    SamplingParams params{given->temperature,       {}, given->top_p, given->min_p, given->repetition_penalty,
                          given->repetition_window, {}};
    if (given->top_k != 0) params.top_k = given->top_k;
    if (given->has_seed != 0) params.seed = given->seed;
    return params;
}

GenerateOptions options_of(const mgr_generate_options* given) {
    GenerateOptions options;
    if (given == nullptr) return options;
    options.max_new_tokens.reset();
    if (given->max_new_tokens != 0) options.max_new_tokens = given->max_new_tokens;
    options.sampling = params_of(&given->sampling);
    if (given->has_stop_tokens != 0) options.stop_tokens = token_vector(given->stop_tokens, given->num_stop_tokens);
    if (given->num_stop_strings > 0) require(given->stop_strings, "stop_strings");
    for (std::size_t index = 0; index < given->num_stop_strings; ++index) {
        options.stop_strings.push_back(text_or_empty(given->stop_strings[index]));
    }
    return options;
}

template <typename Prompt>
int generate(mgr_stream* stream, const Prompt& prompt_of, const mgr_generate_options* options,
             mgr_token_callback callback, void* user, int* finish) {
    return guarded([&] {
        require(stream, "stream");
        const auto on_token = [&](const megalodon::GeneratedToken& item) {
            const int finish_code = static_cast<int>(item.finish);
            return callback == nullptr || callback(item.token, item.text.c_str(), item.text.size(), finish_code, user);
        };
        const Finish why = stream->stream.generate(prompt_of(), options_of(options), on_token);
        if (finish != nullptr) *finish = static_cast<int>(why);
    });
}

}  // namespace

int32_t mgr_abi_version(void) {
    return MGR_ABI_VERSION;
}

const char* mgr_last_error(void) {
    return last_error().c_str();
}

void mgr_set_logger(mgr_logger logger, void* user) {
    guarded([&] {
        if (logger == nullptr) return megalodon::set_logger({});
        megalodon::set_logger([logger, user](megalodon::LogLevel level, std::string_view message) {
            logger(static_cast<int>(level), std::string(message).c_str(), user);
        });
    });
}

int mgr_session_open(const char* bundle, const mgr_session_options* options, mgr_session** out) {
    return guarded([&] {
        require(bundle, "bundle");
        require(out, "out");
        megalodon::SessionOptions chosen;
        if (options != nullptr) {
            if (options->backend != nullptr) chosen.backend = options->backend;
            chosen.threads = options->threads;
            chosen.device = options->device;
            chosen.library = text_or_empty(options->library);
            chosen.plugin_library = text_or_empty(options->plugin_library);
            chosen.operators_library = text_or_empty(options->operators_library);
        }
        *out = new mgr_session{megalodon::Session(megalodon::Bundle::open(bundle), chosen)};
    });
}

void mgr_session_close(mgr_session* session) {
    delete session;
}

int64_t mgr_session_vocab_size(const mgr_session* session) {
    return session == nullptr ? 0 : session->session.bundle().manifest().vocab_size;
}

int mgr_stream_open(mgr_session* session, const char* resume, mgr_stream** out) {
    return guarded([&] {
        require(session, "session");
        require(out, "out");
        *out = new mgr_stream{resume == nullptr ? session->session.stream()
                                                : session->session.resume(std::filesystem::path(resume))};
    });
}

void mgr_stream_close(mgr_stream* stream) {
    delete stream;
}

int mgr_stream_fork(const mgr_stream* stream, mgr_stream** out) {
    return guarded([&] {
        require(stream, "stream");
        require(out, "out");
        *out = new mgr_stream{stream->stream.fork()};
    });
}

int mgr_stream_save(const mgr_stream* stream, const char* path) {
    return guarded([&] {
        require(stream, "stream");
        require(path, "path");
        stream->stream.save(path);
    });
}

int mgr_stream_position(const mgr_stream* stream, int64_t* out) {
    return guarded([&] {
        require(stream, "stream");
        require(out, "out");
        *out = stream->stream.position();
    });
}

int mgr_stream_feed(mgr_stream* stream, const int64_t* tokens, size_t num_tokens, float* logits) {
    return guarded([&] {
        require(stream, "stream");
        const std::vector<float>& result = stream->stream.prefill(token_vector(tokens, num_tokens));
        if (logits != nullptr) std::copy(result.begin(), result.end(), logits);
    });
}

int mgr_stream_generate(mgr_stream* stream, const int64_t* prompt, size_t num_tokens,
                        const mgr_generate_options* options, mgr_token_callback callback, void* user, int* finish) {
    return generate(stream, [&] { return token_vector(prompt, num_tokens); }, options, callback, user, finish);
}

int mgr_stream_generate_text(mgr_stream* stream, const char* prompt, const mgr_generate_options* options,
                             mgr_token_callback callback, void* user, int* finish) {
    return generate(
        stream,
        [&] {
            require(prompt, "prompt");
            return std::string_view(prompt);
        },
        options, callback, user, finish);
}

void mgr_default_generate_options(mgr_generate_options* options) {
    if (options == nullptr) return;
    *options = {};
    const GenerateOptions defaults;
    options->max_new_tokens = *defaults.max_new_tokens;
    mgr_default_sampling(&options->sampling);
}

void mgr_default_sampling(mgr_sampling* sampling) {
    if (sampling == nullptr) return;
    const SamplingParams defaults = SamplingParams::greedy();
    *sampling = {};
    sampling->temperature = defaults.temperature;
    sampling->top_p = defaults.top_p;
    sampling->min_p = defaults.min_p;
    sampling->repetition_penalty = defaults.repetition_penalty;
    sampling->repetition_window = defaults.repetition_window;
}

int mgr_stream_logits(const mgr_stream* stream, float* logits) {
    return guarded([&] {
        require(stream, "stream");
        require(logits, "logits");
        const std::vector<float>& found = stream->stream.logits();
        std::copy(found.begin(), found.end(), logits);
    });
}

int mgr_stream_sample(mgr_stream* stream, const mgr_sampling* sampling, int64_t* token) {
    return guarded([&] {
        require(stream, "stream");
        require(token, "token");
        *token = stream->stream.sample(params_of(sampling));
    });
}

int mgr_batch_open(mgr_session* session, int64_t num_slots, mgr_batch** out) {
    return guarded([&] {
        require(session, "session");
        require(out, "out");
        *out = new mgr_batch{session->session.batch(num_slots)};
    });
}

void mgr_batch_close(mgr_batch* batch) {
    delete batch;
}

int mgr_batch_num_free(const mgr_batch* batch, int64_t* out) {
    return guarded([&] {
        require(batch, "batch");
        require(out, "out");
        *out = batch->batch.num_free();
    });
}

int mgr_batch_admit(mgr_batch* batch, const char* resume, mgr_stream** out) {
    return guarded([&] {
        require(batch, "batch");
        require(out, "out");
        *out = new mgr_stream{resume == nullptr ? batch->batch.admit()
                                                : batch->batch.admit(std::filesystem::path(resume))};
    });
}

int mgr_batch_feed(mgr_batch* batch, const mgr_feed* feeds, size_t num_feeds) {
    return guarded([&] {
        require(batch, "batch");
        if (num_feeds > 0) require(feeds, "feeds");
        std::vector<megalodon::Feed> given;
        for (std::size_t index = 0; index < num_feeds; ++index) {
            require(feeds[index].stream, "stream");
            given.push_back({&feeds[index].stream->stream, token_vector(feeds[index].tokens, feeds[index].num_tokens)});
        }
        batch->batch.feed(given);
    });
}

int mgr_batch_sample(mgr_batch* batch, const mgr_sample* samples, size_t num_samples, int64_t* tokens) {
    return guarded([&] {
        require(batch, "batch");
        if (num_samples > 0) require(samples, "samples"), require(tokens, "tokens");
        std::vector<megalodon::Sample> asked;
        for (std::size_t index = 0; index < num_samples; ++index) {
            require(samples[index].stream, "stream");
            asked.push_back({&samples[index].stream->stream, params_of(&samples[index].sampling)});
        }
        const auto chosen = batch->batch.sample(asked);
        for (std::size_t index = 0; index < num_samples; ++index)
            tokens[index] = chosen[index].value_or(-1);
    });
}
