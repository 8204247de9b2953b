package cniplugin

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"
	"github.com/containernetworking/cni/pkg/version"

	"github.com/podwall/podwall/pkg/agentapi"
	"github.com/podwall/podwall/pkg/attach"
)

// maxSocketPath is what sockaddr_un.sun_path holds (unix(7)).
const maxSocketPath = 107

// validKey is how libcni passes GC's list.
const validKey = "cni.dev/valid-attachments"

// config is the plugin's stdin: its entry of the conflist and what the runtime added. Keys that are not podwall's are not looked at,
// since libcni leaves the runtime's own (capabilities, runtimeConfig) in.
type config struct {
	raw        map[string]json.RawMessage
	cniVersion string
	network    string
	socket     string
	timeout    time.Duration
	logFile    string
}

// parseConfig returns what can be used, with defaults for the rest, and everything that is wrong.
func parseConfig(stdin []byte) (config, error) {
	c := config{cniVersion: "0.1.0", socket: agentapi.DefaultSocket, timeout: agentapi.DefaultAttachTimeout}
	if err := json.Unmarshal(stdin, &c.raw); err != nil {
		return c, types.NewError(types.ErrDecodingFailure, "cannot decode the network configuration", err.Error())
	}
	// skel has checked these two.
	_ = json.Unmarshal(c.raw["cniVersion"], &c.cniVersion)
	_ = json.Unmarshal(c.raw["name"], &c.network)
	return c, errors.Join(
		c.option("socket", "an absolute path of at most 107 bytes", func(s string) bool {
			if !filepath.IsAbs(s) || len(s) > maxSocketPath {
				return false
			}
			c.socket = s
			return true
		}),
		c.option("timeout", fmt.Sprintf("a Go duration of at most %s, such as 10s", agentapi.MaxAttachTimeout), func(s string) bool {
			d, err := time.ParseDuration(s)
			if err != nil || d <= 0 || d > agentapi.MaxAttachTimeout {
				return false
			}
			c.timeout = d
			return true
		}),
		c.option("logFile", "an absolute path", func(s string) bool {
			if !filepath.IsAbs(s) {
				return false
			}
			c.logFile = s
			return true
		}),
	)
}

// option hands a string key of the entry, if there is one, to set.
func (c *config) option(key, want string, set func(string) bool) error {
	raw, ok := c.raw[key]
	if !ok || string(raw) == "null" {
		return nil
	}
	var s string
	if err := json.Unmarshal(raw, &s); err != nil || !set(s) {
		return types.NewError(types.ErrInvalidNetworkConfig, fmt.Sprintf("%s %.200s in podwall's conflist entry: want %s", key, raw, want), "")
	}
	return nil
}

// labels reads the convention args.cni.labels, [{"key": ..., "value": ...}] (CNI CONVENTIONS.md).
func (c *config) labels() (map[string]string, error) {
	raw, ok := c.raw["args"]
	if !ok {
		return nil, nil
	}
	var args struct {
		CNI struct {
			Labels []struct {
				Key   string  `json:"key"`
				Value *string `json:"value"`
			} `json:"labels"`
		} `json:"cni"`
	}
	bad := func(what string) error {
		return types.NewError(types.ErrInvalidNetworkConfig, fmt.Sprintf(`args.cni.labels %.200s: %s; want [{"key": "app", "value": "web"}]`, raw, what), "")
	}
	if err := json.Unmarshal(raw, &args); err != nil {
		return nil, bad(err.Error())
	}
	var labels map[string]string
	for _, l := range args.CNI.Labels {
		if l.Key == "" || l.Value == nil {
			return nil, bad("a label lacks key or value")
		}
		if _, dup := labels[l.Key]; dup {
			return nil, bad(fmt.Sprintf("label %q is there twice", l.Key))
		}
		if labels == nil {
			labels = map[string]string{}
		}
		labels[l.Key] = *l.Value
	}
	return labels, nil
}

// validAttachments tells an absent list (cnitool) from null (CRI-O without pods) and from a list.
func (c *config) validAttachments() ([]attach.Key, bool, error) {
	raw, ok := c.raw[validKey]
	if !ok {
		return nil, false, nil
	}
	var valid []attach.Key
	if err := json.Unmarshal(raw, &valid); err != nil {
		return nil, false, types.NewError(types.ErrInvalidNetworkConfig, fmt.Sprintf("%s %.200s: want a list of containerID and ifname", validKey, raw), err.Error())
	}
	return valid, true, nil
}

// previous is the main plugin's result, as it will be printed and in the form of the newest version.
type previous struct {
	out    types.Result
	result types100.Result
}

