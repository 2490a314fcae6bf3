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
 * If there is no INSIDE in the mount namespace of ROOT_PID, the folder is first bound there, read-only.
 *
 * Undo is exact and cheap because the old areas are not replaced but moved aside (mremap moves page tables, not pages) and
 * moved back on failure. System calls are made in one stopped thread of the process, by code that lies where the vDSO's
 * mapping is padding. Nothing of that raises a signal: a trap would reset a handler that ignores SIGTRAP, or be mistaken for
 * one that waits.
 *
 * If this program is killed, the kernel lets every thread go on from where it stands. Therefore the thread that makes our
 * calls always stands in front of code that restores it, and before each area it looks whether we still hold a lock that the
 * kernel drops with us: areas that were moved have the same contents as those that were not. What stays behind is address
 * space and a word of padding. Not covered is one area in flight, if the thread is preempted in it; and, where the vDSO has
 * no room, a fraction of a millisecond for each process (bring_in_code).
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <elf.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <linux/kcmp.h>
#include <linux/mount.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
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
enum { STOP_TIMEOUT_MS = 2000, FREEZE_TIMEOUT_MS = 10000, USER_64_BIT = 0x33, RSEQ_UNREGISTER = 1, RESTART_WITHOUT_HANDLER = 514 };

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
enum { GET_SYSCALL_USER_DISPATCH = 0x4211 };

struct span { uint64_t start, end; };
struct area { uint64_t start, end, offset, aside; int prot, whole, advice; };
struct job { size_t first, count; uint64_t offset; }; /* spans that are read together and written at once */
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
	struct span *spans;              /* what is copied */
	size_t n_spans, cap_spans;
	struct job *jobs;
	size_t n_jobs, cap_jobs;
	uint64_t copied_bytes, next_job;
	int ended;                       /* all of it: what children it had are others' now */
	int file, memory, failed;        /* memory: /proc/PID/mem; failed: errno of a copying thread */
	int has_file;                    /* the process has the file open: through it scripts see that we are gone */
	int64_t inside_file;
	int injecting;                   /* the injector's registers and mask are not its own */
	struct user_regs_struct saved;
	struct __ptrace_rseq_configuration rseq;
	uint64_t mask, vdso_syscall, vdso_room, code, table, table_bytes, aside, aside_bytes;
	uint64_t covered[128];           /* what the code lies upon; in a page of its own (code == own_page) nothing */
	uint64_t own_page;
};

static struct process **processes, *by_pid[1 << 22]; /* 4194304: the kernel's PID_MAX_LIMIT */
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

/* What the code knows. It lies right behind the code, is written by us and only read there. */
struct knowledge {
	struct user_regs_struct regs;    /* where the thread goes on if we are gone; offsets as in the code */
	uint64_t mask;
	int64_t file;
	struct flock lock;
	uint64_t rseq, rseq_bytes, rseq_signature;
};
_Static_assert(offsetof(struct knowledge, mask) == 216 && offsetof(struct knowledge, file) == 224 &&
	       offsetof(struct knowledge, lock) == 232 && offsetof(struct knowledge, rseq) == 264, "the offsets in the code");
_Static_assert(SYS_fcntl == 72 && F_OFD_SETLKW == 38 && SYS_rt_sigprocmask == 14 && SIG_SETMASK == 2 && SYS_close == 3 &&
	       SYS_rseq == 334, "the calls in the code");

