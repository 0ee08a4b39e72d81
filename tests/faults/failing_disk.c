/* A disk that fails: calls of the C library on anything below one folder are counted, and chosen ones fail.
 *
 * Loaded with LD_PRELOAD; a process sets it up for itself by fail_below(). Reads and writes are told by where their
 * descriptor points. Without fail_below() nothing is counted and nothing fails. */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

static char folder[PATH_MAX];
static long first, last;   /* numbers of the calls that fail, from 1 */
static int number, writes; /* what they say; whether only calls that write fail */
static atomic_long calls;

void fail_below(const char *path, long from, long to, int error, int only_writes) {
    first = from, last = to, number = error, writes = only_writes;
    calls = 0;
    snprintf(folder, sizeof folder, "%s", path);
}

long calls_below(void) { return calls; }

static int is_below(int at, const char *path) {
    char place[PATH_MAX], link[64];
    if (!folder[0]) return 0;
    if (path && path[0] == '/') return !strncmp(path, folder, strlen(folder));
    snprintf(link, sizeof link, at == AT_FDCWD ? "/proc/self/cwd" : "/proc/self/fd/%d", at);
    long size = syscall(SYS_readlinkat, AT_FDCWD, link, place, sizeof place - 1);
    if (size < 0) return 0;
    place[size] = 0;
    return !strncmp(place, folder, strlen(folder));
}

/* Whether this call, which is below the folder, is one of those that fail. */
static int fails(int at, const char *path, int writing) {
    if (!is_below(at, path) || (writes && !writing)) return 0;
    long mine = atomic_fetch_add(&calls, 1) + 1;
    if (mine < first || mine > last) return 0;
    errno = number;
    return 1;
}

#define NEXT(name) static __typeof__(&name) next; if (!next) next = (__typeof__(&name))dlsym(RTLD_NEXT, #name)
#define WRAP(result, failed, writing, name, at, path, declared, passed) \
    result name declared { NEXT(name); return fails(at, path, writing) ? failed : next passed; }

WRAP(ssize_t, -1, 0, read, fd, NULL, (int fd, void *b, size_t n), (fd, b, n))
WRAP(ssize_t, -1, 0, pread, fd, NULL, (int fd, void *b, size_t n, off_t o), (fd, b, n, o))
WRAP(ssize_t, -1, 0, pread64, fd, NULL, (int fd, void *b, size_t n, off64_t o), (fd, b, n, o))
WRAP(ssize_t, -1, 0, preadv64, fd, NULL, (int fd, const struct iovec *v, int n, off64_t o), (fd, v, n, o))
WRAP(ssize_t, -1, 0, preadv64v2, fd, NULL, (int fd, const struct iovec *v, int n, off64_t o, int f), (fd, v, n, o, f))
WRAP(ssize_t, -1, 1, write, fd, NULL, (int fd, const void *b, size_t n), (fd, b, n))
WRAP(ssize_t, -1, 1, pwrite, fd, NULL, (int fd, const void *b, size_t n, off_t o), (fd, b, n, o))
WRAP(ssize_t, -1, 1, pwrite64, fd, NULL, (int fd, const void *b, size_t n, off64_t o), (fd, b, n, o))
WRAP(ssize_t, -1, 1, writev, fd, NULL, (int fd, const struct iovec *v, int n), (fd, v, n))
WRAP(ssize_t, -1, 1, sendfile, out, NULL, (int out, int in, off_t *o, size_t n), (out, in, o, n))
WRAP(ssize_t, -1, 1, sendfile64, out, NULL, (int out, int in, off64_t *o, size_t n), (out, in, o, n))
WRAP(int, -1, 1, fsync, fd, NULL, (int fd), (fd))
WRAP(int, -1, 1, ftruncate, fd, NULL, (int fd, off_t n), (fd, n))
WRAP(int, -1, 1, ftruncate64, fd, NULL, (int fd, off64_t n), (fd, n))
WRAP(int, -1, 1, rename, AT_FDCWD, a, (const char *a, const char *b), (a, b))
WRAP(int, -1, 1, renameat2, at, a, (int at, const char *a, int bt, const char *b, unsigned f), (at, a, bt, b, f))
WRAP(int, -1, 1, mkdir, AT_FDCWD, path, (const char *path, mode_t m), (path, m))
WRAP(int, -1, 1, rmdir, AT_FDCWD, path, (const char *path), (path))
WRAP(int, -1, 1, unlink, AT_FDCWD, path, (const char *path), (path))
WRAP(int, -1, 1, unlinkat, at, path, (int at, const char *path, int f), (at, path, f))
WRAP(int, -1, 1, link, AT_FDCWD, b, (const char *a, const char *b), (a, b))
WRAP(int, -1, 0, stat, AT_FDCWD, path, (const char *restrict path, struct stat *restrict s), (path, s))
WRAP(int, -1, 0, lstat, AT_FDCWD, path, (const char *restrict path, struct stat *restrict s), (path, s))
WRAP(int, -1, 0, fstatat, at, path, (int at, const char *restrict path, struct stat *restrict s, int f), (at, path, s, f))
WRAP(int, -1, 0, stat64, AT_FDCWD, path, (const char *restrict path, struct stat64 *restrict s), (path, s))
WRAP(int, -1, 0, lstat64, AT_FDCWD, path, (const char *restrict path, struct stat64 *restrict s), (path, s))
WRAP(int, -1, 0, fstatat64, at, path, (int at, const char *restrict path, struct stat64 *restrict s, int f), (at, path, s, f))
WRAP(DIR *, NULL, 0, opendir, AT_FDCWD, path, (const char *path), (path))

#define WRAP_OPEN(name, at, declared, passed) \
    int name declared { \
        NEXT(name); \
        va_list more; \
        va_start(more, flags); \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(more, mode_t) : 0; \
        va_end(more); \
        return fails(at, path, flags & (O_CREAT | O_TRUNC)) ? -1 : next passed; \
    }

WRAP_OPEN(open, AT_FDCWD, (const char *path, int flags, ...), (path, flags, mode))
WRAP_OPEN(open64, AT_FDCWD, (const char *path, int flags, ...), (path, flags, mode))
WRAP_OPEN(openat, at, (int at, const char *path, int flags, ...), (at, path, flags, mode))
WRAP_OPEN(openat64, at, (int at, const char *path, int flags, ...), (at, path, flags, mode))
