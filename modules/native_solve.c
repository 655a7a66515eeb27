/* The backward solve v = g + B^T (gain v) of a single spiking layer with feedback onto itself, float32 on a CPU.
 *
 * Samples are independent there, so each is solved on its own, by Anderson acceleration that stays in the processor's cache. Units
 * whose equilibrium rate can't change (gain 0) stand on the left alone: the equation is solved for the others, the active ones, and v of
 * the silent ones follows from their values with residual 0. */
#include "native.h"

#include <math.h>
#include <string.h>

#define MEMORY 5 /* of Anderson acceleration */
#define NEIGHBOURS 8 /* samples: fewer share a row of weights in the cache; more leave a thread waiting for another's last ones */
#define TILED_BYTES 1048576 /* of a weight in parts, which is to stay in the second-level cache */
#define TOGETHER_BELOW 4096 /* units: a larger layer's samples are taken one by one, as their histories would fill the cache */

/* One sample's solve: the iterate x of its `count` active units, their gain and g, and x's history; the best x so far and, in v, what it
 * sent to all units. */
struct solve {
    double gram[MEMORY][MEMORY], best;
    const float *all_g;
    float *v, *product, *x, *best_x, *gain, *g, *mapped, *residuals;
    struct active active;
    int count, slot, used, done;
};

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

/* v from the best iterate: x itself for the active units, g + B^T (gain x) for the others. */
static void finish(const struct solve *solve, ptrdiff_t n)
{
    for (ptrdiff_t i = 0; i < n; i++)
        solve->v[i] += solve->all_g[i];
    for (int k = 0; k < solve->count; k++)
        solve->v[solve->active.units[k]] = solve->best_x[k];
}

/* After product = B^T (gain x): note the residual, keep x if it is the best, and propose the next x unless this one serves. */
static void advance(struct solve *solve, ptrdiff_t n, double bound, double regularisation)
{
    int slot = solve->slot, used = solve->used < MEMORY ? ++solve->used : MEMORY, count = solve->count;
    float *restrict mapped = solve->mapped + slot * n, *restrict residual = solve->residuals + slot * n, *restrict x = solve->x;
    solve->slot = (slot + 1) % MEMORY;
    for (int k = 0; k < count; k++) /* apart from what the compiler vectorises */
        mapped[k] = solve->product[solve->active.units[k]];
    for (int k = 0; k < count; k++) {
        mapped[k] += solve->g[k];
        residual[k] = mapped[k] - x[k];
    }
    for (int i = 0; i < used; i++)
        solve->gram[slot][i] = solve->gram[i][slot] = dot(solve->residuals + i * n, residual, count);
    double size = sqrt(solve->gram[slot][slot]), weights[MEMORY];
    if (size < solve->best) {
        solve->best = size;
        memcpy(solve->best_x, x, count * sizeof *x);
        memcpy(solve->v, solve->product, n * sizeof *x);
    }
    solve->done = !(size > bound) || !isfinite(size);
    if (solve->done)
        return;
    anderson_weights(solve->gram, used, regularisation, weights);
    for (int k = 0; k < count; k++)
        x[k] = (float)weights[0] * solve->mapped[k];
    for (int i = 1; i < used; i++) {
        const float *restrict earlier = solve->mapped + i * n;
        for (int k = 0; k < count; k++)
            x[k] += (float)weights[i] * earlier[k];
    }
}

/* Bytes of one sample's scratch, and its places there; the iteration starts from x = g. */
static size_t solve_bytes(const struct map *map, ptrdiff_t n)
{
    return sizeof(float) * n * (6 + 2 * MEMORY) + sizeof(int) * (n + 1 + map->in_positions + 1);
}

