/* Checks libhotstart-shim.so, which must be preloaded, on areas that are folded by hand: one named check for each promise.
 *
 * usage: LD_PRELOAD=libhotstart-shim.so shim_check [--text] [NAME...]        without a name: all
 *        ... shim_check [--text] random SEED STEPS                           twin areas, see compare_worlds
 *        ... shim_check [--text] costs
 *
 * --text hides PROCMAP_QUERY, as a kernel before 6.11 would. Wants a private, writable /run/hotstart/mem. Prints "NAME ok" or
 * "NAME FAILED ...", each in a process of its own; exit status 0 if none failed, 77 if the only one was skipped.
 * The reference is always the kernel itself: syscall() goes past the shim, plain names go through it.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <pthread.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <time.h>
#include <ucontext.h>
#include <unistd.h>

#define FOLDER "/run/hotstart/mem"
#define UNFOLDED FOLDER "/.unfolded"
#define PROCMAP_QUERY _IOC(_IOC_READ | _IOC_WRITE, 'f', 17, 104)
#define RW (PROT_READ | PROT_WRITE)
enum { COLLAPSE = 25, GUARD_INSTALL = 102, GUARD_REMOVE = 103, SKIPPED = 77, JUNK_PAGES = 64 };
typedef unsigned char byte;

static size_t P; /* the page size */
static const char *check_name;

static void fail(int line, const char *what)
{
	printf("%s FAILED line %d: %s (errno %s)\n", check_name, line, what, strerror(errno));
	fflush(stdout);
	_exit(1);
}
#define EXPECT(condition) do { if (!(condition)) fail(__LINE__, #condition); } while (0)
#define EXPECT_ERRNO(call, wanted) do { errno = 0; EXPECT((long)(call) == -1); EXPECT(errno == (wanted)); } while (0)

static void skip(const char *why)
{
	printf("%s skipped: %s\n", check_name, why);
	fflush(stdout);
	_exit(SKIPPED);
}

/* ---- memory, and what a fold does to it --------------------------------------------------------------------- */

static long raw_madvise(void *at, size_t bytes, int advice) { return syscall(SYS_madvise, at, bytes, advice); }
static void *raw_mremap(void *at, size_t old, size_t new, int flags, void *to)
{
	return (void *)syscall(SYS_mremap, at, old, new, flags, to);
}

static byte *anonymous(void *at, size_t bytes, int value)
{
	byte *p = mmap(at, bytes, RW, MAP_PRIVATE | MAP_ANONYMOUS | (at ? MAP_FIXED : 0), -1, 0);
	EXPECT(p != MAP_FAILED);
	if (value) memset(p, value, bytes);
	return p;
}

/* A memory file with the contents of [at, at + bytes) and junk before and behind, as in a real one with many areas. */
static int memory_file(const void *at, size_t bytes)
{
	static int number;
	char path[128];
	byte *junk = malloc(JUNK_PAGES * P);
	memset(junk, 0xEE, JUNK_PAGES * P);
	mkdir(FOLDER "/0123456789abcdef", 0755);
	snprintf(path, sizeof path, FOLDER "/0123456789abcdef/%d-%d.mem", getpid(), number++);
	int fd = open(path, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
	EXPECT(fd >= 0);
	EXPECT(pwrite(fd, junk, P, 0) == (ssize_t)P);
	EXPECT(pwrite(fd, at, bytes, (off_t)P) == (ssize_t)bytes);
	EXPECT(pwrite(fd, junk, JUNK_PAGES * P, (off_t)(P + bytes)) == (ssize_t)(JUNK_PAGES * P));
	free(junk);
	return fd;
}

static void fold(void *at, size_t bytes)
{
	int fd = memory_file(at, bytes);
	unlink(UNFOLDED);
	EXPECT(mmap(at, bytes, RW, MAP_PRIVATE | MAP_FIXED | MAP_NORESERVE, fd, (off_t)P) == at);
	close(fd);
}

static byte *folded(void *at, size_t pages, int value)
{
	byte *p = anonymous(at, pages * P, value);
	fold(p, pages * P);
	return p;
}

static int all(const byte *p, size_t bytes, int value)
{
	for (size_t i = 0; i < bytes; i++)
		if (p[i] != value) return 0;
	return 1;
}

/* Room whose neighbours are known: unmapped before and behind, and nothing is put there by itself (it lies low). */
static byte *room(int which)
{
	static volatile uintptr_t base = 0x100000000000UL; /* volatile: GCC takes a constant address for an object of no size */
	return (byte *)(base + (uintptr_t)which * 0x10000000UL);
}

static int mapped(const void *at)
{
	byte vector;
	return mincore((void *)at, P, &vector) == 0;
}

static int in_child(int (*does)(void *), void *argument)
{
	int status;
	fflush(stdout);
	pid_t pid = fork();
	if (!pid) _exit(does(argument));
	EXPECT(pid > 0);
	EXPECT(waitpid(pid, &status, 0) == pid);
	return WIFEXITED(status) ? WEXITSTATUS(status) : 256 + status;
}

/* System call `number` fails with `error` when (argument & mask) == value. */
static void deny(int number, int argument, uint32_t mask, uint32_t value, int error)
{
	struct sock_filter code[] = {
		BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, (uint32_t)number, 0, 4),
		BPF_STMT(BPF_LD | BPF_W | BPF_ABS, (uint32_t)(offsetof(struct seccomp_data, args) + 8 * (size_t)argument)),
		BPF_STMT(BPF_ALU | BPF_AND | BPF_K, mask),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, value, 0, 1),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | (uint32_t)error),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
	};
	struct sock_fprog program = {sizeof code / sizeof *code, code};
	EXPECT(!prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0));
	EXPECT(!prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program));
}

/* ---- the checks --------------------------------------------------------------------------------------------- */

struct check { const char *name; void (*run)(void); };
static struct check checks[64];
static int n_checks;
#define CHECK(sentence) \
	static void sentence(void); \
	__attribute__((constructor)) static void register_##sentence(void) { checks[n_checks++] = (struct check){#sentence, sentence}; } \
	static void sentence(void)

CHECK(without_the_shim_a_folded_area_shows_its_old_bytes) /* the hazard exists, so the other checks have teeth */
{
	byte *p = folded(0, 4, 0xAA);
	EXPECT(raw_madvise(p, 4 * P, MADV_DONTNEED) == 0 && all(p, 4 * P, 0xAA));
	EXPECT_ERRNO(raw_madvise(p, 4 * P, MADV_FREE), EINVAL);
	EXPECT_ERRNO(raw_madvise(p, 4 * P, MADV_WIPEONFORK), EINVAL);
	p = raw_mremap(p, 4 * P, 8 * P, MREMAP_MAYMOVE, 0);
	EXPECT(p != MAP_FAILED && all(p + 4 * P, 4 * P, 0xEE));
}

