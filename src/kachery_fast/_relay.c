/* Reading on one core while another hashes; _relay.h is the contract. */
#if defined(__linux__) && !defined(_GNU_SOURCE)
#define _GNU_SOURCE 1
#endif
#include "_relay.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>
#if defined(__linux__)
#include <linux/fs.h>
#endif

/* 8 MiB stay in the cache that the cores share. The thread sleeps until half of the ring is empty: to wake it for
 * every slot costs more than the reading (measured 1.50 against 1.69 GB/s on two shared EPYC cores). */
#define SLOT_SIZE ((size_t)512 << 10)
#define SLOT_COUNT 16
#define REFILL_COUNT 8
#define WAIT_NANOSECONDS 50000000L
#define PENDING PTRDIFF_MIN

struct kf_relay {
    int source;
    int target;
    uint8_t *memory;
    pthread_t thread;
    pthread_mutex_t lock; /* over all that follows; a slot's memory belongs to who claimed it, then to the hasher */
    pthread_cond_t filled_one;
    pthread_cond_t freed_some;
    uint64_t claimed; /* slots, ever: claimed for filling */
    uint64_t hashed;
    ptrdiff_t filled[SLOT_COUNT]; /* bytes; less than SLOT_SIZE at the end; a negative errno; or PENDING */
    int ended; /* no slot need be filled any more */
    int reader_waits;
    int hasher_waits;
};

/* Read up to size bytes, less only at the end, and write them to the target. Bytes, or a negative errno. */
static ptrdiff_t transfer(int source, int target, uint8_t *memory, size_t size, off_t offset)
{
    size_t got = 0, written = 0;
    while (got < size) {
        const ssize_t result = pread(source, memory + got, size - got, offset + (off_t)got);
        if (result == 0)
            break;
        if (result > 0)
            got += (size_t)result;
        else if (errno != EINTR)
            return -errno;
    }
    while (target >= 0 && written < got) {
        const ssize_t result = pwrite(target, memory + written, got - written, offset + (off_t)written);
        if (result > 0)
            written += (size_t)result;
        else if (result == 0)
            return -EIO;
        else if (errno != EINTR)
            return -errno;
    }
    return (ptrdiff_t)got;
}

/* Claim the next slot and fill it. The lock is held before and after, not meanwhile. */
static void fill_slot(kf_relay *relay)
{
    const uint64_t number = relay->claimed++;
    const size_t slot = number % SLOT_COUNT;
    ptrdiff_t got;
    pthread_mutex_unlock(&relay->lock);
    got = transfer(relay->source, relay->target, relay->memory + slot * SLOT_SIZE, SLOT_SIZE,
                   (off_t)(number * SLOT_SIZE));
    pthread_mutex_lock(&relay->lock);
    relay->filled[slot] = got;
    if (got < (ptrdiff_t)SLOT_SIZE)
        relay->ended = 1;
    if (relay->hasher_waits)
        pthread_cond_signal(&relay->filled_one);
}

static void *run_reader(void *argument)
{
    kf_relay *relay = argument;
    pthread_mutex_lock(&relay->lock);
    while (!relay->ended) {
        if (relay->claimed - relay->hashed < SLOT_COUNT) {
            fill_slot(relay);
            continue;
        }
        relay->reader_waits = 1;
        while (!relay->ended && relay->claimed - relay->hashed > SLOT_COUNT - REFILL_COUNT)
            pthread_cond_wait(&relay->freed_some, &relay->lock);
        relay->reader_waits = 0;
    }
    pthread_mutex_unlock(&relay->lock);
    return NULL;
}

/* A thread that no signal is delivered to: they belong to the threads that know Python. */
static int start_reader(kf_relay *relay)
{
    sigset_t all, before;
    int failed;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    failed = pthread_create(&relay->thread, NULL, run_reader, relay);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return failed;
}

static void free_relay(kf_relay *relay)
{
    pthread_cond_destroy(&relay->filled_one);
    pthread_cond_destroy(&relay->freed_some);
    pthread_mutex_destroy(&relay->lock);
    free(relay->memory);
    free(relay);
}

kf_relay *kf_relay_open(int source, int target, int *error)
{
    kf_relay *relay = calloc(1, sizeof *relay);
    size_t slot;
    *error = ENOMEM;
    if (relay == NULL)
        return NULL;
    relay->source = source;
    relay->target = target;
    relay->memory = malloc(SLOT_COUNT * SLOT_SIZE);
    for (slot = 0; slot < SLOT_COUNT; slot++)
        relay->filled[slot] = PENDING;
    pthread_mutex_init(&relay->lock, NULL);
    pthread_cond_init(&relay->filled_one, NULL);
    pthread_cond_init(&relay->freed_some, NULL);
    if (relay->memory != NULL)
        *error = start_reader(relay);
    if (*error == 0)
        return relay;
    free_relay(relay);
    return NULL;
}

