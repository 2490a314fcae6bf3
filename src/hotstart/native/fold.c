/* hotstart-fold: freezes a process tree, copies chosen areas of memory into memory files, and maps those files in their
 * place, privately, so that the processes go on unchanged and a CRIU dump afterwards finds almost nothing to write.
 *
 * usage: hotstart-fold ROOT_PID FOLDER_FD INSIDE THREADS          (x86_64, kernel 6.7+ for PAGEMAP_SCAN)
 *
 * It takes no decisions. A conversation of lines on stdin and stdout:
 *   < process PID                     one for each process of the tree, all of its threads stopped
 *   < frozen
 *   > compare PID BASE START END WHOLE             any number of these, then
 *   > answer
 *   < block PID BASE START END SAME DIFFERENT ZERO for each 2 MiB: pages that both share, that they do not, that only BASE has
 *   < compared
 *   > process PID NAME SIZE           NAME is made in FOLDER_FD and is INSIDE/NAME to the process; "-": it needs none
 *   > area START END OFFSET PROT WHOLE ADVICE BASE  hexadecimal; WHOLE: every page, else those that are populated; BASE: the
 *                                     process in whose file it is mapped, at the offset of the same addresses there, or 0
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
 * kernel drops with us: areas that were moved have the same contents as those that were not. All other threads stand in front
 * of code that waits until it is done, and restores them then. What stays behind is address space. Not covered is, where the
 * vDSO has no room, a fraction of a millisecond for each process (bring_in_code); and threads that cannot make system calls.
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
struct waiter {                          /* a thread that is not the injector, while areas are in flight */
	pid_t tid;
	struct user_regs_struct saved;
	struct __ptrace_rseq_configuration rseq;
	uint64_t mask, code;
};
struct area {
	uint64_t start, end, offset, aside;
	int prot, whole, advice, moved;
	struct process *owner;           /* in whose file it is mapped */
	size_t first_apart, n_apart;     /* pages that are not what the file has, if it is another's */
};
struct wish { struct process *p, *base; uint64_t start, end; int whole; };
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
	struct span *apart;              /* what is not as in another's file, and stays private */
	size_t n_apart, cap_apart;
	struct job *jobs;
	size_t n_jobs, cap_jobs;
	uint64_t copied_bytes, next_job;
	int ended;                       /* all of it: what children it had are others' now */
	int file, memory, pagemap, failed; /* memory, pagemap: of /proc/PID; failed: errno of a copying thread */
	int has_file;                    /* the process has the file open: through it scripts see that we are gone */
	int64_t inside_file;
	int injecting;                   /* the injector's registers and mask are not its own */
	struct user_regs_struct saved;
	struct __ptrace_rseq_configuration rseq;
	uint64_t mask, vdso_syscall, vdso_room, code, table, table_bytes, aside, aside_bytes;
	uint64_t covered[128];           /* what the code lies upon; in a page of its own (code == own_page) nothing */
	uint64_t own_page;
	struct waiter *waiters;
	size_t n_waiters;
	uint64_t waiting_room, waiting_bytes; /* each one's code */
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
	uint64_t gate;                   /* where the word stands that all other threads wait for */
};
_Static_assert(offsetof(struct knowledge, mask) == 216 && offsetof(struct knowledge, file) == 224 &&
	       offsetof(struct knowledge, lock) == 232 && offsetof(struct knowledge, rseq) == 264 && offsetof(struct knowledge, gate) == 288, "the offsets in the code");
_Static_assert(SYS_sched_yield == 24 && SYS_fcntl == 72 && F_OFD_SETLKW == 38 && SYS_rt_sigprocmask == 14 && SIG_SETMASK == 2 && SYS_close == 3 &&
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
	"code_farewell:\n"                   /* we are gone: all areas are whole, the others may go on */
	"	mov " KNOWN(288) ", %rdi\n"
	"	test %rdi, %rdi\n"
	"	jz 6f\n"
	"	movq $1, (%rdi)\n"
	"6:"
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
	"code_waits:\n"                      /* what the other threads do if we are gone, until the injector is done */
	"	mov " KNOWN(288) ", %rax\n"
	"	cmpq $0, (%rax)\n"
	"	jne code_farewell\n"
	"	mov $24, %eax\n"            /* sched_yield() */
	"	syscall\n"
	"	jmp code_waits\n"
	"	.balign 8\n"
	"known:\n"
	".popsection\n");
