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
 * moved back on failure. System calls are made in the process by a short script of calls that it runs itself; the first
 * one, which brings in the script's page, is a single step over a `syscall` instruction of the vDSO, so that no text
 * page is ever written.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
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
enum { STOP_TIMEOUT_MS = 2000 };

/* linux/fs.h of Debian 12 is older than PAGEMAP_SCAN (kernel 6.7, Documentation/admin-guide/mm/pagemap.rst). */
struct scan_region { uint64_t start, end, categories; };
struct scan_arg {
	uint64_t size, flags, start, end, walk_end, vec, vec_len, max_pages;
	uint64_t category_inverted, category_mask, category_anyof_mask, return_mask;
};
#define SCAN _IOWR('f', 16, struct scan_arg)
enum { IS_PRESENT = 1 << 3, IS_SWAPPED = 1 << 4, IS_ZERO_PAGE = 1 << 5 };

struct area { uint64_t start, end, offset, aside; int prot, whole, advice; };
struct job { uint64_t address, bytes, offset; };
struct process {
	pid_t pid, injector;             /* injector: the stopped thread that makes our system calls */
	pid_t *threads;
	int n_threads, cap_threads;
	char name[128];
	uint64_t size_bytes;
	struct area *areas;
	size_t n_areas, cap_areas;
	struct job *jobs;
	size_t n_jobs, cap_jobs;
	uint64_t copied_bytes, next_job;
	int file, failed;                /* failed: errno of a copying thread */
	struct user_regs_struct saved;
	uint64_t mask, vdso_syscall, script, script_bytes, aside, aside_bytes;
	int moved;                       /* the areas stand aside; undo has something to do */
};

static struct process *processes[4096];
static int n_processes;
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

/* ---- the script of system calls, run by the process itself -------------------------------------------------- */

struct call { int64_t number, a, b, c, d, e, f, may_fail; }; /* number becomes the result; a negative number ends the script */

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
	"	add $64, %r12\n"
	"	cmp $-4096, %rax\n"
	"	jbe 1b\n"
	"	cmpq $0, -8(%r12)\n"
	"	jne 1b\n"
	"2:	int3\n"
	"script_code_end:\n"
	".popsection\n");
extern const char script_code[], script_code_end[];

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

static int wait_stop(pid_t tid, int *status)
{
	for (int waited_us = 0; waited_us < STOP_TIMEOUT_MS * 1000; waited_us += 200) {
		pid_t p = waitpid(tid, status, __WALL | WNOHANG);
		if (p == tid) return 0;
		if (p < 0) return -1;
		usleep(200);
	}
	errno = ETIMEDOUT;
	return -1;
}

static int resume_until_trap(struct process *p, int request, struct user_regs_struct *regs)
{
	int status;
	if (ptrace(PTRACE_SETREGS, p->injector, 0, regs) || ptrace(request, p->injector, 0, 0)) return -1;
	/* Blocking: the script may take as long as the kernel needs to free gigabytes. */
	if (waitpid(p->injector, &status, __WALL) < 0) return -1;
	if (!WIFSTOPPED(status) || WSTOPSIG(status) != SIGTRAP) { errno = EPROTO; return -1; }
	return ptrace(PTRACE_GETREGS, p->injector, 0, regs) ? -1 : 0;
}

static int64_t one_call(struct process *p, int64_t number, uint64_t a, uint64_t b, uint64_t c, uint64_t d, int64_t e)
{
	struct user_regs_struct r = p->saved;
	r.rip = p->vdso_syscall;
	r.rax = (uint64_t)number;
	r.rdi = a; r.rsi = b; r.rdx = c; r.r10 = d; r.r8 = (uint64_t)e; r.r9 = 0;
	r.orig_rax = (uint64_t)-1; /* else the kernel would restart the interrupted call now instead of at the end */
	if (resume_until_trap(p, PTRACE_SINGLESTEP, &r)) return -errno;
	return (int64_t)r.rax;
}

