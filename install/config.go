package main

import (
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"time"

	cniconf "github.com/podwall/podwall/cni-conf"
	"github.com/podwall/podwall/pkg/conflist"
)

// defaultSocket is what the plugin uses when its entry names none.
const defaultSocket = "/run/podwall/podwall.sock"

// config is the command line.
type config struct {
	binDir, confDir  string
	plugin           string
	socket, stateDir string
	table            string
	timeout          time.Duration
	logFile          string
	wait             time.Duration
	output           string
	purge            bool
}

// commonFlags are those of every command, so that one line of flags serves all three.
func commonFlags(fs *flag.FlagSet, c *config) {
	fs.StringVar(&c.binDir, "cni-bin-dir", "/opt/cni/bin", "`DIR` where the runtime looks for CNI plugins")
	fs.StringVar(&c.confDir, "cni-conf-dir", "/etc/cni/net.d", "`DIR` where the runtime looks for CNI configurations")
	fs.StringVar(&c.plugin, "plugin", "", "`FILE` that is installed as the plugin (default: podwall beside this program)")
	fs.StringVar(&c.socket, "socket", defaultSocket, "`PATH` of podwalld's socket")
	fs.StringVar(&c.stateDir, "state-dir", "/run/podwall", "podwalld's `DIR` for state; a file in it tells podwalld to stand down")
}

func entryFlags(fs *flag.FlagSet, c *config) {
	fs.DurationVar(&c.timeout, "timeout", 0, "how long the plugin's ADD waits for podwalld, for the entry (default: the plugin's own)")
	fs.StringVar(&c.logFile, "log-file", "", "`PATH` of a file where the plugin logs its calls, for the entry (default: none)")
}

func installFlags(fs *flag.FlagSet, c *config) {
	commonFlags(fs, c)
	entryFlags(fs, c)
	fs.DurationVar(&c.wait, "wait", 0, "how long to wait for the main CNI plugin's configuration if there is none yet")
}

func uninstallFlags(fs *flag.FlagSet, c *config) {
	commonFlags(fs, c)
	fs.StringVar(&c.table, "table", "podwall", "`NAME` of podwalld's nftables tables")
	fs.DurationVar(&c.wait, "wait", 10*time.Second, "how long to wait for podwalld to let go of its tables")
	fs.BoolVar(&c.purge, "purge", false, "remove the plugin too: CRI-O then cannot remove pods that were made with it")
}

func statusFlags(fs *flag.FlagSet, c *config) {
	commonFlags(fs, c)
	entryFlags(fs, c)
	fs.DurationVar(&c.wait, "wait", 0, "how long to wait for podwall to be installed")
	fs.StringVar(&c.output, "o", "text", "output: `text|json`")
}

// tableName is what podwalld accepts.
var tableName = regexp.MustCompile(`^[a-zA-Z][a-zA-Z0-9_-]{0,31}$`)

// complete fills in what depends on the machine and reports everything that is wrong, joined.
func (c *config) complete() error {
	var errs []error
	add := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	if c.plugin == "" {
		self, err := os.Executable()
		if err != nil {
			add("--plugin is not set and this program does not know where it is: %w", err)
		}
		c.plugin = filepath.Join(filepath.Dir(self), conflist.Type)
	}
	for _, p := range []struct{ flag, path string }{
		{"cni-bin-dir", c.binDir}, {"cni-conf-dir", c.confDir}, {"socket", c.socket}, {"state-dir", c.stateDir}, {"log-file", c.logFile},
	} {
		if !filepath.IsAbs(p.path) && (p.flag != "log-file" || p.path != "") {
			add("--%s %q: must be an absolute path", p.flag, p.path)
		}
	}
	if c.timeout < 0 || c.wait < 0 {
		add("--timeout and --wait must not be negative")
	}
	if c.table != "" && !tableName.MatchString(c.table) {
		add("--table %q: want a letter and up to 31 letters, digits, _ or -", c.table)
	}
	if c.output != "" && c.output != "text" && c.output != "json" {
		add("-o %q: must be text or json", c.output)
	}
	return errors.Join(errs...)
}

// entry returns what the conflist is to have: the embedded entry, and of the plugin's options those that differ from its defaults.
func (c *config) entry() ([]byte, error) {
	var e struct {
		Type    string `json:"type"`
		Socket  string `json:"socket,omitempty"`
		Timeout string `json:"timeout,omitempty"`
		LogFile string `json:"logFile,omitempty"`
	}
	if err := json.Unmarshal(cniconf.Entry(), &e); err != nil {
		return nil, fmt.Errorf("parse embedded entry: %w", err)
	}
	if c.socket != defaultSocket {
		e.Socket = c.socket
	}
	if c.timeout > 0 {
		e.Timeout = c.timeout.String()
	}
	e.LogFile = c.logFile
	return json.Marshal(e)
}
