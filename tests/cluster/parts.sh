# What the parts of the cluster are started with, and how one sees that they serve. Sourced by `inside` and `control`; needs
# TEST_CLUSTER, the state folder, and `parts_folder`, the one of this file.
#
# The parts run in a mount namespace of their own, in which the state folder is /run/cluster and all folders that they write
# to by themselves are temporary.
# shellcheck shell=bash
# shellcheck disable=SC2034,SC2054,SC2154 # used by who sources it; commas belong to arguments; set by who sources it

plain_parts=(etcd kube-apiserver kube-controller-manager kube-scheduler containerd kubelet kube-proxy coredns kube-router registry)
all_parts=("${plain_parts[@]}" jobset tfjob kwok)

# The bridge's address: the node's, and that of every part that pods talk to.
node_address=10.244.0.1
server=https://127.0.0.1:6443
registry=127.0.0.1:5000
# A part that is not ready by then never will be, unless the machine is very busy.
patience=60

# command_of PART: sets the array `command`, with paths as the part sees them.
command_of() {
    local here=/run/cluster
    local pki=$here/pki bin=$here/bin users=$here/users
    case $1 in
    etcd)
        command=(etcd --data-dir "$here/etcd" --unsafe-no-fsync
            --listen-client-urls http://127.0.0.1:2379 --advertise-client-urls http://127.0.0.1:2379
            --listen-peer-urls http://127.0.0.1:2380)
        ;;
    kube-apiserver)
        command=("$bin/kube-apiserver" --etcd-servers=http://127.0.0.1:2379
            --bind-address=0.0.0.0 --advertise-address="$node_address" --secure-port=6443
            --tls-cert-file="$pki/kube-apiserver.crt" --tls-private-key-file="$pki/kube-apiserver.key"
            --client-ca-file="$pki/ca.crt"
            --service-account-issuer=https://kubernetes.default.svc
            --service-account-key-file="$pki/service-accounts.pub" --service-account-signing-key-file="$pki/service-accounts.key"
            --service-cluster-ip-range=10.96.0.0/16
            --authorization-mode=Node,RBAC --enable-admission-plugins=NodeRestriction
            --kubelet-client-certificate="$pki/kubelet-client.crt" --kubelet-client-key="$pki/kubelet-client.key"
            --kubelet-preferred-address-types=InternalIP
            --allow-privileged=true
            # Lists as watches need a newer etcd than Debian 12 has. Said, clients fall back at once; else a watch from version
            # 0, as kwok has them, is taken for one and ends as soon as it begins.
            --feature-gates=WatchList=false
            # Else it would wait for watches that nobody ends.
            --shutdown-watch-termination-grace-period=1s
            # Webhooks are called by the endpoints of their service.
            --enable-aggregator-routing=true
            --audit-policy-file="$here/audit.yaml" --audit-log-path="$here/audit.log" --audit-log-maxsize=4000)
        ;;
    kube-controller-manager)
        command=("$bin/kube-controller-manager" --kubeconfig="$users/kube-controller-manager"
            --bind-address=127.0.0.1 --leader-elect=false --use-service-account-credentials=true
            --service-account-private-key-file="$pki/service-accounts.key" --root-ca-file="$pki/ca.crt"
            --cluster-cidr=10.244.0.0/16 --allocate-node-cidrs=true
            # It asks a hundred things when it starts, and its own limit would hold them back for four seconds.
            --kube-api-qps=200 --kube-api-burst=400)
        ;;
    kube-scheduler)
        command=("$bin/kube-scheduler" --kubeconfig="$users/kube-scheduler" --bind-address=127.0.0.1 --leader-elect=false)
        ;;
    containerd)
        command=(containerd --config "$here/containerd.toml")
        ;;
    kubelet)
        command=("$bin/kubelet" --config="$here/kubelet.yaml" --kubeconfig="$users/kubelet"
            --hostname-override=node-1 --node-ip="$node_address")
        ;;
    kube-proxy)
        command=("$bin/kube-proxy" --kubeconfig="$users/kube-proxy" --hostname-override=node-1
            --proxy-mode=iptables --cluster-cidr=10.244.0.0/16
            # The tables of connections are the whole machine's.
            --conntrack-max-per-core=0 --conntrack-min=0
            --conntrack-tcp-timeout-established=0 --conntrack-tcp-timeout-close-wait=0)
        ;;
    coredns)
        command=("$bin/coredns" -conf "$here/Corefile")
        ;;
    kube-router)
        command=("$bin/kube-router" --kubeconfig="$users/kube-router" --hostname-override=node-1
            --run-firewall=true --run-router=false --run-service-proxy=false --run-loadbalancer=false
            --service-cluster-ip-range=10.96.0.0/16)
        ;;
    registry)
        command=(docker-registry serve "$here/registry.yaml")
        ;;
    jobset)
        command=(operator "$bin/jobset" --config="$here/jobset-config.yaml")
        ;;
    tfjob)
        command=(operator env MY_POD_NAMESPACE=kubeflow "$bin/tfjob" --enable-scheme=tfjob
            --webhook-server-port=9444 --health-probe-bind-address=127.0.0.1:8082 --metrics-bind-address=0)
        ;;
    kwok)
        # It asks for lists as watches, which need a newer etcd than Debian 12 has.
        command=(env KUBE_FEATURE_WatchListClient=false "$bin/kwok" --kubeconfig="$users/kwok" --config="$bin/kwok.yaml" --manage-nodes-with-annotation-selector=kwok.x-k8s.io/node=fake
            --node-lease-duration-seconds=40 --server-address=0.0.0.0:10247
            # The API server asks it for logs, as it asks kubelet.
            --node-ip="$node_address" --node-port=10247
            --tls-cert-file="$pki/kubelet-server.crt" --tls-private-key-file="$pki/kubelet-server.key")
        ;;
    *)
        echo "unknown part: $1 (known: ${all_parts[*]})" >&2
        return 2
        ;;
    esac
    # Both operators look for their certificate in the same folder.
    if [[ ${command[0]} == operator ]]; then
        # shellcheck disable=SC2016 # for the inner shell
        command=(unshare --mount bash -c '
            mount -t tmpfs tmpfs /tmp && mkdir -p /tmp/k8s-webhook-server &&
            ln -s /run/cluster/pki/webhook-$1 /tmp/k8s-webhook-server/serving-certs && shift && exec "$@"
        ' operator "$1" env KUBECONFIG="$users/$1" "${command[@]:1}")
    fi
}

