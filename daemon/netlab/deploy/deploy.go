// Package deploy runs the real daemons in a lab: concentratord on the cloud
// machine, sheafd on the router, joined by a token as an operator would.
//
//	binaries ─▶ concentratord in Lab.Cloud ─ token ─▶ sheafd --settings in Lab.Router ─▶ status: up
//
// The demo, the end-to-end tests and the benchmarks stand on it.
package deploy

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"sheaf/daemon/control/settings"
	"sheaf/daemon/netlab"
	"sheaf/webui"
)

// concentratorPort is where the routers of the lab find it.
const concentratorPort = 4443

// Deployment is a concentrator and a router in a lab.
type Deployment struct {
	Lab *netlab.Lab
	// Binaries is the directory of sheafd, sheafctl and concentratord.
	Binaries string
	// Dir holds the state of both daemons.
	Dir string
	// Log takes what the daemons write to stderr.
	Log io.Writer

	Concentrator, Router *netlab.Process
}

// New prepares a deployment; nothing runs yet.
func New(lab *netlab.Lab, binaries, dir string, log io.Writer) *Deployment {
	return &Deployment{Lab: lab, Binaries: binaries, Dir: dir, Log: log}
}

// Address is the concentrator's, as routers reach it.
func (d *Deployment) Address() string {
	return fmt.Sprintf("%s:%d", netlab.CloudAddress, concentratorPort)
}

// Socket is sheafd's.
func (d *Deployment) Socket() string { return filepath.Join(d.Dir, "sheaf.sock") }

func (d *Deployment) concentratorState() string { return filepath.Join(d.Dir, "concentrator") }

// StartConcentrator starts concentratord with further arguments.
func (d *Deployment) StartConcentrator(arguments ...string) error {
	arguments = append([]string{"run", "--state-dir", d.concentratorState()}, arguments...)
	p, err := d.start(d.Lab.Cloud, "concentratord", arguments)
	if err != nil {
		return err
	}
	d.Concentrator = p
	return d.until("concentratord answers", p, func() error {
		_, err := d.Concentratord("routers")
		return err
	})
}

// Concentratord runs one of concentratord's commands.
func (d *Deployment) Concentratord(arguments ...string) (string, error) {
	return run(d.Lab.Cloud, filepath.Join(d.Binaries, "concentratord"), append(arguments, "--state-dir", d.concentratorState())...)
}

// Token makes an enrolment token.
func (d *Deployment) Token(name string) (string, error) {
	out, err := d.Concentratord("token", "--name", name, "--address", d.Address())
	return strings.TrimSpace(out), err
}

// Settings is a settings file for the lab: every uplink on, and the token, if
// there is one.
func (d *Deployment) Settings(token string) string {
	var b strings.Builder
	b.WriteString("version: 1\nlan:\n  interfaces: [lan0]\nuplinks:\n")
	for _, u := range d.Lab.Uplinks {
		fmt.Fprintf(&b, "  - {name: uplink%d, interface: %s, mode: on, address: {method: existing}}\n", u.Number, u.Interface())
	}
	if token != "" {
		fmt.Fprintf(&b, "concentrator: {token: %s}\n", token)
	}
	return b.String()
}

// StartRouter starts sheafd with further arguments; settings, if not empty, is
// the text of --settings.
func (d *Deployment) StartRouter(settings string, further ...string) error {
	arguments := append([]string{"run", "--state-dir", filepath.Join(d.Dir, "router"), "--socket", d.Socket()}, further...)
	if settings != "" {
		file, err := d.File("settings.yaml", settings)
		if err != nil {
			return err
		}
		arguments = append(arguments, "--settings", file)
	}
	p, err := d.start(d.Lab.Router, "sheafd", arguments)
	if err != nil {
		return err
	}
	d.Router = p
	return d.until("sheafd answers", p, func() error {
		_, err := d.Status()
		return err
	})
}

// File writes a file into the deployment's directory and returns its path.
func (d *Deployment) File(name, text string) (string, error) {
	path := filepath.Join(d.Dir, name)
	return path, os.WriteFile(path, []byte(text), 0o600)
}

// Start starts everything and waits until every uplink carries.
func (d *Deployment) Start() error {
	if err := d.StartBoth(); err != nil {
		return err
	}
	return d.WaitUp()
}

// StartBoth starts a concentrator and a router with a token for it.
func (d *Deployment) StartBoth() error {
	if err := d.StartConcentrator(); err != nil {
		return err
	}
	token, err := d.Token("lab")
	if err != nil {
		return err
	}
	return d.StartRouter(d.Settings(token))
}

