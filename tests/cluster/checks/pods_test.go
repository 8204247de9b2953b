package checks

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"net"
	"net/http"
	"net/url"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"github.com/podwall/podwall/tests/cluster/lab"
)

// Ports of the probe program in every pod.
const (
	web     = "80"
	sink    = "82"
	control = "9000"
)

// pod is a running pod of the probe program.
type pod struct {
	c         *cluster
	namespace string
	name      string
	node      string
	ip        string
	created   time.Time // when the API server had answered
	http      *http.Client
	labels    map[string]string
}

func (p *pod) addr(port string) string { return net.JoinHostPort(p.ip, port) }

// ref is how podwall names it.
func (p *pod) ref() string { return p.namespace + "/" + p.name }

// namespace makes a namespace for a test.
func (c *cluster) namespace(t *testing.T) string {
	t.Helper()
	*c.names++
	name := fmt.Sprintf("check-%d", *c.names)
	ns := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name}}
	if _, err := c.client.CoreV1().Namespaces().Create(t.Context(), ns, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = c.client.CoreV1().Namespaces().Delete(context.Background(), name, metav1.DeleteOptions{})
	})
	// After an outage of the API server its controllers take up to a minute to come back to it.
	eventually(t, 2*time.Minute, "service account of "+name, func() error {
		_, err := c.client.CoreV1().ServiceAccounts(name).Get(t.Context(), "default", metav1.GetOptions{})
		return err
	})
	return name
}

// podSpec describes a pod of the probe program. Change may alter what is created.
type podSpec struct {
	namespace, name, node string
	labels                map[string]string
	args                  []string
	change                func(*corev1.Pod)
}

func (s podSpec) object() *corev1.Pod {
	labels := map[string]string{"pod": s.name}
	maps.Copy(labels, s.labels)
	o := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: s.namespace, Name: s.name, Labels: labels},
		Spec: corev1.PodSpec{
			TerminationGracePeriodSeconds: new(int64),
			AutomountServiceAccountToken:  new(false),
			EnableServiceLinks:            new(false),
			Containers: []corev1.Container{{
				Name: "probe", Image: lab.ProbeImage, ImagePullPolicy: corev1.PullNever, Args: s.args,
			}},
			NodeSelector: map[string]string{"kubernetes.io/hostname": s.node},
		},
	}
	if s.change != nil {
		s.change(o)
	}
	return o
}

// create creates a pod and does not wait for it.
func (c *cluster) create(t *testing.T, s podSpec) *pod {
	t.Helper()
	o, err := c.client.CoreV1().Pods(s.namespace).Create(t.Context(), s.object(), metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return &pod{c: c, namespace: s.namespace, name: s.name, node: s.node, created: time.Now(), labels: o.Labels, http: c.httpClient(s.node)}
}

// httpClient speaks from a node, whose traffic to its own pods is exempt from policies.
func (c *cluster) httpClient(node string) *http.Client {
	return &http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{
		MaxIdleConnsPerHost: 1, IdleConnTimeout: 2 * time.Second,
		DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
			return c.nodes[node].Dial(ctx, network, addr)
		},
	}}
}

// start creates pods and waits until all of them run.
func (c *cluster) start(t *testing.T, specs ...podSpec) []*pod {
	t.Helper()
	pods := make([]*pod, len(specs))
	for i, s := range specs {
		pods[i] = c.create(t, s)
	}
	for _, p := range pods {
		p.waitRunning(t, 3*time.Minute)
	}
	return pods
}

