/* Decoding on a CPU in fp32: attention over the page pool, RMSNorm, SwiGLU; and training's kernels
with their gradients. Built by native.py, which with native_layers.py says what the tensors are and
where the references stand.

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

/* ---- row kernels, forward and backward ---- */

/* Rows whose parts of a weight's gradient are added up on their own: the order of the sum then
does not depend on the threads. */
#define PART 64

INLINE vec sigmoid(vec x) { return 1.0f / (1.0f + vexp(-x)); }

/* x, residual or NULL [rows, width] -> their sum in `total`, its norm in `out`, and in `scales`
[rows], if not NULL, what the sum was multiplied by. */
void rms_norm(const float *x, const float *residual, const float *weight, float *total, float *out,
              float *scales, int64_t rows, int64_t width, float eps) {
#pragma omp parallel for if (rows * width > 100000)
    for (int64_t row = 0; row < rows; row++) {
        const float *from = x + row * width;
        float *to = out + row * width;
        if (residual) {
            float *added = total + row * width;
            for (int64_t i = 0; i < width; i += LANES)
                store(added + i, load(residual + row * width + i) + load(from + i));
            from = added;
        }

        vec squares[UNIT / LANES] = {0}; /* as many chains: an addition waits for the last one */
        for (int64_t i = 0; i < width; i += UNIT)
            for (int j = 0; j < UNIT / LANES; j++) {
                vec x = load(from + i + j * LANES);
                squares[j] += x * x;
            }
        float square = 0;
        for (int j = 0; j < UNIT / LANES; j++) square += sum(squares[j]);
        const float scale = 1.0f / sqrtf(square / width + eps);
        if (scales) scales[row] = scale;
        for (int64_t i = 0; i < width; i += LANES)
            store(to + i, load(from + i) * scale * load(weight + i));
    }
}

/* Of the norm of `total`: grad_x (grad_total, if not NULL, is added) and the weight's gradient in
parts [rows / PART, width]. */
void rms_norm_backward(const float *grad, const float *grad_total, const float *total,
                       const float *weight, const float *scales, float *grad_x, float *parts,
                       int64_t rows, int64_t width) {
#pragma omp parallel for if (rows * width > 50000)
    for (int64_t first = 0; first < rows; first += PART) {
        const int64_t end = first + PART < rows ? first + PART : rows;
        float *part = parts + first / PART * width;
        memset(part, 0, width * sizeof(float));
        for (int64_t row = first; row < end; row++) {
            const float *g = grad + row * width, *x = total + row * width;
            const float scale = scales[row];
            vec along[UNIT / LANES] = {0};
            for (int64_t i = 0; i < width; i += UNIT)
                for (int j = 0; j < UNIT / LANES; j++) {
                    const int64_t at = i + j * LANES;
                    vec product = load(g + at) * (load(x + at) * scale);
                    store(part + at, load(part + at) + product);
                    along[j] += product * load(weight + at);
                }
            float mean = 0;
            for (int j = 0; j < UNIT / LANES; j++) mean += sum(along[j]);
            mean /= width;
            for (int64_t i = 0; i < width; i += LANES) {
                vec to = load(g + i) * load(weight + i) - load(x + i) * scale * mean;
                to *= scale;
                if (grad_total) to += load(grad_total + row * width + i);
                store(grad_x + row * width + i, to);
            }
        }
    }
}

/* gate_up [rows, 2 * width] -> out [rows, width] */
void swiglu(const float *gate_up, float *out, int64_t rows, int64_t width) {
#pragma omp parallel for if (rows * width > 50000)
    for (int64_t row = 0; row < rows; row++)
        for (int64_t i = 0; i < width; i += LANES) {
            vec gate = load(gate_up + row * 2 * width + i);
            vec up = load(gate_up + (row * 2 + 1) * width + i);
            store(out + row * width + i, gate * sigmoid(gate) * up);
        }
}

