/* Threads at work: none loses a write, a register or a wake-up, however often they are stopped. */
#include "check.h"
#include <linux/futex.h>
#include <sys/rseq.h>

static pthread_t new_thread(void *(*body)(void *), void *argument, size_t stack_bytes)
{
	pthread_t t;
	pthread_attr_t attr;
	pthread_attr_init(&attr);
	if (stack_bytes) pthread_attr_setstacksize(&attr, stack_bytes);
	EXPECT(!pthread_create(&t, &attr, body, argument));
	pthread_attr_destroy(&attr);
	return t;
}

/* ---- hammering memory ------------------------------------------------------------------------------------------- */

enum { HAMMERS = 4, HAMMERED_PAGES = 300 };
static volatile uint64_t *hammered[HAMMERS];
static volatile uint64_t laps[HAMMERS], total;

static void *hammer(void *argument)
{
	long self = (long)argument;
	volatile uint64_t *mine = hammered[self];
	for (uint64_t lap = 1;; lap++) {
		for (int i = 0; i < HAMMERED_PAGES; i++) {
			volatile uint64_t *at = mine + i * 512 + i % 512;
			EXPECT(*at == lap - 1);
			*at = lap;
			__atomic_add_fetch(&total, 1, __ATOMIC_RELAXED);
		}
		__atomic_store_n(&laps[self], lap, __ATOMIC_RELEASE);
		if (lap % 16 == 0) usleep(200);
	}
	return 0;
}

static void verify_hammers(void)
{
	for (int i = 0; i < HAMMERS; i++)
		for (uint64_t before = laps[i]; laps[i] < before + 50;) pause_ms(1);
	uint64_t low = 0, high = 0;
	for (int i = 0; i < HAMMERS; i++) low += laps[i] * HAMMERED_PAGES;
	uint64_t now = __atomic_load_n(&total, __ATOMIC_ACQUIRE);
	for (int i = 0; i < HAMMERS; i++) high += (laps[i] + 1) * HAMMERED_PAGES;
	EXPECT(low <= now && now <= high);
}

static void hammers(void)
{
	for (long i = 0; i < HAMMERS; i++) {
		hammered[i] = map(HAMMERED_PAGES * PAGE_BYTES, RW, ANONYMOUS);
		new_thread(hammer, (void *)i, 0);
	}
	serve(0, verify_hammers);
}

/* ---- stacks, thread-local storage, condition variables -------------------------------------------------------------- */

enum { SLEEPERS = 24 };
static __thread uint64_t own[1024];
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t wake = PTHREAD_COND_INITIALIZER, woken = PTHREAD_COND_INITIALIZER;
static int turn, answers;

static void *sleeper(void *argument)
{
	long self = (long)argument;
	volatile uint64_t here[8192];
	for (int i = 0; i < 8192; i++) here[i] = word((uint64_t)self, (uint64_t)i);
	fill(own, sizeof own, (uint64_t)self + 100);
	pthread_mutex_lock(&lock);
	for (int seen = 0;;) {
		while (turn == seen) pthread_cond_wait(&wake, &lock);
		seen = turn;
		for (int i = 0; i < 8192; i++) EXPECT(here[i] == word((uint64_t)self, (uint64_t)i));
		EXPECT(is_filled(own, sizeof own, (uint64_t)self + 100));
		answers++;
		pthread_cond_signal(&woken);
	}
	return 0;
}

static void verify_sleepers(void)
{
	pthread_mutex_lock(&lock);
	answers = 0;
	turn++;
	pthread_cond_broadcast(&wake);
	while (answers < SLEEPERS) pthread_cond_wait(&woken, &lock);
	pthread_mutex_unlock(&lock);
}

static void stacks(void)
{
	for (long i = 0; i < SLEEPERS; i++) new_thread(sleeper, (void *)i, 256 << 10);
	serve(0, verify_sleepers);
}

/* ---- a first thread that has ended -------------------------------------------------------------------------------------- */

static void *survivor(void *argument)
{
	(void)argument;
	pause_ms(20);
	serve(0, verify_hammers);
	return 0;
}

