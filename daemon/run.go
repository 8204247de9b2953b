package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"time"

	"github.com/prometheus/client_golang/prometheus/promhttp"
	"golang.org/x/sync/errgroup"
	"k8s.io/klog/v2"
	"k8s.io/utils/clock"

	"github.com/podwall/podwall/pkg/agentapi"
	"github.com/podwall/podwall/pkg/cluster"
	"github.com/podwall/podwall/pkg/conntrack"
	"github.com/podwall/podwall/pkg/metrics"
	"github.com/podwall/podwall/pkg/nft"
	"github.com/podwall/podwall/pkg/reconcile"
	"github.com/podwall/podwall/pkg/registry"
)

// source feeds the loop with objects until ctx ends.
type source interface {
	Run(ctx context.Context, sink cluster.Sink) error
}

func runDaemon(ctx context.Context, c *call) error {
	var cfg config
	cfg.flags(c.flags)
	if err := c.parse(); err != nil {
		return err
	}
	if err := cfg.complete(); err != nil {
		return err
	}
	log := newLogger(&cfg, c)
	src, err := newSource(&cfg, log)
	if err != nil {
		return err
	}
	reg, lock, err := openState(&cfg, log)
	if err != nil {
		return err
	}
	defer func() { _ = lock.Close() }()
	kernel, err := nft.New(nft.Config{})
	if err != nil {
		return err
	}
	defer func() { _ = kernel.Close() }()
	connections, err := conntrack.New(conntrack.Config{})
	if err != nil {
		return err
	}
	defer connections.Close()

	m := metrics.New()
	loop := reconcile.New(reconcile.Config{
		NodeName: cfg.nodeName, Standalone: cfg.manifests != "", Policy: cfg.options(),
		Kernel: kernel, Links: registry.Links{}, Registry: reg, Forget: connections.Forget,
		Log: log, Metrics: m, Clock: clock.RealClock{},
	})
	log.Info("starting", "version", versionText(), "node", cfg.nodeName, "table", cfg.table, "registered", len(reg.Entries()))

	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return loop.Run(ctx) })
	g.Go(func() error { return src.Run(ctx, loop) })
	g.Go(func() error { return watchLinks(ctx, loop, log) })
	g.Go(func() error { return serveSocket(ctx, &cfg, loop, log) })
	if cfg.listen != "" {
		g.Go(func() error { return serveHealth(ctx, &cfg, loop, m) })
	}
	err = g.Wait()
	log.Info("stopped; the kernel keeps enforcing what is loaded")
	return err
}

func newLogger(cfg *config, c *call) *slog.Logger {
	opts := &slog.HandlerOptions{Level: cfg.logLevel}
	var h slog.Handler = slog.NewTextHandler(c.stderr, opts)
	if cfg.logFormat == "json" {
		h = slog.NewJSONHandler(c.stderr, opts)
	}
	log := slog.New(h)
	klog.SetSlogLogger(log) // client-go's lines look like ours
	return log
}

func newSource(cfg *config, log *slog.Logger) (source, error) {
	if cfg.manifests != "" {
		return cluster.NewManifests(cfg.manifests, log), nil
	}
	client, err := cluster.RESTClient(cfg.kubeconfig)
	if err != nil {
		return nil, err
	}
	return cluster.NewAPIServer(client, log), nil
}

// openState makes this process the writer of the state directory and loads the registrations.
func openState(cfg *config, log *slog.Logger) (*registry.Registry, *os.File, error) {
	if err := os.MkdirAll(cfg.stateDir, 0o700); err != nil {
		return nil, nil, fmt.Errorf("create --state-dir: %w", err)
	}
	lock, err := registry.Lock(filepath.Join(cfg.stateDir, "daemon.lock"))
	if err != nil {
		return nil, nil, err
	}
	reg, unreadable, err := registry.Open(filepath.Join(cfg.stateDir, "attachments"))
	if err != nil {
		_ = lock.Close()
		return nil, nil, err
	}
	for _, err := range unreadable {
		log.Warn("registration cannot be read and is ignored; delete its pod", "error", err)
	}
	return reg, lock, nil
}

// watchLinks keeps the subscription to link events alive: without it a sweep finds what has gone.
func watchLinks(ctx context.Context, loop *reconcile.Loop, log *slog.Logger) error {
	for {
		err := registry.Links{}.Watch(ctx, loop.LinkGone)
		if ctx.Err() != nil {
			return nil
		}
		log.Warn("link events lost, subscribing again", "error", err)
		loop.LinkGone()
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(time.Second):
		}
	}
}

// serveSocket answers the plugin from the moment on that the kernel holds a complete ruleset: before that an ADD finds no
// socket, is told to try again, and leaves nothing behind.
func serveSocket(ctx context.Context, cfg *config, loop *reconcile.Loop, log *slog.Logger) error {
	if err := loop.WaitReady(ctx); err != nil {
		return nil //nolint:nilerr // the daemon was stopped before it was ready
	}
	ln, err := agentapi.Listen(cfg.socket)
	if err != nil {
		return err
	}
	log.Info("ready", "socket", cfg.socket)
	return agentapi.Serve(ctx, ln, agentapi.NewHandler(agent{loop}, views(loop), log), log)
}

// serveHealth serves Prometheus and probes.
func serveHealth(ctx context.Context, cfg *config, loop *reconcile.Loop, m *metrics.Metrics) error {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(m.Registry, promhttp.HandlerOpts{}))
	mux.HandleFunc("GET /livez", func(w http.ResponseWriter, _ *http.Request) { _, _ = fmt.Fprintln(w, "ok") })
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, r *http.Request) {
		if err := loop.Status(r.Context()); err != nil {
			http.Error(w, err.Error(), http.StatusServiceUnavailable)
			return
		}
		_, _ = fmt.Fprintln(w, "ok")
	})
	srv := &http.Server{
		Handler: mux, ReadHeaderTimeout: 5 * time.Second, WriteTimeout: 10 * time.Second,
		BaseContext: func(net.Listener) context.Context { return ctx },
	}
	ln, err := (&net.ListenConfig{}).Listen(ctx, "tcp", cfg.listen)
	if err != nil {
		return fmt.Errorf("--listen: %w", err)
	}
	stop := context.AfterFunc(ctx, func() { _ = srv.Close() })
	defer stop()
	if err := srv.Serve(ln); !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("serve --listen %s: %w", cfg.listen, err)
	}
	return nil
}