/* grad [rows, width] of `out` -> grad_gate_up [rows, 2 * width] */
void swiglu_backward(const float *gate_up, const float *grad, float *grad_gate_up, int64_t rows,
                     int64_t width) {
#pragma omp parallel for if (rows * width > 50000)
    for (int64_t row = 0; row < rows; row++)
        for (int64_t i = 0; i < width; i += LANES) {
            vec gate = load(gate_up + row * 2 * width + i);
            vec up = load(gate_up + (row * 2 + 1) * width + i);
            vec upstream = load(grad + row * width + i);
            vec share = sigmoid(gate);
            vec slope = share * (1.0f + gate * (1.0f - share));
            store(grad_gate_up + row * 2 * width + i, upstream * up * slope);
            store(grad_gate_up + (row * 2 + 1) * width + i, upstream * gate * share);
        }
}

/* qkv [rows, (heads + 2 kv_heads) * head_dim] and its bias, or NULL -> q, k, v [rows, heads of
each, head_dim], q and k turned by cos and sin [rows, head_dim / 2]. */
void rotate(const float *qkv, const float *bias, const float *cos, const float *sin, float *q,
            float *k, float *v, int64_t rows, int64_t heads, int64_t kv_heads, int64_t head_dim) {
    const int64_t half = head_dim / 2, all_heads = heads + 2 * kv_heads;
#pragma omp parallel for if (rows * all_heads * head_dim > 100000)
    for (int64_t row = 0; row < rows; row++) {
        const float *c = cos + row * half, *s = sin + row * half;
        for (int64_t head = 0; head < all_heads; head++) {
            float *to = q + (row * heads + head) * head_dim;
            if (head >= heads) to = k + (row * kv_heads + head - heads) * head_dim;
            if (head >= heads + kv_heads)
                to = v + (row * kv_heads + head - heads - kv_heads) * head_dim;
            memcpy(to, qkv + (row * all_heads + head) * head_dim, head_dim * sizeof(float));
            if (bias)
                for (int64_t i = 0; i < head_dim; i++) to[i] += bias[head * head_dim + i];
            if (head >= heads + kv_heads) continue;
            for (int64_t i = 0; i < half; i++) {
                const float low = to[i], high = to[i + half];
                to[i] = low * c[i] - high * s[i];
                to[i + half] = high * c[i] + low * s[i];
            }
        }
    }
}

/* Gradients of q, k and v -> of qkv, and the bias's in parts [rows / PART, its width] or NULL. */
void rotate_backward(const float *q, const float *k, const float *v, const float *cos,
                     const float *sin, float *grad_qkv, float *parts, int64_t rows, int64_t heads,
                     int64_t kv_heads, int64_t head_dim) {
    const int64_t half = head_dim / 2, all_heads = heads + 2 * kv_heads;
    const int64_t width = all_heads * head_dim;
#pragma omp parallel for if (rows * width > 100000)
    for (int64_t first = 0; first < rows; first += PART) {
        const int64_t end = first + PART < rows ? first + PART : rows;
        if (parts) memset(parts + first / PART * width, 0, width * sizeof(float));
        for (int64_t row = first; row < end; row++) {
            const float *c = cos + row * half, *s = sin + row * half;
            float *to = grad_qkv + row * width;
            for (int64_t head = 0; head < heads + kv_heads; head++) {
                const float *x = head < heads ? q + (row * heads + head) * head_dim
                                              : k + (row * kv_heads + head - heads) * head_dim;
                float *turned = to + head * head_dim;
                for (int64_t i = 0; i < half; i++) {
                    turned[i] = x[i] * c[i] + x[i + half] * s[i];
                    turned[i + half] = x[i + half] * c[i] - x[i] * s[i];
                }
            }
            memcpy(to + (heads + kv_heads) * head_dim, v + row * kv_heads * head_dim,
                   kv_heads * head_dim * sizeof(float));
            if (parts)
                for (int64_t i = 0; i < width; i++) parts[first / PART * width + i] += to[i];
        }
    }
}

/* ---- attention of packed segments, forward and backward ---- */

/* Queries at a time: their scores with 1,500 keys fill 200 KB. A multiple of 4. */
#define BLOCK 32

/* Segment s holds rows first[s] .. first[s] + length[s] - 1. Each sees those before it in its
segment, and all of segment parent[s] where that is not -1; children come behind their parents. */
typedef struct {
    const int64_t *first, *length, *parent; /* [segments] */
    int64_t segments, heads, kv_heads, head_dim;
    float scale;
} Packed;

