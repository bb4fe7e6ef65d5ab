#include "megalodon/session.hpp"

#include <set>
#include <utility>

#include "backends/backends.hpp"
#include "bytes_tokenizer.hpp"
#include "session_state.hpp"
#include "stop_strings.hpp"
#include "utf8.hpp"

namespace megalodon {

namespace {

// The text of a stream's tokens, as far as whole characters go.
class Detokenizer {
 public:
    Detokenizer(std::shared_ptr<const Tokenizer> tokenizer, const std::vector<std::int64_t>& context)
        : tokenizer_(std::move(tokenizer)) {
        for (const std::int64_t token : context)
            push(token);
    }
    std::string push(std::int64_t token) { return tokenizer_ ? decoder_.push(tokenizer_->bytes_of(token)) : ""; }

 private:
    std::shared_ptr<const Tokenizer> tokenizer_;
    detail::Utf8Decoder decoder_;
};

void check(const GenerateOptions& options, const Tokenizer* tokenizer, const TokenCallback& callback) {
    check(options.sampling);
    if (!callback) throw Error(ErrorKind::invalid_argument, "generate was given no callback");
    if (options.max_new_tokens && *options.max_new_tokens < 1) {
        throw Error(ErrorKind::invalid_argument,
                    "max_new_tokens = " + std::to_string(*options.max_new_tokens) + " is not a positive integer");
    }
    if (!options.stop_strings.empty() && tokenizer == nullptr) {
        throw Error(ErrorKind::invalid_argument, "stop_strings need a tokenizer: call Session::set_tokenizer first");
    }
}

}  // namespace

Snapshot::Snapshot(std::shared_ptr<const detail::SavedStream> saved) : saved_(std::move(saved)) {}

Snapshot Snapshot::load(const std::filesystem::path& path, const Bundle& bundle) {
    auto manifest = std::make_shared<const Manifest>(bundle.manifest());
    return Snapshot(std::make_shared<const detail::SavedStream>(detail::read_saved_stream(path, std::move(manifest))));
}

void Snapshot::save(const std::filesystem::path& path) const {
    detail::write_saved_stream(*saved_, path);
}

Stream::Stream(std::unique_ptr<detail::StreamState> state) : state_(std::move(state)) {}
Stream::Stream(Stream&&) noexcept = default;
Stream& Stream::operator=(Stream&&) noexcept = default;
Stream::~Stream() = default;

detail::StreamState& Stream::state() const {
    if (!state_) throw Error(ErrorKind::state, "the stream was moved away; use the one that it was moved to");
    return *state_;
}

std::int64_t Stream::position() const {
    return state().position();
}

const std::vector<float>& Stream::logits() const {
    return state().logits();
}

const std::vector<float>& Stream::prefill(const std::vector<std::int64_t>& tokens) {
    state().feed(tokens);
    return logits();
}

const std::vector<float>& Stream::step(std::int64_t token) {
    return prefill({token});
}

std::int64_t Stream::sample(const SamplingParams& params) {
    return state().sample(params);
}

Finish Stream::generate(std::string_view prompt, const GenerateOptions& options, const TokenCallback& callback) {
    const auto tokenizer = state().session().tokenizer;
    if (!tokenizer) {
        throw Error(ErrorKind::invalid_argument,
                    "this bundle's tokenizer is not built in: give tokens, or call Session::set_tokenizer first");
    }
    return generate(tokenizer->encode(prompt, state().is_fresh()), options, callback);
}

Finish Stream::generate(const std::vector<std::int64_t>& prompt, const GenerateOptions& options,
                        const TokenCallback& callback) {
    detail::StreamState& stream = state();
    const auto tokenizer = stream.session().tokenizer;
    check(options, tokenizer.get(), callback);
    detail::StopStrings stops(options.stop_strings);
    const auto& ends = options.stop_tokens ? *options.stop_tokens : stream.session().manifest().stop_tokens;
    const std::set<std::int64_t> stop_tokens(ends.begin(), ends.end());
    if (stream.is_fresh() && prompt.empty()) stream.logits();  // throws
    if (!prompt.empty()) stream.feed(prompt);
    Detokenizer detokenizer(tokenizer, stream.recent());
    for (std::int64_t count = 1;; ++count) {
        GeneratedToken item;
        item.token = sample(options.sampling);
        if (stop_tokens.count(item.token) > 0) {
            item.text = stops.flush();
            item.finish = Finish::stop_token;
        } else {
            bool is_stopped = false;
            std::tie(item.text, is_stopped) = stops.push(detokenizer.push(item.token));
            if (is_stopped) item.finish = Finish::stop_string;
        }
        if (count == options.max_new_tokens && item.finish == Finish::none) {
            item.text += stops.flush();
            item.finish = Finish::length;
        }
        const bool goes_on = callback(item);
        if (item.finish != Finish::none) return item.finish;
        if (!goes_on) return Finish::callback;
    }
}

Snapshot Stream::snapshot() const {
    state().batch();
    return Snapshot(std::make_shared<const detail::SavedStream>(state().save()));
}

void Stream::save(const std::filesystem::path& path) const {
    snapshot().save(path);
}

Stream Stream::fork() const {
    auto batch = std::make_shared<detail::BatchState>(state().batch().shared_session(), 1);
    return Stream(std::make_unique<detail::StreamState>(std::move(batch), state()));
}

StreamBatch::StreamBatch(std::shared_ptr<detail::BatchState> state) : state_(std::move(state)) {}

std::int64_t StreamBatch::num_slots() const {
    return state_->num_slots();
}

std::int64_t StreamBatch::num_free() const {
    return state_->num_free();
}

Stream StreamBatch::admit() {
    return Stream(std::make_unique<detail::StreamState>(state_, nullptr));
}

Stream StreamBatch::admit(const Snapshot& snapshot) {
    return Stream(std::make_unique<detail::StreamState>(state_, snapshot.saved_.get()));
}

Stream StreamBatch::admit(const std::filesystem::path& path) {
    return admit(Snapshot::load(path, state_->session().bundle()));
}

void StreamBatch::retire(Stream& stream) {
    if (&stream.state().batch() != state_.get()) {
        throw Error(ErrorKind::state, "the stream belongs to another batch; retire it there");
    }
    stream.state().retire();
}

std::vector<detail::StreamState*> StreamBatch::states(const std::vector<const Stream*>& streams) const {
    std::vector<detail::StreamState*> states;
    std::set<const Stream*> seen;
    for (const Stream* stream : streams) {
        if (stream == nullptr) throw Error(ErrorKind::invalid_argument, "a stream is null");
        if (!seen.insert(stream).second) throw Error(ErrorKind::invalid_argument, "a stream is named twice in a call");
        states.push_back(&stream->state());
        if (&states.back()->batch() != state_.get()) throw Error(ErrorKind::state, "a stream belongs to another batch");
    }
    return states;
}

void StreamBatch::feed(const std::vector<Feed>& feeds) {
    std::vector<const Stream*> streams;
    for (const Feed& feed : feeds)
        streams.push_back(feed.stream);
    const auto fed = states(streams);
    for (std::size_t index = 0; index < feeds.size(); ++index)
        fed[index]->check(feeds[index].tokens);
    std::vector<detail::BatchState::Fed> waiting;
    for (std::size_t index = 0; index < feeds.size(); ++index)
        waiting.push_back({fed[index], fed[index]->take(feeds[index].tokens)});
    state_->feed(std::move(waiting));
}

std::vector<std::optional<std::int64_t>> StreamBatch::sample(const std::vector<Sample>& samples) {
    std::vector<const Stream*> streams;
    for (const Sample& sample : samples)
        streams.push_back(sample.stream);
    const auto asked = states(streams);
    std::vector<detail::BatchState::Asked> choices;
    for (std::size_t index = 0; index < samples.size(); ++index) {
        asked[index]->check_choice(samples[index].params);
        choices.push_back({asked[index], samples[index].params});
    }
    return state_->choose(choices);
}

Session::Session(const Bundle& bundle, const SessionOptions& options)
    : Session(bundle, detail::open_engine(bundle, options)) {}

Session::Session(const Bundle& bundle, std::unique_ptr<Engine> engine)
    : state_(std::make_shared<detail::SessionState>(bundle, std::move(engine))) {
    if (bundle.manifest().tokenizer_file.empty()) {  // bytes, or nothing is known of the tokens
        state_->tokenizer = std::make_shared<const detail::BytesTokenizer>();
    }
}

const Bundle& Session::bundle() const {
    return state_->bundle();
}

const char* Session::backend() const {
    return state_->engine().backend();
}

void Session::set_tokenizer(std::shared_ptr<const Tokenizer> tokenizer) {
    state_->tokenizer = std::move(tokenizer);
}

Stream Session::stream() {
    return batch(1).admit();
}

Stream Session::resume(const Snapshot& snapshot) {
    return batch(1).admit(snapshot);
}

Stream Session::resume(const std::filesystem::path& path) {
    return resume(Snapshot::load(path, bundle()));
}

StreamBatch Session::batch(std::int64_t num_slots) {
    if (num_slots < 1) {
        throw Error(ErrorKind::invalid_argument,
                    "num_slots = " + std::to_string(num_slots) + " is not a positive integer");
    }
    if (const std::int64_t most = state_->engine().max_batch(); num_slots > most) {
        throw Error(ErrorKind::invalid_argument,
                    std::to_string(num_slots) + " slots: this engine takes " + std::to_string(most) +
                        " streams in a call; build one with `megalodon-deploy build --max-batch " +
                        std::to_string(num_slots) + "`");
    }
    return StreamBatch(std::make_shared<detail::BatchState>(state_, num_slots));
}

}  // namespace megalodon
