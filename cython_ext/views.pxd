# Typed memoryviews over memory that no Python object owns, made without the GIL: `view3(start, a, b, c)` for a C-contiguous (a, b, c) there.
#
# Cython makes views from objects alone, which takes the GIL. These are filled in by hand; all of them belong to one array of the module that
# makes them, given once to `adopt`, so that Cython's counting of owners goes on as ever and never reaches zero.

from cython_ext.algebra cimport real

cdef extern from *:
    """
    static void *groundwave_owner;
    #define GROUNDWAVE_ADOPT(view) (groundwave_owner = (void *) (view).memview)
    #define GROUNDWAVE_VIEW(start, ...) ({ \\
        Py_ssize_t sizes_[] = {__VA_ARGS__}, step_ = sizeof(*(start)); \\
        __Pyx_memviewslice view_ = {0}; \\
        view_.memview = (struct __pyx_memoryview_obj *) groundwave_owner; \\
        view_.data = (char *) (start); \\
        for (int axis_ = (int) (sizeof(sizes_) / sizeof(*sizes_)) - 1; axis_ >= 0; axis_--) { \\
            view_.shape[axis_] = sizes_[axis_]; \\
            view_.strides[axis_] = step_; \\
            view_.suboffsets[axis_] = -1; \\
            step_ *= sizes_[axis_]; \\
        } \\
        __PYX_INC_MEMVIEW(&view_, 0); \\
        view_; })
    """
    void adopt "GROUNDWAVE_ADOPT"(double[::1] owner)
    Py_ssize_t[::1] whole1 "GROUNDWAVE_VIEW"(Py_ssize_t* start, Py_ssize_t a) nogil
    float[::1] float1 "GROUNDWAVE_VIEW"(float* start, Py_ssize_t a) nogil
    float[:, ::1] float2 "GROUNDWAVE_VIEW"(float* start, Py_ssize_t a, Py_ssize_t b) nogil
    float[:, :, ::1] float3 "GROUNDWAVE_VIEW"(float* start, Py_ssize_t a, Py_ssize_t b, Py_ssize_t c) nogil
    float[:, :, :, ::1] float4 "GROUNDWAVE_VIEW"(float* start, Py_ssize_t a, Py_ssize_t b, Py_ssize_t c, Py_ssize_t d) nogil
    double[::1] double1 "GROUNDWAVE_VIEW"(double* start, Py_ssize_t a) nogil
    double[:, ::1] double2 "GROUNDWAVE_VIEW"(double* start, Py_ssize_t a, Py_ssize_t b) nogil
    double[:, :, ::1] double3 "GROUNDWAVE_VIEW"(double* start, Py_ssize_t a, Py_ssize_t b, Py_ssize_t c) nogil
    double[:, :, :, ::1] double4 "GROUNDWAVE_VIEW"(double* start, Py_ssize_t a, Py_ssize_t b, Py_ssize_t c, Py_ssize_t d) nogil


cdef inline real[::1] view1(real* start, Py_ssize_t a) noexcept nogil:
    if real is float:
        return float1(start, a)
    else:
        return double1(start, a)


cdef inline real[:, ::1] view2(real* start, Py_ssize_t a, Py_ssize_t b) noexcept nogil:
    if real is float:
        return float2(start, a, b)
    else:
        return double2(start, a, b)


cdef inline real[:, :, ::1] view3(real* start, Py_ssize_t a, Py_ssize_t b, Py_ssize_t c) noexcept nogil:
    if real is float:
        return float3(start, a, b, c)
    else:
        return double3(start, a, b, c)


cdef inline real[:, :, :, ::1] view4(real* start, Py_ssize_t a, Py_ssize_t b, Py_ssize_t c, Py_ssize_t d) noexcept nogil:
    if real is float:
        return float4(start, a, b, c, d)
    else:
        return double4(start, a, b, c, d)