CHECK(dontneed_on_a_folded_area_gives_zero_pages)
{
	byte *p = folded(0, 8, 0xAA);
	EXPECT(madvise(p, 8 * P, MADV_DONTNEED) == 0 && all(p, 8 * P, 0));
	memset(p, 0xBB, 8 * P); /* and again, now that it is ordinary memory */
	EXPECT(madvise(p, 8 * P - 1, MADV_DONTNEED) == 0 && all(p, 8 * P, 0));
}

CHECK(dontneed_on_pages_written_since_the_fold_gives_zero_pages)
{
	byte *p = folded(0, 8, 0xAA);
	memset(p + P, 0xBB, 2 * P);
	EXPECT(madvise(p, 8 * P, MADV_DONTNEED) == 0 && all(p, 8 * P, 0));
}

CHECK(free_on_a_folded_area_succeeds_and_never_brings_old_bytes_back)
{
	byte *p = folded(0, 8, 0xAA);
	EXPECT(madvise(p, 8 * P, MADV_FREE) == 0 && all(p, 8 * P, 0));
	p[0] = 1;
	EXPECT(p[0] == 1 && all(p + P, 7 * P, 0));
}

CHECK(a_part_is_zeroed_and_its_neighbours_keep_their_bytes)
{
	byte *p = folded(0, 9, 0xAA);
	EXPECT(madvise(p + 3 * P, 3 * P, MADV_DONTNEED) == 0);
	EXPECT(all(p, 3 * P, 0xAA) && all(p + 3 * P, 3 * P, 0) && all(p + 6 * P, 3 * P, 0xAA));
}

CHECK(a_memory_file_that_was_unlinked_is_still_recognised)
{
	byte *p = anonymous(0, 4 * P, 0xAA);
	int fd = memory_file(p, 4 * P);
	char link[64], path[256] = "";
	snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
	EXPECT(readlink(link, path, sizeof path - 1) > 0 && unlink(path) == 0);
	unlink(UNFOLDED);
	EXPECT(mmap(p, 4 * P, RW, MAP_PRIVATE | MAP_FIXED, fd, (off_t)P) == p);
	EXPECT(madvise(p, 4 * P, MADV_DONTNEED) == 0 && all(p, 4 * P, 0));
}

static int touch(void *at) { *(volatile byte *)at = 1; return 0; }
static int look(void *at) { return *(volatile byte *)at; }

CHECK(zeroed_pages_keep_their_protection)
{
	byte *p = folded(0, 6, 0xAA);
	EXPECT(mprotect(p, 2 * P, PROT_READ) == 0 && mprotect(p + 2 * P, 2 * P, PROT_NONE) == 0);
	EXPECT(madvise(p, 6 * P, MADV_DONTNEED) == 0);
	EXPECT(all(p, 2 * P, 0) && in_child(touch, p) == 256 + SIGSEGV);
	EXPECT(in_child(look, p + 2 * P) == 256 + SIGSEGV);
	EXPECT(mprotect(p + 2 * P, 2 * P, RW) == 0 && all(p, 6 * P, 0));
}

CHECK(a_locked_area_refuses_dontneed_and_keeps_its_bytes)
{
	byte *p = folded(0, 4, 0xAA);
	if (mlock(p, 4 * P)) skip("mlock is not allowed");
	EXPECT_ERRNO(madvise(p, 4 * P, MADV_DONTNEED), EINVAL);
	EXPECT_ERRNO(madvise(p, 4 * P, MADV_FREE), EINVAL);
	EXPECT(all(p, 4 * P, 0xAA));
}

CHECK(dontneed_locked_gives_zero_pages_that_are_still_locked)
{
	byte *p = folded(0, 4, 0xAA), *twin = anonymous(0, P, 1);
	if (mlock(p, 4 * P)) skip("mlock is not allowed");
	if (raw_madvise(twin, P, MADV_DONTNEED_LOCKED)) skip("this kernel has no MADV_DONTNEED_LOCKED");
	EXPECT(madvise(p, 4 * P, MADV_DONTNEED_LOCKED) == 0 && all(p, 4 * P, 0));
	EXPECT_ERRNO(raw_madvise(p, 4 * P, MADV_DONTNEED), EINVAL);
}

static int is_wiped(void *at) { return all(at, 4 * P, 0); }

CHECK(wipeonfork_wipes_in_the_child_and_keeps_the_bytes_in_the_parent)
{
	for (int prot = PROT_READ; prot <= RW; prot++) {
		byte *p = folded(0, 6, 0xAA);
		EXPECT(mprotect(p + P, 4 * P, prot) == 0);
		EXPECT(madvise(p + P, 4 * P, MADV_WIPEONFORK) == 0);
		EXPECT(mprotect(p, 6 * P, PROT_READ) == 0);
		EXPECT(in_child(is_wiped, p + P) == 1);
		EXPECT(all(p, 6 * P, 0xAA));
	}
}

CHECK(wipeonfork_on_a_locked_area_keeps_the_lock)
{
	byte *p = folded(0, 4, 0xAA);
	if (mlock(p, 4 * P)) skip("mlock is not allowed");
	EXPECT(madvise(p, 4 * P, MADV_WIPEONFORK) == 0 && all(p, 4 * P, 0xAA) && in_child(is_wiped, p) == 1);
	EXPECT_ERRNO(raw_madvise(p, 4 * P, MADV_DONTNEED), EINVAL);
}

CHECK(wipeonfork_on_an_inaccessible_area_keeps_its_bytes)
{
	byte *p = folded(0, 4, 0xAA);
	EXPECT(mprotect(p, 4 * P, PROT_NONE) == 0 && madvise(p, 4 * P, MADV_WIPEONFORK) == 0);
	EXPECT(in_child(look, p) == 256 + SIGSEGV);
	EXPECT(mprotect(p, 4 * P, PROT_READ) == 0 && all(p, 4 * P, 0xAA));
}

CHECK(a_guard_that_is_removed_leaves_zero_pages)
{
	byte *p = folded(0, 4, 0xAA), *twin = anonymous(0, P, 1);
	if (raw_madvise(twin, P, GUARD_INSTALL)) skip("this kernel has no MADV_GUARD_INSTALL");
	EXPECT(madvise(p + P, 2 * P, GUARD_INSTALL) == 0);
	EXPECT(in_child(look, p + P) == 256 + SIGSEGV);
	EXPECT(madvise(p + P, 2 * P, GUARD_REMOVE) == 0);
	EXPECT(all(p, P, 0xAA) && all(p + P, 2 * P, 0) && all(p + 3 * P, P, 0xAA));
}

