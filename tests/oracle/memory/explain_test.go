package memory

import (
	"testing"

	"pgregory.net/rapid"

	"github.com/podwall/podwall/pkg/policy"
	"github.com/podwall/podwall/tests/oracle/generate"
	"github.com/podwall/podwall/tests/oracle/subject"
)

// TestExplain compares what `podwalld explain` would say of the oracle's connections with the oracle, which knows the policies of one node:
// pods of others are subject to none here.
func TestExplain(t *testing.T) {
	allowed, all := 0, 0
	rapid.Check(t, func(t *rapid.T) {
		if all >= *verdicts {
			return
		}
		c := generate.Cluster(t)
		in := subject.Input(c, subject.Model(c))
		x := policy.NewExplainer(in)
		managed := func(p policy.Party) policy.Party {
			for i := range in.Endpoints {
				if in.Endpoints[i].Pod == p.Subject {
					return p
				}
			}
			p.Subject = nil
			return p
		}
		for _, conn := range generate.Conns(c) {
			packet := subject.Packet(conn)
			f := policy.Flow{
				From: managed(x.At(conn.Src)), To: managed(x.At(conn.Dst)), FromNode: conn.FromNode, ToNode: conn.ToNode,
				Proto: packet.Proto, Port: packet.Dport,
			}
			want := c.Allowed(conn)
			if got := x.Explain(f); got.Allowed != want {
				t.Fatalf("%+v\noracle: allowed=%v, explained: %+v\n%s", conn, want, got, generate.Text(c))
			}
			if got := x.Ports(f); packet.Dport != 0 && got.Has(packet.Proto, packet.Dport) != want {
				t.Fatalf("%+v\noracle: allowed=%v, ports: %s\n%s", conn, want, got, generate.Text(c))
			}
			all++
			if want {
				allowed++
			}
		}
	})
	t.Logf("%d verdicts, %d allowed", all, allowed)
	if all < 1000 || allowed < all/4 || allowed > all*3/4 {
		t.Errorf("%d verdicts, %d allowed: the cases are too few or too much alike", all, allowed)
	}
}
