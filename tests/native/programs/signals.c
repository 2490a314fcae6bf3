/* Signals and interrupted system calls: none is lost, doubled or changed, and nothing is interrupted that a stop would not. */
#include "check.h"
#include <limits.h>
#include <linux/futex.h>
#include <semaphore.h>
#include <sys/epoll.h>
#include <sys/ipc.h>
#include <sys/msg.h>
#include <sys/select.h>
#include <sys/sem.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/timerfd.h>
#include <sys/un.h>

static void on(int signal, void (*handler)(int, siginfo_t *, void *), int flags)
{
	struct sigaction act = {.sa_sigaction = handler, .sa_flags = SA_SIGINFO | SA_RESTART | flags};
	EXPECT(!sigaction(signal, &act, 0));
}

static void block(int how, int signal)
{
	sigset_t set;
	sigemptyset(&set);
	sigaddset(&set, signal);
	EXPECT(!pthread_sigmask(how, &set, 0));
}

/* ---- timers --------------------------------------------------------------------------------------------------------- */

static volatile uint64_t alarms, rings, ticks;
static int ticker;

static void on_alarm(int s, siginfo_t *i, void *c) { (void)s; (void)c; EXPECT(i->si_code == SI_KERNEL); alarms++; }
static void on_ring(int s, siginfo_t *i, void *c) { (void)s; (void)c; EXPECT(i->si_code == SI_TIMER && i->si_value.sival_int == 77); rings++; }

static void count_ticks(void)
{
	uint64_t n;
	pause_ms(1);
	if (read(ticker, &n, sizeof n) == sizeof n) ticks += n;
	else EXPECT(errno == EAGAIN);
}

static void verify_timers(void)
{
	uint64_t before[3] = {alarms, rings, ticks};
	while (alarms < before[0] + 20 || rings < before[1] + 20 || ticks < before[2] + 20) count_ticks();
}

static void timers(void)
{
	struct itimerval every = {{0, 1000}, {0, 1000}};
	struct itimerspec also = {{0, 1500000}, {0, 1500000}};
	struct sigevent ring = {.sigev_notify = SIGEV_SIGNAL, .sigev_signo = SIGRTMIN + 3, .sigev_value.sival_int = 77};
	timer_t timer;
	on(SIGALRM, on_alarm, 0);
	on(SIGRTMIN + 3, on_ring, 0);
	EXPECT((ticker = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK)) >= 0);
	EXPECT(!timer_create(CLOCK_MONOTONIC, &ring, &timer) && !timer_settime(timer, 0, &also, 0));
	EXPECT(!setitimer(ITIMER_REAL, &every, 0) && !timerfd_settime(ticker, 0, &also, 0));
	serve(count_ticks, verify_timers);
}

/* ---- a flood of queued signals: each arrives once, in order, with its value and sender ------------------------------------ */

static volatile int next_value;
static pid_t sender;

static void on_queued(int s, siginfo_t *i, void *c)
{
	(void)s; (void)c;
	EXPECT(i->si_code == SI_QUEUE && i->si_pid == sender && i->si_value.sival_int == next_value);
	next_value++;
}

static void verify_flood(void)
{
	for (int before = next_value; next_value < before + 2000;) pause_ms(1);
}

static void flood(void)
{
	on(SIGRTMIN, on_queued, 0);
	block(SIG_BLOCK, SIGRTMIN);
	pid_t parent = getpid();
	if (!(sender = fork())) {
		for (int i = 0;;) {
			union sigval v = {i};
			if (sigqueue(parent, SIGRTMIN, v)) { EXPECT(errno == EAGAIN); usleep(200); }
			else if (++i % 50 == 0) usleep(300);
		}
	}
	block(SIG_UNBLOCK, SIGRTMIN);
	serve(0, verify_flood);
}

/* ---- faults that a handler mends: every one is seen once, with its address --------------------------------------------------- */

