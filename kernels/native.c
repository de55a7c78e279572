/* Decoding on a CPU in fp32: attention over the page pool, RMSNorm, SwiGLU. Built by native.py,
which has the references and says what the tensors are.

Between two matrix products, which read all weights and so throw everything else out of the caches,
a torch call costs some 10 us and a layer takes a dozen of them; here it is four short loops. Every
result depends on its own row alone, to the last bit: the order of each sum is fixed by positions,
and lanes do not mix but in sum(). Vectors of 16 floats are GCC's and Clang's own extension: one
register with AVX-512, several elsewhere. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define LANES 16
#define INLINE static inline __attribute__((always_inline))
typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));

/* native.py's Call */
typedef struct {
    const float *cos, *sin;                /* [rows, head_dim / 2] */
    const int64_t *shared, *shared_length; /* [rows]: first token in the pool, count */
    const int64_t *own, *own_length;       /* the same; the row's new token counts */
    const uint8_t *alive;                  /* [rows] */
    int64_t rows, heads, kv_heads, head_dim, tokens;
    float scale;
} Call;

/* ---- vectors ---- */

INLINE vec load(const float *from) {
    vec x;
    memcpy(&x, from, sizeof x);
    return x;
}

INLINE void store(float *to, vec x) { memcpy(to, &x, sizeof x); }

INLINE vec all(float x) { return x - (vec){0}; }

INLINE vec larger(vec a, vec b) {
    ints m = a > b;
    return (vec)(((ints)a & m) | ((ints)b & ~m));
}

INLINE float sum(vec x) {
    for (int width = LANES / 2; width; width /= 2)
        for (int i = 0; i < width; i++) x[i] += x[i + width];
    return x[0];
}

