package generate

import (
	"net/netip"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/podwall/podwall/tests/oracle"
	"github.com/podwall/podwall/tests/oracle/layout"
)

// podKind says where a pod is and who knows of it.
type podKind uint8

const (
	attached    podKind = iota // on this node, with a sandbox
	remote                     // on another node
	adopted                    // on this node since before podwall: known by what the API reports
	hostNetwork                // has its node's addresses
	released                   // completed: reports addresses that are free, or somebody else's by now
	orphan                     // a sandbox without a pod object
)

// podKinds are weighted.
var podKinds = slices.Concat(slices.Repeat([]podKind{attached}, 28), slices.Repeat([]podKind{remote}, 20), slices.Repeat([]podKind{hostNetwork, released}, 6), []podKind{adopted, adopted, adopted, orphan})

const elsewhere = "there"

// addPod adds a pod, its sandbox, or both. When the node is full a local pod becomes a remote one.
func (m *maker) addPod(kind podKind) {
	free := freePlaces(m.c)
	if len(free) == 0 && (kind == attached || kind == adopted || kind == orphan) {
		kind = remote
	}
	pod := m.pod()
	switch kind {
	case attached, orphan:
		s := oracle.Sandbox{Namespace: pod.Namespace, Name: pod.Name, IPs: m.families(pick(m, free).IPs)}
		m.c.Sandboxes = append(m.c.Sandboxes, s)
		if kind == orphan {
			return
		}
		pod.Spec.NodeName = m.c.Node
		m.report(pod, s.IPs)
		if m.oneIn(8) {
			pod.Status.Phase = corev1.PodFailed // the sandbox is still there, and so are its policies
		}
	case adopted:
		pod.Spec.NodeName = m.c.Node
		m.reportAll(pod, m.families(pick(m, free).IPs))
	case remote:
		pod.Spec.NodeName = elsewhere
		ips := m.remoteIPs()
		if m.oneIn(8) {
			ips = pick(m, layout.Places).IPs // stale or wrong: a sandbox that is there has them
		}
		m.reportAll(pod, m.families(ips))
	case hostNetwork:
		pod.Spec.HostNetwork = true
		pod.Spec.NodeName = m.c.Node
		m.reportAll(pod, layout.Node[:2])
		if m.oneIn(2) {
			pod.Spec.NodeName = elsewhere
			m.reportAll(pod, layout.Outside[:2])
		}
	case released:
		pod.Spec.NodeName = elsewhere
		m.reportAll(pod, m.remoteIPs())
		if m.oneIn(3) {
			pod.Spec.NodeName = m.c.Node
			m.reportAll(pod, pick(m, layout.Places).IPs)
		}
		pod.Status.Phase = pick(m, []corev1.PodPhase{corev1.PodSucceeded, corev1.PodFailed})
	}
	// The order of objects must not matter.
	m.c.Pods = slices.Insert(m.c.Pods, m.between(0, len(m.c.Pods)), pod)
}

// pod draws what does not depend on where it is. It is newer than all others.
func (m *maker) pod() *corev1.Pod {
	created := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	for _, p := range m.c.Pods {
		if !p.CreationTimestamp.Time.Before(created) {
			created = p.CreationTimestamp.Add(time.Second)
		}
	}
	namespace := pick(m, homes)
	pod := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: namespace, Name: freeName("p", func(name string) bool { return known(m.c, namespace, name) }),
			Labels: m.labels(), CreationTimestamp: metav1.NewTime(created),
		},
		Status: corev1.PodStatus{Phase: corev1.PodRunning},
	}
	m.containers(&pod.Spec)
	return pod
}

// known looks at sandboxes as well: one whose pod is gone stays closed, and is nobody else's.
func known(c *oracle.Cluster, namespace, name string) bool {
	return podOf(c, namespace, name) != nil ||
		slices.ContainsFunc(c.Sandboxes, func(s oracle.Sandbox) bool { return s.Namespace == namespace && s.Name == name })
}

func podOf(c *oracle.Cluster, namespace, name string) *corev1.Pod {
	for _, p := range c.Pods {
		if p.Namespace == namespace && p.Name == name {
			return p
		}
	}
	return nil
}

// containerNames is also how many containers a pod has at most.
var containerNames = []string{"one", "two"}

func (m *maker) containers(spec *corev1.PodSpec) {
	for _, name := range containerNames[:m.between(1, len(containerNames))] {
		spec.Containers = append(spec.Containers, corev1.Container{Name: name, Ports: m.containerPorts()})
	}
	if m.oneIn(2) {
		always := corev1.ContainerRestartPolicyAlways
		spec.InitContainers = append(spec.InitContainers, corev1.Container{Name: "sidecar", RestartPolicy: &always, Ports: m.containerPorts()})
	}
	if m.oneIn(3) {
		spec.InitContainers = append(spec.InitContainers, corev1.Container{Name: "init", Ports: m.containerPorts()})
	}
}