CHECK(collapse_gives_what_it_gives_for_anonymous_memory)
{
	size_t huge = 2 << 20;
	byte *twin = anonymous(room(0), 2 * huge, 0xAA), *p = folded(room(1), 2 * huge / P, 0xAA);
	long wanted = raw_madvise(twin, 2 * huge, COLLAPSE);
	if (wanted) skip("no huge page to be had here");
	EXPECT(madvise(p, 2 * huge, COLLAPSE) == 0 && all(p, 2 * huge, 0xAA));
}

CHECK(remove_is_refused_as_for_anonymous_memory)
{
	byte *p = folded(0, 4, 0xAA);
	EXPECT_ERRNO(madvise(p, 4 * P, MADV_REMOVE), EINVAL);
	EXPECT(all(p, 4 * P, 0xAA));
}

CHECK(a_hole_gives_enomem_after_the_rest_is_done)
{
	byte *p = room(0);
	folded(p, 2, 0xAA), anonymous(p + 3 * P, P, 0xBB), folded(p + 5 * P, 2, 0xCC); /* holes at 2, 4 and from 7 on */
	EXPECT_ERRNO(madvise(p, 6 * P, MADV_DONTNEED), ENOMEM);
	EXPECT(all(p, 2 * P, 0) && all(p + 3 * P, P, 0) && all(p + 5 * P, P, 0) && all(p + 6 * P, P, 0xCC));
	EXPECT_ERRNO(madvise(p + 6 * P, 2 * P, MADV_DONTNEED), ENOMEM);
	EXPECT(all(p + 6 * P, P, 0));
	EXPECT_ERRNO(madvise(p - 2 * P, P, MADV_DONTNEED), ENOMEM);
	folded(p, 2, 0xAA);
	EXPECT_ERRNO(madvise(p - P, 2 * P, MADV_FREE), ENOMEM);
	EXPECT(all(p, P, 0) && all(p + P, P, 0xAA) && !mapped(p - P) && !mapped(p + 2 * P));
}

CHECK(the_rest_of_a_range_stays_when_one_area_fails)
{
	byte *p = room(0);
	folded(p, 6, 0xAA);
	anonymous(p + 6 * P, P, 0xBB);
	if (mlock(p + 2 * P, 2 * P)) skip("mlock is not allowed");
	EXPECT_ERRNO(madvise(p, 7 * P, MADV_DONTNEED), EINVAL);
	EXPECT(all(p, 2 * P, 0) && all(p + 2 * P, 4 * P, 0xAA) && all(p + 6 * P, P, 0xBB));
}

CHECK(bad_arguments_get_the_kernels_answer)
{
	byte *p = folded(0, 4, 0xAA);
	EXPECT_ERRNO(madvise(p + 1, P, MADV_DONTNEED), EINVAL);
	EXPECT_ERRNO(madvise(p, (size_t)-1, MADV_DONTNEED), EINVAL);
	EXPECT_ERRNO(madvise(p, (size_t)-2 * P, MADV_FREE), EINVAL);
	EXPECT_ERRNO(madvise(p, 4 * P, 999), EINVAL);
	EXPECT(madvise(p, 0, MADV_DONTNEED) == 0);
	EXPECT_ERRNO(mremap(p + 1, P, 2 * P, MREMAP_MAYMOVE), EINVAL);
	EXPECT_ERRNO(mremap(p, 4 * P, 0, MREMAP_MAYMOVE), EINVAL);
	EXPECT_ERRNO(mremap(p, 4 * P, 4 * P, 64), EINVAL);
	EXPECT_ERRNO(mremap(p, 4 * P, 4 * P, MREMAP_FIXED, room(0)), EINVAL);
	EXPECT_ERRNO(mremap(p, 4 * P, 8 * P, MREMAP_MAYMOVE | MREMAP_FIXED, p + P), EINVAL);
	EXPECT_ERRNO(mremap(p, 0, 4 * P, MREMAP_MAYMOVE), EINVAL); /* only shared memory can be had twice */
	EXPECT_ERRNO(mremap(room(5), P, 2 * P, MREMAP_MAYMOVE), EFAULT);
	EXPECT(all(p, 4 * P, 0xAA));
}

CHECK(success_leaves_errno_alone)
{
	byte *p = folded(0, 8, 0xAA);
	errno = EXDEV;
	EXPECT(madvise(p, 2 * P, MADV_FREE) == 0 && errno == EXDEV);
	EXPECT(madvise(p, 4 * P, MADV_DONTNEED) == 0 && errno == EXDEV);
	EXPECT(madvise(p + 6 * P, P, MADV_WIPEONFORK) == 0 && errno == EXDEV);
	EXPECT(mremap(p, 8 * P, 16 * P, MREMAP_MAYMOVE) != MAP_FAILED && errno == EXDEV);
}

CHECK(files_of_others_and_shared_mappings_stay_the_kernels)
{
	byte *ours = folded(0, 1, 1), *content = anonymous(0, 4 * P, 0xAB);
	mkdir("/run/hotstart/memory", 0755);
	int fd = open("/run/hotstart/memory/x.mem", O_RDWR | O_CREAT, 0600), memory = memory_file(content, 4 * P);
	EXPECT(write(fd, content, 4 * P) == (ssize_t)(4 * P));
	byte *other = mmap(0, 2 * P, RW, MAP_PRIVATE, fd, 0), *shared = mmap(0, 2 * P, RW, MAP_SHARED, memory, (off_t)P);
	EXPECT(other != MAP_FAILED && shared != MAP_FAILED && ours);
	memset(other, 1, P);
	EXPECT(madvise(other, 2 * P, MADV_DONTNEED) == 0 && all(other, 2 * P, 0xAB));
	EXPECT_ERRNO(madvise(other, 2 * P, MADV_FREE), EINVAL);
	EXPECT_ERRNO(madvise(other, 2 * P, MADV_WIPEONFORK), EINVAL);
	EXPECT_ERRNO(madvise(other, 2 * P, MADV_REMOVE), EACCES);
	EXPECT((other = mremap(other, 2 * P, 4 * P, MREMAP_MAYMOVE)) != MAP_FAILED && all(other, 4 * P, 0xAB));
	EXPECT(madvise(shared, 2 * P, MADV_DONTNEED) == 0 && all(shared, 2 * P, 0xAB));
	EXPECT((shared = mremap(shared, 2 * P, 4 * P, MREMAP_MAYMOVE)) != MAP_FAILED && all(shared, 4 * P, 0xAB));
	byte *again = mremap(shared, 0, 4 * P, MREMAP_MAYMOVE);
	EXPECT(again != MAP_FAILED && again != shared && all(again, 4 * P, 0xAB));
}

