/* Renewal: what must not be the same in two replicas. Whoever of a restored tree has left a file named like its pid in a folder gets
 * SIGURG, and says in a fifo there, "PID [WHAT IT COULD NOT]", that it has renewed itself. */
#ifndef HOTSTART_RENEWAL_H
#define HOTSTART_RENEWAL_H

#include <dirent.h>
#include <fcntl.h>
#include <limits.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

static double monotonic(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

enum { PATIENCE_MS = 50, AGAIN_US = 500, LATER_MS = 10 };

struct renewal { pid_t *pids; size_t count; char *unrenewed; size_t unrenewed_bytes; };

static size_t read_text(const char *path, char *text, size_t size)
{
	int f = open(path, O_RDONLY | O_CLOEXEC);
	ssize_t n = f < 0 ? 0 : read(f, text, size - 1);
	if (f >= 0) close(f);
	text[n < 0 ? 0 : n] = 0;
	return n < 0 ? 0 : (size_t)n;
}

static int catches_urgent(pid_t pid) /* who does not has ended, or become another program: the signal would be ignored */
{
	char path[32], text[4096];
	snprintf(path, sizeof path, "/proc/%d/status", pid);
	read_text(path, text, sizeof text);
	char *caught = strstr(text, "SigCgt:\t");
	return caught && strtoull(caught + 8, 0, 16) >> (SIGURG - 1) & 1;
}

static int sleeps(pid_t pid, pid_t thread) /* it waits, and not for a disk */
{
	char path[64], text[512];
	snprintf(path, sizeof path, "/proc/%d/task/%d/stat", pid, thread);
	read_text(path, text, sizeof text);
	char *after_name = strrchr(text, ')');
	return !after_name || !strchr("RD", after_name[2]);
}

static int all_sleep(pid_t pid) /* nobody is about to let its first thread run Python */
{
	char path[32];
	int asleep = 1;
	snprintf(path, sizeof path, "/proc/%d/task", pid);
	DIR *threads = opendir(path);
	for (struct dirent *e; threads && asleep && (e = readdir(threads));)
		asleep = e->d_name[0] == '.' || sleeps(pid, (pid_t)atoi(e->d_name));
	if (threads) closedir(threads);
	return asleep;
}

static void tell_unrenewed(struct renewal *r, pid_t pid, const char *what)
{
	size_t n = strlen(r->unrenewed);
	snprintf(r->unrenewed + n, r->unrenewed_bytes - n, *what ? "%s%d:%s" : "%s%d", n ? " " : "", pid, what);
}

static void take_answer(struct renewal *r, char *line)
{
	char *what;
	pid_t pid = (pid_t)strtol(line, &what, 10);
	for (size_t i = 0; i < r->count; i++) {
		if (r->pids[i] != pid) continue;
		r->pids[i] = r->pids[--r->count];
		if (*what == ' ') tell_unrenewed(r, pid, what + 1);
		return;
	}
}

static void wait_for_answers(struct renewal *r, int answers, double began, int most_ms)
{
	char text[4096];
	size_t filled = 0;
	struct pollfd p = {.fd = answers, .events = POLLIN};
	while (r->count) {
		int passed_ms = (int)((monotonic() - began) * 1000), patient = passed_ms < PATIENCE_MS;
		struct timespec pause = {.tv_nsec = patient ? AGAIN_US * 1000 : LATER_MS * 1000000};
		if (ppoll(&p, 1, &pause, 0) == 0) {
			for (size_t i = 0; i < r->count; i++) {
				/* The signal may have come before the restored thread took up its call again: then nothing has ended that. */
				if (sleeps(r->pids[i], r->pids[i])) kill(r->pids[i], SIGURG);
				if (!patient) patient = passed_ms < most_ms && !all_sleep(r->pids[i]);
			}
			if (!patient) break;
			continue;
		}
		ssize_t n = read(answers, text + filled, sizeof text - filled);
		if (n <= 0) continue;
		filled += (size_t)n;
		char *line = text;
		for (char *end; (end = memchr(line, '\n', filled - (size_t)(line - text))); line = end + 1) {
			*end = 0;
			take_answer(r, line);
		}
		filled -= (size_t)(line - text);
		memmove(text, line, filled);
		if (filled == sizeof text) filled = 0; /* none of ours is that long */
	}
}

/* Nobody who cannot answer holds a replica up for long. Who did not is told in unrenewed. */
static void renew(const char *renewal, int most_ms, char *unrenewed, size_t unrenewed_bytes)
{
	double began = monotonic();
	struct renewal r = {.unrenewed = unrenewed, .unrenewed_bytes = unrenewed_bytes};
	char path[PATH_MAX];
	*unrenewed = 0;
	DIR *folder = opendir(renewal); /* not there in snapshots of older versions */
	if (folder) {
		snprintf(path, sizeof path, "%s/.answers", renewal);
		int answers = mkfifo(path, 0666) ? -1 : open(path, O_RDWR | O_NONBLOCK | O_CLOEXEC);
		chmod(path, 0666);
		for (struct dirent *e; answers >= 0 && (e = readdir(folder));) {
			pid_t pid = (pid_t)atoi(e->d_name);
			if (pid <= 1 || !catches_urgent(pid)) continue;
			pid_t *more = realloc(r.pids, (r.count + 1) * sizeof *more);
			if (!more) break;
			r.pids = more;
			if (!kill(pid, SIGURG)) r.pids[r.count++] = pid;
		}
		closedir(folder);
		if (answers >= 0) {
			wait_for_answers(&r, answers, began, most_ms);
			close(answers);
		}
		unlink(path);
		for (size_t i = 0; i < r.count; i++) tell_unrenewed(&r, r.pids[i], "");
		free(r.pids);
	}
}
#endif
