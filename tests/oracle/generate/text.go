package generate

import (
	"fmt"
	"strings"

	"sigs.k8s.io/yaml"

	"github.com/podwall/podwall/tests/oracle"
)

// Text writes a cluster as YAML documents, for people who look for what went wrong.
func Text(c *oracle.Cluster) string {
	var b strings.Builder
	document := func(kind string, object any) {
		y, err := yaml.Marshal(object)
		if err != nil {
			y = []byte(err.Error())
		}
		fmt.Fprintf(&b, "---\nkind: %s\n", kind)
		for line := range strings.Lines(string(y)) {
			if !strings.Contains(line, "creationTimestamp: null") && !strings.HasSuffix(line, "resources: {}\n") {
				b.WriteString(line)
			}
		}
	}
	fmt.Fprintf(&b, "# node: %s, own-node-egress=allow: %v\n", c.Node, c.AllowOwnNode)
	for _, s := range c.Sandboxes {
		fmt.Fprintf(&b, "# sandbox: %s/%s %v\n", s.Namespace, s.Name, s.IPs)
	}
	for _, n := range c.Namespaces {
		document("Namespace", n)
	}
	for _, p := range c.Pods {
		document("Pod", p)
	}
	for _, p := range c.Policies {
		document("NetworkPolicy", p)
	}
	return b.String()
}