CHECK(growth_in_place_shows_zeros)
{
	byte *p = folded(room(0), 4, 0xAA);
	EXPECT(mremap(p, 4 * P, 8 * P, 0) == p);
	EXPECT(all(p, 4 * P, 0xAA) && all(p + 4 * P, 4 * P, 0) && !mapped(p + 8 * P));
}

CHECK(growth_by_moving_shows_zeros)
{
	byte *p = folded(room(0), 4, 0xAA);
	anonymous(p + 4 * P, P, 0xBB);
	EXPECT_ERRNO(mremap(p, 4 * P, 8 * P, 0), ENOMEM);
	EXPECT(all(p, 4 * P, 0xAA) && all(p + 4 * P, P, 0xBB));
	byte *q = mremap(p, 4 * P, 8 * P, MREMAP_MAYMOVE);
	EXPECT(q != MAP_FAILED && q != p && !mapped(p));
	EXPECT(all(q, 4 * P, 0xAA) && all(q + 4 * P, 4 * P, 0) && all(p + 4 * P, P, 0xBB));
}

CHECK(growth_to_a_fixed_address_shows_zeros)
{
	byte *p = folded(room(0), 4, 0xAA), *q = anonymous(room(1), 8 * P, 0xBB);
	EXPECT(mremap(p, 4 * P, 8 * P, MREMAP_MAYMOVE | MREMAP_FIXED, q) == q);
	EXPECT(all(q, 4 * P, 0xAA) && all(q + 4 * P, 4 * P, 0) && !mapped(p) && !mapped(q + 8 * P));
}

CHECK(growth_beyond_the_end_of_the_file_is_no_bus_error)
{
	byte *p = folded(room(0), 4, 0xAA);
	size_t pages = 4 + 2 * JUNK_PAGES;
	EXPECT(mremap(p, 4 * P, pages * P, MREMAP_MAYMOVE) == p);
	EXPECT(all(p, 4 * P, 0xAA) && all(p + 4 * P, (pages - 4) * P, 0));
}

CHECK(an_area_that_was_shrunk_grows_with_zeros)
{
	byte *p = folded(room(0), 8, 0xAA);
	EXPECT(mremap(p, 8 * P, 2 * P, 0) == p && !mapped(p + 2 * P));
	EXPECT(mremap(p, 2 * P, 8 * P, 0) == p && all(p, 2 * P, 0xAA) && all(p + 2 * P, 6 * P, 0));
}

CHECK(an_area_grows_again_and_again)
{
	byte *p = folded(room(0), 2, 0xAA);
	for (size_t pages = 2; pages < 12; pages++) {
		EXPECT(mremap(p, pages * P, (pages + 1) * P, pages % 2 ? MREMAP_MAYMOVE : 0) == p);
		EXPECT(all(p + pages * P, P, 0));
		memset(p + pages * P, 0xAA, P);
	}
	anonymous(p + 12 * P, P, 0xBB);
	EXPECT_ERRNO(mremap(p, 12 * P, 14 * P, 0), ENOMEM);
	byte *q = mremap(p, 12 * P, 14 * P, MREMAP_MAYMOVE);
	EXPECT(q != MAP_FAILED && !mapped(p) && !mapped(p + 11 * P));
	EXPECT(all(q, 12 * P, 0xAA) && all(q + 12 * P, 2 * P, 0) && all(p + 12 * P, P, 0xBB));
	EXPECT(mremap(q, 14 * P, 20 * P, MREMAP_MAYMOVE | MREMAP_FIXED, p) == p);
	EXPECT(all(p, 12 * P, 0xAA) && all(p + 12 * P, 8 * P, 0) && !mapped(q));
}

CHECK(an_area_that_was_zeroed_in_part_moves_as_one)
{
	byte *p = room(0), *to = room(1), *r;
	for (int kind = 0; kind < 3; kind++) {
		folded(p, 8, 0xAA);
		EXPECT(madvise(p + 2 * P, 2 * P, MADV_DONTNEED) == 0);
		memset(p + 3 * P, 0xBB, P);
		switch (kind) {
		case 0: r = mremap(p, 8 * P, 8 * P, MREMAP_MAYMOVE | MREMAP_FIXED, to); break;
		case 1: r = mremap(p, 8 * P, 9 * P, MREMAP_MAYMOVE | MREMAP_FIXED, to); break;
		default: r = mremap(p, 8 * P, 8 * P, MREMAP_MAYMOVE | MREMAP_DONTUNMAP, NULL); break;
		}
		EXPECT(r != MAP_FAILED && (kind == 2 || r == to));
		EXPECT(all(r, 2 * P, 0xAA) && all(r + 2 * P, P, 0) && all(r + 3 * P, P, 0xBB) && all(r + 4 * P, 4 * P, 0xAA));
		EXPECT(kind == 1 ? all(r + 8 * P, P, 0) : kind == 2 || !mapped(r + 8 * P));
		EXPECT(kind == 2 ? all(p, 8 * P, 0) : !mapped(p) && !mapped(p + 7 * P));
		munmap(to, 16 * P);
	}
}

CHECK(a_range_that_was_never_one_area_cannot_grow)
{
	byte *p = room(0);
	folded(p, 3, 0xAA), folded(p + 4 * P, 2, 0xAA);
	EXPECT_ERRNO(mremap(p, 6 * P, 8 * P, MREMAP_MAYMOVE), EFAULT);
	folded(p, 6, 0xAA);
	EXPECT(mprotect(p + 2 * P, P, PROT_READ) == 0);
	EXPECT_ERRNO(mremap(p, 6 * P, 8 * P, MREMAP_MAYMOVE), EFAULT);
	EXPECT(all(p, 6 * P, 0xAA) && !mapped(p + 6 * P));
	for (int shared = 0; shared < 2; shared++) {
		int fd = shared ? -1 : memfd_create("of others", 0), flags = shared ? MAP_SHARED | MAP_ANONYMOUS : MAP_PRIVATE;
		folded(p, 6, 0xAA);
		EXPECT(shared || ftruncate(fd, (off_t)P) == 0);
		EXPECT(mmap(p + 2 * P, P, RW, flags | MAP_FIXED, fd, 0) == p + 2 * P);
		EXPECT_ERRNO(mremap(p, 6 * P, 8 * P, MREMAP_MAYMOVE), EFAULT);
	}
}

