package nft

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/mdlayher/netlink"
	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

// newGeneration is the type of the one message that the kernel sends for each transaction, behind those for its objects.
const newGeneration = unix.NFNL_SUBSYS_NFTABLES<<8 | unix.NFT_MSG_NEWGEN

// onlyGenerations passes the messages of type newGeneration, which the kernel sends each in a packet of its own
// (nf_tables_gen_notify). Without a filter the objects of one large transaction overflow the socket. A netlink header begins
// with 32 bits of length; its type is in host order, while the filter loads in network order.
func onlyGenerations() ([]bpf.RawInstruction, error) {
	typ := binary.BigEndian.Uint16(binary.NativeEndian.AppendUint16(nil, newGeneration))
	return bpf.Assemble([]bpf.Instruction{
		bpf.LoadAbsolute{Off: 4, Size: 2},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: uint32(typ), SkipFalse: 1},
		bpf.RetConstant{Val: 1 << 16},
		bpf.RetConstant{Val: 0},
	})
}

// Watch calls foreign whenever another socket than this Kernel's has committed a transaction, to whatever table, with the name
// and number of the thread that did. It is called once with an empty name at the beginning, for what was before, and whenever
// messages were lost. It must not block. Watch returns when ctx ends, or with the error that ended it.
func (k *Kernel) Watch(ctx context.Context, foreign func(who string)) error {
	conn, err := k.subscribe()
	if err != nil {
		return fmt.Errorf("subscribe to nftables' generations: %w", err)
	}
	defer func() { _ = conn.Close() }()
	stop := context.AfterFunc(ctx, func() { _ = conn.Close() })
	defer stop()
	foreign("")
	for {
		msgs, err := conn.Receive()
		switch {
		case ctx.Err() != nil:
			return nil //nolint:nilerr // the connection was closed for that
		case errors.Is(err, unix.ENOBUFS):
			foreign("")
			continue
		case err != nil:
			return fmt.Errorf("receive nftables' generations: %w", err)
		}
		for _, m := range msgs {
			if m.Header.Type == newGeneration && m.Header.PID != k.nl.PID() {
				foreign(committer(m.Data))
			}
		}
	}
}

func (k *Kernel) subscribe() (*netlink.Conn, error) {
	filter, err := onlyGenerations()
	if err != nil {
		return nil, err
	}
	conn, err := netlink.Dial(unix.NETLINK_NETFILTER, &netlink.Config{NetNS: k.netNS})
	if err != nil {
		return nil, err
	}
	if err := errors.Join(conn.SetBPF(filter), conn.JoinGroup(unix.NFNLGRP_NFTABLES)); err != nil {
		return nil, errors.Join(err, conn.Close())
	}
	return conn, nil
}

// committer returns who a message of a new generation is about, e.g. "nft[4711]".
func committer(data []byte) string {
	if len(data) < 4 {
		return ""
	}
	ad, err := netlink.NewAttributeDecoder(data[4:])
	if err != nil {
		return ""
	}
	ad.ByteOrder = binary.BigEndian
	var name string
	var pid uint32
	for ad.Next() {
		switch ad.Type() {
		case unix.NFTA_GEN_PROC_NAME:
			name = ad.String()
		case unix.NFTA_GEN_PROC_PID:
			pid = ad.Uint32()
		}
	}
	if ad.Err() != nil || name == "" {
		return ""
	}
	return fmt.Sprintf("%s[%d]", name, pid)
}
