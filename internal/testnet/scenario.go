package testnet

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sync/errgroup"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	utilyaml "k8s.io/apimachinery/pkg/util/yaml"
	"sigs.k8s.io/yaml"
)

// addParallel is how many cnitool runs a node sees at once: a kubelet starts several pods at a time, too.
const addParallel = 3

// Scenario is an example directory: manifests, and by hand the matrix that they must lead to.
type Scenario struct {
	Name      string
	Title     string // first line of its README
	Manifests []Manifest
	Pods      []PodSpec
	Matrix    Matrix
}

// Manifest is one document of a manifest file.
type Manifest struct {
	File string
	Kind string
	Text string
}

// PodSpec is a pod of a scenario. Its container ports are served.
type PodSpec struct {
	Namespace, Name, UID string
	Ports                []Port
}

func (p PodSpec) key() string { return p.Namespace + "/" + p.Name }

// Cell is one question to the network, with the answer that a human expects.
type Cell struct {
	From, To string
	Port     Port
	Want     bool
}

// Matrix is a list of cells, in the order of its file.
type Matrix []Cell

// LoadScenarios reads every scenario under a directory, by name.
func LoadScenarios(dir string) ([]*Scenario, error) {
	files, err := filepath.Glob(filepath.Join(dir, "*", "matrix.txt"))
	if err != nil {
		return nil, fmt.Errorf("list scenarios: %w", err)
	}
	if len(files) == 0 {
		return nil, fmt.Errorf("no */matrix.txt in %s: give the examples directory", dir)
	}
	scenarios := make([]*Scenario, 0, len(files))
	var errs []error
	for _, f := range files {
		s, err := LoadScenario(filepath.Dir(f))
		errs = append(errs, err)
		scenarios = append(scenarios, s)
	}
	return scenarios, errors.Join(errs...)
}

// LoadScenario reads one scenario and checks that its matrix is complete.
func LoadScenario(dir string) (*Scenario, error) {
	s := &Scenario{Name: filepath.Base(dir)}
	readme, err := os.ReadFile(filepath.Join(dir, "README.md"))
	if err != nil {
		return nil, fmt.Errorf("load scenario %s: %w", s.Name, err)
	}
	title, _, _ := strings.Cut(string(readme), "\n")
	s.Title = strings.TrimLeft(title, "# ")
	files, err := filepath.Glob(filepath.Join(dir, "manifests", "*.yaml"))
	if err != nil {
		return nil, fmt.Errorf("load scenario %s: %w", s.Name, err)
	}
	for _, f := range files {
		if err := s.loadManifests(f); err != nil {
			return nil, fmt.Errorf("load scenario %s: %w", s.Name, err)
		}
	}
	slices.SortFunc(s.Pods, func(a, b PodSpec) int { return cmp.Compare(a.key(), b.key()) })
	file := filepath.Join(dir, "matrix.txt")
	text, err := os.ReadFile(file)
	if err != nil {
		return nil, fmt.Errorf("load scenario %s: %w", s.Name, err)
	}
	if s.Matrix, err = ParseMatrix(string(text)); err != nil {
		return nil, fmt.Errorf("load scenario %s: %s:%w", s.Name, file, err)
	}
	if err := s.checkComplete(); err != nil {
		return nil, fmt.Errorf("load scenario %s: %s: %w", s.Name, file, err)
	}
	return s, nil
}

func (s *Scenario) loadManifests(file string) error {
	text, err := os.ReadFile(file)
	if err != nil {
		return fmt.Errorf("read manifest: %w", err)
	}
	documents := utilyaml.NewYAMLReader(bufio.NewReader(bytes.NewReader(text)))
	for {
		document, err := documents.Read()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("read manifest %s: %w", file, err)
		}
		var meta metav1.TypeMeta
		if err := yaml.Unmarshal(document, &meta); err != nil {
			return fmt.Errorf("parse manifest %s: %w", file, err)
		}
		s.Manifests = append(s.Manifests, Manifest{File: filepath.Base(file), Kind: meta.Kind, Text: string(document)})
		if meta.Kind != "Pod" {
			continue
		}
		var pod corev1.Pod
		if err := yaml.UnmarshalStrict(document, &pod); err != nil {
			return fmt.Errorf("parse pod in %s: %w", file, err)
		}
		spec := PodSpec{Namespace: cmp.Or(pod.Namespace, "default"), Name: pod.Name, UID: string(pod.UID)}
		for _, c := range pod.Spec.Containers {
			for _, p := range c.Ports {
				spec.Ports = append(spec.Ports, Port{strings.ToLower(string(cmp.Or(p.Protocol, corev1.ProtocolTCP))), uint16(p.ContainerPort)})
			}
		}
		s.Pods = append(s.Pods, spec)
	}
}

