# Return types that carry a compiler attribute: a function declared with `cloned` is compiled once for the baseline, once for AVX2 and
# once for AVX-512, and the loader picks one for the processor, so that one wheel serves them all; `inlined` goes into each caller, and
# so into each clone. Where the compiler or the C library lacks indirect functions, and with -DGROUNDWAVE_CLONES=, only the baseline is
# built.

cdef extern from *:
    """
    #ifndef GROUNDWAVE_CLONES
    #if defined(__x86_64__) && defined(__linux__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
    #define GROUNDWAVE_CLONES __attribute__((target_clones("default", "avx2", "avx512f")))
    #else
    #define GROUNDWAVE_CLONES
    #endif
    #endif
    #define GROUNDWAVE_INLINE inline __attribute__((always_inline))
    """
    ctypedef void cloned "GROUNDWAVE_CLONES void"
    ctypedef void inlined "GROUNDWAVE_INLINE void"
