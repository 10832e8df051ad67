// SwiGLU experts for few tokens, forward and backward: each expert's matrices are read, and their gradients written,
// once. For many tokens, what is between their matrix products.
//
// A matrix product that expects many rows copies the matrix into an order of its own first; where an expert has 1 to 64
// tokens, that copy is most of the work. Here the tokens are copied instead, into columns: [size, width] with a width
// of 16 to 64 tokens, one to four vector registers, zeros beyond the tokens that there are. The matrices are read as
// they lie. What is between two products stays in columns.
//
// Matrices are row-major. `Number` is float or bfloat16; sums, and all that is in columns, are float. A group is the
// rows [start, end) of one expert, 1 to 64.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>

#include <immintrin.h>

namespace kernels {

constexpr int64_t LANES = 16;     // numbers in a vector register
constexpr int64_t MOST_ROWS = 64; // of a group
constexpr int64_t BLOCK = 8;      // rows of a matrix at a time
constexpr int64_t TILE = 256;     // numbers of a row at a time, where their sums stay in the nearest caches
constexpr int64_t TASK = 64;      // rows of a matrix that one thread takes at a time
constexpr int64_t LINE = 32;      // bfloat16 numbers in a line of the caches
constexpr int64_t VERY_FEW = 8;   // rows of a group that are no columns where nothing is kept

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

// Past the caches: what is only written need not be read into them first, and drives nothing out of them. `to` is
// aligned to the vector.
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

// exp: 2^n times the Taylor polynomial of the rest, which is at most ln(2) / 2 and leaves 1e-8 of the sum; infinite
// from 89 on. What is not a number stays so: of two that cannot be compared, min and max give the second.
inline Vector exponential(Vector x) {
    const __m512 bounded = _mm512_min_ps(_mm512_set1_ps(89.0f), _mm512_max_ps(_mm512_set1_ps(-87.0f), (__m512)x));
    const __m512 whole = _mm512_roundscale_ps(_mm512_mul_ps(bounded, _mm512_set1_ps(1.44269504f)),
                                              _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    // ln(2) in two parts, of which the first times `whole` is exact.
    __m512 rest = _mm512_fnmadd_ps(whole, _mm512_set1_ps(0.693145751953125f), bounded);
    rest = _mm512_fnmadd_ps(whole, _mm512_set1_ps(1.42860682e-6f), rest);
    __m512 sum = _mm512_set1_ps(1.0f / 5040);
    for (float factor : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 1.0f / 2, 1.0f, 1.0f})
        sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(factor));
    return (Vector)_mm512_scalef_ps(sum, whole);
}

inline Vector sigmoid(Vector x) { return 1.0f / (1.0f + exponential(-x)); }

struct Problem {
    const Group *groups;
    const int64_t *tokens; // of each row
    int64_t count, hidden, intermediate;
    int threads;

    int64_t rows(int64_t group) const { return groups[group].end - groups[group].start; }
    int64_t vectors(int64_t group) const { return (rows(group) + LANES - 1) / LANES; }
    int64_t width(int64_t group) const { return vectors(group) * LANES; }
};

// Columns of every group, one after the other.
struct Columns {
    std::unique_ptr<float[]> memory;
    std::unique_ptr<int64_t[]> starts;
    float *aligned;

    Columns(const Problem &problem, int64_t size) : starts(new int64_t[problem.count + 1]) {
        starts[0] = 0;
        for (int64_t group = 0; group < problem.count; group++)
            starts[group + 1] = starts[group] + size * problem.width(group);
        memory.reset(new float[starts[problem.count] + LANES]);
        aligned = (float *)((uintptr_t(memory.get()) + 63) / 64 * 64);
    }

    float *of(int64_t group) { return aligned + starts[group]; }
};

