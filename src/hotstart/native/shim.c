/* libhotstart-shim.so: preloaded in a sandbox, keeps madvise(2) and mremap(2) true after a fold, and lets OpenSSL notice that it
 * goes on as a replica (the last section; all before that is about the fold).
 *
 * A fold replaces private anonymous memory by private mappings of /run/hotstart/mem/ID/NAME.mem ("ours" below). Three
 * things then differ, all for the worse: what is thrown away comes back from the file instead of as zeros (jemalloc's
 * calloc relies on zeros), advice that is meant for anonymous memory fails with EINVAL, and growth shows the file's next
 * bytes. Where there is nothing of ours, result, errno and effect are the kernel's; one leniency is at move_in_pieces.
 *
 * The kernel is always asked first and its answer mended afterwards. The fold strikes from outside at any instruction:
 * had we looked before the call, it could come in between. After the call it cannot: what was anonymous during the call
 * has been treated rightly and is folded as such.
 *
 * Runs inside memory allocators and signal handlers: no allocation, no lock, no cancellation point, errno only on failure.
 * Not covered: raw system calls (Go, static programs), the C library's calls to itself, a process that changes its root.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <link.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#define MEMORY_FOLDER "/run/hotstart/mem/"
/* Made with the sandbox of a fresh worker, removed by the fold before it maps anything, not there in a replica's sandbox. If
 * it is missing or cannot be looked up, that costs time only; the one thing that must not happen is that it outlives a fold. */
#define UNFOLDED MEMORY_FOLDER ".unfolded"

/* Newer than the headers of Debian 12. */
enum { ADVICE_COLLAPSE = 25, ADVICE_GUARD_INSTALL = 102 };
struct procmap_query { /* kernel 6.11, linux/fs.h */
	uint64_t size, query_flags, query_addr, vma_start, vma_end, vma_flags, vma_page_size, vma_offset, inode;
	uint32_t dev_major, dev_minor, vma_name_size, build_id_size;
	uint64_t vma_name_addr, build_id_addr;
};
#define PROCMAP_QUERY _IOWR('f', 17, struct procmap_query)
enum { COVERING_OR_NEXT_AREA = 0x10, AREA_IS_SHARED = 0x08 }; /* the low three bits of vma_flags are those of PROT_* */

/* libc's own syscall() would touch errno. */
static long kernel(long number, long a, long b, long c, long d, long e)
{ /* a sixth argument is always 0 */
#if defined(__x86_64__)
	long result;
	register long r10 __asm__("r10") = d, r8 __asm__("r8") = e, r9 __asm__("r9") = 0;
	__asm__ volatile("syscall" : "=a"(result) : "a"(number), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9)
			 : "rcx", "r11", "memory");
	return result;
#elif defined(__aarch64__)
	register long x8 __asm__("x8") = number, x0 __asm__("x0") = a, x1 __asm__("x1") = b, x2 __asm__("x2") = c;
	register long x3 __asm__("x3") = d, x4 __asm__("x4") = e, x5 __asm__("x5") = 0;
	__asm__ volatile("svc 0" : "+r"(x0) : "r"(x8), "r"(x1), "r"(x2), "r"(x3), "r"(x4), "r"(x5) : "memory");
	return x0;
#else
#error "libhotstart-shim knows x86_64 and aarch64"
#endif
}

static long raw_madvise(uintptr_t start, uintptr_t end, int advice)
{
	return kernel(SYS_madvise, start, end - start, advice, 0, 0);
}

static long raw_mremap(uintptr_t old, size_t old_length, size_t new_length, int flags, uintptr_t new_address)
{
	return kernel(SYS_mremap, old, old_length, new_length, flags, new_address);
}

static long map_zeros(uintptr_t start, size_t length, int prot, int flags)
{
	/* NORESERVE: the program may have reserved the range with it, and overcommit would refuse so much otherwise. */
	return kernel(SYS_mmap, start, length, prot, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | flags, -1);
}

static size_t whole_pages(size_t bytes)
{
	size_t page = (size_t)getpagesize();
	return (bytes + page - 1) & -page;
}

