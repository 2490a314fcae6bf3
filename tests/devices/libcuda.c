/* An emulated CUDA driver: contexts, allocations, copies, one kernel and the checkpoint calls. It is not a GPU and computes nothing fast.
 *
 * What it is faithful to, as the driver API documents it: the states of a process and which call is legal in which; calls block
 * while a process is locked; device memory lives outside the process, goes into the process's own memory when it is checkpointed, and
 * out again when it is restored, at the same device addresses, perhaps on another device; while a process holds a device it
 * cannot be dumped by CRIU (the real driver: /dev/nvidia*; here: one end of a unix connection whose other end nobody dumps).
 *
 * How the checkpoint calls reach a process: its restore thread (named emulated-cuda) waits for a signal that carries a number N,
 * connects to $EMULATED_DEVICES/agents/N, does what it is told there, answers and hangs up.
 *
 * Faults: the file $EMULATED_DEVICES/faults/OPERATION (lock, checkpoint, restore, unlock) is used up by the next one:
 *     error CODE    the call fails with that CUresult and nothing has happened
 *     fail CODE     the call fails with it and the process is in the state FAILED, its device memory lost
 *     die           the process is killed in the middle
 *     agent         whoever made the call is killed in the middle
 *     wait MS       the operation takes so long
 * A name that ends in .PID is for the process with that pid inside only.
 */
#include "emulated.h"
#include <dlfcn.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <time.h>

enum { SUCCESS = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NOT_INITIALIZED = 3, DEVICE_UNAVAILABLE = 46, NO_DEVICE = 100,
	INVALID_DEVICE = 101, INVALID_CONTEXT = 201, ILLEGAL_STATE = 401, NOT_FOUND = 500, NOT_READY = 600, NOT_SUPPORTED = 801,
	UNKNOWN = 999 };
enum { RUNNING, LOCKED, CHECKPOINTED, FAILED };
enum { GET_STATE, LOCK, CHECKPOINT, RESTORE, UNLOCK };
enum { MOST_ALLOCATIONS = 4096, MOST_PAIRS = 16, SIGNAL = 62 };

typedef int CUresult;
typedef unsigned long long CUdeviceptr;
typedef struct { unsigned char bytes[16]; } CUuuid;
struct pair { CUuuid from, to; };
struct lock_args { unsigned timeout_ms, reserved0; uint64_t reserved1[7]; };
struct restore_args { struct pair *pairs; unsigned n_pairs; char reserved[52]; };
_Static_assert(sizeof(struct lock_args) == 64 && sizeof(struct restore_args) == 64, "as in cuda.h");

struct request { int operation; unsigned timeout_ms, n_pairs; struct pair pairs[MOST_PAIRS]; };
struct answer { int result, state, tid; };

static const char *operation_names[] = {"state", "lock", "checkpoint", "restore", "unlock"};

static struct allocation { CUdeviceptr address; size_t bytes; int gpu; char *saved; } allocations[MOST_ALLOCATIONS];
static struct device { struct gpu gpu; char folder[PATH_BYTES]; int alive, has_context; } devices[MOST_GPUS];
static int n_devices, initialised, state = RUNNING, driver = -1, current = -1;
static CUdeviceptr next_address = 0x7a0000000000;
static pthread_rwlock_t gate; /* calls hold it for reading, who locks the process for writing */
static pthread_mutex_t books = PTHREAD_MUTEX_INITIALIZER;

/* ---- devices -------------------------------------------------------------------------------------------------- */

static int connect_to(const char *path)
{
	struct sockaddr_un a = {.sun_family = AF_UNIX};
	int folder = open(devices_folder(), O_PATH | O_CLOEXEC), s = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	snprintf(a.sun_path, sizeof a.sun_path, "/proc/self/fd/%d/%s", folder, path);
	int failed = connect(s, (struct sockaddr *)&a, sizeof a);
	close(folder);
	if (!failed) return s;
	close(s);
	return -1;
}

static int lock_device(const struct device *d)
{
	char path[PATH_BYTES + 64];
	snprintf(path, sizeof path, "%s/gpus/%s/lock", devices_folder(), d->gpu.uuid);
	int f = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0666);
	if (f >= 0) flock(f, LOCK_EX);
	return f;
}

