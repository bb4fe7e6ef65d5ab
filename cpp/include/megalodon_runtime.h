/* The C interface of libmegalodon_runtime, for other languages. C++ programs use megalodon/runtime.hpp.
 *
 * Functions return 0, or a status whose sentence mgr_last_error() gives for the calling thread; nothing is thrown and
 * nothing aborts. Strings are UTF-8 and end with NUL. Handles may be closed in any order: each keeps what it needs.
 *
 * Threads: a session with its batches and streams is used by one thread at a time, closing included; which one may
 * change. Sessions are independent of each other. A callback may use other sessions, and of its own stream nothing.
 */
#ifndef MEGALODON_RUNTIME_H
#define MEGALODON_RUNTIME_H

#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__)
#define MGR_API __attribute__((visibility("default")))
#else
#define MGR_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* Raised by one whenever a function's meaning or a struct changes. */
#define MGR_ABI_VERSION 2

enum mgr_status {
    MGR_OK = 0,
    MGR_INVALID_ARGUMENT = 1, /* a value that makes no sense */
    MGR_BUNDLE = 2,           /* a bundle that is incomplete, damaged or of another format version */
    MGR_STATE = 3,            /* a saved stream that is damaged or of another bundle; a stream that is broken */
    MGR_ENGINE = 4,           /* an engine or a model that cannot run on this machine */
    MGR_MISSING_LIBRARY = 5,  /* ONNX Runtime, TensorRT, the driver or the plugin library was not found */
    MGR_IO = 6,               /* a file that cannot be read or written */
    MGR_INTERNAL = 7          /* a bug of this library, or no memory */
};

enum mgr_finish {
    MGR_GOES_ON = 0,
    MGR_LENGTH = 1,
    MGR_STOP_TOKEN = 2,
    MGR_STOP_STRING = 3,
    MGR_CALLBACK = 4 /* the callback returned 0 */
};

typedef struct mgr_session mgr_session;
typedef struct mgr_batch mgr_batch;
typedef struct mgr_stream mgr_stream;

/* As SessionOptions of megalodon/session.hpp; NULL and 0 are the defaults. */
typedef struct mgr_session_options {
    const char* backend; /* "onnxruntime", "tensorrt", "tensorrt-rtx" */
    int32_t threads;
    int32_t device;
    const char* library;
    const char* plugin_library;
    const char* operators_library;
} mgr_session_options;

/* As SamplingParams; fill it with mgr_default_sampling first. */
typedef struct mgr_sampling {
    double temperature; /* 0, the default: always the most probable token */
    uint64_t top_k;     /* 0: all */
    double top_p;
    double min_p;
    double repetition_penalty;
    int32_t repetition_window;
    int32_t has_seed; /* 0: continue the stream's generator */
    uint64_t seed;
} mgr_sampling;

/* As GenerateOptions; fill it with mgr_default_generate_options first. */
typedef struct mgr_generate_options {
    int64_t max_new_tokens; /* 0: until a stop */
    mgr_sampling sampling;
    int32_t has_stop_tokens; /* 0: those of the bundle's tokenizer */
    const int64_t* stop_tokens;
    size_t num_stop_tokens;
    const char* const* stop_strings;
    size_t num_stop_strings;
} mgr_generate_options;

/* `text`: the characters that the token completes, NUL among them perhaps, and one NUL behind; valid during the call.
 * Returns whether to go on. */
typedef int (*mgr_token_callback)(int64_t token, const char* text, size_t text_bytes, int finish, void* user);

/* `level`: 0 error, 1 warning, 2 info, 3 debug. Called by any thread that uses the library, one message at a time;
 * must not use the library. */
typedef void (*mgr_logger)(int level, const char* message, void* user);

MGR_API int32_t mgr_abi_version(void);

/* What the last failed call of this thread said; "" when none failed. Valid until the next call of this thread. */
MGR_API const char* mgr_last_error(void);

MGR_API void mgr_set_logger(mgr_logger logger, void* user); /* NULL: drop messages */

MGR_API int mgr_session_open(const char* bundle, const mgr_session_options* options, mgr_session** out);
MGR_API void mgr_session_close(mgr_session* session); /* NULL is allowed */
MGR_API int64_t mgr_session_vocab_size(const mgr_session* session);

/* A fresh stream, or one that was saved: `resume` is a file's path, or NULL. */
MGR_API int mgr_stream_open(mgr_session* session, const char* resume, mgr_stream** out);
MGR_API void mgr_stream_close(mgr_stream* stream); /* NULL is allowed */
MGR_API int mgr_stream_fork(const mgr_stream* stream, mgr_stream** out);
MGR_API int mgr_stream_save(const mgr_stream* stream, const char* path);
MGR_API int mgr_stream_position(const mgr_stream* stream, int64_t* out);

/* Consume tokens; `logits` [vocab_size], the logits that follow, may be NULL. */
MGR_API int mgr_stream_feed(mgr_stream* stream, const int64_t* tokens, size_t num_tokens, float* logits);

/* Generate after a prompt of tokens; `finish` (an mgr_finish) may be NULL. */
MGR_API int mgr_stream_generate(mgr_stream* stream, const int64_t* prompt, size_t num_tokens,
                                const mgr_generate_options* options, mgr_token_callback callback, void* user,
                                int* finish);
/* The same after a text, for bundles with a byte tokenizer. */
MGR_API int mgr_stream_generate_text(mgr_stream* stream, const char* prompt, const mgr_generate_options* options,
                                     mgr_token_callback callback, void* user, int* finish);
MGR_API void mgr_default_sampling(mgr_sampling* sampling);
MGR_API void mgr_default_generate_options(mgr_generate_options* options);

/* The logits [vocab_size] that follow the last consumed token. */
MGR_API int mgr_stream_logits(const mgr_stream* stream, float* logits);
/* Choose the next token, which the stream's next call consumes; `sampling` NULL: the most probable one. */
MGR_API int mgr_stream_sample(mgr_stream* stream, const mgr_sampling* sampling, int64_t* token);

/* Slots for streams that advance together, in one call of the model. */
MGR_API int mgr_batch_open(mgr_session* session, int64_t num_slots, mgr_batch** out);
MGR_API void mgr_batch_close(mgr_batch* batch); /* NULL is allowed */
MGR_API int mgr_batch_num_free(const mgr_batch* batch, int64_t* out);

/* A stream in a free slot, fresh or saved, as mgr_stream_open; mgr_stream_close gives the slot back. */
MGR_API int mgr_batch_admit(mgr_batch* batch, const char* resume, mgr_stream** out);

/* Tokens for one stream of a batch; none: its sampled token alone. */
typedef struct mgr_feed {
    mgr_stream* stream;
    const int64_t* tokens;
    size_t num_tokens;
} mgr_feed;

/* Feed these streams; the others wait. Everything is checked before anything is computed. */
MGR_API int mgr_batch_feed(mgr_batch* batch, const mgr_feed* feeds, size_t num_feeds);

typedef struct mgr_sample {
    mgr_stream* stream;
    mgr_sampling sampling;
} mgr_sample;

/* The next token of each of these streams; tokens that were sampled before are consumed first, in one call. -1: that
 * stream went non-finite, the others go on. */
MGR_API int mgr_batch_sample(mgr_batch* batch, const mgr_sample* samples, size_t num_samples, int64_t* tokens);

#ifdef __cplusplus
}
#endif

#endif