#define KNOWN(offset) "known + " #offset "(%rip)"
__asm__(".pushsection .rodata\n"
	".balign 8\n"
	"code_begins:\n"
	"1:	mov (%r12), %rax\n"          /* run the calls from r12 on */
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
	"2:	movq $1, (%r14)\n"           /* done */
	"3:	mov $72, %eax\n"             /* fcntl(file, F_OFD_SETLKW, &lock) returns 0 when we are gone */
	"	mov " KNOWN(224) ", %rdi\n"
	"	mov $38, %esi\n"
	"	lea " KNOWN(232) ", %rdx\n"
	"	syscall\n"
	"	test %rax, %rax\n"
	"	jnz 3b\n"
	"	jmp code_farewell\n"
	"code_call:\n"                       /* a single call with the registers that we set */
	"	syscall\n"
	"code_farewell:\n"                   /* we are gone */
	"	mov " KNOWN(264) ", %rdi\n"
	"	test %rdi, %rdi\n"
	"	jz 4f\n"
	"	mov $334, %eax\n"            /* rseq(area, bytes, 0, signature): fails if it never was unregistered */
	"	mov " KNOWN(272) ", %rsi\n"
	"	xor %edx, %edx\n"
	"	mov " KNOWN(280) ", %r10\n"
	"	syscall\n"
	"4:	mov " KNOWN(224) ", %rdi\n"
	"	test %rdi, %rdi\n"
	"	js 5f\n"
	"	mov $3, %eax\n"              /* close(file) */
	"	syscall\n"
	"5:	mov " KNOWN(152) ", %rsp\n"
	"	mov $14, %eax\n"             /* rt_sigprocmask(SIG_SETMASK, &mask, 0, 8) */
	"	mov $2, %edi\n"
	"	lea " KNOWN(216) ", %rsi\n"
	"	xor %edx, %edx\n"
	"	mov $8, %r10d\n"
	"	syscall\n"
	"	mov " KNOWN(144) ", %ecx\n"  /* the flags that the above changed: without a stack, which may have no room */
	"	mov %ecx, %eax\n"
	"	shr $11, %eax\n"
	"	and $1, %eax\n"
	"	mov %cl, %ah\n"
	"	add $127, %al\n"             /* overflows if the flag was set */
	"	sahf\n"
	"	mov " KNOWN(0) ", %r15\n"
	"	mov " KNOWN(8) ", %r14\n"
	"	mov " KNOWN(16) ", %r13\n"
	"	mov " KNOWN(24) ", %r12\n"
	"	mov " KNOWN(32) ", %rbp\n"
	"	mov " KNOWN(40) ", %rbx\n"
	"	mov " KNOWN(48) ", %r11\n"
	"	mov " KNOWN(56) ", %r10\n"
	"	mov " KNOWN(64) ", %r9\n"
	"	mov " KNOWN(72) ", %r8\n"
	"	mov " KNOWN(80) ", %rax\n"
	"	mov " KNOWN(88) ", %rcx\n"
	"	mov " KNOWN(96) ", %rdx\n"
	"	mov " KNOWN(104) ", %rsi\n"
	"	mov " KNOWN(112) ", %rdi\n"
	"	jmp *" KNOWN(128) "\n"
	"	.balign 8\n"
	"known:\n"
	".popsection\n");
extern const char code_begins[], code_call[], code_farewell[], known[];
#define CODE_BYTES ((size_t)(known - code_begins))
#define ALL_BYTES (CODE_BYTES + sizeof(struct knowledge))

struct table { uint64_t done; struct call calls[]; }; /* in memory that the process may write to */

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
	r.rip = p->code ? p->code + (uint64_t)(code_call - code_begins) : p->vdso_syscall;
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

/* Where a program's segments end in the vDSO's image; what follows in its last page is for debuggers, or nothing. */
static size_t end_of_segments(const unsigned char *image, size_t bytes)
{
	const Elf64_Ehdr *header = (const Elf64_Ehdr *)image;
	size_t end = 0;
	if (bytes < sizeof *header || memcmp(image, ELFMAG, SELFMAG) || header->e_phentsize != sizeof(Elf64_Phdr)) return bytes;
	for (size_t i = 0; i < header->e_phnum; i++) {
		const Elf64_Phdr *segment = (const Elf64_Phdr *)(image + header->e_phoff) + i;
		if ((const unsigned char *)(segment + 1) > image + bytes) return bytes;
		if (segment->p_offset + segment->p_filesz > end) end = segment->p_offset + segment->p_filesz;
	}
	return end;
}

static int look_at_vdso(struct process *p)
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
	static unsigned char image[8 * PAGE];
	size_t bytes = end - start;
	errno = ENOEXEC;
	if (!start || bytes > sizeof image || read_from(p, start, image, bytes)) return -1;
	if (end_of_segments(image, bytes) + ALL_BYTES + 8 <= bytes && ALL_BYTES <= sizeof p->covered)
		p->vdso_room = (end - ALL_BYTES) & -8UL;
	for (size_t i = 0; i + 1 < bytes; i++)
		if (image[i] == 0x0f && image[i + 1] == 0x05) { p->vdso_syscall = start + i; return 0; }
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

/* Writes as a debugger does, for whom no page is read-only. What is written has a length that is a multiple of eight. */
static int poke(struct process *p, uint64_t at, const void *data, size_t bytes)
{
	for (size_t i = 0; i < bytes; i += 8) {
		uint64_t word;
		memcpy(&word, (const char *)data + i, 8);
		if (ptrace(PTRACE_POKEDATA, p->injector, at + i, word)) return -1;
	}
	return 0;
}

