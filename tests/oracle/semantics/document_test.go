package semantics

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	kjson "sigs.k8s.io/json"
	"sigs.k8s.io/yaml"

	"github.com/podwall/podwall/tests/oracle"
	"github.com/podwall/podwall/tests/oracle/layout"
)

const (
	castHeading   = "The cast"
	claimsHeading = "Claims you may have read"
	otherNode     = "there"
)

// document is the page: who plays, and what is shown with them.
type document struct {
	cast     *cast
	sections []*section
	examples []*example
}

// section is a heading with the text up to the next one.
type section struct {
	line    int
	title   string
	level   int
	under   string // title of the section of level 2 around it
	text    string // without its fenced blocks
	claims  int    // lines of its examples that put a claim right
	example bool
}

// example is a yaml block with the text block below it.
type example struct {
	line         int
	policies     []*networkingv1.NetworkPolicy
	pods         []*corev1.Pod
	lines        []line
	reported     []string // what podwall says about objects that it cannot use as written
	allowOwnNode bool
}

// line is one row of a text block: connections with one verdict.
type line struct {
	number   int
	text     string
	from, to string
	what     []probe
	family   string // "IPv4", "IPv6", or empty: each family that both ends have
	allowed  bool
	always   bool // whatever policies say
}

type probe struct {
	protocol oracle.Protocol
	port     uint16
}

// cast is the yaml block at the top of the page.
type cast struct {
	Namespaces map[string]map[string]string `json:"namespaces"`
	Pods       map[string]actor             `json:"pods"`
	Elsewhere  map[string]actor             `json:"elsewhere"`
	Addresses  map[string][]netip.Addr      `json:"addresses"`
}

type actor struct {
	Labels map[string]string `json:"labels"`
	Ports  map[string]int32  `json:"ports"`
	IPs    []netip.Addr      `json:"ips"`
}

type block struct {
	line       int
	lang, text string
	section    *section
}

// parse reads the page. Everything that it does not understand is an error: an example that is passed over proves nothing.
func parse(page string) (*document, error) {
	d := &document{}
	blocks, err := d.split(page)
	if err != nil {
		return nil, err
	}
	var errs []error
	var current *example
	var in *section
	finish := func() {
		if current != nil && len(current.lines) == 0 {
			errs = append(errs, fmt.Errorf("line %d: the example has no verdicts; put a text block below it", current.line))
		}
		current = nil
	}
	for _, b := range blocks {
		if b.section != in {
			finish()
			in = b.section
		}
		switch {
		case b.lang == "yaml" && in.title == castHeading:
			if d.cast != nil {
				errs = append(errs, fmt.Errorf("line %d: the cast is there already", b.line))
			}
			d.cast = &cast{}
			err = decode([]byte(b.text), d.cast)
		case b.lang == "yaml":
			finish()
			current, err = parseObjects(b)
			if current != nil {
				in.example = true
				d.examples = append(d.examples, current)
			}
		case b.lang == "text" && current == nil:
			err = errors.New("verdicts without an example; put its yaml block above them")
		case b.lang == "text" && len(current.lines) > 0:
			err = errors.New("the example has its verdicts already")
		case b.lang == "text":
			err = current.parseVerdicts(b)
		default:
			err = fmt.Errorf("a block of %q; the page has yaml (examples) and text (verdicts)", b.lang)
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("line %d: %w", b.line, err))
		}
	}
	finish()
	if d.cast == nil {
		errs = append(errs, fmt.Errorf("no yaml block below the heading %q", castHeading))
	}
	return d, errors.Join(errs...)
}

// split finds headings and fenced blocks.
func (d *document) split(page string) ([]block, error) {
	var blocks []block
	var open *block
	now := &section{}
	chapter := ""
	number := 0
	for text := range strings.Lines(page) {
		number++
		fence, isFence := strings.CutPrefix(strings.TrimSpace(text), "```")
		switch {
		case open != nil && isFence:
			blocks = append(blocks, *open)
			open = nil
		case open != nil:
			open.text += text
		case isFence:
			open = &block{line: number + 1, lang: fence, section: now}
		case strings.HasPrefix(text, "#"):
			title := strings.TrimLeft(text, "#")
			now = &section{line: number, level: len(text) - len(title), title: strings.TrimSpace(title)}
			if now.level <= 2 {
				chapter = now.title
			}
			now.under = chapter
			d.sections = append(d.sections, now)
		default:
			now.text += text
		}
	}
	if open != nil {
		return nil, fmt.Errorf("line %d: the block has no end", open.line)
	}
	return blocks, nil
}

