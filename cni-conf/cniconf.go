// Package cniconf holds the conflist entry of podwall and sample conflists to put it in.
package cniconf

import (
	"bytes"
	"embed"
	"fmt"
)

//go:embed podwall.conf *.conflist
var files embed.FS

// Entry returns the entry that is inserted into a conflist's plugins.
func Entry() []byte {
	data, err := files.ReadFile("podwall.conf")
	if err != nil {
		panic(err) // embedded
	}
	return bytes.TrimSpace(data)
}

// Sample returns a conflist without podwall, "ptp" or "bridge": dual stack and without masquerading, which would hide who talks to whom.
func Sample(name string) ([]byte, error) {
	data, err := files.ReadFile(name + ".conflist")
	if err != nil {
		return nil, fmt.Errorf("read sample conflist %q, there are bridge and ptp: %w", name, err)
	}
	return data, nil
}