static char *faulting;
static volatile char *wanted_fault;
static volatile uint64_t faults_seen, faults_made;

static void on_fault_here(int s, siginfo_t *i, void *c)
{
	(void)s; (void)c;
	EXPECT(i->si_code == SEGV_ACCERR && i->si_addr == wanted_fault);
	faults_seen++;
	mprotect((void *)((uintptr_t)wanted_fault & ~4095UL), PAGE_BYTES, RW);
}

static void make_faults(void)
{
	for (int i = 0; i < 64; i++) {
		wanted_fault = faulting + i * PAGE_BYTES + i;
		EXPECT(!mprotect(faulting + i * PAGE_BYTES, PAGE_BYTES, PROT_READ));
		*wanted_fault = (char)i;
		EXPECT(++faults_made == faults_seen);
	}
	usleep(200);
}

static void verify_faults(void) { make_faults(); }

static void faults(void)
{
	faulting = map(64 * PAGE_BYTES, RW, ANONYMOUS);
	memset(faulting, 1, 64 * PAGE_BYTES);
	on(SIGSEGV, on_fault_here, 0);
	serve(make_faults, verify_faults);
}

/* ---- SIGTRAP: handled, ignored, or blocked and waiting ---------------------------------------------------------------------------- */

static volatile uint64_t traps_seen, traps_made;
static void on_trap(int s, siginfo_t *i, void *c) { (void)s; (void)c; EXPECT(i->si_code == SI_KERNEL); traps_seen++; }

static void make_traps(void)
{
	for (int i = 0; i < 100; i++) {
		__asm__ volatile("int3");
		EXPECT(++traps_made == traps_seen);
	}
	usleep(100);
}

static void traps(void)
{
	on(SIGTRAP, on_trap, 0);
	serve(make_traps, make_traps);
}

static void verify_trap_ignored(void)
{
	struct sigaction act;
	EXPECT(!sigaction(SIGTRAP, 0, &act) && act.sa_handler == SIG_IGN && act.sa_flags & SA_RESTART);
	EXPECT(!raise(SIGTRAP));
}

static void trap_ignored(void)
{
	struct sigaction act = {.sa_handler = SIG_IGN, .sa_flags = SA_RESTART};
	EXPECT(!sigaction(SIGTRAP, &act, 0));
	serve(0, verify_trap_ignored);
}

static void verify_trap_pending(void)
{
	sigset_t pending;
	EXPECT(traps_seen == 0 && !sigpending(&pending) && sigismember(&pending, SIGTRAP));
}

static void on_any_trap(int s, siginfo_t *i, void *c) { (void)s; (void)c; (void)i; traps_seen++; }

static void trap_pending(void)
{
	on(SIGTRAP, on_any_trap, 0);
	block(SIG_BLOCK, SIGTRAP);
	EXPECT(!kill(getpid(), SIGTRAP));
	serve(0, verify_trap_pending);
}

/* ---- a handler on its own stack, which is an area that is folded --------------------------------------------------------------------- */

static char *handler_stack;
static volatile uint64_t deep_handlers;

static void on_deep(int s, siginfo_t *i, void *c)
{
	volatile uint64_t here[4096];
	(void)s; (void)i; (void)c;
	EXPECT((char *)here > handler_stack && (char *)here < handler_stack + MIB);
	for (int k = 0; k < 4096; k++) here[k] = word(deep_handlers, (uint64_t)k);
	for (volatile int k = 0; k < 20000; k++) {}
	for (int k = 0; k < 4096; k++) EXPECT(here[k] == word(deep_handlers, (uint64_t)k));
	deep_handlers++;
}

static void raise_deep(void) { raise(SIGUSR1); }

static void verify_deep(void) { uint64_t before = deep_handlers; raise_deep(); EXPECT(deep_handlers == before + 1); }