/* c[0 : 4, 0 : w vectors] (+)= a[4, steps] b[steps, w vectors]; strides of a's rows and columns. */
INLINE void four_rows(int w, const float *a, int64_t a_row, int64_t a_step, const float *b,
                      int64_t b_step, int64_t steps, float *c, int64_t c_row, int add) {
    vec total[4][4];
    for (int i = 0; i < 4; i++)
        for (int j = 0; j < w; j++)
            total[i][j] = add ? load(c + i * c_row + j * LANES) : (vec){0};
    for (int64_t t = 0; t < steps; t++, a += a_step, b += b_step) {
        vec x[4];
        for (int j = 0; j < w; j++) x[j] = load(b + j * LANES);
        for (int i = 0; i < 4; i++)
            for (int j = 0; j < w; j++) total[i][j] += x[j] * a[i * a_row];
    }
    for (int i = 0; i < 4; i++)
        for (int j = 0; j < w; j++) store(c + i * c_row + j * LANES, total[i][j]);
}

/* c [rows, columns] (+)= a [rows, steps] b [steps, columns]; rows in fours, columns in vectors. */
INLINE void product(int64_t rows, int64_t columns, int64_t steps, const float *a, int64_t a_row,
                    int64_t a_step, const float *b, int64_t b_step, float *c, int64_t c_row,
                    int add) {
    for (int64_t i = 0; i < rows; i += 4) {
        const float *from = a + i * a_row;
        float *to = c + i * c_row;
        int64_t j = 0;
        for (; REGISTERS == 32 && j + 4 * LANES <= columns; j += 4 * LANES)
            four_rows(4, from, a_row, a_step, b + j, b_step, steps, to + j, c_row, add);
        for (; j + 2 * LANES <= columns; j += 2 * LANES)
            four_rows(2, from, a_row, a_step, b + j, b_step, steps, to + j, c_row, add);
        for (; j < columns; j += LANES)
            four_rows(1, from, a_row, a_step, b + j, b_step, steps, to + j, c_row, add);
    }
}

/* A thread's copies of what one segment sees, `width` keys with those that fill a vector up, and
what it makes of a block of queries. */
typedef struct {
    int64_t width;
    float *keys, *values;               /* [width, head_dim] */
    float *keys_across, *values_across; /* [head_dim, width] */
    float *grad_keys, *grad_values;     /* [width, head_dim] */
    float *queries, *upstream, *mixed;  /* [BLOCK, head_dim] */
    float *scores, *slopes;             /* [BLOCK, width] */
    float *memory;
} Room;

static Room make_room(const Packed *p) {
    int64_t most = 0;
    for (int64_t s = 0; s < p->segments; s++) {
        int64_t keys = p->length[s] + (p->parent[s] < 0 ? 0 : p->length[p->parent[s]]);
        most = keys > most ? keys : most;
    }
    Room room = {.width = (most + UNIT - 1) / UNIT * UNIT};
    const int64_t table = room.width * p->head_dim, block = BLOCK * p->head_dim;
    const int64_t floats = 6 * table + 3 * block + 2 * BLOCK * room.width;
    float *at = room.memory = malloc(floats * sizeof(float));
    if (!at) abort();
    float **tables[6] = {&room.keys,          &room.values,    &room.keys_across,
                         &room.values_across, &room.grad_keys, &room.grad_values};
    for (int i = 0; i < 6; i++, at += table) *tables[i] = at;
    room.queries = at, room.upstream = at + block, room.mixed = at + 2 * block;
    room.scores = at + 3 * block, room.slopes = room.scores + BLOCK * room.width;
    return room;
}

/* x [rows, heads, head_dim]: its row of the key at place t of segment s. */
INLINE int64_t row_of(const Packed *p, int64_t s, int64_t t) {
    const int64_t before = p->parent[s] < 0 ? 0 : p->length[p->parent[s]];
    return t < before ? p->first[p->parent[s]] + t : p->first[s] + t - before;
}

