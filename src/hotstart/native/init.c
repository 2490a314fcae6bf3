/* hotstart-init: the first process of a sandbox.
 *
 * Owns the sandbox: makes its namespaces and mounts, lays out the files that belong to a snapshot, starts one
 * program in it (a worker, or CRIU restoring one), reaps, forwards signals, pumps the worker's output to a log and
 * relays connections from the host. It stays for as long as the worker lives and is never part of a checkpoint.
 * It knows nothing of snapshots, stores or plans: the caller opens every descriptor and passes every decision.
 *
 * usage: hotstart-init OPTION... -- PROGRAM ARG...
 *   -s FD            status: one line an event, "NAME BEGAN ENDED [DETAIL]", in seconds of CLOCK_MONOTONIC
 *   -l FD            lifeline: end of file before a byte arrives means that the caller died: end everything
 *   -o FD            log: receives what the worker writes to stdout and stderr
 *   -x FD            result: the root's wait status is written here as text when it ends
 *   -d FD            door: listening unix socket; a client sends a port (2 bytes, network order) and may go on at once;
 *                    it gets the byte 0x06 once it is connected to that port inside, or end of file if that is refused
 *   -f FD|PORT       publish: listening TCP socket of the host, relayed to PORT inside
 *   -g FD            cgroup.procs file to join before anything else (repeatable)
 *   -h NAME          host name inside
 *   -c DIR           working directory of PROGRAM
 *   -b SRC|DST       bind SRC at DST, read-only; -B: writable (repeatable); taken before the private tmpfs hide SRC
 *   -k SRC|DST       copy the small file SRC to DST (under /run) (repeatable)
 *   -u FD            file pack (docs/format.md) to lay out under /run, /tmp and /dev/shm
 *   -p PID           the root's pid inside; the worker is started with it, a restored tree has it
 *   -r FD            restore: PROGRAM is CRIU; the write end of the log pipe is passed to it as descriptor FD
 *   -K FD            keep FD open for PROGRAM (repeatable)
 *   -n DIR           renewal: made for a worker; whoever of a restored tree has left a file named like its pid there gets
 *                    SIGURG, and says in DIR/.answers, "PID [WHAT IT COULD NOT]", that it has renewed itself
 *   -P FD            PROGRAM ARG... is two commands, separated by "--": a page server (CRIU's), which listens in the folder FD,
 *                    and the restore that sends it a userfaultfd for each process
 *   -m FD|DST        attach at DST (under /run) the mount FD that is nowhere yet (repeatable)
 *   -e FD            entrance: a restored tree is renewed and can be reached once a byte comes there; until then whoever restores
 *                    its device state is at work
 *   -w FD            socket of whoever those mounts are answered by: end of file means that memory cannot be had any more: end
 *                    everything; what it says before goes to the log
 *
 * What stands as | is the byte 0x1f: paths may hold anything that people type.
 *
 * Mounts (kernel 5.12+): the host's root, read-only, at the same paths; fresh /proc; private tmpfs /run, /tmp, /dev/shm.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/close_range.h>
#include <linux/filter.h>
#include <linux/mount.h>
#include <linux/seccomp.h>
#include <net/if.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "filepack.h"
#include "iouring.h"
#include "renewal.h"

/* glibc 2.36's <sys/mount.h> clashes with <linux/mount.h>; these few are all that is needed of it. */
int mount(const char *, const char *, const char *, unsigned long, const void *);
enum { M_NOSUID = 2, M_NODEV = 4, M_NOEXEC = 8, M_REC = 16384, M_PRIVATE = 1 << 18 };

enum { MAX_LIST = 64, SEPARATOR = 0x1f };

struct pair { char *source, *target; int writable; };
struct publish { int fd, port; };

static struct {
	int status, lifeline, log, result, door, pack, restore_fd, is_restore, root_pid, pages, source, entrance;
	char *hostname, *workdir, *renewal;
	struct pair binds[MAX_LIST], copies[MAX_LIST];
	struct publish publishes[MAX_LIST];
	struct attached { int fd; char *target; } attached[MAX_LIST];
	int cgroups[MAX_LIST], keeps[MAX_LIST];
	int n_binds, n_copies, n_publishes, n_attached, n_cgroups, n_keeps;
} opt = {.status = -1, .lifeline = -1, .log = -1, .result = -1, .door = -1, .pack = -1, .pages = -1,
	.source = -1, .entrance = -1};

static struct rlimit files_of_program;

static void event(const char *name, double began, double ended, const char *detail)
{
	char line[512];
	int n = snprintf(line, sizeof line, "%s %.6f %.6f %s\n", name, began, ended, detail);
	if (opt.status >= 0 && write(opt.status, line, (size_t)n) < 0) { /* the caller went away: nothing to tell */ }
}

