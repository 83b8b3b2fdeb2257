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
        for (int64_t i = 0; i < size; i++) o[i] = gate[i] / (1.0f + expf(-gate[i])) * up[i];
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

/* Attention of one query token per sequence over its blocks, with a running softmax (arXiv:2205.14135, algorithm 1):
 * each key and value is read once, where it lies, for all query heads that share it.
 *
 * query: row of sequence i at query + i * query_stride, num_heads * head_dim floats; out: the same, contiguous
 * cache: key of (block, offset, kv head) at block * block_stride + (offset * num_kv_heads + head) * head_dim, its value
 *        value_stride floats after it */
void octavo_paged_decode(float *restrict out, const float *restrict query, const float *restrict cache,
                         const int64_t *restrict block_tables, const int64_t *restrict seq_lens, int64_t num_seqs,
                         int64_t max_blocks, int64_t query_stride, int64_t num_heads, int64_t num_kv_heads,
                         int64_t head_dim, int64_t block_size, int64_t block_stride, int64_t value_stride,
                         int64_t window, float scale) {
    const int64_t group = num_heads / num_kv_heads, token_stride = num_kv_heads * head_dim;
#pragma omp parallel for collapse(2) schedule(dynamic)
    for (int64_t seq = 0; seq < num_seqs; seq++) {
        for (int64_t head = 0; head < num_kv_heads; head++) {
            const float *q = query + seq * query_stride + head * group * head_dim;
            const int64_t *table = block_tables + seq * max_blocks;
            const int64_t length = seq_lens[seq], first = window && length > window ? length - window : 0;
            float accumulated[MAX_GROUP][MAX_HEAD_DIM], best[MAX_GROUP], total[MAX_GROUP], scores[MAX_GROUP][MAX_BLOCK];
            for (int64_t g = 0; g < group; g++) {
                best[g] = -INFINITY;
                total[g] = 0;
                memset(accumulated[g], 0, (size_t)head_dim * sizeof(float));
            }
            for (int64_t block = first / block_size; block * block_size < length; block++) {
                const float *keys = cache + table[block] * block_stride + head * head_dim;
                const float *values = keys + value_stride;
                const int64_t start = block * block_size < first ? first - block * block_size : 0;
                const int64_t end = length - block * block_size < block_size ? length - block * block_size : block_size;
                for (int64_t t = start; t < end; t++)
                    for (int64_t g = 0; g < group; g++)
                        scores[g][t] = scale * dot(q + g * head_dim, keys + t * token_stride, (int)head_dim);
                for (int64_t g = 0; g < group; g++) {
                    float highest = best[g];
                    for (int64_t t = start; t < end; t++) highest = scores[g][t] > highest ? scores[g][t] : highest;
                    const float shrink = expf(best[g] - highest);
                    float sum = 0;
                    for (int64_t t = start; t < end; t++) {
                        scores[g][t] = expf(scores[g][t] - highest);
                        sum += scores[g][t];
                    }
                    total[g] = total[g] * shrink + sum;
                    best[g] = highest;
                    if (shrink != 1.0f)
                        for (int64_t d = 0; d < head_dim; d++) accumulated[g][d] *= shrink;
                }
                for (int64_t t = start; t < end; t++)
                    for (int64_t g = 0; g < group; g++)
                        for (int64_t d = 0; d < head_dim; d++)
                            accumulated[g][d] += scores[g][t] * values[t * token_stride + d];
            }
            for (int64_t g = 0; g < group; g++) {
                float *o = out + seq * num_heads * head_dim + (head * group + g) * head_dim;
                for (int64_t d = 0; d < head_dim; d++) o[d] = accumulated[g][d] / total[g];
            }
        }
    }
}
