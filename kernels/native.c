/* Decoding on a CPU in fp32: attention over the page pool, RMSNorm, SwiGLU. Built by native.py,
which has the references and says what the tensors are.

Between two matrix products, which read all weights and so throw everything else out of the caches,
a torch call costs some 10 us and a layer takes a dozen of them; here it is four short loops. Every
result depends on its own row alone, to the last bit: the order of each sum is fixed by positions,
and lanes do not mix but in sum(). Vectors are GCC's and Clang's own extension, as wide as the
processor's registers. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* Floats in a register, and registers: what a block of sums has to fit into. */
#if defined(__AVX512F__)
#define LANES 16
#define REGISTERS 32
#elif defined(__AVX__)
#define LANES 8
#define REGISTERS 16
#elif defined(__ARM_NEON)
#define LANES 4
#define REGISTERS 32
#else
#define LANES 4
#define REGISTERS 16
#endif

#define UNIT 16   /* tokens whose keys lie side by side; widths are multiples of it */
#define QUERIES 8 /* most heads that go over keys and values together */
#define AHEAD 32  /* tokens of values at a time, 8 KB for 64 floats a head */
#define PAST -1e30f

/* Vectors side by side in a block of n queries: n * w sums, the w vectors that the queries share
and one query or weight fit into the registers. 7 queries: 2 with 32 registers, 1 with 16. */
#define WIDE(n) (4 * (n) + 5 <= REGISTERS ? 4 : 2 * (n) + 3 <= REGISTERS ? 2 : 1)

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
        float *key = cache + (head * c->tokens + at / UNIT * UNIT) * hd + at % UNIT;
        for (int64_t i = 0; i < hd; i++) key[i * UNIT] = k[head * hd + i];
        float *value = cache + ((c->kv_heads + head) * c->tokens + at) * hd;
        memcpy(value, v + head * hd, hd * sizeof(float));
    }
}

/* Scores of n queries against the next w vectors of a unit of keys. */
INLINE void score(int n, int w, const float *q, int64_t hd, const float *keys, float *scores,
                  int64_t width) {
    vec total[QUERIES][4] = {0};
    for (int64_t d = 0; d < hd; d++, keys += UNIT) {
        __builtin_prefetch(keys + hd * UNIT); /* of the next unit */
        vec k[4];
        for (int j = 0; j < w; j++) k[j] = load(keys + j * LANES);
        for (int i = 0; i < n; i++)
            for (int j = 0; j < w; j++) total[i][j] += k[j] * q[i * hd + d];
    }

    for (int i = 0; i < n; i++)
        for (int j = 0; j < w; j++) store(scores + i * width + j * LANES, total[i][j]);
}

/* out[i, 0 : w vectors] += sum over tokens of weights * values */
INLINE void mix(int n, int w, const float *weights, int64_t width, const float *values, int64_t hd,
                int64_t tokens, float *out) {
    vec total[QUERIES][4];
    for (int i = 0; i < n; i++)
        for (int j = 0; j < w; j++) total[i][j] = load(out + i * hd + j * LANES);

    for (int64_t t = 0; t < tokens; t++, values += hd) {
        vec v[4];
        for (int j = 0; j < w; j++) {
            v[j] = load(values + j * LANES);
            if (j * LANES % UNIT == 0) __builtin_prefetch(values + AHEAD * hd + j * LANES);
        }
        for (int i = 0; i < n; i++)
            for (int j = 0; j < w; j++) total[i][j] += v[j] * weights[i * width + t];
    }

    for (int i = 0; i < n; i++)
        for (int j = 0; j < w; j++) store(out + i * hd + j * LANES, total[i][j]);
}

/* Scores -> weights, without their common factor, which is returned. */
static float softmax(float *scores, int64_t count) {
    vec top = all(PAST), mass = {0};
    for (int64_t t = 0; t < count; t += LANES) top = larger(top, load(scores + t));
    float highest = top[0];
    for (int lane = 1; lane < LANES; lane++) highest = top[lane] > highest ? top[lane] : highest;

    for (int64_t t = 0; t < count; t += LANES) {
        vec weight = vexp(load(scores + t) - highest);
        store(scores + t, weight);
        mass += weight;
    }
    return 1.0f / sum(mass);
}

