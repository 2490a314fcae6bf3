/* hotstart-podinit: the first process of a pod's container, in the place of the program that the image names.
 *
 * The agent of the node makes the container's own first process execute this (hotstart-enter, "take"), from a file that has no name:
 * nothing of the image is needed, and the arguments are the container's own command. It reaps, passes signals on, ends as the worker
 * does, and holds on where a container without it would have ended: while nothing runs yet, and when its worker has died and the
 * agent restores it again. Whenever the agent is not there it does what the container would have done by itself.
 *
 * usage: hotstart-podinit -- COMMAND...            as pid 1
 *        hook                                      as CRIU's action script: says "frozen", waits until the caller is done
 *
 * The agent takes descriptor 3 out of this process (pidfd_getfd): the other end of a socket whose messages are words.
 *   > hello                 < state STATE PID STATUS        whoever says so is the agent from now on
 *   > hold                                                  if the agent goes away, wait longer for the next one
 *   > restoring             < clear                         every process but this one has ended
 *   > restored PID          < renewed [WHO DID NOT]         the tree is there: PID is its root
 *   > failed                                                nothing was restored: wait for what comes next
 *   > cold                  < started PID                   run the command
 *   > end                                                   end as the worker did
 *   < ended STATUS                                          it has ended, with that status of wait(2); it waits for an order
 * End of file: the agent is gone. A restore that was under way is given up, and the command runs.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "iouring.h"
#include "renewal.h"

enum { OFFERED = 3, ROOT_PID = 1000, ORDER_MS = 5000, HELD_MS = 30000, RENEWAL_MS = 1000 };
static const char renewal_folder[] = "/run/hotstart/renewal";

static enum state { WAITING, RESTORING, RUNNING, ENDED } state;
static const char *const state_names[] = {"waiting", "restoring", "running", "ended"};
static char **command;
static int control = -1, connected, held, terminating, ended_with;
static pid_t root;
static double deadline;

__attribute__((format(printf, 1, 2))) static void say(const char *format, ...)
{
	char text[400];
	va_list arguments;
	va_start(arguments, format);
	int n = vsnprintf(text, sizeof text, format, arguments);
	va_end(arguments);
	if (send(control, text, (size_t)n, MSG_NOSIGNAL | MSG_DONTWAIT) < 0) { /* gone: the end of file says so */ }
}

/* A socket of which the other end lies ready to be taken. */
static void offer(void)
{
	int pair[2];
	if (control >= 0) close(control);
	connected = 0;
	if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair)) _exit(99);
	if (pair[0] == OFFERED) { pair[0] = fcntl(pair[0], F_DUPFD_CLOEXEC, OFFERED + 1); }
	if (pair[1] != OFFERED) {
		dup3(pair[1], OFFERED, O_CLOEXEC);
		close(pair[1]);
	}
	control = pair[0];
}

static void wait_for_order(int ms)
{
	state = WAITING;
	deadline = monotonic() + ms / 1000.0;
}

static void end_as(int wait_status)
{
	_exit(WIFEXITED(wait_status) ? WEXITSTATUS(wait_status) : 128 + WTERMSIG(wait_status));
}

static void end_all_others(void)
{
	int st;
	kill(-1, SIGKILL);
	while (waitpid(-1, &st, 0) > 0 || errno == EINTR) { }
	root = 0;
}

/* Low pids are for CRIU, which restores in this same namespace: the worker begins where they end. */
static void skip_pids(void)
{
	for (;;) {
		pid_t p = vfork();
		if (p == 0) _exit(0);
		if (p < 0) return;
		waitpid(p, 0, 0);
		if (p >= ROOT_PID - 1) return;
	}
}

/* Where nobody came to put the shim there the loader would complain of it in the worker's log. */
static void leave_out_missing_shim(void)
{
	static const char shim[] = "/run/hotstart/shim.so";
	const char *preload = getenv("LD_PRELOAD"), *rest;
	if (!preload || strncmp(preload, shim, sizeof shim - 1) || !access(shim, R_OK)) return;
	rest = preload + sizeof shim - 1;
	if (*rest == ':') setenv("LD_PRELOAD", rest + 1, 1);
	else unsetenv("LD_PRELOAD");
}

static void run_command(void)
{
	skip_pids();
	root = fork();
	if (root == 0) {
		sigset_t none;
		sigemptyset(&none);
		sigprocmask(SIG_SETMASK, &none, 0);
		setsid();
		prctl(PR_SET_CHILD_SUBREAPER, 1); /* orphans stay in the root's tree, which is what CRIU checkpoints */
		hide_io_uring();
		leave_out_missing_shim();
		execvp(command[0], command);
		fprintf(stderr, "%s: %s\n", command[0], strerror(errno));
		_exit(errno == ENOENT ? 127 : 126);
	}
	if (root < 0) _exit(98);
	state = RUNNING;
	say("started %d", root);
}

