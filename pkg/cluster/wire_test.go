package cluster

import (
	"bytes"
	"net/netip"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer/protobuf"
)

// decoders are the one of the library and the lean one.
func decoders(t testing.TB) (runtime.Serializer, lean) {
	t.Helper()
	scheme := runtime.NewScheme()
	if err := corev1.AddToScheme(scheme); err != nil {
		t.Fatal(err)
	}
	if err := networkingv1.AddToScheme(scheme); err != nil {
		t.Fatal(err)
	}
	full := protobuf.NewSerializer(scheme, scheme)
	return full, lean{full}
}

// everything is a pod with all that is kept of one, and with much that is not.
func everything() *corev1.Pod {
	at := metav1.Unix(1700000000, 0)
	noise := []corev1.EnvVar{{Name: "SECRET", Value: "noise"}}
	return &corev1.Pod{
		TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Pod"},
		ObjectMeta: metav1.ObjectMeta{
			Namespace: "shop", Name: "web", GenerateName: "noise", UID: "u-1", ResourceVersion: "7", CreationTimestamp: at, DeletionTimestamp: &at,
			Labels: map[string]string{"app": "web", "empty": ""}, Annotations: map[string]string{corev1.MirrorPodAnnotationKey: "mirror"}, Finalizers: []string{"noise"},
			ManagedFields: []metav1.ManagedFieldsEntry{{Manager: "noise", FieldsV1: metav1.NewFieldsV1(strings.Repeat("noise", 500))}},
		},
		Spec: corev1.PodSpec{
			NodeName: "node-1", HostNetwork: true, Hostname: "noise", Volumes: []corev1.Volume{{Name: "noise"}},
			InitContainers: []corev1.Container{
				{Name: "noise", Ports: []corev1.ContainerPort{{Name: "early", ContainerPort: 1}}},
				{Name: "noise", Env: noise, RestartPolicy: new(corev1.ContainerRestartPolicyAlways), Ports: []corev1.ContainerPort{{Name: "side", ContainerPort: 2, Protocol: corev1.ProtocolUDP}}},
			},
			Containers: []corev1.Container{
				{Name: "noise", Env: noise},
				{Name: "noise", Image: "noise", Env: noise, Ports: []corev1.ContainerPort{{Name: "http", ContainerPort: 8080, Protocol: corev1.ProtocolTCP}, {Name: "dns", ContainerPort: 53, Protocol: corev1.ProtocolUDP}}},
			},
		},
		Status: corev1.PodStatus{
			Phase: corev1.PodFailed, PodIP: "10.0.0.1", PodIPs: []corev1.PodIP{{IP: "10.0.0.1"}, {IP: "fd00::1"}}, HostIP: "192.0.2.1", Reason: "noise",
			ContainerStatuses: []corev1.ContainerStatus{{Name: "noise", ImageID: "noise"}},
		},
	}
}

