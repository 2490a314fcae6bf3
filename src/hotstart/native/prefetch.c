/* hotstart-prefetch: brings spans of files into the page cache, in order, several at a time.
 *
 * usage: hotstart-prefetch [-w] THREADS < ORDERS
 *
 *   file PATH          the spans that follow are of this file
 *   span OFFSET LENGTH bytes; spans are begun in the order in which they stand
 *   idle               what follows is not needed soon: processor and disk go to others first
 *
 * A program of its own: it goes on when the command that started it has ended, and Python holds its interpreter lock in
 * madvise(2). Memory files are mapped, advised MADV_HUGEPAGE and populated: of several ways tried on ext4 (Linux 6.18) that is
 * the one that fills the page cache with folios of 2 MiB, which replicas then map by one page table entry each. Spans of less
 * than half of that are read by themselves.
 *
 * It detaches itself at once. With -w it does not, and says how much it read before `idle`, in which time: "BYTES SECONDS".
 * Advice only: a file that is gone or shorter is passed over.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum { PIECE = 2 << 20, MOST_THREADS = 16, IOPRIO_WHO_PROCESS = 1, IOPRIO_IDLE = 3 << 13 };

struct file { char *start; uint64_t size; int fd; };
struct span { struct file *file; uint64_t offset, length; bool idle; };

static struct span *spans;
static size_t n_spans, room;
static size_t next_span;      /* the one that is being handed out, and how much of it has been */
static uint64_t handed;
static size_t being_read;     /* pieces that are needed and under way */
static uint64_t read_bytes;
static double began, ended;   /* of what is needed */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static double monotonic(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

static struct file *open_file(const char *path)
{
	struct file *f = calloc(1, sizeof *f);
	struct stat st;
	if (!f) exit(1);
	f->fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOATIME);
	if (f->fd < 0) f->fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
	if (f->fd < 0 || fstat(f->fd, &st) || !S_ISREG(st.st_mode) || !st.st_size) return f;
	/* Congruent to the file modulo 2 MiB, else there are no huge folios. */
	char *room_for = mmap(0, (size_t)st.st_size + PIECE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (room_for == MAP_FAILED) return f;
	char *aligned = (char *)(((uintptr_t)room_for + PIECE - 1) & -(uintptr_t)PIECE);
	if (mmap(aligned, (size_t)st.st_size, PROT_READ, MAP_SHARED | MAP_FIXED, f->fd, 0) == MAP_FAILED) return f;
	madvise(aligned, (size_t)st.st_size, MADV_HUGEPAGE);
	f->start = aligned;
	f->size = (uint64_t)st.st_size;
	return f;
}

static void add(struct file *file, uint64_t offset, uint64_t length, bool idle)
{
	if (!file || !file->start || offset >= file->size || !length) return;
	if (length > file->size - offset) length = file->size - offset;
	if (n_spans == room) {
		room = room ? 2 * room : 256;
		spans = realloc(spans, room * sizeof *spans);
		if (!spans) exit(1);
	}
	spans[n_spans++] = (struct span){file, offset, length, idle};
}

static void read_orders(void)
{
	char line[4200];
	struct file *file = 0;
	bool idle = false;
	while (fgets(line, sizeof line, stdin)) {
		unsigned long long offset, length;
		line[strcspn(line, "\n")] = 0;
		if (!strncmp(line, "file ", 5)) file = open_file(line + 5);
		else if (sscanf(line, "span %llu %llu", &offset, &length) == 2) add(file, offset, length, idle);
		else if (!strcmp(line, "idle")) idle = true;
	}
}

static void become_idle(void)
{
	struct sched_param none = {0};
	sched_setscheduler(0, SCHED_IDLE, &none);
	syscall(SYS_ioprio_set, IOPRIO_WHO_PROCESS, 0, IOPRIO_IDLE);
}

/* The next piece, up to the next border of 2 MiB in its file. */
static bool take(struct span *piece)
{
	bool found = false;
	pthread_mutex_lock(&lock);
	if (next_span < n_spans) {
		struct span *s = &spans[next_span];
		uint64_t at = s->offset + handed, left = s->length - handed, to_border = PIECE - at % PIECE;
		*piece = (struct span){s->file, at, left < to_border ? left : to_border, s->idle};
		handed += piece->length;
		if (handed == s->length) { next_span++; handed = 0; }
		being_read += !piece->idle;
		found = true;
	}
	pthread_mutex_unlock(&lock);
	return found;
}

static void done(const struct span *piece)
{
	pthread_mutex_lock(&lock);
	if (!piece->idle) {
		read_bytes += piece->length;
		if (!--being_read) ended = monotonic();
	}
	pthread_mutex_unlock(&lock);
}

static void *work(void *nothing)
{
	struct span piece;
	bool idle = false;
	(void)nothing;
	while (take(&piece)) {
		if (piece.idle && !idle) {
			become_idle();
			idle = true;
		}
		char *start = piece.file->start + piece.offset;
		uintptr_t page = (uintptr_t)start & 4095;
		if (piece.length < PIECE / 2) /* not worth a whole folio */
			posix_fadvise(piece.file->fd, (off_t)piece.offset, (off_t)piece.length, POSIX_FADV_WILLNEED);
		else
			madvise(start - page, piece.length + page, MADV_POPULATE_READ);
		done(&piece);
	}
	return 0;
}

int main(int argc, char **argv)
{
	pthread_t threads[MOST_THREADS];
	bool wait = argc > 1 && !strcmp(argv[1], "-w");
	int n = argc > 1 + wait ? atoi(argv[1 + wait]) : 1;
	if (!wait && fork()) return 0;
	if (!wait) setsid();
	if (n < 1) n = 1;
	if (n > MOST_THREADS) n = MOST_THREADS;
	began = ended = monotonic();
	read_orders();
	for (int i = 1; i < n; i++)
		if (pthread_create(&threads[i], 0, work, 0)) n = i;
	work(0);
	for (int i = 1; i < n; i++) pthread_join(threads[i], 0);
	if (wait) printf("%llu %.6f\n", (unsigned long long)read_bytes, ended - began);
	return 0;
}
