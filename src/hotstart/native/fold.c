/* hotstart-fold: freezes a process tree, copies chosen areas of memory into memory files, and maps those files in their
 * place, privately, so that the processes go on unchanged and a CRIU dump afterwards finds almost nothing to write.
 *
 * usage: hotstart-fold ROOT_PID FOLDER_FD INSIDE THREADS          (x86_64, kernel 6.7+ for PAGEMAP_SCAN)
 *
 * It takes no decisions. A conversation of lines on stdin and stdout:
 *   < process PID                     one for each process of the tree, all of its threads stopped
 *   < frozen
 *   > process PID NAME SIZE           NAME is made in FOLDER_FD and is INSIDE/NAME to the process
 *   > area START END OFFSET PROT WHOLE ADVICE      hexadecimal; WHOLE: every page, else those that are populated
 *   > go
 *   < copied PID BYTES
 *   < folded
 *   > release                         everything is let go, the old memory freed; anything else is undone
 * or, at any point, "< refused REASON", with every process as it was. End of file before "release" means undo.
 *
 * Undo is exact and cheap because the old areas are not replaced but moved aside (mremap moves page tables, not pages) and
 * moved back on failure. System calls are made in one stopped thread of the process, by a script in a page of its own.
 * Nothing of that raises a signal: a trap would reset a handler that ignores SIGTRAP, or be mistaken for one that waits.
 *
 * If this program is killed, the kernel lets every thread go on from where it stands. Therefore the script looks, before it
 * touches an area, whether we still hold a lock that the kernel drops with us, and ends by restoring the thread's registers
 * itself: areas that were moved have the same contents as those that were not. What stays behind is address space. Not
 * covered are the two calls that bring in the script's page, the one that removes it, and one area in flight: a fraction of a
 * millisecond for each process; of programs whose fold was killed at random moments, some were lost (tests/native/test_fold.py).
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <linux/kcmp.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/ptrace.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/user.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#ifndef __x86_64__
#error "hotstart-fold knows x86_64 only; without it snapshots are taken with a plain dump"
#endif

#define HUGE_BYTES (2UL << 20)
#define PAGE 4096UL
enum { STOP_TIMEOUT_MS = 2000, USER_64_BIT = 0x33, RSEQ_UNREGISTER = 1, RESTART_WITHOUT_HANDLER = 514 };

/* linux/fs.h of Debian 12 is older than PAGEMAP_SCAN (kernel 6.7, Documentation/admin-guide/mm/pagemap.rst). */
struct scan_region { uint64_t start, end, categories; };
struct scan_arg {
	uint64_t size, flags, start, end, walk_end, vec, vec_len, max_pages;
	uint64_t category_inverted, category_mask, category_anyof_mask, return_mask;
};
#define SCAN _IOWR('f', 16, struct scan_arg)
enum { IS_PRESENT = 1 << 3, IS_SWAPPED = 1 << 4, IS_ZERO_PAGE = 1 << 5, IS_GUARD = 1 << 8 };
enum { ADVICE_GUARD_INSTALL = 102 }; /* kernel 6.13; 6.15 for files, which is also when PAGEMAP_SCAN began to show guards */

/* linux/ptrace.h clashes with sys/ptrace.h (kernel 6.4). */
struct sud_config { uint64_t mode, selector, offset, length; };
enum { GET_SYSCALL_USER_DISPATCH = 0x4210 };

struct span { uint64_t start, end; };
struct area { uint64_t start, end, offset, aside; int prot, whole, advice; };
struct job { uint64_t address, bytes, offset; };
struct process {
	pid_t pid, injector;             /* injector: the stopped thread that makes our system calls */
	pid_t *threads;
	size_t n_threads, cap_threads;
	char name[128];
	uint64_t size_bytes;
	struct area *areas;
	size_t n_areas, cap_areas;
	struct span *guards;             /* lightweight guard regions in the areas: not read, made again */
	size_t n_guards, cap_guards;
	struct job *jobs;
	size_t n_jobs, cap_jobs;
	uint64_t copied_bytes, next_job;
	int file, memory, failed;        /* memory: /proc/PID/mem; failed: errno of a copying thread */
	int64_t inside_file;             /* 1 + its descriptor of the file; open while scripts run: through it they see us gone */
	int injecting;                   /* the injector's registers and mask are not its own */
	struct user_regs_struct saved;
	struct __ptrace_rseq_configuration rseq;
	uint64_t mask, vdso_syscall, script, script_bytes, aside, aside_bytes;
};

static struct process **processes;
static size_t n_processes, cap_processes;
static int folder;
static const char *inside;

static void *grow(void *list, size_t count, size_t *cap, size_t size)
{
	if (count < *cap) return list;
	*cap = *cap ? *cap * 2 : 64;
	list = realloc(list, *cap * size);
	if (!list) abort();
	return list;
}

static void undo_and_quit(void) __attribute__((noreturn));

static void refuse(const char *format, ...)
{
	va_list args;
	va_start(args, format);
	fputs("refused ", stdout);
	vprintf(format, args);
	putchar('\n');
	fflush(stdout);
	va_end(args);
	undo_and_quit();
}

static void refuse_if_abandoned(void)
{
	struct pollfd orders = {.fd = 0};
	if (poll(&orders, 1, 0) > 0 && orders.revents & (POLLHUP | POLLERR)) undo_and_quit();
}

/* ---- the script: system calls that the process makes itself --------------------------------------------------- */

enum after { ON_SUCCESS, ALWAYS, ON_FAILURE }; /* when to go on with the next call */
struct call { int64_t number, a, b, c, d, e, f, go_on; }; /* number becomes the result; a negative number ends the script */

