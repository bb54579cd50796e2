/* Stands between a process and the operating system: counts what it does to the files below a folder, ends it at a chosen operation,
 * refuses operations from there on, or writes a journal of them. Preloaded (LD_PRELOAD); asleep until door_set is called.
 *
 * An operation is what changes a file or a directory: an opening that makes or empties a file, a run of writes to one file (its first
 * write counts), rename, link, unlink, mkdir, rmdir, truncate, fsync. Whoever asks: Python, torch's C++, safetensors' Rust, Arrow.
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
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

enum { COUNT, KILL, REFUSE, REFUSE_ALL, JOURNAL };

static char root[PATH_MAX];
static int mode, reason, journal = -1, awake;
static long at, count;
static char writing[PATH_MAX]; /* the file of the run of writes that goes on */
static pthread_mutex_t one = PTHREAD_MUTEX_INITIALIZER;

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

void door_set(const char *folder, int what, long when, int error, const char *file) {
  pthread_mutex_lock(&one);
  snprintf(root, sizeof root, "%s/", folder);
  mode = what, at = when, reason = error, count = 0, writing[0] = 0;
  if (what == JOURNAL) journal = REAL(open)(file, O_WRONLY | O_CREAT | O_TRUNC | O_APPEND | O_CLOEXEC, 0600);
  awake = 1;
  pthread_mutex_unlock(&one);
}
long door_count(void) { return count; }

/* The absolute path of what is named; 0 where it does not lie below the folder, or is a display. */
static int below(int directory, const char *name, char *path) {
  char link[64], base[PATH_MAX] = "";
  if (!awake || !name) return 0;
  if (name[0] != '/') {
    if (directory == AT_FDCWD) { if (!getcwd(base, sizeof base)) return 0; }
    else {
      snprintf(link, sizeof link, "/proc/self/fd/%d", directory);
      ssize_t n = readlink(link, base, sizeof base - 1);
      if (n < 0) return 0;
      base[n] = 0;
    }
    snprintf(path, PATH_MAX, "%.2000s/%.2000s", base, name);
  } else snprintf(path, PATH_MAX, "%s", name);
  return !strncmp(path, root, strlen(root)) && !strstr(path, "/tensorboard/");
}
static int opened(int handle, char *path) {
  char link[64];
  if (!awake) return 0;
  snprintf(link, sizeof link, "/proc/self/fd/%d", handle);
  ssize_t n = readlink(link, path, PATH_MAX - 1);
  if (n < 0) return 0;
  path[n] = 0;
  return !strncmp(path, root, strlen(root)) && !strstr(path, "/tensorboard/");
}
static void note(char kind, const char *path, const char *other, int64_t offset, const void *data, int64_t length) {
  if (mode != JOURNAL) return;
  char head[PATH_MAX * 2 + 64];
  int n = snprintf(head, sizeof head, "%c\t%s\t%s\t%lld\t%lld\n", kind, path, other ? other : "", (long long)offset, (long long)length);
  if (REAL(write)(journal, head, n) != n || (length && REAL(write)(journal, data, length) != length)) abort();
}
/* Before an operation: 1 where it is to be refused. `grows`: it needs room on the disk. */
static int counted(const char *path, int grows, int is_write) {
  int refused = 0;
  if (is_write && !strcmp(path, writing) && !(mode >= REFUSE && mode <= REFUSE_ALL)) return 0;
  if (!is_write || strcmp(path, writing)) count++;
  if (is_write) strcpy(writing, path); else writing[0] = 0;
  if (mode == KILL && count == at && !is_write) kill(getpid(), SIGKILL);
  if (mode == REFUSE) refused = grows && count >= at;
  if (mode == REFUSE_ALL) refused = count >= at;
  if (refused) errno = reason;
  return refused;
}
#define ENTER pthread_mutex_lock(&one)
#define LEAVE pthread_mutex_unlock(&one)