static void dead_leader(void)
{
	for (long i = 0; i < HAMMERS; i++) {
		hammered[i] = map(HAMMERED_PAGES * PAGE_BYTES, RW, ANONYMOUS);
		new_thread(hammer, (void *)i, 0);
	}
	new_thread(survivor, 0, 0);
	syscall(SYS_exit, 0);
}

/* ---- threads that are born and end all the time ----------------------------------------------------------------------------- */

static volatile uint64_t born;

static void *short_life(void *argument)
{
	volatile uint64_t here[512];
	for (int i = 0; i < 512; i++) here[i] = word((uint64_t)argument, (uint64_t)i);
	sched_yield();
	for (int i = 0; i < 512; i++) EXPECT(here[i] == word((uint64_t)argument, (uint64_t)i));
	return argument;
}

static void *midwife(void *argument)
{
	for (uint64_t i = (uint64_t)argument; ; i++) {
		pthread_t children[4];
		for (uint64_t k = 0; k < 4; k++) children[k] = new_thread(short_life, (void *)(i + k), 0);
		for (uint64_t k = 0; k < 4; k++) {
			void *result;
			EXPECT(!pthread_join(children[k], &result) && (uint64_t)result == i + k);
		}
		__atomic_add_fetch(&born, 4, __ATOMIC_RELAXED);
		if (i % 8 == 0) usleep(500);
	}
	return 0;
}

static void verify_births(void)
{
	for (uint64_t before = born; born < before + 200;) pause_ms(1);
}

static void births(void)
{
	for (uint64_t i = 0; i < 3; i++) new_thread(midwife, (void *)(i << 32), 0);
	serve(0, verify_births);
}

/* ---- futex ping-pong, with and without time-outs ------------------------------------------------------------------------------ */

static int ball;
static volatile uint64_t strokes;

static void *player(void *argument)
{
	int self = (int)(long)argument;
	struct timespec patience = {30, 0};
	for (;;) {
		int now;
		while ((now = __atomic_load_n(&ball, __ATOMIC_ACQUIRE)) % 2 != self) {
			long r = syscall(SYS_futex, &ball, FUTEX_WAIT_PRIVATE, now, self ? &patience : 0, 0, 0);
			EXPECT(r == 0 || errno == EAGAIN);
		}
		strokes++;
		__atomic_store_n(&ball, now + 1, __ATOMIC_RELEASE);
		syscall(SYS_futex, &ball, FUTEX_WAKE_PRIVATE, 1, 0, 0, 0);
		if (now % 64 == 0) usleep(300);
	}
	return 0;
}

static void verify_futex(void)
{
	for (uint64_t before = strokes; strokes < before + 500;) pause_ms(1);
}

static void futexes(void)
{
	new_thread(player, (void *)0L, 0);
	new_thread(player, (void *)1L, 0);
	serve(0, verify_futex);
}

/* ---- vector and floating point registers, which no other instruction touches for a long time -------------------------------------- */

static volatile uint64_t spins[3];

static void spin(long self)
{
	uint64_t in[8], out[8], general[5] = {(uint64_t)self + 1, 2, 3, 4, 5};
	long double real = 1.0L / (long double)(self + 3), seen = 0;
	fill(in, sizeof in, (uint64_t)self + 7);
	__asm__ volatile("movdqu (%[in]), %%xmm5\n movdqu 16(%[in]), %%xmm11\n movdqu 32(%[in]), %%xmm15\n"
			 "fldt (%[real])\n"
			 "mov (%[general]), %%r8\n mov 8(%[general]), %%r12\n mov 16(%[general]), %%rbx\n std\n"
			 "mov $40000, %%ecx\n"
			 "1: dec %%ecx\n jnz 1b\n"
			 "cld\n add %%r8, 24(%[general])\n add %%r12, 32(%[general])\n add %%rbx, 32(%[general])\n"
			 "fstpt (%[seen])\n"
			 "movdqu %%xmm5, (%[out])\n movdqu %%xmm11, 16(%[out])\n movdqu %%xmm15, 32(%[out])\n"
			 :: [in] "D"(in), [out] "S"(out), [real] "d"(&real), [seen] "a"(&seen), [general] "r"(general)
			 : "rcx", "r8", "r12", "rbx", "xmm5", "xmm11", "xmm15", "memory", "cc");
	EXPECT(!memcmp(in, out, 48) && real == seen);
	EXPECT(general[3] == (uint64_t)self + 5 && general[4] == 10);
	spins[self]++;
}

