package cluster

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/kubernetes/fake"
	clienttesting "k8s.io/client-go/testing"
	"k8s.io/client-go/tools/cache"
)

func apiPod(namespace, name string, labels map[string]string) *corev1.Pod {
	return &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name, Labels: labels}}
}

// fakeClient is a Client of objects in memory, less the stream of initial events, which client-go's fake does not have.
type fakeClient struct{ *fake.Clientset }

// List implements Client.
func (c fakeClient) List(ctx context.Context, resource string, opts metav1.ListOptions) (runtime.Object, error) {
	switch resource {
	case namespaces:
		return c.CoreV1().Namespaces().List(ctx, opts)
	case pods:
		return c.CoreV1().Pods("").List(ctx, opts)
	}
	return c.NetworkingV1().NetworkPolicies("").List(ctx, opts)
}

// Watch implements Client.
func (c fakeClient) Watch(ctx context.Context, resource string, opts metav1.ListOptions) (watch.Interface, error) {
	switch resource {
	case namespaces:
		return c.CoreV1().Namespaces().Watch(ctx, opts)
	case pods:
		return c.CoreV1().Pods("").Watch(ctx, opts)
	}
	return c.NetworkingV1().NetworkPolicies("").Watch(ctx, opts)
}

// runAPI starts the source. The fake client loses what happens between a list and its watch: in a synctest bubble Wait
// returns when all watches stand.
func runAPI(t *testing.T, client Client, log *logBuffer) *recorder {
	t.Helper()
	sink := newRecorder()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- NewAPIServer(client, log.logger()).Run(ctx, sink) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	return sink
}

func TestAPIServer(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		client := fakeClient{fake.NewClientset(
			&corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "shop"}},
			apiPod("shop", "web", map[string]string{"app": "web"}),
			apiPod("bank", "db", nil),
			&networkingv1.NetworkPolicy{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "deny"}},
		)}
		sink := runAPI(t, client, &logBuffer{})
		model := NewModel()
		take := func(changes []Change) []Change {
			for _, c := range changes {
				model.Apply(c)
			}
			return changes
		}
		if got := take(sink.waitSynced(t)); len(got) != 4 {
			t.Fatalf("initial changes: %v", describe(got))
		}
		synctest.Wait()
		ctx := t.Context()
		pods := client.CoreV1().Pods("shop")

		relabelled := apiPod("shop", "web", map[string]string{"app": "db"})
		if _, err := pods.Update(ctx, relabelled, metav1.UpdateOptions{}); err != nil {
			t.Fatal(err)
		}
		wantChanges(t, take(sink.next(t)), "+Pod shop/web")
		if got := model.Pod("shop", "web").Labels["app"]; got != "db" {
			t.Errorf("label after relabel: %q", got)
		}

		heartbeat := relabelled.DeepCopy()
		heartbeat.Annotations = map[string]string{"touched": "yes"}
		heartbeat.Status.Conditions = []corev1.PodCondition{{Type: corev1.PodReady, LastProbeTime: metav1.Now()}}
		if _, err := pods.Update(ctx, heartbeat, metav1.UpdateOptions{}); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		if len(sink.batches) != 0 {
			t.Errorf("a heartbeat woke the sink: %v", describe(<-sink.batches))
		}

		heartbeat.Status.PodIPs = []corev1.PodIP{{IP: "10.0.0.1"}}
		if _, err := pods.Update(ctx, heartbeat, metav1.UpdateOptions{}); err != nil {
			t.Fatal(err)
		}
		wantChanges(t, take(sink.next(t)), "+Pod shop/web")

		if err := pods.Delete(ctx, "web", metav1.DeleteOptions{}); err != nil {
			t.Fatal(err)
		}
		wantChanges(t, take(sink.next(t)), "-Pod shop/web")

		policy := &networkingv1.NetworkPolicy{ObjectMeta: metav1.ObjectMeta{Namespace: "bank", Name: "open"}}
		if _, err := client.NetworkingV1().NetworkPolicies("bank").Create(ctx, policy, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
		wantChanges(t, take(sink.next(t)), "+NetworkPolicy bank/open")

		ns := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "shop", Labels: map[string]string{"team": "a"}}}
		if _, err := client.CoreV1().Namespaces().Update(ctx, ns, metav1.UpdateOptions{}); err != nil {
			t.Fatal(err)
		}
		wantChanges(t, take(sink.next(t)), "+Namespace shop")
		if got := model.NamespaceLabels("shop")["team"]; got != "a" {
			t.Errorf("namespace label: %q", got)
		}
	})
}

