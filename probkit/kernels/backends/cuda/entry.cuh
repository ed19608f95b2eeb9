// What one entry of a kernel matrix goes through, for the device and, in tests, for the host.
//
// Nothing here knows of threads or memory layout. Every function mirrors one of
// probkit/kernels/backends/activations.py or stationary_tiled.py, to rounding.
#pragma once

#if defined(__CUDACC__) || defined(__CUDACC_RTC__)
#define PK_FUNCTION __device__ __forceinline__
#else
#include <cmath>
#define PK_FUNCTION inline
using std::acos;
using std::asin;
using std::exp;
using std::sqrt;
#endif

namespace probkit {

constexpr double kPi = 3.14159265358979323846;

template <typename T>
struct Limits;
template <>
struct Limits<double> {
    static constexpr double epsilon = 2.220446049250313e-16;
};
template <>
struct Limits<float> {
    static constexpr float epsilon = 1.1920928955078125e-07f;
};

template <typename T>
PK_FUNCTION T clamp(T value, T low, T high) {
    return value < low ? low : (value > high ? high : value);
}

// ------------------------------------------------------------------------------- activations

// Covariance F of an activation between two inputs, and its slope dF/dK.
template <typename T>
struct Moments {
    T covariance;
    T slope;
};

// Gradients of F with respect to K and to the two variances.
template <typename T>
struct Partials {
    T covariance;
    T first;
    T second;
};

// phi(u) = max(u, 0); the factors of a variance k are its root and the inverse of that (0 for 0).
struct ReLU {
    static constexpr int factors = 2;

    template <typename T>
    static PK_FUNCTION Moments<T> moments(T K, const T* row, const T* column) {
        const T c = clamp<T>(K * row[1] * column[1], T(-1), T(1));
        const T sine = sqrt((T(1) - c) * (T(1) + c));
        const T angle = acos(-c);  // pi - arccos(c)
        const T scale = T(1 / (2 * kPi));
        return {row[0] * column[0] * (sine + angle * c) * scale, angle * scale};
    }

    template <typename T>
    static PK_FUNCTION Partials<T> partials(T K, const T* row, const T* column) {
        const T c = clamp<T>(K * row[1] * column[1], T(-1), T(1));
        const T sine = sqrt((T(1) - c) * (T(1) + c));
        const T scale = T(1 / (4 * kPi)) * sine;
        return {
            acos(-c) * T(1 / (2 * kPi)),
            scale * column[0] * row[1],
            scale * row[0] * column[1],
        };
    }
};

// phi(u) = erf(u); the factor of a variance k is the inverse root of 1 + 2 k.
struct Erf {
    static constexpr int factors = 1;

    template <typename T>
    static PK_FUNCTION T correlation(T K, const T* row, const T* column) {
        return clamp<T>(T(2) * K * row[0] * column[0], T(-1), T(1));
    }

    template <typename T>
    static PK_FUNCTION T inverse_cosine(T c) {
        const T square = (T(1) - c) * (T(1) + c);
        return T(1) / sqrt(square < Limits<T>::epsilon ? Limits<T>::epsilon : square);
    }

    template <typename T>
    static PK_FUNCTION Moments<T> moments(T K, const T* row, const T* column) {
        const T c = correlation(K, row, column);
        return {
            asin(c) * T(2 / kPi),
            inverse_cosine(c) * row[0] * column[0] * T(4 / kPi),
        };
    }

