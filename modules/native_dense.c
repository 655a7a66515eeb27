/* One dense spiking layer with feedback onto itself, float32 on a CPU: its simulation and its backward solve, sample by sample.
 *
 * Samples are independent, so each runs from start to end on one thread with its state in the innermost cache. A product with the
 * feedback weight adds the weight rows of the neurons that spiked, or whose equilibrium rate can change, and skips the others. */
#include <math.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

/* Sixteen floats at any address, which GCC and Clang map onto the processor's own vectors. */
typedef float vector __attribute__((vector_size(64), aligned(4), may_alias));
#define LANES 16
#define VECTORS 8 /* sums kept in registers while the rows are added */
#define MEMORY 5  /* of Anderson acceleration */

static inline __attribute__((always_inline)) void
add_block(const float *weight, const ptrdiff_t *rows, const float *factors, ptrdiff_t count, ptrdiff_t n, float *out, const int vectors)
{
    vector sum[VECTORS] = {{0}};
    for (ptrdiff_t k = 0; k < count; k++) {
        const vector *row = (const vector *)(weight + rows[k] * n);
#pragma GCC unroll 8
        for (int j = 0; j < vectors; j++)
            if (factors)
                sum[j] += factors[k] * row[j];
            else
                sum[j] += row[j];
    }
#pragma GCC unroll 8
    for (int j = 0; j < vectors; j++)
        ((vector *)out)[j] = sum[j];
}

/* out = sum over k of factors[k] weight[rows[k], :], the factors being 1 without an array of them; weight is (n, n). */
static inline __attribute__((always_inline)) void
add_rows(const float *weight, const ptrdiff_t *rows, const float *factors, ptrdiff_t count, ptrdiff_t n, float *out)
{
    ptrdiff_t from = 0;
    for (; from + VECTORS * LANES <= n; from += VECTORS * LANES)
        add_block(weight + from, rows, factors, count, n, out + from, VECTORS);
    for (; from + LANES <= n; from += LANES)
        add_block(weight + from, rows, factors, count, n, out + from, 1);
    for (; from < n; from++) {
        float sum = 0;
        for (ptrdiff_t k = 0; k < count; k++)
            sum += factors ? factors[k] * weight[rows[k] * n + from] : weight[rows[k] * n + from];
        out[from] = sum;
    }
}

/* current, mask, total: (batch, n); weight: (n, n), row i what neuron i sends; spikes: (steps, batch, n) or null; mask may be null.
 * total becomes the sum over t of leak^(steps-1-t) s(t). Returns -1 where memory is short, else 0. */
int simulate_dense(const float *current, const float *weight, const float *mask, float *total, float *spikes,
                   ptrdiff_t batch, ptrdiff_t n, ptrdiff_t steps, float threshold, float leak)
{
    int failed = 0;
#pragma omp parallel for schedule(dynamic, 4) reduction(| : failed)
    for (ptrdiff_t b = 0; b < batch; b++) {
        ptrdiff_t *fired = malloc(n * sizeof *fired), count = 0;
        float *input = calloc(3 * n, sizeof *input), *potential = input + n, *spike = potential + n;
        if (!fired || !input) {
            failed = 1;
            free(fired);
            free(input);
            continue;
        }
        const float *drive = current + b * n, *keep = mask ? mask + b * n : NULL;
        float *sum = total + b * n;
        memset(sum, 0, n * sizeof *sum);
        for (ptrdiff_t t = 0; t < steps; t++) {
            if (t > 0)
                add_rows(weight, fired, NULL, count, n, input);
            for (ptrdiff_t i = 0; i < n; i++) {
                float u = (potential[i] - threshold * spike[i]) * leak + (drive[i] + (keep ? input[i] * keep[i] : input[i]));
                float s = u >= threshold ? 1.0f : 0.0f;
                potential[i] = u;
                spike[i] = s;
                sum[i] = sum[i] * leak + s;
            }
            count = 0;
            for (ptrdiff_t i = 0; i < n; i++) {
                fired[count] = i;
                count += spike[i] != 0.0f;
            }
            if (spikes)
                memcpy(spikes + (t * batch + b) * n, spike, n * sizeof *spike);
        }
        free(fired);
        free(input);
    }
    return -failed;
}

static float dot(const float *a, const float *b, ptrdiff_t n)
{
    vector sum = {0};
    float total = 0;
    ptrdiff_t i = 0;
    for (; i + LANES <= n; i += LANES)
        sum += *(const vector *)(a + i) * *(const vector *)(b + i);
    for (int lane = 0; lane < LANES; lane++)
        total += sum[lane];
    for (; i < n; i++)
        total += a[i] * b[i];
    return total;
}

/* Anderson's weights: they minimise |sum w_i r_i| subject to sum w_i = 1, from the residuals' Gram matrix, which is scaled to unit
 * diagonal and regularised as in modules/solvers.py. */