// object is the pod as the API server has it.
func (p *pod) object(t *testing.T) *corev1.Pod {
	t.Helper()
	o, err := p.c.client.CoreV1().Pods(p.namespace).Get(t.Context(), p.name, metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return o
}

func (p *pod) waitRunning(t *testing.T, timeout time.Duration) {
	t.Helper()
	eventually(t, timeout, "pod "+p.ref()+" to run", func() error {
		o, err := p.c.client.CoreV1().Pods(p.namespace).Get(t.Context(), p.name, metav1.GetOptions{})
		if err != nil {
			return err
		}
		p.ip = o.Status.PodIP
		for _, s := range o.Status.ContainerStatuses {
			if s.State.Running != nil && p.ip != "" {
				return nil
			}
		}
		time.Sleep(80 * time.Millisecond) // many pods are waited for at once
		return fmt.Errorf("phase %s", o.Status.Phase)
	})
	// It listens a moment after it runs.
	eventually(t, 20*time.Second, "the program of pod "+p.ref(), func() error {
		_, err := p.try(http.MethodGet, "/started", nil)
		return err
	})
}

func (p *pod) delete(t *testing.T) {
	t.Helper()
	err := p.c.client.CoreV1().Pods(p.namespace).Delete(t.Context(), p.name, metav1.DeleteOptions{GracePeriodSeconds: new(int64)})
	if err != nil {
		t.Fatal(err)
	}
}

// try asks the probe program from the pod's own node.
func (p *pod) try(method, path string, query url.Values) (json.RawMessage, error) {
	req, err := http.NewRequest(method, "http://"+p.addr(control)+path+"?"+query.Encode(), http.NoBody)
	if err != nil {
		return nil, err
	}
	resp, err := p.http.Do(req)
	if err != nil {
		return nil, err
	}
	defer func() { _ = resp.Body.Close() }()
	var body json.RawMessage
	if resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("%s: %s", path, resp.Status)
	}
	if resp.ContentLength == 0 {
		return nil, nil
	}
	return body, json.NewDecoder(resp.Body).Decode(&body)
}

func ask[T any](t *testing.T, p *pod, method, path string, query url.Values) T {
	t.Helper()
	var v T
	data, err := p.tryDecoded(method, path, query, &v)
	if err != nil {
		t.Fatalf("ask pod %s: %v (%s)", p.ref(), err, data)
	}
	return v
}

func (p *pod) tryDecoded(method, path string, query url.Values, v any) (json.RawMessage, error) {
	data, err := p.try(method, path, query)
	if err != nil || data == nil {
		return data, err
	}
	return data, json.Unmarshal(data, v)
}

// outcome of a connection, see the probe program.
type outcome struct {
	OK    bool   `json:"ok"`
	Reply string `json:"reply"`
	Error string `json:"error"`
}

func (p *pod) connect(t *testing.T, addr string) outcome {
	t.Helper()
	return ask[outcome](t, p, http.MethodGet, "/connect", url.Values{"to": {addr}, "timeout": {"700ms"}})
}

// allowed fails the test unless a connection is possible, which may take until a change is enforced.
func (p *pod) allowed(t *testing.T, addr string) {
	t.Helper()
	eventually(t, 10*time.Second, fmt.Sprintf("%s (%s) to reach %s", p.ref(), p.ip, addr), func() error {
		if o := p.connect(t, addr); !o.OK {
			return fmt.Errorf("%s", o.Error)
		}
		return nil
	})
}

// denied fails the test unless connections become impossible and stay so.
func (p *pod) denied(t *testing.T, addr string) {
	t.Helper()
	eventually(t, 10*time.Second, fmt.Sprintf("%s (%s) not to reach %s", p.ref(), p.ip, addr), func() error {
		if o := p.connect(t, addr); o.OK {
			return fmt.Errorf("answered: %s", o.Reply)
		}
		return nil
	})
	for range 2 {
		if o := p.connect(t, addr); o.OK {
			t.Fatalf("%s (%s) reached %s again after it was denied: %s", p.ref(), p.ip, addr, o.Reply)
		}
	}
}

// send starts a stream of a datagram every so often from p to another pod's sink.
func (p *pod) send(t *testing.T, stream, addr string, every time.Duration) {
	t.Helper()
	ask[any](t, p, http.MethodPost, "/send", url.Values{"stream": {stream}, "to": {addr}, "every": {every.String()}})
}

// stream is what has arrived, see the probe program.
type stream struct {
	Count    uint64 `json:"count"`
	First    int64  `json:"first"`
	Last     int64  `json:"last"`
	FirstSeq uint64 `json:"firstSeq"`
	LastSeq  uint64 `json:"lastSeq"`
	Gaps     []gap  `json:"gaps"`
}

type gap struct {
	From int64  `json:"from"`
	To   int64  `json:"to"`
	Lost uint64 `json:"lost"`
}

func (s stream) longestGap() time.Duration {
	var longest time.Duration
	for _, g := range s.Gaps {
		longest = max(longest, time.Duration(g.To-g.From))
	}
	return longest
}

// lost counts packets between the first and the last that arrived.
func (s stream) lost() uint64 {
	if s.Count == 0 {
		return 0
	}
	return s.LastSeq - s.FirstSeq + 1 - s.Count
}

