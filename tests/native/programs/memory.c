/* Shapes of memory: what was in it is still there after a fold, and what the kernel promised about it still holds. */
#include "check.h"

/* ---- heap: blocks of every size -------------------------------------------------------------------------------- */

enum { BLOCKS = 400 };
static struct { char *at; size_t bytes; } blocks[BLOCKS];

static void verify_heap(void)
{
	for (int i = 0; i < BLOCKS; i++) {
		EXPECT(is_filled(blocks[i].at, blocks[i].bytes, (uint64_t)i));
		if (i % 3) continue;
		blocks[i].at = realloc(blocks[i].at, blocks[i].bytes + 4096);
		EXPECT(blocks[i].at && is_filled(blocks[i].at, blocks[i].bytes, (uint64_t)i));
		blocks[i].bytes += 4096;
		fill(blocks[i].at, blocks[i].bytes, (uint64_t)i);
	}
}

static void heap(void)
{
	for (int i = 0; i < BLOCKS; i++) {
		blocks[i].bytes = (16UL << i % 14) + (size_t)i * 8;
		EXPECT((blocks[i].at = malloc(blocks[i].bytes)));
		fill(blocks[i].at, blocks[i].bytes, (uint64_t)i);
	}
	serve(0, verify_heap);
}

/* ---- mappings: odd sizes and places, some pages touched, the others still zero ----------------------------------- */

enum { MAPPINGS = 60 };
static struct { char *at; size_t pages; } mappings[MAPPINGS];

static void verify_mappings(void)
{
	for (int i = 0; i < MAPPINGS; i++)
		for (size_t k = 0; k < mappings[i].pages; k++) {
			char *page = mappings[i].at + k * PAGE_BYTES;
			if (k % (size_t)(i % 7 + 1) == 0) EXPECT(is_filled(page, PAGE_BYTES, (uint64_t)i << 32 | k));
			else EXPECT(is_zero(page, PAGE_BYTES));
		}
	for (int i = 0; i < MAPPINGS; i += 9) { /* give one back, take one of another size */
		munmap(mappings[i].at, mappings[i].pages * PAGE_BYTES);
		mappings[i].pages += 5;
		mappings[i].at = map(mappings[i].pages * PAGE_BYTES, RW, ANONYMOUS);
		for (size_t k = 0; k < mappings[i].pages; k += (size_t)(i % 7 + 1))
			fill(mappings[i].at + k * PAGE_BYTES, PAGE_BYTES, (uint64_t)i << 32 | k);
	}
}

static void sparse_mappings(void)
{
	for (int i = 0; i < MAPPINGS; i++) {
		mappings[i].pages = (size_t)(16 + i * 13);
		mappings[i].at = map(mappings[i].pages * PAGE_BYTES, RW, ANONYMOUS);
		map(PAGE_BYTES, PROT_NONE, ANONYMOUS); /* keep them apart */
		for (size_t k = 0; k < mappings[i].pages; k += (size_t)(i % 7 + 1))
			fill(mappings[i].at + k * PAGE_BYTES, PAGE_BYTES, (uint64_t)i << 32 | k);
	}
	serve(0, verify_mappings);
}

/* ---- huge pages ------------------------------------------------------------------------------------------------- */

static char *huge;

static void verify_huge(void)
{
	EXPECT(is_filled(huge, 3 * MIB, 1));
	EXPECT(is_zero(huge + 3 * MIB, 3 * MIB)); /* the huge zero page, read only */
	EXPECT(is_filled(huge + 6 * MIB, 2 * MIB, 2));
}

static void huge_pages(void)
{
	huge = (char *)(((uintptr_t)map(12 * MIB, RW, ANONYMOUS) + 2 * MIB) & -(2 * MIB));
	madvise(huge, 8 * MIB, MADV_HUGEPAGE);
	fill(huge, 3 * MIB, 1);
	EXPECT(is_zero(huge + 4 * MIB, 2 * MIB));
	fill(huge + 6 * MIB, 2 * MIB, 2);
	serve(0, verify_huge);
}

/* ---- the program break grows, shrinks, and gives zeros again ------------------------------------------------------ */

static char *break_start;
static size_t break_bytes = 8 * MIB;

