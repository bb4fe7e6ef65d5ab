#include <algorithm>
#include <utility>

#include "choice.hpp"
#include "formats.hpp"
#include "session_state.hpp"

namespace megalodon::detail {

namespace {

constexpr char kFreshStream[] = "a fresh stream has nothing to go on from; give a prompt of at least one token";

}  // namespace

StreamState::StreamState(std::shared_ptr<BatchState> batch, const SavedStream* saved) : batch_(std::move(batch)) {
    if (saved != nullptr) {
        check_origin(*saved, session().manifest(), "snapshot");
        position_ = saved->position;
        recent_ = saved->recent;
        pending_ = saved->pending;
        has_logits_ = !saved->logits.empty();
        generator_ = saved->generator;
    }
    slot_ = batch_->admit(*this, saved);
}

StreamState::StreamState(std::shared_ptr<BatchState> batch, const StreamState& source)
    : batch_(std::move(batch)),
      position_(source.position_),
      recent_(source.recent_),
      pending_(source.pending_),
      has_logits_(source.has_logits_),
      generator_(source.generator_) {
    slot_ = batch_->admit_copy(*this, source);
}

StreamState::~StreamState() {
    try {
        if (slot_ >= 0) retire();
    } catch (...) {  // a GPU that is gone: the slot is lost with it
    }
}

BatchState& StreamState::batch() const {
    if (slot_ < 0) throw Error(ErrorKind::state, "the stream was retired; start or resume one with admit()");
    return *batch_;
}

void StreamState::retire() {
    BatchState& owner = batch();
    const std::int64_t slot = std::exchange(slot_, -1);
    owner.retire(slot);
}

const std::vector<float>& StreamState::logits() const {
    if (!has_logits_) throw Error(ErrorKind::invalid_argument, kFreshStream);
    if (logits_.empty()) logits_ = batch().logits(slot_);
    return logits_;
}

std::vector<std::int64_t> StreamState::recent() const {
    const auto count = std::min<std::size_t>(recent_.size(), kHistoryTokens);
    return {recent_.end() - static_cast<std::ptrdiff_t>(count), recent_.end()};
}

void StreamState::feed(const std::vector<std::int64_t>& tokens) {
    BatchState& owner = batch();
    check(tokens);
    owner.feed({{this, take(tokens)}});
}

std::int64_t StreamState::sample(const SamplingParams& params) {
    check_choice(params);
    const std::optional<std::int64_t> token = batch().choose({{this, params}}).front();
    if (!token) throw Error(ErrorKind::state, kBrokenStream);
    return *token;
}

void StreamState::check_choice(const SamplingParams& params) const {
    batch();
    megalodon::check(params);
    if (!has_pending() && !has_logits_) throw Error(ErrorKind::invalid_argument, kFreshStream);
}

// The stream's own generator goes on, also over `save` and `fork`; another seed starts another one.
Generator& StreamState::generator_for(const SamplingParams& params) {
    thread_local Generator unused;  // greedy choices draw nothing
    if (params.temperature == 0.0) return unused;
    const bool is_other = generator_ && params.seed && *params.seed != generator_->seed;
    if (!generator_ || is_other) generator_ = params.seed ? Generator{*params.seed, 0} : Generator::from_system();
    return *generator_;
}

SavedStream StreamState::save() const {
    SavedStream saved;
    saved.manifest = session().shared_manifest();
    saved.fingerprint = saved.manifest->fingerprint;
    saved.model_fingerprint = saved.manifest->model_fingerprint;
    saved.position = position_;
    if (position_ > 0) {
        saved.tensors = batch().read(slot_, position_);
    } else {  // what lies in the slot is not this stream's
        for (const StateSpec& spec : saved.manifest->state) {
            HostTensor zeros{spec.dtype, concrete_shape(spec.past_shape, 1, 0, 0), {}};
            zeros.data.resize(static_cast<std::size_t>(num_elements(zeros.shape)) * byte_size(spec.dtype));
            saved.tensors[spec.past] = std::move(zeros);
        }
    }
    saved.recent = recent();
    saved.pending = pending_;
    if (!pending_ && has_logits_) saved.logits = logits();
    saved.generator = generator_;
    return saved;
}

void StreamState::check(const std::vector<std::int64_t>& tokens) const {
    const std::int64_t vocab_size = session().manifest().vocab_size;
    for (const std::int64_t token : tokens) {
        if (token < 0 || token >= vocab_size) {
            throw Error(ErrorKind::invalid_argument, "token " + std::to_string(token) +
                                                         " is outside the model's vocabulary of " +
                                                         std::to_string(vocab_size));
        }
    }
    if (tokens.empty() && !has_pending()) {
        throw Error(ErrorKind::invalid_argument, "a stream was fed no tokens; give at least one");
    }
}

std::vector<std::int64_t> StreamState::take(const std::vector<std::int64_t>& tokens) {
    std::vector<std::int64_t> taken;
    if (pending_) taken.push_back(*pending_);
    pending_.reset();
    for (const std::int64_t token : tokens)
        note(token);
    taken.insert(taken.end(), tokens.begin(), tokens.end());
    return taken;
}

void StreamState::consumed(std::int64_t num_tokens) {
    position_ += num_tokens;
    has_logits_ = true;
    logits_.clear();
}

TokenChoice StreamState::choice(const SamplingParams& params) {
    return choice_of(params, recent(), generator_for(params));
}

void StreamState::chosen(std::int64_t token) {
    note(token);
    pending_ = token;
}

void StreamState::note(std::int64_t token) {
    recent_.push_back(token);
    if (recent_.size() > 2 * kHistoryTokens) recent_.erase(recent_.begin(), recent_.end() - kHistoryTokens);
}

}  // namespace megalodon::detail
