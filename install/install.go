package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/google/renameio/v2"
	"golang.org/x/sys/unix"

	"github.com/podwall/podwall/pkg/conflist"
)

// progressInterval is how often install tells what it waits for.
const progressInterval = 10 * time.Second

// installer is one invocation.
type installer struct {
	config
	store             *conflist.Store
	target            string // the plugin in the runtime's directory
	standDown         string // tells podwalld that it is uninstalled
	stdout, diagnosis io.Writer
}

func newInstaller(cfg config, stdout, stderr io.Writer) (*installer, error) {
	entry, err := cfg.entry()
	if err != nil {
		return nil, err
	}
	standDown := filepath.Join(cfg.stateDir, conflist.StandDownFile)
	return &installer{
		config:    cfg,
		store:     conflist.New(conflist.Config{Dir: cfg.confDir, Entry: entry, StandDown: standDown}),
		target:    filepath.Join(cfg.binDir, conflist.Type),
		standDown: standDown,
		stdout:    stdout,
		diagnosis: stderr,
	}, nil
}

func (in *installer) say(format string, args ...any) {
	_, _ = fmt.Fprintf(in.stdout, format+"\n", args...)
}

func (in *installer) warn(format string, args ...any) {
	_, _ = fmt.Fprintf(in.diagnosis, format+"\n", args...)
}

// install puts the plugin in place before the entry: CRI-O drops a conflist that names a plugin which is missing or does not answer.
func (in *installer) install(ctx context.Context) error {
	if err := in.installPlugin(ctx); err != nil {
		return err
	}
	if in.wait > 0 {
		if err := in.waitForMainPlugin(ctx); err != nil {
			return err
		}
	}
	// Before the entry: a daemon that stands down would refuse the pods that the entry brings it.
	if err := os.Remove(in.standDown); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("tell podwalld to work again: %w", err)
	}
	report, err := in.store.Insert()
	if errors.Is(err, conflist.ErrNoConflist) {
		return fmt.Errorf("%w: install the main CNI plugin first, wait for it with --wait, or name the runtime's directory with --cni-conf-dir", err)
	}
	if err != nil {
		return err
	}
	for _, skipped := range report.Skipped {
		in.warn("passed over %v", skipped)
	}
	if report.Changed {
		in.say("conflist %s: podwall inserted", report.Path)
	} else {
		in.say("conflist %s: podwall is there", report.Path)
	}
	return nil
}

func (in *installer) waitForMainPlugin(ctx context.Context) error {
	start := time.Now()
	ctx, cancel := context.WithTimeoutCause(ctx, in.wait, fmt.Errorf("waited %s for a main CNI plugin", in.wait))
	defer cancel()
	return in.store.Wait(ctx, progressInterval, func(reason error) {
		in.warn("waiting for a main CNI plugin, up to %s more: %v", (in.wait - time.Since(start)).Round(time.Second), reason)
	})
}

// installPlugin copies the plugin if it differs. The new one must run before it takes the place of the old one, and again in that
// place: a file system mounted noexec shows only there.
func (in *installer) installPlugin(ctx context.Context) error {
	data, err := os.ReadFile(in.plugin)
	if err != nil {
		return fmt.Errorf("read plugin: %w; name it with --plugin", err)
	}
	if err := selfTest(ctx, in.plugin); err != nil {
		return err
	}
	if err := os.MkdirAll(in.binDir, 0o755); err != nil { //nolint:gosec // plugins are for everybody
		return in.writeError(err)
	}
	unlock, err := conflist.Lock(in.binDir)
	if err != nil {
		return err
	}
	defer unlock()
	if err := removeTemps(in.binDir); err != nil {
		return in.writeError(err)
	}
	old, err := os.ReadFile(in.target)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("read installed plugin: %w", err)
	}
	if info, err := os.Stat(in.target); err == nil && bytes.Equal(old, data) && info.Mode().Perm()&0o111 == 0o111 {
		in.say("plugin %s: it is there (sha256 %s)", in.target, sum(data))
	} else {
		if err := replacePlugin(in.target, data); err != nil {
			return in.writeError(err)
		}
		in.say("plugin %s: copied from %s (sha256 %s)", in.target, in.plugin, sum(data))
	}
	return selfTest(ctx, in.target)
}

// replacePlugin works by rename: a plugin that is running cannot be written to (ETXTBSY).
func replacePlugin(path string, data []byte) error {
	f, err := renameio.NewPendingFile(path, renameio.WithTempDir(filepath.Dir(path)), renameio.WithStaticPermissions(0o755))
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	if err == nil {
		err = f.CloseAtomicallyReplace()
	}
	return errors.Join(err, f.Cleanup()) // Cleanup does nothing after the rename
}

func (in *installer) writeError(err error) error {
	if errors.Is(err, unix.EROFS) {
		return fmt.Errorf("directory %s is on a read-only file system: mount it writable, or name another with --cni-bin-dir", in.binDir)
	}
	return fmt.Errorf("install plugin: %w", err)
}

// removeTemps removes what renameio has left in a process that was killed. The caller holds the directory's lock.
func removeTemps(dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		digits, ours := strings.CutPrefix(e.Name(), "."+conflist.Type)
		if ours && digits != "" && strings.Trim(digits, "0123456789") == "" {
			if err := os.Remove(filepath.Join(dir, e.Name())); err != nil {
				return err
			}
		}
	}
	return nil
}

// selfTest calls a plugin as the runtime does when it loads a conflist.
func selfTest(ctx context.Context, plugin string) error {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, plugin)
	cmd.Env = []string{"CNI_COMMAND=VERSION"}
	cmd.Stdin = strings.NewReader(`{"cniVersion":"1.1.0"}`)
	cmd.WaitDelay = time.Second
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return fmt.Errorf("self-test plugin %s (CNI_COMMAND=VERSION): %w: %.500s%.500s; is it podwall, built for this machine?", plugin, err, out, stderr.Bytes())
	}
	var answer struct {
		SupportedVersions []string `json:"supportedVersions"`
	}
	if err := json.Unmarshal(out, &answer); err != nil || len(answer.SupportedVersions) == 0 {
		return fmt.Errorf("self-test plugin %s (CNI_COMMAND=VERSION): it answers %.500q: is it podwall?", plugin, out)
	}
	return nil
}

func sum(data []byte) string {
	s := sha256.Sum256(data)
	return hex.EncodeToString(s[:])
}