static void lose_worker(int wait_status)
{
	ended_with = wait_status;
	root = 0;
	if (terminating || !connected) end_as(wait_status);
	state = ENDED;
	deadline = monotonic() + ORDER_MS / 1000.0;
	say("ended %d", wait_status);
}

static void take_order(char *text)
{
	char who[300];
	if (!strcmp(text, "hello")) {
		if (!connected) close(OFFERED);
		connected = 1;
		say("state %s %d %d", state_names[state], root, ended_with);
		deadline = 0; /* it says what comes next, or is gone */
	} else if (!strcmp(text, "hold") && state == WAITING) {
		held = 1;
	} else if (!strcmp(text, "restoring") && (state == WAITING || state == ENDED)) {
		held = 0;
		end_all_others();
		state = RESTORING;
		deadline = 0;
		say("clear");
	} else if (!strncmp(text, "restored ", 9) && state == RESTORING) {
		root = (pid_t)atoi(text + 9);
		state = RUNNING;
		if (kill(root, 0)) { lose_worker(SIGKILL); return; } /* it was reaped while it was not known yet */
		renew(renewal_folder, RENEWAL_MS, who, sizeof who);
		say("renewed %s", who);
	} else if (!strcmp(text, "failed") && state == RESTORING) {
		end_all_others();
		wait_for_order(ORDER_MS);
	} else if (!strcmp(text, "cold") && (state == WAITING || state == ENDED)) {
		if (state == ENDED) end_all_others();
		run_command();
	} else if (!strcmp(text, "end") && state == ENDED) {
		end_as(ended_with);
	}
}

static void lose_agent(void)
{
	offer();
	if (state == RESTORING) {
		end_all_others();
		run_command();
	} else if (state == WAITING) {
		wait_for_order(held ? HELD_MS : ORDER_MS);
	} else if (state == ENDED) {
		end_as(ended_with);
	}
}

static void reap(void)
{
	int st, worker_ended = 0, its_status = 0;
	for (pid_t p; (p = waitpid(-1, &st, WNOHANG)) > 0;) {
		if (state == RUNNING && p == root) { worker_ended = 1; its_status = st; }
	}
	if (worker_ended) lose_worker(its_status);
}

static void pass_on(int signal)
{
	int asks_to_end = signal == SIGTERM || signal == SIGINT || signal == SIGQUIT;
	if (asks_to_end) terminating = 1;
	if (state == RUNNING) kill(root, signal);
	else if (asks_to_end) _exit(128 + signal);
}

static int hook(void)
{
	const char *action = getenv("CRTOOLS_SCRIPT_ACTION");
	if (!action || strcmp(action, "post-dump")) return 0;
	if (chdir("/run/hotstart/capture")) return 1;
	int frozen = open("frozen", O_RDWR | O_CLOEXEC), alive = open("alive", O_RDONLY | O_CLOEXEC);
	if (frozen < 0 || alive < 0 || write(frozen, "frozen\n", 7) != 7) return 1;
	while (flock(alive, LOCK_SH) && errno == EINTR) { }
	return access("done", F_OK) ? 1 : 0;
}

int main(int argc, char **argv)
{
	const char *slash = argc ? strrchr(argv[0], '/') : 0;
	if (argc && !strcmp(slash ? slash + 1 : argv[0], "hook")) return hook();
	if (argc < 3 || strcmp(argv[1], "--")) return 2;
	command = argv + 2;
	prctl(PR_SET_NAME, "hotstart-init");
	syscall(SYS_close_range, 3, ~0U, 0);
	sigset_t all;
	sigfillset(&all);
	sigprocmask(SIG_SETMASK, &all, 0);
	for (int s = 1; s < NSIG; s++) signal(s, SIG_DFL);
	int signals = signalfd(-1, &all, SFD_NONBLOCK | SFD_CLOEXEC);
	if (signals == OFFERED) { signals = fcntl(signals, F_DUPFD_CLOEXEC, 10); close(OFFERED); }
	offer();
	wait_for_order(ORDER_MS);
	for (;;) {
		struct pollfd p[] = {{.fd = signals, .events = POLLIN}, {.fd = control, .events = POLLIN}};
		double left = deadline - monotonic();
		int timed = deadline && (state == WAITING || state == ENDED);
		if (poll(p, 2, !timed ? -1 : left > 0 ? (int)(left * 1000) + 1 : 0) == 0) {
			if (state == WAITING) run_command();
			else if (state == ENDED) end_as(ended_with);
			continue;
		}
		for (struct signalfd_siginfo s; read(signals, &s, sizeof s) == sizeof s;) {
			if (s.ssi_signo != SIGCHLD) pass_on((int)s.ssi_signo);
		}
		reap();
		if (p[1].revents) {
			char text[64];
			ssize_t n = recv(control, text, sizeof text - 1, MSG_DONTWAIT);
			if (n > 0) {
				text[n] = 0;
				take_order(text);
			} else if (n == 0 || (errno != EAGAIN && errno != EINTR)) {
				lose_agent();
			}
		}
	}
}
