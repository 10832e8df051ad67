/* Counts the calls that write below one folder, and kills, stops or fails at the n-th of them.
 *
 * Loaded by LD_PRELOAD into a command and all its children, which share one counter: a mapped file, whose layout stands
 * in interpose.py too. Without a control file (KOINE_FAULTS_CONTROL, or faults_attach) every call passes through.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#undef fwrite
#undef open
#undef openat

enum { OPEN = 1, WRITE = 2, RENAME = 4, LINK = 8, UNLINK = 16, MKDIR = 32, FSYNC = 64, TRUNCATE = 128, MAP = 256 };
#define PROCESSES 128

struct control {
    int64_t count;      /* calls so far */
    int64_t kill_at;    /* all processes are killed before this call; 0: never */
    int64_t torn;       /* 1: a write is half done first */
    int64_t fail_at;    /* this call fails; 0: none */
    int64_t fail_errno;
    int64_t fail_later; /* kinds of later calls that fail too */
    int64_t stop_at;    /* the process waits before this call until `go_on` is 1; 0: never */
    int64_t stopped;    /* id of the process that waits */
    int64_t go_on;
    int64_t reached;    /* 1: the call was met */
    int64_t processes[PROCESSES];
    char root[PATH_MAX]; /* with a slash at its end */
    char log[PATH_MAX];  /* "count kind path" for every call; empty: none */
};

static struct control *control;