// ParseMatrix reads a table: the first line names a receiver and port per column (shop/db:5432, kube-system/dns:53/udp), every
// other line a sender and "yes", "no" or, for a pod and itself, "-" per column. "#" starts a comment. Several tables, each behind a
// line that starts with "to", may follow each other.
func ParseMatrix(text string) (Matrix, error) {
	var matrix Matrix
	var columns []Cell
	seen := map[Cell]bool{}
	for i, line := range strings.Split(text, "\n") {
		line, _, _ = strings.Cut(line, "#")
		fields := strings.Fields(line)
		if len(fields) == 0 {
			continue
		}
		if fields[0] == "to" {
			columns = nil
			for _, field := range fields[1:] {
				name, port, err := parseTarget(field)
				if err != nil {
					return nil, fmt.Errorf("%d: %w", i+1, err)
				}
				columns = append(columns, Cell{To: name, Port: port})
			}
			continue
		}
		if len(fields) != len(columns)+1 {
			return nil, fmt.Errorf("%d: row %s has %d answers for %d columns", i+1, fields[0], len(fields)-1, len(columns))
		}
		for j, answer := range fields[1:] {
			cell := columns[j]
			cell.From = fields[0]
			if seen[cell] {
				return nil, fmt.Errorf("%d: %s -> %s %s is answered twice", i+1, cell.From, cell.To, cell.Port)
			}
			seen[cell] = true
			switch {
			case (answer == "-") != (cell.From == cell.To):
				return nil, fmt.Errorf(`%d: %s -> %s %s is %q: "-" is for a sender and itself, and for nothing else`, i+1, cell.From, cell.To, cell.Port, answer)
			case answer == "-":
				continue
			case answer != "yes" && answer != "no":
				return nil, fmt.Errorf(`%d: %s -> %s %s is %q: want "yes" or "no"`, i+1, cell.From, cell.To, cell.Port, answer)
			}
			cell.Want = answer == "yes"
			matrix = append(matrix, cell)
		}
	}
	if len(matrix) == 0 {
		return nil, errors.New("1: the matrix has no cells")
	}
	return matrix, nil
}

func parseTarget(s string) (string, Port, error) {
	name, port, ok := strings.Cut(s, ":")
	number, proto, named := strings.Cut(port, "/")
	if !named {
		proto = "tcp"
	}
	n, err := strconv.ParseUint(number, 10, 16)
	if !ok || err != nil || n == 0 || (proto != "tcp" && proto != "udp") {
		return "", Port{}, fmt.Errorf("column %q: want NAME:PORT or NAME:PORT/PROTO with proto tcp or udp", s)
	}
	return name, Port{proto, uint16(n)}, nil
}

// checkComplete sees that no pair of a pod, or of the node or an outside client with a pod, is forgotten.
func (s *Scenario) checkComplete() error {
	asked := map[Cell]bool{}
	for _, c := range s.Matrix {
		c.Want = false
		asked[c] = true
	}
	senders := []string{NodeName, External}
	for _, p := range s.Pods {
		senders = append(senders, p.key())
	}
	var errs []error
	for _, p := range s.Pods {
		for _, port := range p.Ports {
			for _, from := range senders {
				if c := (Cell{From: from, To: p.key(), Port: port}); from != p.key() && !asked[c] {
					errs = append(errs, fmt.Errorf("no answer for %s -> %s %s", c.From, c.To, c.Port))
				}
			}
		}
	}
	return errors.Join(errs...)
}

// Open returns the matrix of a network without policies: everything that listens can be reached.
func (m Matrix) Open() Matrix {
	open := slices.Clone(m)
	for i := range open {
		open[i].Want = true
	}
	return open
}

// WriteManifests gives the scenario's manifests to the daemon. Without policies, it is the control of every matrix.
func (s *Scenario) WriteManifests(n *Node, policies bool) error {
	files := map[string][]string{}
	for _, m := range s.Manifests {
		if policies || m.Kind != "NetworkPolicy" {
			files[m.File] = append(files[m.File], m.Text)
		}
	}
	for name, documents := range files {
		if err := n.WriteManifest(name, strings.Join(documents, "\n---\n")); err != nil {
			return err
		}
	}
	return nil
}

// Deploy adds the scenario's pods to a node and serves every port that the matrix asks for.
func (s *Scenario) Deploy(ctx context.Context, n *Node) error {
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(addParallel)
	for _, p := range s.Pods {
		g.Go(func() error {
			_, err := n.AddPod(gctx, p.Namespace, p.Name, p.UID, p.Ports...)
			return err
		})
	}
	if err := g.Wait(); err != nil {
		return fmt.Errorf("deploy scenario %s: %w", s.Name, err)
	}
	// Machines that have no Pod manifest serve what somebody asks of them.
	served := map[Cell]bool{}
	for _, c := range s.Matrix {
		target := Cell{To: c.To, Port: c.Port}
		if served[target] || n.Pod(c.To) != nil {
			continue
		}
		served[target] = true
		host, err := n.Find(c.To)
		if err != nil {
			return fmt.Errorf("deploy scenario %s: %w", s.Name, err)
		}
		if err := host.Serve(c.Port); err != nil {
			return fmt.Errorf("deploy scenario %s: %w", s.Name, err)
		}
	}
	return nil
}