/* What the script knows; it follows the page with its code. Offsets appear in the code. */
struct context {
	struct user_regs_struct regs;    /* where the thread goes on if we are gone */
	uint64_t done, mask, file;
	struct flock lock;
	uint64_t stack[4];
	struct call farewell[3];         /* what it does before it goes on alone */
	struct call calls[];
};
_Static_assert(offsetof(struct context, done) == 216 && offsetof(struct context, mask) == 224 &&
	       offsetof(struct context, file) == 232 && offsetof(struct context, lock) == 240 &&
	       offsetof(struct context, stack) == 272 && offsetof(struct context, farewell) == 304, "the script's offsets");
_Static_assert(SYS_fcntl == 72 && F_OFD_SETLKW == 38 && SYS_rt_sigprocmask == 14 && SIG_SETMASK == 2, "the script's calls");

#define AT(offset) "script_code + 4096 + " #offset "(%rip)"
__asm__(".pushsection .rodata\n"
	"script_code:\n"
	"1:	mov (%r12), %rax\n"
	"	test %rax, %rax\n"
	"	js 2f\n"
	"	mov 8(%r12), %rdi\n"
	"	mov 16(%r12), %rsi\n"
	"	mov 24(%r12), %rdx\n"
	"	mov 32(%r12), %r10\n"
	"	mov 40(%r12), %r8\n"
	"	mov 48(%r12), %r9\n"
	"	syscall\n"
	"	mov %rax, (%r12)\n"
	"	mov 56(%r12), %rcx\n"
	"	add $64, %r12\n"
	"	cmp $1, %rcx\n"
	"	je 1b\n"
	"	shr $1, %rcx\n"
	"	cmp $-4096, %rax\n"
	"	seta %al\n"
	"	cmp %cl, %al\n"
	"	je 1b\n"
	"2:	test %r13, %r13\n"
	"	jnz 4f\n"
	"	movq $1, " AT(216) "\n"
	"3:	mov $72, %eax\n"             /* fcntl(file, F_OFD_SETLKW, &lock) returns 0 when we are gone */
	"	mov " AT(232) ", %rdi\n"
	"	mov $38, %esi\n"
	"	lea " AT(240) ", %rdx\n"
	"	syscall\n"
	"	test %rax, %rax\n"
	"	jnz 3b\n"
	"	jmp script_farewell\n"
	"script_call:\n"                     /* a single call with the registers that we set */
	"	syscall\n"
	"script_farewell:\n"
	"	mov $1, %r13d\n"
	"	lea " AT(304) ", %r12\n"
	"	jmp 1b\n"
	"4:	lea " AT(296) ", %rsp\n"
	"	pushq " AT(144) "\n"
	"	popfq\n"
	"	mov $14, %eax\n"             /* rt_sigprocmask(SIG_SETMASK, &mask, 0, 8); none of these touches the flags */
	"	mov $2, %edi\n"
	"	lea " AT(224) ", %rsi\n"
	"	mov $0, %edx\n"
	"	mov $8, %r10d\n"
	"	mov " AT(152) ", %rsp\n"
	"	syscall\n"
	"	mov " AT(0) ", %r15\n"
	"	mov " AT(8) ", %r14\n"
	"	mov " AT(16) ", %r13\n"
	"	mov " AT(24) ", %r12\n"
	"	mov " AT(32) ", %rbp\n"
	"	mov " AT(40) ", %rbx\n"
	"	mov " AT(48) ", %r11\n"
	"	mov " AT(56) ", %r10\n"
	"	mov " AT(64) ", %r9\n"
	"	mov " AT(72) ", %r8\n"
	"	mov " AT(80) ", %rax\n"
	"	mov " AT(88) ", %rcx\n"
	"	mov " AT(96) ", %rdx\n"
	"	mov " AT(104) ", %rsi\n"
	"	mov " AT(112) ", %rdi\n"
	"	jmp *" AT(128) "\n"
	"	.balign 8\n"
	"script_code_end:\n"
	".popsection\n");
extern const char script_code[], script_call[], script_code_end[];

/* ---- stops ---------------------------------------------------------------------------------------------------- */

enum stop { ENDED, INTERRUPTED, AT_SYSCALL, BY_SIGNAL };

static enum stop kind_of(int status)
{
	if (!WIFSTOPPED(status)) return ENDED;
	if (status >> 16 == PTRACE_EVENT_STOP) return INTERRUPTED; /* by us, or by a stop or continue signal to the process */
	return WSTOPSIG(status) == (SIGTRAP | 0x80) ? AT_SYSCALL : BY_SIGNAL;
}

static int lost(void) { errno = ESRCH; return -1; }

/* Waits for the injector. A process that is killed reports its first thread last, after we have taken note of all others. */
static int wait_injector(struct process *p, int *status)
{
	for (;;) {
		pid_t tid = waitpid(-1, status, __WALL);
		if (tid == p->injector) return kind_of(*status) == ENDED ? lost() : 0;
		if (tid < 0 && errno != EINTR) return lost();
	}
}

/* The signal with which the thread must be resumed. All that can be blocked is; a fault of our own must not get to it. */
static int signal_to_pass(int status)
{
	if (kind_of(status) != BY_SIGNAL) return 0;
	return WSTOPSIG(status) == SIGSTOP ? SIGSTOP : -1;
}

static int resume_until(struct process *p, int request, enum stop wanted)
{
	int status, signal = 0;
	do {
		if (ptrace(request, p->injector, 0, signal) || wait_injector(p, &status)) return -1;
		if ((signal = signal_to_pass(status)) < 0) { errno = EPROTO; return -1; }
	} while (kind_of(status) != wanted);
	return 0;
}

/* ---- system calls in the process ------------------------------------------------------------------------------ */

