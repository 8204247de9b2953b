package cli

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
)

// greet is a program of one command that prints its flag.
func greet() Program {
	return Program{Name: "greet", Version: "v1", Help: "greet greets.\n%s", Commands: []Command{{
		Name: "hello", About: "say hello", Run: func(_ context.Context, c *Call) error {
			name := c.Flags.String("your-name", "world", "`NAME` to greet")
			if err := c.Parse(); err != nil {
				return err
			}
			switch *name {
			case "nobody":
				return ErrNo
			case "trouble":
				return errors.New("no such luck")
			case "":
				return UsageError{errors.New("--your-name is empty")}
			}
			_, err := fmt.Fprintln(c.Stdout, "hello", *name)
			return err
		},
	}}}
}

func TestRun(t *testing.T) {
	for _, tt := range []struct {
		name           string
		args           []string
		env            string
		code           int
		stdout, stderr string // parts of
	}{
		{name: "nothing", code: Usage, stderr: "say hello"},
		{name: "help", args: []string{"--help"}, code: OK, stdout: "say hello"},
		{name: "version", args: []string{"--version"}, code: OK, stdout: "greet v1"},
		{name: "unknown", args: []string{"bye"}, code: Usage, stderr: `unknown command "bye"`},
		{name: "default", args: []string{"hello"}, code: OK, stdout: "hello world"},
		{name: "flag", args: []string{"hello", "--your-name=you"}, code: OK, stdout: "hello you"},
		{name: "environment", args: []string{"hello"}, env: "env", code: OK, stdout: "hello env"},
		{name: "flag before environment", args: []string{"hello", "--your-name=you"}, env: "env", code: OK, stdout: "hello you"},
		{name: "help of a command", args: []string{"hello", "-h"}, code: OK, stdout: "NAME to greet"},
		{name: "unknown flag", args: []string{"hello", "--x"}, code: Usage, stderr: "see greet hello --help"},
		{name: "argument", args: []string{"hello", "you"}, code: Usage, stderr: `unexpected argument "you"`},
		{name: "no", args: []string{"hello", "--your-name=nobody"}, code: No},
		{name: "failure", args: []string{"hello", "--your-name=trouble"}, code: Failed, stderr: "greet: no such luck"},
		{name: "usage", args: []string{"hello", "--your-name="}, code: Usage, stderr: "is empty"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if tt.env != "" {
				t.Setenv("PODWALL_YOUR_NAME", tt.env)
			}
			var stdout, stderr bytes.Buffer
			if code := greet().Run(t.Context(), tt.args, &stdout, &stderr); code != tt.code {
				t.Errorf("exit code %d, want %d", code, tt.code)
			}
			if !strings.Contains(stdout.String(), tt.stdout) || !strings.Contains(stderr.String(), tt.stderr) {
				t.Errorf("stdout:\n%s\nstderr:\n%s", &stdout, &stderr)
			}
		})
	}
}
