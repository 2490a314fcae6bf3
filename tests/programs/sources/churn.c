/* A small HTTP server whose threads ask their allocator for zeroed memory, over and over, and look whether it is zero.
 *
 * usage: churn PORT MIB
 *
 * GET /check?N: N rounds in each of three threads; {"wrong": W, "held": MIB}, where W counts blocks that were not zero or had
 * changed. The MIB blocks of 1 MiB that are held all the time are looked at, too.
 * Compiled with RAW it also gives memory back past the C library.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { THREADS = 3, SLOTS = 200, MIB = 1 << 20, RAW_BYTES = 4 << 20 };
static int rounds, n_held;
static unsigned char **held;
static long wrong;

static void report(int is_wrong) { if (is_wrong) __sync_fetch_and_add(&wrong, 1); }

static int all(const unsigned char *p, size_t bytes, unsigned char value)
{
	return p[0] == value && !memcmp(p, p + 1, bytes - 1);
}

static uint32_t rnd(uint32_t *state, uint32_t below)
{
	*state = *state * 1664525U + 1013904223U;
	return (*state >> 8) % below;
}

static void *churn(void *seed)
{
	static __thread struct { unsigned char *at; size_t bytes; } slots[SLOTS];
	uint32_t state = (uint32_t)(uintptr_t)seed;
	for (int round = 0; round < rounds; round++) {
		for (int i = 0; i < SLOTS; i++) {
			if (slots[i].at) continue;
			slots[i].bytes = 1024 + rnd(&state, rnd(&state, 4) ? 60000 : 400000);
			slots[i].at = calloc(1, slots[i].bytes);
			report(!all(slots[i].at, slots[i].bytes, 0));
			memset(slots[i].at, 0xC0 | i % 16, slots[i].bytes);
		}
		for (int i = 0; i < SLOTS; i++) {
			if (round + 1 < rounds && rnd(&state, 2)) continue;
			report(!all(slots[i].at, slots[i].bytes, 0xC0 | i % 16));
			free(slots[i].at);
			slots[i].at = 0;
		}
	}
	return 0;
}

#ifdef RAW
static unsigned char *given_back;

static void give_back(void)
{
	long result;
	if (!given_back) {
		given_back = mmap(0, RAW_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		memset(given_back, 0x77, RAW_BYTES);
	}
	report(!all(given_back, RAW_BYTES, 0x77));
	__asm__ volatile("movl $28, %%eax\n\tsyscall" : "=a"(result) : "D"(given_back), "S"((long)RAW_BYTES), "d"((long)MADV_DONTNEED)
			 : "rcx", "r11", "memory");
	report(result != 0 || !all(given_back, RAW_BYTES, 0));
	memset(given_back, 0x77, RAW_BYTES);
}
#else
static void give_back(void) { }
#endif

static void check(void)
{
	pthread_t threads[THREADS];
	for (long i = 0; i < THREADS; i++) pthread_create(&threads[i], 0, churn, (void *)(i + rounds + 1));
	for (int i = 0; i < THREADS; i++) pthread_join(threads[i], 0);
	for (int i = 0; i < n_held; i++) report(!all(held[i], MIB, (unsigned char)(i + 1)));
	give_back();
}

int main(int argc, char **argv)
{
	int one = 1, listener = socket(AF_INET, SOCK_STREAM, 0);
	struct sockaddr_in a = {.sin_family = AF_INET, .sin_port = htons((uint16_t)atoi(argv[1])), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
	n_held = atoi(argv[2]);
	held = malloc(sizeof *held * (size_t)(n_held + 1));
	for (int i = 0; i < n_held; i++) memset(held[i] = malloc(MIB), i + 1, MIB);
	rounds = 3;
	check(); /* the allocator has its arenas before the snapshot */
	setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
	if (bind(listener, (struct sockaddr *)&a, sizeof a) || listen(listener, 64)) { perror("listen"); return 1; }
	for (;;) {
		char request[4096], body[128], answer[512];
		int s = accept(listener, 0, 0);
		if (s < 0) continue;
		ssize_t n = read(s, request, sizeof request - 1);
		request[n > 0 ? n : 0] = 0;
		char *question = strstr(request, "?rounds=");
		rounds = question ? atoi(question + 8) : 0;
		if (question) check();
		int length = snprintf(body, sizeof body, "{\"wrong\": %ld, \"held\": %d}", wrong, n_held);
		n = snprintf(answer, sizeof answer, "HTTP/1.0 200 OK\r\nContent-Length: %d\r\n\r\n%s", length, body);
		if (write(s, answer, (size_t)n) != n) perror("write");
		close(s);
	}
}
