/* CRC-32C (Castagnoli; RFC 3720 §12.1, appendix B.4), by which Google Cloud Storage compares what is uploaded.
 *
 * The contract: all kernels give the same; any alignment of the data; the size may be zero. No function here allocates,
 * and none knows Python.
 */
#ifndef KACHERY_FAST_CRC32C_H
#define KACHERY_FAST_CRC32C_H

#include <stddef.h>
#include <stdint.h>

typedef struct {
    const char *name;
    int (*available)(void); /* can this CPU run it? */
    /* The CRC of some bytes that follow others, whose CRC is given (0 of none). */
    uint32_t (*update)(uint32_t crc, const uint8_t *data, size_t size);
} kf_crc32c_kernel;

/* Every kernel compiled in, best first, ended by an entry whose name is NULL. The last one runs on every CPU. */
extern const kf_crc32c_kernel kf_crc32c_kernels[];

#endif