extern const char code_begins[], code_call[], code_farewell[], code_waits[], known[];
#define CODE_BYTES ((size_t)(known - code_begins))
#define ALL_BYTES (CODE_BYTES + sizeof(struct knowledge))

struct table { uint64_t done, gate; struct call calls[]; }; /* in memory that the process may write to */

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

static int know_gate(struct process *p, uint64_t gate)
{
	return poke(p, p->code + CODE_BYTES + offsetof(struct knowledge, gate), &gate, sizeof gate);
}

static struct knowledge knowledge_of(struct process *p)
{
	return (struct knowledge){.regs = as_restarted(p->saved), .mask = p->mask, .file = -1,
				  .lock = {.l_type = F_RDLCK, .l_whence = SEEK_SET, .l_len = 1},
				  .rseq = p->rseq.rseq_abi_pointer, .rseq_bytes = p->rseq.rseq_abi_size,
				  .rseq_signature = p->rseq.signature};
}

static int write_code(struct process *p, uint64_t at)
{
	struct knowledge k = knowledge_of(p);
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

static int64_t status_number(pid_t tid, const char *name, int last)
{
	char path[64], line[256];
	int64_t value = 0;
	size_t n = strlen(name);
	snprintf(path, sizeof path, "/proc/%d/status", tid);
	FILE *f = fopen(path, "re");
	while (f && fgets(line, sizeof line, f))
		if (!strncmp(line, name, n)) value = strtoll(last ? strrchr(line, '\t') : line + n, 0, 10);
	if (f) fclose(f);
	return value;
}

static int64_t status_field(pid_t tid, const char *name) { return status_number(tid, name, 0); }
static int64_t last_number(pid_t tid, const char *name) { return status_number(tid, name, 1); }

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

/* ---- the other threads, while areas are in flight ---------------------------------------------------------------- */

/* Makes a waiter the one that we make calls in, or the injector again. */
static void swap_roles(struct process *p, struct waiter *w)
{
	struct waiter other = {p->injector, p->saved, p->rseq, p->mask, p->code};
	p->injector = w->tid;
	p->saved = w->saved;
	p->rseq = w->rseq;
	p->mask = w->mask;
	p->code = w->code;
	*w = other;
}

/* Lets the thread stand in front of code that waits until the injector is done. It runs that only if we are killed. */
static int hold(struct process *p, int memory)
{
	uint64_t everything = ~0UL;
	struct knowledge k;
	struct user_regs_struct r;
	leave_rseq(p);
	k = knowledge_of(p);
	k.gate = p->table + offsetof(struct table, gate);
	if (pwrite(memory, code_begins, CODE_BYTES, (off_t)p->code) != (ssize_t)CODE_BYTES ||
	    pwrite(memory, &k, sizeof k, (off_t)(p->code + CODE_BYTES)) != (ssize_t)sizeof k)
		return -1;
	r = p->saved;
	r.rip = p->code + (uint64_t)(code_waits - code_begins);
	r.orig_rax = (uint64_t)-1;
	if (ptrace(PTRACE_SETREGS, p->injector, 0, &r) || ptrace(PTRACE_SETSIGMASK, p->injector, 8, &everything)) return -1;
	/* Nothing is in flight yet: who is killed in this call leaves threads that go on. */
	if (set_rseq(p, RSEQ_UNREGISTER) < 0) return -1;
	return ptrace(PTRACE_SETREGS, p->injector, 0, &r);
}

static void let_go_on(struct process *p)
{
	set_rseq(p, 0); /* fails if it never was unregistered */
	ptrace(PTRACE_SETSIGMASK, p->injector, 8, &p->mask);
	ptrace(PTRACE_SETREGS, p->injector, 0, &p->saved);
}

static int hold_others(struct process *p)
{
	char path[64];
	size_t each = (ALL_BYTES + 63) & -64UL;
	int64_t at;
	if (p->n_threads < 2) return 0;
	p->waiters = calloc(p->n_threads, sizeof *p->waiters);
	if (!p->waiters) abort();
	p->waiting_bytes = (p->n_threads * each + PAGE - 1) & -PAGE;
	at = one_call(p, SYS_mmap, 0, p->waiting_bytes, PROT_READ | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS, -1);
	if (at < 0) { errno = (int)-at; return -1; }
	p->waiting_room = (uint64_t)at;
	snprintf(path, sizeof path, "/proc/%d/mem", p->injector);
	int memory = open(path, O_RDWR | O_CLOEXEC), failed = memory < 0;
	for (size_t i = 0; i < p->n_threads && !failed; i++) {
		struct waiter w = {.tid = p->threads[i], .code = p->waiting_room + i * each};
		if (w.tid == p->injector) continue;
		if (ptrace(PTRACE_GETREGS, w.tid, 0, &w.saved) || ptrace(PTRACE_GETSIGMASK, w.tid, 8, &w.mask)) { failed = 1; break; }
		swap_roles(p, &w);
		int excused = why_not_inject(p) != 0; /* it stays as it is: at risk if we are killed */
		if (!excused) failed = hold(p, memory);
		swap_roles(p, &w);
		if (!excused) p->waiters[p->n_waiters++] = w;
	}
	if (memory >= 0) close(memory);
	return failed ? -1 : 0;
}

static void release_others(struct process *p)
{
	for (size_t i = 0; i < p->n_waiters; i++) {
		swap_roles(p, &p->waiters[i]);
		let_go_on(p);
		swap_roles(p, &p->waiters[i]);
	}
	p->n_waiters = 0;
	if (p->waiting_room) one_call(p, SYS_munmap, p->waiting_room, p->waiting_bytes, 0, 0, 0);
	p->waiting_room = 0;
	free(p->waiters);
	p->waiters = 0;
}

static int begin_injection(struct process *p, size_t bytes)
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
	p->table_bytes = (sizeof(struct table) + sizeof(struct call) + bytes + PAGE - 1) & -PAGE;
	int64_t r = one_call(p, SYS_mmap, 0, p->table_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1);
	if (r < 0) { errno = (int)-r; return -1; }
	p->table = (uint64_t)r;
	if (know_gate(p, p->table + offsetof(struct table, gate))) return -1;
	r = set_rseq(p, RSEQ_UNREGISTER);
	if (r < 0) { errno = (int)-r; return -1; }
	return hold_others(p);
}