static void begin(struct solve *solve, const struct map *map, char *scratch, const float *gain, const float *g, float *v, ptrdiff_t n)
{
    float *floats = (float *)scratch;
    int *ints = (int *)(floats + n * (6 + 2 * MEMORY)), *units = ints + map->in_positions + 1;
    *solve = (struct solve){.best = INFINITY, .all_g = g, .v = v, .product = floats, .x = floats + n, .gain = floats + 2 * n,
                            .g = floats + 3 * n, .best_x = floats + 5 * n, .mapped = floats + 6 * n,
                            .residuals = floats + (6 + MEMORY) * n, .active = {ints, units, floats + 4 * n}};
    list_active(gain, map->in_positions, map->in_channels, &solve->active);
    solve->count = ints[map->in_positions];
    for (int k = 0; k < solve->count; k++) {
        solve->gain[k] = gain[units[k]];
        solve->best_x[k] = solve->x[k] = solve->g[k] = g[units[k]];
    }
    memset(v, 0, n * sizeof *v);
}

/* How products with B^T are made: event-driven, from packed panels, or, where the tiling has memory, by the matrix unit. */
struct feedback {
    const struct map *map;
    struct panels panels;
    struct tiling tiling;
    float *sent, *received; /* a vector for each sample */
};

/* product = B^T (gain x) of the samples that are not done. Returns how many there are. */
static int send_back(const struct feedback *feedback, struct solve *solves, int count, ptrdiff_t n)
{
    struct active active[TILED_ROWS];
    float *out[TILED_ROWS];
    int going = 0, tiled = feedback->tiling.memory != NULL;
    for (int s = 0; s < count; s++) {
        struct solve *solve = solves + s;
        if (solve->done)
            continue;
        if (tiled) {
            float *sent = feedback->sent + going * n;
            memset(sent, 0, n * sizeof *sent);
            for (int k = 0; k < solve->count; k++)
                sent[solve->active.units[k]] = solve->gain[k] * solve->x[k];
            solve->product = feedback->received + going * feedback->tiling.columns;
        } else
            for (int k = 0; k < solve->count; k++)
                solve->active.factors[k] = solve->gain[k] * solve->x[k];
        active[going] = solve->active;
        out[going++] = solve->product;
    }
    if (going > 0 && tiled)
        tile_rows(&feedback->tiling, (struct factor){feedback->sent, n, 1}, round_up(going, TILE_ROWS), feedback->received,
                  feedback->tiling.columns, 0); /* with rows of earlier samples, where whole tiles need some */
    else if (going > 0)
        add_rows(feedback->map, feedback->panels.at, NULL, active, out, going);
    return going;
}

/* Of every NEIGHBOURS neighbours, however many are iterated at a time, all are done once their joint residual is within the bound. */
static void stop(struct solve *solves, int count, double bound)
{
    for (int first = 0, end; first < count; first = end) {
        double squares = 0;
        end = first + NEIGHBOURS < count ? first + NEIGHBOURS : count;
        for (int s = first; s < end; s++)
            squares += solves[s].best * solves[s].best;
        for (int s = first; s < end && squares <= (end - first) * bound * bound; s++)
            solves[s].done = 1;
    }
}

/* Iterate `count` samples together; those that are done drop out of the products. Returns the number of products. */
static ptrdiff_t iterate(const struct feedback *feedback, struct solve *solves, int count, ptrdiff_t n, double bound, ptrdiff_t most,
                         double regularisation)
{
    ptrdiff_t products = 0;
    for (ptrdiff_t iteration = 0; iteration < most; iteration++) {
        int going = send_back(feedback, solves, count, n);
        if (going == 0)
            break;
        products += going;
        for (int s = 0; s < count; s++)
            if (!solves[s].done)
                advance(solves + s, n, bound, regularisation);
        stop(solves, count, bound);
    }
    return products;
}

/* Whether more than `most` of n values are not zero. */
int more_active_than(const float *values, ptrdiff_t n, double most)
{
    ptrdiff_t count = 0;
#pragma omp parallel for simd reduction(+ : count) if (n >= PARALLEL_FROM)
    for (ptrdiff_t i = 0; i < n; i++)
        count += values[i] != 0.0f;
    return count > most;
}