static void anderson_weights(double gram[MEMORY][MEMORY], int used, double regularisation, double *weights)
{
    double a[MEMORY][MEMORY], scale[MEMORY], sum = 0;
    for (int i = 0; i < used; i++)
        weights[i] = scale[i] = 1 / sqrt(gram[i][i] > 1e-300 ? gram[i][i] : 1e-300);
    for (int i = 0; i < used; i++)
        for (int j = 0; j < used; j++)
            a[i][j] = gram[i][j] * scale[i] * scale[j] + (i == j ? regularisation : 0);
    for (int i = 0; i < used; i++) /* Gaussian elimination; the matrix is positive definite */
        for (int k = i + 1; k < used; k++) {
            double factor = a[k][i] / a[i][i];
            for (int j = i; j < used; j++)
                a[k][j] -= factor * a[i][j];
            weights[k] -= factor * weights[i];
        }
    for (int i = used - 1; i >= 0; i--) {
        for (int j = i + 1; j < used; j++)
            weights[i] -= a[i][j] * weights[j];
        weights[i] /= a[i][i];
    }
    for (int i = 0; i < used; i++)
        sum += weights[i] *= scale[i];
    for (int i = 0; i < used; i++)
        weights[i] /= sum;
}

/* Solve v = g + W^T (gain v) for one sample from v = g until |residual| <= bound. `scratch` holds (2 MEMORY + 2) n floats.
 * The best v goes to `v`; returns its |residual| and counts the products. */
static double solve_sample(const float *weight, const float *gain, const float *g, float *v, ptrdiff_t n, double bound,
                           ptrdiff_t most, double regularisation, ptrdiff_t *rows, float *factors, float *scratch, ptrdiff_t *products)
{
    float *x = scratch, *product = x + n, *mapped = product + n, *residuals = mapped + MEMORY * n;
    double gram[MEMORY][MEMORY], best = INFINITY;
    ptrdiff_t active = 0;
    for (ptrdiff_t i = 0; i < n; i++) {
        rows[active] = i;
        active += gain[i] != 0.0f;
    }
    memcpy(x, g, n * sizeof *x);
    memcpy(v, g, n * sizeof *v);
    for (ptrdiff_t iteration = 0; iteration < most; iteration++) {
        int slot = iteration % MEMORY, used = iteration < MEMORY ? iteration + 1 : MEMORY;
        float *next = mapped + slot * n, *residual = residuals + slot * n;
        for (ptrdiff_t k = 0; k < active; k++)
            factors[k] = gain[rows[k]] * x[rows[k]];
        add_rows(weight, rows, factors, active, n, product);
        ++*products;
        for (ptrdiff_t i = 0; i < n; i++) {
            next[i] = g[i] + product[i];
            residual[i] = next[i] - x[i];
        }
        for (int i = 0; i < used; i++)
            gram[slot][i] = gram[i][slot] = dot(residuals + i * n, residual, n);
        double size = sqrt(gram[slot][slot]);
        if (size < best) {
            best = size;
            memcpy(v, x, n * sizeof *v);
        }
        if (!(size > bound) || !isfinite(size))
            break;
        double weights[MEMORY];
        anderson_weights(gram, used, regularisation, weights);
        for (ptrdiff_t i = 0; i < n; i++)
            x[i] = (float)weights[0] * mapped[i];
        for (int k = 1; k < used; k++)
            for (ptrdiff_t i = 0; i < n; i++)
                x[i] += (float)weights[k] * mapped[k * n + i];
    }
    return best;
}

/* gain, g, v: (batch, n); weight: (n, n). Every sample is solved to |residual| <= bound or `most` products. Returns -1 where memory
 * is short, else 0; `squares` is the sum of the squared residuals, `products` the number of products over all samples. */
int solve_dense(const float *weight, const float *gain, const float *g, float *v, ptrdiff_t batch, ptrdiff_t n, double bound,
                ptrdiff_t most, double regularisation, double *squares, ptrdiff_t *products)
{
    int failed = 0;
    double sum = 0;
    ptrdiff_t count = 0;
#pragma omp parallel for schedule(dynamic, 4) reduction(| : failed) reduction(+ : sum, count)
    for (ptrdiff_t b = 0; b < batch; b++) {
        float *scratch = malloc((2 * MEMORY + 3) * n * sizeof *scratch);
        ptrdiff_t *rows = malloc(n * sizeof *rows);
        if (scratch && rows) {
            double residual = solve_sample(weight, gain + b * n, g + b * n, v + b * n, n, bound, most, regularisation, rows,
                                           scratch + (2 * MEMORY + 2) * n, scratch, &count);
            sum += residual * residual;
        } else
            failed = 1;
        free(scratch);
        free(rows);
    }
    *squares = sum;
    *products = count;
    return -failed;
}
