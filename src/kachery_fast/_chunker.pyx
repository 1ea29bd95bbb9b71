"""Chunks of a file: how a file is split, and how it is put together again in its final place.

A download is received straight into the mapped file: a chunk's window is allocated on disk, mapped, filled by the
socket and unmapped, so that no chunk is copied or concatenated and resident memory is that of the open windows. A
verifier hashes the contiguous prefix in order, both digests in one pass.
"""

from __future__ import annotations

import os

cimport cython
from cpython.buffer cimport PyBuffer_FillInfo
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.errno cimport EFAULT, EIO, ENXIO, EOPNOTSUPP, errno
from libc.stdint cimport uint8_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcmp, memcpy

from kachery_fast._core cimport (
    KF_SHA1_DIGEST_SIZE,
    find_kernel,
    hexadecimal,
    kf_sha1,
    kf_sha1_digest,
    kf_sha1_kernel,
    kf_sha1_start,
    kf_sha1_update,
    kf_sha1_update_both,
)

__all__ = ["ChunkMemory", "Reassembly", "begin_writeback", "chunk_ranges"]

cdef enum:
    # How much of a chunk is mapped, or read, at a time to be hashed; it bounds resident memory for chunks of any
    # length. Hashing from a mapping ran at 1.73 GB/s, from a reused 1 MiB buffer at 1.61 (page cache, EPYC).
    WINDOW_SIZE_BYTES = 4 << 20
    READ_SIZE_BYTES = 1 << 20
    # Longer chunks are not made present at once when they are opened.
    POPULATE_SIZE_BYTES_MAX = 64 << 20


cdef extern from "_disk.h" nogil:
    int PROT_READ, PROT_WRITE, MAP_SHARED, MAP_POPULATE
    void *MAP_FAILED
    int ENOMEM, ENOSPC
    void *mmap(void *, size_t, int, int, int, long long) noexcept
    int munmap(void *, size_t) noexcept
    int ftruncate(int, long long) noexcept
    int close(int) noexcept
    int kf_read_fully(int, uint8_t *, size_t, long long) noexcept
    int kf_write_fully(int, const uint8_t *, size_t, long long) noexcept
    int kf_maps_safely(int) noexcept
    int kf_allocate(int, long long, long long, int) noexcept
    long long kf_free_bytes(int) noexcept
    int kf_file_status(int, long long *, long long *) noexcept
    long long kf_next_data(int, long long) noexcept
    int kf_populate(void *, size_t) noexcept
    void kf_begin_writeback(int, long long, long long) noexcept
    int kf_sync(int) noexcept


PAGE_SIZE_BYTES = os.sysconf("SC_PAGE_SIZE")
cdef Py_ssize_t page_size = PAGE_SIZE_BYTES


def chunk_ranges(size_bytes, chunk_size_bytes) -> list[tuple[int, int]]:
    """Split a file into chunks: ``[(start, end), ...]`` in bytes, the last one maybe short; no bytes, no chunks.

    :raises ValueError: a negative size, or a chunk size below 1.
    """
    if size_bytes < 0 or chunk_size_bytes < 1:
        raise ValueError(f"cannot split {size_bytes!r} bytes into chunks of {chunk_size_bytes!r}")
    return [(start, min(start + chunk_size_bytes, size_bytes)) for start in range(0, size_bytes, chunk_size_bytes)]


def begin_writeback(int fd, long long start, long long size) -> None:
    """Have ``size`` bytes of a file from ``start`` on go to the disk, for a caller who will wait for it (fsync)."""
    with nogil:
        kf_begin_writeback(fd, start, size)


