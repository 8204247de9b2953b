package reconcile

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/podwall/podwall/pkg/attach"
)

// Reasons why a request is refused, for errors.Is.
var (
	ErrIdentity   = errors.New("the pod is not named")
	ErrNoHostLink = errors.New("no host link")
	ErrNotReady   = errors.New("not enforced yet")
	ErrUnknown    = errors.New("attachment is not registered")
	ErrRefused    = errors.New("cannot be enforced")
)

// Attach registers an attachment and returns when its pod's isolation and allow rules are in the kernel. When ctx ends first
// the error is ErrNotReady and the attachment stays closed until DEL.
func (l *Loop) Attach(ctx context.Context, a attach.Attachment) error {
	if l.isDown() {
		return fmt.Errorf("%w: podwall was uninstalled from this node; podwall-install install takes it up again", ErrRefused)
	}
	if err := l.identify(&a); err != nil {
		return err
	}
	link, err := l.cfg.Links.Lookup(a.HostLink)
	if err != nil {
		return err
	}
	if !link.Exists {
		return fmt.Errorf("%w: %s (index %d) does not exist on this node", ErrNoHostLink, a.HostLink.Name, a.HostLink.Index)
	}
	if link.Bridge != "" {
		if err := l.cfg.Links.ShowBridged(link.Bridge); err != nil {
			return fmt.Errorf("%w: %w", ErrRefused, err)
		}
	}
	entry, _, err := l.registry.Put(a)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrRefused, err)
	}
	l.attachmentsChanged()
	for {
		now, changed := l.current()
		if s := now.of(entry.Seq); s != nil && s.State == StateEnforced {
			return nil
		}
		if now.stopped {
			return fmt.Errorf("pod %s: %w: the daemon is stopping; it stays closed", a.Pod, ErrNotReady)
		}
		select {
		case <-changed:
		case <-ctx.Done():
			now, _ := l.current()
			reason := "the daemon has not come to it"
			if s := now.of(entry.Seq); s != nil {
				reason = s.Reason
			}
			if now.err != nil {
				reason = now.err.Error()
			}
			return fmt.Errorf("pod %s: %w: %s; it stays closed until it is deleted", a.Pod, ErrNotReady, reason)
		}
	}
}

func (l *Loop) attachmentsChanged() {
	l.mu.Lock()
	l.told = true
	l.mu.Unlock()
	l.kick()
}

// identify fills in the pod of an attachment that came without one.
func (l *Loop) identify(a *attach.Attachment) error {
	if a.Pod.Named() {
		return nil
	}
	if !l.cfg.Standalone {
		return fmt.Errorf("%w: K8S_POD_NAMESPACE and K8S_POD_NAME must be in CNI_ARGS", ErrIdentity)
	}
	a.Pod = attach.PodRef{Namespace: "default", Name: a.ContainerID}
	return nil
}

// Detach closes an attachment and forgets its connections; it is removed when its host link is gone. An attachment that is
// not registered is a success.
func (l *Loop) Detach(ctx context.Context, k attach.Key) error {
	entry, ok, err := l.registry.Detach(k)
	if !ok {
		return nil
	}
	l.attachmentsChanged()
	for {
		now, changed := l.current()
		s := now.of(entry.Seq)
		if s == nil && now.ready {
			// Not heard of yet, or ended already.
			if e, ok := l.registry.Get(k); ok && e.Seq == entry.Seq {
				s = &PodStatus{}
			}
		}
		if s == nil || s.State == StateDetached {
			return err
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return errors.Join(err, fmt.Errorf("attachment %s: %w: closing it goes on", k, ErrNotReady))
		}
	}
}

// Check returns an attachment that is enforced.
func (l *Loop) Check(_ context.Context, k attach.Key) (attach.Attachment, error) {
	e, ok := l.registry.Get(k)
	if !ok || e.Detached {
		return attach.Attachment{}, fmt.Errorf("%w: %s; delete the pod so that it is added again", ErrUnknown, k)
	}
	now, _ := l.current()
	if s := now.of(e.Seq); s == nil || s.State != StateEnforced {
		return attach.Attachment{}, fmt.Errorf("attachment %s: %w", k, ErrNotReady)
	}
	return e.Attachment, nil
}

// GC detaches every attachment of a network that is not listed as valid.
func (l *Loop) GC(ctx context.Context, network string, valid []attach.Key) error {
	var errs []error
	for _, e := range l.registry.Entries() {
		if e.Network == network && !e.Detached && !slices.Contains(valid, e.Key) {
			errs = append(errs, l.Detach(ctx, e.Key))
		}
	}
	return errors.Join(errs...)
}

// Status reports whether an ADD could be served now.
func (l *Loop) Status(context.Context) error {
	now, _ := l.current()
	if !now.ready {
		return fmt.Errorf("%w: the daemon has not read all objects yet", ErrNotReady)
	}
	return nil
}

// Complete reports whether all objects have been read, which a standby has to have done before it may take over.
func (l *Loop) Complete() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.synced
}

// WaitReady returns when the first complete ruleset is in the kernel.
func (l *Loop) WaitReady(ctx context.Context) error {
	for {
		now, changed := l.current()
		if now.ready {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}
