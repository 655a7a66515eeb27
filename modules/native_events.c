/* Event-driven linear maps on a CPU, float32: a product touches the weight rows of the units that spiked and no others. */
#include "native.h"

#include <pthread.h>
#ifdef _OPENMP
#include <omp.h>
#endif

#define VECTORS (PANEL / LANES)
#define STAYS 131072 /* floats of a map that stay in a core's second-level cache, about */
#define TOGETHER 2 /* panels that a product takes at a time, as long as there are so many */
/* Samples that a thread takes through a panel together, so that its rows stay in the cache. The threads' shares are the same in every
 * kernel (static schedules): what one has left of a sample is in the cache of the core that goes on with it. */
#define GROUP 8

static pthread_key_t scratch_key; /* frees a thread's scratch when the thread ends */
static int has_key;

__attribute__((constructor)) static void make_scratch_key(void)
{
    has_key = pthread_key_create(&scratch_key, give_lines) == 0;
}

int most_threads(void)
{
#ifdef _OPENMP
    return omp_get_max_threads();
#else
    return 1;
#endif
}

void *thread_scratch(size_t bytes)
{
    static _Thread_local char *memory;
    static _Thread_local size_t size;
    if (size < bytes) {
        give_lines(memory);
        memory = take_lines(bytes);
        size = memory ? bytes : 0;
        if (has_key)
            pthread_setspecific(scratch_key, memory);
    }
    return memory;
}

void pack_rows(const float *matrix, ptrdiff_t row_stride, ptrdiff_t column_stride, ptrdiff_t rows, ptrdiff_t columns, float scale,
               float *packed)
{
#pragma omp parallel for schedule(static)
    for (ptrdiff_t first = 0; first < columns; first += PANEL) {
        float *panel = packed + first * rows;
        ptrdiff_t width = columns - first < PANEL ? columns - first : PANEL;
        if (column_stride == 1 && width == PANEL) {
            for (ptrdiff_t i = 0; i < rows; i++)
                for (ptrdiff_t j = 0; j < PANEL; j++)
                    panel[i * PANEL + j] = scale * matrix[i * row_stride + first + j];
            continue;
        }
        ptrdiff_t i = 0;
#ifdef __AVX2__
        if (row_stride == 1 && width == PANEL)
            for (; i + 8 <= rows; i += 8)
                for (ptrdiff_t j = 0; j < PANEL; j += 8)
                    transpose(matrix + i + (first + j) * column_stride, column_stride, scale, panel + i * PANEL + j);
#endif
        for (; i < rows; i++)
            for (ptrdiff_t j = 0; j < PANEL; j++)
                panel[i * PANEL + j] = j < width ? scale * matrix[i * row_stride + (first + j) * column_stride] : 0.0f;
    }
}

#if defined __AVX512F__
#define AT_ONCE 16 /* units that are listed without a branch */

/* Append i plus the number of every set bit to `units`, which holds `count`; what is written behind the last one is overwritten later. */
static inline int append_bits(int bits, ptrdiff_t i, int *units, int count)
{
    __m512i places = _mm512_add_epi32(_mm512_set1_epi32(i), _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
    _mm512_storeu_si512(units + count, _mm512_maskz_compress_epi32(bits, places));
    return count + __builtin_popcount(bits);
}

static inline int active_bits(const float *values)
{
    return _mm512_cmp_ps_mask(_mm512_loadu_ps(values), _mm512_setzero_ps(), _CMP_NEQ_UQ);
}
#elif defined __AVX2__
#define AT_ONCE 8

/* The numbers of a byte's set bits, in ascending order, for all bytes. */
static unsigned char set_bits[256][8];

static __attribute__((constructor)) void fill_set_bits(void)
{
    for (int byte = 0; byte < 256; byte++)
        for (int bit = 0, found = 0; bit < 8; bit++)
            if (byte >> bit & 1)
                set_bits[byte][found++] = bit;
}

static inline int append_bits(int bits, ptrdiff_t i, int *units, int count)
{
    __m256i places = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)set_bits[bits]));
    _mm256_storeu_si256((__m256i *)(units + count), _mm256_add_epi32(places, _mm256_set1_epi32(i)));
    return count + __builtin_popcount(bits);
}

