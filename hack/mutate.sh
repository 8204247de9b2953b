#!/usr/bin/env bash
# Mutation testing: gremlins changes one token of pkg/policy or pkg/ruleset at a time, in a copy of the tree. The package's unit
# tests must notice; what they let live is put before the random tests of tests/oracle/memory. Ends non-zero when a mutant lives that
# docs/testing.md does not explain.
#
#   hack/mutate.sh [--unit] [policy] [ruleset]      --unit: without the random tests
set -euo pipefail
cd "$(dirname "$0")/.."

random=yes
if [[ ${1-} == --unit ]]; then
	random=
	shift
fi
if (($# == 0)); then set -- policy ruleset; fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export TMPDIR=$work GO_REAL TREE=$work/tree RANDOM_TESTS=$random TALLY=$work/tally
GO_REAL=$(command -v go)
mkdir "$TREE" "$work/path"
tar -c --exclude=./bin --exclude=./.git . | tar -x -C "$TREE"
go build -C tests/oracle/tools -o "$work/" tool

# This stands in for go where gremlins calls it.
# - Coverage: gremlins does not try what no test runs. Go's profile leaves out constants and the conditions of a switch, so
#   every line of a file that has any is reported as covered.
# - Tests: gremlins takes status 1 for a mutant that was killed and 2 for one that does not compile; `go test` exits 1 for both.
cat >"$work/path/go" <<'EOF2'
#!/usr/bin/env bash
case "$1 ${3-}" in
"test -coverprofile")
	"$GO_REAL" "$@" || exit
	profile=$(sed -nE 's/^(.*\.go):.*/\1:1.1,99999.1 1 1/p' "$4" | sort -u)
	printf 'mode: set\n%s\n' "$profile" >"$4"
	exit
	;;
"test "*) ;;
*) exec "$GO_REAL" "$@" ;;
esac
if ! out=$("$GO_REAL" test -vet=off "${@:2}" -args -rapid.nofailfile -rapid.shrinktime=1ms 2>&1); then
	if [[ $out == *"[build failed]"* ]]; then exit 2; fi
	echo "unit tests" >>"$TALLY"
	exit 1
fi
[[ $RANDOM_TESTS ]] || exit 0
cd "${PWD%/pkg/*}/tests/oracle" || exit 2
if ! "$GO_REAL" test -vet=off -timeout 5m -run '^Test(Verdicts|Sequences)$' ./memory -args -rapid.seed=1 -rapid.shrinktime=1ms -verdicts=300000 -steps=2000; then
	echo "random tests" >>"$TALLY"
	exit 1
fi
EOF2
chmod +x "$work/path/go"

lived=0
for package; do
	echo "== pkg/$package"
	: >"$TALLY"
	(cd "$TREE" && PATH=$work/path:$PATH nice "$work/gremlins" unleash --workers 2 --timeout-coefficient 60 \
		--invert-assignments --invert-bitwise --invert-bwassign --invert-logical --invert-loopctrl --remove-self-assignments "./pkg/$package") >"$work/log"
	grep -A9 '^Mutation testing completed' "$work/log"
	sort "$TALLY" | uniq -c | sed -E 's/^ *([0-9]+) (.*)/Killed by the \2: \1/'
	while read -r kind position; do
		IFS=: read -r file line _ <<<"$position"
		if ! grep -qF "\`$position\` $kind" docs/testing.md; then
			echo "lived and is not explained in docs/testing.md: pkg/$package: \`$position\` $kind: $(sed -n "${line}s/^\t*//p" "$TREE/pkg/$package/$file")"
			lived=$((lived + 1))
		fi
	done < <(sed -nE 's/^ *(LIVED|NOT COVERED|TIMED OUT) ([A-Z_]+) at ([^ ]+)$/\2 \3/p' "$work/log")
done
((lived == 0))
