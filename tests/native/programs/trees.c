/* Trees of processes, and processes that a fold must leave alone or refuse. */
#include "check.h"
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <linux/userfaultfd.h>
#include <sched.h>
#include <spawn.h>
#include <stddef.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/ptrace.h>
#include <sys/socket.h>

extern char **environ;

static char *filled_area(size_t bytes, uint64_t seed)
{
	char *p = map(bytes, RW, ANONYMOUS);
	fill(p, bytes, seed);
	return p;
}

/* ---- a deep chain, each with its own view of what it inherited ---------------------------------------------------------- */

enum { DEPTH = 50 };
static int next[2], back[2]; /* to the child and from it */

static void verify_chain(void)
{
	char b = 0;
	EXPECT(write(next[1], &b, 1) == 1 && read(back[0], &b, 1) == 1 && b == DEPTH);
}

/* Every link looks at its memory, asks the next one, and answers how deep it goes. */
static void serve_link(char *mine, int depth, int from, int to)
{
	char b;
	while (read(from, &b, 1) == 1) {
		EXPECT(is_filled(mine, 256 << 10, (uint64_t)depth));
		if (depth < DEPTH) EXPECT(write(next[1], &b, 1) == 1 && read(back[0], &b, 1) == 1);
		else b = DEPTH;
		EXPECT(write(to, &b, 1) == 1);
	}
	_exit(0);
}

static void deep_chain(void)
{
	char b = 'r', *mine = filled_area(256 << 10, 0);
	int depth = 0, from = -1, to = -1;
	while (depth < DEPTH) {
		EXPECT(!pipe(next) && !pipe(back));
		if (fork()) break;
		close(next[1]);
		close(back[0]);
		from = next[0];
		to = back[1];
		fill(mine, 256 << 10, (uint64_t)++depth);
	}
	if (depth < DEPTH) EXPECT(read(back[0], &b, 1) == 1); /* all below stand */
	if (depth == 0) serve(0, verify_chain);
	EXPECT(write(to, &b, 1) == 1);
	serve_link(mine, depth, from, to);
}

/* ---- children that sleep, zombies among them ------------------------------------------------------------------------------ */

enum { CHILDREN = 16 };
static pid_t children[CHILDREN], zombie;
static int release_pipe[2];

static void start_children(void)
{
	EXPECT(!pipe(release_pipe));
	for (int i = 0; i < CHILDREN; i++) {
		if ((children[i] = fork())) continue;
		char b, *mine = filled_area(MIB, (uint64_t)i);
		close(release_pipe[1]);
		EXPECT(read(release_pipe[0], &b, 1) == 0 && is_filled(mine, MIB, (uint64_t)i));
		_exit(i);
	}
	close(release_pipe[0]);
	if (!(zombie = fork())) _exit(5);
	siginfo_t i;
	EXPECT(!waitid(P_PID, (id_t)zombie, &i, WEXITED | WNOWAIT));
}

static void verify_children(void)
{
	expect_exit(zombie, 5);
	close(release_pipe[1]);
	for (int i = 0; i < CHILDREN; i++) expect_exit(children[i], i);
	start_children();
}

static void sleeping_children(void)
{
	start_children();
	serve(0, verify_children);
}

/* ---- births: children that end at once, and orphans that leave their parents behind ------------------------------------------ */

static char *heirloom;
static volatile uint64_t *generations;

static void fork_once(void)
{
	pid_t child = fork();
	EXPECT(child >= 0);
	if (!child) {
		EXPECT(is_filled(heirloom, MIB, 3));
		fill(heirloom, 64 << 10, 4);
		EXPECT(is_filled(heirloom, 64 << 10, 4));
		__atomic_add_fetch(generations, 1, __ATOMIC_RELAXED);
		_exit(3);
	}
	expect_exit(child, 3);
	EXPECT(is_filled(heirloom, MIB, 3));
	usleep(500);
}

static void fork_often(void) { for (int i = 0; i < 20; i++) fork_once(); }

static void forking(void)
{
	heirloom = filled_area(MIB, 3);
	generations = map(PAGE_BYTES, RW, MAP_SHARED | MAP_ANONYMOUS);
	serve(fork_once, fork_often);
}

static void reap(void)
{
	pause_ms(1);
	while (waitpid(-1, 0, WNOHANG) > 0) {}
}

static void verify_generations(void)
{
	for (uint64_t before = *generations; *generations < before + 20;) reap();
}

static void orphans(void) /* a line of processes, each of which forks the next and ends */
{
	heirloom = filled_area(MIB, 3);
	generations = map(PAGE_BYTES, RW, MAP_SHARED | MAP_ANONYMOUS);
	for (int line = 0; line < 3; line++) {
		if (fork()) continue;
		for (;;) {
			usleep(200);
			EXPECT(is_filled(heirloom, MIB, 3));
			__atomic_add_fetch(generations, 1, __ATOMIC_RELAXED);
			if (fork()) _exit(0);
		}
	}
	serve(reap, verify_generations);
}

