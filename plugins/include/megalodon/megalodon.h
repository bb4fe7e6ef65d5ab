/* The C interface of libmegalodon: Megalodon's operators on raw device pointers.
 *
 * Every tensor is dense and row-major. B rows (streams), T tokens of this call, D channels, N complex modes of a
 * channel, G normalisation groups of D / G channels, H attention heads with keys of dz and values of dv numbers, C
 * tokens of a chunk, S rows of key/value memory. An activation has the type named by `dtype`; states, positions and
 * coefficients have the types written here whatever the activations are. State layouts: megalodon/state_layout.h.
 *
 * A row whose position is 0 starts a fresh stream: nothing of its past state is used, so NaN there has no effect.
 * The present state never shares memory with the past state: past is left as it was.
 *
 * Calls enqueue work on `stream` (a cudaStream_t; NULL is the default stream) of the calling thread's current device
 * and return at once. Pointers must stay valid until the stream has passed. All functions are thread-safe, none throws.
 * A call with B, T or D equal to 0 is valid; with T = 0 the present state is the past state (zero in fresh rows).
 */
#ifndef MEGALODON_MEGALODON_H
#define MEGALODON_MEGALODON_H

#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__)
#define MGD_API __attribute__((visibility("default")))
#else
#define MGD_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* Raised by one whenever a function's meaning or arguments change. */
#define MGD_ABI_VERSION 2

/* Largest number of complex modes N of a channel. */
#define MGD_MAX_MODES 256

/* Largest widths dz and dv of a head. */
#define MGD_MAX_KEY_WIDTH 256
#define MGD_MAX_VALUE_WIDTH 2048

/* Activations have one of the first three types; key/value memory any. MGD_FLOAT8_E4M3 has no infinity. */
enum mgd_dtype { MGD_FLOAT32 = 0, MGD_FLOAT16 = 1, MGD_BFLOAT16 = 2, MGD_FLOAT8_E4M3 = 3, MGD_INT8 = 4 };

/* What the functions return. MGD_CUDA_ERROR + n stands for the CUDA runtime's error n. */
enum mgd_status {
    MGD_OK = 0,
    MGD_INVALID_ARGUMENT = 1, /* a size, type or pointer that no call can have */
    MGD_UNSUPPORTED = 2,      /* a valid call beyond this library's limits: the MGD_MAX_* numbers, or 2^31 blocks */
    MGD_INTERNAL_ERROR = 3,   /* a bug in this library */
    MGD_CUDA_ERROR = 1000
};

MGD_API int32_t mgd_abi_version(void);

/* A sentence for a status, never NULL; static memory. */
MGD_API const char* mgd_status_string(int status);

/* ComplexEMA: h_t = q h_{t-1} + p x_t (complex), y_t = Re(sum over N of gamma h_t) + omega x_t.
 *
 * x         [B, T, D]     dtype
 * past      [B, D, N, 2]  float32, state before the call
 * position  [B]           int64, tokens that the row has consumed before this call
 * p         [D, N]        float32
 * q         [D, N, 2]     float32; the operator's q_powers[0], so a pointer to q_powers serves
 * gamma     [D, N, 2]     float32, with 1 / sqrt(N) folded in
 * omega     [D]           float32
 * lengths   [B]           int64, or NULL: tokens of the row that count, 0 .. T (numbers outside count as the nearest).
 *                         Those after them change nothing, may hold anything, and their y is 0
 * y         [B, T, D]     dtype, output; must not overlap x
 * present   [B, D, N, 2]  float32, output: the state after the row's last token that counts
 * workspace device memory of workspace_bytes, 16-byte aligned; may be NULL and 0. With at least
 *           mgd_complex_ema_workspace_bytes, few channels and many tokens are spread over the whole device
 */
MGD_API int mgd_complex_ema(int dtype, int64_t B, int64_t T, int64_t D, int64_t N, const void* x, const float* past,
                            const int64_t* position, const float* p, const float* q, const float* gamma,
                            const float* omega, const int64_t* lengths, void* y, float* present, void* workspace,
                            size_t workspace_bytes, void* stream);

/* Bytes of workspace with which mgd_complex_ema is fastest, the same on every device; no call with smaller B, T or D
 * needs more. At most 2 MiB; 0 for few tokens. */
MGD_API size_t mgd_complex_ema_workspace_bytes(int64_t B, int64_t T, int64_t D, int64_t N);

