package policy

import (
	"testing"

	"pgregory.net/rapid"

	"github.com/podwall/podwall/pkg/cluster"
)

// TestParseCIDR holds that a CIDR is read as the API server reads it.
func TestParseCIDR(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct{ in, want string }{
		{"10.0.0.0/8", "10.0.0.0/8"},
		{"10.0.0.77/24", "10.0.0.0/24"},
		{"010.0.0.0/08", "10.0.0.0/8"},
		{"0.0.0.0/0", "0.0.0.0/0"},
		{"1.2.3.4/32", "1.2.3.4/32"},
		{"FD00:0::/64", "fd00::/64"},
		{"fd00::1:2/96", "fd00::/96"},
		{"fd00::1:2/120", "fd00::1:0/120"},
		{"::/0", "::/0"},
		{"::1/128", "::1/128"},
		{"::ffff:10.0.0.0/104", "10.0.0.0/8"},
		{"::ffff:10.1.2.3/128", "10.1.2.3/32"},
		{"::ffff:0.0.0.0/96", "0.0.0.0/0"},
		{"::ffff:0.0.0.0/95", "::fffe:0:0/95"}, // more than the mapped addresses
		{"10.0.0.0", ""},
		{"10.0.0.0/33", ""},
		{"10.0.0.0/-1", ""},
		{"", ""},
	} {
		got, err := parseCIDR(tt.in)
		switch {
		case tt.want == "" && err == nil:
			t.Errorf("%q is %s, want an error", tt.in, got)
		case tt.want != "" && (err != nil || got.String() != tt.want):
			t.Errorf("%q is %s (%v), want %s", tt.in, got, err, tt.want)
		}
	}
}

// TestMergePorts holds that merging changes no port's fate and leaves nothing to merge.
func TestMergePorts(t *testing.T) {
	t.Parallel()
	protocols := []cluster.Protocol{cluster.TCP, cluster.UDP, cluster.SCTP}
	number := rapid.OneOf(rapid.Uint16Range(1, 12), rapid.Uint16Range(65530, 65535))
	one := rapid.Custom(func(rt *rapid.T) portRange {
		p := portRange{proto: rapid.SampledFrom(protocols).Draw(rt, "protocol")}
		if p.every = rapid.IntRange(0, 9).Draw(rt, "every") == 9; !p.every {
			a, b := number.Draw(rt, "a"), number.Draw(rt, "b")
			p.from, p.to = min(a, b), max(a, b)
		}
		return p
	})
	matches := func(list []portRange, proto cluster.Protocol, n uint16) bool {
		for _, p := range list {
			if p.proto == proto && (p.every || p.from <= n && n <= p.to) {
				return true
			}
		}
		return false
	}
	rapid.Check(t, func(rt *rapid.T) {
		ports := rapid.SliceOfN(one, 0, 12).Draw(rt, "ports")
		merged := mergePorts(append([]portRange(nil), ports...))
		for _, proto := range protocols {
			for _, n := range []uint16{1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 1000, 65529, 65530, 65531, 65532, 65533, 65534, 65535} {
				if want, got := matches(ports, proto, n), matches(merged, proto, n); got != want {
					rt.Fatalf("%s %d: %v after merging, %v before; merged %v", protoName(proto), n, got, want, merged)
				}
			}
		}
		for i := range merged {
			if i == 0 || merged[i-1].proto != merged[i].proto {
				continue
			}
			if a, b := merged[i-1], merged[i]; a.every || b.every || int(b.from) <= int(a.to)+1 {
				rt.Fatalf("%v and %v are not merged", a, b)
			}
		}
		for i := range merged {
			for j := range i {
				if merged[j].proto > merged[i].proto {
					rt.Fatalf("not sorted: %v", merged)
				}
			}
		}
	})
}