static void die(const char *what)
{
	char detail[400];
	snprintf(detail, sizeof detail, "%s: %s", what, strerror(errno));
	double now = monotonic();
	event("error", now, now, detail);
	_exit(99);
}

/* ---- options ---------------------------------------------------------------------------------------------- */

static struct pair split_pair(char *text, int writable)
{
	char *separator = strchr(text, SEPARATOR);
	if (!separator) { errno = EINVAL; die(text); }
	*separator = 0;
	return (struct pair){.source = text, .target = separator + 1, .writable = writable};
}

#define ADD(list, count, value) \
	do { \
		if ((count) == MAX_LIST) { errno = E2BIG; die("too many options"); } \
		(list)[(count)++] = (value); \
	} while (0)

static char **parse(int argc, char **argv)
{
	int o;
	while ((o = getopt(argc, argv, "+s:l:o:x:d:f:g:h:c:b:B:k:u:p:r:K:m:n:w:P:e:")) != -1) {
		switch (o) {
		case 's': opt.status = atoi(optarg); break;
		case 'l': opt.lifeline = atoi(optarg); break;
		case 'o': opt.log = atoi(optarg); break;
		case 'x': opt.result = atoi(optarg); break;
		case 'd': opt.door = atoi(optarg); break;
		case 'h': opt.hostname = optarg; break;
		case 'c': opt.workdir = optarg; break;
		case 'u': opt.pack = atoi(optarg); break;
		case 'n': opt.renewal = optarg; break;
		case 'p': opt.root_pid = atoi(optarg); break;
		case 'r': opt.is_restore = 1; opt.restore_fd = atoi(optarg); break;
		case 'P': opt.pages = atoi(optarg); break;
		case 'g': ADD(opt.cgroups, opt.n_cgroups, atoi(optarg)); break;
		case 'K': ADD(opt.keeps, opt.n_keeps, atoi(optarg)); break;
		case 'b': ADD(opt.binds, opt.n_binds, split_pair(optarg, 0)); break;
		case 'B': ADD(opt.binds, opt.n_binds, split_pair(optarg, 1)); break;
		case 'k': ADD(opt.copies, opt.n_copies, split_pair(optarg, 0)); break;
		case 'w': opt.source = atoi(optarg); break;
		case 'e': opt.entrance = atoi(optarg); break;
		case 'm': {
			struct pair p = split_pair(optarg, 0);
			struct attached a = {atoi(p.source), p.target};
			ADD(opt.attached, opt.n_attached, a);
			break;
		}
		case 'f': {
			struct pair p = split_pair(optarg, 0);
			struct publish f = {atoi(p.source), atoi(p.target)};
			ADD(opt.publishes, opt.n_publishes, f);
			break;
		}
		default: errno = EINVAL; die("unknown option");
		}
	}
	if (optind >= argc) { errno = EINVAL; die("no program"); }
	return argv + optind;
}

/* ---- mounts and files ------------------------------------------------------------------------------------- */

static void make_folders(const char *path)
{
	char part[PATH_MAX];
	for (const char *p = path + 1;; p++) {
		if (*p != '/' && *p) continue;
		size_t n = (size_t)(p - path);
		if (n >= sizeof part) { errno = ENAMETOOLONG; die(path); }
		memcpy(part, path, n);
		part[n] = 0;
		mkdir(part, 0755);
		if (!*p) return;
	}
}

static void make_parent(const char *path)
{
	char folder[PATH_MAX];
	snprintf(folder, sizeof folder, "%s", path);
	char *slash = strrchr(folder, '/');
	if (slash && slash != folder) { *slash = 0; make_folders(folder); }
}

static void copy_small(const struct pair *p, int from)
{
	char buffer[65536];
	make_parent(p->target);
	int to = open(p->target, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0755);
	if (to < 0) die(p->target);
	for (ssize_t n; (n = read(from, buffer, sizeof buffer)) != 0;) {
		if (n < 0 || write(to, buffer, (size_t)n) != n) die(p->source);
	}
	close(to);
	close(from);
}

static void private_tmpfs(const char *path, const char *options)
{
	if (mount("tmpfs", path, "tmpfs", M_NOSUID | M_NODEV, options)) die(path);
}

