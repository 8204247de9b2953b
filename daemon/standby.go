package main

import (
	"context"
	"errors"
	"log/slog"
	"time"

	"github.com/podwall/podwall/pkg/agentapi"
	"github.com/podwall/podwall/pkg/nft"
	"github.com/podwall/podwall/pkg/ruleset"
)

const (
	// askOwner is how often a standby asks the writer for the owner of the tables until it has it.
	askOwner = time.Second

	// ownerGrace is how long a standby holds the owner when the writer has gone: it has become the writer by then, or another one
	// has, which cannot work before this one lets go.
	ownerGrace = 250 * time.Millisecond

	// ownRetry and ownPatience are for the moment in which a process that was killed still closes its files, one by one.
	ownRetry    = time.Millisecond
	ownPatience = time.Second
)

// holdOwner keeps the netlink socket that owns the writer's tables open, so that nobody else can change them in the moment in
// which there is no writer, also when that one is killed. What it returns lets go of it.
func holdOwner(ctx context.Context, client *agentapi.Client, log *slog.Logger) func() {
	ctx, cancel := context.WithCancel(ctx)
	done := make(chan struct{})
	var held *agentapi.Owner
	go func() {
		defer close(done)
		for ctx.Err() == nil {
			owner, err := client.Owner(ctx)
			if err == nil {
				log.Info("holding the owner of the writer's tables")
				owner.Wait(ctx)
				wait(ctx, ownerGrace)
				if ctx.Err() != nil {
					held = owner
					return
				}
				_ = owner.Close()
			}
			if _, answered := errors.AsType[*agentapi.Error](err); answered {
				log.Info("the writer does not hand over the owner of its tables: nobody owns them in the moment of the change", "error", err)
				return
			}
			wait(ctx, askOwner)
		}
	}()
	return func() {
		cancel()
		<-done
		if held != nil {
			_ = held.Close()
		}
	}
}

// takeOver makes the tables this process's own, right after the last one who held them has let go. If somebody else has them,
// the loop will say so and try again.
func takeOver(ctx context.Context, kernel *nft.Kernel, tables []ruleset.TableID, log *slog.Logger) {
	begin := time.Now()
	for {
		_, err := kernel.Own(ctx, tables...)
		if err == nil {
			log.Info("tables taken over", "took", time.Since(begin))
			return
		}
		if !nft.IsPermission(err) || ctx.Err() != nil || time.Since(begin) > ownPatience {
			log.Warn("the tables could not be taken over yet", "error", err)
			return
		}
		wait(ctx, ownRetry)
	}
}

func wait(ctx context.Context, d time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
}
