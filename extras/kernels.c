/* kernels.c: RMSNorm, products, and attention of one new token a sample, for kernels.py, which
 * compiles it.
 *
 * Constants: BF16, 1 or 0; for attention, which is then compiled alone, GROUP, query heads per key
 * head, and DIM, a head's size. Norms and heads have a multiple of 16 numbers.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>
#if BF16 && defined __AVX512BF16__
#include <immintrin.h>
#endif

/* On x86 as many numbers as a register holds: of more the compiler makes poor code. */
#ifdef __AVX512F__
#define LANES 16
#else
#define LANES 8
#endif
/* Numbers from which on work is shared among threads. */
#define MUCH 32768

/* LANES numbers, wherever in memory. */
typedef float vec __attribute__((vector_size(4 * LANES), aligned(4)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES), aligned(2)));

#if BF16
/* bf16 is the upper half of fp32. */
typedef uint16_t number;
static inline vec load(const number *from) {
    words wide = __builtin_convertvector(*(const halves *)from, words) << 16;
    vec x;
    memcpy(&x, &wide, sizeof x);
    return x;
}
static inline void store(number *to, vec x) {
    words wide;
    memcpy(&wide, &x, sizeof x);
    /* To the nearest, a tie to the even one. */
    wide = (wide + 0x7fff + ((wide >> 16) & 1)) >> 16;
    *(halves *)to = __builtin_convertvector(wide, halves);
}
#else
typedef float number;
static inline vec load(const number *from) { return *(const vec *)from; }
static inline void store(number *to, vec x) { *(vec *)to = x; }
#endif

static inline float sum(vec x) {
    float s = 0;
    for (int i = 0; i < LANES; i++) s += x[i];
    return s;
}

#ifndef GROUP
/* x, upstream and out (rows, dim), scale (dim,); upstream 0: out = x / rms(x) * scale, else the
 * gradient of x. */
void rms_norm(const number *x, const number *scale, const number *upstream, number *out, long rows,
              long dim, float eps) {
#pragma omp parallel for if (rows * dim > MUCH)
    for (long at = 0; at < rows * dim; at += dim) {
        vec squares = {0}, products = {0};
        for (long d = 0; d < dim; d += LANES) {
            vec one = load(x + at + d);
            squares += one * one;
            if (upstream) products += one * load(scale + d) * load(upstream + at + d);
        }
        const float k = 1 / sqrtf(sum(squares) / dim + eps);
        const float share = k * k * sum(products) / dim;
        for (long d = 0; d < dim; d += LANES) {
            vec one = load(x + at + d), by = load(scale + d);
            if (upstream)
                store(out + at + d, k * (by * load(upstream + at + d) - share * one));
            else
                store(out + at + d, k * one * by);
        }
    }
}

/* In a product a tile is ROWS tokens by WIDE outputs, summed over STEP inputs at a time. */
#define COLUMNS 2
#define WIDE (COLUMNS * LANES)
#define ROWS (LANES / 2)

#if BF16 && defined __AVX512BF16__
#define STEP 2
typedef int32_t input;
typedef __m512bh weights;
static inline weights unfold(const number *from) { return (weights)_mm512_loadu_si512(from); }
static inline vec add(vec s, weights w, input x) {
    return (vec)_mm512_dpbf16_ps((__m512)s, w, (weights)_mm512_set1_epi32(x));
}
static inline input take(const number *from) {
    input x;
    memcpy(&x, from, sizeof x);
    return x;
}
#else
#define STEP 1
typedef float input;
typedef vec weights;
static inline weights unfold(const number *from) { return load(from); }
static inline vec add(vec s, weights w, input x) { return s + w * x; }
static inline input take(const number *from) {
#if BF16
    const uint32_t wide = (uint32_t)*from << 16;
    input x;
    memcpy(&x, &wide, sizeof x);
    return x;
#else
    return *from;
#endif
}
#endif

/* For kernels.py. */
const int rows_of_tile = ROWS, width_of_tile = WIDE, step_of_tile = STEP;

/* out[r][c] += the tokens x (count, ROWS) times the weights w (count, WIDE, STEP) */
static inline void tile(const input *x, const number *w, long count, vec out[ROWS][COLUMNS]) {
    vec s[ROWS][COLUMNS];
    memcpy(s, out, sizeof s);
    for (long i = 0; i < count; i++) {
        weights one[COLUMNS];
        for (int c = 0; c < COLUMNS; c++) one[c] = unfold(w + (i * COLUMNS + c) * LANES * STEP);
        for (int r = 0; r < ROWS; r++)
            for (int c = 0; c < COLUMNS; c++) s[r][c] = add(s[r][c], one[c], x[i * ROWS + r]);
    }
    memcpy(out, s, sizeof s);
}

/* out (n, outs) = [x; z] weight^T + bias, where z = x down^T, for x (n, ins); rank 0: without z,
 * bias 0: without bias.
 *
 * ins and rank are multiples of STEP, outs of WIDE. weight (outs, ins + rank) and down (rank, ins)
 * lie in panels (outs / WIDE, ins / STEP, WIDE, STEP); down's last panel is filled up. [x; z] is
 * laid out likewise, in scratch (blocks, (ins + rank) / STEP, ROWS), the last block filled up.
 */
