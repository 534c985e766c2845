/* Preloaded into a command: numbers the calls that change files below one directory, over all processes
 * of the run, and disturbs the one that the control page names, or records them all.
 *
 * The control page is a file that the driver (shim.py) maps too; INTERRUPTIONS_CONTROL names it.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

/* What happens at the call of number `target`; FULL goes on from there. */
enum { NONE, FAIL, FULL, SHORT, KILL_BEFORE, KILL_AFTER, SIGNAL };
/* What a call may do: take space, or less than it was asked for. */
enum { SPACE = 1, PARTLY = 2 };

/* shim.py declares the same fields. */
struct control {
    int64_t armed;
    int64_t recording;
    int64_t fault;
    int64_t detail; /* FAIL: the error; SIGNAL: the signal */
    int64_t target;
    int64_t calls;
    int64_t first_process;
    int64_t lock;
    char below[PATH_MAX];
    char log[PATH_MAX];
    char contents[PATH_MAX]; /* what files held when they were synced, one after the other */
    char struck[PATH_MAX + 64];
};

static struct control *control;

struct call {
    const char *name;
    int flags;
    int descriptor; /* or -1 */
    int open_flags;
    int hit;
    int64_t number;
    char path[PATH_MAX];
    char from[PATH_MAX];
};

#define REAL(name)                                                \
    ({                                                            \
        static __typeof__(&name) found;                           \
        if (!found)                                               \
            found = (__typeof__(&name))dlsym(RTLD_NEXT, #name);   \
        found;                                                    \
    })

__attribute__((constructor)) static void map_control(void)
{
    const char *path = getenv("INTERRUPTIONS_CONTROL");
    int descriptor = path ? syscall(SYS_openat, AT_FDCWD, path, O_RDWR | O_CLOEXEC) : -1;
    if (descriptor < 0)
        return;
    void *page = mmap(NULL, sizeof *control, PROT_READ | PROT_WRITE, MAP_SHARED, descriptor, 0);
    if (page != MAP_FAILED)
        control = page;
    close(descriptor);
}

/* The absolute path of an open file, or of a directory. */
static int path_of(int descriptor, char *path)
{
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t length = readlink(link, path, PATH_MAX - 1);
    path[length < 0 ? 0 : length] = 0;
    return length > 0;
}

static int absolute(int directory, const char *path, char *result)
{
    if (path[0] == '/')
        return snprintf(result, PATH_MAX, "%s", path) < PATH_MAX;
    if (directory == AT_FDCWD ? !getcwd(result, PATH_MAX) : !path_of(directory, result))
        return 0;
    size_t length = strlen(result);
    return snprintf(result + length, PATH_MAX - length, "/%s", path) < (int)(PATH_MAX - length);
}

static int is_below(const char *path)
{
    size_t length = strlen(control->below);
    return !strncmp(path, control->below, length) && (path[length] == '/' || !path[length]);
}

/* Whether the call changes what is watched; its paths are filled in. */
static int watched(struct call *call, int directory, const char *path)
{
    int error = errno;
    int found = control && control->armed && path && absolute(directory, path, call->path) &&
                is_below(call->path);
    call->descriptor = -1;
    errno = error;
    return found;
}

static int watched_open(struct call *call, int descriptor)
{
    int error = errno;
    int found = control && control->armed && path_of(descriptor, call->path) &&
                is_below(call->path);
    call->descriptor = descriptor;
    errno = error;
    return found;
}

static int watched_move(struct call *call, int old_directory, const char *old, int directory,
                        const char *path)
{
    return watched(call, directory, path) && absolute(old_directory, old, call->from);
}

/* Processes that lead groups of their own are killed with the first one. */
static void end_run(void)
{
    kill(-control->first_process, SIGKILL);
    kill(0, SIGKILL);
    for (;;)
        pause();
}

/* Number the call; true when it must fail, errno says how. */
static int begin(struct call *call)
{
    if (control->recording)
        while (__atomic_exchange_n(&control->lock, 1, __ATOMIC_ACQUIRE))
            sched_yield();
    call->number = __atomic_add_fetch(&control->calls, 1, __ATOMIC_SEQ_CST);
    int here = call->number == control->target;
    int beyond = control->fault == FULL && call->number > control->target;
    call->hit = here || (beyond && (call->flags & SPACE));
    if (!call->hit || control->fault == NONE)
        return 0;
    if (here)
        snprintf(control->struck, sizeof control->struck, "%s %s", call->name, call->path);
    switch (control->fault) {
    case FAIL:
        errno = control->detail;
        return 1;
    case FULL:
        errno = ENOSPC;
        return call->flags & SPACE;
    case KILL_BEFORE:
        end_run();
        return 1;
    case SIGNAL:
        kill(control->first_process, control->detail);
        return 0;
    }
    return 0;
}

static void append(const char *path, const void *data, size_t size)
{
    int file = syscall(SYS_openat, AT_FDCWD, path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
    while (size) {
        ssize_t count = syscall(SYS_write, file, data, size);
        if (count <= 0)
            abort();
        data = (const char *)data + count;
        size -= count;
    }
    close(file);
}

static void keep_contents(int descriptor)
{
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    int file = syscall(SYS_openat, AT_FDCWD, link, O_RDONLY | O_CLOEXEC);
    char buffer[1 << 16];
    ssize_t count;
    while ((count = read(file, buffer, sizeof buffer)) > 0)
        append(control->contents, buffer, count);
    close(file);
}

/* One line: number, name, size and time and mode afterwards, flags of open, path, other path. */
static void record(struct call *call)
{
    struct stat found = {0};
    if (call->descriptor >= 0)
        fstat(call->descriptor, &found);
    else
        lstat(call->path, &found);
    int64_t modified = found.st_mtim.tv_sec * 1000000000LL + found.st_mtim.tv_nsec;
    char line[3 * PATH_MAX];
    int length = snprintf(line, sizeof line, "%ld\t%s\t%ld\t%ld\t%d\t%d\t%s\t%s\n",
                          (long)call->number, call->name, (long)found.st_size, (long)modified,
                          (int)found.st_mode, call->open_flags, call->path, call->from);
    append(control->log, line, length);
    if (!strcmp(call->name, "fsync") && S_ISREG(found.st_mode))
        keep_contents(call->descriptor);
}

static ssize_t end(struct call *call, ssize_t result)
{
    int error = errno;
    if (control->recording) {
        if (result >= 0) {
            if (!strcmp(call->name, "open"))
                call->descriptor = result;
            record(call);
        }
        __atomic_store_n(&control->lock, 0, __ATOMIC_RELEASE);
    }
    if (call->hit && control->fault == KILL_AFTER)
        end_run();
    errno = error;
    return result;
}

static size_t shortened(struct call *call, size_t count)
{
    return call->hit && control->fault == SHORT && count > 1 ? count / 2 : count;
}

/* Opening to write */

static int changes(int flags)
{
    return (flags & O_ACCMODE) != O_RDONLY || (flags & (O_CREAT | O_TRUNC));
}

#define MODE(flags)                                       \
    ({                                                    \
        mode_t mode = 0;                                  \
        if ((flags) & O_CREAT || ((flags) & O_TMPFILE) == O_TMPFILE) { \
            va_list rest;                                 \
            va_start(rest, flags);                        \
            mode = va_arg(rest, mode_t);                  \
            va_end(rest);                                 \
        }                                                 \
        mode;                                             \
    })

#define OPENED(directory, path, flags, really)                              \
    do {                                                                    \
        struct call call = {.name = "open", .flags = SPACE, .open_flags = flags}; \
        if (!changes(flags) || !watched(&call, directory, path))            \
            return really;                                                  \
        return begin(&call) ? -1 : end(&call, really);                      \
    } while (0)

int open(const char *path, int flags, ...)
{
    mode_t mode = MODE(flags);
    OPENED(AT_FDCWD, path, flags, REAL(open)(path, flags, mode));
}

int open64(const char *path, int flags, ...)
{
    mode_t mode = MODE(flags);
    OPENED(AT_FDCWD, path, flags, REAL(open64)(path, flags, mode));
}

int openat(int directory, const char *path, int flags, ...)
{
    mode_t mode = MODE(flags);
    OPENED(directory, path, flags, REAL(openat)(directory, path, flags, mode));
}

int openat64(int directory, const char *path, int flags, ...)
{
    mode_t mode = MODE(flags);
    OPENED(directory, path, flags, REAL(openat64)(directory, path, flags, mode));
}

/* What callers that were compiled with checks call. */
int __open_2(const char *path, int flags) { return open(path, flags); }
int __open64_2(const char *path, int flags) { return open64(path, flags); }
int __openat_2(int directory, const char *path, int flags) { return openat(directory, path, flags); }
int __openat64_2(int directory, const char *path, int flags)
{
    return openat64(directory, path, flags);
}

int creat(const char *path, mode_t mode) { return open(path, O_CREAT | O_WRONLY | O_TRUNC, mode); }
int creat64(const char *path, mode_t mode) { return creat(path, mode); }

#define STREAM(path, mode, really)                                             \
    do {                                                                       \
        int truncates = mode[0] == 'w' ? O_TRUNC : 0;                          \
        struct call call = {.name = "open", .flags = SPACE,                    \
                            .open_flags = O_WRONLY | O_CREAT | truncates};     \
        if ((mode[0] == 'r' && !strchr(mode, '+')) || !watched(&call, AT_FDCWD, path)) \
            return really;                                                     \
        if (begin(&call))                                                      \
            return NULL;                                                       \
        FILE *stream = really;                                                 \
        end(&call, stream ? fileno(stream) : -1);                              \
        return stream;                                                         \
    } while (0)

FILE *fopen(const char *path, const char *mode) { STREAM(path, mode, REAL(fopen)(path, mode)); }
FILE *fopen64(const char *path, const char *mode) { STREAM(path, mode, REAL(fopen64)(path, mode)); }

/* Bytes */

#define BYTES(descriptor, really, shorter)                                  \
    do {                                                                    \
        struct call call = {.name = "write", .flags = SPACE | PARTLY};      \
        if (!watched_open(&call, descriptor))                               \
            return really;                                                  \
        return begin(&call) ? -1 : end(&call, shorter);                     \
    } while (0)

ssize_t write(int file, const void *data, size_t count)
{
    BYTES(file, REAL(write)(file, data, count),
          REAL(write)(file, data, shortened(&call, count)));
}

ssize_t pwrite(int file, const void *data, size_t count, off_t at)
{
    BYTES(file, REAL(pwrite)(file, data, count, at),
          REAL(pwrite)(file, data, shortened(&call, count), at));
}

ssize_t pwrite64(int file, const void *data, size_t count, off64_t at)
{
    BYTES(file, REAL(pwrite64)(file, data, count, at),
          REAL(pwrite64)(file, data, shortened(&call, count), at));
}

ssize_t writev(int file, const struct iovec *parts, int count)
{
    BYTES(file, REAL(writev)(file, parts, count),
          call.hit && control->fault == SHORT
              ? REAL(write)(file, parts[0].iov_base, shortened(&call, parts[0].iov_len))
              : REAL(writev)(file, parts, count));
}

ssize_t pwritev(int file, const struct iovec *parts, int count, off_t at)
{
    BYTES(file, REAL(pwritev)(file, parts, count, at),
          call.hit && control->fault == SHORT
              ? REAL(pwrite)(file, parts[0].iov_base, shortened(&call, parts[0].iov_len), at)
              : REAL(pwritev)(file, parts, count, at));
}

ssize_t sendfile(int file, int source, off_t *from, size_t count)
{
    BYTES(file, REAL(sendfile)(file, source, from, count),
          REAL(sendfile)(file, source, from, shortened(&call, count)));
}

ssize_t sendfile64(int file, int source, off64_t *from, size_t count)
{
    BYTES(file, REAL(sendfile64)(file, source, from, count),
          REAL(sendfile64)(file, source, from, shortened(&call, count)));
}

ssize_t copy_file_range(int source, off64_t *from, int file, off64_t *at, size_t count,
                        unsigned flags)
{
    BYTES(file, REAL(copy_file_range)(source, from, file, at, count, flags),
          REAL(copy_file_range)(source, from, file, at, shortened(&call, count), flags));
}

#define ON_OPEN(kind, flag, descriptor, really)                        \
    do {                                                               \
        struct call call = {.name = kind, .flags = flag};              \
        if (!watched_open(&call, descriptor))                          \
            return really;                                             \
        return begin(&call) ? -1 : end(&call, really);                 \
    } while (0)

int ftruncate(int file, off_t size)
{
    ON_OPEN("truncate", SPACE, file, REAL(ftruncate)(file, size));
}
int ftruncate64(int file, off64_t size)
{
    ON_OPEN("truncate", SPACE, file, REAL(ftruncate64)(file, size));
}
int fallocate(int file, int mode, off_t at, off_t size)
{
    ON_OPEN("write", SPACE, file, REAL(fallocate)(file, mode, at, size));
}
int fallocate64(int file, int mode, off64_t at, off64_t size)
{
    ON_OPEN("write", SPACE, file, REAL(fallocate64)(file, mode, at, size));
}
int fsync(int file) { ON_OPEN("fsync", SPACE, file, REAL(fsync)(file)); }
int fdatasync(int file) { ON_OPEN("fsync", SPACE, file, REAL(fdatasync)(file)); }
int fchmod(int file, mode_t mode) { ON_OPEN("attributes", 0, file, REAL(fchmod)(file, mode)); }
int futimens(int file, const struct timespec times[2])
{
    ON_OPEN("attributes", 0, file, REAL(futimens)(file, times));
}

/* Names */

#define ON_PATH(kind, flag, directory, path, really)                   \
    do {                                                               \
        struct call call = {.name = kind, .flags = flag};              \
        if (!watched(&call, directory, path))                          \
            return really;                                             \
        return begin(&call) ? -1 : end(&call, really);                 \
    } while (0)

int truncate(const char *path, off_t size)
{
    ON_PATH("truncate", SPACE, AT_FDCWD, path, REAL(truncate)(path, size));
}
int truncate64(const char *path, off64_t size)
{
    ON_PATH("truncate", SPACE, AT_FDCWD, path, REAL(truncate64)(path, size));
}
int unlink(const char *path) { ON_PATH("unlink", 0, AT_FDCWD, path, REAL(unlink)(path)); }
int unlinkat(int directory, const char *path, int flags)
{
    const char *kind = flags & AT_REMOVEDIR ? "rmdir" : "unlink";
    ON_PATH(kind, 0, directory, path, REAL(unlinkat)(directory, path, flags));
}
int remove(const char *path) { ON_PATH("unlink", 0, AT_FDCWD, path, REAL(remove)(path)); }
int rmdir(const char *path) { ON_PATH("rmdir", 0, AT_FDCWD, path, REAL(rmdir)(path)); }
int mkdir(const char *path, mode_t mode)
{
    ON_PATH("mkdir", SPACE, AT_FDCWD, path, REAL(mkdir)(path, mode));
}
int mkdirat(int directory, const char *path, mode_t mode)
{
    ON_PATH("mkdir", SPACE, directory, path, REAL(mkdirat)(directory, path, mode));
}
int chmod(const char *path, mode_t mode)
{
    ON_PATH("attributes", 0, AT_FDCWD, path, REAL(chmod)(path, mode));
}
int fchmodat(int directory, const char *path, mode_t mode, int flags)
{
    ON_PATH("attributes", 0, directory, path, REAL(fchmodat)(directory, path, mode, flags));
}
int utimensat(int directory, const char *path, const struct timespec times[2], int flags)
{
    if (!path)
        return futimens(directory, times);
    ON_PATH("attributes", 0, directory, path, REAL(utimensat)(directory, path, times, flags));
}

#define MOVED(kind, old_directory, old, directory, path, really)              \
    do {                                                                      \
        struct call call = {.name = kind, .flags = SPACE};                    \
        if (!watched_move(&call, old_directory, old, directory, path))        \
            return really;                                                    \
        return begin(&call) ? -1 : end(&call, really);                        \
    } while (0)

int rename(const char *old, const char *path)
{
    MOVED("rename", AT_FDCWD, old, AT_FDCWD, path, REAL(rename)(old, path));
}
int renameat(int old_directory, const char *old, int directory, const char *path)
{
    MOVED("rename", old_directory, old, directory, path,
          REAL(renameat)(old_directory, old, directory, path));
}
int renameat2(int old_directory, const char *old, int directory, const char *path, unsigned flags)
{
    const char *kind = flags & RENAME_EXCHANGE ? "exchange" : "rename";
    MOVED(kind, old_directory, old, directory, path,
          REAL(renameat2)(old_directory, old, directory, path, flags));
}
int link(const char *old, const char *path)
{
    MOVED("link", AT_FDCWD, old, AT_FDCWD, path, REAL(link)(old, path));
}
int linkat(int old_directory, const char *old, int directory, const char *path, int flags)
{
    MOVED("link", old_directory, old, directory, path,
          REAL(linkat)(old_directory, old, directory, path, flags));
}
int symlinkat(const char *target, int directory, const char *path)
{
    struct call call = {.name = "symlink", .flags = SPACE};
    if (!watched(&call, directory, path))
        return REAL(symlinkat)(target, directory, path);
    snprintf(call.from, PATH_MAX, "%s", target);
    return begin(&call) ? -1 : end(&call, REAL(symlinkat)(target, directory, path));
}
int symlink(const char *target, const char *path) { return symlinkat(target, AT_FDCWD, path); }