@cython.final
@cython.no_gc
cdef class ChunkMemory:
    """The place of one chunk in the file, to be filled. ``Reassembly.open_chunk`` makes it.

    Leaving its ``with`` block, or ``close``, puts what was written to ``view`` into the file. Views that are still
    alive then keep the memory, but what is written to them later may be lost.
    """

    cdef Reassembly owner  # held for its descriptor, in pwrite mode, until the buffer is written
    cdef uint8_t *base  # the mapping, or the buffer, that `data` lies in
    cdef size_t base_size
    cdef uint8_t *data
    cdef Py_ssize_t size
    cdef long long start
    cdef bint mapped
    cdef bint closed
    cdef Py_ssize_t exports

    def __cinit__(self):
        self.closed = True

    def __init__(self):
        raise TypeError("ChunkMemory is made by Reassembly.open_chunk")

    def __dealloc__(self):
        if self.owner is not None:
            self.owner.leave()
        self.release_memory()

    cdef void release_memory(self) noexcept:
        cdef uint8_t *base = self.base
        self.base = NULL
        if base != NULL and self.mapped:
            with nogil:
                munmap(base, self.base_size)
        else:
            free(base)

    def __getbuffer__(self, Py_buffer *buffer, int flags):
        if self.closed:
            raise ValueError("this chunk is closed")
        PyBuffer_FillInfo(buffer, self, self.data, self.size, 0, flags)
        self.exports += 1

    def __releasebuffer__(self, Py_buffer *buffer):
        self.exports -= 1
        if self.closed and self.exports == 0:
            self.release_memory()

    @property
    def view(self) -> memoryview:
        """The chunk's bytes, writable, exactly as many as the chunk has.

        :raises ValueError: the chunk is closed.
        """
        return memoryview(self)

    def close(self) -> None:
        """Put the bytes into the file; the memory goes back when the last view of it is gone. May be repeated.

        :raises OSError: writing failed (pwrite mode); ENOSPC when the disk is full. The chunk is closed then too.
        """
        cdef int failed = 0
        if self.closed:
            return
        self.closed = True
        try:
            if not self.mapped:
                self.exports += 1  # nobody else releases the memory while it is being written
                with nogil:
                    failed = kf_write_fully(self.owner.fd, self.data, self.size, self.start)
                self.exports -= 1
        finally:
            if self.owner is not None:
                self.owner.leave()
                self.owner = None
            if self.exports == 0:
                self.release_memory()
        if failed:
            raise OSError(failed, os.strerror(failed))

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace) -> None:
        self.close()


@cython.final
@cython.no_gc
cdef class ChunkSpan:
    """The place of one chunk in the file, to be filled through the descriptor. ``Reassembly.open_span`` makes it.

    ``fd`` stays open until ``close``, or the end of its ``with`` block, also when the ``Reassembly`` is closed before.
    """

    cdef Reassembly owner
    cdef readonly int fd
    cdef readonly long long start
    cdef readonly Py_ssize_t size

    def __init__(self):
        raise TypeError("ChunkSpan is made by Reassembly.open_span")

    def __dealloc__(self):
        if self.owner is not None:
            self.owner.leave()

    def close(self) -> None:
        """Let go of the descriptor. May be repeated."""
        if self.owner is not None:
            self.owner.leave()
            self.owner = None
            self.fd = -1

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace) -> None:
        self.close()


