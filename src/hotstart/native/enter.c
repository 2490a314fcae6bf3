/* hotstart-enter: the agent's hand in a container that another program made.
 *
 * usage: hotstart-enter take PID INIT_FD ENVIRONMENT_FD -- COMMAND...                                       (x86_64)
 *            makes process PID, the first of a container, execute the program open as INIT_FD, as "hotstart-podinit -- COMMAND...",
 *            with the variables in ENVIRONMENT_FD (each ended by a zero byte). If that cannot be, PID goes on as it was.
 *        hotstart-enter run PID [OPTION...] [-- PROGRAM ARG...]
 *            joins PID's namespaces, does what the options say, and runs PROGRAM there; ends as it does
 *            -g FD         cgroup.procs file to join before (repeatable)
 *            -t            a private tmpfs at /run/hotstart, if there is none
 *            -b SRC|DST    bind the host's folder SRC at DST, read-only (repeatable)
 *            -k SRC|DST    copy the host's small file SRC to DST (repeatable)
 *            -u FD         file pack to lay out (docs/format.md)
 *            -K FD         keep FD open for PROGRAM (repeatable)
 *            -e PID        end with the caller, whose pid that is
 *        What stands as | is the byte 0x1f.
 *
 * Everything of the host enters as a descriptor, opened before the namespaces are joined; paths are the container's from then on.
 * Ends with 99 and a line on stderr if it fails itself.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/close_range.h>
#include <linux/mount.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/stat.h>
#include <sys/sendfile.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/user.h>
#include <sys/vfs.h>
#include <sys/wait.h>
#include <unistd.h>

#include "filepack.h"

int mount(const char *, const char *, const char *, unsigned long, const void *); /* <sys/mount.h> clashes, see init.c */
int umount2(const char *, int);
enum { M_NOSUID = 2, M_NODEV = 4, M_PRIVATE = 1 << 18 };
enum { MAX_LIST = 64, SEPARATOR = 0x1f, STOP_TIMEOUT_MS = 5000, TMPFS = 0x01021994, SYSCALL_BYTES = 2 };
static const char support[] = "/run/hotstart";

static void die(const char *what)
{
	fprintf(stderr, "%s: %s\n", what, strerror(errno));
	exit(99);
}

/* ---- take -------------------------------------------------------------------------------------------------------- */

#ifdef __x86_64__
static struct user_regs_struct saved;
static uint8_t covered[8];
static uint64_t at;

/* Waits for the next stop of a traced process; the wait status, or -1 if it has ended or takes too long: a pod without requests
   of CPU may not be scheduled for seconds on a busy node. */
static int next_stop(pid_t pid)
{
	int st;
	for (int ms = 0; ms < STOP_TIMEOUT_MS * 10; ms++) {
		pid_t p = waitpid(pid, &st, __WALL | WNOHANG);
		if (p < 0) return -1;
		if (p == pid) return WIFSTOPPED(st) ? st : -1;
		usleep(100);
	}
	errno = ETIMEDOUT;
	return -1;
}

/* One system call, made by the stopped process; it stops again behind it. Signals that come meanwhile are for whoever it becomes. */
static int64_t call(pid_t pid, long number, uint64_t a, uint64_t b, uint64_t c, uint64_t d, uint64_t e, uint64_t f)
{
	struct user_regs_struct r = saved;
	r.rip = at;
	r.orig_rax = (uint64_t)-1; /* none to be restarted */
	r.rax = (uint64_t)number;
	r.rdi = a; r.rsi = b; r.rdx = c; r.r10 = d; r.r8 = e; r.r9 = f;
	if (ptrace(PTRACE_SETREGS, pid, 0, &r)) return -errno;
	for (int stops = 0; stops < 2;) { /* entry and exit, or the event of an exec */
		if (ptrace(PTRACE_SYSCALL, pid, 0, 0)) return -errno; /* a signal is dropped: it was for a program that ends here */
		int st = next_stop(pid);
		if (st < 0) return -ESRCH;
		if (st >> 8 == (SIGTRAP | (PTRACE_EVENT_EXEC << 8))) return 0;
		if (WSTOPSIG(st) == (SIGTRAP | 0x80)) stops++;
	}
	return ptrace(PTRACE_GETREGS, pid, 0, &r) ? -errno : (int64_t)r.rax;
}

/* The runtime's own process, about to become the container's: it has rights to give up before that. */
static int is_runtime(pid_t pid)
{
	char path[32], name[32] = "";
	snprintf(path, sizeof path, "/proc/%d/comm", pid);
	int f = open(path, O_RDONLY | O_CLOEXEC);
	if (f >= 0 && read(f, name, sizeof name - 1) < 0) *name = 0;
	if (f >= 0) close(f);
	return !strncmp(name, "runc:[", 6) || !strncmp(name, "crun", 4);
}

