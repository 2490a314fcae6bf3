/* Programs that look after themselves: each says "ready", is folded from outside, sees the file "go", and checks itself.
 *
 * usage: behaviour NAME        exit status 0: all is as it would be without a fold; else a line says what is not
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define CONTROL "/run/hotstart/control/"
#define RW (PROT_READ | PROT_WRITE)
#define ANON (MAP_PRIVATE | MAP_ANONYMOUS)
#define MIB (1UL << 20)
#define EXPECT(c) do { if (!(c)) { printf("line %d: %s (%s)\n", __LINE__, #c, strerror(errno)); fflush(stdout); _exit(1); } } while (0)

static volatile int handled, trapped;
static char data[1 << 20] = {1}; /* .data */

static void ready(void) { puts("ready"); fflush(stdout); }
static int gone_on(void) { return access(CONTROL "go", F_OK) == 0; }
static void until_go(void) { ready(); while (!gone_on()) usleep(2000); }

static void fill(unsigned char *p, size_t n, unsigned seed) { for (size_t i = 0; i < n; i++) p[i] = (unsigned char)(i * 31 + i / 4096 + seed); }
static int is_filled(const unsigned char *p, size_t n, unsigned seed)
{
	for (size_t i = 0; i < n; i++) if (p[i] != (unsigned char)(i * 31 + i / 4096 + seed)) return 0;
	return 1;
}
static int is_zero(const unsigned char *p, size_t n) { for (size_t i = 0; i < n; i++) if (p[i]) return 0; return 1; }
static void *map(size_t n, int prot, int flags)
{
	void *p = mmap(0, n, prot, flags, -1, 0);
	EXPECT(p != MAP_FAILED);
	return p;
}
static void *filled(size_t n, unsigned seed) { void *p = map(n, RW, ANON); fill(p, n, seed); return p; }

static void memory(void) /* heap, mmap with holes, .data, read-only */
{
	unsigned char *heap = malloc(100000), *m = filled(4 * MIB, 2), *ro = filled(MIB, 3), *sparse = map(64 * MIB, RW, ANON);
	fill(heap, 100000, 1);
	fill((unsigned char *)data, sizeof data, 4);
	fill(sparse + 33 * MIB, 8192, 5);
	EXPECT(!mprotect(ro, MIB, PROT_READ));
	until_go();
	EXPECT(is_filled(heap, 100000, 1) && is_filled(m, 4 * MIB, 2) && is_filled(ro, MIB, 3) && is_filled((unsigned char *)data, sizeof data, 4));
	EXPECT(is_zero(sparse, 33 * MIB) && is_filled(sparse + 33 * MIB, 8192, 5) && is_zero(sparse + 34 * MIB, 30 * MIB));
	EXPECT(!mprotect(ro, MIB, RW));
	fill(ro, MIB, 9); fill(m, 4 * MIB, 9);
	EXPECT(is_filled(ro, MIB, 9) && is_filled(m, 4 * MIB, 9));
}

static void huge_pages(void)
{
	unsigned char *p = map(16 * MIB, RW, ANON);
	madvise(p, 16 * MIB, MADV_HUGEPAGE);
	fill(p, 16 * MIB, 1);
	until_go();
	EXPECT(is_filled(p, 16 * MIB, 1));
}

static void brk_grows(void)
{
	unsigned char *p = sbrk(MIB);
	fill(p, MIB, 1);
	until_go();
	unsigned char *q = sbrk(MIB);
	EXPECT(q == p + MIB && is_zero(q, MIB) && is_filled(p, MIB, 1));
	fill(q, MIB, 2);
	EXPECT(sbrk(-(long)MIB) == q + MIB && sbrk(MIB) == q && is_zero(q, MIB));
}

static void kept_areas(void) /* wiped, not inherited, locked, reserved */
{
	unsigned char *wiped = filled(MIB, 1), *away = filled(MIB, 2), *locked = filled(MIB, 3), *none = map(MIB, PROT_NONE, ANON);
	EXPECT(!madvise(wiped, MIB, MADV_WIPEONFORK) && !madvise(away, MIB, MADV_DONTFORK));
	mlock(locked, MIB);
	until_go();
	int status;
	unsigned char vector[256];
	pid_t child = fork();
	if (!child) _exit(!is_zero(wiped, MIB) || mincore(away, MIB, vector) == 0 ? 1 : 0);
	EXPECT(waitpid(child, &status, 0) == child && status == 0);
	EXPECT(is_filled(wiped, MIB, 1) && is_filled(away, MIB, 2) && is_filled(locked, MIB, 3));
	EXPECT(write(open("/dev/null", O_WRONLY), none, 1) >= -1 && !mprotect(none, MIB, RW) && is_zero(none, MIB));
}

