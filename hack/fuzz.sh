#!/usr/bin/env bash
# Runs every fuzz target for a while, or those whose name matches. go test fuzzes one target of one package at a time.
#
#   hack/fuzz.sh 30s
#   hack/fuzz.sh 10m 'FuzzRequest|FuzzCall'
#
# What go test finds it writes below the package's testdata/fuzz, from where plain go test runs it ever after.
set -euo pipefail
cd "$(dirname "$0")/.."

found=0
failed=()
while IFS=: read -r file target; do
	echo "== $(dirname "$file") $target"
	go test "$(dirname "$file")" -run '^$' -fuzz "^$target\$" -fuzztime "$1" || failed+=("$(dirname "$file") $target")
	found=$((found + 1))
done < <(grep -roE '^func Fuzz[A-Za-z0-9_]+' --include='*_test.go' . | sed 's/:func /:/' | grep -E ":(${2:-.*})\$" | sort)
echo "$found targets, $1 each"
if ((${#failed[@]} > 0)); then
	printf 'failed: %s\n' "${failed[@]}" >&2
	exit 1
fi
((found > 0))