CHECK(moving_and_shrinking_a_split_area_at_once_is_refused_and_harmless)
{
	byte *p = folded(room(0), 8, 0xAA), *to = anonymous(room(1), 8 * P, 0xBB);
	EXPECT(madvise(p + 2 * P, 2 * P, MADV_DONTNEED) == 0);
	EXPECT_ERRNO(mremap(p, 8 * P, 6 * P, MREMAP_MAYMOVE | MREMAP_FIXED, to), EFAULT);
	EXPECT(all(p, 2 * P, 0xAA) && all(p + 2 * P, 2 * P, 0) && all(p + 4 * P, 2 * P, 0xAA));
}

CHECK(dontunmap_leaves_zeros_behind)
{
	byte *p = folded(0, 4, 0xAA), *q = mremap(p, 4 * P, 4 * P, MREMAP_MAYMOVE | MREMAP_DONTUNMAP, NULL);
	EXPECT(q != MAP_FAILED && q != p && all(q, 4 * P, 0xAA) && all(p, 4 * P, 0));
}

CHECK(a_locked_area_grows_locked)
{
	byte *p = folded(room(0), 4, 0xAA);
	if (mlock(p, 4 * P)) skip("mlock is not allowed");
	for (size_t pages = 4; pages < 16; pages += 4) { /* at first as one area, then as several */
		EXPECT(mremap(p, pages * P, (pages + 4) * P, 0) == p && all(p + pages * P, 4 * P, 0));
		EXPECT_ERRNO(raw_madvise(p + pages * P, 4 * P, MADV_DONTNEED), EINVAL);
	}
}

CHECK(no_descriptor_is_left_open)
{
	byte *p = folded(room(0), 8, 0xAA);
	int before = dup(0);
	EXPECT(before >= 0 && close(before) == 0);
	EXPECT(madvise(p, P, MADV_DONTNEED) == 0 && mremap(p, 8 * P, 9 * P, 0) == p && madvise(p - P, 2 * P, MADV_FREE) == -1);
	EXPECT(dup(0) == before);
}

CHECK(posix_madvise_needs_no_help) /* its DONTNEED does nothing in glibc and musl alike */
{
	byte *p = folded(0, 4, 0xAA);
	EXPECT(posix_madvise(p, 4 * P, POSIX_MADV_DONTNEED) == 0 && all(p, 4 * P, 0xAA));
}

/* ---- when something is missing ------------------------------------------------------------------------------ */

static void no_more_descriptors(void)
{
	struct rlimit none = {0, 0};
	EXPECT(setrlimit(RLIMIT_NOFILE, &none) == 0);
}

CHECK(while_nothing_is_folded_proc_is_not_asked)
{
	byte *p = anonymous(0, 4 * P, 0xAA);
	close(open(UNFOLDED, O_CREAT | O_WRONLY, 0644));
	no_more_descriptors();
	EXPECT(madvise(p, 4 * P, MADV_DONTNEED) == 0 && all(p, 4 * P, 0));
	EXPECT(mremap(p, 4 * P, 8 * P, MREMAP_MAYMOVE) != MAP_FAILED);
}

CHECK(when_proc_cannot_be_asked_success_is_not_claimed)
{
	byte *p = folded(room(0), 4, 0xAA);
	no_more_descriptors();
	EXPECT_ERRNO(madvise(p, 4 * P, MADV_DONTNEED), ENOMEM);
	EXPECT_ERRNO(mremap(p, 4 * P, 8 * P, MREMAP_MAYMOVE), ENOMEM);
	EXPECT(all(p, 4 * P, 0xAA) && !mapped(p + 4 * P));
}

CHECK(when_areas_run_out_zeros_are_written)
{
	byte *p = folded(0, 4, 0xAA);
	deny(SYS_mmap, 3, MAP_FIXED, MAP_FIXED, ENOMEM);
	EXPECT(madvise(p + P, 2 * P, MADV_DONTNEED) == 0);
	EXPECT(all(p, P, 0xAA) && all(p + P, 2 * P, 0) && all(p + 3 * P, P, 0xAA));
}

CHECK(growth_that_cannot_be_finished_is_undone)
{
	byte *p = folded(room(0), 4, 0xAA), *q = folded(room(1), 4, 0xAA);
	anonymous(q + 4 * P, P, 0xBB);
	deny(SYS_mmap, 3, MAP_FIXED, MAP_FIXED, ENOMEM);
	EXPECT_ERRNO(mremap(p, 4 * P, 8 * P, 0), ENOMEM);
	EXPECT(all(p, 4 * P, 0xAA) && !mapped(p + 4 * P));
	EXPECT_ERRNO(mremap(q, 4 * P, 8 * P, MREMAP_MAYMOVE), ENOMEM);
	EXPECT(all(q, 4 * P, 0xAA) && all(q + 4 * P, P, 0xBB));
}

CHECK(moving_in_pieces_that_fails_half_way_is_undone)
{
	byte *p = folded(room(0), 8, 0xAA);
	EXPECT(madvise(p + 2 * P, 2 * P, MADV_DONTNEED) == 0);
	anonymous(p + 8 * P, P, 0xBB);
	deny(SYS_mremap, 1, ~0U, (uint32_t)(4 * P), ENOMEM); /* the last piece has four pages */
	EXPECT_ERRNO(mremap(p, 8 * P, 9 * P, MREMAP_MAYMOVE), ENOMEM);
	EXPECT(all(p, 2 * P, 0xAA) && all(p + 2 * P, 2 * P, 0) && all(p + 4 * P, 4 * P, 0xAA) && all(p + 8 * P, P, 0xBB));
}

/* ---- a fold that strikes in the middle ---------------------------------------------------------------------- */

/* Every system call of the shim traps here (its sixth argument is 0, ours is not); at the chosen one the area is folded first. */
static struct { byte *at; int fd, calls, strike_at; } victim;
enum { OURS = 4096, STRUCK = 2 };

static void strike(void)
{
	size_t bytes = mapped(victim.at + 4 * P) ? 8 * P : 4 * P;
	if (pwrite(victim.fd, victim.at, bytes, (off_t)P) != (ssize_t)bytes) _exit(99);
	unlink(UNFOLDED);
	syscall(SYS_mmap, victim.at, bytes, RW, MAP_PRIVATE | MAP_FIXED, victim.fd, P);
}

