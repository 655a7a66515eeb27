/* One dense spiking layer with feedback onto itself, float32 on a CPU: its simulation and its backward solve, sample by sample.
 *
 * Samples are independent, so a thread takes a group of them from start to end. A product with the feedback weight adds the weight
 * rows of the neurons that spiked, or whose equilibrium rate can change, and skips the others. */
#include <math.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

/* Sixteen floats at any address, which GCC and Clang map onto the processor's own vectors. */
typedef float vector __attribute__((vector_size(64), aligned(4), may_alias));
#define LANES 16
#define VECTORS 2 /* a panel's columns: its rows then stay in the innermost cache while all samples of a group add theirs */
#define PANEL (VECTORS * LANES)
#define GROUP 16  /* samples that a thread takes through together */
#define MEMORY 5  /* of Anderson acceleration */

/* What a thread holds of its samples: `rows` and `factors` are the rows to add and by how much, `count` how many there are. */
struct sample {
    ptrdiff_t count;
    int *rows;
    float *factors, *product;
};

static ptrdiff_t panels(ptrdiff_t n) { return (n + PANEL - 1) / PANEL; }

/* Copy weight (n, n), or its transpose, panel by panel: packed[p][row][PANEL], with zeros behind the last column. */
static float *pack(const float *weight, ptrdiff_t n, int transposed)
{
    float *packed = NULL;
    if (posix_memalign((void **)&packed, 64, panels(n) * n * PANEL * sizeof *packed))
        return NULL;
#pragma omp parallel for
    for (ptrdiff_t p = 0; p < panels(n); p++) {
        float *panel = packed + p * n * PANEL;
        ptrdiff_t from = p * PANEL, width = n - from < PANEL ? n - from : PANEL;
        if (width < PANEL)
            memset(panel, 0, n * PANEL * sizeof *panel);
        if (transposed)
            for (ptrdiff_t i = 0; i < n; i += LANES)
                for (ptrdiff_t j = 0; j < width; j++)
                    for (ptrdiff_t k = i; k < (i + LANES < n ? i + LANES : n); k++)
                        panel[k * PANEL + j] = weight[(from + j) * n + k];
        else
            for (ptrdiff_t i = 0; i < n; i++)
                memcpy(panel + i * PANEL, weight + i * n + from, width * sizeof *panel);
    }
    return packed;
}

/* product = sum over k of factors[k] weight[rows[k], :] for each of the samples; `product` has room for whole panels. */
static inline __attribute__((always_inline)) void
add_rows(const float *packed, ptrdiff_t n, const struct sample *samples, int count, const int weighted)
{
    for (ptrdiff_t p = 0; p < panels(n); p++) {
        const float *panel = packed + p * n * PANEL;
        for (int s = 0; s < count; s++) {
            const struct sample *sample = samples + s;
            vector sum[VECTORS] = {{0}}, more[VECTORS] = {{0}};
            ptrdiff_t k = 0;
            for (; k + 1 < sample->count; k += 2) { /* two chains of additions, as one alone would wait for itself */
                const vector *row = (const vector *)(panel + (ptrdiff_t)sample->rows[k] * PANEL);
                const vector *next = (const vector *)(panel + (ptrdiff_t)sample->rows[k + 1] * PANEL);
                float factor = weighted ? sample->factors[k] : 1.0f, another = weighted ? sample->factors[k + 1] : 1.0f;
                for (int j = 0; j < VECTORS; j++) {
                    sum[j] += row[j] * factor;
                    more[j] += next[j] * another;
                }
            }
            for (; k < sample->count; k++) {
                const vector *row = (const vector *)(panel + (ptrdiff_t)sample->rows[k] * PANEL);
                float factor = weighted ? sample->factors[k] : 1.0f;
                for (int j = 0; j < VECTORS; j++)
                    sum[j] += row[j] * factor;
            }
            for (int j = 0; j < VECTORS; j++)
                ((vector *)(sample->product + p * PANEL))[j] = sum[j] + more[j];
        }
    }
}

