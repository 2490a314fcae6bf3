/* File packs: the contents of a sandbox's private tmpfs (docs/format.md, "File pack"), laid out by hotstart-init. */
#ifndef HOTSTART_FILEPACK_H
#define HOTSTART_FILEPACK_H

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/openat2.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

struct filepack_record {                 /* little endian, packed; followed by path, target, runs, data */
	uint8_t type;                    /* D folder, F file, L symbolic link, H hard link, P fifo, W removed */
	uint8_t reserved;
	uint16_t path_bytes, target_bytes;
	uint32_t mode, uid, gid, runs;
	uint64_t size_bytes;
	int64_t mtime_ns;
} __attribute__((packed));
struct filepack_run { uint64_t offset, length; } __attribute__((packed));

static int filepack_is_private(const char *path)
{
	static const char *const roots[] = {"/run/", "/tmp/", "/dev/shm/", "/run", "/tmp", "/dev/shm"};
	for (int i = 0; i < 3; i++)
		if (!strncmp(path, roots[i], strlen(roots[i]))) return 1;
	for (int i = 3; i < 6; i++)
		if (!strcmp(path, roots[i])) return 1;
	return 0;
}

/* Never through ".."; only below the private tmpfs, or in a container anywhere but where the kernel shows itself. */
static int filepack_allowed(const char *path, int anywhere)
{
	size_t n = strlen(path);
	if (*path != '/' || strstr(path, "/../") || (n >= 3 && !strcmp(path + n - 3, "/.."))) return 0;
	if (filepack_is_private(path)) return 1;
	return anywhere && n > 1 && strncmp(path, "/proc/", 6) && strncmp(path, "/sys/", 5) && strncmp(path, "/dev/", 5);
}

/* The folder that a path lies in, below a root; *leaf is the rest. In a container no link on the way is followed: what the image has
 * there decides nothing. What lies beyond another mount is the pod's own, unless it is one of the private folders. */
static int filepack_parent(int root, const char *path, int anywhere, const char **leaf)
{
	char folder[PATH_MAX];
	const char *slash = strrchr(path, '/');
	*leaf = slash + 1;
	snprintf(folder, sizeof folder, ".%.*s", (int)(slash - path), path);
	if (!anywhere) return openat(root, folder, O_PATH | O_DIRECTORY | O_CLOEXEC);
	struct open_how how = {.flags = O_PATH | O_DIRECTORY | O_CLOEXEC, .resolve = RESOLVE_NO_SYMLINKS | RESOLVE_NO_MAGICLINKS};
	if (!filepack_is_private(path)) how.resolve |= RESOLVE_NO_XDEV;
	return (int)syscall(SYS_openat2, root, folder, &how, sizeof how);
}

static int filepack_remove(int parent, const char *leaf)
{
	if (!unlinkat(parent, leaf, 0) || errno == ENOENT) return 0;
	if (errno != EISDIR && errno != EPERM) return -1;
	int fd = openat(parent, leaf, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC), bad = 0;
	DIR *folder = fd < 0 ? 0 : fdopendir(fd);
	if (!folder) return -1;
	for (struct dirent *e; !bad && (e = readdir(folder));)
		if (strcmp(e->d_name, ".") && strcmp(e->d_name, "..")) bad = filepack_remove(fd, e->d_name);
	closedir(folder);
	return bad ? -1 : unlinkat(parent, leaf, AT_REMOVEDIR);
}

static int filepack_file(int parent, const char *leaf, const struct filepack_record *r, const struct filepack_run *runs,
			 const char *data, const char *end)
{
	int fd = openat(parent, leaf, O_WRONLY | O_CREAT | O_TRUNC | O_NOFOLLOW | O_CLOEXEC, 0600);
	if (fd < 0) return -1;
	if (ftruncate(fd, (off_t)r->size_bytes)) { close(fd); return -1; }
	for (uint32_t i = 0; i < r->runs; i++) {
		struct filepack_run run = runs[i];
		if (run.length > (uint64_t)(end - data)) { errno = EBADMSG; close(fd); return -1; }
		while (run.length) {
			ssize_t n = pwrite(fd, data, run.length, (off_t)run.offset);
			if (n <= 0) { close(fd); return -1; }
			data += n;
			run.offset += (uint64_t)n;
			run.length -= (uint64_t)n;
		}
	}
	return close(fd);
}

