package main

import (
	"errors"
	"fmt"
	"runtime"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// patience is how long an end waits for a packet until that is lost: longer than a busy machine keeps the other end from running.
const patience = 5 * time.Second

// endToEnd returns the CPU time in nanoseconds that a packet of the established flow takes from a program to a program that sleeps until it
// comes: each end is a thread of its own, the n packets of a chunk go there and back in turns, and the time of both threads counts.
// It is what wires.packets measures, and the receiver's sleep, wake-up and context switch, within one address space.
//
// Both threads are on the CPU that this one is pinned to. On one each, an idle CPU has to be interrupted for every packet, and a virtual
// one has to be started by the hypervisor: where this was written a packet took 21 to 32 µs then instead of 2.4, and the median of
// 21 rounds' ratios could be off by 0.04 instead of 0.007.
func (w *wires) endToEnd(chunks, n int) (float64, error) {
	type outcome struct {
		times []int64
		err   error
	}
	answered := make(chan outcome, 1)
	var cpu unix.CPUSet
	if err := unix.SchedGetaffinity(0, &cpu); err != nil {
		return 0, fmt.Errorf("own CPU: %w", err)
	}
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends with the goroutine, as no other may have its affinity
		if err := unix.SchedSetaffinity(0, &cpu); err != nil {
			answered <- outcome{err: fmt.Errorf("pin the server's thread: %w", err)}
			return
		}
		times, err := talk("server", chunks, n/2, func(buf []byte) bool { return awaits(w.server, buf) && send(w.server, buf) })
		answered <- outcome{times, err}
	}()
	times, err := talk("client", chunks, n/2, func(buf []byte) bool { return send(w.client, buf) && awaits(w.client, buf) })
	server := <-answered // it ends, for it has no more patience than the client
	if err := errors.Join(err, server.err); err != nil {
		return 0, err
	}
	perPacket := make([]float64, chunks)
	for i := range perPacket {
		perPacket[i] = float64(times[i]+server.times[i]) / float64(n/2*2)
	}
	return lowerQuartile(perPacket), nil
}

// talk returns the CPU time that one end of the flow takes for each chunk of n turns. Chunks follow each other without a pause, so no end's time is
// missing from them.
func talk(end string, chunks, n int, turn func(buf []byte) bool) ([]int64, error) {
	buf := make([]byte, payload)
	times := make([]int64, chunks)
	last := threadTime()
	for i := range times {
		for j := range n {
			if !turn(buf) {
				return nil, fmt.Errorf("the %s has lost a packet of the established flow, in turn %d of chunk %d", end, j, i)
			}
		}
		now := threadTime()
		times[i], last = now-last, now
	}
	return times, nil
}

// awaits sleeps until fd has received something, and reports false when nothing has come for as long as the socket waits.
func awaits(fd int, buf []byte) bool {
	var interrupted time.Time
	for {
		n, _, errno := unix.RawSyscall6(unix.SYS_RECVFROM, uintptr(fd), uintptr(unsafe.Pointer(&buf[0])), uintptr(len(buf)), 0, 0, 0)
		if errno != unix.EINTR {
			return errno == 0 && n > 0
		}
		// Go signals a thread that seems to be busy for too long, and the kernel does not restart a receive that has a timeout: it
		// would begin to wait anew.
		if interrupted.IsZero() {
			interrupted = time.Now()
		} else if time.Since(interrupted) > patience {
			return false
		}
	}
}
