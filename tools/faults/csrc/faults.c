// A library for LD_PRELOAD that counts the calls that change files below some folders, and fails some of them.
//
// The process that runs the checks maps the file named by H1EXPORT_FAULTS as a `struct control` and writes into it;
// every process that has loaded this library, children included, shares it. A call's number is its place in the order
// of all counted calls of all these processes. Each counted call is noted as a line "NUMBER KIND PATH" in FILE.log.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
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

enum kind { OPEN = 1, WRITE = 2, TRUNCATE = 4, MKDIR = 8, RENAME = 16, LINK = 32, SYNC = 64, CLOSE = 128, MAP = 256 };
enum action { ERROR = 0, SHORT = 1, KILL = 2 };
enum { FOLDERS = 4, PATH = 1024 };

// faults/library.py writes the same layout
struct control {
  int32_t armed;
  int32_t kinds;   // which kinds are counted
  int32_t action;  // ERROR; SHORT: half of the first write and errors after it; KILL: the process ends at the call
  int32_t error;   // errno
  int64_t first;   // number of the first call that fails; the first call of all has 0
  int64_t last;    // number of the first call after it that does not fail
  _Atomic int64_t count;
  _Atomic int64_t failed;
  char folders[FOLDERS][PATH];
};

static struct control* control;
static char log_name[PATH];

#define NEXT(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

__attribute__((constructor)) static void load(void) {
  const char* name = getenv("H1EXPORT_FAULTS");
  if (name == NULL) {
    return;
  }
  int handle = (int)syscall(SYS_openat, AT_FDCWD, name, O_RDWR | O_CLOEXEC);
  if (handle < 0) {
    return;
  }
  void* at = mmap(NULL, sizeof(struct control), PROT_READ | PROT_WRITE, MAP_SHARED, handle, 0);
  syscall(SYS_close, handle);
  if (at != MAP_FAILED) {
    control = at;
    snprintf(log_name, sizeof log_name, "%s.log", name);
  }
}

static int is_watched(const char* path) {
  for (int index = 0; index < FOLDERS; ++index) {
    size_t length = strlen(control->folders[index]);
    if (length > 0 && strncmp(path, control->folders[index], length) == 0 &&
        (path[length] == '/' || path[length] == 0)) {
      return 1;
    }
  }
  return 0;
}

static void note(int64_t number, const char* kind, const char* path) {
  char line[PATH + 64];
  int length = snprintf(line, sizeof line, "%lld %s %s\n", (long long)number, kind, path);
  int handle = (int)syscall(SYS_openat, AT_FDCWD, log_name, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0600);
  if (handle >= 0) {
    syscall(SYS_write, handle, line, (size_t)length);
    syscall(SYS_close, handle);
  }
}

// Returns what becomes of a call: -1 nothing, ERROR with errno set, or SHORT.
static int fate(enum kind kind, const char* name, const char* path) {
  int kept = errno;
  if (!is_watched(path)) {
    return -1;
  }
  int64_t number = atomic_fetch_add(&control->count, 1);
  note(number, name, path);
  errno = kept;
  if (number < control->first || number >= control->last) {
    return -1;
  }
  atomic_fetch_add(&control->failed, 1);
  if (control->action == KILL) {
    kill(getpid(), SIGKILL);
  }
  if (control->action == SHORT && number == control->first && kind == WRITE) {
    return SHORT;
  }
  errno = control->error;
  return ERROR;
}

static int is_counted(enum kind kind) { return control != NULL && control->armed && (control->kinds & (int)kind) != 0; }

static const char* path_of(int handle, char* room) {
  char link[64];
  snprintf(link, sizeof link, "/proc/self/fd/%d", handle);
  ssize_t length = readlink(link, room, PATH - 1);
  room[length < 0 ? 0 : length] = 0;
  return room;
}

static const char* absolute(int folder, const char* path, char* room) {
  if (path[0] == '/') {
    return path;
  }
  char start[PATH] = "";
  if (folder == AT_FDCWD) {
    if (getcwd(start, sizeof start) == NULL) {
      start[0] = 0;
    }
  } else {
    path_of(folder, start);
  }
  if ((size_t)snprintf(room, PATH, "%s/%s", start, path) >= PATH) {
    room[0] = 0;
  }
  return room;
}

static int by_handle(enum kind kind, const char* name, int handle) {
  int kept = errno;
  char room[PATH];
  if (!is_counted(kind)) {
    return -1;
  }
  path_of(handle, room);
  errno = kept;
  return fate(kind, name, room);
}

static int by_name(enum kind kind, const char* name, int folder, const char* path) {
  char room[PATH];
  if (!is_counted(kind) || path == NULL) {
    return -1;
  }
  return fate(kind, name, absolute(folder, path, room));
}

static int opens_for_writing(int flags) {
  return (flags & O_ACCMODE) != O_RDONLY || (flags & (O_CREAT | O_TRUNC)) != 0;
}

