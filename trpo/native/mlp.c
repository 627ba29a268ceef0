/* A multilayer perceptron, products with its Jacobian, and its fit by Adam, in float32; and small loops of an update that
 * are slow in Python.
 *
 * The formulas are those of `trpo/networks/mlp.py`, which is also what the tests compare this file with. It is here because
 * at TRPO's sizes (thousands of rows, layers of 64) a BLAS library spends most of its time around the arithmetic. Three
 * things are different: all layers of a block of rows are done before the next block (on the way back, of sixteen blocks
 * where threads share them), so that what passes between layers stays in the first two levels of cache; bias and sums of
 * two products start in the registers of the product; and nothing is allocated.
 *
 * Threads share blocks of rows, or rows of a gradient: every number is computed in one order, however many there are.
 *
 * Conventions. Row-major. Widths are padded with zeros to whole vectors, `pad(n)`, in everything that is not the
 * caller's. Parameters come as W_0, b_0, W_1, b_1, …, W_l [n_{l+1}, n_l]; gradients and tangents as one vector in that
 * order. Layer l maps h_l to z_{l+1} = h_l W_lᵀ + b_l, and h_{l+1} = σ(z_{l+1}) but for the last one.
 */

#include <math.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>
#include <time.h>

#if defined(__AVX__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif
#if defined(__ARM_FEATURE_SVE) && defined(__linux__)
#include <sys/auxv.h>
#endif

/* Numbers in a vector; vectors side by side and rows of them that fit into the registers as sums of products, if there
 * are many columns (WIDE × TALL) or few (one or two × TALLER). */
#if defined(__AVX512F__)
enum { LANES = 16, WIDE = 4, TALL = 6, TALLER = 12 };
#elif defined(__aarch64__)
enum { LANES = 4, WIDE = 4, TALL = 6, TALLER = 12 };
#elif defined(__AVX__)
enum { LANES = 8, WIDE = 2, TALL = 6, TALLER = 12 };
#else
enum { LANES = 4, WIDE = 2, TALL = 6, TALLER = 12 };
#endif

enum { BLOCK = 128, GROUP = 16 * BLOCK, STRIP = 16, MOST_LAYERS = 16, MOST_THREADS = 8 };
enum { TANH = 0, RELU = 1 };

typedef float vec __attribute__((vector_size(LANES * sizeof(float))));
typedef int vec_int __attribute__((vector_size(LANES * sizeof(int))));
typedef float vec_unaligned __attribute__((vector_size(LANES * sizeof(float)), aligned(4)));

#define INLINE static inline __attribute__((always_inline))

static inline vec load(const float *p) { return *(const vec_unaligned *)p; }
static inline void store(float *p, vec x) { *(vec_unaligned *)p = x; }
static inline vec all(float x) { return x - (vec){0}; } /* minus: plus would make 0 of −0, for which compilers add */

/* a b + c, rounded once where the processor can. Left to the compiler it would be rounded once or twice as suits the
 * loop around it, and a number would depend on how many rows a thread was given. */
static inline vec fused(vec a, vec b, vec c)
{
#if defined(__AVX512F__)
    return (vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX__) && defined(__FMA__)
    return (vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
    return (vec)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
    return a * b + c;
#endif
}

static inline long pad(long n) { return (n + LANES - 1) / LANES * LANES; }
static inline long least(long a, long b) { return a < b ? a : b; }

/* ------------------------------------------------------------------------------------------------ products ---- */

/* C [rows, vecs · LANES] = init + Σ_k a(·, k) b(k, ·), all of C in registers; rows and vecs are compile-time constants.
 * a(i, k) = a[i · a_row + k · a_col], so that A may be a transpose. init_row = 0 adds one row (a bias) to all; without
 * `init` sums start at 0. */
INLINE void tile(
    const int rows, const int vecs, long depth, const float *a, long a_row, long a_col, const float *b, long b_row,
    const float *init, long init_row, float *c, long c_row)
{
    vec sum[TALLER][WIDE];
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < vecs; j++) sum[i][j] = init ? load(init + i * init_row + j * LANES) : all(0);
    for (long k = 0; k < depth; k++) {
        vec right[WIDE];
        for (int j = 0; j < vecs; j++) right[j] = load(b + k * b_row + j * LANES);
        for (int i = 0; i < rows; i++) {
            const vec left = all(a[i * a_row + k * a_col]);
            for (int j = 0; j < vecs; j++) sum[i][j] = fused(left, right[j], sum[i][j]);
        }
    }
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < vecs; j++) store(c + i * c_row + j * LANES, sum[i][j]);
}

/* A column of C, `vecs` wide, from the top to the bottom. */
INLINE void column(
    const int tall, const int vecs, long rows, long depth, const float *a, long a_row, long a_col, const float *b,
    long b_row, const float *init, long init_row, float *c, long c_row)
{
    long i = 0;
#define TILE(n)                                                                                                      \
    tile(n, vecs, depth, a + i * a_row, a_row, a_col, b, b_row, init ? init + i * init_row : init, init_row,         \
         c + i * c_row, c_row)
    for (; i + tall <= rows; i += tall) TILE(tall);
    for (; i + 4 <= rows; i += 4) TILE(4);
    for (; i + 2 <= rows; i += 2) TILE(2);
    for (; i < rows; i++) TILE(1);
#undef TILE
}