static void make_mounts(void)
{
	int tree[MAX_LIST], file[MAX_LIST];
	if (mount("none", "/", 0, M_REC | M_PRIVATE, 0)) die("make / private");
	/* Take hold of what the private tmpfs are about to hide, and of writable folders before / becomes read-only. */
	for (int i = 0; i < opt.n_binds; i++) {
		struct pair *b = &opt.binds[i];
		struct mount_attr attr = {.attr_set = b->writable ? 0 : MOUNT_ATTR_RDONLY};
		tree[i] = (int)syscall(SYS_open_tree, AT_FDCWD, b->source, OPEN_TREE_CLONE | O_CLOEXEC);
		if (tree[i] < 0) die(b->source);
		if (syscall(SYS_mount_setattr, tree[i], "", AT_EMPTY_PATH, &attr, sizeof attr)) die(b->source);
	}
	for (int i = 0; i < opt.n_copies; i++) {
		file[i] = open(opt.copies[i].source, O_RDONLY | O_CLOEXEC);
		if (file[i] < 0) die(opt.copies[i].source);
	}
	struct mount_attr readonly = {.attr_set = MOUNT_ATTR_RDONLY};
	if (syscall(SYS_mount_setattr, AT_FDCWD, "/", AT_RECURSIVE, &readonly, sizeof readonly)) die("make / read-only");
	if (mount("proc", "/proc", "proc", M_NOSUID | M_NODEV | M_NOEXEC, 0)) die("/proc");
	private_tmpfs("/run", "mode=755");
	private_tmpfs("/tmp", "mode=1777");
	private_tmpfs("/dev/shm", "mode=1777");
	for (int i = 0; i < opt.n_binds; i++) {
		struct stat st;
		if (fstat(tree[i], &st)) die(opt.binds[i].source);
		if (S_ISDIR(st.st_mode)) {
			make_folders(opt.binds[i].target);
		} else {
			make_parent(opt.binds[i].target);
			close(open(opt.binds[i].target, O_WRONLY | O_CREAT | O_CLOEXEC, 0644));
		}
		if (syscall(SYS_move_mount, tree[i], "", AT_FDCWD, opt.binds[i].target, MOVE_MOUNT_F_EMPTY_PATH))
			die(opt.binds[i].target);
		close(tree[i]);
	}
	for (int i = 0; i < opt.n_attached; i++) {
		make_folders(opt.attached[i].target);
		if (syscall(SYS_move_mount, opt.attached[i].fd, "", AT_FDCWD, opt.attached[i].target, MOVE_MOUNT_F_EMPTY_PATH))
			die(opt.attached[i].target);
		close(opt.attached[i].fd);
	}
	for (int i = 0; i < opt.n_copies; i++) copy_small(&opt.copies[i], file[i]);
	if (opt.renewal && !opt.is_restore) {
		make_folders(opt.renewal);
		if (chmod(opt.renewal, 01777)) die(opt.renewal); /* for processes that give up being root */
	}
}

static void loopback_up(void)
{
	int s = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
	struct ifreq r = {.ifr_flags = IFF_UP | IFF_RUNNING | IFF_LOOPBACK};
	strcpy(r.ifr_name, "lo");
	if (s < 0 || ioctl(s, SIOCSIFFLAGS, &r)) die("loopback");
	close(s);
}

/* ---- the program ------------------------------------------------------------------------------------------ */

static void next_pid(int pid)
{
	char text[16];
	int n = snprintf(text, sizeof text, "%d", pid - 1);
	int f = open("/proc/sys/kernel/ns_last_pid", O_WRONLY | O_CLOEXEC);
	if (f < 0 || write(f, text, (size_t)n) != n) die("ns_last_pid");
	close(f);
}

static double program_began;

/* Returns once the program runs, or could not be started: then an event has told why, and it is about to be reaped. */
static pid_t start(char **program, int log_write)
{
	int running[2];
	char none_comes;
	if (pipe2(running, O_CLOEXEC)) die("pipe");
	if (!opt.is_restore) next_pid(opt.root_pid);
	program_began = monotonic();
	pid_t pid = fork();
	if (pid < 0) die("fork");
	if (pid) {
		close(running[1]);
		while (read(running[0], &none_comes, 1) < 0 && errno == EINTR) { }
		close(running[0]);
		return pid;
	}
	sigset_t none;
	sigemptyset(&none);
	sigprocmask(SIG_SETMASK, &none, 0);
	signal(SIGPIPE, SIG_DFL);
	setrlimit(RLIMIT_NOFILE, &files_of_program);
	for (int i = 0; i < opt.n_keeps; i++) fcntl(opt.keeps[i], F_SETFD, 0);
	if (opt.is_restore) {
		if (log_write != opt.restore_fd) {
			if (dup2(log_write, opt.restore_fd) < 0) die("log descriptor (is the limit of open files too low?)");
		} else {
			fcntl(log_write, F_SETFD, 0);
		}
	} else {
		dup2(log_write, 1);
		dup2(log_write, 2);
		setsid();
		/* Orphans stay in the root's tree: CRIU checkpoints that tree and nothing else. */
		prctl(PR_SET_CHILD_SUBREAPER, 1);
		if (hide_io_uring()) die("seccomp");
	}
	if (opt.workdir && chdir(opt.workdir)) die(opt.workdir);
	execvp(program[0], program);
	die(program[0]);
	return -1;
}