#define MODE(flags)                                                \
  mode_t mode = 0;                                                 \
  if (((flags) & O_CREAT) || ((flags) & O_TMPFILE) == O_TMPFILE) { \
    va_list rest;                                                  \
    va_start(rest, flags);                                         \
    mode = va_arg(rest, mode_t);                                   \
    va_end(rest);                                                  \
  }

int open(const char* path, int flags, ...) {
  MODE(flags)
  if (opens_for_writing(flags) && by_name(OPEN, "open", AT_FDCWD, path) >= 0) {
    return -1;
  }
  return NEXT(open)(path, flags, mode);
}

int open64(const char* path, int flags, ...) {
  MODE(flags)
  if (opens_for_writing(flags) && by_name(OPEN, "open", AT_FDCWD, path) >= 0) {
    return -1;
  }
  return NEXT(open64)(path, flags, mode);
}

int openat(int folder, const char* path, int flags, ...) {
  MODE(flags)
  if (opens_for_writing(flags) && by_name(OPEN, "open", folder, path) >= 0) {
    return -1;
  }
  return NEXT(openat)(folder, path, flags, mode);
}

int openat64(int folder, const char* path, int flags, ...) {
  MODE(flags)
  if (opens_for_writing(flags) && by_name(OPEN, "open", folder, path) >= 0) {
    return -1;
  }
  return NEXT(openat64)(folder, path, flags, mode);
}

FILE* fopen(const char* path, const char* mode) {
  if (mode[0] != 'r' && by_name(OPEN, "open", AT_FDCWD, path) >= 0) {
    return NULL;
  }
  return NEXT(fopen)(path, mode);
}

FILE* fopen64(const char* path, const char* mode) {
  if (mode[0] != 'r' && by_name(OPEN, "open", AT_FDCWD, path) >= 0) {
    return NULL;
  }
  return NEXT(fopen64)(path, mode);
}

// A C stream writes its buffer with a call that cannot be replaced, so that its end reports the full disk.
int fclose(FILE* stream) {
  int flags = fcntl(fileno(stream), F_GETFL);
  int fails = flags >= 0 && opens_for_writing(flags) && by_handle(WRITE, "fclose", fileno(stream)) >= 0;
  int code = errno;
  int done = NEXT(fclose)(stream);
  if (fails) {
    errno = code;
    return EOF;
  }
  return done;
}

ssize_t write(int handle, const void* data, size_t size) {
  int found = by_handle(WRITE, "write", handle);
  return found == ERROR ? -1 : NEXT(write)(handle, data, found == SHORT ? (size + 1) / 2 : size);
}

ssize_t pwrite(int handle, const void* data, size_t size, off_t at) {
  int found = by_handle(WRITE, "write", handle);
  return found == ERROR ? -1 : NEXT(pwrite)(handle, data, found == SHORT ? (size + 1) / 2 : size, at);
}

ssize_t pwrite64(int handle, const void* data, size_t size, off64_t at) {
  int found = by_handle(WRITE, "write", handle);
  return found == ERROR ? -1 : NEXT(pwrite64)(handle, data, found == SHORT ? (size + 1) / 2 : size, at);
}

ssize_t writev(int handle, const struct iovec* parts, int count) {
  int found = by_handle(WRITE, "write", handle);
  return found == ERROR ? -1 : NEXT(writev)(handle, parts, found == SHORT ? 1 : count);
}

ssize_t pwritev(int handle, const struct iovec* parts, int count, off_t at) {
  int found = by_handle(WRITE, "write", handle);
  return found == ERROR ? -1 : NEXT(pwritev)(handle, parts, found == SHORT ? 1 : count, at);
}

ssize_t pwritev64(int handle, const struct iovec* parts, int count, off64_t at) {
  int found = by_handle(WRITE, "write", handle);
  return found == ERROR ? -1 : NEXT(pwritev64)(handle, parts, found == SHORT ? 1 : count, at);
}

ssize_t sendfile(int to, int from, off_t* at, size_t size) {
  int found = by_handle(WRITE, "sendfile", to);
  return found == ERROR ? -1 : NEXT(sendfile)(to, from, at, found == SHORT ? (size + 1) / 2 : size);
}

ssize_t sendfile64(int to, int from, off64_t* at, size_t size) {
  int found = by_handle(WRITE, "sendfile", to);
  return found == ERROR ? -1 : NEXT(sendfile64)(to, from, at, found == SHORT ? (size + 1) / 2 : size);
}

ssize_t copy_file_range(int from, off64_t* start, int to, off64_t* at, size_t size, unsigned flags) {
  int found = by_handle(WRITE, "copy_file_range", to);
  return found == ERROR ? -1
                        : NEXT(copy_file_range)(from, start, to, at, found == SHORT ? (size + 1) / 2 : size, flags);
}