func encodeTo(t testing.TB, s runtime.Serializer, o runtime.Object) []byte {
	t.Helper()
	var b bytes.Buffer
	if err := s.Encode(o, &b); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func decodeWith(t testing.TB, s runtime.Serializer, data []byte) runtime.Object {
	t.Helper()
	o, _, err := s.Decode(data, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	return o
}

var sameAddr = cmp.Comparer(func(a, b netip.Addr) bool { return a == b })

func TestLeanPod(t *testing.T) {
	t.Parallel()
	full, lean := decoders(t)
	data := encodeTo(t, full, everything())
	want := PodFrom(decodeWith(t, full, data).(*corev1.Pod))
	for _, field := range reflect.VisibleFields(reflect.TypeFor[Pod]()) {
		if reflect.ValueOf(want).Elem().FieldByIndex(field.Index).IsZero() {
			t.Errorf("this test has a pod without %s", field.Name)
		}
	}
	got := decodeWith(t, lean, data).(*corev1.Pod)
	if diff := cmp.Diff(want, PodFrom(got), sameAddr); diff != "" {
		t.Errorf("pod (-full +lean):\n%s", diff)
	}
	if got.ResourceVersion != "7" {
		t.Errorf("resourceVersion %q: a watch could not be resumed", got.ResourceVersion)
	}
	if stripped := strip(data); bytes.Contains(stripped, []byte("noise")) || len(stripped) > 400 {
		t.Errorf("kept %d of %d bytes: %q", len(stripped), len(data), stripped)
	}
}

func TestLeanOthers(t *testing.T) {
	t.Parallel()
	full, lean := decoders(t)
	meta := metav1.ObjectMeta{
		Namespace: "shop", Name: "n", Labels: map[string]string{"team": "a"}, ResourceVersion: "9",
		ManagedFields: []metav1.ManagedFieldsEntry{{Manager: "noise"}}, Annotations: map[string]string{metav1.InitialEventsAnnotationKey: "true"},
	}
	spec := networkingv1.NetworkPolicySpec{
		PodSelector: metav1.LabelSelector{MatchLabels: map[string]string{"app": "web"}}, PolicyTypes: []networkingv1.PolicyType{networkingv1.PolicyTypeEgress},
		Egress: []networkingv1.NetworkPolicyEgressRule{{To: []networkingv1.NetworkPolicyPeer{{IPBlock: &networkingv1.IPBlock{CIDR: "10.0.0.0/8", Except: []string{"10.1.0.0/16"}}}}}},
	}
	v1, networking := metav1.TypeMeta{APIVersion: "v1"}, metav1.TypeMeta{APIVersion: "networking.k8s.io/v1"}
	kind := func(m metav1.TypeMeta, kind string) metav1.TypeMeta { m.Kind = kind; return m }
	list := metav1.ListMeta{ResourceVersion: "10", Continue: "next"}
	pod := everything()
	for _, o := range []runtime.Object{
		&corev1.Namespace{TypeMeta: kind(v1, "Namespace"), ObjectMeta: meta},
		&networkingv1.NetworkPolicy{TypeMeta: kind(networking, "NetworkPolicy"), ObjectMeta: meta, Spec: spec},
		&corev1.NamespaceList{TypeMeta: kind(v1, "NamespaceList"), ListMeta: list, Items: []corev1.Namespace{{ObjectMeta: meta}, {}}},
		&networkingv1.NetworkPolicyList{TypeMeta: kind(networking, "NetworkPolicyList"), ListMeta: list, Items: []networkingv1.NetworkPolicy{{ObjectMeta: meta, Spec: spec}}},
		&corev1.PodList{TypeMeta: kind(v1, "PodList"), ListMeta: list, Items: []corev1.Pod{*pod, {}, *pod}},
		&metav1.Status{TypeMeta: kind(v1, "Status"), Status: "Failure", Reason: metav1.StatusReasonExpired, Message: "too old"},
	} {
		data := encodeTo(t, full, o)
		want, got := decodeWith(t, full, data), decodeWith(t, lean, data)
		if bytes.Contains(strip(data), []byte("noise")) {
			t.Errorf("%T: noise is kept", o)
		}
		switch want := want.(type) {
		case *corev1.PodList:
			got := got.(*corev1.PodList)
			if want.ListMeta != got.ListMeta || len(want.Items) != len(got.Items) {
				t.Errorf("list of %d pods %v, want %d, %v", len(got.Items), got.ListMeta, len(want.Items), want.ListMeta)
			}
			for i := range got.Items {
				if diff := cmp.Diff(PodFrom(&want.Items[i]), PodFrom(&got.Items[i]), sameAddr); diff != "" {
					t.Errorf("pod %d (-full +lean):\n%s", i, diff)
				}
			}
		case *corev1.Namespace:
			want.ManagedFields = nil
		case *networkingv1.NetworkPolicy:
			want.ManagedFields = nil
		case *corev1.NamespaceList:
			want.Items[0].ManagedFields = nil
		case *networkingv1.NetworkPolicyList:
			want.Items[0].ManagedFields = nil
		}
		if _, isPods := want.(*corev1.PodList); isPods {
			continue
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%T (-full +lean):\n%s", o, diff)
		}
	}
}

// FuzzStrip holds that what the library can decode, the lean decoder decodes to the same trimmed object, whatever the message.
func FuzzStrip(f *testing.F) {
	full, lean := decoders(f)
	kinds := []struct{ apiVersion, kind string }{{"v1", "Pod"}, {"v1", "Namespace"}, {"networking.k8s.io/v1", "NetworkPolicy"}, {"v1", "Secret"}}
	raw, err := everything().Marshal()
	if err != nil {
		f.Fatal(err)
	}
	for i := range kinds {
		f.Add(uint8(i), raw)
	}
	f.Add(uint8(0), []byte{0x12, 0x02, 0x10, 0x01, 0x12, 0x00, 0x0b, 0x0c}) // spec with a varint for containers, spec once more, a group
	f.Fuzz(func(t *testing.T, which uint8, raw []byte) {
		k := kinds[int(which)%len(kinds)]
		u := runtime.Unknown{TypeMeta: runtime.TypeMeta{APIVersion: k.apiVersion, Kind: k.kind}, Raw: raw}
		text, err := u.Marshal()
		if err != nil {
			t.Fatal(err)
		}
		data := append([]byte("k8s\x00"), text...)
		want, _, err := full.Decode(data, nil, nil)
		if err != nil {
			_, _, _ = lean.Decode(data, nil, nil) // must not panic
			return
		}
		got, _, err := lean.Decode(data, nil, nil)
		if err != nil {
			t.Fatalf("the library decodes it: %v", err)
		}
		a, err := trim(want)
		if err != nil {
			if !reflect.DeepEqual(want, got) {
				t.Fatalf("what is no object of podwall's was changed: %v, want %v", got, want)
			}
			return
		}
		b, err := trim(got)
		if err != nil {
			t.Fatal(err)
		}
		if !reflect.DeepEqual(a, b) {
			t.Fatalf("full %+v\nlean %+v", a.Object, b.Object)
		}
	})
}

// BenchmarkDecode compares decoding a pod in full with decoding what is kept of it.
func BenchmarkDecode(b *testing.B) {
	full, lean := decoders(b)
	pod := everything()
	pod.DeletionTimestamp = nil
	for range 20 {
		pod.Spec.Containers[1].Env = append(pod.Spec.Containers[1].Env, corev1.EnvVar{Name: "SETTING", Value: "some value of it"})
		pod.Status.Conditions = append(pod.Status.Conditions, corev1.PodCondition{Type: corev1.PodReady, Status: corev1.ConditionTrue, LastTransitionTime: metav1.NewTime(time.Unix(1, 0))})
	}
	data := encodeTo(b, full, pod)
	for name, s := range map[string]runtime.Serializer{"full": full, "lean": lean} {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			b.SetBytes(int64(len(data)))
			for b.Loop() {
				if _, _, err := s.Decode(data, nil, nil); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
