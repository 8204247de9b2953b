// Package semantics holds the user's page on semantics to its word: it runs every example of docs/semantics.md.
package semantics

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/podwall/podwall/pkg/ruleset"
	"github.com/podwall/podwall/tests/oracle"
	"github.com/podwall/podwall/tests/oracle/subject"
)

const page = "../../../docs/semantics.md"

func read(t *testing.T) *document {
	t.Helper()
	text, err := os.ReadFile(page)
	if err != nil {
		t.Fatal(err)
	}
	d, err := parse(string(text))
	if err != nil {
		t.Fatalf("%s: %v", page, err)
	}
	return d
}

// TestExamples asks the reference and podwall's ruleset about every line of every example.
func TestExamples(t *testing.T) {
	t.Parallel()
	d := read(t)
	lines := 0
	for _, e := range d.examples {
		lines += len(e.lines)
		if err := d.check(e); err != nil {
			t.Errorf("%s: %v", page, err)
		}
	}
	t.Logf("%d examples, %d lines", len(d.examples), lines)
}

// TestExamplesControl turns every verdict of the page round, one at a time: each is noticed.
func TestExamplesControl(t *testing.T) {
	t.Parallel()
	d := read(t)
	for _, e := range d.examples {
		for i := range e.lines {
			wrong := *e
			wrong.lines = slices.Clone(e.lines)
			wrong.lines[i].allowed = !wrong.lines[i].allowed
			if d.check(&wrong) == nil {
				t.Errorf("%s: line %d: nobody notices the opposite of %q", page, e.lines[i].number, e.lines[i].text)
			}
		}
	}
}

// check compares an example with both engines, and sees to it that the example shows something: what is denied is open without
// the policies, what is allowed is closed when everything is isolated (or says that it always is allowed), and no policy and
// no flag can be left out without a change. It stops at the first error.
func (d *document) check(e *example) error {
	as, err := d.judge(e, e.policies)
	if err != nil {
		return err
	}
	for i, l := range e.lines {
		if as[i] != l.allowed {
			return fmt.Errorf("line %d: %q: it is the other way round", l.number, l.text)
		}
	}
	if err := d.checkReported(e); err != nil {
		return err
	}
	open, err := d.judge(e, nil)
	if err != nil {
		return err
	}
	if slices.Equal(as, open) {
		return fmt.Errorf("line %d: the example is the same without its policies", e.line)
	}
	closed, err := d.judge(e, d.isolateEverything())
	if err != nil {
		return err
	}
	for i, l := range e.lines {
		switch {
		case !l.allowed && !open[i]:
			return fmt.Errorf("line %d: %q: it is denied without policies, too", l.number, l.text)
		case l.allowed && closed[i] != l.always:
			return fmt.Errorf("line %d: %q: that it is allowed when everything is isolated is %t; say always allowed if so", l.number, l.text, closed[i])
		}
	}
	for i, p := range e.policies {
		without, err := d.judge(e, slices.Concat(e.policies[:i], e.policies[i+1:]))
		if err != nil {
			return err
		}
		if slices.Equal(as, without) {
			return fmt.Errorf("line %d: the example is the same without the policy %s/%s", e.line, p.Namespace, p.Name)
		}
	}
	for _, p := range e.pods {
		name := p.Namespace + "/" + p.Name
		if !slices.ContainsFunc(e.lines, func(l line) bool { return l.from == name || l.to == name }) {
			return fmt.Errorf("line %d: no line speaks of the pod %s", e.line, name)
		}
	}
	if e.allowOwnNode {
		other := *e
		other.allowOwnNode = false
		if without, err := d.judge(&other, e.policies); err != nil || slices.Equal(as, without) {
			return errors.Join(err, fmt.Errorf("line %d: the example is the same without the flag", e.line))
		}
	}
	return nil
}

func (d *document) cluster(e *example, policies []*networkingv1.NetworkPolicy) (*oracle.Cluster, error) {
	c, err := d.cast.base()
	if err != nil {
		return nil, err
	}
	for _, p := range e.pods {
		if err := add(c, p); err != nil {
			return nil, fmt.Errorf("line %d: pod %s/%s: %w", e.line, p.Namespace, p.Name, err)
		}
	}
	c.Policies, c.AllowOwnNode = policies, e.allowOwnNode
	return c, nil
}

// judge returns a verdict per line of an example; the reference and the ruleset have to agree about it, in all families.
func (d *document) judge(e *example, policies []*networkingv1.NetworkPolicy) ([]bool, error) {
	here, err := d.cluster(e, policies)
	if err != nil {
		return nil, err
	}
	there := *here // a pod of another node is guarded by that node
	there.Node, there.Sandboxes = otherNode, nil
	rules := subject.Render(here).Ruleset
	var list []bool
	for _, l := range e.lines {
		conns, err := d.cast.conns(here, l)
		if err != nil {
			return nil, fmt.Errorf("line %d: %q: %w", l.number, l.text, err)
		}
		verdict := here.Allowed(conns[0]) && there.Allowed(conns[0])
		for _, conn := range conns {
			if err := agree(rules, conn, here.Allowed(conn) && there.Allowed(conn), verdict); err != nil {
				return nil, fmt.Errorf("line %d: %q: %w", l.number, l.text, err)
			}
		}
		list = append(list, verdict)
	}
	return list, nil
}

