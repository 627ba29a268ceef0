/* A multilayer perceptron, products with its Jacobian, and its fit by Adam; float32, one thread.
 *
 * The formulas are those of `trpo/networks.py`, which is also what the tests compare this file with. It is here because
 * at TRPO's sizes (thousands of rows, layers of 64) a BLAS library spends most of its time around the arithmetic. Three
 * things are different: all layers of a block of rows are done before the next block, so that what passes between
 * layers stays in the first two levels of cache; bias and sums of two products start in the registers of the product;
 * and nothing is allocated.
 *
 * Conventions. Row-major. Widths are padded with zeros to whole vectors, `pad(n)`, in everything that is not the
 * caller's. Parameters come as W_0, b_0, W_1, b_1, …, W_l [n_{l+1}, n_l]; gradients and tangents as one vector in that
 * order. Layer l maps h_l to z_{l+1} = h_l W_lᵀ + b_l, and h_{l+1} = σ(z_{l+1}) but for the last one.
 */

#include <math.h>
#include <string.h>

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

enum { BLOCK = 128, STRIP = 16, MOST_LAYERS = 16 };
enum { TANH = 0, RELU = 1 };

typedef float vec __attribute__((vector_size(LANES * sizeof(float))));
typedef int vec_int __attribute__((vector_size(LANES * sizeof(int))));
typedef float vec_unaligned __attribute__((vector_size(LANES * sizeof(float)), aligned(4)));

static inline vec load(const float *p) { return *(const vec_unaligned *)p; }
static inline void store(float *p, vec x) { *(vec_unaligned *)p = x; }
static inline vec all(float x) { return x - (vec){0}; } /* minus: plus would make 0 of −0, for which compilers add */
static inline long pad(long n) { return (n + LANES - 1) / LANES * LANES; }
static inline long least(long a, long b) { return a < b ? a : b; }

/* ------------------------------------------------------------------------------------------------ products ---- */

/* C [rows, vecs · LANES] = init + Σ_k a(·, k) b(k, ·), all of C in registers; rows and vecs are compile-time constants.
 * a(i, k) = a[i · a_row + k · a_col], so that A may be a transpose. init_row = 0 adds one row (a bias) to all; without
 * `init` sums start at 0. */
static inline __attribute__((always_inline)) void tile(
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
            for (int j = 0; j < vecs; j++) sum[i][j] += left * right[j];
        }
    }
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < vecs; j++) store(c + i * c_row + j * LANES, sum[i][j]);
}

/* A column of C, `vecs` wide, from the top to the bottom. */
static inline __attribute__((always_inline)) void column(
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
    union { float f; int i; } power = {shifted};
    power.i = (power.i - 0x4b400000 + 127) << 23; /* big's own bits taken off, n is left: 2^n */
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

/* ------------------------------------------------------------------------------------------------- networks ---- */

/* Where things lie in the caller's workspace, in floats. */
typedef struct {
    long n[MOST_LAYERS + 1];           /* widths */
    long weight[MOST_LAYERS];          /* W_l    [n_{l+1}, pad(n_l)], for δ W */
    long turned[MOST_LAYERS];          /* W_lᵀ   [n_l, pad(n_{l+1})], for h Wᵀ */
    long turned_tangent[MOST_LAYERS];  /* the same of a tangent or, before it is put in order, gradient Σ δᵀh */
    long bias[MOST_LAYERS], bias_tangent[MOST_LAYERS];
    long input[MOST_LAYERS];           /* h_l    [rows, pad(n_l)] */
    long block[2];                     /* two    [up to BLOCK, pad(widest)] */
    long total;
} Plan;

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
    }
    for (int i = 0; i < 2; i++) PLACE(block[i], least(rows, BLOCK) * widest);
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