@cython.final
@cython.no_gc
cdef class Reassembly:
    """A file that is put together from its chunks, in any order, in place.

    What the file at ``path`` already holds is kept, and trusted in nothing: a resume asks ``has_data`` and then
    verifies. The methods may be called from several threads; ``verify_next`` from one at a time.

    :param path: the file, made if it is not there (mode 0o666 less the umask).
    :param size_bytes: how long the file is to be; what is longer is cut.
    :param ranges: (start, end) in bytes of every chunk, in order, without gaps, from 0 to ``size_bytes``.
    :param chunk_sha1s: the SHA-1 of every chunk, 40 hexadecimal digits.
    :param reserve: allocate the whole file now, so that a full disk is an error up front; else the file is sparse
        and each chunk is allocated when it is opened.
    :param mode: "map" receives into the mapped file, "pwrite" into a buffer that is written when the chunk is
        closed; "auto" maps where the file system allocates and maps safely.
    :raises ValueError: ranges or digests that are not as said, or an unknown mode.
    :raises OSError: the file cannot be opened or allocated (ENOSPC), or, in mode "map", not mapped (EOPNOTSUPP).
    """

    cdef readonly str mode
    cdef readonly Py_ssize_t chunk_count
    cdef readonly Py_ssize_t next_index
    cdef long long file_size
    cdef int fd
    cdef int users  # calls and open chunks that need the descriptor
    cdef bint closed
    cdef bint maps
    cdef bint reserved
    cdef bint verifying
    cdef long long *borders  # chunk_count + 1 of them
    cdef uint8_t *digests
    cdef const kf_sha1_kernel *kernel
    cdef kf_sha1 whole

    def __cinit__(self):
        self.fd = -1
        self.closed = True

    def __init__(self, path, size_bytes, ranges, chunk_sha1s, *, reserve, mode="auto"):
        if self.fd >= 0 or self.borders != NULL:
            raise RuntimeError("a Reassembly is made once")
        if mode not in ("auto", "map", "pwrite"):
            raise ValueError(f"the mode must be auto, map or pwrite, not {mode!r}")
        self.kernel = find_kernel(None)
        self.file_size = size_bytes
        self.take_chunks(ranges, chunk_sha1s)
        kf_sha1_start(&self.whole)
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        self.closed = False
        try:
            self.mode = self.prepare_file(bool(reserve), mode)
            self.maps = self.mode == "map"
        except BaseException:
            self.close()
            raise

    def __dealloc__(self):
        if self.fd >= 0:
            close(self.fd)
        free(self.borders)
        free(self.digests)

    cdef int take_chunks(self, ranges, chunk_sha1s) except -1:
        cdef Py_ssize_t index
        cdef long long start, end
        self.chunk_count = len(ranges)
        if len(chunk_sha1s) != self.chunk_count:
            raise ValueError(f"{self.chunk_count} chunks have {len(chunk_sha1s)} digests")
        self.borders = <long long *>malloc((self.chunk_count + 1) * sizeof(long long))
        self.digests = <uint8_t *>malloc(self.chunk_count * KF_SHA1_DIGEST_SIZE + 1)
        if self.borders == NULL or self.digests == NULL:
            raise MemoryError
        self.borders[0] = 0
        for index in range(self.chunk_count):
            start, end = ranges[index]
            if start != self.borders[index] or end <= start:
                raise ValueError(f"chunk {index} is from {start} to {end}; it must begin at {self.borders[index]}")
            self.borders[index + 1] = end
            digest = bytes.fromhex(chunk_sha1s[index])
            if len(digest) != KF_SHA1_DIGEST_SIZE:
                raise ValueError(f"the digest of chunk {index} is not 40 hexadecimal digits")
            memcpy(self.digests + index * KF_SHA1_DIGEST_SIZE, PyBytes_AS_STRING(digest), KF_SHA1_DIGEST_SIZE)
        if self.borders[self.chunk_count] != self.file_size:
            raise ValueError(f"the chunks end at {self.borders[self.chunk_count]}, the file at {self.file_size}")
        return 0

    cdef str prepare_file(self, bint reserve, str wanted):
        """Bring the file to its length, allocate it if that is wanted, and return the mode that will do."""
        cdef long long size = 0
        cdef long long allocated = 0
        cdef long long room
        cdef int failed
        mode = "pwrite" if wanted == "auto" and not kf_maps_safely(self.fd) else wanted
        with nogil:
            failed = kf_file_status(self.fd, &size, &allocated)
            if not failed and size > self.file_size and ftruncate(self.fd, self.file_size) != 0:
                failed = errno
        self.check(failed)
        if self.file_size and (reserve or mode != "pwrite"):
            # Without a reservation one byte is asked for, to see whether the file system allocates at all.
            with nogil:
                failed = kf_allocate(self.fd, 0, self.file_size if reserve else 1, not reserve)
            if failed != EOPNOTSUPP or mode == "map":
                self.check(failed)
            else:
                mode = "pwrite"
            room = kf_free_bytes(self.fd)
            if failed and reserve and 0 <= room < self.file_size - allocated:
                self.check(ENOSPC)
            self.reserved = reserve and not failed
        with nogil:
            failed = errno if size < self.file_size and ftruncate(self.fd, self.file_size) != 0 else 0
        self.check(failed)
        return "map" if mode == "auto" else mode

    cdef int check(self, int failed) except -1:
        if failed:
            raise OSError(failed, os.strerror(failed))
        return 0

    cdef int enter(self) except -1:
        """Every use of the descriptor is between enter and leave, so that close cannot take it away."""
        if self.closed:
            raise ValueError("this file is closed")
        self.users += 1
        return 0

    cdef void leave(self) noexcept:
        self.users -= 1
        if self.closed and self.users == 0 and self.fd >= 0:
            close(self.fd)
            self.fd = -1

    cdef Py_ssize_t checked_index(self, object index) except -1:
        cdef Py_ssize_t checked = index
        if not 0 <= checked < self.chunk_count:
            raise IndexError(f"there is no chunk {index} of {self.chunk_count}")
        return checked

    @property
    def size_bytes(self) -> int:
        """How long the whole file is."""
        return self.file_size

    def has_data(self, index) -> bool:
        """Return False when nothing was ever written to the chunk, True when something was or nobody knows.

        :raises IndexError: there is no such chunk.
        """
        cdef Py_ssize_t checked = self.checked_index(index)
        cdef long long found
        cdef int failed
        self.enter()
        try:
            with nogil:
                found = kf_next_data(self.fd, self.borders[checked])
                failed = errno
        finally:
            self.leave()
        if found < 0:
            return failed != ENXIO
        return found < self.borders[checked + 1]

    def open_chunk(self, index) -> ChunkMemory:
        """Allocate a chunk on disk and return its memory, to be filled.

        :raises IndexError: there is no such chunk.
        :raises OSError: no room (ENOSPC), or the memory cannot be had.
        """
        cdef Py_ssize_t checked = self.checked_index(index)
        cdef ChunkMemory memory = ChunkMemory.__new__(ChunkMemory)
        cdef int failed
        memory.start = self.borders[checked]
        memory.size = self.borders[checked + 1] - memory.start
        memory.mapped = self.maps
        self.enter()
        memory.owner = self  # which leaves when the memory is closed, or dies
        if memory.mapped:
            with nogil:
                failed = self.map_chunk(memory)
            self.check(failed)
            self.leave()
            memory.owner = None
        else:
            memory.base = memory.data = <uint8_t *>calloc(memory.size, 1)
            if memory.base == NULL:
                raise MemoryError
        memory.closed = False
        return memory

    def open_span(self, index) -> ChunkSpan:
        """Allocate a chunk on disk and return its place in the file, to be filled through the descriptor.

        :raises IndexError: there is no such chunk.
        :raises OSError: no room (ENOSPC).
        """
        cdef Py_ssize_t checked = self.checked_index(index)
        cdef ChunkSpan span = ChunkSpan.__new__(ChunkSpan)
        cdef int failed = 0
        span.start = self.borders[checked]
        span.size = self.borders[checked + 1] - span.start
        self.enter()
        span.owner = self  # which leaves when the span is closed, or dies
        span.fd = self.fd
        if not self.reserved and self.maps:
            with nogil:
                failed = kf_allocate(self.fd, span.start, span.size, True)
        self.check(failed)
        return span

    cdef int map_chunk(self, ChunkMemory memory) noexcept nogil:
        """Returns 0 or an errno. The mapping begins on a page border, at or before the chunk."""
        cdef Py_ssize_t lead = memory.start % page_size
        cdef void *mapping
        cdef int failed = 0 if self.reserved else kf_allocate(self.fd, memory.start, memory.size, True)
        if failed:
            return failed
        memory.base_size = lead + memory.size
        mapping = mmap(NULL, memory.base_size, PROT_READ | PROT_WRITE, MAP_SHARED, self.fd, memory.start - lead)
        if mapping == MAP_FAILED:
            return errno
        memory.base = <uint8_t *>mapping
        memory.data = memory.base + lead
        if memory.base_size <= POPULATE_SIZE_BYTES_MAX:
            failed = kf_populate(mapping, memory.base_size)
            return EIO if failed == EFAULT else failed
        return 0

    cdef int hash_range(self, kf_sha1 *whole, kf_sha1 *chunk, long long start, long long end) noexcept nogil:
        """Feed a range of the file to the chunk's digest, and to the whole one's too if given. 0 or an errno."""
        cdef uint8_t *buffer = NULL
        cdef Py_ssize_t size
        cdef int failed = 0
        if not self.maps:
            buffer = <uint8_t *>malloc(READ_SIZE_BYTES)
            if buffer == NULL:
                return ENOMEM
        while start < end and not failed:
            if self.maps:
                size = min(end - start, <long long>WINDOW_SIZE_BYTES - start % page_size)
                failed = self.hash_mapped(whole, chunk, start, size)
            else:
                size = min(end - start, <long long>READ_SIZE_BYTES)
                failed = kf_read_fully(self.fd, buffer, size, start)
                if not failed:
                    feed(self.kernel, whole, chunk, buffer, size)
            start += size
        free(buffer)
        return failed

    cdef int hash_mapped(self, kf_sha1 *whole, kf_sha1 *chunk, long long start, Py_ssize_t size) noexcept nogil:
        cdef Py_ssize_t lead = start % page_size
        cdef void *mapping = mmap(NULL, lead + size, PROT_READ, MAP_SHARED | MAP_POPULATE, self.fd, start - lead)
        if mapping == MAP_FAILED:
            return errno
        feed(self.kernel, whole, chunk, <const uint8_t *>mapping + lead, size)
        munmap(mapping, lead + size)
        return 0

    cdef bint is_right(self, Py_ssize_t index, const kf_sha1 *chunk) noexcept nogil:
        cdef uint8_t digest[KF_SHA1_DIGEST_SIZE]
        kf_sha1_digest(self.kernel, chunk, digest)
        return memcmp(digest, self.digests + index * KF_SHA1_DIGEST_SIZE, KF_SHA1_DIGEST_SIZE) == 0

    def verify_chunk(self, index) -> bool:
        """Return whether the chunk in the file has its digest. Hashes that chunk alone.

        :raises IndexError: there is no such chunk.
        :raises OSError: reading failed.
        """
        cdef Py_ssize_t checked = self.checked_index(index)
        cdef kf_sha1 chunk
        cdef bint right = False
        cdef int failed
        kf_sha1_start(&chunk)
        self.enter()
        try:
            with nogil:
                failed = self.hash_range(NULL, &chunk, self.borders[checked], self.borders[checked + 1])
                if not failed:
                    right = self.is_right(checked, &chunk)
        finally:
            self.leave()
        self.check(failed)
        return right

    def verify_next(self) -> bool:
        """Hash the chunk ``next_index``, for its own digest and for the file's, in one pass.

        True: the chunk is right, the digest of the file has advanced over it, and ``next_index`` is one higher.
        False: it is damaged, and nothing has changed; fill it again.

        :raises IndexError: all chunks are done.
        :raises RuntimeError: another thread is in this call.
        :raises OSError: reading failed; nothing has changed.
        """
        cdef Py_ssize_t index = self.checked_index(self.next_index)
        cdef kf_sha1 whole = self.whole
        cdef kf_sha1 chunk
        cdef bint right = False
        cdef int failed
        if self.verifying:
            raise RuntimeError("another thread is verifying this file")
        kf_sha1_start(&chunk)
        self.enter()
        self.verifying = True
        try:
            with nogil:
                failed = self.hash_range(&whole, &chunk, self.borders[index], self.borders[index + 1])
                if not failed:
                    right = self.is_right(index, &chunk)
        finally:
            self.verifying = False
            self.leave()
        self.check(failed)
        if right:
            self.whole = whole
            self.next_index = index + 1
        return right

    def whole_sha1(self) -> str:
        """Return the SHA-1 of the whole file, 40 hexadecimal digits.

        :raises ValueError: ``verify_next`` has not passed over every chunk yet.
        """
        cdef uint8_t digest[KF_SHA1_DIGEST_SIZE]
        if self.next_index != self.chunk_count:
            raise ValueError(f"{self.next_index} of {self.chunk_count} chunks are verified")
        kf_sha1_digest(self.kernel, &self.whole, digest)
        return hexadecimal(digest)

    def read(self, start, end) -> bytes:
        """Return the bytes from ``start`` to ``end`` as the file has them now.

        :raises ValueError: the range is not inside the file.
        :raises OSError: reading failed.
        """
        cdef long long first = start
        cdef long long last = end
        cdef int failed
        if not 0 <= first <= last <= self.file_size:
            raise ValueError(f"{start} to {end} is not inside a file of {self.file_size} bytes")
        content = PyBytes_FromStringAndSize(NULL, last - first)
        cdef uint8_t *data = <uint8_t *>PyBytes_AS_STRING(content)
        self.enter()
        try:
            with nogil:
                failed = kf_read_fully(self.fd, data, last - first, first)
        finally:
            self.leave()
        self.check(failed)
        return content

    def begin_writeback(self, index) -> None:
        """Have a chunk written to the disk from now on, without waiting, so that ``sync`` has less left to do.

        :raises IndexError: there is no such chunk.
        """
        cdef Py_ssize_t checked = self.checked_index(index)
        self.enter()
        try:
            with nogil:
                kf_begin_writeback(self.fd, self.borders[checked], self.borders[checked + 1] - self.borders[checked])
        finally:
            self.leave()

    def sync(self) -> None:
        """Wait until everything written is on the disk (fdatasync; F_FULLFSYNC on macOS).

        :raises OSError: the disk failed, or what was written did not fit.
        """
        cdef int failed
        self.enter()
        try:
            with nogil:
                failed = kf_sync(self.fd)
        finally:
            self.leave()
        self.check(failed)

    def close(self) -> None:
        """Close the file, which stays where it is. Chunks that are open stay usable. May be repeated."""
        if not self.closed:
            self.users += 1
            self.closed = True
            self.leave()

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace) -> None:
        self.close()


cdef void feed(const kf_sha1_kernel *kernel, kf_sha1 *whole, kf_sha1 *chunk, const uint8_t *data,
               Py_ssize_t size) noexcept nogil:
    if whole != NULL:
        kf_sha1_update_both(kernel, whole, chunk, data, size)
    else:
        kf_sha1_update(kernel, chunk, data, size)