func agree(rules ruleset.Ruleset, conn oracle.Conn, reference, line bool) error {
	got, path, err := subject.Allowed(rules, conn)
	switch {
	case err != nil:
		return err
	case got != reference:
		return fmt.Errorf("%+v: allowed is %t for podwall, and %t for the reference\n%s", conn, got, reference, path)
	case reference != line:
		return fmt.Errorf("%+v: allowed is %t, unlike the line's first connection: write lines of their own", conn, reference)
	}
	return nil
}

func (d *document) checkReported(e *example) error {
	c, err := d.cluster(e, e.policies)
	if err != nil {
		return err
	}
	var problems []string
	for _, p := range subject.Render(c).Problems {
		problems = append(problems, p.String())
	}
	if !slices.Equal(problems, e.reported) {
		return fmt.Errorf("line %d: podwall reports %q, the example has %q", e.line, problems, e.reported)
	}
	return nil
}

// isolateEverything denies whatever a policy can deny.
func (d *document) isolateEverything() []*networkingv1.NetworkPolicy {
	var list []*networkingv1.NetworkPolicy
	for name := range d.cast.Namespaces {
		list = append(list, &networkingv1.NetworkPolicy{
			ObjectMeta: metav1.ObjectMeta{Namespace: name, Name: "deny-all"},
			Spec:       networkingv1.NetworkPolicySpec{PolicyTypes: []networkingv1.PolicyType{networkingv1.PolicyTypeIngress, networkingv1.PolicyTypeEgress}},
		})
	}
	return list
}

var link = regexp.MustCompile(`\[([^\]]*)\]\(([^)]*)\)`)

// TestSections holds that every section has an example or names the test that holds what it says, that these tests exist, and
// that every claim is put right by a line.
func TestSections(t *testing.T) {
	t.Parallel()
	if err := read(t).checkSections(); err != nil {
		t.Errorf("%s: %v", page, err)
	}
}

func (d *document) checkSections() error {
	var errs []error
	for i, s := range d.sections {
		tests := 0
		for _, l := range link.FindAllStringSubmatch(s.text, -1) {
			named, err := d.follow(l[1], l[2])
			if err != nil {
				errs = append(errs, fmt.Errorf("line %d, %s: %w", s.line, s.title, err))
			}
			if named {
				tests++
			}
		}
		parent := i+1 < len(d.sections) && d.sections[i+1].level > s.level
		if !s.example && tests == 0 && !parent && s.title != castHeading {
			errs = append(errs, fmt.Errorf("line %d: the section %q has neither an example nor a link to a test", s.line, s.title))
		}
		if s.under == claimsHeading && s.level > 2 && s.claims == 0 && tests == 0 {
			errs = append(errs, fmt.Errorf("line %d: no line of %q says what is wrong: write \"allowed, not denied\"", s.line, s.title))
		}
	}
	return errors.Join(errs...)
}

// follow checks that a link leads somewhere, and tells whether that is a test.
func (d *document) follow(text, target string) (bool, error) {
	if strings.HasPrefix(target, "https://") {
		return false, nil
	}
	if anchor, ok := strings.CutPrefix(target, "#"); ok {
		if !slices.ContainsFunc(d.sections, func(s *section) bool { return anchorOf(s.title) == anchor }) {
			return false, fmt.Errorf("no heading has the anchor #%s", anchor)
		}
		return false, nil
	}
	data, err := os.ReadFile(filepath.Join(filepath.Dir(page), target))
	if err != nil {
		return false, err
	}
	name, sub, hasSub := strings.Cut(strings.Trim(text, "`"), "/")
	if !strings.HasSuffix(target, "_test.go") {
		return strings.HasSuffix(target, ".txtar"), nil
	}
	if !strings.Contains(string(data), "\nfunc "+name+"(t *testing.T)") || hasSub && !strings.Contains(string(data), `"`+sub+`"`) {
		return false, fmt.Errorf("%s has no test %s", target, text)
	}
	return true, nil
}

var notInAnchor = regexp.MustCompile(`[^\p{L}\p{N} _-]`)

// anchorOf is how GitHub names a heading.
func anchorOf(title string) string {
	return strings.ReplaceAll(notInAnchor.ReplaceAllString(strings.ToLower(title), ""), " ", "-")
}

const head = "## The cast\n```yaml\nnamespaces: {a: {}}\npods:\n  a/x: {ips: [10.244.0.10]}\n  a/y: {ips: [10.244.0.11]}\naddresses: {node: [172.18.0.2, fd00:172:18::2]}\n```\n## One\n"