static int64_t one_call(struct process *p, int64_t number, uint64_t a, uint64_t b, uint64_t c, uint64_t d, int64_t e)
{
	struct user_regs_struct r = p->saved;
	r.rip = p->script ? p->script + (uint64_t)(script_call - script_code) : p->vdso_syscall;
	r.rax = (uint64_t)number;
	r.rdi = a; r.rsi = b; r.rdx = c; r.r10 = d; r.r8 = (uint64_t)e; r.r9 = 0;
	r.orig_rax = (uint64_t)-1; /* else the kernel would restart the interrupted call now instead of at the end */
	if (ptrace(PTRACE_SETREGS, p->injector, 0, &r)) return -errno;
	if (resume_until(p, PTRACE_SYSCALL, AT_SYSCALL) || resume_until(p, PTRACE_SYSCALL, AT_SYSCALL)) return -errno;
	return ptrace(PTRACE_GETREGS, p->injector, 0, &r) ? -errno : (int64_t)r.rax;
}

static int write_to(struct process *p, uint64_t address, const void *data, size_t bytes)
{
	struct iovec local = {(void *)data, bytes}, remote = {(void *)address, bytes};
	return process_vm_writev(p->injector, &local, 1, &remote, 1, 0) == (ssize_t)bytes ? 0 : -1;
}

static int read_from(struct process *p, uint64_t address, void *data, size_t bytes)
{
	struct iovec local = {data, bytes}, remote = {(void *)address, bytes};
	return process_vm_readv(p->injector, &local, 1, &remote, 1, 0) == (ssize_t)bytes ? 0 : -1;
}

static int find_vdso_syscall(struct process *p)
{
	char path[64], line[512];
	unsigned long start = 0, end = 0;
	snprintf(path, sizeof path, "/proc/%d/maps", p->injector);
	FILE *f = fopen(path, "re");
	if (!f) return -1;
	while (fgets(line, sizeof line, f)) {
		/* Reads that are under way arrive in the old pages, wherever the process stands. */
		if (strstr(line, " /[aio] (deleted)")) refuse("process %d: asynchronous I/O (io_setup) may be under way", p->pid);
		if (strstr(line, "[vdso]")) sscanf(line, "%lx-%lx", &start, &end);
	}
	fclose(f);
	unsigned char text[4 * PAGE];
	size_t bytes = end - start < sizeof text ? end - start : sizeof text;
	errno = ENOEXEC;
	if (!start || read_from(p, start, text, bytes)) return -1;
	for (size_t i = 0; i + 1 < bytes; i++)
		if (text[i] == 0x0f && text[i + 1] == 0x05) { p->vdso_syscall = start + i; return 0; }
	return -1;
}

/* A restartable sequence (rseq(2)) that was interrupted must not be resumed in its middle after we moved the instruction
 * pointer: the kernel would have sent it to its abort address, so that is where it goes on. */
static void leave_rseq(struct process *p)
{
	uint64_t cs_pointer = 0;
	struct { uint32_t version, flags; uint64_t start, length, abort; } cs;
	if (ptrace(PTRACE_GET_RSEQ_CONFIGURATION, p->injector, sizeof p->rseq, &p->rseq) <= 0) p->rseq.rseq_abi_pointer = 0;
	if (!p->rseq.rseq_abi_pointer || read_from(p, p->rseq.rseq_abi_pointer + 8, &cs_pointer, 8) || !cs_pointer) return;
	if (!read_from(p, cs_pointer, &cs, sizeof cs) && p->saved.rip - cs.start < cs.length) p->saved.rip = cs.abort;
}

/* While we run in the thread the kernel must not write to its rseq area: the area moves, and its copy was made before. */
static int64_t set_rseq(struct process *p, int flags)
{
	if (!p->rseq.rseq_abi_pointer) return 0;
	return one_call(p, SYS_rseq, p->rseq.rseq_abi_pointer, p->rseq.rseq_abi_size, (uint64_t)flags, p->rseq.signature, 0);
}

/* The registers with which the kernel would resume it, that is, with an interrupted call begun again. */
static struct user_regs_struct as_restarted(struct user_regs_struct r)
{
	enum { ERESTARTSYS = 512, ERESTARTNOINTR = 513, ERESTARTNOHAND = RESTART_WITHOUT_HANDLER, ERESTART_RESTARTBLOCK = 516 };
	if ((int64_t)r.orig_rax < 0) return r;
	switch (-(int64_t)r.rax) {
	case ERESTARTSYS: case ERESTARTNOINTR: case ERESTARTNOHAND: r.rax = r.orig_rax; r.rip -= 2; break;
	case ERESTART_RESTARTBLOCK: r.rax = SYS_restart_syscall; r.rip -= 2; break;
	}
	return r;
}

static int write_context(struct process *p, int64_t file)
{
	struct context c = {.regs = as_restarted(p->saved), .mask = p->mask, .file = (uint64_t)file,
			    .lock = {.l_type = F_RDLCK, .l_whence = SEEK_SET, .l_len = 1}};
	struct call *say = c.farewell;
	if (p->rseq.rseq_abi_pointer)
		*say++ = (struct call){SYS_rseq, (int64_t)p->rseq.rseq_abi_pointer, p->rseq.rseq_abi_size, 0,
				       p->rseq.signature, 0, 0, ALWAYS};
	if (file >= 0) *say++ = (struct call){SYS_close, file, 0, 0, 0, 0, 0, ALWAYS};
	say->number = -1;
	return write_to(p, p->script + PAGE, &c, sizeof c);
}

static int write_code(struct process *p, uint64_t at) /* as a debugger does: the page is never writable */
{
	for (size_t i = 0; i < (size_t)(script_code_end - script_code); i += 8)
		if (ptrace(PTRACE_POKEDATA, p->injector, at + i, *(const uint64_t *)(script_code + i))) return -1;
	return 0;
}

