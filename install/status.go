package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"time"

	"github.com/podwall/podwall/pkg/cli"
	"github.com/podwall/podwall/pkg/conflist"
)

// unverified is the state of a plugin that is there, when there is none to compare it with.
const unverified conflist.State = "unverified"

// report is the answer of status.
type report struct {
	OK       bool `json:"ok"`
	Plugin   part `json:"plugin"`
	Conflist part `json:"conflist"`
	// StandDown says that podwall was uninstalled and podwalld leaves the conflist alone.
	StandDown bool `json:"standDown"`
}

type part struct {
	Path   string         `json:"path"`
	State  conflist.State `json:"state"`
	SHA256 string         `json:"sha256,omitempty"`
	Note   string         `json:"note,omitempty"`
}

// statusInterval is how often status looks while it waits.
const statusInterval = 200 * time.Millisecond

func (in *installer) status(ctx context.Context) error {
	tick := time.NewTicker(statusInterval)
	defer tick.Stop()
	deadline := time.After(in.wait)
	for {
		r, err := in.report()
		if err != nil {
			return err
		}
		if r.OK {
			return in.print(r)
		}
		select {
		case <-tick.C:
			continue
		case <-deadline:
		case <-ctx.Done():
		}
		if err := in.print(r); err != nil {
			return err
		}
		return cli.ErrNo
	}
}

func (in *installer) report() (report, error) {
	var r report
	var err error
	if r.Plugin, err = in.pluginStatus(); err != nil {
		return r, err
	}
	if r.Conflist, err = in.conflistStatus(); err != nil {
		return r, err
	}
	_, err = os.Stat(in.standDown)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return r, fmt.Errorf("look whether podwalld stands down: %w", err)
	}
	r.StandDown = err == nil
	r.OK = (r.Plugin.State == conflist.Installed || r.Plugin.State == unverified) && r.Conflist.State == conflist.Installed && !r.StandDown
	return r, nil
}

func (in *installer) pluginStatus() (part, error) {
	p := part{Path: in.target, State: conflist.Missing}
	have, err := os.ReadFile(in.target)
	if errors.Is(err, fs.ErrNotExist) {
		return p, nil
	}
	if err != nil {
		return p, fmt.Errorf("read installed plugin: %w", err)
	}
	p.SHA256 = sum(have)
	info, err := os.Stat(in.target)
	if err != nil {
		return p, fmt.Errorf("read installed plugin: %w", err)
	}
	want, err := os.ReadFile(in.plugin)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		p.State, p.Note = unverified, fmt.Sprintf("no %s to compare it with, see --plugin", in.plugin)
	case err != nil:
		return p, fmt.Errorf("read plugin: %w", err)
	case !bytes.Equal(have, want):
		p.State, p.Note = conflist.Outdated, fmt.Sprintf("differs from %s", in.plugin)
	default:
		p.State = conflist.Installed
	}
	if info.Mode().Perm()&0o111 != 0o111 {
		p.State, p.Note = conflist.Outdated, "not executable: mode "+info.Mode().String()
	}
	return p, nil
}

func (in *installer) conflistStatus() (part, error) {
	report, err := in.store.State()
	if errors.Is(err, conflist.ErrNoConflist) {
		return part{Path: in.confDir, State: conflist.Missing, Note: err.Error()}, nil
	}
	if err != nil {
		return part{}, err
	}
	p := part{Path: report.Path, State: report.State}
	if err := errors.Join(report.Skipped...); err != nil {
		p.Note = "passed over " + err.Error()
	}
	return p, nil
}

func (in *installer) print(r report) error {
	if in.output == "json" {
		enc := json.NewEncoder(in.stdout)
		enc.SetIndent("", "  ")
		return enc.Encode(r)
	}
	for _, p := range []struct {
		name string
		part
	}{{"plugin", r.Plugin}, {"conflist", r.Conflist}} {
		in.say("%-9s %-10s %s", p.name, p.State, p.Path)
		if p.Note != "" {
			in.say("%-9s %s", "", p.Note)
		}
	}
	if r.StandDown {
		in.say("podwall was uninstalled from this node (%s): podwall-install install undoes it", in.standDown)
	}
	return nil
}
