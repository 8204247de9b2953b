package main

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/intstr"
)

// The proportions of a made-up cluster.
const (
	nodeName         = "node-under-test"
	podsPerNode      = 50
	podsPerNamespace = 100
	podsPerSet       = 10 // pods of one ReplicaSet: equal but for name, UID, addresses and node
	teams            = 10 // values of the label that namespaceSelectors ask for
)

// created is when the objects of every made-up cluster were created.
var created = time.Date(2025, 3, 1, 12, 0, 0, 0, time.UTC)

// fleet makes the objects of a cluster. Equal fleets make equal objects.
type fleet struct {
	seed        uint64
	pods, local int // local of the pods are on nodeName
}

func (f fleet) namespaces() int { return max(f.pods/podsPerNamespace, 1) }

func (f fleet) random(kind, i int) *rand.Rand {
	return rand.New(rand.NewPCG(f.seed, uint64(kind)<<40|uint64(i)))
}

func namespaceName(i int) string { return fmt.Sprintf("team-%d-project-%04d", i%teams, i) }

func appName(i int) string {
	return []string{"web", "api", "db", "cache", "queue", "worker", "auth", "mail", "search", "proxy"}[i%10]
}

// hex returns n random hexadecimal digits.
func hex(r *rand.Rand, n int) string {
	var b strings.Builder
	for range n {
		b.WriteByte("0123456789abcdef"[r.IntN(16)])
	}
	return b.String()
}

func uid(r *rand.Rand) types.UID {
	return types.UID(hex(r, 8) + "-" + hex(r, 4) + "-4" + hex(r, 3) + "-a" + hex(r, 3) + "-" + hex(r, 12))
}

func (f fleet) namespace(i int) *corev1.Namespace {
	r := f.random(1, i)
	name := namespaceName(i)
	return &corev1.Namespace{
		TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Namespace"},
		ObjectMeta: metav1.ObjectMeta{
			Name: name, UID: uid(r), CreationTimestamp: metav1.NewTime(created), ManagedFields: managed(r, "kubectl-create", 300),
			Labels: map[string]string{
				corev1.LabelMetadataName: name, "team": fmt.Sprintf("team-%d", i%teams), "env": []string{"prod", "staging"}[i%2],
				"pod-security.kubernetes.io/enforce": "restricted",
			},
		},
		Spec:   corev1.NamespaceSpec{Finalizers: []corev1.FinalizerName{corev1.FinalizerKubernetes}},
		Status: corev1.NamespaceStatus{Phase: corev1.NamespaceActive},
	}
}

// podAddress is the i-th pod's: a /24 per node of 10.0.0.0/8, as flannel and kindnet give them.
func podAddress(i int) netip.Addr {
	node, host := i/200, i%200+2
	return netip.AddrFrom4([4]byte{10, byte(64 + node/256), byte(node), byte(host)})
}

// isLocal spreads the pods of nodeName over the whole cluster, as a scheduler does.
func (f fleet) isLocal(i int) bool {
	step := f.pods / f.local
	return i%step == 0 && i/step < f.local
}

