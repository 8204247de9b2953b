package nft

import (
	"context"
	"errors"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/podwall/podwall/pkg/ruleset"
)

// Stage is the part of a ruleset.Delta that a transaction belongs to.
type Stage string

// The stages of a commit, in their order.
const (
	Prepare Stage = "prepare"
	Apply   Stage = "apply"
	Cleanup Stage = "cleanup"
)

// CommitError is an error of a transaction. The stages before it are in the kernel; of its own stage nothing is, unless
// IsUncertain says so.
type CommitError struct {
	Stage Stage
	Op    string // what was refused, e.g. "add chain inet podwall/ingress"; empty when the kernel did not say
	Err   error
}

// Error returns the stage, the operation and the reason.
func (e *CommitError) Error() string {
	parts := []string{"commit (" + string(e.Stage) + ")"}
	if e.Op != "" {
		parts = append(parts, e.Op)
	}
	return strings.Join(append(parts, e.Err.Error()+e.hint()), ": ")
}

func (e *CommitError) hint() string {
	switch {
	case IsNotExist(e.Err), IsExist(e.Err), errors.Is(e.Err, unix.EBUSY):
		return "; the kernel's table is not the expected one: read it back and commit the difference"
	case IsPermission(e.Err):
		return "; another process owns the table, or CAP_NET_ADMIN is missing"
	case IsUncertain(e.Err):
		return "; the transaction may be in the kernel all the same: read the table back"
	}
	return ""
}

// Unwrap returns the reason.
func (e *CommitError) Unwrap() error { return e.Err }

// IsNotExist reports whether an object that a transaction needs is missing: somebody else has changed the table.
func IsNotExist(err error) bool { return errors.Is(err, unix.ENOENT) }

// IsExist reports whether an object is already there with other properties, or an interval overlaps another one.
func IsExist(err error) bool { return errors.Is(err, unix.EEXIST) }

// IsPermission reports whether another netlink socket owns the table (flags owner), or CAP_NET_ADMIN is missing.
func IsPermission(err error) bool { return errors.Is(err, unix.EPERM) }

// IsUncertain reports whether the kernel's answer was lost because it did not fit the socket's receive buffer. The
// transaction may have been applied (google/nftables#103).
func IsUncertain(err error) bool { return errors.Is(err, unix.ENOBUFS) }

// Refused is what a transaction was refused for.
type Refused struct {
	Verb  string // add, delete or flush
	Kind  string // table, chain, rule, set or element
	Table ruleset.TableID
	Name  string // of the chain or set
}

// Refused returns the operation that the kernel named; the zero value if it named none.
func (e *CommitError) Refused() Refused {
	words := strings.Fields(e.Op) // "add rule inet podwall ingress ...", see ruleset.Op.Name
	if len(words) < 5 {
		return Refused{}
	}
	return Refused{Verb: words[0], Kind: words[1], Table: ruleset.TableID{Family: ruleset.Family(words[2]), Name: words[3]}, Name: words[4]}
}

// IsRefusal reports whether the kernel does not take what was asked of it, however often it is asked. Otherwise the whole transaction
// has failed for a reason that lies in none of its objects: it was interrupted, memory is short, or somebody else owns the table.
func IsRefusal(err error) bool {
	var refused *CommitError
	if !errors.As(err, &refused) || IsPermission(err) || IsUncertain(err) {
		return false
	}
	for _, passing := range []error{context.Canceled, context.DeadlineExceeded, unix.ENOMEM, unix.EAGAIN, unix.EINTR, unix.ERESTART, unix.EMSGSIZE, unix.EBADF} {
		if errors.Is(err, passing) {
			return false
		}
	}
	return true
}