static void alternate_stack(void)
{
	handler_stack = map(MIB, RW, ANONYMOUS);
	stack_t stack = {.ss_sp = handler_stack, .ss_size = MIB};
	EXPECT(!sigaltstack(&stack, 0));
	on(SIGUSR1, on_deep, SA_ONSTACK);
	serve(raise_deep, verify_deep);
}

/* ---- signals that are blocked and wait: the thread's own and the process's ---------------------------------------------------------------- */

static void verify_blocked(void)
{
	sigset_t set;
	siginfo_t i;
	struct timespec none = {0, 0};
	union sigval v = {4711};
	sigemptyset(&set);
	sigaddset(&set, SIGUSR1);
	sigaddset(&set, SIGUSR2);
	sigaddset(&set, SIGRTMIN + 1);
	for (int k = 0; k < 5; k++) {
		int s = sigtimedwait(&set, &i, &none);
		if (s == SIGUSR1 || s == SIGUSR2) EXPECT(i.si_code == SI_USER && i.si_pid == getpid());
		else EXPECT(s == SIGRTMIN + 1 && i.si_code == SI_QUEUE && i.si_value.sival_int == 4711 + k - 2);
	}
	EXPECT(sigtimedwait(&set, &i, &none) == -1 && errno == EAGAIN);
	EXPECT(!syscall(SYS_tgkill, getpid(), gettid(), SIGUSR1) && !kill(getpid(), SIGUSR2));
	for (int k = 0; k < 3; k++, v.sival_int++) EXPECT(!sigqueue(getpid(), SIGRTMIN + 1, v));
}

static void blocked(void)
{
	int all[] = {SIGUSR1, SIGUSR2, SIGRTMIN + 1};
	union sigval v = {4711};
	for (int i = 0; i < 3; i++) block(SIG_BLOCK, all[i]);
	EXPECT(!syscall(SYS_tgkill, getpid(), gettid(), SIGUSR1) && !kill(getpid(), SIGUSR2));
	for (int k = 0; k < 3; k++, v.sival_int++) EXPECT(!sigqueue(getpid(), SIGRTMIN + 1, v));
	serve(0, verify_blocked);
}

/* ---- children that wait in one system call each, and none sees EINTR, not even where SIGSTOP and SIGCONT cause it (signal(7)) ---------------------------- */

enum { PATIENCE_S = 100 };
static int wait_pipe[2];
static struct timespec far = {PATIENCE_S, 0};

