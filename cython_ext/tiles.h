/* Products of a few rows and one block of packed weights, kept in registers, with fused multiply-add: what a BLAS does, without the copies of
 * both operands that it begins with.
 *
 *     out (rows, width) = a (rows, inner; `step` entries from row to row) @ block (inner, width)        rows at most TILE_ROWS
 *
 * for the blocks of dense.pxd, WIDE or, in float32, HALF; width 64 in float32, 32 in float64. Columns from `columns` on may be left as they were.
 * Every entry is one sum over `inner` in its order, each term added with one rounding, whatever the processor and the number of rows: AVX-512
 * and AVX2 give the same bits. Returns 0, with nothing done, on a processor without either; `tile_kind` says which is used, `tile_choose` changes it.
 *
 * A pass over the block takes one vector of columns in either half of it, since a word of bfloat16 holds one column of each: with AVX-512, 28
 * accumulators of 14 rows, so that each vector of weights that is read serves 14 multiplications. Few rows take two such pairs in a pass. The
 * first pass asks for the weights TILE_AHEAD rows on, past the end too: what comes next in memory is the next block. */
#ifndef GROUNDWAVE_TILES_H
#define GROUNDWAVE_TILES_H
#include <stddef.h>

enum { TILE_ROWS = 14, TILE_FEW = 6, TILE_AHEAD = 32 };
enum tile_kinds { TILE_NONE, TILE_AVX2, TILE_AVX512 };

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>

static int tile_best(void) {
    if (__builtin_cpu_supports("avx512f")) return TILE_AVX512;
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? TILE_AVX2 : TILE_NONE;
}

#define TILE_WIDE(mm, kind, scalar, words, at, gap) \
    low[p] = mm##_loadu_##kind((const scalar*)block + i * 2 * gap + at); \
    high[p] = mm##_loadu_##kind((const scalar*)block + i * 2 * gap + gap + at);
#define TILE_HALF_AVX512(mm, kind, scalar, words, at, gap) \
    words word = _mm512_loadu_si512((const unsigned*)block + i * gap + at); \
    low[p] = _mm512_castsi512_ps(_mm512_slli_epi32(word, 16)); \
    high[p] = _mm512_castsi512_ps(_mm512_and_si512(word, _mm512_set1_epi32(-65536)));
#define TILE_HALF_AVX2(mm, kind, scalar, words, at, gap) \
    words word = _mm256_loadu_si256((const __m256i*)((const unsigned*)block + i * gap + at)); \
    low[p] = _mm256_castsi256_ps(_mm256_slli_epi32(word, 16)); \
    high[p] = _mm256_castsi256_ps(_mm256_and_si256(word, _mm256_set1_epi32(-65536)));

#define TILE_WIDE_BYTES 256
#define TILE_HALF_AVX512_BYTES 128
#define TILE_HALF_AVX2_BYTES 128

