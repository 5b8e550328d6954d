# Keys, certificates, and the users that they make. Sourced by `inside.sh` and `control`; needs TEST_CLUSTER, the state folder,
# and `server`, the API server's address. All paths are relative to the state folder.
# shellcheck shell=bash
# shellcheck disable=SC2154 # set by who sources it

# What openssl puts into certificates; rustls refuses those without any extension.
certificate_rules() {
    cat >pki/openssl.cnf <<'CONF'
[req]
distinguished_name = name
x509_extensions = leaf
[name]
[leaf]
basicConstraints = critical, CA:FALSE
keyUsage = critical, digitalSignature, keyEncipherment
extendedKeyUsage = serverAuth, clientAuth
[authority]
basicConstraints = critical, CA:TRUE
keyUsage = critical, keyCertSign, digitalSignature
CONF
}

# certificate NAME SUBJECT [EXTENSION...]: a key and a certificate that the cluster's authority has signed.
certificate() {
    local name=$1 subject=$2 extension extensions=()
    shift 2
    for extension in "$@"; do
        extensions+=(-addext "$extension")
    done
    openssl req -x509 -config pki/openssl.cnf -CA pki/ca.crt -CAkey pki/ca.key -newkey ec -pkeyopt ec_paramgen_curve:P-256 \
        -noenc -days 365 -keyout "pki/$name.key" -out "pki/$name.crt" -subj "$subject" "${extensions[@]}"
}

# user NAME SUBJECT: a kubeconfig with a certificate.
user() {
    certificate "$1" "$2" && kubeconfig_of "$1" >"users/$1"
}

kubeconfig_of() {
    cat <<YAML
apiVersion: v1
kind: Config
clusters:
  - name: test
    cluster: {server: "$server", certificate-authority-data: $(base64 -w0 pki/ca.crt)}
users:
  - name: $1
    user: {client-certificate-data: $(base64 -w0 "pki/$1.crt"), client-key-data: $(base64 -w0 "pki/$1.key")}
contexts:
  - name: $1
    context: {cluster: test, user: $1}
current-context: $1
YAML
}

# webhook OPERATOR SERVICE.NAMESPACE AUTHORITY: what the operator would mint for its webhooks.
webhook() {
    local folder=pki/webhook-$1
    mkdir -p "$folder"
    # It parses its authority's key as one of RSA in the old form.
    openssl genrsa -traditional -out "$folder/ca.key" 2048 &&
        openssl req -x509 -config pki/openssl.cnf -extensions authority -key "$folder/ca.key" -days 3650 \
            -out "$folder/ca.crt" -subj "/O=$3/CN=$3" -addext "subjectAltName=DNS:$3" &&
        openssl req -x509 -config pki/openssl.cnf -CA "$folder/ca.crt" -CAkey "$folder/ca.key" \
            -newkey ec -pkeyopt ec_paramgen_curve:P-256 -noenc -days 3650 \
            -keyout "$folder/tls.key" -out "$folder/tls.crt" -subj "/CN=$2.svc" -addext "subjectAltName=DNS:$2.svc"
}

# operator_secrets OPERATOR: the user that it is in the cluster, and its webhooks' certificates.
operator_secrets() (
    cd "$TEST_CLUSTER" || exit
    [[ ! -e users/$1 ]] || exit 0
    case $1 in
    # Their own service accounts, and so the rights of their own roles.
    jobset)
        webhook jobset jobset-webhook-service.jobset-system jobset-ca &&
            user jobset "/O=system:serviceaccounts/CN=system:serviceaccount:jobset-system:jobset-controller-manager"
        ;;
    tfjob)
        webhook tfjob training-operator.kubeflow training-operator-ca &&
            user tfjob "/O=system:serviceaccounts/CN=system:serviceaccount:kubeflow:training-operator"
        ;;
    kwok) user kwok /O=system:masters/CN=kwok ;;
    esac
)
