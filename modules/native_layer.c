/* A training pass of a single dense layer with feedback onto itself, float32 on a CPU, in three calls: method sections 3, 5 and 6. */
#include "native.h"

#include <math.h>

#define UNITS 16 /* that a thread takes at a time: a line of the cache */

/* What all calls see. Layers are (batch, units), weights (units, inputs) and (units, units); masks may be null. */
struct layer {
    ptrdiff_t batch, inputs, units, steps, first_expectation;
    double most_active;
    float threshold, leak, normaliser, momentum, epsilon;
    const struct map *map; /* from the layer to itself */
    const float *x, *weight, *bias, *gamma, *beta, *w, *g, *input_mask, *feedback_mask;
    float *running_mean, *running_variance, *u, *v; /* they and the count advance only where the first call succeeds */
    int64_t *batches_tracked;
    /* The first call's results. The feedback is scale w, so that mapped's slope in w a is scale times that in B a: `gain`. `normalised` is
     * what the batch norm has before gamma and beta, `slope` mapped's slope in the input current. */
    float *rate, *mapped, *gain, *slope, *normalised;
    float *mean, *variance, *inverse_std, *new_u, *new_v, *sigma, *scale; /* (units) each, the last two one number */
};

/* The batch norm of y (units, batch) with the batch's statistics, and its masked output. */
static void normalise_batch(const struct layer *layer, const float *restrict y, float *restrict current)
{
    ptrdiff_t batch = layer->batch, n = layer->units;
    float *restrict normalised = layer->normalised;
    const float *restrict mask = layer->input_mask;
#pragma omp parallel for
    for (ptrdiff_t first = 0; first < n; first += UNITS) {
        ptrdiff_t count = n - first < UNITS ? n - first : UNITS;
        float means[UNITS], scales[UNITS];
        for (ptrdiff_t i = 0; i < count; i++) {
            const float *row = y + (first + i) * batch;
            float sum = 0, squares = 0;
#pragma omp simd reduction(+ : sum)
            for (ptrdiff_t s = 0; s < batch; s++)
                sum += row[s];
            means[i] = sum / batch;
#pragma omp simd reduction(+ : squares)
            for (ptrdiff_t s = 0; s < batch; s++)
                squares += (row[s] - means[i]) * (row[s] - means[i]);
            scales[i] = 1 / sqrtf(squares / batch + layer->epsilon);
            layer->mean[first + i] = means[i] + layer->bias[first + i];
            layer->variance[first + i] = squares / (batch - 1);
            layer->inverse_std[first + i] = scales[i];
        }
        for (ptrdiff_t s = 0; s < batch; s++)
            for (ptrdiff_t i = 0, at = s * n + first; i < count; i++, at++) {
                normalised[at] = (y[(first + i) * batch + s] - means[i]) * scales[i];
                current[at] = (normalised[at] * layer->gamma[first + i] + layer->beta[first + i]) * (mask ? mask[at] : 1.0f);
            }
    }
}

static int forward(const struct layer *layer, float *scratch)
{
    ptrdiff_t batch = layer->batch, inputs = layer->inputs, n = layer->units;
    float *packed = scratch, *y = packed + packed_floats(inputs, batch), *current = y + batch * n, *feedback = current + batch * n;
    pack_rows(layer->x, 1, inputs, inputs, batch, 1, packed);
    dense_product((struct factor){layer->weight, inputs, 1}, (struct panels){packed, inputs * PANEL, PANEL}, y, n, inputs, batch,
                  ALL_PARTS);
    normalise_batch(layer, y, current);
    power_iteration(layer->w, layer->u, layer->new_u, layer->new_v, layer->sigma, n, n);
    float bounded = *layer->g > 1 ? 1 : *layer->g < -1 ? -1 : *layer->g, scale = *layer->scale = bounded / *layer->sigma;
    pack_rows(layer->w, 1, n, n, n, scale, feedback);
    int status = simulate_layer(layer->map, feedback, current, layer->feedback_mask, layer->rate, batch, layer->steps,
                                layer->first_expectation, layer->most_active, layer->normaliser, layer->threshold, layer->leak);
    if (status == 0 && more_active_than(layer->rate, batch * n, layer->most_active * batch * n))
        status = 1;
    if (status == 0)
        status = layer_equilibrium(layer->map, feedback, layer->rate, current, layer->feedback_mask, layer->mapped, layer->slope,
                                   layer->gain, scale, batch, layer->threshold);
    return status;
}

/* rate; and, at it, mapped, slope and gain. Returns 1 where the layer is so active that dense products serve it better, -1 where memory is
 * short, else 0. */
int layer_forward(const struct layer *layer)
{
    ptrdiff_t batch = layer->batch, n = layer->units;
    float *scratch = take_lines(sizeof *scratch * (packed_floats(layer->inputs, batch) + packed_floats(n, n) + 2 * batch * n));
    int status = scratch ? forward(layer, scratch) : -1;
    give_lines(scratch);
    if (status != 0)
        return status;
    memcpy(layer->u, layer->new_u, n * sizeof *layer->u);
    memcpy(layer->v, layer->new_v, n * sizeof *layer->v);
    for (ptrdiff_t i = 0; i < n; i++) {
        layer->running_mean[i] += layer->momentum * (layer->mean[i] - layer->running_mean[i]);
        layer->running_variance[i] += layer->momentum * (layer->variance[i] - layer->running_variance[i]);
    }
    ++*layer->batches_tracked;
    return 0;
}