/* ---- which areas are ours ----------------------------------------------------------------------------------- */

enum { TEXT_BYTES = 512 }; /* on the stack, which may be a signal handler's */
struct area { uintptr_t start, end; int prot; bool ours, anonymous; };
struct maps { long fd; bool as_text; size_t next, filled; char *text; };

/* Only "certainly not folded" is asked again; the other answer holds until exec, for replicas too. */
static bool folded(void)
{
	static int known;
	if (__atomic_load_n(&known, __ATOMIC_RELAXED)) return true;
	if (kernel(SYS_faccessat, AT_FDCWD, (long)UNFOLDED, F_OK, 0, 0) == 0) return false;
	__atomic_store_n(&known, 1, __ATOMIC_RELAXED);
	return true;
}

static bool is_our_name(const char *name)
{
	return !strncmp(name, MEMORY_FOLDER, sizeof MEMORY_FOLDER - 1);
}

/* The area that covers `at` or the next one: 1 found, 0 none, -1 the kernel cannot tell this way. */
static int query_area(struct maps *m, uintptr_t at, struct area *a)
{
	char name[320]; /* more than any memory file's path needs; a longer one (ENAMETOOLONG) is left to the text */
	struct procmap_query q = {.size = sizeof q, .query_flags = COVERING_OR_NEXT_AREA, .query_addr = at,
				  .vma_name_size = sizeof name, .vma_name_addr = (uintptr_t)name};
	name[0] = 0;
	long r = kernel(SYS_ioctl, m->fd, PROCMAP_QUERY, (long)&q, 0, 0);
	if (r < 0) return r == -ENOENT ? 0 : -1;
	*a = (struct area){q.vma_start, q.vma_end, .prot = (int)(q.vma_flags & 7), .anonymous = !q.inode,
			   .ours = q.inode && !(q.vma_flags & AREA_IS_SHARED) && is_our_name(name)};
	return 1;
}

static bool read_line(struct maps *m, char *line, size_t size)
{
	for (size_t n = 0;;) {
		if (m->next == m->filled) {
			long r = kernel(SYS_read, m->fd, (long)m->text, TEXT_BYTES, 0, 0);
			if (r <= 0) return false;
			m->next = 0;
			m->filled = (size_t)r;
		}
		char c = m->text[m->next++];
		if (c == '\n') { line[n] = 0; return true; }
		if (n + 1 < size) line[n++] = c;
	}
}

static uintptr_t parse_hex(const char **p)
{
	uintptr_t value = 0;
	for (; (**p >= '0' && **p <= '9') || (**p >= 'a' && **p <= 'f'); ++*p)
		value = value * 16 + (uintptr_t)(**p <= '9' ? **p - '0' : **p - 'a' + 10);
	return value;
}

static const char *next_field(const char *p)
{
	while (*p && *p != ' ') p++;
	while (*p == ' ') p++;
	return p;
}

/* The same from the text, for kernels before 6.11. It goes forward only, which is all that a walk needs. */
static int scan_area(struct maps *m, uintptr_t at, struct area *a)
{
	char line[160]; /* "START-END rw-p OFFSET DEVICE INODE   PATH": the path begins before column 100 */
	while (read_line(m, line, sizeof line)) {
		const char *p = line;
		a->start = parse_hex(&p);
		p++;
		a->end = parse_hex(&p);
		if (a->end <= at) continue;
		const char *mode = p + 1, *inode = next_field(next_field(next_field(mode)));
		a->prot = (mode[0] == 'r' ? PROT_READ : 0) | (mode[1] == 'w' ? PROT_WRITE : 0) | (mode[2] == 'x' ? PROT_EXEC : 0);
		a->ours = mode[3] == 'p' && is_our_name(next_field(inode));
		a->anonymous = inode[0] == '0';
		return 1;
	}
	return 0;
}

/* Calls visit for every area of [start, end), cut to it, until one fails; 1 if there was a hole. -ENOMEM, which madvise and
 * mremap document, if there is no /proc to ask or nothing in it: success with old bytes in the memory would be worse.
 * /proc/self and not /proc/thread-self: a dump that strikes now restores descriptors before it makes threads.
 * The descriptor is not kept: the worker may close it, and in a child it would go on to show the parent. */