// A group's tokens as columns, each times its weight where there are any.
template <class Number>
void put_in_columns(const Number *tokens, const float *weights, const Problem &problem, int64_t number, int64_t size,
                    float *columns) {
    const Group &group = problem.groups[number];
    const int64_t width = problem.width(number), count = group.end - group.start;
    for (int64_t first = 0; first < size; first += LANES) {
        const int64_t last = std::min(first + LANES, size);
        for (int64_t row = 0; row < count; row++) {
            const Number *from = tokens + problem.tokens[group.start + row] * size;
            const float weight = weights ? weights[group.start + row] : 1.0f;
            for (int64_t at = first; at < last; at++)
                columns[at * width + row] = read(from[at]) * weight;
        }
        for (int64_t row = count; row < width; row++)
            for (int64_t at = first; at < last; at++)
                columns[at * width + row] = 0.0f;
    }
}

template <class Number>
void put_in_rows(const Number *tokens, const Problem &problem, int64_t number, int64_t size, float *rows) {
    const Group &group = problem.groups[number];
    for (int64_t row = group.start; row < group.end; row++, rows += size)
        for (int64_t at = 0; at < size; at++)
            rows[at] = read(tokens[problem.tokens[row] * size + at]);
}

// `COUNT` rows of a matrix times columns: sums [COUNT, VECTORS].
template <int VECTORS, int COUNT>
inline void sums_of(const float *matrix, int64_t stride, const float *columns, int64_t size,
                    Vector (&found)[COUNT][VECTORS]) {
    Vector sums[COUNT][VECTORS]; // A copy, so that the compiler keeps it in registers.
    std::memcpy(sums, found, sizeof sums);
    for (int64_t at = 0; at < size; at++) {
        Vector column[VECTORS];
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++)
            column[v] = load(columns + (at * VECTORS + v) * LANES);
#pragma GCC unroll 16
        for (int row = 0; row < COUNT; row++) {
            const float one = matrix[row * stride + at];
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; v++)
                sums[row][v] += column[v] * one;
        }
    }
    std::memcpy(found, sums, sizeof sums);
}

template <int VECTORS, int COUNT>
inline void sums_of(const bfloat16 *matrix, int64_t stride, const float *columns, int64_t size,
                    Vector (&sums)[COUNT][VECTORS]) {
    alignas(64) float tile[COUNT * TILE];
    for (int64_t first = 0; first < size; first += TILE) {
        const int64_t count = std::min(TILE, size - first);
        for (int row = 0; row < COUNT; row++) {
            const bfloat16 *from = matrix + row * stride + first;
            const bfloat16 *next = first + TILE < size ? from + TILE : matrix + (row + COUNT) * stride;
            for (int64_t ahead = 0; ahead < TILE; ahead += LINE)
                __builtin_prefetch(next + ahead);
            int64_t at = 0;
            for (; at + LANES <= count; at += LANES)
                store(tile + row * TILE + at, load(from + at));
            for (; at < count; at++)
                tile[row * TILE + at] = read(from[at]);
        }
        sums_of<VECTORS, COUNT>(tile, TILE, columns + first * VECTORS * LANES, count, sums);
    }
}

// Both halves of `COUNT` units, and the units: silu(gate) * up. `halves`: [2 * intermediate, width]; `units`:
// [intermediate, width].
template <class Number, int VECTORS, int COUNT>
void units_of(const Number *into, const float *columns, int64_t hidden, int64_t intermediate, int64_t at, float *halves,
              float *units) {
    constexpr int64_t WIDTH = VECTORS * LANES;
    Vector gates[COUNT][VECTORS] = {}, ups[COUNT][VECTORS] = {};
    sums_of<VECTORS, COUNT>(into + at * hidden, hidden, columns, hidden, gates);
    sums_of<VECTORS, COUNT>(into + (intermediate + at) * hidden, hidden, columns, hidden, ups);
    for (int row = 0; row < COUNT; row++)
        for (int v = 0; v < VECTORS; v++) {
            const Vector gate = gates[row][v], up = ups[row][v];
            if (halves) {
                store(halves + (at + row) * WIDTH + v * LANES, gate);
                store(halves + (intermediate + at + row) * WIDTH + v * LANES, up);
            }
            store(units + (at + row) * WIDTH + v * LANES, gate * sigmoid(gate) * up);
        }
}

