package cluster

import (
	"context"
	"crypto/sha256"
	"io/fs"
	"os"
	"syscall"
	"time"
)

// manifest is what is known of a file.
type manifest struct {
	sum         [sha256.Size]byte
	good        bool // definitions are of content without problems
	definitions []definition
	problems    []Problem
	stamp       stamp
	readAt      time.Time
	emptySince  time.Time

	restored time.Time         // not zero: definitions are not the file's but the cache's, of that time
	cached   [sha256.Size]byte // what the cache holds
	unsaved  *lastGood         // what it should hold
}

// stamp changes when a file does.
type stamp struct {
	inode, device uint64
	size          int64
	modified      time.Time
	changed       syscall.Timespec // ctime: nobody can set it back
}

func stampOf(info fs.FileInfo) stamp {
	s := stamp{size: info.Size(), modified: info.ModTime()}
	if sys, ok := info.Sys().(*syscall.Stat_t); ok {
		s.inode, s.device, s.changed = sys.Ino, sys.Dev, sys.Ctim
	}
	return s
}

// refresh reads a file if it has changed and returns for how long it wants to be left as it was, if not 0.
func (f *manifest) refresh(ctx context.Context, name string, deadline time.Time) (time.Duration, error) {
	info, err := os.Stat(name)
	if err != nil {
		return 0, err
	}
	if f.stamp == stampOf(info) && f.readAt.Sub(info.ModTime()) > timesTrusted {
		return 0, nil
	}
	now := time.Now()
	data, info, err := readSettled(ctx, name, deadline)
	if err != nil {
		return 0, err
	}
	if len(data) == 0 && len(f.definitions) > 0 {
		if f.emptySince.IsZero() {
			f.emptySince = now
		}
		if left := emptyHold - now.Sub(f.emptySince); left > 0 {
			return left, nil
		}
	}
	f.emptySince = time.Time{}
	sum := sha256.Sum256(data)
	if f.sum != sum && f.parse(name, data) {
		f.unsaved = &lastGood{taken: now, content: data}
	}
	if f.cached == sum {
		f.restored, f.unsaved = time.Time{}, nil
	}
	f.sum, f.stamp, f.readAt = sum, stampOf(info), now
	return 0, nil
}

// parse takes the new content if it is understood in full, or if there is nothing better to keep. It reports the former.
func (f *manifest) parse(name string, data []byte) bool {
	definitions, problems := parseFile(name, data)
	good := len(badFiles(problems)) == 0
	f.problems = problems
	if !good && f.good {
		instead := "the file's last good content stays in force"
		if !f.restored.IsZero() {
			instead = f.fromCache()
		}
		for i, p := range problems {
			if !p.Warning {
				problems[i].Reason += "; " + instead
			}
		}
		return false
	}
	f.definitions, f.good, f.restored = definitions, good, time.Time{}
	return good
}

// fromCache says what a restored file goes by.
func (f *manifest) fromCache() string {
	return "the content of " + f.restored.Format(time.RFC3339) + " is used"
}

// readSettled reads a file that nobody is writing, or what there is at the deadline.
func readSettled(ctx context.Context, name string, deadline time.Time) ([]byte, fs.FileInfo, error) {
	for {
		before, err := os.Stat(name)
		if err != nil {
			return nil, nil, err
		}
		data, err := os.ReadFile(name)
		if err != nil {
			return nil, nil, err
		}
		after, err := os.Stat(name)
		if err != nil {
			return nil, nil, err
		}
		age := time.Since(after.ModTime())
		resting := stampOf(before) == stampOf(after) && (age < 0 || age >= settleQuiet)
		left := time.Until(deadline)
		if resting || left <= 0 || ctx.Err() != nil {
			return data, after, nil
		}
		select {
		case <-ctx.Done():
		case <-time.After(min(settleQuiet, left)):
		}
	}
}