static void verify_break(void)
{
	EXPECT(is_filled(break_start, break_bytes, 3));
	EXPECT(sbrk(0) == break_start + break_bytes);
	EXPECT(sbrk(MIB) == break_start + break_bytes && is_zero(break_start + break_bytes, MIB));
	fill(break_start + break_bytes, MIB, 4);
	EXPECT(sbrk(-(2L << 20)) != (void *)-1 && sbrk(2 * MIB) != (void *)-1); /* below the old break and up again */
	EXPECT(is_filled(break_start, break_bytes - MIB, 3));
	EXPECT(is_zero(break_start + break_bytes - MIB, 2 * MIB));
	break_bytes += MIB;
	fill(break_start, break_bytes, 3);
}

static void program_break(void)
{
	char *volatile block = malloc(100); /* the allocator takes its piece of it now and not in between */
	free(block);
	break_start = sbrk((long)break_bytes);
	EXPECT(break_start != (void *)-1);
	fill(break_start, break_bytes, 3);
	serve(0, verify_break);
}

/* ---- protections ------------------------------------------------------------------------------------------------- */

static char *read_only, *code, *forbidden, *write_only, *striped;

static void verify_protections(void)
{
	EXPECT(is_filled(read_only, MIB, 5) && fault_of(read_only, 1) == SIGSEGV && fault_of(read_only, 0) == 0);
	EXPECT(((int (*)(void))code)() == 42 && fault_of(code, 1) == SIGSEGV);
	EXPECT(fault_of(forbidden, 0) == SIGSEGV);
	EXPECT(!mprotect(forbidden, MIB, PROT_READ) && is_filled(forbidden, MIB, 6) && !mprotect(forbidden, MIB, PROT_NONE));
	EXPECT(!mprotect(write_only, MIB, PROT_READ) && is_filled(write_only, MIB, 7) && !mprotect(write_only, MIB, PROT_WRITE));
	for (int i = 0; i < 64; i++) {
		char *stripe = striped + i * 16 * PAGE_BYTES;
		EXPECT(is_filled(stripe, 16 * PAGE_BYTES, (uint64_t)i) && (fault_of(stripe, 1) == SIGSEGV) == i % 2);
	}
	EXPECT(!mprotect(striped, 64 * 16 * PAGE_BYTES, RW) && is_filled(striped, 16 * PAGE_BYTES, 0));
	for (int i = 1; i < 64; i += 2) mprotect(striped + i * 16 * PAGE_BYTES, 16 * PAGE_BYTES, PROT_READ);
}

static void protections(void)
{
	static const unsigned char returns_42[] = {0xb8, 42, 0, 0, 0, 0xc3};
	read_only = map(MIB, RW, ANONYMOUS);
	code = map(MIB, RW, ANONYMOUS);
	forbidden = map(MIB, RW, ANONYMOUS);
	write_only = map(MIB, RW, ANONYMOUS);
	striped = map(64 * 16 * PAGE_BYTES, RW, ANONYMOUS);
	fill(read_only, MIB, 5);
	memcpy(code, returns_42, sizeof returns_42);
	memset(code + PAGE_BYTES, 0x90, MIB - PAGE_BYTES);
	fill(forbidden, MIB, 6);
	fill(write_only, MIB, 7);
	for (int i = 0; i < 64; i++) fill(striped + i * 16 * PAGE_BYTES, 16 * PAGE_BYTES, (uint64_t)i);
	mprotect(read_only, MIB, PROT_READ);
	mprotect(code, MIB, PROT_READ | PROT_EXEC);
	mprotect(forbidden, MIB, PROT_NONE);
	mprotect(write_only, MIB, PROT_WRITE);
	for (int i = 1; i < 64; i += 2) mprotect(striped + i * 16 * PAGE_BYTES, 16 * PAGE_BYTES, PROT_READ);
	serve(0, verify_protections);
}

/* ---- reservations far larger than memory --------------------------------------------------------------------------- */

enum { ISLANDS = 40 };
static char *ocean, *none;
static int extra;

static void verify_reservation(void)
{
	for (uint64_t i = 0; i < ISLANDS; i++) {
		EXPECT(is_filled(ocean + (i << 26) + i * PAGE_BYTES, PAGE_BYTES, i));
		EXPECT(is_zero(ocean + (i << 26) + (i + 1) * PAGE_BYTES, PAGE_BYTES));
	}
	EXPECT(fault_of(none, 0) == SIGSEGV);
	EXPECT(!mprotect(none + (extra << 20), MIB, RW) && is_zero(none + (extra << 20), MIB));
	EXPECT(!mprotect(none + (extra++ << 20), MIB, PROT_NONE));
}