static size_t lay(char *buffer, size_t filled, const char *text, size_t bytes)
{
	memcpy(buffer + filled, text, bytes);
	return filled + bytes;
}

static int take(int argc, char **argv)
{
	static const char init_name[] = "hotstart-podinit";
	pid_t pid = atoi(argv[2]);
	int init = atoi(argv[3]), environment_fd = atoi(argv[4]);
	struct stat init_stat, environment_stat;
	if (argc < 7 || strcmp(argv[5], "--")) { errno = EINVAL; die("take"); }
	if (fstat(init, &init_stat) || fstat(environment_fd, &environment_stat)) die("take");

	/* Strings, then pointers to them, as the process will have them in its memory. */
	size_t strings = sizeof init_name + 3 + (size_t)environment_stat.st_size + 1, count = 2, variables = 0;
	for (int i = 6; i < argc; i++, count++) strings += strlen(argv[i]) + 1;
	char *text = calloc(1, strings + 16), *environment = mmap(0, (size_t)environment_stat.st_size + 1, PROT_READ, MAP_PRIVATE, environment_fd, 0);
	if (!text || environment == MAP_FAILED) die("memory");
	for (off_t i = 0; i < environment_stat.st_size; i++) variables += !environment[i];
	uint64_t *pointers = calloc(count + variables + 2, sizeof *pointers);
	size_t filled = 0, n = 0;
	pointers[n++] = filled;
	filled = lay(text, filled, init_name, sizeof init_name);
	pointers[n++] = filled;
	filled = lay(text, filled, "--", 3);
	for (int i = 6; i < argc; i++) {
		pointers[n++] = filled;
		filled = lay(text, filled, argv[i], strlen(argv[i]) + 1);
	}
	n++; /* the end of the arguments */
	size_t first_variable = n;
	for (off_t i = 0; i < environment_stat.st_size; i += (off_t)strlen(environment + i) + 1) {
		pointers[n++] = filled;
		filled = lay(text, filled, environment + i, strlen(environment + i) + 1);
	}
	size_t empty = filled; /* a zero byte */
	size_t table = (filled + 15) / 8 * 8, bytes = table + (n + 1) * sizeof *pointers;

	if (ptrace(PTRACE_SEIZE, pid, 0, PTRACE_O_TRACESYSGOOD | PTRACE_O_TRACEEXEC)) die("seize it");
	int st = 0;
	if (is_runtime(pid)) {
		while ((st = next_stop(pid)) >= 0 && st >> 16 != PTRACE_EVENT_EXEC) {
			if (ptrace(PTRACE_CONT, pid, 0, st >> 16 ? 0 : WSTOPSIG(st))) break;
		}
		if (st < 0 || ptrace(PTRACE_INTERRUPT, pid, 0, 0) || ptrace(PTRACE_CONT, pid, 0, 0)) die("wait until it is the container's");
	} else if (ptrace(PTRACE_INTERRUPT, pid, 0, 0)) {
		die("stop it");
	}
	while ((st = next_stop(pid)) >= 0 && st >> 16 != PTRACE_EVENT_STOP) {
		/* A signal, or an exec of its own: pass it on. Any stop makes the kernel forget that it was to be interrupted: again. */
		if (ptrace(PTRACE_INTERRUPT, pid, 0, 0) || ptrace(PTRACE_CONT, pid, 0, st >> 16 ? 0 : WSTOPSIG(st))) break;
	}
	if (st < 0) die("stop it");
	if (ptrace(PTRACE_GETREGS, pid, 0, &saved)) die("its registers");
	at = saved.rip & ~7UL; /* a word that does not cross into a page that may not be there */
	errno = 0;
	long word = ptrace(PTRACE_PEEKTEXT, pid, at, 0), changed = word;
	if (errno) die("its code");
	memcpy(covered, &word, sizeof word);
	memcpy(&changed, "\x0f\x05", SYSCALL_BYTES);
	if (ptrace(PTRACE_POKETEXT, pid, at, changed)) die("its code");

	const char *step = "memory for it";
	int64_t area = call(pid, SYS_mmap, 0, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, (uint64_t)-1, 0), file = -1, result = area;
	if (area < 0 && area > -4096) goto undo;
	for (size_t i = 0; i < n; i++) if (i < first_variable - 1 || i >= first_variable) pointers[i] += (uint64_t)area;
	pointers[first_variable - 1] = pointers[n] = 0;
	struct iovec mine[] = {{text, table}, {pointers, (n + 1) * sizeof *pointers}}, its = {(void *)area, bytes};
	if (table > strings + 16 || process_vm_writev(pid, mine, 2, &its, 1, 0) != (ssize_t)bytes) { result = -errno; goto undo; }
	step = "a file in its memory";
	result = file = call(pid, SYS_memfd_create, (uint64_t)area, 1 /* MFD_CLOEXEC */, 0, 0, 0, 0);
	if (file < 0) goto undo;
	char path[64];
	snprintf(path, sizeof path, "/proc/%d/fd/%d", pid, (int)file);
	int copy = open(path, O_WRONLY | O_CLOEXEC);
	if (copy < 0 || sendfile(copy, init, &(off_t){0}, (size_t)init_stat.st_size) != init_stat.st_size) {
		result = -errno;
		if (copy >= 0) close(copy);
		goto undo;
	}
	close(copy); /* open for writing, it could not be executed */
	step = "execute the init";
	result = call(pid, SYS_execveat, (uint64_t)file, (uint64_t)area + empty, (uint64_t)area + table,
		      (uint64_t)area + table + first_variable * sizeof *pointers, 0x1000 /* AT_EMPTY_PATH */, 0);
	if (result == 0) {
		ptrace(PTRACE_DETACH, pid, 0, 0);
		return 0;
	}
undo:
	if (file >= 0) call(pid, SYS_close, (uint64_t)file, 0, 0, 0, 0, 0);
	if (area > 0 || area < -4095) call(pid, SYS_munmap, (uint64_t)area, bytes, 0, 0, 0, 0);
	ptrace(PTRACE_POKETEXT, pid, at, word);
	ptrace(PTRACE_SETREGS, pid, 0, &saved);
	ptrace(PTRACE_DETACH, pid, 0, 0);
	errno = (int)-result;
	die(step);
	return 99;
}
#else
static int take(int argc, char **argv)
{
	(void)argc;
	errno = ENOSYS;
	die(argv[1]);
	return 99;
}
#endif