    template <typename T>
    static PK_FUNCTION Partials<T> partials(T K, const T* row, const T* column) {
        const T c = correlation(K, row, column);
        const T scaled = inverse_cosine(c) * T(2 / kPi);
        return {
            scaled * T(2) * row[0] * column[0],
            -scaled * c * row[0] * row[0],
            -scaled * c * column[0] * column[0],
        };
    }
};

// --------------------------------------------------------------------------------- networks

// An entry on its way through the layers. Step l = 1, 2, ... reads `Activation::factors` numbers of
// the row and of the column; they lie `row_stride` and `column_stride` apart from step to step.
//
// `gains` and `biases` hold the variances of weights and biases of all steps, the input layer first.
template <typename Activation, bool kTangent, bool kResidual, typename T>
PK_FUNCTION T network_entry(
    T K, const T* row, long long row_stride, const T* column, long long column_stride,
    const T* gains, const T* biases, int steps) {
    T theta = K;
    for (int step = 1; step < steps; ++step) {
        const bool block = kResidual && step < steps - 1;
        const Moments<T> found = Activation::moments(K, row, column);
        const T next = gains[step] * found.covariance + biases[step];
        if (kTangent) {
            const T passed = gains[step] * found.slope * theta;
            theta = next + passed + (block ? theta : T(0));
        }
        K = block ? K + next : next;
        row += row_stride;
        column += column_stride;
    }
    return kTangent ? theta : K;
}

constexpr int kMaxSteps = 33;  // layers that the backward pass keeps in registers or local memory

// Gradients of upstream * network_entry, by going forward once and back once.
//
// Returns the gradient of the input-layer entry K. `to_gain`, `to_bias` [steps], `to_row` and
// `to_column` [steps - 1] receive those of the steps after the first, and of the two variances.
template <typename Activation, bool kResidual, typename T>
PK_FUNCTION T network_entry_backward(
    T K, const T* row, long long row_stride, const T* column, long long column_stride,
    const T* gains, const T* biases, int steps, T upstream,
    T* to_gain, T* to_bias, T* to_row, T* to_column) {
    T before[kMaxSteps];
    for (int step = 1; step < steps; ++step) {
        const bool block = kResidual && step < steps - 1;
        before[step] = K;
        const long long at = step - 1;
        const T covariance =
            Activation::moments(K, row + at * row_stride, column + at * column_stride).covariance;
        const T next = gains[step] * covariance + biases[step];
        to_gain[step] = covariance;  // multiplied by its upstream on the way back
        K = block ? K + next : next;
    }
    T flow = upstream;
    for (int step = steps - 1; step > 0; --step) {
        const bool block = kResidual && step < steps - 1;
        const long long at = step - 1;
        const Partials<T> slope = Activation::partials(
            before[step], row + at * row_stride, column + at * column_stride);
        const T through = flow * gains[step];
        to_gain[step] *= flow;
        to_bias[step] = flow;
        to_row[at] = through * slope.first;
        to_column[at] = through * slope.second;
        flow = through * slope.covariance + (block ? flow : T(0));
    }
    return flow;
}

// ------------------------------------------------------------------------ stationary kernels

// A stationary kernel as a function of the squared scaled distance s, and its derivative.
struct RBF {
    template <typename T>
    static PK_FUNCTION T value(T s) {
        return exp(T(-0.5) * s);
    }
    template <typename T>
    static PK_FUNCTION T slope(T s) {
        return T(-0.5) * exp(T(-0.5) * s);
    }
};

struct Matern12 {
    template <typename T>
    static PK_FUNCTION T value(T s) {
        return exp(-sqrt(s));
    }
    // infinite at s = 0, where it multiplies a difference of zero: zero by rule
    template <typename T>
    static PK_FUNCTION T slope(T s) {
        const T r = sqrt(s);
        return s > T(0) ? T(-0.5) * exp(-r) / r : T(0);
    }
};

struct Matern32 {
    template <typename T>
    static PK_FUNCTION T value(T s) {
        const T r = sqrt(T(3) * s);
        return (T(1) + r) * exp(-r);
    }
    template <typename T>
    static PK_FUNCTION T slope(T s) {
        return T(-1.5) * exp(-sqrt(T(3) * s));
    }
};

struct Matern52 {
    template <typename T>
    static PK_FUNCTION T value(T s) {
        const T r = sqrt(T(5) * s);
        return (T(1) + r + r * r * T(1.0 / 3.0)) * exp(-r);
    }
    template <typename T>
    static PK_FUNCTION T slope(T s) {
        const T r = sqrt(T(5) * s);
        return T(-5.0 / 6.0) * (T(1) + r) * exp(-r);
    }
};

}  // namespace probkit
