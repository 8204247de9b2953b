package main

// mutant is a wrong variant of the product: one file with pieces of its text replaced.
type mutant struct {
	name   string
	breaks string
	file   string // of the repository
	edits  []edit
}

// edit replaces a text that occurs exactly once.
type edit struct{ old, new string }

const (
	compileGo = "pkg/policy/compile.go"
	peersGo   = "pkg/policy/peers.go"
	engineGo  = "pkg/policy/engine.go"
	indexGo   = "pkg/policy/index.go"
	liveGo    = "pkg/policy/live.go"
	renderGo  = "pkg/policy/render.go"
	baseGo    = "pkg/policy/base.go"
	linkGo    = "pkg/policy/link.go"
	diffGo    = "pkg/ruleset/diff.go"
	exprGo    = "pkg/ruleset/expr.go"
	rulesetGo = "pkg/ruleset/ruleset.go"
	convertGo = "pkg/cluster/convert.go"
)

var mutants = []mutant{
	// Selection and defaulting.
	{
		"policy-types-empty-as-none", "policyTypes: [] isolates nothing, absent is defaulted", compileGo,
		[]edit{{"if len(spec.PolicyTypes) == 0 {", "if spec.PolicyTypes == nil {"}},
	},
	{
		"policy-types-no-egress", "absent policyTypes with egress rules do not isolate egress", compileGo,
		[]edit{{"return true, len(spec.Egress) > 0", "return true, false"}},
	},
	{
		"policy-types-egress-only", "absent policyTypes with egress rules only do not isolate ingress", compileGo,
		[]edit{{"return true, len(spec.Egress) > 0", "return len(spec.Ingress) > 0 || len(spec.Egress) == 0, len(spec.Egress) > 0"}},
	},
	{
		"policy-types-unlisted", "rules of a type that policyTypes does not list isolate and are applied", compileGo,
		[]edit{{"return ingress, egress\n", "return ingress || len(spec.Ingress) > 0, egress || len(spec.Egress) > 0\n"}},
	},
	{
		"no-rules-no-isolation", "a policy without ingress rules isolates nobody", renderGo,
		[]edit{{"if c.ingress != nil {", "if c.ingress != nil && len(c.ingress.rules) > 0 {"}},
	},
	{
		"subject-all-namespaces", "a policy selects pods of every namespace", renderGo,
		[]edit{{
			"for _, c := range r.policies[e.Pod.Namespace] {",
			"var all []*compiled\n\tfor _, list := range r.policies {\n\t\tall = append(all, list...)\n\t}\n\tfor _, c := range all {",
		}},
	},
	{
		"subject-everybody", "spec.podSelector is not looked at", renderGo,
		[]edit{{"if !c.subject.Matches(labels.Set(e.Pod.Labels)) {", "if !labels.Everything().Matches(labels.Set(e.Pod.Labels)) {"}},
	},
	{
		"first-policy-only", "of several policies that select a pod the first one counts", renderGo,
		[]edit{{"for _, p := range policies {", "for _, p := range policies[:1] {"}},
	},
	{
		"first-rule-only", "of several rules the first one counts", renderGo,
		[]edit{{"for i := range d.rules {", "for i := range min(1, len(d.rules)) {"}},
	},

	// Peers and selectors.
	{
		"and-as-or", "namespaceSelector and podSelector in one peer are two peers", compileGo,
		[]edit{{
			"r.pods = append(r.pods, peer)",
			"if p.PodSelector != nil && p.NamespaceSelector != nil {\n\t\t\tr.pods = append(r.pods, podPeer{namespaces: peer.namespaces, pods: labels.Everything()}, podPeer{namespace: c.namespace, pods: peer.pods})\n\t\t\treturn\n\t\t}\n\t\tr.pods = append(r.pods, peer)",
		}},
	},
	{
		"or-as-and", "two selector peers of one rule must both match", compileGo,
		[]edit{{
			"r.pods = append(r.pods, peer)",
			"if n := len(r.pods); n > 0 {\n\t\t\treqs, _ := peer.pods.Requirements()\n\t\t\tr.pods[n-1].pods = r.pods[n-1].pods.Add(reqs...)\n\t\t\treturn\n\t\t}\n\t\tr.pods = append(r.pods, peer)",
		}},
	},
	{
		"pod-selector-all-namespaces", "a peer without namespaceSelector selects pods of every namespace", compileGo,
		[]edit{{"peer.namespace = c.namespace", "peer.namespaces = labels.Everything()"}},
	},
	{
		"namespace-selector-empty", "namespaceSelector: {} is the policy's own namespace", compileGo,
		[]edit{{"if p.NamespaceSelector == nil {", "if p.NamespaceSelector == nil || p.NamespaceSelector.Size() == 0 {"}},
	},
	{
		"namespace-selector-ignored", "namespaceSelector is not looked at", peersGo,
		[]edit{{"ok = p.namespaces.Matches(labels.Set(r.in.Model.NamespaceLabels(pod.Namespace)))", "ok = true"}},
	},
	{
		"peer-pod-selector-ignored", "the podSelector of a peer is not looked at", peersGo,
		[]edit{{"if p.pods.Matches(labels.Set(pod.Labels)) && !yield", "if !yield"}},
	},
	{
		"not-in-needs-key", "NotIn matches only pods that have the key", compileGo,
		[]edit{{
			"if peer.pods, err = metav1.LabelSelectorAsSelector(p.PodSelector); err != nil {",
			"s := p.PodSelector.DeepCopy()\n\t\t\tfor _, e := range p.PodSelector.MatchExpressions {\n\t\t\t\tif e.Operator == metav1.LabelSelectorOpNotIn {\n\t\t\t\t\ts.MatchExpressions = append(s.MatchExpressions, metav1.LabelSelectorRequirement{Key: e.Key, Operator: metav1.LabelSelectorOpExists})\n\t\t\t\t}\n\t\t\t}\n\t\t\tif peer.pods, err = metav1.LabelSelectorAsSelector(s); err != nil {",
		}},
	},
	{
		"empty-value-matches-absent", `matchLabels {k: ""} matches pods without k`, compileGo,
		[]edit{{
			"if peer.pods, err = metav1.LabelSelectorAsSelector(p.PodSelector); err != nil {",
			"s := p.PodSelector.DeepCopy()\n\t\t\tfor k, v := range p.PodSelector.MatchLabels {\n\t\t\t\tif v == \"\" {\n\t\t\t\t\tdelete(s.MatchLabels, k)\n\t\t\t\t}\n\t\t\t}\n\t\t\tif peer.pods, err = metav1.LabelSelectorAsSelector(s); err != nil {",
		}},
	},
	{
		"from-empty-as-nobody", "from: [] allows nobody, absent everybody", compileGo,
		[]edit{{"anyPeer: len(peers) == 0", "anyPeer: peers == nil"}},
	},
	{
		"empty-peer-set-as-everybody", "a selector that selects nobody is rendered without a match", renderGo,
		[]edit{{
			"for i, set := range r.peerSets(p) {",
			"for i, set := range r.peerSets(p) {\n\t\t\tif len(r.table.Sets[set].Elements) == 0 {\n\t\t\t\treturn [][]ruleset.Expr{nil}\n\t\t\t}",
		}},
	},
	{
		"peer-set-shared-by-pods", "the name of a peer set does not depend on the podSelector", peersGo,
		[]edit{{`return []string{"namespaces", p.namespaces.String(), p.pods.String()}`, `return []string{"namespaces", p.namespaces.String()}`}},
	},
	{
		"peer-set-shared-by-namespaces", "the name of a peer set does not depend on the policy's namespace", peersGo,
		[]edit{{`return []string{"namespace", p.namespace, p.pods.String()}`, `return []string{"namespace", p.pods.String()}`}},
	},
	{
		"policy-chain-shared", "the name of a policy's chain does not depend on its namespace", renderGo,
		[]edit{{"identity = append(identity, p.of.namespace, p.of.name)", "identity = append(identity, p.of.name)"}},
	},
	{
		"port-ranges-shared", "the name of a set of port ranges does not depend on the ranges", peersGo,
		[]edit{{"ID(append([]string{setPortRanges}, elemStrings(elements)...)...)", "ID(setPortRanges)"}},
	},
	{
		"host-network-peer", "a hostNetwork pod is a peer under the node's address", peersGo,
		[]edit{{"return !pod.HostNetwork && !pod.Terminal", "return !pod.Terminal"}},
	},
	{
		"terminal-peer", "a completed pod stays a peer", peersGo,
		[]edit{{"return !pod.HostNetwork && !pod.Terminal", "return !pod.HostNetwork"}},
	},
	{
		"older-claim-wins", "of two pods that claim an address the older is the peer", peersGo,
		[]edit{{"return cmp.Or(a.Created.Compare(b.Created), strings.Compare(nameOf(b), nameOf(a)))", "return -cmp.Or(a.Created.Compare(b.Created), strings.Compare(nameOf(b), nameOf(a)))"}},
	},
	{
		"remote-claim-wins", "another pod's object takes the address of a pod that is attached here", engineGo,
		[]edit{{"if list := e.local[ip]; list != nil {", "if list := e.local[ip]; list != nil && (e.claimed[ip] == nil || list[len(list)-1].Pod == nil) {"}},
	},
	{
		"peer-one-address", "of a dual stack pod one address is a peer", peersGo,
		[]edit{{"for _, ip := range ips {\n\t\ti := 1", "for _, ip := range ips[:min(1, len(ips))] {\n\t\ti := 1"}},
	},

	// ipBlock.
	{
		"except-dropped", "except is not looked at", compileGo,
		[]edit{{"own.RemovePrefix(except)", "_ = except"}},
	},
	{
		"except-narrows-other-peers", "except is cut out of the peers before it, too", compileGo,
		[]edit{{"var own netipx.IPSetBuilder\n", "own := to\n"}},
	},
	{
		"first-except-only", "of several excepts the first one counts", compileGo,
		[]edit{{"for _, e := range b.Except {", "for _, e := range b.Except[:min(1, len(b.Except))] {"}},
	},
	{
		"bad-except-ignored", "an except that cannot be read is left out", compileGo,
		[]edit{{`return fmt.Errorf("ipBlock except: %w", err)`, "continue"}},
	},
	{
		"bad-cidr-as-everybody", "a cidr that cannot be read is 0.0.0.0/0", compileGo,
		[]edit{{`return fmt.Errorf("ipBlock cidr: %w", err)`, "cidr = everything4"}},
	},
	{
		"sloppy-cidr-refused", "leading zeros and the like make a block match nothing", compileGo,
		[]edit{{
			"_, ipnet, err := netutils.ParseCIDRSloppy(s)\n\tif err != nil {",
			"_, ipnet, err := netutils.ParseCIDRSloppy(s)\n\tif _, strict := netip.ParsePrefix(s); err != nil || strict != nil {",
		}},
	},
	{
		"mapped-cidr-as-ipv6", "::ffff:10.0.0.0/104 is not 10.0.0.0/8", compileGo,
		[]edit{{"bits == 128 && ones >= 96", "bits == 128 && ones > 128"}},
	},
	{
		"any-ipv4-is-any", "0.0.0.0/0 opens IPv6 too", compileGo,
		[]edit{{"own.AddPrefix(cidr)", "own.AddPrefix(cidr)\n\tif cidr == everything4 {\n\t\town.AddPrefix(everything6)\n\t}"}},
	},
	{
		"range-end", "a range that is no prefix ends one address early", renderGo,
		[]edit{{"To: string(rg.To().AsSlice())", "To: string(rg.To().Prev().AsSlice())"}},
	},
	{
		"range-set-end", "the ranges of an interval set end one address early", peersGo,
		[]edit{{
			"elements[ruleset.RangeElem(rg.From(), rg.To())] = ruleset.Verdict{}",
			"to := rg.To()\n\t\t\tif to != rg.From() {\n\t\t\t\tto = to.Prev()\n\t\t\t}\n\t\t\telements[ruleset.RangeElem(rg.From(), to)] = ruleset.Verdict{}",
		}},
	},
	{
		"range-set-name", "the name of an interval set does not depend on all of its ranges", peersGo,
		[]edit{{`ID(setBlocks, rangesText(list))`, `ID(setBlocks, rangesText(list[:1]))`}},
	},

	// Ports.
	{
		"ports-empty-as-none", "ports: [] allows nothing, absent everything", compileGo,
		[]edit{{"anyPort: len(ports) == 0", "anyPort: ports == nil"}},
	},
	{
		"protocol-nil-as-any", "a port without protocol is every protocol's", compileGo,
		[]edit{{
			"proto := cluster.TCP\n",
			"if p.Protocol == nil {\n\t\tfor _, proto := range []corev1.Protocol{\"TCP\", \"UDP\", \"SCTP\"} {\n\t\t\tq := *p\n\t\t\tq.Protocol = &proto\n\t\t\tc.port(where, &q, r)\n\t\t}\n\t\treturn\n\t}\n\tproto := cluster.TCP\n",
		}, {"networkingv1 \"k8s.io/api/networking/v1\"\n", "corev1 \"k8s.io/api/core/v1\"\n\tnetworkingv1 \"k8s.io/api/networking/v1\"\n"}},
	},
	{
		"sctp-as-tcp", "SCTP is read as TCP", compileGo,
		[]edit{{"proto = cluster.SCTP", "proto = cluster.TCP"}},
	},
	{
		"protocol-not-matched", "a single port is matched without its protocol", renderGo,
		[]edit{{"match(p.proto, ruleset.Equal16(ruleset.Dport, p.from))", "matches = append(matches, []ruleset.Expr{ruleset.Equal16(ruleset.Dport, p.from)})"}},
	},
	{
		"port-set-protocol", "the ports of a set are all TCP's", peersGo,
		[]edit{{"elements[ruleset.PortElem(uint8(p.proto), p.from)]", "elements[ruleset.PortElem(ruleset.ProtoTCP, p.from)]"}},
	},
	{
		"no-port-as-everything", "ports: [{}] matches every protocol", renderGo,
		[]edit{{"for _, p := range whole {\n\t\tmatch(p.proto)", "for range whole {\n\t\tmatches = append(matches, nil)"}},
	},
	{
		"source-port", "a port is matched with the source's", renderGo,
		[]edit{{"ruleset.Equal16(ruleset.Dport, p.from))", "ruleset.Equal16(ruleset.Sport, p.from))"}},
	},
	{
		"end-port-ignored", "endPort is not looked at", compileGo,
		[]edit{{"end = *p.EndPort", "end = p.Port.IntVal"}},
	},
	{
		"end-port-exclusive", "endPort is not part of the range", compileGo,
		[]edit{{"end = *p.EndPort", "end = max(p.Port.IntVal, *p.EndPort-1)"}},
	},
	{
		"port-range-start", "a range begins one port late", renderGo,
		[]edit{{"ruleset.Between16(ruleset.Dport, p.from, p.to)", "ruleset.Between16(ruleset.Dport, p.from+1, p.to)"}},
	},
	{
		"port-merge-gap", "ranges are joined over a gap of one port", compileGo,
		[]edit{{"if int(p.from) <= int(last.to)+1 {", "if int(p.from) <= int(last.to)+2 {"}},
	},
	{
		"port-merge-nested", "a range that ends inside another one cuts it off", compileGo,
		[]edit{{"last.to = max(last.to, p.to)", "last.to = p.to"}},
	},
	{
		"port-merge-protocols", "ranges of different protocols are joined", compileGo,
		[]edit{{"n > 0 && merged[n-1].proto == p.proto {", "n > 0 {"}},
	},
	{
		"icmp-by-ports", "a rule with ports admits ICMP", renderGo,
		[]edit{{"var matches [][]ruleset.Expr\n\tmatch := func", "matches := [][]ruleset.Expr{{ruleset.Equal(ruleset.L4Proto, ruleset.ProtoICMP)}}\n\tmatch := func"}},
	},
	{
		"icmp-never", "a rule without ports admits TCP, UDP and SCTP only", renderGo,
		[]edit{{
			"if rule.anyPort {\n\t\treturn [][]ruleset.Expr{nil}",
			"if rule.anyPort {\n\t\treturn [][]ruleset.Expr{{ruleset.Equal(ruleset.L4Proto, ruleset.ProtoTCP)}, {ruleset.Equal(ruleset.L4Proto, ruleset.ProtoUDP)}, {ruleset.Equal(ruleset.L4Proto, ruleset.ProtoSCTP)}}",
		}},
	},

	// Named ports.
	{
		"named-port-union-ingress", "a named port of an ingress rule is every number that any pod gives the name", renderGo,
		[]edit{{
			"for _, n := range resolved[port] {\n\t\t\t\t\tnumbers",
			"for p := range r.in.Model.Pods() {\n\t\t\t\t\tresolved[port] = append(resolved[port], resolve(p, port)...)\n\t\t\t\t}\n\t\t\t\tfor _, n := range resolved[port] {\n\t\t\t\t\tnumbers",
		}},
	},
	{
		"named-port-union-egress", "a named port of an egress rule is, on each pod, every number that any pod gives the name", peersGo,
		[]edit{{"numbers = resolve(pod, *s.port)", "everyNumber = append(everyNumber, resolve(pod, *s.port)...)\n\t\tnumbers = everyNumber"}, {"// peerSets returns the names", "var everyNumber []uint16\n\n// peerSets returns the names"}},
	},
	{
		"named-port-any-address", "a named port of an egress rule opens its numbers for any address that the peers match", renderGo,
		[]edit{{
			"for _, sets := range r.namedPeers(rule, port) {",
			"for i := range r.peers {\n\t\t\t\tfor _, n := range resolve(r.peers[i].pod, port) {\n\t\t\t\t\trules = append(rules, r.product(rule, []portRange{{proto: port.proto, from: n, to: n}}, destinations, allowed)...)\n\t\t\t\t}\n\t\t\t}\n\t\t\tfor _, sets := range r.namedPeers(rule, port) {",
		}},
	},
	{
		"named-port-protocol", "a named port is resolved by its name alone", peersGo,
		[]edit{{"if p.Name == port.name && p.Protocol == port.proto {", "if p.Name == port.name {"}},
	},
	{
		"named-port-first-only", "of two numbers with one name the smaller counts", peersGo,
		[]edit{{"return slices.Compact(numbers)", "return numbers[:min(1, len(numbers))]"}},
	},
	{
		"named-port-block-ignored", "a named port with an ipBlock is open on pods outside of the block", renderGo,
		[]edit{{"r.namedPortSets(everyPod, rule.blocks, port)", "r.namedPortSets(everyPod, nil, port)"}},
	},
	{
		"named-port-chain-shared", "pods with different numbers for a name share the chain of the first", renderGo,
		[]edit{{"identity = append(identity, strconv.Itoa(int(n)))", "_ = strconv.Itoa(int(n))"}},
	},
	{
		"init-container-ports", "named ports of plain init containers are resolved", convertGo,
		[]edit{{"if c.RestartPolicy != nil && *c.RestartPolicy == corev1.ContainerRestartPolicyAlways {", "{"}},
	},
	{
		"sidecar-ports-ignored", "named ports of native sidecars are not resolved", convertGo,
		[]edit{{"*c.RestartPolicy == corev1.ContainerRestartPolicyAlways {", "*c.RestartPolicy != corev1.ContainerRestartPolicyAlways {"}},
	},
	{
		"container-protocol-default", "a container port without protocol is not TCP's", convertGo,
		[]edit{{`case "", corev1.ProtocolTCP:`, `case corev1.ProtocolTCP:`}},
	},

	// Pods and their addresses.
	{
		"second-family-open", "of a dual stack pod one address is isolated", renderGo,
		[]edit{{"for _, ip := range e.IPs {\n\t\tm := map6", "for _, ip := range e.IPs[:min(1, len(e.IPs))] {\n\t\tm := map6"}},
	},
	{
		"second-address-dropped", "of status.podIPs the first one counts", convertGo,
		[]edit{{"for _, ip := range s.PodIPs {", "for _, ip := range s.PodIPs[:min(1, len(s.PodIPs))] {"}},
	},
	{
		"failed-pod-alive", "phase Failed is not terminal", convertGo,
		[]edit{{"p.Status.Phase == corev1.PodSucceeded || p.Status.Phase == corev1.PodFailed", "p.Status.Phase == corev1.PodSucceeded"}},
	},
	{
		"unknown-pod-open", "a pod that is attached and not known receives from everybody", renderGo,
		[]edit{{"r.dispatch(e, mapIngress4, mapIngress6, verdict)\n", ""}},
	},
	{
		"isolated-link-open", "an isolated pod on a routed veth receives on addresses that CNI did not report", linkGo,
		[]edit{{"if ingress {\n\t\tr.isolateLink(e)\n\t}\n", ""}},
	},
	{
		"closed-address-as-peer", "the address of a pod that is not known is a peer of whoever claims it", engineGo,
		[]edit{{"return list[len(list)-1].Pod\n", "if p := list[len(list)-1].Pod; p != nil {\n\t\t\treturn p\n\t\t}\n"}},
	},

	// Directions, the node, the pod itself.
	{
		"egress-accept-is-final", "what the sender's policies allow is not judged by the receiver's", baseGo,
		[]edit{{"allowed = ruleset.Verdict{Kind: ruleset.Return}", "allowed = ruleset.Verdict{Kind: ruleset.Accept}"}},
	},
	{
		"directions-swapped", "an ingress rule is compared with the destination", renderGo,
		[]edit{{"return r.product(rule, mergePorts(numbers), sources, accept)", "return r.product(rule, mergePorts(numbers), destinations, accept)"}},
	},
	{
		"own-node-open", "egress policies do not hold for the own node", baseGo,
		[]edit{{"if !r.in.Options.AllowOwnNode {", "if false {"}},
	},
	{
		"own-node-switch", "--own-node-egress=allow has no effect", baseGo,
		[]edit{{"if !r.in.Options.AllowOwnNode {", "if true {"}},
	},
	{
		"hairpin-denied", "a pod does not reach itself through its own Service", renderGo,
		[]edit{{"for _, ip := range e.IPs {\n\t\trules = append(rules, ruleset.NewRule(ruleset.Address(daddr(ip), ip), allowed))", "for _, ip := range e.IPs[:0] {\n\t\trules = append(rules, ruleset.NewRule(ruleset.Address(daddr(ip), ip), allowed))"}},
	},
	{
		"hairpin-any-interface", "who forges a pod's own address as the source is let in to it", renderGo,
		[]edit{{"ruleset.Cmp{Field: ruleset.IIFName, Value: iif}, ruleset.Address(saddr(ip), ip)", "ruleset.Address(saddr(ip), ip)"}},
	},
	{
		"pod-chain-open-end", "what no ingress policy accepts is accepted", renderGo,
		[]edit{{"r.chain(prefixIngress+e.ID, nil, rules, r.deny(tell))", "r.chain(prefixIngress+e.ID, nil, rules, tell)"}},
	},
	{
		"profile-open-end", "what no egress policy allows goes on", baseGo,
		[]edit{{"ruleset.NewRule(ruleset.Related, allowed)}, r.deny(tell))", "ruleset.NewRule(ruleset.Related, allowed)}, tell)"}},
	},
	{
		"profile-goes-nowhere", "the egress chain of a set of policies has no end", renderGo,
		[]edit{{"c.Rules = append(c.Rules, ruleset.NewRule(ruleset.To(ruleset.Goto, p.next)))\n", ""}},
	},
	{
		"new-chain-with-its-element", "a closed pod's new chain is committed together with the element that leads there", diffGo,
		[]edit{{"if rechains(from, to) {", "if false {"}},
	},
	{
		"jump-as-goto", "the chain of a policy does not come back to that of the next", renderGo,
		[]edit{{"ruleset.NewRule(ruleset.To(ruleset.Jump, chain))", "ruleset.NewRule(ruleset.To(ruleset.Goto, chain))"}},
	},
	{
		"forged-source", "a pod sends from addresses that are not its own", linkGo,
		[]edit{{"rules = append(rules, dropRule(notOwn(e, ruleset.IPSaddr)...), dropRule(stranger(e)...))", "rules = append(rules, dropRule(stranger(e)...))"}},
	},
	{
		"solicitation-from-afar", "neighbour discovery passes with any hop limit", baseGo,
		[]edit{{"Set: setND}, ruleset.Equal(ruleset.IP6HopLimit, 255), accept)", "Set: setND}, accept)"}},
	},

	// Rulesets and their differences.
	{
		"port-byte-order", "the ports of a set are in the order of the host", rulesetGo,
		[]edit{{"return Elem([]byte{proto, byte(port >> 8), byte(port)})", "return Elem([]byte{proto, byte(port), byte(port >> 8)})"}},
	},
	{
		"diff-keeps-elements", "elements that are gone stay in the kernel", diffGo,
		[]edit{{"remove = append(remove, Op{Kind: DelElements, Table: to.ID, Set: s, Elements: gone})", "_ = gone"}},
	},
	{
		"diff-misses-new-elements", "elements that are new do not come to a set that exists", diffGo,
		[]edit{{"add = append(add, Op{Kind: AddElements, Table: to.ID, Set: s, Elements: added})", "_ = added"}},
	},
	{
		"diff-misses-verdicts", "an element whose verdict changes keeps the old one", diffGo,
		[]edit{{"if w, ok := b[e]; ok && v == w {", "if _, ok := b[e]; ok {"}},
	},
	{
		"diff-adds-first", "a changed verdict is added before the old one is removed", diffGo,
		[]edit{{"return append(remove, add...)", "return append(add, remove...)"}},
	},
	{
		"diff-misses-rules", "the rules of a chain that exists are not changed", diffGo,
		[]edit{{"if !fresh && (old == c || sameRules(old, c)) {", "if !fresh {"}},
	},
	{
		"diff-does-not-flush", "the new rules of a chain come behind the old ones", diffGo,
		[]edit{{"if !fresh {\n\t\t\tops(FlushChain, &d.Apply)(Op{Chain: c})\n\t\t}\n", ""}},
	},
	{
		"diff-counts-rules", "chains with equally many rules are taken for equal", diffGo,
		[]edit{{"return x.text == y.text", "return true"}},
	},
	{
		"diff-sets-late", "the elements of an interval set are loaded together with its rules", diffGo,
		[]edit{{"if s.Interval {\n\t\t\t\tlist = &d.Prepare\n\t\t\t}\n", ""}, {"newTable = ops(AddTable, &d.Prepare)", "newTable = ops(AddTable, &d.Apply)"}},
	},
	{
		"diff-leaves-objects", "chains and sets that are gone stay in the kernel", diffGo,
		[]edit{{"d.Apply = slices.Concat(d.Apply, flush, del)", "_ = slices.Concat(flush, del)"}},
	},
	{
		"rule-text-without-end", "rules that differ in the end of a range are taken for equal", exprGo,
		[]edit{{`valueText(r.Field, r.From) + "-" + valueText(r.Field, r.To)`, `valueText(r.Field, r.From)`}},
	},

	// The engine, which changes a ruleset event by event.
	{
		"index-first-value", "of the values that a selector lists a pod is found by the first", indexGo,
		[]edit{{"for _, v := range values {\n\t\t\tb.values", "for _, v := range values[:1] {\n\t\t\tb.values"}},
	},
	{
		"index-not-in", "a selector that asks what a pod is not is filed under what it is not", indexGo,
		[]edit{{"case selection.Equals, selection.DoubleEquals, selection.In:", "case selection.Equals, selection.DoubleEquals, selection.In, selection.NotIn:"}},
	},
	{
		"index-not-there", "a selector that asks for the absence of a label is filed under that label", indexGo,
		[]edit{{"case selection.Exists, selection.GreaterThan", "case selection.Exists, selection.DoesNotExist, selection.GreaterThan"}},
	},
	{
		"index-no-labels", "a pod without labels is found by no selector", indexGo,
		[]edit{{"for _, s := range b.rest {\n\t\tf(s)\n\t}\n\tif len(b.values)", "if len(have) > 0 {\n\t\tfor _, s := range b.rest {\n\t\t\tf(s)\n\t\t}\n\t}\n\tif len(b.values)"}},
	},
	{
		"index-own-namespace-only", "an event of a pod is not looked up among the selectors of namespaces", indexGo,
		[]edit{{"x.pods.each(pod, either)\n", ""}},
	},
	{
		"event-namespace", "a namespace that is relabelled keeps its place in peer sets", engineGo,
		[]edit{{"if was != is {", "if was != is && is {"}},
	},
	{
		"event-relabelled-peer", "a pod that loses a label stays a peer", engineGo,
		[]edit{{"for _, s := range selecting(old) {", "for _, s := range selecting(nil) {"}},
	},
	{
		"event-next-owner", "an address that goes over to another pod takes nothing along, and its new owner has nothing", engineGo,
		[]edit{{"for _, s := range selecting(now) {", "for _, s := range selecting(map[bool]*cluster.Pod{true: now}[old == nil]) {"}},
	},
	{
		"event-endpoint-address", "an endpoint's addresses are not looked at when it changes", engineGo,
		[]edit{{"for _, ip := range ep.IPs {\n\t\te.touch(ip)\n\t\te.local[ip] = append(e.local[ip], ep)", "for _, ip := range ep.IPs {\n\t\te.local[ip] = append(e.local[ip], ep)"}},
	},
	{
		"event-policy-new-subject", "a policy that changes reaches the pods that it selected before", engineGo,
		[]edit{{"if (was || is) && (was != is || !e.swap(ep, old, now, chains)) {", "if was && (was != is || !e.swap(ep, old, now, chains)) {"}},
	},
	{
		"event-policy-old-subject", "a policy that changes reaches the pods that it selects now", engineGo,
		[]edit{{"if (was || is) && (was != is || !e.swap(ep, old, now, chains)) {", "if is && (was != is || !e.swap(ep, old, now, chains)) {"}},
	},
	{
		"event-policy-directions", "a policy that changes its directions keeps the chains of its pods as they are", engineGo,
		[]edit{{"if (old.ingress == nil) != (now.ingress == nil) || (old.egress == nil) != (now.egress == nil) {\n\t\treturn false\n\t}\n", "if false {\n\t\treturn false\n\t}\n\tif now.ingress == nil || now.egress == nil {\n\t\treturn true\n\t}\n"}},
	},
	{
		"shared-set-given-up", "a set goes with the first chain that needs it no more", engineGo,
		[]edit{{"if delete(s.users, f); len(s.users) > 0 {\n\t\t\tcontinue\n\t\t}\n\t\ts.gone = true", "delete(s.users, f)\n\t\ts.gone = true"}},
	},
	{
		"failed-commit-forgotten", "what a failed commit should have removed stays", liveGo,
		[]edit{{"delete(s.add, e)\n\t\tdelete(s.del, e)\n\t\treturn", "delete(s.del, e)\n\t\treturn"}},
	},
	{
		"tightened-by-sets", "a peer that goes tightens nobody", engineGo,
		[]edit{{"concerns(&now, s.users, \"\")", "concerns(&now, nil, \"\")"}},
	},
	{
		"groups-open", "an isolated pod sends to multicast groups", baseGo,
		[]edit{{"dropRule(from4, ruleset.Prefix{", "ruleset.NewRule(from4, accept, ruleset.Prefix{"}},
	},
	{
		"tightened-late", "the connections of a peer that is no friend any more are looked at late", engineGo,
		[]edit{{"if !ok || here || local == nil && e.claimed[ip] != nil {", "if !ok || here && local == nil {"}},
	},
}
