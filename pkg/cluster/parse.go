package cluster

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"reflect"
	"regexp"
	"slices"
	"sort"
	"strings"

	yamlnode "go.yaml.in/yaml/v3"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/validation"
	kjson "sigs.k8s.io/json"
	"sigs.k8s.io/yaml"
)

// Problem is something in a manifest that its author should know about.
type Problem struct {
	File string
	// Line is 0 if the problem is the file's, not a line's.
	Line   int
	Reason string
	// Warning: the file counts as understood all the same (an unknown kind, a second definition of an object).
	Warning bool
}

// String returns "file:line: reason".
func (p Problem) String() string {
	if p.Line == 0 {
		return p.File + ": " + p.Reason
	}
	return fmt.Sprintf("%s:%d: %s", p.File, p.Line, p.Reason)
}

// ParseFile reads a manifest of any number of YAML or JSON documents. It returns what could be read, whatever else is
// wrong: a NetworkPolicy whose name can be read is always returned, with Unreadable set if the rest of it cannot.
func ParseFile(name string, data []byte) ([]Object, []Problem) {
	definitions, problems := parseFile(name, data)
	var objects []Object
	for _, d := range definitions {
		objects = append(objects, d.object)
	}
	return objects, problems
}

// definition is an object and where it is defined.
type definition struct {
	object Object
	line   int
}

func parseFile(name string, data []byte) ([]definition, []Problem) {
	p := parser{file: name, lines: map[Key]int{}}
	for line, text := range documents(data) {
		p.document(line, text)
	}
	slices.SortStableFunc(p.problems, func(a, b Problem) int { return cmp.Compare(a.Line, b.Line) })
	return p.definitions, p.problems
}

// documents yields each document and the line that it starts on. Cutting the text first lets the documents around a
// malformed one be read.
func documents(data []byte) func(yield func(int, []byte) bool) {
	return func(yield func(int, []byte) bool) {
		start, line, at := 1, 0, 0
		for text := range bytes.Lines(data) {
			line++
			rest, found := bytes.CutPrefix(text, []byte("---"))
			if found && line > 1 && (len(rest) == 0 || bytes.ContainsRune([]byte(" \t\r\n"), rune(rest[0]))) {
				if !yield(start, data[:at]) {
					return
				}
				data, start, at = data[at:], line, 0
			}
			at += len(text)
		}
		yield(start, data)
	}
}

type parser struct {
	file        string
	definitions []definition
	lines       map[Key]int
	problems    []Problem

	// Of the document at hand.
	start    int            // its first line in the file
	root     *yamlnode.Node // its tree, for line numbers
	repeated []fault
}

// path leads from a document's root to a value: strings are keys, ints are indexes.
type path []any

func (p path) with(step any) path { return append(slices.Clip(p), step) }

func (p path) String() string {
	var s strings.Builder
	for _, step := range p {
		switch step := step.(type) {
		case int:
			fmt.Fprintf(&s, "[%d]", step)
		case string:
			if strings.ContainsAny(step, "./ ") || step == "" {
				fmt.Fprintf(&s, "[%q]", step)
				continue
			}
			if s.Len() > 0 {
				s.WriteByte('.')
			}
			s.WriteString(step)
		}
	}
	return s.String()
}

// fault is one reason why a value cannot be decoded as it stands.
type fault struct {
	at      path
	reason  string
	warning bool // it changes nothing that podwall reads
}

func (f fault) String() string {
	if len(f.at) == 0 {
		return f.reason
	}
	return f.at.String() + ": " + f.reason
}

func (p *parser) report(line int, warning bool, format string, args ...any) {
	p.problems = append(p.problems, Problem{File: p.file, Line: line, Warning: warning, Reason: fmt.Sprintf(format, args...)})
}