static void reservation(void)
{
	ocean = map(4UL << 30, RW, ANONYMOUS | MAP_NORESERVE);
	none = map(16UL << 30, PROT_NONE, ANONYMOUS | MAP_NORESERVE);
	for (uint64_t i = 0; i < ISLANDS; i++) fill(ocean + (i << 26) + i * PAGE_BYTES, PAGE_BYTES, i);
	extra = 0;
	serve(0, verify_reservation);
}

/* ---- lightweight guard regions (kernel 6.13), which glibc 2.42 puts into the stacks of threads -------------------------- */

enum { GUARD_INSTALL = 102 };
static char *guarded;

static void verify_guards(void)
{
	for (int i = 0; i < 8; i++) {
		char *at = guarded + i * 32 * PAGE_BYTES;
		EXPECT(fault_of(at, 0) == SIGSEGV && fault_of(at + PAGE_BYTES, 1) == SIGSEGV);
		EXPECT(is_filled(at + 2 * PAGE_BYTES, 20 * PAGE_BYTES, (uint64_t)i));
		EXPECT(is_zero(at + 22 * PAGE_BYTES, 10 * PAGE_BYTES));
	}
}

static void guards(void)
{
	guarded = map(8 * 32 * PAGE_BYTES, RW, ANONYMOUS);
	for (int i = 0; i < 8; i++) {
		fill(guarded + (i * 32 + 2) * PAGE_BYTES, 20 * PAGE_BYTES, (uint64_t)i);
		if (!madvise(guarded + i * 32 * PAGE_BYTES, 2 * PAGE_BYTES, GUARD_INSTALL)) continue;
		dprintf(1, "skipped: no MADV_GUARD_INSTALL\n");
		_exit(77);
	}
	serve(0, verify_guards);
}

/* ---- advice ------------------------------------------------------------------------------------------------------------ */

static char *dont_fork, *dont_dump, *wipe_on_fork, *random_access;

static void verify_advised(void)
{
	unsigned char present;
	EXPECT(is_filled(dont_fork, MIB, 8) && is_filled(dont_dump, MIB, 9) && is_filled(wipe_on_fork, MIB, 10));
	EXPECT(is_filled(random_access, MIB, 11));
	EXPECT(has_flag(dont_fork, "dc") && has_flag(dont_dump, "dd") && has_flag(wipe_on_fork, "wf"));
	pid_t child = fork();
	if (child == 0) {
		EXPECT(mincore(dont_fork, PAGE_BYTES, &present) == -1 && errno == ENOMEM);
		EXPECT(is_filled(dont_dump, MIB, 9) && is_zero(wipe_on_fork, MIB));
		_exit(0);
	}
	expect_exit(child, 0);
	EXPECT(is_filled(wipe_on_fork, MIB, 10));
}

static void advised(void)
{
	char **areas[] = {&dont_fork, &dont_dump, &wipe_on_fork, &random_access};
	int advice[] = {MADV_DONTFORK, MADV_DONTDUMP, MADV_WIPEONFORK, MADV_RANDOM};
	for (int i = 0; i < 4; i++) {
		*areas[i] = map(MIB, RW, ANONYMOUS);
		EXPECT(!madvise(*areas[i], MIB, advice[i]));
		fill(*areas[i], MIB, (uint64_t)(8 + i));
	}
	serve(0, verify_advised);
}

/* ---- locked, growing down ------------------------------------------------------------------------------------------------ */

static char *locked_area, *growing;

static void verify_locked(void)
{
	EXPECT(is_filled(locked_area, MIB, 12) && has_flag(locked_area, "lo"));
	fill(locked_area, MIB, 12);
}

static void locked(void)
{
	locked_area = map(MIB, RW, ANONYMOUS);
	fill(locked_area, MIB, 12);
	EXPECT(!mlock(locked_area, MIB));
	serve(0, verify_locked);
}

static int grown_pages = 64;

static void verify_growing(void)
{
	EXPECT(is_filled(growing - grown_pages * PAGE_BYTES, PAGE_BYTES, (uint64_t)grown_pages));
	for (int i = 0; i < 16; i++) {
		grown_pages++;
		fill(growing - grown_pages * PAGE_BYTES, PAGE_BYTES, (uint64_t)grown_pages);
	}
	for (int i = 1; i <= grown_pages; i++) EXPECT(is_filled(growing - i * PAGE_BYTES, PAGE_BYTES, (uint64_t)i));
}

