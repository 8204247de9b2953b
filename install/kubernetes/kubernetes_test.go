// Package kubernetes holds what `kubectl apply -k` puts on a cluster, and this test of what it may do there.
package kubernetes

import (
	"bufio"
	"bytes"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	"k8s.io/apimachinery/pkg/util/yaml"
	sigsyaml "sigs.k8s.io/yaml"
)

// applied returns the objects of the kustomization by kind, each checked for fields that its type does not have.
func applied(t *testing.T) map[string][]any {
	t.Helper()
	text, err := os.ReadFile("kustomization.yaml")
	if err != nil {
		t.Fatal(err)
	}
	var kustomization struct {
		Resources, Components []string
		Patches               []any
	}
	if err := sigsyaml.Unmarshal(text, &kustomization); err != nil {
		t.Fatal(err)
	}
	if len(kustomization.Components) > 0 || len(kustomization.Patches) > 0 {
		t.Fatalf("the kustomization changes its resources: this test does not see what is applied")
	}
	files, err := filepath.Glob("*.yaml")
	if err != nil {
		t.Fatal(err)
	}
	if want := append([]string{"kustomization.yaml"}, kustomization.Resources...); len(files) != len(want) {
		t.Errorf("files %v, of which are applied %v", files, kustomization.Resources)
	}
	objects := map[string][]any{}
	for _, name := range kustomization.Resources {
		text, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		documents := yaml.NewYAMLReader(bufio.NewReader(bytes.NewReader(text)))
		for {
			document, err := documents.Read()
			if errors.Is(err, io.EOF) {
				break
			}
			if err != nil {
				t.Fatal(err)
			}
			var kind struct{ Kind string }
			if err := sigsyaml.Unmarshal(document, &kind); err != nil {
				t.Fatal(err)
			}
			object, ok := map[string]any{
				"DaemonSet": &appsv1.DaemonSet{}, "ServiceAccount": &corev1.ServiceAccount{},
				"ClusterRole": &rbacv1.ClusterRole{}, "ClusterRoleBinding": &rbacv1.ClusterRoleBinding{},
			}[kind.Kind]
			if !ok {
				t.Fatalf("%s has a %s, of which this test knows nothing", name, kind.Kind)
			}
			if err := sigsyaml.UnmarshalStrict(document, object); err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			objects[kind.Kind] = append(objects[kind.Kind], object)
		}
	}
	return objects
}

// only returns the one object of a kind.
func only[T any](t *testing.T, objects map[string][]any, kind string) T {
	t.Helper()
	if len(objects[kind]) != 1 {
		t.Fatalf("%d objects of kind %s, want one", len(objects[kind]), kind)
	}
	return objects[kind][0].(T)
}

// The service account reads three resources and nothing else.
func TestServiceAccountReadsThreeResources(t *testing.T) {
	t.Parallel()
	objects := applied(t)
	account := only[*corev1.ServiceAccount](t, objects, "ServiceAccount")
	role, binding := only[*rbacv1.ClusterRole](t, objects, "ClusterRole"), only[*rbacv1.ClusterRoleBinding](t, objects, "ClusterRoleBinding")
	var got []string
	for _, rule := range role.Rules {
		if len(rule.NonResourceURLs) > 0 || len(rule.ResourceNames) > 0 {
			t.Errorf("rule %+v", rule)
		}
		for _, group := range rule.APIGroups {
			for _, resource := range rule.Resources {
				got = append(got, group+"/"+resource+" "+strings.Join(slices.Sorted(slices.Values(rule.Verbs)), ","))
			}
		}
	}
	slices.Sort(got)
	if diff := cmp.Diff([]string{"/namespaces get,list,watch", "/pods get,list,watch", "networking.k8s.io/networkpolicies get,list,watch"}, got); diff != "" {
		t.Errorf("the role (-want +got):\n%s", diff)
	}
	if role.AggregationRule != nil || binding.RoleRef.Name != role.Name || binding.RoleRef.Kind != "ClusterRole" || len(binding.Subjects) != 1 ||
		binding.Subjects[0].Kind != "ServiceAccount" || binding.Subjects[0].Name != account.Name {
		t.Errorf("binding %+v of role %+v", binding, role)
	}
	if account.AutomountServiceAccountToken == nil || *account.AutomountServiceAccountToken {
		t.Error("the account's token is mounted into every pod that names it")
	}
}