// What `COUNT` rows of a matrix give for columns, as rows: out[row, at] for the group's rows.
template <class Number, int VECTORS, int COUNT>
void rows_of(const Number *matrix, const float *columns, int64_t size, int64_t at, Number *out, int64_t stride,
             int64_t rows) {
    Vector sums[COUNT][VECTORS] = {};
    sums_of<VECTORS, COUNT>(matrix + at * size, size, columns, size, sums);
    for (int64_t row = 0; row < rows; row++)
        for (int one = 0; one < COUNT; one++)
            write(out + row * stride + at + one, sums[one][row / LANES][row % LANES]);
}

// Rows of a matrix at a time: sums for all of them and all vectors of columns stay in the registers.
template <int VECTORS> constexpr int64_t AT_A_TIME = VECTORS > 2 ? BLOCK / 2 : BLOCK;

template <class Number, int VECTORS>
void units_between(const Number *into, const float *columns, const Problem &problem, int64_t from, int64_t to,
                   float *halves, float *units) {
    constexpr int64_t COUNT = AT_A_TIME<VECTORS>;
    for (; from + COUNT <= to; from += COUNT)
        units_of<Number, VECTORS, COUNT>(into, columns, problem.hidden, problem.intermediate, from, halves, units);
    for (; from < to; from++)
        units_of<Number, VECTORS, 1>(into, columns, problem.hidden, problem.intermediate, from, halves, units);
}

template <class Number, int VECTORS>
void rows_between(const Number *out, const float *units, const Problem &problem, int64_t from, int64_t to, Number *said,
                  int64_t rows) {
    constexpr int64_t COUNT = AT_A_TIME<VECTORS>;
    for (; from + COUNT <= to; from += COUNT)
        rows_of<Number, VECTORS, COUNT>(out, units, problem.intermediate, from, said, problem.hidden, rows);
    for (; from < to; from++)
        rows_of<Number, VECTORS, 1>(out, units, problem.intermediate, from, said, problem.hidden, rows);
}

// Numbers `at` to `at + LANES` of a row, or those that there are.
struct Whole {
    int64_t at;

    template <class Number> Vector load(const Number *row) const { return kernels::load(row + at); }
    template <class Number> void store(Number *row, Vector value) const { kernels::store(row + at, value); }
};

struct Rest {
    int64_t at, count;

    template <class Number> Vector load(const Number *row) const {
        alignas(64) float numbers[LANES] = {};
        for (int64_t one = 0; one < count; one++)
            numbers[one] = read(row[at + one]);
        return kernels::load(numbers);
    }
    template <class Number> void store(Number *row, Vector value) const {
        for (int64_t one = 0; one < count; one++)
            write(row + at + one, value[one]);
    }
};

template <class Function> inline void each_vector(int64_t size, Function function) {
    int64_t at = 0;
    for (; at + LANES <= size; at += LANES)
        function(Whole{at});
    if (at < size)
        function(Rest{at, size - at});
}

inline float sum_of(Vector value) { return _mm512_reduce_add_ps((__m512)value); }

// Dot products of `COUNT` rows of a matrix with `ROWS` rows of numbers, each row `stride` after the one before: found
// [COUNT][ROWS]. Where rows are very few, columns would be mostly zeros.
template <class Number, int COUNT, int ROWS>
inline void dots_of(const Number *matrix, const float *rows, int64_t size, float (&found)[COUNT][ROWS]) {
    Vector sums[COUNT][ROWS] = {};
    int64_t at = 0;
    for (; at + LANES <= size; at += LANES) {
        Vector part[ROWS];
#pragma GCC unroll 8
        for (int row = 0; row < ROWS; row++)
            part[row] = load(rows + row * size + at);
#pragma GCC unroll 8
        for (int one = 0; one < COUNT; one++) {
            const Vector weights = load(matrix + one * size + at);
#pragma GCC unroll 8
            for (int row = 0; row < ROWS; row++)
                sums[one][row] += weights * part[row];
        }
    }
    for (int one = 0; one < COUNT; one++)
        for (int row = 0; row < ROWS; row++) {
            found[one][row] = sum_of(sums[one][row]);
            for (int64_t rest = at; rest < size; rest++)
                found[one][row] += read(matrix[one * size + rest]) * rows[row * size + rest];
        }
}

