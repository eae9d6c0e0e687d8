package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"time"

	"sheaf/daemon/netlab"
	"sheaf/daemon/netlab/deploy"
)

type demoOptions struct {
	megabytes int
	hold      bool
}

// pulledAfter is when the demo pulls an uplink, and pulledFor how long for.
const (
	pulledAfter = 2 * time.Second
	pulledFor   = 3 * time.Second
)

// result is a line of the demo's table.
type result struct {
	what    string
	mbits   float64
	seconds float64
	longest time.Duration // without a byte
}

// demo lets a stock client download from a stock server, both of which know
// nothing of Sheaf: curl and busybox httpd.
func demo(ctx context.Context, binaries string, o demoOptions) (err error) {
	for _, program := range []string{"curl", "busybox"} {
		if _, err := exec.LookPath(program); err != nil {
			return fmt.Errorf("%s is not installed: apt-get install %s", program, program)
		}
	}
	fmt.Println("A LAN client, a router with three uplinks, a concentrator and a web server,")
	fmt.Println("each in a network namespace of its own:")
	for i, s := range uplinks {
		fmt.Printf("  uplink%d  %2.0f Mbit/s, %2.0f ms each way\n", i+1, s.Rate/1e6, s.Delay.Seconds()*1000)
	}
	fmt.Println()
	return withLab(netlab.Config{Uplinks: uplinks, Seed: 1}, func(lab *netlab.Lab) error {
		dir, err := os.MkdirTemp("", "sheaf-demo-")
		if err != nil {
			return err
		}
		defer func() { _ = os.RemoveAll(dir) }()
		if err := os.Chmod(dir, 0o755); err != nil { // busybox httpd serves it
			return err
		}
		file, err := os.Create(filepath.Join(dir, "file"))
		if err != nil {
			return err
		}
		if err := errors.Join(file.Truncate(int64(o.megabytes)*1e6), file.Close()); err != nil {
			return err
		}
		httpd := lab.Server.Command("busybox", "httpd", "-f", "-p", netlab.ServerAddress+":80", "-h", dir)
		if _, err := lab.Server.Start(httpd); err != nil {
			return err
		}

		var table []result
		alone, err := download(ctx, lab, o, "uplink1 alone, without Sheaf")
		if err != nil {
			return err
		}
		table = append(table, alone)
		return withBond(lab, binaries, func(d *deploy.Deployment) error {
			bonded, err := download(ctx, lab, o, "all three, bonded")
			if err != nil {
				return err
			}
			table = append(table, bonded)

			var pull errorBox
			timer := time.AfterFunc(pulledAfter, func() {
				fmt.Println("  -- uplink1 is pulled: every frame is swallowed, nobody is told")
				pull.set(lab.Uplinks[0].BlackHole(true))
			})
			back := time.AfterFunc(pulledAfter+pulledFor, func() {
				fmt.Println("  -- uplink1 is back")
				pull.set(lab.Uplinks[0].BlackHole(false))
			})
			pulled, err := download(ctx, lab, o, fmt.Sprintf("bonded, uplink1 pulled for %v", pulledFor))
			timer.Stop()
			if back.Stop() { // a short download may be through before
				pull.set(lab.Uplinks[0].BlackHole(false))
			}
			if err := errors.Join(err, pull.get()); err != nil {
				return err
			}
			table = append(table, pulled)

			fmt.Println()
			if out, err := d.Sheafctl("status"); err == nil {
				fmt.Println(strings.TrimRight(out, "\n"))
			}
			limit := payloadLimit(uplinks)
			fmt.Printf("\n%-40s %10s %8s %12s %14s\n", fmt.Sprintf("one download of %d MB by curl", o.megabytes), "Mbit/s", "seconds", "of the sum", "longest gap")
			for _, r := range table {
				fmt.Printf("%-40s %10.1f %8.1f %11.0f%% %11d ms\n", r.what, r.mbits, r.seconds, r.mbits*1e6/limit*100, r.longest.Milliseconds())
			}
			if o.hold {
				client, err := lab.LAN.Start(lab.LAN.Command("busybox", "sleep", "1000000"))
				if err != nil {
					return err
				}
				ctl := filepath.Join(binaries, "sheafctl") + " --socket " + d.Socket()
				fmt.Printf("\nThe lab stays up until Ctrl-C. In another terminal, as root:\n"+
					"  nsenter -t %d -n curl -o /dev/null http://%s/file    # a LAN client\n"+
					"  watch %s uplinks\n  %s uplink set uplink1 --mode off\n", client.Pid(), netlab.ServerAddress, ctl, ctl)
				<-ctx.Done()
			}
			return nil
		})
	})
}

