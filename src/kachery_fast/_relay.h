/* Reading (and copying) a file on one core while another hashes it.
 *
 * A relay is a ring of slots and a thread that fills them, ahead of the caller, who hashes them in order. What is
 * hashed is the memory that was written to the copy, so that the digests are those of the copy even when somebody
 * changes the source meanwhile. Files are never mapped here: one that is cut short would kill the process (SIGBUS).
 */
#ifndef KACHERY_FAST_RELAY_H
#define KACHERY_FAST_RELAY_H

#include "_sha1.h"

#define KF_RELAY_END 0
#define KF_RELAY_MORE 1

typedef struct kf_relay kf_relay;

/* Start to read the source from its first byte, and to write to the target at the same offsets unless it is -1.
 * NULL and an errno in *error when memory or a thread cannot be had. */
kf_relay *kf_relay_open(int source, int target, int *error);
/* Hash what comes, about span_size bytes, or less when nothing has come for a while, so that the caller can look for
 * signals. Returns KF_RELAY_MORE, KF_RELAY_END when all is hashed, or a negative errno. */
int kf_relay_hash(kf_relay *relay, kf_fused *fused, size_t span_size);
/* Stop the thread, wait for it, and free everything; at any time. */
void kf_relay_close(kf_relay *relay);

/* Without a thread: a file of up to size bytes is read whole, copied and hashed. Returns KF_RELAY_END, or
 * KF_RELAY_MORE when the file is longer (nothing is hashed then; a copy is to be begun again), or a negative errno. */
int kf_hash_small(int source, int target, kf_fused *fused, size_t size);

/* The length that a file says it has; 0 where it says none. */
long long kf_claimed_size(int fd);
/* Make the target a clone that shares the source's blocks. Returns 0 when it is one. */
int kf_clone(int source, int target);
/* Allocate the copy's space: a full disk shows at once, and writing is faster by a third (ext4, page cache). Returns
 * 0, also where the file system cannot, or an errno. */
int kf_expect(int source, int target, long long size);
/* Cut the copy to what was hashed. Returns 0 or an errno. */
int kf_cut(int target, long long size);

#endif