// parseObjects reads an example's objects. The page leaves out apiVersion, and kind where it is NetworkPolicy.
func parseObjects(b block) (*example, error) {
	e := &example{line: b.line}
	for document := range bytes.SplitSeq([]byte(b.text), []byte("---\n")) {
		var meta metav1.TypeMeta
		if err := yaml.Unmarshal(document, &meta); err != nil {
			return nil, err
		}
		switch meta.Kind {
		case "", "NetworkPolicy":
			p := &networkingv1.NetworkPolicy{}
			if err := decode(document, p); err != nil {
				return nil, err
			}
			if p.Namespace == "" || p.Name == "" {
				return nil, errors.New("a policy without name or namespace; give it both")
			}
			e.policies = append(e.policies, p)
		case "Pod":
			p := &corev1.Pod{}
			if err := decode(document, p); err != nil {
				return nil, err
			}
			e.pods = append(e.pods, p)
		default:
			return nil, fmt.Errorf("kind %s; an example has policies and pods", meta.Kind)
		}
	}
	if len(e.policies) == 0 {
		return nil, errors.New("the example has no policy")
	}
	return e, nil
}

// decode is as strict as the API server can be asked to be, which tells upper from lower case.
func decode(text []byte, into any) error {
	raw, err := yaml.YAMLToJSONStrict(text)
	if err != nil {
		return err
	}
	strict, err := kjson.UnmarshalStrict(raw, into)
	return errors.Join(append(strict, err)...)
}

func (e *example) parseVerdicts(b block) error {
	number := b.line - 1
	for text := range strings.Lines(b.text) {
		number++
		text = strings.TrimSpace(text)
		if problem, ok := strings.CutPrefix(text, "reported: "); ok {
			e.reported = append(e.reported, problem)
			continue
		}
		if command, ok := strings.CutPrefix(text, "podwalld run "); ok {
			if command != "--own-node-egress=allow" {
				return fmt.Errorf("podwalld run %s: the only flag that an example can show is --own-node-egress=allow", command)
			}
			e.allowOwnNode = true
			continue
		}
		l, claim, err := parseLine(text)
		if err != nil {
			return fmt.Errorf("line %d: %q: %w", number, text, err)
		}
		l.number = number
		e.lines = append(e.lines, l)
		if claim {
			b.section.claims++
		}
	}
	return nil
}

var verdicts = map[string]bool{"allowed": true, "denied": false}

// parseLine reads "FROM -> TO :PORT[/udp|/sctp]... [over IPv4|over IPv6] [always] allowed|denied[, not denied|allowed] [# why]";
// ping stands for an ICMP echo request. It also tells whether the line puts a claim right.
func parseLine(text string) (line, bool, error) {
	l := line{text: text}
	text, _, _ = strings.Cut(text, "#")
	words := strings.Fields(text)
	next := func() string {
		if len(words) == 0 {
			return ""
		}
		word := words[0]
		words = words[1:]
		return word
	}
	l.from = next()
	if next() != "->" {
		return line{}, false, errors.New("want FROM -> TO")
	}
	l.to = next()
	word := next()
	for ; word == "ping" || strings.HasPrefix(word, ":"); word = next() {
		p, err := parseProbe(word)
		if err != nil {
			return line{}, false, err
		}
		l.what = append(l.what, p)
	}
	if len(l.what) == 0 {
		return line{}, false, errors.New("want a port such as :80 or :53/udp, or ping, after the receiver")
	}
	if word == "over" {
		if l.family = next(); l.family != "IPv4" && l.family != "IPv6" {
			return line{}, false, errors.New("want over IPv4 or over IPv6")
		}
		word = next()
	}
	if word == "always" {
		l.always = true
		word = next()
	}
	word, more := strings.CutSuffix(word, ",")
	allowed, ok := verdicts[word]
	if !ok || l.always && !allowed {
		return line{}, false, errors.New("want the verdict: allowed, denied or always allowed")
	}
	l.allowed = allowed
	if more {
		if claimed, ok := verdicts[strings.TrimSpace(strings.TrimPrefix(strings.Join(words, " "), "not "))]; !ok || words[0] != "not" || claimed == allowed {
			return line{}, false, errors.New("want what was claimed after the comma: not and the opposite verdict")
		}
		words = nil
	}
	if len(words) > 0 {
		return line{}, false, fmt.Errorf("%q after the verdict", strings.Join(words, " "))
	}
	return l, more, nil
}

func parseProbe(word string) (probe, error) {
	if word == "ping" {
		return probe{protocol: oracle.ICMP}, nil
	}
	number, name, named := strings.Cut(word[1:], "/")
	protocol := oracle.TCP
	if named {
		protocol = oracle.Protocol(strings.ToUpper(name))
		if protocol != oracle.UDP && protocol != oracle.SCTP {
			return probe{}, fmt.Errorf("protocol %q; want /udp, /sctp, or none for TCP", name)
		}
	}
	port, err := strconv.ParseUint(number, 10, 16)
	if err != nil {
		return probe{}, err
	}
	return probe{protocol, uint16(port)}, nil
}