/* ---- pages on demand ------------------------------------------------------------------------------------------ */

/* A page that its server has not brought must never be taken for zeros, which is what the kernel gives once the last descriptor
 * of a userfaultfd is closed. So the restore meets us where it expects the server: we hold a descriptor of each, and if the
 * server fails, everything is killed before we let go. Not covered is a process forked while pages are still being brought,
 * whose descriptor only the server has: for the moment between the server's death and our noticing. For trees of one process only:
 * the server polls what it has closed and we hold (CRIU 4.2.1). */
enum { FINISHED = 0x52535446 }; /* criu/uffd.c, LAZY_PAGES_RESTORE_FINISHED */
static const char page_socket[] = "lazy-pages.socket"; /* LAZY_PAGES_SOCK_NAME */
static pid_t page_server;
static int to_page_server = -1, page_listener = -1, *held, n_held;

static struct sockaddr_un page_address(void)
{
	struct sockaddr_un a = {.sun_family = AF_UNIX};
	snprintf(a.sun_path, sizeof a.sun_path, "/proc/self/fd/%d/%s", opt.pages, page_socket);
	return a;
}

static void start_page_server(char **program)
{
	struct sockaddr_un address = page_address();
	page_server = fork();
	if (page_server < 0) die("fork");
	if (!page_server) {
		sigset_t none;
		sigemptyset(&none);
		sigprocmask(SIG_SETMASK, &none, 0);
		signal(SIGPIPE, SIG_DFL);
		for (int i = 0; i < opt.n_keeps; i++) fcntl(opt.keeps[i], F_SETFD, 0);
		execvp(program[0], program);
		_exit(127);
	}
	to_page_server = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	while (connect(to_page_server, (struct sockaddr *)&address, sizeof address)) {
		int st;
		if (errno != ENOENT && errno != ECONNREFUSED) die("page server");
		if (waitpid(page_server, &st, WNOHANG)) { errno = ECHILD; die("the page server did not start"); }
		usleep(200);
	}
	unlink(address.sun_path); /* it has one client; the next one is ours */
	page_listener = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	if (bind(page_listener, (struct sockaddr *)&address, sizeof address) || listen(page_listener, 1)) die(page_socket);
}

static int keep_and_pass(int from) /* the userfaultfd that follows a pid; 0: nothing went wrong */
{
	char byte, control[CMSG_SPACE(sizeof(int))];
	struct iovec data = {&byte, 1};
	struct msghdr m = {.msg_iov = &data, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control};
	if (recvmsg(from, &m, MSG_CMSG_CLOEXEC) != 1 || !CMSG_FIRSTHDR(&m)) return -1;
	int *more = realloc(held, sizeof *held * (size_t)(n_held + 1));
	if (!more) return -1;
	held = more;
	memcpy(&held[n_held++], CMSG_DATA(CMSG_FIRSTHDR(&m)), sizeof(int));
	return sendmsg(to_page_server, &m, MSG_NOSIGNAL) == 1 ? 0 : -1;
}

static int pass_to_page_server(int from) /* one message: a pid with its descriptor, a zombie's negated pid, or FINISHED */
{
	int32_t word;
	if (recv(from, &word, sizeof word, MSG_WAITALL) != sizeof word) return -1;
	if (send(to_page_server, &word, sizeof word, MSG_NOSIGNAL) != sizeof word) return -1;
	return word == FINISHED || word < 0 ? 0 : keep_and_pass(from);
}

static void let_pages_go(void)
{
	while (n_held) close(held[--n_held]);
	page_server = 0;
}

/* ---- relays: connections from the host to ports inside ----------------------------------------------------- */

enum { RELAY_BYTES = 65536, CONNECTED = 0x06 };
enum kind { SIGNALS, LIFELINE, LOG, SOURCE, ENTRANCE, DOOR, PUBLISH, PAGES_DOOR, PAGES, END };

struct watch { enum kind kind; int fd, port; struct end *end; };
struct end {             /* one side of a relay; what is read from it waits in buffer for the other side */
	struct watch watch;
	struct end *other, *next_buried;
	char *buffer;
	size_t start, filled;
	int eof, shut, connecting, by_door, wants_port, events, accepted;
	int closed;
};

static int ep;
static struct end *graveyard;
static struct watch *crowded[MAX_LIST + 1]; /* listeners that wait until a descriptor is free again */
static int n_crowded, n_relays;