/* C [rows, cols] = init + A B for B [depth, cols], cols whole vectors. `init` may be C itself. */
static void product(long rows, long cols, long depth, const float *a, long a_row, long a_col, const float *b,
                    long b_row, const float *init, long init_row, float *c, long c_row)
{
    /* A slice of B that stays in the first level of cache while all of A passes by; if its rows lie far apart, they
     * would get in each other's way there. */
    float slice[BLOCK * WIDE * LANES] __attribute__((aligned(64)));
    for (long k = 0; k == 0 || k < depth; k += BLOCK) {
        const long deep = least(BLOCK, depth - k);
        for (long j = 0; j < cols;) {
            const long left = (cols - j) / LANES, vecs = left >= WIDE ? WIDE : left >= 2 ? 2 : 1, wide = vecs * LANES;
            const float *right = b + k * b_row + j, *from = k ? c + j : init ? init + j : init;
            long right_row = b_row;
            if (cols > WIDE * LANES && rows > 2 * TALL) {
                for (long d = 0; d < deep; d++)
                    memcpy(slice + d * wide, right + d * b_row, sizeof(float) * (size_t)wide);
                right = slice;
                right_row = wide;
            }
#define COLUMN(tall, vecs)                                                                                           \
    column(tall, vecs, rows, deep, a + k * a_col, a_row, a_col, right, right_row, from, k ? c_row : init_row, c + j, \
           c_row)
            if (vecs == WIDE) COLUMN(TALL, WIDE);
            else if (vecs == 2) COLUMN(TALLER, 2);
            else COLUMN(TALLER, 1);
#undef COLUMN
            j += wide;
        }
    }
}

/* ---------------------------------------------------------------------------------------------- activations ---- */

/* Written for one number; the compiler does a vector of them at a time. */

/* e^y = power · (1 + rest), a power of two and −0.3 < rest < 0.42; for |y| ≤ 87. With r = y − n ln 2, |r| ≤ ½ ln 2, rest is
 * the power series of e^r − 1 to the 7th. */
typedef struct { float power, rest; } Exponential;

static inline Exponential exponential(float y)
{
    const float big = 12582912.0f; /* 1.5 · 2²³: a sum with it has no room for a fraction */
    const float shifted = y * 1.44269504f + big, n = shifted - big;
    const float r = y - n * 0.693359375f + n * 2.12194440e-4f; /* ln 2 in two parts, the first one exact times n */
    const float rest = r * (1 + r * (1.0f / 2 + r * (1.0f / 6 + r * (1.0f / 24 + r * (1.0f / 120 + r * (1.0f / 720 +
                       r * (1.0f / 5040)))))));
    union { float f; unsigned i; } power = {shifted};
    power.i = (power.i - 0x4b400000u + 127u) << 23; /* big's own bits taken off, n is left: 2^n */
    return (Exponential){power.f, rest};
}

static inline float exp_(float y)
{
    const Exponential e = exponential(y);
    return e.power + e.power * e.rest;
}

/* tanh x = (e^{2x} − 1) / (e^{2x} + 1), with e^y − 1 = power · rest + (power − 1): near 0, power is 1 and nothing cancels.
 * Within 4 units in the last place. NaN passes. */
static inline float tanh_(float x)
{
    const float limit = 9.1f; /* 1 − tanh is below half a unit there */
    const float y = x < -limit ? -limit : x;
    const Exponential e = exponential(2 * (y > limit ? limit : y));
    const float less_one = e.power * e.rest + (e.power - 1);
    return less_one / (less_one + 2);
}

static void activate(int activation, float *h, long count)
{
    if (activation == TANH)
        for (long i = 0; i < count; i++) h[i] = tanh_(h[i]);
    else
        for (long i = 0; i < count; i++) h[i] = h[i] < 0 ? 0 : h[i];
}

/* t ← t σ′(z), from h = σ(z). */
static void times_slope(int activation, const float *restrict h, float *restrict t, long count)
{
    if (activation == TANH)
        for (long i = 0; i < count; i++) t[i] -= t[i] * h[i] * h[i];
    else
        for (long i = 0; i < count; i++) t[i] *= h[i] > 0 ? 1 : 0;
}

/* ------------------------------------------------------------------------------------------------- threads ---- */

/* Helpers of whoever calls, made when they are first wanted. One that has nothing to do stays awake for a moment, since
 * the next product follows within it, and then sleeps. A forked process has none of them, and makes its own. */

enum { AWAKE_NS = 300000 };

/* Part `part` of a task, by thread `rank`, which has a piece of the workspace for itself. */
typedef void (*Part)(const void *task, long part, int rank);

typedef struct {
    _Alignas(64) atomic_uint asked; /* rises with each task */
    atomic_uint done;               /* the last one that is */
    pthread_mutex_t lock;
    pthread_cond_t wake;
} Helper;

static struct {
    pthread_mutex_t taken; /* by one caller at a time */
    int count;             /* of helpers that run */
    Helper helpers[MOST_THREADS - 1];
    Part part;
    const void *task;
    long parts;
    _Alignas(64) atomic_long next;
} team;

