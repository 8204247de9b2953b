package cluster

import (
	"fmt"
	"maps"
	"net/netip"
	"reflect"
	"slices"
	"testing"
	"time"
	"unsafe"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"pgregory.net/rapid"
)

func sameMap(a, b map[string]string) bool {
	return reflect.ValueOf(a).UnsafePointer() == reflect.ValueOf(b).UnsafePointer()
}

// replica is a pod decoded on its own: nothing of it is shared with another one.
func replica(name string, labels map[string]string) *corev1.Pod {
	own := map[string]string{}
	for k, v := range labels {
		own[string([]byte(k))] = string([]byte(v))
	}
	p := apiPod(string([]byte("shop")), name, own)
	p.Spec.NodeName = string([]byte("node-1"))
	p.Spec.Containers = []corev1.Container{{Ports: []corev1.ContainerPort{{Name: "http", ContainerPort: 8080}}}}
	return p
}

func TestPodsOfOneSetShare(t *testing.T) {
	t.Parallel()
	sink := newRecorder()
	s := newStore(sink, func() {})
	labels := map[string]string{"app": "web", "tier": "front"}
	if err := s.Replace([]any{replica("a", labels), replica("b", labels), replica("c", map[string]string{"app": "web"})}, "1"); err != nil {
		t.Fatal(err)
	}
	pods := map[string]*Pod{}
	for _, c := range sink.next(t) {
		pods[c.Key.Name] = c.Object.(*Pod)
	}
	a, b, c := pods["a"], pods["b"], pods["c"]
	if !sameMap(a.Labels, b.Labels) || sameMap(a.Labels, c.Labels) {
		t.Error("equal label sets are not one map, or others are")
	}
	if unsafe.SliceData(a.Ports) != unsafe.SliceData(b.Ports) {
		t.Error("equal ports of pods with equal labels are not one slice")
	}
	if unsafe.StringData(a.Node) != unsafe.StringData(c.Node) || unsafe.StringData(a.Labels["app"]) != unsafe.StringData(c.Labels["app"]) {
		t.Error("equal strings are kept twice")
	}
	if diff := cmp.Diff(labels, a.Labels); diff != "" {
		t.Errorf("labels (-want +got):\n%s", diff)
	}
	other := replica("d", labels)
	other.Spec.Containers[0].Ports[0].ContainerPort = 9090
	if err := s.Add(other); err != nil {
		t.Fatal(err)
	}
	if got := sink.next(t)[0].Object.(*Pod).Ports[0].Port; got != 9090 || a.Ports[0].Port != 8080 {
		t.Errorf("ports of a pod with the labels of others: %d, those of the others: %d", got, a.Ports[0].Port)
	}
}

// TestSharedIsForgotten changes pods at random: every pod is what a store without sharing would keep, and nothing is kept for
// objects that are gone.
func TestSharedIsForgotten(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		model := NewModel()
		s := newStore(applyTo{model}, func() {})
		want := map[string]*corev1.Pod{}
		draw := func() *corev1.Pod {
			labels := rapid.MapOfN(rapid.SampledFrom([]string{"a", "b", "c"}), rapid.SampledFrom([]string{"", "a", "1", "2"}), 0, 3).Draw(t, "labels")
			return replica(rapid.SampledFrom([]string{"p", "q", "r", "s"}).Draw(t, "name"), labels)
		}
		for range rapid.IntRange(1, 20).Draw(t, "steps") {
			switch rapid.IntRange(0, 4).Draw(t, "step") {
			case 0, 1:
				p := draw()
				want[p.Name] = p
				if err := s.Update(p.DeepCopy()); err != nil {
					t.Fatal(err)
				}
			case 2:
				p := draw()
				delete(want, p.Name)
				if err := s.Delete(p); err != nil {
					t.Fatal(err)
				}
			case 3: // a streamed list that breaks off
				if _, err := s.Transformer()(draw()); err != nil {
					t.Fatal(err)
				}
			case 4:
				clear(want)
				var list []any
				for range rapid.IntRange(0, 3).Draw(t, "listed") {
					p := draw()
					if want[p.Name] != nil {
						continue
					}
					want[p.Name] = p
					value, err := s.Transformer()(p.DeepCopy())
					if err != nil {
						t.Fatal(err)
					}
					list = append(list, value)
				}
				if err := s.Replace(list, "1"); err != nil {
					t.Fatal(err)
				}
			}
			got := map[string]*Pod{}
			for p := range model.Pods() {
				got[p.Name] = p
			}
			trimmed := map[string]*Pod{}
			for name, p := range want {
				trimmed[name] = PodFrom(p)
			}
			if diff := cmp.Diff(trimmed, got, cmp.Comparer(func(a, b netip.Addr) bool { return a == b })); diff != "" {
				t.Fatalf("pods (-want +got):\n%s", diff)
			}
		}
		if err := s.Replace(nil, "2"); err != nil {
			t.Fatal(err)
		}
		if len(s.parts.sets) > 0 || len(s.parts.values) > 0 {
			t.Fatalf("kept for nobody: %v, %v", s.parts.sets, slices.Collect(maps.Keys(s.parts.values)))
		}
	})
}