/* posix_spawn: the parent waits in vfork for a moment, over and over */
static void spawn_once(void)
{
	static char name[] = "/bin/true";
	char *argv[] = {name, 0};
	pid_t child;
	EXPECT(!posix_spawn(&child, argv[0], 0, 0, argv, environ));
	expect_exit(child, 0);
	++*generations;
	EXPECT(is_filled(heirloom, MIB, 3));
}

static void spawn_often(void) { for (int i = 0; i < 20; i++) spawn_once(); }

static void spawning(void)
{
	heirloom = filled_area(MIB, 3);
	generations = map(PAGE_BYTES, RW, MAP_SHARED | MAP_ANONYMOUS);
	serve(spawn_once, spawn_often);
}

/* ---- to be refused: a parent that waits in vfork, shared memory between processes, a debugger, io_submit, ... ------------------ */

static volatile uint64_t *heartbeat;

static void verify_heartbeat(void)
{
	for (uint64_t before = *heartbeat; *heartbeat < before + 10;) pause_ms(1);
	EXPECT(is_filled(heirloom, MIB, 3));
}

static void prepare_heartbeat(void)
{
	heirloom = filled_area(MIB, 3);
	heartbeat = map(PAGE_BYTES, RW, MAP_SHARED | MAP_ANONYMOUS);
}

static void long_vfork(void)
{
	prepare_heartbeat();
	if (!fork()) {
		pid_t child = vfork();
		if (!child) for (;;) { ++*heartbeat; usleep(1000); }
		_exit(1);
	}
	serve(0, verify_heartbeat);
}

static int sharing_child(void *argument)
{
	(void)argument;
	for (;;) { ++*heartbeat; usleep(1000); }
	return 0;
}

static void shared_address_space(void)
{
	prepare_heartbeat();
	EXPECT(clone(sharing_child, (char *)map(MIB, RW, ANONYMOUS) + MIB, CLONE_VM | SIGCHLD, 0) > 0);
	serve(0, verify_heartbeat);
}

static void debugged(void)
{
	prepare_heartbeat();
	pid_t child = fork();
	if (!child) {
		ptrace(PTRACE_TRACEME, 0, 0, 0);
		for (;;) { ++*heartbeat; usleep(1000); }
	}
	serve(0, verify_heartbeat);
}

static void beat(void) { ++*heartbeat; usleep(500); }
static void verify_beat(void) { EXPECT(is_filled(heirloom, MIB, 3)); }

static void asynchronous_reads(void)
{
	unsigned long context = 0;
	prepare_heartbeat();
	EXPECT(!syscall(SYS_io_setup, 16, &context));
	serve(beat, verify_beat);
}

static volatile char selector; /* 0: system calls are let through */

static void own_dispatch(void)
{
	prepare_heartbeat();
	if (prctl(59 /* PR_SET_SYSCALL_USER_DISPATCH */, 1, 0, 0, &selector)) { dprintf(1, "skipped: no dispatch\n"); _exit(77); }
	serve(beat, verify_beat);
}

/* ---- sandboxed children ------------------------------------------------------------------------------------------------------------ */

static int to_child[2], from_child[2];

static void verify_prisoner(void)
{
	char b = 'x';
	EXPECT(write(to_child[1], &b, 1) == 1 && read(from_child[0], &b, 1) == 1 && b == 'y');
}

static void serve_prisoner(void)
{
	char b;
	char *mine = heirloom;
	for (;;) {
		if (read(to_child[0], &b, 1) != 1) syscall(SYS_exit, 0);
		b = is_filled(mine, MIB, 3) ? 'y' : 'n';
		if (write(from_child[1], &b, 1) != 1) syscall(SYS_exit, 0);
	}
}

static void filtered_seccomp(void) /* kills at the calls that a fold makes */
{
	struct sock_filter code[] = {
		BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_mmap, 5, 0),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_mremap, 4, 0),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_munmap, 3, 0),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_openat, 2, 0),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_fcntl, 1, 0),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS),
	};
	struct sock_fprog program = {sizeof code / sizeof *code, code};
	prepare_heartbeat();
	EXPECT(!pipe(to_child) && !pipe(from_child));
	if (!fork()) {
		EXPECT(!prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) && !prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program));
		serve_prisoner();
	}
	serve(0, verify_prisoner);
}

static void no_writable_code(void) /* prctl(PR_SET_MDWE), kernel 6.3 */
{
	prepare_heartbeat();
	if (prctl(65, 1, 0, 0, 0)) { dprintf(1, "skipped: no PR_SET_MDWE\n"); _exit(77); }
	serve(beat, verify_beat);
}

/* ---- memory whose faults a thread answers (userfaultfd): left alone ------------------------------------------------------------------- */

static int uffd;
static char *lazy;
static volatile int answered;

