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
	"syscall"
	"time"

	"github.com/prometheus/client_golang/prometheus/promhttp"
	"golang.org/x/sync/errgroup"
	"k8s.io/klog/v2"
	"k8s.io/utils/clock"

	cniconf "github.com/podwall/podwall/cni-conf"
	"github.com/podwall/podwall/pkg/agentapi"
	"github.com/podwall/podwall/pkg/cli"
	"github.com/podwall/podwall/pkg/cluster"
	"github.com/podwall/podwall/pkg/conflist"
	"github.com/podwall/podwall/pkg/conntrack"
	"github.com/podwall/podwall/pkg/metrics"
	"github.com/podwall/podwall/pkg/nft"
	"github.com/podwall/podwall/pkg/policy"
	"github.com/podwall/podwall/pkg/reconcile"
	"github.com/podwall/podwall/pkg/registry"
)

// source feeds the loop with objects until ctx ends.
type source interface {
	Run(ctx context.Context, sink cluster.Sink) error
}

func runDaemon(ctx context.Context, c *cli.Call) error {
	var cfg config
	cfg.flags(c.Flags)
	if err := c.Parse(); err != nil {
		return err
	}
	if err := cfg.complete(); err != nil {
		return err
	}
	log := newLogger(&cfg, c)
	limitMemory(os.DirFS("/"), os.Getenv, log)
	src, faults, err := newSource(&cfg, log)
	if err != nil {
		return err
	}
	if err := dropPrivileges(cfg.capabilities(), log); err != nil {
		return err
	}
	kernel, err := nft.New(nft.Config{Own: true})
	if err != nil {
		return err
	}
	defer func() { _ = kernel.Close() }()
	owner, err := kernel.SyscallConn()
	if err != nil {
		return err
	}
	connections, err := conntrack.New(conntrack.Config{})
	if err != nil {
		return err
	}
	defer connections.Close()

	m := metrics.New(func() float64 { return float64(len(faults())) })
	options := cfg.options()
	if options.Log, err = kernel.CanLog(policy.LogGroup); err != nil {
		return err
	}
	if !options.Log {
		log.Warn("this kernel cannot log packets for programs (modules nft_log, nfnetlink_log): podwalld denials shows nothing, policies are enforced all the same")
	}
	foreign := make(chan string, foreignBacklog)
	loop := reconcile.New(reconcile.Config{
		NodeName: cfg.nodeName, Standalone: cfg.manifests != "", Policy: options,
		Kernel: kernel, Links: registry.Links{}, Foreign: foreign, Connections: connections,
		Log: log, Metrics: m, Clock: clock.RealClock{},
	})
	denials := newDenials(loop, m, log)
	log.Info("starting", "version", versionText(), "node", cfg.nodeName, "table", cfg.table, "own", kernel.Owns())
	if !kernel.Owns() {
		log.Warn("this kernel cannot give podwall's tables an owner (Linux 6.9 can): what others do to them is undone, not prevented")
	}

	// What is handed over is held until this process has let go of everything: its end is what a standby waits for.
	handOver, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer cancel()
	g, ctx := errgroup.WithContext(ctx)
	lead := make(chan *registry.Registry, 1)
	var lock *os.File // held until the process has stopped writing
	g.Go(func() error {
		var err error
		lock, err = becomeWriter(ctx, &cfg, kernel, lead, log)
		return err
	})
	g.Go(func() error { return loop.Run(ctx, lead) })
	g.Go(func() error { return src.Run(ctx, loop) })
	g.Go(func() error {
		tidyUp(ctx, loop)
		return nil
	})
	g.Go(func() error { return watchLinks(ctx, loop, log) })
	g.Go(func() error { return watchKernel(ctx, kernel, foreign, log) })
	g.Go(func() error { return serveSocket(ctx, handOver, &cfg, loop, denials, owner, faults, log) })
	g.Go(func() error { return denials.watch(ctx) })
	g.Go(func() error { return watchStandDown(ctx, &cfg, loop, log) })
	if cfg.cniConfDir != "" {
		g.Go(func() error { return keepEntry(ctx, &cfg, log) })
	}
	health := healthHandler(&cfg, loop, m)
	g.Go(func() error { return serveHealth(ctx, "unix", ownHealth(cfg.socket), health, log) })
	if cfg.listen != "" {
		g.Go(func() error { return serveHealth(ctx, "tcp", cfg.listen, health, log) })
	}
	err = g.Wait()
	// Before the lock falls: who takes it finds tables that are nobody's, or that only it holds the owner of.
	err = errors.Join(err, kernel.Close())
	if lock != nil {
		_ = lock.Close()
	}
	log.Info("stopped; the kernel keeps enforcing what is loaded")
	return err
}

