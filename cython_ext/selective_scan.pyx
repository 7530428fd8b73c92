"""The normalised selective scan of GroundedMamba, forward and backward.

    pre_t = h_{t-1} + dt_a_t * (h_{t-1} @ transition.T) + dt_b_t * update_t
    h_t   = (pre_t - mean(pre_t)) / sqrt(var(pre_t) + eps) * weight + bias            var: biased, over N

One batch row after another, each by one thread; the sums over the batch are added in row order afterwards, so that no result depends on
the number of threads. Sums over N run in LANES fixed lanes and products are never fused into additions: every processor rounds alike.
Source: GroundThink's StableStateSSM. Letters: B batch, L length, N state.
"""

import numpy as np

from cython.parallel cimport prange

from cython_ext.algebra cimport root
from cython_ext.clones cimport inlined

from cython_ext.checks import MAX_STATE, scan_arguments
from cython_ext.threads import threads_for

cdef enum:
    LIMIT = 256  # MAX_STATE of checks.py, as a constant of C
    LANES = 16  # one AVX-512 register of float32

assert MAX_STATE == LIMIT


cdef inlined clear(real* x) noexcept nogil:
    cdef Py_ssize_t i
    # x[:] = 0
    for i in range(LIMIT):
        x[i] = 0


cdef inline real total(const real* x, Py_ssize_t n) noexcept nogil:
    """Sum of x[:n] in a fixed order; x holds zeros from n up to the next multiple of LANES."""
    cdef real lane[LANES]
    cdef Py_ssize_t i, k
    # lane = x.reshape(-1, LANES).sum(0)
    for k in range(LANES):
        lane[k] = x[k]
    for i in range(1, (n + LANES - 1) // LANES):
        for k in range(LANES):
            lane[k] += x[i * LANES + k]
    # lane.reshape(2, 2, 2, 2).sum(0).sum(0).sum(0).sum(0)
    for k in range(8):
        lane[k] += lane[k + 8]
    for k in range(4):
        lane[k] += lane[k + 4]
    return (lane[0] + lane[2]) + (lane[1] + lane[3])


cdef inlined multiply(const real* x, const real[:, ::1] rows, real* out, Py_ssize_t n) noexcept nogil:
    """out[:n] = x @ rows; both hold zeros from n up to the next multiple of GROUP rows."""
    cdef Py_ssize_t group, i, j
    cdef real x0, x1, x2, x3
    # out = sum(x[j : j + GROUP] @ rows[j : j + GROUP] for j in range(0, n, GROUP))
    for i in range(n):
        out[i] = 0
    for group in range((n + GROUP - 1) // GROUP):
        j = group * GROUP
        x0, x1, x2, x3 = x[j], x[j + 1], x[j + 2], x[j + 3]
        for i in range(n):
            out[i] += (x0 * rows[j, i] + x1 * rows[j + 1, i]) + (x2 * rows[j + 2, i] + x3 * rows[j + 3, i])


cdef inlined forward_body(
    const real[:, :, ::1] update, const real[:, ::1] dt_a, const real[:, ::1] dt_b, bint scaled, const real[:, ::1] transposed,
    const real[::1] weight, const real[::1] bias, const real[:, ::1] start, real[:, :, ::1] states, real eps, Py_ssize_t row, Py_ssize_t n,
) noexcept nogil:
    cdef real h[LIMIT]
    cdef real mixed[LIMIT]
    cdef real pre[LIMIT]
    cdef real square[LIMIT]
    cdef real a, b, mean, scale
    cdef Py_ssize_t t, i
    clear(h)
    clear(pre)
    clear(square)
    # h = start[row]
    for i in range(n):
        h[i] = start[row, i]
    for t in range(update.shape[1]):
        a = dt_a[row, t]
        b = dt_b[row, t] if scaled else 1
        multiply(h, transposed, mixed, n)
        # pre = h + dt_a[row, t] * (h @ transition.T) + dt_b[row, t] * update[row, t]
        for i in range(n):
            pre[i] = h[i] + a * mixed[i] + b * update[row, t, i]
        mean = total(pre, n) / n
        # pre = pre - pre.mean(); square = pre**2
        for i in range(n):
            pre[i] -= mean
            square[i] = pre[i] * pre[i]
        scale = 1 / root(total(square, n) / n + eps)
        # h = pre / np.sqrt(square.mean() + eps) * weight + bias; states[row, t] = h
        for i in range(n):
            h[i] = pre[i] * scale * weight[i] + bias[i]
            states[row, t, i] = h[i]


cdef cloned forward_row(
    const real[:, :, ::1] update, const real[:, ::1] dt_a, const real[:, ::1] dt_b, bint scaled, const real[:, ::1] transposed,
    const real[::1] weight, const real[::1] bias, const real[:, ::1] start, real[:, :, ::1] states, real eps, Py_ssize_t row,
) noexcept nogil:
    # A constant n lets the compiler keep the state in registers; the default size gets that.
    if weight.shape[0] == 16:
        forward_body(update, dt_a, dt_b, scaled, transposed, weight, bias, start, states, eps, row, 16)
    else:
        forward_body(update, dt_a, dt_b, scaled, transposed, weight, bias, start, states, eps, row, weight.shape[0])


cdef forward_rows(
    const real[:, :, ::1] update, const real[:, ::1] dt_a, const real[:, ::1] dt_b, bint scaled, const real[:, ::1] transposed,
    const real[::1] weight, const real[::1] bias, const real[:, ::1] start, real[:, :, ::1] states, real eps, int threads,
):
    cdef Py_ssize_t row
    # for row in range(B): states[row] = scan(update[row], dt_a[row], dt_b[row], start[row])
    for row in prange(update.shape[0], nogil=True, schedule="static", num_threads=threads):
        forward_row(update, dt_a, dt_b, scaled, transposed, weight, bias, start, states, eps, row)


cdef inlined backward_body(
    const real[:, :, ::1] grad_states, const real[:, :, ::1] update, const real[:, ::1] dt_a, const real[:, ::1] dt_b, bint scaled,
    const real[:, ::1] transition, const real[:, ::1] transposed, const real[::1] weight, const real[:, ::1] start,
    const real[:, :, ::1] states, real eps, real[:, :, ::1] grad_update, real[:, ::1] grad_dt_a, real[:, ::1] grad_dt_b,
    real[:, ::1] grad_start, double[:, :, ::1] grad_transition, double[:, ::1] grad_weight, double[:, ::1] grad_bias,
    Py_ssize_t row, Py_ssize_t n,
) noexcept nogil:
    cdef real h[LIMIT]
    cdef real mixed[LIMIT]
    cdef real drive[LIMIT]
    cdef real unit[LIMIT]
    cdef real product[LIMIT]
    cdef real grad[LIMIT]
    cdef real pull[LIMIT]
    cdef real back[LIMIT]
    cdef real carry[LIMIT]
    cdef real a, b, mean, scale, along
    cdef double factor
    cdef Py_ssize_t t, i, j
    clear(h)
    clear(unit)
    clear(product)
    clear(grad)
    clear(pull)
    clear(carry)
    for t in range(update.shape[1] - 1, -1, -1):
        a = dt_a[row, t]
        b = dt_b[row, t] if scaled else 1
        # h = states[row, t - 1] if t else start[row]; drive = update[row, t]
        for i in range(n):
            h[i] = states[row, t - 1, i] if t > 0 else start[row, i]
            drive[i] = update[row, t, i]
        multiply(h, transposed, mixed, n)
        # unit = h + dt_a[row, t] * (h @ transition.T) + dt_b[row, t] * drive
        for i in range(n):
            unit[i] = h[i] + a * mixed[i] + b * drive[i]
        mean = total(unit, n) / n
        # unit = unit - unit.mean(); product = unit**2
        for i in range(n):
            unit[i] -= mean
            product[i] = unit[i] * unit[i]
        scale = 1 / root(total(product, n) / n + eps)
        # unit = unit / np.sqrt(product.mean() + eps); grad = grad_states[row, t] + carry
        # grad_bias[row] += grad; grad_weight[row] += grad * unit; pull = grad * weight; product = pull * unit
        for i in range(n):
            unit[i] *= scale
            grad[i] = grad_states[row, t, i] + carry[i]
            grad_bias[row, i] += grad[i]
            grad_weight[row, i] += grad[i] * unit[i]
            pull[i] = grad[i] * weight[i]
            product[i] = pull[i] * unit[i]
        mean = total(pull, n) / n
        along = total(product, n) / n
        # pull = (pull - pull.mean() - unit * product.mean()) / np.sqrt(var + eps); grad_update[row, t] = dt_b[row, t] * pull
        # product = pull * mixed; grad = pull * drive
        for i in range(n):
            pull[i] = (pull[i] - mean - unit[i] * along) * scale
            grad_update[row, t, i] = b * pull[i]
            product[i] = pull[i] * mixed[i]
            grad[i] = pull[i] * drive[i]
        # grad_dt_a[row, t] = product.sum(); grad_dt_b[row, t] = grad.sum()
        grad_dt_a[row, t] = total(product, n)
        if scaled:
            grad_dt_b[row, t] = total(grad, n)
        multiply(pull, transition, back, n)
        # carry = pull + dt_a[row, t] * (pull @ transition)
        for i in range(n):
            carry[i] = pull[i] + a * back[i]
        # grad_transition[row] += dt_a[row, t] * np.outer(pull, h)
        for i in range(n):
            factor = a * pull[i]
            for j in range(n):
                grad_transition[row, i, j] += factor * h[j]
    # grad_start[row] = carry
    for i in range(n):
        grad_start[row, i] = carry[i]


cdef cloned backward_row(
    const real[:, :, ::1] grad_states, const real[:, :, ::1] update, const real[:, ::1] dt_a, const real[:, ::1] dt_b, bint scaled,
    const real[:, ::1] transition, const real[:, ::1] transposed, const real[::1] weight, const real[:, ::1] start,
    const real[:, :, ::1] states, real eps, real[:, :, ::1] grad_update, real[:, ::1] grad_dt_a, real[:, ::1] grad_dt_b,
    real[:, ::1] grad_start, double[:, :, ::1] grad_transition, double[:, ::1] grad_weight, double[:, ::1] grad_bias, Py_ssize_t row,
) noexcept nogil:
    if weight.shape[0] == 16:
        backward_body(grad_states, update, dt_a, dt_b, scaled, transition, transposed, weight, start, states, eps, grad_update,
                      grad_dt_a, grad_dt_b, grad_start, grad_transition, grad_weight, grad_bias, row, 16)
    else:
        backward_body(grad_states, update, dt_a, dt_b, scaled, transition, transposed, weight, start, states, eps, grad_update,
                      grad_dt_a, grad_dt_b, grad_start, grad_transition, grad_weight, grad_bias, row, weight.shape[0])


cdef backward_rows(
    const real[:, :, ::1] grad_states, const real[:, :, ::1] update, const real[:, ::1] dt_a, const real[:, ::1] dt_b, bint scaled,
    const real[:, ::1] transition, const real[:, ::1] transposed, const real[::1] weight, const real[:, ::1] start,
    const real[:, :, ::1] states, real eps, real[:, :, ::1] grad_update, real[:, ::1] grad_dt_a, real[:, ::1] grad_dt_b,
    real[:, ::1] grad_start, double[:, :, ::1] grad_transition, double[:, ::1] grad_weight, double[:, ::1] grad_bias, int threads,
):
    cdef Py_ssize_t row
    # for row in range(B): every gradient of scan(update[row], dt_a[row], dt_b[row], start[row])
    for row in prange(update.shape[0], nogil=True, schedule="static", num_threads=threads):
        backward_row(grad_states, update, dt_a, dt_b, scaled, transition, transposed, weight, start, states, eps, grad_update,
                     grad_dt_a, grad_dt_b, grad_start, grad_transition, grad_weight, grad_bias, row)


def padded(matrix):
    """`matrix` (N, N) with rows of zeros added until their number is a multiple of GROUP."""
    rows = np.zeros((-(-matrix.shape[0] // GROUP) * GROUP, matrix.shape[1]), matrix.dtype)
    rows[:matrix.shape[0]] = matrix
    return rows


def forward(update, dt_a, dt_b, transition, weight, bias, initial_state=None, eps=1e-5):
    """The state after every token of the normalised selective scan.

    update (B, L, N); dt_a (B, L); dt_b (B, L) or None for 1; transition (N, N); weight, bias (N,) of the LayerNorm;
    initial_state (B, N) or None for zeros; eps added to the variance. All float32 or all float64, N at most 256; arrays that are
    read-only or not contiguous are accepted, the latter copied. Returns the states (B, L, N), a new array.
    Raises TypeError for another type or dtype, ValueError for another shape, an empty axis or an eps that is not positive, by name.
    """
    arrays, eps = scan_arguments(update, dt_a, dt_b, transition, weight, bias, initial_state, eps)
    update, dt_a, dt_b, transition, weight, bias, initial_state = arrays
    batch, length, n = update.shape
    threads = threads_for(batch, batch * length * n * n)
    start = np.zeros((batch, n), update.dtype) if initial_state is None else initial_state
    scale = dt_a if dt_b is None else dt_b  # with dt_b None this one is not read
    states = np.empty_like(update)
    if update.dtype == np.float32:
        forward_rows[float](update, dt_a, scale, dt_b is not None, padded(transition.T), weight, bias, start, states, eps, threads)
    else:
        forward_rows[double](update, dt_a, scale, dt_b is not None, padded(transition.T), weight, bias, start, states, eps, threads)
    return states


def backward(grad_states, update, dt_a, dt_b, transition, weight, bias, initial_state, states, eps):
    """The gradients of every array argument of `forward`, given the gradient of the states that it returned.

    grad_states, states (B, L, N), the latter as `forward` returned it; the rest as `forward` took it. Returns a tuple in the order
    (update, dt_a, dt_b, transition, weight, bias, initial_state), each of the argument's shape and dtype; None where the argument
    was None. Sums over B and L are taken in float64. Raises as `forward` does.
    """
    arrays, eps = scan_arguments(
        update, dt_a, dt_b, transition, weight, bias, initial_state, eps, grad_states=grad_states, states=states)
    update, dt_a, dt_b, transition, weight, bias, initial_state, grad_states, states = arrays
    batch, length, n = update.shape
    threads = threads_for(batch, 3 * batch * length * n * n)
    start = np.zeros((batch, n), update.dtype) if initial_state is None else initial_state
    scale = dt_a if dt_b is None else dt_b
    grad_update, grad_dt_a, grad_start = np.empty_like(update), np.empty_like(dt_a), np.empty_like(start)
    grad_dt_b = grad_dt_a if dt_b is None else np.empty_like(dt_b)
    grad_transition, grad_weight, grad_bias = np.zeros((batch, n, n)), np.zeros((batch, n)), np.zeros((batch, n))
    arguments = (
        grad_states, update, dt_a, scale, dt_b is not None, padded(transition), padded(transition.T), weight, start, states, eps,
        grad_update, grad_dt_a, grad_dt_b, grad_start, grad_transition, grad_weight, grad_bias, threads)
    if update.dtype == np.float32:
        backward_rows[float](*arguments)
    else:
        backward_rows[double](*arguments)
    shared = [rows.sum(0).astype(update.dtype) for rows in (grad_transition, grad_weight, grad_bias)]
    return (grad_update, grad_dt_a, None if dt_b is None else grad_dt_b, *shared, None if initial_state is None else grad_start)
