// Products of few rows with the matrices of many experts, each matrix read (or written) once.
//
// A matrix product that expects many rows copies the matrix into an order of its own first; where an expert has 1 to 32 rows, that copy is most of
// the work. Here the rows are copied instead, into columns of 16 numbers, one vector register each, and the matrix is read as it lies.
//
// Everything is row-major. `Number` is float or bfloat16; sums are float. An expert's rows are [start, end) of `rows`; all groups have 1 to 32 rows.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>

#include <immintrin.h>

namespace {

constexpr int64_t LANES = 16;     // numbers in a vector register
constexpr int64_t MOST_ROWS = 32; // of a group
constexpr int64_t BLOCK = 8;      // rows of a matrix at a time: as many sums in registers for each vector of columns
constexpr int64_t TILE = 256;     // numbers of a row at a time, where sums over rows of the matrix stay in the nearest cache
constexpr int64_t TASK = 64;      // rows of a matrix that one thread takes at a time

typedef float Vector __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint16_t Halves __attribute__((vector_size(32), aligned(2), may_alias));
typedef uint32_t Words __attribute__((vector_size(64), aligned(4), may_alias));

struct bfloat16 {
    uint16_t bits;
};

struct Group {
    int64_t expert, start, end;
};

inline Vector load(const float *from) { return *(const Vector *)from; }

inline Vector load(const bfloat16 *from) {
    return (Vector)(__builtin_convertvector(*(const Halves *)from, Words) << 16);
}

inline void store(float *to, Vector value) { *(Vector *)to = value; }


// To the nearest, ties to even, as torch does; what is not a number stays so.
inline void store(bfloat16 *to, Vector value) {
    Words bits = (Words)value;
    Words rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
    Words unordered = (Words)(value != value);
    rounded = (rounded & ~unordered) | (0x7FC0 & unordered);
    *(Halves *)to = __builtin_convertvector(rounded, Halves);
}

// Past the caches: what is only written need not be read into them first, and drives nothing out of them. `to` is aligned to the vector.
inline void stream(float *to, Vector value) { _mm512_stream_ps(to, (__m512)value); }

inline void stream(bfloat16 *to, Vector value) {
    Halves halves;
    store((bfloat16 *)&halves, value);
    _mm256_stream_si256((__m256i *)to, (__m256i)halves);
}

template <class Number> inline bool may_stream(const Number *to, int64_t stride) {
    return stride % LANES == 0 && uintptr_t(to) % (LANES * sizeof(Number)) == 0;
}

inline float read(float value) { return value; }

inline float read(bfloat16 value) {
    uint32_t bits = uint32_t(value.bits) << 16;
    float found;
    std::memcpy(&found, &bits, 4);
    return found;
}

inline void write(float *to, float value) { *to = value; }

inline void write(bfloat16 *to, float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    to->bits = value != value ? 0x7FC0 : uint16_t((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

inline int64_t width_of(const Group &group) { return group.end - group.start > LANES ? 2 * LANES : LANES; }

// A group's rows as columns: [size, width], with zeros beyond the rows that there are.
template <class Number> void put_in_columns(const Number *rows, const Group &group, int64_t size, float *columns) {
    const int64_t width = width_of(group), count = group.end - group.start;
    for (int64_t first = 0; first < size; first += LANES) {
        const int64_t last = std::min(first + LANES, size);
        for (int64_t row = 0; row < width; row++) {
            const Number *from = rows + (group.start + row) * size;
            for (int64_t at = first; at < last; at++)
                columns[at * width + row] = row < count ? read(from[at]) : 0.0f;
        }
    }
}

struct Columns {
    std::unique_ptr<float[]> memory;
    int64_t size;

    Columns(int64_t groups, int64_t size) : memory(new float[groups * size * MOST_ROWS + LANES]), size(size) {}

    float *of(int64_t group) {
        float *start = memory.get() + group * size * MOST_ROWS;
        return (float *)((uintptr_t(start) + 63) / 64 * 64);
    }
};

// `COUNT` rows of a matrix times columns: sums [COUNT, VECTORS].
template <int VECTORS, int COUNT>
inline void sums_of(const float *matrix, int64_t stride, const float *columns, int64_t size, Vector (&found)[COUNT][VECTORS]) {
    Vector sums[COUNT][VECTORS]; // A copy, so that the compiler keeps it in registers.
    std::memcpy(sums, found, sizeof sums);
    for (int64_t at = 0; at < size; at++) {
        Vector column[VECTORS];
#pragma GCC unroll 2
        for (int v = 0; v < VECTORS; v++)
            column[v] = load(columns + (at * VECTORS + v) * LANES);
#pragma GCC unroll 16
        for (int row = 0; row < COUNT; row++) {
            const float one = matrix[row * stride + at];
#pragma GCC unroll 2
            for (int v = 0; v < VECTORS; v++)
                sums[row][v] += column[v] * one;
        }
    }
    std::memcpy(found, sums, sizeof sums);
}

template <int VECTORS, int COUNT>
inline void sums_of(const bfloat16 *matrix, int64_t stride, const float *columns, int64_t size, Vector (&sums)[COUNT][VECTORS]) {
    alignas(64) float tile[COUNT * TILE];
    for (int64_t first = 0; first < size; first += TILE) {
        const int64_t count = std::min(TILE, size - first);
        for (int row = 0; row < COUNT; row++) {
            const bfloat16 *from = matrix + row * stride + first;
            int64_t at = 0;
            for (; at + LANES <= count; at += LANES)
                store(tile + row * TILE + at, load(from + at));
            for (; at < count; at++)
                tile[row * TILE + at] = read(from[at]);
        }
        sums_of<VECTORS, COUNT>(tile, TILE, columns + first * VECTORS * LANES, count, sums);
    }
}

template <class Number, int VECTORS, int COUNT>
void block_times_columns(const Number *matrix, const float *columns, int64_t size, Number *out, int64_t stride, int64_t rows) {
    Vector sums[COUNT][VECTORS] = {};
    sums_of<VECTORS, COUNT>(matrix, size, columns, size, sums);
    for (int64_t row = 0; row < rows; row++)
        for (int at = 0; at < COUNT; at++)
            write(out + row * stride + at, sums[at][row / LANES][row % LANES]);
}

template <class Number, int VECTORS>
void rows_of_matrix(const Number *matrix, const float *columns, int64_t size, Number *out, int64_t stride, int64_t rows, int64_t from, int64_t to) {
    int64_t at = from;
    for (; at + BLOCK <= to; at += BLOCK)
        block_times_columns<Number, VECTORS, BLOCK>(matrix + at * size, columns, size, out + at, stride, rows);
    for (; at < to; at++)
        block_times_columns<Number, VECTORS, 1>(matrix + at * size, columns, size, out + at, stride, rows);
}

// out[row, n] = sum over k of rows[row, k] matrices[expert, n, k]
template <class Number>
void times_transposed(const Number *rows, const Number *matrices, Number *out, const Group *groups, int64_t count, int64_t results, int64_t size, int threads) {
    Columns columns(count, size);
    const int64_t tasks = (results + TASK - 1) / TASK;
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(dynamic)
        for (int64_t group = 0; group < count; group++)
            put_in_columns(rows, groups[group], size, columns.of(group));
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < count * tasks; task++) {
            const Group &group = groups[task / tasks];
            const int64_t from = task % tasks * TASK, to = std::min(from + TASK, results);
            const Number *matrix = matrices + group.expert * results * size;
            auto run = width_of(group) > LANES ? rows_of_matrix<Number, 2> : rows_of_matrix<Number, 1>;
            run(matrix, columns.of(task / tasks), size, out + group.start * results, results, group.end - group.start, from, to);
        }
    }
}

// `COUNT` rows of a matrix, each times its number of every column, onto sums [rows, TILE].
template <class Number, int COUNT>
inline void add_rows(const Number *matrix, int64_t stride, const float *columns, int64_t width, int64_t rows, int64_t from, int64_t to, float *sums) {
    for (int64_t at = from; at + LANES <= to; at += LANES) {
        Vector part[COUNT];
#pragma GCC unroll 8
        for (int row = 0; row < COUNT; row++) {
            part[row] = load(matrix + row * stride + at);
            __builtin_prefetch(matrix + (row + COUNT) * stride + at);
        }
        float *here = sums + (at - from);
        for (int64_t row = 0; row < rows; row += 4) {
            Vector sum[4];
#pragma GCC unroll 4
            for (int r = 0; r < 4; r++)
                sum[r] = load(here + (row + r) * TILE);
#pragma GCC unroll 8
            for (int one = 0; one < COUNT; one++)
#pragma GCC unroll 4
                for (int r = 0; r < 4; r++)
                    sum[r] += part[one] * columns[one * width + row + r];
#pragma GCC unroll 4
            for (int r = 0; r < 4; r++)
                store(here + (row + r) * TILE, sum[r]);
        }
    }
    for (int64_t at = to - (to - from) % LANES; at < to; at++)
        for (int one = 0; one < COUNT; one++)
            for (int64_t row = 0; row < rows; row++)
                sums[row * TILE + at - from] += read(matrix[one * stride + at]) * columns[one * width + row];
}

// out[row, k] = sum over n of rows[row, n] matrices[expert, n, k]
template <class Number>
void times(const Number *rows, const Number *matrices, Number *out, const Group *groups, int64_t count, int64_t size, int64_t results, int threads) {
    Columns columns(count, size);
    const int64_t tasks = (results + TILE - 1) / TILE;
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(dynamic)
        for (int64_t group = 0; group < count; group++)
            put_in_columns(rows, groups[group], size, columns.of(group));
        alignas(64) float sums[MOST_ROWS * TILE];
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < count * tasks; task++) {
            // From the last to the first: the forward pass left the last in the caches.
            const int64_t number = count - 1 - task / tasks;
            const Group &group = groups[number];
            const int64_t here = group.end - group.start, width = width_of(group), filled = (here + 3) / 4 * 4;
            const int64_t from = task % tasks * TILE, to = std::min(from + TILE, results);
            const Number *matrix = matrices + group.expert * size * results;
            const float *factors = columns.of(number);
            std::fill(sums, sums + filled * TILE, 0.0f);
            int64_t at = 0;
            for (; at + BLOCK <= size; at += BLOCK)
                add_rows<Number, BLOCK>(matrix + at * results, results, factors + at * width, width, filled, from, to, sums);
            for (; at < size; at++)
                add_rows<Number, 1>(matrix + at * results, results, factors + at * width, width, filled, from, to, sums);
            for (int64_t row = 0; row < here; row++)
                for (int64_t k = from; k < to; k++)
                    write(out + (group.start + row) * results + k, sums[row * TILE + k - from]);
        }
    }
}

