package cluster

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"reflect"
	"sync"
	"sync/atomic"
	"time"

	"github.com/go-logr/logr"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	utilnet "k8s.io/apimachinery/pkg/util/net"
	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/klog/v2"
)

// APIServer is the source that watches pods, namespaces and policies of all namespaces.
//
// It runs reflectors on stores of its own and no informers: an informer's store needs every object's resourceVersion and
// keeps a second index and queue, whereas here a trimmed value exists once, shared by the store (for diffs) and the Sink.
type APIServer struct {
	client kubernetes.Interface
	log    *slog.Logger
}

// NewAPIServer returns a source that reads through client.
func NewAPIServer(client kubernetes.Interface, log *slog.Logger) *APIServer {
	return &APIServer{client: client, log: log}
}

// Run feeds sink until ctx ends. An API server that is away or forbids is logged and tried again with backoff.
func (a *APIServer) Run(ctx context.Context, sink Sink) error {
	logger := logr.FromSlogHandler(a.log.Handler())
	ctx = klog.NewContext(ctx, logger)

	pods := a.client.CoreV1().Pods(metav1.NamespaceAll)
	namespaces := a.client.CoreV1().Namespaces()
	policies := a.client.NetworkingV1().NetworkPolicies(metav1.NamespaceAll)
	sources := []struct {
		resource string
		example  runtime.Object
		lw       *cache.ListWatch
	}{
		{"namespaces", &corev1.Namespace{}, listWatch(a.log, namespaces.List, namespaces.Watch)},
		{"pods", &corev1.Pod{}, listWatch(a.log, pods.List, pods.Watch)},
		{"networkpolicies", &networkingv1.NetworkPolicy{}, listWatch(a.log, policies.List, policies.Watch)},
	}
	var missing atomic.Int32
	missing.Store(int32(len(sources)))
	synced := func() {
		if missing.Add(-1) == 0 {
			sink.Synced()
		}
	}
	var wg sync.WaitGroup
	for _, s := range sources {
		reflector := cache.NewReflectorWithOptions(
			cache.ToListWatcherWithWatchListSemantics(s.lw, a.client), s.example, newStore(sink, synced),
			cache.ReflectorOptions{Name: s.resource, TypeDescription: s.resource, Logger: &logger, Backoff: retry()})
		wg.Go(func() { reflector.RunWithContext(ctx) })
	}
	wg.Wait()
	return nil
}

// retry is how an API server that is away is asked again. client-go's own goes up to a minute: policies that were created
// right after the server's return would wait for that. The jitter keeps the nodes of a cluster apart.
func retry() *wait.Backoff {
	const first, most = 200 * time.Millisecond, 5 * time.Second
	return &wait.Backoff{Duration: first, Cap: most, Steps: int(most / first), Factor: 2, Jitter: 0.5}
}

// listWatch is the typed client's List and Watch as a ListWatch whose errors carry their remedy. The reflector logs them,
// but for those that it calls retriable, which it would only tell at a debug level.
func listWatch[L runtime.Object](
	log *slog.Logger,
	list func(context.Context, metav1.ListOptions) (L, error),
	watchFrom func(context.Context, metav1.ListOptions) (watch.Interface, error),
) *cache.ListWatch {
	return &cache.ListWatch{
		ListWithContextFunc: func(ctx context.Context, opts metav1.ListOptions) (runtime.Object, error) {
			l, err := list(ctx, opts)
			if err != nil {
				return nil, withRemedy(err)
			}
			return l, nil
		},
		WatchFuncWithContext: func(ctx context.Context, opts metav1.ListOptions) (watch.Interface, error) {
			w, err := watchFrom(ctx, opts)
			if utilnet.IsConnectionRefused(err) || apierrors.IsTooManyRequests(err) {
				log.WarnContext(ctx, "watch API server, will try again", "err", err)
			}
			if err != nil {
				return nil, withRemedy(err)
			}
			return w, nil
		},
	}
}

func withRemedy(err error) error {
	if apierrors.IsForbidden(err) {
		return fmt.Errorf("%w (grant podwalld get, list and watch on pods, namespaces and networkpolicies by a ClusterRole)", err)
	}
	return err
}

// store is what a reflector keeps: the trimmed values of one kind, so that changes which do not touch them wake nobody.
// One goroutine, the reflector's, calls it.
type store struct {
	sink   Sink
	synced func()
	full   bool // the initial list has been applied
	known  map[Key]Object
}

var _ cache.TransformingStore = (*store)(nil)

func newStore(sink Sink, synced func()) *store {
	return &store{sink: sink, synced: synced, known: map[Key]Object{}}
}

// Transformer makes the reflector trim objects while it streams the initial list (WatchList), so that the whole list
// never exists in full.
func (s *store) Transformer() cache.TransformFunc {
	return func(obj any) (any, error) { return trim(obj) }
}

// Add implements cache.ReflectorStore.
func (s *store) Add(obj any) error { return s.Update(obj) }

// Update implements cache.ReflectorStore.
func (s *store) Update(obj any) error {
	t, err := trim(obj)
	if err != nil {
		return err
	}
	if c, changed := s.put(t.Object); changed {
		s.sink.Apply(c)
	}
	return nil
}

// Delete implements cache.ReflectorStore.
func (s *store) Delete(obj any) error {
	t, err := trim(obj)
	if err != nil {
		return err
	}
	key := t.Key()
	if _, ok := s.known[key]; ok {
		delete(s.known, key)
		s.sink.Apply(Change{Key: key})
	}
	return nil
}