static void in_read(void) { char b; EXPECT(read(wait_pipe[0], &b, 1) == 0); }
static void in_poll(void) { struct pollfd f = {wait_pipe[0], POLLIN, 0}; EXPECT(poll(&f, 1, PATIENCE_S * 1000) == 1); }
static void in_ppoll(void)
{
	struct pollfd f = {wait_pipe[0], POLLIN, 0};
	sigset_t mask;
	sigfillset(&mask);
	EXPECT(ppoll(&f, 1, 0, &mask) == 1);
}
static void in_select(void)
{
	fd_set set;
	struct timeval t = {PATIENCE_S, 0};
	FD_ZERO(&set);
	FD_SET(wait_pipe[0], &set);
	EXPECT(select(wait_pipe[0] + 1, &set, 0, 0, &t) == 1);
}
static void in_epoll(void)
{
	struct epoll_event e = {.events = EPOLLIN};
	int ep = epoll_create1(0);
	EXPECT(!epoll_ctl(ep, EPOLL_CTL_ADD, wait_pipe[0], &e));
	EXPECT(epoll_wait(ep, &e, 1, -1) == 1);
}
static void in_nanosleep(void)
{
	struct timespec start, end, some = {0, 300000000};
	for (;;) { /* until the pipe is closed; each time for as long as was asked for */
		struct pollfd f = {wait_pipe[0], POLLIN, 0};
		clock_gettime(CLOCK_MONOTONIC, &start);
		EXPECT(nanosleep(&some, 0) == 0);
		clock_gettime(CLOCK_MONOTONIC, &end);
		EXPECT((end.tv_sec - start.tv_sec) * 1000000000 + end.tv_nsec - start.tv_nsec >= 300000000);
		if (poll(&f, 1, 0) == 1) return;
	}
}
static void in_clock_nanosleep(void)
{
	struct timespec until;
	struct pollfd f = {wait_pipe[0], POLLIN, 0};
	while (poll(&f, 1, 0) == 0) {
		clock_gettime(CLOCK_MONOTONIC, &until);
		until.tv_sec++;
		EXPECT(clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &until, 0) == 0);
	}
}
static void in_futex(void)
{
	int *word_ = map(MIB, RW, ANONYMOUS);
	struct timespec some = {0, 250000000};
	struct pollfd f = {wait_pipe[0], POLLIN, 0};
	memset(word_, 1, MIB);
	while (poll(&f, 1, 0) == 0) {
		long r = syscall(SYS_futex, word_, FUTEX_WAIT_PRIVATE, *word_, &some, 0, 0);
		EXPECT(r == -1 && errno == ETIMEDOUT);
	}
}
static void in_accept(void)
{
	struct sockaddr_un name = {.sun_family = AF_UNIX};
	int s = socket(AF_UNIX, SOCK_STREAM, 0);
	snprintf(name.sun_path + 1, 100, "accept-%d", getpid());
	EXPECT(!bind(s, (struct sockaddr *)&name, sizeof name) && !listen(s, 1));
	pid_t child = fork();
	if (!child) {
		char b;
		int c = socket(AF_UNIX, SOCK_STREAM, 0);
		EXPECT(read(wait_pipe[0], &b, 1) == 0);
		_exit(connect(c, (struct sockaddr *)&name, sizeof name) != 0);
	}
	EXPECT(accept(s, 0, 0) >= 0);
	expect_exit(child, 0);
}
static void in_recv(void)
{
	int s[2];
	char b;
	EXPECT(!socketpair(AF_UNIX, SOCK_SEQPACKET, 0, s));
	pid_t child = fork();
	if (!child) { close(s[0]); EXPECT(read(wait_pipe[0], &b, 1) == 0); _exit(send(s[1], "x", 1, 0) != 1); }
	close(s[1]);
	EXPECT(recv(s[0], &b, 1, 0) == 1 && b == 'x');
	expect_exit(child, 0);
}
static void in_wait(void)
{
	char b;
	pid_t child = fork();
	if (!child) { EXPECT(read(wait_pipe[0], &b, 1) == 0); _exit(9); }
	expect_exit(child, 9);
}
static void in_flock(void)
{
	char b;
	struct flock whole = {.l_type = F_WRLCK};
	int file = open("/tmp", O_RDWR | O_TMPFILE, 0600), ready_[2];
	EXPECT(file >= 0 && !pipe(ready_));
	pid_t child = fork();
	if (!child) {
		EXPECT(!fcntl(file, F_SETLK, &whole) && write(ready_[1], "x", 1) == 1);
		EXPECT(read(wait_pipe[0], &b, 1) == 0);
		_exit(0);
	}
	EXPECT(read(ready_[0], &b, 1) == 1 && !fcntl(file, F_SETLKW, &whole));
	expect_exit(child, 0);
}
static void in_message_queue(void)
{
	struct { long type; char text[8]; } m = {1, "hello"};
	char b;
	int q = msgget(IPC_PRIVATE, 0600);
	pid_t child = fork();
	if (!child) { EXPECT(read(wait_pipe[0], &b, 1) == 0); _exit(msgsnd(q, &m, 8, 0) != 0); }
	EXPECT(msgrcv(q, &m, 8, 1, 0) == 8);
	expect_exit(child, 0);
	msgctl(q, IPC_RMID, 0);
}
static void in_old_semaphore(void)
{
	struct sembuf take = {0, -1, 0}, give = {0, 1, 0};
	char b;
	int s = semget(IPC_PRIVATE, 1, 0600);
	pid_t child = fork();
	if (!child) { EXPECT(read(wait_pipe[0], &b, 1) == 0); _exit(semop(s, &give, 1)); }
	EXPECT(s >= 0 && !semtimedop(s, &take, 1, &far));
	expect_exit(child, 0);
	semctl(s, 0, IPC_RMID);
}
static void in_semaphore(void)
{
	sem_t *s = map(MIB, RW, MAP_SHARED | MAP_ANONYMOUS);
	char b;
	EXPECT(!sem_init(s, 1, 0));
	pid_t child = fork();
	if (!child) { EXPECT(read(wait_pipe[0], &b, 1) == 0); _exit(sem_post(s)); }
	EXPECT(!sem_wait(s));
	expect_exit(child, 0);
}
static volatile int woken_by;
static void on_woken(int s, siginfo_t *i, void *c) { (void)i; (void)c; woken_by = s; }
static void in_suspend(void)
{
	sigset_t mask;
	pid_t self = getpid();
	char b;
	on(SIGUSR1, on_woken, 0);
	block(SIG_BLOCK, SIGUSR1);
	pid_t child = fork();
	if (!child) { EXPECT(read(wait_pipe[0], &b, 1) == 0); _exit(kill(self, SIGUSR1)); }
	sigfillset(&mask);
	sigdelset(&mask, SIGUSR1);
	EXPECT(sigsuspend(&mask) == -1 && errno == EINTR && woken_by == SIGUSR1);
	sigset_t now;
	EXPECT(!sigprocmask(SIG_SETMASK, 0, &now) && sigismember(&now, SIGUSR1) && !sigismember(&now, SIGUSR2));
	expect_exit(child, 0);
}
static void in_pause(void)
{
	pid_t self = getpid();
	char b;
	on(SIGUSR1, on_woken, 0);
	pid_t child = fork();
	if (!child) { EXPECT(read(wait_pipe[0], &b, 1) == 0); usleep(20000); _exit(kill(self, SIGUSR1)); }
	EXPECT(pause() == -1 && errno == EINTR && woken_by == SIGUSR1);
	expect_exit(child, 0);
}
static void in_sigwait(void)
{
	sigset_t set;
	siginfo_t i;
	pid_t self = getpid();
	char b;
	sigemptyset(&set);
	sigaddset(&set, SIGUSR2);
	block(SIG_BLOCK, SIGUSR2);
	pid_t child = fork();
	if (!child) { EXPECT(read(wait_pipe[0], &b, 1) == 0); _exit(kill(self, SIGUSR2)); }
	EXPECT(sigtimedwait(&set, &i, &far) == SIGUSR2);
	EXPECT(i.si_pid == child);
	expect_exit(child, 0);
}

