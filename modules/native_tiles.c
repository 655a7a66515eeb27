/* Products of dense float32 matrices by the matrix unit (AMX) of some server processors, which multiplies tiles of bfloat16.
 *
 * A float32 number is the sum of three bfloat16 ones, a = a1 + a2 + a3, each at most 2^-8 of the one before. Of the nine products in a b
 * six are added up, in float32, with less rounding than fused multiply-adds give; a2 b3, a3 b2 and a3 b3, together about one rounding of
 * a b, are left out. With two parts, 16 bits of a number, three products serve. Parts below 2^-126 count as 0; numbers from 3.396e38 on,
 * which bfloat16 has not, and results that would be infinite become no number. */
#include "native.h"

#if (defined __AMX_BF16__ || defined __AMXBF16__) && defined __AVX512F__ && defined __linux__ /* the latter is older Clangs' */
#include <sys/syscall.h>
#include <unistd.h>

#define SIDE TILE_ROWS /* columns of a result's tile, too */
#define DEPTH 32       /* of the product that a tile of a factor holds */
#define DEEPEST 1024   /* of the product's depth that is added up at a time */
#define KEPT 786432    /* bytes of split panels that a thread keeps in its second-level cache */

/* What the unit loads and stores is memory, which the compiler is not told. */
#define IN_MEMORY() __asm__ volatile("" ::: "memory")

/* Pairs of bfloat16. In a tile of A, row r holds A's row r; in a tile of B, row j holds what meets the j-th pair of A's rows. The lower
 * halves are the first 16 numbers of the tile's depth, the upper halves the other 16. */
struct tile {
    uint32_t pairs[SIDE][SIDE];
};

/* Linux gives the unit's registers to a process that asks for them, and from then on wants larger stacks for its signal handlers. */
int has_tiles(void)
{
    const int ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
    static int permitted = -1;
    if (permitted < 0)
        permitted = syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
    return permitted;
}

static void configure_tiles(void)
{
    struct {
        uint8_t palette, start_row, reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } shapes = {.palette = 1};
    for (int i = 0; i < 8; i++) {
        shapes.row_bytes[i] = sizeof(uint32_t[SIDE]);
        shapes.rows[i] = SIDE;
    }
    IN_MEMORY();
    _tile_loadconfig(&shapes);
}

/* The bits of what is rounded to bfloat16 when their lower half is cut off. What may be no number stays so, which the carry might undo. */
static inline __attribute__((always_inline)) __m512i rounded_bits(__m512 x, const int may_be_none)
{
    __m512i bits = _mm512_castps_si512(x), half = _mm512_set1_epi32(0x8000);
    return may_be_none ? _mm512_mask_add_epi32(bits, _mm512_cmp_ps_mask(x, x, _CMP_ORD_Q), bits, half) : _mm512_add_epi32(bits, half);
}

/* Write the parts of two vectors of numbers as a row of pairs, into tiles that lie `step` apart. The first two parts are rounded, the
 * third is exact, and no number where the whole is none. */
static inline __attribute__((always_inline)) void
split(__m512 lower, __m512 upper, struct tile *to, ptrdiff_t step, int row, const int parts)
{
    const __m512i kept = _mm512_set1_epi32(0xffff0000);
    for (int part = 0; part < parts; part++, to += step) {
        __m512i low = part < 2 ? rounded_bits(lower, parts == 2 && part == 0) : _mm512_castps_si512(lower);
        __m512i high = part < 2 ? rounded_bits(upper, parts == 2 && part == 0) : _mm512_castps_si512(upper);
        low = _mm512_and_si512(low, kept);
        high = _mm512_and_si512(high, kept);
        _mm512_store_si512(to->pairs[row], _mm512_or_si512(_mm512_srli_epi32(low, 16), high));
        lower = _mm512_sub_ps(lower, _mm512_castsi512_ps(low));
        upper = _mm512_sub_ps(upper, _mm512_castsi512_ps(high));
    }
}

/* The first rows and columns of A as a block, with zeros beyond them. */
static void take_block(struct factor a, ptrdiff_t rows, ptrdiff_t columns, float (*block)[DEPTH])
{
    if (rows >= SIDE && columns >= DEPTH && a.row_step == 1)
        for (int r = 0; r < SIDE; r += 8)
            for (int j = 0; j < DEPTH; j += 8)
                transpose(a.at + r + j * a.depth_step, a.depth_step, 1, &block[r][j]);
    else
        for (int r = 0; r < SIDE; r++)
            for (int j = 0; j < DEPTH; j++)
                block[r][j] = r < rows && j < columns ? a.at[r * a.row_step + j * a.depth_step] : 0.0f;
}