static int find_vdso_syscall(struct process *p)
{
	char path[64], line[512];
	unsigned long start = 0, end = 0;
	snprintf(path, sizeof path, "/proc/%d/maps", p->pid);
	FILE *f = fopen(path, "re");
	if (!f) return -1;
	while (fgets(line, sizeof line, f))
		if (strstr(line, "[vdso]") && sscanf(line, "%lx-%lx", &start, &end) == 2) break;
	fclose(f);
	unsigned char text[4 * PAGE];
	size_t bytes = end - start < sizeof text ? end - start : sizeof text;
	struct iovec local = {text, bytes}, remote = {(void *)start, bytes};
	if (!start || process_vm_readv(p->pid, &local, 1, &remote, 1, 0) != (ssize_t)bytes) { errno = ENOEXEC; return -1; }
	for (size_t i = 0; i + 1 < bytes; i++)
		if (text[i] == 0x0f && text[i + 1] == 0x05) { p->vdso_syscall = start + i; return 0; }
	errno = ENOEXEC;
	return -1;
}

/* A restartable sequence (rseq(2)) that was interrupted must not be resumed in its middle after we moved the instruction
 * pointer: the kernel would have sent it to its abort address, so that is where it goes on. */
static void leave_rseq(struct process *p)
{
	struct __ptrace_rseq_configuration conf;
	uint64_t cs_pointer = 0;
	struct { uint32_t version, flags; uint64_t start, length, abort; } cs;
	if (ptrace(PTRACE_GET_RSEQ_CONFIGURATION, p->injector, sizeof conf, &conf) <= 0 || !conf.rseq_abi_pointer) return;
	struct iovec local = {&cs_pointer, 8}, remote = {(void *)(conf.rseq_abi_pointer + 8), 8};
	if (process_vm_readv(p->pid, &local, 1, &remote, 1, 0) != 8 || !cs_pointer) return;
	struct iovec local_cs = {&cs, sizeof cs}, remote_cs = {(void *)cs_pointer, sizeof cs};
	if (process_vm_readv(p->pid, &local_cs, 1, &remote_cs, 1, 0) != sizeof cs) return;
	if (p->saved.rip - cs.start < cs.length) p->saved.rip = cs.abort;
}

static int begin_injection(struct process *p, size_t n_calls)
{
	uint64_t nothing_but_trap = ~(1UL << (SIGTRAP - 1)); /* a blocked SIGTRAP would reset its handler (force_sig) */
	if (ptrace(PTRACE_GETREGS, p->injector, 0, &p->saved)) return -1;
	leave_rseq(p);
	if (ptrace(PTRACE_GETSIGMASK, p->injector, 8, &p->mask)) return -1;
	if (ptrace(PTRACE_SETSIGMASK, p->injector, 8, &nothing_but_trap)) return -1;
	if (find_vdso_syscall(p)) return -1;
	p->script_bytes = PAGE + ((n_calls + 1) * sizeof(struct call) + 2 * PAGE - 1) / PAGE * PAGE;
	int64_t at = one_call(p, SYS_mmap, 0, p->script_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1);
	if (at < 0) { errno = (int)-at; return -1; }
	p->script = (uint64_t)at;
	struct iovec local = {(void *)script_code, (size_t)(script_code_end - script_code)}, remote = {(void *)at, local.iov_len};
	if (process_vm_writev(p->pid, &local, 1, &remote, 1, 0) < 0) return -1;
	int64_t r = one_call(p, SYS_mprotect, p->script, PAGE, PROT_READ | PROT_EXEC, 0, 0);
	if (r < 0) { errno = (int)-r; return -1; }
	return 0;
}

static void end_injection(struct process *p)
{
	if (p->script) one_call(p, SYS_munmap, p->script, p->script_bytes, 0, 0, 0);
	p->script = 0;
	ptrace(PTRACE_SETREGS, p->injector, 0, &p->saved);
	ptrace(PTRACE_SETSIGMASK, p->injector, 8, &p->mask);
}

