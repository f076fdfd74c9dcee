#!/bin/sh
# The first process of a guest: makes it a machine on which tests can run, runs them, and switches it off.
# Kernel messages go to the first serial port, everything else to the second, for kernels/report.rs to read.
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root
# Emulated, everything takes ten times as long.
export RUST_BACKTRACE=0 FAIRLEAD_FEWER=20
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mkdir -p /dev/pts /dev/shm
mount -t devpts pts /dev/pts
# Nothing is mounted there: what is tested may have been built below it.
chmod 1777 /tmp
mount -t tmpfs run /run
mount -t bpf bpf /sys/fs/bpf
mount -t cgroup2 cgroup2 /sys/fs/cgroup
stty -F /dev/ttyS1 raw -echo
exec </dev/null >/dev/ttyS1 2>&1

seconds() { cut -d ' ' -f 1 /proc/uptime; }

while read -r module; do
    insmod "$module" || echo "# module $module"
done </modules/list
ifconfig lo up
echo "# up $(seconds) $(uname -r)"
while read -r name command; do
    echo
    echo "# begin $(seconds) $name"
    sh -c "$command"
    status=$?
    echo
    echo "# end $(seconds) $name $status"
done </suites
echo "# done $(seconds)"
poweroff -f