// base is the cluster of the cast, without policies.
func (c *cast) base() (*oracle.Cluster, error) {
	base := &oracle.Cluster{Node: layout.NodeName}
	for _, name := range slices.Sorted(maps.Keys(c.Namespaces)) {
		base.Namespaces = append(base.Namespaces, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: c.Namespaces[name]}})
	}
	for node, actors := range map[string]map[string]actor{layout.NodeName: c.Pods, otherNode: c.Elsewhere} {
		for _, name := range slices.Sorted(maps.Keys(actors)) {
			if err := add(base, actors[name].pod(name, node)); err != nil {
				return nil, fmt.Errorf("pod %s: %w", name, err)
			}
		}
	}
	if !slices.Equal(c.Addresses["node"], layout.Node[:2]) {
		return nil, fmt.Errorf("node has %v, the layout gives it %v", c.Addresses["node"], layout.Node[:2])
	}
	for name, ips := range c.Addresses {
		for _, ip := range ips {
			if name != "node" && !slices.Contains(layout.Outside, ip) {
				return nil, fmt.Errorf("%s has %s, which is no outside address of the layout: %v", name, ip, layout.Outside)
			}
		}
	}
	return base, nil
}

func (a actor) pod(name, node string) *corev1.Pod {
	p := &corev1.Pod{Spec: corev1.PodSpec{NodeName: node}}
	p.Namespace, p.Name, _ = strings.Cut(name, "/")
	p.Labels = a.Labels
	for _, ip := range a.IPs {
		p.Status.PodIPs = append(p.Status.PodIPs, corev1.PodIP{IP: ip.String()})
	}
	var container corev1.Container
	for _, port := range slices.Sorted(maps.Keys(a.Ports)) {
		container.Ports = append(container.Ports, corev1.ContainerPort{Name: port, ContainerPort: a.Ports[port]})
	}
	p.Spec.Containers = []corev1.Container{container}
	return p
}

// add puts a pod into a cluster. One of this node gets a sandbox, at a free place unless it says where it is.
func add(c *oracle.Cluster, p *corev1.Pod) error {
	p = p.DeepCopy()
	p.Spec.NodeName = cmp.Or(p.Spec.NodeName, c.Node)
	c.Pods = append(c.Pods, p)
	if p.Spec.NodeName != c.Node || p.Spec.HostNetwork {
		if len(p.Status.PodIPs) == 0 {
			return errors.New("is not a pod of this node's network and has no status.podIPs")
		}
		return nil
	}
	free := slices.IndexFunc(layout.Places, func(place layout.Place) bool {
		if len(p.Status.PodIPs) > 0 {
			return place.IPs[0].String() == p.Status.PodIPs[0].IP
		}
		return !slices.ContainsFunc(c.Sandboxes, func(s oracle.Sandbox) bool { return slices.Equal(s.IPs, place.IPs) })
	})
	if free < 0 {
		return errors.New("has no place on the node")
	}
	ips := layout.Places[free].IPs
	p.Status.PodIPs = []corev1.PodIP{{IP: ips[0].String()}, {IP: ips[1].String()}}
	c.Sandboxes = append(c.Sandboxes, oracle.Sandbox{Namespace: p.Namespace, Name: p.Name, IPs: ips})
	return nil
}

// party is what a name in a verdict stands for.
type party struct {
	ips  []netip.Addr
	node bool // this node itself
	here bool // judged by this node
}

func (c *cast) party(cluster *oracle.Cluster, name string) (party, error) {
	if ip, err := netip.ParseAddr(name); err == nil {
		return party{ips: []netip.Addr{ip}}, nil
	}
	if name == "node" {
		return party{ips: layout.Node, node: true, here: true}, nil
	}
	if ips, ok := c.Addresses[name]; ok {
		return party{ips: ips}, nil
	}
	for _, p := range cluster.Pods {
		if p.Namespace+"/"+p.Name != name {
			continue
		}
		here := p.Spec.NodeName == cluster.Node
		if here && p.Spec.HostNetwork {
			return party{ips: layout.Node, node: true, here: true}, nil
		}
		found := party{here: here}
		for _, ip := range p.Status.PodIPs {
			parsed, err := netip.ParseAddr(ip.IP)
			if err != nil {
				return party{}, fmt.Errorf("pod %s: %w", name, err)
			}
			found.ips = append(found.ips, parsed)
		}
		return found, nil
	}
	return party{}, fmt.Errorf("nobody is called %q; name a pod of the cast or of the example, an address of the cast, or an IP", name)
}

// conns are the connections that a line speaks of.
func (c *cast) conns(cluster *oracle.Cluster, l line) ([]oracle.Conn, error) {
	from, err := c.party(cluster, l.from)
	if err != nil {
		return nil, err
	}
	to, err := c.party(cluster, l.to)
	if err != nil {
		return nil, err
	}
	if !from.here && !to.here || from.node && !to.here || from.node && to.node {
		return nil, errors.New("this node does not judge it; one end must be a pod of this node")
	}
	var list []oracle.Conn
	for _, src := range from.ips {
		for _, dst := range to.ips {
			if src.Is4() != dst.Is4() || l.family == "IPv4" && src.Is6() || l.family == "IPv6" && src.Is4() {
				continue
			}
			for _, p := range l.what {
				list = append(list, oracle.Conn{Src: src, Dst: dst, FromNode: from.node, ToNode: to.node, Protocol: p.protocol, Port: p.port})
			}
		}
	}
	if len(list) == 0 {
		return nil, errors.New("the two have no address family in common")
	}
	return list, nil
}