static void end_injection(struct process *p)
{
	if (!p->injecting) return;
	if (p->code) release_others(p);
	if (p->code && p->table) know_gate(p, 0);
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
	p->file = p->memory = p->pagemap = -1;
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

/* ---- what processes share: pages that were never written to since a fork --------------------------------------- */

static void open_views(struct process *p)
{
	char path[64];
	if (p->pagemap >= 0) return;
	snprintf(path, sizeof path, "/proc/%d/pagemap", p->injector);
	p->pagemap = open(path, O_RDONLY | O_CLOEXEC);
	if (p->pagemap < 0) refuse("process %d: %s: %s", p->pid, path, strerror(errno));
	snprintf(path, sizeof path, "/proc/%d/mem", p->injector);
	p->memory = open(path, O_RDONLY | O_CLOEXEC);
}

enum { PAGES_AT_ONCE = 16 * HUGE_BYTES / PAGE };
static const uint64_t PFN = (1UL << 55) - 1, PRESENT = 1UL << 63, SWAPPED = 1UL << 62, GUARD = 1UL << 58;
enum likeness { BOTH_ABSENT, SAME_PAGE, OTHER_PAGE };

static void read_entries(struct process *p, uint64_t start, size_t pages, uint64_t *entries)
{
	errno = EIO;
	if (pread(p->pagemap, entries, pages * 8, (off_t)(start / PAGE * 8)) != (ssize_t)(pages * 8))
		refuse("process %d: pagemap: %s", p->pid, strerror(errno));
}

static int is_there(uint64_t entry) { return (entry & (PRESENT | SWAPPED)) != 0; }

/* Numbers of pages are zero to those who may not see them (CAP_SYS_ADMIN): contents decide then. */
static enum likeness likeness(uint64_t a, uint64_t b)
{
	if (!is_there(a) && !is_there(b)) return BOTH_ABSENT;
	return (a ^ b) & (PFN | PRESENT | SWAPPED) || !(a & PFN) ? OTHER_PAGE : SAME_PAGE;
}

static int read_memory(struct process *p, uint64_t at, void *to, size_t bytes) /* 0, or errno */
{
	errno = EFAULT;
	if (!read_from(p, at, to, bytes)) return 0;
	int reason = errno; /* memory that may only be written; as a debugger we may read it */
	return pread(p->memory, to, bytes, (off_t)at) == (ssize_t)bytes ? 0 : reason;
}

/* Contents as the file has them: absent pages of anonymous memory are zero there, and reading must not make them. */
static void read_contents(struct process *p, uint64_t at, size_t pages, int absent, char *to)
{
	int reason = 0;
	if (absent) memset(to, 0, pages * PAGE);
	else reason = read_memory(p, at, to, pages * PAGE);
	if (reason) refuse("process %d: copying its memory: %s", p->pid, strerror(reason));
}

static void compare(const struct wish *w)
{
	static uint64_t mine[PAGES_AT_ONCE], bases[PAGES_AT_ONCE];
	static char page[2][PAGE];
	open_views(w->p);
	open_views(w->base);
	for (uint64_t at = w->start; at < w->end;) {
		size_t pages = (w->end - at) / PAGE < PAGES_AT_ONCE ? (w->end - at) / PAGE : PAGES_AT_ONCE;
		read_entries(w->p, at, pages, mine);
		read_entries(w->base, at, pages, bases);
		for (size_t i = 0; i < pages;) {
			uint64_t begin = at + i * PAGE, end = (begin + HUGE_BYTES) & -HUGE_BYTES, counts[2] = {0, 0}, zeros = 0;
			if (end > at + pages * PAGE) end = at + pages * PAGE;
			for (; at + i * PAGE < end; i++) {
				enum likeness l = likeness(mine[i], bases[i]);
				if (l == BOTH_ABSENT) continue;
				if (l == OTHER_PAGE && !w->whole && !is_there(mine[i])) { zeros++; continue; }
				if (l == OTHER_PAGE && is_there(bases[i]) && !(mine[i] & PFN) && !(bases[i] & PFN)) {
					read_contents(w->p, at + i * PAGE, 1, 0, page[0]);
					read_contents(w->base, at + i * PAGE, 1, 0, page[1]);
					if (!memcmp(page[0], page[1], PAGE)) l = SAME_PAGE;
				}
				counts[l == SAME_PAGE]++;
			}
			printf("block %d %d %lx %lx %lu %lu %lu\n", w->p->pid, w->base->pid, begin, end, counts[1], counts[0], zeros);
		}
		at += pages * PAGE;
	}
}

static void add_apart(struct process *p, struct area *a, uint64_t start)
{
	struct span *last = a->n_apart ? &p->apart[p->n_apart - 1] : 0;
	if (last && last->end == start) { last->end += PAGE; return; }
	p->apart = grow(p->apart, p->n_apart, &p->cap_apart, sizeof *p->apart);
	p->apart[p->n_apart++] = (struct span){start, start + PAGE};
	a->n_apart++;
}

/* Which of these pages, none of which both share, differ after all? */
static void find_differences(struct process *p, struct area *a, uint64_t start, size_t pages, int absent, int base_absent)
{
	static char mine[HUGE_BYTES], bases[HUGE_BYTES];
	read_contents(p, start, pages, absent, mine);
	read_contents(a->owner, start, pages, base_absent, bases);
	for (size_t i = 0; i < pages; i++)
		if (memcmp(mine + i * PAGE, bases + i * PAGE, PAGE)) add_apart(p, a, start + i * PAGE);
}

static void find_apart(struct process *p, struct area *a)
{
	static uint64_t mine[PAGES_AT_ONCE], bases[PAGES_AT_ONCE];
	open_views(p);
	open_views(a->owner);
	a->first_apart = p->n_apart;
	for (uint64_t at = a->start; at < a->end;) {
		size_t pages = (a->end - at) / PAGE < PAGES_AT_ONCE ? (a->end - at) / PAGE : PAGES_AT_ONCE;
		read_entries(p, at, pages, mine);
		read_entries(a->owner, at, pages, bases);
		for (size_t i = 0; i < pages;) {
			size_t first = i;
			int absent = !a->whole && !is_there(mine[i]), base_absent = !a->whole && !is_there(bases[i]);
			if (mine[i] & GUARD || likeness(mine[i], bases[i]) != OTHER_PAGE) { i++; continue; }
			while (i < pages && i - first < HUGE_BYTES / PAGE && !(mine[i] & GUARD) &&
			       likeness(mine[i], bases[i]) == OTHER_PAGE && (a->whole || (absent == !is_there(mine[i]) && base_absent == !is_there(bases[i]))))
				i++;
			find_differences(p, a, at + first * PAGE, i - first, absent, base_absent);
		}
		at += pages * PAGE;
	}
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
			.category_anyof_mask = a->whole || a->owner != p ? guard : IS_PRESENT | IS_SWAPPED,
			.category_inverted = IS_ZERO_PAGE, .category_mask = IS_ZERO_PAGE, .return_mask = IS_PRESENT | guard};
		if ((a->whole || a->owner != p) && !guard) break;
		int n = ioctl(pagemap, SCAN, &s);
		if (n < 0 && errno == EINVAL && guard) { guard = 0; continue; } /* a kernel before 6.15 does not know them */
		if (n < 0) refuse("process %d: PAGEMAP_SCAN: %s", p->pid, strerror(errno));
		for (int k = 0; k < n; k++) {
			int is_guard = (regions[k].categories & guard) != 0;
			if (is_guard) add_guard(p, regions[k].start, regions[k].end);
			if (a->owner != p) continue;
			if (a->whole) add_pages(p, a, covered, regions[k].start);
			else if (!is_guard) add_pages(p, a, regions[k].start, regions[k].end);
			covered = regions[k].end;
		}
		at = s.walk_end;
	}
	if (a->owner != p) find_apart(p, a);
	else if (a->whole) add_pages(p, a, covered, a->end);
}