/* Runs the calls in the process; their results replace their numbers. Returns how many were made, or -1. */
static ssize_t run_script(struct process *p, struct call *calls, size_t n)
{
	uint64_t table = p->script + PAGE;
	calls[n].number = -1;
	struct iovec local = {calls, (n + 1) * sizeof *calls}, remote = {(void *)table, (n + 1) * sizeof *calls};
	if (process_vm_writev(p->pid, &local, 1, &remote, 1, 0) != (ssize_t)local.iov_len) return -1;
	struct user_regs_struct r = p->saved;
	r.rip = p->script;
	r.r12 = table;
	r.orig_rax = (uint64_t)-1;
	if (resume_until_trap(p, PTRACE_CONT, &r)) return -1;
	if (process_vm_readv(p->pid, &local, 1, &remote, 1, 0) != (ssize_t)local.iov_len) return -1;
	return (ssize_t)((r.r12 - table) / sizeof *calls);
}

/* ---- freeze ------------------------------------------------------------------------------------------------- */

static struct process *find_process(pid_t pid)
{
	for (int i = 0; i < n_processes; i++)
		if (processes[i]->pid == pid) return processes[i];
	return 0;
}

static char state_of(pid_t pid, pid_t tid)
{
	char path[64], text[512], state = 0;
	snprintf(path, sizeof path, "/proc/%d/task/%d/stat", pid, tid);
	FILE *f = fopen(path, "re");
	if (!f) return 'X';
	size_t n = fread(text, 1, sizeof text - 1, f);
	fclose(f);
	text[n] = 0;
	char *after = strrchr(text, ')');
	if (after) sscanf(after + 1, " %c", &state);
	return state;
}

static int stop_thread(struct process *p, pid_t tid)
{
	int status;
	for (int i = 0; i < p->n_threads; i++)
		if (p->threads[i] == tid) return 0;
	char state = state_of(p->pid, tid);
	if (state == 'Z' || state == 'X') return 0;
	/* Our own tracer may be filtered (then suspending is not allowed) or the worker strict (then it is needed). */
	if (ptrace(PTRACE_SEIZE, tid, 0, PTRACE_O_SUSPEND_SECCOMP) && ptrace(PTRACE_SEIZE, tid, 0, 0)) {
		if (errno == ESRCH) return 0;
		refuse("process %d: thread %d cannot be traced: %s", p->pid, tid, strerror(errno));
	}
	size_t cap = (size_t)p->cap_threads;
	p->threads = grow(p->threads, (size_t)p->n_threads, &cap, sizeof *p->threads);
	p->cap_threads = (int)cap;
	p->threads[p->n_threads++] = tid;
	if (ptrace(PTRACE_INTERRUPT, tid, 0, 0) || wait_stop(tid, &status))
		refuse("process %d: thread %d cannot be stopped (%s; a parent in vfork?)", p->pid, tid, strerror(errno));
	if (!WIFSTOPPED(status)) { p->n_threads--; return 1; } /* it ended meanwhile */
	/* A signal was about to be delivered: give it back, it arrives after the fold. */
	if (status >> 16 != PTRACE_EVENT_STOP) syscall(SYS_tgkill, p->pid, tid, WSTOPSIG(status));
	if (!p->injector || tid == p->pid) p->injector = tid;
	return 1;
}