/* One time step of one sample; lists what fired. The roundings of the update are those of neuron_step in native.c. */
static void step(struct sample *sample, const float *restrict current, const float *restrict mask, float *restrict potential,
                 float *restrict spikes, float *restrict total, ptrdiff_t n, float threshold, float leak)
{
    float *restrict input = sample->product;
    int *restrict rows = sample->rows, count = 0;
    for (ptrdiff_t i = 0; mask && i < n; i++)
        input[i] *= mask[i];
    for (ptrdiff_t i = 0; i < n; i++) {
        float u = (potential[i] - threshold * spikes[i]) * leak + (current[i] + input[i]);
        float s = u >= threshold ? 1.0f : 0.0f;
        potential[i] = u;
        spikes[i] = s;
        total[i] = total[i] * leak + s;
    }
    for (int i = 0; i < n; i++) {
        rows[count] = i;
        count += spikes[i] != 0.0f;
    }
    sample->count = count;
}

/* current, mask, total: (batch, n); feedback: (n, n), row i what neuron i receives; spikes: (steps, batch, n) or null; mask may be
 * null. total becomes the sum over t of leak^(steps-1-t) s(t). Returns -1 where memory is short, else 0. */
int simulate_dense(const float *current, const float *feedback, const float *mask, float *total, float *spikes,
                   ptrdiff_t batch, ptrdiff_t n, ptrdiff_t steps, float threshold, float leak)
{
    int failed = 0;
    float *packed = pack(feedback, n, 1);
    if (!packed)
        return -1;
    ptrdiff_t room = panels(n) * PANEL;
    memset(total, 0, batch * n * sizeof *total);
#pragma omp parallel for schedule(dynamic, 1) reduction(| : failed)
    for (ptrdiff_t first = 0; first < batch; first += GROUP) {
        int size = batch - first < GROUP ? batch - first : GROUP;
        struct sample samples[GROUP];
        float *state = calloc(GROUP * 3 * room, sizeof *state);
        int *rows = malloc(GROUP * (n + 1) * sizeof *rows);
        if (!state || !rows)
            failed = 1;
        for (ptrdiff_t t = 0; t < steps && !failed; t++) {
            if (t > 0)
                add_rows(packed, n, samples, size, 0);
            for (int s = 0; s < size; s++) {
                ptrdiff_t b = first + s;
                float *potential = state + s * 3 * room, *spike = potential + room;
                if (t == 0)
                    samples[s] = (struct sample){0, rows + s * (n + 1), NULL, spike + room};
                step(samples + s, current + b * n, mask ? mask + b * n : NULL, potential, spike, total + b * n, n, threshold, leak);
                if (spikes)
                    memcpy(spikes + (t * batch + b) * n, spike, n * sizeof *spike);
            }
        }
        free(rows);
        free(state);
    }
    free(packed);
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

/* One sample's solve of v = g + W^T (gain v): the iterate x, its Anderson history, and the best v seen so far. */
struct solve {
    double gram[MEMORY][MEMORY], best;
    float *x, *mapped, *residuals;
    int slot, used, done;
};

/* After product = W^T (gain x): note the residual, keep x if it is the best, and propose the next x unless this one serves. */
static void advance(struct solve *solve, const float *product, const float *g, float *v, ptrdiff_t n, double bound, double regularisation)
{
    int slot = solve->slot, used = solve->used < MEMORY ? ++solve->used : MEMORY;
    float *mapped = solve->mapped + slot * n, *residual = solve->residuals + slot * n, *x = solve->x;
    solve->slot = (slot + 1) % MEMORY;
    for (ptrdiff_t i = 0; i < n; i++) {
        mapped[i] = g[i] + product[i];
        residual[i] = mapped[i] - x[i];
    }
    for (int i = 0; i < used; i++)
        solve->gram[slot][i] = solve->gram[i][slot] = dot(solve->residuals + i * n, residual, n);
    double size = sqrt(solve->gram[slot][slot]), weights[MEMORY];
    if (size < solve->best) {
        solve->best = size;
        memcpy(v, x, n * sizeof *v);
    }
    solve->done = !(size > bound) || !isfinite(size);
    if (solve->done)
        return;
    anderson_weights(solve->gram, used, regularisation, weights);
    for (ptrdiff_t i = 0; i < n; i++)
        x[i] = (float)weights[0] * solve->mapped[i];
    for (int k = 1; k < used; k++)
        for (ptrdiff_t i = 0; i < n; i++)
            x[i] += (float)weights[k] * solve->mapped[k * n + i];
}

/* Solve `size` samples from v = g, whose gain, g and v start at the pointers given; those that are done drop out of the products. */
static double solve_group(const float *packed, const float *gain, const float *g, float *v, int size, ptrdiff_t n, double bound,
                          ptrdiff_t most, double regularisation, float *scratch, int *rows, ptrdiff_t *products)
{
    struct solve solves[GROUP];
    struct sample samples[GROUP], going[GROUP];
    ptrdiff_t room = panels(n) * PANEL, floats = room + (2 + 2 * MEMORY) * n;
    double squares = 0;
    for (int s = 0; s < size; s++) {
        float *own = scratch + s * floats;
        samples[s] = (struct sample){0, rows + s * (n + 1), own + room, own};
        solves[s] = (struct solve){.best = INFINITY, .x = own + room + n, .mapped = own + room + 2 * n,
                                   .residuals = own + room + (2 + MEMORY) * n};
        memcpy(solves[s].x, g + s * n, n * sizeof *g);
        memcpy(v + s * n, g + s * n, n * sizeof *g);
        for (int i = 0; i < n; i++) {
            samples[s].rows[samples[s].count] = i;
            samples[s].count += gain[s * n + i] != 0.0f;
        }
    }
    for (ptrdiff_t iteration = 0; iteration < most; iteration++) {
        int count = 0;
        for (int s = 0; s < size; s++)
            if (!solves[s].done) {
                for (ptrdiff_t k = 0; k < samples[s].count; k++)
                    samples[s].factors[k] = gain[s * n + samples[s].rows[k]] * solves[s].x[samples[s].rows[k]];
                going[count++] = samples[s];
            }
        if (count == 0)
            break;
        *products += count;
        add_rows(packed, n, going, count, 1);
        for (int s = 0; s < size; s++)
            if (!solves[s].done)
                advance(solves + s, samples[s].product, g + s * n, v + s * n, n, bound, regularisation);
    }
    for (int s = 0; s < size; s++)
        squares += solves[s].best * solves[s].best;
    return squares;
}

/* gain, g, v: (batch, n); weight: (n, n). Every sample is solved to |residual| <= bound or `most` products. Returns -1 where memory
 * is short, else 0; `squares` is the sum of the squared residuals, `products` the number of products over all samples. */
int solve_dense(const float *weight, const float *gain, const float *g, float *v, ptrdiff_t batch, ptrdiff_t n, double bound,
                ptrdiff_t most, double regularisation, double *squares, ptrdiff_t *products)
{
    int failed = 0;
    double sum = 0;
    ptrdiff_t count = 0, floats = panels(n) * PANEL + (2 + 2 * MEMORY) * n;
    float *packed = pack(weight, n, 0);
    if (!packed)
        return -1;
#pragma omp parallel for schedule(dynamic, 1) reduction(| : failed) reduction(+ : sum, count)
    for (ptrdiff_t first = 0; first < batch; first += GROUP) {
        int size = batch - first < GROUP ? batch - first : GROUP;
        float *scratch = malloc(GROUP * floats * sizeof *scratch);
        int *rows = malloc(GROUP * (n + 1) * sizeof *rows);
        if (scratch && rows)
            sum += solve_group(packed, gain + first * n, g + first * n, v + first * n, size, n, bound, most, regularisation,
                               scratch, rows, &count);
        else
            failed = 1;
        free(scratch);
        free(rows);
    }
    free(packed);
    *squares = sum;
    *products = count;
    return -failed;
}