static int know_file(struct process *p, int64_t file)
{
	return poke(p, p->code + CODE_BYTES + offsetof(struct knowledge, file), &file, sizeof file);
}

static int write_code(struct process *p, uint64_t at)
{
	struct knowledge k = {.regs = as_restarted(p->saved), .mask = p->mask, .file = -1,
			      .lock = {.l_type = F_RDLCK, .l_whence = SEEK_SET, .l_len = 1},
			      .rseq = p->rseq.rseq_abi_pointer, .rseq_bytes = p->rseq.rseq_abi_size,
			      .rseq_signature = p->rseq.signature};
	return poke(p, at, code_begins, CODE_BYTES) || poke(p, at + CODE_BYTES, &k, sizeof k) ? -1 : 0;
}

/* Brings our code in and lets the thread stand in it, with all signals blocked. Where the vDSO has no room it gets a page of
 * its own, by a call that stands in front of the vDSO's code and not of ours: being killed there costs the process its life. */
static int bring_in_code(struct process *p)
{
	uint64_t everything = ~0UL;
	struct user_regs_struct r = p->saved;
	if (p->vdso_room) {
		if (read_from(p, p->vdso_room, p->covered, ALL_BYTES) || write_code(p, p->vdso_room)) return -1;
		p->code = p->vdso_room;
		p->injecting = 1;
		r.rip = p->code + (uint64_t)(code_farewell - code_begins);
		r.orig_rax = (uint64_t)-1;
		return ptrace(PTRACE_SETREGS, p->injector, 0, &r) || ptrace(PTRACE_SETSIGMASK, p->injector, 8, &everything) ? -1 : 0;
	}
	p->injecting = 1;
	if (ptrace(PTRACE_SETSIGMASK, p->injector, 8, &everything)) return -1;
	/* Never writable and executable, not even one after the other: prctl(PR_SET_MDWE) forbids that. */
	int64_t at = one_call(p, SYS_mmap, 0, PAGE, PROT_READ | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS, -1);
	if (at < 0) { errno = (int)-at; return -1; }
	p->own_page = (uint64_t)at;
	if (write_code(p, p->own_page)) return -1;
	p->code = p->own_page;
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
	if (ptrace(PTRACE_GETREGS, p->injector, 0, &p->saved)) return -1;
	const char *reason = why_not_inject(p);
	if (reason) refuse("process %d: %s", p->pid, reason);
	if (look_at_vdso(p)) return -1;
	if (p->vdso_room && p->saved.rip - p->vdso_room < ALL_BYTES)
		refuse("process %d: has not yet recovered from a fold that was killed: try again", p->pid);
	if (ptrace(PTRACE_GETSIGMASK, p->injector, 8, &p->mask)) return -1;
	leave_rseq(p);
	if (bring_in_code(p)) return -1;
	p->table_bytes = (sizeof(struct table) + (n_calls + 1) * sizeof(struct call) + PAGE - 1) & -PAGE;
	int64_t r = one_call(p, SYS_mmap, 0, p->table_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1);
	if (r < 0) { errno = (int)-r; return -1; }
	p->table = (uint64_t)r;
	r = set_rseq(p, RSEQ_UNREGISTER);
	if (r < 0) { errno = (int)-r; return -1; }
	return 0;
}

static void end_injection(struct process *p)
{
	if (!p->injecting) return;
	if (p->code) set_rseq(p, 0); /* fails if it never was unregistered */
	if (p->table) one_call(p, SYS_munmap, p->table, p->table_bytes, 0, 0, 0);
	uint64_t code = p->code;
	if (p->own_page) {
		p->code = 0; /* the call that removes it cannot be made in it */
		one_call(p, SYS_munmap, p->own_page, PAGE, 0, 0, 0);
	}
	ptrace(PTRACE_SETSIGMASK, p->injector, 8, &p->mask);
	ptrace(PTRACE_SETREGS, p->injector, 0, &p->saved);
	if (code && !p->own_page) poke(p, code, p->covered, ALL_BYTES);
	p->code = p->table = p->own_page = 0;
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
		if (read_from(p, p->table, &done, sizeof done)) return lost();
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
	uint64_t first = p->table + offsetof(struct table, calls), none = 0;
	struct user_regs_struct r = p->saved;
	calls[n].number = -1;
	if (write_to(p, first, calls, (n + 1) * sizeof *calls) || write_to(p, p->table, &none, sizeof none)) return -1;
	r.rip = p->code;
	r.r12 = first;
	r.r14 = p->table;
	r.orig_rax = (uint64_t)-1;
	if (ptrace(PTRACE_SETREGS, p->injector, 0, &r) || ptrace(PTRACE_CONT, p->injector, 0, 0)) return -1;
	if (wait_until_done(p) || ptrace(PTRACE_GETREGS, p->injector, 0, &r)) return -1;
	if (read_from(p, first, calls, (n + 1) * sizeof *calls)) return -1;
	return (ssize_t)((r.r12 - first) / sizeof *calls);
}

