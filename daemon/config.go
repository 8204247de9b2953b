package main

import (
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"strings"

	"github.com/podwall/podwall/pkg/agentapi"
	"github.com/podwall/podwall/pkg/cli"
	"github.com/podwall/podwall/pkg/policy"
	"github.com/podwall/podwall/pkg/ruleset"
)

// config is the command line of `podwalld run`.
type config struct {
	kubeconfig, manifests string
	nodeName              string
	socket, stateDir      string
	table                 string
	listen                string
	cniConfDir            string
	ownNodeEgress         string
	nodeDNS               addresses
	established           string
	deny                  string
	logLevel              slog.Level
	logFormat             string
}

// addresses is a repeatable flag of IPs; commas separate them in the environment.
type addresses []netip.Addr

// String implements flag.Value.
func (a *addresses) String() string {
	list := make([]string, len(*a))
	for i, ip := range *a {
		list[i] = ip.String()
	}
	return strings.Join(list, ",")
}

// Set implements flag.Value.
func (a *addresses) Set(s string) error {
	for part := range strings.SplitSeq(s, ",") {
		ip, err := netip.ParseAddr(strings.TrimSpace(part))
		if err != nil || ip.Zone() != "" {
			return fmt.Errorf("%q is not an IP address", part)
		}
		*a = append(*a, ip.Unmap())
	}
	return nil
}

func (c *config) flags(fs *flag.FlagSet) {
	fs.StringVar(&c.kubeconfig, "kubeconfig", "", "kubeconfig `FILE` of the API server; empty means in-cluster")
	fs.StringVar(&c.manifests, "manifests", "", "read Namespaces, Pods and NetworkPolicies from `DIR` instead of an API server")
	fs.StringVar(&c.nodeName, "node-name", "", "this node's name (default $NODE_NAME, then the hostname)")
	fs.StringVar(&c.socket, "socket", agentapi.DefaultSocket, "`PATH` of the socket that the CNI plugin and operator commands speak to")
	fs.StringVar(&c.stateDir, "state-dir", "/run/podwall", "`DIR` of the lock and of attachments/, the registrations")
	fs.StringVar(&c.table, "table", "podwall", "`NAME` of the nftables tables, inet and netdev")
	fs.StringVar(&c.listen, "listen", "127.0.0.1:9481", "`ADDR` for /metrics, /livez and /readyz; empty switches them off")
	fs.StringVar(&c.cniConfDir, "cni-conf-dir", "", "watch the conflists in `DIR` and append podwall's entry again when it was lost; empty means off")
	fs.StringVar(&c.ownNodeEgress, "own-node-egress", "enforce", "pod to its own node: `enforce|allow` egress policies")
	fs.Var(&c.nodeDNS, "node-dns", "`IP` of this node whose port 53 every pod may reach, for NodeLocal DNS (repeatable)")
	fs.StringVar(&c.established, "established", "cut", "connections that a change no longer allows: `cut|keep`")
	fs.StringVar(&c.deny, "deny", "drop", "what happens to denied packets: `drop|reject`")
	fs.TextVar(&c.logLevel, "log-level", slog.LevelInfo, "`LEVEL`: debug, info, warn or error")
	fs.StringVar(&c.logFormat, "log-format", "text", "`text|json`")
}

var tableName = regexp.MustCompile(`^[a-zA-Z][a-zA-Z0-9_-]{0,31}$`)

// complete fills in what depends on the machine and reports everything that is wrong, joined.
func (c *config) complete() error {
	var errs []error
	add := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	if c.kubeconfig != "" && c.manifests != "" {
		add("--kubeconfig and --manifests exclude each other: policies come from an API server or from files")
	}
	if c.nodeName == "" {
		c.nodeName = os.Getenv("NODE_NAME")
	}
	if c.nodeName == "" {
		host, err := os.Hostname()
		if err != nil {
			add("--node-name is not set and the hostname cannot be read: %w", err)
		}
		c.nodeName = strings.ToLower(host)
	}
	if !filepath.IsAbs(c.socket) {
		add("--socket %q: must be an absolute path", c.socket)
	}
	if !filepath.IsAbs(c.stateDir) {
		add("--state-dir %q: must be an absolute path", c.stateDir)
	}
	if c.cniConfDir != "" && !filepath.IsAbs(c.cniConfDir) {
		add("--cni-conf-dir %q: must be an absolute path", c.cniConfDir)
	}
	if !tableName.MatchString(c.table) {
		add("--table %q: want a letter and up to 31 letters, digits, _ or -", c.table)
	}
	if c.listen != "" {
		if _, _, err := net.SplitHostPort(c.listen); err != nil {
			add("--listen %q: want HOST:PORT, or empty for none", c.listen)
		}
	}
	for _, choice := range []struct{ flag, value, a, b string }{
		{"own-node-egress", c.ownNodeEgress, "enforce", "allow"},
		{"established", c.established, "cut", "keep"},
		{"deny", c.deny, "drop", "reject"},
		{"log-format", c.logFormat, "text", "json"},
	} {
		if choice.value != choice.a && choice.value != choice.b {
			add("--%s %q: must be %s or %s", choice.flag, choice.value, choice.a, choice.b)
		}
	}
	if err := errors.Join(errs...); err != nil {
		return cli.UsageError{Err: err}
	}
	return nil
}

// tables are what podwall may have in the kernel.
func (c *config) tables() []ruleset.TableID {
	return []ruleset.TableID{{Family: ruleset.Inet, Name: c.table}, {Family: ruleset.Netdev, Name: c.table}}
}

func (c *config) options() policy.Options {
	return policy.Options{
		Table:        c.table,
		AllowOwnNode: c.ownNodeEgress == "allow",
		NodeDNS:      c.nodeDNS,
		Cut:          c.established == "cut",
		Reject:       c.deny == "reject",
	}
}
