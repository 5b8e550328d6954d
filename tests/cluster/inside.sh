#!/usr/bin/env bash
# The first process of the cluster's namespaces: starts the parts, then the command, and ends with the command's status.
# `run` starts it: inside.sh STATE-FOLDER CONTROL-GROUP OPERATORS FILES [COMMAND...]
#
# When it ends, for whatever reason, the kernel ends every other process in here, and with the last of them go the mounts,
# the interfaces and the rules. Nothing has to be stopped.

# shellcheck disable=SC2317 # some functions are called by `await`

set -uo pipefail
# Anywhere else, what follows would be done to this machine.
[[ $$ == 1 ]] || { echo "run starts it" >&2; exit 1; }
parts_folder=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export TEST_CLUSTER=$1
group=$2
read -ra operators <<<"$3"
files=$4
shift 4
# shellcheck source=parts.sh
source "$parts_folder/parts.sh"
# shellcheck source=certificates.sh
source "$parts_folder/certificates.sh"

began=${EPOCHREALTIME/[.,]/}
trap 'exit 130' INT
trap 'exit 143' TERM

fail() {
    # The folder goes with this process; its logs would explain.
    local kept="${XDG_CACHE_HOME:-$HOME/.cache}/fairing/cluster/failed"
    rm -rf "$kept"
    mkdir -p "$kept" && cp "$TEST_CLUSTER"/logs/* "$kept" 2>/dev/null
    echo "the cluster could not be started: $1; all logs of this start: $kept" >&2
    exit 1
}

# The state is in memory, and seen in here only.
private_folders() {
    mount --make-rprivate / &&
        mount -t tmpfs -o mode=755 tmpfs "$TEST_CLUSTER" &&
        mkdir "$TEST_CLUSTER"/{bin,logs,pki,users} &&
        chmod 700 "$TEST_CLUSTER/pki" "$TEST_CLUSTER/users" || return
    local name path
    # Bound, since the parts may not see the folder that they are in.
    while read -r name path; do
        touch "$TEST_CLUSTER/bin/$name" && mount --bind "$path" "$TEST_CLUSTER/bin/$name" || return
    done <<<"$files"
    # kubelet sets these of the kernel to what is in the files, for the whole machine; it leaves alone what is right already.
    # A process has to stay in the namespace, since Linux 6.18 refuses at random to bind one to a file.
    # shellcheck disable=SC2016 # for the inner shell
    unshare --mount bash -c '
        mount -t tmpfs -o mode=755 tmpfs /run && mkdir -p /run/cluster /run/netns /run/lock &&
        mount --rbind "$1" /run/cluster &&
        mount -t tmpfs -o mode=755 tmpfs /var/lib && mount -t tmpfs -o mode=755 tmpfs /var/log &&
        mount -t tmpfs tmpfs /tmp && mkdir /run/kernel || exit
        while read -r setting value; do
            echo "$value" >"/run/kernel/${setting//\//.}" || exit
            [[ ! -e /proc/sys/$setting ]] || mount --bind "/run/kernel/${setting//\//.}" "/proc/sys/$setting" || exit
        done <<SETTINGS
vm/overcommit_memory 1
vm/panic_on_oom 0
kernel/panic 10
kernel/panic_on_oops 1
kernel/keys/root_maxkeys 1000000
kernel/keys/root_maxbytes 25000000
SETTINGS
        echo $$ >/run/cluster/mounts.new && mv /run/cluster/mounts.new /run/cluster/mounts && exec setsid sleep infinity
    ' mounts "$TEST_CLUSTER" </dev/null 9>&- &
    until [[ -e $TEST_CLUSTER/mounts ]]; do
        kill -0 $! 2>/dev/null || return
        sleep 0.01
    done
}

private_network() {
    ip link set lo up &&
        ip link add cluster0 type bridge &&
        ip address add "$node_address/24" dev cluster0 &&
        ip link set cluster0 up &&
        ip route add default dev cluster0 &&
        # Else packets between two pods would pass no rule, neither a policy's nor a service's.
        echo 1 >/proc/sys/net/bridge/bridge-nf-call-iptables
}

# A root of the pods' control groups by a name of this cluster's own. Groups are no part of a namespace: `run` removes them.
control_groups() {
    local hierarchy controllers
    if [[ -e /sys/fs/cgroup/cgroup.controllers ]]; then
        mkdir "/sys/fs/cgroup/$group"
        return
    fi
    while read -r hierarchy; do
        # Version 1 lists one controller twice if two names lead to one hierarchy.
        mkdir -p "$hierarchy/$group" || return
        for controllers in cpuset.cpus cpuset.mems; do
            [[ ! -e $hierarchy/$controllers ]] || cat "$hierarchy/$controllers" >"$hierarchy/$group/$controllers" || return
        done
    done < <(awk '$3 == "cgroup" { print $2 }' /proc/mounts)
}

secrets() (
    cd "$TEST_CLUSTER" || exit
    certificate_rules
    openssl req -x509 -config pki/openssl.cnf -extensions authority -newkey ec -pkeyopt ec_paramgen_curve:P-256 -noenc \
        -days 3650 -keyout pki/ca.key -out pki/ca.crt -subj /CN=test-cluster &&
        openssl ecparam -name prime256v1 -genkey -noout -out pki/service-accounts.key &&
        openssl ec -in pki/service-accounts.key -pubout -out pki/service-accounts.pub || exit
    certificate kube-apiserver /CN=kube-apiserver \
        "subjectAltName=IP:127.0.0.1,IP:10.96.0.1,IP:$node_address,DNS:localhost,DNS:kubernetes.default.svc" &&
        certificate kubelet-client /O=system:masters/CN=kube-apiserver-kubelet-client &&
        certificate kubelet-server /CN=node-1 "subjectAltName=DNS:node-1,IP:$node_address,IP:127.0.0.1" &&
        user admin /O=system:masters/CN=admin &&
        user kube-controller-manager /CN=system:kube-controller-manager &&
        user kube-scheduler /CN=system:kube-scheduler &&
        user kubelet /O=system:nodes/CN=system:node:node-1 &&
        user kube-proxy /CN=system:kube-proxy &&
        user coredns /O=system:masters/CN=coredns &&
        user kube-router /O=system:masters/CN=kube-router &&
        cp users/admin kubeconfig && chmod 600 kubeconfig
)

configurations() (
    cd "$TEST_CLUSTER" || exit
    cat >audit.yaml <<'YAML'
# Who asked what, once per request.
apiVersion: audit.k8s.io/v1
kind: Policy
omitStages: [RequestReceived]
rules:
  - level: Metadata
YAML
    cat >registry.yaml <<YAML
version: 0.1
log: {level: warn}
storage:
  filesystem: {rootdirectory: /run/cluster/registry}
  delete: {enabled: true}
http: {addr: "$registry"}
YAML
    cat >containerd.toml <<'TOML'
version = 2
# Not there on most machines, and complained about.
disabled_plugins = ["io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.aufs", "io.containerd.snapshotter.v1.zfs", "io.containerd.snapshotter.v1.devmapper"]
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "fairing.test/pause:1"
  # In some containers not even root may lower its score, and a pod would not start.
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "/run/cluster/cni"
TOML
    mkdir cni
    cat >cni/10-cluster.conflist <<'JSON'
{"cniVersion": "1.0.0", "name": "cluster", "plugins": [
    {"type": "bridge", "bridge": "cluster0", "isGateway": true, "hairpinMode": true,
     "ipam": {"type": "host-local", "ranges": [[{"subnet": "10.244.0.0/24"}]], "routes": [{"dst": "0.0.0.0/0"}]}},
    {"type": "portmap", "capabilities": {"portMappings": true}}]}
JSON
    # Names of other networks are none of the pods'.
    echo "nameserver $node_address" >resolv.conf
    cat >kubelet.yaml <<YAML
apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
authentication:
  anonymous: {enabled: false}
  webhook: {enabled: true}
  x509: {clientCAFile: /run/cluster/pki/ca.crt}
authorization: {mode: Webhook}
tlsCertFile: /run/cluster/pki/kubelet-server.crt
tlsPrivateKeyFile: /run/cluster/pki/kubelet-server.key
address: $node_address
readOnlyPort: 0
containerRuntimeEndpoint: unix:///run/containerd/containerd.sock
volumePluginDir: /run/cluster/volume-plugins
resolvConf: /run/cluster/resolv.conf
clusterDNS: [$node_address]
clusterDomain: cluster.local
cgroupDriver: cgroupfs
cgroupRoot: /$group
failCgroupV1: false
failSwapOn: false
# Starts are measured, and the registry is a local one.
serializeImagePulls: false
registryPullQPS: 0
eventRecordQPS: 0
maxPods: 110
# A full disk of a developer's is no reason for a test to fail.
imageGCHighThresholdPercent: 100
imageGCLowThresholdPercent: 99
evictionHard: {memory.available: 50Mi, nodefs.available: 1%, imagefs.available: 1%}
YAML
    cat >Corefile <<CONF
cluster.local:53 {
    bind $node_address
    errors
    ready 127.0.0.1:8181
    kubernetes {
        kubeconfig /run/cluster/users/coredns
        # A peer that has just started is found at once.
        ttl 1
    }
}
# There is no other network, and saying so is faster than no answer.
.:53 {
    bind $node_address
    template ANY ANY {
        rcode NXDOMAIN
    }
}
CONF
    cat >jobset-config.yaml <<'YAML'
apiVersion: config.jobset.x-k8s.io/v1alpha1
kind: Configuration
webhook: {port: 9443}
health: {healthProbeBindAddress: "127.0.0.1:8081"}
metrics: {bindAddress: "127.0.0.1:8443"}
leaderElection: {leaderElect: false}
YAML
    printf '#!/bin/sh\nTEST_CLUSTER=%q exec %q "$@"\n' "$TEST_CLUSTER" "$parts_folder/control" >control
    chmod +x control
)

import_pause_image() {
    among_parts ctr --namespace k8s.io images import /run/cluster/bin/pause.tar
}

node_is_ready() {
    [[ $(as_admin get node node-1 --output='jsonpath={.status.conditions[?(@.type=="Ready")].status}' 2>/dev/null) == True ]]
}

account_is_there() {
    as_admin get serviceaccount default --namespace default >/dev/null 2>&1
}

start_cluster() {
    private_folders || fail "no private folders"
    private_network || fail "no private network"
    control_groups || fail "no control groups"
    configurations || fail "no configurations"
    launch etcd
    launch containerd
    launch registry
    secrets >"$TEST_CLUSTER/logs/secrets.log" 2>&1 || fail "no certificates"
    launch kube-apiserver
    await_service containerd || fail containerd
    import_pause_image >"$TEST_CLUSTER/logs/images.log" 2>&1 || fail "the pause image was refused"
    await_service kube-apiserver || fail kube-apiserver
    local part
    for part in kubelet kube-controller-manager kube-scheduler coredns kube-proxy; do
        launch "$part"
    done
    await kubelet "node-1 is ready" node_is_ready || fail kubelet
    # It ends at once if its node is not there.
    launch kube-router
    await kube-controller-manager "there is a service account" account_is_there || fail kube-controller-manager
    for part in coredns kube-proxy kube-router registry; do
        await_service "$part" || fail "$part"
    done
}

start_operators() {
    local part
    for part in "${operators[@]}"; do
        prepare "$part" || fail "$part"
        launch "$part"
    done
    for part in "${operators[@]}"; do
        await_service "$part" || fail "$part"
    done
}

start_cluster
with=""
if ((${#operators[@]} > 0)); then
    start_operators
    with=", with ${operators[*]}"
fi
version=$("$TEST_CLUSTER/bin/kube-apiserver" --version)
took=$((${EPOCHREALTIME/[.,]/} - began))
printf 'cluster ready in %d.%d s: %s, registry %s%s\n' $((took / 1000000)) $((took / 100000 % 10)) "$version" "$registry" "$with" >&2

export KUBECONFIG=$TEST_CLUSTER/kubeconfig
export FAIRING_TARGET=kubernetes
export FAIRING_REPOSITORY=$registry/fairing
# There is no network in here.
export CARGO_NET_OFFLINE=true
export PATH=$PATH:$TEST_CLUSTER/bin

if (($# == 0)); then
    cat >&2 <<TEXT

A shell in the cluster; it ends with the shell. kubectl is there and is an administrator. Set are:
    KUBECONFIG=$KUBECONFIG
    FAIRING_TARGET=$FAIRING_TARGET
    FAIRING_REPOSITORY=$FAIRING_REPOSITORY
    TEST_CLUSTER=$TEST_CLUSTER
Logs are in $TEST_CLUSTER/logs; $TEST_CLUSTER/control --help says how to stop and start parts.
There is no network but the cluster's: what is to be run must have been fetched before.

TEXT
    set -- bash
fi

# The command gets the terminal and its Ctrl-C; this shell waits for it, whatever comes.
noted=""
trap 'noted=yes' INT
trap 'noted=yes; kill -TERM "$command_id" 2>/dev/null' TERM
env --default-signal=INT,QUIT "$@" <&0 9>&- &
command_id=$!
while :; do
    wait "$command_id"
    status=$?
    # A signal that is caught ends the wait, but not the command.
    [[ -n $noted ]] || break
    noted=""
done
exit "$status"