// The same for rows `from` to `to` of a matrix: found [ROWS, TASK].
template <class Number, int ROWS>
void dots_between(const Number *matrix, const float *rows, int64_t size, int64_t from, int64_t to, float *found) {
    constexpr int COUNT = ROWS > 4 ? 2 : 4;
    int64_t at = from;
    for (; at + COUNT <= to; at += COUNT) {
        float sums[COUNT][ROWS];
        dots_of<Number, COUNT, ROWS>(matrix + at * size, rows, size, sums);
        for (int one = 0; one < COUNT; one++)
            for (int row = 0; row < ROWS; row++)
                found[row * TASK + at + one - from] = sums[one][row];
    }
    for (; at < to; at++) {
        float sums[1][ROWS];
        dots_of<Number, 1, ROWS>(matrix + at * size, rows, size, sums);
        for (int row = 0; row < ROWS; row++)
            found[row * TASK + at - from] = sums[0][row];
    }
}

template <class Number>
void dots(int64_t count, const Number *matrix, const float *rows, int64_t size, int64_t from, int64_t to,
          float *found) {
    const decltype(&dots_between<Number, 1>) runs[VERY_FEW] = {
        dots_between<Number, 1>, dots_between<Number, 2>, dots_between<Number, 3>, dots_between<Number, 4>,
        dots_between<Number, 5>, dots_between<Number, 6>, dots_between<Number, 7>, dots_between<Number, 8>};
    runs[count - 1](matrix, rows, size, from, to, found);
}

// As `units_between` and `rows_between`, from rows [count, hidden] to rows.
template <class Number>
void dot_units(int64_t count, const Number *into, const float *rows, const Problem &problem, int64_t from, int64_t to,
               float *units) {
    float gates[VERY_FEW * TASK], ups[VERY_FEW * TASK];
    dots(count, into, rows, problem.hidden, from, to, gates);
    dots(count, into + problem.intermediate * problem.hidden, rows, problem.hidden, from, to, ups);
    for (int64_t row = 0; row < count; row++)
        each_vector(to - from, [&](auto at) {
            const Vector gate = at.load(gates + row * TASK);
            at.store(units + row * problem.intermediate + from, gate * sigmoid(gate) * at.load(ups + row * TASK));
        });
}

template <class Number>
void dot_rows(int64_t count, const Number *out, const float *units, const Problem &problem, int64_t from, int64_t to,
              Number *said) {
    float found[VERY_FEW * TASK];
    dots(count, out, units, problem.intermediate, from, to, found);
    for (int64_t row = 0; row < count; row++)
        each_vector(to - from,
                    [&](auto at) { at.store(said + row * problem.hidden + from, at.load(found + row * TASK)); });
}

// said[row] = out_e (silu(gate_e x) * (up_e x)) for each row of a group; `halves` (all groups' [2 * intermediate,
// width]) is null where nothing is kept.
template <class Number>
void forward(const Problem &problem, const Number *x, const Number *into, const Number *out, Number *said,
             float *halves) {
    const int64_t hidden = problem.hidden, intermediate = problem.intermediate;
    Columns columns(problem, hidden), units(problem, intermediate);
    const int64_t unit_tasks = (intermediate + TASK - 1) / TASK, row_tasks = (hidden + TASK - 1) / TASK;
    const auto very_few = [&](int64_t group) { return !halves && problem.rows(group) <= VERY_FEW; };
    const decltype(&units_between<Number, 1>) unit_runs[] = {units_between<Number, 1>, units_between<Number, 2>,
                                                             units_between<Number, 3>, units_between<Number, 4>};
    const decltype(&rows_between<Number, 1>) row_runs[] = {rows_between<Number, 1>, rows_between<Number, 2>,
                                                           rows_between<Number, 3>, rows_between<Number, 4>};
#pragma omp parallel num_threads(problem.threads)
    {
#pragma omp for schedule(dynamic)
        for (int64_t group = 0; group < problem.count; group++)
            if (very_few(group))
                put_in_rows(x, problem, group, hidden, columns.of(group));
            else
                put_in_columns(x, nullptr, problem, group, hidden, columns.of(group));
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < problem.count * unit_tasks; task++) {
            const int64_t group = task / unit_tasks, from = task % unit_tasks * TASK,
                          to = std::min(from + TASK, intermediate);
            const Number *gates = into + problem.groups[group].expert * 2 * intermediate * hidden;
            if (very_few(group)) {
                dot_units(problem.rows(group), gates, columns.of(group), problem, from, to, units.of(group));
                continue;
            }
            const auto run = unit_runs[problem.vectors(group) - 1];
            float *kept = halves ? halves + 2 * units.starts[group] : nullptr;
            run(gates, columns.of(group), problem, from, to, kept, units.of(group));
        }
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < problem.count * row_tasks; task++) {
            const int64_t group = task / row_tasks, from = task % row_tasks * TASK, to = std::min(from + TASK, hidden);
            const Group &here = problem.groups[group];
            const Number *matrix = out + here.expert * hidden * intermediate;
            if (very_few(group)) {
                dot_rows(problem.rows(group), matrix, units.of(group), problem, from, to, said + here.start * hidden);
                continue;
            }
            const auto run = row_runs[problem.vectors(group) - 1];
            run(matrix, units.of(group), problem, from, to, said + here.start * hidden, here.end - here.start);
        }
    }
}

