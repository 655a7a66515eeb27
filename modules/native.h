/* What the CPU kernels share: linear maps that add the weight rows of active units, and scratch memory.
 *
 * A layer lies in memory as (batch, positions, channels), a dense one having one position. A map's weight is packed panel by panel,
 * packed[panel][row][PANEL], with a row for each kernel position and input channel and zeros behind the last output channel. What an
 * output position receives from is a list of segments: input positions from .. to - 1, whose weight rows follow each other, the row
 * of unit i (counted over positions and channels) being i + row. */
#ifndef FEEDBACK_SNN_NATIVE_H
#define FEEDBACK_SNN_NATIVE_H

#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __AVX2__
#include <immintrin.h>
#endif

#define PANEL 32

/* Floats in one of the processor's own vectors; wider ones would be kept in memory. */
#ifdef __AVX512F__
#define LANES 16
#else
#define LANES 8
#endif

/* Floats at any address, which GCC and Clang map onto the processor's own vectors. */
typedef float vector __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

/* Sum of a[i] * b[i]: float32 sums over a stretch, float64 over stretches. */
static inline double dot(const float *a, const float *b, ptrdiff_t n)
{
    double total = 0;
    ptrdiff_t i = 0;
    while (i + LANES <= n) {
        vector sum = {0};
        for (ptrdiff_t end = i + 512 < n ? i + 512 : n; i + LANES <= end; i += LANES)
            sum += *(const vector *)(a + i) * *(const vector *)(b + i);
        double lanes[LANES];
        for (int lane = 0; lane < LANES; lane++)
            lanes[lane] = sum[lane];
        for (int half = LANES / 2; half > 0; half /= 2) /* pairwise, as one addition after the other would wait */
            for (int lane = 0; lane < half; lane++)
                lanes[lane] += lanes[lane + half];
        total += lanes[0];
    }
    for (; i < n; i++)
        total += a[i] * b[i];
    return total;
}

/* clamp(keep drive / threshold, 0, 1) and its slope in the drive. */
static inline void saturate_unit(float drive, float keep, float threshold, float *rate, float *slope)
{
    const float steep = 1.0f / threshold;
    float scaled = drive * keep / threshold;
    *rate = scaled > 1.0f ? 1.0f : scaled < 0.0f ? 0.0f : scaled;
    *slope = scaled >= 0.0f && scaled <= 1.0f ? keep * steep : 0.0f;
}

static inline ptrdiff_t round_up(ptrdiff_t number, ptrdiff_t step)
{
    return (number + step - 1) / step * step;
}

#define LINE 64 /* bytes of the cache that are moved together */
#define PARALLEL_FROM 32768 /* numbers, below which threads cost more than they save */

struct map {
    ptrdiff_t in_positions, in_channels, out_positions, out_channels, rows; /* rows: in one panel */
    const int *segments; /* (out_positions + 1): where each output position's segments start */
    const int *from, *to, *row;
};

/* The units of a layer that are not silent: `units` in ascending order, those of position p at start[p] .. start[p + 1] - 1. */
struct active {
    int *start, *units;
    float *factors; /* what each unit's row is multiplied by; null stands for ones */
};

/* out (out_positions, out_channels) = bias + sum of the active units' weight rows, for each of `count` samples. */
void add_rows(const struct map *map, const float *packed, const float *bias, const struct active *active, float *const *out, int count);

void list_active(const float *values, ptrdiff_t positions, ptrdiff_t channels, struct active *active);

/* scale times a matrix (rows, columns) of any strides as panels of columns, with zeros behind the last one. */
void pack_rows(const float *matrix, ptrdiff_t row_stride, ptrdiff_t column_stride, ptrdiff_t rows, ptrdiff_t columns, float scale,
               float *packed);

static inline ptrdiff_t packed_floats(ptrdiff_t rows, ptrdiff_t columns)
{
    return round_up(columns, PANEL) * rows;
}

#ifdef __AVX2__
/* to[i][j] = scale from[j][i] for 8 x 8 floats, `to` having rows of PANEL. */
static inline void transpose(const float *from, ptrdiff_t stride, float scale, float *to)
{
    __m256 row[8], pair[8];
    for (int j = 0; j < 8; j++)
        row[j] = _mm256_mul_ps(_mm256_loadu_ps(from + j * stride), _mm256_set1_ps(scale));
    for (int j = 0; j < 8; j += 2) { /* pair[j]: columns 0, 1, 4, 5 of rows j and j + 1; pair[j + 1]: columns 2, 3, 6, 7 */
        pair[j] = _mm256_unpacklo_ps(row[j], row[j + 1]);
        pair[j + 1] = _mm256_unpackhi_ps(row[j], row[j + 1]);
    }
    for (int half = 0; half < 8; half += 4) /* row[half + c]: columns c and c + 4 of rows half .. half + 3 */
        for (int high = 0; high < 2; high++) {
            row[half + 2 * high] = _mm256_shuffle_ps(pair[half + high], pair[half + 2 + high], 0x44);
            row[half + 2 * high + 1] = _mm256_shuffle_ps(pair[half + high], pair[half + 2 + high], 0xee);
        }
    for (int column = 0; column < 4; column++) {
        _mm256_storeu_ps(to + column * PANEL, _mm256_permute2f128_ps(row[column], row[column + 4], 0x20));
        _mm256_storeu_ps(to + (column + 4) * PANEL, _mm256_permute2f128_ps(row[column], row[column + 4], 0x31));
    }
}
#endif

