"""The hierarchical delta rule of LAM, forward.

Inside a chunk of normalised keys K and queries Q, with K_b = beta K and N = -strict_lower(K_b K^T):

    T = I + N + strict_lower(N N^T)  ("lam")   or   (I - N)^-1  ("exact")
    U = T (beta V)     W = T K_b     Aq = lower(Q K^T)

and from chunk to chunk, with R_x = S_x / (|S_x|_F + 1e-8) of the decayed states, x in {fast, slow}:

    o_x = gate_x (Aq U + (Q - Aq W) R_x)     S_x <- S_x + K^T U - (K^T W) R_x     then the cross update and the normalisation

Whatever does not need a state is done for every chunk and head at once; a head then walks through its chunks. Both happen window by window,
so that buffers do not grow with L. Blocks of work are cut by shape alone and BLAS keeps to one thread, so that no result depends on the
number of threads; each chunk is computed at the size that it has, so that none depends on the padding.
Source: LAM's hierarchical DeltaNet. Letters: B batch, H heads, L length, d head width, C chunk, m hidden width of a flux; head: one of B * H.
"""

import numpy as np

from cython.parallel cimport prange, threadid

from cython_ext.algebra cimport LANES, add_products, clamped, folded, inverse_norm, multiply, root, sigmoid, solve
from cython_ext.clones cimport inlined
from cython_ext.functions cimport silu_dot

from cython_ext.checks import hierarchical_arguments
from cython_ext.plain_delta import backward, forward
from cython_ext.threads import one_blas_thread, threads_for

WINDOW_BYTES = 1 << 20  # buffers of a window of chunks: they are to stay in cache between the two phases


cdef inlined prepare(
    const real[:, :, ::1] q, const real[:, :, ::1] k, const real[:, :, ::1] v, const real[:, ::1] beta, const real[:, ::1] token_in,
    const real[:, ::1] token_out, real[:, :, ::1] queries, real[:, :, ::1] keys, real[:, :, :, ::1] turned, real[:, :, ::1] scaled,
    real[:, :, ::1] wide, real[:, ::1] phi, Py_ssize_t head, Py_ssize_t start, Py_ssize_t place, Py_ssize_t n, int thread,
) noexcept nogil:
    """Steps 1 to 3 for n tokens from `start`: normalised queries and keys, turned = [keys.T, beta keys.T], scaled = [beta v, beta k], phi."""
    cdef Py_ssize_t d = q.shape[2], hidden = token_in.shape[1], t, i
    cdef real by_q, by_k, by
    for t in range(n):
        by_q, by_k, by = inverse_norm(&q[head, start + t, 0], d), inverse_norm(&k[head, start + t, 0], d), beta[head, start + t]
        # queries[t] = q / |q|; keys[t] = k / |k|; scaled[t] = np.append(beta * v, beta * keys[t])
        for i in range(d):
            queries[thread, t, i] = q[head, start + t, i] * by_q
        for i in range(d):
            keys[thread, t, i] = k[head, start + t, i] * by_k
        for i in range(d):
            scaled[thread, t, i] = v[head, start + t, i] * by
        for i in range(d):
            scaled[thread, t, d + i] = keys[thread, t, i] * by
    # turned = [keys.T, scaled[:, d:].T]
    for i in range(d):
        for t in range(n):
            turned[thread, 0, i, t] = keys[thread, t, i]
        for t in range(n):
            turned[thread, 1, i, t] = turned[thread, 0, i, t] * beta[head, start + t]
    # wide = scaled @ token_in
    multiply(False, False, n, hidden, 2 * d, 1, &scaled[thread, 0, 0], 2 * d, &token_in[0, 0], hidden, 0, &wide[thread, 0, 0], hidden)
    # phi = np.clip(sigmoid(silu(wide + token_out[0]) @ token_out[1] + bias), 0.01, 0.99)
    for t in range(n):
        phi[head, place + t] = clamped(sigmoid(silu_dot(&wide[thread, t, 0], &token_out[0, 0], &token_out[1, 0], hidden) + token_out[2, 0]))