log_of() {
    echo "$TEST_CLUSTER/logs/$1.log"
}

is_alive() {
    local pid
    pid=$(cat "$TEST_CLUSTER/$1.pid" 2>/dev/null) && kill -0 "$pid" 2>/dev/null
}

# among_parts COMMAND...: runs it with the parts' view of the file system.
among_parts() {
    nsenter --target "$(cat "$TEST_CLUSTER/mounts")" --mount "$@"
}

# Starts a part and returns at once.
launch() {
    local command
    command_of "$1" || return
    # In a session of its own, so that Ctrl-C is the command's alone; without the variables of the caller, such as a proxy's;
    # with a process id that is known before it runs.
    # shellcheck disable=SC2016 # for the inner shell
    env -i PATH="/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin" HOME=/root \
        setsid --fork nsenter --target "$(cat "$TEST_CLUSTER/mounts")" --mount bash -c 'echo $$ >"/run/cluster/$1.pid" && shift && cd / && exec "$@"' \
        part "$1" "${command[@]}" </dev/null >>"$(log_of "$1")" 2>&1 9>&-
}

# http_ok PORT PATH: whether a plain HTTP server of this machine answers with 200.
http_ok() {
    local status
    # shellcheck disable=SC2016 # for the inner shell
    status=$(timeout 2 bash -c '
        exec 3<>"/dev/tcp/127.0.0.1/$1" && printf "GET %s HTTP/1.0\r\nHost: localhost\r\n\r\n" "$2" >&3 && head -n 1 <&3
    ' http "$1" "$2" 2>/dev/null)
    [[ $status == *" 200 "* ]]
}

# https_ok PORT PATH: the same, of a server whose certificate is made anew at each start and known to nobody.
https_ok() {
    local status
    status=$(printf 'GET %s HTTP/1.0\r\nHost: localhost\r\n\r\n' "$2" |
        timeout 2 openssl s_client -quiet -connect "127.0.0.1:$1" 2>/dev/null | head -n 1)
    [[ $status == *" 200 "* ]]
}

as_admin() {
    "$TEST_CLUSTER/bin/kubectl" --kubeconfig "$TEST_CLUSTER/kubeconfig" --request-timeout=5s "$@"
}

serves() {
    case $1 in
    etcd) http_ok 2379 /health ;;
    kube-apiserver) as_admin get --raw /readyz >/dev/null 2>&1 ;;
    kube-controller-manager) https_ok 10257 /healthz ;;
    kube-scheduler) https_ok 10259 /healthz ;;
    containerd) among_parts test -S /run/containerd/containerd.sock ;;
    kubelet) http_ok 10248 /healthz ;;
    kube-proxy) http_ok 10256 /healthz ;;
    coredns) http_ok 8181 /ready ;;
    kube-router) http_ok 20244 /healthz ;;
    registry) http_ok "${registry#*:}" /v2/ ;;
    # A dry run asks the webhooks too.
    jobset) http_ok 8081 /readyz && as_admin create --dry-run=server -f - >/dev/null 2>&1 <"$parts_folder/objects/try-jobset.yaml" ;;
    tfjob) http_ok 8082 /readyz && as_admin create --dry-run=server -f - >/dev/null 2>&1 <"$parts_folder/objects/try-tfjob.yaml" ;;
    kwok) http_ok 10247 /healthz ;;
    esac
}