/* One record below a root. Returns 0, or -1 with errno. */
static int filepack_lay(int root, const struct filepack_record *r, const char *path, const char *target, const struct filepack_run *runs,
			const char *data, const char *end, int anywhere)
{
	const char *leaf, *target_leaf;
	struct stat there, above;
	int bad = 0, parent = filepack_parent(root, path, anywhere, &leaf);
	if (parent < 0) return anywhere && errno == EXDEV ? 0 : -1;
	int exists = !fstatat(parent, leaf, &there, AT_SYMLINK_NOFOLLOW);
	if (anywhere && exists && !filepack_is_private(path) && !fstat(parent, &above) && there.st_dev != above.st_dev) {
		close(parent); /* mounted there: /etc/hosts, a volume */
		return 0;
	}
	/* In a container the image may have something of another kind at that place. */
	if (exists && r->type != 'D' && !(r->type == 'F' && S_ISREG(there.st_mode))) bad = filepack_remove(parent, leaf);
	if (!bad) switch (r->type) {
	case 'D': bad = exists && S_ISDIR(there.st_mode) ? 0 : mkdirat(parent, leaf, 0755); break;
	case 'F': bad = filepack_file(parent, leaf, r, runs, data, end); break;
	case 'L': bad = symlinkat(target, parent, leaf); break;
	case 'H': {
		int from = filepack_parent(root, target, anywhere, &target_leaf);
		bad = from < 0 || linkat(from, target_leaf, parent, leaf, 0);
		if (from >= 0) close(from);
		break;
	}
	case 'P': bad = mkfifoat(parent, leaf, 0600); break;
	case 'W': break; /* removed */
	default: errno = EBADMSG; bad = -1;
	}
	if (!bad && r->type != 'H' && r->type != 'W') {
		int64_t ns = (r->mtime_ns % 1000000000 + 1000000000) % 1000000000; /* before 1970 it is negative */
		struct timespec times[2] = {{0, UTIME_OMIT}, {(r->mtime_ns - ns) / 1000000000, ns}};
		int as_it_is = r->type == 'D' && exists && there.st_uid == r->uid && there.st_gid == r->gid;
		if (!as_it_is && (r->uid || r->gid || exists)) bad = fchownat(parent, leaf, r->uid, r->gid, AT_SYMLINK_NOFOLLOW);
		if (!bad && r->type != 'L' && !(as_it_is && (there.st_mode & 07777) == r->mode)) bad = fchmodat(parent, leaf, r->mode, 0);
		if (!bad && r->type == 'F') bad = utimensat(parent, leaf, times, AT_SYMLINK_NOFOLLOW);
	}
	int code = errno;
	close(parent);
	errno = code;
	return bad ? -1 : 0;
}

/* Lays out the pack open as fd. Returns 0, or -1 with the reason in problem. `writable`, in a container, gives its root where it may be
 * written to, even if the container itself may not. */
static int filepack_unpack(int fd, int (*writable)(void), char *problem, size_t problem_bytes)
{
	int anywhere = writable != 0, root = open("/", O_PATH | O_DIRECTORY | O_CLOEXEC), beyond = -1;
	struct stat st;
	char path[PATH_MAX], target[PATH_MAX];
	if (fstat(fd, &st) || st.st_size < 8) { snprintf(problem, problem_bytes, "file pack: too short"); return -1; }
	const char *map = mmap(0, (size_t)st.st_size, PROT_READ, MAP_PRIVATE | MAP_POPULATE, fd, 0);
	const char *p = map + 8, *end = map + st.st_size;
	if (map == MAP_FAILED || memcmp(map, "HSFILES1", 8)) { snprintf(problem, problem_bytes, "file pack: not one"); return -1; }
	while (p < end) {
		struct filepack_record r;
		if ((size_t)(end - p) < sizeof r) goto torn;
		memcpy(&r, p, sizeof r);
		p += sizeof r;
		uint64_t runs_bytes = (uint64_t)r.runs * sizeof(struct filepack_run), data_bytes = 0;
		if (r.path_bytes >= PATH_MAX || r.target_bytes >= PATH_MAX ||
		    r.path_bytes + r.target_bytes + runs_bytes > (uint64_t)(end - p)) goto torn;
		memcpy(path, p, r.path_bytes);
		path[r.path_bytes] = 0;
		memcpy(target, p + r.path_bytes, r.target_bytes);
		target[r.target_bytes] = 0;
		p += r.path_bytes + r.target_bytes;
		const struct filepack_run *runs = (const struct filepack_run *)p;
		for (uint32_t i = 0; i < r.runs; i++) data_bytes += runs[i].length;
		p += runs_bytes;
		if (data_bytes > (uint64_t)(end - p)) goto torn;
		if (!filepack_allowed(path, anywhere) || (r.type == 'H' && !filepack_allowed(target, anywhere))) {
			snprintf(problem, problem_bytes, "file pack: %.200s is outside the private folders", path);
			return -1;
		}
		int bad = filepack_lay(root, &r, path, target, runs, p, end, anywhere);
		if (bad && errno == EROFS && writable) {
			if (beyond < 0) beyond = writable();
			bad = filepack_lay(beyond, &r, path, target, runs, p, end, anywhere);
		}
		if (bad && errno == EBADMSG) goto torn;
		if (bad) { snprintf(problem, problem_bytes, "file pack: %.150s: %s", path, strerror(errno)); return -1; }
		p += data_bytes;
	}
	munmap((void *)map, (size_t)st.st_size);
	close(root);
	if (beyond >= 0) close(beyond);
	return 0;
torn:
	snprintf(problem, problem_bytes, "file pack: torn or damaged");
	return -1;
}
#endif