static void (*const waits[])(void) = {in_read, in_poll, in_ppoll, in_select, in_epoll, in_nanosleep, in_clock_nanosleep,
	in_futex, in_accept, in_recv, in_wait, in_flock, in_message_queue, in_old_semaphore,
	in_semaphore, in_suspend, in_pause, in_sigwait};
enum { WAITS = sizeof waits / sizeof *waits };
static pid_t waiting[WAITS];

static void start_waiting(void)
{
	EXPECT(!pipe(wait_pipe));
	for (int i = 0; i < WAITS; i++) {
		waiting[i] = fork();
		EXPECT(waiting[i] >= 0);
		if (waiting[i]) continue;
		char *mine = map(MIB, RW, ANONYMOUS); /* so that there is something to fold in each */
		fill(mine, MIB, (uint64_t)i);
		close(wait_pipe[1]);
		waits[i]();
		EXPECT(is_filled(mine, MIB, (uint64_t)i));
		_exit(0);
	}
	close(wait_pipe[0]);
	pause_ms(30);
}

static void verify_waiting(void)
{
	for (int i = 0; i < WAITS; i++) EXPECT(waitpid(waiting[i], 0, WNOHANG) == 0);
	close(wait_pipe[1]);
	for (int i = 0; i < WAITS; i++) expect_exit(waiting[i], 0);
	start_waiting();
}