// errorBox carries an error out of a timer.
type errorBox struct{ p atomic.Pointer[error] }

func (b *errorBox) set(err error) {
	if err != nil {
		b.p.Store(&err)
	}
}

func (b *errorBox) get() error {
	if err := b.p.Load(); err != nil {
		return *err
	}
	return nil
}

// download lets curl fetch the file in the LAN, and prints a line every half
// second.
func download(ctx context.Context, lab *netlab.Lab, o demoOptions, what string) (result, error) {
	fmt.Println(what)
	r, w, err := os.Pipe()
	if err != nil {
		return result{}, err
	}
	defer func() { _ = r.Close() }()
	var stderr bytes.Buffer
	curl := lab.LAN.Command("curl", "--silent", "--show-error", "--fail", "--max-time", "120", "http://"+netlab.ServerAddress+"/file")
	curl.Stdout, curl.Stderr = w, &stderr
	before := counters(lab)
	begin := time.Now()
	process, err := lab.LAN.Start(curl)
	_ = w.Close()
	if err != nil {
		return result{}, err
	}
	stop := context.AfterFunc(ctx, func() { _ = process.Kill() })
	defer stop()

	var total atomic.Int64
	done := make(chan struct{})
	go live(lab, &total, before, done)
	var longest time.Duration
	last := begin
	in := bufio.NewReaderSize(r, 1<<16)
	for {
		n, err := in.Read(make([]byte, 1<<16))
		now := time.Now()
		longest = max(longest, now.Sub(last))
		last = now
		total.Add(int64(n))
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return result{}, err
		}
	}
	close(done)
	elapsed := time.Since(begin).Seconds()
	if err := process.Wait(); err != nil {
		return result{}, fmt.Errorf("curl: %w: %s", err, strings.TrimSpace(stderr.String()))
	}
	if total.Load() != int64(o.megabytes)*1e6 {
		return result{}, fmt.Errorf("curl received %d of %d bytes", total.Load(), int64(o.megabytes)*1e6)
	}
	return result{what, float64(total.Load()) * 8 / elapsed / 1e6, elapsed, longest}, nil
}

// counters are the bytes that have come down each uplink.
func counters(lab *netlab.Lab) []uint64 {
	list := make([]uint64, len(lab.Uplinks))
	for i, u := range lab.Uplinks {
		_, down := u.Counters()
		list[i] = down.Bytes
	}
	return list
}

func live(lab *netlab.Lab, total *atomic.Int64, before []uint64, done <-chan struct{}) {
	const every = 500 * time.Millisecond
	tick := time.NewTicker(every)
	defer tick.Stop()
	lastTotal := int64(0)
	for second := every; ; second += every {
		select {
		case <-done:
			return
		case <-tick.C:
		}
		now := total.Load()
		current := counters(lab)
		line := fmt.Sprintf("  %4.1f s  %5.1f Mbit/s ", second.Seconds(), float64(now-lastTotal)*8/every.Seconds()/1e6)
		for i := range current {
			rate := float64(current[i]-before[i]) * 8 / every.Seconds() / 1e6
			line += fmt.Sprintf("  %s %5.1f %-10s", fmt.Sprintf("uplink%d", i+1), rate, strings.Repeat("#", int(rate/5+0.5)))
		}
		fmt.Println(strings.TrimRight(line, " "))
		lastTotal, before = now, current
	}
}