static void on_system_call(int signal, siginfo_t *info, void *context)
{
	ucontext_t *u = context;
	int saved = errno;
	(void)signal;
	if (victim.calls++ == victim.strike_at) strike();
#ifdef __x86_64__
	greg_t *r = u->uc_mcontext.gregs;
	long result = syscall(info->si_syscall, r[REG_RDI], r[REG_RSI], r[REG_RDX], r[REG_R10], r[REG_R8], OURS);
	r[REG_RAX] = result < 0 ? -errno : result;
#else
	unsigned long long *r = u->uc_mcontext.regs;
	long result = syscall(info->si_syscall, r[0], r[1], r[2], r[3], r[4], OURS);
	r[0] = (unsigned long long)(result < 0 ? -errno : result);
#endif
	errno = saved;
}

static void trap_the_shim(void)
{
	struct sigaction action = {.sa_sigaction = on_system_call, .sa_flags = SA_SIGINFO | SA_NODEFER};
	EXPECT(sigaction(SIGSYS, &action, 0) == 0);
	static const int trapped[] = {SYS_madvise, SYS_mremap, SYS_mmap, SYS_faccessat, SYS_openat, SYS_ioctl, SYS_read, SYS_close};
	enum { N = sizeof trapped / sizeof *trapped };
	struct sock_filter code[N + 6] = {BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr))};
	int n = 1;
	for (int i = 0; i < N; i++)
		code[n++] = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, (uint32_t)trapped[i], (uint8_t)(N - i), 0);
	code[n++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW);
	code[n++] = (struct sock_filter)BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, args[5]));
	code[n++] = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, 0, 0, 1);
	code[n++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_TRAP);
	code[n++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW);
	struct sock_fprog program = {(unsigned short)n, code};
	EXPECT(!prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0));
	EXPECT(!prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program));
}

/* Returns 0 if the fold did not strike, because the call made fewer system calls than that. */
static int struck_during(int operation, int strike_at)
{
	byte *p = victim.at = anonymous(room(0), 4 * P, 0xAA);
	victim.fd = memory_file(p, 8 * P - 4 * P);
	victim.strike_at = strike_at;
	close(open(UNFOLDED, O_CREAT | O_WRONLY, 0644));
	trap_the_shim();
	if (operation == 0) EXPECT(madvise(p, 4 * P, MADV_DONTNEED) == 0 && all(p, 4 * P, 0));
	if (operation == 1) EXPECT(madvise(p, 4 * P, MADV_FREE) == 0 && (all(p, 4 * P, 0) || all(p, 4 * P, 0xAA)));
	if (operation == 2) EXPECT(mremap(p, 4 * P, 8 * P, 0) == p && all(p, 4 * P, 0xAA) && all(p + 4 * P, 4 * P, 0));
	return victim.calls > strike_at ? STRUCK : 0;
}

static int struck_during_in_child(void *argument) { int *a = argument; return struck_during(a[0], a[1]); }

CHECK(a_fold_may_strike_before_any_system_call_of_the_shim)
{
	for (int operation = 0; operation < 3; operation++) {
		int struck = STRUCK, a[2] = {operation, 0};
		for (; struck == STRUCK && a[1] < 64; a[1]++) struck = in_child(struck_during_in_child, a);
		EXPECT(struck == 0);  /* else a child said what was wrong, or died */
		EXPECT(a[1] > 1);
	}
}

/* ---- many at once ------------------------------------------------------------------------------------------- */

static volatile int stop;

static void *zero_own_pages(void *argument)
{
	byte *p = argument;
	for (int round = 0; round < 300; round++) {
		size_t at = (size_t)(round % 7) * P, pages = 1 + (size_t)round % 5;
		memset(p, 0xAA, 12 * P);
		if (round % 50 == 0) fold(p, 12 * P);
		EXPECT(madvise(p + at, pages * P, round % 2 ? MADV_DONTNEED : MADV_FREE) == 0);
		int anonymous_free = round % 2 == 0; /* then old bytes may still be seen */
		EXPECT(anonymous_free || all(p + at, pages * P, 0));
		EXPECT(all(p, at, 0xAA) && all(p + at + pages * P, 12 * P - at - pages * P, 0xAA));
	}
	return 0;
}

static void *fork_all_the_time(void *argument)
{
	(void)argument;
	while (!stop) {
		pid_t pid = fork();
		if (!pid) _exit(0);
		waitpid(pid, 0, 0);
	}
	return 0;
}

CHECK(threads_zero_their_own_memory_while_others_fork)
{
	pthread_t threads[6], forker;
	byte *p = folded(0, 6 * 12, 0xAA);
	EXPECT(!pthread_create(&forker, 0, fork_all_the_time, 0));
	for (int i = 0; i < 6; i++) EXPECT(!pthread_create(&threads[i], 0, zero_own_pages, p + (size_t)i * 12 * P));
	for (int i = 0; i < 6; i++) pthread_join(threads[i], 0);
	stop = 1;
	pthread_join(forker, 0);
}

static byte *of_the_handler;
static volatile int handled, wrong;

static void zero_in_handler(int signal)
{
	(void)signal;
	if (handled >= 200) return;
	byte *p = of_the_handler + (size_t)handled++ * P;
	if (madvise(p, P, MADV_DONTNEED) || !all(p, P, 0)) wrong++;
}

CHECK(a_signal_handler_may_interrupt_the_shim_and_use_it)
{
	of_the_handler = folded(0, 200, 0xAA);
	struct sigaction action = {.sa_handler = zero_in_handler};
	struct itimerval often = {{0, 300}, {0, 300}};
	EXPECT(sigaction(SIGALRM, &action, 0) == 0 && setitimer(ITIMER_REAL, &often, 0) == 0);
	for (time_t began = time(0); handled < 200 && time(0) - began < 20;) {
		byte *p = folded(room(1), 2, 0xBB);
		errno = EXDEV;
		EXPECT(madvise(p, P, MADV_DONTNEED) == 0 && all(p, P, 0) && all(p + P, P, 0xBB));
	}
	EXPECT(handled == 200 && !wrong);
}

static int churned(void *argument);
CHECK(a_shrunken_stack_is_enough) { EXPECT(in_child(churned, 0) == 0); }

static int churned(void *argument) /* the shim in a handler on the smallest alternate stack of old */
{
	(void)argument;
	of_the_handler = folded(0, 200, 0xAA);
	stack_t small = {.ss_sp = anonymous(0, 4 * P, 0), .ss_size = 8192};
	struct sigaction action = {.sa_handler = zero_in_handler, .sa_flags = SA_ONSTACK};
	EXPECT(sigaltstack(&small, 0) == 0 && sigaction(SIGUSR1, &action, 0) == 0);
	for (int i = 0; i < 200; i++) raise(SIGUSR1);
	return wrong;
}