/* Wait for the slot that is hashed next. When nobody reads it yet, because the reading thread got no processor or
 * waits for the disk, it is read here rather than waited for. Returns 0 when the wait was long enough. */
static int await_slot(kf_relay *relay, size_t slot)
{
    while (relay->filled[slot] == PENDING) {
        struct timespec until;
        int timed_out;
        if (relay->claimed == relay->hashed) {
            fill_slot(relay);
            continue;
        }
        clock_gettime(CLOCK_REALTIME, &until); /* macOS has no other clock for a condition */
        until.tv_nsec += WAIT_NANOSECONDS;
        if (until.tv_nsec >= 1000000000L) {
            until.tv_nsec -= 1000000000L;
            until.tv_sec++;
        }
        relay->hasher_waits = 1;
        timed_out = pthread_cond_timedwait(&relay->filled_one, &relay->lock, &until) == ETIMEDOUT;
        relay->hasher_waits = 0;
        if (timed_out && relay->filled[slot] == PENDING)
            return 0;
    }
    return 1;
}

int kf_relay_hash(kf_relay *relay, kf_fused *fused, size_t span_size)
{
    size_t done = 0;
    int result = KF_RELAY_MORE;
    pthread_mutex_lock(&relay->lock);
    while (result == KF_RELAY_MORE && done < span_size) {
        const size_t slot = relay->hashed % SLOT_COUNT;
        ptrdiff_t got;
        if (!await_slot(relay, slot))
            break;
        got = relay->filled[slot];
        if (got < 0) {
            result = (int)got;
            break;
        }
        pthread_mutex_unlock(&relay->lock);
        if (kf_fused_update(fused, relay->memory + slot * SLOT_SIZE, (size_t)got) != 0)
            result = -ENOMEM;
        done += (size_t)got;
        pthread_mutex_lock(&relay->lock);
        if (got < (ptrdiff_t)SLOT_SIZE) {
            if (result == KF_RELAY_MORE)
                result = KF_RELAY_END;
            relay->filled[slot] = 0; /* it stays the last one: asked again, the answer is the end again */
            break;
        }
        relay->filled[slot] = PENDING;
        relay->hashed++;
        if (relay->reader_waits && relay->claimed - relay->hashed <= SLOT_COUNT - REFILL_COUNT)
            pthread_cond_signal(&relay->freed_some);
    }
    pthread_mutex_unlock(&relay->lock);
    return result;
}

void kf_relay_close(kf_relay *relay)
{
    pthread_mutex_lock(&relay->lock);
    relay->ended = 1;
    pthread_cond_signal(&relay->freed_some);
    pthread_mutex_unlock(&relay->lock);
    pthread_join(relay->thread, NULL);
    free_relay(relay);
}

int kf_hash_small(int source, int target, kf_fused *fused, size_t size)
{
    uint8_t *memory = malloc(size + 1); /* one more, to see the end */
    ptrdiff_t got;
    int result;
    if (memory == NULL)
        return -ENOMEM;
    got = transfer(source, target, memory, size + 1, 0);
    if (got < 0)
        result = (int)got;
    else if ((size_t)got > size)
        result = KF_RELAY_MORE;
    else
        result = kf_fused_update(fused, memory, (size_t)got) == 0 ? KF_RELAY_END : -ENOMEM;
    free(memory);
    return result;
}

long long kf_claimed_size(int fd)
{
    struct stat status;
    return fstat(fd, &status) == 0 && S_ISREG(status.st_mode) ? (long long)status.st_size : 0;
}

int kf_clone(int source, int target)
{
#if defined(FICLONE)
    /* The clone, which nobody else writes to, is what gets hashed: it must be readable. */
    if ((fcntl(target, F_GETFL) & O_ACCMODE) == O_RDWR)
        return ioctl(target, FICLONE, source);
#endif
    (void)source;
    (void)target;
    return -1;
}

int kf_expect(int source, int target, long long size)
{
#if defined(POSIX_FADV_SEQUENTIAL)
    (void)posix_fadvise(source, 0, 0, POSIX_FADV_SEQUENTIAL);
#else
    (void)source;
#endif
#if defined(__linux__)
    /* Only a full disk or a limit counts; posix_fallocate would write zeros where this call cannot be had. */
    if (target >= 0 && size > 0 && fallocate(target, 0, 0, (off_t)size) != 0 &&
        (errno == ENOSPC || errno == EDQUOT || errno == EFBIG))
        return errno;
#else
    (void)target;
    (void)size;
#endif
    return 0;
}

int kf_cut(int target, long long size)
{
    struct stat status;
    if (fstat(target, &status) != 0)
        return errno;
    return status.st_size == size || ftruncate(target, (off_t)size) == 0 ? 0 : errno;
}