type applyTo struct{ model *Model }

func (a applyTo) Synced() {}

func (a applyTo) Apply(changes ...Change) {
	for _, c := range changes {
		a.model.Apply(c)
	}
}

// TestEqual changes one field of a pod after the other: equal must not forget the next one that is added.
func TestEqual(t *testing.T) {
	t.Parallel()
	full := func() *Pod {
		return &Pod{
			Namespace: "ns", Name: "n", UID: "u", MirrorUID: "m", Node: "o", Labels: map[string]string{"k": "v"},
			IPs: []netip.Addr{netip.MustParseAddr("10.0.0.1")}, Ports: []NamedPort{{"http", TCP, 80}}, Created: time.Unix(1, 0),
		}
	}
	if !equal(full(), full()) || equal(full(), &Namespace{}) || !equal(&Namespace{Name: "a"}, &Namespace{Name: "a"}) || equal(&Namespace{Name: "a"}, &Namespace{Name: "b"}) {
		t.Error("not the answer of reflect.DeepEqual")
	}
	other := map[string]any{
		"Labels": map[string]string{"k": "w"}, "IPs": []netip.Addr{netip.MustParseAddr("10.0.0.2")}, "Ports": []NamedPort{{"http", UDP, 80}}, "Created": time.Unix(2, 0),
	}
	for _, field := range reflect.VisibleFields(reflect.TypeFor[Pod]()) {
		changed := full()
		v := reflect.ValueOf(changed).Elem().FieldByIndex(field.Index)
		switch {
		case other[field.Name] != nil:
			v.Set(reflect.ValueOf(other[field.Name]))
		case v.Kind() == reflect.String:
			v.SetString("other")
		case v.Kind() == reflect.Bool:
			v.SetBool(true)
		default:
			t.Fatalf("add another value of the field %s to this test", field.Name)
		}
		if equal(full(), changed) {
			t.Errorf("pods that differ in %s count as equal", field.Name)
		}
	}
}

// BenchmarkStore is a list of pods of ten a set, streamed into a store, and then an update of each that changes nothing.
func BenchmarkStore(b *testing.B) {
	for _, n := range []int{1000, 10_000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			pods := make([]*corev1.Pod, n)
			for i := range pods {
				pods[i] = replica(fmt.Sprintf("pod-%d", i), map[string]string{"app": "web", "tier": "front", "pod-template-hash": fmt.Sprint(i / 10)})
				pods[i].CreationTimestamp = metav1.Unix(int64(i), 0)
			}
			b.ReportAllocs()
			for b.Loop() {
				s := newStore(applyTo{NewModel()}, func() {})
				for _, p := range pods {
					_ = s.Add(p)
				}
				for _, p := range pods {
					_ = s.Update(p)
				}
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N*n), "ns/pod")
		})
	}
}
