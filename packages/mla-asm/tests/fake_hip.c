/* A HIP runtime that launches nothing and writes down what it was asked.
 *
 * The first byte of a code object is the error that loading it gives, 0 for none. Handles are
 * numbers; the argument block of the last launch is kept, as the real runtime copies it.
 */
#include <stddef.h>
#include <string.h>

int loads, launches;
unsigned sizes[7];
void *last_kernel, *last_stream;
unsigned char block[512];
size_t block_bytes;
char last_symbol[64];
int next_error;

int hipModuleLoadData(void **module, const void *image) {
    loads++;
    *module = (void *)(size_t)(100 + loads);
    return *(const unsigned char *)image;
}

int hipModuleGetFunction(void **kernel, void *module, const char *symbol) {
    strncpy(last_symbol, symbol, sizeof last_symbol - 1);
    *kernel = strcmp(symbol, "no_handle") ? (void *)((size_t)module + 1000) : NULL;
    return strcmp(symbol, "absent") ? 0 : 500;
}

int hipModuleLaunchKernel(void *kernel, unsigned gx, unsigned gy, unsigned gz, unsigned bx,
                          unsigned by, unsigned bz, unsigned lds, void *stream, void **params,
                          void **extra) {
    unsigned given[7] = {gx, gy, gz, bx, by, bz, lds};
    if (params || extra[0] != (void *)1 || extra[2] != (void *)2 || extra[4] != (void *)3)
        return 1;
    launches++;
    memcpy(sizes, given, sizeof sizes);
    last_kernel = kernel;
    last_stream = stream;
    block_bytes = *(size_t *)extra[3];
    memcpy(block, extra[1], block_bytes);
    return next_error;
}

const char *hipGetErrorName(int error) {
    return error == 209 ? "hipErrorNoBinaryForGpu" : error == 500 ? "hipErrorNotFound" : NULL;
}

const char *hipGetErrorString(int error) {
    return error == 209 ? "no kernel image is available" : "some text";
}