static inline void pause_(void)
{
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static long long now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

/* Whoever is free takes the next part. */
static void take_parts(int rank)
{
    for (long i; (i = atomic_fetch_add(&team.next, 1)) < team.parts;) team.part(team.task, i, rank);
}

static void *help(void *number)
{
    const int rank = (int)(long)number;
    Helper *self = &team.helpers[rank - 1];
    for (unsigned seen = 0;; seen++) {
        for (const long long start = now_ns(); atomic_load(&self->asked) == seen && now_ns() - start < AWAKE_NS;) {
            for (int i = 0; i < 64 && atomic_load(&self->asked) == seen; i++) pause_();
            sched_yield(); /* where cores are few, to whoever has something to do */
        }
        if (atomic_load(&self->asked) == seen) {
            pthread_mutex_lock(&self->lock);
            while (atomic_load(&self->asked) == seen) pthread_cond_wait(&self->wake, &self->lock);
            pthread_mutex_unlock(&self->lock);
        }
        take_parts(rank);
        atomic_store(&self->done, seen + 1);
    }
    return NULL;
}

static void forget_helpers(void)
{
    memset(&team, 0, sizeof team);
    pthread_mutex_init(&team.taken, NULL);
}

static void found_team(void)
{
    forget_helpers();
    pthread_atfork(NULL, NULL, forget_helpers);
}

/* Helpers there are, of those wanted. Signals are for the threads of the program, but for those of a crash. */
static int helpers(int wanted)
{
    sigset_t every, before;
    pthread_attr_t detached;
    pthread_t thread;
    if (team.count >= wanted) return wanted;
    sigfillset(&every);
    sigdelset(&every, SIGSEGV);
    sigdelset(&every, SIGBUS);
    sigdelset(&every, SIGFPE);
    sigdelset(&every, SIGILL);
    pthread_sigmask(SIG_SETMASK, &every, &before);
    pthread_attr_init(&detached);
    pthread_attr_setdetachstate(&detached, PTHREAD_CREATE_DETACHED);
    for (; team.count < wanted; team.count++) {
        pthread_mutex_init(&team.helpers[team.count].lock, NULL);
        pthread_cond_init(&team.helpers[team.count].wake, NULL);
        if (pthread_create(&thread, &detached, help, (void *)(long)(team.count + 1))) break;
    }
    pthread_attr_destroy(&detached);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return team.count;
}

/* All parts of a task, by up to so many threads; by the caller alone while another one has the helpers. */
static void share(int threads, Part part, const void *task, long parts)
{
    static pthread_once_t founded = PTHREAD_ONCE_INIT;
    if (threads > MOST_THREADS) threads = MOST_THREADS;
    if (threads > parts) threads = (int)parts;
    if (threads > 1) pthread_once(&founded, found_team);
    if (threads <= 1 || pthread_mutex_trylock(&team.taken)) {
        for (long i = 0; i < parts; i++) part(task, i, 0);
        return;
    }
    const int asked = helpers(threads - 1);
    team.part = part;
    team.task = task;
    team.parts = parts;
    atomic_store(&team.next, 0);
    for (int i = 0; i < asked; i++) {
        Helper *helper = &team.helpers[i];
        pthread_mutex_lock(&helper->lock);
        atomic_fetch_add(&helper->asked, 1);
        pthread_cond_signal(&helper->wake);
        pthread_mutex_unlock(&helper->lock);
    }
    take_parts(0);
    for (int i = 0; i < asked; i++) {
        Helper *helper = &team.helpers[i];
        for (long spins = 0; atomic_load(&helper->done) != atomic_load(&helper->asked); spins++)
            spins < 200 ? pause_() : (void)sched_yield();
    }
    pthread_mutex_unlock(&team.taken);
}

/* ------------------------------------------------------------------------------------------------- networks ---- */

/* Where things lie in the caller's workspace, in floats. */
typedef struct {
    long n[MOST_LAYERS + 1];           /* widths */
    long weight[MOST_LAYERS];          /* W_l    [n_{l+1}, pad(n_l)], for δ W */
    long turned[MOST_LAYERS];          /* W_lᵀ   [n_l, pad(n_{l+1})], for h Wᵀ */
    long turned_tangent[MOST_LAYERS];  /* the same of a tangent or, before it is put in order, gradient */
    long bias[MOST_LAYERS], bias_tangent[MOST_LAYERS];
    long input[MOST_LAYERS];           /* h_l    [rows, pad(n_l)] */
    long delta[MOST_LAYERS];           /* δ_l    [up to GROUP, pad(n_{l+1})], the way back from u */
    long block[2];                     /* two    [up to BLOCK, pad(widest)] for each thread */
    long apart;                        /* from one thread's to the next one's */
    long total;
} Plan;

static inline long blocks(long rows) { return (rows + BLOCK - 1) / BLOCK; }

/* Rows that a workspace needs for so many that are not kept: a whole block for each thread, whoever takes the last one. */
static inline long passing(long rows) { return rows <= BLOCK ? rows : least(blocks(rows), MOST_THREADS) * BLOCK; }

static Plan plan(const long *widths, int layers, long rows)
{
    Plan p = {0};
    long at = 0, widest = 0;
    for (int l = 0; l <= layers; l++) {
        p.n[l] = widths[l];
        if (pad(widths[l]) > widest) widest = pad(widths[l]);
    }
#define PLACE(where, floats) (p.where = at, at += pad(floats))
    for (int l = 0; l < layers; l++) {
        const long in = pad(p.n[l]), out = pad(p.n[l + 1]);
        PLACE(weight[l], in * out);
        PLACE(turned[l], in * out);
        PLACE(turned_tangent[l], in * out);
        PLACE(bias[l], out);
        PLACE(bias_tangent[l], out);
        PLACE(input[l], rows * in);
        PLACE(delta[l], least(rows, GROUP) * out);
    }
    p.apart = 2 * least(rows, BLOCK) * widest;
    PLACE(block[0], least(MOST_THREADS, blocks(rows)) * p.apart);
    p.block[1] = p.block[0] + p.apart / 2;
#undef PLACE
    p.total = at;
    return p;
}

/* Rows of less than a vector go as a whole one, as long as what is read or written beyond them is of the same array,
 * and what comes after it there is written later. */
static void widen(const float *from, long rows, long cols, float *to)
{
    const long width = pad(cols);
    long i = 0;
    if (cols < LANES) {
        vec_int mask;
        for (int k = 0; k < LANES; k++) mask[k] = k < cols ? -1 : 0;
        for (; i * cols + LANES <= rows * cols; i++)
            store(to + i * width, (vec)((vec_int)load(from + i * cols) & mask));
    }
    for (; i < rows; i++) {
        memcpy(to + i * width, from + i * cols, sizeof(float) * (size_t)cols);
        memset(to + i * width + cols, 0, sizeof(float) * (size_t)(width - cols));
    }
}

static void narrow(const float *from, long rows, long cols, float *to)
{
    long i = 0;
    if (cols < LANES)
        for (; i * cols + LANES <= rows * cols; i++) store(to + i * cols, load(from + i * LANES));
    for (; i < rows; i++) memcpy(to + i * cols, from + i * pad(cols), sizeof(float) * (size_t)cols);
}

/* W [rows, cols] → Wᵀ [cols, pad(rows)] */
static void turn(const float *from, long rows, long cols, float *to)
{
    for (long j = 0; j < cols; j++) {
        for (long i = 0; i < rows; i++) to[j * pad(rows) + i] = from[i * cols + j];
        for (long i = rows; i < pad(rows); i++) to[j * pad(rows) + i] = 0;
    }
}

/* A layer, for a block of rows: c = bias + h Wᵀ, or without `bias` c = c + h Wᵀ. */
static void through(const Plan *p, int l, long rows, const float *h, const float *turned, const float *bias, float *c)
{
    const long out = pad(p->n[l + 1]);
    product(rows, out, p->n[l], h, pad(p->n[l]), 1, turned, out, bias ? bias : c, bias ? 0 : out, c, out);
}

/* Back to the layer before, for a block of rows: before = (δ W) σ′. */
static void back(const Plan *p, int l, int activation, long rows, const float *h, const float *delta, float *before,
                 const float *work)
{
    const long in = pad(p->n[l]);
    product(rows, in, p->n[l + 1], delta, pad(p->n[l + 1]), 1, work + p->weight[l], in, NULL, 0, before, in);
    times_slope(activation, h, before, rows * in);
}

/* sum [width] ← sum + Σ of the rows. */
static void add_rows(const float *from, long rows, long width, float *sum)
{
    for (long j = 0; j < width; j += LANES) {
        vec total = load(sum + j);
        for (long i = 0; i < rows; i++) total += load(from + i * width + j);
        store(sum + j, total);
    }
}

/* Of the functions here and their arguments: `trpo/native/library.py` has the same number. */
int mlp_version(void) { return 6; }

/* Whether this processor has the instructions that this file was compiled to. */
int mlp_runs_here(void)
{
#if defined(__AVX512F__)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
#elif defined(__AVX2__)
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#elif defined(__AVX__)
    return __builtin_cpu_supports("avx");
#elif defined(__ARM_FEATURE_SVE) && defined(__linux__)
    return (getauxval(AT_HWCAP) & HWCAP_SVE) != 0;
#else
    return 1;
#endif
}

/* Floats of a workspace for so many rows. */
long mlp_workspace(const long *widths, int layers, long rows) { return plan(widths, layers, rows).total; }
long mlp_padded(long width) { return pad(width); }
long mlp_passing(long rows) { return passing(rows); }

/* Weights and biases into the workspace: turned for the way forward, and with `keep` as they are for the way back. */
static void take_parameters(const Plan *p, int layers, const float *const *parameters, int keep, float *work)
{
    for (int l = 0; l < layers; l++) {
        turn(parameters[2 * l], p->n[l + 1], p->n[l], work + p->turned[l]);
        widen(parameters[2 * l + 1], 1, p->n[l + 1], work + p->bias[l]);
        if (keep) widen(parameters[2 * l], p->n[l + 1], p->n[l], work + p->weight[l]);
    }
}

/* What the functions below share among threads. Part i of it is a block of rows, but for `gradient_part`. */
typedef struct {
    const Plan *p;
    int layers, activation;
    long rows;
    const float *x;                            /* [rows, n_0] */
    const int64_t *order;                      /* or of more rows than that, those numbers [rows] */
    const void *raw;                           /* or before it is normalised: clip((raw − shift) · scale, ±clip) */
    int wide;                                  /* raw is of doubles */
    const double *shift, *scale;
    double clip;
    const float *u;                            /* [rows, n_L] */
    float *out;                                /* [rows, n_L] */
    float *work;
    int keep;                                  /* all rows, or those of the block that a thread is at */
    long row, stop;                            /* of the rows that are at hand in δ */
    int strips;                                /* of each layer's gradient */
} Task;

/* All layers for a block of rows. */
static void forward_part(const void *task, long part, int rank)
{
    const Task *t = task;
    const Plan *p = t->p;
    const long row = part * BLOCK, count = least(BLOCK, t->rows - row), at = t->keep ? row : rank * BLOCK;
    const long in = pad(p->n[0]);
    float *input = t->work + p->input[0] + at * in, *z = t->work + p->block[0] + rank * p->apart;
    if (t->raw)
        for (long i = 0; i < count; i++)
            for (long j = 0; j < p->n[0]; j++) {
                const long k = (row + i) * p->n[0] + j;
                const double x = t->wide ? ((const double *)t->raw)[k] : ((const float *)t->raw)[k];
                const double y = (x - t->shift[j]) * t->scale[j]; /* NaN passes, here and on */
                input[i * in + j] = (float)(y < -t->clip ? -t->clip : y > t->clip ? t->clip : y);
            }
    else if (t->order)
        for (long i = 0; i < count; i++) widen(t->x + t->order[row + i] * p->n[0], 1, p->n[0], input + i * in);
    else
        widen(t->x + row * p->n[0], count, p->n[0], input);
    for (int l = 0; l < t->layers; l++) {
        const long width = pad(p->n[l + 1]);
        const float *h = t->work + p->input[l] + at * pad(p->n[l]);
        float *next = l < t->layers - 1 ? t->work + p->input[l + 1] + at * width : z;
        through(p, l, count, h, t->work + p->turned[l], t->work + p->bias[l], next);
        if (l < t->layers - 1) activate(t->activation, next, count * width);
    }
    narrow(z, count, p->n[t->layers], t->out + row * p->n[t->layers]);
}

/* `mlp_forward` of x, or of those of its rows that `order` [rows] names. */
static void forward(const long *widths, int layers, int activation, const float *const *parameters, const float *x,
                    const int64_t *order, long rows, int keep, float *out, float *work, int threads)
{
    const Plan p = plan(widths, layers, keep ? rows : passing(rows));
    const Task task = {&p, layers, activation, rows, .x = x, .order = order, .out = out, .work = work, .keep = keep};
    take_parameters(&p, layers, parameters, keep, work);
    share(threads, forward_part, &task, blocks(rows));
}

/* f(θ) [rows, n_L] of x [rows, n_0]. With `keep`, what the products below need stays in the workspace of `rows` rows;
 * without, one of `mlp_passing` rows is enough. */
void mlp_forward(const long *widths, int layers, int activation, const float *const *parameters, const float *x,
                 long rows, int keep, float *out, float *work, int threads)
{
    forward(widths, layers, activation, parameters, x, NULL, rows, keep, out, work, threads);
}

/* A network that stays as it is for a while: its parameters into a workspace for any number of passing rows, for
 * `policy_act`. */
void mlp_freeze(const long *widths, int layers, const float *const *parameters, float *work)
{
    const Plan p = plan(widths, layers, MOST_THREADS * BLOCK);
    take_parameters(&p, layers, parameters, 0, work);
}

static void jvp_part(const void *task, long part, int rank)
{
    const Task *t = task;
    const Plan *p = t->p;
    const long row = part * BLOCK, count = least(BLOCK, t->rows - row);
    float *tangent = t->work + p->block[0] + rank * p->apart, *next = t->work + p->block[1] + rank * p->apart;
    for (int l = 0; l < t->layers; l++) {
        const float *h = t->work + p->input[l] + row * pad(p->n[l]);
        const long width = pad(p->n[l + 1]);
        through(p, l, count, h, t->work + p->turned_tangent[l], t->work + p->bias_tangent[l], next);
        if (l) through(p, l, count, tangent, t->work + p->turned[l], NULL, next);
        if (l < t->layers - 1)
            times_slope(t->activation, t->work + p->input[l + 1] + row * width, next, count * width);
        float *done = next;
        next = tangent;
        tangent = done;
    }
    narrow(tangent, count, p->n[t->layers], t->out + row * p->n[t->layers]);
}

/* Jv [rows, n_L] of a tangent v of the parameters: dz = h dWᵀ + dh Wᵀ + db. */
void mlp_jvp(const long *widths, int layers, int activation, const float *v, long rows, float *out, float *work,
             int threads)
{
    const Plan p = plan(widths, layers, rows);
    const Task task = {&p, layers, activation, rows, .out = out, .work = work};
    for (int l = 0; l < layers; l++) {
        turn(v, p.n[l + 1], p.n[l], work + p.turned_tangent[l]);
        v += p.n[l + 1] * p.n[l];
        widen(v, 1, p.n[l + 1], work + p.bias_tangent[l]);
        v += p.n[l + 1];
    }
    share(threads, jvp_part, &task, blocks(rows));
}

/* δ of all layers, for a block of the rows at hand. */
static void back_part(const void *task, long part, int rank)
{
    const Task *t = task;
    const Plan *p = t->p;
    const long at = part * BLOCK, row = t->row + at, count = least(BLOCK, t->stop - row), last = t->layers - 1;
    (void)rank;
    widen(t->u + row * p->n[last + 1], count, p->n[last + 1], t->work + p->delta[last] + at * pad(p->n[last + 1]));
    for (int l = (int)last; l; l--) {
        const long in = pad(p->n[l]);
        back(p, l, t->activation, count, t->work + p->input[l] + row * in,
             t->work + p->delta[l] + at * pad(p->n[l + 1]), t->work + p->delta[l - 1] + at * in, t->work);
    }
}

/* Whether the gradient of a layer is summed as Σ hᵀδ = (Σ δᵀh)ᵀ, of which less lies in the padding: so of few inputs. */
static inline int gradient_turned(const Plan *p, int l)
{
    return p->n[l] * pad(p->n[l + 1]) < p->n[l + 1] * pad(p->n[l]);
}

/* Some rows of the gradient of one layer's weights, or of its transpose, and with the first of them its biases': block by
 * block of the rows at hand, for which it makes no difference to a number how many parts there are. */
static void gradient_part(const void *task, long part, int rank)
{
    const Task *t = task;
    const Plan *p = t->p;
    const int l = t->layers - 1 - (int)(part / t->strips);
    const long strip = part % t->strips, in = pad(p->n[l]), width = pad(p->n[l + 1]);
    const int turned = gradient_turned(p, l);
    const long high = turned ? p->n[l] : p->n[l + 1], wide = turned ? width : in;
    const long from = strip * high / t->strips, to = (strip + 1) * high / t->strips;
    float *weight = t->work + p->turned_tangent[l] + from * wide;
    (void)rank;
    for (long row = t->row; row < t->stop; row += BLOCK) {
        const long count = least(BLOCK, t->stop - row);
        const float *delta = t->work + p->delta[l] + (row - t->row) * width, *h = t->work + p->input[l] + row * in;
        if (turned) product(to - from, wide, count, h + from, 1, in, delta, width, weight, wide, weight, wide);
        else product(to - from, wide, count, delta + from, 1, width, h, in, weight, wide, weight, wide);
        if (!strip) add_rows(delta, count, width, t->work + p->bias_tangent[l]);
    }
}

/* Jᵀu, summed over rows, of u [rows, n_L]: dW = Σ δᵀh or (Σ hᵀδ)ᵀ, db = Σ δ, δ ← (δ W) σ′. */
void mlp_vjp(const long *widths, int layers, int activation, const float *u, long rows, float *out, float *work,
             int threads)
{
    const Plan p = plan(widths, layers, rows);
    Task task = {&p, layers, activation, rows, .u = u, .work = work, .strips = threads};
    for (int l = 0; l < layers; l++) {
        memset(work + p.turned_tangent[l], 0, sizeof(float) * (size_t)(pad(p.n[l]) * pad(p.n[l + 1])));
        memset(work + p.bias_tangent[l], 0, sizeof(float) * (size_t)pad(p.n[l + 1]));
    }
    for (; task.row < rows; task.row = task.stop) {
        task.stop = least(rows, task.row + (threads > 1 ? GROUP : BLOCK));
        share(threads, back_part, &task, blocks(task.stop - task.row));
        share(threads, gradient_part, &task, (long)layers * task.strips);
    }
    for (int l = 0; l < layers; l++) {
        const float *weight = work + p.turned_tangent[l];
        if (gradient_turned(&p, l))
            for (long i = 0; i < p.n[l + 1]; i++)
                for (long j = 0; j < p.n[l]; j++) out[i * p.n[l] + j] = weight[j * pad(p.n[l + 1]) + i];
        else narrow(weight, p.n[l + 1], p.n[l], out);
        out += p.n[l + 1] * p.n[l];
        narrow(work + p.bias_tangent[l], 1, p.n[l + 1], out);
        out += p.n[l + 1];
    }
}

/* sum [n, ·] += Σ xxᵀ over rows of x [rows, width], in strips that begin at the diagonal: `mirror` makes what is left. */
static void add_squares(long n, long rows, const float *x, long width, float *sum, long sum_row)
{
    for (long i = 0; i < n; i += STRIP) {
        float *corner = sum + i * sum_row + i;
        product(least(STRIP, n - i), width - i, rows, x + i, 1, width, x + i, width, corner, sum_row, corner, sum_row);
    }
}

static void mirror(long n, float *sum, long sum_row)
{
    for (long i = 0; i < n; i++)
        for (long j = 0; j < i; j++) sum[i * sum_row + j] = sum[j * sum_row + i];
}

/* Of every layer, first to last, Σ h̃h̃ᵀ [n_l + 1, pad(n_l + 1)] with h̃ = (h, 1), then Σ δδᵀ [n_{l+1}, pad(n_{l+1})],
 * summed over rows, δ the way of u [rows, n_L] back through the layers; all one after the other in `out`. */
void mlp_factors(const long *widths, int layers, int activation, const float *u, long rows, float *out, float *work)
{
    const Plan p = plan(widths, layers, rows);
    Task task = {&p, layers, activation, rows, .u = u, .work = work};
    float *inputs[MOST_LAYERS], *outputs[MOST_LAYERS];
    for (int l = 0; l < layers; l++) {
        inputs[l] = out;
        outputs[l] = inputs[l] + (p.n[l] + 1) * pad(p.n[l] + 1);
        out = outputs[l] + p.n[l + 1] * pad(p.n[l + 1]);
        memset(inputs[l], 0, sizeof(float) * (size_t)(out - inputs[l]));
    }
    for (long row = 0; row < rows; row += BLOCK) {
        const long count = least(BLOCK, rows - row);
        task.row = row;
        task.stop = row + count;
        back_part(&task, 0, 0);
        for (int l = layers - 1; l >= 0; l--) {
            const long n = p.n[l], in = pad(n), wide = pad(n + 1), width = pad(p.n[l + 1]);
            const float *h = work + p.input[l] + row * in, *delta = work + p.delta[l];
            add_squares(n, count, h, in, inputs[l], wide);
            add_rows(h, count, in, inputs[l] + n * wide);
            add_squares(p.n[l + 1], count, delta, width, outputs[l], width);
        }
    }
    for (int l = 0; l < layers; l++) {
        const long n = p.n[l], wide = pad(n + 1);
        for (long i = 0; i < n; i++) inputs[l][i * wide + n] = inputs[l][n * wide + i];
        mirror(n, inputs[l], wide);
        inputs[l][n * wide + n] = (float)rows;
        mirror(p.n[l + 1], outputs[l], pad(p.n[l + 1]));
    }
}

/* θ ← θ − rate · m / (√s + ε), m and s the decaying means of the gradient and of its square. */
void adam_step(long count, float *restrict theta, const float *restrict gradient, float *restrict mean,
               float *restrict square, float beta1, float beta2, float epsilon, float rate)
{
    for (long i = 0; i < count; i++) {
        mean[i] += (1 - beta1) * (gradient[i] - mean[i]);
        square[i] = beta2 * square[i] + (1 - beta2) * gradient[i] * gradient[i];
        theta[i] -= rate * mean[i] / (sqrtf(square[i]) + epsilon);
    }
}

/* Adam on the mean over rows of |f(x) − y|², a step for each minibatch of so many rows: those of x and y that `order`
 * names, one minibatch after the other. `work`: a workspace for the largest minibatch, then room for its outputs and for
 * one gradient. */
void mlp_adam(const long *widths, int layers, int activation, float *theta, float *mean, float *square, const float *x,
              const float *y, const int64_t *order, int minibatches, const long *rows, const float *epsilon,
              const float *rate, float beta1, float beta2, float *work)
{
    const float *parameters[2 * MOST_LAYERS];
    const long outputs = widths[layers];
    long size = 0, most = 0;
    for (int l = 0; l < layers; l++) {
        parameters[2 * l] = theta + size;
        size += widths[l] * widths[l + 1];
        parameters[2 * l + 1] = theta + size;
        size += widths[l + 1];
    }
    for (int i = 0; i < minibatches; i++)
        if (rows[i] > most) most = rows[i];
    float *error = work + plan(widths, layers, most).total, *gradient = error + pad(most * outputs);
    for (int i = 0; i < minibatches; i++) {
        const float scale = 2.0f / (float)rows[i];
        forward(widths, layers, activation, parameters, x, order, rows[i], 1, error, work, 1);
        for (long j = 0; j < rows[i]; j++)
            for (long k = 0; k < outputs; k++)
                error[j * outputs + k] = (error[j * outputs + k] - y[order[j] * outputs + k]) * scale;
        mlp_vjp(widths, layers, activation, error, rows[i], gradient, work, 1);
        adam_step(size, theta, gradient, mean, square, beta1, beta2, epsilon[i], rate[i]);
        order += rows[i];
    }
}

/* --------------------------------------------------------------------------------------- sums over time ---- */

#if defined(__FMA__) || defined(__aarch64__)
#define FUSED(fma, a, b, c) fma(a, b, c)
#else
#define FUSED(fma, a, b, c) ((a) * (b) + (c)) /* by a library it would take a hundred times as long */
#endif

/* x_{t+1} ← x_{t+1} + c_t x_t, x [steps, count] and c [steps − 1, count]; in `reverse` x_t ← x_t + c_t x_{t+1}. */
#define CARRIED_SUMS(name, number, fma)                                                                              \
    void name(long steps, long count, number *x, const number *carry, int reverse)                                   \
    {                                                                                                                \
        for (long s = 0; s < steps - 1; s++) {                                                                       \
            const long t = reverse ? steps - 2 - s : s;                                                              \
            const number *c = carry + t * count, *from = x + (reverse ? t + 1 : t) * count;                          \
            number *to = x + (reverse ? t : t + 1) * count;                                                          \
            for (long i = 0; i < count; i++) to[i] = FUSED(fma, c[i], from[i], to[i]);                               \
        }                                                                                                            \
    }
CARRIED_SUMS(carried_sums_float, float, __builtin_fmaf)
CARRIED_SUMS(carried_sums_double, double, __builtin_fma)

/* --------------------------------------------------------------------------------------- ordinal policies ---- */

/* Each of `components` of each row has n values in order, log p_i = i η_0 + Σ_{1 ≤ j ≤ i} η_j + const. η, and what is
 * dual to it, comes as [count, n], what belongs to values as [n, count], of all rows' components one after the other;
 * `work` holds n vectors for each thread. */

enum { COMPONENTS = 32 * LANES }; /* in a part of a task */

typedef struct Components {
    /* What is done, of up to LANES components from `from` on, with n vectors of work. */
    void (*vector)(const struct Components *c, long from, int lanes, float *work);
    long count, n, components;
    const float *eta, *p, *noise, *low, *width;
    float *out, *work;
} Components;

static void components_part(const void *task, long part, int rank)
{
    const Components *c = task;
    const long stop = least(c->count, (part + 1) * COMPONENTS);
    for (long from = part * COMPONENTS; from < stop; from += LANES)
        c->vector(c, from, (int)least(LANES, stop - from), c->work + rank * c->n * LANES);
}

static void share_components(int threads, const Components *c)
{
    share(threads, components_part, c, (c->count + COMPONENTS - 1) / COMPONENTS);
}

/* Loops over all lanes, which are mostly full, are to have a constant length. */
#define VECTOR(name)                                                                                                 \
    static void name##_vector(const Components *c, long from, int lanes, float *work)                                \
    {                                                                                                                \
        if (lanes == LANES) name##_of(c, from, LANES, work);                                                         \
        else name##_of(c, from, lanes, work);                                                                        \
    }

/* Of up to LANES components, from `from` on: logit i of η − logit 0, value by value in `work`. Returns the largest, or NaN
 * if one is not finite: comparisons alone would take such a policy for a certain one. */
INLINE vec logits(long from, int lanes, long n, const float *eta, float *work)
{
    float tilt[LANES] = {0}, logit[LANES] = {0}, top[LANES] = {0};
    for (int k = 0; k < lanes; k++) tilt[k] = eta[(from + k) * n];
    store(work, all(0));
    for (long i = 1; i < n; i++) {
        for (int k = 0; k < lanes; k++) logit[k] += eta[(from + k) * n + i] + tilt[k];
        for (int k = 0; k < LANES; k++) top[k] = logit[k] > top[k] ? logit[k] : top[k];
        store(work + i * LANES, load(logit));
    }
    return load(top) + 0 * load(logit);
}

/* x, with exp(x − top) in its place; what is below e^-87 is that. Returns the sum. */
static vec exponentials(long n, vec top, float *x)
{
    vec total = all(0);
    for (long i = 0; i < n; i++) {
        float y[LANES];
        store(y, load(x + i * LANES) - top);
        for (int k = 0; k < LANES; k++) y[k] = exp_(y[k] < -87 ? -87 : y[k]);
        store(x + i * LANES, load(y));
        total += load(y);
    }
    return total;
}

INLINE void log_probabilities_of(const Components *c, long from, int lanes, float *work)
{
    const vec top = logits(from, lanes, c->n, c->eta, work);
    float high[LANES], total[LANES];
    store(high, top);
    for (long i = 0; i < c->n; i++)
        for (int k = 0; k < lanes; k++) c->out[i * c->count + from + k] = work[i * LANES + k] - high[k];
    store(total, exponentials(c->n, top, work));
    for (int k = 0; k < lanes; k++) total[k] = logf(total[k]);
    for (long i = 0; i < c->n; i++)
        for (int k = 0; k < lanes; k++) c->out[i * c->count + from + k] -= total[k];
}

VECTOR(log_probabilities)

/* log p [n, count] of η. */
void ordinal_log_probabilities(long rows, long components, long n, const float *eta, float *out, float *work,
                               int threads)
{
    const Components task = {log_probabilities_vector, rows * components, n, components, .eta = eta, .out = out,
                             .work = work};
    share_components(threads, &task);
}

INLINE void metric_of(const Components *c, long from, int lanes, float *work)
{
    float here[LANES] = {0};
    vec mean = all(0), above = all(0), tilt = all(0);
    logits(from, lanes, c->n, c->eta, work);
    for (long i = 0; i < c->n; i++) {
        for (int k = 0; k < lanes; k++) here[k] = c->p[i * c->count + from + k];
        mean = fused(load(here), load(work + i * LANES), mean);
    }
    for (long i = c->n - 1; i > 0; i--) {
        for (int k = 0; k < lanes; k++) here[k] = c->p[i * c->count + from + k];
        above = fused(load(here), load(work + i * LANES) - mean, above);
        tilt += above;
        store(here, above);
        for (int k = 0; k < lanes; k++) c->out[(from + k) * c->n + i] = here[k];
    }
    store(here, tilt);
    for (int k = 0; k < lanes; k++) c->out[(from + k) * c->n] = here[k];
}

VECTOR(metric)

/* C w [count, n] of w_i = p_i (v_i − Σ p v), v = Cᵀ u: the product of u with the Fisher metric in η, p [n, count]. */
void ordinal_metric(long rows, long components, long n, const float *p, const float *u, float *out, float *work,
                    int threads)
{
    const Components task = {metric_vector, rows * components, n, components, .eta = u, .p = p, .out = out,
                             .work = work};
    share_components(threads, &task);
}

INLINE void sample_of(const Components *c, long from, int lanes, float *work)
{
    const vec total = exponentials(c->n, logits(from, lanes, c->n, c->eta, work), work);
    float bound[LANES] = {0}, found[LANES] = {0}, below[LANES] = {0};
    store(bound, total);
    for (int k = 0; k < LANES; k++) bound[k] *= k < lanes ? 0.5f * erfcf(c->noise[from + k] * -0.70710678f) : 0;
    for (long i = 0; i < c->n - 1; i++)
        for (int k = 0; k < LANES; k++) {
            below[k] += work[i * LANES + k];
            found[k] += below[k] < bound[k] ? 1 : 0;
        }
    for (int k = 0; k < lanes; k++) {
        const long a = (from + k) % c->components;
        c->out[from + k] = c->low[a] + c->width[a] * (found[k] + 0 * bound[k]);
    }
}

VECTOR(sample)

/* One of the values of each component, low + width · i: so many i as have a cumulated probability below Φ(noise). low
 * and width are the same for every row. */
void ordinal_sample(long rows, long components, long n, const float *eta, const float *noise, const float *low,
                    const float *width, float *out, float *work, int threads)
{
    const Components task = {sample_vector, rows * components, n, components, .eta = eta, .noise = noise, .low = low,
                             .width = width, .out = out, .work = work};
    share_components(threads, &task);
}

/* ------------------------------------------------------------------------------------------------ rollouts ---- */

enum { OUTPUTS = 0, NORMAL = 1, ORDINAL = 2 };

/* A policy whose parameters `mlp_freeze` took, in a rollout of any number of steps. All numbers are eight bytes, so that
 * this lies in memory as `trpo/native/mlp.py` has it. */
typedef struct {
    const long *widths;
    long layers, activation, wide, rows;
    const void *obs;                      /* [steps, rows, n_0] as the environments gave them, doubles if `wide` */
    const double *shift, *scale;          /* [n_0] */
    double clip;
    float *out;                           /* [rows, n_L] of the last step */
    float *work;
    long kind;                            /* OUTPUTS: that is all */
    long components;                      /* of an action */
    const float *noise;                   /* [steps, rows, components] */
    float *action;                        /* the same */
    const float *std;                     /* NORMAL: action = out + std · noise, [components] */
    long bins;                            /* ORDINAL: `ordinal_sample` */
    const float *low, *width;
    float *vectors;
} Policy;

/* Step t of the rollout. */
void policy_act(const Policy *a, long t, int threads)
{
    const Plan p = plan(a->widths, (int)a->layers, MOST_THREADS * BLOCK);
    const long obs = a->rows * p.n[0], actions = a->rows * a->components;
    const Task task = {&p, (int)a->layers, (int)a->activation, a->rows, .wide = (int)a->wide, .shift = a->shift,
                       .raw = a->wide ? (const void *)((const double *)a->obs + t * obs)
                                      : (const void *)((const float *)a->obs + t * obs),
                       .scale = a->scale, .clip = a->clip, .out = a->out, .work = a->work};
    const float *noise = a->noise + t * actions;
    float *action = a->action + t * actions;
    share(threads, forward_part, &task, blocks(a->rows));
    if (a->kind == ORDINAL)
        ordinal_sample(a->rows, a->components, a->bins, a->out, noise, a->low, a->width, action, a->vectors, threads);
    if (a->kind == NORMAL)
        for (long i = 0; i < actions; i++) action[i] = a->out[i] + a->std[i % a->components] * noise[i];
}
