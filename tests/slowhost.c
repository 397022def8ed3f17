/*
 * A slow host for a program that this object is loaded into (LD_PRELOAD): calls for files that wait, or are held at a
 * gate until a test opens it, reads of cold data, and reads and writes that do less than they were asked for.
 *
 * What is wanted stands in a file that tests/slowhost.py makes and changes, and COWFS_SLOW_HOST names; its layout is
 * `struct host`. Without it, everything goes on as if this object were not there.
 */

#define _GNU_SOURCE

#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum { FLUSH, READ, WRITE, SPACE, COPY, KINDS };

/* One kind of calls. Shares are in 1/65536. A test writes all but `waiting`. */
struct kind {
    uint64_t inode;            /* of the only file that the gate and the delay are for; 0: all */
    uint32_t delay;            /* microseconds; calls take up to that longer */
    uint32_t declines;         /* of reads that must not wait: those that find nothing in memory */
    uint32_t shortens;         /* of reads, writes and copies: those that do only a part */
    _Atomic uint32_t holds;    /* calls that the gate is still to hold */
    _Atomic uint32_t opened;   /* changes when the gate lets those go that it holds */
    _Atomic uint32_t waiting;  /* calls that the gate holds */
};

struct host {
    uint64_t seed;
    struct kind kinds[KINDS];
};

static struct host *host;
static _Atomic uint64_t drawn;

