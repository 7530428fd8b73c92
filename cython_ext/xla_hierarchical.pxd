# The hierarchical delta rule of a call by XLA, on at most `most` threads; its operands are in xla_hierarchical.pyx.

from libc.stdint cimport int64_t

from cython_ext.algebra cimport real
from cython_ext.xla_abi cimport Frame, Room

cdef void hierarchical(Frame* frame, Room* room, int64_t most, real* kind) noexcept nogil