/* Rows of one head to a table, and to the same table lying across. */
static void gather(const Packed *p, int64_t s, int64_t head, int64_t count, int64_t width,
                   const float *x, float *table, float *across) {
    const int64_t hd = p->head_dim;
    for (int64_t t = 0; t < width; t++)
        if (t < count)
            memcpy(table + t * hd, x + (row_of(p, s, t) * p->kv_heads + head) * hd,
                   hd * sizeof(float));
        else
            memset(table + t * hd, 0, hd * sizeof(float));
    if (across)
        for (int64_t d = 0; d < hd; d++)
            for (int64_t t = 0; t < width; t++) across[d * width + t] = table[t * hd + d];
}

/* Rows first .. first + count - 1 of a query head, times `scale`, and zeros to fill the block up. */
static void take_block(const Packed *p, int64_t first, int64_t count, int64_t head, float scale,
                       const float *x, float *block) {
    const int64_t hd = p->head_dim;
    memset(block, 0, BLOCK * hd * sizeof(float));
    for (int64_t i = 0; i < count; i++)
        for (int64_t d = 0; d < hd; d++)
            block[i * hd + d] = x[((first + i) * p->heads + head) * hd + d] * scale;
}

static float highest(const float *scores, int64_t count) {
    float found = scores[0];
    for (int64_t t = 1; t < count; t++) found = scores[t] > found ? scores[t] : found;
    return found;
}

/* exp(scores - shift) of the first `count`, then zeros up to `width`. Returns their sum. */
static float exponentials(float *scores, int64_t count, int64_t width, float shift) {
    vec mass = {0};
    for (int64_t t = count; t < width; t++) scores[t] = PAST;
    for (int64_t t = 0; t < count; t += LANES) {
        vec weight = vexp(load(scores + t) - shift);
        store(scores + t, weight);
        mass += weight;
    }
    memset(scores + count, 0, (width - count) * sizeof(float));
    return sum(mass);
}

/* q [rows, heads, hd], k, v [rows, kv_heads, hd] -> out as q, lse [rows, heads]: log of the sum of
the exponentials of a query's scores. */
void attend_segments(const Packed *p, const float *q, const float *k, const float *v, float *out,
                     float *lse) {
    const int64_t hd = p->head_dim, ratio = p->heads / p->kv_heads;
#pragma omp parallel
    {
        Room room = make_room(p);
#pragma omp for schedule(dynamic)
        for (int64_t item = 0; item < p->segments * p->kv_heads; item++) {
            const int64_t s = item / p->kv_heads, kv = item % p->kv_heads;
            const int64_t before = p->parent[s] < 0 ? 0 : p->length[p->parent[s]];
            const int64_t count = before + p->length[s];
            const int64_t width = (count + UNIT - 1) / UNIT * UNIT;
            gather(p, s, kv, count, width, k, room.keys, room.keys_across);
            gather(p, s, kv, count, width, v, room.values, NULL);

            for (int64_t head = kv * ratio; head < (kv + 1) * ratio; head++)
                for (int64_t i = 0; i < p->length[s]; i += BLOCK) {
                    const int64_t n = p->length[s] - i < BLOCK ? p->length[s] - i : BLOCK;
                    const int64_t rows = (n + 3) / 4 * 4;
                    const int64_t seen = (before + i + n + UNIT - 1) / UNIT * UNIT;
                    take_block(p, p->first[s] + i, n, head, p->scale, q, room.queries);
                    product(rows, seen, hd, room.queries, hd, 1, room.keys_across, width,
                            room.scores, width, 0);
                    float mass[BLOCK];
                    for (int64_t row = 0; row < n; row++) {
                        float *scores = room.scores + row * width;
                        const int64_t own = before + i + row + 1; /* keys that it sees */
                        const float top = highest(scores, own);
                        mass[row] = exponentials(scores, own, seen, top);
                        lse[(p->first[s] + i + row) * p->heads + head] = top + logf(mass[row]);
                    }
                    product(rows, hd, seen, room.scores, width, 1, room.values, hd, room.mixed,
                            hd, 0);
                    for (int64_t row = 0; row < n; row++) {
                        float *to = out + ((p->first[s] + i + row) * p->heads + head) * hd;
                        for (int64_t d = 0; d < hd; d++)
                            to[d] = room.mixed[row * hd + d] / mass[row];
                    }
                }
        }
        free(room.memory);
    }
}

