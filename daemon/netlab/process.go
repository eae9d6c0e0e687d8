package netlab

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// A Process is a child process in a Host's namespace.
type Process struct {
	Cmd *exec.Cmd

	host *Host
	done chan struct{} // closed when the process has ended and was reaped
	err  error         // of exec.Cmd.Wait, valid after done
}

// Command prepares a process for Start.
func (h *Host) Command(name string, arguments ...string) *exec.Cmd {
	return exec.Command(name, arguments...)
}

// Start starts the command in the Host. It is killed with the Host, and by the
// kernel when this process ends in any way.
func (h *Host) Start(cmd *exec.Cmd) (*Process, error) {
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	cmd.SysProcAttr.Pdeathsig = syscall.SIGKILL
	p := &Process{Cmd: cmd, host: h, done: make(chan struct{})}

	h.mu.Lock()
	defer h.mu.Unlock()
	if h.namespace < 0 {
		return nil, fmt.Errorf("netlab: start %s: host %s is closed", cmd.Path, h.Name)
	}
	started := make(chan error)
	h.owned <- func() { started <- cmd.Start() }
	if err := <-started; err != nil {
		return nil, fmt.Errorf("netlab: start %s in %s: %w", cmd.Path, h.Name, err)
	}
	h.processes[p] = struct{}{}
	go p.reap()
	return p, nil
}

func (p *Process) reap() {
	p.err = p.Cmd.Wait()
	p.host.mu.Lock()
	delete(p.host.processes, p)
	p.host.mu.Unlock()
	close(p.done)
}

// Pid is the number of the process.
func (p *Process) Pid() int { return p.Cmd.Process.Pid }

// Done is closed when the process has ended.
func (p *Process) Done() <-chan struct{} { return p.done }

// Wait waits for the end of the process and returns what exec.Cmd.Wait would,
// to any number of callers.
func (p *Process) Wait() error {
	<-p.done
	return p.err
}

// Kill ends the process by SIGKILL and waits until it is gone.
func (p *Process) Kill() error {
	if err := p.signal(syscall.SIGKILL); err != nil {
		return err
	}
	<-p.done
	return nil
}

// Stop asks the process to end by SIGTERM and returns its Wait. If it is still
// there after the timeout, Stop kills it and says so.
func (p *Process) Stop(timeout time.Duration) error {
	if err := p.signal(syscall.SIGTERM); err != nil {
		return err
	}
	select {
	case <-p.done:
		return p.err
	case <-time.After(timeout):
	}
	if err := p.Kill(); err != nil {
		return err
	}
	return fmt.Errorf("netlab: %s (pid %d) in %s had to be killed: still running %v after SIGTERM",
		p.Cmd.Path, p.Pid(), p.host.Name, timeout)
}

func (p *Process) signal(s syscall.Signal) error {
	err := p.Cmd.Process.Signal(s)
	if err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("netlab: send %v to %s (pid %d): %w", s, p.Cmd.Path, p.Pid(), err)
	}
	return nil
}

// Usage is what a process has used so far.
type Usage struct {
	CPU          time.Duration // user and system time of all threads; the kernel counts in 10 ms
	Resident     int64         // bytes of memory now (VmRSS)
	PeakResident int64         // bytes of memory at most (VmHWM)
}

// Usage reads what the process has used.
func (p *Process) Usage() (Usage, error) { return ReadUsage(p.Pid()) }

// ReadUsage reads what the process of this number has used.
func ReadUsage(pid int) (Usage, error) {
	var u Usage
	path := fmt.Sprintf("/proc/%d/stat", pid)
	stat, err := os.ReadFile(path)
	if err != nil {
		return u, fmt.Errorf("netlab: usage: %w", err)
	}
	// The command's name, in parentheses, may itself contain anything.
	fields := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:]))
	if len(fields) < 13 {
		return u, fmt.Errorf("netlab: usage: %s has %d fields after the name, want at least 13", path, len(fields))
	}
	for _, ticks := range fields[11:13] {
		n, err := strconv.ParseInt(ticks, 10, 64)
		if err != nil {
			return u, fmt.Errorf("netlab: usage: %s: %w", path, err)
		}
		u.CPU += time.Duration(n) * time.Second / 100 // USER_HZ
	}
	path = fmt.Sprintf("/proc/%d/status", pid)
	status, err := os.ReadFile(path)
	if err != nil {
		return u, fmt.Errorf("netlab: usage: %w", err)
	}
	for line := range strings.Lines(string(status)) {
		key, value, _ := strings.Cut(line, ":")
		var target *int64
		switch key {
		case "VmRSS":
			target = &u.Resident
		case "VmHWM":
			target = &u.PeakResident
		default:
			continue
		}
		kB, err := strconv.ParseInt(strings.TrimSuffix(strings.TrimSpace(value), " kB"), 10, 64)
		if err != nil {
			return u, fmt.Errorf("netlab: usage: %s: %s: %w", path, key, err)
		}
		*target = kB << 10
	}
	if u.Resident == 0 {
		return u, fmt.Errorf("netlab: usage: process %d has ended", pid)
	}
	return u, nil
}