static void *spinner(void *argument)
{
	for (;;) spin((long)argument);
	return 0;
}

static void verify_registers(void)
{
	for (int i = 0; i < 2; i++)
		for (uint64_t before = spins[i]; spins[i] < before + 100;) pause_ms(1);
}

static void registers(void)
{
	new_thread(spinner, (void *)0L, 0);
	new_thread(spinner, (void *)1L, 0);
	serve(0, verify_registers);
}

static void spin_myself(void) { spin(2); }

static void verify_my_spins(void) { EXPECT(spins[2] > 0); }

static void registers_of_the_first(void) { serve(spin_myself, verify_my_spins); }

/* ---- restartable sequences: a counter for each processor, no atomic instruction (rseq(2)) -------------------------------------------- */

struct counter { uint64_t value, pad[7]; };
static struct counter counters[4096];
static volatile uint64_t increments[3];

static struct rseq *rseq_area(void) { return (struct rseq *)((char *)__builtin_thread_pointer() + __rseq_offset); }

/* One increment of this processor's counter; 0 if it was interrupted. The abort address is preceded by RSEQ_SIG. */
static int try_increment(struct rseq *rs)
{
	uint32_t cpu = *(volatile uint32_t *)&rs->cpu_id_start;
	int done = 0;
	__asm__ goto volatile(
		".pushsection __rseq_cs, \"aw\"\n .balign 32\n"
		"3: .long 0, 0\n .quad 1f, 2f-1f, 4f\n .popsection\n"
		"lea 3b(%%rip), %%rax\n mov %%rax, 8(%[rs])\n"
		"1: cmp %[cpu], 4(%[rs])\n jnz 4f\n"
		"mov (%[counter]), %%rax\n"
		"mov $200, %%ecx\n 5: dec %%ecx\n jnz 5b\n" /* a long sequence, so that it is hit */
		"inc %%rax\n mov %%rax, (%[counter])\n"
		"2: jmp 6f\n"
		".byte 0x0f, 0xb9, 0x3d\n .long 0x53053053\n"
		"4: jmp %l[aborted]\n"
		"6:\n"
		:: [rs] "r"(rs), [cpu] "r"(cpu), [counter] "r"(&counters[cpu].value)
		: "rax", "rcx", "memory", "cc" : aborted);
	done = 1;
aborted:
	return done;
}

static void increment_often(long self)
{
	for (int i = 0; i < 1000; i++)
		if (try_increment(rseq_area())) increments[self]++;
}


static volatile int quiet;
static pthread_rwlock_t gate = PTHREAD_RWLOCK_INITIALIZER;

static void *gated_incrementer(void *argument)
{
	for (;;) {
		pthread_rwlock_rdlock(&gate);
		increment_often((long)argument);
		pthread_rwlock_unlock(&gate);
		while (quiet) usleep(100);
	}
	return 0;
}

static void increment_myself(void) { increment_often(0); }

static void verify_sequences(void)
{
	uint64_t sum = 0, wanted = 0;
	for (uint64_t before = increments[1]; increments[1] < before + 1000;) pause_ms(1);
	quiet = 1;
	pthread_rwlock_wrlock(&gate);
	for (int i = 0; i < 4096; i++) sum += counters[i].value;
	for (int i = 0; i < 3; i++) wanted += increments[i];
	pthread_rwlock_unlock(&gate);
	quiet = 0;
	EXPECT(sum == wanted);
}

static void restartable_sequences(void)
{
	if (!__rseq_size) { dprintf(1, "skipped: no rseq\n"); _exit(77); }
	new_thread(gated_incrementer, (void *)1L, 0);
	new_thread(gated_incrementer, (void *)2L, 0);
	serve(increment_myself, verify_sequences);
}

BEHAVIOURS({"hammers", hammers}, {"stacks", stacks}, {"dead_leader", dead_leader}, {"births", births}, {"futexes", futexes},
	   {"registers", registers}, {"registers_of_the_first", registers_of_the_first},
	   {"restartable_sequences", restartable_sequences})
