package agentapi

import (
	"context"
	"encoding/json"
	"errors"
	"net/url"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// streaming serves a stream "numbers", and everything else as without it.
func streaming(ctx context.Context, t *testing.T, s Stream) *Client {
	t.Helper()
	views := map[string]View{"numbers": func(context.Context, url.Values) (any, error) { return []int{1, 2}, nil }}
	return NewClient(serve(t, Streams(ctx, quiet(&fakeAgent{}, views), map[string]Stream{"numbers": s}))) //nolint:contextcheck // the listener lives as long as the test
}

func TestStream(t *testing.T) {
	t.Parallel()
	more := make(chan int)
	life, end := context.WithCancel(t.Context())
	defer end()
	client := streaming(life, t, func(ctx context.Context, q url.Values, send func(any) error) error {
		if q.Get("of") != "three" {
			t.Errorf("query %v", q)
		}
		for {
			select {
			case n := <-more:
				if err := send(n); err != nil {
					return err
				}
			case <-ctx.Done():
				return nil
			}
		}
	})
	lines, ended := make(chan string, 1), make(chan error, 1)
	go func() {
		ended <- client.Follow(t.Context(), "numbers", url.Values{"of": {"three"}}, func(line []byte) error {
			lines <- string(line)
			return nil
		})
	}()
	for _, want := range []string{"1", "2"} { // each comes at once, not when the stream has ended
		more <- int(want[0] - '0')
		select {
		case got := <-lines:
			if got != want {
				t.Errorf("line %q, want %q", got, want)
			}
		case <-time.After(5 * time.Second):
			t.Fatal("a line does not come")
		}
	}
	var list []int
	if err := client.View(t.Context(), "numbers", nil, &list); err != nil || !cmp.Equal(list, []int{1, 2}) {
		t.Errorf("the view of the same name: %v (%v)", list, err)
	}
	if err := client.Status(t.Context()); err != nil {
		t.Errorf("another request: %v", err)
	}
	end()
	select {
	case err := <-ended:
		if e, ok := errors.AsType[*Error](err); !ok || e.Code != CodeTryAgainLater {
			t.Errorf("the end of the daemon: %v", err)
		}
	case <-time.After(5 * time.Second):
		t.Error("the stream does not end with the daemon")
	}
}

// A stream lasts for longer than a request may take to be sent, which is when the server's own deadline would end it.
func TestStreamOutlastsDeadlines(t *testing.T) {
	t.Parallel()
	client := streaming(t.Context(), t, func(ctx context.Context, _ url.Values, send func(any) error) error {
		timer := time.NewTimer(readTimeout + time.Second)
		defer timer.Stop()
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-timer.C:
			return send("late")
		}
	})
	var got []string
	_ = client.Follow(t.Context(), "numbers", nil, func(line []byte) error { // its end is an error
		got = append(got, string(line))
		return nil
	})
	if diff := cmp.Diff([]string{`"late"`}, got); diff != "" {
		t.Error(diff)
	}
}

func TestFollowersAreBounded(t *testing.T) {
	t.Parallel()
	client := streaming(t.Context(), t, func(ctx context.Context, _ url.Values, send func(any) error) error {
		if err := send("hello"); err != nil {
			return err
		}
		<-ctx.Done()
		return nil
	})
	ctx, leave := context.WithCancel(t.Context())
	var followers, greeted sync.WaitGroup
	for range maxFollowers {
		greeted.Add(1)
		followers.Go(func() {
			if err := client.Follow(ctx, "numbers", nil, func([]byte) error { greeted.Done(); return nil }); err != nil {
				t.Error(err)
			}
		})
	}
	greeted.Wait()
	err := client.Follow(t.Context(), "numbers", nil, func([]byte) error { return nil })
	if e, ok := errors.AsType[*Error](err); !ok || e.Code != CodeTryAgainLater {
		t.Errorf("one too many: %v", err)
	}
	leave()
	followers.Wait()
	// Those that left make room.
	enough := errors.New("enough")
	deadline := time.Now().Add(5 * time.Second)
	for err = nil; !errors.Is(err, enough) && time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
		err = client.Follow(t.Context(), "numbers", nil, func(line []byte) error {
			var text string
			if err := json.Unmarshal(line, &text); err != nil || text != "hello" {
				t.Errorf("line %s (%v)", line, err)
			}
			return enough
		})
	}
	if !errors.Is(err, enough) {
		t.Errorf("after the others have left: %v", err)
	}
}

func TestStreamUnknown(t *testing.T) {
	t.Parallel()
	client := streaming(t.Context(), t, nil)
	err := client.Follow(t.Context(), "letters", nil, func([]byte) error { return nil })
	if e, ok := errors.AsType[*Error](err); !ok || e.Code != CodeVersionMismatch {
		t.Errorf("a stream that there is not: %v", err)
	}
}
