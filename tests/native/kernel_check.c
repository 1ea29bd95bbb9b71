/* Prints digests by every kernel that this CPU has, for the test beside it to compare with another implementation.
 *
 * usage: kernel_check CHUNK_SIZE LENGTH...
 * For each kernel and length one line of the single digest and one of the fused pass (whole, then the chunks), of
 * the bytes 0, 1, 2, ... LENGTH-1 of the generator x -> x * 1103515245 + 12345 (bits 16 to 23). The data lies at an
 * odd address and is fed in pieces of 1, 7, 64, 200 and the rest, in turn.
 */
#include "_sha1.h"

#include <stdio.h>
#include <stdlib.h>

static void print_digest(const uint8_t *digest)
{
    int i;
    putchar(' ');
    for (i = 0; i < KF_SHA1_DIGEST_SIZE; i++)
        printf("%02x", digest[i]);
}

static int check(const kf_sha1_kernel *kernel, const uint8_t *data, size_t length, size_t chunk_size)
{
    static const size_t pieces[] = {1, 7, 64, 200, (size_t)-1};
    uint8_t digest[KF_SHA1_DIGEST_SIZE];
    kf_sha1 single;
    kf_fused fused;
    size_t done, taken, turn = 0, i;
    kf_sha1_start(&single);
    kf_fused_start(&fused, kernel, chunk_size);
    for (done = 0; done < length; done += taken, turn++) {
        taken = length - done < pieces[turn % 5] ? length - done : pieces[turn % 5];
        kf_sha1_update(kernel, &single, data + done, taken);
        if (kf_fused_update(&fused, data + done, taken) != 0)
            return 1;
    }
    if (kf_fused_finish(&fused) != 0)
        return 1;
    kf_sha1_digest(kernel, &single, digest);
    printf("%s single %zu", kernel->name, length);
    print_digest(digest);
    kf_sha1_digest(kernel, &fused.whole, digest);
    printf("\n%s fused %zu", kernel->name, length);
    print_digest(digest);
    for (i = 0; i < fused.chunk_count; i++)
        print_digest(fused.chunk_digests + i * KF_SHA1_DIGEST_SIZE);
    putchar('\n');
    kf_fused_free(&fused);
    return 0;
}

int main(int argc, char **argv)
{
    const kf_sha1_kernel *kernel;
    int i;
    if (argc < 3)
        return 2;
    for (kernel = kf_sha1_kernels; kernel->name != NULL; kernel++) {
        if (!kernel->available())
            continue;
        for (i = 2; i < argc; i++) {
            const size_t length = strtoull(argv[i], NULL, 10);
            uint8_t *memory = malloc(length + 1); /* exactly, so that the address sanitizer sees every overrun */
            uint32_t x = 1;
            size_t j;
            int failed;
            if (memory == NULL)
                return 1;
            for (j = 0; j < length; j++, x = x * 1103515245u + 12345u)
                memory[j + 1] = (uint8_t)(x >> 16);
            failed = check(kernel, memory + 1, length, strtoull(argv[1], NULL, 10));
            free(memory);
            if (failed)
                return 1;
        }
    }
    return 0;
}