# await PART WHAT COMMAND...: until the command succeeds. A part that has died, or time that has passed, is a failure.
await() {
    local part=$1 what=$2 began=$SECONDS
    shift 2
    until "$@"; do
        # Its process id is written a moment after its start.
        if ! is_alive "$part" && ((SECONDS - began >= 2)); then
            complain "$part" "$part has ended before $what"
            return 1
        fi
        if ((SECONDS - began >= patience)); then
            complain "$part" "$part: not so after $patience s: $what"
            return 1
        fi
        sleep 0.05
    done
}

complain() {
    {
        echo "$2; the last lines of $(log_of "$1"):"
        tail -n 12 "$(log_of "$1")" | sed 's/^/    /'
    } >&2
}

await_service() {
    await "$1" "it serves" serves "$1"
}

# What an operator needs before it starts; nothing for other parts.
prepare() {
    local namespace secret
    case $1 in
    jobset) namespace=jobset-system secret=jobset-webhook-server-cert ;;
    tfjob) namespace=kubeflow secret=training-operator-webhook-cert ;;
    kwok) ;;
    *) return 0 ;;
    esac
    if [[ ! -e $TEST_CLUSTER/bin/$1 ]]; then
        echo "$1 was not there when this cluster was started: tests/cluster/build $1" >&2
        return 1
    fi
    operator_secrets "$1" >>"$(log_of "$1")" 2>&1 || {
        complain "$1" "no certificates for $1"
        return 1
    }
    if [[ $1 == kwok ]]; then
        echo "2026-01-01T00:00:00Z stdout F no program runs in a fake pod" >"$TEST_CLUSTER/fake.log"
        return
    fi
    {
        as_admin apply --server-side --force-conflicts -f "$TEST_CLUSTER/bin/$1.yaml" &&
            # Certificates as the operator would mint them itself; it checks them and puts their authority into the webhooks.
            as_admin create secret generic "$secret" --namespace "$namespace" --dry-run=client --output=yaml \
                --from-file="$TEST_CLUSTER/pki/webhook-$1" | as_admin apply --server-side --force-conflicts -f -
    } >>"$(log_of "$1")" 2>&1 || {
        complain "$1" "the objects of $1 were refused"
        return 1
    }
}