func (p *parser) document(start int, text []byte) {
	p.start, p.root, p.repeated = start, nil, nil
	root, err := yamlTree(text)
	if errors.Is(err, io.EOF) {
		return // only comments
	}
	raw := text
	switch {
	case err == nil:
		p.root, p.repeated = root, repeatedKeys(root, nil, nil)
		// The conversion that kubectl does, with its YAML 1.1 booleans.
		if raw, err = yaml.YAMLToJSON(text); err != nil {
			p.syntax(text, err, func(text []byte) error { _, err := yaml.YAMLToJSON(text); return err })
			return
		}
	case json.Valid(text): // JSON that is no YAML: surrogate pairs
	default:
		p.syntax(text, err, func(text []byte) error { _, err := yamlTree(text); return err })
		return
	}
	if !isNull(raw) {
		p.object(nil, raw)
	}
}

// yamlTree returns the root of the one document in text, or io.EOF if there is none.
func yamlTree(text []byte) (*yamlnode.Node, error) {
	decoder := yamlnode.NewDecoder(bytes.NewReader(text))
	var document, second yamlnode.Node
	if err := decoder.Decode(&document); err != nil {
		return nil, err
	}
	if err := decoder.Decode(&second); !errors.Is(err, io.EOF) {
		return nil, errors.New("more than one document here, separate them by a line with ---")
	}
	return document.Content[0], nil
}

var yamlPrefix = regexp.MustCompile(`^(yaml: )?(line \d+: )?`)

// syntax reports an error of the YAML library. The line that the library names is that of the enclosing structure, or one
// too small, or none: the first line that brings the error about is found by trying.
func (p *parser) syntax(text []byte, err error, try func([]byte) error) {
	lines := bytes.SplitAfter(text, []byte("\n"))
	good := sort.Search(len(lines)-1, func(i int) bool {
		again := try(bytes.Join(lines[:i+1], nil))
		return again != nil && again.Error() == err.Error()
	})
	p.report(p.start+good, false, "%s", yamlPrefix.ReplaceAllString(err.Error(), ""))
}

// repeatedKeys finds keys that a mapping has twice. A merge key's are not meant: the later ones override them.
func repeatedKeys(node *yamlnode.Node, at path, found []fault) []fault {
	switch node.Kind {
	case yamlnode.SequenceNode:
		for i, item := range node.Content {
			found = repeatedKeys(item, append(at, i), found)
		}
	case yamlnode.MappingNode:
		seen := map[string]bool{}
		for i := 0; i+1 < len(node.Content); i += 2 {
			key := node.Content[i]
			if key.Kind == yamlnode.ScalarNode && seen[key.Value] {
				found = append(found, fault{at: at.with(key.Value), reason: "repeated field"})
			}
			seen[key.Value] = true
			found = repeatedKeys(node.Content[i+1], append(at, key.Value), found)
		}
	}
	return found
}

// repeatedBelow returns the repeated fields of the object at a path.
func (p *parser) repeatedBelow(at path) []fault {
	var below []fault
	for _, f := range p.repeated {
		if len(f.at) > len(at) && slices.Equal(f.at[:len(at)], at) {
			below = append(below, f)
		}
	}
	return below
}

// line finds where in the file a value is; what YAML's merge keys brought in is where they are.
func (p *parser) line(at path) int {
	node, line := p.root, 1
	if node != nil {
		line = node.Line
	}
	for _, step := range at {
		if node != nil && node.Kind == yamlnode.AliasNode {
			node = node.Alias
		}
		key, value := child(node, step)
		if key == nil {
			break
		}
		node, line = value, key.Line
	}
	return p.start + line - 1
}

// child returns the key and the value, or twice the item, that a step leads to; nil if there is none.
func child(node *yamlnode.Node, step any) (*yamlnode.Node, *yamlnode.Node) {
	if node == nil {
		return nil, nil
	}
	switch step := step.(type) {
	case int:
		if node.Kind == yamlnode.SequenceNode && step < len(node.Content) {
			return node.Content[step], node.Content[step]
		}
	case string:
		if node.Kind != yamlnode.MappingNode {
			return nil, nil
		}
		for i := len(node.Content) - 2; i >= 0; i -= 2 { // of repeated keys the last one counts
			if node.Content[i].Value == step {
				return node.Content[i], node.Content[i+1]
			}
		}
	}
	return nil, nil
}