static CUresult acquire(struct device *d)
{
	char path[PATH_BYTES + 64];
	struct flock lock = {.l_type = F_WRLCK, .l_whence = SEEK_SET};
	int books_of_device = lock_device(d);
	if (books_of_device < 0) return DEVICE_UNAVAILABLE;
	snprintf(d->folder, sizeof d->folder, "%s/gpus/%s/ctx-XXXXXX", devices_folder(), d->gpu.uuid);
	if (!mkdtemp(d->folder)) { d->folder[0] = 0; close(books_of_device); return DEVICE_UNAVAILABLE; }
	snprintf(path, sizeof path, "%s/alive", d->folder);
	d->alive = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0666);
	fcntl(d->alive, F_SETLK, &lock);
	close(books_of_device);
	return SUCCESS;
}

static void release(struct device *d)
{
	if (!d->folder[0]) return;
	int books_of_device = lock_device(d);
	bytes_in(d->folder, 1);
	close(d->alive);
	if (books_of_device >= 0) close(books_of_device);
	d->folder[0] = 0;
}

static int memory_of(const struct allocation *a)
{
	char path[PATH_BYTES + 64];
	snprintf(path, sizeof path, "%s/%llx", devices[a->gpu].folder, a->address);
	return open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0666);
}

static CUresult reserve(const struct allocation *a)
{
	struct device *d = &devices[a->gpu];
	int books_of_device = lock_device(d);
	if (books_of_device < 0) return DEVICE_UNAVAILABLE;
	CUresult r = SUCCESS;
	if (used_bytes(&d->gpu, d->folder, 0, 0) + a->bytes > d->gpu.bytes) {
		r = OUT_OF_MEMORY;
	} else {
		int f = memory_of(a);
		if (f < 0 || ftruncate(f, (off_t)a->bytes)) r = DEVICE_UNAVAILABLE;
		if (f >= 0) close(f);
	}
	close(books_of_device);
	return r;
}

static CUresult transfer(const struct allocation *a, size_t offset, void *memory, size_t bytes, int out)
{
	int f = memory_of(a);
	if (f < 0) return DEVICE_UNAVAILABLE;
	ssize_t n = 1;
	for (size_t done = 0; done < bytes && n > 0; done += (size_t)n) {
		char *at = (char *)memory + done;
		n = out ? pwrite(f, at, bytes - done, (off_t)(offset + done)) : pread(f, at, bytes - done, (off_t)(offset + done));
	}
	close(f);
	return n > 0 || !bytes ? SUCCESS : DEVICE_UNAVAILABLE;
}

/* ---- checkpoint, inside the process --------------------------------------------------------------------------- */

static void uuid_bytes(const char *text, unsigned char *bytes)
{
	memset(bytes, 0, 16);
	int n = 0;
	for (const char *p = strchr(text, '-'); p && *p && n < 32; p++) {
		if (*p == '-') continue;
		int digit = *p <= '9' ? *p - '0' : (*p | 32) - 'a' + 10;
		bytes[n / 2] |= (unsigned char)(n % 2 ? digit : digit << 4);
		n++;
	}
}

static CUresult lock_process(unsigned timeout_ms)
{
	struct timespec until;
	if (state != RUNNING) return ILLEGAL_STATE;
	if (!timeout_ms) {
		pthread_rwlock_wrlock(&gate);
	} else {
		clock_gettime(CLOCK_REALTIME, &until);
		until.tv_sec += timeout_ms / 1000;
		until.tv_nsec += timeout_ms % 1000 * 1000000L;
		if (until.tv_nsec >= 1000000000) { until.tv_sec++; until.tv_nsec -= 1000000000; }
		if (pthread_rwlock_timedwrlock(&gate, &until)) return NOT_READY;
	}
	state = LOCKED;
	return SUCCESS;
}

static void let_devices_go(void)
{
	for (int i = 0; i < n_devices; i++) release(&devices[i]);
	if (driver >= 0) close(driver);
	driver = -1;
}