static int makes(int flags) { return (flags & (O_CREAT | O_TRUNC)) && !((flags & O_TMPFILE) == O_TMPFILE); }
static int open_any(int directory, const char *name, int flags, mode_t rights) {
  char path[PATH_MAX];
  int at_work = makes(flags) && below(directory, name, path), refused = 0;
  if (at_work) {
    ENTER;
    struct stat there;
    int is_new = stat(path, &there) != 0;
    if (!is_new && !(flags & O_TRUNC)) at_work = 0; /* a lock that is there already */
    else refused = counted(path, 1, 0);
    if (at_work && !refused) note(is_new ? 'c' : 't', path, 0, 0, 0, 0);
    LEAVE;
  }
  return refused ? -1 : REAL(openat)(directory, name, flags, rights);
}
#define RIGHTS mode_t rights = 0; if (flags & (O_CREAT | O_TMPFILE)) { va_list rest; va_start(rest, flags); rights = va_arg(rest, mode_t); va_end(rest); }
int open(const char *name, int flags, ...) { RIGHTS return open_any(AT_FDCWD, name, flags, rights); }
int open64(const char *name, int flags, ...) { RIGHTS return open_any(AT_FDCWD, name, flags | O_LARGEFILE, rights); }
int openat(int directory, const char *name, int flags, ...) { RIGHTS return open_any(directory, name, flags, rights); }
int openat64(int directory, const char *name, int flags, ...) { RIGHTS return open_any(directory, name, flags | O_LARGEFILE, rights); }
int creat(const char *name, mode_t rights) { return open_any(AT_FDCWD, name, O_WRONLY | O_CREAT | O_TRUNC, rights); }

/* Only what is opened for writing: C++ opens through here. */
static FILE *stream(const char *name, const char *how, FILE *(*real)(const char *, const char *)) {
  char path[PATH_MAX];
  int refused = 0;
  if (how[0] == 'w' && below(AT_FDCWD, name, path)) {
    ENTER;
    struct stat there;
    int is_new = stat(path, &there) != 0;
    refused = counted(path, 1, 0);
    if (!refused) note(is_new ? 'c' : 't', path, 0, 0, 0, 0);
    LEAVE;
  }
  return refused ? NULL : real(name, how);
}
FILE *fopen(const char *name, const char *how) { return stream(name, how, REAL(fopen)); }
FILE *fopen64(const char *name, const char *how) { return stream(name, how, REAL(fopen64)); }

/* A write that is killed leaves its first half behind. */
static ssize_t write_any(int handle, const void *data, size_t size, off_t offset, int placed) {
  char path[PATH_MAX];
  if (!opened(handle, path))
    return placed ? REAL(pwrite)(handle, data, size, offset) : REAL(write)(handle, data, size);
  ENTER;
  int begins = strcmp(path, writing) != 0, refused = counted(path, 1, 1);
  if (mode == KILL && begins && count == at) {
    if (placed) (void)!REAL(pwrite)(handle, data, size / 2, offset); else (void)!REAL(write)(handle, data, size / 2);
    kill(getpid(), SIGKILL);
  }
  ssize_t n = -1;
  if (!refused) {
    struct stat there;
    if (!placed) offset = fcntl(handle, F_GETFL) & O_APPEND && !fstat(handle, &there) ? there.st_size : lseek(handle, 0, SEEK_CUR);
    n = placed ? REAL(pwrite)(handle, data, size, offset) : REAL(write)(handle, data, size);
    if (n > 0) note('w', path, 0, offset, data, n);
  }
  LEAVE;
  return n;
}
ssize_t write(int handle, const void *data, size_t size) { return write_any(handle, data, size, 0, 0); }
ssize_t pwrite(int handle, const void *data, size_t size, off_t offset) { return write_any(handle, data, size, offset, 1); }
ssize_t pwrite64(int handle, const void *data, size_t size, off64_t offset) { return write_any(handle, data, size, offset, 1); }
ssize_t writev(int handle, const struct iovec *pieces, int n) {
  char path[PATH_MAX];
  if (!opened(handle, path)) return REAL(writev)(handle, pieces, n);
  ssize_t total = 0;
  for (int i = 0; i < n; i++) {
    ssize_t done = write_any(handle, pieces[i].iov_base, pieces[i].iov_len, 0, 0);
    if (done < 0) return total ? total : -1;
    total += done;
    if ((size_t)done < pieces[i].iov_len) break;
  }
  return total;
}
/* Copies inside the kernel: whoever asks for one is sent to read and write. */
ssize_t sendfile(int out, int in, off_t *offset, size_t n) {
  char path[PATH_MAX];
  if (opened(out, path)) { errno = ENOSYS; return -1; }
  return REAL(sendfile)(out, in, offset, n);
}
ssize_t sendfile64(int out, int in, off64_t *offset, size_t n) { return sendfile(out, in, offset, n); }
ssize_t copy_file_range(int in, off64_t *from, int out, off64_t *to, size_t n, unsigned flags) {
  char path[PATH_MAX];
  if (opened(out, path)) { errno = ENOSYS; return -1; }
  return REAL(copy_file_range)(in, from, out, to, n, flags);
}

