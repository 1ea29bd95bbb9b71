"""SHA-1 at the speed of the machine: streams, the fused two-digest pass, hashing a file, copying while hashing.

A chunk manifest needs the SHA-1 of the file and that of each chunk. The kernels (``_sha1.h``) work both out in one
pass. Nothing here holds the interpreter lock for longer than ``LOCKED_SIZE_BYTES`` of data, nor keeps it from looking
for signals for longer than ``SPAN_SIZE_BYTES``.
"""

from __future__ import annotations

import os
from collections import namedtuple

from kachery_fast.errors import InvalidSetting

cimport cython
from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_FromStringAndSize
from cpython.exc cimport PyErr_CheckSignals
from libc.stdint cimport uint8_t, uint64_t

from kachery_fast._core cimport (
    KF_SHA1_DIGEST_SIZE,
    kf_fused,
    kf_fused_finish,
    kf_fused_free,
    kf_fused_start,
    kf_fused_update,
    kf_sha1,
    kf_sha1_digest,
    kf_sha1_kernel,
    kf_sha1_kernels,
    kf_sha1_start,
    kf_sha1_update,
)

__all__ = ["KERNELS", "Digests", "FusedSha1", "Sha1", "copy_file", "digest_buffer", "digest_file", "kernel"]

ENVIRONMENT_VARIABLE = "KACHERY_SHA1_KERNEL"

cdef enum:
    # Taking the interpreter lock again can cost 5 ms (sys.getswitchinterval) where other threads compute; 8 MiB
    # take 5 ms with the fastest kernel and some 15 ms with the portable one, far below the 0.2 s of a Ctrl-C.
    SPAN_SIZE_BYTES = 8 << 20
    # Below this, giving the lock away costs more than the hashing.
    LOCKED_SIZE_BYTES = 4096
    # A file up to this length is read and hashed on one core: starting a thread would take longer.
    SMALL_FILE_SIZE_BYTES = 1 << 20


cdef extern from "_disk.h" nogil:
    void kf_begin_writeback(int fd, long long start, long long size) noexcept

cdef extern from "_relay.h" nogil:
    enum:
        KF_RELAY_END
        KF_RELAY_MORE

    ctypedef struct kf_relay:
        pass

    kf_relay *kf_relay_open(int source, int target, int *error) noexcept
    int kf_relay_hash(kf_relay *relay, kf_fused *fused, size_t span_size) noexcept
    void kf_relay_close(kf_relay *relay) noexcept
    int kf_hash_small(int source, int target, kf_fused *fused, size_t size) noexcept
    long long kf_claimed_size(int fd) noexcept
    int kf_clone(int source, int target) noexcept
    int kf_expect(int source, int target, long long size) noexcept
    int kf_cut(int target, long long size) noexcept


# --- kernels

cdef const kf_sha1_kernel *_in_use = NULL


def _available_kernels():
    cdef const kf_sha1_kernel *candidate = kf_sha1_kernels
    names = []
    while candidate.name != NULL:
        if candidate.available():
            names.append(candidate.name.decode("ascii"))
        candidate += 1
    return tuple(names)


KERNELS = _available_kernels()


cdef const kf_sha1_kernel *find_kernel(object name) except NULL:
    """The kernel called ``name``; None means the one in use. InvalidSetting where this CPU lacks it."""
    global _in_use
    cdef const kf_sha1_kernel *candidate = kf_sha1_kernels
    cdef bint from_environment = False
    if name is None:
        if _in_use != NULL:
            return _in_use
        name = os.environ.get(ENVIRONMENT_VARIABLE) or KERNELS[0]
        from_environment = True
    while candidate.name != NULL:
        if candidate.name.decode("ascii") == name and candidate.available():
            if from_environment:
                _in_use = candidate
            return candidate
        candidate += 1
    raise InvalidSetting(
        name="sha1_kernel",
        value=name,
        source=f"the environment variable {ENVIRONMENT_VARIABLE}" if from_environment else "a call",
        why=f"this CPU has {', '.join(KERNELS)}",
    )


def kernel() -> str:
    """Return the name of the kernel in use: ``KACHERY_SHA1_KERNEL``, read once, else the best this CPU has.

    :raises InvalidSetting: the environment demands a kernel that this CPU lacks.
    """
    return find_kernel(None).name.decode("ascii")


# --- streams

Digests = namedtuple("Digests", ("size", "sha1", "chunk_sha1s"))
Digests.__module__ = "kachery_fast._core"
Digests.__doc__ = """The digests of some bytes: ``size`` in bytes, ``sha1`` of all, ``chunk_sha1s`` of every chunk.

The last chunk may be short; no bytes have no chunks. Digests are 40 lower-case hexadecimal digits.
"""


cdef str hexadecimal(const uint8_t *digest):
    return PyBytes_FromStringAndSize(<const char *>digest, KF_SHA1_DIGEST_SIZE).hex()


