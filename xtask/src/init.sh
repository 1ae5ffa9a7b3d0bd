#!/bin/busybox sh
# The whole user space of a test guest: mounts what a machine has, runs /command (or a shell where there is
# none) and reports its exit status on the second serial port. An empty report means a crash on the way.
# tracefs stays unmounted, as it is in most containers.

export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/tmp OBSERVER_TEST_EMULATED=1
# Never replaces a real program by an applet of its name, but complains about each.
/bin/busybox --install -s 2>/dev/null

mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mkdir -p /dev/pts /dev/shm
mount -t devpts devpts /dev/pts
mount -t tmpfs tmpfs /dev/shm
mount -t cgroup2 cgroup2 /sys/fs/cgroup
ln -s /proc/self/fd /dev/fd

while read -r module; do insmod "$module"; done </modules
ip link set lo up
hostname guest
ulimit -n 65536

if [ -e /command ]; then
    stty -onlcr
    sh /command </dev/null
else
    setsid cttyhack sh
fi
status=$?
stty -F /dev/ttyS1 raw
if [ -e /handed-out ] && read -r file </handed-out && [ -e "$file" ]; then
    cat "$file" >/dev/ttyS1
    echo >/dev/ttyS1
fi
echo $status >/dev/ttyS1
poweroff -f