/* ---- freeze --------------------------------------------------------------------------------------------------- */

static struct process *find_process(pid_t pid)
{
	return pid > 0 && pid < (int)(sizeof by_pid / sizeof *by_pid) ? by_pid[pid] : 0;
}

static int add_process(pid_t pid) /* 1 if it is new */
{
	if (find_process(pid)) return 0;
	struct process *p = calloc(1, sizeof *p);
	if (!p) abort();
	p->pid = pid;
	p->file = p->memory = -1;
	processes = grow(processes, n_processes, &cap_processes, sizeof *processes);
	by_pid[pid] = processes[n_processes++] = p;
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
	if (p->ended) return 0;
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
	p->ended = !p->n_threads && !is_alive(p->pid, p->pid) && !found;
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
	int64_t deadline = now_ms() + FREEZE_TIMEOUT_MS;
	for (int quiet = 0; quiet < 2;) {
		int found = 0;
		if (now_ms() > deadline) refuse("processes are born faster than they can be stopped");
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

/* Joins what is close together: thousands of direct writes of a page each took longer than all the rest. */
static void add_span(struct process *p, struct area *a, uint64_t start, uint64_t end)
{
	enum { GAP_BYTES = 64 << 10, MOST_SPANS = HUGE_BYTES / PAGE };
	struct job *last = p->n_jobs ? &p->jobs[p->n_jobs - 1] : 0;
	struct span *before = p->n_spans ? &p->spans[p->n_spans - 1] : 0;
	p->copied_bytes += end - start;
	if (last && before->start >= a->start && start - before->end <= GAP_BYTES && start / HUGE_BYTES == before->start / HUGE_BYTES &&
	    last->count < MOST_SPANS) {
		last->count++;
	} else {
		p->jobs = grow(p->jobs, p->n_jobs, &p->cap_jobs, sizeof *p->jobs);
		p->jobs[p->n_jobs++] = (struct job){p->n_spans, 1, a->offset + start - a->start};
	}
	p->spans = grow(p->spans, p->n_spans, &p->cap_spans, sizeof *p->spans);
	p->spans[p->n_spans++] = (struct span){start, end};
}

static void add_pages(struct process *p, struct area *a, uint64_t start, uint64_t end)
{
	while (start < end) { /* cut where 2 MiB pages begin: the file's offsets are congruent */
		uint64_t next = (start + HUGE_BYTES) & ~(HUGE_BYTES - 1);
		add_span(p, a, start, next < end ? next : end);
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
			if (a->whole) add_pages(p, a, covered, regions[k].start);
			else if (!is_guard) add_pages(p, a, regions[k].start, regions[k].end);
			covered = regions[k].end;
		}
		at = s.walk_end;
	}
	if (a->whole) add_pages(p, a, covered, a->end);
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
	struct iovec local[HUGE_BYTES / PAGE], remote[HUGE_BYTES / PAGE];
	struct span *spans = p->spans + j->first;
	size_t total = 0;
	for (size_t i = 0; i < j->count; i++) {
		char *to = buffer + (spans[i].start - spans[0].start);
		size_t bytes = spans[i].end - spans[i].start;
		if (i) memset(buffer + (spans[i - 1].end - spans[0].start), 0, spans[i].start - spans[i - 1].end);
		local[i] = (struct iovec){to, bytes};
		remote[i] = (struct iovec){(void *)spans[i].start, bytes};
		total += bytes;
	}
	errno = EFAULT; /* what it means to read less than was asked for */
	if (process_vm_readv(p->injector, local, j->count, remote, j->count, 0) == (ssize_t)total) return 0;
	int reason = errno;
	/* Memory that may only be written; as a debugger we may read it. */
	for (size_t i = 0; i < j->count; i++)
		if (pread(p->memory, local[i].iov_base, local[i].iov_len, (off_t)spans[i].start) != (ssize_t)local[i].iov_len)
			return reason;
	return 0;
}

static int write_job(struct process *p, struct job *j, const char *buffer, size_t bytes) /* 0, or errno */
{
	for (size_t done = 0; done < bytes;) {
		ssize_t n = pwrite(p->file, buffer + done, bytes - done, (off_t)(j->offset + done));
		if (n > 0) { done += (size_t)n; continue; }
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
		size_t bytes = p->spans[j->first + j->count - 1].end - p->spans[j->first].start;
		int reason = poll(&orders, 1, 0) > 0 && orders.revents & (POLLHUP | POLLERR) ? ECANCELED : read_job(p, j, buffer);
		/* Zeros stay a hole. */
		if (!reason && (buffer[0] || memcmp(buffer, buffer + 1, bytes - 1))) reason = write_job(p, j, buffer, bytes);
		if (reason) p->failed = reason;
	}
	free(buffer);
	return 0;
}

static void open_file(struct process *p)
{
	struct flock alive = {.l_type = F_WRLCK, .l_whence = SEEK_SET, .l_len = 1};
	enum { FLAGS = O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC };
	/* Direct writes: a copy that went through the page cache took four times as long (kernel 6.18, ext4). Some refuse them.
	 * Into a tmpfs with huge pages they are what is fastest, too: whole pages need not be zeroed before, as mapped ones are. */
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
			     (int64_t)(p->code + CODE_BYTES + offsetof(struct knowledge, lock)), 0, 0, 0, ON_FAILURE};
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
	uint64_t at = p->table + offsetof(struct table, calls);
	int bytes = snprintf(path, sizeof path, "%s/%s", inside, p->name) + 1;
	if (bytes > (int)sizeof path) return -ENAMETOOLONG;
	if (write_to(p, at, path, (size_t)bytes)) return -errno;
	int64_t file = one_call(p, SYS_openat, (uint64_t)AT_FDCWD, at, O_RDONLY | O_CLOEXEC, 0, 0);
	if (file < 0) refuse("process %d: cannot open %s: %s", p->pid, path, strerror((int)-file));
	p->has_file = 1;
	p->inside_file = file;
	return know_file(p, file) ? -errno : file;
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
	if (p->table && p->aside) {
		if (undo && p->has_file) move_back(p);
		one_call(p, SYS_munmap, p->aside, p->aside_bytes, 0, 0, 0);
		p->aside = 0;
	}
	if (p->has_file) {
		know_file(p, -1);
		one_call(p, SYS_close, (uint64_t)p->inside_file, 0, 0, 0, 0);
		p->has_file = 0;
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

/* ---- the folder inside ---------------------------------------------------------------------------------------- */

/* A child enters the namespace, for good: we need ours for the rest. Returns 0, or errno. */
static int bind_folder(int namespace, int tree)
{
	struct mount_attr readonly = {.attr_set = MOUNT_ATTR_RDONLY};
	if (setns(namespace, CLONE_NEWNS) || mkdir(inside, 0755)) return errno;
	if (syscall(SYS_mount_setattr, tree, "", AT_EMPTY_PATH, &readonly, sizeof readonly) ||
	    syscall(SYS_move_mount, tree, "", AT_FDCWD, inside, MOVE_MOUNT_F_EMPTY_PATH)) {
		int reason = errno;
		rmdir(inside);
		return reason;
	}
	return 0;
}

static void show_folder(pid_t root)
{
	char path[512];
	int status = 0;
	snprintf(path, sizeof path, "/proc/%d/root%s", root, inside);
	if (!access(path, F_OK)) return;
	snprintf(path, sizeof path, "/proc/%d/ns/mnt", root);
	int namespace = open(path, O_RDONLY | O_CLOEXEC);
	if (namespace < 0) return; /* freezing it will say why */
	int tree = (int)syscall(SYS_open_tree, folder, "", OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC | AT_EMPTY_PATH);
	pid_t child = tree < 0 ? -1 : fork();
	if (!child) _exit(bind_folder(namespace, tree));
	int reason = errno;
	if (child > 0 && waitpid(child, &status, 0) == child) reason = WIFEXITED(status) ? WEXITSTATUS(status) : ECHILD;
	if (child < 0 || reason) refuse("the folder of memory files cannot be bound in the sandbox: %s", strerror(reason));
	close(tree);
	close(namespace);
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
	show_folder(atoi(argv[1]));
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
