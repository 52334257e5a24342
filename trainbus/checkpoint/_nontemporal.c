/*
 * Copies memory with stores that go past the caches ("non-temporal" ones).
 *
 * An ordinary store first reads the line that it is about to overwrite. A snapshot is larger than the
 * caches and is not read again soon, so that read is wasted: three bytes cross the memory bus for each
 * byte copied, and here two. Neither torch nor, below a threshold that depends on the machine, memcpy
 * does this.
 */

#define _GNU_SOURCE
#include <Python.h>

#include <emmintrin.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>

enum {
    LINE = 64,
    PAGE = 4096,
    PAGES = 4,                 /* read at the same time, because a core prefetches within one page only */
    PIECE = 1 << 20,           /* what a thread takes at a time */
    WORTH_A_THREAD = 4 << 20,  /* starting one takes as long as copying about 1 MiB */
    MOST_THREADS = 64,
};

/* Byte ranges, which threads copy as one sequence of bytes, each taking the next PIECE of it. */
struct ranges {
    const uint64_t *targets, *sources, *sizes;
    uint64_t total;
    _Atomic uint64_t taken;
};

static inline void stream_line(char *target, const char *source)
{
    for (int i = 0; i < LINE; i += sizeof(__m128i))
        _mm_stream_si128((__m128i *)(target + i), _mm_loadu_si128((const __m128i *)(source + i)));
}

static void copy_range(char *target, const char *source, size_t size)
{
    size_t head = -(uintptr_t)target % LINE;

    if (size >= head + PAGES * PAGE) {
        memcpy(target, source, head);
        target += head, source += head, size -= head;
        for (; size >= PAGES * PAGE; target += PAGES * PAGE, source += PAGES * PAGE, size -= PAGES * PAGE)
            for (size_t line = 0; line < PAGE; line += LINE)
                for (size_t page = 0; page < PAGES * PAGE; page += PAGE)
                    stream_line(target + page + line, source + page + line);
    }
    memcpy(target, source, size);
}

static void *copy_pieces(void *argument)
{
    struct ranges *ranges = argument;
    size_t index = 0;
    uint64_t first = 0; /* how many bytes lie before the range at `index` */

    for (;;) {
        uint64_t start = atomic_fetch_add(&ranges->taken, PIECE);
        uint64_t stop = start + PIECE < ranges->total ? start + PIECE : ranges->total;

        if (start >= ranges->total)
            break;
        while (start < stop) {
            while (first + ranges->sizes[index] <= start)
                first += ranges->sizes[index++];
            uint64_t offset = start - first, left = ranges->sizes[index] - offset;
            uint64_t size = left < stop - start ? left : stop - start;
            copy_range((char *)(uintptr_t)(ranges->targets[index] + offset),
                       (const char *)(uintptr_t)(ranges->sources[index] + offset), size);
            start += size;
        }
    }
    _mm_sfence(); /* such stores are seen by others in any order until this */
    return NULL;
}

/*
 * Lets threads begin on other processors than the caller's. Left to itself the system queues one in three
 * behind the caller, which keeps it from working for some milliseconds.
 */
static void begin_elsewhere(pthread_attr_t *attributes)
{
    cpu_set_t processors;

    if (pthread_getaffinity_np(pthread_self(), sizeof processors, &processors) != 0)
        return;
    CPU_CLR(sched_getcpu(), &processors);
    if (CPU_COUNT(&processors) > 0)
        pthread_attr_setaffinity_np(attributes, sizeof processors, &processors);
}

static void copy_on_threads(struct ranges *ranges, int threads)
{
    pthread_t others[MOST_THREADS];
    pthread_attr_t attributes;
    uint64_t useful = ranges->total / WORTH_A_THREAD;
    int most = useful < MOST_THREADS ? (int)useful : MOST_THREADS;
    int wanted = (threads < most ? threads : most) - 1;
    int started = 0;

    pthread_attr_init(&attributes);
    if (wanted > 0)
        begin_elsewhere(&attributes);
    /* Where the system refuses one, the others do its part. */
    while (started < wanted && pthread_create(&others[started], &attributes, copy_pieces, ranges) == 0)
        started++;
    pthread_attr_destroy(&attributes);
    copy_pieces(ranges);
    while (started > 0)
        pthread_join(others[--started], NULL);
}

static PyObject *copy(PyObject *module, PyObject *args)
{
    Py_buffer targets, sources, sizes;
    int threads, fits;
    struct ranges ranges = {0};

    if (!PyArg_ParseTuple(args, "y*y*y*i", &targets, &sources, &sizes, &threads))
        return NULL;
    fits = targets.len == sizes.len && sources.len == sizes.len && sizes.len % sizeof(uint64_t) == 0;
    if (fits) {
        ranges.targets = targets.buf, ranges.sources = sources.buf, ranges.sizes = sizes.buf;
        for (size_t i = 0; i < sizes.len / sizeof(uint64_t); i++)
            ranges.total += ranges.sizes[i];
        Py_BEGIN_ALLOW_THREADS
        copy_on_threads(&ranges, threads);
        Py_END_ALLOW_THREADS
    }
    else
        PyErr_SetString(PyExc_ValueError, "Cannot copy: give as many targets and sizes as sources, as uint64.");
    PyBuffer_Release(&targets);
    PyBuffer_Release(&sources);
    PyBuffer_Release(&sizes);
    if (!fits)
        return NULL;
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"copy", copy, METH_VARARGS, "copy(targets, sources, sizes, threads): see the .pyi file."},
    {NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, .m_name = "_nontemporal", .m_size = 0, .m_methods = methods,
};

PyMODINIT_FUNC PyInit__nontemporal(void)
{
    return PyModuleDef_Init(&definition);
}
