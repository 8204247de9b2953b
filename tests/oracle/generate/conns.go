package generate

import (
	"cmp"
	"math/rand/v2"
	"net/netip"
	"slices"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"

	"github.com/podwall/podwall/tests/oracle"
	"github.com/podwall/podwall/tests/oracle/layout"
)

// perCluster is how many connections Conns draws. There are some three hundred pairs of addresses, and fifty ports for each.
const perCluster = 600

// probe is a protocol and a port.
type probe struct {
	protocol oracle.Protocol
	port     uint16
}

// Conns returns connections that are worth trying: between local pods (with themselves too), between local pods and everybody
// else, and with the node. Ports are at and beside every number that a policy names, and those that a pod has. The same
// cluster gives the same connections. With several clusters (before and after a change) it is those that can be tried in all
// of them.
func Conns(clusters ...*oracle.Cluster) []oracle.Conn {
	pairs := pairs(clusters)
	if len(pairs) == 0 {
		return nil
	}
	weigh := weights(clusters[len(clusters)-1])
	sums := make([]int, len(pairs))
	sum := 0
	for i, conn := range pairs {
		sum += weigh(conn)
		sums[i] = sum
	}
	random := rand.New(rand.NewPCG(1, 2))
	probes, own := probes(clusters), containerProbes(clusters)
	conns := make([]oracle.Conn, perCluster)
	for i := range conns {
		n, _ := slices.BinarySearch(sums, 1+random.IntN(sum))
		conn := pairs[n]
		from := probes
		if list := own[conn.Dst]; len(list) > 0 && random.IntN(2) == 0 {
			from = list
		}
		p := from[random.IntN(len(from))]
		conn.Protocol, conn.Port = p.protocol, p.port
		conns[i] = conn
	}
	return conns
}

// weights returns how often a pair of ends is tried. Most of NetworkPolicy happens between pods that policies select, and most
// mistakes where it is not plain whose an address is. Addresses that nobody has are tried least.
func weights(c *oracle.Cluster) func(oracle.Conn) int {
	const (
		pod       = 4
		selected  = 12
		contested = 20
	)
	weight := map[netip.Addr]int{}
	for _, s := range c.Sandboxes {
		for _, ip := range s.IPs {
			weight[ip] = pod
		}
	}
	for _, p := range c.Pods {
		w := pod
		switch {
		case p.Spec.HostNetwork || completed(p):
			w = contested
		case slices.ContainsFunc(c.Policies, func(o *networkingv1.NetworkPolicy) bool { return isSubject(o, p) }):
			w = selected
		}
		for _, ip := range addressesOf(c, p) {
			if weight[ip] > 0 && p.Spec.NodeName != c.Node {
				w = contested
			}
			weight[ip] = max(weight[ip], w)
		}
	}
	return func(conn oracle.Conn) int {
		if conn.Src == conn.Dst {
			return 3 * weight[conn.Src]
		}
		return max(1, weight[conn.Src]) * max(1, weight[conn.Dst])
	}
}

func isSubject(policy *networkingv1.NetworkPolicy, p *corev1.Pod) bool {
	s, err := metav1.LabelSelectorAsSelector(&policy.Spec.PodSelector)
	return err == nil && policy.Namespace == p.Namespace && s.Matches(labels.Set(p.Labels))
}

// addressesOf returns the addresses of a pod's sandbox, or those that it reports.
func addressesOf(c *oracle.Cluster, p *corev1.Pod) []netip.Addr {
	for _, s := range c.Sandboxes {
		if s.Namespace == p.Namespace && s.Name == p.Name {
			return s.IPs
		}
	}
	return reported(p)
}

