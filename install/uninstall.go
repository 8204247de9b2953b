package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"time"

	"github.com/google/renameio/v2"

	"github.com/podwall/podwall/pkg/nft"
	"github.com/podwall/podwall/pkg/ruleset"
)

const (
	// tablesInterval is how often uninstall looks whether podwalld has let go of its tables.
	tablesInterval = 200 * time.Millisecond

	// tablesQuiet is how long they must stay away while podwalld runs: it would put back what somebody else deletes.
	tablesQuiet = time.Second
)

const standDownText = `podwall was uninstalled from this node. While this file is there, podwalld leaves the CNI configuration alone.
"podwall-install install" removes it.
`

// uninstall tells podwalld first, or it would put back what is removed here. The plugin stays: CRI-O removes a pod with the
// conflist that it was made with, and fails forever when that names a plugin which is gone.
func (in *installer) uninstall(ctx context.Context) error {
	if err := os.MkdirAll(in.stateDir, 0o700); err != nil {
		return fmt.Errorf("tell podwalld to stand down: %w", err)
	}
	if err := renameio.WriteFile(in.standDown, []byte(standDownText), 0o644, renameio.WithTempDir(in.stateDir)); err != nil {
		return fmt.Errorf("tell podwalld to stand down: %w", err)
	}
	changed, err := in.store.Remove()
	for _, path := range changed {
		in.say("conflist %s: podwall removed", path)
	}
	if err != nil {
		return err
	}
	if len(changed) == 0 {
		in.say("conflist: podwall is in none of %s", in.confDir)
	}
	if err := in.removeTables(ctx); err != nil {
		return err
	}
	if !in.purge {
		return nil
	}
	switch err := os.Remove(in.target); {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		return fmt.Errorf("remove plugin: %w", err)
	default:
		in.say("plugin %s: removed", in.target)
	}
	return nil
}

// removeTables deletes podwall's tables and sees that they stay away.
func (in *installer) removeTables(ctx context.Context) error {
	kernel, err := nft.New(nft.Config{})
	if err != nil {
		return err
	}
	defer kernel.Close()
	tick := time.NewTicker(tablesInterval)
	defer tick.Stop()
	deadline := time.After(in.wait)
	var reason error // why the tables are not known to be gone for good
	deleted := map[ruleset.Family]bool{}
	last := time.Now() // when there was a table
	for {
		running := in.daemonRuns()
		for _, family := range []ruleset.Family{ruleset.Inet, ruleset.Netdev} {
			name := string(family) + " " + in.table
			err := kernel.Commit(ctx, ruleset.Delta{Apply: []ruleset.Op{{Kind: ruleset.DelTable, Table: ruleset.TableID{Family: family, Name: in.table}}}})
			switch {
			case err == nil && deleted[family]:
				last, reason = time.Now(), fmt.Errorf("table %s comes back", name)
			case err == nil:
				deleted[family] = true
				last = time.Now()
				in.say("table %s: deleted", name)
			case nft.IsPermission(err):
				running = true
				last, reason = time.Now(), fmt.Errorf("delete table %s: %w", name, err)
			case !nft.IsNotExist(err):
				return fmt.Errorf("delete table %s: %w", name, err)
			}
		}
		if !running || time.Since(last) >= tablesQuiet {
			return nil
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return fmt.Errorf("wait for podwalld to let go of its tables: %w", context.Cause(ctx))
		case <-deadline:
			if reason == nil {
				return nil
			}
			return fmt.Errorf("podwalld did not let go of its tables in %s: %w: stop podwalld and uninstall again", in.wait, reason)
		}
	}
}

// daemonRuns reports whether somebody serves podwalld's socket.
func (in *installer) daemonRuns() bool {
	conn, err := net.Dial("unix", in.socket)
	if err != nil {
		return false
	}
	_ = conn.Close()
	return true
}