static long walk(uintptr_t start, uintptr_t end, long (*visit)(const struct area *, void *), void *context)
{
	char text[TEXT_BYTES];
	struct maps maps = {.text = text, .fd = kernel(SYS_openat, AT_FDCWD, (long)"/proc/self/maps", O_RDONLY | O_CLOEXEC, 0, 0)};
	struct area a;
	long hole = 0, r = 0;
	if (maps.fd < 0) return -ENOMEM;
	for (uintptr_t at = start; at < end && r == 0; at = a.end) {
		int found = maps.as_text ? -1 : query_area(&maps, at, &a);
		if (found < 0) {
			maps.as_text = true;
			found = scan_area(&maps, at, &a);
		}
		if (!found) { r = -ENOMEM; break; }
		if (a.start > at) hole = 1;
		if (a.start >= end) break;
		if (a.start < at) a.start = at;
		if (a.end > end) a.end = end;
		r = visit(&a, context);
	}
	kernel(SYS_close, maps.fd, 0, 0, 0, 0);
	return r ? r : hole;
}

/* ---- madvise ------------------------------------------------------------------------------------------------ */

static long lock_as_before(const struct area *a, bool locked)
{
	return locked ? kernel(SYS_mlock2, a->start, a->end - a->start, MLOCK_ONFAULT, 0, 0) : 0;
}

/* Zeros in place of an area of ours. Advice that only smaps shows (DONTFORK, DONTDUMP, huge pages) is lost with the mapping. */
static long discard(const struct area *a, bool even_if_locked)
{
	bool locked = raw_madvise(a->start, a->end, MADV_DONTNEED) == -EINVAL; /* the only reason for it in an area of ours */
	if (locked && !even_if_locked) return -EINVAL;
	long r = map_zeros(a->start, a->end - a->start, a->prot, MAP_FIXED);
	return r < 0 ? r : lock_as_before(a, locked);
}

/* Anonymous memory of the same contents. What another thread writes into the area meanwhile may be lost: nothing can turn a
 * mapping in place, and a program that gives such advice does so before it shares the memory. */
static long make_anonymous(const struct area *a)
{
	size_t length = a->end - a->start;
	bool locked = raw_madvise(a->start, a->end, MADV_COLD) == -EINVAL; /* a question without effect (kernel 5.4) */
	long copy = map_zeros(0, length, PROT_READ | PROT_WRITE, 0);
	if (copy < 0) return copy;
	if (!(a->prot & PROT_READ)) kernel(SYS_mprotect, a->start, length, a->prot | PROT_READ, 0, 0);
	memcpy((void *)copy, (void *)a->start, length);
	long r = kernel(SYS_mprotect, copy, length, a->prot, 0, 0);
	if (r == 0) r = raw_mremap(copy, length, length, MREMAP_MAYMOVE | MREMAP_FIXED, a->start);
	if (r >= 0) return lock_as_before(a, locked);
	kernel(SYS_mprotect, a->start, length, a->prot, 0, 0);
	kernel(SYS_munmap, copy, length, 0, 0, 0);
	return r;
}

static long advise_ours(const struct area *a, int advice)
{
	long r;
	switch (advice) {
	case MADV_REMOVE: /* EACCES for files */
		return -EINVAL;
	case MADV_WIPEONFORK:
	case ADVICE_COLLAPSE:
		r = make_anonymous(a);
		return r ? r : raw_madvise(a->start, a->end, advice);
	case ADVICE_GUARD_INSTALL: /* it throws the contents away, and they must stay away when the guard goes */
		r = raw_madvise(a->start, a->end, advice); /* refused before 6.15 (files) or 6.13: then nothing is thrown away */
		if (r == 0) r = discard(a, false);
		return r ? r : raw_madvise(a->start, a->end, advice);
	default: /* DONTNEED, DONTNEED_LOCKED, and FREE, which may take effect at once */
		r = discard(a, advice == MADV_DONTNEED_LOCKED);
		if (r != -ENOMEM || !(a->prot & PROT_WRITE)) return r;
		memset((void *)a->start, 0, a->end - a->start); /* more areas than vm.max_map_count allows */
		return 0;
	}
}