/* v = g + B^T (gain v) as solve_layer finds it, for g and v (batch, units). Returns -1 where memory is short, else 0. */
int layer_solve(const struct layer *layer, const float *g, float *v, double tol, ptrdiff_t most, double regularisation, double *residual,
                ptrdiff_t *products)
{
    struct panels panels = {layer->w, PANEL, layer->units};
    return solve_layer(layer->map, panels, layer->gain, g, v, layer->batch, tol, most, regularisation, residual, products);
}

/* For `count` units from the `first` on: v^T's way back to what the feedback gave, `received`, and through the batch norm and its mask
 * to what the weight gave, `delta`, and its sums, the gradients of beta, gamma and bias. Constants let the compiler vectorise. */
static inline __attribute__((always_inline)) void
units_backward(const struct layer *layer, ptrdiff_t first, const int count, const int has_input_mask, const int has_feedback_mask,
               const float *restrict v, float *restrict received, float *restrict delta, float *restrict of_beta, float *restrict of_gamma,
               float *restrict of_bias)
{
    ptrdiff_t batch = layer->batch, n = layer->units;
    const float *restrict slope = layer->slope, *restrict normalised = layer->normalised;
    const float *restrict input_mask = layer->input_mask, *restrict feedback_mask = layer->feedback_mask;
    float sums[UNITS] = {0}, along[UNITS] = {0}, left[UNITS] = {0}, steep[UNITS];
    for (ptrdiff_t s = 0; s < batch; s++)
        for (int i = 0; i < count; i++) {
            ptrdiff_t at = s * n + first + i;
            float drive = v[at] * slope[at], through = has_input_mask ? drive * input_mask[at] : drive;
            received[at] = has_feedback_mask ? drive * feedback_mask[at] : drive;
            delta[at] = through;
            sums[i] += through;
            along[i] += through * normalised[at];
        }
    for (int i = 0; i < count; i++) {
        steep[i] = layer->gamma[first + i] * layer->inverse_std[first + i];
        of_beta[first + i] = sums[i];
        of_gamma[first + i] = along[i];
        sums[i] /= batch;
        along[i] /= batch;
    }
    for (ptrdiff_t s = 0; s < batch; s++)
        for (int i = 0; i < count; i++) {
            ptrdiff_t at = s * n + first + i;
            float change = steep[i] * (delta[at] - sums[i] - normalised[at] * along[i]);
            delta[at] = change;
            left[i] += change;
        }
    for (int i = 0; i < count; i++)
        of_bias[first + i] = left[i];
}

#define MASKED(count, m, k) units_backward(layer, first, count, m, k, v, received, delta, of_beta, of_gamma, of_bias)

static void elementwise_backward(const struct layer *layer, const float *v, float *received, float *delta, float *of_beta, float *of_gamma,
                                 float *of_bias)
{
    ptrdiff_t n = layer->units;
    int masked = layer->input_mask && layer->feedback_mask;
#pragma omp parallel for
    for (ptrdiff_t first = 0; first < n; first += UNITS)
        if (first + UNITS <= n && masked)
            MASKED(UNITS, 1, 1);
        else if (first + UNITS <= n && !layer->input_mask && !layer->feedback_mask)
            MASKED(UNITS, 0, 0);
        else
            MASKED(n - first < UNITS ? n - first : UNITS, layer->input_mask != NULL, layer->feedback_mask != NULL);
}

/* The gradients of v^T mapped in every parameter, for v (batch, units) that was solved to a residual of tol. Returns -1 where memory is
 * short, else 0. */
int layer_backward(const struct layer *layer, const float *v, double tol, float *of_weight, float *of_bias, float *of_gamma, float *of_beta,
                   float *of_w, float *of_g)
{
    ptrdiff_t batch = layer->batch, inputs = layer->inputs, n = layer->units;
    float *scratch = take_lines(sizeof *scratch * (2 * n + 2 * batch * n + packed_floats(batch, inputs)));
    if (!scratch)
        return -1;
    int parts = tol >= ROUGH_FROM ? ROUGH_PARTS : ALL_PARTS;
    double *sums = (double *)scratch;
    float *received = scratch + 2 * n, *delta = received + batch * n, *packed = delta + batch * n;
    elementwise_backward(layer, v, received, delta, of_beta, of_gamma, of_bias);
    dense_product((struct factor){received, 1, n}, (struct panels){layer->rate, PANEL, n}, of_w, n, batch, n, parts); /* of B, then of w */
    normalised_backward(of_w, layer->w, layer->new_u, layer->new_v, *layer->scale, *layer->sigma, sums, of_g, of_w, n, n);
    if (*layer->g > 1 || *layer->g < -1)
        *of_g = 0;
    pack_rows(layer->x, inputs, 1, batch, inputs, 1, packed); /* rows so far apart would each lie in a page of their own */
    dense_product((struct factor){delta, 1, n}, (struct panels){packed, batch * PANEL, PANEL}, of_weight, n, batch, inputs, parts);
    give_lines(scratch);
    return 0;
}
