package nft

import (
	"context"
	"errors"
	"fmt"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/podwall/podwall/pkg/ruleset"
)

// TestRefusedObject holds that the object of a refused operation is read back from what Op.Name wrote.
func TestRefusedObject(t *testing.T) {
	t.Parallel()
	table := ruleset.TableID{Family: ruleset.Netdev, Name: "podwall"}
	set, chain := &ruleset.Set{Name: "p4_x"}, &ruleset.Chain{Name: "in_x"}
	for _, tt := range []struct {
		op   ruleset.Op
		want Refused
	}{
		{ruleset.Op{Kind: ruleset.AddSet, Table: table, Set: set}, Refused{"add", "set", table, "p4_x"}},
		{ruleset.Op{Kind: ruleset.AddElements, Table: table, Set: set}, Refused{"add", "element", table, "p4_x"}},
		{ruleset.Op{Kind: ruleset.FlushChain, Table: table, Chain: chain}, Refused{"flush", "chain", table, "in_x"}},
		{ruleset.Op{Kind: ruleset.DelChain, Table: table, Chain: chain}, Refused{"delete", "chain", table, "in_x"}},
		{ruleset.Op{Kind: ruleset.AddTable, Table: table}, Refused{}},
	} {
		if diff := cmp.Diff(tt.want, (&CommitError{Op: tt.op.Name()}).Refused()); diff != "" {
			t.Errorf("%s (-want +got):\n%s", tt.op.Name(), diff)
		}
	}
	rule := ruleset.NewRule(ruleset.Verdict{Kind: ruleset.Drop})
	got := (&CommitError{Op: ruleText(ruleset.Op{Kind: ruleset.AddRules, Table: table, Chain: chain}, rule)}).Refused()
	if diff := cmp.Diff(Refused{"add", "rule", table, "in_x"}, got); diff != "" {
		t.Errorf("a rule (-want +got):\n%s", diff)
	}
	if got := (&CommitError{}).Refused(); got != (Refused{}) {
		t.Errorf("nothing named: %+v", got)
	}
}

// TestIsRefusal tells what lies in an object from what lies in the moment.
func TestIsRefusal(t *testing.T) {
	t.Parallel()
	for err, want := range map[error]bool{
		unix.EINVAL: true, unix.EEXIST: true, unix.EBUSY: true, unix.ENFILE: true, unix.E2BIG: true, unix.ENOENT: true,
		unix.EPERM: false, unix.ENOBUFS: false, unix.ENOMEM: false, unix.ERESTART: false, context.Canceled: false,
	} {
		if got := IsRefusal(fmt.Errorf("commit: %w", &CommitError{Stage: Apply, Err: err})); got != want {
			t.Errorf("%v: %v", err, got)
		}
	}
	if IsRefusal(errors.New("cannot read")) {
		t.Error("an error of no commit is a refusal")
	}
}

// TestFakeRefuses holds that a transaction with a refused operation changes nothing and names it, unless it is to be silent.
func TestFakeRefuses(t *testing.T) {
	t.Parallel()
	table := ruleset.TableID{Family: ruleset.Inet, Name: "podwall"}
	d := ruleset.Delta{Apply: []ruleset.Op{{Kind: ruleset.AddTable, Table: table}, {Kind: ruleset.AddChain, Table: table, Chain: &ruleset.Chain{Name: "in_x"}}}}
	f := NewFake()
	for _, silent := range []bool{false, true} {
		f.Refuse(func(op ruleset.Op) error {
			if op.Kind == ruleset.AddChain {
				return unix.E2BIG
			}
			return nil
		}, silent)
		var refused *CommitError
		if err := f.Commit(t.Context(), d); !errors.As(err, &refused) || !errors.Is(err, unix.E2BIG) || (refused.Op == "") != silent || len(f.Ruleset()) > 0 {
			t.Errorf("silent %v: %v, %d tables", silent, err, len(f.Ruleset()))
		}
	}
	f.Refuse(nil, false)
	if err := f.Commit(t.Context(), d); err != nil || len(f.Ruleset()) != 1 {
		t.Errorf("lifted: %v", err)
	}
}
