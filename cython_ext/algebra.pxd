# Small functions that the kernels share: products through BLAS, sums in a fixed order, sigmoids. All of them go into their callers, and so
# into each clone.

from libc.math cimport exp, expf, sqrt, sqrtf
from scipy.linalg.cython_blas cimport dgemm, dtrsm, sgemm, strsm

from cython_ext.clones cimport inlined

cdef enum:
    LANES = 16  # one AVX-512 register of float32

ctypedef fused real:
    float
    double


cdef inline real root(real x) noexcept nogil:
    if real is float:
        return sqrtf(x)
    else:
        return sqrt(x)


cdef inline real sigmoid(real x) noexcept nogil:
    if real is float:
        return <real> 1 / (<real> 1 + expf(-x))
    else:
        return <real> 1 / (<real> 1 + exp(-x))


cdef inline real clamped(real x) noexcept nogil:
    """Between 0.01 and 0.99; NaN stays NaN."""
    if x < <real> 0.01:
        return <real> 0.01
    return <real> 0.99 if x > <real> 0.99 else x


cdef inline inlined multiply(
    bint turn_a, bint turn_b, Py_ssize_t rows, Py_ssize_t columns, Py_ssize_t inner, real scale, const real* a, Py_ssize_t step_a,
    const real* b, Py_ssize_t step_b, real keep, real* c, Py_ssize_t step_c,
) noexcept nogil:
    """c = scale * a @ b + keep * c, row-major with `step` entries from row to row; a, b transposed where `turn` says so."""
    cdef char trans_a = b"T" if turn_a else b"N"
    cdef char trans_b = b"T" if turn_b else b"N"
    cdef int m = columns, n = rows, k = inner, lda = step_b, ldb = step_a, ldc = step_c
    # BLAS reads columns first: it sees every matrix transposed, and (a @ b).T = b.T @ a.T
    if real is float:
        sgemm(&trans_b, &trans_a, &m, &n, &k, &scale, <real*> b, &lda, <real*> a, &ldb, &keep, c, &ldc)
    else:
        dgemm(&trans_b, &trans_a, &m, &n, &k, &scale, <real*> b, &lda, <real*> a, &ldb, &keep, c, &ldc)


cdef inline inlined solve(Py_ssize_t rows, Py_ssize_t columns, const real* a, Py_ssize_t step_a, real* x, Py_ssize_t step_x) noexcept nogil:
    """x = inv(I + strict_upper(a).T) @ x, row-major."""
    cdef char side = b"R", lower = b"L", turned = b"T", unit = b"U"
    cdef int m = columns, n = rows, lda = step_a, ldx = step_x
    cdef real one = 1
    if real is float:
        strsm(&side, &lower, &turned, &unit, &m, &n, &one, <real*> a, &lda, x, &ldx)
    else:
        dtrsm(&side, &lower, &turned, &unit, &m, &n, &one, <real*> a, &lda, x, &ldx)


cdef inline inlined add_products(const real* x, const real* y, Py_ssize_t n, real* lane) noexcept nogil:
    cdef Py_ssize_t i, k
    # lane += (x[:n] * y[:n]).reshape(-1, LANES).sum(0), both filled up with zeros
    for i in range(n // LANES):
        for k in range(LANES):
            lane[k] += x[i * LANES + k] * y[i * LANES + k]
    for k in range(n % LANES):
        lane[k] += x[n // LANES * LANES + k] * y[n // LANES * LANES + k]


cdef inline real folded(real* lane) noexcept nogil:
    """The sum of the lanes, which it overwrites, in a fixed order."""
    cdef Py_ssize_t k
    # lane.reshape(2, 2, 2, 2).sum(0).sum(0).sum(0).sum(0)
    for k in range(8):
        lane[k] += lane[k + 8]
    for k in range(4):
        lane[k] += lane[k + 4]
    return (lane[0] + lane[2]) + (lane[1] + lane[3])


cdef inline real dot(const real* x, const real* y, Py_ssize_t n) noexcept nogil:
    """x @ y, added up in a fixed order."""
    cdef real lane[LANES]
    cdef Py_ssize_t k
    for k in range(LANES):
        lane[k] = 0
    add_products(x, y, n, lane)
    return folded(lane)


cdef inline real inverse_norm(const real* x, Py_ssize_t n) noexcept nogil:
    """1 / max(|x|, 1e-12)."""
    cdef real norm = root(dot(x, x, n))
    return 1 / (norm if not norm < <real> 1e-12 else <real> 1e-12)
