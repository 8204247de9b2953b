#!/usr/bin/env bash
# Runs every fuzz target for a while, or those whose name matches. go test fuzzes one target of one package at a time.
#
#   hack/fuzz.sh 30s
#   hack/fuzz.sh 10m 'FuzzRequest|FuzzCall'
#
# What go test finds it writes below the package's testdata/fuzz, from where plain go test runs it ever after.
set -euo pipefail
cd "$(dirname "$0")/.."

log=$(mktemp)
trap 'rm -f "$log"' EXIT

# unfinished FILE: the only failure is that the time was over while a worker was busy (go.dev/issue/75804, which Go 1.27 mends).
unfinished() {
	[[ $(grep -cE '^ *(--- FAIL|panic:)' "$1") == 1 ]] && grep -A1 -E '^--- FAIL' "$1" | grep -qxE ' *context deadline exceeded' &&
		! grep -q 'Failing input written' "$1"
}

found=0
failed=()
while IFS=: read -r file target; do
	echo "== $(dirname "$file") $target"
	for attempt in 1 2 3; do
		if go test "$(dirname "$file")" -run '^$' -fuzz "^$target\$" -fuzztime "$1" | tee "$log"; then
			break
		fi
		if ((attempt == 3)) || ! unfinished "$log"; then
			failed+=("$(dirname "$file") $target")
			break
		fi
		echo "nothing was found, but go test took its own deadline for a failure: once more"
	done
	found=$((found + 1))
done < <(grep -roE '^func Fuzz[A-Za-z0-9_]+' --include='*_test.go' . | sed 's/:func /:/' | grep -E ":(${2:-.*})\$" | sort)
echo "$found targets, $1 each"
if ((${#failed[@]} > 0)); then
	printf 'failed: %s\n' "${failed[@]}" >&2
	exit 1
fi
((found > 0))
