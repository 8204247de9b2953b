#!/usr/bin/env bash
# Runs every fuzz target for a while. go test fuzzes one target of one package at a time.
#
#   hack/fuzz.sh 30s
set -euo pipefail
cd "$(dirname "$0")/.."

found=0
while IFS=: read -r file target; do
	echo "== $(dirname "$file") $target"
	go test "$(dirname "$file")" -run '^$' -fuzz "^$target\$" -fuzztime "$1"
	found=$((found + 1))
done < <(grep -roE '^func Fuzz[A-Za-z0-9_]+' --include='*_test.go' . | sed 's/:func /:/' | sort)
echo "$found targets, $1 each"
((found > 0))