/* ---- run --------------------------------------------------------------------------------------------------------- */

struct pair { char *source, *target; };

static struct pair split(char *text)
{
	char *separator = strchr(text, SEPARATOR);
	if (!separator) { errno = EINVAL; die(text); }
	*separator = 0;
	return (struct pair){text, separator + 1};
}

/* The container's root, writable even where the container may not write to it: only the mount is read-only, not what it shows. */
static int writable_root(void)
{
	struct mount_attr attr = {.attr_clr = MOUNT_ATTR_RDONLY};
	int root = (int)syscall(SYS_open_tree, AT_FDCWD, "/", OPEN_TREE_CLONE | O_CLOEXEC);
	if (root < 0 || syscall(SYS_mount_setattr, root, "", AT_EMPTY_PATH, &attr, sizeof attr)) die("its root");
	return root;
}

static void make_folder(const char *path)
{
	struct stat st;
	if (!stat(path, &st) || !mkdir(path, 0755)) return;
	if (errno != EROFS) die(path);
	int root = writable_root();
	if (mkdirat(root, path + 1, 0755)) die(path);
	close(root);
}

static void make_folders(const char *path)
{
	char part[PATH_MAX];
	for (const char *p = path + 1;; p++) {
		if (*p != '/' && *p) continue;
		size_t n = (size_t)(p - path);
		if (n >= sizeof part) { errno = ENAMETOOLONG; die(path); }
		memcpy(part, path, n);
		part[n] = 0;
		make_folder(part);
		if (!*p) return;
	}
}

static void copy_to(int from, const char *target)
{
	char folder[PATH_MAX], buffer[65536];
	snprintf(folder, sizeof folder, "%s", target);
	char *slash = strrchr(folder, '/');
	if (slash && slash != folder) { *slash = 0; make_folders(folder); }
	int to = open(target, O_WRONLY | O_CREAT | O_TRUNC | O_NOFOLLOW | O_CLOEXEC, 0755);
	if (to < 0 && errno == EROFS) {
		int root = writable_root();
		to = openat(root, target + 1, O_WRONLY | O_CREAT | O_TRUNC | O_NOFOLLOW | O_CLOEXEC, 0755);
		close(root);
	}
	if (to < 0) die(target);
	for (ssize_t n; (n = read(from, buffer, sizeof buffer)) != 0;) {
		if (n < 0 || write(to, buffer, (size_t)n) != n) die(target);
	}
	close(to);
	close(from);
}