#define NAMED(result_of, kind, directory, name, grows) \
  char path[PATH_MAX]; \
  if (!below(directory, name, path)) return result_of; \
  ENTER; \
  int result = counted(path, grows, 0) ? -1 : result_of; \
  if (!result) note(kind, path, 0, 0, 0, 0); \
  LEAVE; \
  return result;
int unlink(const char *name) { NAMED(REAL(unlink)(name), 'u', AT_FDCWD, name, 0) }
int unlinkat(int directory, const char *name, int flags) { NAMED(REAL(unlinkat)(directory, name, flags), flags & AT_REMOVEDIR ? 'd' : 'u', directory, name, 0) }
int rmdir(const char *name) { NAMED(REAL(rmdir)(name), 'd', AT_FDCWD, name, 0) }
int mkdir(const char *name, mode_t rights) { NAMED(REAL(mkdir)(name, rights), 'm', AT_FDCWD, name, 1) }
int mkdirat(int directory, const char *name, mode_t rights) { NAMED(REAL(mkdirat)(directory, name, rights), 'm', directory, name, 1) }

#define PAIR(result_of, kind, first, from, second, to) \
  char path[PATH_MAX], other[PATH_MAX]; \
  if (!below(second, to, other)) return result_of; \
  if (!below(first, from, path)) abort(); \
  ENTER; \
  int result = counted(other, 0, 0) ? -1 : result_of; \
  if (!result) note(kind, path, other, 0, 0, 0); \
  LEAVE; \
  return result;
int rename(const char *from, const char *to) { PAIR(REAL(rename)(from, to), 'r', AT_FDCWD, from, AT_FDCWD, to) }
int renameat(int first, const char *from, int second, const char *to) { PAIR(REAL(renameat)(first, from, second, to), 'r', first, from, second, to) }
int renameat2(int first, const char *from, int second, const char *to, unsigned flags) { PAIR(REAL(renameat2)(first, from, second, to, flags), 'r', first, from, second, to) }
int link(const char *from, const char *to) { PAIR(REAL(link)(from, to), 'l', AT_FDCWD, from, AT_FDCWD, to) }
int linkat(int first, const char *from, int second, const char *to, int flags) { PAIR(REAL(linkat)(first, from, second, to, flags), 'l', first, from, second, to) }

#define HANDLED(result_of, kind, grows, size) \
  char path[PATH_MAX]; \
  if (!opened(handle, path)) return result_of; \
  ENTER; \
  int result = counted(path, grows, 0) ? -1 : result_of; \
  if (!result) note(kind, path, 0, size, 0, 0); \
  LEAVE; \
  return result;
int fsync(int handle) { HANDLED(REAL(fsync)(handle), 's', 0, 0) }
int fdatasync(int handle) { HANDLED(REAL(fdatasync)(handle), 's', 0, 0) }
int ftruncate(int handle, off_t size) { HANDLED(REAL(ftruncate)(handle, size), 'z', 0, size) }
int ftruncate64(int handle, off64_t size) { HANDLED(REAL(ftruncate64)(handle, size), 'z', 0, size) }