static void watch(struct watch *w, uint32_t events, int op)
{
	struct epoll_event e = {.events = events, .data.ptr = w};
	epoll_ctl(ep, op, w->fd, &e);
}

static void bury(struct end *e) /* freed after the batch of events: another event may still point at it */
{
	if (e->closed) return;
	e->closed = 1;
	close(e->watch.fd);
	free(e->buffer);
	e->next_buried = graveyard;
	graveyard = e;
	n_relays -= e->accepted;
	while (n_crowded) watch(crowded[--n_crowded], EPOLLIN, EPOLL_CTL_ADD);
}

static void end_relay(struct end *e)
{
	if (e->other) bury(e->other);
	bury(e);
}

static struct end *new_end(int fd, int port)
{
	struct end *e = calloc(1, sizeof *e);
	char *buffer = malloc(RELAY_BYTES);
	if (!e || !buffer) { free(e); free(buffer); close(fd); return 0; }
	e->watch = (struct watch){END, fd, port, e};
	e->buffer = buffer;
	return e;
}

static int dial(int port, int family)
{
	struct sockaddr_in v4 = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port),
				 .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
	struct sockaddr_in6 v6 = {.sin6_family = AF_INET6, .sin6_port = htons((uint16_t)port),
				  .sin6_addr = IN6ADDR_LOOPBACK_INIT};
	int one = 1, s = socket(family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
	if (s < 0) return -1;
	setsockopt(s, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
	int r = family == AF_INET ? connect(s, (struct sockaddr *)&v4, sizeof v4)
				  : connect(s, (struct sockaddr *)&v6, sizeof v6);
	if (r && errno != EINPROGRESS) { close(s); return -1; }
	return s;
}

static void arm(struct end *e)
{
	int events = 0;
	if (e->closed) return;
	if (!e->eof && e->filled < RELAY_BYTES && !e->connecting) events |= EPOLLIN;
	if (e->connecting || (e->other && e->other->filled)) events |= EPOLLOUT;
	if (events == e->events) return;
	/* Taken out altogether when it waits for the other side: EPOLLHUP cannot be masked, and would be reported without end. */
	watch(&e->watch, (uint32_t)events, !e->events ? EPOLL_CTL_ADD : events ? EPOLL_CTL_MOD : EPOLL_CTL_DEL);
	e->events = events;
}

static void connect_inside(struct end *client, int port)
{
	int s = dial(port, AF_INET);
	if (s < 0) s = dial(port, AF_INET6);
	struct end *inside = s < 0 ? 0 : new_end(s, port);
	if (!inside) { bury(client); return; }
	inside->connecting = 1;
	inside->other = client;
	client->other = inside;
	inside->events = EPOLLOUT;
	watch(&inside->watch, EPOLLOUT, EPOLL_CTL_ADD);
}

static int most_relays(void)
{
	enum { OURS = 20 };
	struct rlimit files;
	getrlimit(RLIMIT_NOFILE, &files);
	return files.rlim_cur < OURS ? 0 : files.rlim_cur > 1 << 20 ? 1 << 19 : (int)(files.rlim_cur - OURS) / 2;
}

static void accept_from(struct watch *w)
{
	int one = 1, s = -1, most = most_relays();
	while (n_relays < most && (s = accept4(w->fd, 0, 0, SOCK_NONBLOCK | SOCK_CLOEXEC)) >= 0) {
		if (w->kind == PUBLISH) setsockopt(s, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
		struct end *e = new_end(s, w->port);
		if (!e) continue;
		n_relays++;
		e->accepted = 1;
		e->by_door = e->wants_port = w->kind == DOOR;
		e->events = EPOLLIN;
		watch(&e->watch, EPOLLIN, EPOLL_CTL_ADD);
		if (!e->wants_port) { connect_inside(e, w->port); arm(e); }
	}
	if (n_relays < most && errno != EMFILE && errno != ENFILE) return;
	watch(w, 0, EPOLL_CTL_DEL); /* who waits would be reported without end; the next relay that ends undoes this */
	crowded[n_crowded++] = w;
}

static int fill(struct end *e) /* 0: nothing went wrong */
{
	if (e->start) {
		memmove(e->buffer, e->buffer + e->start, e->filled);
		e->start = 0;
	}
	ssize_t n = read(e->watch.fd, e->buffer + e->filled, RELAY_BYTES - e->filled);
	if (n < 0) return errno != EAGAIN && errno != EINTR;
	if (n == 0) e->eof = 1;
	e->filled += (size_t)n;
	return 0;
}

static int drain(struct end *from, struct end *to)
{
	while (from->filled) {
		ssize_t n = send(to->watch.fd, from->buffer + from->start, from->filled, MSG_NOSIGNAL);
		if (n < 0) return errno != EAGAIN && errno != EINTR;
		from->start += (size_t)n;
		from->filled -= (size_t)n;
	}
	from->start = 0;
	if (from->eof && !to->shut) {
		shutdown(to->watch.fd, SHUT_WR);
		to->shut = 1;
	}
	return 0;
}

/* Whom e is connected to, or why it is not. Connecting to a port on which nobody listens can meet itself (simultaneous open)
 * if the kernel happens to choose that port for our side. */
static int connect_error(struct end *e, int *family)
{
	struct sockaddr_in6 self = {0}; /* the port lies at the same place in both families */
	socklen_t size = sizeof self, error_size = sizeof(int);
	int error = 0;
	getsockopt(e->watch.fd, SOL_SOCKET, SO_ERROR, &error, &error_size);
	getsockname(e->watch.fd, (struct sockaddr *)&self, &size);
	*family = self.sin6_family;
	return !error && ntohs(self.sin6_port) == e->watch.port ? ECONNREFUSED : error;
}

static void relay(struct end *e, uint32_t events)
{
	if (e->closed) return;
	if (e->connecting) {
		int family, error = connect_error(e, &family);
		if (error) {   /* nobody listens on 127.0.0.1: try ::1 once */
			int s = family == AF_INET && error == ECONNREFUSED ? dial(e->watch.port, AF_INET6) : -1;
			if (s < 0) { end_relay(e); return; }
			close(e->watch.fd);
			e->watch.fd = s;
			e->events = EPOLLOUT;
			watch(&e->watch, EPOLLOUT, EPOLL_CTL_ADD);
			return;
		}
		e->connecting = 0;
		if (e->other->by_door) e->buffer[e->filled++] = CONNECTED;
	}
	if ((events & (EPOLLIN | EPOLLHUP | EPOLLERR)) && !e->eof && e->filled < RELAY_BYTES && fill(e)) {
		end_relay(e);
		return;
	}
	if (e->wants_port) {
		if (e->filled >= 2) {
			int port = (unsigned char)e->buffer[0] << 8 | (unsigned char)e->buffer[1];
			e->start = 2;
			e->filled -= 2;
			e->wants_port = 0;
			connect_inside(e, port);
		} else if (e->eof) {
			bury(e);
		}
		arm(e);
		return;
	}
	struct end *other = e->other;
	if (!other->connecting && (drain(e, other) || drain(other, e))) { end_relay(e); return; }
	if (e->eof && other->eof && !e->filled && !other->filled) { end_relay(e); return; }
	/* A peer that reset while we still hold its bytes would spin on EPOLLHUP: nobody will read them. */
	if ((events & EPOLLERR) && e->eof) { end_relay(e); return; }
	arm(e);
	arm(other);
}

/* ---- renewal ------------------------------------------------------------------------------------------------ */

enum { MOST_PATIENCE_MS = 1000, STREAMED_PATIENCE_MS = 60000 };

/* Before anything from outside reaches the tree. Whoever waits for a page that is still on its way sleeps like one that waits for a disk. */
static void renew_tree(void)
{
	double began = monotonic();
	char unrenewed[300] = "";
	if (opt.renewal) renew(opt.renewal, opt.source >= 0 ? STREAMED_PATIENCE_MS : MOST_PATIENCE_MS, unrenewed, sizeof unrenewed);
	event("renewed", began, monotonic(), unrenewed);
}

/* ---- main loop -------------------------------------------------------------------------------------------- */

/* What is in the pipe and no more: a worker that never stops writing must not keep us from the rest, nor from ending. */
static void pump_log(int from)
{
	char buffer[65536];
	ssize_t n = 1;
	for (int reads = 0; reads < 16 && (n = read(from, buffer, sizeof buffer)) > 0; reads++) {
		/* Disk full: the worker must not block on its log. */
		for (ssize_t done = 0, w; opt.log >= 0 && done < n && (w = write(opt.log, buffer + done, (size_t)(n - done))) > 0;)
			done += w;
	}
	if (n == 0) epoll_ctl(ep, EPOLL_CTL_DEL, from, 0); /* nobody can write any more; this would be reported without end */
}

static void finish(int wait_status, int log_read)
{
	char text[32];
	int n = snprintf(text, sizeof text, "%d\n", wait_status);
	pump_log(log_read);
	if (opt.result >= 0 && write(opt.result, text, (size_t)n) < 0) { /* disk full: the caller sees us gone all the same */ }
	text[n - 1] = 0; /* the line has an end of its own */
	event("exit", program_began, monotonic(), text);
	_exit(0); /* the kernel ends everything else in this pid namespace */
}

/* Its memory is incomplete for good: nothing of it may run on. */
static void end_without_pages(int log_read)
{
	static const char why[] = "hotstart: the page server failed; the replica was ended, for its memory is not complete\n";
	double now = monotonic();
	kill(-1, SIGKILL); /* all but us */
	while (waitpid(-1, 0, 0) > 0 || errno == EINTR) { }
	pump_log(log_read);
	if (opt.log >= 0 && write(opt.log, why, sizeof why - 1) < 0) { /* disk full */ }
	event("error", now, now, "the page server failed, the memory of what was restored is not complete");
	finish(SIGKILL, log_read);
}

/* The pages that are not here yet will never come: whoever touches one would get SIGBUS, or an error from a system call that he may
 * take for another one. So all end at once. */
static void lose_source(pid_t root, int log_read)
{
	char why[512];
	ssize_t n = read(opt.source, why, sizeof why);
	if (n < 0 && (errno == EAGAIN || errno == EINTR)) return;
	if (n > 0) {
		if (opt.log >= 0 && write(opt.log, why, (size_t)n) < 0) { /* disk full */ }
		return;
	}
	kill(-1, SIGKILL);
	if (waitpid(root, 0, 0) < 0) { /* CRIU had not made it yet */ }
	finish(SIGBUS, log_read);
}

static int reap(pid_t program, pid_t root, int log_read) /* 1 once a restore has succeeded */
{
	int st, restored = 0, lost = 0;
	for (pid_t p; (p = waitpid(-1, &st, WNOHANG)) > 0;) {
		if (p == root) finish(st, log_read);
		if (p == page_server && st) lost = 1;
		else if (p == page_server) let_pages_go();
		if (p != program || !opt.is_restore) continue;
		if (!WIFEXITED(st) || WEXITSTATUS(st)) {
			char text[32];
			snprintf(text, sizeof text, "%d", WIFEXITED(st) ? WEXITSTATUS(st) : 128 + WTERMSIG(st));
			event("failed", program_began, monotonic(), text);
			_exit(98);
		}
		event("restored", program_began, monotonic(), "");
		restored = 1;
	}
	if (lost) end_without_pages(log_read); /* not before: if the restore failed, that is the reason */
	return restored;
}

static void open_doors(struct watch *door, struct watch *doors)
{
	if (door->fd >= 0) watch(door, EPOLLIN, EPOLL_CTL_ADD);
	for (int i = 0; i < opt.n_publishes; i++) watch(&doors[i], EPOLLIN, EPOLL_CTL_ADD);
}

static void serve(pid_t program, int signals, int log_read)
{
	pid_t root = opt.is_restore ? opt.root_pid : program;
	struct watch sig = {.kind = SIGNALS, .fd = signals}, life = {.kind = LIFELINE, .fd = opt.lifeline};
	struct watch log = {.kind = LOG, .fd = log_read}, door = {.kind = DOOR, .fd = opt.door};
	struct watch pages_door = {.kind = PAGES_DOOR, .fd = page_listener}, pages = {.kind = PAGES};
	struct watch source = {.kind = SOURCE, .fd = opt.source}, entrance = {.kind = ENTRANCE, .fd = opt.entrance};
	struct watch doors[MAX_LIST];
	if (page_listener >= 0) watch(&pages_door, EPOLLIN, EPOLL_CTL_ADD);
	watch(&sig, EPOLLIN, EPOLL_CTL_ADD);
	for (int i = 0; i < opt.n_publishes; i++)
		doors[i] = (struct watch){.kind = PUBLISH, .fd = opt.publishes[i].fd, .port = opt.publishes[i].port};
	watch(&log, EPOLLIN, EPOLL_CTL_ADD);
	if (opt.lifeline >= 0) watch(&life, EPOLLIN, EPOLL_CTL_ADD);
	if (opt.source >= 0) watch(&source, EPOLLIN, EPOLL_CTL_ADD);
	if (!opt.is_restore) open_doors(&door, doors);
	for (;;) {
		struct epoll_event ready[64];
		int n = epoll_wait(ep, ready, 64, -1);
		for (int i = 0; i < n; i++) {
			struct watch *w = ready[i].data.ptr;
			switch (w->kind) {
			case SIGNALS: {
				struct signalfd_siginfo s;
				while (read(signals, &s, sizeof s) == sizeof s) {
					if (s.ssi_signo != SIGCHLD) kill(root, (int)s.ssi_signo);
				}
				if (reap(program, root, log_read)) {
					program = 0; /* its pid may be another's one day */
					if (opt.entrance >= 0) {
						watch(&entrance, EPOLLIN, EPOLL_CTL_ADD);
						break;
					}
					renew_tree();
					open_doors(&door, doors);
				}
				break;
			}
			case LIFELINE: {
				char byte;
				ssize_t got = read(w->fd, &byte, 1);
				if (got == 0) _exit(97); /* the caller died before it took over */
				if (got == 1) {
					close(w->fd);
					if (opt.status >= 0) { close(opt.status); opt.status = -1; }
				}
				break;
			}
			case ENTRANCE: { /* its end without a byte: the caller died, and so do we by the lifeline */
				char byte;
				ssize_t got = read(w->fd, &byte, 1);
				close(w->fd);
				if (got != 1) break;
				renew_tree();
				open_doors(&door, doors);
				break;
			}
			case LOG: pump_log(log_read); break;
			case SOURCE: lose_source(root, log_read); break;
			case PAGES_DOOR:
				pages.fd = accept4(w->fd, 0, 0, SOCK_CLOEXEC);
				if (pages.fd < 0) break;
				close(w->fd);
				watch(&pages, EPOLLIN, EPOLL_CTL_ADD);
				break;
			case PAGES:
				if (!pass_to_page_server(w->fd)) break;
				close(w->fd); /* the restore has ended; so the server learns it */
				close(to_page_server);
				break;
			case DOOR: case PUBLISH: accept_from(w); break;
			case END: relay(w->end, ready[i].events); break;
			}
		}
		for (struct end *e; (e = graveyard); free(e)) graveyard = e->next_buried;
	}
}

static void nonblocking(int fd)
{
	if (fd >= 0) fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK);
}

static void init(char **program, double began)
{
	sigset_t all;
	int log_pipe[2];
	char problem[256];
	sigfillset(&all);
	sigprocmask(SIG_BLOCK, &all, 0);
	signal(SIGPIPE, SIG_IGN);
	setsid();
	/* Every connection takes two descriptors here. The program keeps the limit that we were given. */
	getrlimit(RLIMIT_NOFILE, &files_of_program);
	setrlimit(RLIMIT_NOFILE, &(struct rlimit){files_of_program.rlim_max, files_of_program.rlim_max});
	double now = monotonic();
	event("namespaces", began, now, "");
	began = now;
	make_mounts();
	event("mounts", began, monotonic(), "");
	if (opt.pack >= 0) {
		began = monotonic();
		if (filepack_unpack(opt.pack, 0, problem, sizeof problem)) { errno = EINVAL; die(problem); }
		close(opt.pack);
		event("files", began, monotonic(), "");
	}
	began = monotonic();
	loopback_up();
	if (opt.hostname && sethostname(opt.hostname, strlen(opt.hostname))) die("hostname");
	if (pipe2(log_pipe, O_CLOEXEC)) die("pipe");
	int null = open("/dev/null", O_RDWR | O_CLOEXEC);
	dup2(null, 0);
	dup2(null, 1);
	dup2(null, 2);
	ep = epoll_create1(EPOLL_CLOEXEC);
	int signals = signalfd(-1, &all, SFD_NONBLOCK | SFD_CLOEXEC);
	if (opt.pages >= 0) {
		char **server = program;
		while (*program && strcmp(*program, "--")) program++;
		if (!*program) { errno = EINVAL; die("no page server"); }
		*program++ = 0;
		start_page_server(server);
	}
	pid_t pid = start(program, log_pipe[1]);
	struct stat log_stat;
	char log_inode[32];
	fstat(log_pipe[0], &log_stat);
	snprintf(log_inode, sizeof log_inode, "%lu", (unsigned long)log_stat.st_ino);
	event("started", began, program_began, log_inode); /* the caller must know the pipe: a restore gives the tree another one in its place */
	close(log_pipe[1]);
	for (int i = 0; i < opt.n_keeps; i++) close(opt.keeps[i]);
	nonblocking(log_pipe[0]);
	nonblocking(opt.lifeline);
	nonblocking(opt.door);
	nonblocking(opt.source);
	nonblocking(opt.entrance);
	for (int i = 0; i < opt.n_publishes; i++) nonblocking(opt.publishes[i].fd);
	serve(pid, signals, log_pipe[0]);
}

int main(int argc, char **argv)
{
	double began = monotonic();
	char **program = parse(argc, argv);
	if (close_range(3, ~0U, CLOSE_RANGE_CLOEXEC)) die("close_range");
	for (int i = 0; i < opt.n_cgroups; i++) {
		if (write(opt.cgroups[i], "0", 1) != 1) die("join the control group");
		close(opt.cgroups[i]);
	}
	if (unshare(CLONE_NEWPID | CLONE_NEWNS | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS)) die("namespaces");
	pid_t pid = fork(); /* the first child is the new namespace's first process */
	if (pid < 0) die("fork");
	if (!pid) init(program, began);
	char text[16];
	snprintf(text, sizeof text, "%d", pid);
	event("init", began, monotonic(), text);
	return 0;
}
