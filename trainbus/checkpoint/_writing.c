/*
 * What the writer of a file does for each of thousands of tensors, with little of the interpreter's lock:
 * while it has that, a training thread can launch nothing.
 */

#include <Python.h>

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* What xxHash and ISA-L are asked for, by address. */
struct functions {
    uint32_t (*sum)(uint32_t sum, const unsigned char *bytes, uint64_t size);
    int (*hash)(void *state, const void *bytes, size_t size);
    void *state;
};

/* Bytes of records, piece by piece. */
struct pieces {
    const uint64_t *starts, *sizes;
    uint32_t *sums;
    size_t count;
};

/* What stands behind each of the first of those records, which end there. */
struct gaps {
    const uint64_t *starts, *bounds; /* on the memory; in the parts, and behind the last one where it ends */
    unsigned char *parts;
    size_t count;
    size_t sum_at;
};

enum { BLOCK = 256 << 10, SUM_BYTES = 4 };

/* Block by block: what the sum has read lies in the core's cache when the digest reads it. */
static uint32_t sum_and_hash(const struct functions *to, uint32_t sum, const unsigned char *bytes, uint64_t size)
{
    while (size > 0) {
        uint64_t block = size < BLOCK ? size : BLOCK;
        sum = to->sum(sum, bytes, block);
        to->hash(to->state, bytes, block);
        bytes += block, size -= block;
    }
    return sum;
}

static void complete_all(const struct functions *to, unsigned char *memory, const struct pieces *pieces,
                         const struct gaps *gaps)
{
    for (size_t i = 0; i < pieces->count; i++) {
        uint32_t sum = sum_and_hash(to, pieces->sums[i], memory + pieces->starts[i], pieces->sizes[i]);

        pieces->sums[i] = sum;
        if (i < gaps->count) {
            unsigned char *part = gaps->parts + gaps->bounds[i], *gap = memory + gaps->starts[i];
            uint64_t size = gaps->bounds[i + 1] - gaps->bounds[i];
            for (int byte = 0; byte < SUM_BYTES; byte++)
                part[gaps->sum_at + byte] = (unsigned char)(sum >> 8 * byte);
            memcpy(gap, part, size);
            to->hash(to->state, gap, size);
        }
    }
}

static int lie_within(uint64_t size, const struct pieces *pieces)
{
    for (size_t i = 0; i < pieces->count; i++)
        if (pieces->sizes[i] > size || pieces->starts[i] > size - pieces->sizes[i])
            return 0;
    return 1;
}

static int fit(uint64_t size, uint64_t parts, const struct gaps *gaps)
{
    for (size_t i = 0; i < gaps->count; i++) {
        uint64_t part = gaps->bounds[i + 1] - gaps->bounds[i]; /* far too large where they go down */
        if (gaps->bounds[i + 1] > parts || part < gaps->sum_at + SUM_BYTES || part > size
            || gaps->starts[i] > size - part)
            return 0;
    }
    return 1;
}

/* One call for many: a call for each from Python lets go of the lock, and waits 5 ms for it beside a thread
 * that never does. */
static PyObject *complete(PyObject *module, PyObject *args)
{
    unsigned long long sum, hash, state;
    Py_buffer memory, starts, sizes, sums, gap_starts, bounds, parts;
    unsigned int sum_at;
    int fits;

    if (!PyArg_ParseTuple(args, "(KKK)w*(y*y*w*)(y*y*w*I)", &sum, &hash, &state, &memory, &starts, &sizes, &sums,
                          &gap_starts, &bounds, &parts, &sum_at))
        return NULL;
    struct functions functions = {.state = (void *)(uintptr_t)state};
    functions.sum = (uint32_t (*)(uint32_t, const unsigned char *, uint64_t))(uintptr_t)sum;
    functions.hash = (int (*)(void *, const void *, size_t))(uintptr_t)hash;
    struct pieces pieces = {starts.buf, sizes.buf, sums.buf, (size_t)sums.len / sizeof(uint32_t)};
    struct gaps gaps = {gap_starts.buf, bounds.buf, parts.buf, (size_t)gap_starts.len / sizeof(uint64_t), sum_at};
    fits = sums.len % (Py_ssize_t)sizeof(uint32_t) == 0 && starts.len == 2 * sums.len && sizes.len == starts.len
           && gap_starts.len % (Py_ssize_t)sizeof(uint64_t) == 0 && gaps.count <= pieces.count
           && bounds.len == gap_starts.len + (Py_ssize_t)sizeof(uint64_t)
           && lie_within((uint64_t)memory.len, &pieces) && fit((uint64_t)memory.len, (uint64_t)parts.len, &gaps);
    if (fits) {
        Py_BEGIN_ALLOW_THREADS
        complete_all(&functions, memory.buf, &pieces, &gaps);
        Py_END_ALLOW_THREADS
    }
    else
        PyErr_SetString(PyExc_ValueError,
                        "Cannot complete: each piece needs a start, a size and a sum, each gap a start and a part "
                        "with room for its sum, and all must lie on the memory.");
    PyBuffer_Release(&memory);
    PyBuffer_Release(&starts);
    PyBuffer_Release(&sizes);
    PyBuffer_Release(&sums);
    PyBuffer_Release(&gap_starts);
    PyBuffer_Release(&bounds);
    PyBuffer_Release(&parts);
    if (!fits)
        return NULL;
    Py_RETURN_NONE;
}

