/* An emulated NVML: as much of it as tells which devices there are, how much memory is free and who uses it. Not a GPU's. */
#include "emulated.h"

enum { SUCCESS = 0, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, INSUFFICIENT_SIZE = 7, DRIVER_NOT_LOADED = 9 };

struct memory { unsigned long long total, free, used; };
struct process { unsigned pid; unsigned long long bytes; unsigned gpu_instance, compute_instance; };

static struct machine machine;

int nvmlInitWithFlags(unsigned flags) { (void)flags; return read_machine(&machine) ? DRIVER_NOT_LOADED : SUCCESS; }
int nvmlShutdown(void) { return SUCCESS; }
const char *nvmlErrorString(int error) { return error ? "error of the emulated NVML" : "Success"; }
int nvmlSystemGetDriverVersion(char *text, unsigned n) { snprintf(text, n, "%s", machine.driver); return SUCCESS; }
int nvmlDeviceGetCount_v2(unsigned *n) { *n = (unsigned)machine.n_gpus; return SUCCESS; }

int nvmlDeviceGetHandleByIndex_v2(unsigned i, struct gpu **device)
{
	if (i >= (unsigned)machine.n_gpus) return INVALID_ARGUMENT;
	*device = &machine.gpus[i];
	return SUCCESS;
}

int nvmlDeviceGetUUID(struct gpu *g, char *text, unsigned n) { snprintf(text, n, "%s", g->uuid); return SUCCESS; }

int nvmlDeviceGetName(struct gpu *g, char *text, unsigned n)
{
	(void)g;
	snprintf(text, n, "Emulated device (not a GPU)");
	return SUCCESS;
}

int nvmlDeviceGetCudaComputeCapability(struct gpu *g, int *major, int *minor)
{
	*major = g->major;
	*minor = g->minor;
	return SUCCESS;
}

int nvmlDeviceGetMigMode(struct gpu *g, unsigned *now, unsigned *pending)
{
	(void)g, (void)now, (void)pending;
	return NOT_SUPPORTED;
}

int nvmlDeviceGetMemoryInfo(struct gpu *g, struct memory *m)
{
	unsigned long long used = used_bytes(g, 0, 0, 0);
	*m = (struct memory){g->bytes, g->bytes > used ? g->bytes - used : 0, used};
	return SUCCESS;
}

struct listing { struct process *found; unsigned room, n; };

static void note(void *with, pid_t pid, unsigned long long bytes)
{
	struct listing *l = with;
	if (l->found && l->n < l->room) l->found[l->n] = (struct process){(unsigned)pid, bytes, ~0U, ~0U};
	l->n++;
}

int nvmlDeviceGetComputeRunningProcesses_v3(struct gpu *g, unsigned *n, struct process *found)
{
	struct listing l = {found, *n, 0};
	used_bytes(g, 0, note, &l);
	int room = found && l.n <= *n;
	*n = l.n;
	return room || !l.n ? SUCCESS : INSUFFICIENT_SIZE;
}
