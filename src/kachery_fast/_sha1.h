/* SHA-1 (FIPS 180-4) as kernels behind one contract.
 *
 * A kernel compresses whole 64-byte blocks, into one state or into two. The second operation ("fused") is what a
 * chunk manifest needs: the digest of the file and that of the chunk eat the same blocks, so the message schedule is
 * worked out once and the two round chains, each bound by latency, run interleaved.
 *
 * The contract: all kernels give bit-identical results; any alignment of the data; count may be zero; the two
 * states of the fused operation do not overlap. No function here allocates unless it says so, and none knows Python.
 */
#ifndef KACHERY_FAST_SHA1_H
#define KACHERY_FAST_SHA1_H

#include <stddef.h>
#include <stdint.h>

#define KF_SHA1_BLOCK_SIZE 64
#define KF_SHA1_DIGEST_SIZE 20

typedef struct {
    const char *name;
    int (*available)(void); /* can this CPU run it? */
    void (*compress)(uint32_t state[5], const uint8_t *blocks, size_t count);
    void (*compress_both)(uint32_t first[5], uint32_t second[5], const uint8_t *blocks, size_t count);
} kf_sha1_kernel;

/* Every kernel compiled in, best first, ended by an entry whose name is NULL. The last one runs on every CPU. */
extern const kf_sha1_kernel kf_sha1_kernels[];

/* One digest in the making. The tail holds the size_bytes % 64 bytes that do not fill a block yet. */
typedef struct {
    uint64_t size_bytes;
    uint32_t state[5];
    uint8_t tail[KF_SHA1_BLOCK_SIZE];
} kf_sha1;

void kf_sha1_start(kf_sha1 *sha1);
void kf_sha1_update(const kf_sha1_kernel *kernel, kf_sha1 *sha1, const uint8_t *data, size_t size);
/* Feed the same bytes to two digests: fused when both are at the same place within a block, else one by one. */
void kf_sha1_update_both(const kf_sha1_kernel *kernel, kf_sha1 *first, kf_sha1 *second, const uint8_t *data,
                         size_t size);
/* The digest of what was fed so far; sha1 is unchanged and may be fed on. */
void kf_sha1_digest(const kf_sha1_kernel *kernel, const kf_sha1 *sha1, uint8_t digest[KF_SHA1_DIGEST_SIZE]);

/* The digest of a file together with the digests of its chunks of chunk_size_bytes, a multiple of 64. */
typedef struct {
    const kf_sha1_kernel *kernel;
    uint64_t chunk_size_bytes;
    kf_sha1 whole;
    kf_sha1 chunk;
    uint8_t *chunk_digests; /* of the completed chunks, 20 bytes each; owned */
    size_t chunk_count;
    size_t chunk_capacity;
} kf_fused;

void kf_fused_start(kf_fused *fused, const kf_sha1_kernel *kernel, uint64_t chunk_size_bytes);
/* Returns 0, or -1 when memory for a chunk's digest ran out (then the state is of no further use). Allocates. */
int kf_fused_update(kf_fused *fused, const uint8_t *data, size_t size);
/* Completes a last, short chunk. Returns as kf_fused_update. */
int kf_fused_finish(kf_fused *fused);
void kf_fused_free(kf_fused *fused);

#endif