// maxListDepth counts steps of a path, two for each List: every level is decoded again.
const maxListDepth = 2 * 8

func (p *parser) object(at path, raw json.RawMessage) {
	line := p.line(at)
	fields, ok := decodeAs[map[string]json.RawMessage](raw)
	if !ok {
		p.report(line, false, "not an object with apiVersion, kind and metadata")
		return
	}
	kind, _ := decodeAs[string](fields["kind"])
	apiVersion, _ := decodeAs[string](fields["apiVersion"])
	switch {
	case kind == "":
		p.report(line, false, "kind is missing or not a string")
	case kind == "List" && apiVersion == "v1" && len(at) > maxListDepth:
		p.report(line, false, "List: too many Lists inside each other")
	case kind == "List" && apiVersion == "v1":
		items, ok := decodeAs[[]json.RawMessage](fields["items"])
		if !ok {
			p.report(line, false, "List: items is missing or not a list")
		}
		for _, f := range p.repeatedBelow(at) {
			if len(f.at) == len(at)+1 { // deeper ones are the items' own
				p.report(p.line(f.at), false, "List: %s: %s", f.at[len(at):], f.reason)
			}
		}
		for i, item := range items {
			p.object(at.with("items").with(i), item)
		}
	case kind == "Namespace" && apiVersion == "v1":
		p.define(at, Key{Kind: KindNamespace}, raw, fields)
	case kind == "Pod" && apiVersion == "v1":
		p.define(at, Key{Kind: KindPod}, raw, fields)
	case kind == "NetworkPolicy" && podwallsGroup(apiVersion):
		p.define(at, Key{Kind: KindPolicy}, raw, fields)
	case apiVersion == "":
		p.report(line, false, "%s: apiVersion is missing or not a string", kind)
	default:
		p.report(line, true, "kind %s of %s is ignored; podwall reads v1 Namespace, v1 Pod and networking.k8s.io/v1 NetworkPolicy",
			kind, apiVersion)
	}
}

// podwallsGroup tells the NetworkPolicy of Kubernetes, in whatever version, from other vendors' kinds of that name.
func podwallsGroup(apiVersion string) bool {
	group, _, found := strings.Cut(apiVersion, "/")
	return !found || group == networkingv1.GroupName || group == "extensions"
}

// define adds the object of key.Kind at a path and reports what is wrong with it.
func (p *parser) define(at path, key Key, raw json.RawMessage, fields map[string]json.RawMessage) {
	key, faults := identify(at, key, fields["metadata"])
	repeated := p.repeatedBelow(at)
	var object Object
	if len(faults) == 0 {
		switch key.Kind {
		case KindNamespace:
			var ns *corev1.Namespace
			if ns, faults = decode[corev1.Namespace](at, raw, repeated); ns != nil {
				object = NamespaceFrom(ns)
			}
		case KindPod:
			var pod *corev1.Pod
			if pod, faults = decode[corev1.Pod](at, raw, repeated); pod != nil {
				pod.Namespace = key.Namespace
				object = PodFrom(pod)
				faults = append(faults, addressFaults(at, pod)...)
			}
		case KindPolicy:
			object, faults = policy(at, key, raw, fields, repeated)
		}
	}
	name := key.Kind.String()
	if key.Name != "" {
		name = key.String()
	}
	for _, f := range faults {
		p.report(p.line(f.at), f.warning, "%s: %s", name, fault{at: f.at[len(at):], reason: f.reason})
	}
	if object == nil {
		return
	}
	line := p.line(at)
	if first, ok := p.lines[key]; ok {
		p.report(line, true, "%s: already defined at %s:%d, which counts", name, p.file, first)
		return
	}
	p.lines[key] = line
	p.definitions = append(p.definitions, definition{object, line})
}

