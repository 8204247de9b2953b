// Package cniplugin holds the CNI verbs of podwall: each tells the daemon, over its socket, what the runtime said.
package cniplugin

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"runtime/debug"
	"slices"
	"time"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"
	"golang.org/x/sys/unix"

	"github.com/podwall/podwall/pkg/agentapi"
	"github.com/podwall/podwall/pkg/attach"
	"github.com/podwall/podwall/pkg/hostlink"
)

// How long each verb may take in all; ADD has the conflist's key timeout. DEL is short because runtimes hold a lock during it. CHECK and
// STATUS are asked often (CRI-O runs CHECK after every ADD, kubelet asks for STATUS every few seconds): they ask once, and STATUS is
// done within a second even on a busy node.
const (
	delTimeout    = 2 * time.Second
	checkTimeout  = time.Second
	statusTimeout = 500 * time.Millisecond
	gcTimeout     = 10 * time.Second
)

// Plugin is what the verbs need of the world.
type Plugin struct {
	// Agent returns the daemon behind a socket.
	Agent func(socket string) agentapi.Agent
	// FindLink returns the host side of an interface of a sandbox; see hostlink.Find.
	FindLink func(ctx context.Context, netns, ifname string, candidates []string) (attach.HostLink, error)
	// Stdout gets ADD's result and nothing else; Stderr gets warnings if there is no log file.
	Stdout, Stderr io.Writer
}

// Funcs returns the verbs for skel.
func (p *Plugin) Funcs() skel.CNIFuncs {
	return skel.CNIFuncs{
		Add:    p.verb("ADD", p.add),
		Check:  p.verb("CHECK", p.check),
		GC:     p.verb("GC", p.gc),
		Status: p.verb("STATUS", p.status),
		Del:    p.verb("DEL", p.del),
	}
}

// call is one call of the plugin.
type call struct {
	args  *skel.CmdArgs
	conf  config
	agent agentapi.Agent
}

func (c *call) key() attach.Key {
	return attach.Key{ContainerID: c.args.ContainerID, IfName: c.args.IfName}
}

// verb turns errors and panics of a call into CNI errors, except for DEL, which never fails: podwall is last in the list, so its DEL comes
// first, and libcni stops at the first error, which would leak the main plugin's interface and address.
func (p *Plugin) verb(name string, f func(context.Context, *call) error) func(*skel.CmdArgs) error {
	return func(args *skel.CmdArgs) error {
		var err error
		func() {
			defer func() {
				if r := recover(); r != nil {
					err = types.NewError(types.ErrInternal, fmt.Sprintf("podwall panicked in %s: %v", name, r), string(debug.Stack()))
				}
			}()
			err = p.call(name, f, args)
		}()
		if err != nil && name == "DEL" {
			fmt.Fprintln(p.Stderr, err)
			return nil
		}
		return cniError(err)
	}
}

// call parses the configuration, does what the verb does and logs how it went.
func (p *Plugin) call(name string, f func(context.Context, *call) error, args *skel.CmdArgs) error {
	begin := time.Now()
	conf, err := parseConfig(args.StdinData)
	log, closeLog := p.logger(conf.logFile)
	defer closeLog()
	log = log.With("command", name, "network", conf.network, "containerID", args.ContainerID, "ifname", args.IfName)
	if err == nil || name == "DEL" {
		err = errors.Join(err, f(context.Background(), &call{args: args, conf: conf, agent: p.Agent(conf.socket)}))
	}
	switch {
	case err == nil:
		log.Info("done", "took", time.Since(begin).String())
	case name == "DEL":
		log.Warn("podwalld was not told, it will notice that the pod's link is gone", "error", err, "took", time.Since(begin).String())
		return nil
	default:
		log.Info("failed", "error", err, "took", time.Since(begin).String()) // and the runtime gets it too
	}
	return err
}

// logger writes warnings to stderr, or everything to the log file if there is one. No pod should wait for a log.
func (p *Plugin) logger(path string) (*slog.Logger, func()) {
	stderr := slog.New(slog.NewTextHandler(p.Stderr, &slog.HandlerOptions{Level: slog.LevelWarn}))
	if path == "" {
		return stderr, func() {}
	}
	// Opening a fifo must not wait for its reader.
	f, err := os.OpenFile(path, os.O_APPEND|os.O_CREATE|os.O_WRONLY|unix.O_NONBLOCK, 0o600)
	if err != nil {
		stderr.Warn("cannot open the conflist's logFile", "error", err)
		return stderr, func() {}
	}
	return slog.New(slog.NewJSONHandler(f, nil)), func() { f.Close() }
}

