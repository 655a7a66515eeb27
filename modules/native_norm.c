/* What follows a hidden connection's linear map in training, float32 on a CPU: batch norm with the batch's statistics, dropout mask and
 * clamp (method sections 4 and 5), and the way back through them.
 *
 * The map's output y, rates and gradients are (rows, channels), a row for each sample and position. Beside y, a byte for each unit tells
 * where the clamp stands, so that neither rates nor slopes need to be kept. Sums run over blocks of rows in float32 and over the blocks in
 * float64, and so don't depend on the number of threads. */
#include "native.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#define BLOCK 64 /* rows that stay in the second-level cache */

enum { SILENT, OPEN, SATURATED }; /* a unit whose rate is 0 or that is dropped; between 0 and 1; 1. As in modules/hidden_layer.py */

struct norm {
    ptrdiff_t rows, channels;
    float threshold;
    const float *y;
    int8_t *state;
    float *mean, *variance, *inverse_std; /* (channels), the variance with one row less in its denominator */
    const float *gamma, *beta;
    float *keep; /* (), the value of the dropout mask at all units that it keeps; 1 without a mask */
};

static ptrdiff_t rows_from(const struct norm *norm, ptrdiff_t first)
{
    return norm->rows - first < BLOCK ? norm->rows - first : BLOCK;
}

/* A block's mean and its sum of squares about it. */
static void block_statistics(const float *restrict y, ptrdiff_t rows, ptrdiff_t channels, float *restrict mean, float *restrict squares)
{
    memset(mean, 0, channels * sizeof *mean);
    memset(squares, 0, channels * sizeof *squares);
    for (ptrdiff_t r = 0; r < rows; r++)
        for (ptrdiff_t c = 0; c < channels; c++)
            mean[c] += y[r * channels + c];
    for (ptrdiff_t c = 0; c < channels; c++)
        mean[c] /= rows;
    for (ptrdiff_t r = 0; r < rows; r++)
        for (ptrdiff_t c = 0; c < channels; c++)
            squares[c] += (y[r * channels + c] - mean[c]) * (y[r * channels + c] - mean[c]);
}

static void statistics(const struct norm *norm, float epsilon, float *blocks)
{
    ptrdiff_t channels = norm->channels, rows = norm->rows;
#pragma omp parallel for if (rows * channels >= PARALLEL_FROM)
    for (ptrdiff_t first = 0; first < rows; first += BLOCK) {
        float *own = blocks + first / BLOCK * 2 * channels;
        block_statistics(norm->y + first * channels, rows_from(norm, first), channels, own, own + channels);
    }
    for (ptrdiff_t c = 0; c < channels; c++) {
        double sum = 0, squares = 0;
        for (ptrdiff_t first = 0; first < rows; first += BLOCK)
            sum += blocks[first / BLOCK * 2 * channels + c] * (double)rows_from(norm, first);
        double mean = sum / rows;
        for (ptrdiff_t first = 0; first < rows; first += BLOCK) {
            const float *own = blocks + first / BLOCK * 2 * channels;
            squares += own[channels + c] + rows_from(norm, first) * (own[c] - mean) * (own[c] - mean);
        }
        norm->mean[c] = mean;
        norm->variance[c] = squares / (rows - 1);
        norm->inverse_std[c] = 1 / sqrt(squares / rows + epsilon);
    }
}

/* The batch norm as scale y + shift. */
static void affine(const struct norm *norm, float *scale, float *shift)
{
    for (ptrdiff_t c = 0; c < norm->channels; c++) {
        scale[c] = norm->gamma[c] * norm->inverse_std[c];
        shift[c] = norm->beta[c] - norm->mean[c] * scale[c];
    }
}

/* Writes the rates, every unit's state and norm->keep. Whether the mask is 0 or one value. */
static inline __attribute__((always_inline)) int
rates_of(const struct norm *norm, const float *scale, const float *shift, const int has_mask, const float *restrict mask,
         float *restrict rate)
{
    const float *restrict y = norm->y;
    int8_t *restrict state = norm->state;
    ptrdiff_t channels = norm->channels;
    float most = 0, least = INFINITY, threshold = norm->threshold;
#pragma omp parallel for reduction(max : most) reduction(min : least) if (norm->rows * channels >= PARALLEL_FROM)
    for (ptrdiff_t r = 0; r < norm->rows; r++)
        for (ptrdiff_t c = 0, at = r * channels; c < channels; c++, at++) {
            float keep = has_mask ? mask[at] : 1.0f, drive = (y[at] * scale[c] + shift[c]) * keep / threshold;
            rate[at] = drive > 1.0f ? 1.0f : drive < 0.0f ? 0.0f : drive;
            state[at] = drive > 1.0f ? SATURATED : drive < 0.0f || keep == 0.0f ? SILENT : OPEN;
            most = keep > most ? keep : most;
            least = keep != 0.0f && keep < least ? keep : least;
        }
    *norm->keep = most;
    return least == INFINITY || most == least;
}