// previous returns nil if there is no prevResult.
func (c *config) previous() (*previous, error) {
	conf := types.PluginConf{CNIVersion: c.cniVersion}
	bad := func(err error) error {
		return types.NewError(types.ErrDecodingFailure, "cannot decode prevResult", err.Error())
	}
	raw, ok := c.raw["prevResult"]
	if !ok {
		return nil, nil
	}
	if err := json.Unmarshal(raw, &conf.RawPrevResult); err != nil {
		return nil, bad(err)
	}
	if err := noNulls(conf.RawPrevResult); err != nil {
		return nil, bad(err)
	}
	if err := version.ParsePrevResult(&conf); err != nil {
		return nil, bad(err)
	}
	if conf.PrevResult == nil {
		return nil, nil
	}
	out, err := conf.PrevResult.GetAsVersion(c.cniVersion)
	if err != nil {
		return nil, bad(err)
	}
	result, err := types100.NewResultFromResult(conf.PrevResult)
	if err != nil {
		return nil, bad(err)
	}
	return &previous{out: out, result: *result}, nil
}

// noNulls refuses lists with null in them: types of CNI follow them as pointers when they convert between versions.
func noNulls(result map[string]any) error {
	for key, value := range result {
		list, _ := value.([]any)
		known := func(k string) bool { return strings.EqualFold(k, key) } // as encoding/json does
		if slices.ContainsFunc([]string{"interfaces", "ips", "routes"}, known) && slices.Contains(list, nil) {
			return fmt.Errorf("%s has null in it: the main plugin is at fault", key)
		}
	}
	return nil
}

// podIPs returns the addresses of ifname: those without an interface and those whose interface has its name. The sandbox does not count,
// kindnet and azure leave it empty. An index that points nowhere is refused, for the alternative is an address without policies.
func (p *previous) podIPs(ifname string) ([]netip.Addr, error) {
	var ips []netip.Addr
	for _, ipc := range p.result.IPs {
		if ipc.Interface != nil {
			i := *ipc.Interface
			if i < 0 || i >= len(p.result.Interfaces) {
				return nil, types.NewError(types.ErrInvalidNetworkConfig,
					fmt.Sprintf("prevResult: IP %s belongs to interface %d and there are %d: the main plugin is at fault", ipc.Address.IP, i, len(p.result.Interfaces)), "")
			}
			if iface := p.result.Interfaces[i]; iface == nil || iface.Name != ifname {
				continue
			}
		}
		ip, ok := netip.AddrFromSlice(ipc.Address.IP)
		if !ok {
			return nil, types.NewError(types.ErrInvalidNetworkConfig, fmt.Sprintf("prevResult: %q is not an IP: the main plugin is at fault", ipc.Address.IP), "")
		}
		if ip = ip.Unmap(); !slices.Contains(ips, ip) {
			ips = append(ips, ip)
		}
	}
	return ips, nil
}

// hostNames returns the interfaces that may be on the host: bridges, host sides, and some that exist nowhere.
func (p *previous) hostNames(ifname string) []string {
	var names []string
	for _, iface := range p.result.Interfaces {
		if iface != nil && iface.Sandbox == "" && iface.Name != ifname {
			names = append(names, iface.Name)
		}
	}
	return names
}

// cniArgs are the keys of CNI_ARGS that containerd and CRI-O pass; types.LoadArgs goes by the fields' names.
type cniArgs struct {
	types.CommonArgs
	K8S_POD_NAMESPACE types.UnmarshallableString //nolint:revive // see above
	K8S_POD_NAME      types.UnmarshallableString //nolint:revive // see above
	K8S_POD_UID       types.UnmarshallableString //nolint:revive // see above
}

// podRef reads CNI_ARGS. Without a pod the reference stays empty: the daemon knows whether that is allowed.
func podRef(s string) (attach.PodRef, error) {
	args := cniArgs{CommonArgs: types.CommonArgs{IgnoreUnknown: true}}
	if err := types.LoadArgs(s, &args); err != nil {
		return attach.PodRef{}, types.NewError(types.ErrInvalidEnvironmentVariables, fmt.Sprintf("malformed CNI_ARGS %.200q", s), err.Error())
	}
	pod := attach.PodRef{Namespace: string(args.K8S_POD_NAMESPACE), Name: string(args.K8S_POD_NAME), UID: string(args.K8S_POD_UID)}
	if pod.Namespace == "" && pod.Name == "" {
		return attach.PodRef{}, nil
	}
	if !pod.Named() {
		return attach.PodRef{}, types.NewError(types.ErrInvalidEnvironmentVariables, "CNI_ARGS must have both K8S_POD_NAMESPACE and K8S_POD_NAME, or neither", s)
	}
	return pod, nil
}