// pod makes the i-th pod, also beyond the number of pods at the start: those are created later.
func (f fleet) pod(i int) *corev1.Pod {
	r := f.random(2, i)
	set := i / podsPerSet
	setRandom := f.random(3, set)
	app, hash := appName(set), hex(setRandom, 10)
	node := fmt.Sprintf("node-%05d.europe-west4-b.compute.internal", r.IntN(f.pods/podsPerNode+1))
	if i < f.pods && f.isLocal(i) {
		node = nodeName
	}
	address := podAddress(i).String()
	deployment := fmt.Sprintf("%s-%d", app, set%podsPerNamespace)
	labels := map[string]string{
		"app": app, "app.kubernetes.io/name": deployment, "app.kubernetes.io/part-of": "shop", "app.kubernetes.io/managed-by": "Helm",
		"app.kubernetes.io/version": fmt.Sprintf("1.%d.%d", setRandom.IntN(20), setRandom.IntN(9)), "tier": []string{"front", "back", "data"}[set%3],
		"pod-template-hash": hash,
	}
	began := metav1.NewTime(created.Add(time.Duration(i) * time.Second))
	p := &corev1.Pod{
		TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Pod"},
		ObjectMeta: metav1.ObjectMeta{
			Namespace: namespaceName(set / (podsPerNamespace / podsPerSet) % f.namespaces()), Name: deployment + "-" + hash + "-" + fmt.Sprintf("%05x", i),
			GenerateName: deployment + "-" + hash + "-", UID: uid(r), CreationTimestamp: began, Labels: labels,
			Annotations: map[string]string{"prometheus.io/scrape": "true", "prometheus.io/port": "9090", "checksum/config": hex(setRandom, 64)},
			OwnerReferences: []metav1.OwnerReference{{
				APIVersion: "apps/v1", Kind: "ReplicaSet", Name: deployment + "-" + hash, UID: uid(setRandom), Controller: new(true), BlockOwnerDeletion: new(true),
			}},
			ManagedFields: append(managed(setRandom, "kube-controller-manager", 1100), managed(r, "kubelet", 700)...),
		},
		Spec: corev1.PodSpec{
			NodeName: node, ServiceAccountName: deployment, DNSPolicy: corev1.DNSClusterFirst, RestartPolicy: corev1.RestartPolicyAlways,
			SchedulerName: "default-scheduler", TerminationGracePeriodSeconds: new(int64(30)), EnableServiceLinks: new(true),
			Tolerations: []corev1.Toleration{
				{Key: corev1.TaintNodeNotReady, Operator: corev1.TolerationOpExists, Effect: corev1.TaintEffectNoExecute, TolerationSeconds: new(int64(300))},
				{Key: corev1.TaintNodeUnreachable, Operator: corev1.TolerationOpExists, Effect: corev1.TaintEffectNoExecute, TolerationSeconds: new(int64(300))},
			},
			Volumes: []corev1.Volume{
				{Name: "config", VolumeSource: corev1.VolumeSource{ConfigMap: &corev1.ConfigMapVolumeSource{LocalObjectReference: corev1.LocalObjectReference{Name: deployment}}}},
				{Name: "tmp", VolumeSource: corev1.VolumeSource{EmptyDir: &corev1.EmptyDirVolumeSource{}}},
				{Name: "kube-api-access-" + hex(r, 5), VolumeSource: corev1.VolumeSource{Projected: &corev1.ProjectedVolumeSource{Sources: []corev1.VolumeProjection{
					{ServiceAccountToken: &corev1.ServiceAccountTokenProjection{ExpirationSeconds: new(int64(3607)), Path: "token"}},
					{ConfigMap: &corev1.ConfigMapProjection{LocalObjectReference: corev1.LocalObjectReference{Name: "kube-root-ca.crt"}}},
				}}}},
			},
		},
		Status: corev1.PodStatus{
			Phase: corev1.PodRunning, HostIP: "192.0.2.10", PodIP: address, PodIPs: []corev1.PodIP{{IP: address}}, StartTime: &began, QOSClass: corev1.PodQOSBurstable,
		},
	}
	for _, c := range []corev1.PodConditionType{"PodReadyToStartContainers", corev1.PodInitialized, corev1.PodReady, corev1.ContainersReady, corev1.PodScheduled} {
		p.Status.Conditions = append(p.Status.Conditions, corev1.PodCondition{Type: c, Status: corev1.ConditionTrue, LastTransitionTime: began})
	}
	for c, name := range []string{app, "istio-proxy", "log-shipper"}[:2+set%2] {
		p.Spec.Containers = append(p.Spec.Containers, container(setRandom, name, c))
		p.Status.ContainerStatuses = append(p.Status.ContainerStatuses, corev1.ContainerStatus{
			Name: name, Ready: true, Started: new(true), Image: p.Spec.Containers[c].Image, ImageID: "registry.example.com/shop/" + name + "@sha256:" + hex(setRandom, 64),
			ContainerID: "containerd://" + hex(r, 64), State: corev1.ContainerState{Running: &corev1.ContainerStateRunning{StartedAt: began}},
		})
	}
	return p
}