// containerProbes returns, by address, the container ports of whoever may be there.
func containerProbes(clusters []*oracle.Cluster) map[netip.Addr][]probe {
	probes := map[netip.Addr][]probe{}
	for _, c := range clusters {
		for _, p := range c.Pods {
			for _, container := range slices.Concat(p.Spec.Containers, p.Spec.InitContainers) {
				for _, port := range container.Ports {
					for _, ip := range addressesOf(c, p) {
						probes[ip] = append(probes[ip], probe{oracle.Protocol(cmp.Or(port.Protocol, corev1.ProtocolTCP)), uint16(port.ContainerPort)})
					}
				}
			}
		}
	}
	return probes
}

// pairs returns the ends of connections. What the node sends to a closed pod is left out: neither NetworkPolicy nor podwall
// decides it, as nobody is there yet who could answer.
func pairs(clusters []*oracle.Cluster) []oracle.Conn {
	var local []netip.Addr
	for _, c := range clusters {
		local = append(local, localIPs(c)...)
	}
	slices.SortFunc(local, netip.Addr.Compare)
	local = slices.DeleteFunc(slices.Compact(local), func(ip netip.Addr) bool { return inAny(clusters, disputed, ip) })
	others := slices.Concat(layout.RemotePods, layout.Outside)
	var list []oracle.Conn
	for _, a := range local {
		for _, b := range local {
			list = append(list, oracle.Conn{Src: a, Dst: b})
		}
		for _, b := range others {
			list = append(list, oracle.Conn{Src: a, Dst: b}, oracle.Conn{Src: b, Dst: a})
		}
		open := !inAny(clusters, closed, a)
		for _, b := range layout.Node {
			list = append(list, oracle.Conn{Src: a, Dst: b, ToNode: true})
			if open {
				list = append(list, oracle.Conn{Src: b, Dst: a, FromNode: true})
			}
		}
	}
	return slices.DeleteFunc(list, func(conn oracle.Conn) bool { return conn.Src.Is4() != conn.Dst.Is4() })
}

func inAny(clusters []*oracle.Cluster, is func(*oracle.Cluster, netip.Addr) bool, ip netip.Addr) bool {
	return slices.ContainsFunc(clusters, func(c *oracle.Cluster) bool { return is(c, ip) })
}

func closed(c *oracle.Cluster, ip netip.Addr) bool {
	return slices.ContainsFunc(c.Sandboxes, func(s oracle.Sandbox) bool {
		return slices.Contains(s.IPs, ip) && podOf(c, s.Namespace, s.Name) == nil
	})
}

// probes returns ICMP, and every port of every protocol that could make a difference.
func probes(clusters []*oracle.Cluster) []probe {
	ports := ports(clusters)
	var list []probe
	for _, n := range ports {
		for _, protocol := range []oracle.Protocol{oracle.TCP, oracle.TCP, oracle.UDP, oracle.SCTP} {
			list = append(list, probe{protocol, n})
		}
		list = append(list, probe{protocol: oracle.ICMP}) // as often as a protocol: it has no ports to be tried with
	}
	return list
}

func ports(clusters []*oracle.Cluster) []uint16 {
	var numbers []int32
	for _, c := range clusters {
		for _, p := range c.Policies {
			for _, r := range p.Spec.Ingress {
				numbers = append(numbers, bounds(r.Ports)...)
			}
			for _, r := range p.Spec.Egress {
				numbers = append(numbers, bounds(r.Ports)...)
			}
		}
	}
	numbers = append(numbers, portNumbers...)
	var ports []uint16
	for _, n := range numbers {
		for _, near := range []int32{n - 1, n, n + 1} {
			if 1 <= near && near <= 65535 {
				ports = append(ports, uint16(near))
			}
		}
	}
	slices.Sort(ports)
	return slices.Compact(ports)
}

func bounds(ports []networkingv1.NetworkPolicyPort) []int32 {
	var numbers []int32
	for _, p := range ports {
		if p.Port != nil && p.Port.StrVal == "" {
			numbers = append(numbers, p.Port.IntVal)
		}
		if p.EndPort != nil {
			numbers = append(numbers, *p.EndPort)
		}
	}
	return numbers
}