/* The factors of a product A B: A's element in row r and column k is at[r * row_step + k * depth_step]; B's row k has panels of PANEL
 * neighbouring floats, panel p at[p * panel_step + k * depth_step]. B may be a matrix as it is or one that pack_rows has packed. */
struct factor {
    const float *at;
    ptrdiff_t row_step, depth_step;
};

struct panels {
    const float *at;
    ptrdiff_t panel_step, depth_step;
};

/* The 8-bit parts of a number that a matrix unit multiplies, where there is one (native_tiles.c): all of them, or the first two where the
 * backward solve is asked for this tolerance or a larger one. A product then has a relative error of 4e-6, root mean square, and of 2^-15
 * at most. */
#define ALL_PARTS 3
#define ROUGH_PARTS 2
#define ROUGH_FROM 1e-3

/* out (rows, columns) = A B, where A has `depth` columns. */
void dense_product(struct factor a, struct panels b, float *out, ptrdiff_t rows, ptrdiff_t depth, ptrdiff_t columns, int parts);

/* The two ways in which it is done: by vectors; or, if depth > 0, by the matrix unit, with 0 returned where there is none, or no memory. */
void vector_product(struct factor a, struct panels b, float *out, ptrdiff_t rows, ptrdiff_t depth, ptrdiff_t columns);
int tile_product(struct factor a, struct panels b, float *out, ptrdiff_t rows, ptrdiff_t depth, ptrdiff_t columns, int parts);

/* Products of a few rows at a time with the same B by the matrix unit of the calling thread. */
#define TILE_ROWS 16
#define TILED_ROWS (2 * TILE_ROWS) /* at most, at a time */

struct tiling {
    ptrdiff_t depth, columns; /* of the product */
    int parts;
    void *memory; /* tiling_bytes, from a line of the cache on, in which B is kept */
};

int has_tiles(void);

size_t tiling_bytes(const struct tiling *tiling);

/* Split B for the calls of tile_rows to come. Of B's columns so many are read, the product's others become 0. */
void tile_panels(const struct tiling *tiling, struct panels b, ptrdiff_t columns);

/* out (rows, columns) = A B, or out + A B where there is something `before`; out's rows lie out_step apart. */
void tile_rows(const struct tiling *tiling, struct factor a, ptrdiff_t rows, float *out, ptrdiff_t out_step, int before);

/* Memory that begins with a line of the cache; null where there is none. What malloc gives has every vector of a large array lie across
 * two lines, and beside aligned_alloc's PyTorch's heap grows by tens of megabytes. */
static inline void *take_lines(size_t bytes)
{
    char *taken = malloc(bytes + LINE + sizeof(void *));
    if (!taken)
        return NULL;
    char *lines = taken + sizeof(void *);
    lines += -(uintptr_t)lines % LINE;
    memcpy(lines - sizeof taken, &taken, sizeof taken);
    return lines;
}

static inline void give_lines(void *lines)
{
    void *taken = NULL;
    if (lines)
        memcpy(&taken, (char *)lines - sizeof taken, sizeof taken);
    free(taken);
}

/* Such memory of the calling thread, at least so many bytes, valid until its next call; null where there is none. */
void *thread_scratch(size_t bytes);

int most_threads(void);

ptrdiff_t neuron_step(const float *current, const float *synaptic, const float *mask, float *potential, int8_t *spikes, float *total,
                      uint8_t *count, ptrdiff_t n, float threshold, float leak);

int simulate_layer(const struct map *map, const float *packed, const float *current, const float *mask, float *rate, ptrdiff_t batch,
                   ptrdiff_t steps, ptrdiff_t first_expectation, double most, float normaliser, float threshold, float leak);

int layer_equilibrium(const struct map *map, const float *packed, const float *rates, const float *current, const float *mask,
                      float *mapped, float *slope, float *gain, float scale, ptrdiff_t batch, float threshold);

int more_active_than(const float *values, ptrdiff_t n, double most);

/* v = g + B^T (gain v), where `map` is that of B^T, from the layer to itself; gain, g, v: (batch, n). Neighbours, eight at a time, are
 * solved to a joint residual of at most tol |g| sqrt(8 / batch), where |g| is that of the whole batch, or `most` products. `residual`
 * becomes the joint one relative to |g| (to 1 where that is 0), `products` the number of products over all samples. The panels are B^T's;
 * a dense one's may be the matrix as it is. Returns -1 where memory is short, else 0. */
int solve_layer(const struct map *map, struct panels panels, const float *gain, const float *g, float *v, ptrdiff_t batch, double tol,
                ptrdiff_t most, double regularisation, double *residual, ptrdiff_t *products);

void power_iteration(const float *w, const float *u, float *next, float *v, float *sigma, ptrdiff_t rows, ptrdiff_t columns);

void normalised_backward(const float *gradient, const float *w, const float *u, const float *v, float scale, float sigma, double *sums,
                         float *along, float *gradient_w, ptrdiff_t rows, ptrdiff_t columns);

#endif