static int freeze_tree(pid_t pid) /* returns how many threads were new */
{
	char path[64];
	int found = 0;
	struct process *p = find_process(pid);
	if (!p) {
		if (n_processes == 4096) refuse("more than 4096 processes");
		p = calloc(1, sizeof *p);
		p->pid = pid;
		p->file = -1;
		processes[n_processes++] = p;
	}
	snprintf(path, sizeof path, "/proc/%d/task", pid);
	DIR *tasks = opendir(path);
	if (!tasks) return 0;
	for (struct dirent *e; (e = readdir(tasks));) {
		pid_t tid = atoi(e->d_name), child;
		if (!tid) continue;
		found += stop_thread(p, tid);
		snprintf(path, sizeof path, "/proc/%d/task/%d/children", pid, tid);
		FILE *children = fopen(path, "re");
		while (children && fscanf(children, "%d", &child) == 1) found += freeze_tree(child);
		if (children) fclose(children);
	}
	closedir(tasks);
	return found;
}

static void let_go(void)
{
	for (int i = 0; i < n_processes; i++)
		for (int k = 0; k < processes[i]->n_threads; k++) ptrace(PTRACE_DETACH, processes[i]->threads[k], 0, 0);
}

/* ---- copy --------------------------------------------------------------------------------------------------- */

static void add_jobs(struct process *p, uint64_t start, uint64_t end, uint64_t offset)
{
	while (start < end) { /* cut where 2 MiB pages begin: the file's offsets are congruent */
		uint64_t next = (start + HUGE_BYTES) & ~(HUGE_BYTES - 1);
		if (next > end) next = end;
		p->jobs = grow(p->jobs, p->n_jobs, &p->cap_jobs, sizeof *p->jobs);
		p->jobs[p->n_jobs++] = (struct job){start, next - start, offset};
		p->copied_bytes += next - start;
		offset += next - start;
		start = next;
	}
}

static void find_pages(struct process *p)
{
	char path[64];
	struct scan_region regions[4096];
	snprintf(path, sizeof path, "/proc/%d/pagemap", p->pid);
	int pagemap = open(path, O_RDONLY | O_CLOEXEC);
	if (pagemap < 0) refuse("process %d: %s: %s", p->pid, path, strerror(errno));
	for (size_t i = 0; i < p->n_areas; i++) {
		struct area *a = &p->areas[i];
		if (a->whole) { add_jobs(p, a->start, a->end, a->offset); continue; }
		for (uint64_t at = a->start; at < a->end;) {
			struct scan_arg s = {.size = sizeof s, .start = at, .end = a->end, .vec = (uint64_t)regions,
				.vec_len = sizeof regions / sizeof *regions, .category_anyof_mask = IS_PRESENT | IS_SWAPPED,
				.category_inverted = IS_ZERO_PAGE, .category_mask = IS_ZERO_PAGE, .return_mask = IS_PRESENT};
			int n = ioctl(pagemap, SCAN, &s);
			if (n < 0) refuse("process %d: PAGEMAP_SCAN: %s", p->pid, strerror(errno));
			for (int k = 0; k < n; k++)
				add_jobs(p, regions[k].start, regions[k].end, a->offset + regions[k].start - a->start);
			at = s.walk_end;
		}
	}
	close(pagemap);
}

static void *copy_thread(void *argument)
{
	struct process *p = argument;
	char *buffer = 0;
	if (posix_memalign((void **)&buffer, HUGE_BYTES, HUGE_BYTES)) { p->failed = ENOMEM; return 0; }
	madvise(buffer, HUGE_BYTES, MADV_HUGEPAGE);
	for (uint64_t i; !p->failed && (i = __sync_fetch_and_add(&p->next_job, 1)) < p->n_jobs;) {
		struct job *j = &p->jobs[i];
		struct iovec local = {buffer, j->bytes}, remote = {(void *)j->address, j->bytes};
		ssize_t n = process_vm_readv(p->pid, &local, 1, &remote, 1, 0);
		if (n != (ssize_t)j->bytes) { p->failed = n < 0 ? errno : EFAULT; break; }
		if (!buffer[0] && !memcmp(buffer, buffer + 1, j->bytes - 1)) continue; /* zeros stay a hole */
		for (uint64_t done = 0; done < j->bytes; done += (uint64_t)n) {
			n = pwrite(p->file, buffer + done, j->bytes - done, (off_t)(j->offset + done));
			if (n <= 0) { p->failed = n ? errno : ENOSPC; break; }
		}
	}
	free(buffer);
	return 0;
}