// cniError gives every error its code; skel prints it.
func cniError(err error) error {
	var remote *agentapi.Error
	var local *types.Error
	switch {
	case err == nil:
		return nil
	case errors.As(err, &local):
		return local
	case errors.As(err, &remote):
		return types.NewError(remote.Code, remote.Msg, remote.Details)
	case errors.Is(err, hostlink.ErrNetns):
		return types.NewError(types.ErrInvalidNetNS, err.Error(), "")
	case errors.Is(err, hostlink.ErrNoHostLink):
		return types.NewError(agentapi.CodeNoHostLink, err.Error(), "")
	case errors.Is(err, unix.EAGAIN): // netlink's receive timeout
		return types.NewError(types.ErrTryAgainLater, "the kernel does not answer about network links", err.Error())
	default:
		return types.NewError(types.ErrInternal, err.Error(), "")
	}
}

// add has the attachment enforced and then prints the main plugin's result as it came.
func (p *Plugin) add(ctx context.Context, c *call) error {
	ctx, cancel := context.WithTimeout(ctx, c.conf.timeout)
	defer cancel()
	prev, err := c.conf.previous()
	if err != nil {
		return err
	}
	if prev == nil {
		return types.NewError(types.ErrInvalidNetworkConfig, "podwall must be called as a chained plugin: there is no prevResult, put its entry after the main plugin's", "")
	}
	ips, err := prev.podIPs(c.args.IfName)
	if err != nil {
		return err
	}
	if len(ips) == 0 {
		return types.NewError(types.ErrInvalidNetworkConfig,
			fmt.Sprintf("prevResult has no IP for %s: policies apply to IPs, remove podwall from networks without IPAM", c.args.IfName), "")
	}
	pod, err := podRef(c.args.Args)
	if err != nil {
		return err
	}
	labels, err := c.conf.labels()
	if err != nil {
		return err
	}
	link, err := p.FindLink(ctx, c.args.Netns, c.args.IfName, prev.hostNames(c.args.IfName))
	if err != nil {
		return err
	}
	if err := c.agent.Attach(ctx, attach.Attachment{
		Network: c.conf.network, Key: c.key(), Pod: pod, IPs: ips, HostLink: link, Labels: labels, Netns: c.args.Netns,
	}); err != nil {
		return err
	}
	if err := prev.out.PrintTo(p.Stdout); err != nil {
		return types.NewError(types.ErrIOFailure, "cannot print the result", err.Error())
	}
	return nil
}

// del needs nothing but the key: no prevResult, no netns, no CNI_ARGS.
func (p *Plugin) del(ctx context.Context, c *call) error {
	ctx, cancel := context.WithTimeout(ctx, delTimeout)
	defer cancel()
	return c.agent.Detach(ctx, c.key())
}

// check fails only on what is known to be wrong.
func (p *Plugin) check(ctx context.Context, c *call) error {
	ctx, cancel := context.WithTimeout(ctx, checkTimeout)
	defer cancel()
	prev, err := c.conf.previous()
	if err != nil {
		return err
	}
	if prev == nil {
		prev = &previous{}
	}
	want, err := prev.podIPs(c.args.IfName)
	if err != nil {
		return err
	}
	link, err := p.FindLink(ctx, c.args.Netns, c.args.IfName, prev.hostNames(c.args.IfName))
	if err != nil {
		return err
	}
	have, err := c.agent.Check(ctx, c.key())
	if err != nil {
		return err
	}
	if have.HostLink != link {
		return agentapi.Errorf(agentapi.CodeRefused, "podwalld enforces %s on host link %s (index %d), but its host link is %s (index %d): recreate the pod",
			c.key(), have.HostLink.Name, have.HostLink.Index, link.Name, link.Index)
	}
	for _, ip := range want {
		if !slices.Contains(have.IPs, ip) {
			return agentapi.Errorf(agentapi.CodeRefused, "podwalld does not enforce %s for IP %s: recreate the pod", c.key(), ip)
		}
	}
	return nil
}

// gc does nothing without a list: cnitool calls it so, and taking that for an empty list would open the door to every running pod.
func (p *Plugin) gc(ctx context.Context, c *call) error {
	ctx, cancel := context.WithTimeout(ctx, gcTimeout)
	defer cancel()
	valid, listed, err := c.conf.validAttachments()
	if err != nil || !listed {
		return err
	}
	return c.agent.GC(ctx, c.conf.network, valid)
}

func (p *Plugin) status(ctx context.Context, c *call) error {
	ctx, cancel := context.WithTimeout(ctx, statusTimeout)
	defer cancel()
	return c.agent.Status(ctx)
}