void product(const number *x, const number *down, const number *weight, const number *bias,
             number *out, input *scratch, long n, long ins, long rank, long outs) {
    const long own = ins / STEP, all = (ins + rank) / STEP, blocks = (n + ROWS - 1) / ROWS;
#pragma omp parallel
    {
#pragma omp for
        for (long b = 0; b < blocks; b++)
            for (long i = 0; i < own; i++)
                for (long r = 0; r < ROWS; r++) {
                    const long token = b * ROWS + r;
                    scratch[(b * all + i) * ROWS + r] =
                        token < n ? take(x + token * ins + i * STEP) : 0;
                }
        if (rank) {
#pragma omp for collapse(2)
            for (long panel = 0; panel < rank; panel += WIDE)
                for (long b = 0; b < blocks; b++) {
                    vec s[ROWS][COLUMNS] = {0};
                    number z[WIDE];
                    input *block = scratch + b * all * ROWS;
                    tile(block, down + panel * ins, own, s);
                    for (int r = 0; r < ROWS; r++) {
                        for (int c = 0; c < COLUMNS; c++) store(z + c * LANES, s[r][c]);
                        for (long i = 0; i < WIDE && panel + i < rank; i += STEP)
                            block[(own + (panel + i) / STEP) * ROWS + r] = take(z + i);
                    }
                }
        }
#pragma omp for
        for (long panel = 0; panel < outs; panel += WIDE)
            for (long b = 0; b < blocks; b++) {
                vec s[ROWS][COLUMNS] = {0};
                if (bias)
                    for (int r = 0; r < ROWS; r++)
                        for (int c = 0; c < COLUMNS; c++) s[r][c] = load(bias + panel + c * LANES);
                tile(scratch + b * all * ROWS, weight + panel * (ins + rank), all, s);
                for (int r = 0; r < ROWS && b * ROWS + r < n; r++)
                    for (int c = 0; c < COLUMNS; c++)
                        store(out + (b * ROWS + r) * outs + panel + c * LANES, s[r][c]);
            }
    }
}

#else
#define VECTORS (DIM / LANES)
/* So much of a head is summed at a time, in registers for small groups. */
#define TILE (VECTORS % 4 == 0 ? 4 : VECTORS % 2 == 0 ? 2 : 1)

/* score[g][i] = query[g] . keys[i], i < count */
static inline void multiply(vec query[GROUP][VECTORS], const number *keys, long count, long pitch,
                            float score[GROUP][pitch]) {
    for (long i = 0; i < count; i++) {
        vec key[VECTORS];
        for (int d = 0; d < VECTORS; d++) key[d] = load(keys + i * DIM + d * LANES);
        for (int g = 0; g < GROUP; g++) {
            vec s = query[g][0] * key[0];
            for (int d = 1; d < VECTORS; d++) s += query[g][d] * key[d];
            score[g][i] = sum(s);
        }
    }
}

/* out[g] += weight[g][i] values[i], summed over i < count */
static inline void gather(long pitch, float weight[GROUP][pitch], const number *values, long count,
                          vec out[GROUP][VECTORS]) {
    for (int at = 0; at < VECTORS; at += TILE) {
        vec s[GROUP][TILE];
        memset(s, 0, sizeof s);
        for (long i = 0; i < count; i++)
            for (int d = 0; d < TILE; d++) {
                vec value = load(values + i * DIM + (at + d) * LANES);
                for (int g = 0; g < GROUP; g++) s[g][d] += weight[g][i] * value;
            }
        for (int g = 0; g < GROUP; g++)
            for (int d = 0; d < TILE; d++) out[g][at + d] += s[g][d];
    }
}

static inline void softmax(float *x, long count) {
    float most = x[0], total = 0;
    for (long i = 1; i < count; i++) most = x[i] > most ? x[i] : most;
    for (long i = 0; i < count; i++) total += x[i] = expf(x[i] - most);
    for (long i = 0; i < count; i++) x[i] /= total;
}

/* One new token for each of n samples, which see `shared` tokens that are the same for all, then
 * of their own the last `window` of the first length[sample] + 1.
 *
 * query and out (n, heads * GROUP, DIM); far keys and values (heads, shared, DIM); near ones
 * (n, heads, columns, DIM). `scores` (threads, GROUP, shared + columns) is scratch.
 */
int omp_get_thread_num(void);
void attend(const number *query, const number *far_keys, const number *far_values,
            const number *near_keys, const number *near_values, const int64_t *length, number *out,
            float *scores, long threads, long n, long heads, long shared, long columns,
            long window, float scale) {
    const long pitch = shared + columns;
#pragma omp parallel num_threads(threads)
    {
        float(*score)[pitch] = (void *)(scores + omp_get_thread_num() * GROUP * pitch);
/* Head by head, so that what is shared stays in the cache. */
#pragma omp for schedule(dynamic, 4)
        for (long job = 0; job < heads * n; job++) {
            const long head = job / n, sample = job % n, place = sample * heads + head;
            const long end = length[sample] + 1, start = end > window ? end - window : 0;
            const long far = head * shared * DIM, near = (place * columns + start) * DIM;
            vec q[GROUP][VECTORS], result[GROUP][VECTORS];
            memset(result, 0, sizeof result);
            for (int g = 0; g < GROUP; g++)
                for (int d = 0; d < VECTORS; d++)
                    q[g][d] = scale * load(query + (place * GROUP + g) * DIM + d * LANES);
            multiply(q, far_keys + far, shared, pitch, score);
            multiply(q, near_keys + near, end - start, pitch, (void *)&score[0][shared]);
            for (int g = 0; g < GROUP; g++) softmax(score[g], shared + end - start);
            gather(pitch, score, far_values + far, shared, result);
            gather(pitch, (void *)&score[0][shared], near_values + near, end - start, result);
            for (int g = 0; g < GROUP; g++)
                for (int d = 0; d < VECTORS; d++)
                    store(out + (place * GROUP + g) * DIM + d * LANES, result[g][d]);
        }
    }
}
#endif