/* n query heads of one row that share a KV head: once over its keys, once over its values. */
INLINE void attend(int n, const Call *c, int64_t row, const float *q, const float *keys,
                   const float *values, float *out, float *scores, int64_t width) {
    /* Two parts, shared and own; their scores stand one after the other, in whole units. */
    const int64_t hd = c->head_dim;
    const int64_t starts[2] = {c->shared[row], c->own[row]};
    const int64_t lengths[2] = {c->shared_length[row], c->own_length[row]};
    const int64_t second = (lengths[0] + UNIT - 1) / UNIT * UNIT;
    const int64_t end = second + (lengths[1] + UNIT - 1) / UNIT * UNIT;

    const int w = WIDE(n), unit = w * LANES < UNIT ? w * LANES : UNIT;
    for (int part = 0; part < 2; part++) {
        const int64_t length = lengths[part];
        float *to = scores + (part ? second : 0);
        int64_t t = 0;
        for (; t < length; t += UNIT)
            for (int lane = 0; lane < UNIT; lane += unit)
                score(n, unit / LANES, q, hd, keys + (starts[part] + t) * hd + lane, to + t + lane,
                      width);
        for (int i = 0; i < n; i++)
            for (int64_t past = length; past < t; past++) to[i * width + past] = PAST;
    }

    float scale[QUERIES];
    for (int i = 0; i < n; i++) scale[i] = softmax(scores + i * width, end);

    memset(out, 0, n * hd * sizeof(float));
    for (int part = 0; part < 2; part++)
        for (int64_t t = 0; t < lengths[part]; t += AHEAD) {
            const float *v = values + (starts[part] + t) * hd;
            const float *weights = scores + (part ? second : 0) + t;
            const int64_t left = lengths[part] - t, tokens = left < AHEAD ? left : AHEAD;
            int64_t d = 0;
            for (; d + w * LANES <= hd; d += w * LANES)
                mix(n, w, weights, width, v + d, hd, tokens, out + d);
            for (; d < hd; d += LANES) mix(n, 1, weights, width, v + d, hd, tokens, out + d);
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
    const int64_t passes = (ratio + QUERIES - 1) / QUERIES;
    const int64_t block = (ratio + passes - 1) / passes; /* 9 heads: 5 + 4 */
    int64_t longest = 0, work = 0;
    for (int64_t row = 0; row < c->rows; row++) {
        int64_t keys = c->shared_length[row] + c->own_length[row];
        longest = keys > longest ? keys : longest;
        work += c->alive[row] ? keys : 0;
    }
    const int64_t width = longest + 2 * UNIT;

    /* With one row each KV head is a thread's. */
    const int few = c->rows < 8 ? c->rows : 8;
    /* With less work, waking a thread costs more than it saves. */
#pragma omp parallel if (work * c->heads * hd > 500000)
    {
        float *scores = malloc(QUERIES * width * sizeof(float)); /* 32 bytes per token of context */
        if (!scores) abort();

#pragma omp for schedule(static)
        for (int64_t row = 0; row < c->rows; row++)
            if (c->alive[row]) rotate_and_write(c, row, qkv + row * all_heads * hd, cache);

        /* Head by head, not row by row: neighbours of one group then find their prompt's keys in
        the cache. */
#pragma omp for schedule(dynamic, few)
        for (int64_t item = 0; item < c->kv_heads * c->rows; item++) {
            const int64_t kv = item / c->rows, row = item % c->rows;
            if (!c->alive[row]) continue;
            const float *keys = cache + kv * c->tokens * hd;
            const float *values = cache + (c->kv_heads + kv) * c->tokens * hd;
            for (int64_t first = 0; first < ratio; first += block) {
                const float *q = qkv + (row * all_heads + kv * ratio + first) * hd;
                float *to = out + (row * c->heads + kv * ratio + first) * hd;
                const int64_t n = ratio - first < block ? ratio - first : block;
                switch (n) {
                case 1: attend(1, c, row, q, keys, values, to, scores, width); break;
                case 2: attend(2, c, row, q, keys, values, to, scores, width); break;
                case 3: attend(3, c, row, q, keys, values, to, scores, width); break;
                case 4: attend(4, c, row, q, keys, values, to, scores, width); break;
                case 5: attend(5, c, row, q, keys, values, to, scores, width); break;
                case 6: attend(6, c, row, q, keys, values, to, scores, width); break;
                case 7: attend(7, c, row, q, keys, values, to, scores, width); break;
                default: attend(8, c, row, q, keys, values, to, scores, width);
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
        vec squares[UNIT / LANES] = {0}; /* as many chains: an addition waits for the last one */
        for (int64_t i = 0; i < width; i += UNIT)
            for (int j = 0; j < UNIT / LANES; j++) {
                vec x = load(from + i + j * LANES);
                squares[j] += x * x;
            }
        float total = 0;
        for (int j = 0; j < UNIT / LANES; j++) total += sum(squares[j]);
        const float scale = 1.0f / sqrtf(total / width + eps);
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