/* SIDE rows of A, to[depth][part], with zeros where A has fewer rows or less depth. */
static inline __attribute__((always_inline)) void
split_rows(struct factor a, ptrdiff_t rows, ptrdiff_t depth, struct tile *to, const int parts)
{
    for (ptrdiff_t k = 0; k < depth; k += DEPTH, a.at += DEPTH * a.depth_step, to += parts) {
        float block[SIDE][DEPTH];
        const float *from = a.at;
        ptrdiff_t step = a.row_step;
        if (rows < SIDE || depth - k < DEPTH || a.depth_step != 1) {
            take_block(a, rows, depth - k, block);
            from = block[0];
            step = DEPTH;
        }
        for (int r = 0; r < SIDE; r++)
            split(_mm512_loadu_ps(from + r * step), _mm512_loadu_ps(from + r * step + SIDE), to, 1, r, parts);
    }
}

/* A panel of B, to[depth][part][half of the panel], with zeros where it has fewer columns or less depth. */
static inline __attribute__((always_inline)) void
split_panel(const float *panel, ptrdiff_t step, ptrdiff_t columns, ptrdiff_t depth, struct tile *to, const int parts)
{
    uint32_t there = columns < PANEL ? (1u << columns) - 1 : ~0u;
    for (ptrdiff_t k = 0; k < depth; k += DEPTH, to += 2 * parts)
        for (int j = 0; j < SIDE; j++)
            for (int half = 0; half < 2; half++) {
                const float *from = panel + (k + j) * step + half * SIDE;
                __mmask16 mask = there >> half * SIDE;
                split(_mm512_maskz_loadu_ps(k + j < depth ? mask : 0, from),
                      _mm512_maskz_loadu_ps(k + j + SIDE < depth ? mask : 0, from + SIDE * step), to + half, 2, j, parts);
            }
}

/* The unit's registers: 0 .. 3 hold the result, 4 and 5 a part of A's strips, 6 and 7 one of B's panel. */
#define LOAD_A(part) \
    do { \
        _tile_loadd(4, strip[part].pairs, 64); \
        if (tall) \
            _tile_loadd(5, strip[below + part].pairs, 64); \
    } while (0)
#define LOAD_B(part) \
    do { \
        _tile_loadd(6, panel[2 * (part)].pairs, 64); \
        _tile_loadd(7, panel[2 * (part) + 1].pairs, 64); \
    } while (0)
#define MULTIPLY() \
    do { \
        _tile_dpbf16ps(0, 4, 6); \
        _tile_dpbf16ps(1, 4, 7); \
        if (tall) { \
            _tile_dpbf16ps(2, 5, 6); \
            _tile_dpbf16ps(3, 5, 7); \
        } \
    } while (0)
#define RESULT(access) \
    do { \
        access(0, out, bytes); \
        access(1, out + SIDE, bytes); \
        if (tall) { \
            access(2, out + SIDE * out_step, bytes); \
            access(3, out + SIDE * out_step + SIDE, bytes); \
        } \
    } while (0)

/* out = A B, or out + A B where there is something `before`, for a strip of SIDE rows, or two if `tall`, and a panel, both split. */
static inline __attribute__((always_inline)) void
multiply(const struct tile *strip, const struct tile *panel, ptrdiff_t blocks, float *out, ptrdiff_t out_step, int before, const int parts,
         const int tall)
{
    ptrdiff_t below = blocks * parts, bytes = out_step * sizeof *out;
    IN_MEMORY();
    if (before)
        RESULT(_tile_loadd);
    else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (ptrdiff_t k = 0; k < blocks; k++, strip += parts, panel += 2 * parts) {
        /* a1 b3, a1 b2, a1 b1, a2 b1, a2 b2, a3 b1, so that few tiles are loaded twice; with two parts a1 b2, a1 b1, a2 b1 */
        LOAD_A(0);
        if (parts == 3) {
            LOAD_B(2);
            MULTIPLY();
        }
        LOAD_B(1);
        MULTIPLY();
        LOAD_B(0);
        MULTIPLY();
        LOAD_A(1);
        MULTIPLY();
        if (parts == 3) {
            LOAD_B(1);
            MULTIPLY();
            LOAD_A(2);
            LOAD_B(0);
            MULTIPLY();
        }
    }
    RESULT(_tile_stored);
    IN_MEMORY();
}

static ptrdiff_t blocks_of(ptrdiff_t depth)
{
    return round_up(depth, DEPTH) / DEPTH;
}

size_t tiling_bytes(const struct tiling *tiling)
{
    return sizeof(struct tile) * blocks_of(tiling->depth) * tiling->parts * 2 * (round_up(tiling->columns, PANEL) / PANEL + 1);
}

static inline __attribute__((always_inline)) void
tile_panels_in(const struct tiling *tiling, struct panels b, ptrdiff_t columns, const int parts)
{
    ptrdiff_t panel_tiles = 2 * blocks_of(tiling->depth) * parts;
    struct tile *to = (struct tile *)tiling->memory + panel_tiles; /* behind the two strips, which take as much */
    for (ptrdiff_t c = 0; c < tiling->columns; c += PANEL, b.at += b.panel_step, to += panel_tiles)
        split_panel(b.at, b.depth_step, columns - c, tiling->depth, to, parts);
}