static void find_pages(struct process *p)
{
	open_views(p);
	for (size_t i = 0; i < p->n_areas; i++) find_pages_of(p, &p->areas[i], p->pagemap);
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
	if (p->size_bytes) open_file(p);
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
	for (size_t i = 0; i < p->n_areas; i++) {
		struct area *a = &p->areas[i];
		a->aside = (uint64_t)at + ((a->start - (uint64_t)at) & (HUGE_BYTES - 1));
		at = (int64_t)(a->aside + a->end - a->start);
	}
}

static void close_inside(struct process *p)
{
	if (!p->has_file) return;
	know_file(p, -1);
	one_call(p, SYS_close, (uint64_t)p->inside_file, 0, 0, 0, 0);
	p->has_file = 0;
}

static void open_inside(struct process *p, const struct process *owner)
{
	char path[512];
	uint64_t at = p->table + offsetof(struct table, calls);
	int bytes = snprintf(path, sizeof path, "%s/%s", inside, owner->name) + 1;
	errno = ENAMETOOLONG;
	if (bytes > (int)sizeof path || write_to(p, at, path, (size_t)bytes)) refuse("process %d: %s", p->pid, strerror(errno));
	int64_t file = one_call(p, SYS_openat, (uint64_t)AT_FDCWD, at, O_RDONLY | O_CLOEXEC, 0, 0);
	if (file < 0) refuse("process %d: cannot open %s: %s", p->pid, path, strerror((int)-file));
	p->has_file = 1;
	p->inside_file = file;
	if (know_file(p, file)) refuse("process %d: %s", p->pid, strerror(errno));
}

