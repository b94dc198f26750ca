// SPDX-License-Identifier: GPL-2.0-only
/*
 * The hook inside CRIU: a trampoline, without a policy of its own.
 *
 * CRIU loads it as a plugin. At each hook it sends one message to the agent's UNIX
 * socket ($MIGRATE_HOOK_SOCKET) and then does what the agent asks, in the process and
 * thread CRIU called it in: run an ioctl, open a node, take an fd of the traced process,
 * return a value. Messages are those of migrate/engine/wire.py, ioctls those of
 * migrate/kfd/marshal.py, which describe themselves, so that there is no table here.
 *
 * If the agent goes away: before HOLD the queues that are paused are started and the dump
 * or restore fails; in HOLD nothing is done at all.
 *
 * GPL, because it is linked into CRIU; the agent is another process.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <unistd.h>

#include <criu/criu-plugin.h>

/* Of linux/kfd_ioctl.h, which wants libdrm's headers: all that is needed to UNPAUSE. */
enum { KFD_CRIU_OP_PROCESS_INFO = 0, KFD_CRIU_OP_UNPAUSE = 2 };

struct criu_args {
	uint64_t devices, bos, priv_data, priv_data_size;
	uint32_t num_devices, num_bos, num_objects, pid, op, pad;
};

#define AMDKFD_IOC_CRIU_OP _IOWR('K', 0x22, struct criu_args)

enum kind { REPLY, IOCTL, OPEN, CLOSE, HOLD, DONE, ATTACH, RANGES, FINISH, HOOK, RETURN };

#define MAGIC 0x3152474d
#define MAX_PAYLOAD (512u << 20)
#define FDS_PER_GROUP 250
#define NO_FD 0xffffffffu
#define HOOK_INIT 100
#define HOOK_FINI 101

struct header {
	uint32_t magic;
	uint16_t version, kind;
	uint32_t sequence;
	int32_t status;
	uint64_t file;
	uint32_t length, fds;
} __attribute__((packed));

/* Payload of HOOK; a path may follow. fd and st_* are of the file a hook is about. */
struct event {
	int32_t stage, pid, id, fd;
	uint64_t address, offset;
	uint32_t st_mode, task;
	uint64_t st_rdev;
} __attribute__((packed));

/* Payload of RETURN. The last two are for UPDATE_VMA_MAP. */
struct verdict {
	int32_t value, fd;
	uint64_t new_offset;
} __attribute__((packed));

struct call_head {
	char magic[4];
	uint16_t version, flags;
	uint32_t request, arg_size, regions, slots, fds;
} __attribute__((packed));

struct call_region {
	uint64_t pointer, length;
	uint32_t offset, direction;
} __attribute__((packed));

struct call_slot {
	uint32_t region, offset, stride, count, direction;
} __attribute__((packed));

struct reply_head {
	char magic[4];
	uint16_t version, flags;
	uint32_t error, arg_size, regions, fds;
} __attribute__((packed));

#define DIRECTION_IN 1
#define DIRECTION_OUT 2

static int channel = -1;
static pid_t channel_owner;
static pid_t lost; /* process in which the agent went away: not called again there */
static int stage;
static int held;
static int paused[256];
static int n_paused;

static void complain(const char *what)
{
	fprintf(stderr, "migrate hook: %s: %s\n", what, strerror(errno));
}

/* ------------------------------------------------------------------ the socket */

static int transfer(int fd, void *buffer, size_t size, int writing)
{
	while (size) {
		ssize_t n = writing ? send(fd, buffer, size, MSG_NOSIGNAL) : recv(fd, buffer, size, 0);

		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0) {
			if (!n)
				errno = ECONNRESET;
			return -1;
		}
		buffer = (char *)buffer + n;
		size -= n;
	}
	return 0;
}

static int send_fds(int fd, const int *fds, unsigned int count)
{
	char mark = '+', control[CMSG_SPACE(FDS_PER_GROUP * sizeof(int))];
	struct iovec data = { &mark, 1 };

	while (count) {
		unsigned int n = count < FDS_PER_GROUP ? count : FDS_PER_GROUP;
		struct msghdr message = { .msg_iov = &data, .msg_iovlen = 1, .msg_control = control };
		struct cmsghdr *rights;

		message.msg_controllen = CMSG_SPACE(n * sizeof(int));
		rights = CMSG_FIRSTHDR(&message);
		rights->cmsg_level = SOL_SOCKET;
		rights->cmsg_type = SCM_RIGHTS;
		rights->cmsg_len = CMSG_LEN(n * sizeof(int));
		memcpy(CMSG_DATA(rights), fds, n * sizeof(int));
		if (sendmsg(fd, &message, MSG_NOSIGNAL) != 1)
			return -1;
		fds += n;
		count -= n;
	}
	return 0;
}

