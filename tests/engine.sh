#!/bin/sh
# A container engine of the tests' own. It lives in private mount, network and process namespaces, so that it cannot
# disturb another engine, and its containers cannot be reached from outside. It ends when standard input ends, and leaves
# nothing behind.
#
#     unshare --mount --net --pid --fork --kill-child --mount-proc sh tests/engine.sh FOLDER [REGISTRY-CONFIGURATION]
#
# FAIRING_TESTS_CERTIFICATES names a folder as /etc/docker/certs.d: whom the engine trusts at which registry. With
# FAIRING_TESTS_TLS, a folder of ca.pem, cert.pem and key.pem, it also listens at tcp://127.0.0.1:2376, with mutual TLS.
#
# FOLDER is a new folder: `docker.sock` and `docker.log` are in it while the engine runs. With a configuration, a registry
# runs beside the engine, so that what is pushed to a registry with the same storage outside can be pulled inside.

set -u
# Anywhere else, what follows would be done to this machine.
[ $$ -eq 1 ] || { echo "start it with unshare, as its head says" >&2; exit 1; }
folder=$1
name=fairing-$(basename "$folder")

mount --make-rprivate / && mount -t tmpfs tmpfs /run || exit 1
mkdir /run/data /run/tmp
ip link set lo up
# An address that is not the machine's own loopback, where engines trust whoever answers.
ip address add 192.0.2.10/32 dev lo
if [ -n "${FAIRING_TESTS_CERTIFICATES:-}" ]; then
    mkdir /run/etc /run/etc-work
    mount -t overlay -o lowerdir=/etc,upperdir=/run/etc,workdir=/run/etc-work overlay /etc || exit 1
    mkdir -p /etc/docker
    cp -r "$FAIRING_TESTS_CERTIFICATES" /etc/docker/certs.d
fi
tls=
if [ -n "${FAIRING_TESTS_TLS:-}" ]; then
    tls="--host tcp://127.0.0.1:2376 --tlsverify --tlscacert $FAIRING_TESTS_TLS/ca.pem"
    tls="$tls --tlscert $FAIRING_TESTS_TLS/cert.pem --tlskey $FAIRING_TESTS_TLS/key.pem"
fi

if [ $# -gt 1 ]; then
    docker-registry serve "$2" </dev/null >"$folder/registry.log" 2>&1 &
fi
if [ "${FAIRING_TESTS_ENGINE:-docker}" = podman ]; then
    # runc, since crun refuses machines that have both versions of control groups.
    podman --runtime runc --root /run/data --runroot /run/run --storage-driver overlay --cgroup-manager cgroupfs \
        --events-backend file system service --time 0 "unix://$folder/docker.sock" </dev/null >"$folder/docker.log" 2>&1 &
    cat >/dev/null
    kill -9 -1
    wait
    rm -rf "$folder"
    # Empty ones, of containers that this engine called by its own name.
    find /sys/fs/cgroup -depth -type d -path "*/libpod_parent*" -exec rmdir {} + 2>/dev/null
    exit
fi
# The folder of the data is on the temporary file system above, and so are all images and containers.
# shellcheck disable=SC2086 # several arguments, and no blank in the names of temporary folders
DOCKER_TMPDIR=/run/tmp dockerd --host "unix://$folder/docker.sock" $tls --data-root /run/data --exec-root /run/exec \
    --pidfile /run/docker.pid --cgroup-parent "/$name" </dev/null >"$folder/docker.log" 2>&1 &

cat >/dev/null

# Everything but this shell, which is the first process of its namespace.
kill -9 -1
wait
rm -rf "$folder"
# Groups are no part of a namespace; they are empty now, or will be in a moment.
for _ in 1 2 3 4 5 6 7 8 9 10; do
    find /sys/fs/cgroup -depth -type d \( -path "*/$name" -o -path "*/$name/*" \) -exec rmdir {} + 2>/dev/null
    find /sys/fs/cgroup -type d -name "$name" 2>/dev/null | grep -q . || break
    sleep 0.1
done
