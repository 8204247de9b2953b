package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer/protobuf"
)

// object is what API servers serve: metadata, and a protobuf form.
type object interface {
	metav1.Object
	runtime.Object
	Marshal() ([]byte, error)
}

// apiServer serves lists and watches of three resources as API servers do, in protobuf, and as fast as it can: objects are kept
// encoded.
type apiServer struct {
	url string

	mu        sync.Mutex
	rv        int64
	resources map[string]*resourceType // by path
	requests  []string                 // what was asked for, in order
	listed    map[string]time.Time     // when the last byte of a resource's first complete list had been taken, by path
}

// resourceType is all objects of one kind, in the order of their creation.
type resourceType struct {
	apiVersion, kind string
	index            map[string]int
	items            [][]byte // encoded; nil is gone
	watchers         map[*watcher]bool
}

// watcher is one watch request. Its frames are bounded: a client that falls behind this far is cut off, as API servers do.
type watcher struct{ frames chan []byte }

const watchBacklog = 1 << 16

func newAPIServer(listener net.Listener) *apiServer {
	a := &apiServer{url: "http://" + listener.Addr().String(), rv: 1000, listed: map[string]time.Time{}, resources: map[string]*resourceType{
		"/api/v1/namespaces": {apiVersion: "v1", kind: "Namespace"},
		"/api/v1/pods":       {apiVersion: "v1", kind: "Pod"},
		"/apis/networking.k8s.io/v1/networkpolicies": {apiVersion: "networking.k8s.io/v1", kind: "NetworkPolicy"},
	}}
	for _, r := range a.resources {
		r.index, r.watchers = map[string]int{}, map[*watcher]bool{}
	}
	server := &http.Server{Handler: a, ReadHeaderTimeout: 10 * time.Second}
	go func() { _ = server.Serve(listener) }() // until the process, and with it the sandbox, ends
	return a
}

func pathOf(o object) string {
	switch o.GetObjectKind().GroupVersionKind().Kind {
	case "Namespace":
		return "/api/v1/namespaces"
	case "Pod":
		return "/api/v1/pods"
	}
	return "/apis/networking.k8s.io/v1/networkpolicies"
}

// forget forgets what was asked so far.
func (a *apiServer) forget() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.requests, a.listed = nil, map[string]time.Time{}
}

// drop removes all objects, but for those of the kinds to keep. Nobody watches.
func (a *apiServer) drop(keep ...string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, r := range a.resources {
		if !slices.Contains(keep, r.kind) {
			r.items, r.index = nil, map[string]int{}
		}
	}
}

// put creates or changes an object and tells the watchers.
func (a *apiServer) put(o object) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	r := a.resources[pathOf(o)]
	a.rv++
	o.SetResourceVersion(strconv.FormatInt(a.rv, 10))
	data, err := o.Marshal()
	if err != nil {
		return err
	}
	key := o.GetNamespace() + "/" + o.GetName()
	i, known := r.index[key]
	if !known {
		i = len(r.items)
		r.index[key], r.items = i, append(r.items, nil)
	}
	r.items[i] = data
	kind := "ADDED"
	if known {
		kind = "MODIFIED"
	}
	return r.tell(kind, data)
}

// remove deletes an object and tells the watchers.
func (a *apiServer) remove(o object) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	r := a.resources[pathOf(o)]
	key := o.GetNamespace() + "/" + o.GetName()
	i, known := r.index[key]
	if !known {
		return fmt.Errorf("delete %s %s: there is none", r.kind, key)
	}
	r.items[i] = nil
	delete(r.index, key)
	a.rv++
	o.SetResourceVersion(strconv.FormatInt(a.rv, 10))
	data, err := o.Marshal()
	if err != nil {
		return err
	}
	return r.tell("DELETED", data)
}

func (r *resourceType) tell(event string, data []byte) error {
	if len(r.watchers) == 0 {
		return nil
	}
	frame, err := r.frame(event, data)
	if err != nil {
		return err
	}
	for w := range r.watchers {
		select {
		case w.frames <- frame:
		default:
			close(w.frames)
			delete(r.watchers, w)
		}
	}
	return nil
}

// encode puts an object or list into the envelope of application/vnd.kubernetes.protobuf.
func encode(apiVersion, kind string, data []byte) ([]byte, error) {
	u := runtime.Unknown{TypeMeta: runtime.TypeMeta{APIVersion: apiVersion, Kind: kind}, Raw: data}
	text, err := u.Marshal()
	return append([]byte("k8s\x00"), text...), err
}

// frame is a watch event as it is on the wire.
func (r *resourceType) frame(event string, data []byte) ([]byte, error) {
	raw, err := encode(r.apiVersion, r.kind, data)
	if err != nil {
		return nil, err
	}
	e := metav1.WatchEvent{Type: event, Object: runtime.RawExtension{Raw: raw}}
	text, err := e.Marshal()
	if err != nil {
		return nil, err
	}
	var b bytes.Buffer
	_, err = protobuf.LengthDelimitedFramer.NewFrameWriter(&b).Write(text)
	return b.Bytes(), err
}

