/* Products of dense matrices, float32 on a CPU, in the sizes of a layer and a batch: three quarters of the time of a library that scales
 * the result first and copies both factors. */
#include "native.h"

#include <string.h>

#define VECTORS (PANEL / LANES)
#define ROWS (LANES == 16 ? 10 : 3) /* of the result that stay in the processor's registers, a panel wide */
#define TILES_FROM_ROWS 96 /* of the result: with fewer, splitting B takes longer than tiles shorten the product */
#define TILES_FROM_DEPTH 32

/* out = A B for ROWS rows and vectors * LANES columns of the result. A constant row_step spares a register, or a load, for every row. */
static inline __attribute__((always_inline)) void
tile(const float *a, ptrdiff_t row_step, ptrdiff_t depth_step, const float *b, ptrdiff_t b_step, ptrdiff_t depth, float *out,
     ptrdiff_t columns, const int vectors)
{
    vector sum[ROWS][VECTORS] = {{{0}}};
    for (ptrdiff_t k = 0; k < depth; k++) {
        const vector *row = (const vector *)(b + k * b_step);
        for (int r = 0; r < ROWS; r++)
            for (int v = 0; v < vectors; v++)
                sum[r][v] += row[v] * a[r * row_step + k * depth_step];
    }
    for (int r = 0; r < ROWS; r++)
        for (int v = 0; v < vectors; v++)
            ((vector *)(out + r * columns))[v] = sum[r][v]; /* memcpy would keep all sums in memory */
}

#define TILE(out, columns, vectors) \
    (these.row_step == 1 ? tile(these.at, 1, these.depth_step, panel, b.depth_step, depth, out, columns, vectors) \
                         : tile(these.at, these.row_step, these.depth_step, panel, b.depth_step, depth, out, columns, vectors))

/* The same for any number of rows and columns. */
static void corner(struct factor a, const float *b, ptrdiff_t b_step, ptrdiff_t depth, float *out, ptrdiff_t columns, ptrdiff_t rows,
                   ptrdiff_t width)
{
    for (ptrdiff_t r = 0; r < rows; r++) {
        float sum[PANEL] = {0};
        for (ptrdiff_t k = 0; k < depth; k++)
            for (ptrdiff_t j = 0; j < width; j++)
                sum[j] += a.at[r * a.row_step + k * a.depth_step] * b[k * b_step + j];
        memcpy(out + r * columns, sum, width * sizeof *sum);
    }
}

void vector_product(struct factor a, struct panels b, float *out, ptrdiff_t rows, ptrdiff_t depth, ptrdiff_t columns)
{
#pragma omp parallel for
    for (ptrdiff_t r = 0; r < rows; r += ROWS) {
        struct factor these = {a.at + r * a.row_step, a.row_step, a.depth_step};
        ptrdiff_t height = rows - r < ROWS ? rows - r : ROWS;
        for (ptrdiff_t first = 0; first < columns; first += PANEL) {
            const float *panel = b.at + first / PANEL * b.panel_step;
            float *to = out + r * columns + first;
            ptrdiff_t width = columns - first < PANEL ? columns - first : PANEL;
            if (height == ROWS && width == PANEL)
                TILE(to, columns, VECTORS);
            else if (height == ROWS && width == PANEL / 2)
                TILE(to, columns, VECTORS / 2);
            else if (height == ROWS && b.depth_step == PANEL) { /* packed, with zeros behind the last column */
                float all[ROWS * PANEL];
                TILE(all, PANEL, VECTORS);
                for (int i = 0; i < ROWS; i++)
                    memcpy(to + i * columns, all + i * PANEL, width * sizeof *to);
            } else
                corner(these, panel, b.depth_step, depth, to, columns, height, width);
        }
    }
}

void dense_product(struct factor a, struct panels b, float *out, ptrdiff_t rows, ptrdiff_t depth, ptrdiff_t columns, int parts)
{
    if (rows < TILES_FROM_ROWS || depth < TILES_FROM_DEPTH || !tile_product(a, b, out, rows, depth, columns, parts))
        vector_product(a, b, out, rows, depth, columns);
}
