package reconcile

import (
	"errors"
	"net/netip"
	"slices"

	"github.com/podwall/podwall/pkg/attach"
	"github.com/podwall/podwall/pkg/policy"
)

// orphan is a pod that the kernel still has and no registration explains: its file is damaged or was removed while no daemon
// ran. To take its chains for left-overs would open it.
type orphan struct {
	id     string
	link   attach.HostLink
	bridge string
	ips    []netip.Addr
}

// findOrphans looks for them among what a former daemon loaded.
func (l *Loop) findOrphans() error {
	registered := map[string]bool{}
	for _, st := range l.states {
		registered[st.id] = true
	}
	for id, link := range policy.Links(l.loaded) {
		if registered[id] {
			continue
		}
		index, err := l.cfg.Links.Index(link.Device)
		if err != nil {
			return err
		}
		if index == 0 {
			continue // it has ended
		}
		l.cfg.Log.Warn("a pod has lost its registration: it stays closed until it is deleted", "link", link.Device, "ips", link.IPs)
		l.orphans = append(l.orphans, orphan{id: id, link: attach.HostLink{Name: link.Device, Index: index}, ips: link.IPs})
	}
	return l.lookAtOrphans()
}

// orphaned reports whether the kernel has chains of an endpoint that had lost its registration.
func (l *Loop) orphaned(id string) bool {
	return slices.ContainsFunc(l.orphans, func(o orphan) bool { return o.id == id })
}

// lookAtOrphans forgets those whose link has ended.
func (l *Loop) lookAtOrphans() error {
	var errs []error
	var left []orphan
	for _, o := range l.orphans {
		link, err := l.cfg.Links.Lookup(o.link)
		switch {
		case err != nil:
			errs = append(errs, err)
		case !link.Exists:
			continue
		default:
			o.bridge = link.Bridge
		}
		left = append(left, o)
	}
	l.orphans = left
	return errors.Join(errs...)
}

// closeOrphans adds them, closed, with those of their addresses that nobody has been given since. One that the API knows by
// its addresses, and that was adopted for that, keeps its veth instead.
func (l *Loop) closeOrphans(in policy.Input, owners map[netip.Addr]attach.Key) policy.Input {
	if len(l.orphans) == 0 {
		return in
	}
	taken := map[string]bool{}
	adopted := map[netip.Addr]*policy.Endpoint{}
	for i := range in.Endpoints {
		e := &in.Endpoints[i]
		taken[e.ID] = true
		if e.Link == "" {
			for _, ip := range e.IPs {
				adopted[ip] = e
			}
		}
	}
	for _, o := range l.orphans {
		if taken[o.id] {
			continue // added again
		}
		if i := slices.IndexFunc(o.ips, func(ip netip.Addr) bool { return adopted[ip] != nil }); i >= 0 {
			e := adopted[o.ips[i]]
			e.ID, e.Link, e.Bridge = o.id, o.link.Name, o.bridge
			continue
		}
		e := policy.Endpoint{ID: o.id, Name: lostRegistration, Link: o.link.Name, Bridge: o.bridge}
		for _, ip := range o.ips {
			if _, owned := owners[ip]; !owned {
				e.IPs = append(e.IPs, ip)
			}
		}
		in.Endpoints = append(in.Endpoints, e)
	}
	return in
}

// lostRegistration stands for the name of a pod that nobody knows any more.
const lostRegistration = "(lost registration)"