template <class Number, int COUNT>
inline void outer_block(const float *columns, int64_t width, const float *right, int64_t rows, int64_t from, int64_t to, Number *out, int64_t stride, bool streams) {
    int64_t at = from;
    for (; at + 2 * LANES <= to; at += 2 * LANES) {
        Vector sums[COUNT][2] = {};
        for (int64_t row = 0; row < rows; row++) {
            const Vector one = load(right + row * TILE + at - from), two = load(right + row * TILE + at + LANES - from);
#pragma GCC unroll 8
            for (int each = 0; each < COUNT; each++) {
                const float factor = columns[each * width + row];
                sums[each][0] += one * factor;
                sums[each][1] += two * factor;
            }
        }
#pragma GCC unroll 8
        for (int each = 0; each < COUNT; each++) {
            Number *to = out + each * stride + at;
            if (streams) {
                stream(to, sums[each][0]);
                stream(to + LANES, sums[each][1]);
            } else {
                store(to, sums[each][0]);
                store(to + LANES, sums[each][1]);
            }
        }
    }
    for (; at < to; at++)
        for (int one = 0; one < COUNT; one++) {
            float sum = 0;
            for (int64_t row = 0; row < rows; row++)
                sum += right[row * TILE + at - from] * columns[one * width + row];
            write(out + one * stride + at, sum);
        }
}

