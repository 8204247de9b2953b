package cluster

import (
	"context"
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"reflect"
	"slices"
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
	"k8s.io/client-go/tools/cache"
	"k8s.io/klog/v2"
)

// APIServer is the source that watches pods, namespaces and policies of all namespaces.
//
// It runs reflectors on stores of its own and no informers: an informer's store needs every object's resourceVersion and
// keeps a second index and queue, whereas here a trimmed value exists once, shared by the store (for diffs) and the Sink.
type APIServer struct {
	client Client
	log    *slog.Logger
}

// NewAPIServer returns a source that reads through client.
func NewAPIServer(client Client, log *slog.Logger) *APIServer {
	return &APIServer{client: client, log: log}
}

// Run feeds sink until ctx ends. An API server that is away or forbids is logged and tried again with backoff.
func (a *APIServer) Run(ctx context.Context, sink Sink) error {
	logger := logr.FromSlogHandler(a.log.Handler())
	ctx = klog.NewContext(ctx, logger)

	sources := []struct {
		resource string
		example  runtime.Object
	}{
		{namespaces, &corev1.Namespace{}},
		{pods, &corev1.Pod{}},
		{networkPolicies, &networkingv1.NetworkPolicy{}},
	}
	select {
	case <-ctx.Done():
		return nil
	case <-time.After(rand.N(startWithin)): //nolint:gosec // no secret
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
			cache.ToListWatcherWithWatchListSemantics(a.listWatch(s.resource), a.client), s.example, newStore(sink, synced),
			cache.ReflectorOptions{Name: s.resource, TypeDescription: s.resource, Logger: &logger, Backoff: retry()})
		wg.Go(func() { reflector.RunWithContext(ctx) })
	}
	wg.Wait()
	return nil
}

// startWithin spreads the lists of nodes whose daemons start at the same moment. It is short: until its daemon has listed, a node
// starts no pods.
const startWithin = 300 * time.Millisecond

// retry is how an API server that is away is asked again. client-go's own goes up to a minute: policies that were created
// right after the server's return would wait for that, and for two pauses where a watch has to fail before the list is tried. The
// jitter keeps the nodes of a cluster apart, and so do the API server's own limits (priority and fairness).
func retry() *wait.Backoff {
	const first, most = 200 * time.Millisecond, 2 * time.Second
	return &wait.Backoff{Duration: first, Cap: most, Steps: int(most / first), Factor: 2, Jitter: 0.5}
}

// listWatch is the client's List and Watch of a resource with errors that carry their remedy. The reflector logs them, but for those
// that it calls retriable, which it would only tell at a debug level.
func (a *APIServer) listWatch(resource string) *cache.ListWatch {
	return &cache.ListWatch{
		ListWithContextFunc: func(ctx context.Context, opts metav1.ListOptions) (runtime.Object, error) {
			list, err := a.client.List(ctx, resource, opts)
			if err != nil {
				return nil, withRemedy(err)
			}
			return list, nil
		},
		WatchFuncWithContext: func(ctx context.Context, opts metav1.ListOptions) (watch.Interface, error) {
			w, err := a.client.Watch(ctx, resource, opts)
			if utilnet.IsConnectionRefused(err) || apierrors.IsTooManyRequests(err) {
				a.log.WarnContext(ctx, "watch API server, will try again", "err", err)
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
	parts  *interner
}

var _ cache.TransformingStore = (*store)(nil)

func newStore(sink Sink, synced func()) *store {
	return &store{sink: sink, synced: synced, known: map[Key]Object{}, parts: newInterner()}
}

// Transformer makes the reflector trim objects while it streams the initial list (WatchList), so that the whole list
// never exists in full.
func (s *store) Transformer() cache.TransformFunc {
	return func(obj any) (any, error) { return s.shared(obj) }
}

// shared trims an object and shares what it has in common with others.
func (s *store) shared(obj any) (trimmed, error) {
	if t, ok := obj.(trimmed); ok {
		return t, nil
	}
	t, err := trim(obj)
	if err == nil {
		s.parts.share(t.Object)
	}
	return t, err
}

// Add implements cache.ReflectorStore.
func (s *store) Add(obj any) error { return s.Update(obj) }

// Update implements cache.ReflectorStore.
func (s *store) Update(obj any) error {
	t, err := s.shared(obj)
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
		s.forget(key)
		s.sink.Apply(Change{Key: key})
	}
	return nil
}

// Replace implements cache.ReflectorStore: what a relist no longer names is gone, as its deletion was missed.
func (s *store) Replace(list []any, _ string) error {
	var changes []Change
	listed := make(map[Key]bool, len(list))
	for _, obj := range list {
		t, err := s.shared(obj)
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
			s.forget(key)
			changes = append(changes, Change{Key: key})
		}
	}
	s.parts.sweep()
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
	old, known := s.known[key]
	if known && equal(old, o) {
		return Change{}, false
	}
	s.parts.keep(o)
	if known {
		s.parts.release(old)
	}
	s.known[key] = o
	return Change{Key: key, Object: o}, true
}

func (s *store) forget(key Key) {
	s.parts.release(s.known[key])
	delete(s.known, key)
}

// equal is reflect.DeepEqual, but quick for pods: most of their updates change nothing that is kept of them.
func equal(a, b Object) bool {
	p, ok := a.(*Pod)
	q, also := b.(*Pod)
	if !ok || !also {
		return reflect.DeepEqual(a, b)
	}
	return p.Namespace == q.Namespace && p.Name == q.Name && p.UID == q.UID && p.MirrorUID == q.MirrorUID && p.Node == q.Node &&
		maps.Equal(p.Labels, q.Labels) && slices.Equal(p.IPs, q.IPs) && slices.Equal(p.Ports, q.Ports) &&
		p.HostNetwork == q.HostNetwork && p.Terminal == q.Terminal && p.Deleting == q.Deleting && p.Created.Equal(q.Created)
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
