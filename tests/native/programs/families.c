/* Processes that share memory since they were forked, and differ in some pages. */
#include "check.h"

enum { PAGES = 8192, HUGE_PAGES = 512, CHILDREN = 3, NEVER = 0, ZEROS = 1, FIRST_SEED = 2 };

static char *memory, *constant; /* constant: no longer writable */
static uint32_t *seeds, seed_count; /* what each page holds, in this very process */
static uint64_t me = 1;
static struct { int to, from; } children[CHILDREN];
static int n_children;

static void write_page(size_t i)
{
	seeds[i] = FIRST_SEED + seed_count++;
	fill(memory + i * PAGE_BYTES, PAGE_BYTES, me << 32 | seeds[i]);
}

static void write_zeros(size_t i)
{
	seeds[i] = ZEROS;
	memset(memory + i * PAGE_BYTES, 0, PAGE_BYTES);
}

/* Whose words they are follows from who was alive when the page was written: kept beside the seed. */
static uint64_t *writers;

static void write_mine(size_t i) { writers[i] = me; write_page(i); }

static void write_some(size_t from, size_t to, size_t step) { for (size_t i = from; i < to; i += step) write_mine(i); }

static int is_right(size_t i)
{
	const char *at = memory + i * PAGE_BYTES;
	return seeds[i] < FIRST_SEED ? is_zero(at, PAGE_BYTES) : is_filled(at, PAGE_BYTES, writers[i] << 32 | seeds[i]);
}

static void verify_family(void)
{
	char b = 'v';
	for (size_t i = 0; i < PAGES; i++) EXPECT(is_right(i));
	EXPECT(is_filled(constant, MIB - PAGE_BYTES, 5) && is_filled(constant + MIB - PAGE_BYTES, PAGE_BYTES, me));
	EXPECT(fault_of(constant, 1) == SIGSEGV);
	for (int i = 0; i < n_children; i++)
		EXPECT(write(children[i].to, &b, 1) == 1 && read(children[i].from, &b, 1) == 1);
	/* Nobody else may see these. */
	for (size_t i = me; i < PAGES; i += 997) write_mine(i);
	write_zeros(me * 31);
}

static void live(int from, int to)
{
	char b;
	while (read(from, &b, 1) == 1) {
		verify_family();
		EXPECT(write(to, &b, 1) == 1);
	}
	_exit(0);
}

static void make_constant(void)
{
	EXPECT(!mprotect(constant, MIB, RW));
	fill(constant + MIB - PAGE_BYTES, PAGE_BYTES, me);
	EXPECT(!mprotect(constant, MIB, PROT_READ));
}

static void bear(uint64_t id, int grandchildren)
{
	int down[2], up[2];
	char b = 0;
	EXPECT(!pipe(down) && !pipe(up));
	if (fork()) {
		close(down[0]);
		close(up[1]);
		children[n_children].to = down[1];
		children[n_children++].from = up[0];
		EXPECT(read(up[0], &b, 1) == 1);
		return;
	}
	close(down[1]);
	close(up[0]);
	for (int i = 0; i < n_children; i++) { close(children[i].to); close(children[i].from); }
	n_children = 0;
	me = id;
	EXPECT(!mprotect(memory, PAGES * PAGE_BYTES, RW));
	write_some(id, 8 * HUGE_PAGES, 61);                   /* a few everywhere */
	write_some(8 * HUGE_PAGES, 10 * HUGE_PAGES, 1);       /* all of it */
	write_some(12 * HUGE_PAGES, 13 * HUGE_PAGES, 1);      /* what nobody had */
	if (id == 3) write_some(13 * HUGE_PAGES + 7, 14 * HUGE_PAGES, 50); /* a bit of it */
	for (size_t i = id; i < HUGE_PAGES; i += 37) write_zeros(i);
	make_constant();
	for (int i = 0; i < grandchildren; i++) bear(id * 8 + (uint64_t)i, 0);
	EXPECT(write(up[1], &b, 1) == 1);
	live(down[0], up[1]);
}

static void found(void)
{
	memory = map(PAGES * PAGE_BYTES, RW, ANONYMOUS);
	seeds = map(PAGES * sizeof *seeds, RW, ANONYMOUS);
	writers = map(PAGES * sizeof *writers, RW, ANONYMOUS);
	constant = map(MIB, RW, ANONYMOUS);
	fill(constant, MIB, 5);
	write_some(0, 10 * HUGE_PAGES, 1);
	write_some(14 * HUGE_PAGES, PAGES, 1);
}

static void preforked(void)
{
	found();
	for (uint64_t i = 0; i < CHILDREN; i++) bear(2 + i, i == 0);
	write_some(3, 8 * HUGE_PAGES, 101);
	write_some(10 * HUGE_PAGES, 12 * HUGE_PAGES, 1); /* the children have zeros there */
	make_constant();
	serve(0, verify_family);
}

/* Areas that no longer have the same bounds: split, cut, joined, elsewhere. */
static void grown_apart(void)
{
	found();
	bear(2, 0);
	EXPECT(!mprotect(memory + 3 * MIB, MIB, PROT_READ));
	EXPECT(!mprotect(memory + 3 * MIB, MIB, RW));
	EXPECT(!mprotect(memory + 5 * MIB, 8 * MIB, PROT_READ));
	char *gap = map(MIB, PROT_NONE, ANONYMOUS);
	EXPECT(mremap(constant, MIB, MIB, MREMAP_MAYMOVE | MREMAP_FIXED, gap) == gap);
	constant = gap;
	make_constant();
	bear(3, 0);
	EXPECT(!mprotect(memory + 5 * MIB, 8 * MIB, RW));
	serve(0, verify_family);
}

BEHAVIOURS({"preforked", preforked}, {"grown_apart", grown_apart})
