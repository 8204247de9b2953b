package main

import (
	"bytes"
	"regexp"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestRun(t *testing.T) {
	t.Parallel()
	const okay = `{"Action":"run","Package":"m/a","Test":"TestA"}
{"Action":"output","Package":"m/a","Test":"TestA","Output":"chatter\n"}
{"Action":"attr","Package":"m/a","Test":"TestA","Key":"seed","Value":"7"}
{"Action":"run","Package":"m/a","Test":"TestA/sub"}
{"Action":"pass","Package":"m/a","Test":"TestA/sub"}
{"Action":"pass","Package":"m/a","Test":"TestA"}
{"Action":"output","Package":"m/a","Output":"PASS\n"}
{"Action":"output","Package":"m/a","Output":"coverage: 91.5% of statements\n"}
{"Action":"output","Package":"m/a","Output":"ok  \tm/a\t0.1s\tcoverage: 91.5% of statements\n"}
{"Action":"pass","Package":"m/a"}
{"Action":"output","Package":"m/none","Output":"?   \tm/none\t[no test files]\n"}
{"Action":"skip","Package":"m/none"}
`
	for _, tt := range []struct {
		name string
		args []string
		in   string
		code int
		want string
	}{
		{
			name: "all well", args: []string{"-cover", "m/a=90"}, in: okay,
			want: "    TestA seed: 7\nok  \tm/a\t0.1s\tcoverage: 91.5% of statements\nPASS: 1 packages, 1 tests and 1 subtests passed, 0 failed, 0 skipped, 0 builds failed in 0s; coverage a 91.5%\n",
		},
		{
			name: "covered too little", args: []string{"-cover", "m/a=92"}, in: okay, code: 1,
			want: "    TestA seed: 7\nok  \tm/a\t0.1s\tcoverage: 91.5% of statements\ncoverage of m/a is 91.5%, it must be at least 92%\nFAIL: 1 packages, 1 tests and 1 subtests passed, 0 failed, 0 skipped, 0 builds failed in 0s; coverage a 91.5%\n",
		},
		{
			name: "not covered at all", args: []string{"-cover", "m/b=90"}, in: okay, code: 1,
			want: "    TestA seed: 7\nok  \tm/a\t0.1s\tcoverage: 91.5% of statements\nno coverage of m/b was reported\nFAIL: 1 packages, 1 tests and 1 subtests passed, 0 failed, 0 skipped, 0 builds failed in 0s; coverage b 0.0%\n",
		},
		{
			name: "failure and skip", code: 1,
			in: `{"Action":"run","Package":"m/a","Test":"TestA"}
{"Action":"output","Package":"m/a","Test":"TestA","Output":"why\n"}
{"Action":"fail","Package":"m/a","Test":"TestA"}
{"Action":"skip","Package":"m/a","Test":"TestB"}
{"Action":"output","Package":"m/a","Output":"FAIL\tm/a\t0.1s\n"}
{"Action":"fail","Package":"m/a"}
`,
			want: "why\nFAIL\tm/a\t0.1s\nskipped: TestB\nFAIL: 1 packages, 0 tests and 0 subtests passed, 1 failed, 1 skipped, 0 builds failed in 0s\n",
		},
		{
			name: "panic", code: 1,
			in: `{"Action":"run","Package":"m/a","Test":"TestA"}
{"Action":"pause","Package":"m/a","Test":"TestA"}
{"Action":"run","Package":"m/a","Test":"TestWaits"}
{"Action":"pause","Package":"m/a","Test":"TestWaits"}
{"Action":"cont","Package":"m/a","Test":"TestA"}
{"Action":"output","Package":"m/a","Test":"TestA","Output":"panic: x\n"}
{"Action":"output","Package":"m/a","Output":"FAIL\tm/a\t0.1s\n"}
{"Action":"fail","Package":"m/a"}
`,
			want: "panic: x\nFAIL\tm/a\t0.1s\nFAIL: 1 packages, 0 tests and 0 subtests passed, 1 failed, 0 skipped, 0 builds failed in 0s\n",
		},
		{
			name: "exit in TestMain", code: 1,
			in: `{"Action":"output","Package":"m/a","Output":"no such device\n"}
{"Action":"fail","Package":"m/a"}
`,
			want: "no such device\nFAIL: 1 packages, 0 tests and 0 subtests passed, 1 failed, 0 skipped, 0 builds failed in 0s\n",
		},
		{
			name: "build", code: 1,
			in: `{"ImportPath":"m/a [m/a.test]","Action":"build-output","Output":"a_test.go:1: no\n"}
{"ImportPath":"m/a [m/a.test]","Action":"build-fail"}
{"Action":"output","Package":"m/a","Output":"FAIL\tm/a [build failed]\n"}
{"Action":"fail","Package":"m/a"}
`,
			want: "a_test.go:1: no\nFAIL\tm/a [build failed]\nFAIL: 1 packages, 0 tests and 0 subtests passed, 0 failed, 0 skipped, 1 builds failed in 0s\n",
		},
		{
			name: "nothing ran", in: "go: cannot find main module\n", code: 1,
			want: "go: cannot find main module\nFAIL: 0 packages, 0 tests and 0 subtests passed, 0 failed, 0 skipped, 0 builds failed in 0s\n",
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			var out, errs bytes.Buffer
			code := run(tt.args, strings.NewReader(tt.in), &out, &errs)
			got := regexp.MustCompile(`in \d+s`).ReplaceAllString(out.String(), "in 0s")
			if code != tt.code || errs.Len() > 0 {
				t.Errorf("exit code %d, want %d, stderr %q", code, tt.code, &errs)
			}
			if d := cmp.Diff(tt.want, got); d != "" {
				t.Errorf("output (-want +got):\n%s", d)
			}
		})
	}
	if code := run([]string{"-cover", "a=x"}, strings.NewReader(""), &bytes.Buffer{}, &bytes.Buffer{}); code != 2 {
		t.Errorf("bad flag: exit code %d, want 2", code)
	}
}