static void waiting_calls(void)
{
	start_waiting();
	serve(0, verify_waiting);
}

/* ---- a child that is stopped stays stopped, and its parent hears nothing new about it -------------------------------------------------------- */

static pid_t stopped_child;
static volatile uint64_t *stopped_counter;

static void verify_stopped(void)
{
	int st;
	uint64_t before = *stopped_counter;
	pause_ms(20);
	EXPECT(*stopped_counter == before && waitpid(stopped_child, &st, WNOHANG | WUNTRACED | WCONTINUED) == 0);
	EXPECT(!kill(stopped_child, SIGCONT) && waitpid(stopped_child, &st, WCONTINUED) == stopped_child && WIFCONTINUED(st));
	while (*stopped_counter < before + 100) pause_ms(1);
	EXPECT(!kill(stopped_child, SIGSTOP) && waitpid(stopped_child, &st, WUNTRACED) == stopped_child);
	EXPECT(WIFSTOPPED(st) && WSTOPSIG(st) == SIGSTOP);
}

static void *count_up(void *mine)
{
	for (uint64_t lap = 0;; lap++) {
		EXPECT(is_filled(mine, MIB, 1));
		stopped_counter[0]++;
		usleep(50);
	}
	return 0;
}

static void stopped(void)
{
	int st;
	stopped_counter = map(PAGE_BYTES, RW, MAP_SHARED | MAP_ANONYMOUS);
	if (!(stopped_child = fork())) {
		pthread_t t;
		char *mine = map(MIB, RW, ANONYMOUS);
		fill(mine, MIB, 1);
		pthread_create(&t, 0, count_up, mine);
		count_up(mine);
	}
	pause_ms(10);
	EXPECT(!kill(stopped_child, SIGSTOP) && waitpid(stopped_child, &st, WUNTRACED) == stopped_child && WIFSTOPPED(st));
	serve(0, verify_stopped);
}

/* ---- stop and continue, all the time, from outside: the state that was asked for last is the one that holds ------------------------------------- */

static volatile uint64_t *stop_rounds;

static void verify_stop_storm(void)
{
	for (uint64_t before = *stop_rounds; *stop_rounds < before + 20;) pause_ms(1);
}

static void stop_storm(void)
{
	stop_rounds = map(PAGE_BYTES, RW, MAP_SHARED | MAP_ANONYMOUS);
	stopped_counter = map(PAGE_BYTES, RW, MAP_SHARED | MAP_ANONYMOUS);
	if (!(stopped_child = fork())) {
		pthread_t t;
		char *mine = map(4 * MIB, RW, ANONYMOUS);
		fill(mine, 4 * MIB, 1);
		pthread_create(&t, 0, count_up, mine);
		count_up(mine);
	}
	pid_t child = stopped_child;
	if (!fork()) { /* not its parent, so that no wait tells */
		for (;; ++*stop_rounds) {
			kill(child, SIGSTOP);
			usleep(300);
			kill(child, SIGCONT);
			uint64_t before = *stopped_counter;
			for (int i = 0; *stopped_counter < before + 3; i++) {
				EXPECT(i < 20000);
				usleep(500);
			}
		}
	}
	serve(0, verify_stop_storm);
}

BEHAVIOURS({"timers", timers}, {"flood", flood}, {"faults", faults}, {"traps", traps}, {"trap_ignored", trap_ignored},
	   {"trap_pending", trap_pending}, {"alternate_stack", alternate_stack}, {"blocked", blocked},
	   {"waiting_calls", waiting_calls}, {"stopped", stopped}, {"stop_storm", stop_storm})