var (
	portNames   = []string{"web", "dns"}
	portNumbers = []int32{80, 53, 8080}
	// The API server fills in TCP; files have not been through it.
	containerProtocols = []corev1.Protocol{corev1.ProtocolTCP, "", "", corev1.ProtocolTCP, corev1.ProtocolUDP, corev1.ProtocolSCTP}
)

// containerPorts draws each name at most once (the API refuses more in one container) and sometimes a port without a name.
func (m *maker) containerPorts() []corev1.ContainerPort {
	var ports []corev1.ContainerPort
	for _, name := range append(slices.Clone(portNames), "") {
		if m.oneIn(3) || name == "" && !m.oneIn(4) {
			continue
		}
		ports = append(ports, corev1.ContainerPort{Name: name, ContainerPort: pick(m, portNumbers), Protocol: pick(m, containerProtocols)})
	}
	return ports
}

// families draws one or both of an IPv4 and an IPv6 address.
func (m *maker) families(ips []netip.Addr) []netip.Addr {
	switch m.between(0, 7) {
	case 6:
		return ips[:1]
	case 7:
		return ips[1:2]
	}
	return ips
}

// remoteIPs draws both addresses of a remote pod. Two pods often draw the same: then the newer one has it.
func (m *maker) remoteIPs() []netip.Addr {
	i := 2 * pick(m, []int{0, 0, 0, 0, 1, 1, 2, len(layout.RemotePods)/2 - 1})
	return layout.RemotePods[i : i+2]
}

// report puts addresses in the status of a pod that has a sandbox: all, not yet, or only the first family yet.
func (m *maker) report(pod *corev1.Pod, ips []netip.Addr) {
	switch m.between(0, 5) {
	case 4:
		ips = nil
	case 5:
		ips = ips[:1]
	}
	m.reportAll(pod, ips)
}

func (m *maker) reportAll(pod *corev1.Pod, ips []netip.Addr) {
	pod.Status.PodIPs = nil
	for _, ip := range ips {
		pod.Status.PodIPs = append(pod.Status.PodIPs, corev1.PodIP{IP: ip.String()})
	}
}

// freePlaces returns the places where no sandbox and no adopted pod is.
func freePlaces(c *oracle.Cluster) []layout.Place {
	taken := localIPs(c)
	return slices.DeleteFunc(vacant(c), func(p layout.Place) bool {
		return slices.ContainsFunc(p.IPs, func(ip netip.Addr) bool { return slices.Contains(taken, ip) })
	})
}

// vacant returns the places without a sandbox.
func vacant(c *oracle.Cluster) []layout.Place {
	return slices.DeleteFunc(slices.Clone(layout.Places), func(p layout.Place) bool { return sandboxAt(c, p) >= 0 })
}

func sandboxAt(c *oracle.Cluster, p layout.Place) int {
	return slices.IndexFunc(c.Sandboxes, func(s oracle.Sandbox) bool { return slices.Contains(p.IPs, s.IPs[0]) })
}

// localIPs returns the addresses of whoever is on the node: of sandboxes, and of living pods that the API reports at vacant
// places.
func localIPs(c *oracle.Cluster) []netip.Addr {
	var ips []netip.Addr
	for _, s := range c.Sandboxes {
		ips = append(ips, s.IPs...)
	}
	for _, p := range c.Pods {
		if p.Spec.NodeName != c.Node || p.Spec.HostNetwork || completed(p) {
			continue
		}
		for _, ip := range reported(p) {
			if !slices.Contains(ips, ip) && !disputed(c, ip) {
				ips = append(ips, ip)
			}
		}
	}
	return ips
}

// disputed reports whether an address of a place cannot be tried: the veth there is that of a sandbox without it.
func disputed(c *oracle.Cluster, ip netip.Addr) bool {
	place, ok := layout.PlaceOf(ip)
	if !ok {
		return false
	}
	if i := sandboxAt(c, place); i >= 0 {
		return !slices.Contains(c.Sandboxes[i].IPs, ip)
	}
	return false
}

func completed(p *corev1.Pod) bool {
	return p.Status.Phase == corev1.PodSucceeded || p.Status.Phase == corev1.PodFailed
}

func reported(p *corev1.Pod) []netip.Addr {
	var ips []netip.Addr
	for _, ip := range p.Status.PodIPs {
		ips = append(ips, netip.MustParseAddr(ip.IP))
	}
	return ips
}