/* ---- random twins ------------------------------------------------------------------------------------------- */

/* Two worlds of the same pages: in world 0 anonymous memory and the bare kernel, in world 1 areas folded and the shim. Every
 * operation is done in both at the same offsets; answers and every byte must agree, for a child too. */
enum { WORLD_PAGES = 96 };
static uint64_t random_state;
static long step, operations, refused, joined, moved_away;
static char last[160];

static uint32_t rnd(uint32_t below)
{
	random_state = random_state * 6364136223846793005UL + 1442695040888963407UL;
	return (uint32_t)(random_state >> 33) % below;
}

static byte *world(int which) { return room(10 + which); }

static void differ(const char *what, long a, long b)
{
	printf("%s FAILED at step %ld after %s: %s: kernel %ld, shim %ld\n", check_name, step, last, what, a, b);
	fflush(stdout);
	_exit(1);
}

static long peek(const byte *at, byte *into) /* by the kernel, so that what cannot be read does not kill us */
{
	struct iovec local = {into, P}, remote = {(void *)at, P};
	return process_vm_readv(getpid(), &local, 1, &remote, 1, 0);
}

static void compare_ranges(const byte *plain, const byte *ours, size_t pages)
{
	static byte a[65536], b[65536];
	for (size_t i = 0; i < pages; i++) {
		long ra = peek(plain + i * P, a), rb = peek(ours + i * P, b);
		if (ra != rb) differ("readable bytes of a page", ra, rb);
		if (ra > 0 && memcmp(a, b, P))
			for (size_t k = 0; k < P; k++)
				if (a[k] != b[k]) { snprintf(last + strlen(last), 30, ", page %zu", i); differ("a byte", a[k], b[k]); }
	}
}

static int compare_worlds(void *nothing)
{
	(void)nothing;
	compare_ranges(world(0), world(1), WORLD_PAGES);
	return 0;
}

static void agree(long plain, int plain_errno, long ours, int ours_errno)
{
	operations++;
	if (plain < 0) refused++;
	if ((plain < 0) != (ours < 0)) differ("result", plain < 0 ? -plain_errno : plain, ours < 0 ? -ours_errno : ours);
	if (plain < 0 && plain_errno != ours_errno) differ("errno", plain_errno, ours_errno);
}

static void renew(size_t at, size_t pages)
{
	int prefix = (int)rnd(255) + 1, folds = rnd(4) != 0;
	for (int w = 0; w < 2; w++)
		for (size_t i = 0; i < pages; i++) {
			byte *p = world(w) + (at + i) * P;
			if (i == 0) anonymous(p, pages * P, 0);
			memset(p, prefix, P / 2);
			p[P / 2] = (byte)i;
		}
	if (folds) fold(world(1) + at * P, pages * P);
}

static void write_some(size_t at, size_t pages)
{
	static byte data[65536];
	memset(data, (int)rnd(255) + 1, P);
	size_t bytes = 1 + rnd((uint32_t)P);
	for (size_t i = 0; i < pages; i++) {
		long r[2];
		for (int w = 0; w < 2; w++) {
			struct iovec local = {data, bytes}, remote = {world(w) + (at + i) * P, bytes};
			r[w] = process_vm_writev(getpid(), &local, 1, &remote, 1, 0);
		}
		agree(r[0], 0, r[1], 0);
	}
}

static void advise(size_t at, size_t pages)
{
	static const int advices[] = {MADV_DONTNEED, MADV_DONTNEED, MADV_DONTNEED, MADV_DONTNEED, MADV_FREE, MADV_FREE,
		MADV_WIPEONFORK, MADV_KEEPONFORK, MADV_DONTNEED_LOCKED, GUARD_INSTALL, GUARD_REMOVE, MADV_REMOVE, MADV_WILLNEED,
		MADV_POPULATE_READ, MADV_POPULATE_WRITE, MADV_COLD, MADV_PAGEOUT, MADV_SEQUENTIAL, MADV_NOHUGEPAGE, 999};
	int advice = advices[rnd(sizeof advices / sizeof *advices)];
	size_t bytes = pages * P - (rnd(4) ? 0 : rnd((uint32_t)P)), odd = rnd(40) ? 0 : 8;
	if (!rnd(60)) bytes = 0;
	snprintf(last, sizeof last, "madvise(%zu, %zu bytes, %d)", at, bytes, advice);
	errno = 0;
	long plain = raw_madvise(world(0) + at * P + odd, bytes, advice);
	int plain_errno = errno;
	errno = 0;
	long ours = madvise(world(1) + at * P + odd, bytes, advice);
	agree(plain, plain_errno, ours, errno);
	/* FREE zeroes some time later: bring that about now. An area that it left ours would show the file's bytes again. */
	for (int w = 0; advice == MADV_FREE && w < 2; w++) raw_madvise(world(w) + at * P + odd, bytes, MADV_DONTNEED);
}

static void remap(size_t at, size_t pages)
{
	size_t new_pages = rnd(3) ? 1 + rnd(24) : pages, to = rnd(WORLD_PAGES - 24);
	int flags = rnd(4) ? MREMAP_MAYMOVE : 0;
	if (flags && rnd(2)) flags |= MREMAP_FIXED;
	if (flags && !rnd(6)) { flags |= MREMAP_DONTUNMAP; new_pages = pages; }
	/* The kernel's DONTUNMAP unlocks whole areas and not only what moved (6.18), so the areas would have to be the same. */
	for (int w = 0; flags & MREMAP_DONTUNMAP && w < 2; w++)
		for (size_t i = 0; i < WORLD_PAGES; i++) munlock(world(w) + i * P, P);
	if (!rnd(40)) pages = 0;
	if (!rnd(40)) new_pages = 0;
	snprintf(last, sizeof last, "mremap(%zu, %zu -> %zu pages, flags %d, to %zu)", at, pages, new_pages, flags, to);
	errno = 0;
	void *hint[2] = {flags & MREMAP_FIXED ? world(0) + to * P : 0, flags & MREMAP_FIXED ? world(1) + to * P : 0};
	byte *plain = raw_mremap(world(0) + at * P, pages * P, new_pages * P, flags, hint[0]);
	int plain_errno = errno;
	/* Anonymous areas of different history do not merge, and the kernel then refuses what the shim may allow. */
	if (plain == MAP_FAILED && plain_errno == EFAULT) { joined++; return; }
	errno = 0;
	byte *ours = mremap(world(1) + at * P, pages * P, new_pages * P, flags, hint[1]);
	if (plain != MAP_FAILED && ours == MAP_FAILED && errno == EFAULT && new_pages < pages) { /* in one call: not promised */
		EXPECT(mremap(world(1) + at * P, pages * P, new_pages * P, 0) == world(1) + at * P);
		ours = mremap(world(1) + at * P, new_pages * P, new_pages * P, flags, hint[1]);
	}
	agree(plain == MAP_FAILED ? -1 : 0, plain_errno, ours == MAP_FAILED ? -1 : 0, errno);
	if (plain == MAP_FAILED) return;
	int away = plain < world(0) || plain >= world(0) + WORLD_PAGES * P;
	if (away ? ours >= world(1) && ours < world(1) + WORLD_PAGES * P : plain - world(0) != ours - world(1))
		differ("place", plain - world(0), ours - world(1));
	if (!away) return;
	moved_away++;
	compare_ranges(plain, ours, new_pages); /* and home again */
	plain = raw_mremap(plain, new_pages * P, new_pages * P, MREMAP_MAYMOVE | MREMAP_FIXED, world(0) + to * P);
	ours = mremap(ours, new_pages * P, new_pages * P, MREMAP_MAYMOVE | MREMAP_FIXED, world(1) + to * P);
	EXPECT(plain == world(0) + to * P && ours == world(1) + to * P);
}