func TestDaemonSetHasLeastPrivilege(t *testing.T) {
	t.Parallel()
	set := only[*appsv1.DaemonSet](t, applied(t), "DaemonSet")
	pod := set.Spec.Template.Spec
	if pod.HostPID || pod.HostIPC || !pod.HostNetwork {
		t.Errorf("hostPID %v, hostIPC %v, hostNetwork %v, want the node's network and nothing else of it", pod.HostPID, pod.HostIPC, pod.HostNetwork)
	}
	seccomp := pod.SecurityContext.SeccompProfile
	if seccomp == nil || seccomp.Type != corev1.SeccompProfileTypeRuntimeDefault {
		t.Errorf("seccomp profile %+v, want RuntimeDefault", seccomp)
	}
	mounts := map[string][]string{}
	adds := map[string][]corev1.Capability{"install": nil, "podwalld": {"NET_ADMIN"}}
	for _, c := range append(slices.Clone(pod.InitContainers), pod.Containers...) {
		want, known := adds[c.Name]
		s := c.SecurityContext
		if !known || s == nil || s.Capabilities == nil {
			t.Fatalf("container %s: %+v", c.Name, s)
		}
		if s.AllowPrivilegeEscalation == nil || *s.AllowPrivilegeEscalation || s.ReadOnlyRootFilesystem == nil || !*s.ReadOnlyRootFilesystem ||
			s.Privileged != nil || s.SeccompProfile != nil || s.ProcMount != nil {
			t.Errorf("container %s: %+v", c.Name, s)
		}
		if diff := cmp.Diff(&corev1.Capabilities{Drop: []corev1.Capability{"ALL"}, Add: want}, s.Capabilities); diff != "" {
			t.Errorf("capabilities of %s (-want +got):\n%s", c.Name, diff)
		}
		if len(c.Ports) > 0 {
			t.Errorf("container %s declares ports: under hostNetwork they are hostPorts, and two daemons run during an update", c.Name)
		}
		if c.Resources.Limits.Memory().IsZero() || c.Resources.Requests.Cpu().IsZero() {
			t.Errorf("container %s: resources %+v", c.Name, c.Resources)
		}
		for _, m := range c.VolumeMounts {
			mounts[c.Name] = append(mounts[c.Name], m.MountPath)
			if m.MountPropagation != nil {
				t.Errorf("container %s: mount %+v", c.Name, m)
			}
		}
	}
	// The plugin's directory is the init container's only: a daemon that was taken over cannot replace what runtimes execute.
	if diff := cmp.Diff(map[string][]string{
		"install": {"/run/podwall", "/opt/cni/bin", "/etc/cni/net.d"}, "podwalld": {"/run/podwall", "/etc/cni/net.d"},
	}, mounts); diff != "" {
		t.Errorf("mounts (-want +got):\n%s", diff)
	}
	var paths []string
	for _, v := range pod.Volumes {
		if v.HostPath == nil {
			t.Fatalf("volume %+v", v)
		}
		paths = append(paths, v.HostPath.Path)
	}
	if diff := cmp.Diff([]string{"/run/podwall", "/opt/cni/bin", "/etc/cni/net.d"}, paths); diff != "" {
		t.Errorf("the node's directories (-want +got):\n%s", diff)
	}
}

// During an update two daemons of one node are alive, and 127.0.0.1:9481 is one of them.
func TestDaemonSetSurgesAndProbesItself(t *testing.T) {
	t.Parallel()
	set := only[*appsv1.DaemonSet](t, applied(t), "DaemonSet")
	update := set.Spec.UpdateStrategy
	if update.Type != appsv1.RollingUpdateDaemonSetStrategyType || update.RollingUpdate.MaxSurge.IntValue() != 1 || update.RollingUpdate.MaxUnavailable.IntValue() != 0 {
		t.Errorf("update strategy %+v", update)
	}
	c := set.Spec.Template.Spec.Containers[0]
	for name, tt := range map[string]struct {
		probe   *corev1.Probe
		command []string
	}{
		"readiness": {c.ReadinessProbe, []string{"podwalld", "health"}},
		"liveness":  {c.LivenessProbe, []string{"podwalld", "health", "--live"}},
	} {
		if tt.probe == nil || tt.probe.Exec == nil {
			t.Errorf("%s probe %+v, want one by exec", name, tt.probe)
			continue
		}
		if diff := cmp.Diff(tt.command, tt.probe.Exec.Command); diff != "" {
			t.Errorf("%s probe (-want +got):\n%s", name, diff)
		}
	}
}