static bool kernel_was_right(int advice, long r)
{
	switch (advice) {
	case MADV_DONTNEED:
	case MADV_DONTNEED_LOCKED:
	case ADVICE_GUARD_INSTALL:
		return false;
	case MADV_FREE:
	case MADV_WIPEONFORK:
	case ADVICE_COLLAPSE:
		return r != -EINVAL; /* what it answers for a file; success means that all was anonymous */
	case MADV_REMOVE:
		return r != -EACCES;
	default:
		return true;
	}
}

struct advising { int advice; bool others_done; };

static long advise_area(const struct area *a, void *context)
{
	const struct advising *c = context;
	if (a->ours) return advise_ours(a, c->advice);
	return c->others_done ? 0 : raw_madvise(a->start, a->end, c->advice);
}

static long advise(uintptr_t start, size_t length, int advice)
{
	uintptr_t end = start + whole_pages(length);
	long r = kernel(SYS_madvise, start, length, advice, 0, 0);
	if (kernel_was_right(advice, r) || !folded()) return r;
	if (start != whole_pages(start) || end <= start) return r;
	struct advising again = {advice, .others_done = r == 0 || r == -ENOMEM}; /* else it stopped at the first that failed */
	r = walk(start, end, advise_area, &again);
	return r > 0 ? -ENOMEM : r;
}

int madvise(void *address, size_t length, int advice)
{
	long r = advise((uintptr_t)address, length, advice);
	if (r >= 0) return (int)r;
	errno = (int)-r;
	return -1;
}

/* ---- mremap ------------------------------------------------------------------------------------------------- */

static long discard_ours(const struct area *a, void *nothing)
{
	(void)nothing;
	return a->ours ? discard(a, true) : 0;
}

struct pieces { int prot; uintptr_t last; };

/* Accepts a range that consists of areas of ours and anonymous ones, all of one protection. */
static long examine(const struct area *a, void *context)
{
	struct pieces *p = context;
	if (!(a->ours || a->anonymous) || (p->last && p->prot != a->prot)) return -EFAULT;
	p->prot = a->prot;
	p->last = a->start;
	return 0;
}

struct moving { uintptr_t distance, done, grow_at; size_t growth; int dontunmap; };

static long move_area(const struct area *a, void *context)
{
	struct moving *m = context;
	size_t length = a->end - a->start;
	long r = raw_mremap(a->start, length, length + (a->end == m->grow_at ? m->growth : 0),
			    MREMAP_MAYMOVE | MREMAP_FIXED | m->dontunmap, a->start + m->distance);
	if (r < 0) return r;
	m->done = a->end;
	return 0;
}

/* What the program made as one area may be several since it was folded or mended; the kernel (for everything before 6.17,
 * for growth to this day) answers EFAULT. The leniency: in a folded process this joins anonymous areas that are none of ours.
 * Moving and shrinking in one call stays EFAULT: some kernels have unmapped the tail by then, and nobody asks for it. */
static long move_in_pieces(uintptr_t old, size_t old_length, size_t new_length, int flags, uintptr_t new_address)
{
	uintptr_t end = old + old_length;
	struct pieces found = {0, 0};
	if (new_length < old_length || walk(old, end, examine, &found)) return -EFAULT;
	size_t growth = new_length - old_length;
	if (!(flags & MREMAP_FIXED) && growth) {
		long r = raw_mremap(found.last, end - found.last, end - found.last + growth, 0, 0);
		if (r >= 0) return (long)old;
	}
	if (!(flags & MREMAP_MAYMOVE)) return -ENOMEM;
	long new = map_zeros(new_address, new_length, PROT_NONE, flags & MREMAP_FIXED ? MAP_FIXED : 0);
	if (new < 0) return new;
	struct moving there = {(uintptr_t)new - old, old, end, growth, flags & MREMAP_DONTUNMAP};
	struct moving back = {.distance = old - (uintptr_t)new};
	long r = walk(old, end, move_area, &there);
	if (r >= 0) return new;
	walk((uintptr_t)new, there.done + there.distance, move_area, &back);
	kernel(SYS_munmap, new, new_length, 0, 0, 0);
	return r;
}

