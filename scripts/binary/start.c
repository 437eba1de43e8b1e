/* The beginning of the one file that scripts/build-binary makes: starts Python without a Python on the machine.
 *
 * Python and the few libraries that it needs to read the archive behind this program are inside it. The
 * system's loader opens libraries by path, so each is written to a file in memory first, which goes with the
 * process. All else is in the archive, and found by droppexd/packed.py.
 */
#define _GNU_SOURCE
#include <Python.h>
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

/* libraries.def is made by the build: LIBRARY(number, "file", "soname") for each, Python last. */
#define LIBRARY(number, file, name)                                  \
    __asm__(".pushsection .rodata\n"                                 \
            ".balign 16\n"                                           \
            "library_" #number ": .incbin \"" file "\"\n"            \
            "library_end_" #number ":\n"                             \
            ".popsection\n");                                        \
    extern const char library_##number[], library_end_##number[];
#include "libraries.def"
#undef LIBRARY

static const struct library {
    const char *name, *start, *end;
} libraries[] = {
#define LIBRARY(number, file, name) {name, library_##number, library_end_##number},
#include "libraries.def"
#undef LIBRARY
};

/* The file that runs, also when another has taken its place on the disk meanwhile. */
#define THIS_FILE "/proc/self/exe"

static const char install[] = "from droppexd.packed import install; install()";
static const char run_command[] = "from droppexd.cli.packed import main; main()";

static void fail(const char *what, const char *why) {
    fprintf(stderr, "droppex: cannot start: %s: %s\n", what, why);
    exit(1);
}

/* The file in memory stays open: the loader takes two libraries with the same path for one. */
static void *load(const struct library *library) {
    int file = memfd_create(library->name, MFD_CLOEXEC);
    if (file < 0) fail(library->name, "no file in memory");
    for (const char *at = library->start; at < library->end;) {
        ssize_t written = write(file, at, library->end - at);
        if (written <= 0) fail(library->name, "no memory");
        at += written;
    }
    char path[64];
    snprintf(path, sizeof path, "/proc/self/fd/%d", file);
    void *handle = dlopen(path, RTLD_NOW | RTLD_GLOBAL);
    if (!handle) fail(library->name, dlerror());
    return handle;
}

static void *symbol(void *python, const char *name) {
    void *found = dlsym(python, name);
    if (!found) fail(name, dlerror());
    return found;
}

#define FROM_PYTHON(name) __typeof__(&name) py_##name = (__typeof__(&name))symbol(python, #name)

static int run(void *python, int argc, char **argv) {
    FROM_PYTHON(PyPreConfig_InitPythonConfig);
    FROM_PYTHON(Py_PreInitialize);
    FROM_PYTHON(PyConfig_InitPythonConfig);
    FROM_PYTHON(PyConfig_SetBytesArgv);
    FROM_PYTHON(PyConfig_SetString);
    FROM_PYTHON(PyWideStringList_Append);
    FROM_PYTHON(Py_InitializeFromConfig);
    FROM_PYTHON(Py_DecodeLocale);
    FROM_PYTHON(PyStatus_Exception);
    FROM_PYTHON(Py_ExitStatusException);
    FROM_PYTHON(PyRun_SimpleStringFlags);
    FROM_PYTHON(Py_RunMain);
#define CHECKED(call)                                                         \
    do {                                                                      \
        PyStatus status = (call);                                             \
        if (py_PyStatus_Exception(status)) py_Py_ExitStatusException(status); \
    } while (0)

    /* As `python -I -B -S`: nothing that lies around on the machine counts, no PYTHON... variable either. */
    PyPreConfig before;
    py_PyPreConfig_InitPythonConfig(&before);
    before.isolated = 1;
    before.use_environment = 0;
    CHECKED(py_Py_PreInitialize(&before));

    PyConfig config;
    py_PyConfig_InitPythonConfig(&config);
    config.isolated = 1;
    config.use_environment = 0;
    config.user_site_directory = 0;
    config.site_import = 0;
    config.write_bytecode = 0;
    config.parse_argv = 0;
    config.pathconfig_warnings = 0;
    CHECKED(py_PyConfig_SetBytesArgv(&config, argc, argv));
    CHECKED(py_PyConfig_SetString(&config, &config.executable, py_Py_DecodeLocale(THIS_FILE, NULL)));
    CHECKED(py_PyConfig_SetString(&config, &config.run_command, py_Py_DecodeLocale(run_command, NULL)));
    config.module_search_paths_set = 1;
    CHECKED(py_PyWideStringList_Append(&config.module_search_paths, py_Py_DecodeLocale(THIS_FILE, NULL)));
    CHECKED(py_Py_InitializeFromConfig(&config));
    if (py_PyRun_SimpleStringFlags(install, NULL)) return 1;
    return py_Py_RunMain();
}

int main(int argc, char **argv) {
    void *last = NULL;
    for (size_t i = 0; i < sizeof libraries / sizeof *libraries; i++) last = load(&libraries[i]);
    return run(last, argc, argv);
}
