# What XLA hands to a custom call and what it reads back: the structures of XLA's FFI in C, `xla/ffi/api/c_api.h` of version 0.3, as far as
# they are read here, and where a handler finds things in them.
#
# The layout is a stable binary interface: XLA asks a handler for the version that it was built for and refuses one that it no longer serves,
# so that building needs neither jaxlib nor a C++ compiler. Source: https://openxla.org/xla/custom_call.

from libc.stdint cimport int64_t, uint32_t
from libc.stdlib cimport malloc
from libc.string cimport memcmp, strlen

from cython_ext.algebra cimport real

cdef enum:
    MAJOR = 0
    MINOR = 3
    METADATA = 1  # the extension that asks for the version
    EXECUTE = 3  # the stage in which there is something to do
    BOOL = 1  # types of buffers
    FLOAT32 = 11
    FLOAT64 = 12
    INVALID = 3  # error codes
    EXHAUSTED = 8
    MOST = 24  # pieces of scratch memory in a call

cdef struct Extension:
    size_t struct_size
    int kind
    Extension* next

cdef struct Version:
    size_t struct_size
    Extension* extensions
    int major
    int minor

cdef struct Metadata:
    size_t struct_size
    Version version
    uint32_t traits

cdef struct MetadataExtension:
    Extension base
    Metadata* metadata

ctypedef void Error  # XLA's own

cdef struct Complaint:
    size_t struct_size
    Extension* extensions
    const char* message
    int code

cdef struct Api:
    size_t struct_size
    Extension* extensions
    Version version
    const void* internal
    Error* (*create_error)(Complaint*) noexcept nogil

cdef struct Buffer:
    size_t struct_size
    Extension* extensions
    int kind
    void* data
    int64_t rank
    int64_t* sizes

cdef struct Buffers:
    size_t struct_size
    Extension* extensions
    int64_t count
    int* kinds
    Buffer** items

cdef struct Name:
    const char* start
    size_t length

cdef struct Scalar:
    int kind
    void* value

cdef struct Attributes:
    size_t struct_size
    Extension* extensions
    int64_t count
    int* kinds
    Name** names
    Scalar** items  # where every attribute is a number

cdef struct Frame:
    size_t struct_size
    Extension* extensions
    const Api* api
    void* context
    int stage
    Buffers arguments
    Buffers results
    Attributes attributes

cdef struct Room:  # scratch memory of a call
    void* held[MOST]
    int count
    bint failed

ctypedef Error* (*Handler)(Frame*) noexcept nogil


cdef inline bint answered(Frame* frame) noexcept nogil:
    """Whether XLA asks for the version that the handler was built for rather than for its work; if so, it has the answer."""
    cdef Metadata* metadata
    if frame.extensions is NULL or frame.extensions.kind != METADATA:
        return False
    metadata = (<MetadataExtension*> frame.extensions).metadata
    metadata.version.major, metadata.version.minor, metadata.traits = MAJOR, MINOR, 0
    return True


cdef inline Error* refusal(Frame* frame, int code, const char* message) noexcept nogil:
    cdef Complaint complaint
    complaint.struct_size, complaint.extensions, complaint.message, complaint.code = sizeof(Complaint), NULL, message, code
    return frame.api.create_error(&complaint)


cdef inline Py_ssize_t size(Frame* frame, int argument, int axis) noexcept nogil:
    return frame.arguments.items[argument].sizes[axis]


cdef inline void* attribute(Frame* frame, const char* name) noexcept nogil:
    """Where the value of a number by name is; NULL without one."""
    cdef int64_t i
    for i in range(frame.attributes.count):
        if frame.attributes.names[i].length == strlen(name) and not memcmp(frame.attributes.names[i].start, name, strlen(name)):
            return frame.attributes.items[i].value
    return NULL


cdef inline int64_t whole(Frame* frame, const char* name) noexcept nogil:
    """An int64 attribute; 0 without one."""
    cdef int64_t* value = <int64_t*> attribute(frame, name)
    return 0 if value is NULL else value[0]


cdef inline double number(Frame* frame, const char* name) noexcept nogil:
    """A float64 attribute; 0 without one."""
    cdef double* value = <double*> attribute(frame, name)
    return 0 if value is NULL else value[0]


cdef inline real* given(Frame* frame, int operand, real* kind) noexcept nogil:
    return <real*> frame.arguments.items[operand].data


cdef inline real* made(Frame* frame, int result, real* kind) noexcept nogil:
    return <real*> frame.results.items[result].data


cdef inline real* scratch(Room* room, Py_ssize_t entries, real* kind) noexcept nogil:
    """New memory for `entries`, which the end of the call frees; NULL, and `room.failed`, where there is none."""
    cdef void* memory = malloc(entries * sizeof(real))
    room.failed = room.failed or memory is NULL
    room.held[room.count] = memory
    room.count += 1
    return <real*> memory


cdef inline void add_rows(const double* rows, Py_ssize_t count, Py_ssize_t n, real* out) noexcept nogil:
    cdef Py_ssize_t row, i
    cdef double total
    # out = rows.sum(0)
    for i in range(n):
        total = rows[i]
        for row in range(1, count):
            total += rows[row * n + i]
        out[i] = <real> total