enum { CALLS_PER_AREA = 5, MOST_VECTORS = 1024 }; /* IOV_MAX */
struct script {
	struct call *calls;
	int64_t *wanted;                 /* results, where success is not enough */
	size_t n;
	struct iovec *vectors;           /* behind the calls, at vectors_at in the process */
	size_t n_vectors;
	uint64_t vectors_at;
};

static void add_call(struct script *s, struct call c, int64_t wanted)
{
	s->wanted[s->n] = wanted;
	s->calls[s->n++] = c;
}

/* The process copies them itself: it must be done if we are killed meanwhile. */
static void copy_apart(struct process *p, struct area *a, struct script *s)
{
	int64_t self = last_number(p->injector, "NSpid:");
	for (size_t i = 0; i < a->n_apart;) {
		size_t n = a->n_apart - i < MOST_VECTORS ? a->n_apart - i : MOST_VECTORS;
		uint64_t bytes = 0, from = s->vectors_at + s->n_vectors * sizeof(struct iovec);
		for (size_t k = 0; k < n; k++) {
			struct span apart = p->apart[a->first_apart + i + k];
			size_t length = apart.end - apart.start;
			s->vectors[s->n_vectors + k] = (struct iovec){(void *)(a->aside + apart.start - a->start), length};
			s->vectors[s->n_vectors + n + k] = (struct iovec){(void *)apart.start, length};
			bytes += length;
		}
		s->n_vectors += 2 * n;
		i += n;
		add_call(s, (struct call){SYS_process_vm_writev, self, (int64_t)from, (int64_t)n,
					  (int64_t)(from + n * sizeof(struct iovec)), (int64_t)n, 0, ON_SUCCESS}, (int64_t)bytes);
	}
}