static inline int active_bits(const float *values)
{
    return _mm256_movemask_ps(_mm256_cmp_ps(_mm256_loadu_ps(values), _mm256_setzero_ps(), _CMP_NEQ_UQ));
}
#endif

/* Append those of the units from .. to - 1 that are not silent to `units`, which holds `count`; returns how many it then holds. */
static int append_active(const float *values, ptrdiff_t from, ptrdiff_t to, int *units, int count)
{
    ptrdiff_t i = from;
#ifdef AT_ONCE
    for (; i + AT_ONCE <= to; i += AT_ONCE)
        count = append_bits(active_bits(values + i), i, units, count);
#endif
    for (; i < to; i++) {
        units[count] = i;
        count += values[i] != 0.0f;
    }
    return count;
}

void list_active(const float *values, ptrdiff_t positions, ptrdiff_t channels, struct active *active)
{
    int count = 0;
    for (ptrdiff_t p = 0; p < positions; p++) {
        active->start[p] = count;
        count = append_active(values, p * channels, (p + 1) * channels, active->units, count);
    }
    active->start[positions] = count;
}

/* The same for units whose spike, 0 or 1, is not the expected one; without `expected` for those that spiked. */
static inline __attribute__((always_inline)) int
append_departures(const int8_t *spikes, const int8_t *expected, ptrdiff_t from, ptrdiff_t to, int *units, int count)
{
    ptrdiff_t i = from;
#ifdef AT_ONCE
    for (; i + 16 <= to; i += 16) {
        __m128i usual = expected ? _mm_loadu_si128((const __m128i *)(expected + i)) : _mm_setzero_si128();
        int bits = ~_mm_movemask_epi8(_mm_cmpeq_epi8(_mm_loadu_si128((const __m128i *)(spikes + i)), usual)) & 0xffff;
        for (int part = 0; part < 16; part += AT_ONCE)
            count = append_bits(bits >> part & ((1 << AT_ONCE) - 1), i + part, units, count);
    }
#endif
    for (; i < to; i++) {
        units[count] = i;
        count += spikes[i] != (expected ? expected[i] : 0);
    }
    return count;
}

/* List the units whose spike is not the expected one, with the difference in `factors`; without `expected` those that spiked. */
static void list_departures(const struct map *map, const int8_t *spikes, const int8_t *expected, float *factors, struct active *active)
{
    ptrdiff_t channels = map->in_channels;
    int count = 0;
    for (ptrdiff_t p = 0; p < map->in_positions; p++) {
        ptrdiff_t from = p * channels, to = from + channels;
        active->start[p] = count;
        count = expected ? append_departures(spikes, expected, from, to, active->units, count)
                         : append_departures(spikes, NULL, from, to, active->units, count);
    }
    active->start[map->in_positions] = count;
    active->factors = expected ? factors : NULL;
    for (int k = 0; expected && k < count; k++)
        factors[k] = spikes[active->units[k]] - expected[active->units[k]];
}

static inline __attribute__((always_inline)) void
add_row(vector *sum, const float *rows, ptrdiff_t panel_step, const struct active *active, int k, const int vectors, const int weighted)
{
    const float *row = rows + (ptrdiff_t)active->units[k] * PANEL;
    for (int v = 0; v < vectors; v++) {
        const vector *part = (const vector *)(row + v / VECTORS * panel_step) + v % VECTORS;
        if (weighted)
            sum[v] += *part * active->factors[k];
        else
            sum[v] += *part;
    }
}

/* Segments of an output position in `vectors` of a panel or two, on top of what `out` holds (the bias, or nothing yet, before the first
 * one). Two chains of additions where the registers hold them, as one alone would wait for itself. */
