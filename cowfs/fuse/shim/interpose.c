/*
 * Adds two requests to the table of operations that pyfuse3 hands to libfuse: fallocate and lseek, which pyfuse3 does
 * not pass on; and tells of each write where it comes from, which pyfuse3 does not either. This object is loaded, with its names visible to all, before pyfuse3 is; so pyfuse3's call of
 * fuse_session_new ends here. The table is copied, completed, and passed on to the function that was meant.
 *
 * The requests end in functions that cowfs/fuse/shim/__init__.py sets. Like all of pyfuse3's they are called by the
 * thread that runs its loop, which holds the interpreter's lock.
 */

#define _GNU_SOURCE
#define FUSE_USE_VERSION 32

#include <dlfcn.h>
#include <stddef.h>
#include <string.h>
#include <fuse3/fuse_lowlevel.h>

/*
 * Under other names in C: from libfuse 3.17 on the first is a macro, and the second has a type of its own in the header.
 */
#define NAMED(name) __asm__(name) __attribute__((visibility("default")))
#define EXPORTED __attribute__((visibility("default")))

typedef void (*fallocate_function)(fuse_req_t, fuse_ino_t, uint64_t, int, off_t, off_t);
typedef void (*lseek_function)(fuse_req_t, fuse_ino_t, uint64_t, off_t, int);

EXPORTED fallocate_function cowfs_on_fallocate;
EXPORTED lseek_function cowfs_on_lseek;
/* the session that was made last; NULL if pyfuse3 went another way */
EXPORTED struct fuse_session *cowfs_session;
/* whether the write that was passed on last comes from the kernel's cache, and not from a program that waits for it */
EXPORTED int cowfs_is_writeback;

static struct fuse_lowlevel_ops completed, original;

static void on_write(fuse_req_t req, fuse_ino_t inode, const char *data, size_t size, off_t offset,
                     struct fuse_file_info *info)
{
    cowfs_is_writeback = info->writepage;
    original.write(req, inode, data, size, offset, info);
}

static void on_write_buf(fuse_req_t req, fuse_ino_t inode, struct fuse_bufvec *data, off_t offset,
                         struct fuse_file_info *info)
{
    cowfs_is_writeback = info->writepage;
    original.write_buf(req, inode, data, offset, info);
}

static void on_fallocate(fuse_req_t req, fuse_ino_t inode, int mode, off_t offset, off_t length,
                         struct fuse_file_info *info)
{
    cowfs_on_fallocate(req, inode, info->fh, mode, offset, length);
}

static void on_lseek(fuse_req_t req, fuse_ino_t inode, off_t offset, int whence, struct fuse_file_info *info)
{
    cowfs_on_lseek(req, inode, info->fh, offset, whence);
}

/* The function of a name in the library that the caller is linked with, not in this object. */
static void *meant(const char *name, void *caller)
{
    Dl_info info;
    void *library, *found = NULL;

    if (dladdr(caller, &info) && (library = dlopen(info.dli_fname, RTLD_LAZY | RTLD_NOLOAD)) != NULL) {
        found = dlsym(library, name);
        dlclose(library);
    }
    return found;
}

/* What libfuse shall call; the table as it is, where nothing was set or it is too short. */
static const struct fuse_lowlevel_ops *complete(const struct fuse_lowlevel_ops *operations, size_t size)
{
    if (cowfs_on_fallocate == NULL || cowfs_on_lseek == NULL)
        return operations;
    if (size < offsetof(struct fuse_lowlevel_ops, lseek) + sizeof completed.lseek || size > sizeof completed)
        return operations;
    memcpy(&completed, operations, size);
    memcpy(&original, operations, size);
    if (original.write != NULL)
        completed.write = on_write;
    if (original.write_buf != NULL)
        completed.write_buf = on_write_buf;
    if (completed.fallocate == NULL)
        completed.fallocate = on_fallocate;
    if (completed.lseek == NULL)
        completed.lseek = on_lseek;
    return &completed;
}

static struct fuse_session *made(struct fuse_session *session, int is_completed)
{
    cowfs_session = is_completed ? session : NULL;
    return session;
}

struct fuse_session *session_new(struct fuse_args *, const struct fuse_lowlevel_ops *, size_t, void *)
    NAMED("fuse_session_new");
struct fuse_session *session_new_versioned(struct fuse_args *, const struct fuse_lowlevel_ops *, size_t, void *, void *)
    NAMED("fuse_session_new_versioned");

struct fuse_session *session_new(struct fuse_args *args, const struct fuse_lowlevel_ops *operations, size_t size,
                                 void *userdata)
{
    struct fuse_session *(*next)(struct fuse_args *, const struct fuse_lowlevel_ops *, size_t, void *) =
        meant("fuse_session_new", __builtin_return_address(0));
    const struct fuse_lowlevel_ops *all = complete(operations, size);

    return next == NULL ? NULL : made(next(args, all, size, userdata), all != operations);
}

/* The same, as programs call it that were built with libfuse 3.17 or later. */
struct fuse_session *session_new_versioned(struct fuse_args *args, const struct fuse_lowlevel_ops *operations,
                                           size_t size, void *version, void *userdata)
{
    struct fuse_session *(*next)(struct fuse_args *, const struct fuse_lowlevel_ops *, size_t, void *, void *) =
        meant("fuse_session_new_versioned", __builtin_return_address(0));
    const struct fuse_lowlevel_ops *all = complete(operations, size);

    return next == NULL ? NULL : made(next(args, all, size, version, userdata), all != operations);
}
