"""BLAS kept to one thread while anybody is inside, with or without the GIL; `threads.one_blas_thread` is the door for Python.

The libraries are OpenBLAS with threads of its own, by the addresses of its functions: threadpoolctl lets one Python thread alone set
their number, and code that runs without Python cannot ask it.
"""

from cpython.pythread cimport WAIT_LOCK, PyThread_acquire_lock, PyThread_allocate_lock, PyThread_release_lock, PyThread_type_lock
from libc.stdint cimport uintptr_t

cdef enum:
    MOST = 64  # libraries

cdef struct Library:
    int (*get)() noexcept nogil
    void (*set)(int) noexcept nogil
    int before

cdef Library[MOST] libraries
cdef int count = 0
cdef int inside = 0  # callers between `enter` and `leave`
cdef PyThread_type_lock lock = PyThread_allocate_lock()


cdef void enter() noexcept nogil:
    """Keep every library to one thread from here on."""
    global inside
    cdef int i
    PyThread_acquire_lock(lock, WAIT_LOCK)
    if inside == 0:
        for i in range(count):
            libraries[i].before = libraries[i].get()
            if libraries[i].before != 1:
                libraries[i].set(1)
    inside += 1
    PyThread_release_lock(lock)


cdef void leave() noexcept nogil:
    """The last caller to leave restores what was before the first came."""
    global inside
    cdef int i
    PyThread_acquire_lock(lock, WAIT_LOCK)
    inside -= 1
    if inside == 0:
        for i in range(count):
            if libraries[i].before != 1:
                libraries[i].set(libraries[i].before)
    PyThread_release_lock(lock)


def begin():
    """`enter`, for Python."""
    with nogil:
        enter()


def end():
    """`leave`, for Python."""
    with nogil:
        leave()


def add(uintptr_t get, uintptr_t set):
    """Care for the library with the functions `int get(void)` and `void set(int)` at these addresses. Nobody may be inside."""
    global count
    if count == MOST:
        raise ValueError(f"at most {MOST} BLAS libraries can be kept to one thread, found one more")
    libraries[count].get = <int (*)() noexcept nogil> get
    libraries[count].set = <void (*)(int) noexcept nogil> set
    count += 1