/* Returns where the area's guards end. */
static size_t add_area(struct process *p, struct area *a, size_t guard, struct script *s)
{
	int64_t start = (int64_t)a->start, length = (int64_t)(a->end - a->start);
	int prot = a->n_apart ? a->prot | PROT_READ | PROT_WRITE : a->prot;
	add_call(s, are_we_there(p, p->inside_file), -1);
	add_call(s, (struct call){SYS_mremap, start, length, length, MREMAP_MAYMOVE | MREMAP_FIXED, (int64_t)a->aside, 0, ON_SUCCESS},
		 (int64_t)a->aside);
	add_call(s, (struct call){SYS_mmap, start, length, prot, MAP_PRIVATE | MAP_FIXED | MAP_NORESERVE, p->inside_file,
				  (int64_t)a->offset, ON_SUCCESS}, start);
	copy_apart(p, a, s);
	if (prot != a->prot) add_call(s, (struct call){SYS_mprotect, start, length, a->prot, 0, 0, 0, ON_SUCCESS}, 0);
	/* Advice may fail (a kernel without huge pages). */
	if (a->advice >= 0) add_call(s, (struct call){SYS_madvise, start, length, a->advice, 0, 0, 0, ALWAYS}, -1);
	for (; guard < p->n_guards && p->guards[guard].start < a->end; guard++) {
		struct span g = p->guards[guard];
		add_call(s, (struct call){SYS_madvise, (int64_t)g.start, (int64_t)(g.end - g.start), ADVICE_GUARD_INSTALL, 0, 0, 0,
					  ON_SUCCESS}, 0);
	}
	return guard;
}

/* Maps the areas that lie in one file. */
static void map_from(struct process *p, const struct process *owner, struct script *s)
{
	size_t guard = 0, *begins = calloc(p->n_areas, sizeof *begins);
	if (!begins) abort();
	s->n = s->n_vectors = 0;
	open_inside(p, owner);
	for (size_t i = 0; i < p->n_areas; i++) {
		struct area *a = &p->areas[i];
		while (guard < p->n_guards && p->guards[guard].end <= a->start) guard++;
		begins[i] = s->n;
		if (a->owner == owner) guard = add_area(p, a, guard, s);
	}
	if (s->n_vectors && write_to(p, s->vectors_at, s->vectors, s->n_vectors * sizeof *s->vectors))
		refuse("process %d: %s", p->pid, strerror(errno));
	ssize_t made = run_script(p, s->calls, s->n);
	int reason = errno;
	for (size_t i = 0; i < p->n_areas; i++) /* where the script ended, areas never moved */
		if (p->areas[i].owner == owner) p->areas[i].moved = (ssize_t)begins[i] + 1 < made && s->calls[begins[i] + 1].number >= 0;
	if (made < 0) refuse("process %d: mapping its memory file: %s", p->pid, strerror(reason));
	for (size_t i = 0; i < s->n; i++) {
		int64_t result = s->calls[i].number;
		if (s->wanted[i] >= 0 && ((ssize_t)i >= made || result != s->wanted[i]))
			refuse("process %d: mapping its memory file: %s", p->pid,
			       (ssize_t)i < made && result < 0 ? strerror((int)-result) : "it ended before it was done");
	}
	free(begins);
}

