/* What else a process has of the kernel: mappings that move, shared memory, timers, queues, files without a name, many threads. */
#include "check.h"
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <sys/timerfd.h>
#include <sys/un.h>

/* ---- areas that are grown, shrunk and moved: what is new is zero (with the shim) --------------------------------------------- */

enum { REMAPPED = 4 };
static struct { char *at; size_t bytes; } remapped[REMAPPED];
static unsigned rounds;

static void verify_remapped(void)
{
	for (size_t i = 0; i < REMAPPED; i++) EXPECT(is_filled(remapped[i].at, remapped[i].bytes, 40 + i));
	rounds++;
	for (size_t i = 0; i < REMAPPED; i++) {
		size_t before = remapped[i].bytes, after = i & 1 ? before + (i + rounds) * MIB / 2 : before - before / 3 / PAGE_BYTES * PAGE_BYTES;
		char *at = mremap(remapped[i].at, before, after, MREMAP_MAYMOVE);
		EXPECT(at != MAP_FAILED);
		if (i & 2) { /* and elsewhere */
			char *gap = map(after, PROT_NONE, ANONYMOUS);
			EXPECT(mremap(at, after, after, MREMAP_MAYMOVE | MREMAP_FIXED, gap) == gap);
			at = gap;
		}
		if (after > before) EXPECT(is_zero(at + before, after - before));
		EXPECT(is_filled(at, before < after ? before : after, 40 + i));
		remapped[i].at = at;
		remapped[i].bytes = after;
		fill(at, after, 40 + i);
	}
}

static void remapping(void)
{
	for (size_t i = 0; i < REMAPPED; i++) {
		remapped[i].bytes = (i + 2) * MIB;
		remapped[i].at = map(remapped[i].bytes, RW, ANONYMOUS);
		fill(remapped[i].at, remapped[i].bytes, 40 + i);
	}
	serve(0, verify_remapped);
}

/* ---- pages that were thrown away are zero, and calloc's are ---------------------------------------------------------------------- */

static char *thrown;

static void verify_thrown(void)
{
	static const int advice[] = {MADV_DONTNEED, MADV_FREE};
	for (int i = 0; i < 2; i++) {
		fill(thrown, 4 * MIB, 50);
		EXPECT(!madvise(thrown + MIB, MIB, advice[i]));
		EXPECT(is_filled(thrown, MIB, 50));
		if (advice[i] == MADV_DONTNEED) EXPECT(is_zero(thrown + MIB, MIB));
		memset(thrown + MIB, 7, 100);
		EXPECT(thrown[MIB + 99] == 7 && thrown[3 * MIB] == (char)word(50, 3 * MIB / 8));
	}
	for (size_t n = 100; n < 8 * MIB; n *= 3) {
		char *p = calloc(1, n);
		EXPECT(p && is_zero(p, n));
		memset(p, 0xee, n);
		free(p);
	}
}

static void throwing_away(void)
{
	thrown = map(4 * MIB, RW, ANONYMOUS);
	for (int i = 0; i < 3; i++) verify_thrown();
	serve(0, verify_thrown);
}

/* ---- memory that processes share on purpose ----------------------------------------------------------------------------------------- */

enum { VIEWS = 3 };
static volatile uint64_t *views[VIEWS];
static int to_sharer, from_sharer;

static void verify_views(void)
{
	char b = 0;
	for (size_t i = 0; i < VIEWS; i++) {
		EXPECT(is_filled((const void *)(views[i] + 512), MIB - PAGE_BYTES, 60 + i));
		views[i][0]++;
	}
	EXPECT(write(to_sharer, &b, 1) == 1 && read(from_sharer, &b, 1) == 1);
	for (size_t i = 0; i < VIEWS; i++) EXPECT(views[i][0] == views[i][1]);
}

static void shared_between_processes(void)
{
	int down[2], up[2], memfd = memfd_create("views", 0), shm = open("/dev/shm/views", O_RDWR | O_CREAT, 0600);
	char b;
	EXPECT(memfd >= 0 && shm >= 0 && !ftruncate(memfd, MIB) && !ftruncate(shm, MIB) && !pipe(down) && !pipe(up));
	views[0] = map(MIB, RW, MAP_SHARED | MAP_ANONYMOUS);
	views[1] = mmap(0, MIB, RW, MAP_SHARED, memfd, 0);
	views[2] = mmap(0, MIB, RW, MAP_SHARED, shm, 0);
	for (size_t i = 0; i < VIEWS; i++) fill((void *)(views[i] + 512), MIB - PAGE_BYTES, 60 + i);
	if (!fork()) {
		while (read(down[0], &b, 1) == 1) {
			for (size_t i = 0; i < VIEWS; i++) views[i][1] = views[i][0];
			EXPECT(write(up[1], &b, 1) == 1);
		}
		_exit(0);
	}
	to_sharer = down[1];
	from_sharer = up[0];
	serve(0, verify_views);
}

/* ---- timers: they go on ticking ------------------------------------------------------------------------------------------------------ */