static void copy_memory(struct process *p, int threads)
{
	pthread_t t[64];
	int started = 0;
	find_pages(p);
	/* Direct writes: a copy that went through the page cache took four times as long (kernel 6.18, ext4). tmpfs may refuse. */
	p->file = openat(folder, p->name, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC | O_DIRECT, 0444);
	if (p->file < 0 && errno == EINVAL) {
		unlinkat(folder, p->name, 0);
		p->file = openat(folder, p->name, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0444);
	}
	if (p->file < 0) refuse("memory file: %s", strerror(errno));
	if (ftruncate(p->file, (off_t)p->size_bytes)) refuse("memory file: %s", strerror(errno));
	while (started < threads && !pthread_create(&t[started], 0, copy_thread, p)) started++;
	if (!started) copy_thread(p);
	while (started) pthread_join(t[--started], 0);
	if (p->failed) refuse("process %d: copying its memory: %s", p->pid, strerror(p->failed));
	printf("copied %d %lu\n", p->pid, p->copied_bytes);
	fflush(stdout);
}

/* ---- map in place, and undo --------------------------------------------------------------------------------- */

static void map_back(struct process *p)
{
	enum { CALLS_PER_AREA = 3 };
	if (!p->n_areas) return;
	size_t n = 0;
	struct call *calls = calloc(p->n_areas * CALLS_PER_AREA + 4, sizeof *calls);
	if (!calls || begin_injection(p, p->n_areas * CALLS_PER_AREA + 2))
		refuse("process %d: cannot make system calls in it: %s", p->pid, strerror(errno));
	/* Room aside: one reservation in which every area finds a place congruent to its own, so that whole page tables move. */
	for (size_t i = 0; i < p->n_areas; i++) p->aside_bytes += p->areas[i].end - p->areas[i].start + 2 * HUGE_BYTES;
	int64_t at = one_call(p, SYS_mmap, 0, p->aside_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1);
	if (at < 0) refuse("process %d: no address space to move its areas aside: %s", p->pid, strerror((int)-at));
	p->aside = (uint64_t)at;
	char path[512];
	int bytes = snprintf(path, sizeof path, "%s/%s", inside, p->name) + 1;
	uint64_t path_at = p->script + p->script_bytes - PAGE;
	struct iovec local = {path, (size_t)bytes}, remote = {(void *)path_at, (size_t)bytes};
	if (process_vm_writev(p->pid, &local, 1, &remote, 1, 0) < 0) refuse("process %d: %s", p->pid, strerror(errno));
	int64_t fd = one_call(p, SYS_openat, (uint64_t)AT_FDCWD, path_at, O_RDONLY | O_CLOEXEC, 0, 0);
	if (fd < 0) refuse("process %d: cannot open %s: %s", p->pid, path, strerror((int)-fd));
	uint64_t cursor = p->aside;
	for (size_t i = 0; i < p->n_areas; i++) {
		struct area *a = &p->areas[i];
		uint64_t length = a->end - a->start;
		a->aside = cursor + ((a->start - cursor) & (HUGE_BYTES - 1));
		cursor = a->aside + length;
		calls[n++] = (struct call){SYS_mremap, (int64_t)a->start, (int64_t)length, (int64_t)length,
					   MREMAP_MAYMOVE | MREMAP_FIXED, (int64_t)a->aside, 0, 0};
		calls[n++] = (struct call){SYS_mmap, (int64_t)a->start, (int64_t)length, a->prot,
					   MAP_PRIVATE | MAP_FIXED | MAP_NORESERVE, fd, (int64_t)a->offset, 0};
		if (a->advice >= 0)
			calls[n++] = (struct call){SYS_madvise, (int64_t)a->start, (int64_t)length, a->advice, 0, 0, 0, 1};
	}
	p->moved = 1;
	ssize_t made = run_script(p, calls, n);
	one_call(p, SYS_close, (uint64_t)fd, 0, 0, 0, 0);
	int64_t last = made > 0 ? calls[made - 1].number : -EPROTO;
	if (made != (ssize_t)n || last < 0) {
		/* Areas beyond the failing call never moved; the undo skips them because nothing is aside for them. */
		for (size_t i = 0, k = 0; i < p->n_areas; i++) {
			if ((ssize_t)k >= made || calls[k].number < 0) p->areas[i].aside = 0;
			k += p->areas[i].advice >= 0 ? 3 : 2;
		}
		refuse("process %d: mapping its memory file: %s", p->pid, strerror((int)-last));
	}
	free(calls);
}