static inline __attribute__((always_inline)) void
add_segments(const struct map *map, const float *panel, const struct active *active, int segment, int end, const float *before, float *out,
             ptrdiff_t width, const int vectors, const int weighted)
{
    const int chains = vectors * LANES > PANEL && LANES < 16 ? 1 : 2;
    ptrdiff_t panel_step = map->rows * PANEL;
    vector sum[TOGETHER * VECTORS] = {{0}}, more[TOGETHER * VECTORS] = {{0}};
    for (; segment < end; segment++) {
        const float *rows = panel + (ptrdiff_t)map->row[segment] * PANEL;
        int k = active->start[map->from[segment]], last = active->start[map->to[segment]];
        for (; chains == 2 && k + 1 < last; k += 2) {
            add_row(sum, rows, panel_step, active, k, vectors, weighted);
            add_row(more, rows, panel_step, active, k + 1, vectors, weighted);
        }
        for (; k < last; k++)
            add_row(sum, rows, panel_step, active, k, vectors, weighted);
    }
    for (int v = 0; chains == 2 && v < vectors; v++)
        sum[v] += more[v];
    if (width == vectors * LANES)
        for (int v = 0; v < vectors; v++) {
            if (before)
                sum[v] += ((const vector *)before)[v];
            ((vector *)out)[v] = sum[v];
        }
    else
        for (int i = 0; i < width; i++)
            out[i] = ((const float *)sum)[i] + (before ? before[i] : 0.0f);
}

#define ADD(vectors) \
    (weighted ? add_segments(map, panel, active + s, segment, end, before, to, width, vectors, 1) \
              : add_segments(map, panel, active + s, segment, end, before, to, width, vectors, 0))

/* A round takes one segment of every output position, for a convolution a row of its kernel, so that few weights are in use at a time, or
 * all of them where all weights stay in the cache. Every output position has a segment, if an empty one. */
void add_rows(const struct map *map, const float *packed, const float *bias, const struct active *active, float *const *out, int count)
{
    ptrdiff_t channels = map->out_channels, positions = map->out_positions;
    int most = 0;
    for (ptrdiff_t p = 0; p < positions; p++)
        if (map->segments[p + 1] - map->segments[p] > most)
            most = map->segments[p + 1] - map->segments[p];
    int stays = map->rows * channels <= STAYS, round = stays ? most : 1;
    /* What does not stay: the rows of the round after the next come from the third-level cache, `step` of their floats at a time. */
    ptrdiff_t block = map->rows / most * PANEL, step = stays || positions == 1 ? 0 : 16 * (block / (16 * count * positions) + 1);
    for (ptrdiff_t first = 0, width; first < channels; first += width) {
        const float *panel = packed + first * map->rows;
        width = channels - first < TOGETHER * PANEL ? channels - first : TOGETHER * PANEL;
        if (width > PANEL && width < TOGETHER * PANEL)
            width = PANEL;
        for (int j = 0; j < most; j += round) {
            const float *coming = panel + (j + 2) * block;
            for (int s = 0; s < count; s++)
                for (ptrdiff_t p = 0; p < positions; p++) {
                    int segment = map->segments[p] + j, end = map->segments[p + 1];
                    for (ptrdiff_t at = 0; at < step; at += 16) {
                        __builtin_prefetch(coming + at, 0, 2);
                        if (width > PANEL)
                            __builtin_prefetch(coming + map->rows * PANEL + at, 0, 2);
                    }
                    coming += step;
                    if (segment >= end)
                        continue;
                    if (end > segment + round)
                        end = segment + round;
                    float *to = out[s] + p * channels + first;
                    const float *before = j > 0 ? to : bias ? bias + first : NULL;
                    int weighted = active[s].factors != NULL;
                    if (width > PANEL)
                        ADD(TOGETHER * VECTORS);
                    else if (width > PANEL / 2)
                        ADD(VECTORS);
                    else
                        ADD(VECTORS / 2);
                }
        }
    }
}

/* Samples for a thread at a time, fewer than GROUP where that leaves work for every thread. */
static ptrdiff_t group_size(ptrdiff_t batch)
{
    ptrdiff_t share = (batch + most_threads() - 1) / most_threads();
    return share < GROUP ? share : GROUP;
}

/* Bytes of scratch for a group's lists, factors and products, and their places in it. */
static size_t group_bytes(const struct map *map)
{
    size_t inputs = map->in_positions * map->in_channels, outputs = map->out_positions * map->out_channels;
    return GROUP * (sizeof(int) * (map->in_positions + 1 + inputs + 1) + sizeof(float) * (inputs + outputs));
}

