/* An emulated cuda-checkpoint: its command line (driver 570 and later), on the emulated driver. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int cuInit(unsigned);
int cuCheckpointProcessGetState(int, int *);
int cuCheckpointProcessGetRestoreThreadId(int, int *);
int cuCheckpointProcessLock(int, const void *);
int cuCheckpointProcessCheckpoint(int, const void *);
int cuCheckpointProcessRestore(int, const void *);
int cuCheckpointProcessUnlock(int, const void *);

static const char *states[] = {"running", "locked", "checkpointed", "failed"};

int main(int argc, char **argv)
{
	const char *action = 0;
	int pid = 0, get_state = 0, get_tid = 0, r = 0, answer = 0;
	unsigned lock_args[16] = {0};
	for (int i = 1; i < argc; i++) {
		if (!strcmp(argv[i], "--help") || !strcmp(argv[i], "-h")) {
			puts("Emulated cuda-checkpoint.\n--get-state\n--action\n--get-restore-tid");
			return 0;
		}
		if (!strcmp(argv[i], "--get-state")) get_state = 1;
		else if (!strcmp(argv[i], "--get-restore-tid")) get_tid = 1;
		else if (!strcmp(argv[i], "--action") && i + 1 < argc) action = argv[++i];
		else if (!strcmp(argv[i], "--pid") && i + 1 < argc) pid = atoi(argv[++i]);
		else if (!strcmp(argv[i], "--timeout") && i + 1 < argc) lock_args[0] = (unsigned)atoi(argv[++i]);
		else { fprintf(stderr, "unknown option %s\n", argv[i]); return 1; }
	}
	setenv("EMULATED_AGENT", "1", 1);
	if (!(r = cuInit(0))) {
		if (get_state && !(r = cuCheckpointProcessGetState(pid, &answer))) puts(states[answer]);
		if (get_tid && !(r = cuCheckpointProcessGetRestoreThreadId(pid, &answer))) printf("%d\n", answer);
		if (action && !strcmp(action, "lock")) r = cuCheckpointProcessLock(pid, lock_args);
		if (action && !strcmp(action, "checkpoint")) r = cuCheckpointProcessCheckpoint(pid, 0);
		if (action && !strcmp(action, "restore")) r = cuCheckpointProcessRestore(pid, 0);
		if (action && !strcmp(action, "unlock")) r = cuCheckpointProcessUnlock(pid, 0);
	}
	if (r) fprintf(stderr, "Could not %s on process ID %d: \"error %d\"\n", action ? action : "look", pid, r);
	return r ? 1 : 0;
}