cdef object digests_of(const kf_fused *fused):
    cdef uint8_t digest[KF_SHA1_DIGEST_SIZE]
    cdef size_t index
    kf_sha1_digest(fused.kernel, &fused.whole, digest)
    chunks = [hexadecimal(fused.chunk_digests + index * KF_SHA1_DIGEST_SIZE) for index in range(fused.chunk_count)]
    return Digests(fused.whole.size_bytes, hexadecimal(digest), tuple(chunks))


@cython.final
cdef class Sha1:
    """A SHA-1 in the making, as ``hashlib.sha1``, by a kernel of choice.

    :param data: first bytes to feed; any C-contiguous buffer.
    :param kernel: one of ``KERNELS``; None for the one in use.
    :raises InvalidSetting: this CPU lacks the kernel.
    """

    cdef kf_sha1 state
    cdef const kf_sha1_kernel *kernel
    cdef bint busy

    def __init__(self, data=b"", *, kernel=None):
        self.check_idle()
        self.kernel = find_kernel(kernel)
        kf_sha1_start(&self.state)
        self.update(data)

    cdef int check_idle(self) except -1:
        if self.busy:
            raise RuntimeError("this digest is being fed by another thread")
        return 0

    def update(self, buffer) -> None:
        """Feed the bytes of ``buffer``, any C-contiguous buffer. A KeyboardInterrupt leaves it partly fed."""
        cdef Py_buffer view
        cdef const uint8_t *data
        cdef Py_ssize_t left
        cdef Py_ssize_t span
        self.check_idle()
        if self.kernel == NULL:
            raise RuntimeError("Sha1.__init__ was not called")
        PyObject_GetBuffer(buffer, &view, PyBUF_SIMPLE)
        data = <const uint8_t *>view.buf
        left = view.len
        self.busy = True
        try:
            if left <= LOCKED_SIZE_BYTES:
                kf_sha1_update(self.kernel, &self.state, data, left)
                return
            while left:
                span = min(left, <Py_ssize_t>SPAN_SIZE_BYTES)
                with nogil:
                    kf_sha1_update(self.kernel, &self.state, data, span)
                data += span
                left -= span
                PyErr_CheckSignals()
        finally:
            self.busy = False
            PyBuffer_Release(&view)

    def digest(self) -> bytes:
        """Return the 20 bytes of the digest of what was fed so far."""
        cdef uint8_t digest[KF_SHA1_DIGEST_SIZE]
        self.check_idle()
        if self.kernel == NULL:
            raise RuntimeError("Sha1.__init__ was not called")
        kf_sha1_digest(self.kernel, &self.state, digest)
        return PyBytes_FromStringAndSize(<char *>digest, KF_SHA1_DIGEST_SIZE)

    def hexdigest(self) -> str:
        """Return the digest of what was fed so far as 40 hexadecimal digits."""
        return self.digest().hex()

    def copy(self) -> Sha1:
        """Return a digest that was fed the same and goes its own way from here."""
        self.check_idle()
        cdef Sha1 twin = Sha1.__new__(Sha1)
        twin.kernel = self.kernel
        twin.state = self.state
        return twin


@cython.final
cdef class FusedSha1:
    """The SHA-1 of a stream and that of each of its chunks, in one pass.

    :param chunk_size_bytes: the length of a chunk, a positive multiple of 64.
    :param kernel: one of ``KERNELS``; None for the one in use.
    :raises ValueError: the chunk size is not a positive multiple of 64.
    :raises InvalidSetting: this CPU lacks the kernel.
    """

    cdef kf_fused fused
    cdef bint usable

    def __cinit__(self, chunk_size_bytes, *, kernel=None):
        kf_fused_start(&self.fused, find_kernel(kernel), checked_chunk_size(chunk_size_bytes))
        self.usable = True

    def __dealloc__(self):
        kf_fused_free(&self.fused)

    def update(self, buffer) -> None:
        """Feed the bytes of ``buffer``, any C-contiguous buffer.

        :raises RuntimeError: the stream is finished, was interrupted, or is being fed by another thread.
        """
        cdef Py_buffer view
        self.check_usable()
        PyObject_GetBuffer(buffer, &view, PyBUF_SIMPLE)
        self.usable = False
        try:
            feed_buffer(&self.fused, &view)
            self.usable = True
        finally:
            PyBuffer_Release(&view)

    def finish(self) -> Digests:
        """Return the digests of what was fed; nothing can be fed after it."""
        self.check_usable()
        self.usable = False
        if kf_fused_finish(&self.fused) != 0:
            raise MemoryError
        return digests_of(&self.fused)

    cdef int check_usable(self) except -1:
        if not self.usable:
            raise RuntimeError("this stream is finished, was interrupted, or is being fed by another thread")
        return 0


cdef uint64_t checked_chunk_size(object chunk_size_bytes) except 0:
    if chunk_size_bytes <= 0 or chunk_size_bytes % 64:
        raise ValueError(f"a chunk size must be a positive multiple of 64 bytes, not {chunk_size_bytes!r}")
    return chunk_size_bytes


