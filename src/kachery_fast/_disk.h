/* What the operating systems do differently about allocating, mapping and syncing a file. */
#ifndef KACHERY_FAST_DISK_H
#define KACHERY_FAST_DISK_H

#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>
#if defined(__linux__)
#include <linux/falloc.h>
#include <sys/vfs.h>
#endif

#if !defined(MAP_POPULATE)
#define MAP_POPULATE 0
#endif
#if defined(__linux__) && !defined(MADV_POPULATE_WRITE)
#define MADV_POPULATE_WRITE 23 /* Linux 5.14 */
#endif

/* Can a mapping of allocated space on this file system be written without a SIGBUS? Only where allocated blocks
 * are overwritten in place; not where a copy on write can run out of room, nor over a network. Numbers from
 * linux/magic.h: ext4, xfs, tmpfs, f2fs, and overlayfs, whose upper directory is one of these in practice. */
static inline int kf_maps_safely(int fd)
{
#if defined(__linux__)
    struct statfs status;
    if (fstatfs(fd, &status) != 0)
        return 0;
    switch ((unsigned long)status.f_type & 0xffffffffUL) {
    case 0xef53UL: case 0x58465342UL: case 0x01021994UL: case 0xf2f52010UL: case 0x794c7630UL:
        return 1;
    }
    return 0;
#else
    (void)fd;
    return 1;
#endif
}

/* Allocate a range of a file that may be sparse, or all of one that is not, growing it at need. 0, or an errno; EOPNOTSUPP where that cannot be had: the
 * C library would then write zeros to every block, which is why posix_fallocate is not used. */
static inline int kf_allocate(int fd, long long start, long long size, int sparse)
{
#if defined(__linux__)
    int result;
    (void)sparse;
    do
        result = fallocate(fd, 0, (off_t)start, (off_t)size);
    while (result != 0 && errno == EINTR);
    return result == 0 ? 0 : errno == ENOSYS ? EOPNOTSUPP : errno;
#elif defined(F_PREALLOCATE)
    struct stat status;
    fstore_t store = {F_ALLOCATEALL, F_PEOFPOSMODE, 0, 0, 0};
    if (fstat(fd, &status) != 0)
        return errno;
    if (sparse || start != 0) /* only the end of a file can be allocated, not a hole in it */
        return EOPNOTSUPP;
    store.fst_length = (off_t)size - (off_t)status.st_blocks * 512;
    if (store.fst_length > 0 && fcntl(fd, F_PREALLOCATE, &store) == -1)
        return errno == ENOTSUP ? EOPNOTSUPP : errno;
    return 0;
#else
    (void)fd, (void)start, (void)size, (void)sparse;
    return EOPNOTSUPP;
#endif
}

/* The bytes that the file system has free for this user, or -1 where it does not count them. */
static inline long long kf_free_bytes(int fd)
{
    struct statvfs status;
    if (fstatvfs(fd, &status) != 0 || status.f_blocks == 0)
        return -1;
    return (long long)status.f_bavail * (long long)status.f_frsize;
}

static inline int kf_file_status(int fd, long long *size, long long *allocated)
{
    struct stat status;
    if (fstat(fd, &status) != 0)
        return errno;
    *size = (long long)status.st_size;
    *allocated = (long long)status.st_blocks * 512;
    return 0;
}

/* Where the next data at or after start begin; -1 and errno as lseek. The position of fd is used for nothing. */
static inline long long kf_next_data(int fd, long long start)
{
#if defined(SEEK_DATA)
    return (long long)lseek(fd, (off_t)start, SEEK_DATA);
#else
    (void)fd, (void)start;
    errno = EINVAL;
    return -1;
#endif
}

/* Make a mapping present and writable in one call. A refusal is an errno where touching it would be a SIGBUS;
 * a kernel that does not know the call leaves it to the page faults. */
static inline int kf_populate(void *memory, size_t size)
{
#if defined(MADV_POPULATE_WRITE)
    int result;
    do
        result = madvise(memory, size, MADV_POPULATE_WRITE);
    while (result != 0 && (errno == EINTR || errno == EAGAIN));
    return result == 0 || errno == EINVAL ? 0 : errno;
#else
    (void)memory, (void)size;
    return 0;
#endif
}

/* Begin to write a range to the disk, waiting for nothing: the final sync has less left to do. Only a hint. */
static inline void kf_begin_writeback(int fd, long long start, long long size)
{
#if defined(SYNC_FILE_RANGE_WRITE)
    (void)sync_file_range(fd, (off_t)start, (off_t)size, SYNC_FILE_RANGE_WRITE);
#else
    (void)fd, (void)start, (void)size;
#endif
}

/* Read all of a range. 0, or an errno; a file that ends early is EIO. */
static inline int kf_read_fully(int fd, uint8_t *data, size_t size, long long offset)
{
    size_t got = 0;
    while (got < size) {
        const ssize_t result = pread(fd, data + got, size - got, (off_t)offset + (off_t)got);
        if (result > 0)
            got += (size_t)result;
        else if (result == 0)
            return EIO;
        else if (errno != EINTR)
            return errno;
    }
    return 0;
}

/* Write all of a range. 0, or an errno. */
static inline int kf_write_fully(int fd, const uint8_t *data, size_t size, long long offset)
{
    size_t written = 0;
    while (written < size) {
        const ssize_t result = pwrite(fd, data + written, size - written, (off_t)offset + (off_t)written);
        if (result > 0)
            written += (size_t)result;
        else if (result == 0)
            return EIO;
        else if (errno != EINTR)
            return errno;
    }
    return 0;
}

/* Wait until what was written is on the disk itself. 0, or an errno. */
static inline int kf_sync(int fd)
{
#if defined(F_FULLFSYNC)
    if (fcntl(fd, F_FULLFSYNC) == 0)
        return 0;
    return fsync(fd) == 0 ? 0 : errno;
#elif defined(__linux__)
    return fdatasync(fd) == 0 ? 0 : errno;
#else
    return fsync(fd) == 0 ? 0 : errno;
#endif
}

#endif