int ftruncate(int handle, off_t size) {
  return by_handle(TRUNCATE, "truncate", handle) >= 0 ? -1 : NEXT(ftruncate)(handle, size);
}

int ftruncate64(int handle, off64_t size) {
  return by_handle(TRUNCATE, "truncate", handle) >= 0 ? -1 : NEXT(ftruncate64)(handle, size);
}

int truncate(const char* path, off_t size) {
  return by_name(TRUNCATE, "truncate", AT_FDCWD, path) >= 0 ? -1 : NEXT(truncate)(path, size);
}

int truncate64(const char* path, off64_t size) {
  return by_name(TRUNCATE, "truncate", AT_FDCWD, path) >= 0 ? -1 : NEXT(truncate64)(path, size);
}

int fallocate(int handle, int mode, off_t at, off_t size) {
  return by_handle(TRUNCATE, "fallocate", handle) >= 0 ? -1 : NEXT(fallocate)(handle, mode, at, size);
}

int fallocate64(int handle, int mode, off64_t at, off64_t size) {
  return by_handle(TRUNCATE, "fallocate", handle) >= 0 ? -1 : NEXT(fallocate64)(handle, mode, at, size);
}

int posix_fallocate(int handle, off_t at, off_t size) {
  return by_handle(TRUNCATE, "fallocate", handle) >= 0 ? errno : NEXT(posix_fallocate)(handle, at, size);
}

int posix_fallocate64(int handle, off64_t at, off64_t size) {
  return by_handle(TRUNCATE, "fallocate", handle) >= 0 ? errno : NEXT(posix_fallocate64)(handle, at, size);
}

int mkdir(const char* path, mode_t mode) {
  return by_name(MKDIR, "mkdir", AT_FDCWD, path) >= 0 ? -1 : NEXT(mkdir)(path, mode);
}

int mkdirat(int folder, const char* path, mode_t mode) {
  return by_name(MKDIR, "mkdir", folder, path) >= 0 ? -1 : NEXT(mkdirat)(folder, path, mode);
}

int rename(const char* old, const char* new) {
  return by_name(RENAME, "rename", AT_FDCWD, new) >= 0 ? -1 : NEXT(rename)(old, new);
}

int renameat(int old_folder, const char* old, int folder, const char* new) {
  return by_name(RENAME, "rename", folder, new) >= 0 ? -1 : NEXT(renameat)(old_folder, old, folder, new);
}

int renameat2(int old_folder, const char* old, int folder, const char* new, unsigned flags) {
  return by_name(RENAME, "exchange", folder, new) >= 0 ? -1 : NEXT(renameat2)(old_folder, old, folder, new, flags);
}

int link(const char* old, const char* new) {
  return by_name(LINK, "link", AT_FDCWD, new) >= 0 ? -1 : NEXT(link)(old, new);
}

int linkat(int old_folder, const char* old, int folder, const char* new, int flags) {
  return by_name(LINK, "link", folder, new) >= 0 ? -1 : NEXT(linkat)(old_folder, old, folder, new, flags);
}

int symlink(const char* old, const char* new) {
  return by_name(LINK, "link", AT_FDCWD, new) >= 0 ? -1 : NEXT(symlink)(old, new);
}

int symlinkat(const char* old, int folder, const char* new) {
  return by_name(LINK, "link", folder, new) >= 0 ? -1 : NEXT(symlinkat)(old, folder, new);
}

int fsync(int handle) { return by_handle(SYNC, "sync", handle) >= 0 ? -1 : NEXT(fsync)(handle); }

int fdatasync(int handle) { return by_handle(SYNC, "sync", handle) >= 0 ? -1 : NEXT(fdatasync)(handle); }

// Some file systems report a full disk only when a file is closed; the descriptor is gone all the same.
int close(int handle) {
  if (!is_counted(CLOSE)) {
    return NEXT(close)(handle);
  }
  int kept = errno;
  int flags = fcntl(handle, F_GETFL);
  errno = kept;
  int fails = flags >= 0 && opens_for_writing(flags) && by_handle(CLOSE, "close", handle) >= 0;
  int code = errno;
  int done = NEXT(close)(handle);
  if (fails) {
    errno = code;
    return -1;
  }
  return done;
}

// A write into mapped memory cannot report a full disk: it ends the process. Nothing may write that way.
void* mmap64(void* at, size_t size, int access, int flags, int handle, off64_t start) {
  if (handle >= 0 && (access & PROT_WRITE) && (flags & MAP_SHARED) && by_handle(MAP, "map", handle) >= 0) {
    return MAP_FAILED;
  }
  return (void*)syscall(SYS_mmap, at, size, access, flags, handle, start);
}

void* mmap(void* at, size_t size, int access, int flags, int handle, off_t start) {
  return mmap64(at, size, access, flags, handle, start);
}