static void shared(void)
{
	int fd = memfd_create("shared", 0);
	EXPECT(!ftruncate(fd, MIB));
	unsigned char *a = mmap(0, MIB, RW, MAP_SHARED, fd, 0), *b = map(MIB, RW, MAP_SHARED | MAP_ANONYMOUS);
	fill(a, MIB, 1); fill(b, MIB, 2);
	pid_t child = fork();
	if (!child) { while (!gone_on()) usleep(1000); a[0] = 77; b[0] = 88; _exit(0); }
	until_go();
	EXPECT(waitpid(child, 0, 0) == child && a[0] == 77 && b[0] == 88 && is_filled(a + 4096, 0, 1));
	unsigned char byte;
	EXPECT(pread(fd, &byte, 1, 0) == 1 && byte == 77);
}

static void isolation(void) /* parent and child see their own writes only */
{
	unsigned char *p = filled(4 * MIB, 1);
	pid_t child = fork();
	if (!child) {
		fill(p, MIB, 2);
		while (!gone_on()) usleep(1000);
		EXPECT(is_filled(p, MIB, 2));
		fill(p, 4 * MIB, 3);
		_exit(is_filled(p, 4 * MIB, 3) ? 0 : 1);
	}
	until_go();
	int status;
	EXPECT(waitpid(child, &status, 0) == child && !status && is_filled(p, 4 * MIB, 1));
	if (!(child = fork())) { fill(p, 4 * MIB, 5); _exit(0); }
	EXPECT(waitpid(child, &status, 0) == child && !status && is_filled(p, 4 * MIB, 1));
}

static void *hammer(void *seed)
{
	unsigned char *p = filled(MIB, (unsigned)(size_t)seed);
	for (unsigned n = 1; !gone_on(); n++) {
		EXPECT(is_filled(p, MIB, (unsigned)(size_t)seed + n - 1));
		fill(p, MIB, (unsigned)(size_t)seed + n);
	}
	return p;
}
static void threads(void)
{
	pthread_t t[8];
	for (size_t i = 0; i < 8; i++) EXPECT(!pthread_create(&t[i], 0, hammer, (void *)(i + 1)));
	until_go();
	for (int i = 0; i < 8; i++) pthread_join(t[i], 0);
}

static void churn(void)
{
	unsigned char *block[64] = {0};
	size_t bytes[64];
	ready();
	for (unsigned n = 0; !gone_on() || n < 3000; n++) {
		unsigned i = n * 7919 % 64;
		if (block[i]) { EXPECT(is_filled(block[i], bytes[i], i)); free(block[i]); }
		bytes[i] = 100 + n * 104729 % 150000;
		EXPECT((block[i] = calloc(1, bytes[i])) && is_zero(block[i], bytes[i]));
		fill(block[i], bytes[i], i);
	}
}

static int pipe_end[2];
static void *in_epoll(void *x)
{
	struct epoll_event e = {.events = EPOLLIN};
	int ep = epoll_create1(0);
	epoll_ctl(ep, EPOLL_CTL_ADD, pipe_end[0], &e);
	EXPECT(epoll_wait(ep, &e, 1, 60000) == 1);
	return x;
}
static void *in_poll(void *x) { struct pollfd f = {pipe_end[0], POLLIN, 0}; EXPECT(poll(&f, 1, 60000) == 1); return x; }
static void *in_read(void *x) { char c; EXPECT(read(pipe_end[0], &c, 1) == 1); return x; }
static void *in_futex(void *x)
{
	int word = 0;
	struct timespec t = {2, 0};
	EXPECT(syscall(SYS_futex, &word, 0, 0, &t, 0, 0) == -1 && errno == ETIMEDOUT);
	return x;
}
static void *in_sleep(void *x) { struct timespec t = {2, 0}; EXPECT(!nanosleep(&t, 0)); return x; }
static void *in_sigtimedwait(void *x)
{
	sigset_t s;
	struct timespec t = {2, 0};
	sigemptyset(&s);
	sigaddset(&s, SIGUSR2);
	EXPECT(sigtimedwait(&s, 0, &t) == -1 && errno == EAGAIN);
	return x;
}
static void waits(void)
{
	void *(*all[])(void *) = {in_epoll, in_poll, in_futex, in_sleep, in_sigtimedwait, in_read};
	pthread_t t[6];
	EXPECT(!pipe(pipe_end));
	for (int i = 0; i < 6; i++) pthread_create(&t[i], 0, all[i], 0);
	usleep(50000);
	until_go();
	EXPECT(write(pipe_end[1], "xx", 2) == 2);
	for (int i = 0; i < 6; i++) pthread_join(t[i], 0);
}
static void leader_waits(void) /* the thread that makes our system calls is itself in epoll_wait */
{
	struct epoll_event e = {.events = EPOLLIN};
	int ep = epoll_create1(0);
	EXPECT(!pipe(pipe_end));
	if (!fork()) { while (!gone_on()) usleep(1000); EXPECT(write(pipe_end[1], "x", 1) == 1); _exit(0); }
	epoll_ctl(ep, EPOLL_CTL_ADD, pipe_end[0], &e);
	ready();
	EXPECT(epoll_wait(ep, &e, 1, 60000) == 1);
}