/* Gradients of mgd_complex_ema (without lengths). Sums run in a fixed order: the same call gives the same bits.
 *
 * The inputs of the forward call, and
 * grad_y        [B, T, D]     dtype
 * grad_present  [B, D, N, 2]  float32
 * grad_x        [B, T, D]     dtype, output; must not overlap x or grad_y
 * grad_past     [B, D, N, 2]  float32, output; 0 in rows at position 0
 * grad_p        [D, N]        float32, output
 * grad_q        [D, N, 2]     float32, output: derivatives by the real and the imaginary part
 * grad_gamma    [D, N, 2]     float32, output
 * grad_omega    [D]           float32, output
 * workspace     device memory of at least mgd_complex_ema_backward_workspace_bytes, 16-byte aligned
 */
MGD_API int mgd_complex_ema_backward(int dtype, int64_t B, int64_t T, int64_t D, int64_t N, const void* x,
                                     const float* past, const int64_t* position, const float* p, const float* q,
                                     const float* gamma, const float* omega, const void* grad_y,
                                     const float* grad_present, void* grad_x, float* grad_past, float* grad_p,
                                     float* grad_q, float* grad_gamma, float* grad_omega, void* workspace,
                                     size_t workspace_bytes, void* stream);

/* The states before every 32nd token (16th where N <= 4, 8th where N > 32), B D N ceil(T / 32) 8 bytes, and with B > 1
 * each row's gradients of the coefficients, B D (5 N + 1) 4 bytes. */
MGD_API size_t mgd_complex_ema_backward_workspace_bytes(int64_t B, int64_t T, int64_t D, int64_t N);

/* TimestepNorm: group norm over all tokens of the stream so far. The running mean and variance are float64.
 *
 * x         [B, T, D]  dtype
 * past      [B, G, 4]  float32, state before the call
 * position  [B]        int64, tokens that the row has consumed before this call
 * weight    [D]        float32, the effective scale (1 already added)
 * bias      [D]        float32
 * epsilon   added to the variance; finite and positive
 * lengths   [B]        int64, or NULL: tokens of the row that count, as in mgd_complex_ema
 * y         [B, T, D]  dtype, output; must not overlap x
 * present   [B, G, 4]  float32, output: the state after the row's last token that counts
 * workspace device memory of at least mgd_timestep_norm_workspace_bytes, 16-byte aligned; contents are of no meaning
 */
MGD_API int mgd_timestep_norm(int dtype, int64_t B, int64_t T, int64_t D, int64_t G, const void* x, const float* past,
                              const int64_t* position, const float* weight, const float* bias, float epsilon,
                              const int64_t* lengths, void* y, float* present, void* workspace, size_t workspace_bytes,
                              void* stream);

/* 16 bytes for each group of each token; 0 for a few tokens. */
MGD_API size_t mgd_timestep_norm_workspace_bytes(int64_t B, int64_t T, int64_t G);

/* Gradients of mgd_timestep_norm (without lengths), in a fixed order of summation.
 *
 * The inputs of the forward call, and
 * grad_y        [B, T, D]  dtype
 * grad_present  [B, G, 4]  float32; only that of mean hi and of var hi is read, which carry their number's gradient
 * grad_x        [B, T, D]  dtype, output; must not overlap x or grad_y
 * grad_past     [B, G, 4]  float32, output: hi and lo both get their number's gradient; 0 in rows at position 0
 * grad_weight   [D]        float32, output
 * grad_bias     [D]        float32, output
 * workspace     device memory of at least mgd_timestep_norm_backward_workspace_bytes, 16-byte aligned
 */
MGD_API int mgd_timestep_norm_backward(int dtype, int64_t B, int64_t T, int64_t D, int64_t G, const void* x,
                                       const float* past, const int64_t* position, const float* weight, float epsilon,
                                       const void* grad_y, const float* grad_present, void* grad_x, float* grad_past,
                                       float* grad_weight, float* grad_bias, void* workspace, size_t workspace_bytes,
                                       void* stream);

/* 24 bytes for each group of each token, and 8 D for each 32 tokens of each row. */
MGD_API size_t mgd_timestep_norm_backward_workspace_bytes(int64_t B, int64_t T, int64_t D, int64_t G);

/* Bytes of device memory that mgd_chunk_attention needs as workspace; enough for any call of at most B rows, S rows of
 * memory and dv columns. */
MGD_API size_t mgd_chunk_attention_workspace_bytes(int64_t B, int64_t H, int64_t S, int64_t dv);

/* ChunkAttention: each token attends to the rows of memory below position mod C and to the call's tokens up to itself.
 * Scores are q.k without a further factor; softmax is float32. Other rows of memory are not read: they may hold
 * anything. The call must stay inside a chunk: (position mod C) + T <= C.
 *
 * q, k            [B, H, T, dz]  dtype
 * v               [B, H, T, dv]  dtype
 * past_key        [B, H, S, dz]  past_dtype: that of the activations, MGD_FLOAT8_E4M3 or MGD_INT8
 * past_value      [B, H, S, dv]  past_dtype
 * position        [B]            int64, tokens that the row has consumed before this call
 * past_key_scale, past_value_scale [B, H, S] float32, by which a row of memory is multiplied; NULL for memory of the
 *                 activations' type, and never for the others
 * C               tokens of a chunk, at least 1
 * out             [B, H, T, dv]  dtype, output; must not overlap an input
 * workspace       device memory of at least mgd_chunk_attention_workspace_bytes, 16-byte aligned; contents are of no
 *                 meaning. Needed for T = 1 only.
 */
