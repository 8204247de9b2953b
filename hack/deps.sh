#!/usr/bin/env bash
# Installs what `make test` and `make demo` need beside Go, on Debian and Ubuntu, and only what is missing.
#
#   hack/deps.sh COMMAND...      for example: hack/deps.sh ip nft gcc
set -euo pipefail

PATH=$PATH:/usr/sbin:/sbin # su without - leaves them out

declare -A package=([ip]=iproute2 [nft]=nftables [gcc]="gcc libc6-dev" [modprobe]=kmod)

missing=() packages=()
for command in "$@"; do
	if ! command -v "$command" >/dev/null; then
		missing+=("$command")
		read -ra names <<<"${package[$command]}"
		packages+=("${names[@]}")
	fi
done

# Pods on a bridge are invisible to nftables' inet family without this module, and it cannot be loaded from the namespaces of the tests.
netfilter() {
	[[ -d /proc/sys/net/bridge ]] || modprobe br_netfilter 2>/dev/null ||
		echo "deps: cannot load the kernel module br_netfilter: whatever needs a bridge will fail; load it with: modprobe br_netfilter" >&2
}

if ((${#missing[@]} == 0)); then
	netfilter
	exit
fi
if ! command -v apt-get >/dev/null; then
	echo "deps: not found: ${missing[*]}. This is not Debian: install the packages that hold them (here: ${packages[*]}) and try again" >&2
	exit 1
fi
if ((EUID != 0)); then
	echo "deps: not found: ${missing[*]}. Run as root: apt-get install ${packages[*]}" >&2
	exit 1
fi
echo "deps: installing ${packages[*]}" >&2
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
apt-get install -qq -y --no-install-recommends "${packages[@]}" </dev/null >/dev/null
netfilter