static void place_group(const struct map *map, char *scratch, struct active *active, float **products)
{
    size_t inputs = map->in_positions * map->in_channels, outputs = map->out_positions * map->out_channels;
    for (int s = 0; s < GROUP; s++) {
        int *start = (int *)scratch, *units = start + map->in_positions + 1;
        float *factors = (float *)(units + inputs + 1);
        active[s] = (struct active){start, units, factors};
        products[s] = factors + inputs;
        scratch = (char *)(products[s] + outputs);
    }
}

/* products = bias + W (source - expected) for up to `group` samples from the `first` on; source and expected, which may be null, are
 * (batch, in_positions, in_channels). Their place is in the calling thread's scratch. Returns how many, -1 where memory is short. */
static int group_products(const struct map *map, const float *packed, const float *bias, const int8_t *source, const int8_t *expected,
                          ptrdiff_t batch, ptrdiff_t first, ptrdiff_t group, float **products)
{
    ptrdiff_t inputs = map->in_positions * map->in_channels;
    int count = batch - first < group ? batch - first : group;
    struct active active[GROUP];
    char *scratch = thread_scratch(group_bytes(map));
    if (!scratch)
        return -1;
    place_group(map, scratch, active, products);
    for (int s = 0; s < count; s++) {
        ptrdiff_t at = (first + s) * inputs;
        list_departures(map, source + at, expected ? expected + at : NULL, active[s].factors, active + s);
    }
    add_rows(map, packed, bias, active, products, count);
    return count;
}

/* One time step of a layer whose input comes through `map` from the spikes `source` (batch, in_positions, in_channels):
 * I = current + mask * (bias + W (source - expected)), then neuron_step. expected (like source), current, mask, total and counts may be
 * null; all the others are (batch, out_positions, out_channels). Returns the number of spikes, -1 where memory is short. */
ptrdiff_t spike_step(const struct map *map, const float *packed, const float *bias, const int8_t *source, const int8_t *expected,
                     const float *current, const float *mask, float *potential, int8_t *spikes, float *total, uint8_t *counts,
                     ptrdiff_t batch, float threshold, float leak)
{
    ptrdiff_t outputs = map->out_positions * map->out_channels, group = group_size(batch), fired = 0;
    int failed = 0;
#pragma omp parallel for schedule(static) reduction(+ : fired) reduction(| : failed)
    for (ptrdiff_t first = 0; first < batch; first += group) {
        float *products[GROUP];
        int count = group_products(map, packed, bias, source, expected, batch, first, group, products);
        failed |= count < 0;
        for (int s = 0; s < count; s++) {
            ptrdiff_t at = (first + s) * outputs;
            fired += neuron_step(current ? current + at : NULL, products[s], mask ? mask + at : NULL, potential + at, spikes + at,
                                 total ? total + at : NULL, counts ? counts + at : NULL, outputs, threshold, leak);
        }
    }
    return failed ? -1 : fired;
}

/* The I of spike_step alone, drive (batch, out_positions, out_channels), which current may be itself. Returns -1 where memory is short,
 * else 0. */
int spike_drive(const struct map *map, const float *packed, const float *bias, const int8_t *source, const int8_t *expected,
                const float *current, const float *mask, float *drive, ptrdiff_t batch)
{
    ptrdiff_t outputs = map->out_positions * map->out_channels, group = group_size(batch);
    int failed = 0;
#pragma omp parallel for schedule(static) reduction(| : failed)
    for (ptrdiff_t first = 0; first < batch; first += group) {
        float *products[GROUP];
        int count = group_products(map, packed, bias, source, expected, batch, first, group, products);
        failed |= count < 0;
        for (int s = 0; s < count; s++)
            for (ptrdiff_t i = 0, at = (first + s) * outputs; i < outputs; i++, at++)
                drive[at] = (current ? current[at] : 0.0f) + products[s][i] * (mask ? mask[at] : 1.0f);
    }
    return -failed;
}

/* out (batch, out_positions, out_channels) = bias + W source for source (batch, in_positions, in_channels) of any values. Returns -1
 * where memory is short, else 0. */
