"""CRC-32C, by which Google Cloud Storage compares what is uploaded with what was sent."""

from __future__ import annotations

from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.exc cimport PyErr_CheckSignals
from libc.stdint cimport uint8_t, uint32_t

__all__ = ["KERNELS", "crc32c"]

cdef enum:
    # As of _core: the interpreter lock costs up to 5 ms to get back, and a Ctrl-C has to be seen.
    SPAN_SIZE_BYTES = 8 << 20
    LOCKED_SIZE_BYTES = 16384


cdef extern from "_crc32c.h" nogil:
    ctypedef struct kf_crc32c_kernel:
        const char *name
        int (*available)() noexcept nogil
        uint32_t (*update)(uint32_t crc, const uint8_t *data, size_t size) noexcept nogil

    const kf_crc32c_kernel kf_crc32c_kernels[]


def _available_kernels():
    cdef const kf_crc32c_kernel *candidate = kf_crc32c_kernels
    names = []
    while candidate.name != NULL:
        if candidate.available():
            names.append(candidate.name.decode("ascii"))
        candidate += 1
    return tuple(names)


KERNELS = _available_kernels()


cdef const kf_crc32c_kernel *find_kernel(object name) except NULL:
    """The kernel called ``name``; None means the best that this CPU has."""
    cdef const kf_crc32c_kernel *candidate = kf_crc32c_kernels
    while candidate.name != NULL:
        if candidate.available() and (name is None or candidate.name.decode("ascii") == name):
            return candidate
        candidate += 1
    raise ValueError(f"this CPU has {', '.join(KERNELS)}, not {name!r}")


def crc32c(buffer, uint32_t value=0, *, kernel=None) -> int:
    """Return the CRC-32C of the bytes of ``buffer``, any C-contiguous buffer.

    :param value: the CRC of the bytes before, which ``buffer`` goes on.
    :param kernel: one of ``KERNELS``; None for the best.
    :raises ValueError: this CPU lacks the kernel.
    """
    cdef Py_buffer view
    cdef const uint8_t *data
    cdef Py_ssize_t left
    cdef Py_ssize_t span
    cdef const kf_crc32c_kernel *chosen = find_kernel(kernel)
    PyObject_GetBuffer(buffer, &view, PyBUF_SIMPLE)
    data = <const uint8_t *>view.buf
    left = view.len
    try:
        if left <= LOCKED_SIZE_BYTES:
            return chosen.update(value, data, left)
        while left:
            span = min(left, <Py_ssize_t>SPAN_SIZE_BYTES)
            with nogil:
                value = chosen.update(value, data, span)
            data += span
            left -= span
            PyErr_CheckSignals()
        return value
    finally:
        PyBuffer_Release(&view)
