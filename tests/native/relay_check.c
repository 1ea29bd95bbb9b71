/* Drives the two threads of a relay under the sanitizers: to the end, and broken off after 0, 1, 2, ... spans.
 *
 * usage: relay_check SOURCE TARGET; prints the SHA-1 of the copy as it was hashed.
 */
#include "_relay.h"

#include <fcntl.h>
#include <stdio.h>
#include <unistd.h>

/* Hash at most this many spans; the result of the last. */
static int hash(int source, int target, kf_fused *fused, int spans)
{
    int error = 0, result = KF_RELAY_MORE;
    kf_relay *relay = kf_relay_open(source, target, &error);
    if (relay == NULL)
        return -error;
    for (; result == KF_RELAY_MORE && spans > 0; spans--)
        result = kf_relay_hash(relay, fused, 1 << 20);
    kf_relay_close(relay);
    return result;
}

int main(int argc, char **argv)
{
    const kf_sha1_kernel *kernel = kf_sha1_kernels;
    uint8_t digest[KF_SHA1_DIGEST_SIZE];
    kf_fused fused;
    int source, target, spans, result = KF_RELAY_MORE, i;
    if (argc != 3)
        return 2;
    while (!kernel->available())
        kernel++;
    source = open(argv[1], O_RDONLY);
    target = open(argv[2], O_RDWR | O_CREAT, 0666);
    if (source < 0 || target < 0)
        return 1;
    for (spans = 0; spans < 8; spans++) {
        kf_fused_start(&fused, kernel, 1 << 20);
        result = hash(source, spans % 2 ? target : -1, &fused, spans);
        kf_fused_free(&fused);
        if (result < 0)
            return 1;
    }
    kf_fused_start(&fused, kernel, 1 << 20);
    result = hash(source, target, &fused, 1 << 30);
    kf_sha1_digest(kernel, &fused.whole, digest);
    kf_fused_free(&fused);
    for (i = 0; i < KF_SHA1_DIGEST_SIZE; i++)
        printf("%02x", digest[i]);
    putchar('\n');
    close(source);
    close(target);
    return result == KF_RELAY_END ? 0 : 1;
}
