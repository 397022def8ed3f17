/*
 * A link between two network namespaces, with a delay and a rate: kernels without tc's netem have none.
 *
 *     link NAMESPACE NAMESPACE MICROSECONDS BITS_PER_SECOND      names as in /run/netns; in the foreground
 *
 * Each namespace gets a tun device called link0, which is up to the caller. A packet that comes out of one goes into the
 * other when the link has had the time for its bits and for all before it, and after the delay. What finds more than a
 * quarter of a second waiting is lost, as on a router.
 */
#define _GNU_SOURCE

#include <fcntl.h>
#include <linux/if.h>
#include <linux/if_tun.h>
#include <poll.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <time.h>
#include <unistd.h>

enum { PACKETS = 1 << 14, LARGEST = 2048, AT_ONCE = 64 };
static const int64_t SECOND = 1000000000, LONGEST_QUEUE = SECOND / 4;

struct packet {
	int64_t due;
	ssize_t size;
	char bytes[LARGEST];
};

/* one way of the link: a ring of packets that are on it */
struct way {
	int from, to;
	int64_t free; /* when the link has sent what it has got so far */
	unsigned first, last;
	struct packet *ring;
};

static void fail(const char *what)
{
	perror(what);
	exit(1);
}

static int64_t now(void)
{
	struct timespec time;
	clock_gettime(CLOCK_MONOTONIC, &time);
	return time.tv_sec * SECOND + time.tv_nsec;
}

static int make_device(const char *namespace)
{
	char path[128];
	snprintf(path, sizeof path, "/run/netns/%s", namespace);
	int inside = open(path, O_RDONLY | O_CLOEXEC);
	if (inside < 0 || setns(inside, CLONE_NEWNET))
		fail(path);
	close(inside);
	int device = open("/dev/net/tun", O_RDWR | O_NONBLOCK | O_CLOEXEC);
	struct ifreq request = {.ifr_flags = IFF_TUN | IFF_NO_PI};
	strcpy(request.ifr_name, "link0");
	if (device < 0 || ioctl(device, TUNSETIFF, &request))
		fail("/dev/net/tun");
	return device;
}

static void take(struct way *way, int64_t delay, int64_t rate)
{
	char lost[LARGEST];
	for (int count = 0; count < AT_ONCE; count++) {
		int64_t time = now();
		int full = way->last - way->first == PACKETS || way->free - time > LONGEST_QUEUE;
		struct packet *packet = &way->ring[way->last % PACKETS];
		ssize_t size = read(way->from, full ? lost : packet->bytes, LARGEST);
		if (size <= 0)
			return;
		if (full)
			continue;
		way->free = (way->free > time ? way->free : time) + size * 8 * SECOND / rate;
		packet->due = way->free + delay;
		packet->size = size;
		way->last++;
	}
}

static void give(struct way *way)
{
	int64_t time = now();
	while (way->first != way->last && way->ring[way->first % PACKETS].due <= time) {
		struct packet *packet = &way->ring[way->first++ % PACKETS];
		/* a device that is down takes none, and the packet is lost */
		if (write(way->to, packet->bytes, packet->size) < 0)
			continue;
	}
}

int main(int count, char **words)
{
	if (count != 5)
		return 2;
	int devices[2] = {make_device(words[1]), make_device(words[2])};
	int64_t delay = atoll(words[3]) * 1000, rate = atoll(words[4]);
	struct way ways[2] = {{.from = devices[0], .to = devices[1]}, {.from = devices[1], .to = devices[0]}};
	for (int i = 0; i < 2; i++)
		if (!(ways[i].ring = malloc(PACKETS * sizeof *ways[i].ring)))
			fail("malloc");
	/* links do not wait for those who use them */
	struct sched_param priority = {.sched_priority = 1};
	if (sched_setscheduler(0, SCHED_FIFO, &priority))
		fail("sched_setscheduler");
	puts("ready");
	fflush(stdout);
	for (;;) {
		int64_t next = INT64_MAX;
		for (int i = 0; i < 2; i++)
			if (ways[i].first != ways[i].last && ways[i].ring[ways[i].first % PACKETS].due < next)
				next = ways[i].ring[ways[i].first % PACKETS].due;
		int64_t wait = next - now();
		wait = wait > 0 ? wait : 0;
		struct timespec time = {wait / SECOND, wait % SECOND};
		struct pollfd polls[2] = {{.fd = devices[0], .events = POLLIN}, {.fd = devices[1], .events = POLLIN}};
		if (ppoll(polls, 2, next == INT64_MAX ? NULL : &time, NULL) < 0)
			fail("ppoll");
		for (int i = 0; i < 2; i++) {
			if (polls[i].revents)
				take(&ways[i], delay, rate);
			give(&ways[i]);
		}
	}
}