static inline __attribute__((always_inline)) void
tile_rows_in(const struct tiling *tiling, struct factor a, ptrdiff_t rows, float *out, ptrdiff_t out_step, int before, const int parts)
{
    ptrdiff_t blocks = blocks_of(tiling->depth), strip_tiles = blocks * parts;
    struct tile *strips = tiling->memory, *panel = strips + 2 * strip_tiles;
    for (ptrdiff_t r = 0; r < rows; r += SIDE, a.at += SIDE * a.row_step)
        split_rows(a, rows - r, tiling->depth, strips + r / SIDE * strip_tiles, parts);
    configure_tiles();
    for (ptrdiff_t c = 0; c < tiling->columns; c += PANEL, out += PANEL, panel += 2 * strip_tiles) {
        ptrdiff_t width = tiling->columns - c < PANEL ? tiling->columns - c : PANEL;
        int whole = width == PANEL && rows % SIDE == 0;
        float edge[TILED_ROWS][PANEL], *to = whole ? out : edge[0];
        for (ptrdiff_t r = 0; !whole && before && r < rows; r++)
            memcpy(edge[r], out + r * out_step, width * sizeof *out);
        if (rows > SIDE)
            multiply(strips, panel, blocks, to, whole ? out_step : PANEL, before, parts, 1);
        else
            multiply(strips, panel, blocks, to, whole ? out_step : PANEL, before, parts, 0);
        for (ptrdiff_t r = 0; !whole && r < rows; r++)
            memcpy(out + r * out_step, edge[r], width * sizeof *out);
    }
    _tile_release();
}

/* Constants let the compiler unroll what is done for every part. */
void tile_panels(const struct tiling *tiling, struct panels b, ptrdiff_t columns)
{
    if (tiling->parts == 3)
        tile_panels_in(tiling, b, columns, 3);
    else
        tile_panels_in(tiling, b, columns, 2);
}

void tile_rows(const struct tiling *tiling, struct factor a, ptrdiff_t rows, float *out, ptrdiff_t out_step, int before)
{
    if (tiling->parts == 3)
        tile_rows_in(tiling, a, rows, out, out_step, before, 3);
    else
        tile_rows_in(tiling, a, rows, out, out_step, before, 2);
}

int tile_product(struct factor a, struct panels b, float *out, ptrdiff_t rows, ptrdiff_t depth, ptrdiff_t columns, int parts)
{
    if (!has_tiles())
        return 0;
    ptrdiff_t deepest = depth < DEEPEST ? depth : DEEPEST, strips = round_up(rows, SIDE) / SIDE, shares = most_threads();
    struct tiling widest = {.depth = deepest, .columns = PANEL, .parts = parts};
    ptrdiff_t panel_bytes = tiling_bytes(&widest) / 2, panels = KEPT / panel_bytes; /* the other half is for rows of A */
    widest.columns = panels * PANEL < columns ? panels * PANEL : columns;
    int failed = 0;
#pragma omp parallel for schedule(static) reduction(| : failed)
    for (ptrdiff_t share = 0; share < shares; share++) {
        ptrdiff_t first = strips * share / shares * SIDE, end = strips * (share + 1) / shares * SIDE;
        if (first == end)
            continue;
        /* Every thread splits the panels for itself: what another core has just written takes as long to come. */
        struct tiling tiling = {.parts = parts, .memory = thread_scratch(tiling_bytes(&widest))};
        failed |= !tiling.memory;
        end = end < rows ? end : rows;
        for (ptrdiff_t k = 0; k < depth && tiling.memory; k += deepest)
            for (ptrdiff_t c = 0; c < columns; c += widest.columns) {
                tiling.depth = depth - k < deepest ? depth - k : deepest;
                tiling.columns = columns - c < widest.columns ? columns - c : widest.columns;
                tile_panels(&tiling, (struct panels){b.at + c / PANEL * b.panel_step + k * b.depth_step, b.panel_step, b.depth_step},
                            tiling.columns);
                for (ptrdiff_t r = first; r < end; r += TILED_ROWS)
                    tile_rows(&tiling, (struct factor){a.at + r * a.row_step + k * a.depth_step, a.row_step, a.depth_step},
                              end - r < TILED_ROWS ? end - r : TILED_ROWS, out + r * columns + c, columns, k > 0);
            }
    }
    return !failed;
}
#else
int has_tiles(void)
{
    return 0;
}

size_t tiling_bytes(const struct tiling *tiling)
{
    return 0;
}

void tile_panels(const struct tiling *tiling, struct panels b, ptrdiff_t columns)
{
}

void tile_rows(const struct tiling *tiling, struct factor a, ptrdiff_t rows, float *out, ptrdiff_t out_step, int before)
{
}

int tile_product(struct factor a, struct panels b, float *out, ptrdiff_t rows, ptrdiff_t depth, ptrdiff_t columns, int parts)
{
    return 0;
}
#endif
