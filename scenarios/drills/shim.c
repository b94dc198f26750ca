/* A wall clock that jumps and a disk that is full, for one process, without root.
 *
 * Preloaded into an agent. Adds the seconds written as text in the file
 * MIGRATE_DRILL_CLOCK to CLOCK_REALTIME; the monotonic clock is the kernel's own. While
 * there is a file MIGRATE_DRILL_DISK, pwrite (by which SQLite writes) says ENOSPC.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static long jump(void)
{
	static __thread int busy;
	const char *path = getenv("MIGRATE_DRILL_CLOCK");
	char text[32] = "";
	int fd;

	if (!path || busy)
		return 0;
	busy = 1;
	fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd >= 0) {
		if (read(fd, text, sizeof(text) - 1) < 0)
			text[0] = 0;
		close(fd);
	}
	busy = 0;
	return atol(text);
}

int clock_gettime(clockid_t clock, struct timespec *now)
{
	int result = syscall(SYS_clock_gettime, clock, now);

	if (!result && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE))
		now->tv_sec += jump();
	return result;
}

ssize_t pwrite64(int fd, const void *data, size_t size, off64_t offset)
{
	const char *path = getenv("MIGRATE_DRILL_DISK");

	if (path && !access(path, F_OK)) {
		errno = ENOSPC;
		return -1;
	}
	return syscall(SYS_pwrite64, fd, data, size, offset);
}

int gettimeofday(struct timeval *restrict now, void *restrict zone)
{
	struct timespec exact;

	(void)zone;
	if (clock_gettime(CLOCK_REALTIME, &exact))
		return -1;
	now->tv_sec = exact.tv_sec;
	now->tv_usec = exact.tv_nsec / 1000;
	return 0;
}

time_t time(time_t *where)
{
	struct timespec now;

	clock_gettime(CLOCK_REALTIME, &now);
	if (where)
		*where = now.tv_sec;
	return now.tv_sec;
}