func container(r *rand.Rand, name string, c int) corev1.Container {
	quantity := func(cpu, memory string) corev1.ResourceList {
		return corev1.ResourceList{corev1.ResourceCPU: resource.MustParse(cpu), corev1.ResourceMemory: resource.MustParse(memory)}
	}
	probe := &corev1.Probe{
		ProbeHandler:  corev1.ProbeHandler{HTTPGet: &corev1.HTTPGetAction{Path: "/healthz", Port: intstr.FromString("http"), Scheme: corev1.URISchemeHTTP}},
		PeriodSeconds: 10, TimeoutSeconds: 1, SuccessThreshold: 1, FailureThreshold: 3,
	}
	k := corev1.Container{
		Name: name, Image: "registry.example.com/shop/" + name + ":1." + fmt.Sprint(r.IntN(40)), ImagePullPolicy: corev1.PullIfNotPresent,
		TerminationMessagePath: "/dev/termination-log", TerminationMessagePolicy: corev1.TerminationMessageReadFile,
		Resources: corev1.ResourceRequirements{Requests: quantity("100m", "128Mi"), Limits: quantity("1", "512Mi")}, LivenessProbe: probe, ReadinessProbe: probe,
		VolumeMounts: []corev1.VolumeMount{
			{Name: "config", MountPath: "/etc/" + name, ReadOnly: true},
			{Name: "tmp", MountPath: "/tmp"},
			{Name: "kube-api-access", MountPath: "/var/run/secrets/kubernetes.io/serviceaccount", ReadOnly: true},
		},
	}
	if c == 0 {
		k.Ports = []corev1.ContainerPort{{Name: "http", ContainerPort: 8080, Protocol: corev1.ProtocolTCP}, {Name: "metrics", ContainerPort: 9090, Protocol: corev1.ProtocolTCP}}
	}
	for v := range 6 {
		k.Env = append(k.Env, corev1.EnvVar{Name: fmt.Sprintf("%s_SETTING_%d", strings.ToUpper(name), v), Value: hex(r, 12+4*v)})
	}
	k.Env = append(k.Env, corev1.EnvVar{Name: "POD_IP", ValueFrom: &corev1.EnvVarSource{FieldRef: &corev1.ObjectFieldSelector{APIVersion: "v1", FieldPath: "status.podIP"}}})
	return k
}

// managed is a managedFields entry of about n bytes, the largest part of most objects.
func managed(r *rand.Rand, manager string, n int) []metav1.ManagedFieldsEntry {
	var b strings.Builder
	b.WriteString(`{"f:metadata":{"f:labels":{`)
	for b.Len() < n {
		fmt.Fprintf(&b, `"f:%s":{},`, hex(r, 14))
	}
	b.WriteString(`".":{}}}}`)
	return []metav1.ManagedFieldsEntry{{
		Manager: manager, Operation: metav1.ManagedFieldsOperationUpdate, APIVersion: "v1", FieldsType: "FieldsV1",
		Time: new(metav1.NewTime(created)), FieldsV1: metav1.NewFieldsV1(b.String()),
	}}
}