static void map_back(struct process *p)
{
	struct script s = {0};
	size_t vectors = 0, calls = p->n_areas * CALLS_PER_AREA + p->n_guards + 512 / sizeof *s.calls;
	if (!p->n_areas) return;
	for (size_t i = 0; i < p->n_areas; i++) {
		vectors += 2 * p->areas[i].n_apart;
		calls += p->areas[i].n_apart / MOST_VECTORS + 1;
	}
	s.calls = calloc(calls + 1, sizeof *s.calls);
	s.wanted = calloc(calls + 1, sizeof *s.wanted);
	s.vectors = calloc(vectors + 1, sizeof *s.vectors);
	if (!s.calls || !s.wanted || !s.vectors || begin_injection(p, calls * sizeof *s.calls + vectors * sizeof *s.vectors))
		refuse("process %d: cannot make system calls in it: %s", p->pid, strerror(errno));
	s.vectors_at = p->table + offsetof(struct table, calls) + (calls + 1) * sizeof *s.calls;
	reserve_aside(p);
	for (size_t i = 0; i < p->n_areas; i++) {
		struct process *owner = p->areas[i].owner;
		size_t first = 0;
		while (p->areas[first].owner != owner) first++;
		if (first != i) continue;
		close_inside(p); /* one at a time: through it scripts see that we are gone */
		map_from(p, owner, &s);
	}
	free(s.calls);
	free(s.wanted);
	free(s.vectors);
}

static void move_back(struct process *p)
{
	size_t n = 0;
	struct call *calls = calloc(p->n_areas + 1, sizeof *calls);
	if (!calls) abort();
	for (size_t i = 0; i < p->n_areas; i++) {
		struct area *a = &p->areas[i];
		int64_t length = (int64_t)(a->end - a->start);
		if (!a->moved) continue;
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
	close_inside(p);
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
	struct mount_attr readonly = {.attr_set = MOUNT_ATTR_RDONLY, .propagation = 1 << 18 /* MS_PRIVATE */};
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

static struct process *process_of(int pid, const char *line)
{
	struct process *p = find_process(pid);
	if (!p || !p->injector) refuse("order not understood: %.100s", line);
	return p;
}

static void answer(struct wish *wishes, size_t n)
{
	for (size_t i = 0; i < n; i++) compare(&wishes[i]);
	puts("compared");
	fflush(stdout);
}

static void read_orders(void)
{
	char line[512];
	struct process *p = 0;
	struct wish *wishes = 0;
	size_t n_wishes = 0, cap_wishes = 0;
	while (fgets(line, sizeof line, stdin)) {
		struct area a = {0};
		struct wish w = {0};
		int pid, base;
		if (!strcmp(line, "go\n")) return;
		if (!strcmp(line, "answer\n")) {
			answer(wishes, n_wishes);
			n_wishes = 0;
		} else if (sscanf(line, "compare %d %d %lx %lx %d", &pid, &base, &w.start, &w.end, &w.whole) == 5) {
			w.p = process_of(pid, line);
			w.base = process_of(base, line);
			wishes = grow(wishes, n_wishes, &cap_wishes, sizeof w);
			wishes[n_wishes++] = w;
		} else if (!strncmp(line, "process ", 8)) {
			char name[128];
			uint64_t size;
			if (sscanf(line, "process %d %127s %lx", &pid, name, &size) != 3) refuse("order not understood: %.100s", line);
			p = process_of(pid, line);
			strcpy(p->name, name);
			p->size_bytes = size;
		} else if (p && sscanf(line, "area %lx %lx %lx %x %d %d %d", &a.start, &a.end, &a.offset, (unsigned *)&a.prot,
				       &a.whole, &a.advice, &base) == 7) {
			a.owner = base ? process_of(base, line) : p;
			if (!a.owner->size_bytes) refuse("order not understood: %.100s", line);
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
