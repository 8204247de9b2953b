// Package attach describes one CNI attachment: what the plugin learns at ADD and the daemon enforces.
// It is a leaf, so that the plugin, the socket and the daemon share one value and nothing else.
package attach

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"regexp"
)

// Key identifies an attachment for its whole life. It is (containerID, ifname) and never a pod name or an IP:
// a late DEL of an old sandbox arrives after the ADD of its successor (CNI SPEC, "Container ID"; kubernetes #44100).
type Key struct {
	ContainerID string `json:"containerID"`
	IfName      string `json:"ifname"`
}

// String returns containerID/ifname, the form used in paths and logs.
func (k Key) String() string { return k.ContainerID + "/" + k.IfName }

// Compare orders keys by container and then by interface.
func Compare(a, b Key) int {
	return cmp.Or(cmp.Compare(a.ContainerID, b.ContainerID), cmp.Compare(a.IfName, b.IfName))
}

// PodRef names the pod that owns the sandbox. UID may be empty (old runtimes do not pass K8S_POD_UID), and so may the
// whole reference (cnitool, podman): the plugin passes on what the runtime told it and the daemon decides whose pod it is.
type PodRef struct {
	Namespace string `json:"namespace"`
	Name      string `json:"name"`
	UID       string `json:"uid,omitempty"`
}

// String returns namespace/name.
func (p PodRef) String() string { return p.Namespace + "/" + p.Name }

// Named reports whether both namespace and name are set.
func (p PodRef) Named() bool { return p.Namespace != "" && p.Name != "" }

// HostLink is the host side of the sandbox's interface. Names are reused by the kernel's users, so the index goes with it.
type HostLink struct {
	Name  string `json:"name"`
	Index int    `json:"index"`
}

// Attachment is one interface of one sandbox on this node.
type Attachment struct {
	Network string `json:"network"`
	Key
	Pod      PodRef            `json:"pod"`
	IPs      []netip.Addr      `json:"ips"`
	HostLink HostLink          `json:"hostLink"`
	Labels   map[string]string `json:"labels,omitempty"` // args.cni.labels; used only where no API server describes the pod
	Netns    string            `json:"netns,omitempty"`  // information only: the daemon never opens it
}

// The patterns of the CNI SPEC ("Parameters"): an ID is used as a file name, so nothing else may pass.
var (
	containerIDPattern = regexp.MustCompile(`^[a-zA-Z0-9][a-zA-Z0-9_.\-]*$`)
	networkPattern     = regexp.MustCompile(`^[a-zA-Z0-9][a-zA-Z0-9_.\-]*$`)
)

// maxContainerID leaves room for the interface name and a suffix in a 255 byte file name.
const maxContainerID = 200

// maxIfName is IFNAMSIZ - 1.
const maxIfName = 15

// Validate reports everything that is wrong with the key, joined.
func (k Key) Validate() error {
	var errs []error
	if !containerIDPattern.MatchString(k.ContainerID) || len(k.ContainerID) > maxContainerID {
		errs = append(errs, fmt.Errorf("containerID %.80q: want 1 to %d of [a-zA-Z0-9_.-], starting with a letter or digit", k.ContainerID, maxContainerID))
	}
	if err := validateIfName(k.IfName); err != nil {
		errs = append(errs, fmt.Errorf("ifname %.80q: %w", k.IfName, err))
	}
	return errors.Join(errs...)
}

// validateIfName follows dev_valid_name of the kernel (net/core/dev.c).
func validateIfName(name string) error {
	if name == "" || name == "." || name == ".." || len(name) > maxIfName {
		return fmt.Errorf("want an interface name of 1 to %d bytes", maxIfName)
	}
	for _, c := range []byte(name) {
		if c <= ' ' || c == '/' || c == ':' || c == 0x7f {
			return fmt.Errorf("byte %#x is not allowed in an interface name", c)
		}
	}
	return nil
}

// Validate reports everything that is wrong with the attachment, joined. A valid attachment has a network, a key,
// at least one unmapped IP without a zone, and a host link with name and index; its pod is named in full or not at all.
func (a *Attachment) Validate() error {
	errs := []error{a.Key.Validate()}
	if !networkPattern.MatchString(a.Network) {
		errs = append(errs, fmt.Errorf("network %.80q: not a CNI network name", a.Network))
	}
	if !a.Pod.Named() && a.Pod != (PodRef{}) {
		errs = append(errs, fmt.Errorf("pod %q: namespace and name must both be set", a.Pod))
	}
	if len(a.IPs) == 0 {
		errs = append(errs, errors.New("ips: at least one address is needed"))
	}
	for _, ip := range a.IPs {
		if !ip.IsValid() || ip.Is4In6() || ip.Zone() != "" || ip.IsUnspecified() || ip.IsMulticast() || ip.IsLoopback() {
			errs = append(errs, fmt.Errorf("ips: %q is not a pod's address", ip))
		}
	}
	if err := validateIfName(a.HostLink.Name); err != nil {
		errs = append(errs, fmt.Errorf("hostLink name %.80q: %w", a.HostLink.Name, err))
	}
	if a.HostLink.Index <= 0 {
		errs = append(errs, fmt.Errorf("hostLink index %d: must be positive", a.HostLink.Index))
	}
	return errors.Join(errs...)
}