#define TILE_LOOPS(name, isa, most, scalar, vector, words, mm, kind, READ) \
    __attribute__((target(isa), always_inline)) static inline void name##_rows( \
        const int rows, const int pairs, ptrdiff_t columns, ptrdiff_t inner, const scalar* a, ptrdiff_t step, const void* block, scalar* out) { \
        const ptrdiff_t gap = 128 / sizeof(scalar), lanes = sizeof(vector) / sizeof(scalar); \
        for (ptrdiff_t at = 0; at < gap && at < columns; at += pairs * lanes) { \
            vector first[2][most], second[2][most], low[2], high[2]; \
            _Pragma("GCC unroll 2") for (int p = 0; p < pairs; p++) \
                _Pragma("GCC unroll 14") for (int r = 0; r < rows; r++) first[p][r] = second[p][r] = mm##_setzero_##kind(); \
            for (ptrdiff_t i = 0; i < inner; i++) { \
                if (at == 0) \
                    for (int line = 0; line < READ##_BYTES; line += 64) \
                        __builtin_prefetch((const char*)block + (i + TILE_AHEAD) * READ##_BYTES + line); \
                _Pragma("GCC unroll 2") for (int p = 0; p < pairs; p++) { READ(mm, kind, scalar, words, at + p * lanes, gap) } \
                _Pragma("GCC unroll 14") for (int r = 0; r < rows; r++) { \
                    vector x = mm##_set1_##kind(a[r * step + i]); \
                    _Pragma("GCC unroll 2") for (int p = 0; p < pairs; p++) { \
                        first[p][r] = mm##_fmadd_##kind(x, low[p], first[p][r]); \
                        second[p][r] = mm##_fmadd_##kind(x, high[p], second[p][r]); \
                    } \
                } \
            } \
            _Pragma("GCC unroll 2") for (int p = 0; p < pairs; p++) \
                _Pragma("GCC unroll 14") for (int r = 0; r < rows; r++) { \
                    mm##_storeu_##kind(out + r * 2 * gap + at + p * lanes, first[p][r]); \
                    mm##_storeu_##kind(out + r * 2 * gap + gap + at + p * lanes, second[p][r]); \
                } \
        } \
    } \
    __attribute__((target(isa))) static void name( \
        int rows, ptrdiff_t columns, ptrdiff_t inner, const scalar* a, ptrdiff_t step, const void* block, scalar* out) { \
        for (; rows > 0; rows -= most, a += most * step, out += most * (256 / sizeof(scalar))) \
            switch (rows < most ? rows : most) { TILE_CASES_##most(name) } \
    }

#define TILE_CASE(name, n, pairs) case n: name##_rows(n, pairs, columns, inner, a, step, block, out); break;
#define TILE_CASES_6(name) \
    TILE_CASE(name, 1, 2) TILE_CASE(name, 2, 2) TILE_CASE(name, 3, 1) TILE_CASE(name, 4, 1) TILE_CASE(name, 5, 1) TILE_CASE(name, 6, 1)
#define TILE_CASES_14(name) \
    TILE_CASE(name, 1, 2) TILE_CASE(name, 2, 2) TILE_CASE(name, 3, 2) TILE_CASE(name, 4, 2) TILE_CASE(name, 5, 2) TILE_CASE(name, 6, 2) \
    TILE_CASE(name, 7, 1) TILE_CASE(name, 8, 1) TILE_CASE(name, 9, 1) TILE_CASE(name, 10, 1) TILE_CASE(name, 11, 1) TILE_CASE(name, 12, 1) \
    TILE_CASE(name, 13, 1) TILE_CASE(name, 14, 1)

TILE_LOOPS(tile_float_avx512, "avx512f", 14, float, __m512, int, _mm512, ps, TILE_WIDE)
TILE_LOOPS(tile_half_avx512, "avx512f", 14, float, __m512, __m512i, _mm512, ps, TILE_HALF_AVX512)
TILE_LOOPS(tile_double_avx512, "avx512f", 14, double, __m512d, int, _mm512, pd, TILE_WIDE)
TILE_LOOPS(tile_float_avx2, "avx2,fma", 6, float, __m256, int, _mm256, ps, TILE_WIDE)
TILE_LOOPS(tile_half_avx2, "avx2,fma", 6, float, __m256, __m256i, _mm256, ps, TILE_HALF_AVX2)
TILE_LOOPS(tile_double_avx2, "avx2,fma", 6, double, __m256d, int, _mm256, pd, TILE_WIDE)

#define TILE_CALL(name) name(rows, columns, inner, a, step, block, out)
#else
static int tile_best(void) { return TILE_NONE; }
#define TILE_CALL(name) (void)0
#endif

static int tile_chosen = -1;

static inline int tile_kind(void) { return tile_chosen < 0 ? tile_chosen = tile_best() : tile_chosen; }

static void tile_choose(int kind) { tile_chosen = kind; }

/* Rows to be taken at a time: those that lie a multiple of 4,096 bytes apart share the eight lines of one set of the first cache. */
static inline int tile_rows(size_t bytes) { return bytes % 4096 ? TILE_ROWS : TILE_FEW; }

static int tile_float(
    int half, int rows, ptrdiff_t columns, ptrdiff_t inner, const float* a, ptrdiff_t step, const void* block, float* out) {
    switch (tile_kind()) {
        case TILE_AVX512: if (half) TILE_CALL(tile_half_avx512); else TILE_CALL(tile_float_avx512); return 1;
        case TILE_AVX2: if (half) TILE_CALL(tile_half_avx2); else TILE_CALL(tile_float_avx2); return 1;
        default: return 0;
    }
}

static int tile_double(int rows, ptrdiff_t columns, ptrdiff_t inner, const double* a, ptrdiff_t step, const void* block, double* out) {
    switch (tile_kind()) {
        case TILE_AVX512: TILE_CALL(tile_double_avx512); return 1;
        case TILE_AVX2: TILE_CALL(tile_double_avx2); return 1;
        default: return 0;
    }
}
#endif