cdef int feed_buffer(kf_fused *fused, const Py_buffer *view) except -1:
    """Feed a buffer span by span, without the interpreter lock, looking for signals in between."""
    cdef const uint8_t *data = <const uint8_t *>view.buf
    cdef Py_ssize_t left = view.len
    cdef Py_ssize_t span
    cdef int failed
    if left <= LOCKED_SIZE_BYTES:
        if kf_fused_update(fused, data, left) != 0:
            raise MemoryError
        return 0
    while left:
        span = min(left, <Py_ssize_t>SPAN_SIZE_BYTES)
        with nogil:
            failed = kf_fused_update(fused, data, span)
        if failed:
            raise MemoryError
        data += span
        left -= span
        PyErr_CheckSignals()
    return 0


def digest_buffer(buffer, chunk_size_bytes, *, kernel=None) -> Digests:
    """Return the digests of the bytes of ``buffer``, any C-contiguous buffer.

    :param chunk_size_bytes: the length of a chunk, a positive multiple of 64.
    :param kernel: one of ``KERNELS``; None for the one in use.
    :raises ValueError: the chunk size is not a positive multiple of 64.
    :raises InvalidSetting: this CPU lacks the kernel.
    """
    stream = FusedSha1(chunk_size_bytes, kernel=kernel)
    stream.update(buffer)
    return stream.finish()


# --- files

cdef int check(int failed) except -1:
    """Raise the OSError of an errno; 0 is none."""
    if failed:
        raise OSError(failed, os.strerror(failed))
    return 0


cdef int hash_by_relay(int source, int target, kf_fused *fused, object progress, bint durable) except -1:
    """Hash (and copy) with a second thread that reads (and writes); no trace of it is left, whatever happens."""
    cdef kf_relay *relay
    cdef int result = KF_RELAY_MORE
    cdef int failed = 0
    cdef uint64_t reported = 0
    cdef uint64_t begun = 0
    with nogil:
        relay = kf_relay_open(source, target, &failed)
    check(failed)
    try:
        while result == KF_RELAY_MORE:
            with nogil:
                result = kf_relay_hash(relay, fused, SPAN_SIZE_BYTES)
                if durable and target >= 0:
                    kf_begin_writeback(target, begun, fused.whole.size_bytes - begun)
                    begun = fused.whole.size_bytes
            PyErr_CheckSignals()
            if progress is not None and fused.whole.size_bytes - reported >= SPAN_SIZE_BYTES:
                reported = fused.whole.size_bytes
                progress(reported)
    finally:
        with nogil:
            kf_relay_close(relay)
    return check(-result)


cdef object digest_descriptor(int source, int target, object chunk_size_bytes, object progress, bint durable):
    cdef FusedSha1 stream = FusedSha1(chunk_size_bytes)
    cdef kf_fused *fused = &stream.fused
    cdef long long claimed
    cdef int result = KF_RELAY_MORE
    cdef int failed = 0
    cdef bint cloned
    with nogil:
        claimed = kf_claimed_size(source)
        if claimed <= SMALL_FILE_SIZE_BYTES:
            result = kf_hash_small(source, target, fused, claimed)
    if result == KF_RELAY_MORE:
        with nogil:
            cloned = target >= 0 and kf_clone(source, target) == 0
            failed = kf_expect(source, -1 if cloned else target, claimed)
        check(failed)
        hash_by_relay(target if cloned else source, -1 if cloned else target, fused, progress, durable)
        with nogil:
            failed = kf_cut(target, fused.whole.size_bytes) if target >= 0 else 0
        check(failed)
    else:
        check(-result)
    digests = stream.finish()
    if progress is not None:
        progress(digests.size)
    return digests


def digest_file(int fd, chunk_size_bytes, *, progress=None) -> Digests:
    """Return the digests of a file, from its first byte to its end; the descriptor's position does not matter.

    A second thread reads ahead, within 8 MiB of memory.

    :param fd: a descriptor open for reading, of something that ``pread`` works on.
    :param chunk_size_bytes: the length of a chunk, a positive multiple of 64.
    :param progress: called in the calling thread with the bytes done so far, every 8 MiB or more, and at the end;
        what it raises ends the call.
    :raises ValueError: the chunk size is not a positive multiple of 64.
    :raises OSError: reading failed.
    """
    return digest_descriptor(fd, -1, chunk_size_bytes, progress, False)


def copy_file(int source_fd, int target_fd, chunk_size_bytes, *, progress=None, begin_writeback=False) -> Digests:
    """Copy a file to an empty one and return the digests of what was written.

    Shares the blocks where the file system can (a large file, the target open for reading too) and hashes the
    clone; else a second thread reads and writes while this one hashes the same memory.

    :param source_fd: a descriptor open for reading.
    :param target_fd: a descriptor open for writing, of an empty file; open it O_RDWR to allow a clone.
    :param chunk_size_bytes: the length of a chunk, a positive multiple of 64.
    :param progress: as for :func:`digest_file`.
    :param begin_writeback: have what is written go to the disk meanwhile, for a caller who will wait for it (fsync).
    :raises ValueError: the chunk size is not a positive multiple of 64.
    :raises OSError: reading or writing failed; ``errno`` says how (ENOSPC, EIO, ...).
    """
    return digest_descriptor(source_fd, target_fd, chunk_size_bytes, progress, begin_writeback)