static int64_t status_field(pid_t tid, const char *name)
{
	char path[64], line[256];
	int64_t value = 0;
	size_t n = strlen(name);
	snprintf(path, sizeof path, "/proc/%d/status", tid);
	FILE *f = fopen(path, "re");
	while (f && fgets(line, sizeof line, f))
		if (!strncmp(line, name, n)) value = strtoll(line + n, 0, 10);
	if (f) fclose(f);
	return value;
}

static const char *why_not_inject(struct process *p)
{
	struct sud_config sud = {0};
	if (p->saved.cs != USER_64_BIT) return "a 32-bit program";
	if (!ptrace((enum __ptrace_request)GET_SYSCALL_USER_DISPATCH, p->injector, sizeof sud, &sud) && sud.mode)
		return "it dispatches system calls itself (PR_SET_SYSCALL_USER_DISPATCH)";
	/* Where filters cannot be suspended (we are filtered ourselves) those are harmless that we live under, and the sandbox's. */
	if (ptrace(PTRACE_SETOPTIONS, p->injector, 0, PTRACE_O_TRACESYSGOOD | PTRACE_O_SUSPEND_SECCOMP) == 0) return 0;
	if (status_field(p->injector, "Seccomp:") == 1) return "strict seccomp, which cannot be suspended here";
	if (status_field(p->injector, "Seccomp_filters:") > status_field(getpid(), "Seccomp_filters:") + 1)
		return "seccomp filters of its own, which cannot be suspended here";
	return 0;
}

static int begin_injection(struct process *p, size_t n_calls)
{
	uint64_t everything = ~0UL;
	if (ptrace(PTRACE_GETREGS, p->injector, 0, &p->saved)) return -1;
	const char *reason = why_not_inject(p);
	if (reason) refuse("process %d: %s", p->pid, reason);
	if (find_vdso_syscall(p)) return -1;
	if (ptrace(PTRACE_GETSIGMASK, p->injector, 8, &p->mask)) return -1;
	leave_rseq(p);
	p->injecting = 1;
	if (ptrace(PTRACE_SETSIGMASK, p->injector, 8, &everything)) return -1;
	p->script_bytes = PAGE + (sizeof(struct context) + (n_calls + 1) * sizeof(struct call) + PAGE - 1) / PAGE * PAGE;
	int64_t at = one_call(p, SYS_mmap, 0, p->script_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1);
	if (at < 0) { errno = (int)-at; return -1; }
	/* Never writable and executable, not even one after the other: prctl(PR_SET_MDWE) forbids that. */
	int64_t r = one_call(p, SYS_mmap, (uint64_t)at, PAGE, PROT_READ | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1);
	int written = r < 0 ? -1 : write_code(p, (uint64_t)at);
	if (written) {
		int reason_code = r < 0 ? (int)-r : errno;
		one_call(p, SYS_munmap, (uint64_t)at, p->script_bytes, 0, 0, 0);
		errno = reason_code;
		return -1;
	}
	p->script = (uint64_t)at;
	if (write_context(p, -1)) return -1;
	r = set_rseq(p, RSEQ_UNREGISTER);
	if (r < 0) { p->rseq.rseq_abi_pointer = 0; errno = (int)-r; return -1; }
	return 0;
}

static void end_injection(struct process *p)
{
	if (!p->injecting) return;
	if (p->script) {
		uint64_t script = p->script;
		set_rseq(p, 0);
		p->script = 0; /* the call that removes it cannot be made in it */
		one_call(p, SYS_munmap, script, p->script_bytes, 0, 0, 0);
	}
	ptrace(PTRACE_SETREGS, p->injector, 0, &p->saved);
	ptrace(PTRACE_SETSIGMASK, p->injector, 8, &p->mask);
	p->injecting = 0;
}

static int wait_until_done(struct process *p)
{
	for (;;) {
		uint64_t done = 0;
		int status;
		pid_t tid = waitpid(p->injector, &status, __WALL | WNOHANG);
		if (tid < 0 || (tid && kind_of(status) == ENDED)) return lost();
		if (tid) {
			int signal = signal_to_pass(status);
			if (signal < 0) { errno = EPROTO; return -1; }
			if (ptrace(PTRACE_CONT, p->injector, 0, signal)) return -1;
		}
		if (read_from(p, p->script + PAGE + offsetof(struct context, done), &done, sizeof done)) return lost();
		if (done) break;
		usleep(50);
	}
	if (ptrace(PTRACE_INTERRUPT, p->injector, 0, 0)) return -1;
	for (int status, signal;;) {
		if (wait_injector(p, &status)) return -1;
		if (kind_of(status) == INTERRUPTED) return 0;
		if ((signal = signal_to_pass(status)) < 0) { errno = EPROTO; return -1; }
		if (ptrace(PTRACE_CONT, p->injector, 0, signal)) return -1;
	}
}

/* Runs the calls in the process; their results replace their numbers. Returns how many were made, or -1. */
static ssize_t run_script(struct process *p, struct call *calls, size_t n)
{
	uint64_t context = p->script + PAGE, table = context + offsetof(struct context, calls), none = 0;
	struct user_regs_struct r = p->saved;
	calls[n].number = -1;
	if (write_to(p, table, calls, (n + 1) * sizeof *calls)) return -1;
	if (write_to(p, context + offsetof(struct context, done), &none, sizeof none)) return -1;
	r.rip = p->script;
	r.r12 = table;
	r.r13 = 0;
	r.orig_rax = (uint64_t)-1;
	if (ptrace(PTRACE_SETREGS, p->injector, 0, &r) || ptrace(PTRACE_CONT, p->injector, 0, 0)) return -1;
	if (wait_until_done(p) || ptrace(PTRACE_GETREGS, p->injector, 0, &r)) return -1;
	if (read_from(p, table, calls, (n + 1) * sizeof *calls)) return -1;
	return (ssize_t)((r.r12 - table) / sizeof *calls);
}