// TestWrongPages holds that a page with a mistake is not passed over.
func TestWrongPages(t *testing.T) {
	t.Parallel()
	const denyX = "```yaml\nmetadata: {namespace: a, name: p}\nspec: {podSelector: {}}\n```\n"
	verdict := func(lines string) string { return denyX + "```text\n" + lines + "\n```\n" }
	for _, tt := range []struct{ name, text, want string }{
		{"right", verdict("a/y -> a/x :1 denied # why"), ""},
		{"no verdicts", denyX, "the example has no verdicts"},
		{"verdicts under another heading", denyX + "## Two\n```text\na/y -> a/x :1 denied\n```\n", "the example has no verdicts"},
		{"empty verdicts", denyX + "```text\n```\n", "the example has no verdicts"},
		{"verdicts without an example", "```text\na/y -> a/x :1 denied\n```\n", "verdicts without an example"},
		{"verdicts twice", verdict("a/y -> a/x :1 denied") + "```text\na/y -> a/x :2 denied\n```\n", "has its verdicts already"},
		{"unknown pod", verdict("a/z -> a/x :1 denied"), `nobody is called "a/z"`},
		{"unknown language", "```yml\n```\n", `a block of "yml"`},
		{"no end", "```yaml\n", "the block has no end"},
		{"unknown field", strings.ReplaceAll(verdict("a/y -> a/x :1 denied"), "podSelector", "podselector"), `unknown field "spec.podselector"`},
		{"no verdict in a line", verdict("a/y -> a/x :1"), "want the verdict"},
		{"no port", verdict("a/y -> a/x denied"), "want a port"},
		{"always denied", verdict("a/y -> a/x :1 always denied"), "want the verdict"},
		{"claim that is right", verdict("a/y -> a/x :1 denied, not denied"), "want what was claimed"},
		{"wrong verdict", verdict("a/y -> a/x :1 allowed"), "the other way round"},
		{"proves nothing", verdict("a/x -> 192.0.2.1 :1 allowed"), "the same without its policies"},
		{"line that proves nothing", verdict("a/y -> a/x :1 denied\nnode -> a/x :1 allowed"), "say always allowed"},
		{"not always", verdict("a/y -> a/x :1 denied\na/x -> 192.0.2.1 :1 always allowed"), "say always allowed"},
		{"policy that proves nothing", strings.ReplaceAll(verdict("a/y -> a/x :1 denied"), "```\n```text", "---\nmetadata: {namespace: a, name: q}\nspec: {policyTypes: [Egress]}\n```\n```text"), "the same without the policy a/"},
		{"pod in no line", strings.ReplaceAll(verdict("a/y -> a/x :1 denied"), "```\n```text", "---\nkind: Pod\nmetadata: {namespace: a, name: z}\n```\n```text"), "no line speaks of the pod a/z"},
		{"flag that proves nothing", verdict("podwalld run --own-node-egress=allow\na/y -> a/x :1 denied"), "the same without the flag"},
		{"unknown flag", verdict("podwalld run --deny=reject\na/y -> a/x :1 denied"), "the only flag"},
		{"nobody of this node", verdict("192.0.2.1 -> 192.0.2.200 :1 denied"), "this node does not judge it"},
		{"no common family", verdict("2001:db8::1 -> a/x :1 over IPv4 denied"), "no address family in common"},
		{"not reported", strings.ReplaceAll(verdict("a/y -> a/x :1 denied"), "podSelector: {}", "ingress: [{from: [{ipBlock: {cidr: nonsense}}]}]"), "podwall reports"},
		{"section that shows nothing", verdict("a/y -> a/x :1 denied") + "## Two\nIt is so.\n", `"Two" has neither an example nor a link`},
		{"link to a test", "[`TestPing`](../tests/e2e/semantics_test.go), [`TestOwnNode/node-dns`](../tests/e2e/semantics_test.go)", ""},
		{"no such file", "[`TestPing`](../tests/e2e/none_test.go)", "no such file"},
		{"no such test", "[`TestPin`](../tests/e2e/semantics_test.go)", "has no test `TestPin`"},
		{"no such part of a test", "[`TestOwnNode/none`](../tests/e2e/semantics_test.go)", "has no test `TestOwnNode/none`"},
		{"no such heading", verdict("a/y -> a/x :1 denied") + "[x](#none)\n", "no heading has the anchor #none"},
		{"claim that is not put right", "## " + claimsHeading + "\n### One\n" + verdict("a/y -> a/x :1 denied"), "says what is wrong"},
		{"claim that is put right", verdict("a/y -> a/x :1 denied") + "## " + claimsHeading + "\n### One\n" + verdict("a/y -> a/x :1 denied, not allowed"), ""},
		{"reported for nothing", verdict("reported: nothing\na/y -> a/x :1 denied"), "podwall reports"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			d, err := parse(head + tt.text)
			for i := 0; err == nil && i < len(d.examples); i++ {
				err = d.check(d.examples[i])
			}
			if err == nil {
				err = d.checkSections()
			}
			switch {
			case tt.want == "" && err != nil:
				t.Error(err)
			case tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want)):
				t.Errorf("error is %v, want one with %q", err, tt.want)
			}
		})
	}
}