// `COUNT` rows of a matrix, each times its number of every column, onto sums [rows, TILE].
template <class Number, int COUNT>
inline void add_rows(const Number *matrix, int64_t stride, const float *columns, int64_t width, int64_t rows,
                     int64_t from, int64_t to, float *sums) {
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

// sums[row, k] = sum over n of columns[n, row] matrix[n, k], for k from `from` to `to`; rows are filled up to a
// multiple of 4.
template <class Number>
void times(const Number *matrix, const float *columns, int64_t width, int64_t rows, int64_t size, int64_t stride,
           int64_t from, int64_t to, float *sums) {
    const int64_t filled = (rows + 3) / 4 * 4;
    std::fill(sums, sums + filled * TILE, 0.0f);
    int64_t at = 0;
    for (; at + BLOCK <= size; at += BLOCK)
        add_rows<Number, BLOCK>(matrix + at * stride, stride, columns + at * width, width, filled, from, to, sums);
    for (; at < size; at++)
        add_rows<Number, 1>(matrix + at * stride, stride, columns + at * width, width, filled, from, to, sums);
}

// The gradients of both halves of a unit, and the unit again.
struct Unit {
    Vector grad_gate, grad_up, value;
};

inline Unit through_unit(Vector grad, Vector gate, Vector up) {
    const Vector share = sigmoid(gate), active = gate * share;
    return {grad * up * share * (1.0f + gate * (1.0f - share)), grad * active, active * up};
}

// From the gradient of units `from` to `to`, as sums [rows, TILE]: that of both halves, and the units again, all in
// columns.
inline void through_units(const float *sums, int64_t rows, int64_t width, int64_t intermediate, int64_t from,
                          int64_t to, const float *halves, float *grad_halves, float *units) {
    for (int64_t at = from; at < to; at++)
        for (int64_t first = 0; first < width; first += LANES) {
            alignas(64) float column[LANES] = {};
            for (int64_t row = first; row < std::min(rows, first + LANES); row++)
                column[row - first] = sums[row * TILE + at - from];
            const int64_t gate_at = at * width + first, up_at = (intermediate + at) * width + first;
            const Unit unit = through_unit(load(column), load(halves + gate_at), load(halves + up_at));
            store(grad_halves + gate_at, unit.grad_gate);
            store(grad_halves + up_at, unit.grad_up);
            store(units + gate_at, unit.value);
        }
}

template <class Number, int COUNT>
inline void outer_block(const float *columns, int64_t width, const float *right, int64_t rows, int64_t from, int64_t to,
                        Number *out, int64_t stride, bool streams) {
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

// out[n, k] = sum over rows of columns[n, row] right[row, k], for n from `first` to `last`; `put(row, from, to, tile)`
// gives right's numbers.
template <class Number, class Put>
void outer(const float *columns, int64_t width, int64_t rows, int64_t first, int64_t last, int64_t size, Number *out,
           bool streams, Put put) {
    alignas(64) float tile[MOST_ROWS * TILE];
    for (int64_t from = 0; from < size; from += TILE) {
        const int64_t to = std::min(from + TILE, size);
        for (int64_t row = 0; row < rows; row++)
            put(row, from, to, tile + row * TILE);
        int64_t at = first;
        for (; at + BLOCK <= last; at += BLOCK)
            outer_block<Number, BLOCK>(columns + at * width, width, tile, rows, from, to, out + at * size, size,
                                       streams);
        for (; at < last; at++)
            outer_block<Number, 1>(columns + at * width, width, tile, rows, from, to, out + at * size, size, streams);
    }
}

// The gradients of `forward` from that of the tokens' answers, with each row's weight in them: of the rows' inputs and
// of the groups' experts; null where not asked for. Matrices are read before the gradients of others are written, and
// from the last to the first: `forward` left the last in the caches.
template <class Number>
void backward(const Problem &problem, const Number *grad, const float *weights, const Number *x, const Number *into,
              const Number *out, const float *halves, Number *grad_rows, Number *grad_into, Number *grad_out) {
    const int64_t hidden = problem.hidden, intermediate = problem.intermediate, matrix = hidden * intermediate;
    Columns grad_said(problem, hidden), grad_halves(problem, 2 * intermediate), units(problem, intermediate);
    const int64_t unit_tiles = (intermediate + TILE - 1) / TILE, hidden_tiles = (hidden + TILE - 1) / TILE;
    const int64_t into_tasks = (2 * intermediate + TASK - 1) / TASK, out_tasks = (hidden + TASK - 1) / TASK;
    const bool streams_into = may_stream(grad_into, hidden), streams_out = may_stream(grad_out, intermediate);
#pragma omp parallel num_threads(problem.threads)
    {
#pragma omp for schedule(dynamic)
        for (int64_t group = 0; group < problem.count; group++)
            put_in_columns(grad, weights, problem, group, hidden, grad_said.of(group));
        alignas(64) float sums[MOST_ROWS * TILE];
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < problem.count * unit_tiles; task++) {
            const int64_t group = problem.count - 1 - task / unit_tiles, from = task % unit_tiles * TILE,
                          to = std::min(from + TILE, intermediate);
            const int64_t rows = problem.rows(group), width = problem.width(group);
            times(out + problem.groups[group].expert * matrix, grad_said.of(group), width, rows, hidden, intermediate,
                  from, to, sums);
            through_units(sums, rows, width, intermediate, from, to, halves + 2 * units.starts[group],
                          grad_halves.of(group), units.of(group));
        }
        if (grad_rows) {
#pragma omp for schedule(dynamic)
            for (int64_t task = 0; task < problem.count * hidden_tiles; task++) {
                const int64_t group = problem.count - 1 - task / hidden_tiles, from = task % hidden_tiles * TILE,
                              to = std::min(from + TILE, hidden);
                const Group &here = problem.groups[group];
                const int64_t rows = problem.rows(group);
                times(into + here.expert * 2 * matrix, grad_halves.of(group), problem.width(group), rows,
                      2 * intermediate, hidden, from, to, sums);
                for (int64_t row = 0; row < rows; row++)
                    for (int64_t at = from; at < to; at++)
                        write(grad_rows + (here.start + row) * hidden + at, sums[row * TILE + at - from]);
            }
        }
        if (grad_into) {
#pragma omp for schedule(dynamic) nowait
            for (int64_t task = 0; task < problem.count * into_tasks; task++) {
                const int64_t group = task / into_tasks, first = task % into_tasks * TASK,
                              last = std::min(first + TASK, 2 * intermediate);
                const Group &here = problem.groups[group];
                auto put = [&](int64_t row, int64_t from, int64_t to, float *tile) {
                    const Number *token = x + problem.tokens[here.start + row] * hidden;
                    for (int64_t at = from; at < to; at++)
                        tile[at - from] = read(token[at]);
                };
                outer(grad_halves.of(group), problem.width(group), problem.rows(group), first, last, hidden,
                      grad_into + here.expert * 2 * matrix, streams_into, put);
            }
        }
        if (grad_out) {
#pragma omp for schedule(dynamic) nowait
            for (int64_t task = 0; task < problem.count * out_tasks; task++) {
                const int64_t group = task / out_tasks, first = task % out_tasks * TASK,
                              last = std::min(first + TASK, hidden);
                const int64_t width = problem.width(group);
                const float *columns = units.of(group);
                auto put = [&](int64_t row, int64_t from, int64_t to, float *tile) {
                    for (int64_t at = from; at < to; at++)
                        tile[at - from] = columns[at * width + row];
                };
                outer(grad_said.of(group), width, problem.rows(group), first, last, intermediate,
                      grad_out + problem.groups[group].expert * matrix, streams_out, put);
            }
        }
        _mm_sfence(); // What was streamed is seen by all threads.
    }
}

// units[row] = silu(gate) * up of rows [2 * intermediate].
template <class Number>
void swiglu(const Number *halves, Number *units, int64_t rows, int64_t intermediate, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t row = 0; row < rows; row++) {
        const Number *gates = halves + row * 2 * intermediate, *ups = gates + intermediate;
        Number *to = units + row * intermediate;
        each_vector(intermediate, [&](auto at) {
            const Vector gate = at.load(gates);
            at.store(to, gate * sigmoid(gate) * at.load(ups));
        });
    }
}