static void enter(void) {
    if (!control) return;
    int64_t own = getpid();
    for (int i = 0; i < PROCESSES; i++) {
        int64_t nobody = 0;
        if (__atomic_compare_exchange_n(&control->processes[i], &nobody, own, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) return;
    }
}

static void leave(void) {
    if (!control) return;
    for (int i = 0; i < PROCESSES; i++) {
        int64_t own = getpid();
        __atomic_compare_exchange_n(&control->processes[i], &own, 0, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
    }
}

int faults_attach(const char *path) {
    int file = syscall(SYS_openat, AT_FDCWD, path, O_RDWR | O_CLOEXEC);
    if (file < 0) return errno;
    void *mapped = (void *)syscall(SYS_mmap, NULL, sizeof(struct control), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    syscall(SYS_close, file);
    if (mapped == MAP_FAILED) return errno;
    control = mapped;
    pthread_atfork(NULL, NULL, enter);
    enter();
    return 0;
}

__attribute__((constructor)) static void begin(void) {
    const char *path = getenv("KOINE_FAULTS_CONTROL");
    if (path && *path) faults_attach(path);
}

__attribute__((destructor)) static void end(void) { leave(); }

static int below(const char *path) { return strncmp(path, control->root, strlen(control->root)) == 0; }

/* Absolute name of a file; 0 where it cannot be told. */
static int name_at(int folder, const char *path, char *into) {
    size_t used = 0;
    if (!path) return 0;
    if (path[0] != '/') {
        char own[64];
        if (folder == AT_FDCWD) strcpy(own, "/proc/self/cwd");
        else snprintf(own, sizeof own, "/proc/self/fd/%d", folder);
        ssize_t got = syscall(SYS_readlinkat, AT_FDCWD, own, into, PATH_MAX - 2);
        if (got <= 0) return 0;
        used = got;
        into[used++] = '/';
    }
    while (path[0] == '.' && path[1] == '/') path += 2;
    if (used + strlen(path) + 1 > PATH_MAX) return 0;
    strcpy(into + used, path);
    return 1;
}

static int name_of(int file, char *into) {
    char own[64];
    snprintf(own, sizeof own, "/proc/self/fd/%d", file);
    ssize_t got = syscall(SYS_readlinkat, AT_FDCWD, own, into, PATH_MAX - 1);
    if (got <= 0 || into[0] != '/') return 0;
    into[got] = 0;
    return 1;
}

static const char *word(int kind) {
    switch (kind) {
    case OPEN: return "open";
    case WRITE: return "write";
    case RENAME: return "rename";
    case LINK: return "link";
    case UNLINK: return "unlink";
    case MKDIR: return "mkdir";
    case FSYNC: return "fsync";
    case TRUNCATE: return "truncate";
    default: return "map";
    }
}

static void die(void) {
    int64_t own = getpid();
    for (int i = 0; i < PROCESSES; i++) {
        int64_t other = control->processes[i];
        if (other > 1 && other != own) syscall(SYS_kill, (pid_t)other, SIGKILL);
    }
    syscall(SYS_kill, (pid_t)own, SIGKILL);
    for (;;) pause();
}

/* What is to be done about a call on `path`: 0 go on, -1 write a half and die, else the errno to fail with. */
static int met(int kind, const char *path) {
    if (!control || !below(path)) return 0;
    int64_t number = __atomic_add_fetch(&control->count, 1, __ATOMIC_SEQ_CST);
    if (control->log[0]) {
        char line[PATH_MAX + 64];
        int size = snprintf(line, sizeof line, "%lld %s %s\n", (long long)number, word(kind), path + strlen(control->root));
        int log = syscall(SYS_openat, AT_FDCWD, control->log, O_WRONLY | O_APPEND | O_CREAT, 0600);
        if (log >= 0) {
            syscall(SYS_write, log, line, size);
            syscall(SYS_close, log);
        }
    }
    if (number == control->kill_at) {
        control->reached = 1;
        if (control->torn && kind == WRITE) return -1;
        die();
    }
    if (number == control->stop_at) {
        control->reached = 1;
        __atomic_store_n(&control->stopped, getpid(), __ATOMIC_SEQ_CST);
        struct timespec moment = {0, 1000000};
        while (!__atomic_load_n(&control->go_on, __ATOMIC_SEQ_CST)) nanosleep(&moment, NULL);
    }
    if (control->fail_at && number == control->fail_at) {
        control->reached = 1;
        return control->fail_errno;
    }
    if (control->fail_at && number > control->fail_at && (control->fail_later & kind)) return control->fail_errno;
    return 0;
}

static int met_at(int kind, int folder, const char *path) {
    char name[PATH_MAX];
    if (!control || !name_at(folder, path, name)) return 0;
    return met(kind, name);
}

static int met_of(int kind, int file) {
    char name[PATH_MAX];
    if (!control || !name_of(file, name)) return 0;
    return met(kind, name);
}

#define NEXT(name) \
    static __typeof__(&name) next; \
    if (!next) next = (__typeof__(&name))dlsym(RTLD_NEXT, #name)
#define REFUSE(result) do { if (todo > 0) { errno = todo; return result; } } while (0)

#define WRITES(flags) (((flags) & O_ACCMODE) != O_RDONLY || ((flags) & (O_CREAT | O_TRUNC)))
#define MODE mode_t mode = 0; if ((flags & O_CREAT) || (flags & O_TMPFILE) == O_TMPFILE) { va_list more; va_start(more, flags); mode = va_arg(more, mode_t); va_end(more); }

int open(const char *path, int flags, ...) {
    MODE NEXT(open);
    int todo = WRITES(flags) ? met_at(OPEN, AT_FDCWD, path) : 0;
    REFUSE(-1);
    return next(path, flags, mode);
}
int open64(const char *path, int flags, ...) {
    MODE NEXT(open64);
    int todo = WRITES(flags) ? met_at(OPEN, AT_FDCWD, path) : 0;
    REFUSE(-1);
    return next(path, flags, mode);
}
int openat(int folder, const char *path, int flags, ...) {
    MODE NEXT(openat);
    int todo = WRITES(flags) ? met_at(OPEN, folder, path) : 0;
    REFUSE(-1);
    return next(folder, path, flags, mode);
}
int openat64(int folder, const char *path, int flags, ...) {
    MODE NEXT(openat64);
    int todo = WRITES(flags) ? met_at(OPEN, folder, path) : 0;
    REFUSE(-1);
    return next(folder, path, flags, mode);
}
int creat(const char *path, mode_t mode) { return open(path, O_CREAT | O_WRONLY | O_TRUNC, mode); }
int creat64(const char *path, mode_t mode) { return open64(path, O_CREAT | O_WRONLY | O_TRUNC, mode); }
#define WRITING(how) ((how)[0] != 'r' || strchr((how), '+'))
FILE *fopen(const char *path, const char *how) {
    NEXT(fopen);
    int todo = WRITING(how) ? met_at(OPEN, AT_FDCWD, path) : 0;
    REFUSE(NULL);
    return next(path, how);
}
FILE *fopen64(const char *path, const char *how) {
    NEXT(fopen64);
    int todo = WRITING(how) ? met_at(OPEN, AT_FDCWD, path) : 0;
    REFUSE(NULL);
    return next(path, how);
}

ssize_t write(int file, const void *from, size_t size) {
    NEXT(write);
    int todo = met_of(WRITE, file);
    REFUSE(-1);
    if (todo < 0) { next(file, from, size / 2); die(); }
    return next(file, from, size);
}
ssize_t pwrite(int file, const void *from, size_t size, off_t at) {
    NEXT(pwrite);
    int todo = met_of(WRITE, file);
    REFUSE(-1);
    if (todo < 0) { next(file, from, size / 2, at); die(); }
    return next(file, from, size, at);
}
ssize_t pwrite64(int file, const void *from, size_t size, off64_t at) {
    NEXT(pwrite64);
    int todo = met_of(WRITE, file);
    REFUSE(-1);
    if (todo < 0) { next(file, from, size / 2, at); die(); }
    return next(file, from, size, at);
}
ssize_t writev(int file, const struct iovec *parts, int count) {
    NEXT(writev);
    int todo = met_of(WRITE, file);
    REFUSE(-1);
    if (todo < 0) { next(file, parts, count / 2); die(); }
    return next(file, parts, count);
}
ssize_t pwritev(int file, const struct iovec *parts, int count, off_t at) {
    NEXT(pwritev);
    int todo = met_of(WRITE, file);
    REFUSE(-1);
    if (todo < 0) die();
    return next(file, parts, count, at);
}
ssize_t pwritev64(int file, const struct iovec *parts, int count, off64_t at) {
    NEXT(pwritev64);
    int todo = met_of(WRITE, file);
    REFUSE(-1);
    if (todo < 0) die();
    return next(file, parts, count, at);
}
ssize_t pwritev2(int file, const struct iovec *parts, int count, off_t at, int flags) {
    NEXT(pwritev2);
    int todo = met_of(WRITE, file);
    REFUSE(-1);
    if (todo < 0) die();
    return next(file, parts, count, at, flags);
}
size_t fwrite(const void *from, size_t size, size_t count, FILE *stream) {
    NEXT(fwrite);
    int todo = met_of(WRITE, fileno(stream));
    REFUSE(0);
    if (todo < 0) { next(from, size, count / 2, stream); fflush(stream); die(); }
    return next(from, size, count, stream);
}
ssize_t sendfile(int to, int from, off_t *at, size_t size) {
    static ssize_t (*next)(int, int, off_t *, size_t);
    if (!next) next = dlsym(RTLD_NEXT, "sendfile");
    int todo = met_of(WRITE, to);
    REFUSE(-1);
    if (todo < 0) die();
    return next(to, from, at, size);
}
ssize_t sendfile64(int to, int from, off64_t *at, size_t size) {
    static ssize_t (*next)(int, int, off64_t *, size_t);
    if (!next) next = dlsym(RTLD_NEXT, "sendfile64");
    int todo = met_of(WRITE, to);
    REFUSE(-1);
    if (todo < 0) die();
    return next(to, from, at, size);
}
ssize_t copy_file_range(int from, off64_t *there, int to, off64_t *here, size_t size, unsigned flags) {
    NEXT(copy_file_range);
    int todo = met_of(WRITE, to);
    REFUSE(-1);
    if (todo < 0) die();
    return next(from, there, to, here, size, flags);
}

int rename(const char *from, const char *to) {
    NEXT(rename);
    int todo = met_at(RENAME, AT_FDCWD, to);
    REFUSE(-1);
    return next(from, to);
}
int renameat(int folder, const char *from, int other, const char *to) {
    NEXT(renameat);
    int todo = met_at(RENAME, other, to);
    REFUSE(-1);
    return next(folder, from, other, to);
}
int renameat2(int folder, const char *from, int other, const char *to, unsigned flags) {
    NEXT(renameat2);
    int todo = met_at(RENAME, other, to);
    REFUSE(-1);
    return next(folder, from, other, to, flags);
}
int link(const char *from, const char *to) {
    NEXT(link);
    int todo = met_at(LINK, AT_FDCWD, to);
    REFUSE(-1);
    return next(from, to);
}
int linkat(int folder, const char *from, int other, const char *to, int flags) {
    NEXT(linkat);
    int todo = met_at(LINK, other, to);
    REFUSE(-1);
    return next(folder, from, other, to, flags);
}
int symlink(const char *from, const char *to) {
    NEXT(symlink);
    int todo = met_at(LINK, AT_FDCWD, to);
    REFUSE(-1);
    return next(from, to);
}
int symlinkat(const char *from, int other, const char *to) {
    NEXT(symlinkat);
    int todo = met_at(LINK, other, to);
    REFUSE(-1);
    return next(from, other, to);
}
int unlink(const char *path) {
    NEXT(unlink);
    int todo = met_at(UNLINK, AT_FDCWD, path);
    REFUSE(-1);
    return next(path);
}
int unlinkat(int folder, const char *path, int flags) {
    NEXT(unlinkat);
    int todo = met_at(UNLINK, folder, path);
    REFUSE(-1);
    return next(folder, path, flags);
}
int rmdir(const char *path) {
    NEXT(rmdir);
    int todo = met_at(UNLINK, AT_FDCWD, path);
    REFUSE(-1);
    return next(path);
}
int remove(const char *path) {
    NEXT(remove);
    int todo = met_at(UNLINK, AT_FDCWD, path);
    REFUSE(-1);
    return next(path);
}
int mkdir(const char *path, mode_t mode) {
    NEXT(mkdir);
    int todo = met_at(MKDIR, AT_FDCWD, path);
    REFUSE(-1);
    return next(path, mode);
}
int mkdirat(int folder, const char *path, mode_t mode) {
    NEXT(mkdirat);
    int todo = met_at(MKDIR, folder, path);
    REFUSE(-1);
    return next(folder, path, mode);
}
int fsync(int file) {
    NEXT(fsync);
    int todo = met_of(FSYNC, file);
    REFUSE(-1);
    /* A kill is no power cut: what was written stays, and the lab is faster without waiting for the disk. */
    return control ? 0 : next(file);
}
int fdatasync(int file) {
    NEXT(fdatasync);
    int todo = met_of(FSYNC, file);
    REFUSE(-1);
    return control ? 0 : next(file);
}
int ftruncate(int file, off_t size) {
    NEXT(ftruncate);
    int todo = met_of(TRUNCATE, file);
    REFUSE(-1);
    return next(file, size);
}
int ftruncate64(int file, off64_t size) {
    NEXT(ftruncate64);
    int todo = met_of(TRUNCATE, file);
    REFUSE(-1);
    return next(file, size);
}
int truncate(const char *path, off_t size) {
    NEXT(truncate);
    int todo = met_at(TRUNCATE, AT_FDCWD, path);
    REFUSE(-1);
    return next(path, size);
}
int truncate64(const char *path, off64_t size) {
    NEXT(truncate64);
    int todo = met_at(TRUNCATE, AT_FDCWD, path);
    REFUSE(-1);
    return next(path, size);
}
int fallocate(int file, int mode, off_t at, off_t size) {
    NEXT(fallocate);
    int todo = met_of(TRUNCATE, file);
    REFUSE(-1);
    return next(file, mode, at, size);
}
int fallocate64(int file, int mode, off64_t at, off64_t size) {
    NEXT(fallocate64);
    int todo = met_of(TRUNCATE, file);
    REFUSE(-1);
    return next(file, mode, at, size);
}
int posix_fallocate(int file, off_t at, off_t size) {
    NEXT(posix_fallocate);
    int todo = met_of(TRUNCATE, file);
    if (todo > 0) return todo;
    return next(file, at, size);
}
int posix_fallocate64(int file, off64_t at, off64_t size) {
    NEXT(posix_fallocate64);
    int todo = met_of(TRUNCATE, file);
    if (todo > 0) return todo;
    return next(file, at, size);
}
void *mmap(void *where, size_t size, int protection, int flags, int file, off_t at) {
    if (control && file >= 0 && (flags & MAP_SHARED) && (protection & PROT_WRITE)) {
        int todo = met_of(MAP, file);
        REFUSE(MAP_FAILED);
    }
    return (void *)syscall(SYS_mmap, where, size, protection, flags, file, at);
}
void *mmap64(void *where, size_t size, int protection, int flags, int file, off64_t at) {
    return mmap(where, size, protection, flags, file, at);
}
int msync(void *where, size_t size, int flags) {
    NEXT(msync);
    /* Which file lies there is not asked: it counts where anything counts. */
    int todo = control ? met(MAP, control->root) : 0;
    REFUSE(-1);
    return next(where, size, flags);
}