/* The rates (rows, channels), and all else that `norm` points to but y, gamma and beta; mask (rows, channels) may be null. Returns -1 where
 * memory is short, 1 where the mask has several values beside 0, else 0. */
int norm_forward(const struct norm *norm, const float *mask, float epsilon, float *rate)
{
    ptrdiff_t channels = norm->channels, blocks = (norm->rows + BLOCK - 1) / BLOCK;
    float *scratch = malloc(sizeof *scratch * 2 * channels * (blocks + 1)), *shift = scratch + channels;
    if (!scratch)
        return -1;
    statistics(norm, epsilon, scratch + 2 * channels);
    affine(norm, scratch, shift);
    int uniform = mask ? rates_of(norm, scratch, shift, 1, mask, rate) : rates_of(norm, scratch, shift, 0, NULL, rate);
    free(scratch);
    return !uniform;
}

/* The rates again. */
int norm_rates(const struct norm *norm, float *restrict rate)
{
    ptrdiff_t channels = norm->channels;
    float *scale = malloc(sizeof *scale * 2 * channels), *shift = scale + channels, keep = *norm->keep, threshold = norm->threshold;
    const float *restrict y = norm->y;
    const int8_t *restrict state = norm->state;
    if (!scale)
        return -1;
    affine(norm, scale, shift);
#pragma omp parallel for if (norm->rows * channels >= PARALLEL_FROM)
    for (ptrdiff_t r = 0; r < norm->rows; r++)
        for (ptrdiff_t c = 0, at = r * channels; c < channels; c++, at++) {
            float drive = (y[at] * scale[c] + shift[c]) * keep / threshold;
            rate[at] = state[at] == OPEN ? drive : state[at] == SATURATED ? 1.0f : 0.0f;
        }
    free(scale);
    return 0;
}

/* Sums over a block of q = gain v and of q (y - mean), the gain being `steep` where the clamp lets a change pass. */
static void block_sums(const struct norm *norm, ptrdiff_t first, const float *restrict v, float steep, float *restrict sum,
                       float *restrict along)
{
    ptrdiff_t channels = norm->channels, last = first + rows_from(norm, first);
    const float *restrict y = norm->y, *restrict mean = norm->mean;
    const int8_t *restrict state = norm->state;
    memset(sum, 0, channels * sizeof *sum);
    memset(along, 0, channels * sizeof *along);
    for (ptrdiff_t r = first; r < last; r++)
        for (ptrdiff_t c = 0, at = r * channels; c < channels; c++, at++) {
            float q = v[at] * (state[at] == OPEN ? steep : 0.0f); /* not a number where v is none */
            sum[c] += q;
            along[c] += q * (y[at] - mean[c]);
        }
}

/* The gradient in y, of_y, for v, that in the rates; they may be one array. And the gradients in gamma and beta, unless those are null.
 * With x = (y - mean) / std, of_y = gamma / std (q - mean(q) - x mean(q x)). Returns -1 where memory is short, else 0. */
int norm_backward(const struct norm *norm, const float *v, float *of_y, float *of_gamma, float *of_beta)
{
    ptrdiff_t channels = norm->channels, rows = norm->rows, blocks = (rows + BLOCK - 1) / BLOCK;
    float *scale = malloc(sizeof *scale * channels * (3 + 2 * blocks)), steep = *norm->keep * (1.0f / norm->threshold);
    if (!scale)
        return -1;
    float *constant = scale + channels, *slope = constant + channels, *sums = slope + channels;
    const int8_t *restrict state = norm->state;
    const float *restrict y = norm->y, *restrict mean = norm->mean;
#pragma omp parallel for if (rows * channels >= PARALLEL_FROM)
    for (ptrdiff_t first = 0; first < rows; first += BLOCK) {
        float *own = sums + first / BLOCK * 2 * channels;
        block_sums(norm, first, v, steep, own, own + channels);
    }
    for (ptrdiff_t c = 0; c < channels; c++) {
        double sum = 0, along = 0, inverse_std = norm->inverse_std[c];
        for (ptrdiff_t block = 0; block < blocks; block++) {
            sum += sums[block * 2 * channels + c];
            along += sums[(block * 2 + 1) * channels + c];
        }
        if (of_gamma) {
            of_gamma[c] = along * inverse_std;
            of_beta[c] = sum;
        }
        double steepness = norm->gamma[c] * inverse_std;
        scale[c] = steepness * steep;
        slope[c] = -steepness * inverse_std * inverse_std * along / rows;
        constant[c] = -steepness * sum / rows;
    }
#pragma omp parallel for if (rows * channels >= PARALLEL_FROM)
    for (ptrdiff_t r = 0; r < rows; r++)
        for (ptrdiff_t c = 0, at = r * channels; c < channels; c++, at++)
            of_y[at] = v[at] * (state[at] == OPEN ? scale[c] : 0.0f) + (y[at] - mean[c]) * slope[c] + constant[c];
    free(scale);
    return 0;
}