static void grows_down(void)
{
	char *room = map(64 * MIB, PROT_NONE, ANONYMOUS);
	EXPECT(!munmap(room, 64 * MIB));
	char *base = mmap(room + 63 * MIB, 16 * PAGE_BYTES, RW, ANONYMOUS | MAP_FIXED | MAP_GROWSDOWN, -1, 0);
	EXPECT(base != MAP_FAILED);
	growing = base + 16 * PAGE_BYTES;
	for (int i = 1; i <= grown_pages; i++) fill(growing - i * PAGE_BYTES, PAGE_BYTES, (uint64_t)i);
	serve(0, verify_growing);
}

/* ---- the main thread's stack, deep ------------------------------------------------------------------------------------------ */

static void recurse(int depth)
{
	volatile uint64_t here[512];
	for (int i = 0; i < 512; i++) here[i] = word((uint64_t)depth, (uint64_t)i);
	if (depth) recurse(depth - 1);
	else {
		ready();
		for (int rounds = 0; rounds < 20; rounds++) {
			while (!asked()) pause_ms(1);
			passed(); /* the frames above are looked at on the way out */
			if (checks_done == 3) break;
		}
	}
	for (int i = 0; i < 512; i++) EXPECT(here[i] == word((uint64_t)depth, (uint64_t)i));
}

static void verify_nothing(void) {}

static void deep_stack(void)
{
	recurse(1000);
	dprintf(1, "unwound\n");
	for (;;) {
		pause_ms(1);
		if (asked()) { verify_nothing(); passed(); }
	}
}

/* ---- shared memory: two views stay one -------------------------------------------------------------------------------------- */

static volatile uint64_t *shared_views[3][2];

static void verify_shared(void)
{
	for (int i = 0; i < 3; i++) {
		volatile uint64_t *a = shared_views[i][0], *b = shared_views[i][1];
		EXPECT(is_filled((const void *)a, MIB, (uint64_t)(20 + i)));
		a[7] = 1234;
		EXPECT(b[7] == 1234);
		pid_t child = fork();
		if (child == 0) { b[7] = word((uint64_t)(20 + i), 7); _exit(0); }
		expect_exit(child, 0);
		EXPECT(a[7] == word((uint64_t)(20 + i), 7));
	}
}

static void shared(void)
{
	int files[2] = {memfd_create("shared", 0), open("/tmp/shared", O_RDWR | O_CREAT, 0600)};
	shared_views[0][0] = shared_views[0][1] = map(MIB, RW, MAP_SHARED | MAP_ANONYMOUS);
	for (int i = 0; i < 2; i++) {
		EXPECT(files[i] >= 0 && !ftruncate(files[i], MIB));
		for (int k = 0; k < 2; k++) shared_views[1 + i][k] = mmap(0, MIB, RW, MAP_SHARED, files[i], 0);
		EXPECT(shared_views[1 + i][0] != MAP_FAILED && shared_views[1 + i][1] != MAP_FAILED);
	}
	for (int i = 0; i < 3; i++) fill((void *)shared_views[i][0], MIB, (uint64_t)(20 + i));
	serve(0, verify_shared);
}

/* ---- private views of files: .data, .bss, and a file of which some pages are changed -------------------------------------------- */

static uint64_t data_array[64 * 1024] = {1, 2, 3}, bss_array[64 * 1024];
static char *private_view, *shrunk_view;

static void verify_file_views(void)
{
	EXPECT(is_filled(data_array, sizeof data_array, 30) && is_filled(bss_array, sizeof bss_array, 31));
	for (int i = 0; i < 256; i++)
		EXPECT(is_filled(private_view + i * PAGE_BYTES, PAGE_BYTES, (uint64_t)(i % 8 ? 1000 + i : 2000 + i)));
	EXPECT(is_filled(shrunk_view, 16 * PAGE_BYTES, 32) && fault_of(shrunk_view + 40 * PAGE_BYTES, 0) == SIGBUS);
	fill(data_array, sizeof data_array, 30);
}

