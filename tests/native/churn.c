/* Asks an allocator that is preloaded for zeroed memory, over and over, after all the anonymous memory of this process was
 * folded. Prints how many callocs were not zero and how many live blocks had changed; exit status 1 if any.
 *
 * usage: LD_PRELOAD=libhotstart-shim.so:libjemalloc.so.2 churn [outside]
 *
 * outside: does not fold itself, but says "warm" and then churns on until its stdin ends, to be folded in the middle of it.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { THREADS = 3, SLOTS = 300 };
static volatile int rounds = 20;
static int warm[2], folded[2]; /* pipes: a barrier's own memory would be folded while others wait at it */
static long callocs, not_zero, changed;

struct slots { unsigned char *block[SLOTS]; size_t bytes[SLOTS]; };

static uint32_t rnd(uint32_t *state, uint32_t below)
{
	*state = *state * 1664525U + 1013904223U;
	return (*state >> 8) % below;
}

static int all(const unsigned char *p, size_t bytes, unsigned char value)
{
	for (size_t i = 0; i < bytes; i++)
		if (p[i] != value) return 0;
	return 1;
}

static void churn(struct slots *s, uint32_t *state)
{
	for (int round = 0; round < rounds; round++) {
		for (int i = 0; i < SLOTS; i++) {
			if (s->block[i]) continue;
			size_t bytes = s->bytes[i] = 1024 + rnd(state, rnd(state, 4) ? 60000 : 200000);
			s->block[i] = calloc(1, bytes);
			__sync_fetch_and_add(&callocs, 1);
			if (!all(s->block[i], bytes, 0)) __sync_fetch_and_add(&not_zero, 1);
			memset(s->block[i], 0xC0 | i % 16, bytes);
		}
		for (int i = SLOTS - 1; i >= 0; i--) {
			if (round % 3 && rnd(state, 2)) continue;
			if (!all(s->block[i], s->bytes[i], 0xC0 | i % 16)) __sync_fetch_and_add(&changed, 1);
			free(s->block[i]);
			s->block[i] = 0;
		}
	}
}

static void *work(void *argument)
{
	uint32_t state = (uint32_t)(uintptr_t)argument * 7919 + 1;
	struct slots *s = calloc(1, sizeof *s);
	churn(s, &state);
	char byte = 0;
	if (write(warm[1], &byte, 1) != 1 || read(folded[0], &byte, 1) != 1) abort();
	churn(s, &state);
	return 0;
}

/* Whether every thread but this one sleeps in the kernel, so that its stack stands still. */
static int others_sleep(void)
{
	int asleep = 0;
	DIR *tasks = opendir("/proc/self/task");
	for (struct dirent *e; (e = readdir(tasks));) {
		char path[300], text[128] = "";
		snprintf(path, sizeof path, "/proc/self/task/%s/syscall", e->d_name);
		int fd = open(path, O_RDONLY);
		if (fd < 0) continue;
		long call, first; /* else the text is "running" */
		asleep += read(fd, text, sizeof text - 1) > 0 && sscanf(text, "%ld %lx", &call, (unsigned long *)&first) == 2 &&
			  call == SYS_read && first == folded[0];
		close(fd);
	}
	closedir(tasks);
	return asleep == THREADS;
}

/* A real fold freezes all threads; here the others sleep, and this one uses nothing but its stack and system calls. */
static int fold_everything(void)
{
	static char text[1 << 20];
	size_t filled = 0;
	int maps = open("/proc/self/maps", O_RDONLY), file = open("/run/hotstart/mem/1.mem", O_RDWR | O_CREAT | O_TRUNC, 0600), areas = 0;
	for (ssize_t n; (n = read(maps, text + filled, sizeof text - 1 - filled)) > 0;) filled += (size_t)n;
	off_t offset = 0;
	for (char *line = text; *line; line = strchr(line, '\n') + 1) {
		uintptr_t start, end;
		char mode[5], path[64] = "";
		unsigned long inode;
		if (sscanf(line, "%lx-%lx %4s %*s %*s %lu%*[ ]%60[^\n]", &start, &end, mode, &inode, path) < 4) return -1;
		if (inode || strcmp(mode, "rw-p") || (path[0] && strcmp(path, "[heap]"))) continue;
		size_t bytes = end - start;
		if (pwrite(file, (void *)start, bytes, offset) != (ssize_t)bytes) return -1;
		void *at = mmap((void *)start, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_FIXED, file, offset);
		if (at != (void *)start) return -1;
		offset += (off_t)bytes;
		areas++;
	}
	return areas;
}

int main(int argc, char **argv)
{
	pthread_t threads[THREADS];
	int areas = 0;
	(void)argv;
	mkdir("/run/hotstart", 0755);
	mkdir("/run/hotstart/mem", 0755);
	close(open("/run/hotstart/mem/.unfolded", O_CREAT | O_WRONLY, 0644));
	if (pipe(warm) || pipe(folded)) return 2;
	for (uintptr_t i = 0; i < THREADS; i++) pthread_create(&threads[i], 0, work, (void *)(i + 1));
	char bytes[THREADS];
	for (int i = 0; i < THREADS; i++)
		if (read(warm[0], bytes, 1) != 1) return 2;
	while (!others_sleep()) usleep(1000);
	if (argc > 1) {
		puts("warm");
		fflush(stdout);
		rounds = INT_MAX;
	} else {
		unlink("/run/hotstart/mem/.unfolded");
		if ((areas = fold_everything()) <= 0) { puts("cannot fold"); return 2; }
	}
	if (write(folded[1], bytes, THREADS) != THREADS) return 2;
	if (argc > 1) {
		while (read(0, bytes, 1) > 0) {}
		rounds = 0;
	}
	for (int i = 0; i < THREADS; i++) pthread_join(threads[i], 0);
	printf("%d areas folded, %ld callocs, %ld not zero, %ld live blocks changed\n", areas, callocs, not_zero, changed);
	return not_zero || changed;
}