// From the gradient of units: that of both halves, and the units again.
template <class Number>
void swiglu_backward(const Number *grad, const Number *halves, Number *grad_halves, Number *units, int64_t rows,
                     int64_t intermediate, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t row = 0; row < rows; row++) {
        const Number *from = grad + row * intermediate, *gates = halves + row * 2 * intermediate,
                     *ups = gates + intermediate;
        Number *grad_gates = grad_halves + row * 2 * intermediate, *grad_ups = grad_gates + intermediate,
               *to = units + row * intermediate;
        each_vector(intermediate, [&](auto at) {
            const Unit unit = through_unit(at.load(from), at.load(gates), at.load(ups));
            at.store(grad_gates, unit.grad_gate);
            at.store(grad_ups, unit.grad_up);
            at.store(to, unit.value);
        });
    }
}

// to[row] = weights[row] * tokens[numbers[row]]
template <class Number>
void gather(const Number *tokens, const int64_t *numbers, const Number *weights, Number *to, int64_t rows, int64_t size,
            int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t row = 0; row < rows; row++) {
        const float weight = read(weights[row]);
        each_vector(size, [&](auto at) { at.store(to + row * size, at.load(tokens + numbers[row] * size) * weight); });
    }
}

} // namespace kernels

using namespace kernels;