/* exp to 1 unit in the last place, for |x| < 87 and clamped beyond (Cephes' expf: 2^n times a
polynomial on |r| < log(2)/2). */
INLINE vec vexp(vec x) {
    x = larger(x, all(-87.0f));
    x = -larger(-x, all(-87.0f));
    const vec magic = all(12582912.0f); /* 1.5 * 2^23: adding it rounds to an integer */
    vec n = (x * 1.44269504088896341f + magic) - magic;
    vec r = x - n * 0.693359375f - n * -2.12194440e-4f;

    vec p = all(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;

    ints power = (__builtin_convertvector(n, ints) + 127) << 23;
    return p * (vec)power;
}

/* ---- attention ---- */

/* q and k turned, q scaled; k and v written. Keys lie 16 tokens side by side, [tokens / 16,
head_dim, 16]: a vector of scores then needs no sum over lanes. */
static void rotate_and_write(const Call *c, int64_t row, float *qkv, float *cache) {
    const int64_t hd = c->head_dim, half = hd / 2;
    const float *cos = c->cos + row * half, *sin = c->sin + row * half;
    for (int64_t head = 0; head < c->heads + c->kv_heads; head++) {
        float *x = qkv + head * hd;
        float scale = head < c->heads ? c->scale : 1.0f;
        for (int64_t i = 0; i < half; i++) {
            float first = x[i], second = x[i + half];
            x[i] = (first * cos[i] - second * sin[i]) * scale;
            x[i + half] = (second * cos[i] + first * sin[i]) * scale;
        }
    }

    const int64_t at = c->own[row] + c->own_length[row] - 1;
    const float *k = qkv + c->heads * hd, *v = k + c->kv_heads * hd;
    for (int64_t head = 0; head < c->kv_heads; head++) {
        float *key = cache + (head * c->tokens + at / LANES * LANES) * hd + at % LANES;
        for (int64_t i = 0; i < hd; i++) key[i * LANES] = k[head * hd + i];
        float *value = cache + ((c->kv_heads + head) * c->tokens + at) * hd;
        memcpy(value, v + head * hd, hd * sizeof(float));
    }
}

/* Scores of n queries against `length` keys -> scores[query * width ...], padded to whole vectors
with -1e30. */
INLINE void score(int n, const float *q, int64_t hd, const float *keys, int64_t length,
                  float *scores, int64_t width) {
    for (int64_t unit = 0; unit * LANES < length; unit++, keys += LANES * hd, scores += LANES) {
        /* Two chains per query, or the latency of the additions is all one waits for. */
        vec even[4] = {0}, odd[4] = {0};
        for (int64_t d = 0; d < hd; d += 2) {
            vec a = load(keys + d * LANES), b = load(keys + (d + 1) * LANES);
            for (int i = 0; i < n; i++) {
                even[i] += a * q[i * hd + d];
                odd[i] += b * q[i * hd + d + 1];
            }
        }

        int64_t past = length - unit * LANES;
        for (int i = 0; i < n; i++) {
            store(scores + i * width, even[i] + odd[i]);
            for (int64_t lane = past; lane < LANES; lane++) scores[i * width + lane] = -1e30f;
        }
    }
}

/* out[i, 0 : 16 w] += sum over tokens of weights * values */
INLINE void mix(int n, int w, const float *weights, int64_t width, const float *values, int64_t hd,
                int64_t length, float *out) {
    vec total[4][4];
    for (int i = 0; i < n; i++)
        for (int j = 0; j < w; j++) total[i][j] = load(out + i * hd + j * LANES);

    for (int64_t t = 0; t < length; t++, values += hd)
        for (int j = 0; j < w; j++) {
            vec v = load(values + j * LANES);
            for (int i = 0; i < n; i++) total[i][j] += v * weights[i * width + t];
        }

    for (int i = 0; i < n; i++)
        for (int j = 0; j < w; j++) store(out + i * hd + j * LANES, total[i][j]);
}

/* n <= 4 query heads of one row that share a KV head. */
INLINE void attend(int n, const Call *c, int64_t row, const float *q, const float *keys,
                   const float *values, float *out, float *scores, int64_t width) {
    /* Two parts, shared and own; their scores stand one after the other, in whole vectors. */
    const int64_t hd = c->head_dim;
    const int64_t starts[2] = {c->shared[row], c->own[row]};
    const int64_t lengths[2] = {c->shared_length[row], c->own_length[row]};
    const int64_t second = (lengths[0] + LANES - 1) / LANES * LANES;
    const int64_t end = second + (lengths[1] + LANES - 1) / LANES * LANES;
    for (int part = 0; part < 2; part++) {
        float *to = scores + (part ? second : 0);
        score(n, q, hd, keys + starts[part] * hd, lengths[part], to, width);
    }

    /* Softmax; its sum divides the result. */
    float scale[4];
    for (int i = 0; i < n; i++) {
        vec top = all(-1e30f), mass = {0};
        for (int64_t t = 0; t < end; t += LANES) top = larger(top, load(scores + i * width + t));
        float highest = top[0];
        for (int lane = 1; lane < LANES; lane++)
            highest = top[lane] > highest ? top[lane] : highest;
        for (int64_t t = 0; t < end; t += LANES) {
            vec weight = vexp(load(scores + i * width + t) - highest);
            store(scores + i * width + t, weight);
            mass += weight;
        }
        scale[i] = 1.0f / sum(mass);
    }

    memset(out, 0, n * hd * sizeof(float));
    for (int part = 0; part < 2; part++) {
        const float *v = values + starts[part] * hd, *weights = scores + (part ? second : 0);
        const int64_t length = lengths[part];
        int64_t d = 0;
        for (; d + 4 * LANES <= hd; d += 4 * LANES)
            mix(n, 4, weights, width, v + d, hd, length, out + d);
        for (; d < hd; d += LANES) mix(n, 1, weights, width, v + d, hd, length, out + d);
    }
    for (int i = 0; i < n; i++)
        for (int64_t d = 0; d < hd; d += LANES) {
            float *at = out + i * hd + d;
            store(at, load(at) * scale[i]);
        }
}

/* qkv [rows, (heads + 2 kv_heads) * head_dim], overwritten; cache: one layer of the pool;
out [rows, heads * head_dim], untouched where a row is not alive. */
void attention(const Call *c, float *qkv, float *cache, float *out) {
    const int64_t hd = c->head_dim, all_heads = c->heads + 2 * c->kv_heads;
    const int64_t ratio = c->heads / c->kv_heads;
    int64_t longest = 0, work = 0;
    for (int64_t row = 0; row < c->rows; row++) {
        int64_t keys = c->shared_length[row] + c->own_length[row];
        longest = keys > longest ? keys : longest;
        work += c->alive[row] ? keys : 0;
    }
    const int64_t width = longest + 2 * LANES;

    /* With less work, waking a thread costs more than it saves. */
#pragma omp parallel if (work * c->heads * hd > 500000)
    {
        float *scores = malloc(4 * width * sizeof(float)); /* 16 bytes per token of context */
        if (!scores) abort();

#pragma omp for schedule(static)
        for (int64_t row = 0; row < c->rows; row++)
            if (c->alive[row]) rotate_and_write(c, row, qkv + row * all_heads * hd, cache);

        /* Head by head, not row by row: neighbours of one group then find their prompt's keys in
        the cache. */
#pragma omp for schedule(dynamic, 8)
        for (int64_t item = 0; item < c->kv_heads * c->rows; item++) {
            const int64_t kv = item / c->rows, row = item % c->rows;
            if (!c->alive[row]) continue;
            const float *keys = cache + kv * c->tokens * hd;
            const float *values = cache + (c->kv_heads + kv) * c->tokens * hd;
            for (int64_t first = 0; first < ratio; first += 4) {
                const float *q = qkv + (row * all_heads + kv * ratio + first) * hd;
                float *to = out + (row * c->heads + kv * ratio + first) * hd;
                switch (ratio - first) {
                case 1: attend(1, c, row, q, keys, values, to, scores, width); break;
                case 2: attend(2, c, row, q, keys, values, to, scores, width); break;
                case 3: attend(3, c, row, q, keys, values, to, scores, width); break;
                default: attend(4, c, row, q, keys, values, to, scores, width);
                }
            }
        }
        free(scores);
    }
}

/* ---- row kernels ---- */

/* x, out [rows, width] */
void rms_norm(const float *x, const float *weight, float *out, int64_t rows, int64_t width,
              float eps) {
#pragma omp parallel for if (rows * width > 100000)
    for (int64_t row = 0; row < rows; row++) {
        const float *from = x + row * width;
        float *to = out + row * width;
        vec squares = {0};
        for (int64_t i = 0; i < width; i += LANES) squares += load(from + i) * load(from + i);
        const float scale = 1.0f / sqrtf(sum(squares) / width + eps);
        for (int64_t i = 0; i < width; i += LANES)
            store(to + i, load(from + i) * scale * load(weight + i));
    }
}

/* gate_up [rows, 2 * width] -> out [rows, width] */
void swiglu(const float *gate_up, float *out, int64_t rows, int64_t width) {
#pragma omp parallel for if (rows * width > 50000)
    for (int64_t row = 0; row < rows; row++)
        for (int64_t i = 0; i < width; i += LANES) {
            vec gate = load(gate_up + row * 2 * width + i);
            vec up = load(gate_up + (row * 2 + 1) * width + i);
            store(out + row * width + i, gate / (1.0f + vexp(-gate)) * up);
        }
}
