/* Octavo's CPU kernels: what torch would do in many small operations, in one pass over the data each.
 *
 * All tensors are float32. Plain C with OpenMP; the compiler vectorises the inner loops. `native.py` compiles and calls
 * it, and says what each function computes; the torch reference of each is in ops/.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

#define MAX_GROUP 16
#define MAX_HEAD_DIM 256
#define MAX_BLOCK 128

static inline float dot(const float *restrict a, const float *restrict b, int n) {
    float sum = 0;
    for (int i = 0; i < n; i++) sum += a[i] * b[i];
    return sum;
}

/* residual += hidden; out = residual / sqrt(mean(residual^2) + eps) * weight, for each row. */
void octavo_add_rms_norm(float *restrict out, float *restrict residual, const float *restrict hidden,
                         const float *restrict weight, float eps, int64_t num_rows, int64_t size) {
    for (int64_t row = 0; row < num_rows; row++) {
        float *r = residual + row * size, *o = out + row * size;
        const float *h = hidden + row * size;
        for (int64_t i = 0; i < size; i++) r[i] += h[i];
        float scale = 1.0f / sqrtf(dot(r, r, (int)size) / (float)size + eps);
        for (int64_t i = 0; i < size; i++) o[i] = r[i] * scale * weight[i];
    }
}

/* out = silu(gate) * up, where each row of gate_up holds both side by side. */
void octavo_silu_and_mul(float *restrict out, const float *restrict gate_up, int64_t num_rows, int64_t size) {
#pragma omp parallel for schedule(static) if (num_rows * size > 16384)
    for (int64_t row = 0; row < num_rows; row++) {
        const float *gate = gate_up + row * 2 * size, *up = gate + size;
        float *o = out + row * size;
        /* The exponential of more than 88 is infinite, and fast division by infinity is not a number. */
        for (int64_t i = 0; i < size; i++) o[i] = gate[i] / (1.0f + expf(fminf(-gate[i], 80.0f))) * up[i];
    }
}

/* Rotate the first num_rotated heads of each row in place, NeoX style, over rotary_dim = 2 * half dimensions.
 * sin has its first half negated, as rotary_cos_sin makes it. */
void octavo_rotate(float *restrict heads, const float *restrict cos, const float *restrict sin, int64_t num_rows,
                   int64_t num_heads, int64_t num_rotated, int64_t head_dim, int64_t half) {
    for (int64_t row = 0; row < num_rows; row++) {
        const float *c = cos + row * 2 * half, *s = sin + row * 2 * half + half;
        for (int64_t head = 0; head < num_rotated; head++) {
            float *x = heads + (row * num_heads + head) * head_dim, *y = x + half;
            for (int64_t i = 0; i < half; i++) {
                float first = x[i], second = y[i];
                x[i] = first * c[i] - second * s[i];
                y[i] = second * c[i] + first * s[i];
            }
        }
    }
}

/* Store keys and values that follow the queries in each row of heads: row r goes to cache rows key_rows[r] and
 * value_rows[r], rows of `width` = num_kv_heads * head_dim floats. */
void octavo_write_kv(float *restrict cache, const float *restrict keys, const float *restrict values,
                     const int64_t *restrict key_rows, const int64_t *restrict value_rows, int64_t num_rows,
                     int64_t row_stride, int64_t width) {
    for (int64_t row = 0; row < num_rows; row++) {
        memcpy(cache + key_rows[row] * width, keys + row * row_stride, (size_t)width * sizeof(float));
        memcpy(cache + value_rows[row] * width, values + row * row_stride, (size_t)width * sizeof(float));
    }
}

/* Eight floats; `Floats` loads and stores them wherever they lie. */
typedef float Vector __attribute__((vector_size(32)));
typedef float Floats __attribute__((vector_size(32), aligned(4)));
#define LANES 8

static inline __attribute__((always_inline)) float sum_lanes(Vector v) {
    return ((v[0] + v[4]) + (v[1] + v[5])) + ((v[2] + v[6]) + (v[3] + v[7]));
}

/* One sequence and one KV head of `octavo_paged_decode`. Called with a constant head_dim, so that a head's vectors stay in
 * registers. */