static void *answer_faults(void *argument)
{
	(void)argument;
	static char page[PAGE_BYTES] __attribute__((aligned(4096)));
	for (;;) {
		struct uffd_msg m;
		if (read(uffd, &m, sizeof m) != sizeof m) continue;
		uint64_t at = m.arg.pagefault.address & -4096UL;
		fill(page, sizeof page, (at - (uint64_t)lazy) / PAGE_BYTES);
		struct uffdio_copy c = {.dst = at, .src = (uint64_t)page, .len = PAGE_BYTES};
		answered++;
		EXPECT(!ioctl(uffd, UFFDIO_COPY, &c));
	}
	return 0;
}

static int lazy_pages = 64;

static void verify_lazy(void)
{
	for (int i = 0; i < lazy_pages; i++) EXPECT(is_filled(lazy + i * PAGE_BYTES, PAGE_BYTES, (uint64_t)i));
	EXPECT(answered == lazy_pages);
	lazy_pages += 32;
	EXPECT(is_filled(heirloom, MIB, 3));
}

static void lazy_memory(void)
{
	pthread_t t;
	struct uffdio_api api = {.api = UFFD_API};
	prepare_heartbeat();
	uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC);
	lazy = map(4 * MIB, RW, ANONYMOUS);
	struct uffdio_register r = {.range = {(uint64_t)lazy, 4 * MIB}, .mode = UFFDIO_REGISTER_MODE_MISSING};
	EXPECT(uffd >= 0 && !ioctl(uffd, UFFDIO_API, &api) && !ioctl(uffd, UFFDIO_REGISTER, &r));
	pthread_create(&t, 0, answer_faults, 0);
	serve(0, verify_lazy);
}

/* ---- what is in flight: pipes, sockets, epoll, event counters -------------------------------------------------------------------------- */

static int stream[2], datagrams[2], pipe_[2], watcher;
static uint64_t sent, received;
static volatile int transfers_done;

static void *transmit(void *argument)
{
	static uint64_t block[4096];
	(void)argument;
	for (;; sent += 4096) {
		for (int i = 0; i < 4096; i++) block[i] = word(9, sent + (uint64_t)i);
		for (size_t n = 0; n < sizeof block;) {
			ssize_t k = write(stream[0], (char *)block + n, sizeof block - n);
			EXPECT(k > 0);
			n += (size_t)k;
		}
		usleep(100);
	}
	return 0;
}

static void *receive(void *argument)
{
	static uint64_t block[1000];
	struct epoll_event e = {.events = EPOLLIN};
	(void)argument;
	EXPECT(!epoll_ctl(watcher, EPOLL_CTL_ADD, stream[1], &e));
	for (size_t filled = 0;;) {
		int n = epoll_wait(watcher, &e, 1, -1);
		if (n < 0) { EXPECT(errno == EINTR); continue; }
		ssize_t k = read(stream[1], (char *)block + filled, sizeof block - filled);
		EXPECT(k > 0);
		filled += (size_t)k;
		for (size_t i = 0; i < filled / 8; i++) EXPECT(block[i] == word(9, received + i));
		received += filled / 8;
		memmove(block, (char *)block + filled / 8 * 8, filled % 8);
		filled %= 8;
		transfers_done++;
	}
	return 0;
}

static void verify_flight(void)
{
	char packet[2048], line[16];
	for (int before = transfers_done; transfers_done < before + 50;) pause_ms(1);
	for (int i = 0; i < 5; i++) EXPECT(recv(datagrams[1], packet, sizeof packet, 0) == 1000 + i && packet[0] == i);
	for (int i = 0; i < 5; i++) { packet[0] = (char)i; EXPECT(send(datagrams[0], packet, (size_t)(1000 + i), 0) == 1000 + i); }
	EXPECT(read(pipe_[0], line, sizeof line) == 5 && !memcmp(line, "hello", 5) && write(pipe_[1], "hello", 5) == 5);
}

static void in_flight(void)
{
	pthread_t t;
	char packet[2048] = {0};
	EXPECT(!socketpair(AF_UNIX, SOCK_STREAM, 0, stream) && !socketpair(AF_UNIX, SOCK_DGRAM, 0, datagrams) && !pipe(pipe_));
	EXPECT((watcher = epoll_create1(0)) >= 0 && write(pipe_[1], "hello", 5) == 5);
	for (int i = 0; i < 5; i++) { packet[0] = (char)i; EXPECT(send(datagrams[0], packet, (size_t)(1000 + i), 0) == 1000 + i); }
	pthread_create(&t, 0, transmit, 0);
	pthread_create(&t, 0, receive, 0);
	serve(0, verify_flight);
}

BEHAVIOURS({"deep_chain", deep_chain}, {"sleeping_children", sleeping_children}, {"forking", forking}, {"orphans", orphans},
	   {"spawning", spawning}, {"long_vfork", long_vfork}, {"shared_address_space", shared_address_space},
	   {"debugged", debugged}, {"asynchronous_reads", asynchronous_reads}, {"own_dispatch", own_dispatch},
	   {"filtered_seccomp", filtered_seccomp}, {"no_writable_code", no_writable_code},
	   {"lazy_memory", lazy_memory}, {"in_flight", in_flight})