/* Back to the layer before, for a block of rows: next = (δ W) σ′, and the two change places. */
static void back(const Plan *p, int l, int activation, long rows, const float *h, float **delta, float **next,
                 const float *work)
{
    const long in = pad(p->n[l]);
    product(rows, in, p->n[l + 1], *delta, pad(p->n[l + 1]), 1, work + p->weight[l], in, NULL, 0, *next, in);
    times_slope(activation, h, *next, rows * in);
    float *done = *next;
    *next = *delta;
    *delta = done;
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

/* Of the functions here and their arguments: `trpo/native/__init__.py` has the same number. */
int mlp_version(void) { return 3; }

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

/* Weights and biases into the workspace: turned for the way forward, and with `keep` as they are for the way back. */
static void take_parameters(const Plan *p, int layers, const float *const *parameters, int keep, float *work)
{
    for (int l = 0; l < layers; l++) {
        turn(parameters[2 * l], p->n[l + 1], p->n[l], work + p->turned[l]);
        widen(parameters[2 * l + 1], 1, p->n[l + 1], work + p->bias[l]);
        if (keep) widen(parameters[2 * l], p->n[l + 1], p->n[l], work + p->weight[l]);
    }
}

/* All layers for a block of `count` rows, the workspace's from `at` on, whose inputs are there. */
static void forward_block(const Plan *p, int layers, int activation, long at, long count, float *out, float *work)
{
    for (int l = 0; l < layers; l++) {
        const int last = l == layers - 1;
        const long width = pad(p->n[l + 1]);
        float *z = last ? work + p->block[0] : work + p->input[l + 1] + at * width;
        const float *h = work + p->input[l] + at * pad(p->n[l]);
        through(p, l, count, h, work + p->turned[l], work + p->bias[l], z);
        if (!last) activate(activation, z, count * width);
    }
    narrow(work + p->block[0], count, p->n[layers], out);
}

/* f(θ) [rows, n_L] of x [rows, n_0]. With `keep`, what the products below need stays in the workspace of `rows` rows;
 * without, one of BLOCK rows, or of as many as there are, is enough. */
void mlp_forward(const long *widths, int layers, int activation, const float *const *parameters, const float *x,
                 long rows, int keep, float *out, float *work)
{
    const Plan p = plan(widths, layers, keep ? rows : least(rows, BLOCK));
    take_parameters(&p, layers, parameters, keep, work);
    for (long row = 0; row < rows; row += BLOCK) {
        const long count = least(BLOCK, rows - row), at = keep ? row : 0;
        widen(x + row * p.n[0], count, p.n[0], work + p.input[0] + at * pad(p.n[0]));
        forward_block(&p, layers, activation, at, count, out + row * p.n[layers], work);
    }
}

/* A network that stays as it is for a while: its parameters into a workspace of BLOCK rows, for `mlp_act`. */
void mlp_freeze(const long *widths, int layers, const float *const *parameters, float *work)
{
    const Plan p = plan(widths, layers, BLOCK);
    take_parameters(&p, layers, parameters, 0, work);
}

/* f [rows, n_L] of clip((x − shift) · scale, ±clip), x [rows, n_0], by the parameters that `mlp_freeze` took. */
void mlp_act(const long *widths, int layers, int activation, const double *x, const double *shift, const double *scale,
             double clip, long rows, float *out, float *work)
{
    const Plan p = plan(widths, layers, BLOCK);
    const long in = pad(p.n[0]);
    for (long row = 0; row < rows; row += BLOCK) {
        const long count = least(BLOCK, rows - row);
        float *input = work + p.input[0];
        for (long i = 0; i < count; i++) {
            for (long j = 0; j < p.n[0]; j++) {
                const double z = (*x++ - shift[j]) * scale[j]; /* NaN passes, here and on */
                input[i * in + j] = (float)(z < -clip ? -clip : z > clip ? clip : z);
            }
        }
        forward_block(&p, layers, activation, 0, count, out + row * p.n[layers], work);
    }
}

/* Jv [rows, n_L] of a tangent v of the parameters: dz = h dWᵀ + dh Wᵀ + db. */
void mlp_jvp(const long *widths, int layers, int activation, const float *v, long rows, float *out, float *work)
{
    const Plan p = plan(widths, layers, rows);
    for (int l = 0; l < layers; l++) {
        turn(v, p.n[l + 1], p.n[l], work + p.turned_tangent[l]);
        v += p.n[l + 1] * p.n[l];
        widen(v, 1, p.n[l + 1], work + p.bias_tangent[l]);
        v += p.n[l + 1];
    }
    for (long row = 0; row < rows; row += BLOCK) {
        const long count = least(BLOCK, rows - row);
        float *tangent = work + p.block[0], *next = work + p.block[1];
        for (int l = 0; l < layers; l++) {
            const float *h = work + p.input[l] + row * pad(p.n[l]);
            const long width = pad(p.n[l + 1]);
            through(&p, l, count, h, work + p.turned_tangent[l], work + p.bias_tangent[l], next);
            if (l) through(&p, l, count, tangent, work + p.turned[l], NULL, next);
            if (l < layers - 1) times_slope(activation, work + p.input[l + 1] + row * width, next, count * width);
            float *done = next;
            next = tangent;
            tangent = done;
        }
        narrow(tangent, count, p.n[layers], out + row * p.n[layers]);
    }
}

/* Jᵀu, summed over rows, of u [rows, n_L]: dW = Σ δᵀh, db = Σ δ, δ ← (δ W) σ′. */
void mlp_vjp(const long *widths, int layers, int activation, const float *u, long rows, float *out, float *work)
{
    const Plan p = plan(widths, layers, rows);
    for (int l = 0; l < layers; l++) {
        memset(work + p.turned_tangent[l], 0, sizeof(float) * (size_t)(p.n[l + 1] * pad(p.n[l])));
        memset(work + p.bias_tangent[l], 0, sizeof(float) * (size_t)pad(p.n[l + 1]));
    }
    for (long row = 0; row < rows; row += BLOCK) {
        const long count = least(BLOCK, rows - row);
        float *delta = work + p.block[0], *next = work + p.block[1];
        widen(u + row * p.n[layers], count, p.n[layers], delta);
        for (int l = layers - 1; l >= 0; l--) {
            const long in = pad(p.n[l]), width = pad(p.n[l + 1]);
            const float *h = work + p.input[l] + row * in;
            float *weight = work + p.turned_tangent[l];
            product(p.n[l + 1], in, count, delta, 1, width, h, in, weight, in, weight, in);
            add_rows(delta, count, width, work + p.bias_tangent[l]);
            if (l) back(&p, l, activation, count, h, &delta, &next, work);
        }
    }
    for (int l = 0; l < layers; l++) {
        narrow(work + p.turned_tangent[l], p.n[l + 1], p.n[l], out);
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
    float *inputs[MOST_LAYERS], *outputs[MOST_LAYERS];
    for (int l = 0; l < layers; l++) {
        inputs[l] = out;
        outputs[l] = inputs[l] + (p.n[l] + 1) * pad(p.n[l] + 1);
        out = outputs[l] + p.n[l + 1] * pad(p.n[l + 1]);
        memset(inputs[l], 0, sizeof(float) * (size_t)(out - inputs[l]));
    }
    for (long row = 0; row < rows; row += BLOCK) {
        const long count = least(BLOCK, rows - row);
        float *delta = work + p.block[0], *next = work + p.block[1];
        widen(u + row * p.n[layers], count, p.n[layers], delta);
        for (int l = layers - 1; l >= 0; l--) {
            const long n = p.n[l], in = pad(n), wide = pad(n + 1), width = pad(p.n[l + 1]);
            const float *h = work + p.input[l] + row * in;
            add_squares(n, count, h, in, inputs[l], wide);
            add_rows(h, count, in, inputs[l] + n * wide);
            add_squares(p.n[l + 1], count, delta, width, outputs[l], width);
            if (l) back(&p, l, activation, count, h, &delta, &next, work);
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

/* Adam on the mean over rows of |f(x) − y|², a step for each minibatch of so many rows, one after the other in x and y.
 * `work`: a workspace for the largest minibatch, then room for its outputs and for one gradient. */
void mlp_adam(const long *widths, int layers, int activation, float *theta, float *mean, float *square, const float *x,
              const float *y, int minibatches, const long *rows, const float *epsilon, const float *rate, float beta1,
              float beta2, float *work)
{
    const float *parameters[2 * MOST_LAYERS];
    long size = 0, most = 0;
    for (int l = 0; l < layers; l++) {
        parameters[2 * l] = theta + size;
        size += widths[l] * widths[l + 1];
        parameters[2 * l + 1] = theta + size;
        size += widths[l + 1];
    }
    for (int i = 0; i < minibatches; i++)
        if (rows[i] > most) most = rows[i];
    float *error = work + plan(widths, layers, most).total, *gradient = error + pad(most * widths[layers]);
    for (int i = 0; i < minibatches; i++) {
        const long outputs = rows[i] * widths[layers];
        const float scale = 2.0f / (float)rows[i];
        mlp_forward(widths, layers, activation, parameters, x, rows[i], 1, error, work);
        for (long j = 0; j < outputs; j++) error[j] = (error[j] - y[j]) * scale;
        mlp_vjp(widths, layers, activation, error, rows[i], gradient, work);
        adam_step(size, theta, gradient, mean, square, beta1, beta2, epsilon[i], rate[i]);
        x += rows[i] * widths[0];
        y += outputs;
    }
}

/* --------------------------------------------------------------------------------------- ordinal policies ---- */

/* Each of `count` components has n values in order, log p_i = i η_0 + Σ_{1 ≤ j ≤ i} η_j + const. η, and what is dual to
 * it, comes as [count, n], what belongs to values as [n, count]; `work` holds n vectors. */

/* Of up to LANES components, from `from` on: logit i of η − logit 0, value by value in `work`. Returns the largest, or NaN
 * if one is not finite: comparisons alone would take such a policy for a certain one. */
static vec logits(long from, int lanes, long n, const float *eta, float *work)
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

/* log p [n, count] of η. */
void ordinal_log_probabilities(long count, long n, const float *eta, float *out, float *work)
{
    for (long from = 0; from < count; from += LANES) {
        const int lanes = (int)least(LANES, count - from);
        const vec top = logits(from, lanes, n, eta, work);
        float high[LANES], total[LANES];
        store(high, top);
        for (long i = 0; i < n; i++)
            for (int k = 0; k < lanes; k++) out[i * count + from + k] = work[i * LANES + k] - high[k];
        store(total, exponentials(n, top, work));
        for (int k = 0; k < lanes; k++) total[k] = logf(total[k]);
        for (long i = 0; i < n; i++)
            for (int k = 0; k < lanes; k++) out[i * count + from + k] -= total[k];
    }
}

/* C w [count, n] of w_i = p_i (v_i − Σ p v), v = Cᵀ u: the product of u with the Fisher metric in η, p [n, count]. */
void ordinal_metric(long count, long n, const float *p, const float *u, float *out, float *work)
{
    for (long from = 0; from < count; from += LANES) {
        const int lanes = (int)least(LANES, count - from);
        float here[LANES] = {0};
        vec mean = all(0), above = all(0), tilt = all(0);
        logits(from, lanes, n, u, work);
        for (long i = 0; i < n; i++) {
            for (int k = 0; k < lanes; k++) here[k] = p[i * count + from + k];
            mean += load(here) * load(work + i * LANES);
        }
        for (long i = n - 1; i > 0; i--) {
            for (int k = 0; k < lanes; k++) here[k] = p[i * count + from + k];
            above += load(here) * (load(work + i * LANES) - mean);
            tilt += above;
            store(here, above);
            for (int k = 0; k < lanes; k++) out[(from + k) * n + i] = here[k];
        }
        store(here, tilt);
        for (int k = 0; k < lanes; k++) out[(from + k) * n] = here[k];
    }
}

/* One of the values of each component, low + width · i: so many i as have a cumulated probability below Φ(noise). low
 * and width repeat after so many `components`. */
void ordinal_sample(long count, long components, long n, const float *eta, const float *noise, const float *low,
                    const float *width, float *out, float *work)
{
    for (long from = 0; from < count; from += LANES) {
        const int lanes = (int)least(LANES, count - from);
        const vec total = exponentials(n, logits(from, lanes, n, eta, work), work);
        float bound[LANES] = {0}, found[LANES] = {0}, below[LANES] = {0};
        store(bound, total);
        for (int k = 0; k < LANES; k++) bound[k] *= k < lanes ? 0.5f * erfcf(noise[from + k] * -0.70710678f) : 0;
        for (long i = 0; i < n - 1; i++)
            for (int k = 0; k < LANES; k++) {
                below[k] += work[i * LANES + k];
                found[k] += below[k] < bound[k] ? 1 : 0;
            }
        for (int k = 0; k < lanes; k++) {
            const long c = (from + k) % components;
            out[from + k] = low[c] + width[c] * (found[k] + 0 * bound[k]);
        }
    }
}