int product(const struct map *map, const float *packed, const float *bias, const float *source, float *out, ptrdiff_t batch)
{
    ptrdiff_t inputs = map->in_positions * map->in_channels, outputs = map->out_positions * map->out_channels;
    ptrdiff_t group = group_size(batch);
    int failed = 0;
#pragma omp parallel for schedule(static) reduction(| : failed)
    for (ptrdiff_t first = 0; first < batch; first += group) {
        int count = batch - first < group ? batch - first : group;
        struct active active[GROUP];
        float *products[GROUP], *scratch = thread_scratch(group_bytes(map));
        if (!scratch) {
            failed = 1;
            continue;
        }
        place_group(map, (char *)scratch, active, products);
        for (int s = 0; s < count; s++) {
            const float *values = source + (first + s) * inputs;
            list_active(values, map->in_positions, map->in_channels, active + s);
            for (int k = 0; k < active[s].start[map->in_positions]; k++)
                active[s].factors[k] = values[active[s].units[k]];
            products[s] = out + (first + s) * outputs;
        }
        add_rows(map, packed, bias, active, products, count);
    }
    return -failed;
}

/* From mapped = W rates to what layer_equilibrium gives, for n units. */
static void saturate_drive(const float *restrict current, const float *restrict mask, float *restrict mapped, float *restrict slope,
                           float *restrict gain, float scale, ptrdiff_t n, float threshold)
{
    if (mask)
        for (ptrdiff_t i = 0; i < n; i++) {
            saturate_unit(current[i] + mask[i] * mapped[i], 1.0f, threshold, mapped + i, slope + i);
            gain[i] = mask[i] * slope[i] * scale;
        }
    else
        for (ptrdiff_t i = 0; i < n; i++)
            saturate_unit(current[i] + mapped[i], 1.0f, threshold, mapped + i, slope + i);
    for (ptrdiff_t i = 0; !mask && gain && i < n; i++)
        gain[i] = slope[i] * scale;
}

/* The equilibrium map at rates (batch, in_positions, in_channels) of a layer whose input comes through `map`:
 * mapped = clamp((current + mask * W rates) / threshold, 0, 1), its slope in current, and gain = scale * mask * slope, for a scale of 1
 * that in W rates. mask may be null, and gain too then. Returns -1 where memory is short, else 0. */
int layer_equilibrium(const struct map *map, const float *packed, const float *rates, const float *current, const float *mask,
                      float *mapped, float *slope, float *gain, float scale, ptrdiff_t batch, float threshold)
{
    ptrdiff_t outputs = map->out_positions * map->out_channels;
    if (product(map, packed, NULL, rates, mapped, batch))
        return -1;
#pragma omp parallel for if (batch * outputs >= PARALLEL_FROM)
    for (ptrdiff_t at = 0; at < batch * outputs; at += outputs)
        saturate_drive(current + at, mask ? mask + at : NULL, mapped + at, slope + at, gain ? gain + at : NULL, scale, outputs, threshold);
    return 0;
}

/* A group's samples, a thread's own memory: the units whose weight rows are added, and their factors; products; membrane potentials and
 * spikes; the spikes that are expected at every step, once they are, and the current with what they send. */
struct group {
    struct active active[GROUP];
    float *factors[GROUP], *products[GROUP], *potentials[GROUP], *currents[GROUP];
    int8_t *spikes[GROUP], *expected[GROUP], expects;
};

static int take_group(struct group *group, const struct map *map, int size, ptrdiff_t n)
{
    size_t lists = sizeof(int) * (n + 1 + map->in_positions + 1), each = lists + 4 * sizeof(float) * n + round_up(2 * n, LINE);
    char *scratch = thread_scratch(size * each);
    group->expects = 0;
    for (int s = 0; scratch && s < size; s++, scratch += each) {
        float *floats = (float *)(scratch + lists);
        group->active[s] = (struct active){(int *)scratch, (int *)scratch + map->in_positions + 1, NULL};
        group->potentials[s] = floats;
        group->products[s] = floats + n;
        group->factors[s] = floats + 2 * n;
        group->currents[s] = floats + 3 * n;
        group->spikes[s] = (int8_t *)(floats + 4 * n);
        group->expected[s] = group->spikes[s] + n;
        memset(floats, 0, n * sizeof *floats);
        memset(group->spikes[s], 0, 2 * n);
    }
    return scratch != NULL;
}

