/* File packs: the contents of a sandbox's private tmpfs (docs/format.md, "File pack"), laid out by hotstart-init. */
#ifndef HOTSTART_FILEPACK_H
#define HOTSTART_FILEPACK_H

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

struct filepack_record {                 /* little endian, packed; followed by path, target, runs, data */
	uint8_t type;                    /* D folder, F file, L symbolic link, H hard link, P fifo */
	uint8_t reserved;
	uint16_t path_bytes, target_bytes;
	uint32_t mode, uid, gid, runs;
	uint64_t size_bytes;
	int64_t mtime_ns;
} __attribute__((packed));
struct filepack_run { uint64_t offset, length; } __attribute__((packed));

static int filepack_allowed(const char *path) /* only below the private tmpfs, and never through ".." */
{
	static const char *const roots[] = {"/run/", "/tmp/", "/dev/shm/", "/run", "/tmp", "/dev/shm"};
	size_t n = strlen(path);
	if (strstr(path, "/../") || (n >= 3 && !strcmp(path + n - 3, "/.."))) return 0;
	for (int i = 0; i < 3; i++)
		if (!strncmp(path, roots[i], strlen(roots[i]))) return 1;
	for (int i = 3; i < 6; i++)
		if (!strcmp(path, roots[i])) return 1;
	return 0;
}

static int filepack_file(const char *path, const struct filepack_record *r, const struct filepack_run *runs,
			 const char *data, const char *end)
{
	int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_NOFOLLOW | O_CLOEXEC, 0600);
	if (fd < 0 || ftruncate(fd, (off_t)r->size_bytes)) return -1;
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

/* Lays out the pack open as fd. Returns 0, or -1 with the reason in problem. */
static int filepack_unpack(int fd, char *problem, size_t problem_bytes)
{
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
		if (!filepack_allowed(path) || (r.type == 'H' && !filepack_allowed(target))) {
			snprintf(problem, problem_bytes, "file pack: %.200s is outside the private folders", path);
			return -1;
		}
		int bad = 0;
		struct stat there; /* in a container the image may have something of another kind at that place */
		if (r.type != 'D' && !lstat(path, &there) && !(r.type == 'F' && S_ISREG(there.st_mode))) unlink(path);
		switch (r.type) {
		case 'D': bad = mkdir(path, 0755) && errno != EEXIST; break;
		case 'F': bad = filepack_file(path, &r, runs, p, end); break;
		case 'L': bad = symlink(target, path); break;
		case 'H': bad = link(target, path); break;
		case 'P': bad = mkfifo(path, 0600); break;
		default: goto torn;
		}
		if (!bad && r.type != 'H') {
			int64_t ns = (r.mtime_ns % 1000000000 + 1000000000) % 1000000000; /* before 1970 it is negative */
			struct timespec times[2] = {{0, UTIME_OMIT}, {(r.mtime_ns - ns) / 1000000000, ns}};
			if (r.uid || r.gid) bad = lchown(path, r.uid, r.gid);
			if (!bad && r.type != 'L') bad = chmod(path, r.mode);
			if (!bad && r.type == 'F') bad = utimensat(AT_FDCWD, path, times, AT_SYMLINK_NOFOLLOW);
		}
		if (bad) { snprintf(problem, problem_bytes, "file pack: %.150s: %s", path, strerror(errno)); return -1; }
		p += data_bytes;
	}
	munmap((void *)map, (size_t)st.st_size);
	return 0;
torn:
	snprintf(problem, problem_bytes, "file pack: torn or damaged");
	return -1;
}
#endif
