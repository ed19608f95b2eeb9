// Kernel matrices and their products, tile by tile; nothing between inputs and result is stored.
//
// A block of 16 x 16 threads computes a tile of 64 x 64 entries, 4 x 4 for each thread: inner
// products or distances in registers, then the map of each entry. All arrays are contiguous and
// row-major. Compiled at run time for the precision and the kernel that is asked for.
#pragma once

#include "entry.cuh"

namespace probkit {

constexpr int kSide = 16;                // threads along each side of a block
constexpr int kMicro = 4;                // entries along each side, for each thread
constexpr int kTile = kSide * kMicro;    // entries along each side of a tile
constexpr int kChunk = 16;               // features read at a time
constexpr int kPitch = kTile + 1;        // padding: columns of a shared tile lie in other banks
constexpr int kVectors = 16;             // right-hand sides of one pass of a product
constexpr int kThreads = kSide * kSide;
constexpr int kBackwardSteps = 17;       // steps that network_backward has room for

// ----------------------------------------------------------------------------------- pairings

struct Dot {
    template <typename T>
    static PK_FUNCTION T add(T sum, T a, T b) {
        return sum + a * b;
    }
};

// Sum of squared differences: no cancellation between close rows.
struct SquaredDistance {
    template <typename T>
    static PK_FUNCTION T add(T sum, T a, T b) {
        const T difference = a - b;
        return sum + difference * difference;
    }
};

// Copy `kChunk` features of `kTile` rows from `first` on to shared[feature][row], zeros beyond.
template <typename T>
__device__ void load_rows(const T* x, long long rows, int features, long long first, int from,
                          T* shared) {
    for (int slot = threadIdx.x; slot < kChunk * kTile; slot += kThreads) {
        const int feature = slot % kChunk, row = slot / kChunk;
        const bool inside = first + row < rows && from + feature < features;
        shared[feature * kPitch + row] =
            inside ? x[(first + row) * features + from + feature] : T(0);
    }
}

// Pair rows i0.. of x1 with rows j0.. of x2: entry [i][j] belongs to row i0 + ty + 16 i and column
// j0 + tx + 16 j. `shared` holds 2 * kChunk * kPitch numbers.
template <typename Pairing, typename T>
__device__ void pair_tile(const T* x1, const T* x2, long long n, long long m, int d, long long i0,
                          long long j0, T* shared, T (&sums)[kMicro][kMicro]) {
    const int tx = threadIdx.x % kSide, ty = threadIdx.x / kSide;
    T *left = shared, *right = shared + kChunk * kPitch;
    for (int i = 0; i < kMicro; ++i)
        for (int j = 0; j < kMicro; ++j) sums[i][j] = T(0);
    for (int from = 0; from < d; from += kChunk) {
        load_rows(x1, n, d, i0, from, left);
        load_rows(x2, m, d, j0, from, right);
        __syncthreads();
        const int count = d - from < kChunk ? d - from : kChunk;
        for (int k = 0; k < count; ++k) {
            T a[kMicro], b[kMicro];
#pragma unroll
            for (int i = 0; i < kMicro; ++i) a[i] = left[k * kPitch + ty + kSide * i];
#pragma unroll
            for (int j = 0; j < kMicro; ++j) b[j] = right[k * kPitch + tx + kSide * j];
#pragma unroll
            for (int i = 0; i < kMicro; ++i)
#pragma unroll
                for (int j = 0; j < kMicro; ++j) sums[i][j] = Pairing::add(sums[i][j], a[i], b[j]);
        }
        __syncthreads();
    }
}

// --------------------------------------------------------------------------------------- maps

// Takes the inner product of two rows to the entry of a network's kernel.
template <typename Activation, bool kTangent, bool kResidual, typename T>
struct Network {
    const T* rows;     // [step, n, factor]
    const T* columns;  // [step, m, factor]
    const T* gains;    // [step]; the first one divided by the number of features
    const T* biases;   // [step]
    long long n, m;
    int steps;