// policy makes the i-th policy: every namespace has some, of all the sorts that people write.
func (f fleet) policy(i int) *networkingv1.NetworkPolicy {
	r := f.random(4, i)
	namespace, sort := i%f.namespaces(), i/f.namespaces()
	labels := func(kv ...string) *metav1.LabelSelector {
		m := map[string]string{}
		for j := 0; j < len(kv); j += 2 {
			m[kv[j]] = kv[j+1]
		}
		return &metav1.LabelSelector{MatchLabels: m}
	}
	port := func(p any) networkingv1.NetworkPolicyPort {
		if name, ok := p.(string); ok {
			return networkingv1.NetworkPolicyPort{Protocol: new(corev1.ProtocolTCP), Port: new(intstr.FromString(name))}
		}
		return networkingv1.NetworkPolicyPort{Protocol: new(corev1.ProtocolTCP), Port: new(intstr.FromInt(p.(int)))}
	}
	app := labels("app", appName(r.IntN(10)))
	p := &networkingv1.NetworkPolicy{
		TypeMeta: metav1.TypeMeta{APIVersion: "networking.k8s.io/v1", Kind: "NetworkPolicy"},
		ObjectMeta: metav1.ObjectMeta{
			Namespace: namespaceName(namespace), Name: fmt.Sprintf("policy-%d", sort), UID: uid(r), CreationTimestamp: metav1.NewTime(created),
			ManagedFields: managed(r, "argocd-application-controller", 500),
		},
		Spec: networkingv1.NetworkPolicySpec{PodSelector: *app, PolicyTypes: []networkingv1.PolicyType{networkingv1.PolicyTypeIngress}},
	}
	ingress := func(ports []networkingv1.NetworkPolicyPort, peers ...networkingv1.NetworkPolicyPeer) {
		p.Spec.Ingress = append(p.Spec.Ingress, networkingv1.NetworkPolicyIngressRule{Ports: ports, From: peers})
	}
	egress := func(ports []networkingv1.NetworkPolicyPort, peers ...networkingv1.NetworkPolicyPeer) {
		p.Spec.Egress = append(p.Spec.Egress, networkingv1.NetworkPolicyEgressRule{Ports: ports, To: peers})
	}
	switch sort % 6 {
	case 0: // from some pods of the namespace
		ingress([]networkingv1.NetworkPolicyPort{port(8080)}, networkingv1.NetworkPolicyPeer{PodSelector: labels("app", appName(r.IntN(10)))})
	case 1: // from everything of a team
		ingress([]networkingv1.NetworkPolicyPort{port("http")}, networkingv1.NetworkPolicyPeer{NamespaceSelector: labels("team", fmt.Sprintf("team-%d", r.IntN(teams)))})
	case 2: // from the scrapers of all namespaces
		ingress([]networkingv1.NetworkPolicyPort{port("metrics")}, networkingv1.NetworkPolicyPeer{
			NamespaceSelector: labels("env", "prod"), PodSelector: labels("app", "proxy", "tier", "front"),
		})
	case 3: // to the outside, but not to private addresses
		p.Spec.PolicyTypes = []networkingv1.PolicyType{networkingv1.PolicyTypeEgress}
		egress([]networkingv1.NetworkPolicyPort{port(443)}, networkingv1.NetworkPolicyPeer{
			IPBlock: &networkingv1.IPBlock{CIDR: "0.0.0.0/0", Except: []string{"10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16"}},
		})
		egress([]networkingv1.NetworkPolicyPort{{Protocol: new(corev1.ProtocolUDP), Port: new(intstr.FromInt(53))}},
			networkingv1.NetworkPolicyPeer{NamespaceSelector: labels(corev1.LabelMetadataName, namespaceName(0))})
	case 4: // the namespace is closed
		p.Spec.PodSelector = metav1.LabelSelector{}
		p.Spec.PolicyTypes = []networkingv1.PolicyType{networkingv1.PolicyTypeIngress, networkingv1.PolicyTypeEgress}
		egress(nil, networkingv1.NetworkPolicyPeer{PodSelector: &metav1.LabelSelector{}})
	case 5: // an office, a range of ports and an expression
		p.Spec.PodSelector = metav1.LabelSelector{MatchExpressions: []metav1.LabelSelectorRequirement{
			{Key: "tier", Operator: metav1.LabelSelectorOpIn, Values: []string{"front", "back"}}, {Key: "legacy", Operator: metav1.LabelSelectorOpDoesNotExist},
		}}
		block := networkingv1.NetworkPolicyPeer{IPBlock: &networkingv1.IPBlock{CIDR: fmt.Sprintf("203.0.%d.0/24", r.IntN(113))}}
		ports := port(30000)
		ports.EndPort = new(int32(30100))
		ingress([]networkingv1.NetworkPolicyPort{ports}, block)
	}
	return p
}