/* products = W (spikes - expected), or W spikes while nothing is expected. */
static void add_departures(struct group *group, const struct map *map, const float *packed, int size)
{
    for (int s = 0; s < size; s++)
        list_departures(map, group->spikes[s], group->expects ? group->expected[s] : NULL, group->factors[s], group->active + s);
    add_rows(map, packed, NULL, group->active, group->products, size);
}

/* From now on expect spikes of those units whose sum of spikes so far is at least `least`, and of no others. */
static void expect(struct group *group, const struct map *map, const float *packed, int size, ptrdiff_t n, const float *total, float least,
                   const float *current, const float *mask)
{
    for (int s = 0; s < size; s++) {
        int8_t *now = (int8_t *)group->products[s];
        for (ptrdiff_t i = 0; i < n; i++)
            now[i] = total[s * n + i] >= least;
        list_departures(map, now, group->expected[s], group->factors[s], group->active + s);
        memcpy(group->expected[s], now, n);
    }
    add_rows(map, packed, NULL, group->active, group->products, size);
    for (int s = 0; s < size; s++)
        for (ptrdiff_t i = 0; i < n; i++) {
            float before = group->expects ? group->currents[s][i] : current[s * n + i];
            group->currents[s][i] = before + (mask ? mask[s * n + i] : 1.0f) * group->products[s][i];
        }
    group->expects = 1;
}

/* All time steps of a single layer under a constant current with feedback onto itself through `map`, a group of samples after the
 * other, so that its state stays in the cache: rate (batch, n) becomes the sum over t of leak^(steps-1-t) s(t) / normaliser. Before the
 * steps `first_expectation`, twice that and so on, if as many are still to come, units that fired in half of the steps are expected to go
 * on, and later steps touch what departs from that. Gives up, returning 1, where more than `most` of a group's neurons spike in one step,
 * as dense products are faster there. -1: memory is short; else 0. */
int simulate_layer(const struct map *map, const float *packed, const float *current, const float *mask, float *rate, ptrdiff_t batch,
                   ptrdiff_t steps, ptrdiff_t first_expectation, double most, float normaliser, float threshold, float leak)
{
    ptrdiff_t n = map->out_positions * map->out_channels;
    int failed = 0, lively = 0;
#pragma omp parallel for schedule(static) reduction(| : failed)
    for (ptrdiff_t first = 0; first < batch; first += GROUP) {
        float *total = rate + first * n;
        int size = batch - first < GROUP ? batch - first : GROUP;
        struct group group;
        if (!take_group(&group, map, size, n)) {
            failed = 1;
            continue;
        }
        memset(total, 0, size * n * sizeof *total);
        const float *currents = current + first * n, *masks = mask ? mask + first * n : NULL;
        ptrdiff_t expectation = first_expectation;
        float most_spikes = 0; /* a unit's sum so far if it had fired in every step */
        for (ptrdiff_t t = 0; t < steps && !lively; t++) {
            ptrdiff_t fired = 0;
            if (t == expectation && 2 * t <= steps) {
                expect(&group, map, packed, size, n, total, most_spikes / 2, currents, masks);
                expectation *= 2;
            }
            if (t > 0)
                add_departures(&group, map, packed, size);
            for (int s = 0; s < size; s++)
                fired += neuron_step(group.expects ? group.currents[s] : currents + s * n, t > 0 ? group.products[s] : NULL,
                                     masks ? masks + s * n : NULL, group.potentials[s], group.spikes[s], total + s * n, NULL, n,
                                     threshold, leak);
            most_spikes = most_spikes * leak + 1;
            if (fired > most * size * n)
#pragma omp atomic write
                lively = 1;
        }
        for (ptrdiff_t i = 0; i < size * n; i++)
            total[i] /= normaliser;
    }
    return failed ? -1 : lively;
}