static volatile sig_atomic_t alarms, expirations;
static int timer_fd, lone_fd;
static void on_alarm(int s) { (void)s; alarms = alarms + 1; }
static void on_timer(int s) { (void)s; expirations = expirations + 1; }

static void verify_timers(void)
{
	uint64_t ticks, all = 0;
	struct itimerspec left;
	int before_alarms = alarms, before = expirations;
	for (int i = 0; i < 2000 && (all < 5 || alarms < before_alarms + 5 || expirations < before + 5); i++) {
		struct pollfd f = {timer_fd, POLLIN, 0};
		if (poll(&f, 1, 1) == 1 && read(timer_fd, &ticks, sizeof ticks) == sizeof ticks) all += ticks;
	}
	EXPECT(all >= 5 && alarms >= before_alarms + 5 && expirations >= before + 5);
	EXPECT(!timerfd_gettime(lone_fd, &left) && left.it_value.tv_sec > 3000 && left.it_value.tv_sec <= 4000);
}

static void timers(void)
{
	struct itimerspec often = {{0, 5000000}, {0, 5000000}}, once = {{0, 0}, {4000, 0}};
	struct itimerval alarm = {{0, 5000}, {0, 5000}};
	struct sigevent event = {.sigev_notify = SIGEV_SIGNAL, .sigev_signo = SIGRTMIN + 1};
	struct sigaction on[] = {{.sa_handler = on_alarm, .sa_flags = SA_RESTART}, {.sa_handler = on_timer, .sa_flags = SA_RESTART}};
	timer_t timer;
	EXPECT((timer_fd = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK)) >= 0 && !timerfd_settime(timer_fd, 0, &often, 0));
	EXPECT((lone_fd = timerfd_create(CLOCK_BOOTTIME, 0)) >= 0 && !timerfd_settime(lone_fd, 0, &once, 0));
	EXPECT(!sigaction(SIGALRM, &on[0], 0) && !sigaction(SIGRTMIN + 1, &on[1], 0) && !setitimer(ITIMER_REAL, &alarm, 0));
	EXPECT(!timer_create(CLOCK_MONOTONIC, &event, &timer) && !timer_settime(timer, 0, &often, 0));
	serve(0, verify_timers);
}

/* ---- queues that are full, and a connection that nobody has accepted yet -------------------------------------------------------------- */

enum { PIPE_BYTES = 1 << 16, PACKETS = 20 };
static int full_pipe[2], stream[2], packets[2], listener, waiting, watcher;

static void fill_queues(void)
{
	static char data[PIPE_BYTES];
	struct sockaddr_un name = {.sun_family = AF_UNIX, .sun_path = "/tmp/queue"};
	fill(data, sizeof data, 70);
	EXPECT(write(full_pipe[1], data, sizeof data) == sizeof data && write(stream[0], data, 50000) == 50000);
	for (size_t i = 0; i < PACKETS; i++) EXPECT(send(packets[0], data, 100 * i + 1, 0) == (ssize_t)(100 * i + 1));
	/* Nothing written to it yet: such a connection CRIU refuses ("Non-empty write queue on an in-flight socket", 4.2.1). */
	EXPECT((waiting = socket(AF_UNIX, SOCK_STREAM, 0)) >= 0 && !connect(waiting, (struct sockaddr *)&name, sizeof name));
}

static void verify_queues(void)
{
	static char data[PIPE_BYTES], found[PIPE_BYTES];
	struct epoll_event ready[4];
	fill(data, sizeof data, 70);
	EXPECT(epoll_wait(watcher, ready, 4, 0) == 4);
	for (size_t n = 0; n < sizeof data;) {
		ssize_t k = read(full_pipe[0], found + n, sizeof data - n);
		EXPECT(k > 0);
		n += (size_t)k;
	}
	EXPECT(!memcmp(found, data, sizeof data) && recv(stream[1], found, 50000, MSG_WAITALL) == 50000 && !memcmp(found, data, 50000));
	for (size_t i = 0; i < PACKETS; i++)
		EXPECT(recv(packets[1], found, sizeof found, 0) == (ssize_t)(100 * i + 1) && !memcmp(found, data, 100 * i + 1));
	int accepted = accept(listener, 0, 0);
	EXPECT(accepted >= 0 && write(waiting, data, 3000) == 3000);
	EXPECT(recv(accepted, found, 3000, MSG_WAITALL) == 3000 && !memcmp(found, data, 3000));
	close(accepted);
	close(waiting);
	EXPECT(epoll_wait(watcher, ready, 4, 0) == 0);
	fill_queues();
}

static void full_queues(void)
{
	struct sockaddr_un name = {.sun_family = AF_UNIX, .sun_path = "/tmp/queue"};
	EXPECT(!pipe(full_pipe) && !socketpair(AF_UNIX, SOCK_STREAM, 0, stream) && !socketpair(AF_UNIX, SOCK_SEQPACKET, 0, packets));
	EXPECT((listener = socket(AF_UNIX, SOCK_STREAM, 0)) >= 0 && !bind(listener, (struct sockaddr *)&name, sizeof name) && !listen(listener, 5));
	EXPECT((watcher = epoll_create1(EPOLL_CLOEXEC)) >= 0);
	int watched[] = {full_pipe[0], stream[1], packets[1], listener};
	for (int i = 0; i < 4; i++) {
		struct epoll_event e = {.events = EPOLLIN, .data.fd = watched[i]};
		EXPECT(!epoll_ctl(watcher, EPOLL_CTL_ADD, watched[i], &e));
	}
	fill_queues();
	serve(0, verify_queues);
}

