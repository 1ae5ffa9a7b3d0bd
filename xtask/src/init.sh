#!/bin/busybox sh
# Init of a test guest: mounts the usual file systems, runs /command (or a shell if there is none) and writes its exit
# status to the second serial port. If nothing is written there, the guest crashed. tracefs is not mounted, as in most
# containers.

export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/tmp OBSERVER_TEST_EMULATED=1
# Does not overwrite real programs with applets of the same name, but prints an error for each.
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
