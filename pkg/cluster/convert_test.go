package cluster

import (
	"net/netip"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

var compareIPs = cmp.Comparer(func(a, b netip.Addr) bool { return a == b })

func TestPodFrom(t *testing.T) {
	t.Parallel()
	created := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	always := corev1.ContainerRestartPolicyAlways
	onFailure := corev1.ContainerRestartPolicyOnFailure
	port := func(name string, number int32, proto corev1.Protocol) corev1.Container {
		return corev1.Container{Ports: []corev1.ContainerPort{{Name: name, ContainerPort: number, Protocol: proto}}}
	}
	restarted := func(c corev1.Container, policy *corev1.ContainerRestartPolicy) corev1.Container {
		c.RestartPolicy = policy
		return c
	}
	tests := []struct {
		name string
		pod  corev1.Pod
		want Pod
	}{
		{"empty", corev1.Pod{}, Pod{}},
		{
			"metadata, node and phase running",
			corev1.Pod{
				ObjectMeta: metav1.ObjectMeta{
					Namespace: "shop", Name: "web", UID: "u1", Labels: map[string]string{"app": "web"},
					CreationTimestamp: metav1.NewTime(created), ManagedFields: []metav1.ManagedFieldsEntry{{Manager: "kubectl"}},
					Annotations: map[string]string{"kubernetes.io/config.mirror": "hash", "other": "x"},
				},
				Spec:   corev1.PodSpec{NodeName: "node1"},
				Status: corev1.PodStatus{Phase: corev1.PodRunning},
			},
			Pod{
				Namespace: "shop", Name: "web", UID: "u1", MirrorUID: "hash", Node: "node1",
				Labels: map[string]string{"app": "web"}, Created: created,
			},
		},
		{
			"deleting is not terminal",
			corev1.Pod{ObjectMeta: metav1.ObjectMeta{DeletionTimestamp: &metav1.Time{Time: created}}},
			Pod{Deleting: true},
		},
		{"succeeded", corev1.Pod{Status: corev1.PodStatus{Phase: corev1.PodSucceeded}}, Pod{Terminal: true}},
		{"failed", corev1.Pod{Status: corev1.PodStatus{Phase: corev1.PodFailed}}, Pod{Terminal: true}},
		{"pending", corev1.Pod{Status: corev1.PodStatus{Phase: corev1.PodPending}}, Pod{}},
		{"hostNetwork", corev1.Pod{Spec: corev1.PodSpec{HostNetwork: true}}, Pod{HostNetwork: true}},
		{
			"addresses: both families, IPv4-mapped unmapped, invalid and repeated ones skipped",
			corev1.Pod{Status: corev1.PodStatus{PodIP: "192.0.2.1", PodIPs: []corev1.PodIP{
				{IP: "10.0.0.1"}, {IP: "fd00::1"}, {IP: "::ffff:10.0.0.2"}, {IP: "10.0.0.256"}, {IP: ""}, {IP: "fe80::1%eth0"}, {IP: "10.0.0.1"},
			}}},
			Pod{IPs: []netip.Addr{netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("fd00::1"), netip.MustParseAddr("10.0.0.2")}},
		},
		{
			"addresses: podIP alone",
			corev1.Pod{Status: corev1.PodStatus{PodIP: "10.0.0.9"}},
			Pod{IPs: []netip.Addr{netip.MustParseAddr("10.0.0.9")}},
		},
		{
			"ports: named ones of containers and native sidecars, duplicates kept",
			corev1.Pod{Spec: corev1.PodSpec{
				InitContainers: []corev1.Container{
					restarted(port("sidecar", 9000, "TCP"), &always), restarted(port("job", 9001, "TCP"), &onFailure), port("init", 9002, "TCP"),
				},
				Containers: []corev1.Container{
					port("http", 80, ""), port("http", 8080, "TCP"), port("dns", 53, "UDP"), port("sig", 5, "SCTP"),
					port("", 81, "TCP"), port("icmp", 1, "ICMP"), port("zero", 0, "TCP"), port("big", 65536, "TCP"), port("last", 65535, "TCP"),
				},
			}},
			Pod{Ports: []NamedPort{
				{"sidecar", TCP, 9000}, {"http", TCP, 80}, {"http", TCP, 8080}, {"dns", UDP, 53}, {"sig", SCTP, 5}, {"last", TCP, 65535},
			}},
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			if diff := cmp.Diff(&tt.want, PodFrom(&tt.pod), compareIPs); diff != "" {
				t.Errorf("PodFrom (-want +got):\n%s", diff)
			}
		})
	}
}

func TestNamespaceAndPolicyFrom(t *testing.T) {
	t.Parallel()
	labels := map[string]string{"team": "a"}
	ns := NamespaceFrom(&corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "shop", Labels: labels}})
	if diff := cmp.Diff(&Namespace{Name: "shop", Labels: labels}, ns); diff != "" {
		t.Errorf("NamespaceFrom (-want +got):\n%s", diff)
	}
	spec := networkingv1.NetworkPolicySpec{Ingress: []networkingv1.NetworkPolicyIngressRule{{}}}
	policy := PolicyFrom(&networkingv1.NetworkPolicy{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "p", Labels: labels}, Spec: spec})
	if diff := cmp.Diff(&Policy{Namespace: "shop", Name: "p", Spec: spec}, policy); diff != "" {
		t.Errorf("PolicyFrom (-want +got):\n%s", diff)
	}
}