// ServeHTTP implements http.Handler.
func (a *apiServer) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	q := req.URL.Query()
	a.mu.Lock()
	r := a.resources[req.URL.Path]
	a.requests = append(a.requests, req.Method+" "+req.URL.Path+" "+summary(q))
	a.mu.Unlock()
	if r == nil || req.Method != http.MethodGet || !strings.Contains(req.Header.Get("Accept"), runtime.ContentTypeProtobuf) {
		http.Error(w, "the benchmark's API server has lists and watches of pods, namespaces and networkpolicies in protobuf", http.StatusNotAcceptable)
		return
	}
	var err error
	if q.Get("watch") == "true" || q.Get("watch") == "1" {
		w.Header().Set("Content-Type", runtime.ContentTypeProtobuf+";stream=watch")
		err = a.watch(req.Context(), w, r, req.URL.Path, q.Get("sendInitialEvents") == "true")
	} else {
		w.Header().Set("Content-Type", runtime.ContentTypeProtobuf)
		err = a.list(w, r, req.URL.Path, q)
	}
	if err != nil && req.Context().Err() == nil {
		panic(http.ErrAbortHandler) // too late for an answer: the client must not take it for complete
	}
}

func summary(q url.Values) string {
	var parts []string
	for _, k := range []string{"watch", "sendInitialEvents", "limit"} {
		if v := q.Get(k); v != "" {
			parts = append(parts, k+"="+v)
		}
	}
	return strings.Join(parts, " ")
}

// list answers a page. Its continue token is the place in the order of creation.
func (a *apiServer) list(w io.Writer, r *resourceType, path string, q url.Values) error {
	limit, _ := strconv.Atoi(q.Get("limit"))
	from, _ := strconv.Atoi(q.Get("continue"))
	a.mu.Lock()
	var items [][]byte
	next := from
	for ; next < len(r.items) && (limit == 0 || len(items) < limit); next++ {
		if r.items[next] != nil {
			items = append(items, r.items[next])
		}
	}
	more := next < len(r.items)
	meta := metav1.ListMeta{ResourceVersion: strconv.FormatInt(a.rv, 10)}
	a.mu.Unlock()
	if more {
		meta.Continue = strconv.Itoa(next)
	}
	head, err := meta.Marshal()
	if err != nil {
		return err
	}
	// A list is its metadata (field 1) and its items (field 2), of all three kinds.
	data := appendField(nil, 1, head)
	for _, item := range items {
		data = appendField(data, 2, item)
	}
	answer, err := encode(r.apiVersion, r.kind+"List", data)
	if err != nil {
		return err
	}
	if _, err := w.Write(answer); err != nil {
		return err
	}
	if !more {
		a.complete(path)
	}
	return nil
}

// appendField appends a length-delimited field (protobuf wire type 2).
func appendField(b []byte, number uint64, data []byte) []byte {
	b = binary.AppendUvarint(b, number<<3|2)
	b = binary.AppendUvarint(b, uint64(len(data)))
	return append(b, data...)
}

func (a *apiServer) complete(path string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.listed[path].IsZero() {
		a.listed[path] = time.Now()
	}
}

// watch streams events, first everything that exists if it is asked to, and the bookmark that ends that.
func (a *apiServer) watch(ctx context.Context, w http.ResponseWriter, r *resourceType, path string, initial bool) error {
	watcher := &watcher{frames: make(chan []byte, watchBacklog)}
	a.mu.Lock()
	var items [][]byte
	if initial {
		items = append(items, r.items...)
	}
	rv := strconv.FormatInt(a.rv, 10)
	r.watchers[watcher] = true
	a.mu.Unlock()
	defer func() {
		a.mu.Lock()
		defer a.mu.Unlock()
		delete(r.watchers, watcher)
	}()
	for _, item := range items {
		if item == nil {
			continue
		}
		frame, err := r.frame("ADDED", item)
		if err != nil {
			return err
		}
		if _, err := w.Write(frame); err != nil {
			return err
		}
	}
	if initial {
		mark := metav1.ObjectMeta{ResourceVersion: rv, Annotations: map[string]string{metav1.InitialEventsAnnotationKey: "true"}}
		head, err := mark.Marshal()
		if err != nil {
			return err
		}
		frame, err := r.frame("BOOKMARK", appendField(nil, 1, head))
		if err != nil {
			return err
		}
		if _, err := w.Write(frame); err != nil {
			return err
		}
	}
	flusher, ok := w.(http.Flusher)
	if !ok {
		return errors.New("cannot stream")
	}
	flusher.Flush()
	if initial {
		a.complete(path)
	}
	for {
		select {
		case <-ctx.Done():
			return nil
		case frame, ok := <-watcher.frames:
			if !ok {
				return errors.New("the watcher has fallen behind")
			}
			if _, err := w.Write(frame); err != nil {
				return err
			}
			if len(watcher.frames) == 0 {
				flusher.Flush()
			}
		}
	}
}

// lastListed is when the last of all lists was complete; zero if one is not yet.
func (a *apiServer) lastListed() time.Time {
	a.mu.Lock()
	defer a.mu.Unlock()
	var last time.Time
	for path := range a.resources {
		t := a.listed[path]
		if t.IsZero() {
			return time.Time{}
		}
		if t.After(last) {
			last = t
		}
	}
	return last
}

// encodedSize is the mean size of a kind's objects on the wire.
func (a *apiServer) encodedSize(path string) float64 {
	a.mu.Lock()
	defer a.mu.Unlock()
	sum, n := 0, 0
	for _, item := range a.resources[path].items {
		if item != nil {
			sum += len(item)
			n++
		}
	}
	return float64(sum) / float64(max(n, 1))
}