static void private_support(void)
{
	struct statfs fs;
	make_folders(support);
	if (!statfs(support, &fs) && fs.f_type == TMPFS) {
		char path[64];
		struct stat here, above;
		snprintf(path, sizeof path, "%s/..", support);
		if (!stat(support, &here) && !stat(path, &above) && here.st_dev != above.st_dev) return;
	}
	if (mount("tmpfs", support, "tmpfs", M_NOSUID | M_NODEV, "mode=755")) die(support);
	make_folder("/run/hotstart/mem");
	make_folder("/run/hotstart/renewal");
	if (chmod("/run/hotstart/renewal", 01777)) die("/run/hotstart/renewal"); /* for workers that are not root */
}

static int run(int argc, char **argv)
{
	static const char *const kinds[] = {"net", "ipc", "uts", "pid", "mnt"};
	struct pair binds[MAX_LIST], copies[MAX_LIST];
	int tree[MAX_LIST], file[MAX_LIST], keeps[MAX_LIST], n_binds = 0, n_copies = 0, n_keeps = 0, pack = -1, o, is_private = 0;
	char path[PATH_MAX], problem[256];
	if (argc < 3) { errno = EINVAL; die("run"); }
	const char *pid = argv[2];
	if (close_range(3, ~0U, CLOSE_RANGE_CLOEXEC)) die("close_range");
	optind = 3;
	while ((o = getopt(argc, argv, "+g:tb:k:u:K:e:")) != -1) {
		if (n_binds == MAX_LIST || n_copies == MAX_LIST || n_keeps == MAX_LIST) { errno = E2BIG; die("options"); }
		switch (o) {
		case 'g': if (write(atoi(optarg), "0", 1) != 1) die("join the control group"); break;
		case 't': is_private = 1; break;
		case 'b': binds[n_binds++] = split(optarg); break;
		case 'k': copies[n_copies++] = split(optarg); break;
		case 'u': pack = atoi(optarg); break;
		case 'K': keeps[n_keeps++] = atoi(optarg); break;
		case 'e':
			prctl(PR_SET_PDEATHSIG, SIGKILL);
			if (getppid() != atoi(optarg)) _exit(99);
			break;
		default: errno = EINVAL; die("option");
		}
	}
	/* Private: the node's mounts may be shared, and whatever is mounted on a copy of a shared one appears on all of them. */
	struct mount_attr readonly = {.attr_set = MOUNT_ATTR_RDONLY, .propagation = M_PRIVATE};
	for (int i = 0; i < n_binds; i++) {
		tree[i] = (int)syscall(SYS_open_tree, AT_FDCWD, binds[i].source, OPEN_TREE_CLONE | O_CLOEXEC);
		if (tree[i] < 0 || syscall(SYS_mount_setattr, tree[i], "", AT_EMPTY_PATH, &readonly, sizeof readonly)) die(binds[i].source);
	}
	for (int i = 0; i < n_copies; i++) {
		file[i] = open(copies[i].source, O_RDONLY | O_CLOEXEC);
		if (file[i] < 0) die(copies[i].source);
	}
	int spaces[sizeof kinds / sizeof *kinds];
	for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++) {
		snprintf(path, sizeof path, "/proc/%s/ns/%s", pid, kinds[i]);
		spaces[i] = open(path, O_RDONLY | O_CLOEXEC);
		if (spaces[i] < 0) die(path);
	}
	for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++) {
		if (setns(spaces[i], 0)) die(kinds[i]);
	}
	if (chdir("/")) die("/");
	umask(022);
	if (is_private) private_support();
	for (int i = 0; i < n_binds; i++) {
		make_folders(binds[i].target);
		umount2(binds[i].target, 2 | 8 /* MNT_DETACH | UMOUNT_NOFOLLOW */); /* of an earlier restore */
		if (syscall(SYS_move_mount, tree[i], "", AT_FDCWD, binds[i].target, MOVE_MOUNT_F_EMPTY_PATH)) die(binds[i].target);
	}
	if (pack >= 0 && filepack_unpack(pack, writable_root, problem, sizeof problem)) { errno = EINVAL; die(problem); }
	for (int i = 0; i < n_copies; i++) copy_to(file[i], copies[i].target);
	if (optind >= argc) return 0;
	pid_t program = fork(); /* the first one in that pid namespace */
	if (program < 0) die("fork");
	if (program == 0) {
		for (int i = 0; i < n_keeps; i++) fcntl(keeps[i], F_SETFD, 0);
		execv(argv[optind], argv + optind);
		die(argv[optind]);
	}
	int st;
	while (waitpid(program, &st, 0) < 0 && errno == EINTR) { }
	return WIFEXITED(st) ? WEXITSTATUS(st) : 128 + WTERMSIG(st);
}

int main(int argc, char **argv)
{
	if (argc >= 6 && !strcmp(argv[1], "take")) return take(argc, argv);
	if (argc >= 3 && !strcmp(argv[1], "run")) return run(argc, argv);
	errno = EINVAL;
	die("usage");
	return 99;
}