/* ---- freeze --------------------------------------------------------------------------------------------------- */

static struct process *find_process(pid_t pid)
{
	for (size_t i = 0; i < n_processes; i++)
		if (processes[i]->pid == pid) return processes[i];
	return 0;
}

static int add_process(pid_t pid) /* 1 if it is new */
{
	if (find_process(pid)) return 0;
	struct process *p = calloc(1, sizeof *p);
	if (!p) abort();
	p->pid = pid;
	p->file = p->memory = -1;
	processes = grow(processes, n_processes, &cap_processes, sizeof *processes);
	processes[n_processes++] = p;
	return 1;
}

static int is_alive(pid_t pid, pid_t tid)
{
	char path[64], text[512], state = 'X';
	snprintf(path, sizeof path, "/proc/%d/task/%d/stat", pid, tid);
	FILE *f = fopen(path, "re");
	if (!f) return 0;
	size_t n = fread(text, 1, sizeof text - 1, f);
	fclose(f);
	text[n] = 0;
	char *after = strrchr(text, ')');
	if (after) sscanf(after + 1, " %c", &state);
	return state != 'Z' && state != 'X';
}

static int seize(struct process *p, pid_t tid) /* 1 if it is new */
{
	for (size_t i = 0; i < p->n_threads; i++)
		if (p->threads[i] == tid) return 0;
	if (!is_alive(p->pid, tid)) return 0;
	if (ptrace(PTRACE_SEIZE, tid, 0, PTRACE_O_TRACESYSGOOD)) {
		int reason = errno;
		if (reason == ESRCH || !is_alive(p->pid, tid)) return 1; /* it ended meanwhile: look again */
		refuse("process %d: thread %d cannot be traced: %s", p->pid, tid, strerror(reason));
	}
	p->threads = grow(p->threads, p->n_threads, &p->cap_threads, sizeof *p->threads);
	p->threads[p->n_threads++] = tid;
	ptrace(PTRACE_INTERRUPT, tid, 0, 0); /* fails if it is ending, which the wait for it will tell */
	return 1;
}

static void forget_thread(struct process *p, size_t i)
{
	memmove(p->threads + i, p->threads + i + 1, (--p->n_threads - i) * sizeof *p->threads);
}

static int64_t now_ms(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return (int64_t)t.tv_sec * 1000 + t.tv_nsec / 1000000;
}

/* Some calls fail with EINTR when a thread is stopped, signal or not (signal(7)). They have done nothing yet: begin them again,
 * unless a handler does run. A timeout starts anew. */
static void restart_its_call(pid_t tid)
{
	static const uint64_t calls[] = {SYS_epoll_wait, SYS_epoll_pwait, SYS_epoll_pwait2, SYS_rt_sigtimedwait, SYS_semop,
		SYS_semtimedop, SYS_read, SYS_recvfrom, SYS_recvmsg, SYS_accept, SYS_accept4};
	struct user_regs_struct r;
	if (ptrace(PTRACE_GETREGS, tid, 0, &r) || r.cs != USER_64_BIT || (int64_t)r.rax != -EINTR) return;
	for (size_t i = 0; i < sizeof calls / sizeof *calls; i++) {
		if (r.orig_rax != calls[i]) continue;
		r.rax = (uint64_t)-RESTART_WITHOUT_HANDLER;
		ptrace(PTRACE_SETREGS, tid, 0, &r);
	}
}

/* Waits until the i-th thread stands still. A signal that was about to be delivered is: the thread then stops before the
 * first instruction of its handler, and nothing about the signal is lost. */
static int wait_until_stopped(struct process *p, size_t i) /* 1 if it ended instead */
{
	for (int64_t deadline = now_ms() + STOP_TIMEOUT_MS; now_ms() < deadline;) {
		int status;
		pid_t tid = waitpid(p->threads[i], &status, __WALL | WNOHANG);
		if (tid < 0 && p->threads[i] != p->pid) { p->threads[i] = p->pid; continue; } /* execve gave it the first one's id */
		if (tid < 0 || (tid && kind_of(status) == ENDED)) return 1;
		if (tid && kind_of(status) == INTERRUPTED) {
			restart_its_call(tid);
			return 0;
		}
		if (tid) {
			ptrace(PTRACE_CONT, tid, 0, kind_of(status) == BY_SIGNAL ? WSTOPSIG(status) : 0);
			continue;
		}
		usleep(50);
	}
	refuse("process %d: thread %d cannot be stopped (a parent in vfork?)", p->pid, p->threads[i]);
	return 0;
}

/* Stops the threads that run, then looks for children. Returns how much was new; 0 if all stood still already. */
static int freeze_process(struct process *p)
{
	char path[64];
	int found = 0;
	size_t known = p->n_threads;
	snprintf(path, sizeof path, "/proc/%d/task", p->pid);
	DIR *tasks = opendir(path);
	if (!tasks && errno != ENOENT && errno != ESRCH) refuse("process %d: %s: %s", p->pid, path, strerror(errno));
	for (struct dirent *e; tasks && (e = readdir(tasks));)
		if (atoi(e->d_name)) found += seize(p, atoi(e->d_name));
	for (size_t i = known; i < p->n_threads;) {
		if (wait_until_stopped(p, i)) forget_thread(p, i);
		else i++;
	}
	if (tasks) rewinddir(tasks);
	for (struct dirent *e; tasks && (e = readdir(tasks));) {
		pid_t child;
		if (!atoi(e->d_name)) continue;
		snprintf(path, sizeof path, "/proc/%d/task/%d/children", p->pid, atoi(e->d_name));
		FILE *children = fopen(path, "re");
		while (children && fscanf(children, "%d", &child) == 1) found += add_process(child);
		if (children) fclose(children);
	}
	if (tasks) closedir(tasks);
	p->injector = p->n_threads ? p->threads[0] : 0;
	for (size_t i = 0; i < p->n_threads; i++)
		if (p->threads[i] == p->pid) p->injector = p->pid;
	return found;
}

