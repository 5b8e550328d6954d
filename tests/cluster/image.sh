#!/usr/bin/env bash
# Packs one static program as an image without anything else: image.sh NAME PROGRAM ARCHIVE

set -euo pipefail
name=$1 program=$2 archive=$3
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

entry=/$(basename "$program")
install -D -m 755 "$program" "$work/root$entry"
# No owner and no time of this machine in it.
pack=(tar --owner=0 --group=0 --numeric-owner --mtime=@0 --sort=name --format=ustar)
"${pack[@]}" -C "$work/root" -cf "$work/layer.tar" .
layer=$(sha256sum "$work/layer.tar")
case $(uname -m) in
aarch64) architecture=arm64 ;;
*) architecture=amd64 ;;
esac
cat >"$work/config.json" <<JSON
{"architecture":"$architecture","os":"linux","config":{"Entrypoint":["$entry"]},
 "rootfs":{"type":"layers","diff_ids":["sha256:${layer%% *}"]}}
JSON
cat >"$work/manifest.json" <<JSON
[{"Config":"config.json","RepoTags":["$name"],"Layers":["layer.tar"]}]
JSON
"${pack[@]}" -C "$work" -cf "$archive" manifest.json config.json layer.tar
