// Package cli runs programs made of subcommands, whose flags can also be given by the environment.
package cli

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"syscall"
)

// Exit codes of all programs, part of the contract with scripts.
const (
	OK     = 0
	Failed = 1
	Usage  = 2
	No     = 3 // the answer is no: drift, not installed
)

// ErrNo makes the exit code No after the answer has been printed.
var ErrNo = errors.New("the answer is no")

// UsageError is an error of the command line: exit code Usage.
type UsageError struct{ Err error }

// Error implements error.
func (e UsageError) Error() string { return e.Err.Error() }

// Unwrap implements errors.Unwrap.
func (e UsageError) Unwrap() error { return e.Err }

// Program is a name with its subcommands. Help has one %s, for the list of commands.
type Program struct {
	Name, Version, Help string
	Commands            []Command
}

// Command is one subcommand. Run adds its flags to the call, parses it, and acts.
type Command struct {
	Name, About string
	Run         func(ctx context.Context, c *Call) error
}

// Call is one invocation of a command.
type Call struct {
	Flags          *flag.FlagSet
	Stdout, Stderr io.Writer
	args           []string
	about          string
}

// Main runs the program until it ends or a signal ends it, and exits.
func (p Program) Main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	code := p.Run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	os.Exit(code)
}

// Run is Main without the process: it returns the exit code.
func (p Program) Run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	if len(args) == 0 {
		p.printHelp(stderr)
		return Usage
	}
	switch args[0] {
	case "help", "-h", "-help", "--help":
		p.printHelp(stdout)
		return OK
	case "version", "-version", "--version":
		_, _ = fmt.Fprintln(stdout, p.Name, p.Version)
		return OK
	}
	for _, cmd := range p.Commands {
		if cmd.Name == args[0] {
			err := cmd.Run(ctx, NewCall(p.Name+" "+cmd.Name, cmd.About, args[1:], stdout, stderr))
			return p.exitCode(err, stderr)
		}
	}
	_, _ = fmt.Fprintf(stderr, "%s: unknown command %q; '%s help' lists them\n", p.Name, args[0], p.Name)
	return Usage
}

func (p Program) exitCode(err error, stderr io.Writer) int {
	switch {
	case err == nil, errors.Is(err, flag.ErrHelp):
		return OK
	case errors.Is(err, ErrNo):
		return No
	}
	_, _ = fmt.Fprintf(stderr, "%s: %v\n", p.Name, err)
	if _, ok := errors.AsType[UsageError](err); ok {
		return Usage
	}
	return Failed
}

func (p Program) printHelp(w io.Writer) {
	var list strings.Builder
	for _, c := range append(p.Commands, Command{Name: "version", About: "print the version"}) {
		fmt.Fprintf(&list, "  %-10s %s\n", c.Name, c.About)
	}
	_, _ = fmt.Fprintf(w, p.Help, list.String())
}

// NewCall returns the invocation of a command with args.
func NewCall(name, about string, args []string, stdout, stderr io.Writer) *Call {
	c := &Call{Flags: flag.NewFlagSet(name, flag.ContinueOnError), Stdout: stdout, Stderr: stderr, args: args, about: about}
	c.Flags.SetOutput(io.Discard) // Run prints errors, once
	return c
}

// Parse reads the flags; those that were not given are taken from the environment: --log-level from PODWALL_LOG_LEVEL.
func (c *Call) Parse() error {
	err := c.Flags.Parse(c.args)
	if errors.Is(err, flag.ErrHelp) {
		_, _ = fmt.Fprintf(c.Stdout, "%s: %s.\n\nFlags:\n", c.Flags.Name(), c.about)
		c.Flags.SetOutput(c.Stdout)
		c.Flags.PrintDefaults()
		return err
	}
	if err == nil && c.Flags.NArg() > 0 {
		err = fmt.Errorf("unexpected argument %q", c.Flags.Arg(0))
	}
	if err == nil {
		err = c.fromEnvironment()
	}
	if err != nil {
		return UsageError{fmt.Errorf("%w; see %s --help", err, c.Flags.Name())}
	}
	return nil
}

func (c *Call) fromEnvironment() error {
	given := map[string]bool{}
	c.Flags.Visit(func(f *flag.Flag) { given[f.Name] = true })
	var errs []error
	c.Flags.VisitAll(func(f *flag.Flag) {
		name := "PODWALL_" + strings.ToUpper(strings.ReplaceAll(f.Name, "-", "_"))
		value, ok := os.LookupEnv(name)
		if !ok || given[f.Name] {
			return
		}
		if err := f.Value.Set(value); err != nil {
			errs = append(errs, fmt.Errorf("%s=%q: %w", name, value, err))
		}
	})
	return errors.Join(errs...)
}
