package lab

import (
	"context"
	"encoding/xml"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// UpstreamFocus selects the suite's specs: without a focus the framework skips every one that has a feature label.
const UpstreamFocus = `\[Feature:NetworkPolicy\]|NetworkPolicy API`

// Suite says how to run the upstream NetworkPolicy suite.
type Suite struct {
	Procs int
	Focus string
	Out   string // directory for junit.xml and the log
}

// Flags registers the suite's flags.
func (s *Suite) Flags(fs *flag.FlagSet) {
	fs.IntVar(&s.Procs, "procs", 4, "parallel processes")
	fs.StringVar(&s.Focus, "focus", UpstreamFocus, "`REGEXP` of the specs to run")
	fs.StringVar(&s.Out, "out", "", "`DIR` for junit.xml and suite.log (default the log directory)")
}

// Result counts the suite's specs.
type Result struct {
	Passed, Failed, Skipped int
	Failures                []string
	Took                    time.Duration
}

func (r Result) String() string {
	return fmt.Sprintf("%d passed, %d failed, %d skipped in %.0f s", r.Passed, r.Failed, r.Skipped, r.Took.Seconds())
}

// RunSuite runs the suite and fails when a spec does, or when none ran. The specs that need SCTP sockets, which few kernels
// have, are left out.
func (l *Lab) RunSuite(ctx context.Context, s Suite) error {
	n, err := l.Node("node1")
	if err != nil {
		return err
	}
	if s.Out == "" {
		s.Out = l.Logs()
	}
	if s.Out, err = filepath.Abs(s.Out); err != nil {
		return err
	}
	if err := os.MkdirAll(s.Out, 0o755); err != nil { //nolint:gosec // logs
		return err
	}
	log, err := os.Create(filepath.Join(s.Out, "suite.log"))
	if err != nil {
		return err
	}
	defer func() { _ = log.Close() }()
	junit := filepath.Join(s.Out, "junit.xml")
	if err := os.RemoveAll(junit); err != nil {
		return err
	}
	begin := time.Now()
	cmd := n.NetCommand(ctx, "ginkgo", "-procs="+strconv.Itoa(s.Procs), "--no-color", "-v", "--focus="+s.Focus, "--skip=SCTPConnectivity", "--timeout=1h",
		"--junit-report=junit.xml", "--output-dir="+s.Out, filepath.Join(l.Bin(), "netpol.test"), "--",
		"-kubeconfig", l.Kubeconfig(), "-provider", "local", "-dump-logs-on-failure=false")
	cmd.Stdout, cmd.Stderr = log, io.Writer(log)
	runErr := cmd.Run()
	r, err := readJUnit(junit)
	if err != nil {
		return errors.Join(runErr, err, fmt.Errorf("see %s", log.Name()))
	}
	r.Took = time.Since(begin)
	_, _ = fmt.Fprintf(l.Out, "upstream suite: %s\n", r)
	l.closingLines(log.Name())
	for _, f := range r.Failures {
		_, _ = fmt.Fprintln(l.Out, "  FAILED", f)
	}
	if r.Failed > 0 || r.Passed == 0 || runErr != nil {
		return fmt.Errorf("upstream suite: %d specs failed, %d passed; see %s", r.Failed, r.Passed, log.Name())
	}
	return nil
}

// closingLines prints the suite's own verdict.
func (l *Lab) closingLines(log string) {
	data, _ := os.ReadFile(log)
	for line := range strings.Lines(string(data)) {
		if strings.HasPrefix(line, "Ran ") || strings.HasPrefix(line, "SUCCESS!") || strings.HasPrefix(line, "FAIL!") {
			_, _ = fmt.Fprint(l.Out, "  ", line)
		}
	}
}

func readJUnit(path string) (Result, error) {
	var doc struct {
		Suites []struct {
			Cases []struct {
				Name   string `xml:"name,attr"`
				Status string `xml:"status,attr"`
			} `xml:"testcase"`
		} `xml:"testsuite"`
	}
	var r Result
	data, err := os.ReadFile(path)
	if err != nil {
		return r, err
	}
	if err := xml.Unmarshal(data, &doc); err != nil {
		return r, fmt.Errorf("read %s: %w", path, err)
	}
	for _, s := range doc.Suites {
		for _, c := range s.Cases {
			switch c.Status {
			case "passed":
				// Set-up and reports of the suite itself are no specs.
				if c.Name != "" && c.Name[0] == '[' && (len(c.Name) < 4 || c.Name[:4] != "[It]") {
					continue
				}
				r.Passed++
			case "skipped", "pending":
				r.Skipped++
			default:
				r.Failed++
				r.Failures = append(r.Failures, c.Name)
			}
		}
	}
	return r, nil
}