// identify completes a key from an object's metadata. What is wrong with the rest of the metadata is not its business.
func identify(at path, key Key, metadata json.RawMessage) (Key, []fault) {
	at = at.with("metadata")
	fields, ok := decodeAs[map[string]json.RawMessage](metadata)
	if !ok && metadata != nil {
		return key, []fault{{at: at, reason: "is not an object"}}
	}
	text := func(name, otherwise string, valid func(string) []string) (string, []fault) {
		raw := fields[name]
		if raw == nil || isNull(raw) {
			raw = json.RawMessage(`""`)
		}
		value, ok := decodeAs[string](raw)
		switch {
		case !ok:
			return "", []fault{{at: at.with(name), reason: "is not a string (put it into quotes)"}}
		case value == "" && otherwise == "":
			return "", []fault{{at: at.with(name), reason: "is empty"}}
		case value == "":
			return otherwise, nil
		}
		if wrong := valid(value); len(wrong) > 0 {
			short, _, _ := strings.Cut(wrong[0], " (e.g.")
			return "", []fault{{at: at.with(name), reason: fmt.Sprintf("is %q: %s", value, short)}}
		}
		return value, nil
	}
	var faults, more []fault
	validName := validation.IsDNS1123Subdomain
	if key.Kind == KindNamespace {
		validName = validation.IsDNS1123Label
	} else {
		key.Namespace, faults = text("namespace", metav1.NamespaceDefault, validation.IsDNS1123Label)
	}
	key.Name, more = text("name", "", validName)
	return key, append(faults, more...)
}

// addressFaults names the addresses that PodFrom skips.
func addressFaults(at path, pod *corev1.Pod) []fault {
	var faults []fault
	at = at.with("status")
	check := func(at path, text string) {
		if _, ok := parseIP(text); text != "" && !ok {
			faults = append(faults, fault{at: at, reason: fmt.Sprintf("%q is not an IP address, ignored", text), warning: true})
		}
	}
	check(at.with("podIP"), pod.Status.PodIP)
	for i, ip := range pod.Status.PodIPs {
		check(at.with("podIPs").with(i).with("ip"), ip.IP)
	}
	return faults
}

// policy fails closed: a policy that cannot be read in full becomes one without rules, for the pods that its selector
// names or, if that is what cannot be read, for its whole namespace.
func policy(at path, key Key, raw json.RawMessage, fields map[string]json.RawMessage, repeated []fault) (*Policy, []fault) {
	decoded, faults := decode[networkingv1.NetworkPolicy](at, raw, repeated)
	if version, _ := decodeAs[string](fields["apiVersion"]); version != networkingv1.SchemeGroupVersion.String() {
		faults = append(faults, fault{at: at.with("apiVersion"), reason: fmt.Sprintf("is %q, want networking.k8s.io/v1", version)})
	}
	p := &Policy{Namespace: key.Namespace, Name: key.Name}
	for i, f := range faults {
		if relative := f.at[len(at):]; decoded != nil && len(relative) > 0 && relative[0] == "status" {
			faults[i].warning = true // a tombstone: servers from 1.24 to 1.27 had and wrote it
			continue
		}
		if p.Unreadable == "" {
			p.Unreadable = fault{at: f.at[len(at):], reason: f.reason}.String()
		}
	}
	if p.Unreadable == "" {
		p.Spec = decoded.Spec
		return p, faults
	}
	p.Spec.PolicyTypes = []networkingv1.PolicyType{networkingv1.PolicyTypeIngress, networkingv1.PolicyTypeEgress}
	if spec, ok := decodeAs[map[string]json.RawMessage](fields["spec"]); ok && len(repeated) == 0 {
		if selector, faults := decode[metav1.LabelSelector](nil, spec["podSelector"], nil); len(faults) == 0 {
			p.Spec.PodSelector = *selector
		}
		if types, ok := decodeAs[[]networkingv1.PolicyType](spec["policyTypes"]); ok && len(types) > 0 {
			p.Spec.PolicyTypes = types
		}
	}
	return p, faults
}