static struct tiling tiling_of(const struct map *map)
{
    return (struct tiling){.depth = map->rows, .columns = round_up(map->out_channels, PANEL), .parts = ROUGH_PARTS};
}

/* Neither this nor where samples stop depends on the number of threads, so that no result does. */
static int solves_by_tiles(const struct map *map, ptrdiff_t batch, double tol)
{
    struct tiling tiling = tiling_of(map);
    int dense = map->in_positions == 1 && map->out_positions == 1 && map->rows == map->in_channels; /* no kernel around one position */
    return dense && batch >= TILED_ROWS && tol >= ROUGH_FROM && tiling_bytes(&tiling) <= TILED_BYTES && has_tiles();
}

int solve_layer(const struct map *map, struct panels panels, const float *gain, const float *g, float *v, ptrdiff_t batch, double tol,
                ptrdiff_t most, double regularisation, double *residual, ptrdiff_t *products)
{
    ptrdiff_t n = map->out_positions * map->out_channels, together = n < TOGETHER_BELOW ? NEIGHBOURS : 1, counted = 0;
    double size = sqrt(dot(g, g, batch * n)), scale = size == 0 ? 1 : size, bound = tol * scale / sqrt(batch), sum = 0;
    struct tiling tiling = tiling_of(map);
    size_t each = solve_bytes(map, n), split = 0, rows = 0;
    int tiled = solves_by_tiles(map, batch, tol), failed = 0;
    float *packed = NULL;
    if (!tiled && panels.depth_step != PANEL) { /* the matrix as it is */
        packed = take_lines(sizeof *packed * packed_floats(n, n));
        if (!packed)
            return -1;
        pack_rows(panels.at, panels.depth_step, 1, n, n, 1, packed);
        panels = (struct panels){packed, n * PANEL, PANEL};
    }
    if (tiled) {
        while (together < TILED_ROWS && batch >= 2 * together * most_threads())
            together *= 2;
        split = tiling_bytes(&tiling);
        rows = round_up(together, TILE_ROWS);
    }
#pragma omp parallel reduction(| : failed) reduction(+ : sum, counted)
    {
        char *scratch = thread_scratch(split + rows * (n + tiling.columns) * sizeof(float) + together * each);
        float *sent = (float *)(scratch + split), *received = sent + rows * n, *solves_at = received + rows * tiling.columns;
        struct feedback feedback = {map, panels, tiling, sent, received};
        failed = scratch == NULL;
        if (tiled && !failed) {
            feedback.tiling.memory = scratch;
            tile_panels(&feedback.tiling, panels, n);
            memset(sent, 0, rows * n * sizeof *sent);
        }
#pragma omp for schedule(static)
        for (ptrdiff_t first = 0; first < batch; first += together) {
            int count = failed ? 0 : batch - first < together ? batch - first : together;
            struct solve solves[TILED_ROWS];
            for (int s = 0; s < count; s++) {
                ptrdiff_t at = (first + s) * n;
                begin(solves + s, map, (char *)solves_at + s * each, gain + at, g + at, v + at, n);
            }
            counted += iterate(&feedback, solves, count, n, bound, most, regularisation);
            for (int s = 0; s < count; s++) {
                finish(solves + s, n);
                sum += solves[s].best * solves[s].best;
            }
        }
    }
    give_lines(packed);
    *residual = sqrt(sum) / scale;
    *products = counted;
    return -failed;
}

/* The same from packed panels. */
int solve_packed(const struct map *map, const float *packed, const float *gain, const float *g, float *v, ptrdiff_t batch, double tol,
                 ptrdiff_t most, double regularisation, double *residual, ptrdiff_t *products)
{
    return solve_layer(map, (struct panels){packed, map->rows * PANEL, PANEL}, gain, g, v, batch, tol, most, regularisation, residual,
                       products);
}
