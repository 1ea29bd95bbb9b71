/* Prints the CRC-32C by every kernel that this CPU has, for the test beside it to compare with another implementation.
 *
 * usage: crc32c_check LENGTH...
 * For each kernel and length a line, of the bytes that kernel_check.c describes. The data lies at an odd address and is
 * fed in pieces of 1, 7, 64, 200 and the rest, in turn.
 */
#include "_crc32c.h"

#include <stdio.h>
#include <stdlib.h>

int main(int argc, char **argv)
{
    static const size_t pieces[] = {1, 7, 64, 200, (size_t)-1};
    const kf_crc32c_kernel *kernel;
    int i;
    for (kernel = kf_crc32c_kernels; kernel->name != NULL; kernel++) {
        if (!kernel->available())
            continue;
        for (i = 1; i < argc; i++) {
            const size_t length = strtoull(argv[i], NULL, 10);
            uint8_t *memory = malloc(length + 1); /* exactly, so that the address sanitizer sees every overrun */
            uint32_t x = 1, crc = 0;
            size_t j, taken, turn = 0;
            if (memory == NULL)
                return 1;
            for (j = 0; j < length; j++, x = x * 1103515245u + 12345u)
                memory[j + 1] = (uint8_t)(x >> 16);
            for (j = 0; j < length; j += taken, turn++) {
                taken = length - j < pieces[turn % 5] ? length - j : pieces[turn % 5];
                crc = kernel->update(crc, memory + 1 + j, taken);
            }
            printf("%s %zu %08x\n", kernel->name, length, crc);
            free(memory);
        }
    }
    return 0;
}