// decode decodes JSON strictly, given what is repeated in its source. With nothing worse than unknown fields there is a
// value beside the faults.
func decode[T any](at path, raw json.RawMessage, repeated []fault) (*T, []fault) {
	value := new(T)
	if raw == nil {
		return value, nil
	}
	strict, err := kjson.UnmarshalStrict(raw, value)
	if err == nil && len(strict) == 0 && len(repeated) == 0 {
		return value, nil
	}
	faults, complete := unknownAndWrong(at, raw, reflect.TypeFor[T]())
	if len(repeated) > 0 {
		faults, complete = append(faults, repeated...), false
	}
	for _, e := range strict {
		if strings.HasPrefix(e.Error(), "duplicate field") {
			faults, complete = append(faults, fault{at: at, reason: e.Error()}), false
		}
	}
	if err != nil && complete {
		faults, complete = append(faults, fault{at: at, reason: err.Error()}), false
	}
	if !complete {
		return nil, faults
	}
	return value, faults
}

func decodeAs[T any](raw json.RawMessage) (T, bool) {
	var value T
	if raw == nil {
		return value, false
	}
	err := kjson.UnmarshalCaseSensitivePreserveInts(raw, &value)
	return value, err == nil
}

func isNull(raw []byte) bool { return string(bytes.TrimSpace(raw)) == "null" }

var unmarshaler = reflect.TypeFor[json.Unmarshaler]()

// unknownAndWrong finds every value of raw that does not fit t; the decoder itself stops at the first wrong one and does
// not say where it is. The second result says that nothing but unknown fields was found.
func unknownAndWrong(at path, raw json.RawMessage, t reflect.Type) ([]fault, bool) {
	if isNull(raw) {
		return nil, true
	}
	var faults []fault
	complete := true
	descend := func(at path, raw json.RawMessage, t reflect.Type) {
		more, ok := unknownAndWrong(at, raw, t)
		faults, complete = append(faults, more...), complete && ok
	}
	switch kind := t.Kind(); {
	case reflect.PointerTo(t).Implements(unmarshaler):
		if err := kjson.UnmarshalCaseSensitivePreserveInts(raw, reflect.New(t).Interface()); err != nil {
			return []fault{{at: at, reason: strings.TrimPrefix(err.Error(), "json: ")}}, false
		}
	case kind == reflect.Pointer:
		return unknownAndWrong(at, raw, t.Elem())
	case kind == reflect.Struct || kind == reflect.Map:
		values, ok := decodeAs[map[string]json.RawMessage](raw)
		if !ok {
			return []fault{{at: at, reason: "is not an object"}}, false
		}
		known := map[string]reflect.Type{}
		if kind == reflect.Struct {
			jsonFields(t, known)
		}
		for _, key := range slices.Sorted(maps.Keys(values)) {
			elem, ok := known[key]
			if kind == reflect.Map {
				elem, ok = t.Elem(), true
			}
			if !ok {
				faults = append(faults, fault{at: at.with(key), reason: "unknown field"})
				continue
			}
			descend(at.with(key), values[key], elem)
		}
	case kind == reflect.Slice && t.Elem().Kind() != reflect.Uint8:
		values, ok := decodeAs[[]json.RawMessage](raw)
		if !ok {
			return []fault{{at: at, reason: "is not a list"}}, false
		}
		for i, value := range values {
			descend(at.with(i), value, t.Elem())
		}
	default:
		err := json.Unmarshal(raw, reflect.New(t).Interface())
		if wrong := (*json.UnmarshalTypeError)(nil); errors.As(err, &wrong) {
			return []fault{{at: at, reason: fmt.Sprintf("want %s, found %s", wanted(kind), wrong.Value)}}, false
		}
		if err != nil {
			return []fault{{at: at, reason: err.Error()}}, false
		}
	}
	return faults, complete
}

func wanted(kind reflect.Kind) string {
	switch kind {
	case reflect.String:
		return "a string (put it into quotes)"
	case reflect.Bool:
		return "true or false"
	}
	return "an integer"
}

// jsonFields adds the fields that a struct has in JSON, with those of inlined structs.
func jsonFields(t reflect.Type, known map[string]reflect.Type) {
	for f := range t.Fields() {
		name, _, _ := strings.Cut(f.Tag.Get("json"), ",")
		switch {
		case name == "" && f.Anonymous:
			jsonFields(f.Type, known)
		case name != "" && name != "-":
			known[name] = f.Type
		}
	}
}
