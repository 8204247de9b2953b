package ruleset

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"strings"
)

// String prints all tables in nft's syntax, in an order that depends on nothing but their content. `nft -f` loads it.
func (r Ruleset) String() string {
	var b strings.Builder
	for i, t := range r {
		if i > 0 {
			b.WriteByte('\n')
		}
		b.WriteString(t.String())
	}
	return b.String()
}

// String prints the table in nft's syntax: maps and sets, base chains, then the other chains, each sorted by name.
func (t *Table) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "table %s %s {\n", t.ID.Family, t.ID.Name)
	sep := ""
	for _, name := range slices.Sorted(maps.Keys(t.Sets)) {
		b.WriteString(sep)
		t.Sets[name].write(&b)
		sep = "\n"
	}
	names := slices.SortedFunc(maps.Keys(t.Chains), func(a, b string) int {
		if ab, bb := t.Chains[a].Hook != nil, t.Chains[b].Hook != nil; ab != bb {
			if ab {
				return -1
			}
			return 1
		}
		return strings.Compare(a, b)
	})
	for _, name := range names {
		b.WriteString(sep)
		t.Chains[name].write(&b)
		sep = "\n"
	}
	b.WriteString("}\n")
	return b.String()
}

func (s *Set) write(b *strings.Builder) {
	kind, suffix := "set", ""
	if s.Map {
		kind, suffix = "map", " : verdict"
	}
	types := make([]string, len(s.Key))
	for i, k := range s.Key {
		types[i] = string(k)
	}
	fmt.Fprintf(b, "\t%s %s {\n\t\ttype %s%s\n", kind, s.Name, strings.Join(types, " . "), suffix)
	if s.Interval {
		b.WriteString("\t\tflags interval\n")
	}
	if s.Timeout > 0 {
		flags := "timeout"
		if s.Dynamic {
			flags = "dynamic,timeout"
		}
		fmt.Fprintf(b, "\t\tsize %d\n\t\tflags %s\n\t\ttimeout %s\n", s.Size, flags, s.Timeout)
	}
	if s.Comment != "" {
		fmt.Fprintf(b, "\t\tcomment %q\n", s.Comment)
	}
	if len(s.Elements) > 0 {
		b.WriteString("\t\telements = {\n")
		for _, e := range slices.Sorted(maps.Keys(s.Elements)) {
			fmt.Fprintf(b, "\t\t\t%s", s.elemText(e))
			if s.Map {
				fmt.Fprintf(b, " : %s", s.Elements[e])
			}
			b.WriteString(",\n")
		}
		b.WriteString("\t\t}\n")
	}
	b.WriteString("\t}\n")
}

func (s *Set) elemText(e Elem) string {
	if s.Interval {
		half := len(e) / 2
		return s.keyText(e[:half]) + "-" + s.keyText(e[half:])
	}
	return s.keyText(e)
}

func (s *Set) keyText(e Elem) string {
	parts := make([]string, 0, len(s.Key))
	for _, k := range s.Key {
		v := e[:k.Len()]
		e = e[k.Len():]
		switch k {
		case IPv4Addr, IPv6Addr:
			ip, _ := netip.AddrFromSlice([]byte(v))
			parts = append(parts, ip.String())
		case IfName:
			parts = append(parts, strconv.Quote(strings.TrimRight(string(v), "\x00")))
		case InetService:
			parts = append(parts, strconv.Itoa(int(v[0])<<8|int(v[1])))
		case InetProto:
			parts = append(parts, protoName(v[0]))
		default:
			parts = append(parts, strconv.Itoa(int(v[0])))
		}
	}
	return strings.Join(parts, " . ")
}

func (c *Chain) write(b *strings.Builder) {
	fmt.Fprintf(b, "\tchain %s {\n", c.Name)
	if h := c.Hook; h != nil {
		device := ""
		if h.Device != "" {
			device = fmt.Sprintf(" device %q", h.Device)
		}
		fmt.Fprintf(b, "\t\ttype filter hook %s%s priority %d; policy accept;\n", h.Name, device, h.Priority)
	}
	for _, r := range c.Rules {
		fmt.Fprintf(b, "\t\t%s\n", r)
	}
	b.WriteString("\t}\n")
}