/* One segment's part of attend_segments_backward, of the query heads that share a KV head. */
static void segment_backward(const Packed *p, int64_t s, int64_t kv, const float *grad,
                             const float *q, const float *k, const float *v, const float *out,
                             const float *lse, float *grad_q, float *grad_k, float *grad_v,
                             Room *room) {
    const int64_t hd = p->head_dim, ratio = p->heads / p->kv_heads;
    const int64_t before = p->parent[s] < 0 ? 0 : p->length[p->parent[s]];
    const int64_t count = before + p->length[s];
    const int64_t width = (count + UNIT - 1) / UNIT * UNIT;
    gather(p, s, kv, count, width, k, room->keys, room->keys_across);
    gather(p, s, kv, count, width, v, room->values, room->values_across);
    memset(room->grad_keys, 0, width * hd * sizeof(float));
    memset(room->grad_values, 0, width * hd * sizeof(float));

    for (int64_t head = kv * ratio; head < (kv + 1) * ratio; head++)
        for (int64_t i = 0; i < p->length[s]; i += BLOCK) {
            const int64_t n = p->length[s] - i < BLOCK ? p->length[s] - i : BLOCK;
            const int64_t rows = (n + 3) / 4 * 4;
            const int64_t seen = (before + i + n + UNIT - 1) / UNIT * UNIT;
            take_block(p, p->first[s] + i, n, head, p->scale, q, room->queries);
            take_block(p, p->first[s] + i, n, head, 1.0f, grad, room->upstream);
            product(rows, seen, hd, room->queries, hd, 1, room->keys_across, width, room->scores,
                    width, 0);
            product(rows, seen, hd, room->upstream, hd, 1, room->values_across, width,
                    room->slopes, width, 0);
            for (int64_t row = 0; row < rows; row++) {
                const int64_t at = (p->first[s] + i + row) * p->heads + head;
                float *scores = room->scores + row * width, *slopes = room->slopes + row * width;
                float along = 0; /* upstream . out, the mean of the slopes */
                if (row < n) {
                    exponentials(scores, before + i + row + 1, seen, lse[at]);
                    for (int64_t d = 0; d < hd; d++)
                        along += room->upstream[row * hd + d] * out[at * hd + d];
                } else
                    memset(scores, 0, seen * sizeof(float));
                for (int64_t t = 0; t < seen; t += LANES)
                    store(slopes + t, load(scores + t) * (load(slopes + t) - along));
            }

            product(rows, hd, seen, room->slopes, width, 1, room->keys, hd, room->mixed, hd, 0);
            for (int64_t row = 0; row < n; row++) {
                float *to = grad_q + ((p->first[s] + i + row) * p->heads + head) * hd;
                for (int64_t d = 0; d < hd; d++) to[d] = room->mixed[row * hd + d] * p->scale;
            }
            product(seen, hd, rows, room->slopes, 1, width, room->queries, hd, room->grad_keys,
                    hd, 1);
            product(seen, hd, rows, room->scores, 1, width, room->upstream, hd,
                    room->grad_values, hd, 1);
        }

    for (int64_t t = 0; t < count; t++) {
        const int64_t at = (row_of(p, s, t) * p->kv_heads + kv) * hd;
        for (int64_t d = 0; d < hd; d++) {
            grad_k[at + d] += room->grad_keys[t * hd + d];
            grad_v[at + d] += room->grad_values[t * hd + d];
        }
    }
}

/* Gradients of q, k and v, the last two added to what is there. An item is a segment without a
parent and all that continue it, for one KV head, so that no sum has two writers. */
void attend_segments_backward(const Packed *p, const float *grad, const float *q, const float *k,
                              const float *v, const float *out, const float *lse, float *grad_q,
                              float *grad_k, float *grad_v) {
#pragma omp parallel
    {
        Room room = make_room(p);
#pragma omp for schedule(dynamic)
        for (int64_t item = 0; item < p->segments * p->kv_heads; item++) {
            const int64_t root = item / p->kv_heads, kv = item % p->kv_heads;
            if (p->parent[root] >= 0) continue;
            for (int64_t s = root; s < p->segments; s++)
                if (s == root || p->parent[s] == root)
                    segment_backward(p, s, kv, grad, q, k, v, out, lse, grad_q, grad_k, grad_v,
                                     &room);
        }
        free(room.memory);
    }
}