func newLogger(cfg *config, c *cli.Call) *slog.Logger {
	opts := &slog.HandlerOptions{Level: cfg.logLevel}
	var h slog.Handler = slog.NewTextHandler(c.Stderr, opts)
	if cfg.logFormat == "json" {
		h = slog.NewJSONHandler(c.Stderr, opts)
	}
	log := slog.New(h)
	klog.SetSlogLogger(log) // client-go's lines look like ours
	return log
}

// newSource returns where objects come from, and what is wrong with it right now: files that cannot be read as they are.
func newSource(cfg *config, log *slog.Logger) (source, func() []string, error) {
	if cfg.manifests == "" {
		client, err := cluster.NewRESTClient(cfg.kubeconfig)
		if err != nil {
			return nil, nil, err
		}
		return cluster.NewAPIServer(client, log), func() []string { return nil }, nil
	}
	files := cluster.NewManifests(cfg.manifests, log)
	files.Cache = filepath.Join(cfg.stateDir, "manifests")
	if err := files.Check(); err != nil {
		return nil, nil, err
	}
	return files, func() []string {
		var list []string
		for _, p := range files.Problems() {
			list = append(list, p.String())
		}
		return list
	}, nil
}

// becomeWriter waits until no other podwalld writes on this node, then hands the registrations to the loop. During an update of
// the DaemonSet the new daemon stands by here, with all objects read, until the old one has gone, and holds its tables' owner.
func becomeWriter(ctx context.Context, cfg *config, kernel *nft.Kernel, lead chan<- *registry.Registry, log *slog.Logger) (*os.File, error) {
	// A kubelet makes missing hostPath directories 0755.
	if err := errors.Join(os.MkdirAll(cfg.stateDir, 0o700), os.Chmod(cfg.stateDir, 0o700)); err != nil { //nolint:gosec // a directory needs x
		return nil, fmt.Errorf("make --state-dir private: %w", err)
	}
	release := func() {}
	lock, err := registry.Lock(ctx, filepath.Join(cfg.stateDir, "daemon.lock"), func() {
		log.Info("another podwalld writes on this node: standing by", "lock", filepath.Join(cfg.stateDir, "daemon.lock"))
		release = holdOwner(ctx, agentapi.NewClient(cfg.socket), log)
	})
	release()
	if ctx.Err() != nil {
		return nil, nil //nolint:nilerr // stopped while standing by
	}
	if err != nil {
		return nil, err
	}
	takeOver(ctx, kernel, cfg.tables(), log)
	reg, unreadable, err := registry.Open(filepath.Join(cfg.stateDir, "attachments"))
	if err != nil {
		return lock, err
	}
	for _, err := range unreadable {
		log.Warn("registration cannot be read and is ignored; delete its pod", "error", err)
	}
	log.Info("writing on this node", "registered", len(reg.Entries()))
	lead <- reg
	return lock, nil
}

// watchLinks keeps the subscription to link events alive: without it a sweep finds what has gone.
func watchLinks(ctx context.Context, loop *reconcile.Loop, log *slog.Logger) error {
	for {
		err := registry.Links{}.Watch(ctx, loop.LinkGone)
		if ctx.Err() != nil {
			return nil
		}
		log.Warn("link events lost, subscribing again", "error", err)
		loop.LinkGone(0)
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(time.Second):
		}
	}
}

// foreignBacklog is how many commits of others are remembered by name while the loop is busy.
const foreignBacklog = 16

// watchKernel tells the loop what others commit. Without it a sweep finds what they have changed.
func watchKernel(ctx context.Context, kernel *nft.Kernel, foreign chan<- string, log *slog.Logger) error {
	for {
		err := kernel.Watch(ctx, func(who string) {
			select {
			case foreign <- who:
			default: // the loop will look in any case
			}
		})
		if ctx.Err() != nil {
			return nil
		}
		log.Warn("events of nftables lost, subscribing again", "error", err)
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(time.Second):
		}
	}
}

// standDownPoll is how often the daemon looks whether podwall-install has told it to stand down.
const standDownPoll = 500 * time.Millisecond

// watchStandDown follows the marker that `podwall-install uninstall` leaves and `install` removes.
func watchStandDown(ctx context.Context, cfg *config, loop *reconcile.Loop, log *slog.Logger) error {
	marker := filepath.Join(cfg.stateDir, conflist.StandDownFile)
	down := false
	for {
		_, err := os.Stat(marker)
		if now := err == nil; now != down {
			down = now
			log.Info("following podwall-install", "uninstalled", down, "marker", marker)
			loop.StandDown(down)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(standDownPoll):
		}
	}
}