static void move_back(struct process *p)
{
	size_t n = 0;
	struct call *calls = calloc(p->n_areas + 2, sizeof *calls);
	if (!calls) return;
	for (size_t i = 0; i < p->n_areas; i++) {
		struct area *a = &p->areas[i];
		int64_t length = (int64_t)(a->end - a->start);
		if (!a->aside) continue;
		calls[n++] = (struct call){SYS_mremap, (int64_t)a->aside, length, length, MREMAP_MAYMOVE | MREMAP_FIXED,
					   (int64_t)a->start, 0, 1};
	}
	run_script(p, calls, n);
	free(calls);
}

static void finish_process(struct process *p, int undo)
{
	if (!p->script) return;
	if (p->moved && undo) move_back(p);
	if (p->aside) one_call(p, SYS_munmap, p->aside, p->aside_bytes, 0, 0, 0);
	end_injection(p);
}

static void undo_and_quit(void)
{
	for (int i = n_processes; i--;) {
		finish_process(processes[i], 1);
		if (processes[i]->file >= 0) unlinkat(folder, processes[i]->name, 0);
	}
	let_go();
	_exit(1);
}

/* ---- the conversation --------------------------------------------------------------------------------------- */

static void read_orders(void)
{
	char line[512];
	struct process *p = 0;
	while (fgets(line, sizeof line, stdin)) {
		struct area a;
		int pid;
		if (!strcmp(line, "go\n")) return;
		if (!strncmp(line, "process ", 8)) {
			char name[128];
			uint64_t size;
			if (sscanf(line, "process %d %127s %lx", &pid, name, &size) != 3 || !(p = find_process(pid)))
				refuse("order not understood: %.100s", line);
			strcpy(p->name, name);
			p->size_bytes = size;
		} else if (p && sscanf(line, "area %lx %lx %lx %x %d %d", &a.start, &a.end, &a.offset, (unsigned *)&a.prot,
				       &a.whole, &a.advice) == 6) {
			a.aside = 0;
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
	if (argc != 5) { fputs("usage: hotstart-fold ROOT_PID FOLDER_FD INSIDE THREADS\n", stderr); return 2; }
	folder = atoi(argv[2]);
	inside = argv[3];
	int threads = atoi(argv[4]);
	threads = threads < 1 ? 1 : threads > 64 ? 64 : threads;
	while (freeze_tree(atoi(argv[1]))) {} /* until nothing new was born while we froze the rest */
	for (int i = 0; i < n_processes; i++)
		if (processes[i]->n_threads) printf("process %d\n", processes[i]->pid);
	puts("frozen");
	fflush(stdout);
	read_orders();
	for (int i = 0; i < n_processes; i++)
		if (processes[i]->n_areas) copy_memory(processes[i], threads);
	for (int i = 0; i < n_processes; i++) map_back(processes[i]);
	puts("folded");
	fflush(stdout);
	char line[64];
	if (!fgets(line, sizeof line, stdin) || strcmp(line, "release\n")) undo_and_quit();
	for (int i = 0; i < n_processes; i++) finish_process(processes[i], 0);
	let_go();
	puts("released");
	return 0;
}