__attribute__((constructor)) static void find_host(void)
{
    const char *name = getenv("COWFS_SLOW_HOST");
    int file = name == NULL ? -1 : open(name, O_RDWR | O_CLOEXEC);

    if (file < 0)
        return;
    host = mmap(NULL, sizeof *host, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (host == MAP_FAILED)
        host = NULL;
    close(file);
}

/* A random number: splitmix64 of the seed and of how many there were. */
static uint64_t draw(void)
{
    uint64_t number = host->seed + 0x9e3779b97f4a7c15 * (atomic_fetch_add(&drawn, 1) + 1);

    number = (number ^ number >> 30) * 0xbf58476d1ce4e5b9;
    number = (number ^ number >> 27) * 0x94d049bb133111eb;
    return number ^ number >> 31;
}

static void wait_for(uint64_t microseconds)
{
    struct timespec time = {microseconds / 1000000, microseconds % 1000000 * 1000};

    nanosleep(&time, NULL);
}

/* Whether what is wanted of a kind of calls is wanted of this file. */
static int concerns(const struct kind *kind, int file)
{
    struct stat status;

    if (fstat(file, &status) || !(S_ISREG(status.st_mode) || S_ISBLK(status.st_mode) || S_ISDIR(status.st_mode)))
        return 0;
    return kind->inode == 0 || kind->inode == status.st_ino;
}

/* Whether the gate has this call; one of those that it is to hold is used up. */
static int is_held(struct kind *kind)
{
    uint32_t left = atomic_load(&kind->holds);

    while (left)
        if (left == UINT32_MAX || atomic_compare_exchange_weak(&kind->holds, &left, left - 1))
            return 1;
    return 0;
}

/* Before a call: wait as long as is wanted. */
static void enter(int number, int file)
{
    struct kind *kind = &host->kinds[number];
    uint32_t opened = atomic_load(&kind->opened);

    if (!concerns(kind, file))
        return;
    if (is_held(kind)) {
        atomic_fetch_add(&kind->waiting, 1);
        while (atomic_load(&kind->opened) == opened)
            wait_for(500);
        atomic_fetch_sub(&kind->waiting, 1);
    }
    if (kind->delay)
        wait_for(draw() % kind->delay);
}

static int happens(uint32_t share)
{
    return share && draw() % 65536 < share;
}

/* How much of so many bytes is to be done: all, or a part. */
static size_t portion(int number, size_t length)
{
    return length > 1 && happens(host->kinds[number].shortens) ? 1 + draw() % (length - 1) : length;
}

/* The same of a vector: the first of `part` are what is to be done; returns how many. */
static int portion_of(int number, const struct iovec *whole, int count, struct iovec *part)
{
    size_t left = 0;
    int used;

    for (int index = 0; index < count; index++)
        left += whole[index].iov_len;
    left = portion(number, left);
    for (used = 0; used < count && (left || !used); used++) {
        part[used] = whole[used];
        if (part[used].iov_len > left)
            part[used].iov_len = left;
        left -= part[used].iov_len;
    }
    return used;
}

/* Whether a read that must not wait is to find nothing in memory; while a gate is closed, none finds anything. */
static int is_cold(int file, int flags)
{
    struct kind *kind = &host->kinds[READ];

    return flags & RWF_NOWAIT && concerns(kind, file) && (atomic_load(&kind->holds) || happens(kind->declines));
}

/* The function that would be called if this object were not there. */
#define NEXT(name) ((__typeof__(&name))next(#name))

static void *next(const char *name)
{
    return dlsym(RTLD_NEXT, name);
}

int fsync(int file)
{
    if (host)
        enter(FLUSH, file);
    return NEXT(fsync)(file);
}

int fdatasync(int file)
{
    if (host)
        enter(FLUSH, file);
    return NEXT(fdatasync)(file);
}

static ssize_t read_some(int file, const struct iovec *buffers, int count, off_t offset, int flags)
{
    struct iovec part[count > 0 ? count : 1];

    if (host && count > 0 && count <= 1024) {
        if (is_cold(file, flags)) {
            errno = EAGAIN;
            return -1;
        }
        if (!(flags & RWF_NOWAIT))
            enter(READ, file);
        count = portion_of(READ, buffers, count, part);
        buffers = part;
    }
    return NEXT(preadv2)(file, buffers, count, offset, flags);
}

static ssize_t write_some(int file, const struct iovec *buffers, int count, off_t offset, int flags)
{
    struct iovec part[count > 0 ? count : 1];

    if (host && count > 0 && count <= 1024) {
        enter(WRITE, file);
        count = portion_of(WRITE, buffers, count, part);
        buffers = part;
    }
    return NEXT(pwritev2)(file, buffers, count, offset, flags);
}

/* Programs call either name of each, by how they were compiled. */

ssize_t preadv2(int file, const struct iovec *buffers, int count, off_t offset, int flags)
{
    return read_some(file, buffers, count, offset, flags);
}

ssize_t preadv64v2(int file, const struct iovec *buffers, int count, off64_t offset, int flags)
{
    return read_some(file, buffers, count, offset, flags);
}

ssize_t pwritev2(int file, const struct iovec *buffers, int count, off_t offset, int flags)
{
    return write_some(file, buffers, count, offset, flags);
}

ssize_t pwritev64v2(int file, const struct iovec *buffers, int count, off64_t offset, int flags)
{
    return write_some(file, buffers, count, offset, flags);
}

ssize_t pread(int file, void *buffer, size_t length, off_t offset)
{
    struct iovec whole = {buffer, length};

    return read_some(file, &whole, 1, offset, 0);
}

ssize_t pread64(int file, void *buffer, size_t length, off64_t offset)
{
    return pread(file, buffer, length, offset);
}

ssize_t pwrite(int file, const void *buffer, size_t length, off_t offset)
{
    struct iovec whole = {(void *)buffer, length};

    return write_some(file, &whole, 1, offset, 0);
}

ssize_t pwrite64(int file, const void *buffer, size_t length, off64_t offset)
{
    return pwrite(file, buffer, length, offset);
}

int fallocate(int file, int mode, off_t offset, off_t length)
{
    if (host)
        enter(SPACE, file);
    return NEXT(fallocate)(file, mode, offset, length);
}

int fallocate64(int file, int mode, off64_t offset, off64_t length)
{
    return fallocate(file, mode, offset, length);
}

int posix_fallocate(int file, off_t offset, off_t length)
{
    if (host)
        enter(SPACE, file);
    return NEXT(posix_fallocate)(file, offset, length);
}

int posix_fallocate64(int file, off64_t offset, off64_t length)
{
    return posix_fallocate(file, offset, length);
}

int ftruncate(int file, off_t length)
{
    if (host)
        enter(SPACE, file);
    return NEXT(ftruncate)(file, length);
}

int ftruncate64(int file, off64_t length)
{
    return ftruncate(file, length);
}

ssize_t copy_file_range(int from, off64_t *from_offset, int to, off64_t *to_offset, size_t length, unsigned int flags)
{
    if (host) {
        enter(COPY, to);
        length = portion(COPY, length);
    }
    return NEXT(copy_file_range)(from, from_offset, to, to_offset, length, flags);
}
