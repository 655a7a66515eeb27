/* Spectral normalisation of the feedback's weight (method section 3), float32 on a CPU: few passes over the weight.
 *
 * What is summed up by several threads is divided among them by rows or by columns, so that no sum depends on their number. */
#include "native.h"

#include <math.h>
#include <string.h>

#define COLUMNS 64 /* that a thread takes at a time */

/* x / |x| in place; returns |x|, or the smallest normal number for a zero vector. */
static float normalise(float *x, ptrdiff_t n)
{
    float size = sqrt(dot(x, x, n));
    size = size < 0x1p-126f ? 0x1p-126f : size; /* what is not a number stays so */
    for (ptrdiff_t i = 0; i < n; i++)
        x[i] /= size;
    return size;
}

/* v = W^T u / |W^T u|, then next = W v / |W v| and sigma = |W v|, for w (rows, columns). */
void power_iteration(const float *restrict w, const float *restrict u, float *restrict next, float *restrict v, float *sigma,
                     ptrdiff_t rows, ptrdiff_t columns)
{
#pragma omp parallel for if (rows * columns >= PARALLEL_FROM)
    for (ptrdiff_t first = 0; first < columns; first += COLUMNS) {
        ptrdiff_t width = columns - first < COLUMNS ? columns - first : COLUMNS;
        float sum[COLUMNS] = {0};
        for (ptrdiff_t i = 0; i < rows; i++)
            for (ptrdiff_t j = 0; j < width; j++)
                sum[j] += u[i] * w[i * columns + first + j];
        memcpy(v + first, sum, width * sizeof *v);
    }
    normalise(v, columns);
#pragma omp parallel for if (rows * columns >= PARALLEL_FROM)
    for (ptrdiff_t i = 0; i < rows; i++)
        next[i] = dot(w + i * columns, v, columns);
    *sigma = normalise(next, rows);
}

/* For the gradient of scale w, where scale = gain / sigma(w) with u and v held constant: along = <gradient, w> / sigma, and
 * gradient_w = scale (gradient - along u v^T), which may be where the gradient is. `sums` (rows) is scratch. */
void normalised_backward(const float *gradient, const float *w, const float *u, const float *v, float scale, float sigma, double *sums,
                         float *along, float *gradient_w, ptrdiff_t rows, ptrdiff_t columns)
{
    double sum = 0;
#pragma omp parallel for if (rows * columns >= PARALLEL_FROM)
    for (ptrdiff_t i = 0; i < rows; i++)
        sums[i] = dot(gradient + i * columns, w + i * columns, columns);
    for (ptrdiff_t i = 0; i < rows; i++)
        sum += sums[i];
    *along = sum / sigma;
#pragma omp parallel for if (rows * columns >= PARALLEL_FROM)
    for (ptrdiff_t i = 0; i < rows; i++) {
        const float outer = *along * u[i];
#pragma omp simd
        for (ptrdiff_t j = 0; j < columns; j++)
            gradient_w[i * columns + j] = scale * (gradient[i * columns + j] - outer * v[j]);
    }
}