// Not in a bubble: apimachinery's HandleError remembers the real time and would sleep until the bubble's clock is there.
func TestAPIServerNotSyncedUntilAllListed(t *testing.T) {
	t.Parallel()
	client := fakeClient{fake.NewClientset(apiPod("shop", "web", nil))}
	var allowed atomic.Bool
	client.PrependReactor("list", "networkpolicies", func(clienttesting.Action) (bool, runtime.Object, error) {
		if allowed.Load() {
			return false, nil, nil
		}
		return true, nil, apierrors.NewForbidden(schema.GroupResource{Group: "networking.k8s.io", Resource: "networkpolicies"}, "", nil)
	})
	log := &logBuffer{}
	sink := runAPI(t, client, log)
	wantChanges(t, sink.next(t), "+Pod shop/web")
	log.wait(t, "forbidden")
	select {
	case <-sink.synced:
		t.Fatal("synced without the policies")
	default:
	}
	for _, want := range []string{"networkpolicies", "grant podwalld get, list and watch on pods, namespaces and networkpolicies"} {
		if !strings.Contains(log.String(), want) {
			t.Errorf("log does not say %q:\n%s", want, log)
		}
	}
	allowed.Store(true)
	sink.waitSynced(t)
}

func TestAPIServerLogsRefusedWatch(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		client := fakeClient{fake.NewClientset()}
		busy := true
		client.PrependWatchReactor("pods", func(clienttesting.Action) (bool, watch.Interface, error) {
			return busy, nil, apierrors.NewTooManyRequests("overloaded", 1)
		})
		log := &logBuffer{}
		sink := runAPI(t, client, log)
		sink.waitSynced(t)
		synctest.Wait()
		if got := log.String(); !strings.Contains(got, "level=WARN") || !strings.Contains(got, "overloaded") {
			t.Errorf("log says nothing of the refusal:\n%s", got)
		}
	})
}

func TestStoreReplace(t *testing.T) {
	t.Parallel()
	sink := newRecorder()
	syncs := 0
	s := newStore(sink, func() { syncs++ })
	replace := func(list ...any) {
		t.Helper()
		if err := s.Replace(list, "1"); err != nil {
			t.Fatal(err)
		}
	}
	replace(apiPod("a", "x", nil), apiPod("a", "y", nil))
	wantChanges(t, sink.next(t), "+Pod a/x", "+Pod a/y")
	replace(apiPod("a", "x", nil), apiPod("a", "y", nil))
	if len(sink.batches) != 0 {
		t.Error("an equal relist woke the sink")
	}
	replace(apiPod("a", "x", map[string]string{"k": "v"}), apiPod("b", "z", nil))
	wantChanges(t, sink.next(t), "+Pod a/x", "+Pod b/z", "-Pod a/y")
	if err := s.Delete(apiPod("a", "y", nil)); err != nil || len(sink.batches) != 0 {
		t.Errorf("deleting what is not there: %v, %d batches", err, len(sink.batches))
	}
	if syncs != 1 {
		t.Errorf("synced %d times, want 1", syncs)
	}
	if s.Update(&corev1.Secret{}) == nil || s.Delete(&corev1.Secret{}) == nil || s.Replace([]any{&corev1.Secret{}}, "1") == nil {
		t.Error("a Secret was taken")
	}
}

