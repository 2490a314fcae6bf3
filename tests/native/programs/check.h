/* What the programs share that are folded, undone and restored by the tests, and verify themselves.
 *
 * usage: PROGRAM BEHAVIOUR. Prints "ready" when it is set up. Whenever the file /run/check.N appears (N = 1, 2, ...) it
 * verifies itself and prints "ok N"; what is wrong it prints as "FAILED ..." and exits with status 1.
 */
#ifndef CHECK_H
#define CHECK_H
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { PAGE_BYTES = 4096 };
#define MIB (1UL << 20)
#define RW (PROT_READ | PROT_WRITE)
#define ANONYMOUS (MAP_PRIVATE | MAP_ANONYMOUS)

__attribute__((unused)) static void failed(const char *file, int line, const char *what)
{
	dprintf(1, "FAILED %s:%d: %s (pid %d, errno: %s)\n", strrchr(file, '/') ? strrchr(file, '/') + 1 : file, line, what,
		getpid(), strerror(errno));
	_exit(1);
}
#define EXPECT(condition) do { if (!(condition)) failed(__FILE__, __LINE__, #condition); } while (0)

__attribute__((unused)) static void pause_ms(long ms)
{
	struct timespec t = {ms / 1000, ms % 1000 * 1000000};
	while (nanosleep(&t, &t) && errno == EINTR) {}
}

/* Words that depend on their place, so that a page in the wrong place does not pass. */
__attribute__((unused)) static uint64_t word(uint64_t seed, uint64_t i)
{
	uint64_t x = seed * 0x9e3779b97f4a7c15UL + i * 0xd1b54a32d192ed03UL;
	x ^= x >> 29;
	return x * 0xbf58476d1ce4e5b9UL;
}

__attribute__((unused)) static void fill(void *at, size_t bytes, uint64_t seed)
{
	uint64_t *p = at;
	for (size_t i = 0; i < bytes / 8; i++) p[i] = word(seed, i);
}

__attribute__((unused)) static int is_filled(const void *at, size_t bytes, uint64_t seed)
{
	const uint64_t *p = at;
	for (size_t i = 0; i < bytes / 8; i++)
		if (p[i] != word(seed, i)) return 0;
	return 1;
}

static char *ballast; /* something to fold in every process */
static int checks_done;

__attribute__((unused)) static int asked(void)
{
	char path[32];
	snprintf(path, sizeof path, "/run/check.%d", checks_done + 1);
	return access(path, F_OK) == 0;
}

__attribute__((unused)) static void passed(void) { EXPECT(is_filled(ballast, MIB, 99)); dprintf(1, "ok %d\n", ++checks_done); }

__attribute__((unused)) static void ready(void) { dprintf(1, "ready\n"); }

/* The usual main loop of a behaviour; work may be 0. Never returns. */
__attribute__((unused)) static void serve(void (*work)(void), void (*verify)(void))
{
	ready();
	for (;;) {
		if (work) work();
		else pause_ms(1);
		if (asked()) { verify(); passed(); }
	}
}

__attribute__((unused)) static void *map(size_t bytes, int prot, int flags)
{
	void *p = mmap(0, bytes, prot, flags, -1, 0);
	EXPECT(p != MAP_FAILED);
	return p;
}

__attribute__((unused)) static int is_zero(const void *at, size_t bytes)
{
	const char *p = at;
	return bytes == 0 || (!p[0] && !memcmp(p, p + 1, bytes - 1));
}

static sigjmp_buf fault_jump;
__attribute__((unused)) static void on_fault(int signal) { siglongjmp(fault_jump, signal); }

/* The signal that reading or writing a byte there raises, or 0. */
__attribute__((unused)) static int fault_of(volatile char *at, int write)
{
	struct sigaction act = {.sa_handler = on_fault}, before[2];
	sigaction(SIGSEGV, &act, &before[0]);
	sigaction(SIGBUS, &act, &before[1]);
	int signal = sigsetjmp(fault_jump, 1);
	if (!signal) {
		if (write) *at = *at;
		else (void)*at;
	}
	sigaction(SIGSEGV, &before[0], 0);
	sigaction(SIGBUS, &before[1], 0);
	return signal;
}

/* Is the two-letter flag in VmFlags of the area at that address? */
__attribute__((unused)) static int has_flag(const void *at, const char *flag)
{
	char line[512];
	unsigned long start, end;
	int inside = 0, found = 0;
	FILE *f = fopen("/proc/self/smaps", "re");
	EXPECT(f);
	while (fgets(line, sizeof line, f)) {
		if (sscanf(line, "%lx-%lx ", &start, &end) == 2 && strchr(line, '-') < strchr(line, ' '))
			inside = start <= (unsigned long)at && (unsigned long)at < end;
		else if (inside && !strncmp(line, "VmFlags:", 8)) found = strstr(line, flag) != 0;
	}
	fclose(f);
	return found;
}

__attribute__((unused)) static void expect_exit(pid_t pid, int status)
{
	int st;
	EXPECT(waitpid(pid, &st, 0) == pid);
	EXPECT(WIFEXITED(st) && WEXITSTATUS(st) == status);
}

struct behaviour { const char *name; void (*run)(void); };
#define BEHAVIOURS(...) \
	int main(int argc, char **argv) \
	{ \
		static const struct behaviour all[] = {__VA_ARGS__}; \
		ballast = map(MIB, RW, ANONYMOUS); \
		fill(ballast, MIB, 99); \
		for (size_t i = 0; argc == 2 && i < sizeof all / sizeof *all; i++) \
			if (!strcmp(argv[1], all[i].name)) all[i].run(); \
		fputs("which behaviour?\n", stderr); \
		return 2; \
	}
#endif