static void on_both(const char *name, int number, size_t at, size_t pages, int argument)
{
	long r[2];
	int error[2];
	snprintf(last, sizeof last, "%s(%zu, %zu pages, %d)", name, at, pages, argument);
	for (int w = 0; w < 2; w++) {
		errno = 0;
		r[w] = syscall(number, world(w) + at * P, pages * P, argument);
		error[w] = errno;
	}
	agree(r[0], error[0], r[1], error[1]);
}

static int random_worlds(uint64_t seed, long steps)
{
	random_state = seed * 2654435761U + 1;
	for (int i = 0; i < 8; i++) rnd(2);
	renew(0, WORLD_PAGES / 2);
	for (step = 0; step < steps; step++) {
		size_t pages = 1 + rnd(rnd(3) ? 6 : 24), at = rnd((uint32_t)(WORLD_PAGES - pages));
		uint32_t kind = rnd(100);
		snprintf(last, sizeof last, "kind %u(%zu, %zu pages)", kind, at, pages);
		if (kind < 12) renew(at, pages);
		else if (kind < 30) write_some(at, pages);
		else if (kind < 62) advise(at, pages);
		else if (kind < 82) remap(at, pages);
		else if (kind < 90) on_both("mprotect", SYS_mprotect, at, pages, rnd(3) ? RW : (int)rnd(8));
		else if (kind < 93) on_both("munmap", SYS_munmap, at, pages, 0);
		else if (kind < 95) on_both("mlock", SYS_mlock, at, pages, 0);
		else if (kind < 98) on_both("munlock", SYS_munlock, at, pages, 0);
		else if (in_child(compare_worlds, 0)) _exit(1); /* it said why */
		compare_worlds(0);
	}
	printf("random ok seed %lu: %ld operations in both worlds, %ld refused alike, %ld moved elsewhere, %ld left out\n",
	       (unsigned long)seed, operations, refused, moved_away, joined);
	return 0;
}

/* ---- what it costs ------------------------------------------------------------------------------------------ */

static double now_us(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return (double)t.tv_sec * 1e6 + (double)t.tv_nsec / 1e3;
}

static int advise_kernel(void *p, size_t bytes, int advice) { return (int)raw_madvise(p, bytes, advice); }

/* The best of many runs (other work on the machine only adds) over N areas of one touched page each. */
static void cost(const char *what, int (*advise_by)(void *, size_t, int), int ours)
{
	enum { N = 250, RUNS = 40 };
	double best_us = 1e9;
	byte *p = anonymous(room(2), 2 * N * P, 0xAA);
	for (size_t i = 0; i < N; i++) mprotect(p + 2 * i * P, P, PROT_READ); /* in all as many areas as a torch worker has */
	for (int run = 0; run < RUNS; run++) {
		for (size_t i = 0; i < N; i++) {
			byte *page = p + (2 * i + 1) * P;
			anonymous(page, P, 0xAA);
			if (ours) fold(page, P), page[0] = 1;
		}
		double began = now_us();
		for (size_t i = 0; i < N; i++) advise_by(p + (2 * i + 1) * P, P, MADV_DONTNEED);
		double us = (now_us() - began) / N;
		if (us < best_us) best_us = us;
	}
	printf("%-52s %6.2f us a call\n", what, best_us);
	munmap(p, 2 * N * P);
}

static int print_costs(void)
{
	close(open(UNFOLDED, O_CREAT | O_WRONLY, 0644));
	cost("kernel alone, anonymous page", advise_kernel, 0);
	cost("shim, nothing folded (the marker stands)", madvise, 0);
	unlink(UNFOLDED);
	cost("shim, folded, the page is not ours", madvise, 0);
	cost("kernel alone, page of a memory file (wrong bytes)", advise_kernel, 1);
	cost("shim, folded, the page is ours", madvise, 1);
	return 0;
}

/* ------------------------------------------------------------------------------------------------------------- */

static int run_check(void *argument)
{
	struct check *c = argument;
	check_name = c->name;
	c->run();
	printf("%s ok\n", c->name);
	return 0;
}

int main(int argc, char **argv)
{
	int failed = 0, skipped = 0, ran = 0;
	P = (size_t)sysconf(_SC_PAGESIZE);
	setvbuf(stdout, 0, _IOLBF, 0);
	if (argc > 1 && !strcmp(argv[1], "--text")) {
		deny(SYS_ioctl, 1, ~0U, (uint32_t)PROCMAP_QUERY, ENOTTY);
		argc--, argv++;
	}
	check_name = argc > 1 ? argv[1] : "";
	if (argc == 4 && !strcmp(argv[1], "random")) return random_worlds(strtoul(argv[2], 0, 10), atol(argv[3]));
	if (argc == 2 && !strcmp(argv[1], "costs")) return print_costs();
	for (int i = 0; i < n_checks; i++) {
		int wanted = argc == 1;
		for (int k = 1; k < argc; k++) wanted |= !strcmp(argv[k], checks[i].name);
		if (!wanted) continue;
		int status = in_child(run_check, &checks[i]);
		if (status > 255) printf("%s FAILED: killed, status %x\n", checks[i].name, status - 256);
		ran++, failed += status && status != SKIPPED, skipped += status == SKIPPED;
	}
	if (!ran) { fprintf(stderr, "no such check: %s\n", check_name); return 2; }
	return failed ? 1 : skipped == ran ? SKIPPED : 0;
}
