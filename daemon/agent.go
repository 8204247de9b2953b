package main

import (
	"context"
	"errors"
	"net/url"

	"github.com/podwall/podwall/pkg/agentapi"
	"github.com/podwall/podwall/pkg/attach"
	"github.com/podwall/podwall/pkg/reconcile"
	"github.com/podwall/podwall/pkg/ruleset"
)

// agent gives the loop's errors their CNI codes.
type agent struct{ loop *reconcile.Loop }

var _ agentapi.Agent = agent{}

func coded(err error, notReady uint) error {
	if err == nil {
		return nil
	}
	code := agentapi.CodeInternal
	for _, c := range []struct {
		err  error
		code uint
	}{
		{reconcile.ErrIdentity, agentapi.CodeInvalidEnvironment},
		{reconcile.ErrNoHostLink, agentapi.CodeNoHostLink},
		{reconcile.ErrNotReady, notReady},
		{reconcile.ErrUnknown, agentapi.CodeRefused},
		{reconcile.ErrRefused, agentapi.CodeRefused},
	} {
		if errors.Is(err, c.err) {
			code = c.code
			break
		}
	}
	return agentapi.Errorf(code, "%v", err)
}

// Attach implements agentapi.Agent.
func (a agent) Attach(ctx context.Context, att attach.Attachment) error {
	return coded(a.loop.Attach(ctx, att), agentapi.CodeTryAgainLater)
}

// Detach implements agentapi.Agent.
func (a agent) Detach(ctx context.Context, key attach.Key) error {
	return coded(a.loop.Detach(ctx, key), agentapi.CodeTryAgainLater)
}

// Check implements agentapi.Agent.
func (a agent) Check(ctx context.Context, key attach.Key) (attach.Attachment, error) {
	att, err := a.loop.Check(ctx, key)
	return att, coded(err, agentapi.CodeTryAgainLater)
}

// GC implements agentapi.Agent.
func (a agent) GC(ctx context.Context, network string, valid []attach.Key) error {
	return coded(a.loop.GC(ctx, network, valid), agentapi.CodeTryAgainLater)
}

// Status implements agentapi.Agent.
func (a agent) Status(ctx context.Context) error {
	return coded(a.loop.Status(ctx), agentapi.CodeNotAvailable)
}

// rulesetView is the answer to `podwalld ruleset`.
type rulesetView struct {
	Ruleset string   `json:"ruleset,omitempty"`
	Diff    []string `json:"diff,omitempty"` // what would make the kernel right again
}

// views are the operator's questions. faults are what is wrong with the source, beside the objects that it read.
func views(loop *reconcile.Loop, faults func() []string) map[string]agentapi.View {
	return map[string]agentapi.View{
		"node": func(context.Context, url.Values) (any, error) {
			s := loop.NodeStatus()
			s.Problems = append(faults(), s.Problems...)
			return s, nil
		},
		"pods":     func(context.Context, url.Values) (any, error) { return loop.Pods(), nil },
		"policies": func(context.Context, url.Values) (any, error) { return loop.Policies(), nil },
		"ruleset": func(ctx context.Context, q url.Values) (any, error) {
			if q.Get("of") == "" {
				return rulesetView{Ruleset: loop.Ruleset().String()}, nil
			}
			kernel, err := loop.KernelRuleset(ctx)
			if err != nil {
				return nil, err
			}
			if q.Get("of") == "kernel" {
				return rulesetView{Ruleset: kernel.String()}, nil
			}
			return rulesetView{Diff: deltaText(ruleset.Diff(kernel, loop.Ruleset()))}, nil
		},
	}
}

func deltaText(d ruleset.Delta) []string {
	var lines []string
	for _, ops := range [][]ruleset.Op{d.Prepare, d.Apply, d.Cleanup} {
		for _, op := range ops {
			lines = append(lines, op.String())
		}
	}
	return lines
}