func TestTransformedValueIsTheOneInTheSink(t *testing.T) {
	t.Parallel()
	sink := newRecorder()
	s := newStore(sink, func() {})
	value, err := s.Transformer()(apiPod("a", "x", nil))
	if err != nil {
		t.Fatal(err)
	}
	if key, err := cache.MetaNamespaceKeyFunc(value); err != nil || key != "a/x" {
		t.Errorf("key of a transformed pod: %q, %v", key, err)
	}
	if err := s.Replace([]any{value}, "1"); err != nil {
		t.Fatal(err)
	}
	given := sink.next(t)[0].Object
	if given != value.(trimmed).Object || given != s.known[given.Key()] {
		t.Error("the sink, the store and the transform hold different values")
	}
}

// TestWatchList runs against an HTTP server that streams its initial list as API servers from 1.32 on do.
func TestWatchList(t *testing.T) {
	t.Parallel()
	initial := map[string]runtime.Object{
		"/api/v1/pods":       &corev1.Pod{TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Pod"}, ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "web", ResourceVersion: "5"}},
		"/api/v1/namespaces": &corev1.Namespace{TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Namespace"}, ObjectMeta: metav1.ObjectMeta{Name: "shop", ResourceVersion: "5"}},
		"/apis/networking.k8s.io/v1/networkpolicies": &networkingv1.NetworkPolicy{
			TypeMeta:   metav1.TypeMeta{APIVersion: "networking.k8s.io/v1", Kind: "NetworkPolicy"},
			ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "deny", ResourceVersion: "5"},
		},
	}
	agents := make(chan string, 3)
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		object := initial[r.URL.Path]
		if object == nil || r.URL.Query().Get("sendInitialEvents") != "true" {
			t.Errorf("request that is no streamed list: %s", r.URL)
			http.NotFound(w, r)
			return
		}
		agents <- r.UserAgent() + " " + r.Header.Get("Accept")
		w.Header().Set("Content-Type", "application/json")
		data, _ := json.Marshal(object)
		kind := object.GetObjectKind().GroupVersionKind()
		fmt.Fprintf(w, `{"type":"ADDED","object":%s}`+"\n", data)
		fmt.Fprintf(w, `{"type":"BOOKMARK","object":{"kind":%q,"apiVersion":%q,"metadata":{"resourceVersion":"9","annotations":{"k8s.io/initial-events-end":"true"}}}}`+"\n",
			kind.Kind, kind.GroupVersion())
		w.(http.Flusher).Flush()
		<-r.Context().Done()
	}))
	t.Cleanup(server.Close)

	kubeconfig := filepath.Join(t.TempDir(), "config")
	config := `{"apiVersion":"v1","kind":"Config","current-context":"c","contexts":[{"name":"c","context":{"cluster":"c","user":"u"}}],` +
		`"clusters":[{"name":"c","cluster":{"server":"` + server.URL + `"}}],"users":[{"name":"u","user":{}}]}`
	if err := os.WriteFile(kubeconfig, []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	client, err := NewRESTClient(kubeconfig)
	if err != nil {
		t.Fatal(err)
	}
	sink := runAPI(t, client, &logBuffer{})
	got := map[string]bool{}
	for _, change := range describe(sink.waitSynced(t)) {
		got[change] = true
	}
	if diff := cmp.Diff(map[string]bool{"+Pod shop/web": true, "+Namespace shop": true, "+NetworkPolicy shop/deny": true}, got); diff != "" {
		t.Errorf("changes (-want +got):\n%s", diff)
	}
	if agent := <-agents; !strings.HasPrefix(agent, "podwalld application/vnd.kubernetes.protobuf") {
		t.Errorf("user agent and accept: %q", agent)
	}
}

func TestRESTClientErrors(t *testing.T) {
	t.Setenv("KUBERNETES_SERVICE_HOST", "")
	if _, err := NewRESTClient(""); err == nil || !strings.Contains(err.Error(), "--manifests") {
		t.Errorf("outside a cluster: %v", err)
	}
	missing := filepath.Join(t.TempDir(), "none")
	if _, err := NewRESTClient(missing); err == nil || !strings.Contains(err.Error(), "--kubeconfig "+missing) {
		t.Errorf("missing kubeconfig: %v", err)
	}
}
