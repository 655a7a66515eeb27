/* The neuron update of one time step in one pass over memory (method section 1), for float32 layers on a CPU.
 *
 * Compiled without contraction to fused multiply-adds, so that every rounding, and so every spike, equals PyTorch's. */
#include "native.h"

#define STRETCH 8192 /* neurons that a thread takes at a time */
#define DRAWS 1024 /* random numbers in the first-level cache */

/* I = current + mask * synaptic;  u = leak (u - threshold s) + I;  s = u >= threshold;  total = leak total + s;  count = count + s. The
 * last step's s is known from its u, so that spikes, a byte each, are written and not read. Parts that are absent (a null pointer) are left
 * out; the flags are constants, so each case is its own loop, which the compiler vectorises only where no flag is left in it. Returns the
 * number of spikes. */
static inline __attribute__((always_inline)) ptrdiff_t
step(const int has_current, const int has_synaptic, const int has_mask, const int has_total, const int has_count,
     const float *restrict current, const float *restrict synaptic, const float *restrict mask,
     float *restrict potential, int8_t *restrict spikes, float *restrict total, uint8_t *restrict count, ptrdiff_t n, float threshold,
     float leak)
{
    int fired = 0;
    for (ptrdiff_t i = 0; i < n; i++) {
        float drive = has_current ? current[i] : 0.0f;
        if (has_synaptic) {
            float input = has_mask ? synaptic[i] * mask[i] : synaptic[i];
            drive = has_current ? drive + input : input;
        }
        float before = potential[i], u = (before >= threshold ? before - threshold : before) * leak + drive;
        float s = u >= threshold ? 1.0f : 0.0f;
        fired += u >= threshold;
        potential[i] = u;
        spikes[i] = u >= threshold;
        if (has_total)
            total[i] = total[i] * leak + s;
        if (has_count)
            count[i] += u >= threshold;
    }
    return fired;
}

#define STEP(c, y, m, t, k) return step(c, y, m, t, k, current, synaptic, mask, potential, spikes, total, count, n, threshold, leak)
#define CASE(c, y, m) do { if (total) STEP(c, y, m, 1, 0); if (count) STEP(c, y, m, 0, 1); STEP(c, y, m, 0, 0); } while (0)

ptrdiff_t neuron_step(const float *current, const float *synaptic, const float *mask, float *potential, int8_t *spikes, float *total,
                      uint8_t *count, ptrdiff_t n, float threshold, float leak)
{
    if (!synaptic) CASE(1, 0, 0);
    if (current && mask) CASE(1, 1, 1);
    if (current) CASE(1, 1, 0);
    if (mask) CASE(0, 1, 1);
    CASE(0, 1, 0);
}

/* The same with the work shared among threads. */
ptrdiff_t neuron_step_shared(const float *current, const float *synaptic, const float *mask, float *potential, int8_t *spikes,
                             float *total, uint8_t *count, ptrdiff_t n, float threshold, float leak)
{
    ptrdiff_t fired = 0;
#pragma omp parallel for reduction(+ : fired) if (n >= PARALLEL_FROM)
    for (ptrdiff_t at = 0; at < n; at += STRETCH)
        fired += neuron_step(current ? current + at : NULL, synaptic ? synaptic + at : NULL, mask ? mask + at : NULL, potential + at,
                             spikes + at, total ? total + at : NULL, count ? count + at : NULL, n - at < STRETCH ? n - at : STRETCH,
                             threshold, leak);
    return fired;
}

/* The rate that a neuron settles at under a constant current, clamp(mask · drive / threshold, 0, 1), and its slope in the drive. */
void saturate(const float *restrict drive, const float *restrict mask, float *restrict rate, float *restrict slope, ptrdiff_t n,
              float threshold)
{
    if (mask) {
#pragma omp parallel for simd if (n >= PARALLEL_FROM)
        for (ptrdiff_t i = 0; i < n; i++)
            saturate_unit(drive[i], mask[i], threshold, rate + i, slope + i);
    } else {
#pragma omp parallel for simd if (n >= PARALLEL_FROM)
        for (ptrdiff_t i = 0; i < n; i++)
            saturate_unit(drive[i], 1.0f, threshold, rate + i, slope + i);
    }
}

/* The n-th number of SplitMix64, a generator that jumps to any place of its sequence at once (Steele, Lea, Flood, OOPSLA 2014). */
static inline uint64_t splitmix(uint64_t seed, uint64_t n)
{
    uint64_t z = seed + n * 0x9E3779B97F4A7C15u;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    return z ^ z >> 31;
}

/* A dropout mask: scale where a uniform 16-bit draw is at least `least`, else 0. */
void keep_mask(uint64_t seed, float *restrict mask, ptrdiff_t n, int least, float scale)
{
#pragma omp parallel for if (n >= PARALLEL_FROM)
    for (ptrdiff_t at = 0; at < n; at += DRAWS) {
        union {
            uint64_t words[DRAWS / 4];
            int16_t draws[DRAWS];
        } random;
        for (int i = 0; i < DRAWS / 4; i++)
            random.words[i] = splitmix(seed, at / 4 + i + 1);
        ptrdiff_t count = n - at < DRAWS ? n - at : DRAWS;
        for (ptrdiff_t i = 0; i < count; i++)
            mask[at + i] = random.draws[i] >= least ? scale : 0.0f;
    }
}
