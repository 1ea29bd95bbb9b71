/* The CRC-32C kernels; _crc32c.h is the contract. */
#include "_crc32c.h"

#include <string.h>

#if defined(__x86_64__)
#define KF_X86 1
#include <cpuid.h>
#include <immintrin.h>
#elif defined(__aarch64__) && (defined(__ARM_FEATURE_CRC32) || !defined(__clang__) || __clang_major__ >= 16)
/* Before version 16, clang declares the intrinsics only where the whole file is compiled for them. */
#define KF_ARM 1
#include <arm_acle.h>
#if defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif
#endif

/* --- portable: eight bytes a step, by a table for the distance of each from the end of the step ("slicing by 8") */

#define POLYNOMIAL 0x82f63b78u /* 0x1edc6f41 with its bits reversed */

static uint32_t tables[8][256];

#if defined(KF_X86) || defined(KF_ARM)
/* An instruction waits for the one before it, though three could be under way: so three streams, one behind the other in
 * the data, are taken at once. The state after all of them is that of the first, moved past the zeros that the second
 * stands for, and that of the second added, which begins from nothing (a CRC is linear); likewise the third. 8 KiB:
 * long enough that joining them costs little, and that the CPU sees what to fetch ahead. */
#define STREAM_BYTES 8192

static uint32_t past_stream[4][256]; /* what each byte of a state becomes by STREAM_BYTES zeros */

static inline uint32_t joined(uint32_t state, uint32_t behind)
{
    return past_stream[0][state & 255] ^ past_stream[1][state >> 8 & 255] ^ past_stream[2][state >> 16 & 255]
        ^ past_stream[3][state >> 24] ^ behind;
}

static void make_past_stream(void)
{
    uint32_t crc;
    int byte, bit, i;
    for (bit = 0; bit < 32; bit++) {
        crc = (uint32_t)1 << bit;
        for (i = 0; i < STREAM_BYTES; i++)
            crc = crc >> 8 ^ tables[0][crc & 255];
        for (byte = 0; byte < 256; byte++)
            if (byte >> bit % 8 & 1)
                past_stream[bit / 8][byte] ^= crc;
    }
}
#endif

/* 2048 entries and 1024, made when the library is loaded: before any thread can ask. */
__attribute__((constructor)) static void make_tables(void)
{
    uint32_t crc;
    int byte, bit, distance;
    for (byte = 0; byte < 256; byte++) {
        crc = (uint32_t)byte;
        for (bit = 0; bit < 8; bit++)
            crc = crc & 1 ? crc >> 1 ^ POLYNOMIAL : crc >> 1;
        tables[0][byte] = crc;
    }
    for (distance = 1; distance < 8; distance++)
        for (byte = 0; byte < 256; byte++) {
            crc = tables[distance - 1][byte];
            tables[distance][byte] = crc >> 8 ^ tables[0][crc & 255];
        }
#if defined(KF_X86) || defined(KF_ARM)
    make_past_stream();
#endif
}

static inline uint32_t load_le32(const uint8_t *bytes)
{
    return (uint32_t)bytes[3] << 24 | (uint32_t)bytes[2] << 16 | (uint32_t)bytes[1] << 8 | (uint32_t)bytes[0];
}

static uint32_t portable_update(uint32_t crc, const uint8_t *data, size_t size)
{
    uint32_t low, high;
    crc = ~crc;
    for (; size >= 8; size -= 8, data += 8) {
        low = crc ^ load_le32(data);
        high = load_le32(data + 4);
        crc = tables[7][low & 255] ^ tables[6][low >> 8 & 255] ^ tables[5][low >> 16 & 255] ^ tables[4][low >> 24]
            ^ tables[3][high & 255] ^ tables[2][high >> 8 & 255] ^ tables[1][high >> 16 & 255] ^ tables[0][high >> 24];
    }
    for (; size; size--, data++)
        crc = crc >> 8 ^ tables[0][(crc ^ *data) & 255];
    return ~crc;
}

static int portable_available(void)
{
    return 1;
}

/* --- SSE 4.2: eight bytes an instruction (Intel SDM volume 2, CRC32), which is ten times the speed of SHA-1 */

#if defined(KF_X86)
__attribute__((target("sse4.2"))) static uint32_t sse_update(uint32_t crc, const uint8_t *data, size_t size)
{
    uint64_t state = (uint32_t)~crc, second, third, word;
    int at;
    for (; size >= 3 * STREAM_BYTES; size -= 3 * STREAM_BYTES, data += 3 * STREAM_BYTES) {
        for (second = third = 0, at = 0; at < STREAM_BYTES; at += 8) {
            memcpy(&word, data + at, 8);
            state = _mm_crc32_u64(state, word);
            memcpy(&word, data + STREAM_BYTES + at, 8);
            second = _mm_crc32_u64(second, word);
            memcpy(&word, data + 2 * STREAM_BYTES + at, 8);
            third = _mm_crc32_u64(third, word);
        }
        state = joined(joined((uint32_t)state, (uint32_t)second), (uint32_t)third);
    }
    for (; size >= 8; size -= 8, data += 8) {
        memcpy(&word, data, 8);
        state = _mm_crc32_u64(state, word);
    }
    for (; size; size--, data++)
        state = _mm_crc32_u8((uint32_t)state, *data);
    return ~(uint32_t)state;
}

static int sse_available(void)
{
    unsigned int a, b, c, d;
    return __get_cpuid(1, &a, &b, &c, &d) && (c & (1u << 20)) != 0;
}
#endif

/* --- ARMv8: the same by CRC32CX and CRC32CB (Arm ARM C6.2) */

#if defined(KF_ARM)
#if defined(__clang__)
#define ARM_CRC __attribute__((target("crc")))
#else
#define ARM_CRC __attribute__((target("+crc")))
#endif

ARM_CRC static uint32_t arm_update(uint32_t crc, const uint8_t *data, size_t size)
{
    uint32_t second, third;
    uint64_t word;
    int at;
    crc = ~crc;
    for (; size >= 3 * STREAM_BYTES; size -= 3 * STREAM_BYTES, data += 3 * STREAM_BYTES) {
        for (second = third = 0, at = 0; at < STREAM_BYTES; at += 8) {
            memcpy(&word, data + at, 8);
            crc = __crc32cd(crc, word);
            memcpy(&word, data + STREAM_BYTES + at, 8);
            second = __crc32cd(second, word);
            memcpy(&word, data + 2 * STREAM_BYTES + at, 8);
            third = __crc32cd(third, word);
        }
        crc = joined(joined(crc, second), third);
    }
    for (; size >= 8; size -= 8, data += 8) {
        memcpy(&word, data, 8);
        crc = __crc32cd(crc, word);
    }
    for (; size; size--, data++)
        crc = __crc32cb(crc, *data);
    return ~crc;
}

static int arm_available(void)
{
#if defined(__APPLE__)
    return 1; /* every Apple arm64 CPU has it */
#elif defined(__linux__)
    return (getauxval(AT_HWCAP) & HWCAP_CRC32) != 0;
#else
    return 0;
#endif
}
#endif

const kf_crc32c_kernel kf_crc32c_kernels[] = {
#if defined(KF_X86)
    {"sse4.2", sse_available, sse_update},
#endif
#if defined(KF_ARM)
    {"armv8", arm_available, arm_update},
#endif
    {"portable", portable_available, portable_update},
    {NULL, NULL, NULL},
};
