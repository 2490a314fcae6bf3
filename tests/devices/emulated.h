/* What the emulated driver and the emulated NVML have in common: a folder that stands for a machine's devices.
 *
 * Nothing here is a GPU. $EMULATED_DEVICES/config has lines
 *     driver VERSION               what NVML calls the driver's version
 *     cuda NUMBER                  what cuDriverGetVersion says, like 13040
 *     gpu UUID BYTES MAJOR MINOR   a device: name, capacity, compute capability
 * and gpus/UUID/ is the memory of one: a folder ctx-XXXXXX for each process that has a context there, with a file for each
 * allocation and `alive`, which its owner holds locked. The memory of a process that has ended is reclaimed by the next one.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

enum { MOST_GPUS = 8, PATH_BYTES = 512 };

struct gpu { char uuid[48]; unsigned long long bytes; int major, minor; };
struct machine { char driver[64]; int cuda, n_gpus; struct gpu gpus[MOST_GPUS]; };

static inline const char *devices_folder(void)
{
	const char *folder = getenv("EMULATED_DEVICES");
	return folder ? folder : "/nonexistent";
}

static inline int read_machine(struct machine *m)
{
	char path[PATH_BYTES], line[256];
	snprintf(path, sizeof path, "%s/config", devices_folder());
	FILE *f = fopen(path, "re");
	if (!f) return -1;
	*m = (struct machine){0};
	while (fgets(line, sizeof line, f)) {
		struct gpu *g = &m->gpus[m->n_gpus];
		if (sscanf(line, "driver %63s", m->driver) == 1 || sscanf(line, "cuda %d", &m->cuda) == 1) continue;
		if (m->n_gpus < MOST_GPUS && sscanf(line, "gpu %47s %llu %d %d", g->uuid, &g->bytes, &g->major, &g->minor) == 4)
			m->n_gpus++;
	}
	fclose(f);
	return 0;
}

/* The pid of whoever has a context folder, as this process sees it; 0 if nobody has. */
static inline pid_t owner_of(const char *folder)
{
	char path[PATH_BYTES + 300];
	struct flock lock = {.l_type = F_WRLCK, .l_whence = SEEK_SET};
	snprintf(path, sizeof path, "%s/alive", folder);
	int f = open(path, O_RDWR | O_CLOEXEC);
	if (f < 0) return 0;
	int told = fcntl(f, F_GETLK, &lock);
	close(f);
	if (told || lock.l_type == F_UNLCK) return 0;
	return lock.l_pid ? lock.l_pid : -1; /* of a pid namespace that we do not see */
}

static inline unsigned long long bytes_in(const char *folder, int remove_them)
{
	char path[PATH_BYTES + 600];
	unsigned long long sum = 0;
	struct stat st;
	DIR *d = opendir(folder);
	for (struct dirent *e; d && (e = readdir(d));) {
		if (e->d_name[0] == '.') continue;
		snprintf(path, sizeof path, "%s/%s", folder, e->d_name);
		if (!stat(path, &st) && strcmp(e->d_name, "alive")) sum += (unsigned long long)st.st_size;
		if (remove_them) unlink(path);
	}
	if (d) closedir(d);
	if (remove_them) rmdir(folder);
	return sum;
}

/* Calls `each` for every process with a context on a device; returns how much memory they have together. `ours` is not looked at
 * (closing any descriptor of a file drops a process's own locks on it) but counted. */
static inline unsigned long long used_bytes(
	const struct gpu *g, const char *ours, void (*each)(void *, pid_t, unsigned long long), void *with)
{
	char root[PATH_BYTES], folder[PATH_BYTES + 300];
	unsigned long long sum = 0, bytes;
	snprintf(root, sizeof root, "%s/gpus/%s", devices_folder(), g->uuid);
	DIR *d = opendir(root);
	for (struct dirent *e; d && (e = readdir(d));) {
		if (strncmp(e->d_name, "ctx-", 4)) continue;
		snprintf(folder, sizeof folder, "%s/%s", root, e->d_name);
		int us = ours && !strcmp(ours, folder);
		pid_t pid = us ? getpid() : owner_of(folder);
		bytes = bytes_in(folder, !pid && ours); /* only the driver reclaims */
		if (!pid) continue;
		sum += bytes;
		if (each) each(with, pid, bytes);
	}
	if (d) closedir(d);
	return sum;
}