static int by_memory(const void *a, const void *b)
{
	long order = syscall(SYS_kcmp, (*(struct process *const *)a)->injector, (*(struct process *const *)b)->injector, KCMP_VM, 0, 0);
	return order == 1 ? -1 : order == 2 ? 1 : 0;
}

static void refuse_shared_memory(void)
{
	struct process **order = calloc(n_processes + 1, sizeof *order);
	size_t n = 0;
	if (!order) abort();
	for (size_t i = 0; i < n_processes; i++)
		if (processes[i]->injector) order[n++] = processes[i];
	qsort(order, n, sizeof *order, by_memory);
	for (size_t i = 1; i < n; i++)
		if (syscall(SYS_kcmp, order[i - 1]->injector, order[i]->injector, KCMP_VM, 0, 0) == 0)
			refuse("processes %d and %d share one memory (CLONE_VM)", order[i - 1]->pid, order[i]->pid);
	free(order);
}

static void freeze_tree(pid_t root)
{
	add_process(root);
	/* Until nothing new was born while we froze the rest, and once more: the kernel's list of children skips some while
	 * others of them end. */
	for (int quiet = 0; quiet < 2;) {
		int found = 0;
		for (size_t i = 0; i < n_processes; i++) found += freeze_process(processes[i]);
		quiet = found ? 0 : quiet + 1;
	}
	if (!processes[0]->injector) refuse("there is no process %d", root);
	refuse_shared_memory();
}

static void let_go(void)
{
	for (size_t i = 0; i < n_processes; i++)
		for (size_t k = 0; k < processes[i]->n_threads; k++) ptrace(PTRACE_DETACH, processes[i]->threads[k], 0, 0);
}

/* ---- copy ----------------------------------------------------------------------------------------------------- */

static void add_jobs(struct process *p, struct area *a, uint64_t start, uint64_t end)
{
	while (start < end) { /* cut where 2 MiB pages begin: the file's offsets are congruent */
		uint64_t next = (start + HUGE_BYTES) & ~(HUGE_BYTES - 1);
		if (next > end) next = end;
		p->jobs = grow(p->jobs, p->n_jobs, &p->cap_jobs, sizeof *p->jobs);
		p->jobs[p->n_jobs++] = (struct job){start, next - start, a->offset + start - a->start};
		p->copied_bytes += next - start;
		start = next;
	}
}

static void add_guard(struct process *p, uint64_t start, uint64_t end)
{
	p->guards = grow(p->guards, p->n_guards, &p->cap_guards, sizeof *p->guards);
	p->guards[p->n_guards++] = (struct span){start, end};
}

static void find_pages_of(struct process *p, struct area *a, int pagemap)
{
	static uint64_t guard = IS_GUARD;
	struct scan_region regions[4096];
	uint64_t covered = a->start;
	for (uint64_t at = a->start; at < a->end;) {
		struct scan_arg s = {.size = sizeof s, .start = at, .end = a->end, .vec = (uint64_t)regions,
			.vec_len = sizeof regions / sizeof *regions,
			.category_anyof_mask = a->whole ? guard : IS_PRESENT | IS_SWAPPED,
			.category_inverted = IS_ZERO_PAGE, .category_mask = IS_ZERO_PAGE, .return_mask = IS_PRESENT | guard};
		if (a->whole && !guard) break;
		int n = ioctl(pagemap, SCAN, &s);
		if (n < 0 && errno == EINVAL && guard) { guard = 0; continue; } /* a kernel before 6.15 does not know them */
		if (n < 0) refuse("process %d: PAGEMAP_SCAN: %s", p->pid, strerror(errno));
		for (int k = 0; k < n; k++) {
			int is_guard = (regions[k].categories & guard) != 0;
			if (is_guard) add_guard(p, regions[k].start, regions[k].end);
			if (a->whole) add_jobs(p, a, covered, regions[k].start);
			else if (!is_guard) add_jobs(p, a, regions[k].start, regions[k].end);
			covered = regions[k].end;
		}
		at = s.walk_end;
	}
	if (a->whole) add_jobs(p, a, covered, a->end);
}

static void find_pages(struct process *p)
{
	char path[64];
	snprintf(path, sizeof path, "/proc/%d/pagemap", p->injector);
	int pagemap = open(path, O_RDONLY | O_CLOEXEC);
	if (pagemap < 0) refuse("process %d: %s: %s", p->pid, path, strerror(errno));
	for (size_t i = 0; i < p->n_areas; i++) find_pages_of(p, &p->areas[i], pagemap);
	close(pagemap);
	snprintf(path, sizeof path, "/proc/%d/mem", p->injector);
	p->memory = open(path, O_RDONLY | O_CLOEXEC);
}

static int read_job(struct process *p, struct job *j, char *buffer) /* 0, or errno */
{
	struct iovec local = {buffer, j->bytes}, remote = {(void *)j->address, j->bytes};
	if (process_vm_readv(p->injector, &local, 1, &remote, 1, 0) == (ssize_t)j->bytes) return 0;
	int reason = errno;
	/* Memory that may only be written; as a debugger we may read it. */
	return pread(p->memory, buffer, j->bytes, (off_t)j->address) == (ssize_t)j->bytes ? 0 : reason;
}