static int send_message(struct header *head, const void *payload, const int *fds)
{
	head->magic = MAGIC;
	head->version = 1;
	if (transfer(channel, head, sizeof(*head), 1) || send_fds(channel, fds, head->fds))
		return -1;
	return transfer(channel, (void *)payload, head->length, 1);
}

static int answer(const struct header *request, int status, uint64_t file)
{
	struct header head = { .kind = REPLY, .sequence = request->sequence };

	head.status = status;
	head.file = file;
	return send_message(&head, NULL, NULL);
}

static void hang_up(void)
{
	if (channel >= 0 && channel_owner == getpid())
		close(channel);
	channel = -1;
}

/*
 * High up: the numbers below belong to the process that is restored. CRIU has raised its limit
 * to fs.nr_open, which is 2^20, but near 2^30 where systemd runs: a table of files for that
 * would take 4 GiB.
 */
static int out_of_the_way(int fd)
{
	struct rlimit limit = { .rlim_cur = 2048 };
	int high;

	getrlimit(RLIMIT_NOFILE, &limit);
	if (limit.rlim_cur > 1 << 20)
		limit.rlim_cur = 1 << 20;
	high = fcntl(fd, F_DUPFD_CLOEXEC, (int)(limit.rlim_cur / 2));
	close(fd);
	return high;
}

static int call_agent(void)
{
	struct sockaddr_un address = { .sun_family = AF_UNIX };
	const char *path = getenv("MIGRATE_HOOK_SOCKET");
	int fd;

	/* What a forked task has inherited is CRIU's main process's, and may be closed. */
	if (channel >= 0 && channel_owner == getpid())
		return 0;
	channel = -1;
	n_paused = 0;
	if (!path || strlen(path) >= sizeof(address.sun_path)) {
		errno = EDESTADDRREQ;
		return -1;
	}
	strcpy(address.sun_path, path);
	fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	if (fd < 0)
		return -1;
	if (connect(fd, (struct sockaddr *)&address, sizeof(address))) {
		close(fd);
		return -1;
	}
	channel = out_of_the_way(fd);
	channel_owner = getpid();
	return channel < 0 ? -1 : 0;
}

/* ------------------------------------------------------------------ what is paused */

static void note(int fd, uint32_t op)
{
	int i;

	if (op == KFD_CRIU_OP_PROCESS_INFO && n_paused < 256)
		paused[n_paused++] = fd;
	for (i = 0; op == KFD_CRIU_OP_UNPAUSE && i < n_paused; i++)
		if (paused[i] == fd)
			paused[i--] = paused[--n_paused];
}

static void unpause_all(void)
{
	while (n_paused) {
		struct criu_args args = { .op = KFD_CRIU_OP_UNPAUSE };

		if (ioctl(paused[--n_paused], AMDKFD_IOC_CRIU_OP, &args))
			complain("UNPAUSE");
	}
}

/* ------------------------------------------------------------------ ioctls */

struct buffer {
	void *map;
	size_t map_size;
	char *data; /* ends where an inaccessible page begins */
	uint64_t length;
};

