package policy

import (
	"crypto/sha256"
	"encoding/base32"
	"encoding/binary"
	"strings"
)

// Names in the kernel. Everything that other software may rely on is in docs/architecture.md.
const (
	chainEgress     = "egress"     // forward hook, filter - 1: what pods send
	chainIngress    = "ingress"    // forward hook, filter: what pods receive
	chainNode       = "node"       // input hook, filter: what pods send to their own node
	chainCommon     = "common"     // what passes between all pods: neighbour discovery, multicast listeners, DHCP
	chainNotNew     = "notnew"     // what of an isolated pod neither begins a connection nor belongs to one
	chainGroups     = "groups"     // what is sent to groups, and in IPv4 beyond them
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
	prefixPolicyE = "pe_" // per policy
	prefixPeers   = "pp_" // per list of peers, where a rule has many ports
	prefixPolicyI = "pi_" // per policy (and, with named ports, per resolution of the names)

	setPeers      = "p"   // p4_, p6_: addresses of a selector's pods
	setNamedPorts = "np"  // np4_, np6_: address . protocol . port of a selector's pods that have a named port
	setBlocks     = "b"   // b4_, b6_: an ipBlock with many ranges
	setPorts      = "pt_" // protocol . port
	setND         = "nd"
	setMLD        = "mld"

	mapEgress4, mapEgress6   = "eg4", "eg6"
	mapIngress4, mapIngress6 = "in4", "in6"
)

// setIsolatedLinks are the routed host veths of pods that are isolated for ingress, or closed.
const setIsolatedLinks = "il"

// Sets of revocation, IPv4 and IPv6.
var (
	setCut             = [2]string{"cut4", "cut6"}       // source . port . destination . port . protocol of revoked connections
	setCutBeforeNAT    = [2]string{"cutnat4", "cutnat6"} // the same as their clients send them, to a Service
	setEgressIsolated  = [2]string{"ie4", "ie6"}
	setIngressIsolated = [2]string{"ii4", "ii6"}
)

// Priorities (linux/netfilter_ipv4.h: NF_IP_PRI_FILTER = 0, NF_IP_PRI_RAW = -300). Egress policy comes first, so that each
// base chain's accept leaves the other's verdict alone. filter is after DNAT (-100) and before SNAT (100).
const (
	priorityEgress  = -1
	priorityIngress = 0
	priorityDevice  = -300
	// Behind conntrack (-200), before DNAT.
	priorityBeforeNAT = -150
)

// LogGroup is the NFLOG group that denied packets are sent to, and LogSnaplen how much of each: an IPv6 header and what may come between it
// and the ports. One chain sends logPerSecond of them after a burst of logBurst.
const (
	LogGroup   = 77
	LogSnaplen = 96

	logPerSecond = 10
	logBurst     = 20
)

// Directions of a denied packet, seen from the endpoint whose policies deny it.
const (
	DirectionIngress = "ingress"
	DirectionEgress  = "egress"
)

// logPrefix is what an endpoint's chain names its denied packets by: a letter for the direction and the endpoint. The kernel takes 127
// bytes (NF_LOG_PREFIXLEN), which a pod's name may fill alone.
func logPrefix(chainPrefix, id string) string { return chainPrefix[:1] + id }

// Denied returns the direction and the endpoint's ID that the prefix of a logged packet stands for; false for one that is not podwall's.
func Denied(logPrefix string) (string, string, bool) {
	if len(logPrefix) < 2 {
		return "", "", false
	}
	switch id := logPrefix[1:]; logPrefix[:1] {
	case prefixIngress[:1]:
		return DirectionIngress, id, true
	case prefixEgress[:1]:
		return DirectionEgress, id, true
	}
	return "", "", false
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