static int write_job(struct process *p, struct job *j, const char *buffer) /* 0, or errno */
{
	for (uint64_t done = 0; done < j->bytes;) {
		ssize_t n = pwrite(p->file, buffer + done, j->bytes - done, (off_t)(j->offset + done));
		if (n > 0) { done += (uint64_t)n; continue; }
		int reason = n ? errno : ENOSPC, flags = fcntl(p->file, F_GETFL);
		/* Some file systems refuse direct writes only now, and what follows a short one is not aligned. */
		if (reason != EINVAL || !(flags & O_DIRECT) || fcntl(p->file, F_SETFL, flags & ~O_DIRECT)) return reason;
	}
	return 0;
}

static void *copy_thread(void *argument)
{
	struct process *p = argument;
	struct pollfd orders = {.fd = 0};
	char *buffer = 0;
	if (posix_memalign((void **)&buffer, HUGE_BYTES, HUGE_BYTES)) { p->failed = ENOMEM; return 0; }
	madvise(buffer, HUGE_BYTES, MADV_HUGEPAGE);
	for (uint64_t i; !p->failed && (i = __sync_fetch_and_add(&p->next_job, 1)) < p->n_jobs;) {
		struct job *j = &p->jobs[i];
		int reason = poll(&orders, 1, 0) > 0 && orders.revents & (POLLHUP | POLLERR) ? ECANCELED : read_job(p, j, buffer);
		/* Zeros stay a hole. */
		if (!reason && (buffer[0] || memcmp(buffer, buffer + 1, j->bytes - 1))) reason = write_job(p, j, buffer);
		if (reason) p->failed = reason;
	}
	free(buffer);
	return 0;
}

static void open_file(struct process *p)
{
	struct flock alive = {.l_type = F_WRLCK, .l_whence = SEEK_SET, .l_len = 1};
	enum { FLAGS = O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC };
	/* Direct writes: a copy that went through the page cache took four times as long (kernel 6.18, ext4). Some refuse them. */
	p->file = openat(folder, p->name, FLAGS | O_DIRECT, 0444);
	if (p->file < 0 && errno == EINVAL) {
		unlinkat(folder, p->name, 0);
		p->file = openat(folder, p->name, FLAGS, 0444);
	}
	/* fchmod: whatever the umask says, the worker opens it under its own user. */
	if (p->file < 0 || ftruncate(p->file, (off_t)p->size_bytes) || fchmod(p->file, 0444)) refuse("memory file: %s", strerror(errno));
	if (fcntl(p->file, F_OFD_SETLK, &alive)) refuse("memory file: cannot be locked: %s", strerror(errno));
}

static void copy_memory(struct process *p, int threads)
{
	pthread_t t[64];
	int started = 0;
	find_pages(p);
	open_file(p);
	while (started < threads && !pthread_create(&t[started], 0, copy_thread, p)) started++;
	if (!started) copy_thread(p);
	while (started) pthread_join(t[--started], 0);
	if (p->failed == ECANCELED) undo_and_quit();
	if (p->failed) refuse("process %d: copying its memory: %s", p->pid, strerror(p->failed));
	printf("copied %d %lu\n", p->pid, p->copied_bytes);
	fflush(stdout);
}

/* ---- map in place, and undo ----------------------------------------------------------------------------------- */

static struct call are_we_there(struct process *p, int64_t file)
{
	return (struct call){SYS_fcntl, file, F_OFD_SETLK,
			     (int64_t)(p->script + PAGE + offsetof(struct context, lock)), 0, 0, 0, ON_FAILURE};
}

/* Room aside: one reservation in which every area finds a place congruent to its own, so that whole page tables move. */
static void reserve_aside(struct process *p)
{
	for (size_t i = 0; i < p->n_areas; i++) p->aside_bytes += p->areas[i].end - p->areas[i].start + 2 * HUGE_BYTES;
	int64_t at = one_call(p, SYS_mmap, 0, p->aside_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1);
	if (at < 0) refuse("process %d: no address space to move its areas aside: %s", p->pid, strerror((int)-at));
	p->aside = (uint64_t)at;
}

static int64_t open_inside(struct process *p)
{
	char path[512];
	uint64_t at = p->script + PAGE + offsetof(struct context, calls);
	int bytes = snprintf(path, sizeof path, "%s/%s", inside, p->name) + 1;
	if (bytes > (int)sizeof path) return -ENAMETOOLONG;
	if (write_to(p, at, path, (size_t)bytes)) return -errno;
	int64_t file = one_call(p, SYS_openat, (uint64_t)AT_FDCWD, at, O_RDONLY | O_CLOEXEC, 0, 0);
	if (file < 0) refuse("process %d: cannot open %s: %s", p->pid, path, strerror((int)-file));
	return write_context(p, file) ? -errno : file;
}