// out[expert, n, k] = sum over the expert's rows of left[row, n] right[row, k]
template <class Number>
void transposed_times(const Number *left, const Number *right, Number *out, const Group *groups, int64_t count, int64_t results, int64_t size, int threads) {
    Columns columns(count, results);
    const int64_t tasks = (results + TASK - 1) / TASK;
    const bool streams = may_stream(out, size);
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(dynamic)
        for (int64_t group = 0; group < count; group++)
            put_in_columns(left, groups[group], results, columns.of(group));
        alignas(64) float tile[MOST_ROWS * TILE];
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < count * tasks; task++) {
            const Group &group = groups[task / tasks];
            const int64_t here = group.end - group.start, width = width_of(group);
            const int64_t first = task % tasks * TASK, last = std::min(first + TASK, results);
            const float *factors = columns.of(task / tasks);
            Number *matrix = out + group.expert * results * size;
            for (int64_t from = 0; from < size; from += TILE) {
                const int64_t to = std::min(from + TILE, size);
                for (int64_t row = 0; row < here; row++)
                    for (int64_t k = from; k < to; k++)
                        tile[row * TILE + k - from] = read(right[(group.start + row) * size + k]);
                int64_t at = first;
                for (; at + BLOCK <= last; at += BLOCK)
                    outer_block<Number, BLOCK>(factors + at * width, width, tile, here, from, to, matrix + at * size, size, streams);
                for (; at < last; at++)
                    outer_block<Number, 1>(factors + at * width, width, tile, here, from, to, matrix + at * size, size, streams);
            }
        }
        _mm_sfence(); // What was streamed is seen by all threads.
    }
}

} // namespace

#define EXPORT(name)                                                                                                                                          \
    extern "C" void name##_float(const float *a, const float *b, float *out, const Group *groups, int64_t count, int64_t first, int64_t second, int threads) { \
        name(a, b, out, groups, count, first, second, threads);                                                                                               \
    }                                                                                                                                                         \
    extern "C" void name##_bfloat16(const bfloat16 *a, const bfloat16 *b, bfloat16 *out, const Group *groups, int64_t count, int64_t first, int64_t second, int threads) { \
        name(a, b, out, groups, count, first, second, threads);                                                                                               \
    }

EXPORT(times_transposed)
EXPORT(times)
EXPORT(transposed_times)
