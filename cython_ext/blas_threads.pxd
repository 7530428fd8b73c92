# BLAS on one thread while anybody is between `enter` and `leave`, for code that does not hold the GIL.

cdef void enter() noexcept nogil
cdef void leave() noexcept nogil
