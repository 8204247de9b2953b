package policy

import (
	"crypto/sha256"
	"encoding/base32"
	"encoding/binary"
	"strings"
	"time"
)

// Names in the kernel. Everything that other software may rely on is in docs/architecture.md.
const (
	chainForward    = "forward"    // forward hook, filter: what pods send and receive
	chainNode       = "node"       // input hook, filter: what pods send to their own node
	chainCommon     = "common"     // what passes between all pods: neighbour discovery, multicast listeners, DHCP
	chainNotNew     = "notnew"     // what is for an isolated pod and neither begins a connection nor belongs to one
	chainGroups     = "groups"     // what is sent to groups, and in IPv4 beyond them
	chainUnsent     = "unsent"     // what no egress policy of its sender allows
	chainQuarantine = "quarantine" // endpoints that are not known

	chainOutput    = "output"     // output hook, filter: what the node sends to pods, for revoked connections only
	chainRevoked   = "revoked"    // what may come back on a revoked connection
	chainMidstream = "midstream"  // TCP packets that begin no connection
	chainDenied    = "denied"     // denied packets that belong to a revoked connection
	chainCut       = "cut"        // the end of a revoked connection
	chainBeforeNAT = "prerouting" // prerouting hook, before DNAT: what bridged clients of revoked connections to Services go on sending

	prefixEgress  = "eg_" // per endpoint
	prefixIngress = "in_" // per endpoint
	prefixSource  = "as_" // per endpoint: the host veth's ingress hook (anti-spoofing)
	prefixDeliver = "to_" // per endpoint on a bridge: the host veth's egress hook
	prefixProfile = "ep_" // per set of policies that an endpoint's egress is under
	prefixPolicyI = "pi_" // per policy (and, with named ports, per resolution of the names)

	setPeers      = "p"   // p4_, p6_: addresses of a selector's pods
	setNamedPorts = "np"  // np4_, np6_: address . protocol . port of a selector's pods that have a named port
	setBlocks     = "b"   // b4_, b6_: an ipBlock with many ranges
	setPorts      = "pt_" // protocol . port
	setPortRanges = "pr_" // ports of one protocol, where a rule has many of them and many peers
	setND         = "nd"
	setMLD        = "mld"

	mapEgress4, mapEgress6   = "eg4", "eg6"
	mapIngress4, mapIngress6 = "in4", "in6"
)

// setIsolatedLinks are the routed host veths of pods that are isolated for ingress, or closed.
const setIsolatedLinks = "il"

// setDenied are the addresses of pods that have lately sent what their egress policies do not allow, each with its own counter and limit, IPv4
// and IPv6.
var setDenied = [2]string{"ed4", "ed6"}

// Sets of revocation, IPv4 and IPv6.
var (
	setCut             = [2]string{"cut4", "cut6"}       // source . port . destination . port . protocol of revoked connections
	setCutBeforeNAT    = [2]string{"cutnat4", "cutnat6"} // the same as their clients send them, to a Service
	setEgressIsolated  = [2]string{"ie4", "ie6"}
	setIngressIsolated = [2]string{"ii4", "ii6"}
)

// Priorities (linux/netfilter_ipv4.h: NF_IP_PRI_FILTER = 0, NF_IP_PRI_RAW = -300). filter is after DNAT (-100) and before SNAT (100).
const (
	priorityFilter = 0
	priorityDevice = -300
	// Behind conntrack (-200), before DNAT.
	priorityBeforeNAT = -150
)

// LogGroup is the NFLOG group that denied packets are sent to, and LogSnaplen how much of each: an IPv6 header and what may come between it
// and the ports. A pod's chain sends logPerSecond of them after a burst of logBurst; of what a pod sends, each of its addresses.
const (
	LogGroup   = 77
	LogSnaplen = 96

	logPerSecond = 10
	logBurst     = 20
)

// deniedTimeout is how long after its last denied packet an address is in a set of setDenied, and deniedSize how many of them there may be: more than
// a node has pods.
const (
	deniedTimeout = 10 * time.Minute
	deniedSize    = 1 << 12
)

// Directions of a denied packet, seen from the endpoint whose policies deny it.
const (
	DirectionIngress = "ingress"
	DirectionEgress  = "egress"
)

// logPrefix is what a chain names its denied packets by: a letter for the direction, and the endpoint where the chain is one's own. The kernel
// takes 127 bytes (NF_LOG_PREFIXLEN), which a pod's name may fill alone.
func logPrefix(direction, id string) string { return direction[:1] + id }

// Denied returns the direction that the prefix of a logged packet stands for; false for one that is not podwall's.
func Denied(logPrefix string) (string, bool) {
	for _, direction := range []string{DirectionIngress, DirectionEgress} {
		if strings.HasPrefix(logPrefix, direction[:1]) {
			return direction, true
		}
	}
	return "", false
}

// ID returns a short name for an identity given as parts: 80 bits of SHA-256 over the length-prefixed parts, so that
// ("a", "bc") and ("ab", "c") differ and no name of a policy can collide with another's (kernel names end at 255 bytes).
func ID(parts ...string) string {
	h := sha256.New()
	var n [8]byte
	for _, p := range parts {
		binary.BigEndian.PutUint64(n[:], uint64(len(p)))
		h.Write(n[:])
		h.Write([]byte(p))
	}
	return strings.ToLower(base32.HexEncoding.WithPadding(base32.NoPadding).EncodeToString(h.Sum(nil)[:10]))
}