MGD_API int mgd_chunk_attention(int dtype, int past_dtype, int64_t B, int64_t H, int64_t T, int64_t S, int64_t dz,
                                int64_t dv, const void* q, const void* k, const void* v, const void* past_key,
                                const void* past_value, const int64_t* position, const float* past_key_scale,
                                const float* past_value_scale, int64_t C, void* out, void* workspace,
                                size_t workspace_bytes, void* stream);

/* TimestepNorm, and ComplexEMA of what it gives: with T = 1 in one kernel, else in those of the two. All arguments are
 * those of mgd_timestep_norm and mgd_complex_ema without `lengths`.
 *
 * u  [B, T, D]  dtype, output: y of TimestepNorm and x of ComplexEMA; must not overlap x
 * y  [B, T, D]  dtype, output: y of ComplexEMA; must not overlap x or u
 */
MGD_API int mgd_timestep_norm_complex_ema(int dtype, int64_t B, int64_t T, int64_t D, int64_t G, int64_t N,
                                          const void* x, const float* past_norm, const int64_t* position,
                                          const float* weight, const float* bias, float epsilon, const float* past_cema,
                                          const float* p, const float* q, const float* gamma, const float* omega,
                                          void* u, float* present_norm, void* y, float* present_cema, void* workspace,
                                          size_t workspace_bytes, void* stream);

/* Bytes of device memory that mgd_timestep_norm_complex_ema needs as workspace; 0 for a few tokens. */
MGD_API size_t mgd_timestep_norm_complex_ema_workspace_bytes(int64_t B, int64_t T, int64_t D, int64_t G, int64_t N);

/* One tensor for mgd_append_rows. A row is any `row_bytes` bytes: dz or dv numbers of any type, or one scale. */
struct mgd_append {
    const void* rows; /* [B, heads, T] rows */
    void* memory;     /* [B, heads, S] rows; must not overlap `rows` */
    int64_t heads;
    int64_t row_bytes;
};

/* Writes the new rows of many tensors behind the rows that memory holds: token t goes to row (position mod C) + t. Rows
 * from S on are dropped. One launch takes up to MGD_APPEND_TENSORS tensors; the table itself lies in host memory and is
 * copied before the call returns, the positions are read on the device: a captured graph appends wherever they say.
 *
 * tensors   [count]  host memory
 * position  [B]      int64, tokens that the row has consumed before the call that made the rows
 * C         tokens of a chunk, at least 1
 */
#define MGD_APPEND_TENSORS 64
MGD_API int mgd_append_rows(const struct mgd_append* tensors, int64_t count, int64_t B, int64_t T, int64_t S, int64_t C,
                            const int64_t* position, void* stream);

/* How to choose the next token of a row: the fields of SamplingParams, which says what they mean. */
struct mgd_choice {
    double temperature; /* 0: the most probable token */
    double top_p;       /* above 0; 1: all */
    double min_p;       /* 0: all */
    double repetition_penalty;
    double uniform;     /* the number to draw with, from 0 up to but not 1 */
    int64_t top_k;      /* 0: all */
    int64_t num_recent; /* of the row's tokens in `recent` */
    int64_t is_wanted;  /* 0: the row is left out, and its token is not written */
};

/* Bytes of device memory that mgd_choose_tokens needs as workspace. */
MGD_API size_t mgd_choose_tokens_workspace_bytes(int64_t B, int64_t V);

/* Chooses a token for each row. -1 stands for logits that nothing can be chosen from: one is NaN or infinite upwards,
 * or all are -inf.
 *
 * logits    [B, V]           float32; V up to MGD_MAX_VOCABULARY
 * choices   [B]              device memory
 * recent    [B, max_recent]  int64, tokens that the repetition penalty applies to, each once, all below V
 * tokens    [B]              int64, output
 * workspace device memory of at least mgd_choose_tokens_workspace_bytes, 16-byte aligned; contents are of no meaning
 */
#define MGD_MAX_VOCABULARY (1 << 24)
MGD_API int mgd_choose_tokens(int64_t B, int64_t V, const float* logits, const struct mgd_choice* choices,
                              const int64_t* recent, int64_t max_recent, int64_t* tokens, void* workspace,
                              size_t workspace_bytes, void* stream);

#ifdef __cplusplus
}
#endif

#endif