// Replace implements cache.ReflectorStore: what a relist no longer names is gone, as its deletion was missed.
func (s *store) Replace(list []any, _ string) error {
	var changes []Change
	listed := make(map[Key]bool, len(list))
	for _, obj := range list {
		t, err := trim(obj)
		if err != nil {
			return err
		}
		listed[t.Key()] = true
		if c, changed := s.put(t.Object); changed {
			changes = append(changes, c)
		}
	}
	for key := range s.known {
		if !listed[key] {
			delete(s.known, key)
			changes = append(changes, Change{Key: key})
		}
	}
	if len(changes) > 0 {
		s.sink.Apply(changes...)
	}
	if !s.full {
		s.full = true
		s.synced()
	}
	return nil
}

// Resync implements cache.ReflectorStore; the reflectors have no resync period.
func (s *store) Resync() error { return nil }

func (s *store) put(o Object) (Change, bool) {
	key := o.Key()
	if old, ok := s.known[key]; ok && reflect.DeepEqual(old, o) {
		return Change{}, false
	}
	s.known[key] = o
	return Change{Key: key, Object: o}, true
}

// trimmed is a value on its way from the API server into a store; the reflector asks for its metadata.
type trimmed struct{ Object }

var _ metav1.ObjectMetaAccessor = trimmed{}

// GetObjectMeta implements metav1.ObjectMetaAccessor with what a store's key is made of.
func (t trimmed) GetObjectMeta() metav1.Object {
	key := t.Key()
	return &metav1.ObjectMeta{Namespace: key.Namespace, Name: key.Name}
}

func trim(obj any) (trimmed, error) {
	switch o := obj.(type) {
	case trimmed:
		return o, nil
	case *corev1.Pod:
		return trimmed{PodFrom(o)}, nil
	case *corev1.Namespace:
		return trimmed{NamespaceFrom(o)}, nil
	case *networkingv1.NetworkPolicy:
		return trimmed{PolicyFrom(o)}, nil
	}
	return trimmed{}, fmt.Errorf("trim object: unexpected type %T", obj)
}

// RESTClient returns a client for the cluster that the kubeconfig file names, or for the one around this pod when
// kubeconfig is empty.
func RESTClient(kubeconfig string) (kubernetes.Interface, error) {
	config, err := restConfig(kubeconfig)
	if err != nil {
		return nil, err
	}
	config.UserAgent = "podwalld"
	config.AcceptContentTypes = runtime.ContentTypeProtobuf + "," + runtime.ContentTypeJSON
	config.ContentType = runtime.ContentTypeProtobuf
	// Three lists and three watches are all there is; the burst lets them start at once after an API server's restart.
	config.QPS, config.Burst = 10, 20
	config.Wrap(func(rt http.RoundTripper) http.RoundTripper { return impatient{rt, answerTimeout} })
	client, err := kubernetes.NewForConfig(config)
	if err != nil {
		return nil, fmt.Errorf("create API client for %s: %w", config.Host, err)
	}
	return client, nil
}

// answerTimeout is how long an API server may take to begin its answer: it ends requests that are no watches after a minute itself,
// and begins the answer to a watch at once. Behind some load balancers a server that has gone is a connection that says nothing.
const answerTimeout = 70 * time.Second

// impatient gives up requests whose answer has not begun in time. What is begun may take forever, as a watch does.
type impatient struct {
	http.RoundTripper
	timeout time.Duration
}

// RoundTrip implements http.RoundTripper.
func (i impatient) RoundTrip(r *http.Request) (*http.Response, error) {
	ctx, cancel := context.WithCancelCause(r.Context())
	timer := time.AfterFunc(i.timeout, func() {
		cancel(fmt.Errorf("no answer from %s within %s; look whether the API server, or a proxy before it, hangs", r.URL.Host, i.timeout))
	})
	resp, err := i.RoundTripper.RoundTrip(r.WithContext(ctx))
	if !timer.Stop() && err == nil { // too late
		err = errors.Join(context.Cause(ctx), resp.Body.Close())
		resp = nil
	}
	if err != nil {
		if cause := context.Cause(ctx); cause != nil && r.Context().Err() == nil {
			err = cause
		}
		cancel(nil)
		return nil, err
	}
	resp.Body = &cancelBody{resp.Body, cancel}
	return resp, nil
}

// cancelBody releases a request's context with its answer.
type cancelBody struct {
	io.ReadCloser
	cancel context.CancelCauseFunc
}

// Close implements io.Closer.
func (b *cancelBody) Close() error {
	defer b.cancel(nil)
	return b.ReadCloser.Close()
}

func restConfig(kubeconfig string) (*rest.Config, error) {
	if kubeconfig != "" {
		config, err := clientcmd.BuildConfigFromFlags("", kubeconfig)
		if err != nil {
			return nil, fmt.Errorf("read --kubeconfig %s: %w", kubeconfig, err)
		}
		return config, nil
	}
	config, err := rest.InClusterConfig()
	if errors.Is(err, rest.ErrNotInCluster) {
		return nil, errors.New("find API server: not in a cluster; give --kubeconfig FILE or --manifests DIR")
	}
	if err != nil {
		return nil, fmt.Errorf("read in-cluster configuration: %w", err)
	}
	return config, nil
}