#define EXPORT(Number, type)                                                                                           \
    extern "C" void forward_##type(const Problem *problem, const Number *x, const Number *into, const Number *out,     \
                                   Number *said, float *halves) {                                                      \
        forward(*problem, x, into, out, said, halves);                                                                 \
    }                                                                                                                  \
    extern "C" void backward_##type(const Problem *problem, const Number *grad, const float *weights, const Number *x, \
                                    const Number *into, const Number *out, const float *halves, Number *grad_rows,     \
                                    Number *grad_into, Number *grad_out) {                                             \
        backward(*problem, grad, weights, x, into, out, halves, grad_rows, grad_into, grad_out);                       \
    }                                                                                                                  \
    extern "C" void swiglu_##type(const Number *halves, Number *units, int64_t rows, int64_t intermediate,             \
                                  int threads) {                                                                       \
        swiglu(halves, units, rows, intermediate, threads);                                                            \
    }                                                                                                                  \
    extern "C" void swiglu_backward_##type(const Number *grad, const Number *halves, Number *grad_halves,              \
                                           Number *units, int64_t rows, int64_t intermediate, int threads) {           \
        swiglu_backward(grad, halves, grad_halves, units, rows, intermediate, threads);                                \
    }                                                                                                                  \
    extern "C" void gather_##type(const Number *tokens, const int64_t *numbers, const Number *weights, Number *to,     \
                                  int64_t rows, int64_t size, int threads) {                                           \
        gather(tokens, numbers, weights, to, rows, size, threads);                                                     \
    }

EXPORT(float, float)
EXPORT(bfloat16, bfloat16)