cdef inlined transform_rows(
    real[:, :, ::1] keys, real[:, :, :, ::1] turned, real[:, :, ::1] scaled, real[:, :, ::1] square, real[:, :, ::1] strip,
    real[:, :, ::1] moved, Py_ssize_t low, Py_ssize_t high, Py_ssize_t columns, bint exact, int thread,
) noexcept nogil:
    """Step 4 for the rows from `low` to `high` of a chunk, the rows before them done: moved = T @ scaled = [U, W].

    `square` is -N.T, strictly upper, and `strip` the columns of T.T: BLAS has quick kernels for a @ b and a.T @ b, none for a @ b.T.
    """
    cdef Py_ssize_t d = keys.shape[2], size = square.shape[2], step = strip.shape[2], rows = high - low, t, i
    # square[:high, low:high] = keys[:high] @ (beta keys)[low:high].T
    multiply(False, False, high, rows, d, 1, &keys[thread, 0, 0], d, &turned[thread, 1, 0, low], size, 0, &square[thread, 0, low], size)
    if exact:
        # moved = inv(I + square.T) @ scaled, the rows above already solved
        for t in range(low, high):
            for i in range(columns):
                moved[thread, t, i] = scaled[thread, t, i]
        if low:
            multiply(True, False, rows, columns, low, -1, &square[thread, 0, low], size, &moved[thread, 0, 0], 2 * d, 1,
                     &moved[thread, low, 0], 2 * d)
        solve(rows, columns, &square[thread, low, low], size, &moved[thread, low, 0], 2 * d)
        return
    for i in range(low, high):
        for t in range(i + 1):
            square[thread, i, t] = 0
    # strip = (I + strict_upper(square.T @ square - square))[:high, low:high]; moved = strip.T @ scaled
    multiply(True, False, high, rows, high, 1, &square[thread, 0, 0], size, &square[thread, 0, low], size, 0, &strip[thread, 0, 0], step)
    for i in range(low):
        for t in range(rows):
            strip[thread, i, t] -= square[thread, i, low + t]
    for i in range(low, high):
        for t in range(i - low):
            strip[thread, i, t] = 0
        strip[thread, i, i - low] = 1
        for t in range(i - low + 1, rows):
            strip[thread, i, t] -= square[thread, i, low + t]
    multiply(True, False, rows, columns, high, 1, &strip[thread, 0, 0], step, &scaled[thread, 0, 0], 2 * d, 0, &moved[thread, low, 0], 2 * d)


cdef inline real chunk_flux(
    real[:, :, ::1] keys, real[:, :, ::1] moved, real[:, :, :, ::1] written, const real[:, ::1] chunk_in, const real[:, ::1] chunk_out,
    const real[:, :, ::1] bilinear, const real[::1] temp, real[:, :, ::1] facts, Py_ssize_t head, Py_ssize_t slot, Py_ssize_t n, int thread,
) noexcept nogil:
    """Step 5: psi of a chunk. s sums to the inner product of the bilinear form and K^T U, which is at hand."""
    cdef Py_ssize_t d = keys.shape[2], hidden = chunk_in.shape[1], h = head % temp.shape[0], t, i, j
    # facts = [keys.mean(0), U.mean(0), (bilinear[h] * K^T U).sum() / temp[h] / n]
    for i in range(2 * d + 1):
        facts[thread, 0, i] = 0
    for t in range(n):
        for i in range(d):
            facts[thread, 0, i] += keys[thread, t, i]
            facts[thread, 0, d + i] += moved[thread, t, i]
    for j in range(d):
        facts[thread, 1, j] = 0
    for i in range(d):
        for j in range(d):
            facts[thread, 1, j] += bilinear[h, i, j] * written[head, slot, i, j]
    for j in range(d):
        facts[thread, 0, 2 * d] += facts[thread, 1, j]
    facts[thread, 0, 2 * d] /= temp[h]
    # psi = np.clip(sigmoid(silu(facts @ chunk_in + chunk_out[0]) @ chunk_out[1] + bias), 0.01, 0.99)
    for j in range(hidden):
        facts[thread, 1, j] = 0
    for i in range(2 * d + 1):
        facts[thread, 0, i] /= n
        for j in range(hidden):
            facts[thread, 1, j] += facts[thread, 0, i] * chunk_in[i, j]
    return clamped(sigmoid(silu_dot(&facts[thread, 1, 0], &chunk_out[0, 0], &chunk_out[1, 0], hidden) + chunk_out[2, 0]))