static inline __attribute__((always_inline)) void decode_head(
    float *restrict out, const float *restrict query, const float *restrict cache, const int64_t *restrict table,
    int64_t first, int64_t length, int64_t group, const int64_t head_dim, int64_t token_stride, int64_t block_size,
    int64_t block_stride, int64_t value_stride, float scale) {
    const int64_t num_vectors = head_dim / LANES;
    Vector accumulated[MAX_GROUP][MAX_HEAD_DIM / LANES];
    float best[MAX_GROUP], total[MAX_GROUP], scores[MAX_GROUP][MAX_BLOCK];
    for (int64_t g = 0; g < group; g++) {
        best[g] = -INFINITY;
        total[g] = 0;
        for (int64_t i = 0; i < num_vectors; i++) accumulated[g][i] = (Vector){0};
    }
    for (int64_t block = first / block_size; block * block_size < length; block++) {
        const float *keys = cache + table[block] * block_stride, *values = keys + value_stride;
        const int64_t start = block * block_size < first ? first - block * block_size : 0;
        const int64_t end = length - block * block_size < block_size ? length - block * block_size : block_size;
        for (int64_t g = 0; g < group; g++) {
            const Floats *q = (const Floats *)(query + g * head_dim);
            int64_t t = start;
            /* Four keys at a time: one alone would wait for each multiplication before the next. */
            for (; t + 4 <= end; t += 4) {
                const Floats *k0 = (const Floats *)(keys + t * token_stride);
                const Floats *k1 = (const Floats *)(keys + (t + 1) * token_stride);
                const Floats *k2 = (const Floats *)(keys + (t + 2) * token_stride);
                const Floats *k3 = (const Floats *)(keys + (t + 3) * token_stride);
                Vector s0 = {0}, s1 = {0}, s2 = {0}, s3 = {0};
                for (int64_t i = 0; i < num_vectors; i++) {
                    s0 += q[i] * k0[i];
                    s1 += q[i] * k1[i];
                    s2 += q[i] * k2[i];
                    s3 += q[i] * k3[i];
                }
                scores[g][t] = scale * sum_lanes(s0);
                scores[g][t + 1] = scale * sum_lanes(s1);
                scores[g][t + 2] = scale * sum_lanes(s2);
                scores[g][t + 3] = scale * sum_lanes(s3);
            }
            for (; t < end; t++) scores[g][t] = scale * dot(query + g * head_dim, keys + t * token_stride, (int)head_dim);
        }
        for (int64_t g = 0; g < group; g++) {
            float highest = best[g], sum = 0;
            for (int64_t t = start; t < end; t++) highest = scores[g][t] > highest ? scores[g][t] : highest;
            for (int64_t t = start; t < end; t++) sum += scores[g][t] = expf(scores[g][t] - highest);
            const float shrink = expf(best[g] - highest);
            total[g] = total[g] * shrink + sum;
            best[g] = highest;
            for (int64_t i = 0; i < num_vectors; i++) accumulated[g][i] *= shrink;
            for (int64_t t = start; t < end; t++) {
                const Floats *v = (const Floats *)(values + t * token_stride);
                for (int64_t i = 0; i < num_vectors; i++) accumulated[g][i] += scores[g][t] * v[i];
            }
        }
    }
    for (int64_t g = 0; g < group; g++) {
        const float sum = length > 0 ? total[g] : 1; /* padding has no keys: zeros */
        for (int64_t i = 0; i < num_vectors; i++) *(Floats *)(out + g * head_dim + i * LANES) = accumulated[g][i] / sum;
    }
}

/* Attention of one query token per sequence over its blocks, with a running softmax (arXiv:2205.14135, algorithm 1):
 * each key and value is read from memory once, where it lies, for all query heads that share it.
 *
 * query: row of sequence i at query + i * query_stride, num_heads * head_dim floats; out: the same, contiguous
 * cache: key of (block, offset, kv head) at block * block_stride + (offset * num_kv_heads + head) * head_dim, its value
 *        value_stride floats after it; head_dim is a multiple of 8 */
void octavo_paged_decode(float *restrict out, const float *restrict query, const float *restrict cache,
                         const int64_t *restrict block_tables, const int64_t *restrict seq_lens, int64_t num_seqs,
                         int64_t max_blocks, int64_t query_stride, int64_t num_heads, int64_t num_kv_heads,
                         int64_t head_dim, int64_t block_size, int64_t block_stride, int64_t value_stride,
                         int64_t window, float scale) {
    const int64_t group = num_heads / num_kv_heads, width = group * head_dim;
#pragma omp parallel for collapse(2) schedule(dynamic)
    for (int64_t seq = 0; seq < num_seqs; seq++) {
        for (int64_t head = 0; head < num_kv_heads; head++) {
            const int64_t length = seq_lens[seq], first = window && length > window ? length - window : 0;
            const int64_t *table = block_tables + seq * max_blocks;
            for (int64_t g = 0; g < group; g += MAX_GROUP) {
                const int64_t count = group - g < MAX_GROUP ? group - g : MAX_GROUP;
                float *o = out + seq * num_heads * head_dim + head * width + g * head_dim;
                const float *q = query + seq * query_stride + head * width + g * head_dim, *c = cache + head * head_dim;
#define DECODE(SIZE)                                                                                              \
    decode_head(o, q, c, table, first, length, count, SIZE, num_kv_heads *SIZE, block_size, block_stride,         \
                value_stride, scale)
                if (head_dim == 64) DECODE(64);
                else if (head_dim == 128) DECODE(128);
                else DECODE(head_dim);
            }
        }
    }
}