static void count(int s) { if (s == SIGTRAP) trapped++; else handled++; }
static void timer(void)
{
	struct itimerval v = {{0, 1000}, {0, 1000}};
	struct sigaction a = {.sa_handler = count, .sa_flags = SA_RESTART};
	sigaction(SIGALRM, &a, 0);
	setitimer(ITIMER_REAL, &v, 0);
	until_go();
	int before = handled;
	for (int i = 0; i < 200 && handled < before + 5; i++) usleep(10000);
	EXPECT(handled >= before + 5);
}
static void pending(void)
{
	sigset_t s, now;
	sigemptyset(&s);
	sigaddset(&s, SIGUSR1); sigaddset(&s, SIGRTMIN);
	sigprocmask(SIG_BLOCK, &s, 0);
	signal(SIGUSR1, count); signal(SIGRTMIN, count);
	raise(SIGUSR1); raise(SIGRTMIN); raise(SIGRTMIN);
	until_go();
	EXPECT(handled == 0 && !sigpending(&now) && sigismember(&now, SIGUSR1));
	sigprocmask(SIG_UNBLOCK, &s, 0);
	EXPECT(handled == 3);
}
static void trap(void)
{
	struct sigaction a;
	signal(SIGTRAP, count);
	until_go();
	EXPECT(!trapped && !sigaction(SIGTRAP, 0, &a) && a.sa_handler == count);
	raise(SIGTRAP);
	EXPECT(trapped == 1);
}
static void trap_ignored(void)
{
	struct sigaction a;
	signal(SIGTRAP, SIG_IGN);
	until_go();
	EXPECT(!sigaction(SIGTRAP, 0, &a) && a.sa_handler == SIG_IGN);
}
static void stopped(void) /* a child in group stop stays so */
{
	unsigned char *p = filled(MIB, 1);
	int status;
	pid_t child = fork();
	if (!child) { raise(SIGSTOP); _exit(is_filled(p, MIB, 1) ? 0 : 1); }
	EXPECT(waitpid(child, &status, WUNTRACED) == child && WIFSTOPPED(status));
	until_go();
	char path[64], line[400];
	snprintf(path, sizeof path, "/proc/%d/stat", child);
	for (int tries = 0, still = 0; !still; tries++) { /* a moment after it was let go it stops again */
		FILE *f = fopen(path, "r");
		EXPECT(tries < 100 && f && fgets(line, sizeof line, f));
		still = strstr(line, ") T ") != 0;
		fclose(f);
		usleep(10000);
	}
	kill(child, SIGCONT);
	EXPECT(waitpid(child, &status, 0) == child && status == 0);
}
static void *outlive(void *x)
{
	unsigned char *p = filled(MIB, 1);
	usleep(50000);
	until_go();
	EXPECT(is_filled(p, MIB, 1));
	exit(0);
	return x;
}
static void leader_gone(void) { pthread_t t; pthread_create(&t, 0, outlive, 0); pthread_exit(0); }

static void deep_tree(void)
{
	unsigned char *p = filled(256 * 1024, 1);
	int status, depth = 0;
	pid_t child = 0;
	while (depth < 12 && !(child = fork())) { depth++; fill(p, 4096, (unsigned)depth); }
	if (depth == 12) until_go();
	else EXPECT(waitpid(child, &status, 0) == child && !status);
	EXPECT(is_filled(p, 4096, depth ? (unsigned)depth : 1));
	if (depth) _exit(0);
}
static void fork_loop(void)
{
	unsigned char *p = filled(MIB, 1);
	int status;
	ready();
	do {
		pid_t child = fork();
		if (!child) _exit(is_filled(p, MIB, 1) ? 0 : 1);
		EXPECT(waitpid(child, &status, 0) == child && !status);
	} while (!gone_on());
}
static void in_vfork(void)
{
	ready();
	if (!vfork()) { while (!gone_on()) ; _exit(0); }
}

#define NAME(f) {#f, f}
static const struct { const char *name; void (*run)(void); } all[] = {NAME(memory), NAME(huge_pages), NAME(brk_grows), NAME(kept_areas),
	NAME(shared), NAME(isolation), NAME(threads), NAME(churn), NAME(waits), NAME(leader_waits), NAME(timer), NAME(pending), NAME(trap),
	NAME(trap_ignored), NAME(stopped), NAME(leader_gone), NAME(deep_tree), NAME(fork_loop), NAME(in_vfork)};

int main(int argc, char **argv)
{
	setvbuf(stdout, 0, _IONBF, 0); /* no allocation behind our back: it would move the program break */
	for (size_t i = 0; i < sizeof all / sizeof *all; i++)
		if (argc == 2 && !strcmp(argv[1], all[i].name)) { all[i].run(); return 0; }
	return 2;
}