// keepEntry appends podwall's entry again when the main CNI has rewritten its conflist.
func keepEntry(ctx context.Context, cfg *config, log *slog.Logger) error {
	store := conflist.New(conflist.Config{
		Dir: cfg.cniConfDir, Entry: cniconf.Entry(), StandDown: filepath.Join(cfg.stateDir, conflist.StandDownFile),
	})
	err := store.Keep(ctx, log)
	if ctx.Err() != nil {
		return nil
	}
	return err
}

// serveSocket answers the plugin from the moment on that the kernel holds a complete ruleset: before that an ADD finds no
// socket, is told to try again, and leaves nothing behind.
func serveSocket(ctx, handOver context.Context, cfg *config, loop *reconcile.Loop, denials *denials, owner syscall.RawConn, faults func() []string, log *slog.Logger) error {
	if err := loop.WaitReady(ctx); err != nil {
		return nil //nolint:nilerr // the daemon was stopped before it was ready
	}
	ln, err := agentapi.Listen(cfg.socket)
	if err != nil {
		return err
	}
	log.Info("ready", "socket", cfg.socket)
	operator := withQuestions(cfg, loop, views(loop, faults))
	operator["denials"] = denials.view
	handler := agentapi.Streams(ctx, agentapi.NewHandler(agent{loop}, operator, log), map[string]agentapi.Stream{"denials": denials.follow})
	return agentapi.Serve(ctx, ln, agentapi.HandOver(handOver, handler, owner), log)
}

// stuck is for how long one pass of the loop may last before the daemon counts as hung. A new daemon starts from what is in the
// kernel, so that being restarted for nothing costs nothing but time.
const stuck = 2 * time.Minute

// healthHandler answers Prometheus and probes.
func healthHandler(cfg *config, loop *reconcile.Loop, m *metrics.Metrics) http.Handler {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(m.Registry, promhttp.HandlerOpts{}))
	mux.HandleFunc("GET /livez", func(w http.ResponseWriter, _ *http.Request) {
		if busy := loop.Busy(); busy > stuck {
			http.Error(w, fmt.Sprintf("the kernel has not answered for %s", busy.Round(time.Second)), http.StatusServiceUnavailable)
			return
		}
		_, _ = fmt.Fprintln(w, "ok")
	})
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, r *http.Request) {
		if err := ready(r.Context(), cfg, loop); err != nil {
			http.Error(w, err.Error(), http.StatusServiceUnavailable)
			return
		}
		_, _ = fmt.Fprintln(w, "ok")
	})
	return mux
}

// serveHealth serves health on a network address. While another daemon of this node still has it, it waits for its turn.
func serveHealth(ctx context.Context, network, address string, h http.Handler, log *slog.Logger) error {
	ln, err := listenHealth(ctx, network, address, log)
	if err != nil || ctx.Err() != nil {
		return err
	}
	srv := &http.Server{
		Handler: h, ReadHeaderTimeout: 5 * time.Second, WriteTimeout: 10 * time.Second,
		BaseContext: func(net.Listener) context.Context { return ctx },
	}
	stop := context.AfterFunc(ctx, func() { _ = srv.Close() })
	defer stop()
	if err := srv.Serve(ln); !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("serve health on %s: %w", address, err)
	}
	return nil
}

// ready is nil when this node is enforced: by this process, or by the writer that it is ready to take over from.
func ready(ctx context.Context, cfg *config, loop *reconcile.Loop) error {
	err := loop.Status(ctx)
	if err == nil || !loop.Complete() {
		return err
	}
	return agentapi.NewClient(cfg.socket).Status(ctx)
}

func listenHealth(ctx context.Context, network, address string, log *slog.Logger) (net.Listener, error) {
	for first := true; ; first = false {
		ln, err := (&net.ListenConfig{}).Listen(ctx, network, address)
		switch {
		case err == nil:
			return ln, nil
		case ctx.Err() != nil:
			return nil, nil
		case !errors.Is(err, syscall.EADDRINUSE):
			return nil, fmt.Errorf("listen for health: %w", err)
		case first:
			log.Warn("the address for health is taken, waiting for it; another podwalld may still be stopping", "address", address)
		}
		select {
		case <-ctx.Done():
			return nil, nil
		case <-time.After(time.Second):
		}
	}
}

// ownHealth is an abstract unix socket on which a daemon answers probes of its own container: the network namespace is that of
// the node, so the name holds the PID namespace. During an update of the DaemonSet the socket of cfg.socket and the address of
// --listen may both be those of the other daemon.
func ownHealth(socket string) string {
	pid, err := os.Readlink("/proc/self/ns/pid")
	if err != nil {
		pid = "pid"
	}
	return "@podwalld-" + policy.ID("health", socket, pid)
}