static void file_views(void)
{
	char page[PAGE_BYTES];
	int file = open("/tmp/file", O_RDWR | O_CREAT, 0600), shrunk = open("/tmp/shrunk", O_RDWR | O_CREAT, 0600);
	for (int i = 0; i < 256; i++) {
		fill(page, sizeof page, (uint64_t)(1000 + i));
		EXPECT(write(file, page, sizeof page) == sizeof page);
	}
	private_view = mmap(0, 256 * PAGE_BYTES, RW, MAP_PRIVATE, file, 0);
	char beginning[16 * PAGE_BYTES];
	fill(beginning, sizeof beginning, 32);
	EXPECT(write(shrunk, beginning, sizeof beginning) == sizeof beginning);
	shrunk_view = mmap(0, 64 * PAGE_BYTES, RW, MAP_PRIVATE, shrunk, 0);
	EXPECT(private_view != MAP_FAILED && shrunk_view != MAP_FAILED);
	for (int i = 0; i < 256; i += 8) fill(private_view + i * PAGE_BYTES, PAGE_BYTES, (uint64_t)(2000 + i));
	fill(shrunk_view, 3 * PAGE_BYTES, 32); /* fewer than a fold cares for */
	fill(data_array, sizeof data_array, 30);
	fill(bss_array, sizeof bss_array, 31);
	serve(0, verify_file_views);
}

/* A private view that reaches beyond its file's end and is changed so much that a fold would take it. */
static void verify_beyond_the_end(void)
{
	EXPECT(is_filled(shrunk_view, 16 * PAGE_BYTES, 33) && fault_of(shrunk_view + 40 * PAGE_BYTES, 0) == SIGBUS);
}

static void beyond_the_end(void)
{
	int file = open("/tmp/shrunk", O_RDWR | O_CREAT, 0600);
	EXPECT(file >= 0 && !ftruncate(file, 16 * PAGE_BYTES));
	shrunk_view = mmap(0, 64 * PAGE_BYTES, RW, MAP_PRIVATE, file, 0);
	EXPECT(shrunk_view != MAP_FAILED);
	fill(shrunk_view, 16 * PAGE_BYTES, 33);
	serve(0, verify_beyond_the_end);
}

/* ---- copy on write between parent and children ------------------------------------------------------------------------------------- */

static char *common;
static int talk[2];

static void verify_cow(void)
{
	pid_t children[4];
	char byte;
	EXPECT(is_filled(common, 4 * MIB, 40));
	EXPECT(!pipe(talk));
	for (int i = 0; i < 4; i++) {
		children[i] = fork();
		if (children[i]) continue;
		EXPECT(is_filled(common, 4 * MIB, 40));
		fill(common + i * (int)MIB, MIB, (uint64_t)(41 + i));
		close(talk[1]);
		EXPECT(read(talk[0], &byte, 1) == 0); /* until the parent has changed its own */
		EXPECT(is_filled(common + i * (int)MIB, MIB, (uint64_t)(41 + i)));
		_exit(7);
	}
	EXPECT(is_filled(common, 4 * MIB, 40));
	memset(common, 1, 4 * MIB);
	close(talk[1]);
	for (int i = 0; i < 4; i++) expect_exit(children[i], 7);
	close(talk[0]);
	EXPECT(common[0] == 1 && common[4 * MIB - 1] == 1);
	fill(common, 4 * MIB, 40);
}

static void copy_on_write(void)
{
	common = map(4 * MIB, RW, ANONYMOUS);
	fill(common, 4 * MIB, 40);
	serve(0, verify_cow);
}

/* ---- an allocator at work: live blocks keep their bytes, calloc gives zeros --------------------------------------------------------- */

enum { CHURNERS = 3, SLOTS = 600 };
static volatile int churn_rounds[CHURNERS];

static void *churner(void *argument)
{
	static struct { char *at; size_t bytes; } slots[CHURNERS][SLOTS];
	long self = (long)argument;
	unsigned seed = (unsigned)self + 1;
	for (;; churn_rounds[self]++) {
		int i = rand_r(&seed) % SLOTS;
		if (slots[self][i].at) {
			EXPECT(is_filled(slots[self][i].at, slots[self][i].bytes, (uint64_t)i));
			free(slots[self][i].at);
		}
		slots[self][i].bytes = 8UL << rand_r(&seed) % 15;
		if (rand_r(&seed) % 100 == 0) slots[self][i].bytes = MIB;
		slots[self][i].at = calloc(1, slots[self][i].bytes);
		EXPECT(slots[self][i].at && is_zero(slots[self][i].at, slots[self][i].bytes));
		fill(slots[self][i].at, slots[self][i].bytes, (uint64_t)i);
		if (churn_rounds[self] % 64 == 0) usleep(500); /* others use these processors too */
	}
	return 0;
}

static void verify_churn(void)
{
	for (int i = 0; i < CHURNERS; i++)
		for (int before = churn_rounds[i]; churn_rounds[i] < before + 500;) pause_ms(1);
}

static void churn(void)
{
	pthread_t t;
	for (long i = 1; i < CHURNERS; i++) EXPECT(!pthread_create(&t, 0, churner, (void *)i));
	EXPECT(!pthread_create(&t, 0, churner, 0));
	serve(0, verify_churn);
}