    __device__ T operator()(T product, long long i, long long j) const {
        const int width = Activation::factors;
        return network_entry<Activation, kTangent, kResidual, T>(
            gains[0] * product + biases[0], rows + i * width, n * width, columns + j * width,
            m * width, gains, biases, steps);
    }
};

template <typename Family, typename T>
struct Stationary {
    __device__ T operator()(T square, long long, long long) const { return Family::value(square); }
};

// ------------------------------------------------------------------------------------- matrix

// Number `t` of the tiles on and above the diagonal, column by column: tile row and tile column.
PK_FUNCTION void upper_tile(long long t, long long& row, long long& column) {
    column = static_cast<long long>((sqrt(8.0 * static_cast<double>(t) + 1.0) - 1.0) * 0.5);
    while ((column + 1) * (column + 2) / 2 <= t) ++column;
    while (column * (column + 1) / 2 > t) --column;
    row = t - column * (column + 1) / 2;
}

// With a diagonal [n], x2 is x1: tiles on and above the diagonal are computed, and both triangles
// written; the diagonal is the one given.
template <typename Pairing, typename Map, typename T>
__device__ void fill_matrix(const T* x1, const T* x2, long long n, long long m, int d, Map map,
                            const T* diagonal, T* out) {
    __shared__ T shared[kTile * kPitch];
    const int tx = threadIdx.x % kSide, ty = threadIdx.x / kSide;
    long long tile_row, tile_column;
    if (diagonal != nullptr) {
        upper_tile(blockIdx.x, tile_row, tile_column);
    } else {
        const long long across = (m + kTile - 1) / kTile;
        tile_row = blockIdx.x / across;
        tile_column = blockIdx.x % across;
    }
    const long long i0 = tile_row * kTile, j0 = tile_column * kTile;
    T sums[kMicro][kMicro];
    pair_tile<Pairing, T>(x1, x2, n, m, d, i0, j0, shared, sums);
    for (int i = 0; i < kMicro; ++i) {
        for (int j = 0; j < kMicro; ++j) {
            const long long row = i0 + ty + kSide * i, column = j0 + tx + kSide * j;
            if (row < n && column < m) sums[i][j] = map(sums[i][j], row, column);
        }
    }
    const bool mirrored = diagonal != nullptr;
    const bool square = mirrored && tile_row == tile_column;
    if (mirrored) {
        for (int i = 0; i < kMicro; ++i)
            for (int j = 0; j < kMicro; ++j)
                shared[(ty + kSide * i) * kPitch + tx + kSide * j] = sums[i][j];
        __syncthreads();
    }
    for (int i = 0; i < kMicro; ++i) {
        for (int j = 0; j < kMicro; ++j) {
            const int r = ty + kSide * i, c = tx + kSide * j;
            const long long row = i0 + r, column = j0 + c;
            if (row < n && column < m) {
                T value = sums[i][j];
                if (square && r > c) value = shared[c * kPitch + r];
                if (square && r == c) value = diagonal[row];
                out[row * m + column] = value;
            }
            // the tile below the diagonal: threads run along its rows, so that writes coalesce
            if (mirrored && !square && j0 + r < n && i0 + c < n)
                out[(j0 + r) * n + i0 + c] = shared[c * kPitch + r];
        }
    }
}

// ------------------------------------------------------------------------------------ product

// out [n, r] = K [n, m] vectors [m, r]: each block takes 64 rows of K and up to 16 vectors.
template <typename Pairing, typename Map, typename T>
__device__ void multiply(const T* x1, const T* x2, long long n, long long m, int d, Map map,
                         const T* diagonal, const T* vectors, int r, T* out) {
    __shared__ T tile[kTile * kPitch];  // first the features of a pairing, then the entries
    __shared__ T right[kTile * kVectors];
    const int tx = threadIdx.x % kSide, ty = threadIdx.x / kSide;
    const long long i0 = static_cast<long long>(blockIdx.x) * kTile;
    const int first = blockIdx.y * kVectors;
    const int my_row = threadIdx.x / 4, my_column = threadIdx.x % 4;
    T sums[kVectors / 4];
    for (int q = 0; q < kVectors / 4; ++q) sums[q] = T(0);
    for (long long j0 = 0; j0 < m; j0 += kTile) {
        T entries[kMicro][kMicro];
        pair_tile<Pairing, T>(x1, x2, n, m, d, i0, j0, tile, entries);
        for (int i = 0; i < kMicro; ++i) {
            for (int j = 0; j < kMicro; ++j) {
                const long long row = i0 + ty + kSide * i, column = j0 + tx + kSide * j;
                T value = T(0);
                if (row < n && column < m) {
                    const bool own = diagonal != nullptr && row == column;
                    value = own ? diagonal[row] : map(entries[i][j], row, column);
                }
                tile[(ty + kSide * i) * kPitch + tx + kSide * j] = value;
            }
        }
        for (int slot = threadIdx.x; slot < kTile * kVectors; slot += kThreads) {
            const long long row = j0 + slot / kVectors;
            const int column = first + slot % kVectors;
            right[slot] = row < m && column < r ? vectors[row * r + column] : T(0);
        }
        __syncthreads();
        for (int k = 0; k < kTile; ++k) {
            const T entry = tile[my_row * kPitch + k];
#pragma unroll
            for (int q = 0; q < kVectors / 4; ++q)
                sums[q] += entry * right[k * kVectors + my_column + 4 * q];
        }
        __syncthreads();
    }
    for (int q = 0; q < kVectors / 4; ++q) {
        const int column = first + my_column + 4 * q;
        if (i0 + my_row < n && column < r) out[(i0 + my_row) * r + column] = sums[q];
    }
}

// ----------------------------------------------------------------------------------- kernels
//
// Every whole number is 64 bits wide, as the launcher passes them.

template <typename T, typename Activation, bool kTangent, bool kResidual>
__global__ void network_matrix(const T* x1, const T* x2, long long n, long long m, long long d,
                               const T* rows, const T* columns, const T* gains, const T* biases,
                               long long steps, const T* diagonal, T* out) {
    const Network<Activation, kTangent, kResidual, T> map{
        rows, columns, gains, biases, n, m, static_cast<int>(steps)};
    fill_matrix<Dot>(x1, x2, n, m, d, map, diagonal, out);
}

template <typename T, typename Activation, bool kTangent, bool kResidual>
__global__ void network_product(const T* x1, const T* x2, long long n, long long m, long long d,
                                const T* rows, const T* columns, const T* gains, const T* biases,
                                long long steps, const T* diagonal, const T* vectors, long long r, T* out) {
    const Network<Activation, kTangent, kResidual, T> map{
        rows, columns, gains, biases, n, m, static_cast<int>(steps)};
    multiply<Dot>(x1, x2, n, m, d, map, diagonal, vectors, r, out);
}

// Inner products [n, m] to entries, in place: for Gram matrices that tensor cores have computed.
template <typename T, typename Activation, bool kTangent, bool kResidual>
__global__ void network_map(long long n, long long m, const T* rows, const T* columns,
                            const T* gains, const T* biases, long long steps, T* matrix) {
    const Network<Activation, kTangent, kResidual, T> map{
        rows, columns, gains, biases, n, m, static_cast<int>(steps)};
    const long long stride = static_cast<long long>(gridDim.x) * blockDim.x;
    for (long long at = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x; at < n * m;
         at += stride)
        matrix[at] = map(matrix[at], at / m, at % m);
}

// Replace the upstream gradient [n, m] of a matrix by that of its inner products times the first
// gain, and add the gradients of gains, biases [step] and of the variances [step - 1, n or m].
//
// Sums over a tile are made in shared memory, then added to global memory once for each row and
// column; their order, and so the last bit, differs between runs.
template <typename T, typename Activation, bool kResidual>
__global__ void network_backward(const T* x1, const T* x2, long long n, long long m, long long d,
                                 const T* rows, const T* columns, const T* gains, const T* biases,
                                 long long steps, T* upstream, T* to_gains, T* to_biases, T* to_rows,
                                 T* to_columns) {
    __shared__ T chunk[2 * kChunk * kPitch];
    __shared__ T row_sums[(kBackwardSteps - 1) * kTile];
    __shared__ T column_sums[(kBackwardSteps - 1) * kTile];
    __shared__ T gain_sums[kBackwardSteps], bias_sums[kBackwardSteps];
    const int tx = threadIdx.x % kSide, ty = threadIdx.x / kSide, layers = static_cast<int>(steps) - 1;
    const long long across = (m + kTile - 1) / kTile;
    const long long i0 = blockIdx.x / across * kTile, j0 = blockIdx.x % across * kTile;
    for (int slot = threadIdx.x; slot < layers * kTile; slot += kThreads)
        row_sums[slot] = column_sums[slot] = T(0);
    for (int slot = threadIdx.x; slot < steps; slot += kThreads)
        gain_sums[slot] = bias_sums[slot] = T(0);
    T sums[kMicro][kMicro];
    pair_tile<Dot, T>(x1, x2, n, m, d, i0, j0, chunk, sums);  // ends with a barrier
    const int width = Activation::factors;
    for (int i = 0; i < kMicro; ++i) {
        for (int j = 0; j < kMicro; ++j) {
            const int r = ty + kSide * i, c = tx + kSide * j;
            const long long row = i0 + r, column = j0 + c;
            if (row >= n || column >= m) continue;
            T to_gain[kMaxSteps], to_bias[kMaxSteps], to_row[kMaxSteps], to_column[kMaxSteps];
            const T flow = network_entry_backward<Activation, kResidual, T>(
                gains[0] * sums[i][j] + biases[0], rows + row * width, n * width,
                columns + column * width, m * width, gains, biases, static_cast<int>(steps),
                upstream[row * m + column], to_gain, to_bias, to_row, to_column);
            upstream[row * m + column] = flow * gains[0];
            atomicAdd(&gain_sums[0], flow * sums[i][j]);
            atomicAdd(&bias_sums[0], flow);
            for (int step = 1; step < steps; ++step) {
                atomicAdd(&gain_sums[step], to_gain[step]);
                atomicAdd(&bias_sums[step], to_bias[step]);
                atomicAdd(&row_sums[(step - 1) * kTile + r], to_row[step - 1]);
                atomicAdd(&column_sums[(step - 1) * kTile + c], to_column[step - 1]);
            }
        }
    }
    __syncthreads();
    for (int slot = threadIdx.x; slot < layers * kTile; slot += kThreads) {
        const int step = slot / kTile, at = slot % kTile;
        if (i0 + at < n) atomicAdd(&to_rows[step * n + i0 + at], row_sums[slot]);
        if (j0 + at < m) atomicAdd(&to_columns[step * m + j0 + at], column_sums[slot]);
    }
    for (int slot = threadIdx.x; slot < steps; slot += kThreads) {
        atomicAdd(&to_gains[slot], gain_sums[slot]);
        atomicAdd(&to_biases[slot], bias_sums[slot]);
    }
}

template <typename T, typename Family>
__global__ void stationary_matrix(const T* x1, const T* x2, long long n, long long m, long long d,
                                  const T* diagonal, T* out) {
    fill_matrix<SquaredDistance>(x1, x2, n, m, d, Stationary<Family, T>{}, diagonal, out);
}

template <typename T, typename Family>
__global__ void stationary_product(const T* x1, const T* x2, long long n, long long m, long long d,
                                   const T* diagonal, const T* vectors, long long r, T* out) {
    multiply<SquaredDistance>(x1, x2, n, m, d, Stationary<Family, T>{}, diagonal, vectors, r, out);
}

// Replace the upstream gradient [n, m] of a matrix by that of the squared scaled distances.
template <typename T, typename Family>
__global__ void stationary_backward(const T* x1, const T* x2, long long n, long long m, long long d,
                                    T* upstream) {
    __shared__ T chunk[2 * kChunk * kPitch];
    const int tx = threadIdx.x % kSide, ty = threadIdx.x / kSide;
    const long long across = (m + kTile - 1) / kTile;
    const long long i0 = blockIdx.x / across * kTile, j0 = blockIdx.x % across * kTile;
    T sums[kMicro][kMicro];
    pair_tile<SquaredDistance, T>(x1, x2, n, m, d, i0, j0, chunk, sums);
    for (int i = 0; i < kMicro; ++i) {
        for (int j = 0; j < kMicro; ++j) {
            const long long row = i0 + ty + kSide * i, column = j0 + tx + kSide * j;
            if (row < n && column < m) upstream[row * m + column] *= Family::slope(sums[i][j]);
        }
    }
}

}  // namespace probkit