static void map_back(struct process *p)
{
	enum { CALLS_PER_AREA = 4 };
	size_t n = 0, guard = 0, room = p->n_areas * CALLS_PER_AREA + p->n_guards + 1;
	if (!p->n_areas) return;
	struct call *calls = calloc(room, sizeof *calls);
	size_t *begins = calloc(p->n_areas + 1, sizeof *begins);
	if (!calls || !begins || begin_injection(p, room + 512 / sizeof *calls))
		refuse("process %d: cannot make system calls in it: %s", p->pid, strerror(errno));
	reserve_aside(p);
	int64_t file = open_inside(p);
	if (file < 0) refuse("process %d: %s", p->pid, strerror((int)-file));
	p->inside_file = file + 1;
	uint64_t cursor = p->aside;
	for (size_t i = 0; i < p->n_areas; i++) {
		struct area *a = &p->areas[i];
		int64_t start = (int64_t)a->start, length = (int64_t)(a->end - a->start);
		a->aside = cursor + ((a->start - cursor) & (HUGE_BYTES - 1));
		cursor = a->aside + (uint64_t)length;
		begins[i] = n;
		calls[n++] = are_we_there(p, file);
		calls[n++] = (struct call){SYS_mremap, start, length, length, MREMAP_MAYMOVE | MREMAP_FIXED, (int64_t)a->aside, 0,
					   ON_SUCCESS};
		calls[n++] = (struct call){SYS_mmap, start, length, a->prot, MAP_PRIVATE | MAP_FIXED | MAP_NORESERVE, file,
					   (int64_t)a->offset, ON_SUCCESS};
		if (a->advice >= 0) calls[n++] = (struct call){SYS_madvise, start, length, a->advice, 0, 0, 0, ALWAYS};
		for (; guard < p->n_guards && p->guards[guard].start < a->end; guard++) {
			struct span g = p->guards[guard];
			calls[n++] = (struct call){SYS_madvise, (int64_t)g.start, (int64_t)(g.end - g.start), ADVICE_GUARD_INSTALL,
						   0, 0, 0, ON_SUCCESS};
		}
	}
	ssize_t made = run_script(p, calls, n);
	int reason = errno;
	if (made < 0) refuse("process %d: mapping its memory file: %s", p->pid, strerror(reason));
	/* Advice may fail (a kernel without huge pages). */
	if (made != (ssize_t)n || (calls[n - 1].go_on == ON_SUCCESS && calls[n - 1].number < 0)) {
		/* Areas beyond the failing call never moved; nothing of theirs is aside. */
		for (size_t i = 0; i < p->n_areas; i++) {
			size_t move = begins[i] + 1;
			if ((ssize_t)move >= made || calls[move].number < 0) p->areas[i].aside = 0;
		}
		refuse("process %d: mapping its memory file: %s", p->pid, strerror((int)-calls[made - 1].number));
	}
	free(calls);
	free(begins);
}

static void move_back(struct process *p)
{
	size_t n = 0;
	struct call *calls = calloc(p->n_areas + 1, sizeof *calls);
	if (!calls) abort();
	for (size_t i = 0; i < p->n_areas; i++) {
		struct area *a = &p->areas[i];
		int64_t length = (int64_t)(a->end - a->start);
		if (!a->aside) continue;
		calls[n++] = (struct call){SYS_mremap, (int64_t)a->aside, length, length, MREMAP_MAYMOVE | MREMAP_FIXED,
					   (int64_t)a->start, 0, ALWAYS};
	}
	run_script(p, calls, n);
	free(calls);
}

static void finish_process(struct process *p, int undo)
{
	if (p->script && p->aside) {
		if (undo && p->inside_file) move_back(p);
		one_call(p, SYS_munmap, p->aside, p->aside_bytes, 0, 0, 0);
		p->aside = 0;
		if (p->inside_file) {
			one_call(p, SYS_close, (uint64_t)p->inside_file - 1, 0, 0, 0, 0);
			write_context(p, -1);
		}
	}
	end_injection(p);
}

static void undo_and_quit(void)
{
	for (size_t i = n_processes; i--;) {
		finish_process(processes[i], 1);
		if (processes[i]->file >= 0) unlinkat(folder, processes[i]->name, 0);
	}
	let_go();
	_exit(1);
}

/* ---- the conversation ----------------------------------------------------------------------------------------- */

static void read_orders(void)
{
	char line[512];
	struct process *p = 0;
	while (fgets(line, sizeof line, stdin)) {
		struct area a = {0};
		int pid;
		if (!strcmp(line, "go\n")) return;
		if (!strncmp(line, "process ", 8)) {
			char name[128];
			uint64_t size;
			if (sscanf(line, "process %d %127s %lx", &pid, name, &size) != 3 || !(p = find_process(pid)) || !p->injector)
				refuse("order not understood: %.100s", line);
			strcpy(p->name, name);
			p->size_bytes = size;
		} else if (p && sscanf(line, "area %lx %lx %lx %x %d %d", &a.start, &a.end, &a.offset, (unsigned *)&a.prot,
				       &a.whole, &a.advice) == 6) {
			p->areas = grow(p->areas, p->n_areas, &p->cap_areas, sizeof a);
			p->areas[p->n_areas++] = a;
		} else {
			refuse("order not understood: %.100s", line);
		}
	}
	undo_and_quit();
}

int main(int argc, char **argv)
{
	sigset_t all;
	char line[64];
	if (argc != 5) { fputs("usage: hotstart-fold ROOT_PID FOLDER_FD INSIDE THREADS\n", stderr); return 2; }
	folder = atoi(argv[2]);
	inside = argv[3];
	int threads = atoi(argv[4]);
	threads = threads < 1 ? 1 : threads > 64 ? 64 : threads;
	/* Nothing but the end of our orders may end us in the middle: not an interrupt, a broken pipe, a file size limit. */
	sigfillset(&all);
	sigprocmask(SIG_BLOCK, &all, 0);
	freeze_tree(atoi(argv[1]));
	for (size_t i = 0; i < n_processes; i++)
		if (processes[i]->injector) printf("process %d\n", processes[i]->pid);
	puts("frozen");
	fflush(stdout);
	read_orders();
	for (size_t i = 0; i < n_processes; i++)
		if (processes[i]->n_areas) copy_memory(processes[i], threads);
	for (size_t i = 0; i < n_processes; i++) {
		refuse_if_abandoned();
		map_back(processes[i]);
	}
	puts("folded");
	fflush(stdout);
	if (!fgets(line, sizeof line, stdin) || strcmp(line, "release\n")) undo_and_quit();
	for (size_t i = 0; i < n_processes; i++) finish_process(processes[i], 0);
	let_go();
	puts("released");
	return 0;
}