/* ---- thousands of areas -------------------------------------------------------------------------------------------------------------- */

enum { AREAS = 1200 };
static char *many_at;

static void verify_many(void)
{
	for (int i = 0; i < AREAS; i++)
		EXPECT(*(uint64_t *)(many_at + (long)i * 17 * PAGE_BYTES) == word(50, (uint64_t)i));
}

static void many_areas(void)
{
	many_at = map((size_t)AREAS * 17 * PAGE_BYTES, PROT_NONE, ANONYMOUS);
	for (int i = 0; i < AREAS; i++) {
		EXPECT(!mprotect(many_at + (long)i * 17 * PAGE_BYTES, 16 * PAGE_BYTES, RW));
		*(uint64_t *)(many_at + (long)i * 17 * PAGE_BYTES) = word(50, (uint64_t)i);
	}
	serve(0, verify_many);
}

/* ---- what the preload shim keeps true: thrown away memory is zero, growth is zero ------------------------------------------------------ */

static char *thrown, *remapped;
static size_t remapped_bytes = MIB;

static void verify_discarded(void)
{
	EXPECT(is_filled(thrown, MIB, 60) && is_filled(remapped, remapped_bytes, 61));
	EXPECT(!madvise(thrown + 64 * PAGE_BYTES, 64 * PAGE_BYTES, MADV_DONTNEED));
	EXPECT(is_zero(thrown + 64 * PAGE_BYTES, 64 * PAGE_BYTES) && is_filled(thrown, 64 * PAGE_BYTES, 60));
	fill(thrown, MIB, 60);
	char *moved = mremap(remapped, remapped_bytes, remapped_bytes + MIB, MREMAP_MAYMOVE);
	EXPECT(moved != MAP_FAILED && is_filled(moved, remapped_bytes, 61) && is_zero(moved + remapped_bytes, MIB));
	remapped = moved;
	remapped_bytes += MIB;
	fill(remapped, remapped_bytes, 61);
	EXPECT(!madvise(thrown, PAGE_BYTES, MADV_WIPEONFORK) && !madvise(thrown, PAGE_BYTES, MADV_KEEPONFORK));
}

static void discarded(void)
{
	thrown = map(MIB, RW, ANONYMOUS);
	map(PAGE_BYTES, PROT_NONE, ANONYMOUS);
	remapped = map(remapped_bytes, RW, ANONYMOUS);
	fill(thrown, MIB, 60);
	fill(remapped, remapped_bytes, 61);
	serve(0, verify_discarded);
}

/* ---- what makes a fold impossible; it must leave everything as it was ------------------------------------------------------------------ */

static char *sealed_area;

static void verify_sealed(void) { EXPECT(is_filled(sealed_area, MIB, 70) && is_filled(huge, 4 * MIB, 71)); }

static void sealed(void)
{
	huge = map(4 * MIB, RW, ANONYMOUS); /* folded before the other is found to be impossible */
	fill(huge, 4 * MIB, 71);
	map(PAGE_BYTES, PROT_NONE, ANONYMOUS);
	sealed_area = map(MIB, RW, ANONYMOUS);
	fill(sealed_area, MIB, 70);
	if (syscall(462 /* mseal, kernel 6.10 */, sealed_area, MIB, 0)) {
		dprintf(1, "skipped: no mseal\n");
		_exit(77);
	}
	serve(0, verify_sealed);
}

static void no_descriptors(void)
{
	huge = map(4 * MIB, RW, ANONYMOUS);
	fill(huge, 4 * MIB, 71);
	sealed_area = map(MIB, RW, ANONYMOUS);
	fill(sealed_area, MIB, 70);
	while (dup(0) >= 0) {}
	serve(0, verify_sealed);
}

BEHAVIOURS({"heap", heap}, {"sparse_mappings", sparse_mappings}, {"huge_pages", huge_pages}, {"program_break", program_break},
	   {"protections", protections}, {"reservation", reservation}, {"guards", guards}, {"advised", advised},
	   {"locked", locked}, {"grows_down", grows_down}, {"deep_stack", deep_stack}, {"shared", shared},
	   {"file_views", file_views}, {"beyond_the_end", beyond_the_end}, {"copy_on_write", copy_on_write}, {"churn", churn},
	   {"many_areas", many_areas}, {"discarded", discarded}, {"sealed", sealed}, {"no_descriptors", no_descriptors})
