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

typedef uint32_t (*sum_function)(uint32_t sum, const unsigned char *bytes, uint64_t size);

static void add_to_sums(sum_function add, const uint64_t *addresses, const uint64_t *sizes, uint32_t *sums,
                        size_t count)
{
    for (size_t i = 0; i < count; i++)
        sums[i] = add(sums[i], (const unsigned char *)(uintptr_t)addresses[i], sizes[i]);
}

/* A call for each from Python lets go of the lock, and waits 5 ms for it beside a thread that never does. */
static PyObject *sum_up(PyObject *module, PyObject *args)
{
    unsigned long long function;
    Py_buffer addresses, sizes, sums;
    int fits;

    if (!PyArg_ParseTuple(args, "Ky*y*w*", &function, &addresses, &sizes, &sums))
        return NULL;
    size_t count = (size_t)sums.len / sizeof(uint32_t);
    Py_ssize_t needed = (Py_ssize_t)(count * sizeof(uint64_t));
    fits = addresses.len == needed && sizes.len == needed && sums.len % sizeof(uint32_t) == 0;
    if (fits) {
        Py_BEGIN_ALLOW_THREADS
        add_to_sums((sum_function)(uintptr_t)function, addresses.buf, sizes.buf, sums.buf, count);
        Py_END_ALLOW_THREADS
    }
    else
        PyErr_SetString(PyExc_ValueError,
                        "Cannot sum up: give as many addresses and sizes, as uint64, as sums, as uint32.");
    PyBuffer_Release(&addresses);
    PyBuffer_Release(&sizes);
    PyBuffer_Release(&sums);
    if (!fits)
        return NULL;
    Py_RETURN_NONE;
}

static int lies_within(const uint64_t *starts, const uint64_t *bounds, size_t count, uint64_t target,
                       uint64_t source)
{
    for (size_t i = 0; i < count; i++) {
        uint64_t size = bounds[i + 1] - bounds[i]; /* far too large where they go down */
        if (bounds[i + 1] > source || size > target || starts[i] > target - size)
            return 0;
    }
    return 1;
}

/* Keeps the interpreter's lock: what is copied between sums that are made without it is some 20 KB. */
static PyObject *scatter(PyObject *module, PyObject *args)
{
    Py_buffer memory, starts, parts, bounds;
    int fits;

    if (!PyArg_ParseTuple(args, "w*y*y*y*", &memory, &starts, &parts, &bounds))
        return NULL;
    const uint64_t *at = starts.buf, *from = bounds.buf;
    size_t count = (size_t)starts.len / sizeof(uint64_t);
    fits = starts.len % sizeof(uint64_t) == 0 && bounds.len == starts.len + (Py_ssize_t)sizeof(uint64_t)
           && lies_within(at, from, count, (uint64_t)memory.len, (uint64_t)parts.len);
    for (size_t i = 0; fits && i < count; i++)
        memcpy((char *)memory.buf + at[i], (const char *)parts.buf + from[i], from[i + 1] - from[i]);
    PyBuffer_Release(&memory);
    PyBuffer_Release(&starts);
    PyBuffer_Release(&parts);
    PyBuffer_Release(&bounds);
    if (!fits)
        return PyErr_Format(PyExc_ValueError, "Cannot scatter: each part must be one of the parts, and fit.");
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
        free_write(write);
        return PyErr_SetFromErrno(PyExc_OSError);
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
    ssize_t count;

    /* From here on it is this call's: a second one finds no such capsule. */
    if (write == NULL || PyCapsule_SetDestructor(capsule, NULL) != 0 || PyCapsule_SetName(capsule, "") != 0)
        return NULL;
    wait_for_write(write);
    count = write->count;
    errno = write->error;
    free_write(write);
    return count < 0 ? PyErr_SetFromErrno(PyExc_OSError) : PyLong_FromSsize_t(count);
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
    {"sum_up", sum_up, METH_VARARGS, "sum_up(function, addresses, sizes, sums): see the .pyi file."},
    {"scatter", scatter, METH_VARARGS, "scatter(memory, starts, parts, bounds): see the .pyi file."},
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