/* A call of pwrite on a thread of its own. */
struct write {
    pthread_t thread;
    pid_t process; /* a forked child has the structure and no thread */
    int fd;
    Py_buffer data;
    off_t position;
    ssize_t count;
    int error;
};

static const char WRITE[] = "trainbus write";

static void *make_write(void *argument)
{
    struct write *write = argument;

    do
        write->count = pwrite(write->fd, write->data.buf, (size_t)write->data.len, write->position);
    while (write->count < 0 && errno == EINTR);
    write->error = errno;
    return NULL;
}

/* The thread leaves signals to others: Python's handlers expect one that Python knows. */
static int start_write(struct write *write)
{
    sigset_t all, before;
    int error;

    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    error = pthread_create(&write->thread, NULL, make_write, write);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return error;
}

static void wait_for_write(struct write *write)
{
    if (write->process != getpid())
        return;
    Py_BEGIN_ALLOW_THREADS
    pthread_join(write->thread, NULL);
    Py_END_ALLOW_THREADS
}

static void free_write(struct write *write)
{
    PyBuffer_Release(&write->data);
    free(write);
}

/* Of one that nobody has waited for: its memory must not go before it has ended. */
static void forget_write(PyObject *capsule)
{
    struct write *write = PyCapsule_GetPointer(capsule, WRITE);

    wait_for_write(write);
    free_write(write);
}

static PyObject *begin_write(PyObject *module, PyObject *args)
{
    struct write *write = calloc(1, sizeof *write);
    long long position;
    PyObject *capsule;

    if (write == NULL)
        return PyErr_NoMemory();
    if (!PyArg_ParseTuple(args, "iy*L", &write->fd, &write->data, &position)) {
        free(write);
        return NULL;
    }
    write->position = (off_t)position;
    write->process = getpid();
    errno = start_write(write);
    if (errno != 0) {
        PyErr_SetFromErrno(PyExc_OSError); /* before anything else can change errno */
        free_write(write);
        return NULL;
    }
    capsule = PyCapsule_New(write, WRITE, forget_write);
    if (capsule == NULL) {
        wait_for_write(write);
        free_write(write);
    }
    return capsule;
}

static PyObject *finish_write(PyObject *module, PyObject *capsule)
{
    struct write *write = PyCapsule_GetPointer(capsule, WRITE);
    PyObject *result;

    /* From here on it is this call's: a second one finds no such capsule. */
    if (write == NULL || PyCapsule_SetDestructor(capsule, NULL) != 0 || PyCapsule_SetName(capsule, "") != 0)
        return NULL;
    wait_for_write(write);
    errno = write->error;
    result = write->count < 0 ? PyErr_SetFromErrno(PyExc_OSError) : PyLong_FromSsize_t(write->count);
    free_write(write);
    return result;
}

static PyObject *answer(PyObject *types_and_function, PyObject *value)
{
    int asked = PySet_Contains(PyTuple_GetItem(types_and_function, 0), (PyObject *)Py_TYPE(value));

    if (asked < 0)
        return NULL;
    if (asked)
        return PyObject_CallFunctionObjArgs(PyTuple_GetItem(types_and_function, 1), value, NULL);
    Py_RETURN_NONE;
}

static PyMethodDef answer_method = {"answer", answer, METH_O, "The function's answer about a value, or None."};

/* A pickler asks for the persistent id of everything it meets: twenty times for a tensor. */
static PyObject *only_about(PyObject *module, PyObject *args)
{
    PyObject *types, *function;

    if (!PyArg_ParseTuple(args, "OO", &types, &function))
        return NULL;
    if (!PyFrozenSet_Check(types)) {
        PyErr_SetString(PyExc_TypeError, "Cannot look types up in what is no frozenset.");
        return NULL;
    }
    return PyCFunction_New(&answer_method, args);
}

static PyMethodDef methods[] = {
    {"complete", complete, METH_VARARGS, "complete(functions, memory, pieces, gaps): see the .pyi file."},
    {"begin_write", begin_write, METH_VARARGS, "begin_write(fd, data, position): see the .pyi file."},
    {"finish_write", finish_write, METH_O, "finish_write(write): see the .pyi file."},
    {"only_about", only_about, METH_VARARGS, "only_about(types, function): see the .pyi file."},
    {NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, .m_name = "_writing", .m_size = 0, .m_methods = methods,
};

PyMODINIT_FUNC PyInit__writing(void)
{
    return PyModuleDef_Init(&definition);
}