static CUresult checkpoint_process(void)
{
	if (state != LOCKED) return ILLEGAL_STATE;
	for (struct allocation *a = allocations; a < allocations + MOST_ALLOCATIONS; a++) {
		if (!a->bytes) continue;
		a->saved = mmap(0, a->bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		if (a->saved == MAP_FAILED || transfer(a, 0, a->saved, a->bytes, 0)) {
			state = FAILED;
			return a->saved == MAP_FAILED ? OUT_OF_MEMORY : DEVICE_UNAVAILABLE;
		}
	}
	let_devices_go();
	state = CHECKPOINTED;
	return SUCCESS;
}

static CUresult choose_device(struct device *d, const struct request *q, const struct machine *m)
{
	unsigned char ours[16], theirs[16], wanted[16];
	uuid_bytes(d->gpu.uuid, ours);
	memcpy(wanted, ours, 16);
	unsigned i = 0;
	while (i < q->n_pairs && memcmp(q->pairs[i].from.bytes, ours, 16)) i++;
	if (q->n_pairs && i == q->n_pairs) return INVALID_VALUE; /* "must contain every checkpointed GPU" */
	if (q->n_pairs) memcpy(wanted, q->pairs[i].to.bytes, 16);
	for (int g = 0; g < m->n_gpus; g++) {
		uuid_bytes(m->gpus[g].uuid, theirs);
		if (memcmp(theirs, wanted, 16)) continue;
		if (m->gpus[g].major != d->gpu.major || m->gpus[g].minor != d->gpu.minor) return NOT_SUPPORTED;
		d->gpu = m->gpus[g];
		return SUCCESS;
	}
	return DEVICE_UNAVAILABLE;
}

static CUresult restore_process(const struct request *q)
{
	struct machine m;
	CUresult r = SUCCESS;
	if (state != CHECKPOINTED) return ILLEGAL_STATE;
	if (read_machine(&m)) return NO_DEVICE;
	if (q->n_pairs && m.cuda < 13010) return INVALID_VALUE; /* they were reserved bytes until then */
	driver = connect_to("driver");
	if (driver < 0) return DEVICE_UNAVAILABLE;
	for (int i = 0; i < n_devices && !r; i++)
		if (devices[i].has_context && !(r = choose_device(&devices[i], q, &m))) r = acquire(&devices[i]);
	for (struct allocation *a = allocations; a < allocations + MOST_ALLOCATIONS && !r; a++)
		if (a->bytes && !(r = reserve(a))) r = transfer(a, 0, a->saved, a->bytes, 1);
	if (r) { /* like the real one: what fails in the middle of a restore is lost */
		let_devices_go();
		state = FAILED;
		return r;
	}
	for (struct allocation *a = allocations; a < allocations + MOST_ALLOCATIONS; a++)
		if (a->bytes) { munmap(a->saved, a->bytes); a->saved = 0; }
	state = LOCKED;
	return SUCCESS;
}

static CUresult unlock_process(void)
{
	if (state != LOCKED) return ILLEGAL_STATE;
	state = RUNNING;
	pthread_rwlock_unlock(&gate);
	return SUCCESS;
}

static int take_fault(int operation, char *kind, int *value)
{
	char name[64], path[PATH_BYTES + 64];
	int n = 0;
	for (int i = 0; i < 2 && n < 1; i++) {
		snprintf(name, sizeof name, i ? "%s" : "%s.%d", operation_names[operation], getpid());
		snprintf(path, sizeof path, "%s/faults/%s", devices_folder(), name);
		FILE *f = fopen(path, "re");
		if (!f) continue;
		n = fscanf(f, "%15s %d", kind, value);
		fclose(f);
		if (unlink(path)) n = 0;
	}
	return n >= 1;
}

static CUresult operate(const struct request *q, int line)
{
	char kind[16] = "";
	int value = 0;
	if (take_fault(q->operation, kind, &value)) {
		if (!strcmp(kind, "error")) return value;
		if (!strcmp(kind, "fail")) { let_devices_go(); state = FAILED; return value; }
		if (!strcmp(kind, "die")) kill(getpid(), SIGKILL);
		if (!strcmp(kind, "wait")) usleep((useconds_t)value * 1000);
		if (!strcmp(kind, "agent")) {
			struct answer die = {.result = -1};
			if (write(line, &die, sizeof die) < 0) { /* it has died already */ }
		}
	}
	switch (q->operation) {
	case LOCK: return lock_process(q->timeout_ms);
	case CHECKPOINT: return checkpoint_process();
	case RESTORE: return restore_process(q);
	case UNLOCK: return unlock_process();
	default: return SUCCESS;
	}
}

static void *restore_thread(void *unused)
{
	sigset_t ours;
	siginfo_t info;
	char path[64];
	struct request q;
	(void)unused;
	pthread_setname_np(pthread_self(), "emulated-cuda");
	sigemptyset(&ours);
	sigaddset(&ours, SIGNAL);
	for (;;) {
		if (sigwaitinfo(&ours, &info) < 0) continue;
		snprintf(path, sizeof path, "agents/%lx", (unsigned long)info.si_value.sival_ptr);
		int line = connect_to(path);
		if (line < 0) continue;
		if (recv(line, &q, sizeof q, MSG_WAITALL) == sizeof q) {
			struct answer a = {.result = operate(&q, line)};
			a.state = state;
			a.tid = (int)syscall(SYS_gettid);
			if (send(line, &a, sizeof a, MSG_NOSIGNAL) < 0) { /* whoever asked has died */ }
		}
		close(line);
	}
	return 0;
}

/* ---- checkpoint, from outside --------------------------------------------------------------------------------- */

static pid_t restore_tid(pid_t pid)
{
	char path[64], name[32];
	pid_t found = 0;
	snprintf(path, sizeof path, "/proc/%d/task", pid);
	DIR *d = opendir(path);
	for (struct dirent *e; d && (e = readdir(d)) && !found;) {
		snprintf(path, sizeof path, "/proc/%d/task/%d/comm", pid, atoi(e->d_name));
		FILE *f = fopen(path, "re");
		if (f && fgets(name, sizeof name, f) && !strcmp(name, "emulated-cuda\n")) found = atoi(e->d_name);
		if (f) fclose(f);
	}
	if (d) closedir(d);
	return found;
}

static int call(pid_t pid, const struct request *q, struct answer *a)
{
	static unsigned long counter;
	struct sockaddr_un address = {.sun_family = AF_UNIX};
	char name[64];
	siginfo_t info = {0};
	pid_t tid = restore_tid(pid);
	if (!initialised) return NOT_INITIALIZED;
	if (!tid) return INVALID_VALUE;
	unsigned long number = (unsigned long)getpid() << 32 | __atomic_add_fetch(&counter, 1, __ATOMIC_RELAXED);
	int folder = open(devices_folder(), O_PATH | O_CLOEXEC), door = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	int process = (int)syscall(SYS_pidfd_open, pid, 0);
	snprintf(name, sizeof name, "agents/%lx", number);
	snprintf(address.sun_path, sizeof address.sun_path, "/proc/self/fd/%d/%s", folder, name);
	bind(door, (struct sockaddr *)&address, sizeof address);
	listen(door, 1);
	info.si_signo = SIGNAL;
	info.si_code = SI_QUEUE;
	info.si_value.sival_ptr = (void *)number;
	int result = syscall(SYS_rt_tgsigqueueinfo, pid, tid, SIGNAL, &info) ? INVALID_VALUE : SUCCESS;
	struct pollfd p[2] = {{door, POLLIN, 0}, {process, POLLIN, 0}};
	int line = -1;
	if (!result && poll(p, 2, -1) > 0 && p[0].revents) line = accept4(door, 0, 0, SOCK_CLOEXEC);
	*a = (struct answer){.result = UNKNOWN};
	if (line >= 0) {
		if (send(line, q, sizeof *q, MSG_NOSIGNAL) < 0) result = UNKNOWN;
		ssize_t n = recv(line, a, sizeof *a, MSG_WAITALL);
		if (n == sizeof *a && a->result == -1) kill(getpid(), SIGKILL);
		if (n != sizeof *a) a->result = UNKNOWN; /* it died in the middle */
		char nothing;
		if (recv(line, &nothing, 1, 0) > 0) a->result = UNKNOWN;
		close(line);
	}
	unlinkat(folder, name, 0);
	close(door);
	close(folder);
	close(process);
	return result ? result : a->result;
}

CUresult cuCheckpointProcessGetState(int pid, int *out)
{
	struct request q = {.operation = GET_STATE};
	struct answer a;
	int r = call(pid, &q, &a);
	if (!r) *out = a.state;
	return r;
}

CUresult cuCheckpointProcessGetRestoreThreadId(int pid, int *tid)
{
	if (!initialised) return NOT_INITIALIZED;
	*tid = restore_tid(pid);
	return *tid ? SUCCESS : INVALID_VALUE;
}

CUresult cuCheckpointProcessLock(int pid, const struct lock_args *args)
{
	struct request q = {.operation = LOCK, .timeout_ms = args ? args->timeout_ms : 0};
	struct answer a;
	return call(pid, &q, &a);
}

CUresult cuCheckpointProcessCheckpoint(int pid, const char *args)
{
	struct request q = {.operation = CHECKPOINT};
	struct answer a;
	for (int i = 0; args && i < 64; i++)
		if (args[i]) return NOT_SUPPORTED; /* memory straight to storage is not emulated */
	return call(pid, &q, &a);
}

CUresult cuCheckpointProcessRestore(int pid, const struct restore_args *args)
{
	struct request q = {.operation = RESTORE};
	struct answer a;
	if (args) {
		if (args->n_pairs > MOST_PAIRS) return INVALID_VALUE;
		for (size_t i = 0; i < sizeof args->reserved; i++)
			if (args->reserved[i]) return NOT_SUPPORTED;
		q.n_pairs = args->n_pairs;
		memcpy(q.pairs, args->pairs, q.n_pairs * sizeof *q.pairs);
	}
	return call(pid, &q, &a);
}

CUresult cuCheckpointProcessUnlock(int pid, const void *args)
{
	struct request q = {.operation = UNLOCK};
	struct answer a;
	(void)args;
	return call(pid, &q, &a);
}

/* ---- what a worker calls -------------------------------------------------------------------------------------- */

CUresult cuInit(unsigned flags)
{
	struct machine m;
	pthread_rwlockattr_t writers_first;
	pthread_t thread;
	sigset_t ours, before;
	if (flags) return INVALID_VALUE;
	pthread_mutex_lock(&books);
	if (!initialised) {
		if (read_machine(&m) || !m.n_gpus) { pthread_mutex_unlock(&books); return NO_DEVICE; }
		n_devices = m.n_gpus;
		for (int i = 0; i < n_devices; i++) devices[i].gpu = m.gpus[i];
		pthread_rwlockattr_init(&writers_first);
		pthread_rwlockattr_setkind_np(&writers_first, PTHREAD_RWLOCK_PREFER_WRITER_NONRECURSIVE_NP);
		pthread_rwlock_init(&gate, &writers_first);
		/* It alone is to get the signal, so it alone may be asked to wait for it. */
		sigemptyset(&ours);
		sigaddset(&ours, SIGNAL);
		pthread_sigmask(SIG_BLOCK, &ours, &before);
		if (!getenv("EMULATED_AGENT")) pthread_create(&thread, 0, restore_thread, 0);
		pthread_sigmask(SIG_SETMASK, &before, 0);
		initialised = 1;
	}
	pthread_mutex_unlock(&books);
	return SUCCESS;
}

CUresult cuDriverGetVersion(int *version)
{
	struct machine m;
	if (read_machine(&m)) return NO_DEVICE;
	*version = m.cuda;
	return SUCCESS;
}

CUresult cuDeviceGetCount(int *count) { *count = n_devices; return initialised ? SUCCESS : NOT_INITIALIZED; }

CUresult cuDeviceGet(int *device, int ordinal)
{
	if (ordinal < 0 || ordinal >= n_devices) return INVALID_DEVICE;
	*device = ordinal;
	return SUCCESS;
}

CUresult cuDeviceGetName(char *name, int length, int device)
{
	if (device < 0 || device >= n_devices) return INVALID_DEVICE;
	snprintf(name, (size_t)length, "Emulated device (not a GPU)");
	return SUCCESS;
}

CUresult cuDeviceGetUuid_v2(CUuuid *uuid, int device)
{
	if (device < 0 || device >= n_devices) return INVALID_DEVICE;
	uuid_bytes(devices[device].gpu.uuid, uuid->bytes);
	return SUCCESS;
}

CUresult cuDeviceGetUuid(CUuuid *uuid, int device) { return cuDeviceGetUuid_v2(uuid, device); }

CUresult cuDeviceTotalMem_v2(size_t *bytes, int device)
{
	if (device < 0 || device >= n_devices) return INVALID_DEVICE;
	*bytes = devices[device].gpu.bytes;
	return SUCCESS;
}

CUresult cuDeviceGetAttribute(int *value, int attribute, int device)
{
	if (device < 0 || device >= n_devices) return INVALID_DEVICE;
	*value = attribute == 75 ? devices[device].gpu.major : attribute == 76 ? devices[device].gpu.minor : 0;
	return SUCCESS;
}

CUresult cuDevicePrimaryCtxRetain(void **context, int device)
{
	CUresult r = SUCCESS;
	if (!initialised) return NOT_INITIALIZED;
	if (device < 0 || device >= n_devices) return INVALID_DEVICE;
	pthread_rwlock_rdlock(&gate);
	pthread_mutex_lock(&books);
	if (driver < 0 && (driver = connect_to("driver")) < 0) r = NO_DEVICE;
	if (!r && !devices[device].has_context && !(r = acquire(&devices[device]))) devices[device].has_context = 1;
	pthread_mutex_unlock(&books);
	pthread_rwlock_unlock(&gate);
	*context = &devices[device];
	return r;
}

CUresult cuCtxSetCurrent(void *context)
{
	current = context ? (int)((struct device *)context - devices) : -1;
	return SUCCESS;
}

CUresult cuCtxSynchronize(void)
{
	if (current < 0) return INVALID_CONTEXT;
	pthread_rwlock_rdlock(&gate);
	pthread_rwlock_unlock(&gate);
	return SUCCESS;
}

CUresult cuMemGetInfo_v2(size_t *free_bytes, size_t *total)
{
	if (current < 0) return INVALID_CONTEXT;
	struct device *d = &devices[current];
	pthread_rwlock_rdlock(&gate);
	*total = d->gpu.bytes;
	*free_bytes = d->gpu.bytes - used_bytes(&d->gpu, d->folder, 0, 0);
	pthread_rwlock_unlock(&gate);
	return SUCCESS;
}

CUresult cuMemAlloc_v2(CUdeviceptr *address, size_t bytes)
{
	CUresult r = OUT_OF_MEMORY;
	if (current < 0) return INVALID_CONTEXT;
	if (!bytes) return INVALID_VALUE;
	pthread_rwlock_rdlock(&gate);
	pthread_mutex_lock(&books);
	struct allocation *a = allocations;
	while (a < allocations + MOST_ALLOCATIONS && a->bytes) a++;
	if (a < allocations + MOST_ALLOCATIONS) {
		*a = (struct allocation){next_address, bytes, current, 0};
		if ((r = reserve(a))) a->bytes = 0;
		else next_address += (bytes + 0x1fffff) & ~0x1fffffULL;
		*address = a->address;
	}
	pthread_mutex_unlock(&books);
	pthread_rwlock_unlock(&gate);
	return r;
}

static struct allocation *found(CUdeviceptr address, size_t bytes)
{
	for (struct allocation *a = allocations; a < allocations + MOST_ALLOCATIONS; a++)
		if (a->bytes && address >= a->address && address + bytes <= a->address + a->bytes) return a;
	return 0;
}

CUresult cuMemFree_v2(CUdeviceptr address)
{
	char path[PATH_BYTES + 64];
	CUresult r = INVALID_VALUE;
	pthread_rwlock_rdlock(&gate);
	pthread_mutex_lock(&books);
	struct allocation *a = found(address, 1);
	if (a && a->address == address) {
		snprintf(path, sizeof path, "%s/%llx", devices[a->gpu].folder, a->address);
		unlink(path);
		a->bytes = 0;
		r = SUCCESS;
	}
	pthread_mutex_unlock(&books);
	pthread_rwlock_unlock(&gate);
	return r;
}

static CUresult copy(CUdeviceptr address, void *memory, size_t bytes, int out)
{
	pthread_rwlock_rdlock(&gate);
	struct allocation *a = found(address, bytes);
	CUresult r = a ? transfer(a, address - a->address, memory, bytes, out) : INVALID_VALUE;
	pthread_rwlock_unlock(&gate);
	return r;
}

CUresult cuMemcpyHtoD_v2(CUdeviceptr to, const void *from, size_t bytes) { return copy(to, (void *)from, bytes, 1); }
CUresult cuMemcpyDtoH_v2(void *to, CUdeviceptr from, size_t bytes) { return copy(from, to, bytes, 0); }

CUresult cuMemsetD8_v2(CUdeviceptr to, unsigned char value, size_t bytes)
{
	char *block = malloc(bytes);
	if (!block) return OUT_OF_MEMORY;
	memset(block, value, bytes);
	CUresult r = copy(to, block, bytes, 1);
	free(block);
	return r;
}

CUresult cuModuleLoadData(void **module, const void *image) { (void)image; *module = devices; return SUCCESS; }

CUresult cuModuleGetFunction(void **function, void *module, const char *name)
{
	(void)module;
	*function = strcmp(name, "add") ? strcmp(name, "spin") ? 0 : (void *)2 : (void *)1;
	return *function ? SUCCESS : NOT_FOUND;
}

/* add(address, bytes, value): adds to each byte. spin(ms): keeps the device busy. */
CUresult cuLaunchKernel(void *function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
	unsigned shared, void *stream, void **parameters, void **extra)
{
	(void)gx, (void)gy, (void)gz, (void)bx, (void)by, (void)bz, (void)shared, (void)stream, (void)extra;
	if (current < 0) return INVALID_CONTEXT;
	pthread_rwlock_rdlock(&gate);
	CUresult r = SUCCESS;
	if (function == (void *)2) {
		usleep(*(unsigned *)parameters[0] * 1000);
	} else {
		CUdeviceptr at = *(CUdeviceptr *)parameters[0];
		size_t bytes = *(size_t *)parameters[1];
		struct allocation *a = found(at, bytes);
		unsigned char value = *(unsigned char *)parameters[2], *block = malloc(bytes);
		r = !a || !block ? INVALID_VALUE : transfer(a, at - a->address, block, bytes, 0);
		for (size_t i = 0; !r && i < bytes; i++) block[i] = (unsigned char)(block[i] + value);
		if (!r) r = transfer(a, at - a->address, block, bytes, 1);
		free(block);
	}
	pthread_rwlock_unlock(&gate);
	return r;
}

CUresult cuGetErrorName(CUresult error, const char **name)
{
	*name = error ? "EMULATED_ERROR" : "CUDA_SUCCESS";
	return SUCCESS;
}

CUresult cuGetErrorString(CUresult error, const char **text)
{
	*text = error ? "error of the emulated driver" : "no error";
	return SUCCESS;
}

CUresult cuGetProcAddress_v2(const char *symbol, void **function, int version, uint64_t flags, int *status)
{
	static const char *suffixes[] = {"_v2", ""};
	char name[128];
	Dl_info here;
	struct machine m;
	(void)flags;
	dladdr((void *)cuInit, &here);
	void *us = dlopen(here.dli_fname, RTLD_NOLOAD | RTLD_NOW);
	*function = 0;
	for (int i = 0; i < 2 && !*function; i++) {
		snprintf(name, sizeof name, "%s%s", symbol, suffixes[i]);
		*function = us ? dlsym(us, name) : 0;
	}
	if (us) dlclose(us);
	/* A driver older than 12.8 has none of these. */
	if (!strncmp(symbol, "cuCheckpoint", 12) && (version < 12080 || read_machine(&m) || m.cuda < 12080)) *function = 0;
	if (status) *status = *function ? 0 : 1;
	return *function ? SUCCESS : NOT_FOUND;
}

CUresult cuGetProcAddress(const char *symbol, void **function, int version, uint64_t flags)
{
	return cuGetProcAddress_v2(symbol, function, version, flags, 0);
}
