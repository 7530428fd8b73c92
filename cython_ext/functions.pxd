# Elementary functions, written to `out`, without a branch or a call in float32, so that a loop over them becomes vector instructions in each
# clone; float64 takes those of the C library. Errors in float32: two or three roundings. NaN stays NaN. Whole numbers are written as <float>:
# C, and Cython too, would compute `1 + x` in float64, in half as many lanes and through conversions.

from libc.math cimport erf, exp, log1p, tanh
from libc.stdint cimport uint32_t

from cython_ext.algebra cimport dot, real
from cython_ext.clones cimport inlined

cdef union Word:
    float value
    uint32_t bits


cdef inline inlined power_of_two(float n, float* out) noexcept nogil:
    """2**n for a whole n between -126 and 127: added to 1.5 * 2**23, a whole number lies in the lowest bits."""
    cdef Word word
    word.value = n + <float> 12582912.0
    word.bits = (word.bits << 23) + (<uint32_t> 127 << 23)
    out[0] = word.value


cdef inline inlined exponential(real x, real* out) noexcept nogil:
    cdef float n, r, half, low, high
    if real is double:
        out[0] = exp(x)
    else:
        # x = n log(2) + r, |r| <= log(2) / 2; out = 2**half * 2**(n - half) * taylor(r), in two factors since 2**n may not be a float
        x = <float> -104.0 if x < <float> -104.0 else x
        x = <float> 89.0 if x > <float> 89.0 else x
        n = (x * <float> 1.44269504088896341 + <float> 12582912.0) - <float> 12582912.0
        r = (x - n * <float> 0.693359375) + n * <float> 2.12194440054690583e-4
        half = (n * <float> 0.5 + <float> 12582912.0) - <float> 12582912.0
        power_of_two(half, &low)
        power_of_two(n - half, &high)
        r = <float> 1 + r * (<float> 1 + r * (<float> (1.0 / 2) + r * (<float> (1.0 / 6) + r * (<float> (1.0 / 24) + r * (
            <float> (1.0 / 120) + r * (<float> (1.0 / 720) + r * <float> (1.0 / 5040)))))))
        out[0] = r * low * high


cdef inline inlined decaying_exponential(float x, float* out) noexcept nogil:
    """exp(x) for x <= 0 beside terms of about 1: what is below exp(-87) becomes that, and the error is 1e-7 of the result."""
    cdef float n, r, power
    # x = n log(2) + r; out = 2**n * taylor(r)
    x = <float> -87.0 if x < <float> -87.0 else x
    n = (x * <float> 1.44269504088896341 + <float> 12582912.0) - <float> 12582912.0
    r = (x - n * <float> 0.693359375) + n * <float> 2.12194440054690583e-4
    power_of_two(n, &power)
    out[0] = power * (<float> 1 + r * (<float> 1 + r * (<float> (1.0 / 2) + r * (<float> (1.0 / 6) + r * (<float> (1.0 / 24) + r * (
        <float> (1.0 / 120) + r * <float> (1.0 / 720)))))))


cdef inline inlined logistic(real x, real* out) noexcept nogil:
    """1 / (1 + exp(-x))."""
    cdef real e
    exponential(-x, &e)
    out[0] = <real> 1 / (<real> 1 + e)


cdef inline inlined hyperbolic_tangent(real x, real* out) noexcept nogil:
    cdef real size, square, small, large
    if real is double:
        out[0] = tanh(x)
    else:
        # Cephes' polynomial near 0, where 1 - 2 / (exp(2 |x|) + 1) cancels
        size = -x if x < 0 else x
        square = x * x
        small = x + x * square * (<float> -3.33332819422e-1 + square * (<float> 1.33314422036e-1 + square * (
            <float> -5.37397155531e-2 + square * (<float> 2.06390887954e-2 + square * <float> -5.70498872745e-3))))
        exponential(<float> 2 * size, &large)
        large = <float> 1 - <float> 2 / (large + <float> 1)
        large = -large if x < 0 else large
        out[0] = small if size < <float> 0.625 else large


cdef inline inlined error_function(real x, real* out) noexcept nogil:
    """erf(x): x + x p(x^2) near 0, sign(x) (1 - exp(q(|x|))) beyond; the coefficients are minimax fits (Juffa)."""
    cdef real size, square, small, large
    if real is double:
        out[0] = erf(x)
    else:
        size = -x if x < 0 else x
        square = x * x
        large = (<float> 3.83197126e-4 + <float> -1.72853470e-5 * size) * square + (<float> 2.42546219e-2 + <float> -3.88396438e-3 * size)
        large = ((large * size + <float> -1.06777877e-1) * size + <float> -6.34846687e-1) * size + <float> -1.28717512e-1
        decaying_exponential(large * size - size, &large)
        large = <float> 1 - large
        large = -large if x < 0 else large
        small = <float> 1.12819925e-1 + square * (<float> -2.67681349e-2 + square * (<float> 4.99119423e-3 + square * <float> -5.96761703e-4))
        small = x + x * (<float> 1.28379166e-1 + square * (<float> -3.76125336e-1 + square * small))
        out[0] = small if size < <float> 0.927734375 else large


cdef inline inlined gaussian_unit(real x, real* out) noexcept nogil:
    """The exact gelu: x * (1 + erf(x / sqrt(2))) / 2."""
    cdef real e
    error_function(x * <real> 0.70710678118654752440, &e)
    out[0] = x * <real> 0.5 * (<real> 1 + e)


cdef inline inlined softplus(real x, real* out) noexcept nogil:
    """log(1 + exp(x)) as max(x, 0) + log1p(exp(-|x|)), which is right for any x."""
    cdef real t, z, square
    exponential(x if x < 0 else -x, &t)
    if real is double:
        t = log1p(t)
    else:
        # log1p(t) = 2 artanh(z), z = t / (2 + t) at most 1/3
        z = t / (<float> 2 + t)
        square = z * z
        t = <float> 2 * (z + z * square * (<float> (1.0 / 3) + square * (<float> (1.0 / 5) + square * (<float> (1.0 / 7) + square * (
            <float> (1.0 / 9) + square * (<float> (1.0 / 11) + square * (<float> (1.0 / 13) + square * <float> (1.0 / 15))))))))
    out[0] = (x if x > 0 else <real> 0) + t


cdef inline real silu_dot(real* x, const real* bias, const real* weight, Py_ssize_t n) noexcept nogil:
    """silu(x + bias) @ weight; x is overwritten."""
    cdef Py_ssize_t i
    cdef real e
    # x = (x + bias) / (1 + np.exp(-(x + bias)))
    for i in range(n):
        x[i] += bias[i]
        logistic(x[i], &e)
        x[i] *= e
    return dot(x, weight, n)
