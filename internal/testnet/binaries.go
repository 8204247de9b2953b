package testnet

import (
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// Binaries are the programs under test and the ones that they are tested with, as absolute paths.
type Binaries struct {
	Podwalld string
	Plugin   string // the podwall CNI plugin
	CNIDir   string // cnitool, bridge, ptp, macvlan, host-local
}

// BinariesIn returns the programs where `make build` puts them. It names the ones that are missing.
func BinariesIn(dir string) (Binaries, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return Binaries{}, fmt.Errorf("find binaries: %w", err)
	}
	b := Binaries{filepath.Join(dir, "podwalld"), filepath.Join(dir, "podwall"), filepath.Join(dir, "cni")}
	var missing []string
	for _, path := range []string{
		b.Podwalld, b.Plugin, filepath.Join(b.CNIDir, "cnitool"), filepath.Join(b.CNIDir, "bridge"),
		filepath.Join(b.CNIDir, "ptp"), filepath.Join(b.CNIDir, "macvlan"), filepath.Join(b.CNIDir, "host-local"),
	} {
		if info, err := os.Stat(path); err != nil || info.Mode()&0o111 == 0 {
			missing = append(missing, path)
		}
	}
	if len(missing) > 0 {
		return Binaries{}, fmt.Errorf("missing programs %s: run `make build`", strings.Join(missing, ", "))
	}
	return b, nil
}

// BinEnv names a directory with the programs for tests. Without it, RunTests builds them.
const BinEnv = "PODWALL_E2E_BIN"

// RunTests runs the tests of a package in a sandbox, with the programs of TestBinaries at hand.
func RunTests(run func() int) int {
	// The tests mostly wait for silence: more of them at a time than there are processors. A -parallel flag overrides this.
	if err := flag.Set("test.parallel", "6"); err != nil {
		fmt.Fprintln(os.Stderr, "testnet:", err)
		return 1
	}
	if os.Getenv(BinEnv) != "" {
		return Sandbox(run)
	}
	dir, err := os.MkdirTemp("", "podwall-test-")
	if err == nil {
		defer os.RemoveAll(dir)
		err = build(dir)
	}
	if err == nil {
		err = os.Setenv(BinEnv, dir) // for the copy in the sandbox
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "testnet: build programs:", err)
		return 1
	}
	return Sandbox(run)
}

// TestBinaries returns the programs that RunTests has provided.
func TestBinaries() (Binaries, error) { return BinariesIn(os.Getenv(BinEnv)) }

// build compiles the programs of this tree, and the CNI plugins at the versions of go.mod.
func build(dir string) error {
	const plugins = "github.com/containernetworking/plugins/plugins/"
	if err := os.Mkdir(filepath.Join(dir, "cni"), 0o755); err != nil {
		return err
	}
	for _, args := range [][]string{
		{"-o", filepath.Join(dir, "podwall"), "github.com/podwall/podwall/plugin"},
		{"-o", filepath.Join(dir, "podwalld"), "github.com/podwall/podwall/daemon"},
		{
			"-o", filepath.Join(dir, "cni"), "github.com/containernetworking/cni/cnitool",
			plugins + "main/bridge", plugins + "main/ptp", plugins + "main/macvlan", plugins + "ipam/host-local",
		},
	} {
		cmd := exec.Command("go", append([]string{"build"}, args...)...)
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("go build %s: %w: %s", strings.Join(args, " "), err, out)
		}
	}
	return nil
}
