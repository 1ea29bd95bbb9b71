"""What the native modules share: the kernels of _sha1.h, and the one that is in use."""

from libc.stdint cimport uint8_t, uint64_t


cdef extern from "_sha1.h" nogil:
    enum:
        KF_SHA1_DIGEST_SIZE

    ctypedef struct kf_sha1_kernel:
        const char *name
        int (*available)() noexcept nogil

    const kf_sha1_kernel kf_sha1_kernels[]

    ctypedef struct kf_sha1:
        uint64_t size_bytes

    void kf_sha1_start(kf_sha1 *sha1) noexcept
    void kf_sha1_update(const kf_sha1_kernel *kernel, kf_sha1 *sha1, const uint8_t *data, size_t size) noexcept
    void kf_sha1_update_both(const kf_sha1_kernel *kernel, kf_sha1 *first, kf_sha1 *second, const uint8_t *data,
                             size_t size) noexcept
    void kf_sha1_digest(const kf_sha1_kernel *kernel, const kf_sha1 *sha1, uint8_t *digest) noexcept

    ctypedef struct kf_fused:
        const kf_sha1_kernel *kernel
        kf_sha1 whole
        uint8_t *chunk_digests
        size_t chunk_count

    void kf_fused_start(kf_fused *fused, const kf_sha1_kernel *kernel, uint64_t chunk_size_bytes) noexcept
    int kf_fused_update(kf_fused *fused, const uint8_t *data, size_t size) noexcept
    int kf_fused_finish(kf_fused *fused) noexcept
    void kf_fused_free(kf_fused *fused) noexcept


cdef const kf_sha1_kernel *find_kernel(object name) except NULL
cdef str hexadecimal(const uint8_t *digest)