// WaitUp waits until the tunnel is up over every uplink that is on, with a pool
// of sessions dialled from the best.
func (d *Deployment) WaitUp() error {
	return d.Until("the tunnel is up", func(s webui.Status) error {
		if s.Tunnel.State != "up" {
			return fmt.Errorf("%s: %s", s.Tunnel.State, s.Tunnel.Reason)
		}
		on := 0
		for _, u := range s.Uplinks {
			if u.Mode == "on" {
				on++
			}
		}
		for _, u := range s.Uplinks {
			if u.Mode == "on" && s.Multipath.Wanted.PathManager == "fullmesh" && s.Multipath.Wanted.Enabled && u.Subflows < s.Concentrator.Sessions {
				return fmt.Errorf("%s has %d subflows of %d sessions", u.Name, u.Subflows, s.Concentrator.Sessions)
			}
		}
		if s.Concentrator.IdleSessions < 8 || on == 0 {
			return fmt.Errorf("%d idle sessions, %d uplinks on", s.Concentrator.IdleSessions, on)
		}
		return nil
	})
}

// Until waits until the router's status satisfies check.
func (d *Deployment) Until(what string, check func(webui.Status) error) error {
	return d.until(what, d.Router, func() error {
		s, err := d.Status()
		if err != nil {
			return err
		}
		return check(s)
	})
}

// patience is how long until waits: long, for busy machines.
const patience = 40 * time.Second

func (d *Deployment) until(what string, p *netlab.Process, check func() error) error {
	deadline := time.Now().Add(patience)
	for {
		err := check()
		if err == nil {
			return nil
		}
		select {
		case <-p.Done():
			return fmt.Errorf("waiting until %s: %s ended: %w; last: %w", what, filepath.Base(p.Cmd.Path), p.Wait(), err)
		case <-time.After(50 * time.Millisecond):
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("waiting until %s: not within %v: %w", what, patience, err)
		}
	}
}

// Status asks sheafd.
func (d *Deployment) Status() (webui.Status, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	return webui.NewClient(d.Socket()).Status(ctx)
}

// SetMode sets an uplink's mode as the operator would: on, off or backup.
func (d *Deployment) SetMode(u *netlab.Uplink, mode string) error {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	_, err := webui.NewClient(d.Socket()).SetUplink(ctx, fmt.Sprintf("uplink%d", u.Number), webui.UplinkChange{Mode: (*settings.Mode)(&mode)})
	return err
}

// Sheafctl runs sheafctl against the router.
func (d *Deployment) Sheafctl(arguments ...string) (string, error) {
	return run(d.Lab.Router, filepath.Join(d.Binaries, "sheafctl"), append([]string{"--socket", d.Socket()}, arguments...)...)
}

// Stop ends both daemons cleanly.
func (d *Deployment) Stop() error {
	var errs []error
	for _, p := range []*netlab.Process{d.Router, d.Concentrator} {
		if p == nil {
			continue
		}
		select {
		case <-p.Done():
		default:
			errs = append(errs, p.Stop(15*time.Second))
		}
	}
	return errors.Join(errs...)
}

// Network is what the kernels of both machines hold that a daemon could leave
// behind; see netlab.Host.Network.
func Network(lab *netlab.Lab) (string, error) {
	var text strings.Builder
	for _, h := range []*netlab.Host{lab.Router, lab.Cloud} {
		lines, err := network(h)
		if err != nil {
			return "", err
		}
		for line := range strings.Lines(lines) {
			fmt.Fprintf(&text, "%s: %s", h.Name, line)
		}
	}
	return text.String(), nil
}

// network is one Host's, without the limits of MPTCP: sheafd leaves them raised.
func network(h *netlab.Host) (string, error) {
	text, err := h.Network()
	if err != nil {
		return "", err
	}
	var lines []string
	for line := range strings.Lines(text) {
		if !strings.HasPrefix(line, "mptcp limit") || h.Name != "router" {
			lines = append(lines, line)
		}
	}
	return strings.Join(lines, ""), nil
}

func (d *Deployment) start(h *netlab.Host, name string, arguments []string) (*netlab.Process, error) {
	c := h.Command(filepath.Join(d.Binaries, name), arguments...)
	c.Stderr, c.Stdout = d.Log, d.Log
	return h.Start(c)
}

// run runs a command to its end and returns what it wrote to stdout.
func run(h *netlab.Host, program string, arguments ...string) (string, error) {
	var stdout, stderr bytes.Buffer
	c := h.Command(program, arguments...)
	c.Stdout, c.Stderr = &stdout, &stderr
	p, err := h.Start(c)
	if err != nil {
		return "", err
	}
	if err := p.Wait(); err != nil {
		return stdout.String(), fmt.Errorf("%s %s: %w: %s", filepath.Base(program), strings.Join(arguments, " "), err, strings.TrimSpace(stderr.String()))
	}
	return stdout.String(), nil
}