/* ---- files that have lost their name: open and mapped ------------------------------------------------------------------------------------ */

static int nameless;
static char *mapped_nameless, *private_nameless;

static void verify_nameless(void)
{
	char found[1000];
	EXPECT(lseek(nameless, 0, SEEK_CUR) == 12345 && pread(nameless, found, sizeof found, 8 * PAGE_BYTES) == sizeof found);
	EXPECT(!memcmp(found, mapped_nameless + 8 * PAGE_BYTES, sizeof found));
	EXPECT(is_filled(mapped_nameless + PAGE_BYTES, 63 * PAGE_BYTES, 81));
	EXPECT(is_filled(private_nameless, PAGE_BYTES, 82) && is_filled(private_nameless + PAGE_BYTES, 63 * PAGE_BYTES, 81));
	++*(uint64_t *)mapped_nameless;
	EXPECT(pread(nameless, found, 8, 0) == 8 && !memcmp(found, mapped_nameless, 8));
}

static void nameless_files(void)
{
	static char data[63 * PAGE_BYTES];
	EXPECT((nameless = open("/tmp/nameless", O_RDWR | O_CREAT, 0600)) >= 0 && !ftruncate(nameless, 64 * PAGE_BYTES));
	fill(data, sizeof data, 81);
	EXPECT(pwrite(nameless, data, sizeof data, PAGE_BYTES) == sizeof data && lseek(nameless, 12345, SEEK_SET) == 12345);
	mapped_nameless = mmap(0, 64 * PAGE_BYTES, RW, MAP_SHARED, nameless, 0);
	private_nameless = mmap(0, 64 * PAGE_BYTES, RW, MAP_PRIVATE, nameless, 0);
	EXPECT(mapped_nameless != MAP_FAILED && private_nameless != MAP_FAILED && !unlink("/tmp/nameless"));
	fill(private_nameless, PAGE_BYTES, 82);
	serve(0, verify_nameless);
}

/* ---- many threads, each with a stack, thread-local data and an arena of its own --------------------------------------------------------- */

enum { THREADS = 80, BLOCK = 100 << 10 };
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static int asked_rounds, answers;
static __thread uint64_t mine[100];

static void *thread(void *argument)
{
	uint64_t id = (uint64_t)argument, local[500];
	char *block = malloc(BLOCK);
	EXPECT(block);
	fill(block, BLOCK, id);
	fill(local, sizeof local, id + 1000);
	fill(mine, sizeof mine, id + 2000);
	pthread_mutex_lock(&lock);
	for (int done = 0;; answers++, pthread_cond_broadcast(&changed)) {
		while (done == asked_rounds) pthread_cond_wait(&changed, &lock);
		done = asked_rounds;
		EXPECT(is_filled(block, BLOCK, id) && is_filled(local, sizeof local, id + 1000) && is_filled(mine, sizeof mine, id + 2000));
	}
	return 0;
}

static void verify_threads(void)
{
	pthread_mutex_lock(&lock);
	answers = 0;
	asked_rounds++;
	pthread_cond_broadcast(&changed);
	while (answers < THREADS) pthread_cond_wait(&changed, &lock);
	pthread_mutex_unlock(&lock);
}

static void many_threads(void)
{
	pthread_t t;
	for (uint64_t i = 0; i < THREADS; i++) EXPECT(!pthread_create(&t, 0, thread, (void *)i));
	verify_threads();
	serve(0, verify_threads);
}

/* ---- children that are born after the restore, and inherit all of it ---------------------------------------------------------------------- */

static char *inherited;

static void verify_births(void)
{
	for (int i = 0; i < 3; i++) {
		pid_t child = fork();
		if (child) { expect_exit(child, 9); continue; }
		EXPECT(is_filled(inherited, 8 * MIB, 90));
		memset(inherited + (size_t)i * MIB, 1, MIB);
		char *more = malloc(3 * MIB);
		EXPECT(more && mprotect(inherited, MIB, PROT_READ) == 0 && inherited[MIB - 1] == (i ? (char)(word(90, MIB / 8 - 1) >> 56) : 1));
		_exit(9);
	}
	EXPECT(is_filled(inherited, 8 * MIB, 90));
}

static void later_births(void)
{
	inherited = map(8 * MIB, RW, ANONYMOUS);
	fill(inherited, 8 * MIB, 90);
	serve(0, verify_births);
}

BEHAVIOURS({"remapping", remapping}, {"throwing_away", throwing_away}, {"shared_between_processes", shared_between_processes},
	   {"timers", timers}, {"full_queues", full_queues}, {"nameless_files", nameless_files}, {"many_threads", many_threads},
	   {"later_births", later_births})
