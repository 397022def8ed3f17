/*
 * The floor of FUSE: one file, shown through libfuse with as little in between as there can be.
 *
 *     passthrough FILE DIRECTORY      shows FILE as DIRECTORY/disk, in the foreground
 *
 * Several threads, each with a descriptor of its own on /dev/fuse; a read is one pread, a write one pwrite, an fsync one
 * fdatasync. Everything else is as libfuse sets it up.
 */
#define FUSE_USE_VERSION 32
#define _GNU_SOURCE

#include <errno.h>
#include <fcntl.h>
#include <fuse_lowlevel.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { DISK = 2, MAX_READ = 1 << 20 };

static int file;
static _Thread_local char buffer[MAX_READ];

static int attributes(fuse_ino_t inode, struct stat *found)
{
	memset(found, 0, sizeof *found);
	found->st_ino = inode;
	if (inode == FUSE_ROOT_ID) {
		found->st_mode = S_IFDIR | 0700;
		found->st_nlink = 2;
		return 0;
	}
	struct stat host;
	if (fstat(file, &host))
		return -1;
	found->st_mode = S_IFREG | 0600;
	found->st_nlink = 1;
	found->st_size = host.st_size;
	found->st_blocks = host.st_blocks;
	return 0;
}

static void on_lookup(fuse_req_t request, fuse_ino_t parent, const char *name)
{
	struct fuse_entry_param entry = {.ino = DISK, .attr_timeout = 3600, .entry_timeout = 3600};
	if (parent != FUSE_ROOT_ID || strcmp(name, "disk"))
		fuse_reply_err(request, ENOENT);
	else if (attributes(DISK, &entry.attr))
		fuse_reply_err(request, errno);
	else
		fuse_reply_entry(request, &entry);
}

static void on_getattr(fuse_req_t request, fuse_ino_t inode, struct fuse_file_info *info)
{
	struct stat found;
	(void)info;
	if (attributes(inode, &found))
		fuse_reply_err(request, errno);
	else
		fuse_reply_attr(request, &found, 3600);
}

/* times and modes are nobody's concern here */
static void on_setattr(fuse_req_t request, fuse_ino_t inode, struct stat *wanted, int which, struct fuse_file_info *info)
{
	(void)wanted;
	(void)which;
	on_getattr(request, inode, info);
}

static void on_open(fuse_req_t request, fuse_ino_t inode, struct fuse_file_info *info)
{
	(void)inode;
	info->keep_cache = 1;
	fuse_reply_open(request, info);
}

static void on_read(fuse_req_t request, fuse_ino_t inode, size_t size, off_t offset, struct fuse_file_info *info)
{
	(void)inode;
	(void)info;
	ssize_t done = pread(file, buffer, size < MAX_READ ? size : MAX_READ, offset);
	if (done < 0)
		fuse_reply_err(request, errno);
	else
		fuse_reply_buf(request, buffer, done);
}

static void on_write(fuse_req_t request, fuse_ino_t inode, const char *data, size_t size, off_t offset,
		     struct fuse_file_info *info)
{
	(void)inode;
	(void)info;
	ssize_t done = pwrite(file, data, size, offset);
	if (done < 0)
		fuse_reply_err(request, errno);
	else
		fuse_reply_write(request, done);
}

static void on_fsync(fuse_req_t request, fuse_ino_t inode, int only_data, struct fuse_file_info *info)
{
	(void)inode;
	(void)only_data;
	(void)info;
	fuse_reply_err(request, fdatasync(file) ? errno : 0);
}

static const struct fuse_lowlevel_ops operations = {
	.lookup = on_lookup,
	.getattr = on_getattr,
	.setattr = on_setattr,
	.open = on_open,
	.read = on_read,
	.write = on_write,
	.fsync = on_fsync,
};

int main(int count, char **words)
{
	if (count != 3) {
		fprintf(stderr, "usage: passthrough FILE DIRECTORY\n");
		return 2;
	}
	file = open(words[1], O_RDWR | O_CLOEXEC);
	if (file < 0) {
		perror(words[1]);
		return 1;
	}
	char *options[] = {words[0], "-ofsname=passthrough"};
	struct fuse_args arguments = FUSE_ARGS_INIT(2, options);
	struct fuse_session *session = fuse_session_new(&arguments, &operations, sizeof operations, NULL);
	if (!session || fuse_set_signal_handlers(session) || fuse_session_mount(session, words[2]))
		return 1;
	struct fuse_loop_config config = {.clone_fd = 1, .max_idle_threads = 10};
	int outcome = fuse_session_loop_mt(session, &config);
	fuse_session_unmount(session);
	fuse_remove_signal_handlers(session);
	fuse_session_destroy(session);
	return outcome ? 1 : 0;
}