cdef inline real mean(const real[:, ::1] x, Py_ssize_t head, Py_ssize_t start, Py_ssize_t n) noexcept nogil:
    cdef real total = 0
    cdef Py_ssize_t t
    # x[head, start : start + n].mean()
    for t in range(n):
        total += x[head, start + t]
    return total / n


cdef cloned inside_chunk(
    const real[:, :, ::1] q, const real[:, :, ::1] k, const real[:, :, ::1] v, const real[:, ::1] beta, const real[:, ::1] fast_decay,
    const real[:, ::1] slow_decay, const real[:, ::1] token_in, const real[:, ::1] token_out, const real[:, ::1] chunk_in,
    const real[:, ::1] chunk_out, const real[:, :, ::1] bilinear, const real[::1] temp, const Py_ssize_t[::1] lengths,
    real[:, :, ::1] queries, real[:, :, ::1] keys, real[:, :, :, ::1] turned, real[:, :, ::1] scaled, real[:, :, ::1] moved,
    real[:, :, ::1] wide, real[:, :, ::1] square, real[:, :, ::1] strip, real[:, :, ::1] scores, real[:, :, ::1] facts, real[:, ::1] phi,
    real[:, :, ::1] read, real[:, :, :, ::1] written, real[:, :, ::1] rates, Py_ssize_t first, Py_ssize_t chunks, Py_ssize_t block,
    bint fresh, bint exact, int thread,
) noexcept nogil:
    cdef Py_ssize_t d = q.shape[2], size = square.shape[2], head = block // chunks, slot = block % chunks
    cdef Py_ssize_t start = (first + slot) * size, place = slot * size, n = min(size, lengths[head // temp.shape[0]] - start)
    # W serves to read a state alone, and the first chunk of a fresh one finds nothing to read
    cdef Py_ssize_t columns = d if fresh and first + slot == 0 else 2 * d, group, low, high, t, i
    if n <= 0:
        return
    prepare(q, k, v, beta, token_in, token_out, queries, keys, turned, scaled, wide, phi, head, start, place, n, thread)
    for group in range((n + ROWS - 1) // ROWS):
        low, high = group * ROWS, min(group * ROWS + ROWS, n)
        transform_rows(keys, turned, scaled, square, strip, moved, low, high, columns, exact, thread)
        # scores = lower(queries @ keys.T)[low:high]; read = scores @ [U, W]
        multiply(False, False, high - low, high, d, 1, &queries[thread, low, 0], d, &turned[thread, 0, 0, 0], size, 0, &scores[thread, 0, 0],
                 size)
        for t in range(low, high):
            for i in range(t + 1, high):
                scores[thread, t - low, i] = 0
        multiply(False, False, high - low, columns, high, 1, &scores[thread, 0, 0], size, &moved[thread, 0, 0], 2 * d, 0,
                 &read[head, place + low, 0], 2 * d)
    if columns > d:
        # read = [Aq U, queries - Aq W]
        for t in range(n):
            for i in range(d):
                read[head, place + t, d + i] = queries[thread, t, i] - read[head, place + t, d + i]
    # written = keys.T @ [U, W]
    multiply(True, False, d, columns, n, 1, &keys[thread, 0, 0], d, &moved[thread, 0, 0], 2 * d, 0, &written[head, slot, 0, 0], 2 * d)
    rates[head, slot, 0] = chunk_flux(keys, moved, written, chunk_in, chunk_out, bilinear, temp, facts, head, slot, n, thread)
    rates[head, slot, 1] = mean(fast_decay, head, start, n)
    rates[head, slot, 2] = mean(slow_decay, head, start, n)


cdef inlined normalise(real[:, :, ::1] states, real[:, :, ::1] out, Py_ssize_t head, Py_ssize_t to) noexcept nogil:
    """out[to] = [S_fast / (|S_fast| + 1e-8), the same of S_slow] of states[head]; the two may be one array."""
    cdef real fast[LANES]
    cdef real slow[LANES]
    cdef Py_ssize_t d = states.shape[1], i, j, k
    cdef real by_fast, by_slow
    for k in range(LANES):
        fast[k] = slow[k] = 0
    for i in range(d):
        add_products(&states[head, i, 0], &states[head, i, 0], d, fast)
        add_products(&states[head, i, d], &states[head, i, d], d, slow)
    by_fast, by_slow = 1 / (root(folded(fast)) + <real> 1e-8), 1 / (root(folded(slow)) + <real> 1e-8)
    for i in range(d):
        for j in range(d):
            out[to, i, j] = states[head, i, j] * by_fast
            out[to, i, d + j] = states[head, i, d + j] * by_slow


cdef inlined output(
    const real[:, ::1] fast_gate, const real[:, ::1] slow_gate, real[:, ::1] phi, real[:, :, ::1] read, real[:, :, ::1] recalled,
    real[:, :, ::1] o, Py_ssize_t head, Py_ssize_t start, Py_ssize_t place, Py_ssize_t n, bint fresh, int thread,
) noexcept nogil:
    cdef Py_ssize_t d = o.shape[2], t, i
    cdef real alpha, fast, slow
    for t in range(n):
        alpha = <real> 0.5 + <real> 0.3 * phi[head, place + t]
        fast, slow = alpha * fast_gate[head, start + t], (1 - alpha) * slow_gate[head, start + t]
        # o = alpha * fast_gate * (own + recalled_fast) + (1 - alpha) * slow_gate * (own + recalled_slow); own: first half of read
        if fresh:
            for i in range(d):
                o[head, start + t, i] = (fast + slow) * read[head, place + t, i]
        else:
            for i in range(d):
                o[head, start + t, i] = fast * (read[head, place + t, i] + recalled[thread, t, i]) + slow * (
                    read[head, place + t, i] + recalled[thread, t, d + i])


cdef cloned across_chunks(
    const real[:, ::1] fast_gate, const real[:, ::1] slow_gate, const Py_ssize_t[::1] lengths, real[:, ::1] phi, real[:, :, ::1] read,
    real[:, :, :, ::1] written, real[:, :, ::1] rates, real[:, :, ::1] states, real[:, :, ::1] unit, real[:, :, ::1] recalled,
    real[:, :, ::1] o, Py_ssize_t heads, Py_ssize_t size, Py_ssize_t first, Py_ssize_t chunks, Py_ssize_t head, bint fresh, int thread,
) noexcept nogil:
    """Step 6 for one head, over the chunks of a window."""
    cdef Py_ssize_t d = o.shape[2], sample = head // heads, slot, start, place, n, i, j
    cdef real psi, mix, by_fast, by_slow, fast, slow
    cdef bint empty
    for slot in range(chunks):
        start, place, empty = (first + slot) * size, slot * size, fresh and first + slot == 0
        n = min(size, lengths[sample] - start)
        if n <= 0:
            break
        psi, mix = rates[head, slot, 0], 0
        # mix = 0.05 + 0.1 * mean over the heads of psi
        for i in range(heads):
            mix += rates[sample * heads + i, slot, 0]
        mix = <real> 0.05 + <real> 0.1 * (mix / heads)
        if empty:
            for i in range(d):
                for j in range(d):
                    states[head, i, j] = states[head, i, d + j] = written[head, slot, i, j]
        else:
            by_fast = rates[head, slot, 1] * (1 - <real> 0.10 * psi)
            by_slow = rates[head, slot, 2] * (1 - <real> 0.05 * psi)
            # states = decay * states; unit = R; recalled = (Q - Aq W) @ R
            for i in range(d):
                for j in range(d):
                    states[head, i, j] *= by_fast
                    states[head, i, d + j] *= by_slow
            normalise(states, unit, head, thread)
            multiply(False, False, n, 2 * d, d, 1, &read[head, place, d], 2 * d, &unit[thread, 0, 0], 2 * d, 0, &recalled[thread, 0, 0], 2 * d)
            # states = states + K^T U - (K^T W) @ R
            for i in range(d):
                for j in range(d):
                    states[head, i, j] += written[head, slot, i, j]
                    states[head, i, d + j] += written[head, slot, i, j]
            multiply(False, False, d, 2 * d, d, -1, &written[head, slot, 0, d], 2 * d, &unit[thread, 0, 0], 2 * d, 1, &states[head, 0, 0], 2 * d)
        output(fast_gate, slow_gate, phi, read, recalled, o, head, start, place, n, empty, thread)
        # S_fast, S_slow = S_fast + mix * psi * S_slow, S_slow + mix * (1 - psi) * S_fast, then each / (norm + 1e-8)
        for i in range(d):
            for j in range(d):
                fast, slow = states[head, i, j], states[head, i, d + j]
                states[head, i, j] = fast + mix * psi * slow
                states[head, i, d + j] = slow + mix * (1 - psi) * fast
        normalise(states, states, head, head)
    # o[lengths:] = 0, once
    if first == 0:
        for i in range(lengths[sample], o.shape[1]):
            for j in range(d):
                o[head, i, j] = 0


cdef window_inside(
    const real[:, :, ::1] q, const real[:, :, ::1] k, const real[:, :, ::1] v, const real[:, ::1] beta, const real[:, ::1] fast_decay,
    const real[:, ::1] slow_decay, const real[:, ::1] token_in, const real[:, ::1] token_out, const real[:, ::1] chunk_in,
    const real[:, ::1] chunk_out, const real[:, :, ::1] bilinear, const real[::1] temp, const Py_ssize_t[::1] lengths,
    real[:, :, ::1] queries, real[:, :, ::1] keys, real[:, :, :, ::1] turned, real[:, :, ::1] scaled, real[:, :, ::1] moved,
    real[:, :, ::1] wide, real[:, :, ::1] square, real[:, :, ::1] strip, real[:, :, ::1] scores, real[:, :, ::1] facts, real[:, ::1] phi,
    real[:, :, ::1] read, real[:, :, :, ::1] written, real[:, :, ::1] rates, Py_ssize_t first, Py_ssize_t chunks, bint fresh, bint exact,
    int threads,
):
    cdef Py_ssize_t block
    # for head, chunk in the window: phi, read, written, rates = steps 1 to 5
    for block in prange(rates.shape[0] * chunks, nogil=True, schedule="dynamic", num_threads=threads):
        inside_chunk(q, k, v, beta, fast_decay, slow_decay, token_in, token_out, chunk_in, chunk_out, bilinear, temp, lengths, queries, keys,
                     turned, scaled, moved, wide, square, strip, scores, facts, phi, read, written, rates, first, chunks, block, fresh, exact,
                     threadid())


cdef window_across(
    const real[:, ::1] fast_gate, const real[:, ::1] slow_gate, const Py_ssize_t[::1] lengths, real[:, ::1] phi, real[:, :, ::1] read,
    real[:, :, :, ::1] written, real[:, :, ::1] rates, real[:, :, ::1] states, real[:, :, ::1] unit, real[:, :, ::1] recalled,
    real[:, :, ::1] o, Py_ssize_t heads, Py_ssize_t size, Py_ssize_t first, Py_ssize_t chunks, bint fresh, int threads,
):
    cdef Py_ssize_t head
    # for head in range(B * H): o, states = step 6
    for head in prange(rates.shape[0], nogil=True, schedule="dynamic", num_threads=threads):
        across_chunks(fast_gate, slow_gate, lengths, phi, read, written, rates, states, unit, recalled, o, heads, size, first, chunks, head,
                      fresh, threadid())


def vectors(mlp):
    """b0, w2 and b2 of a flux as the rows of one array (3, m)."""
    rows = np.zeros((3, mlp[1].size), mlp[1].dtype)
    rows[0], rows[1], rows[2, 0] = mlp[1], mlp[2][0], mlp[3][0]
    return rows


def hierarchical_forward(
    q, k, v, beta, fast_decay, slow_decay, fast_gate, slow_gate, token_mlp, chunk_mlp, bilinear, temp, mask=None, initial_state=None,
    chunk_size=64, transform="lam",
):
    """The hierarchical delta rule: a fast and a slow memory, decayed, read, written, mixed and normalised once per chunk.

    q, k, v (B, H, L, d), not yet normalised; beta, decays and gates (B, H, L) in (0, 1); token_mlp: weights (m, 2d), (m,), (1, m), (1,);
    chunk_mlp the same with 2d + 1 inputs; bilinear (H, d, d); temp (H,); mask (B, L), true for valid tokens, padding on the right, or None;
    initial_state (S_fast, S_slow), each (B, H, d, d), or None for zeros; chunk_size tokens in a chunk; transform "lam" or "exact".
    All float32 or all float64, the mask bool; arrays that are read-only or not contiguous are accepted, the latter copied.
    Returns o (B, H, L, d), zero at padded positions, and the last states (S_fast, S_slow), all new arrays.
    Raises TypeError for another type or dtype, ValueError for another shape, an empty axis, a mask with a hole or an empty row, a
    chunk_size below 1 or an unknown transform, by name.
    """
    named = {"q": q, "k": k, "v": v, "beta": beta, "fast_decay": fast_decay, "slow_decay": slow_decay, "fast_gate": fast_gate, "slow_gate": slow_gate}
    arrays, token_mlp, chunk_mlp, bilinear, temp, lengths, initial_state, size = hierarchical_arguments(
        named, token_mlp, chunk_mlp, bilinear, temp, mask, initial_state, chunk_size, transform)
    batch, heads, length, d = q.shape
    rows, chunks, dtype = batch * heads, -(-length // size), q.dtype
    q, k, v, beta, fast_decay, slow_decay, fast_gate, slow_gate = (x.reshape(rows, *x.shape[2:]) for x in arrays)
    token_in = np.concatenate([token_mlp[0][:, d:], token_mlp[0][:, :d]], axis=1).T.copy()  # the kernel keeps beta v before beta k
    token_out, chunk_in, chunk_out = vectors(token_mlp), chunk_mlp[0].T.copy(), vectors(chunk_mlp)
    threads = threads_for(rows * chunks, rows * length * d * (3 * size + 4 * d))
    window = max(1, min(chunks, WINDOW_BYTES // (rows * 2 * d * (size + d) * dtype.itemsize)))
    strip = min(ROWS, size)

    def new(*shape):
        return np.empty(shape, dtype)

    queries, keys, turned = new(threads, size, d), new(threads, size, d), new(threads, 2, d, size)
    scaled, moved, wide = new(threads, size, 2 * d), new(threads, size, 2 * d), new(threads, size, token_in.shape[1])
    square, strip, scores = new(threads, size, size), new(threads, size, strip), new(threads, strip, size)
    facts, unit, recalled = new(threads, 2, max(2 * d + 1, chunk_in.shape[1])), new(threads, d, 2 * d), new(threads, size, 2 * d)
    phi, read, written, rates = new(rows, window * size), new(rows, window * size, 2 * d), new(rows, window, d, 2 * d), new(rows, window, 3)
    o, states = new(rows, length, d), new(rows, d, 2 * d)
    fresh, exact = initial_state is None, transform == "exact"
    if not fresh:
        np.concatenate([state.reshape(rows, d, d) for state in initial_state], axis=2, out=states)
    with one_blas_thread():
        for first in range(0, chunks, window):
            part = min(window, chunks - first)
            if dtype == np.float32:
                window_inside[float](
                    q, k, v, beta, fast_decay, slow_decay, token_in, token_out, chunk_in, chunk_out, bilinear, temp, lengths, queries, keys, turned,
                    scaled, moved, wide, square, strip, scores, facts, phi, read, written, rates, first, part, fresh, exact, threads)
                window_across[float](
                    fast_gate, slow_gate, lengths, phi, read, written, rates, states, unit, recalled, o, heads, size, first, part, fresh, threads)
            else:
                window_inside[double](
                    q, k, v, beta, fast_decay, slow_decay, token_in, token_out, chunk_in, chunk_out, bilinear, temp, lengths, queries, keys, turned,
                    scaled, moved, wide, square, strip, scores, facts, phi, read, written, rates, first, part, fresh, exact, threads)
                window_across[double](
                    fast_gate, slow_gate, lengths, phi, read, written, rates, states, unit, recalled, o, heads, size, first, part, fresh, threads)
    states = states.reshape(batch, heads, d, 2 * d)
    return o.reshape(batch, heads, length, d), (states[..., :d].copy(), states[..., d:].copy())