static int guarded(struct buffer *buffer, uint64_t length)
{
	size_t page = sysconf(_SC_PAGESIZE), pages = (length + page - 1) / page * page;

	buffer->map_size = pages + page;
	buffer->map = mmap(NULL, buffer->map_size, PROT_READ | PROT_WRITE,
			   MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (buffer->map == MAP_FAILED) {
		buffer->map = NULL;
		return -1;
	}
	mprotect((char *)buffer->map + pages, page, PROT_NONE);
	buffer->data = (char *)buffer->map + pages - length;
	buffer->length = length;
	return 0;
}

struct call {
	struct call_head head;
	struct call_region *regions;
	struct call_slot *slots;
	struct buffer arg, *buffers;
};

static void drop_call(struct call *call)
{
	uint32_t i;

	for (i = 0; call->buffers && i < call->head.regions; i++)
		if (call->buffers[i].map)
			munmap(call->buffers[i].map, call->buffers[i].map_size);
	if (call->arg.map)
		munmap(call->arg.map, call->arg.map_size);
	free(call->buffers);
}

static int take(char **at, char *end, uint64_t size, void *to)
{
	if ((uint64_t)(end - *at) < size)
		return -1;
	memcpy(to, *at, size);
	*at += size;
	return 0;
}

static int slot_fits(const struct call *call, const struct call_slot *slot)
{
	const struct buffer *in = slot->region == NO_FD ? &call->arg : &call->buffers[slot->region];

	if (slot->region != NO_FD && slot->region >= call->head.regions)
		return 0;
	return !slot->count || (uint64_t)slot->offset + (uint64_t)slot->stride * (slot->count - 1) +
				       4 <= in->length;
}

/* The payload becomes buffers of ours, and the argument points to them. -1: nonsense. */
static int parse_call(struct call *call, char *at, uint32_t length)
{
	char *end = at + length;
	uint64_t pointer;
	uint32_t i;

	if (take(&at, end, sizeof(call->head), &call->head) || memcmp(call->head.magic, "KFDC", 4) ||
	    call->head.version != 1 || call->head.fds || call->head.arg_size > 4096 ||
	    call->head.regions > 64 || call->head.slots > 64)
		return -1;
	call->regions = (struct call_region *)at;
	call->slots = (struct call_slot *)(call->regions + call->head.regions);
	at = (char *)(call->slots + call->head.slots);
	call->buffers = calloc(call->head.regions + 1, sizeof(*call->buffers));
	if (!call->buffers || at > end || guarded(&call->arg, call->head.arg_size) ||
	    take(&at, end, call->head.arg_size, call->arg.data))
		return -1;
	for (i = 0; i < call->head.regions; i++) {
		struct call_region *region = &call->regions[i];

		if (region->length > MAX_PAYLOAD || region->offset + 8ull > call->head.arg_size ||
		    guarded(&call->buffers[i], region->length))
			return -1;
		if ((region->direction & DIRECTION_IN) &&
		    take(&at, end, region->length, call->buffers[i].data))
			return -1;
		pointer = (uintptr_t)call->buffers[i].data;
		memcpy(call->arg.data + region->offset, &pointer, 8);
	}
	for (i = 0; i < call->head.slots; i++)
		if (!slot_fits(call, &call->slots[i]))
			return -1;
	return at == end ? 0 : -1;
}

static uint32_t *fd_field(struct call *call, uint32_t slot, uint32_t index)
{
	struct call_slot *s = &call->slots[slot];
	struct buffer *in = s->region == NO_FD ? &call->arg : &call->buffers[s->region];

	return (uint32_t *)(in->data + s->offset + (size_t)s->stride * index);
}

/* Of the fds that come out: mark their fields, or move them into fds, or close them. */
enum fd_step { MARK, COLLECT, DROP };

static uint32_t each_fd(struct call *call, enum fd_step step, int *fds)
{
	uint32_t slot, index, value, count = 0;

	for (slot = 0; slot < call->head.slots; slot++) {
		if (call->slots[slot].direction != DIRECTION_OUT)
			continue;
		for (index = 0; index < call->slots[slot].count; index++) {
			uint32_t *field = fd_field(call, slot, index);

			memcpy(&value, field, 4);
			if (step == MARK) {
				value = NO_FD;
			} else if (value != NO_FD) {
				if (step == DROP)
					close((int)value);
				else if (fds)
					fds[count] = (int)value;
				value = step == DROP ? NO_FD : fds ? count : value;
				count++;
			}
			memcpy(field, &value, 4);
		}
	}
	return count;
}

static int send_reply(const struct header *request, struct call *call, int error)
{
	struct reply_head head = { "KFDR", 1, 0, error, call->head.arg_size, 0, 0 };
	uint32_t i, n_fds = error ? 0 : each_fd(call, COLLECT, NULL);
	int result = -1, *fds = calloc(n_fds + 1, sizeof(int));
	struct header out = { .kind = REPLY, .sequence = request->sequence };
	uint64_t length = sizeof(head) + head.arg_size;
	char *payload, *at;

	head.regions = error ? 0 : call->head.regions;
	for (i = 0; i < head.regions; i++)
		length += 8 + (call->regions[i].direction & DIRECTION_OUT ? call->buffers[i].length : 0);
	payload = malloc(length);
	if (!payload || !fds)
		goto out;
	head.fds = out.fds = each_fd(call, error ? DROP : COLLECT, fds);
	if (error)
		head.fds = out.fds = 0;
	at = mempcpy(payload, &head, sizeof(head));
	for (i = 0; i < head.regions; i++) {
		uint64_t size =
			call->regions[i].direction & DIRECTION_OUT ? call->buffers[i].length : 0;

		at = mempcpy(at, &size, 8);
	}
	at = mempcpy(at, call->arg.data, head.arg_size);
	for (i = 0; i < head.regions; i++)
		if (call->regions[i].direction & DIRECTION_OUT)
			at = mempcpy(at, call->buffers[i].data, call->buffers[i].length);
	out.length = length;
	result = send_message(&out, payload, fds);
	for (i = 0; i < n_fds; i++)
		close(fds[i]);
out:
	free(payload);
	free(fds);
	return result;
}

static int run_ioctl(const struct header *request, char *payload)
{
	struct call call = { 0 };
	int result, error;

	if (parse_call(&call, payload, request->length)) {
		drop_call(&call);
		return answer(request, EBADMSG, 0);
	}
	each_fd(&call, MARK, NULL);
	error = ioctl((int)request->file, call.head.request, call.arg.data) ? errno : 0;
	if (!error && call.head.request == AMDKFD_IOC_CRIU_OP)
		note((int)request->file, ((struct criu_args *)call.arg.data)->op);
	result = send_reply(request, &call, error);
	drop_call(&call);
	return result;
}

/* ------------------------------------------------------------------ the conversation */

static int take_fd(const struct header *request, const char *payload)
{
	int fd = -1, pidfd, number;

	if (request->length != sizeof(number))
		return answer(request, EBADMSG, 0);
	memcpy(&number, payload, sizeof(number));
	pidfd = syscall(SYS_pidfd_open, (pid_t)request->file, 0);
	if (pidfd >= 0) {
		fd = syscall(SYS_pidfd_getfd, pidfd, number, 0);
		if (fd >= 0)
			fd = out_of_the_way(fd);
		number = errno;
		close(pidfd);
		errno = number;
	}
	if (fd < 0)
		return answer(request, errno, 0);
	return answer(request, 0, fd);
}

static int open_path(const struct header *request, const char *path)
{
	int fd = open(path, O_RDWR | O_CLOEXEC);

	if (fd >= 0)
		fd = out_of_the_way(fd);
	return fd < 0 ? answer(request, errno, 0) : answer(request, 0, fd);
}

/* One request. 1: it was RETURN. -1: the agent is gone or talks nonsense. */
static int serve(struct verdict *verdict)
{
	struct header request;
	char *payload;
	int done = 0;

	if (transfer(channel, &request, sizeof(request), 0))
		return -1;
	if (request.magic != MAGIC || request.version != 1 || request.fds ||
	    request.length > MAX_PAYLOAD) {
		errno = EBADMSG;
		return -1;
	}
	payload = calloc(request.length + 1ul, 1);
	if (!payload || transfer(channel, payload, request.length, 0)) {
		free(payload);
		return -1;
	}
	switch (request.kind) {
	case IOCTL:
		done = run_ioctl(&request, payload);
		break;
	case OPEN:
		done = open_path(&request, payload);
		break;
	case CLOSE:
		close((int)request.file);
		done = answer(&request, 0, 0);
		break;
	case ATTACH:
		done = take_fd(&request, payload);
		break;
	case HOLD:
		held = 1;
		done = answer(&request, 0, 0);
		break;
	case RETURN:
		if (request.length != sizeof(*verdict)) {
			done = answer(&request, EBADMSG, 0);
			break;
		}
		memcpy(verdict, payload, sizeof(*verdict));
		done = answer(&request, 0, 0) ? -1 : 1;
		break;
	default:
		done = answer(&request, ENOSYS, 0);
	}
	free(payload);
	return done;
}

/* The agent is gone. */
static int abandoned(void)
{
	if (lost != getpid())
		complain("the agent is gone");
	lost = getpid();
	hang_up();
	if (held)
		return 0;
	unpause_all();
	return -1;
}

static int converse(int hook, struct event *event, const char *path, struct verdict *verdict)
{
	struct header head = { .kind = HOOK, .file = hook };
	char payload[sizeof(*event) + PATH_MAX] = { 0 };
	struct verdict unused = { 0 };
	int done = 0;

	if (!verdict)
		verdict = &unused;
	event->stage = stage;
	event->task = getpid();
	memcpy(payload, event, sizeof(*event));
	if (path)
		strncpy(payload + sizeof(*event), path, PATH_MAX - 1);
	head.length = sizeof(*event) + (path ? strlen(payload + sizeof(*event)) : 0);
	if (lost == getpid() || call_agent() || send_message(&head, payload, NULL))
		return abandoned();
	while (!done)
		done = serve(verdict);
	return done < 0 ? abandoned() : verdict->value;
}

/* In a task that is being restored nothing of ours may stay open. */
static int converse_once(int hook, struct event *event, const char *path, struct verdict *verdict)
{
	int result = converse(hook, event, path, verdict);

	hang_up();
	return result;
}

/* ------------------------------------------------------------------ the hooks */

/* Two plugins would both dump every KFD file. Plugins are loaded one after another. */
static int stock_plugin_loaded(void)
{
	FILE *maps = fopen("/proc/self/maps", "re");
	char line[PATH_MAX + 128];
	int found = 0;

	while (maps && fgets(line, sizeof(line), maps))
		found |= strstr(line, "amdgpu_plugin.so") != NULL;
	if (maps)
		fclose(maps);
	if (found)
		fprintf(stderr, "migrate hook: CRIU's own amdgpu_plugin.so is loaded too\n");
	return found;
}

static int hook_init(int its_stage)
{
	struct event event = { 0 };

	stage = its_stage;
	return stock_plugin_loaded() ? -1 : converse(HOOK_INIT, &event, NULL, NULL);
}

static void hook_fini(int its_stage, int ret)
{
	struct event event = { .id = ret };

	stage = its_stage;
	if (channel >= 0)
		converse(HOOK_FINI, &event, NULL, NULL);
	hang_up();
}

static int pause_devices(int pid)
{
	struct event event = { .pid = pid };

	if (stock_plugin_loaded())
		return -1;
	return converse(CR_PLUGIN_HOOK__PAUSE_DEVICES, &event, NULL, NULL);
}

static int checkpoint_devices(int pid)
{
	struct event event = { .pid = pid };

	return converse(CR_PLUGIN_HOOK__CHECKPOINT_DEVICES, &event, NULL, NULL);
}

static int dump_ext_file(int fd, int id)
{
	struct event event = { .id = id, .fd = fd };
	struct stat st;

	if (fstat(fd, &st))
		return -1;
	event.st_mode = st.st_mode;
	event.st_rdev = st.st_rdev;
	return converse(CR_PLUGIN_HOOK__DUMP_EXT_FILE, &event, NULL, NULL);
}

static int handle_device_vma(int fd, const struct stat *st)
{
	struct event event = { .fd = fd, .st_mode = st->st_mode, .st_rdev = st->st_rdev };

	return converse(CR_PLUGIN_HOOK__HANDLE_DEVICE_VMA, &event, NULL, NULL);
}

static int restore_ext_file(int id)
{
	struct event event = { .id = id };

	return converse_once(CR_PLUGIN_HOOK__RESTORE_EXT_FILE, &event, NULL, NULL);
}

static int update_vma_map(const char *path, const uint64_t address, const uint64_t old_offset,
			  uint64_t *new_offset, int *fd)
{
	struct event event = { .address = address, .offset = old_offset };
	struct verdict verdict = { .new_offset = old_offset, .fd = -1 };
	int result = converse_once(CR_PLUGIN_HOOK__UPDATE_VMA_MAP, &event, path, &verdict);

	*new_offset = verdict.new_offset;
	*fd = verdict.fd;
	return result;
}

static int resume_devices_late(int pid)
{
	struct event event = { .pid = pid };
	int result = converse_once(CR_PLUGIN_HOOK__RESUME_DEVICES_LATE, &event, NULL, NULL);

	/*
	 * CRIU only logs an error of this hook and lets the task run. Nobody has granted it,
	 * and the agent that would have it held is gone or refuses.
	 */
	if (result < 0 && pid > 0 && kill(pid, SIGKILL))
		complain("kill");
	return result;
}

CR_PLUGIN_REGISTER("migrate_kfd", hook_init, hook_fini)
CR_PLUGIN_REGISTER_HOOK(CR_PLUGIN_HOOK__PAUSE_DEVICES, pause_devices)
CR_PLUGIN_REGISTER_HOOK(CR_PLUGIN_HOOK__CHECKPOINT_DEVICES, checkpoint_devices)
CR_PLUGIN_REGISTER_HOOK(CR_PLUGIN_HOOK__DUMP_EXT_FILE, dump_ext_file)
CR_PLUGIN_REGISTER_HOOK(CR_PLUGIN_HOOK__HANDLE_DEVICE_VMA, handle_device_vma)
CR_PLUGIN_REGISTER_HOOK(CR_PLUGIN_HOOK__RESTORE_EXT_FILE, restore_ext_file)
CR_PLUGIN_REGISTER_HOOK(CR_PLUGIN_HOOK__UPDATE_VMA_MAP, update_vma_map)
CR_PLUGIN_REGISTER_HOOK(CR_PLUGIN_HOOK__RESUME_DEVICES_LATE, resume_devices_late)