static long remap(uintptr_t old, size_t old_length, size_t new_length, int flags, uintptr_t new_address)
{
	long new = raw_mremap(old, old_length, new_length, flags, new_address);
	old_length = whole_pages(old_length);
	new_length = whole_pages(new_length);
	if (new == -EFAULT && folded()) new = move_in_pieces(old, old_length, new_length, flags, new_address);
	bool grown = new_length > old_length, left_behind = flags & MREMAP_DONTUNMAP;
	if (new < 0 || !(grown || left_behind) || !folded()) return new;

	uintptr_t stale = grown ? (uintptr_t)new + old_length : old;
	long r = walk(stale, stale + (grown ? new_length - old_length : old_length), discard_ours, 0);
	if (r >= 0) return new; /* since 6.17 there may be holes in what moves */
	raw_mremap((uintptr_t)new, new_length, old_length, (uintptr_t)new == old ? 0 : MREMAP_MAYMOVE | MREMAP_FIXED, old);
	return r;
}

void *mremap(void *old_address, size_t old_length, size_t new_length, int flags, ...)
{
	va_list rest;
	va_start(rest, flags);
	uintptr_t new_address = flags & (MREMAP_FIXED | MREMAP_DONTUNMAP) ? (uintptr_t)va_arg(rest, void *) : 0;
	va_end(rest);
	long r = remap((uintptr_t)old_address, old_length, new_length, flags, new_address);
	if (r >= 0) return (void *)r;
	errno = (int)-r;
	return MAP_FAILED;
}

/* ---- getpid -------------------------------------------------------------------------------------------------

 * OpenSSL (1.1.1 and later) seeds a generator anew when the pid is another than the last time, because that is a fork, and asks
 * for the pid for nothing but its generators. A replica has its original's pid, so libcrypto, and nobody else, is told
 * one that changes with the file which says whose life this is. Where OpenSSL is part of a program or of another library, its
 * calls cannot be told from the others, and get what those get: the pid. */

#define IDENTITY "/run/hotstart/identity"

static int (*find_object)(void *, struct dl_find_object *); /* glibc 2.35: takes no lock, may be called anywhere */

/* By the oldest name of dlsym, and weakly: a C library that lacks either gets the rest of this file. */
void *old_dlsym(void *, const char *) __attribute__((weak));
#if defined(__x86_64__)
__asm__(".symver old_dlsym, dlsym@GLIBC_2.2.5");
#elif defined(__aarch64__)
__asm__(".symver old_dlsym, dlsym@GLIBC_2.17");
#endif

__attribute__((constructor)) static void find_finder(void)
{
	const char *keep = getenv("HOTSTART_KEEP_RANDOM");
	if (old_dlsym && !(keep && *keep)) *(void **)&find_object = old_dlsym(RTLD_DEFAULT, "_dl_find_object");
}

static bool is_libcrypto(void *caller)
{
	struct dl_find_object object;
	if (!find_object || find_object(caller, &object) || !object.dlfo_link_map->l_name) return false;
	const char *path = object.dlfo_link_map->l_name, *slash = strrchr(path, '/');
	return !strncmp(slash ? slash + 1 : path, "libcrypto", 9);
}

static pid_t life(void) /* 0 in a worker that is not yet told who it is */
{
	struct statx st;
	if (kernel(SYS_statx, AT_FDCWD, (long)IDENTITY, 0, STATX_CTIME, (long)&st)) return 0;
	return (pid_t)((st.stx_ctime.tv_nsec ^ (uint32_t)st.stx_ctime.tv_sec << 12) & 0x7ffff000);
}

pid_t getpid(void)
{
	pid_t pid = (pid_t)kernel(SYS_getpid, 0, 0, 0, 0, 0);
	return is_libcrypto(__builtin_return_address(0)) ? pid ^ life() : pid;
}