func (p *pod) streams(t *testing.T) map[string]stream {
	t.Helper()
	return ask[map[string]stream](t, p, http.MethodGet, "/streams", nil)
}

func (p *pod) accepted(t *testing.T) map[string]int {
	t.Helper()
	return ask[map[string]int](t, p, http.MethodGet, "/accepted", nil)
}

// flow is steady TCP traffic, see the probe program.
type flow struct {
	Kept      int    `json:"kept"`
	Broken    int    `json:"broken"`
	New       int    `json:"new"`
	Refused   int    `json:"refused"`
	LastError string `json:"lastError"`
}

func (p *pod) keep(t *testing.T, name, addr string) {
	t.Helper()
	ask[any](t, p, http.MethodPost, "/flow", url.Values{"name": {name}, "to": {addr}, "every": {"50ms"}})
}

func (p *pod) flows(t *testing.T) map[string]flow {
	t.Helper()
	return ask[map[string]flow](t, p, http.MethodGet, "/flows", nil)
}

// policy creates a policy.
func (c *cluster) policy(t *testing.T, namespace, name string, spec networkingv1.NetworkPolicySpec) *networkingv1.NetworkPolicy {
	t.Helper()
	o := &networkingv1.NetworkPolicy{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name}, Spec: spec}
	o, err := c.client.NetworkingV1().NetworkPolicies(namespace).Create(t.Context(), o, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return o
}

func (c *cluster) deletePolicy(t *testing.T, namespace, name string) {
	t.Helper()
	if err := c.client.NetworkingV1().NetworkPolicies(namespace).Delete(t.Context(), name, metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
}

// match selects by "key=value" pairs; none selects everything.
func match(pairs ...string) metav1.LabelSelector {
	s := metav1.LabelSelector{}
	for _, pair := range pairs {
		k, v, _ := strings.Cut(pair, "=")
		if s.MatchLabels == nil {
			s.MatchLabels = map[string]string{}
		}
		s.MatchLabels[k] = v
	}
	return s
}

var (
	onlyIngress = []networkingv1.PolicyType{networkingv1.PolicyTypeIngress}
	onlyEgress  = []networkingv1.PolicyType{networkingv1.PolicyTypeEgress}
	bothWays    = []networkingv1.PolicyType{networkingv1.PolicyTypeIngress, networkingv1.PolicyTypeEgress}
)

func denyAll(selector metav1.LabelSelector, types []networkingv1.PolicyType) networkingv1.NetworkPolicySpec {
	return networkingv1.NetworkPolicySpec{PodSelector: selector, PolicyTypes: types}
}

func allowFrom(selector metav1.LabelSelector, peers ...networkingv1.NetworkPolicyPeer) networkingv1.NetworkPolicySpec {
	return networkingv1.NetworkPolicySpec{
		PodSelector: selector, PolicyTypes: onlyIngress, Ingress: []networkingv1.NetworkPolicyIngressRule{{From: peers}},
	}
}

func allowTo(selector metav1.LabelSelector, peers ...networkingv1.NetworkPolicyPeer) networkingv1.NetworkPolicySpec {
	return networkingv1.NetworkPolicySpec{
		PodSelector: selector, PolicyTypes: onlyEgress, Egress: []networkingv1.NetworkPolicyEgressRule{{To: peers}},
	}
}

func peerPods(pairs ...string) networkingv1.NetworkPolicyPeer {
	return networkingv1.NetworkPolicyPeer{PodSelector: new(match(pairs...))}
}

func peerNamespaces(pairs ...string) networkingv1.NetworkPolicyPeer {
	return networkingv1.NetworkPolicyPeer{NamespaceSelector: new(match(pairs...))}
}

// service makes a service for a pod's web port and returns its ClusterIP and node port.
func (c *cluster) service(t *testing.T, p *pod, policy corev1.ServiceExternalTrafficPolicy) (string, int32) {
	t.Helper()
	o := &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Namespace: p.namespace, Name: p.name},
		Spec: corev1.ServiceSpec{
			Type: corev1.ServiceTypeNodePort, Selector: map[string]string{"pod": p.name}, ExternalTrafficPolicy: policy,
			Ports: []corev1.ServicePort{{Port: 8080, TargetPort: intstr.FromInt32(80)}},
		},
	}
	o, err := c.client.CoreV1().Services(p.namespace).Create(t.Context(), o, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return o.Spec.ClusterIP, o.Spec.Ports[0].NodePort
}
